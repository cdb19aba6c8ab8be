"""The processes of one run: one alone, or several under torchrun that must agree.

Every function works in both cases. Read after nothing.
"""
import torch
import torch.distributed as dist


def join():
    """Meet the other processes, if torchrun started this one."""
    if dist.is_torchelastic_launched():
        dist.init_process_group()           # gloo for tensors of a CPU, nccl for those of a GPU


def leave():
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    """Print, from the first process."""
    if rank() == 0:
        print(text, flush=True)


def device(name):
    """Turn --device into a torch.device; under torchrun on GPUs, into this process's own.

    Raises:
        ValueError: this computer has none
    """
    here = [kind for kind, place in (("cuda", torch.cuda), ("mps", torch.backends.mps),
                                     ("cpu", torch.cpu)) if place.is_available()]
    name = here[0] if name == "auto" else str(name)
    kind, colon, number = name.partition(":")
    numbers = range(torch.cuda.device_count() if kind == "cuda" else 1)
    if kind not in here or colon and number not in map(str, numbers):
        raise ValueError(f"device {name} is not available here: this computer has "
                         f"{', '.join(here)}" + f"; {kind}: {len(numbers)}" * (kind in here))
    if name == "cuda" and world() > 1:
        name = f"cuda:{dist.get_node_local_rank()}"
        torch.cuda.set_device(name)
    return torch.device(name)


def mean(numbers, on):
    """Average a list of numbers over all processes; `on` is the torch.device of the model."""
    if world() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float32, device=on)
    dist.all_reduce(sums)
    return (sums / world()).tolist()


def any_of(flag, on):
    """Whether the flag is true in any process."""
    return mean([float(flag)], on)[0] > 0
