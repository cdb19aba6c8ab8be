"""From a COCO folder to a batch: what is read, what is refused, and that chance is repeatable.

COCO_SAMPLE names a folder of sample data sets (bccd, coco_cc, tiny_fixture and
coco_edge_cases_synthetic); without it the tests on those are skipped, and small folders written
here prove nearly the same.
"""
import copy
import itertools
import json
import math
import os
import pathlib
import pickle
import shutil
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision import ops, tv_tensors

from detr_min.data import batches, coco_folder, dataset, shapes, transforms

SAMPLE = pathlib.Path(os.environ.get("COCO_SAMPLE", "not set"))
needs_sample = pytest.mark.skipif(not SAMPLE.is_dir(), reason="COCO_SAMPLE names no folder")
KEEP_SIZE = transforms.resize(60, 60)        # long side to 60 px, which nearly all pictures here have


def annotation(id_, image_id, category_id, bbox, iscrowd=0):
    return {"id": id_, "image_id": image_id, "category_id": category_id, "bbox": bbox,
            "area": bbox[2] * bbox[3], "iscrowd": iscrowd}


# Four 60x40 images: 11 has a dog, a cat and a crowd of cats; 12 nothing; 13 a bird; 14 two cats.
# The ids have gaps and are not in order: cat 3 -> label 0, dog 7 -> 1, bird 90 -> 2.
GOOD = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40}
               for i in (11, 12, 13, 14)],
    "categories": [{"id": 90, "name": "bird"}, {"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    "annotations": [annotation(1, 11, 7, [6, 4, 30, 20]), annotation(2, 11, 3, [30, 10, 15, 20]),
                    annotation(3, 11, 3, [0, 0, 60, 40], iscrowd=1),
                    annotation(4, 13, 90, [1.5, 2.5, 12, 8]),
                    annotation(5, 14, 3, [10, 10, 9, 9]), annotation(6, 14, 3, [40, 5, 9, 30])],
}


def write(root, coco, split="val", layout="{}"):
    """A COCO folder with a different random picture for each image."""
    name = layout.format(split)
    (root / name).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    text = coco if isinstance(coco, str) else json.dumps(coco)
    (root / "annotations" / f"instances_{name}.json").write_text(text)
    for image in GOOD["images"]:
        pixels = np.random.default_rng(image["id"]).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name / image["file_name"])
    return root


