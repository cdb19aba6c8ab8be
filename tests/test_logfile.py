"""log.jsonl: means over steps, and no line of a future that a crash undid."""
import json
import math

import pytest
import torch

from detr_min import criterion
from detr_min.run import logfile


def parts(cls, pairs, names=("O", "C")):
    """Parts whose l1 is 10 and whose giou is 100 times their cls."""
    return {name: criterion.Parts(torch.tensor(cls), torch.tensor(10 * cls),
                                  torch.tensor(100 * cls), pairs) for name in names}


def test_a_line_is_the_mean_since_the_last_one(tmp_path):
    """cls 1 and 3: mean 2, l1 20, giou 200; both decoders: loss 2 * 222."""
    log = logfile.Log(tmp_path / "log.jsonl", last_step=0)
    log.add(parts(1., 4), objects=5.)
    log.add(parts(3., 7), objects=8.)
    line = log.line(2, list, lr=0.1)
    assert line["step"] == 2 and line["lr"] == 0.1 and line["objects"] == 6.5
    assert line["O"] == line["C"] == {"cls": 2, "l1": 20, "giou": 200, "pairs": 5.5}
    assert line["loss"] == 2 * 222 and line["ms"] > 0 and line["cpu_s"] >= 0
    log.add(parts(7., 1), objects=1.)                       # the next line starts anew
    assert log.line(3, list)["O"]["cls"] == 7


def test_means_are_taken_over_processes_by_what_is_given(tmp_path):
    log = logfile.Log(tmp_path / "log.jsonl", 0)
    log.add(parts(1., 4), objects=5.)
    line = log.line(1, lambda numbers: [2 * number for number in numbers])
    assert line["O"] == {"cls": 2, "l1": 20, "giou": 200, "pairs": 8}
    assert line["loss"] == 2 * 222


def test_the_terms_carry_no_gradient(tmp_path):
    """Else the log would keep the graphs of all steps in memory."""
    log, leaf = logfile.Log(tmp_path / "log.jsonl", 0), torch.tensor(1., requires_grad=True)
    log.add({"O": criterion.Parts(leaf * 1, leaf * 2, leaf * 3, 1)})
    terms, _, _ = log.steps[0]
    assert not terms["O"].requires_grad


def test_lines_are_written_and_shown(tmp_path, capsys):
    log = logfile.Log(tmp_path / "log.jsonl", 0)
    log.write({"step": 1}, "shown")
    log.write({"step": 2}, "hidden", visible=False)
    assert [*map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())] == [
        {"step": 1}, {"step": 2}]
    out = capsys.readouterr()
    assert "shown" in out.out + out.err and "hidden" not in out.out + out.err


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "[1]", "{}", "null", "\x00\x01",
                                  '{"step": "1"}', '{"step": true}', "[" * 10 ** 5,
                                  '{"step": 1, "val": 3}', '{"step": 1, "val": {"AP": 1}}',
                                  '{"step": 1, "val": {"AP": "x", "AP50": 0, "AP75": 0}}',
                                  '{"step": 1, "loss": "x"}', '{"step": 1, "loss": 1e999}',
                                  '{"step": 1, "O": {"cls": 1}}', '{"step": 1, "O": 5}'])
def test_lines_after_the_last_save_are_dropped(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n' + torn)
    logfile.Log(path, last_step=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_validation_is_written_once(tmp_path):
    """A run that was stopped after its last step validates again when it is resumed."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 2}\n{"step": 2, "val": 1}\n')
    log = logfile.Log(path, last_step=2)
    log.write({"step": 2, "val": 1}, "shown")
    log.write({"step": 3, "val": 1}, "shown")
    assert path.read_text() == '{"step": 2}\n{"step": 2, "val": 1}\n{"step": 3, "val": 1}\n'


def test_a_crash_while_lines_are_dropped_loses_none(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 5}\n')
    monkeypatch.setattr(logfile.os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logfile.Log(path, last_step=1)
    assert path.read_text() == '{"step": 1}\n{"step": 5}\n'


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    log = logfile.Log(tmp_path / "log.jsonl", 0)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(OSError, match="log.jsonl could not be written .*is the disk full"):
        log.write({"step": 1}, "shown")


def test_a_line_for_people():
    """Sums of terms by decoder, objects and the queries that each decoder matched."""
    terms = {"cls": 1.0, "l1": 2.0, "giou": 3.0, "pairs": 7.0}
    line = {"step": 40, "loss": 12.0, "O": terms, "C": {**terms, "pairs": 31.5},
            "encoder": terms, "objects": 7.0, "ms": 123.4}
    assert logfile.describe(line) == (
        "step 40 | loss 12.00 = O (cls 1.00 + l1 2.00 + giou 3.00) + C (cls 1.00 + l1 2.00 + giou "
        "3.00) + encoder (cls 1.00 + l1 2.00 + giou 3.00) | objects 7.0, queries matched O 7.0 / C "
        "31.5 | 123 ms")
    assert "+ mine (cls 1.00 + l1 2.00" in logfile.describe({**line, "mine": terms})
    torn = {"step": 4, "mine": {**terms, "cls": math.nan}}
    assert logfile.step_of(json.dumps(torn)) == math.inf


@pytest.mark.parametrize("scores, best, says", [
    ([.1, .5, .511], (.5, 2), "still rising: it was 0.500 at step 2"),
    ([.1, .5, .51], (.5, 2), "not rising: it was 0.500 at step 2"),          # .01 is no rise yet
    ([.5, .1, .49], (.5, 1), "not rising: it was 0.500 at step 1, in best.pt"),
    ([.5, .1, .489], (.5, 1), "below its best: it was 0.500 at step 1, in best.pt"),
    ([.0, .0], (.0, 1), "not rising: it was 0.000 at step 1"),
    ([.3], None, "validated once, so whether it was still rising is not known"),
    ([None, None], None, "there is no object to find")])
def test_whether_ap_was_still_rising(tmp_path, scores, best, says):
    """The last validation against the best before it, so that one bad validation is no rise."""
    lines = []
    for step, ap in enumerate(scores, start=1):
        lines += [{"step": step, "loss": 1.0}, {"step": step, "val": {"AP": ap, "AP50": .9}}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = logfile.best_before(tmp_path / "log.jsonl")
    assert before == (best and dict(zip(("AP", "step"), best)))
    assert logfile.trend(scores[-1], before) == says
