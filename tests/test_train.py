"""The training program as a person uses it: run folder, resume, Ctrl-C, two processes, mistakes."""
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys

import pytest
import torch

import train
from detr_min import criterion
from detr_min.data import shapes
from detr_min.release import denoising
from detr_min.run import checkpoints, config, logfile, loop, sets

ROOT = pathlib.Path(train.__file__).parent
EACH_PART_OF_SD_DETR = [
    ["--model", "deformable"], ["--model", "decoupled"],
    ["--model", "decoupled", "--queries", "task_aware"],
    ["--model", "decoupled", "--queries", "task_aware", "--loss", "tal"],
    ["--model", "split"], ["--model", "dac_decoupled"], ["--preset", "shapes_sd"]]
SMALL = ["--images", "4", "--batch", "2", "--size", "32", "--device", "cpu"]
TINY = dict(d_model=32, num_heads=4, d_ffn=32, decoder_layers=2, num_queries=12)


@pytest.fixture(autouse=True)
def tiny_networks_and_few_validation_images(monkeypatch, no_pictures):
    monkeypatch.setattr(sets, "NUM_VAL_SHAPES", 2)
    for times in ("NUM_SAVES", "NUM_EVALS"):
        monkeypatch.setattr(loop, times, 2)
    for name in ("shapes", "shapes_conditional", "shapes_sd"):
        monkeypatch.setitem(config.PRESETS, name, {**config.PRESETS[name], **TINY})


def run(monkeypatch, *words):
    """train.main() with a command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        train.main()
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def weights(folder):
    return checkpoints.read(folder)["model"]


def log_of(folder):
    """log.jsonl without its times."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss"), line.get("val")) for line in lines]


def assert_same_weights(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("words", [
    ["--model", "dac_decoupled", "--queries", "task_aware", "--loss", "tal"],
    ["--model", "dac_release", "--loss", "align"], ["--preset", "shapes_sd"],
    *(pytest.param(words, marks=pytest.mark.slow) for words in (
        ["--model", "deformable_fixed", "--queries", "learned"],
        ["--model", "deformable"], ["--model", "dac"], ["--model", "decoupled"],
        ["--model", "split"], ["--model", "dac", "--loss", "align"],
        ["--model", "deformable", "--queries", "learned"], ["--preset", "shapes_conditional"]))])
def test_each_variant_trains_and_leaves_a_complete_run_folder(words, monkeypatch, tmp_path, capsys):
    run(monkeypatch, *SMALL, "--steps", 2, "--out", tmp_path / "run", *words)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "log.jsonl", "last.pt", "best.pt", "metrics.json", "curves.png",
                     "predictions.png"}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["images_seen"] == 4 and 0 <= metrics["AP"] <= 1
    assert metrics["parameters"] > 1e5 and metrics["cpu_seconds"] > 0
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert metrics["best_before"]["step"] == 1          # and the last validation, after step 2
    assert last_line == (f"AP {metrics['AP']:.3f}  AP50 {metrics['AP50']:.3f}  "
                         + logfile.trend(metrics["AP"], metrics["best_before"]))


def test_the_log_line_adds_up(monkeypatch, tmp_path):
    run(monkeypatch, *SMALL, "--steps", 2, "--out", tmp_path / "run")
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    parts = sum(line[name][term] for name in ("O", "C", "encoder") for term in logfile.TERMS)
    assert line["loss"] == pytest.approx(parts) and line["O"]["pairs"] == line["objects"]


def test_one_and_one_epoch_are_two(monkeypatch, tmp_path):
    """4 images in batches of 2: two steps an epoch. Bit for bit, optimiser and log included."""
    run(monkeypatch, *SMALL, "--epochs", 2, "--out", tmp_path / "straight")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *SMALL, "--epochs", 2, "--out", tmp_path / "paused", "--pause", 2)
    assert stop.value.code == 0 and not (tmp_path / "paused" / "metrics.json").exists()
    run(monkeypatch, "--resume", tmp_path / "paused")
    straight, paused = (checkpoints.read(tmp_path / name) for name in ("straight", "paused"))
    assert_same_weights(straight["model"], paused["model"], rtol=0, atol=0)
    for a, b in zip(straight["optimizer"]["state"].values(), paused["optimizer"]["state"].values()):
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "paused")