def to_pixels(picture):
    """A normalised image back to uint8 (h, w, 3)."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (transforms.MEAN, transforms.STD))
    return ((picture * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


# ---------------------------------------------------------------- what is read

def test_target_worked_by_hand(tmp_path):
    ds = dataset.open_folder(write(tmp_path, GOOD), "val", KEEP_SIZE)
    picture, target = ds[0]
    # dog, id 7 -> label 1: x 6..36 of 60, y 4..24 of 40: centre (.35, .35), size (.5, .5)
    # cat, id 3 -> label 0: x 30..45, y 10..30: centre (.625, .5), size (.25, .5)
    # the crowd of cats is no target
    assert_close(target.labels, torch.tensor([1, 0]))
    assert_close(target.boxes, torch.tensor([[0.35, 0.35, 0.5, 0.5], [0.625, 0.5, 0.25, 0.5]]))
    assert (target.image_id, target.size_px) == (11, (40, 60))
    expected = np.random.default_rng(11).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_pixels(picture), expected)
    assert picture.dtype == target.boxes.dtype == torch.float32
    assert type(picture) is type(target.boxes) is torch.Tensor      # no tv_tensor leaves the file


def test_categories_are_mapped_by_ascending_id_and_the_json_stays_whole(tmp_path):
    ds = dataset.open_folder(write(tmp_path, GOOD), "val", KEEP_SIZE)
    assert ds.categories == [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"},
                             {"id": 90, "name": "bird"}]
    assert ds.image_ids == [11, 12, 13, 14]
    assert [a["iscrowd"] for a in ds.coco.loadAnns(ds.coco.getAnnIds(imgIds=11))] == [0, 0, 1]
    assert ds.coco.getCatIds() == [90, 3, 7]


def test_image_without_objects_is_kept(tmp_path):
    for transform in (KEEP_SIZE, transforms.flip_only(), transforms.multi_scale_and_crop(64, 100)):
        ds = dataset.open_folder(write(tmp_path / str(id(transform)), GOOD), "val", transform)
        target = ds[1][1]
        assert target.boxes.shape == (0, 4) and target.boxes.dtype == torch.float32
        assert target.labels.shape == (0,) and target.labels.dtype == torch.int64


def test_json_without_any_annotation_is_no_error(tmp_path):
    ds = dataset.open_folder(write(tmp_path, GOOD | {"annotations": []}), "val", KEEP_SIZE)
    assert [len(target.labels) for _, target in ds] == [0, 0, 0, 0]


def test_boxes_are_clipped_and_those_without_area_dropped(tmp_path):
    boxes = [[-10, -5, 30, 25],          # over the top left corner -> 0..20, 0..20
             [50, 30, 20, 20],           # over the bottom right corner -> 50..60, 30..40
             [5, 5, 0, 9], [5, 5, 9, 0], [9, 9, -4, 5],              # no width, no height, negative
             [60, 3, 8, 9], [-9, 3, 9, 9],                           # touch the image from outside
             [30.25, 20.25, 0.5, 0.5]]   # half a pixel is a box
    coco = GOOD | {"annotations": [annotation(i, 12, 90, box) for i, box in enumerate(boxes, 1)]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # 3 of 8 leave the image
        target = dataset.open_folder(write(tmp_path, coco), "val", KEEP_SIZE)[1][1]
    expected = torch.tensor([[0, 0, 20, 20], [50, 30, 60, 40], [30.25, 20.25, 30.75, 20.75]])
    xyxy_px = ops.box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor([60, 40, 60, 40])
    assert_close(xyxy_px, expected)
    assert_close(target.labels, torch.tensor([2, 2, 2]))


@pytest.mark.parametrize("layout", ["{}2017", "{}"])
def test_both_layouts(tmp_path, layout):
    write(tmp_path, GOOD, "train", layout)
    write(tmp_path, GOOD | {"images": GOOD["images"][:3], "annotations": []}, "val", layout)
    assert len(dataset.open_folder(tmp_path, "train", transforms.flip_only())) == 4
    assert len(dataset.open_folder(str(tmp_path), "val", transforms.flip_only())) == 3     # str or Path


def test_ids_of_0_missing_keys_and_pycocotools_chatter(tmp_path, capsys):
    """pycocotools counts no object with id 0 as found and needs iscrowd, area and info."""
    coco = copy.deepcopy(GOOD)
    for number, a in enumerate(coco["annotations"]):
        a["id"] = number
        del a["iscrowd"], a["area"]
    ds = dataset.open_folder(write(tmp_path, coco), "val", KEEP_SIZE)
    assert sorted(ds.coco.anns) == [1, 2, 3, 4, 5, 6]
    assert ds.coco.anns[1]["area"] == 600 and ds.coco.anns[1]["iscrowd"] == 0
    assert "info" in ds.coco.dataset
    assert capsys.readouterr().out == ""


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
        dataset.open_folder(write(tmp_path, coco), "val", KEEP_SIZE)
    assert "instances_val.json" in str(error.value) and "\n" not in str(error.value)


def test_missing_folders_and_files_are_named(tmp_path):
    def refused(sentence, split="val"):
        with pytest.raises(FileNotFoundError, match=sentence):
            dataset.open_folder(tmp_path / "coco", split, KEEP_SIZE)
    refused("coco is no folder")
    write(tmp_path / "coco", GOOD)
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
        dataset.open_folder(write(tmp_path, coco), "val", KEEP_SIZE)


def test_good_boxes_are_not_warned_about(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset.open_folder(write(tmp_path, GOOD), "val", KEEP_SIZE)


def test_the_sentence_survives_a_worker_process(tmp_path):
    ds = dataset.open_folder(write(tmp_path, GOOD), "val", KEEP_SIZE)
    (tmp_path / "val" / "13.png").write_bytes(b"spoiled after opening")
    loader = iter(torch.utils.data.DataLoader(ds, batch_sampler=[[(0, 2)], [(0, 1)]], num_workers=1,
                                              collate_fn=batches.collate))
    with pytest.raises(coco_folder.DataError, match=r"13.png \(image id 13\) cannot be read"):
        next(loader)
    assert len(list(loader)) == 1                                    # the worker itself lives on


# ---------------------------------------------------------------- parts of a data set

def test_class_names_choose_images_in_train_and_targets_everywhere(tmp_path):
    write(tmp_path, GOOD, "train")
    write(tmp_path, GOOD, "val")
    train = dataset.open_folder(tmp_path, "train", KEEP_SIZE, class_names=("cat", "bird"))
    assert train.categories == [{"id": 3, "name": "cat"}, {"id": 90, "name": "bird"}]
    assert train.image_ids == [11, 13, 14]
    assert [target.labels.tolist() for _, target in train] == [[0], [1], [0, 0]]
    dogs = dataset.open_folder(tmp_path, "train", KEEP_SIZE, class_names=("dog",))
    assert dogs.image_ids == [11]
    val = dataset.open_folder(tmp_path, "val", KEEP_SIZE, class_names=("dog",))
    assert [target.labels.tolist() for _, target in val] == [[0], [], [], []]


def test_a_crowd_alone_makes_no_training_image(tmp_path):
    coco = GOOD | {"annotations": [annotation(1, 12, 3, [5, 5, 50, 30], iscrowd=1),
                                   annotation(2, 13, 3, [5, 5, 9, 9])]}
    ds = dataset.open_folder(write(tmp_path, coco, "train"), "train", KEEP_SIZE, class_names=("cat",))
    assert ds.image_ids == [13]


def test_subsets_are_seeded_nested_and_in_order(tmp_path):
    write(tmp_path, GOOD)
    chosen = [dataset.open_folder(tmp_path, "val", KEEP_SIZE, n, seed=1).image_ids
              for n in (1, 2, 3, 4)]
    assert [len(ids) for ids in chosen] == [1, 2, 3, 4]
    for smaller, larger in itertools.pairwise(chosen):
        assert set(smaller) < set(larger) and larger == sorted(larger)
    assert dataset.open_folder(tmp_path, "val", KEEP_SIZE, 2, seed=1).image_ids == chosen[1]
    others = [dataset.open_folder(tmp_path, "val", KEEP_SIZE, 2, seed=s).image_ids for s in range(8)]
    assert len({tuple(ids) for ids in others}) > 1


def test_only_chosen_pictures_need_be_on_disk(tmp_path):
    write(tmp_path, GOOD)
    [kept] = dataset.open_folder(tmp_path, "val", KEEP_SIZE, 1).image_ids
    for i in {11, 12, 13, 14} - {kept}:
        (tmp_path / "val" / f"{i}.png").unlink()
    assert len(dataset.open_folder(tmp_path, "val", KEEP_SIZE, 1)) == 1


@pytest.mark.parametrize("change, sentence", [
    ({"categories": []}, "has no categories"),
    ({"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]},
     "name cat more than once"),
    ({"images": [5]}, "one of images is no COCO entry: 5"),
    ({"iscrowd": "0"}, "iscrowd must be 0 or 1, not '0'"),
    ({"area": "1"}, "area must be a finite number, not '1'"),
    ({"image_id": "1"}, "image_id '1' is not in images.*text for a number"),
    ({"category_id": {}}, "category_id {} is not in categories")])
def test_entries_that_would_go_wrong_later_are_refused(change, sentence):
    """Crowds by accident, lost objects, or a crash in pycocotools at the first validation."""
    whole = {"images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}],
             "categories": [{"id": 1, "name": "cat"}],
             "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]}
    name = next(iter(change))
    (whole if name in whole else whole["annotations"][0]).update(change)
    with pytest.raises(coco_folder.DataError, match=sentence):
        coco_folder.check(whole, "some.json")


def test_impossible_parts_are_refused(tmp_path):
    write(tmp_path, GOOD, "train")
    for arguments, sentence in (
            ({"num_images": 5}, "has 4 images; asked for 5"),
            ({"num_images": -1}, "has 4 images; asked for -1"),
            ({"num_images": 2, "class_names": ("dog",)}, "has 1 images with dog; asked for 2"),
            ({"class_names": ("birds",)}, r"no class 'birds', did you mean 'bird'\? It has: cat"),
            ({"class_names": ("cat", "zebra")}, r"no class 'zebra'\. It has: cat, dog, bird")):
        with pytest.raises(coco_folder.DataError, match=sentence):
            dataset.open_folder(tmp_path, "train", KEEP_SIZE, **arguments)
    with pytest.raises(coco_folder.DataError, match="asked for 0 images of shapes"):
        dataset.open_shapes("train", KEEP_SIZE, 0)


# ---------------------------------------------------------------- chance

def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1].boxes, b[1].boxes)


def test_augmentation_is_a_pure_function_of_seed_epoch_and_index(tmp_path):
    write(tmp_path, GOOD)
    transform = transforms.multi_scale_and_crop(64, 100)
    ds = dataset.open_folder(tmp_path, "val", transform, seed=3)
    again = dataset.open_folder(tmp_path, "val", transform, seed=3)
    keys = [(epoch, i) for epoch in range(4) for i in range(4)]
    first = {key: ds[key] for key in keys}
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for key in reversed(keys):                        # another order, data set and global seed
        assert same(again[key], first[key])
    assert torch.equal(torch.get_rng_state(), state)  # and the global stream is where it was
    assert same(ds[2], first[0, 2])
    assert len({first[epoch, 0][0].shape for epoch in range(4)}) > 1
    other = dataset.open_folder(tmp_path, "val", transform, seed=4)
    assert not all(same(other[key], first[key]) for key in keys)


def test_worker_processes_see_the_same_pictures():
    ds = dataset.open_shapes("train", transforms.flip_only(), 6, size_px=48)
    steps = batches.batches(6, 2, 0, 0, 4)
    loader = torch.utils.data.DataLoader(ds, batch_sampler=steps, num_workers=1,
                                         collate_fn=batches.collate)
    for keys, (images, _, targets) in zip(steps, loader, strict=True):
        for key, picture, target in zip(keys, images, targets):
            assert same((picture, target), ds[key])


def test_data_sets_can_be_sent_to_spawned_workers(tmp_path):
    folder = dataset.open_folder(write(tmp_path, GOOD), "val", transforms.multi_scale_and_crop(64, 100))
    for ds in (folder, dataset.open_shapes("val", transforms.flip_only(), 2, size_px=48)):
        assert same(pickle.loads(pickle.dumps(ds))[1, 1], ds[1, 1])


def test_flip_moves_boxes_with_the_picture():
    ds = dataset.open_shapes("train", transforms.flip_only(), 1, size_px=64)
    plain = ds[0]
    flipped = next(ds[epoch, 0] for epoch in range(20) if not same(ds[epoch, 0], plain))
    assert_close(flipped[0], plain[0].flip(2))
    mirrored = torch.cat((1 - plain[1].boxes[:, :1], plain[1].boxes[:, 1:]), 1)
    assert_close(flipped[1].boxes, mirrored)
    flips = sum(not same(ds[epoch, 0], plain) for epoch in range(200))
    assert 70 < flips < 130                                          # 100 +- 4 sigma


# ---------------------------------------------------------------- sizes

@pytest.mark.parametrize(("size_px", "expected"), [
    ((480, 640), (800, 1066)),       # short side 480 -> 800, long side 1066.67, cut
    ((8, 5), (1280, 800)),
    ((360, 640), (750, 1333)),       # 800 would make the long side 1422: 749.8, rounded; 1333.3
    ((640, 360), (1333, 750)),
    ((200, 640), (417, 1334)),       # 416.6, rounded up: the long side passes 1333, as DETR's does
    ((300, 900), (444, 1332)),       # 444.3, rounded down; 3 * 444
    ((24, 480), (67, 1340)),         # 66.65; 20 * 67
    ((800, 1333), (800, 1333))])
def test_resize_worked_by_hand(size_px, expected):
    """DETR's numbers: a bounded short side is rounded, the long side then cut."""
    picture = tv_tensors.Image(torch.zeros(3, *size_px, dtype=torch.uint8))
    assert transforms.resize(800, 1333)(picture).shape == (3, *expected)


