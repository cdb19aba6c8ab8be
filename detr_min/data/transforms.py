"""Resize, flip, crop and normalise: torchvision's v2 transforms with DETR's numbers.

A transform takes (picture, objects) and returns the same; its chance is torch's global random
stream, which `dataset.py` seeds for each picture. Read after nothing.
"""
import functools
import math

import torch
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # of ImageNet, RGB in [0, 1]
LEAST_PX = 1e-3         # a box of a smaller side has no area


def keep_visible(objects):
    """Clip boxes to the picture, then drop those left without area. Clipping comes first, as
    sanitising drops whatever sticks out; the v2 classes would refuse boxes below 1 px."""
    boxes = v2.functional.clamp_bounding_boxes(objects["boxes"])
    boxes, kept = v2.functional.sanitize_bounding_boxes(boxes, min_size=LEAST_PX,
                                                        min_area=LEAST_PX**2)
    return {"labels": objects["labels"][kept], "boxes": boxes}


def normalise(picture):
    """uint8 (3, h, w) -> float32 (3, h, w), as ImageNet backbones expect it."""
    image = v2.functional.to_dtype(picture.as_subclass(torch.Tensor), torch.float32, scale=True)
    return v2.functional.normalize(image, MEAN, STD)


def denormalise(image):
    """Undo `normalise`. float (3, h, w) -> uint8 (3, h, w), on the CPU"""
    std, mean = (torch.tensor(numbers)[:, None, None] for numbers in (STD, MEAN))
    return (255 * (image.cpu() * std + mean).clamp(0, 1)).round().byte()


def flip_only():
    return v2.RandomHorizontalFlip(0.5)


def resize(size, max_size):
    """DETR's, nothing random: see resized_sides."""
    return functools.partial(resize_all, size, max_size)


def flip_and_resize(size, max_size):
    """For short runs: what is tested, half of the time mirrored."""
    return v2.Compose([flip_only(), resize(size, max_size)])


def resized_sides(h, w, size, max_size):
    """Short side to `size` px, unless the long side would pass `max_size`. -> (h, w)

    DETR's numbers: a short side below `size` is rounded, the long side is cut to whole pixels after
    it. So where the short side is rounded up, the long one may still pass `max_size`, that of a
    strip one pixel wide by much.
    """
    short, long = min(h, w), max(h, w)
    if size * long / short > max_size:
        size = max(round(max_size * short / long), 1)
    sides = size, int(size * long / short)
    return sides if h <= w else sides[::-1]


def resize_all(size, max_size, picture, *objects):
    """A picture, with its objects or without them."""
    return v2.Resize(resized_sides(*picture.shape[-2:], size, max_size))(picture, *objects)


def multi_scale_and_crop(size, max_size):
    """DETR's augmentation for COCO, its pixel numbers (made for size 800) scaled to `size`."""
    def px(*sides):
        return [round(side * size / 800) for side in sides]
    sizes = v2.RandomChoice([resize(side, max_size) for side in px(*range(480, 801, 32))])
    first = v2.RandomChoice([resize(side, math.inf) for side in px(400, 500, 600)])
    crop = v2.Compose([first, RandomSizeCrop(*px(384, 600)), sizes])
    return v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomChoice([sizes, crop])])


class RandomSizeCrop(torch.nn.Module):
    """A crop anywhere, height and width each drawn from [low, high] px, or what the picture has."""

    def __init__(self, low, high):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, picture, objects):
        sides = [int(torch.randint(min(self.low, side), min(self.high, side) + 1, ()))
                 for side in picture.shape[-2:]]
        return v2.RandomCrop(sides)(picture, objects)
