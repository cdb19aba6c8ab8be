"""A COCO json: read, checked before any of it is used, and indexed by pycocotools.

Read after nothing; `coco_folder.py` finds the pictures.
"""
import collections
import contextlib
import io
import json
import posixpath
import reprlib
import warnings

from pycocotools.coco import COCO

MOST_PX = 10**6            # sides of pictures and numbers of boxes: float32 keeps these apart
MOST_WRONG = 0.5           # share of a json's boxes that may reach outside their image
MOST_ID = 2**53            # float64, in which pycocotools stores ids, keeps these apart
LISTS = "images", "annotations", "categories"
FIELDS = (("images", "id", int), ("images", "file_name", str), ("images", "width", int),
          ("images", "height", int), ("categories", "id", int), ("categories", "name", str))
SHORT = reprlib.Repr()     # of whatever a json holds, for a sentence
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 100
SHORT.maxdict = 10


class DataError(ValueError):
    """A fault in the data in one sentence: which file, which image or box, the likely mistake."""


def read(path):
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid json ({error}): an interrupted download?") from None


def check(data, path):
    """The json itself, if nothing in it would trip pycocotools or training later. Boxes that only
    look wrong are warned about; those without area are no fault, COCO has some."""
    fault = lists_fault(data)
    if not fault:
        data["categories"] = without_groups(data)
        for image in data["images"]:
            if isinstance(image.get("file_name"), str):                     # written on Windows
                image["file_name"] = image["file_name"].replace("\\", "/")
        fault = twice_fault(data) or fields_fault(data) or annotations_fault(data)
    if fault:
        raise DataError(f"{path}: {fault}")
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    outside = sum(x + w > width + 1 or y + h > height + 1 or min(w, h) < 0
                  or max(x, y, w, h) <= 1 < max(width, height) for a in data["annotations"]
                  for (x, y, w, h), (width, height) in [(a["bbox"], sizes[a["image_id"]])])
    doubt = (f"{path}: {outside} of {len(data['annotations'])} boxes reach outside their image, "
             "lie in its first pixel or have a negative side: are they corners x1, y1, x2, y2 or "
             "in [0, 1]? bbox is x, y, width, height in pixels")
    if outside > MOST_WRONG * len(data["annotations"]):
        raise DataError(doubt)
    if outside > len(data["annotations"]) / 5:
        warnings.warn(doubt, stacklevel=3)
    return data


def is_number(x, most):
    return type(x) in (int, float) and -most <= x <= most


def is_text(x):
    """Whether it is text that can be written: json may hold halves of characters, surrogates."""
    return type(x) is str and not any("\ud800" <= letter <= "\udfff" for letter in x)


# What may be wrong: each function returns the first fault of its kind, in words, or None.

def lists_fault(data):
    """The json is an object with three lists of objects."""
    if not isinstance(data, dict) or not all(isinstance(data.get(name), list) for name in LISTS):
        return (f"it needs the lists {', '.join(LISTS)}: an object-detection json is expected "
                "(those of test images have no annotations)")
    for name in LISTS:
        for entry in data[name]:
            if not isinstance(entry, dict) or isinstance(entry.get("id"), (list, dict)):
                return f"one of {name} is no COCO entry: {SHORT.repr(entry)}"


def twice_fault(data):
    """There are classes; no id and no class name is there twice."""
    if not data["categories"]:
        return "it has no categories: there is nothing to learn to tell apart"
    for name, key in (*((name, "id") for name in LISTS), ("categories", "name")):
        values = collections.Counter(entry[key] for entry in data[name]
                                     if isinstance(entry.get(key), (int, str)))
        if values and max(values.values()) > 1:
            twice = SHORT.repr(values.most_common(1)[0][0])
            return f"{name} has the {key} {twice} more than once: two jsons put together?"


def fields_fault(data):
    """Images and categories have ids, names and sizes that can be used; pictures lie inside."""
    for name, key, kind in FIELDS:
        for entry in data[name]:
            value = entry.get(key)
            if type(value) is not kind:
                what = (f"has no {key}" if value is None else
                        f"has the {key} {SHORT.repr(value)}, which is not of type {kind.__name__}")
                return f"one of {name} {what}: {SHORT.repr(entry)}"
            if kind is int and not is_number(value, MOST_ID):
                return f"one of {name} has the {key} {SHORT.repr(value)}, which is beyond 2^53"
            if kind is str and not is_text(value):
                return (f"one of {name} has the {key} {SHORT.repr(value)}, which holds half a "
                        "character: written in another encoding?")
    for entry in data["images"]:
        name = entry["file_name"]
        inside = posixpath.normpath(f"pictures/{name}")             # as seen from the root
        if not name or name[0] == "/" or ":" in name.split("/")[0] or inside.startswith(".."):
            return (f"image {entry['id']} has the file_name {SHORT.repr(entry['file_name'])}, which"
                    " leaves the data set's folder: give it relative to the folder of pictures")


def annotations_fault(data):
    """Each annotation is a box of a class in an image."""
    images, classes = ({entry["id"] for entry in data[name]} for name in ("images", "categories"))
    for a in data["annotations"]:
        if fault := annotation_fault(a, images, classes):
            return (f"annotation {SHORT.repr(a.get('id'))} of image {SHORT.repr(a.get('image_id'))}"
                    f": {fault}")


def annotation_fault(a, image_ids, category_ids):
    box, area, iscrowd = a.get("bbox"), a.get("area", 0), a.get("iscrowd", 0)
    image_id, category_id = a.get("image_id"), a.get("category_id")
    if type(image_id) is not int or image_id not in image_ids:
        return (f"there is no image with id {SHORT.repr(image_id)}: was the json cut down, or is "
                "the id written as text?")
    if type(category_id) is not int or category_id not in category_ids:
        return (f"there is no category with id {SHORT.repr(category_id)}: is this the index of a "
                "class?")
    if iscrowd not in (0, 1):
        return f"iscrowd must be 0 or 1, not {SHORT.repr(iscrowd)}"
    if not is_number(area, MOST_PX**2):
        return f"area must be a finite number of pixels, not {SHORT.repr(area)}"
    if not isinstance(box, list):
        return "it has no bbox: a json of captions?"
    if len(box) != 4 or not all(is_number(x, MOST_PX) for x in box):
        return ("bbox must be four finite numbers of pixels x, y, width, height, not "
                + SHORT.repr(box))


def without_groups(data):
    """The classes. Roboflow adds a group, the supercategory of them all, which no object has."""
    used = {a["category_id"] for a in data["annotations"] if type(a.get("category_id")) is int}
    kinds = [c.get("supercategory") for c in data["categories"]]
    return [c for c in data["categories"] if c.get("supercategory") != "none"
            or c.get("id") in used or c.get("name") not in kinds]


def index(data):
    """pycocotools' object for a checked json: the keys it needs filled in, its prints dropped.
    If an annotation has no id, 0 or no integer, all get new ones: an object with id 0 never counts
    as found."""
    data.setdefault("info", {})
    renumber = not all(type(a.get("id")) is int and 0 < abs(a["id"]) <= MOST_ID
                       for a in data["annotations"])
    for number, a in enumerate(data["annotations"], 1):
        a.pop("segmentation", None)             # most of the memory, and no box needs it
        a.setdefault("iscrowd", 0)
        a.setdefault("area", a["bbox"][2] * a["bbox"][3])
        a["id"] = number if renumber else a["id"]
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


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