@pytest.mark.slow
def test_the_log_of_a_killed_run_is_that_of_the_straight_one(monkeypatch, tmp_path):
    """Lines are due at steps 2, 4, 6, saves at 3, 6: the mean at 4 must not depend on a kill at 5.
    """
    monkeypatch.setattr(loop, "NUM_LOGS", 3)
    monkeypatch.setattr(loop, "NUM_SAVES", 2)
    run(monkeypatch, *SMALL, "--steps", 6, "--out", tmp_path / "straight")
    totals = [criterion.total] * 4                                  # there is none for step 5
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(criterion, "total", lambda parts: totals.pop()(parts))
        run(monkeypatch, *SMALL, "--steps", 6, "--out", tmp_path / "killed")
    run(monkeypatch, "--resume", tmp_path / "killed")
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("words", EACH_PART_OF_SD_DETR, ids=" ".join)
def test_each_part_of_sd_detr_resumes_bit_for_bit(words, monkeypatch, tmp_path):
    flags = [*SMALL, "--steps", 4, *words, "--out"]
    run(monkeypatch, *flags, tmp_path / "straight")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *flags, tmp_path / "paused", "--pause", 2)
    assert stop.value.code == 0
    run(monkeypatch, "--resume", tmp_path / "paused")
    assert log_of(tmp_path / "paused") == log_of(tmp_path / "straight")
    paused, straight = weights(tmp_path / "paused"), weights(tmp_path / "straight")
    assert_same_weights(paused, straight, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dac_release", "deformable"])
def test_denoising_is_a_function_of_seed_and_step(model, monkeypatch, tmp_path):
    """With denoising queries too a resumed run is the straight one bit for bit; another seed not.

    Their losses are in the log, and their label embedding learns.
    """
    words = [*SMALL, "--dn_number", 40, "--model", model, "--loss", "align", "--steps", 2]
    run(monkeypatch, *words, "--out", tmp_path / "straight")
    with pytest.raises(SystemExit):
        run(monkeypatch, *words, "--out", tmp_path / "paused", "--pause", 1)
    before = weights(tmp_path / "paused")
    run(monkeypatch, "--resume", tmp_path / "paused")
    after = weights(tmp_path / "straight")
    assert_same_weights(after, weights(tmp_path / "paused"), rtol=0, atol=0)
    assert log_of(tmp_path / "straight") == log_of(tmp_path / "paused")
    assert not torch.equal(before["label_embed.weight"], after["label_embed.weight"])
    line = json.loads((tmp_path / "straight" / "log.jsonl").read_text().splitlines()[0])
    names = ("O", "O_denoising", "C", "C_denoising") if model == "dac_release" else (
        "O", "O_denoising")
    assert all(line[name]["l1"] > 0 for name in names)
    assert line["loss"] == pytest.approx(sum(line[name][term] for name in (*names, "encoder")
                                             for term in logfile.TERMS))
    assert line["O_denoising"]["pairs"] > line["objects"] == line["O"]["pairs"]


def test_bf16_trains(monkeypatch, tmp_path):
    """Both decoders and denoising queries in half precision: finite losses, weights in fp32."""
    heads, forward = [], denoising.DenoisingDetector.forward
    monkeypatch.setattr(denoising.DenoisingDetector, "forward", lambda self, *batch: heads.append(
        forward(self, *batch)) or heads[-1])
    run(monkeypatch, *SMALL, "--steps", 2, "--precision", "bf16", "--dn_number", 40, "--out",
        tmp_path / "run")
    assert heads[0].o_decoder[0].logits.dtype == torch.bfloat16
    losses = [loss for _, loss, val in log_of(tmp_path / "run") if not val]
    assert len(losses) == 2 and all(0 < loss < 1e4 for loss in losses)
    for name, tensor in weights(tmp_path / "run").items():
        assert tensor.dtype == torch.float32 and tensor.isfinite().all(), name
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert line["C_denoising"]["l1"] > 0


def test_ctrl_c_saves_and_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    total = criterion.total

    def interrupted(parts):
        os.kill(os.getpid(), signal.SIGINT)
        return total(parts)

    monkeypatch.setattr(criterion, "total", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *SMALL, "--steps", 9, "--out", tmp_path / "run")
    assert stop.value.code == 130
    assert f"train.py --resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert checkpoints.read(tmp_path / "run")["progress"]["step"] == 1


@pytest.mark.slow
def test_a_broken_picture_ends_a_run_in_one_sentence(tmp_path):
    """Found by a worker process: no traceback, no hang."""
    shapes.write_folder(tmp_path / "data", 4, 4, size_px=64)
    path = next((tmp_path / "data" / "train").iterdir())
    path.write_bytes(path.read_bytes()[:200])
    child = program("--coco", tmp_path / "data", "--batch", 2, "--size", 64, "--steps", 4, "--out",
                    tmp_path / "run")
    assert child.wait(100) == 1
    error = child.stderr.read().strip()
    assert len(error.splitlines()) == 1 and path.name in error and "image id" in error


def test_a_loss_that_turns_nan_names_images_and_learning_rate(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"step \d+, learning rate .*e\+\d+: .*\(images \[\d+, \d"):
        run(monkeypatch, *SMALL, "--steps", 50, "--lr", "1e20", "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(monkeypatch, tmp_path):
    """The loss may be finite and its gradient not: the last save must stay usable."""
    total = criterion.total
    monkeypatch.setattr(criterion, "total", lambda parts: (total(parts) * 0).sqrt())
    with pytest.raises(ValueError, match=r"step 1, .*not finite.*images \[\d+, \d"):
        run(monkeypatch, *SMALL, "--steps", 3, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_finished_run_can_be_finished_again(monkeypatch, tmp_path, capsys):
    """Whatever stopped it after its last step: --resume writes what is missing."""
    run(monkeypatch, *SMALL, "--steps", 2, "--out", tmp_path / "run")
    before = json.loads((tmp_path / "run" / "metrics.json").read_text())
    (tmp_path / "run" / "metrics.json").unlink()
    capsys.readouterr()
    run(monkeypatch, "--resume", tmp_path / "run" / "last.pt")
    assert "all steps of this run are done; to train longer, --init_from" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == before
    lines = log_of(tmp_path / "run")
    assert [step for step, _, val in lines if val] == [1, 2] and len(lines) == 4


def test_init_from_starts_where_the_other_ended(monkeypatch, tmp_path, capsys):
    run(monkeypatch, *SMALL, "--steps", 2, "--out", tmp_path / "a")
    run(monkeypatch, *SMALL, "--steps", 1, "--out", tmp_path / "b", "--init_from", tmp_path / "a",
        "--lr", "1e-30")
    assert_same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert re.search("; 0 of [0-9]+ tensors start", capsys.readouterr().out)


def program(*words, processes=1, script=ROOT / "train.py"):
    """train.py as a program of its own, or on several processes under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                "--standalone"] if processes > 1 else [sys.executable]
    return subprocess.Popen([*launcher, str(script), *map(str, words)], text=True,
                            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_program_ends_in_a_sentence(monkeypatch, tmp_path):
    """Run as a script; a text for sys.exit is printed, with exit status 1."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--coco", str(tmp_path / "nothing"),
                                      "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert ending.value.code.startswith("train.py: ") and str(tmp_path / "nothing") in str(ending)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], *EACH_PART_OF_SD_DETR], ids=" ".join)
def test_two_processes_do_what_one_does(words, tmp_path):
    """The same total batch gives the same losses; Adam makes more of the last digits each step."""
    logs = []
    for processes in (1, 2):
        out = tmp_path / f"run{processes}"
        child = program(*SMALL, "--steps", 6, "--out", out, *words, processes=processes)
        assert child.wait(300) == 0, child.stderr.read()
        logs.append([(line["loss"], line["objects"]) for line in map(json.loads, (
            out / "log.jsonl").read_text().splitlines()) if "loss" in line])
    assert len(logs[0]) == 6
    for step, ((loss, objects), (loss_2, objects_2)) in enumerate(zip(*logs)):
        assert loss_2 == pytest.approx(loss, rel=1e-5 * 10 ** min(step, 3))
        assert objects_2 * 2 == objects                 # the mean of a process, the whole of one


@pytest.mark.slow
def test_a_process_without_objects_keeps_pace(tmp_path):
    """In some steps one of two processes has no object at all: its loss still meets the other's."""
    shapes.write_folder(tmp_path / "data", 4, 4, size_px=64)
    path = tmp_path / "data" / "annotations" / "instances_train.json"
    coco = json.loads(path.read_text())
    empty = {image["id"] for image in coco["images"][:2]}
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] not in empty]
    path.write_text(json.dumps(coco))
    child = program("--coco", tmp_path / "data", "--batch", 2, "--size", 64, "--steps", 6, "--out",
                    tmp_path / "run", processes=2)
    assert child.wait(300) == 0, child.stderr.read()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 6


@pytest.mark.slow
def test_mistakes_end_in_one_sentence_and_a_status(tmp_path):
    child = program("--coco", tmp_path / "nowhere")
    assert child.wait(100) == 1
    error = child.stderr.read().strip()
    assert "Traceback" not in error and "nowhere" in error and len(error.splitlines()) == 1
