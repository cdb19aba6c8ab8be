"""A COCO folder on disk: which pictures are read how, and which faults are told in one sentence.

COCO_SAMPLE names a folder of sample data sets (bccd, coco_cc, tiny_fixture and
coco_edge_cases_synthetic); without it the tests on those are skipped, and small folders written
here prove nearly the same.
"""
import copy
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from detr_min.data import coco_folder, dataset, transforms
from helpers import GOOD, write_coco

KEEP_SIZE = transforms.resize(60, 60)       # long side to 60 px, which nearly all pictures have


# ---------------------------------------------------------------- all kinds of pictures

def gradient(h=40, w=60):
    """(h, w, 3) uint8, different in every corner and channel, so that a turn or a swap shows."""
    ys, xs = np.mgrid[0:h, 0:w]
    return np.stack((xs * 255 // w, ys * 255 // h, (xs + ys) * 255 // (h + w)), 2).astype(np.uint8)


def read(folder, picture, name="p.png", size=(60, 40), **options):
    picture.save(folder / name, **options)
    image = {"id": 5, "file_name": name, "width": size[0], "height": size[1]}
    return np.asarray(coco_folder.read_picture(folder, image))


def test_gray_palette_and_bilevel_become_rgb(tmp_path):
    gray = gradient()[:, :, 0]
    expected = np.repeat(gray[:, :, None], 3, 2)
    np.testing.assert_array_equal(read(tmp_path, Image.fromarray(gray)), expected)
    palette = Image.fromarray(gray).convert("P")
    np.testing.assert_array_equal(read(tmp_path, palette), expected)
    bilevel = Image.fromarray(gray > 127)
    np.testing.assert_array_equal(read(tmp_path, bilevel), np.where(expected > 127, 255, 0))


def test_16_bit_gray_is_scaled_not_clipped(tmp_path):
    gray = gradient()[:, :, 0]
    wide = Image.fromarray(gray.astype(np.uint16) * 257)             # 0..65535 = 257 * (0..255)
    np.testing.assert_array_equal(read(tmp_path, wide), np.repeat(gray[:, :, None], 3, 2))


def test_transparency_is_laid_over_white(tmp_path):
    alpha = np.full((40, 60, 1), 255, np.uint8)
    alpha[:20] = 0                                                   # the upper half is invisible
    rgba = np.concatenate((gradient(), alpha), 2)
    expected = np.where(alpha > 0, gradient(), 255)
    np.testing.assert_array_equal(read(tmp_path, Image.fromarray(rgba)), expected)
    gray_alpha = read(tmp_path, Image.fromarray(rgba).convert("LA"))
    assert (gray_alpha[:20] == 255).all() and (gray_alpha[20:] < 255).any()
    gray = Image.fromarray(gradient()[:, :, 0]).convert("P")         # one palette entry transparent
    turned_white = read(tmp_path, gray, transparency=int(np.asarray(gray)[0, 30]))
    assert (turned_white[:, 30] == 255).all() and (turned_white[:, 0] == 0).all()


def test_cmyk_is_not_inverted(tmp_path):
    difference = read(tmp_path, Image.fromarray(gradient()).convert("CMYK"), "p.jpg", quality=95)
    assert np.abs(difference.astype(int) - gradient()).mean() < 5    # of 255; JPEG is not exact


@pytest.mark.parametrize(("tag", "size", "turned"), [
    (6, (60, 40), False),        # the json has the stored size: the boxes are in the stored frame
    (6, (40, 60), True),         # the json has the turned size: the boxes are in the turned frame
    (3, (60, 40), False)])       # upside down: the size cannot tell, so the tag is ignored
def test_the_json_size_decides_about_the_exif_tag(tmp_path, tag, size, turned):
    exif = Image.Exif()
    exif[0x0112] = tag
    picture = read(tmp_path, Image.fromarray(gradient()), size=size, exif=exif)
    expected = np.rot90(gradient(), -1) if turned else gradient()    # tag 6: show turned clockwise
    np.testing.assert_array_equal(picture, expected)


def test_unreadable_pictures_are_named_with_file_and_image_id(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png"):
        noise.save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1500])
    (tmp_path / "text.jpg").write_text("<html>404 not found</html>")
    for name in ("cut.jpg", "cut.png", "text.jpg"):
        image = {"id": 5, "file_name": name, "width": 60, "height": 40}
        with pytest.raises(coco_folder.DataError, match=rf"{name} \(image id 5\) cannot be read"):
            coco_folder.read_picture(tmp_path, image)
    with pytest.raises(coco_folder.DataError,
                       match=r"p.png \(image id 5\) has 60x40 pixels but 40x60"):
        read(tmp_path, noise, size=(40, 60))                         # turned in the json, no tag


# ---------------------------------------------------------------- what is refused

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
    "image without size": (broken(lambda c: c["images"][1].pop("width")), "no width .*12.png"),
    "class without name": (broken(lambda c: c["categories"][1].pop("name")), "no name .*'id': 3"),
    "no bbox": (broken(lambda c: c["annotations"][1].pop("bbox")),
                "annotation 2 of image 11: it has no bbox"),
    "three numbers": (broken(set_in("annotations", bbox=[1, 2, 3])),
                      r"annotation 2 of image 11: .*four finite numbers.*not \[1, 2, 3\]"),
    "nan": (broken(set_in("annotations", bbox=[float("nan"), 1, 2, 3])),
            r"annotation 2 of image 11: .*four finite numbers.*nan"),
    "text": (broken(set_in("annotations", bbox=["1", "1", "2", "3"])), "four finite numbers"),
    "unknown image": (broken(set_in("annotations", image_id=99)),
                      "annotation 2 of image 99: image_id 99 is not in images"),
    "unknown category": (broken(set_in("annotations", category_id=0)),
                         "annotation 2 of image 11: category_id 0 is not in categories"),
    "no images": (GOOD | {"images": [], "annotations": []}, "has 0 images"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_json_is_refused_in_one_sentence(tmp_path, case):
    coco, sentence = BROKEN[case]
    with pytest.raises(coco_folder.DataError, match=sentence) as error:
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
    ({"categories": [{"id": 1, "name": [[[[[[[[]]]]]]]]}]}, "one of categories has no name"),
    ({"image_id": "1"}, "image_id '1' is not in images.*text for a number"),
    ({"category_id": {}}, "category_id {} is not in categories")])