@pytest.mark.parametrize("size, max_size", [(800, 1333), (600, 1000), (256, 427), (128, 128)])
def test_resize_of_any_picture_in_fractions(size, max_size):
    """Short side: round(min(size, max_size * short / long)); long side: its share, cut."""
    for h, w in itertools.product(range(90, 700), (640, 500, 427, 333)):
        ratio = Fraction(max(h, w), min(h, w))
        short = round(min(size, max_size / ratio))
        sides = short, math.floor(short * ratio)
        expected = sides if h < w else sides[::-1]
        assert transforms.resized_sides(h, w, size, max_size) == expected, (h, w)


def test_resize_takes_boxes_along_and_leaves_a_pixel_of_the_thinnest():
    picture, objects = blank(40, 60)
    picture, objects = transforms.resize(128, 128)(picture, objects)
    assert picture.shape == (3, 85, 127)                    # 85.3; 85 * 1.5 = 127.5
    assert_close(objects["boxes"].as_subclass(torch.Tensor),
                 torch.tensor([[1., 2., 9., 8.]]) * torch.tensor([127 / 60, 85 / 40]).repeat(2))
    assert transforms.resize(60, 60)(tv_tensors.Image(torch.zeros(3, 1, 199))).shape == (3, 1, 199)


def blank(h, w):
    """A black picture with one box, as transforms take them."""
    box = tv_tensors.BoundingBoxes([[1.0, 2.0, 9.0, 8.0]], format="XYXY", canvas_size=(h, w))
    picture = tv_tensors.Image(torch.zeros(3, h, w, dtype=torch.uint8))
    return picture, {"labels": torch.tensor([3]), "boxes": box}


