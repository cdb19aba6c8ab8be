"""Ten thousand generated jsons, pictures and folders: valid tensors or one sentence, never else.

Needs `pip install hypothesis`; run with `python -m pytest -m slow tests/test_fuzz.py`.
"""
import collections
import functools
import io
import json
import os
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from detr_min.data import batches, coco_json, dataset, transforms
from detr_min.run import evaluate
from helpers import GOOD

hypothesis = pytest.importorskip("hypothesis", reason="pip install hypothesis")
st = hypothesis.strategies
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TRANSFORMS = [transforms.resize(48, 80), transforms.flip_only(),
              transforms.multi_scale_and_crop(64, 107)]


def examples(number):
    """That many, the same in each run."""
    return hypothesis.settings(max_examples=number, derandomize=True, database=None,
                               deadline=None, print_blob=False,
                               suppress_health_check=list(hypothesis.HealthCheck))


# ---------------------------------------------------------------- what is allowed to happen

OPENED = []                                     # paths, while it is watched
WATCHED = [False]


def watch(event, arguments):
    if WATCHED[0] and event in ("open", "os.listdir", "os.scandir", "os.remove", "os.rename",
                                "os.mkdir", "subprocess.Popen"):
        OPENED.append(str(arguments[0]))


sys.addaudithook(watch)


def outcome(root, split="val", share=0.2, transform=TRANSFORMS[0]):
    """Open a folder, read all of it, evaluate it. -> "valid" or "refused", else it fails.

    So does what takes 20 seconds of this process, however busy the computer is.
    """
    start = time.process_time()
    OPENED.clear()
    WATCHED[0] = True
    try:
        ds = dataset.open_folder(root, split, transform, val_share=share)
        items = [ds[0, i] for i in range(len(ds))]
        result = "valid"
    except (coco_json.DataError, FileNotFoundError) as error:
        said, result = str(error), "refused"
    finally:
        WATCHED[0] = False
    assert time.process_time() - start < 20
    outside = root.parent / "outside"
    assert not [path for path in OPENED if os.path.realpath(path).startswith(str(outside))]
    if result == "refused":
        assert said.encode()                                        # it can be printed
        assert str(root) in said and len(said) < 2000 and "Traceback" not in said, said
        return result
    assert json.dumps(ds.categories, ensure_ascii=False).encode()    # and so can the classes
    for picture, target in items:
        check_target(picture, target, len(ds.categories))
    results = [{"image_id": target.image_id, "labels": target.labels,
                "scores": torch.ones(len(target.labels)),
                "boxes_xyxy": target.boxes.repeat(1, 1)} for _, target in items]
    images, is_pad, targets = batches.collate(items[:3])
    assert images.isfinite().all() and len(targets) == len(items[:3])
    metrics, _ = evaluate.coco_metrics(ds.coco, ds.image_ids, results, ds.categories)
    assert metrics["AP"] is None or 0 <= metrics["AP"] <= 1
    return result


def check_target(picture, target, num_classes):
    assert picture.dtype == torch.float32 and picture.shape[0] == 3 and picture.isfinite().all()
    assert min(picture.shape) > 0
    assert target.labels.dtype == torch.int64 and target.boxes.dtype == torch.float32
    assert target.boxes.shape == (len(target.labels), 4) and target.boxes.isfinite().all()
    assert ((target.boxes >= 0) & (target.boxes <= 1)).all() and (target.boxes[:, 2:] > 0).all()
    corners = target.boxes[:, :2] - target.boxes[:, 2:] / 2, (
        target.boxes[:, :2] + target.boxes[:, 2:] / 2)
    assert (corners[0] > -1e-6).all() and (corners[1] < 1 + 1e-6).all()
    assert ((target.labels >= 0) & (target.labels < num_classes)).all()