def test_entries_that_would_go_wrong_later_are_refused(change, sentence):
    """Crowds by accident, lost objects, or a crash in pycocotools at the first validation."""
    whole = {"images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}],
             "categories": [{"id": 1, "name": "cat"}],
             "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]}
    name = next(iter(change))
    (whole if name in whole else whole["annotations"][0]).update(change)
    with pytest.raises(coco_folder.DataError, match=sentence) as error:
        coco_folder.check(whole, "some.json")
    assert len(str(error.value)) < 400


def test_missing_folders_and_files_are_named(tmp_path):
    def refused(sentence, split="val"):
        with pytest.raises(FileNotFoundError, match=sentence):
            dataset.open_folder(tmp_path / "coco", split, KEEP_SIZE)
    refused("coco is no folder")
    write_coco(tmp_path / "coco", GOOD)
    refused("instances_train2017.json nor .*instances_train.json exists; where only val", "train")
    (tmp_path / "coco" / "val" / "13.png").write_bytes(b"")
    refused(r"13.png \(image id 13\) .*missing or empty")
    (tmp_path / "coco" / "val" / "13.png").unlink()
    refused(r"13.png \(image id 13\) .*missing or empty")
    shutil.rmtree(tmp_path / "coco" / "val")
    refused("instances_val.json is there but not its pictures")
    (tmp_path / "coco" / "annotations" / "instances_val.json").unlink()
    refused("instances_val2017.json nor .*instances_val.json exists$")


@pytest.mark.parametrize("change", [
    lambda x, y, w, h: [x, y, x + w, y + h],                 # corners, as Pascal VOC writes them
    lambda x, y, w, h: [x / 60, y / 40, w / 60, h / 40]])    # shares of the image, as YOLO does
def test_boxes_of_another_format_are_warned_about(tmp_path, change):
    coco = copy.deepcopy(GOOD)
    for a in coco["annotations"]:
        a["bbox"] = change(*a["bbox"])
    with pytest.warns(UserWarning, match="corners x1, y1, x2, y2 or in .0, 1.?"):
        dataset.open_folder(write_coco(tmp_path, coco), "val", KEEP_SIZE)


def test_good_boxes_are_not_warned_about(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset.open_folder(write_coco(tmp_path, GOOD), "val", KEEP_SIZE)


# ---------------------------------------------------------------- sample data

# each file of annotations/broken: when it is caught, and by which words; None: it is read
BROKEN_FILES = {
    "dangling_image_id": ("open", "annotation 32 of image 9999: image_id 9999 is not in images"),
    "duplicate_annotation_ids": ("open", "annotations has the id 1 more than once"),
    "duplicate_image_ids": ("open", "images has the id 8 more than once"),
    "missing_image_file": ("open", r"not_there.jpg \(image id 8\) .*missing"),
    "nan_box": ("open", "annotation 32 of image 8: bbox must be four finite numbers"),
    "no_annotations_key": ("open", "needs the lists images, annotations, categories"),
    "no_bbox_key": ("open", "annotation 32 of image 8: it has no bbox"),
    "no_iscrowd_key": (None, ""),
    "three_number_box": ("open", "annotation 32 of image 8: bbox must be four finite numbers"),
    "truncated_jpeg": ("read", r"truncated.jpg \(image id 8\) cannot be read"),
    "unknown_category": ("open", "annotation 32 of image 8: category_id 12 is not in categories"),
    "wrong_image_size": ("read", r"08_duplicates.jpg \(image id 8\) has 240x160 pixels but 480x"),
}


def test_no_broken_file_is_left_out(coco_sample):
    folder = coco_sample / "coco_edge_cases_synthetic" / "annotations" / "broken"
    assert sorted(path.stem for path in folder.iterdir()) == sorted(BROKEN_FILES)


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_every_broken_file_is_caught_by_name(coco_sample, tmp_path, name):
    root, (moment, sentence) = coco_sample / "coco_edge_cases_synthetic", BROKEN_FILES[name]
    (tmp_path / "annotations").mkdir()
    for folder in ("val", "broken"):
        shutil.copytree(root / folder, tmp_path / folder)
    (tmp_path / "annotations" / "instances_val.json").symlink_to(
        root.resolve() / "annotations" / "broken" / f"{name}.json")
    if moment == "open":
        with pytest.raises((coco_folder.DataError, FileNotFoundError), match=sentence):
            dataset.open_folder(tmp_path, "val", KEEP_SIZE)
        return
    ds = dataset.open_folder(tmp_path, "val", KEEP_SIZE)
    if moment == "read":
        with pytest.raises(coco_folder.DataError, match=sentence):
            ds[0]
    else:
        assert len(ds[0][1].labels) == 5 and ds.coco.anns[32]["iscrowd"] == 0


@pytest.mark.parametrize("name", ["../../secret.png", "a/../../../b.png", "/etc/passwd.png",
                                  "C:\\pictures\\a.png", "..\\..\\b.png", ""])
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path, name):
    coco = copy.deepcopy(GOOD)
    coco["images"][1]["file_name"] = name
    with pytest.raises(coco_folder.DataError, match="leaves the data set's folder"):
        coco_folder.check(coco, tmp_path / "x.json")
    for inside in ("sub/folder/a..b.png", "../train/b.png"):
        coco["images"][1]["file_name"] = inside
        coco_folder.check(coco, tmp_path / "x.json")
