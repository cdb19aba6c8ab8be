"""Resize, flip, crop: DETR's numbers by hand, and boxes that go along with their objects."""
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision import ops, tv_tensors

from detr_min.data import dataset, transforms
from helpers import annotation, to_pixels, write_coco


def blank(h, w):
    """A black picture with one box, as transforms take them."""
    box = tv_tensors.BoundingBoxes([[1.0, 2.0, 9.0, 8.0]], format="XYXY", canvas_size=(h, w))
    picture = tv_tensors.Image(torch.zeros(3, h, w, dtype=torch.uint8))
    return picture, {"labels": torch.tensor([3]), "boxes": box}


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


def test_multi_scale_sizes_are_detrs():
    """Without a crop a 480x640 picture keeps its 3:4, its short side is among 480, 512, ... 800."""
    transform, shapes_px = transforms.multi_scale_and_crop(800, 1333), set()
    for seed in range(40):
        torch.manual_seed(seed)
        h, w = transform(*blank(480, 640))[0].shape[1:]
        assert min(h, w) <= 800 and max(h, w) <= 1333
        shapes_px.add((h, w))
    short = {h for h, w in shapes_px if w == int(h * 4 / 3)}
    assert short <= set(range(480, 801, 32))
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


def test_a_training_size_is_rounded_as_a_test_size_is():
    """Of 200x640 a short side of 480 to 800 is bounded: 416.6 becomes 417, as in DETR's code."""
    sizes = transforms.multi_scale_and_crop(800, 1333).transforms[1].transforms[0]
    assert {sizes(*blank(200, 640))[0].shape for _ in range(20)} == {(3, 417, 1334)}
    thin = transforms.multi_scale_and_crop(64, 107)
    assert min(min(thin(*blank(1, 150))[0].shape) for _ in range(20)) == 1      # never 0 pixels


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
    Image.fromarray(pixels).save(write_coco(tmp_path, coco) / "val" / "white.png")
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
