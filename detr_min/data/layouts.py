"""Which layout a folder of data has: where the json and the pictures of a split lie.

docs/data.md shows the layouts. A folder in YOLO's or Pascal VOC's is refused with the lines that
convert it. Read after nothing; `dataset.py` opens what is found here.
"""
import pathlib
from typing import NamedTuple

SPLITS = {"train": "train", "train2017": "train", "val": "val", "valid": "val", "val2017": "val"}
PARTS = "annotations", "images", *SPLITS       # folders inside a data set
OTHERS = (      # layout, supervision's reader, its label files and where these lie, the pictures
    ("YOLO", "from_yolo", "labels/{}", "*.txt", "images/{}"),
    ("YOLO", "from_yolo", "{}/labels", "*.txt", "{}/images"),
    ("YOLO", "from_yolo", "labels", "*.txt", "images"),
    ("Pascal VOC", "from_pascal_voc", "Annotations", "*.xml", "JPEGImages"),
    ("Pascal VOC", "from_pascal_voc", "{}", "*.xml", "{}"))


class Part(NamedTuple):
    """A split of a data set on disk."""
    path: pathlib.Path         # its json
    folders: list              # where its pictures may lie, the likeliest first
    is_shared: bool = False    # True: the json is all there is, and val is held out of it


def find(root, split):
    """Find a split, "train" or "val", in a folder of any layout that is read here. -> Part

    Raises:
        FileNotFoundError: what is missing, or how to convert what is there instead
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give the folder that holds your json")
    train, val = own_json(root, "train"), own_json(root, "val")
    if not train and not val:
        train = only_json(root)
    found = val if split == "val" and val else train
    if not found:
        names = (root / "annotations" / f"instances_{split}{year}.json" for year in ("2017", ""))
        raise FileNotFoundError(
            "neither " + " nor ".join(map(str, names)) + " exists" + (
                "; if you have only a validation part, copy or rename it to train; AP is then "
                "measured on the training images" if val else what_lies_in(root)))
    return found._replace(is_shared=not val)


def own_json(root, split):
    """A json that is there for this split: COCO's own layout, the plain one, or Roboflow's."""
    for name in (f"{split}2017", split):
        path = root / "annotations" / f"instances_{name}.json"
        if not path.is_file():
            continue
        folders = [folder for folder in (root / name, root / "images" / name) if folder.is_dir()]
        if not folders:
            raise FileNotFoundError(f"{path} is there but not its pictures: there is no folder "
                                    f"{root / name}")
        return Part(path, folders[:1])
    folders = [root / name for name, its_split in SPLITS.items() if its_split == split]
    return next((Part(folder / "_annotations.coco.json", [folder]) for folder in folders
                 if (folder / "_annotations.coco.json").is_file()), None)


def only_json(root):
    """The json of a folder that holds just one, with pictures in one of the folders beside it."""
    paths = [*root.glob("*.json"), *root.glob("annotations/*.json")]
    return Part(paths[0], [root / "images", root, *subfolders(root), *subfolders(root / "images")]
                ) if len(paths) == 1 else None


def subfolders(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def what_lies_in(root):
    """Say what a folder without a json of its own holds, to go on the sentence that it has none."""
    if root.name in PARTS and holds_data(root.parent):
        return f"; is {root.parent} meant?"
    paths = sorted([*root.glob("*.json"), *root.glob("annotations/*.json")])
    if paths:
        shown = ", ".join(path.name for path in paths[:5]) + ", ..." * (len(paths) > 5)
        return (f"; of its {len(paths)} jsons ({shown}), rename the one to train on as above, and "
                "one to validate on, if there is one, to instances_val.json")
    if lines := conversion(root):
        return lines
    inner = next(filter(holds_data, subfolders(root)), None)
    return f"; is {inner} meant?" if inner else (
        "; no json of boxes lies there in a layout that is read (docs/data.md shows them)")


def holds_data(folder):
    """Whether a folder is one that is read here, or converted."""
    return bool(only_json(folder) or any(folder.glob("annotations/*.json")) or conversion(folder)
                or own_json(folder, "train") or own_json(folder, "val"))


def foreign(root):
    """Which of OTHERS a folder is in, and what lies where.

    Returns:
        layout, reader, pattern of label files, {split: (folder of pictures, of labels)}; or None
    """
    for layout, reader, labels, pattern, pictures in OTHERS:
        names = SPLITS if "{}" in labels else {"": "train"}
        places = {split: (root / pictures.format(name), root / labels.format(name))
                  for name, split in names.items()
                  if any((root / labels.format(name)).glob(pattern))}
        if places:
            return layout, reader, pattern, places


def conversion(root):
    """The lines of Python that bring a YOLO or Pascal VOC folder into COCO layout, or ""."""
    if not (found := foreign(root)):
        return ""
    layout, reader, pattern, places = found
    copy, yaml = root.parent / f"{root.resolve().name}_coco", []
    if layout == "YOLO":
        yaml = [min(root.glob("*.y*ml"), default=root / "data.yaml")]
    lines = ["from supervision import DetectionDataset"]
    for split, folders in places.items():
        to = copy / split, copy / "annotations" / f"instances_{split}.json"
        reading, writing = (", ".join(repr(str(path)) for path in paths)
                            for paths in ([*folders, *yaml], to))
        lines.append(f"DetectionDataset.{reader}({reading}).as_coco({writing})")
    seen = next(iter(places.values()))[1] / pattern
    asked = [f", after you wrote the class names into {path} (names: [cat, dog])"
             for path in yaml if not path.is_file()]
    return (f"; this is {layout} ({seen}), which these lines of Python convert (pip install "
            f"supervision) for --coco {copy}{''.join(asked)}"
            + "".join(f"\n{line}" for line in lines))
