"""A COCO folder on disk: its json is checked, its pictures are read, errors are one sentence.

Read after `layouts.py`; `dataset.py` serves what is read here.
"""
import collections
import contextlib
import io
import json
import os
import posixpath
import reprlib
import warnings

import numpy as np
from PIL import Image, ImageOps
from pycocotools.coco import COCO


MOST_PX = 10**6            # sides of pictures and numbers of boxes: float32 keeps these apart
MOST_ID = 2**53            # float64, in which pycocotools stores ids, keeps these apart
SHORT = reprlib.Repr()     # of whatever a json holds, for a sentence
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 100
SHORT.maxdict = 10


class DataError(ValueError):
    """A fault in the data in one sentence: which file, which image or box, the likely mistake."""


def read_json(path):
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid json ({error}): an interrupted download?") from None


def is_number(x, most):
    return type(x) in (int, float) and -most <= x <= most


def is_text(x):
    """Whether it is text that can be written: json may hold halves of characters, surrogates."""
    return type(x) is str and not any("\ud800" <= letter <= "\udfff" for letter in x)


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
                raise DataError(f"{path}: one of {name} is no COCO entry: {SHORT.repr(entry)}")
    data["categories"] = without_groups(data)
    if not data["categories"]:
        raise DataError(f"{path} has no categories: there is nothing to learn to tell apart")
    for name, key in (*((name, "id") for name in lists), ("categories", "name")):
        values = collections.Counter(entry[key] for entry in data[name]
                                     if isinstance(entry.get(key), (int, str)))
        if values and max(values.values()) > 1:
            twice = SHORT.repr(values.most_common(1)[0][0])
            raise DataError(f"{path}: {name} has the {key} {twice} more than once: two jsons put "
                            "together?")
    for name, key, kind in (("images", "id", int), ("images", "file_name", str),
                            ("images", "width", int), ("images", "height", int),
                            ("categories", "id", int), ("categories", "name", str)):
        for entry in data[name]:
            value = entry.get(key)
            if type(value) is not kind:
                raise DataError(f"{path}: one of {name} has no {key} ({kind.__name__}): "
                                f"{SHORT.repr(entry)}")
            if kind is int and not is_number(value, MOST_ID):
                raise DataError(f"{path}: one of {name} has the {key} {SHORT.repr(value)}, which "
                                "is beyond 2^53")
            if kind is str and not is_text(value):
                raise DataError(f"{path}: one of {name} has the {key} {SHORT.repr(value)}, which "
                                "holds half a character: written in another encoding?")
    for entry in data["images"]:
        name = entry["file_name"].replace("\\", "/")
        inside = posixpath.normpath(f"pictures/{name}")             # as seen from the root
        if not name or name[0] == "/" or ":" in name.split("/")[0] or inside.startswith(".."):
            raise DataError(f"{path}: image {entry['id']} has the file_name "
                            f"{SHORT.repr(entry['file_name'])}, which leaves the data set's "
                            "folder: give it relative to the folder of pictures")
    images = {entry["id"]: entry for entry in data["images"]}
    known = {entry["id"] for entry in data["categories"]}
    outside = 0
    for a in data["annotations"]:
        box, area = a.get("bbox"), a.get("area", 0)
        image_id, category_id = a.get("image_id"), a.get("category_id")
        image = images.get(image_id) if type(image_id) is int else None
        if image is None:
            fault = (f"image_id {SHORT.repr(image_id)} is not in images: a json cut down, text for "
                     "a number?")
        elif type(category_id) is not int or category_id not in known:
            fault = (f"category_id {SHORT.repr(category_id)} is not in categories: a label, not an "
                     "id?")
        elif a.get("iscrowd", 0) not in (0, 1):
            fault = f"iscrowd must be 0 or 1, not {SHORT.repr(a['iscrowd'])}"
        elif not is_number(area, MOST_PX**2):
            fault = f"area must be a finite number of pixels, not {SHORT.repr(area)}"
        elif not isinstance(box, list):
            fault = "it has no bbox: a json of captions?"
        elif len(box) != 4 or not all(is_number(x, MOST_PX) for x in box):
            fault = ("bbox must be four finite numbers of pixels x, y, width, height, not "
                     + SHORT.repr(box))
        else:
            x2, y2 = box[0] + box[2], box[1] + box[3]
            outside += x2 > image["width"] + 1 or y2 > image["height"] + 1 or max(box) <= 1
            continue
        raise DataError(f"{path}: annotation {SHORT.repr(a.get('id'))} of image "
                        f"{SHORT.repr(image_id)}: {fault}")
    if outside > len(data["annotations"]) / 5:
        warnings.warn(f"{path}: {outside} of {len(data['annotations'])} boxes leave their image or "
                      "are inside its first pixel: are they corners x1, y1, x2, y2 or in [0, 1]? "
                      "bbox is x, y, width, height in pixels", stacklevel=3)
    return data


