"""benchmarks/: its arithmetic by hand, and its commands on tiny shapes.

What needs Hugging Face transformers is skipped without it.
"""
import dataclasses
import json
import math

import pytest
import torch
from torch.testing import assert_close

from benchmarks import cases, clock, detectors, learn, memory, speed, theirs
from detr_min import model
from detr_min.data import dataset
from detr_min.run import evaluate, sets


def test_spread_by_hand():
    """Of 1, 2, 3, 4, 10 the middle is 3, the quarters fall on 2 and 4; one number has no width."""
    assert clock.spread([10, 2, 4, 1, 3]) == {"median": 3, "q1": 2, "q3": 4}
    assert clock.spread([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}


def test_a_ratio_is_taken_pair_by_pair():
    """In the second round all is three times slower: the ratios of pairs, 2, 2, 4, do not notice;
    that of medians would be 6 / 2 = 3."""
    ours = [clock.Stretch(1, 2), clock.Stretch(3, 6), clock.Stretch(2, 4)]
    others = [clock.Stretch(2, 2), clock.Stretch(6, 6), clock.Stretch(8, 8)]
    found = clock.compare(ours, others)
    assert found["ratio"]["wall"] == {"median": 2, "q1": 2, "q3": 3}
    assert found["ratio"]["cpu"]["median"] == 1
    assert found["ours"]["wall"]["median"] == 2 and found["theirs"]["wall"]["median"] == 6


def test_both_sides_run_in_turn(monkeypatch):
    monkeypatch.setattr(clock, "LEAST", 0.0)
    order = []
    seen = clock.alternate(lambda: order.append("o"), lambda: order.append("t"), 4,
                           torch.device("cpu"))
    assert "".join(order) == "otot" + "ot" + "to" + "ot" + "to"        # two rounds warm up
    assert [len(side) for side in seen] == [4, 4]


def test_levels_are_those_of_the_backbone():
    """800 x 1333 pixels give the levels that Deformable DETR's users see."""
    assert cases.levels(800, 1333, 4) == [(100, 167), (50, 84), (25, 42), (13, 21)]
    ours, images = cases.build_ours(cases.MODELS["shapes"]), torch.zeros(1, 3, 128, 128)
    shapes = [tuple(x.shape[-2:]) for x in ours.projections(ours.backbone(images))]
    assert shapes == cases.ATTENTIONS["encoder_shapes"].spatial_shapes


@pytest.mark.parametrize("name, most", [("decoder_800_300", 0.2), ("decoder_shapes", 0.2),
                                        ("encoder_512", 0.3), ("encoder_shapes", 0.5)])
def test_some_of_the_points_lie_outside_as_a_model_has_them(name, most):
    """Around boxes few; around cells more, as the ring of 4 cells is wide on a level of 4 x 4."""
    case = cases.ATTENTIONS[name]
    value, locations, weights = cases.attention_inputs(case, torch.device("cpu"))
    S = sum(h * w for h, w in case.spatial_shapes)
    assert value.shape == (case.B, S, case.H, case.width)
    assert locations.shape == (case.B, case.N or S, case.H, len(case.spatial_shapes), case.K, 2)
    assert_close(weights.sum((-1, -2)), torch.ones(locations.shape[:3]))
    assert 0 < cases.outside(locations) < most


def test_different_answers_are_not_timed():
    speed.check_alike("same", 1e-6)
    for most in (0.1, math.nan):
        with pytest.raises(ValueError, match="differ"):
            speed.check_alike("other", most)


def test_against_our_definition_without_transformers(tmp_path, capsys):
    speed.main(["--against", "definition", "--cases", "tiny", "--repeats", "2", "--threads", "1",
                "--out", str(tmp_path / "a.json"), "--table", str(tmp_path / "a.md")])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["part"] for row in rows] == ["attention forward", "attention forward + backward"]
    for row in rows:
        assert row["case"] == "tiny" and row["threads"] == 1 and row["ratio"]["cpu"]["median"] > 0
        assert row["ours"]["wall"]["q1"] <= row["ours"]["wall"]["q3"]
    table = (tmp_path / "a.md").read_text()
    assert table.startswith(speed.title("definition")) and table.count("| tiny |") == 2
    assert table.splitlines()[2] in capsys.readouterr().out


