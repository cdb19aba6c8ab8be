"""A run's folder: a new one is never an old one, and a resumed one goes on where it stopped."""
import errno
import json
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from detr_min import backbone
from detr_min.data import shapes
from detr_min.run import config, folder, registry, sets

TINY = dict(images=4, batch=2, size=64, steps=6, device="cpu", d_model=32, num_heads=4, d_ffn=32,
            decoder_layers=1, num_queries=9)


OPEN = []                               # runs that hold their folder


@pytest.fixture(autouse=True)
def few_validation_images(monkeypatch):
    """And at the end all runs let go of their folders."""
    monkeypatch.setattr(sets, "NUM_VAL_SHAPES", 2)
    yield
    while OPEN:
        OPEN.pop().config_file.close()


def start(cfg):
    OPEN.append(folder.start(cfg))
    return OPEN[-1]


def begin(out="", preset="shapes", **changes):
    return start(config.preset(preset, **{**TINY, "out": str(out), **changes}))


def go_on(out, **changes):
    return start(config.preset("shapes", resume=str(out), device="cpu", **changes))


def saved(out, step=2, **changes):
    """A run that was stopped after some step. Returns it."""
    run = at_step(begin(out, **changes), step)
    run.save("last.pt")
    return run


def at_step(run, step):
    """The run, as if its optimizer had gone so many steps and moved nothing."""
    run.progress["step"] = step
    for p in run.detector.parameters():
        run.optimizer.state[p] = {"step": torch.tensor(float(step)),
                                  "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return run


# --- a new folder ---------------------------------------------------------------------------------

def test_a_new_run_says_what_it_will_do_and_writes_its_config(tmp_path, capsys):
    run = begin(tmp_path / "run", model="deformable", lr=0.5)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["lr"] == 0.5 and stored["recipe"]["num_classes"] == 4
    assert [category["name"] for category in stored["categories"]] == list(shapes.CLASSES)
    said = capsys.readouterr().out
    assert "deformable on synthetic shapes: 4 training and 2 validation images" in said
    assert f"6 steps of 2 images, lr 0.5, seed 0, cpu; run folder {tmp_path / 'run'}" in said
    assert run.progress["step"] == 0 and run.log.path == tmp_path / "run" / "log.jsonl"


def test_epochs_become_steps(tmp_path):
    """4 images in batches of 2: three epochs are six steps; of 3 images, two steps an epoch."""
    assert begin(tmp_path / "a", steps=1, epochs=3).cfg.steps == 6
    assert begin(tmp_path / "b", steps=1, epochs=3, images=3).cfg.steps == 6


def test_weights_follow_from_the_seed(tmp_path):
    one, same, other = (begin(tmp_path / name, seed=seed).detector.state_dict()
                        for name, seed in (("a", 5), ("b", 5), ("c", 6)))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["encoder.level_embed"], other["encoder.level_embed"])


