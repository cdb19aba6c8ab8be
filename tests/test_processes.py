"""One process alone, and two that agree."""
import pytest
import torch
import torch.distributed as dist

from detr_min.run import processes


def test_one_process_is_the_first_of_one(capsys):
    assert (processes.rank(), processes.world()) == (0, 1)
    assert processes.mean([1, 2.5], torch.device("cpu")) == [1, 2.5]
    assert processes.any_of(True, torch.device("cpu")) is True
    assert processes.any_of(False, torch.device("cpu")) is False
    processes.join()                                        # without torchrun: nothing to meet
    assert not dist.is_initialized()
    processes.leave()
    processes.say("said")
    assert capsys.readouterr().out == "said\n"


def test_device():
    assert processes.device("cpu") == processes.device(torch.device("cpu")) == torch.device("cpu")
    assert processes.device("auto").type in ("cpu", "cuda", "mps")
    absent = [kind for kind, place in (("cuda", torch.cuda), ("mps", torch.backends.mps))
              if not place.is_available()]
    for kind in absent:
        with pytest.raises(ValueError, match=f"device {kind} is not available here: .*cpu"):
            processes.device(kind)
        with pytest.raises(ValueError, match=f"device {kind}:1 is not available"):
            processes.device(f"{kind}:1")


def test_a_device_beyond_the_last_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert processes.device("cuda:1") == torch.device("cuda", 1)
    for name in ("cuda:2", "cuda:x", "cuda:", "cpu:1"):
        with pytest.raises(ValueError, match=f"device {name} is not available here: .*cuda, .*; c"):
            processes.device(name)


def one_process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    cpu = torch.device("cpu")
    found = {"who": (processes.rank(), processes.world()),
             "mean": processes.mean([rank, 10.0], cpu),
             "any": [processes.any_of(rank == one, cpu) for one in (0, 1, 2)]}
    torch.save(found, f"{folder}/{rank}.pt")
    processes.leave()


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    torch.multiprocessing.spawn(one_process, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found == {"who": (rank, 2), "mean": [0.5, 10.0], "any": [True, True, False]}