def test_multi_scale_sizes_are_detrs():
    """Without a crop a 480x640 picture keeps its 3:4, its short side is among 480, 512, ... 800."""
    transform, shapes_px = transforms.multi_scale_and_crop(800, 1333), set()
    for seed in range(40):
        torch.manual_seed(seed)
        h, w = transform(*blank(480, 640))[0].shape[1:]
        assert min(h, w) <= 800 and max(h, w) <= 1333
        shapes_px.add((h, w))
    short = {h for h, w in shapes_px if abs(w / h - 4 / 3) < 0.003}
    assert short <= {s - cut for s in range(480, 801, 32) for cut in (0, 1)}    # int() may cut 1
    assert len(short) > 4 and len(shapes_px) > len(short) + 4        # several sizes, several crops


def test_scaled_down_crops_are_scaled_too():
    """At size 200 every number is a quarter: resize to 100, 125 or 150, crop 96 to 150."""
    seen = set()
    crop = transforms.multi_scale_and_crop(200, 333).transforms[1].transforms[1].transforms[1]
    assert (crop.low, crop.high) == (96, 150)
    for seed in range(60):
        torch.manual_seed(seed)
        seen.add(tuple(crop(*blank(125, 166))[0].shape[1:]))
    assert all(96 <= h <= 125 and 96 <= w <= 150 for h, w in seen) and len(seen) > 40