@pytest.mark.parametrize("flags, sentence", [
    (["--only", "speed"], "--only speed: there are attention"),
    (["--cases", "tiny,huge"], "--cases huge: there are decoder_800_300"),
    (["--against", "mmcv"], "--against mmcv: there are transformers, definition"),
    (["--device", "tpu"], "--device tpu: there are cpu, cuda"),
    (["--threads", "1,many"], "--threads 1,many"), (["--repeats", "0"], "--repeats 0"),
    (["--against", "definition", "--only", "step"], "--against definition measures"),
    (["--reps", "3"], "unrecognized arguments: --reps")])
def test_unknown_words_are_refused_in_a_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        speed.main(flags)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize("flags, sentence", [
    (["--sides", "ours_dac,yolo"], "--sides yolo: there are ours_deformable"),
    (["--sides", "ours_dac", "--every", "0"], "--every"),
    (["--sides", "ours_dac", "--size", "8"], "--size 8")])
def test_learn_refuses_unknown_sides_in_a_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        learn.main(flags)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_without_transformers_a_sentence_and_exit_status_2(monkeypatch, capsys):
    monkeypatch.setattr(theirs, "is_there", lambda: False)
    for command in (speed.main, learn.main):
        with pytest.raises(SystemExit) as stop:
            command([])
        assert stop.value.code == 2 and "pip install transformers" in capsys.readouterr().err


@pytest.mark.slow
def test_learn_counts_training_and_stops_at_the_mark(monkeypatch, tmp_path, capsys):
    """Reached at the second test, of step 4 of 6; the clock does not see what testing takes."""
    scores = iter([0.3, 0.6])
    monkeypatch.setattr(sets, "NUM_VAL_SHAPES", 2)
    monkeypatch.setattr(evaluate, "evaluate",
                        lambda *args: (dict(zip(("AP", "AP50"), [next(scores)] * 2)), ""))
    found, = learn.main(["--sides", "ours_deformable", "--steps", "6", "--every", "2", "--size",
                         "32", "--out", str(tmp_path / "l.json")])
    assert (found["reached"], found["step"], found["AP"]) == (True, 4, 0.6)
    assert 0 < found["reading_cpu_seconds"] < found["cpu_seconds"]
    assert [point["step"] for point in found["curve"]] == [2, 4]
    assert json.loads((tmp_path / "l.json").read_text()) == [found]
    assert "| ours_deformable | 0 | step 4 |" in capsys.readouterr().out
    assert "not in 6 steps, best 0.300" in learn.line({**found, "step": 6, "reached": False,
                                                       "best_AP": 0.3})


@pytest.mark.parametrize("flags, sentence", [
    (["--coco", "x", "--sides", "ours,yolo"], "--sides yolo: there are ours, fasterrcnn"),
    (["--coco", "x", "--budget", "0"], "--budget and --every are numbers of sec"),
    ([], "required: --coco")])
def test_detectors_refuses_in_a_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        detectors.main(flags)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize("name, first", [("ssdlite", 1), ("fcos_resnet50", 0)])
def test_torchvision_gets_corners_in_pixels_and_its_own_labels(name, first, monkeypatch):
    """A box with centre .5, .25 and half the size of 40 x 80 pixels has corners 20, 0, 60, 20.

    Its answer on those pixels comes back in those of the picture, three times as large.
    """
    class Net(torch.nn.Module):
        def forward(self, images, targets=None):
            if targets:
                self.targets = targets
                return {"a": torch.tensor(1.), "b": torch.tensor(2.)}
            return [{**target, "scores": torch.ones(1)} for target in self.targets]
    kept = Net()
    monkeypatch.setitem(detectors.BUILDERS, name, lambda **_: kept)
    theirs = detectors.Theirs(name, cases.TINY)
    image = torch.zeros(3, 40, 80)
    target = dataset.Target(torch.tensor([2]), torch.tensor([[.5, .25, .5, .5]]), 7, (120, 240))
    assert theirs.loss([image], [target]) == 3
    given, = kept.targets
    assert given["labels"].tolist() == [2 + first]
    assert given["boxes"].tolist() == [[20, 0, 60, 20]]
    found, = theirs.detect([image], [target.size_px])
    assert found["labels"].tolist() == [2] and found["boxes_xyxy"].tolist() == [[60, 0, 180, 60]]