def tree(folder):
    """{path: (size, time of the last change)} of all that lies in a folder."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


# ---------------------------------------------------------------- jsons

REAL = ["ok.png", "\u00fcn\u00ef.png", "\u65e5\u672c.png", "a b.png", "sub/x.png", "l\nf.png"]
NAMES = [*REAL, "sub/../ok.png", "inside.png"]
EVIL = ["../../outside/secret.png", "sub/../../../outside/secret.png", "outside.png",
        "out/secret.png", "..\\..\\outside\\secret.png", "C:\\a.png", "/etc/hostname", "", ".",
        "..", "sub", "loop.png", "pipe.png", "gone.png", "dangling.png", "a" * 5000, "n\0l.png",
        "\ud800.png", "../val/ok.png", "~/a.png", "//a.png", "ok.png/b.png", "-", "con"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with pictures of all names that can be made, links in and out, a pipe, a loop."""
    base = tmp_path_factory.mktemp("fuzz").resolve()
    root, outside, val = base / "coco", base / "outside", base / "coco" / "val"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    (val / "sub").mkdir(parents=True)
    (root / "annotations").mkdir()
    outside.mkdir()
    for name in REAL:
        picture.save(val / name)
    picture.save(outside / "secret.png")
    (val / "inside.png").symlink_to(val / "ok.png")
    (val / "outside.png").symlink_to(outside / "secret.png")
    (val / "out").symlink_to(outside)
    (val / "loop.png").symlink_to(val / "loop.png")
    (val / "dangling.png").symlink_to(val / "nowhere.png")
    os.mkfifo(val / "pipe.png")
    return root


big = st.one_of(st.integers(), st.sampled_from(
    [0, -1, 2**31, 2**53, 2**53 + 1, 2**63, -2**63 - 1, 10**18, 10**400, -10**400]))
numbers = st.one_of(big, st.floats(), st.floats(-100, 100), st.integers(-100, 100),
                    st.sampled_from([1e-320, 1e38, 3.5e38, 1e300, 59.9999999, 1e-4, 1e6, -1e6]))
scalars = st.one_of(st.none(), st.booleans(), numbers,
                    st.text(st.characters(exclude_categories=[]), max_size=8))
things = st.recursive(scalars, lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6)
segmentations = st.one_of(
    things, st.lists(st.lists(numbers, max_size=8), max_size=3),
    st.fixed_dictionaries({"counts": st.one_of(st.text(), st.lists(big, max_size=5)),
                           "size": st.lists(big, max_size=3)}))
tame = st.tuples(*[st.floats(-20, 80)] * 4).map(list)
wild = st.lists(numbers, min_size=4, max_size=4)
box = st.one_of(tame, wild, st.lists(numbers, max_size=6), things)
KEYS = {"images": ["id", "file_name", "width", "height", "license", "coco_url"],
        "annotations": ["id", "image_id", "category_id", "bbox", "area", "iscrowd",
                        "segmentation", "ignore", "score", "caption"],
        "categories": ["id", "name", "supercategory"]}


@st.composite
def jsons(draw):
    """A json that is right, with up to four changes, each anywhere and to anything."""
    n = draw(st.integers(0, 4))
    image_ids = draw(st.lists(st.one_of(st.integers(-5, 9), big), min_size=n, max_size=n,
                              unique=True))
    category_ids = draw(st.lists(st.integers(0, 95), min_size=1, max_size=3, unique=True))
    coco = {"images": [{"id": i, "file_name": draw(st.sampled_from(
                            EVIL if draw(st.integers(0, 11)) == 5 else NAMES)),
                        "width": 60, "height": 40} for i in image_ids],
            "categories": [{"id": i, "name": f"class {i}"} for i in category_ids],
            "annotations": []}
    for number in range(draw(st.integers(0, 6)) if n else 0):
        a = {"id": number, "image_id": draw(st.sampled_from(image_ids)),
             "category_id": draw(st.sampled_from(category_ids)),
             "bbox": draw(wild if draw(st.integers(0, 11)) == 5 else tame), "area": 5}
        if draw(st.booleans()):
            a |= {"iscrowd": draw(st.integers(0, 1)), "segmentation": draw(segmentations)}
        coco["annotations"].append(a)
    if coco["annotations"] and draw(st.integers(0, 99)) == 57:
        coco["annotations"] = [{**coco["annotations"][0], "id": i} for i in range(3000)]
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 4]))):
        name = draw(st.sampled_from(sorted(KEYS)))
        entries, key = coco.get(name), draw(st.sampled_from(KEYS[name]))
        if draw(st.integers(0, 19)) == 7:
            coco[draw(st.sampled_from([name, "info", "licenses"]))] = draw(things)
            continue
        if not isinstance(entries, list) or not entries:
            continue
        i = draw(st.integers(0, len(entries) - 1))
        kind = draw(st.sampled_from(["set", "set", "set", "drop", "twice", "thing", "evil"]))
        if kind == "thing":
            entries[i] = draw(things)
        elif kind == "twice":
            entries.append(entries[i])
        elif isinstance(entries[i], dict):
            entries[i] = dict(entries[i])
            if kind == "evil" and name == "images":
                entries[i]["file_name"] = draw(st.one_of(st.sampled_from(EVIL), st.text()))
            elif kind == "drop":
                entries[i].pop(key, None)
            else:
                values = {"bbox": box, "segmentation": segmentations, "file_name": st.text()}
                entries[i][key] = draw(values.get(key, st.one_of(things, numbers)))
    return coco