def test_a_small_picture_is_cropped_to_what_it_has():
    crop = transforms.RandomSizeCrop(384, 600)
    h, w = crop(*blank(30, 500))[0].shape[1:]
    assert h == 30 and 384 <= w <= 500


def test_after_a_crop_boxes_still_lie_on_their_objects(tmp_path):
    """One white rectangle on black: whatever the crop, its box is where the white pixels are."""
    pixels = np.zeros((96, 128, 3), np.uint8)
    pixels[30:70, 20:60] = 255
    coco = {"images": [{"id": 1, "file_name": "white.png", "width": 128, "height": 96}],
            "categories": [{"id": 5, "name": "white"}],
            "annotations": [annotation(1, 1, 5, [20, 30, 40, 40])]}
    Image.fromarray(pixels).save(write(tmp_path, coco) / "val" / "white.png")
    ds = dataset.open_folder(tmp_path, "val", transforms.multi_scale_and_crop(96, 160))
    gone = 0
    for epoch in range(60):
        picture, target = ds[epoch, 0]
        white = to_pixels(picture)[:, :, 0] > 127
        ys, xs = np.nonzero(white)
        if not len(target.boxes):
            gone += 1
            assert white.mean() < 0.02
            continue
        h, w = white.shape
        box = ops.box_convert(target.boxes, "cxcywh", "xyxy")[0] * torch.tensor([w, h, w, h])
        seen = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert_close(box, seen.float(), atol=1.0, rtol=0)            # resampling blurs by a pixel
    assert gone < 30


