"""Which layout a folder of data has, and whether the lines that convert it really do."""
import copy
import json
import pathlib
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from detr_min.data import coco_json, dataset, layouts, transforms
from detr_min.run import config, sets
from helpers import GOOD, write_coco

KEEP_SIZE = transforms.resize(60, 60)
BOX = torch.tensor([[0.35, 0.35, 0.5, 0.5]])        # of 60 x 40 pixels: x 6..36, y 4..24


def write_pictures(folder, names=("a.png", "b.png")):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def write_yolo(root, places):
    """Each (labels, pictures): a dog in picture a, nothing in b, of classes cat and dog."""
    for labels, pictures in places:
        write_pictures(root / pictures)
        (root / labels).mkdir(parents=True, exist_ok=True)
        (root / labels / "a.txt").write_text("1 0.35 0.35 0.5 0.5\n")
        (root / labels / "b.txt").write_text("")
    (root / "data.yaml").write_text("names: [cat, dog]\nnc: 2\n")


def write_voc(root, places):
    """The same, in xml; pixels count from 1 there."""
    for labels, pictures in places:
        write_pictures(root / pictures)
        (root / labels).mkdir(parents=True, exist_ok=True)
        objects = ("<object><name>dog</name><bndbox><xmin>7</xmin><ymin>5</ymin><xmax>37</xmax>"
                   "<ymax>25</ymax></bndbox></object>")
        for name, content in (("a", objects), ("b", "")):
            (root / labels / f"{name}.xml").write_text(
                f"<annotation><filename>{name}.png</filename><size><width>60</width><height>40"
                f"</height><depth>3</depth></size>{content}</annotation>")


FOREIGN = {
    "YOLO flat": (write_yolo, [("labels", "images")]),
    "YOLO by ultralytics": (write_yolo, [("labels/train", "images/train"),
                                         ("labels/val", "images/val")]),
    "YOLO of coco128": (write_yolo, [("labels/train2017", "images/train2017")]),
    "YOLO by Roboflow": (write_yolo, [("train/labels", "train/images"),
                                      ("valid/labels", "valid/images")]),
    "Pascal VOC": (write_voc, [("Annotations", "JPEGImages")]),
    "Pascal VOC by Roboflow": (write_voc, [("train", "train"), ("valid", "valid")])}