def test_a_run_is_never_overwritten(tmp_path):
    saved(tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run already .*last.pt.*--resume"):
        begin(tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file is a file: a folder is expected"):
        begin(tmp_path / "file")


def test_a_run_that_never_saved_may_begin_again(tmp_path):
    """Its folder holds config.json and a log; a person's own config.json is left alone."""
    begin(tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run" / "last.unfinished").write_text("torn")
    begin(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json",
                                                                          "log.jsonl"]
    assert (tmp_path / "run" / "log.jsonl").read_text() == ""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match="holds a run already"):
        begin(tmp_path / "mine")


def test_a_run_that_saved_only_its_best_is_not_said_to_go_on(tmp_path):
    """Killed between a first validation and the first save."""
    begin(tmp_path / "run").save("best.pt")
    with pytest.raises(FileExistsError, match="best.pt.: delete it, for no run goes on without"):
        begin(tmp_path / "run")


LOCKS = """                                        # in a process without torch: ready sooner
import fcntl, sys
file = open(sys.argv[1], "a+")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("locked", flush=True)
    sys.stdin.read()
except OSError:
    print("refused")
"""


def test_a_second_process_on_one_folder_is_refused(tmp_path):
    """And config.json stays the first one's. It is free once that one has ended."""
    pytest.importorskip("fcntl", reason="no locks here")
    path = tmp_path / "run" / "config.json"
    words = [sys.executable, "-c", LOCKS, str(path)]
    run = begin(tmp_path / "run", seed=7)
    assert subprocess.run(words, capture_output=True, text=True, input="").stdout == "refused\n"
    run.config_file.close()
    with subprocess.Popen(words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another process trains in .*take another --out"):
            begin(tmp_path / "run", seed=8)
        assert json.loads(path.read_text())["seed"] == 7
        other.communicate()
    begin(tmp_path / "run", seed=8)
    assert json.loads(path.read_text())["seed"] == 8


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="no locks here")

    def no_locks(*given):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    run = begin(tmp_path / "run", seed=7)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 7
    run.config_file.close()


def test_runs_without_out_get_names_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    other = dict(loss="tal", queries="task_aware")
    for changes in ({}, {}, dict(model="deformable", seed=3), other):
        begin(**changes)
    assert sorted(path.name for path in pathlib.Path("runs").iterdir()) == [
        "dac_shapes", "dac_shapes-2", "dac_shapes_tal_task_aware", "deformable_shapes_seed3"]


def test_the_first_weights_are_those_of_another_run(tmp_path, capsys):
    before = saved(tmp_path / "a").detector.state_dict()
    after = begin(tmp_path / "b", seed=9, init_from=str(tmp_path / "a")).detector.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "tensors start at random: -" in capsys.readouterr().out


def test_weights_that_stay_random_are_counted_by_part(tmp_path, capsys):
    saved(tmp_path / "a")
    begin(tmp_path / "b", preset="shapes_conditional", init_from=str(tmp_path / "a"))
    said = capsys.readouterr().out
    assert re.search(r"\d\d of \d+ tensors start at random: \d+ of decoder, \d+ of", said), said
    assert len(max(said.splitlines(), key=len)) < 400


def test_a_resnet_starts_from_imagenet_unless_told_otherwise(monkeypatch, tmp_path):
    asked = []

    class Small(backbone.ConvNet):
        def load_imagenet(self):
            asked.append(self)
    monkeypatch.setitem(registry.BACKBONES["deformable"], "resnet50", lambda r: Small())
    run = begin(tmp_path / "a", backbone="resnet50")
    assert asked == [run.detector.backbone]
    run.save("last.pt")
    begin(tmp_path / "b", backbone="resnet50", init_from=str(tmp_path / "a"))
    go_on(tmp_path / "a")
    assert len(asked) == 1


# --- a resumed one --------------------------------------------------------------------------------

def test_a_resumed_run_has_everything_it_had(tmp_path):
    """Weights, optimiser, flags and progress; --pause and --device are this command's."""
    run = at_step(begin(tmp_path / "run", lr=0.01), 3)
    sum(p.square().sum() for p in run.detector.parameters()).backward()
    run.optimizer.step()
    run.progress.update(step=4, best_AP=0.25)
    run.save("last.pt")
    again = go_on(tmp_path / "run", pause=5)
    assert again.cfg.lr == 0.01 and again.cfg.pause == 5 and again.cfg.steps == 6
    assert again.progress["step"] == 4 and again.progress["best_AP"] == 0.25
    assert again.cfg.out == str(tmp_path / "run")
    state = again.detector.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in
               run.detector.state_dict().items())
    moments = zip(run.optimizer.state.values(), again.optimizer.state.values(), strict=True)
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in moments)
    from_file = go_on(tmp_path / "run" / "last.pt")
    assert from_file.cfg.out == str(tmp_path / "run")