def test_a_line_says_when_the_mark_was_passed():
    curve = [{"cpu_seconds": s, "AP": a / 2, "AP50": a} for s, a in ((30, .4), (60, .55), (90, .7))]
    found = {"side": "ssdlite", "parameters": 2.2e6, "lr": 1e-3, "steps": 9, "curve": curve}
    assert "| 9 | 60 | 0.700 | 0.350 | 90 |" in detectors.line(found, .5)
    assert "| not reached |" in detectors.line(found, .8)


@pytest.mark.slow
@pytest.mark.parametrize("side", detectors.SIDES)
def test_each_detector_trains_for_its_seconds(side, coco_sample, tmp_path):
    found, = detectors.main(["--coco", str(coco_sample / "bccd"), "--sides", side, "--size", "64",
                             "--budget", "4", "--every", "3", "--out", str(tmp_path / "d.json")])
    *earlier, last = found["curve"]             # none earlier if one step takes longer than 1 s
    assert all(3 <= point["cpu_seconds"] < 4 for point in earlier) and len(earlier) <= 1
    assert last["cpu_seconds"] >= 4 and last["step"] == found["steps"]
    assert json.loads((tmp_path / "d.json").read_text()) == [found]


def test_peak_memory_of_a_tiny_step():
    assert memory.of_process("VmHWM") >= memory.of_process("VmRSS") > 1e7
    assert memory.peak_of_steps(cases.MODELS["tiny"], "ours", torch.device("cpu")) >= 0


def test_equal_losses_means_without_the_encoders():
    """Without proposals the loss is the decoder's alone, which is smaller."""
    case = cases.MODELS["tiny"]
    detector, batch = cases.build_ours(case).train(), cases.batch_of(case)
    whole = cases.our_loss(detector, case.cfg)(batch, 1)
    part = cases.our_loss(cases.WithoutProposals(detector), case.cfg)(batch, 1)
    assert 0 < part < whole


def tiny(queries):
    case = cases.MODELS["tiny"]
    return case._replace(cfg=dataclasses.replace(case.cfg, queries=queries))


@pytest.mark.slow
@pytest.mark.parametrize("queries", ["two_stage_unmixed", "learned"])
def test_theirs_answers_as_ours_and_can_be_tested(queries):
    pytest.importorskip("transformers")
    case = tiny(queries)
    batch = cases.batch_of(case)
    ours, net = speed.build_pair(case, batch)
    assert cases.difference(ours, net, batch) < 2e-5
    with torch.no_grad():
        next(ours.decoder.parameters()).add_(1)
    assert cases.difference(ours, net, batch) > 1e-3
    out = theirs.Detector(net)(*batch[:2])
    assert isinstance(out, model.Output) and out.o_decoder[-1].boxes.shape == (2, 12, 4)
    found = evaluate.detect(theirs.Detector(net), batch[0], [(64, 64)] * 2)
    assert len(found) == 2 and found[0]["boxes_xyxy"].max() <= 64


@pytest.mark.slow
def test_their_proposals_get_no_loss():
    """In their two-stage form no loss reaches what picks the queries, so it never learns to."""
    pytest.importorskip("transformers")
    case = tiny("two_stage_unmixed")
    net = theirs.build(case.cfg, cases.build_ours(case).backbone)
    cases.their_loss(net.train(), case.cfg)(cases.batch_of(case), 1).backward()
    untaught = {name for name, p in net.named_parameters() if p.grad is None}
    last = case.cfg.recipe.decoder_layers
    assert {name.split(".")[1] for name in untaught if name.startswith("model.enc_")} == {
        "enc_output", "enc_output_norm"}
    assert f"model.decoder.class_embed.{last}.weight" in untaught


@pytest.mark.slow
def test_the_whole_command_on_tiny_shapes(tmp_path):
    pytest.importorskip("transformers")
    rows = speed.main(["--cases", "tiny", "--repeats", "1", "--threads", "1", "--table",
                       str(tmp_path / "table.md")])
    assert [row["part"] for row in rows] == [
        "attention forward", "attention forward + backward", "inference", "training step",
        "memory of a training step"]
    assert "transformers 5" in (tmp_path / "table.md").read_text()