# ---------------------------------------------------------------- memory

def test_pictures_are_decoded_once_and_only_while_there_is_room(tmp_path, monkeypatch):
    ds = dataset.open_folder(write(tmp_path, GOOD), "val", KEEP_SIZE)
    monkeypatch.setattr(data, "CACHE_BYTES", 2 * 3 * 40 * 60)        # room for two pictures
    first = [ds[i] for i in range(4)]
    assert list(ds.cache) == [11, 12] and ds.cached_bytes == 2 * 3 * 40 * 60
    for i in (11, 12):
        (tmp_path / "val" / f"{i}.png").unlink()
    assert all(same(ds[i], first[i]) for i in range(4))              # 11, 12 from memory, unchanged


# ---------------------------------------------------------------- shapes

def test_shapes_are_served_as_drawn(capsys):
    ds = dataset.open_shapes("val", transforms.resize(96, 96), 3, size_px=96, seed=5)
    assert [category["name"] for category in ds.categories] == list(shapes.CLASSES)
    assert (len(ds), ds.image_ids, capsys.readouterr().out) == (3, [1, 2, 3], "")
    for i in range(3):
        picture, target = ds[i]
        scene = shapes.scene(5, "val", i, 96)
        np.testing.assert_array_equal(to_pixels(picture), np.asarray(shapes.draw(scene)))
        assert target.labels.tolist() == scene.labels
        assert_close(ops.box_convert(target.boxes, "cxcywh", "xyxy") * 96,
                     torch.tensor(scene.boxes_xyxy_px, dtype=torch.float32))


def test_a_written_shapes_folder_reads_the_same(tmp_path):
    shapes.write_folder(tmp_path, 2, 2, size_px=48)
    folder = dataset.open_folder(tmp_path, "train", transforms.flip_only())
    drawn = dataset.open_shapes("train", transforms.flip_only(), 2, size_px=48)
    assert all(same(folder[epoch, i], drawn[epoch, i]) for epoch in range(3) for i in range(2))


# ---------------------------------------------------------------- batches

def test_collate_pads_right_and_bottom():
    target = dataset.Target(torch.tensor([1]), torch.tensor([[0.5, 0.4, 0.3, 0.2]]), 7, (2, 3))
    small, wide = torch.rand(3, 4, 2) + 1, torch.rand(3, 3, 5) + 1
    images, is_pad, targets = batches.collate([(small, target), (wide, target)])
    assert images.shape == (2, 3, 4, 5) and is_pad.shape == (2, 4, 5) and is_pad.dtype == torch.bool
    assert_close(images[0, :, :4, :2], small)
    assert_close(images[1, :, :3, :5], wide)
    assert_close(is_pad, images[:, 0] == 0)                          # all real values are above 1
    assert (~is_pad).sum() == 4 * 2 + 3 * 5 and targets == [target, target]