def test_batches_go_on_where_they_stopped(tmp_path):
    """The images of steps 3 to 6 are those that the straight run sees there."""
    def seen(run):
        return [(step, [target.image_id for target in targets])
                for step, (_, _, targets) in run.batches()]
    whole = seen(begin(tmp_path / "straight"))
    assert [step for step, _ in whole] == [1, 2, 3, 4, 5, 6]
    saved(tmp_path / "run", step=2)
    assert seen(go_on(tmp_path / "run")) == whole[2:]


def test_a_resume_on_other_data_is_refused(tmp_path):
    """Labels are positions in the json's classes: another json would train on permuted labels."""
    shapes.write_folder(tmp_path / "data", 4, 2, size_px=64)
    saved(tmp_path / "run", preset="coco", coco=str(tmp_path / "data"), images=0)
    go_on(tmp_path / "run")
    path = tmp_path / "data" / "annotations" / "instances_train.json"
    whole = path.read_text()
    path.write_text(whole.replace("ellipse", "egg"))
    with pytest.raises(ValueError, match="changed since .*run started on it"):
        go_on(tmp_path / "run")
    fewer = json.loads(whole)
    fewer["images"] = fewer["images"][:3]
    fewer["annotations"] = [a for a in fewer["annotations"] if a["image_id"] != 4]
    path.write_text(json.dumps(fewer))
    with pytest.raises(ValueError, match="changed since .* then of 4 images and 4 classes"):
        go_on(tmp_path / "run")


def test_flags_are_refused_before_a_json_is_read(tmp_path, monkeypatch):
    """Reading the json of many images takes a while."""
    monkeypatch.setattr(sets, "open_train", None)
    data = dict(preset="coco", coco=str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").touch()
    with pytest.raises(FileExistsError, match="--out .*run holds a run already"):
        begin(tmp_path / "run", **data)
    with pytest.raises(FileNotFoundError, match="nothing.pt does not exist: a run folder or"):
        begin(tmp_path / "new", init_from=str(tmp_path / "nothing.pt"), **data)


def test_a_resume_whose_data_is_gone_names_run_and_data(tmp_path):
    shapes.write_folder(tmp_path / "data", 4, 2, size_px=64)
    saved(tmp_path / "run", preset="coco", coco=str(tmp_path / "data"), images=0)
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="run was trained on .*data, which is no longer"):
        go_on(tmp_path / "run")


def test_classes_without_validation_images_do_not_stop_a_resume(tmp_path):
    """The json of validation lacks a class, or gives it another id: training's ids are saved."""
    shapes.write_folder(tmp_path / "data", 4, 2, size_px=64)
    path = tmp_path / "data" / "annotations" / "instances_val.json"
    coco = json.loads(path.read_text())
    gone = coco["categories"].pop()["id"]
    coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] != gone]
    path.write_text(json.dumps(coco))
    saved(tmp_path / "run", preset="coco", coco=str(tmp_path / "data"), images=0)
    assert len(go_on(tmp_path / "run").train_set.categories) == 4


def test_a_pause_that_lies_behind_is_refused(tmp_path):
    saved(tmp_path / "run", step=2)
    for pause in (1, 2):
        with pytest.raises(ValueError, match=f"--pause {pause}: the run is at step 2 already"):
            go_on(tmp_path / "run", pause=pause)


def test_a_resume_of_nothing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no last.pt"):
        go_on(tmp_path)
    with pytest.raises(FileNotFoundError, match="--resume .*typo does not exist: the folder of a"):
        go_on(tmp_path / "typo")


def test_a_resume_of_another_file_is_refused(tmp_path):
    saved(tmp_path / "run").save("best.pt")
    with pytest.raises(ValueError, match="best.pt: a run goes on from its last.pt.*--init_from"):
        go_on(tmp_path / "run" / "best.pt")


# --- while it runs --------------------------------------------------------------------------------

def test_an_object_without_a_query_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"image \d+ holds \d objects but .* 1 queries"):
        begin(tmp_path / "run", num_queries=1)
    assert not (tmp_path / "run").exists()