def test_any_json_gives_valid_tensors_or_a_sentence(root, monkeypatch):
    """6000 of them, also with mostly wrong boxes; a fifth at least is valid and a fifth is refused,
    or little would be shown."""
    monkeypatch.setattr(coco_json, "MOST_WRONG", 1)
    seen, before = collections.Counter(), tree(root.parent / "outside")
    path = root / "annotations" / "instances_val.json"

    @examples(6000)
    @hypothesis.given(jsons(), st.sampled_from(TRANSFORMS))
    def run(coco, transform):
        path.write_text(json.dumps(coco))
        seen[outcome(root, "val", transform=transform)] += 1
    run()
    assert min(seen["valid"], seen["refused"]) > sum(seen.values()) / 5, seen
    assert tree(root.parent / "outside") == before


@pytest.mark.parametrize("name", EVIL, ids=ascii)
def test_each_odd_name_alone(root, name):
    """Only ../val/ok.png leads to a picture in the folder."""
    (root / "annotations" / "instances_val.json").write_text(json.dumps(
        GOOD | {"images": [{**image, "file_name": name} for image in GOOD["images"]]}))
    assert outcome(root) == ("valid" if name == "../val/ok.png" else "refused")


def test_a_damaged_file_of_json_is_refused_or_still_right(root):
    """1000 texts: cut, with bytes replaced, doubled, or nested thousands deep."""
    path = root / "annotations" / "instances_val.json"
    images = [{**image, "file_name": "ok.png"} for image in GOOD["images"]]
    text = json.dumps(GOOD | {"images": images}).encode()

    @examples(1000)
    @hypothesis.given(st.integers(0, len(text)), st.binary(max_size=6), st.integers(0, 9),
                      st.sampled_from(["insert", "cut", "replace", "nest", "utf-16", "bom"]))
    def run(at, noise, cut, kind):
        path.write_bytes({
            "insert": text[:at] + noise + text[at:], "cut": text[:at],
            "replace": text[:at] + noise + text[at + cut:],
            "nest": text[:at] + b"[" * 10 ** (cut % 6) + text[at:],
            "utf-16": text.decode().encode("utf-16")[:at], "bom": b"\xef\xbb\xbf" + text}[kind])
        outcome(root)
    run()


# ---------------------------------------------------------------- pictures

MODES = {"1": "PNG TIFF GIF BMP", "L": "PNG JPEG TIFF GIF BMP WEBP", "P": "PNG GIF BMP TIFF",
         "RGB": "PNG JPEG TIFF BMP WEBP PPM", "RGBA": "PNG TIFF WEBP", "LA": "PNG TIFF",
         "CMYK": "JPEG TIFF", "I;16": "PNG TIFF", "I": "TIFF", "F": "TIFF", "YCbCr": "JPEG"}
SIZES = [(60, 40), (40, 60), (1, 1), (2, 1), (1, 150), (199, 1), (1500, 10), (300, 300), (17, 31)]


