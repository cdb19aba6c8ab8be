"""While a run trains: what is due when, what is kept, how it is stopped and what errors say."""
import contextlib
import json
import os
import signal

import pytest
import torch
from test_folder import at_step, begin, few_validation_images, go_on, saved  # noqa: F401

from detr_min.data import coco_json
from detr_min.run import checkpoints, loop


@pytest.mark.parametrize("steps, times, due", [
    (10, 5, [2, 4, 6, 8, 10]), (7, 3, [3, 6, 7]), (3, 40, [1, 2, 3])])
def test_what_is_due_and_when(tmp_path, steps, times, due):
    """So many times in a run, and always at its end."""
    run = begin(tmp_path / "run", steps=steps)
    assert [step for step in range(1, steps + 1) if run.is_due(step, times)] == due


def test_the_best_model_is_kept(tmp_path, monkeypatch, no_pictures):
    """best.pt holds the weights of the highest AP, last.pt those of the last save."""
    scores = iter([0.2, 0.5, None, 0.4])
    names = ("AP", "AP50", "AP75")
    monkeypatch.setattr(loop.evaluate, "evaluate", lambda *args, **words: (
        dict.fromkeys(names, next(scores)), "table"))
    run = begin(tmp_path / "run")
    for step in (1, 2, 3, 4):
        run.progress["step"] = step
        run.validate()
    assert checkpoints.read(tmp_path / "run" / "best.pt")["progress"]["step"] == 2
    assert run.progress["best_AP"] == 0.5 and run.result[1] == "table"
    lines = [*map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())]
    assert [line["val"]["AP"] for line in lines] == [0.2, 0.5, None, 0.4]


def test_a_resumed_run_still_knows_its_earlier_validations(tmp_path, monkeypatch, capsys,
                                                           no_pictures):
    """Whether AP was rising is said from the log, which is cut to the step that was saved."""
    scores = iter([0.2, 0.9, 0.3, 0.3, 0.3, 0.3])       # 0.9 comes after the save, and is undone
    monkeypatch.setattr(loop.evaluate, "evaluate", lambda *args, **words: (
        dict.fromkeys(("AP", "AP50", "AP75"), next(scores)), "table"))
    run = saved(tmp_path / "run", step=2)
    for step in (2, 3):
        run.progress["step"] = step
        run.validate()
    run.config_file.close()
    for _ in range(2):                                      # the second time, after its last step
        run = at_step(go_on(tmp_path / "run"), 6)
        run.validate()
        run.finish()
        said = capsys.readouterr().out.splitlines()[-1]
        assert said == "AP 0.300  AP50 0.300  still rising: it was 0.200 at step 2"
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert metrics["best_before"] == {"AP": 0.2, "step": 2}
        run.save("last.pt")
        run.config_file.close()


def test_curves_and_predictions_are_drawn_at_each_validation(tmp_path):
    """So that a person sees what has been learned before the run ends."""
    run, drawn = begin(tmp_path / "run"), ("curves.png", "predictions.png")
    for step in (1, 2):
        run.progress["step"] = step
        run.validate()
        for name in drawn:
            assert (tmp_path / "run" / name).read_bytes()[1:4] == b"PNG"
            (tmp_path / "run" / name).unlink()
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_only_a_last_pt_that_was_written_counts_as_saved(tmp_path, monkeypatch):
    """Not best.pt, from which no run goes on, and not one for which the disk was full."""
    def full(*args):
        raise OSError("full")

    run = at_step(begin(tmp_path / "run"), 3)
    run.save("best.pt")
    assert run.progress["saved"] == 0
    with pytest.raises(OSError, match="full; nothing is saved yet in .*: begin anew"):
        with run.saved_named(), monkeypatch.context() as patch:
            patch.setattr(checkpoints, "save", full)
            run.save("last.pt")
    run.save("last.pt")
    assert run.progress["saved"] == 3
    assert checkpoints.read(tmp_path / "run")["progress"]["saved"] == 3


@pytest.mark.parametrize("error, meaning", [
    (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "), "reads pictures was"),
    (EOFError(), "reads pictures was"), (ConnectionResetError(104, "reset"), "reads pictures was"),
    (RuntimeError("[pair.cc:1] Connection closed by peer [::1]"), "another process of this run"),
    (RuntimeError("CUDA out of memory. Tried"), "memory is full"), (MemoryError(), "memory is"),
    (coco_json.DataError("a.png cannot be read"), "a.png cannot be read")])
def test_a_process_or_memory_that_is_gone_is_named(error, meaning, tmp_path):
    run = saved(tmp_path / "run", step=2)
    with pytest.raises(OSError, match=f"{meaning}.*; step 2 is the last one saved in .*--resume"):
        with run.saved_named():
            raise error
    assert run.config_file.closed                           # another process may go on here
    with pytest.raises(RuntimeError, match="^a defect$"):
        with run.saved_named():
            raise RuntimeError("a defect")


def test_what_a_step_leaves_to_chance_follows_from_seed_and_step(tmp_path):
    """Dropout, say: a resumed run draws what the straight one draws, another step other numbers."""
    def drawn(run):
        return [torch.rand(3) for _ in run.batches()]
    straight = drawn(begin(tmp_path / "straight"))
    torch.rand(5)
    saved(tmp_path / "run", step=2)
    resumed = drawn(go_on(tmp_path / "run"))
    assert all(map(torch.equal, resumed, straight[2:])) and len(resumed) == 4
    assert len({tuple(numbers.tolist()) for numbers in straight}) == 6


def test_an_error_names_step_images_and_what_is_saved(tmp_path):
    run = saved(tmp_path / "run", step=2)
    _, (_, _, targets) = next(run.batches())
    with pytest.raises(ValueError, match=r"step 5, learning rate 0.25: told \(images \[\d, \d\]\); "
                                         "step 2 is the last one saved"):
        with run.faults_named(5, 0.25, targets):
            raise ValueError("told")


def test_a_mistake_in_code_is_not_dressed_up(tmp_path):
    run = saved(tmp_path / "run", step=2)
    with pytest.raises(ValueError, match="^0 is not in list"):
        with run.faults_named(5, 0.25, []):
            [].index(0)


def test_signals_go_back_to_what_they_did():
    before = signal.getsignal(signal.SIGINT)
    interrupt = loop.Interrupt()
    assert signal.getsignal(signal.SIGINT) == interrupt.request != before
    interrupt.release()
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(number):
    loop.check_finite(torch.tensor(1.))
    with pytest.raises(ValueError, match="not finite: a lower --lr may help"):
        loop.check_finite(torch.tensor(number))


@contextlib.contextmanager
def own_handlers():
    """The process's own signal handlers come back afterwards."""
    names = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(name) for name in names]
    try:
        yield
    finally:
        for name, handler in zip(names, before):
            signal.signal(name, handler)


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_the_second_ends_all(name):
    with own_handlers():
        interrupt = loop.Interrupt()
        assert not interrupt.requested
        os.kill(os.getpid(), name)
        assert interrupt.requested
        with pytest.raises(SystemExit) as stop:
            os.kill(os.getpid(), name)
        assert stop.value.code == 130