def convert(code):
    """Run the lines that convert a folder as a program of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, {"__name__": "__main__"})


def refusal(root, split="train"):
    with pytest.raises(FileNotFoundError) as error:
        dataset.open_folder(root, split, KEEP_SIZE)
    return str(error.value)


@pytest.mark.parametrize("name", FOREIGN)
def test_the_lines_that_convert_a_folder_do_so(tmp_path, name):
    """They are run, and the new folder opens with the dog where it was."""
    write, places = FOREIGN[name]
    write(tmp_path / "it's mine", places)
    said = refusal(tmp_path / "it's mine")
    sentence, *lines = said.split("\n")
    layout = "Pascal VOC" if "VOC" in name else "YOLO"
    assert f"instances_train.json exists; this is {layout} ({tmp_path}" in sentence
    assert sentence.endswith(f"for --coco {tmp_path / 'it'}'s mine_coco")
    assert len(lines) == 1 + len(places)
    pytest.importorskip("supervision", reason="pip install supervision")
    convert("\n".join(lines))
    for split in ("train", "val"):
        ds = dataset.open_folder(tmp_path / "it's mine_coco", split, KEEP_SIZE)
        assert ds.is_held_out == (split == "val" and len(places) == 1)
        assert len(ds) == (2 if len(places) == 2 else 1)
        names = [category["name"] for category in ds.categories]
        for _, target in ds:
            if len(target.labels):
                assert names[target.labels[0]] == "dog"
                assert_close(target.boxes, BOX, atol=1 / 40, rtol=0)    # a pixel: VOC's corners
        assert len(ds) == 1 or sorted(len(target.labels) for _, target in ds) == [0, 1]


def test_yolo_without_its_yaml_asks_for_the_names(tmp_path):
    write_yolo(tmp_path / "y", [("labels", "images")])
    (tmp_path / "y" / "data.yaml").unlink()
    assert f"after you wrote the class names into {tmp_path / 'y' / 'data.yaml'}" in refusal(
        tmp_path / "y")


def test_lines_that_convert_write_each_split_once(tmp_path):
    """Of a folder in several layouts the first one counts; a list of classes is no label file."""
    write_yolo(tmp_path / "y", [("labels/train", "images/train"), ("labels/val", "images/val")])
    (tmp_path / "y" / "labels" / "classes.txt").write_text("dog")
    write_voc(tmp_path / "y", [("Annotations", "JPEGImages")])
    sentence, _, train, val = refusal(tmp_path / "y").splitlines()
    assert "this is YOLO" in sentence and "VOC" not in sentence
    assert "labels/train'" in train and "labels/val'" in val


def roboflow_json():
    """As Roboflow exports: a group of all classes comes first, and may have the name of one."""
    coco = copy.deepcopy(GOOD)
    for category in coco["categories"]:
        category["supercategory"] = "dog"
    coco["categories"].insert(0, {"id": 0, "name": "dog", "supercategory": "none"})
    return coco


def test_roboflows_coco_export_is_read(tmp_path):
    coco = roboflow_json()
    for name in ("train", "valid", "test"):
        write_pictures(tmp_path / name, [image["file_name"] for image in coco["images"]])
        (tmp_path / name / "_annotations.coco.json").write_text(json.dumps(coco))
    for split in ("train", "val"):
        ds = dataset.open_folder(tmp_path, split, KEEP_SIZE)
        assert [category["name"] for category in ds.categories] == ["cat", "dog", "bird"]
        assert len(ds) == 4 and not ds.is_held_out
        assert ds[0][1].labels.tolist() == [1, 0]
    (tmp_path / "valid" / "_annotations.coco.json").unlink()
    assert len(dataset.open_folder(tmp_path, "val", KEEP_SIZE)) == 1


def test_a_group_that_has_objects_is_a_class():
    """And so is one that is no supercategory; COCO's own json keeps all classes."""
    coco = roboflow_json()
    coco["categories"][0]["name"] = "animal"
    assert len(coco_json.check(copy.deepcopy(coco), "x.json")["categories"]) == 4
    for category in coco["categories"][1:]:
        category["supercategory"] = "animal"
    assert len(coco_json.check(copy.deepcopy(coco), "x.json")["categories"]) == 3
    coco["annotations"][0]["category_id"] = 0
    assert len(coco_json.check(coco, "x.json")["categories"]) == 4


@pytest.mark.parametrize("path, pictures, prefix", [
    ("labels.json", "data", ""),                            # FiftyOne
    ("result.json", "images", "images/"),                   # Label Studio
    ("annotations/instances_default.json", "images", ""),   # CVAT
    ("annotations/default.json", "images/default", ""),     # Datumaro
    ("a.json", ".", "")])
def test_a_single_json_is_read_wherever_its_pictures_are(tmp_path, path, pictures, prefix):
    coco = copy.deepcopy(GOOD)
    write_pictures(tmp_path / pictures, [image["file_name"] for image in coco["images"]])
    for image in coco["images"]:
        image["file_name"] = prefix + image["file_name"]
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(json.dumps(coco))
    train, val = (dataset.open_folder(tmp_path, split, KEEP_SIZE) for split in ("train", "val"))
    assert len(train) == 3 and len(val) == 1 and val.is_held_out
    assert {picture.shape for ds in (train, val) for picture, _ in ds} == {(3, 40, 60)}


def test_pictures_of_cocos_layout_may_lie_in_a_folder_images(tmp_path):
    write_coco(tmp_path, GOOD, "train")
    (tmp_path / "images").mkdir()
    (tmp_path / "train").rename(tmp_path / "images" / "train")
    assert layouts.find(tmp_path, "train").folders == [tmp_path / "images" / "train"]


def test_several_jsons_are_listed(tmp_path):
    write_pictures(tmp_path)
    for name in "fedcba":
        (tmp_path / f"{name}.json").write_text(json.dumps(GOOD))
    assert refusal(tmp_path).endswith("; of its 6 jsons (a.json, b.json, c.json, d.json, e.json, "
                                      "...), rename the one to train on as above, and one to "
                                      "validate on, if there is one, to instances_val.json")


