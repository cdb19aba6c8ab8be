"""The synthetic data set: what is in a scene, and that its boxes are those of the pixels."""
import json
import math
import time

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from detr_min.data import shapes

SCENES = [shapes.scene(0, "train", index) for index in range(200)]


def one_shape(label, box_xyxy_px, size_px=64):
    """A single white shape on black, as an array (h, w): any pixel it touches is above zero."""
    scene = shapes.Scene([label], [box_xyxy_px], np.full((1, 3), 255, np.uint8),
                         np.zeros((4, 4, 3), np.uint8), size_px)
    return np.asarray(shapes.draw(scene))[:, :, 0]


@pytest.mark.parametrize("label", range(4))
@pytest.mark.parametrize("box", [(10, 20, 33, 50), (0, 0, 6, 7), (31, 5, 64, 30), (7, 40, 19, 52)])
def test_boxes_are_tight_on_the_pixels(label, box):
    ys, xs = np.nonzero(one_shape(label, box))
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == box


@pytest.mark.parametrize("label", range(4))
def test_area_is_that_of_the_drawn_shape(label):
    coverage = one_shape(label, (5, 8, 61, 48)).sum() / 255          # pixels, edges counted in part
    expected = shapes.FILLED[shapes.CLASSES[label]] * 56 * 40
    assert abs(coverage - expected) < 0.03 * expected               # the outline is ~150 px long


def test_a_shape_covers_its_own_colour():
    """The drawn scene differs from its bare background inside the boxes and nowhere else."""
    for scene in SCENES[:20]:
        bare = scene._replace(labels=[], boxes_xyxy_px=[], colours=scene.colours[:0])
        changed = (np.asarray(shapes.draw(scene)) != np.asarray(shapes.draw(bare))).any(2)
        inside = np.zeros_like(changed)
        for x1, y1, x2, y2 in scene.boxes_xyxy_px:
            inside[y1:y2, x1:x2] = True
        assert not changed[~inside].any()
        assert changed.sum() > 0.4 * inside.sum()
        x1, y1, x2, y2 = scene.boxes_xyxy_px[-1]                      # the last one lies on top
        middle = np.asarray(shapes.draw(scene))[(y1 + y2) // 2, (x1 + x2) // 2]
        np.testing.assert_array_equal(middle, scene.colours[-1])


def test_what_is_in_an_image():
    """2 to 8 objects, sides of 9 to 45 %, aspect up to 1.5, overlap up to half of the smaller."""
    counts = [len(scene.labels) for scene in SCENES]
    assert (min(counts), max(counts)) == (2, 8)
    for scene in SCENES:
        assert len(scene.labels) == len(scene.boxes_xyxy_px) == len(scene.colours)
        for i, (x1, y1, x2, y2) in enumerate(scene.boxes_xyxy_px):
            w, h = x2 - x1, y2 - y1
            assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 128
            assert round(0.09 * 128) <= min(w, h) and max(w, h) <= round(0.45 * 128)
            assert max(w, h) - 0.5 <= 1.5 * (min(w, h) + 0.5)         # sides are rounded to pixels
            for other in scene.boxes_xyxy_px[:i]:
                assert shapes.overlap((x1, y1, x2, y2), other) <= 0.5


def test_sizes_are_log_uniform():
    """Half of the sides lie below the geometric mean of 9 % and 45 %; classes are as frequent."""
    boxes = torch.tensor([box for scene in SCENES for box in scene.boxes_xyxy_px])   # (~1000, 4)
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() / 128
    below = (sides < math.sqrt(0.09 * 0.45)).double().mean()
    assert 0.45 < below < 0.58           # a little above half: large boxes find no room more often
    counts = torch.bincount(torch.tensor([label for scene in SCENES for label in scene.labels]))
    assert (counts / counts.sum() - 0.25).abs().max() < 0.05


def test_overlap_by_hand():
    # 4x4 = 16 px and 2x6 = 12 px share 2x3 = 6 px: half of the smaller
    assert shapes.overlap((0, 0, 4, 4), (2, 1, 4, 7)) == 0.5
    assert shapes.overlap((0, 0, 4, 4), (5, 5, 8, 9)) == 0


def test_an_image_is_a_pure_function_of_seed_split_and_index():
    np.random.seed(1)                                                 # global streams play no part
    first = np.asarray(shapes.draw(shapes.scene(3, "train", 5)))
    np.random.seed(2)
    np.testing.assert_array_equal(first, np.asarray(shapes.draw(shapes.scene(3, "train", 5))))
    for other in ((4, "train", 5), (3, "val", 5), (3, "train", 6)):
        assert (first != np.asarray(shapes.draw(shapes.scene(*other)))).mean() > 0.5


def test_train_and_val_share_no_image():
    backgrounds = {scene.background.tobytes() for scene in SCENES}
    val = {shapes.scene(0, "val", index).background.tobytes() for index in range(200)}
    assert len(backgrounds) == len(val) == 200 and not backgrounds & val


def test_coco_dict_says_what_the_scenes_say():
    coco = shapes.coco_dict("val", 5, size_px=96, seed=7)
    assert [image["id"] for image in coco["images"]] == [1, 2, 3, 4, 5]
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    for index in range(5):
        scene = shapes.scene(7, "val", index, 96)
        mine = [a for a in coco["annotations"] if a["image_id"] == index + 1]
        assert [a["category_id"] - 1 for a in mine] == scene.labels
        for a, (x1, y1, x2, y2) in zip(mine, scene.boxes_xyxy_px):
            assert a["bbox"] == [x1, y1, x2 - x1, y2 - y1] and a["iscrowd"] == 0


def test_written_folder_is_plain_coco(tmp_path):
    shapes.write_folder(tmp_path, 3, 2, size_px=48, seed=1)
    for split, count in (("train", 3), ("val", 2)):
        path = tmp_path / "annotations" / f"instances_{split}.json"
        assert len(COCO(path).imgs) == count
        for index, image in enumerate(json.loads(path.read_text())["images"]):
            with Image.open(tmp_path / split / image["file_name"]) as picture:
                drawn = shapes.draw(shapes.scene(1, split, index, 48))
                np.testing.assert_array_equal(np.asarray(picture), np.asarray(drawn))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="train.*val.*'test'"):
        shapes.scene(0, "test", 0)
    with pytest.raises(ValueError, match="at least 32; got 'val', 8"):
        shapes.scene(0, "val", 0, 8)


def test_an_image_takes_at_most_3_ms():
    start = time.process_time()
    for index in range(100):
        shapes.draw(shapes.scene(9, "train", index))
    assert (time.process_time() - start) / 100 < 0.003
