"""Hostile checkpoints: each edit of a real one is refused in a sentence that names the file.

Every variant goes through eval.py's door, --resume and --init_from, as far as a door reads what was
edited: --init_from takes what fits of a part of a network. A few run always, all in the slow suite.
"""
import copy
import math
import os
import random
import re
import zipfile

import pytest
import torch
from test_folder import at_step, begin, few_validation_images, go_on  # noqa: F401

from detr_min import backbone
from detr_min.run import checkpoints, config, contents, registry, sets

CATEGORIES = [{"id": 1, "name": "cat"}]
ALL = "eval", "resume", "init_from"
nan, inf = math.nan, math.inf

# --- the variants ---------------------------------------------------------------------------------

CONFIG = [
    ("size", "big"), ("size", 64.5), ("size", True), ("size", 0), ("lr", "fast"), ("lr", nan),
    ("lr", -1.0), ("batch", 0), ("batch", None), ("model", "dca"), ("model", 3), ("loss", "tall"),
    ("queries", ["two_stage"]), ("backbone", "vgg"), ("images", -1), ("seed", -1), ("epochs", "2"),
    ("steps", 0), ("dn_number", -5), ("precision", "fp8"), ("device", "tpu"), ("coco", 5),
    ("classes", None), ("out", 3), ("slow_lr", 2.0), ("recipe", 5), ("recipe", {}),
    ("recipe", "deformable"), ("unknown", 1), (5, 1)]
RECIPE = [
    ("base", "none"), ("d_model", 130), ("d_model", 0), ("d_model", "32"), ("d_model", 64),
    ("d_model", 2 ** 40), ("num_heads", 0), ("num_heads", 3), ("num_heads", -4), ("num_heads", 8),
    ("num_heads", 4.0), ("num_levels", 0), ("num_levels", 2), ("num_levels", 9), ("num_points", 0),
    ("num_points", 3), ("num_points", True), ("d_ffn", 0), ("d_ffn", 33), ("dropout", 2.0),
    ("dropout", "much"), ("cell_weight", nan), ("encoder_layers", -1), ("encoder_layers", 2),
    ("encoder_layers", 10 ** 9), ("decoder_layers", 0), ("decoder_layers", 3), ("num_queries", 0),
    ("num_queries", -9), ("num_queries", "9"), ("num_queries", 20), ("num_classes", 0),
    ("num_classes", 5), ("max_size", 0), ("warmup", -1), ("decay", "never"), ("drop_at", 7.0),
    ("weight_decay", -1.0), ("clip", inf), ("detections", 0), ("swin", 5), ("swin", ("a",)),
    ("start", "late"), ("unknown", 1)]
PROGRESS = [
    ("step", -1), ("step", "2"), ("step", 99), ("step", True), ("step", 2.0), ("step", None),
    ("images", 0), ("images", 5), ("images", "4"), ("images", None), ("saved", -1), ("saved", [2]),
    ("seconds", nan), ("seconds", -1.0), ("cpu_seconds", "1"), ("best_AP", 7.0), ("best_AP", None)]
WEIGHT = "decoder.layers.0.cross_attn.value_proj.weight"
TENSORS = {
    "nan": lambda t: t.fill_(nan), "inf": lambda t: t.fill_(-inf), "bool": lambda t: t.bool(),
    "int64": lambda t: t.long(), "float64": lambda t: t.double(), "float16": lambda t: t.half(),
    "complex": lambda t: t.to(torch.complex64), "text": lambda t: "weights", "none": lambda t: None,
    "list": lambda t: t.tolist(), "shape": lambda t: t[:-1], "flat": lambda t: t.flatten(),
    "empty": lambda t: t[:0], "transposed": lambda t: t.T, "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(), "one number": lambda t: t[:1, :1].expand(t.shape),
    "parameter": torch.nn.Parameter}
MOMENTS = {
    "shape": ("exp_avg", lambda t: t[:-1]), "bool": ("exp_avg", lambda t: t.bool()),
    "nan": ("exp_avg", lambda t: t + nan), "text": ("exp_avg", lambda t: "moment"),
    "negative": ("exp_avg_sq", lambda t: t - 1), "float64": ("exp_avg_sq", lambda t: t.double()),
    "more steps": ("step", lambda t: t + 1), "steps as int": ("step", int),
    "steps as a row": ("step", lambda t: t[None])}


def put(*path):
    """An edit: content[path[0]]...[path[-2]] = path[-1]"""
    def edit(content):
        *keys, last, value = path
        for key in keys:
            content = content[key]
        content[last] = value
    return edit


def change(change_it, *path):
    """An edit: what lies at the end of a path becomes change_it of it."""
    def edit(content):
        *keys, last = path
        for key in keys:
            content = content[key]
        content[last] = change_it(content[last])
    return edit


