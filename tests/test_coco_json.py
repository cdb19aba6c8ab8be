"""A COCO json is checked before any of it is used: which faults are told, in one sentence each."""
import copy
import warnings

import pytest

from detr_min.data import coco_json, dataset, transforms
from helpers import GOOD, write_coco

KEEP_SIZE = transforms.resize(60, 60)       # long side to 60 px, which nearly all pictures have


def broken(change):
    coco = copy.deepcopy(GOOD)
    change(coco)
    return coco


def set_in(entry, **values):
    return lambda coco: coco[entry][1].update(values)


BROKEN = {
    "not json": ('{"images": [', r"not valid json \(.*line 1 column 13.*download"),
    "empty file": ("", "not valid json"),
    "nested": ("[" * 200_000 + "]" * 200_000, "not valid json .*recursion"),
    "many digits": ('{"images": ' + "9" * 5000 + "}", "not valid json .*digits"),
    "results": ([{"image_id": 11}], "object-detection json is expected"),
    "no annotations": (broken(lambda c: c.pop("annotations")), "test images have no annotations"),
    "no categories": (broken(lambda c: c.pop("categories")), "needs the lists .*categories"),
    "annotation twice": (broken(set_in("annotations", id=1)), "annotations has the id 1 more than"),
    "image twice": (broken(set_in("images", id=11)), "images has the id 11 more than once"),
    "category twice": (broken(set_in("categories", id=7)), "categories has the id 7 more than"),
    "image without size": (broken(lambda c: c["images"][1].pop("width")), "no width: .*12.png"),
    "class without name": (broken(lambda c: c["categories"][1].pop("name")), "no name: .*'id': 3"),
    "no bbox": (broken(lambda c: c["annotations"][1].pop("bbox")),
                "annotation 2 of image 11: it has no bbox"),
    "three numbers": (broken(set_in("annotations", bbox=[1, 2, 3])),
                      r"annotation 2 of image 11: .*four finite numbers.*not \[1, 2, 3\]"),
    "nan": (broken(set_in("annotations", bbox=[float("nan"), 1, 2, 3])),
            r"annotation 2 of image 11: .*four finite numbers.*nan"),
    "text": (broken(set_in("annotations", bbox=["1", "1", "2", "3"])), "four finite numbers"),
    "unknown image": (broken(set_in("annotations", image_id=99)),
                      "annotation 2 of image 99: there is no image with id 99"),
    "unknown category": (broken(set_in("annotations", category_id=0)),
                         "annotation 2 of image 11: there is no category with id 0"),
    "no images": (GOOD | {"images": [], "annotations": []}, "has 0 images"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_json_is_refused_in_one_sentence(tmp_path, case):
    coco, sentence = BROKEN[case]
    with pytest.raises(coco_json.DataError, match=sentence) as error:
        dataset.open_folder(write_coco(tmp_path, coco), "val", KEEP_SIZE)
    assert "instances_val.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, sentence", [
    ({"categories": []}, "has no categories"),
    ({"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]},
     "name 'cat' more than once"),
    ({"images": [5]}, "one of images is no COCO entry: 5"),
    ({"iscrowd": "0"}, "iscrowd must be 0 or 1, not '0'"),
    ({"area": "1"}, "area must be a finite number of pixels, not '1'"),
    ({"area": 10 ** 400}, "area must be a finite number of pixels, not 1000.*0000$"),
    ({"bbox": [1, 2, 10 ** 400, 4]}, r"four finite numbers of pixels .* not \[1, 2, 10.*00, 4\]$"),
    ({"images": [{"id": 10 ** 400, "file_name": "a", "width": 1, "height": 1}]},
     "one of images has the id 10.*00, which is beyond 2.53"),
    ({"images": [{"id": 1, "file_name": "\ud800.png", "width": 1, "height": 1}]},
     r"file_name '\\ud800.png', which holds half a character: written in another"),
    ({"categories": [{"id": 1, "name": "\udfff"}]}, r"name '\\udfff', which holds half a char"),
    ({"categories": [{"id": 1, "name": [[[[[[[[]]]]]]]]}]}, "has the name .* is not of type str"),
    ({"images": [{"id": 1, "file_name": "a", "width": 9.0, "height": 9}]},
     "one of images has the width 9.0, which is not of type int"),
    ({"image_id": "1"}, "no image with id '1': .* written as text"),
    ({"category_id": {}}, "no category with id {}")])
def test_entries_that_would_go_wrong_later_are_refused(change, sentence):
    """Crowds by accident, lost objects, or a crash in pycocotools at the first validation."""
    whole = {"images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}],
             "categories": [{"id": 1, "name": "cat"}],
             "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]}
    name = next(iter(change))
    (whole if name in whole else whole["annotations"][0]).update(change)
    with pytest.raises(coco_json.DataError, match=sentence) as error:
        coco_json.check(whole, "some.json")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("change", [
    lambda x, y, w, h: [x + 60, y, x + 60 + w, y + h],       # corners, as Pascal VOC writes them
    lambda x, y, w, h: [x / 60, y / 40, w / 60, h / 40],     # shares of the image, as YOLO does
    lambda x, y, w, h: [x + w, y, -w, h]])                   # drawn from right to left
def test_boxes_of_another_format_are_warned_about_or_refused(tmp_path, change):
    """2 of 6: a warning. 4 of 6: no training on boxes that are mostly wrong."""
    for number, outcome in (2, pytest.warns(UserWarning, match="2 of 6 boxes .* corners x1, y1")), (
            4, pytest.raises(coco_json.DataError, match="4 of 6 boxes .* in .0, 1.?")):
        coco = copy.deepcopy(GOOD)
        for a in coco["annotations"][:number]:
            a["bbox"] = change(*a["bbox"])
        with outcome:
            dataset.open_folder(write_coco(tmp_path / str(number), coco), "val", KEEP_SIZE)


def test_a_backslash_parts_folders_as_on_windows(tmp_path):
    coco = copy.deepcopy(GOOD)
    name = coco["images"][0]["file_name"]
    coco["images"][0]["file_name"] = f"a\\{name}"
    folder = write_coco(tmp_path, coco) / "val"
    (folder / "a").mkdir()
    (folder / name).rename(folder / "a" / name)
    assert len(dataset.open_folder(tmp_path, "val", KEEP_SIZE)) == len(GOOD["images"])


def test_good_boxes_are_not_warned_about(tmp_path):
    """Nor the only one that an image of one pixel can have."""
    pixel = {**GOOD, "images": [{"id": 7, "file_name": "a.png", "width": 1, "height": 1}],
             "annotations": [{**GOOD["annotations"][0], "image_id": 7, "bbox": [0, 0, 1, 1]}]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset.open_folder(write_coco(tmp_path, GOOD), "val", KEEP_SIZE)
        coco_json.check(pixel, tmp_path / "pixel.json")


@pytest.mark.parametrize("name", ["../../secret.png", "a/../../../b.png", "/etc/passwd.png",
                                  "C:\\pictures\\a.png", "..\\..\\b.png", ""])
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path, name):
    coco = copy.deepcopy(GOOD)
    coco["images"][1]["file_name"] = name
    with pytest.raises(coco_json.DataError, match="leaves the data set's folder"):
        coco_json.check(coco, tmp_path / "x.json")
    for inside in ("sub/folder/a..b.png", "../train/b.png"):
        coco["images"][1]["file_name"] = inside
        coco_json.check(coco, tmp_path / "x.json")


def test_outlines_are_not_kept_in_memory():
    """A json of COCO is mostly these; boxes and areas are its own."""
    coco = copy.deepcopy(GOOD)
    for annotation in coco["annotations"]:
        annotation["segmentation"] = [[0.5] * 1000]
    kept = coco_json.index(coco_json.check(coco, "it.json")).anns
    assert list(kept.values()) == GOOD["annotations"]