def test_a_folder_one_too_high_is_noticed(tmp_path):
    write_coco(tmp_path / "coco" / "coco", GOOD, "val")
    assert refusal(tmp_path / "coco").endswith(f"; is {tmp_path / 'coco' / 'coco'} meant?")
    write_coco(tmp_path / "coco" / "coco", GOOD, "test")
    assert refusal(tmp_path / "coco" / "coco" / "annotations").endswith(
        f"; is {tmp_path / 'coco' / 'coco'} meant?")
    (tmp_path / "high" / "low").mkdir(parents=True)
    (tmp_path / "high" / "low" / "one.json").write_text("{}")           # a json of any name
    assert refusal(tmp_path / "high").endswith(f"; is {tmp_path / 'high' / 'low'} meant?")
    write_yolo(tmp_path / "outer" / "mine", [("labels", "images")])
    assert refusal(tmp_path / "outer").endswith(f"; is {tmp_path / 'outer' / 'mine'} meant?")


def test_a_validation_json_is_never_trained_on(tmp_path):
    """It may be the only json in the folder."""
    write_coco(tmp_path, GOOD, "val")
    assert "copy or rename it to train" in refusal(tmp_path)
    assert not layouts.find(tmp_path, "val").is_shared


def test_a_folder_of_pictures_alone_is_told_what_is_missing(tmp_path):
    write_pictures(tmp_path)
    assert refusal(tmp_path) == (f"neither {tmp_path}/annotations/instances_train2017.json nor "
                                 f"{tmp_path}/annotations/instances_train.json exists; no json of "
                                 "boxes lies there in a layout that is read (docs/data.md shows "
                                 "them)")


# ---------------------------------------------------------------- docs/data.md

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "data.md").read_text()
TREES = [tree.split() for tree in re.findall(r"```text\n(.*?)```", PAGE, re.S)]
CODE = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE, re.S))
COMMANDS = re.findall(r"^python train.py (.*)", PAGE, re.M)


@pytest.mark.parametrize("tree", TREES, ids=["coco", "roboflow", "single"])
def test_each_folder_of_the_page_is_read_by_its_commands(tmp_path, monkeypatch, tree):
    """A json describes the pictures in its own folder, in images/ or in the one of its name."""
    monkeypatch.chdir(tmp_path)
    for path in map(pathlib.Path, tree):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jpg":
            write_pictures(path.parent, [path.name])
    for path in (path for path in map(pathlib.Path, tree) if path.suffix == ".json"):
        near = [path.parent, path.parent / "images",
                path.parent.parent / path.stem.removeprefix("instances_")]
        names = sorted({picture.name for folder in near for picture in folder.glob("*.jpg")})
        path.write_text(json.dumps({
            "categories": [{"id": 4, "name": "person"}, {"id": 9, "name": "dog"}],
            "images": [{"id": i, "file_name": name, "width": 60, "height": 40}
                       for i, name in enumerate(names)],
            "annotations": [{"image_id": i, "category_id": 9, "bbox": [6, 4, 30, 20]}
                            for i in range(len(names))]}))
    assert len(COMMANDS) == 3
    for command in COMMANDS:
        cfg, _ = config.parse("", command.split())
        train_set, _ = sets.open_train(cfg)
        val_set = sets.open_val(cfg, train_set.categories)
        assert (len(train_set), len(val_set)) == (1, 1)
        assert val_set.is_held_out == (tree == TREES[2])
        assert [target.labels.tolist() for _, target in val_set] == [[1]]


@pytest.mark.parametrize("name, write, places", [
    ("yolo", write_yolo, FOREIGN["YOLO by Roboflow"][1]),
    ("voc", write_voc, FOREIGN["Pascal VOC"][1])])
def test_the_lines_of_the_page_are_those_of_the_message_and_work(tmp_path, monkeypatch, name, write,
                                                                 places):
    monkeypatch.chdir(tmp_path)
    write(pathlib.Path(f"my_{name}"), places)
    lines = refusal(pathlib.Path(f"my_{name}")).replace("'", '"').replace(f"my_{name}_coco",
                                                                         "my_data").splitlines()
    on_page = CODE[name].strip().replace("(\n    ", "(")        # broken there, to fit a page
    assert "\n".join(line.strip() for line in lines[1:]) == on_page
    pytest.importorskip("supervision", reason="pip install supervision")
    convert(CODE[name])
    for split in ("train", "val"):
        assert len(dataset.open_folder("my_data", split, KEEP_SIZE)) == len(places)
