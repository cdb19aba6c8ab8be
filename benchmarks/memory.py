"""Peak memory of a training step beyond what the built model takes, one side in one process.

    python -m benchmarks.memory CASE ours|transformers cpu|cuda THREADS     # prints json, bytes

`speed.py` starts one such process a side. Read `cases.py` before.
"""
import json
import pathlib
import resource
import subprocess
import sys

import torch

from benchmarks import cases, clock

STEPS = 3               # gradients and the optimizer's state are there from the second on


def of_process(field):
    """Bytes of memory of this process: VmRSS, what it holds; VmHWM, the most it has held.

    Elsewhere than on Linux both are ru_maxrss, the most. Linux's own ru_maxrss would not do: a
    process starts with its parent's.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        line = next(li for li in status.read_text().splitlines() if li.startswith(field + ":"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def peak_of_steps(case, side, device):
    """Bytes that training steps take at most, beyond those after imports and building."""
    net = cases.build_ours(case)
    if side == "transformers":
        net = cases.build_theirs(case, net.backbone)
    batch, net = cases.batch_of(case), net.to(device)
    step = cases.step_of(case, net, is_ours=side == "ours")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = of_process("VmRSS")
    for number in range(STEPS):
        step(batch, number + 1)
    clock.wait(device)
    most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else of_process("VmHWM")
    return most - before


def in_fresh_process(name, side, device, threads):
    """peak_of_steps in a process of its own.

    Raises:
        ValueError: it failed, with its last line
    """
    command = [sys.executable, "-m", "benchmarks.memory", name, side, device.type, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True,
                          cwd=pathlib.Path(__file__).parent.parent)
    if done.returncode:
        raise ValueError(f"{' '.join(command[2:])}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])["bytes"]


def main():
    """Run the command line."""
    name, side, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps({"bytes": peak_of_steps(cases.MODELS[name], side, torch.device(device))}))


if __name__ == "__main__":
    main()