def without_groups(data):
    """The classes. Roboflow adds a group, the supercategory of them all, which no object has."""
    used = {a["category_id"] for a in data["annotations"] if type(a.get("category_id")) is int}
    kinds = [c.get("supercategory") for c in data["categories"]]
    return [c for c in data["categories"] if c.get("supercategory") != "none"
            or c.get("id") in used or c.get("name") not in kinds]


def index_json(data):
    """pycocotools' object for a checked json: the keys it needs filled in, its prints dropped.
    If an annotation has no id, 0 or no integer, all get new ones: an object with id 0 never counts
    as found."""
    data.setdefault("info", {})
    renumber = not all(type(a.get("id")) is int and 0 < abs(a["id"]) <= MOST_ID
                       for a in data["annotations"])
    for number, a in enumerate(data["annotations"], 1):
        a.setdefault("iscrowd", 0)
        a.setdefault("area", a["bbox"][2] * a["bbox"][3])
        a["id"] = number if renumber else a["id"]
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def check_picture(root, folder, image, path):
    """Refuse an image of the json at `path` whose picture is not there, or not to be used.

    Raises:
        DataError, FileNotFoundError: naming the picture and the image's id
    """
    w, h = image["width"], image["height"]
    if not (0 < min(w, h) <= max(w, h) <= MOST_PX and 1 / 200 < w / h < 200):
        raise DataError(f"{path}: image {image['id']} has {w}x{h} pixels, too thin or too large to "
                        "be resized: leave it out")
    file = folder / image["file_name"]
    try:
        real = os.path.realpath(file)
        is_there = os.path.isfile(real) and os.path.getsize(real)
    except (OSError, ValueError):               # a name that is too long, or no name at all
        is_there = False
    if not is_there:
        raise FileNotFoundError(f"{str(file)[:500]} (image id {image['id']}) is in {path} but "
                                "missing or empty on disk: an interrupted download?")
    if not any(real.startswith(os.path.join(os.path.realpath(f), "")) for f in (folder, root)):
        raise DataError(f"{file} (image id {image['id']}) is {real}, outside the data set's folder:"
                        " copy it there, or link the whole folder of pictures")


def read_picture(folder, image):
    """An image of the json as a PIL picture, RGB, in the frame of its boxes: the EXIF tag that
    turns pictures counts only if the json's size equals the turned size and not the stored one."""
    path, size, rgb = folder / image["file_name"], (image["width"], image["height"]), None
    try:
        with Image.open(path) as file:
            stored = file.size
            if file.format == "EPS":
                raise ValueError("it is PostScript, a program")
            if size in (stored, stored[::-1]):                  # else it need not be decoded
                rgb = to_rgb(file if stored == size else ImageOps.exif_transpose(file))
    except Exception as error:                                  # Pillow raises many kinds
        raise DataError(f"{path} (image id {image['id']}) cannot be read "
                        f"({str(error) or type(error).__name__}): an interrupted download?"
                        ) from None
    if not rgb or rgb.size != size:
        raise DataError(f"{path} (image id {image['id']}) has {stored[0]}x{stored[1]} pixels but "
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