def test_each_epoch_is_one_permutation_across_batch_borders():
    steps = batches.batches(5, 2, seed=1, first_step=0, last_step=10)   # 20 slots = 4 epochs of 5
    flat = [key for step in steps for key in step]
    assert all(len(step) == 2 for step in steps)
    assert [epoch for epoch, _ in flat] == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    orders = [tuple(i for e, i in flat if e == epoch) for epoch in range(4)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders) and len(set(orders)) > 1
    assert flat != [key for step in batches.batches(5, 2, 2, 0, 10) for key in step]


def test_a_resumed_run_and_several_ranks_see_the_same_steps():
    whole = batches.batches(7, 4, 0, 0, 9)
    assert batches.batches(7, 4, 0, 0, 4) + batches.batches(7, 4, 0, 4, 9) == whole
    shares = [batches.batches(7, 4, 0, 0, 9, rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*shares)] == whole
    assert batches.batches(2, 5, 0, 0, 1)[0][4][0] == 2                 # three epochs in one batch


def test_batches_that_cannot_be_shared_are_refused():
    for batch_size, world in ((5, 2), (0, 1)):
        with pytest.raises(ValueError, match=f"batch of {batch_size} cannot be shared .* {world} "):
            batches.batches(7, batch_size, 0, 0, 1, world=world)


# ---------------------------------------------------------------- sample data

@needs_sample
def test_every_edge_case_is_read_right():
    root = SAMPLE / "coco_edge_cases_synthetic"
    ds = dataset.open_folder(root, "val", transforms.resize(128, 128))
    expected = json.loads((root / "expected.json").read_text())
    assert len(ds) == len(expected) == 21 and len(ds.categories) == 80
    for (picture, target), case in zip(ds, expected, strict=True):
        w, h = case["json_size"]
        assert target.size_px == (h, w), case["file_name"]
        assert_close(ops.box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor([w, h, w, h]),
                     torch.tensor(case["valid_boxes_xyxy"], dtype=torch.float32).reshape(-1, 4),
                     atol=1e-4, rtol=0)                              # pixels, from float32 [0, 1]
        assert picture.shape[1:] == transforms.resized_sides(h, w, 128, 128) and picture.isfinite().all()
    with Image.open(root / "val" / "15_gray16.png") as stored:
        expected = np.asarray(stored).mean() / 257                   # clipped it would be above 240
    assert abs(to_pixels(ds[14][0]).mean() - expected) < 1


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


@needs_sample
def test_no_broken_file_is_left_out():
    folder = SAMPLE / "coco_edge_cases_synthetic" / "annotations" / "broken"
    assert sorted(path.stem for path in folder.iterdir()) == sorted(BROKEN_FILES)


@needs_sample
@pytest.mark.parametrize("name", BROKEN_FILES)
def test_every_broken_file_is_caught_by_name(tmp_path, name):
    root, (moment, sentence) = SAMPLE / "coco_edge_cases_synthetic", BROKEN_FILES[name]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").symlink_to(root.resolve() / "val")
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


@needs_sample
@pytest.mark.parametrize(("name", "num_train", "num_val", "num_classes"), [
    ("bccd", 292, 72, 3), ("coco_cc", 92, 66, 80), ("tiny_fixture", 8, 4, 17)])
def test_sample_folders_are_read(name, num_train, num_val, num_classes):
    for split, num_images in (("train", num_train), ("val", num_val)):
        ds = dataset.open_folder(SAMPLE / name, split, transforms.multi_scale_and_crop(128, 213))
        assert len(ds) == num_images and len(ds.categories) == num_classes
        images, is_pad, targets = batches.collate([ds[3, i] for i in range(4)])
        assert images.shape[2:] == is_pad.shape[1:] and max(images.shape) <= 213
        for target in targets:
            xyxy = ops.box_convert(target.boxes, "cxcywh", "xyxy")
            assert (xyxy > -1e-6).all() and (xyxy < 1 + 1e-6).all()
            assert (target.boxes[:, 2:] > 0).all() and (target.labels < num_classes).all()