def swapped(content):
    """Two weights under one another's names."""
    state, other = content["model"], "encoder.layers.0.ffn.0.bias"
    state[WEIGHT], state[other] = state[other], state[WEIGHT]


def variants():
    """Yield (name, edit of a content, doors that refuse it)."""
    yield "another format", put("format", "detr_min 9"), ALL
    yield "format is a list", put("format", [contents.FORMAT]), ALL
    for part in contents.PARTS:
        yield f"{part} is missing", lambda content, part=part: content.pop(part), ALL
        yield f"{part} is text", put(part, "text"), ALL
    for key, value in CONFIG:
        yield f"config {key} {value!r}", put("config", key, value), ALL
    for key, value in RECIPE:
        grows = key in ("encoder_layers", "decoder_layers") and value in (2, 3)
        yield f"recipe {key} {value!r}", put("config", "recipe", key, value), ALL[:3 - grows]
    for name, categories in {
            "texts": ["a", "b", "c", "d"], "none": [], "equal": CATEGORIES * 4,
            "numbers as names": [{"id": i, "name": i} for i in range(4)],
            "texts as ids": [{"id": f"{i}", "name": f"{i}"} for i in range(4)],
            "no id": [{"name": f"{i}"} for i in range(4)]}.items():
        yield f"categories: {name}", put("categories", categories), ALL
    yield "a category less", lambda content: content["categories"].pop(), ALL
    yield "weights swapped", swapped, ALL
    yield "a weight missing", lambda content: content["model"].pop(WEIGHT), ALL[:2]
    yield "no weights", put("model", {}), ALL
    yield "a weight more", put("model", "more.weight", torch.ones(2)), ALL
    yield "a number as a name", put("model", 5, torch.ones(2)), ALL
    for name, edit in TENSORS.items():
        yield f"weight: {name}", change(edit, "model", WEIGHT), ALL
    yield "no progress", put("progress", {}), ("resume",)
    for key, value in PROGRESS:
        yield f"progress {key} {value!r}", put("progress", key, value), ("resume",)
    yield "a billion shapes", lambda content: (put("config", "images", 10 ** 9)(content),
                                               put("progress", "images", 10 ** 9)(content)), (
        "resume",)
    yield "no optimizer", put("optimizer", {}), ("resume",)
    yield "SGD", put("optimizer", torch.optim.SGD([torch.ones(2)], momentum=.9).state_dict()), (
        "resume",)
    yield "Adam of another network", put(
        "optimizer", torch.optim.Adam([torch.ones(2)]).state_dict()), ("resume",)
    for name, value in {"groups None": None, "no groups": [], "groups of text": ["a", "b"]}.items():
        yield name, put("optimizer", "param_groups", value), ("resume",)
    yield "groups swapped", change(lambda g: g[::-1], "optimizer", "param_groups"), ("resume",)
    for name, value in {"None": None, "emptied": {}, "text": "moments"}.items():
        yield f"moments {name}", put("optimizer", "state", value), ("resume",)
    for key in (999, -1, "0", 1.0):
        yield f"moments of parameter {key!r}", change(
            lambda state, key=key: {**{i: m for i, m in state.items() if i != key}, key: state[0]},
            "optimizer", "state"), ("resume",)
    yield "moments of one are text", put("optimizer", "state", 0, "text"), ("resume",)
    yield "a moment missing", lambda c: c["optimizer"]["state"][0].pop("exp_avg"), ("resume",)
    yield "a moment more", put("optimizer", "state", 0, "momentum", torch.ones(2)), ("resume",)
    for name, (key, edit) in MOMENTS.items():
        yield f"moment: {name}", change(edit, "optimizer", "state", 0, key), ("resume",)


VARIANTS = {name: (edit, doors) for name, edit, doors in variants()}


def test_there_are_many_variants():
    assert len(VARIANTS) == len([*variants()]) >= 150


# --- the doors ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The content of a run's last.pt, of the smallest network that there is."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sets, "NUM_VAL_SHAPES", 2)
    patch.setitem(registry.BACKBONES["deformable"], "convnet", lambda r: backbone.ConvNet(8))
    run = at_step(begin(tmp_path_factory.mktemp("run") / "good", num_points=2), 2)
    run.save("last.pt")
    yield checkpoints.read(run.cfg.out)
    patch.undo()


def through(door, path):
    """Use a file as a program would."""
    if door == "eval":
        return checkpoints.load_model(path)
    if door == "resume":
        return go_on(path)
    cfg = config.preset("shapes", d_model=32, num_heads=4, d_ffn=32, num_points=2,
                                    decoder_layers=1, num_queries=9)
    return checkpoints.init_from(registry.build(cfg), CATEGORIES, path)