@functools.lru_cache(maxsize=None)
def encoded(mode, kind, size, orientation):
    """A picture file of noise, as bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture = Image.fromarray(noise)
    if mode == "I;16":
        picture = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
    elif mode == "LA":
        picture = picture.convert("RGBA").convert("LA")
    else:
        picture = picture.convert("I" if mode == "I" else mode)
    options, file = {}, io.BytesIO()
    if orientation and kind in ("PNG", "JPEG", "WEBP"):
        options["exif"] = exif = Image.Exif()
        exif[0x0112] = orientation
    picture.save(file, kind, **options)
    return file.getvalue()


@st.composite
def pictures(draw):
    """-> bytes of a file, its size in the json, and whether it must be readable"""
    mode = draw(st.sampled_from(sorted(MODES)))
    kind, size = draw(st.sampled_from(MODES[mode].split())), draw(st.sampled_from(SIZES))
    content = encoded(mode, kind, size, draw(st.integers(0, 9)))
    damage = draw(st.sampled_from(
        ["none", "none", "none", "none", "none", "cut", "noise", "noise", "html", "junk", "eps"]))
    if damage == "cut":
        content = content[:draw(st.integers(0, len(content) - 1))]
    if damage == "noise":
        at, noise = draw(st.integers(0, min(len(content), 400))), draw(st.binary(max_size=8))
        content = content[:at] + noise + content[at + len(noise):]
    if damage == "html":
        content = b"<html>404 not found</html>"
    if damage == "junk":
        content = content[:draw(st.integers(0, 12))] + draw(st.binary(max_size=60))
    if damage == "eps":
        content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\nquit\n"
        size = (60, 40)
    wrong = draw(st.sampled_from([False, False, False, True]))
    said = draw(st.tuples(st.integers(-5, 400), st.integers(-5, 400))) if wrong else size
    return content, said, damage == "none" and said == size and mode != "F"     # F is refused


def test_any_picture_gives_valid_tensors_or_a_sentence(root):
    """3200 of them, under a name that says nothing of what they are; undamaged ones are read."""
    seen = collections.Counter()
    name, path = "odd.jpg", root / "annotations" / "instances_val.json"

    @examples(3200)
    @hypothesis.given(pictures(), st.sampled_from(TRANSFORMS))
    def run(picture, transform):
        content, (w, h), is_good = picture
        (root / "val" / name).write_bytes(content)
        path.write_text(json.dumps({
            "images": [{"id": 7, "file_name": name, "width": w, "height": h}],
            "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"image_id": 7, "category_id": 1, "bbox": [0, 0, w, h]}]}))
        result = outcome(root, transform=transform)
        assert result == "valid" or not is_good
        seen[result] += 1
    run()
    assert min(seen["valid"], seen["refused"]) > sum(seen.values()) / 6, seen


# ---------------------------------------------------------------- folders

FILES = ["data.yaml", "labels/a.txt", "labels/train/a.txt", "images/train/ok.png", "images/ok.png",
         "train/_annotations.coco.json", "valid/_annotations.coco.json", "val/ok.png", "ok.png",
         "train/ok.png", "valid/ok.png", "train/a.xml", "Annotations/a.xml", "JPEGImages/ok.png",
         "annotations/instances_train.json", "annotations/instances_val2017.json", "a.json",
         "annotations/a.json", "coco/annotations/instances_val.json", "coco/val/ok.png"]


def test_any_folder_gives_valid_tensors_or_a_sentence(tmp_path):
    """600 folders of up to 8 files of several layouts; folders may be links, jsons may be bad."""
    seen, root = collections.Counter(), tmp_path.resolve() / "data"
    outside = tmp_path.resolve() / "outside"
    outside.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    picture.save(outside / "secret.png")
    good = json.dumps(GOOD | {"images": [{**image, "file_name": "ok.png"}
                                         for image in GOOD["images"]]})

    @examples(600)
    @hypothesis.given(st.lists(st.sampled_from(FILES), max_size=8, unique=True),
                      st.sampled_from([good, good, good, "{}", "[", ""]), st.integers(0, 9),
                      st.sampled_from(["train", "val"]), st.floats(0.01, 0.9))
    def run(names, text, odd, split, share):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".png"):
                picture.save(root / name)
            else:
                (root / name).write_text(text)
        if odd == 1:
            (root / "labels2").symlink_to(root)                         # a loop
        if odd == 2 and not (root / "images").exists():
            (root / "images").write_text("a file, not a folder")
        seen[outcome(root, split, share)] += 1
    run()
    assert min(seen["valid"], seen["refused"]) > sum(seen.values()) / 20, seen
