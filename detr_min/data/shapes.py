"""Synthetic shapes in COCO form: the data set that needs no download.

An image is 2 to 8 ellipses, rectangles, triangles and diamonds of random colour on a smooth
coloured background. It is a pure function of (seed, split, index): nothing is stored, workers and
resumed runs see the same pictures, and the splits draw from separate random streams. Read
after nothing; `dataset.py` serves these images.
"""
import json
import math
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("ellipse", "rectangle", "triangle", "diamond")   # the position is the label
FILLED = {"ellipse": math.pi / 4, "rectangle": 1.0, "triangle": 0.5, "diamond": 0.5}  # of the box
SPLITS = ("train", "val")
OBJECTS = (2, 8)           # in an image, both ends included
SIDES = (0.09, 0.45)       # of a box, as a share of the image; log-uniform between
MAX_ASPECT = 1.5           # long side / short side
MAX_OVERLAP = 0.5          # of two boxes, as a share of the smaller one
BACKGROUND_CELLS = 4       # the background is 4x4 random colours, upsampled


class Scene(NamedTuple):
    """What is in one image, before it is drawn. Later objects cover earlier ones."""
    labels: list[int]          # (M,)    in [0, 4)
    boxes_xyxy_px: list        # (M, 4)  whole pixels; tight on the shape, covered parts included
    colours: np.ndarray        # (M, 3)     uint8
    background: np.ndarray     # (4, 4, 3)  uint8
    size_px: int               # height and width of the image


def scene(seed, split, index, size_px=128):
    """The geometry of image `index` of a split: the same for the same arguments, always.

    Args:
        seed     int >= 0; another seed is another data set
        split    "train" or "val"
        index    int >= 0
        size_px  height and width of the image, pixels; at least 32
    Returns:
        a Scene of 2 to 8 objects
    Raises:
        ValueError: a split of another name, or an image too small to draw in.
    """
    if split not in SPLITS or size_px < 32:
        raise ValueError(f"split is one of {SPLITS}, size_px at least 32; got {split!r}, {size_px}")
    rng = np.random.default_rng((seed, SPLITS.index(split), index))   # a random stream per image
    boxes_xyxy_px = []
    for _ in range(rng.integers(OBJECTS[0], OBJECTS[1] + 1)):
        for _ in range(50):                                              # then do without this one
            box = random_box(rng, size_px)
            if all(overlap(box, other) <= MAX_OVERLAP for other in boxes_xyxy_px):
                boxes_xyxy_px.append(box)
                break
    labels = rng.integers(0, len(CLASSES), len(boxes_xyxy_px)).tolist()
    colours = rng.integers(0, 256, (len(labels), 3), dtype=np.uint8)
    background = rng.integers(0, 256, (BACKGROUND_CELLS, BACKGROUND_CELLS, 3), dtype=np.uint8)
    return Scene(labels, boxes_xyxy_px, colours, background, size_px)


def random_box(rng, size_px):
    """(x1, y1, x2, y2) of a box inside the image, whole pixels; sides and aspect log-uniform."""
    side = math.exp(rng.uniform(math.log(SIDES[0]), math.log(SIDES[1])))
    stretch = math.exp(rng.uniform(-0.5, 0.5) * math.log(MAX_ASPECT))       # sqrt(width / height)
    w, h = (round(size_px * min(max(share, SIDES[0]), SIDES[1]))
            for share in (side * stretch, side / stretch))
    x1, y1 = (int(rng.integers(0, size_px - length + 1)) for length in (w, h))
    return x1, y1, x1 + w, y1 + h


def overlap(a, b):
    """Intersection of two xyxy boxes as a share of the smaller one, in [0, 1]."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(w, 0) * max(h, 0) / smaller


def draw(scene):
    """A Scene as a PIL image, RGB. Drawn at twice the size and halved, which smooths the edges."""
    size = 2 * scene.size_px
    big = Image.fromarray(scene.background).resize((size, size), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(big)
    for label, box, colour in zip(scene.labels, scene.boxes_xyxy_px, scene.colours.tolist()):
        left, top, right, bottom = 2 * box[0], 2 * box[1], 2 * box[2] - 1, 2 * box[3] - 1
        x, y = (left + right) // 2, (top + bottom) // 2
        fill = tuple(colour)
        match CLASSES[label]:
            case "ellipse":
                pen.ellipse((left, top, right, bottom), fill)
            case "rectangle":
                pen.rectangle((left, top, right, bottom), fill)
            case "triangle":
                pen.polygon([(x, top), (right, bottom), (left, bottom)], fill)
            case "diamond":
                pen.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill)
    return big.reduce(2)


def coco_dict(split, num_images, size_px=128, seed=0):
    """A split in the form of COCO's json: ids from 1, boxes as [x, y, w, h] in pixels.

    Image id i is `scene(seed, split, i - 1, size_px)`, category id c is label c - 1. As in COCO,
    `area` is that of the shape, not of its box: it decides what counts as small, medium, large.
    """
    images, annotations = [], []
    for index in range(num_images):
        images.append({"id": index + 1, "file_name": f"{index + 1:06d}.png",
                       "width": size_px, "height": size_px})
        this = scene(seed, split, index, size_px)
        for label, (x1, y1, x2, y2) in zip(this.labels, this.boxes_xyxy_px):
            w, h = x2 - x1, y2 - y1
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1,
                                "category_id": label + 1, "bbox": [x1, y1, w, h],
                                "area": FILLED[CLASSES[label]] * w * h, "iscrowd": 0})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    return {"info": {"description": f"synthetic shapes, {split}, seed {seed}"}, "images": images,
            "annotations": annotations, "categories": categories}


def write_folder(root, num_train, num_val, size_px=128, seed=0):
    """Write both splits as a COCO folder of PNGs in the plain layout, to look at or to use."""
    root = pathlib.Path(root)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, num_images in zip(SPLITS, (num_train, num_val)):
        (root / split).mkdir(exist_ok=True)
        coco = coco_dict(split, num_images, size_px, seed)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
        for index, image in enumerate(coco["images"]):
            draw(scene(seed, split, index, size_px)).save(root / split / image["file_name"])