def refused(door, path):
    """The sentence in which a file is refused, which names it."""
    with pytest.raises((ValueError, OSError)) as stop:
        through(door, path)
    said = str(stop.value)
    assert type(stop.value) in (ValueError, FileNotFoundError) and str(path.parent) in said
    assert 20 < len(said) - len(str(path)) < 500 and "\n" not in said and "Traceback" not in said
    return said


@pytest.mark.parametrize("door", ALL)
def test_the_unedited_one_is_taken_by_every_door(good, door, tmp_path):
    torch.save(good, tmp_path / "last.pt")
    through(door, tmp_path / "last.pt")


SOME_SLOW = [pytest.param(name, marks=[pytest.mark.slow] * (i % 30 != 7))
             for i, name in enumerate(VARIANTS)]


@pytest.mark.parametrize("name", SOME_SLOW)
def test_a_hostile_checkpoint_is_refused_in_a_sentence(good, name, tmp_path):
    """By every door that reads what was edited; the folder holds nothing more afterwards."""
    content, (edit, doors) = copy.deepcopy(good), VARIANTS[name]
    edit(content)
    torch.save(content, tmp_path / "last.pt")
    for door in doors:
        refused(door, tmp_path / "last.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_rates_in_the_optimizer_are_not_used(good, tmp_path):
    """They follow from the config, whatever the file says."""
    content = copy.deepcopy(good)
    for group in content["optimizer"]["param_groups"]:
        group.update(lr=nan, weight_decay=9.0, betas="two", fused="yes")
    torch.save(content, tmp_path / "last.pt")
    run = go_on(tmp_path)
    [fast, _] = run.optimizer.param_groups
    assert (fast["lr"], fast["weight_decay"], fast["betas"]) == (run.cfg.lr, 1e-4, (0.9, 0.999))


# --- bytes ----------------------------------------------------------------------------------------

def same(a, b):
    """Whether two contents hold the same, tensors by their bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.slow
def test_a_flipped_bit_is_refused_or_was_in_no_number(good, tmp_path):
    """100 bits anywhere in the file: no number, name or config ever changes silently."""
    torch.save(good, tmp_path / "good.pt")
    whole, chance, refusals = (tmp_path / "good.pt").read_bytes(), random.Random(0), 0
    for _ in range(100):
        broken = bytearray(whole)
        broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
        (tmp_path / "last.pt").write_bytes(broken)
        try:
            assert same(contents.open_file(tmp_path), good)
        except ValueError as error:
            refusals += "last.pt cannot be read as a checkpoint" in str(error)
    assert refusals > 50


def flipped(good, path):
    """One bit of one weight, by its place in the file."""
    torch.save(good, path)
    whole = bytearray(path.read_bytes())
    whole[whole.find(good["model"][WEIGHT].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(whole)


def compressed(good, path):
    """100 MB of zeros in a file of 100 kB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("last/data.pkl", bytes(10 ** 8))


class Harm:
    """What a pickle would call when it is loaded."""
    def __reduce__(self):
        return os.mkdir, ("harm",)


BYTES = {
    "flipped": flipped, "compressed": compressed, "folder": lambda good, path: path.mkdir(),
    "empty": lambda good, path: path.write_bytes(b""),
    "text": lambda good, path: path.write_text("weights"),
    "half": lambda good, path: (torch.save(good, path), os.truncate(path, 100_000)),
    "pickle": lambda good, path: torch.save({**good, "model": Harm()}, path),
    "pickle beside": lambda good, path: torch.save({**good, "more": [Harm()]}, path),
    "old pickle": lambda good, path: torch.save({**good, "more": Harm()}, path,
                                                _use_new_zipfile_serialization=False),
    "tensor": lambda good, path: torch.save(torch.ones(3), path),
    "list": lambda good, path: torch.save([good], path)}
if hasattr(os, "mkfifo"):
    BYTES["pipe"] = lambda good, path: os.mkfifo(path)


def test_a_whole_model_is_refused_by_its_name(tmp_path):
    """As torch.save(model) writes it: a pickled object, whose class would have to be run."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "last.pt")
    with pytest.raises(ValueError, match="without running code: it holds torch.nn.modules."
                                         "linear.Linear. Save the model's state_dict"):
        contents.open_file(tmp_path)


@pytest.mark.parametrize("name, door", [
    pytest.param(name, door, marks=[pytest.mark.slow] * (door != ALL[0]))
    for name in BYTES for door in ALL])
def test_no_file_hangs_runs_code_or_loads_wrong(good, name, door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    BYTES[name](good, tmp_path / "last.pt")
    path = tmp_path if name == "folder" else tmp_path / "last.pt"
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        through(door, path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
