"""A COCO folder on disk: its json is checked, its pictures are read, errors are one sentence.

Read after `shapes.py`; `dataset.py` serves what is read here.
"""
import collections
import contextlib
import io
import json
import math
import posixpath
import warnings

import numpy as np
from PIL import Image, ImageOps
from pycocotools.coco import COCO


class DataError(ValueError):
    """A fault in the data in one sentence: which file, which image or box, the likely mistake."""


def find(root, split):
    """The folder of pictures and the json of a split, in COCO's own layout or the plain one."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder: the one that holds annotations/ is expected")
    pairs = [(root / name, root / "annotations" / f"instances_{name}.json")
             for name in (f"{split}2017", split)]
    for folder, path in pairs:
        if path.is_file() and not folder.is_dir():
            raise FileNotFoundError(f"{path} is there but not its pictures: {folder} is no folder")
        if path.is_file():
            return folder, path
    hint = "" if split == "val" else (
        "; where only val is at hand, link or copy its pictures and its json under the train names "
        "(AP is then of images trained on)")
    raise FileNotFoundError(f"neither {pairs[0][1]} nor {pairs[1][1]} exists{hint}")


def read_json(path):
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not valid json ({error}): an interrupted download?") from None


def check(data, path):
    """The json itself, if nothing in it would trip pycocotools or training later. Boxes that only
    look wrong are warned about; those without area are no fault, COCO has some."""
    lists = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(name), list) for name in lists):
        raise DataError(f"{path} needs the lists {', '.join(lists)}: an object-detection json is "
                        "expected (those of test images have no annotations)")
    for name in lists:
        for entry in data[name]:
            if not isinstance(entry, dict) or isinstance(entry.get("id"), (list, dict)):
                raise DataError(f"{path}: one of {name} is no COCO entry: {entry}")
    if not data["categories"]:
        raise DataError(f"{path} has no categories: there is nothing to learn to tell apart")
    for name, key in (*((name, "id") for name in lists), ("categories", "name")):
        values = collections.Counter(str(entry[key]) for entry in data[name] if key in entry)
        if values and max(values.values()) > 1:
            raise DataError(f"{path}: {name} has the {key} {values.most_common(1)[0][0]} more than "
                            "once: two jsons put together?")
    for name, key, kind in (("images", "id", int), ("images", "file_name", str),
                            ("images", "width", int), ("images", "height", int),
                            ("categories", "id", int), ("categories", "name", str)):
        for entry in data[name]:
            if type(entry.get(key)) is not kind:
                raise DataError(f"{path}: one of {name} has no {key} ({kind.__name__}): {entry}")
    for entry in data["images"]:
        name = entry["file_name"].replace("\\", "/")
        inside = posixpath.normpath(f"pictures/{name}")             # as seen from the root
        if not name or name[0] == "/" or ":" in name.split("/")[0] or inside.startswith(".."):
            raise DataError(f"{path}: image {entry['id']} has the file_name "
                            f"{entry['file_name']!r}, which leaves the data set's folder: give it "
                            "relative to the folder of pictures")
    images = {entry["id"]: entry for entry in data["images"]}
    known = {entry["id"] for entry in data["categories"]}
    outside = 0
    for a in data["annotations"]:
        box, area = a.get("bbox"), a.get("area", 0)
        image_id, category_id = a.get("image_id"), a.get("category_id")
        image = images.get(image_id) if type(image_id) is int else None
        if image is None:
            fault = f"image_id {image_id!r} is not in images: a json cut down, text for a number?"
        elif type(category_id) is not int or category_id not in known:
            fault = f"category_id {category_id!r} is not in categories: a label, not an id?"
        elif a.get("iscrowd", 0) not in (0, 1):
            fault = f"iscrowd must be 0 or 1, not {a['iscrowd']!r}"
        elif type(area) not in (int, float) or not math.isfinite(area):
            fault = f"area must be a finite number, not {area!r}"
        elif not isinstance(box, list):
            fault = "it has no bbox: a json of captions?"
        elif len(box) != 4 or not all(type(x) in (int, float) and math.isfinite(x) for x in box):
            fault = f"bbox must be four finite numbers x, y, width, height, not {box}"
        else:
            x2, y2 = box[0] + box[2], box[1] + box[3]
            outside += x2 > image["width"] + 1 or y2 > image["height"] + 1 or max(box) <= 1
            continue
        raise DataError(f"{path}: annotation {a.get('id')} of image {a.get('image_id')}: {fault}")
    if outside > len(data["annotations"]) / 5:
        warnings.warn(f"{path}: {outside} of {len(data['annotations'])} boxes leave their image or "
                      "are inside its first pixel: are they corners x1, y1, x2, y2 or in [0, 1]? "
                      "bbox is x, y, width, height in pixels", stacklevel=3)
    return data


def index_json(data):
    """pycocotools' object for a checked json: the keys it needs filled in, its prints dropped.
    If an annotation has no id or 0, all get new ones: an object with id 0 never counts as found."""
    data.setdefault("info", {})
    renumber = not all(a.get("id") for a in data["annotations"])
    for number, a in enumerate(data["annotations"], 1):
        a.setdefault("iscrowd", 0)
        a.setdefault("area", a["bbox"][2] * a["bbox"][3])
        a["id"] = number if renumber else a["id"]
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def read_picture(folder, image):
    """An image of the json as a PIL picture, RGB, in the frame of its boxes: the EXIF tag that
    turns pictures counts only if the json's size equals the turned size and not the stored one."""
    path, size = folder / image["file_name"], (image["width"], image["height"])
    try:
        with Image.open(path) as file:
            rgb = to_rgb(file if file.size == size else ImageOps.exif_transpose(file))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} (image id {image['id']}) cannot be read ({error}): an interrupted "
                        "download?") from None
    if rgb.size != size:
        raise DataError(f"{path} (image id {image['id']}) has {rgb.width}x{rgb.height} pixels but "
                        f"{size[0]}x{size[1]} in the json: resized without its boxes?")
    return rgb


def to_rgb(picture):
    """Any PIL picture as 8-bit RGB: transparency over white, 16-bit gray scaled, not clipped."""
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) / 257).round().clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


NAMES = """- person bicycle car motorcycle airplane bus train truck boat traffic_light
fire_hydrant - stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra
giraffe - backpack umbrella - - handbag tie suitcase frisbee skis snowboard sports_ball kite
baseball_bat baseball_glove skateboard surfboard tennis_racket bottle - wine_glass cup fork knife
spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch
potted_plant bed - dining_table - - toilet - tv laptop mouse remote keyboard cell_phone microwave
oven toaster sink refrigerator - book clock vase scissors teddy_bear hair_drier toothbrush"""


def all_ids():
    """[{"id", "name"}] of COCO's ids 0 to 90, position = id, as detectors of 91 classes have them.

    NAMES are in this order. COCO never used 11 ids; those get a name that no data set has.
    """
    return [{"id": i, "name": f"unused {i}" if name == "-" else name.replace("_", " ")}
            for i, name in enumerate(NAMES.split())]
