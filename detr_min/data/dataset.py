"""COCO folders and synthetic shapes as one kind of data set: pictures in, normalised boxes out.

Category ids become labels here and nowhere else; boxes become cxcywh in [0, 1] last. Read
`coco_folder.py` and `transforms.py` before.
"""
import difflib
import functools
import os
import pathlib
from typing import NamedTuple

import torch
from torchvision import ops, tv_tensors
from torchvision.transforms import v2

from . import batches, coco_folder, coco_json, layouts, shapes, transforms

CACHE_BYTES = 2**30        # decoded pictures kept in memory by a data set, all its workers together


class Target(NamedTuple):
    labels: torch.Tensor       # (M,)    int64 in [0, C)
    boxes: torch.Tensor        # (M, 4)  float32 cxcywh, in [0, 1] of the un-padded network image
    image_id: int              # as in the json
    size_px: tuple[int, int]   # (h, w) of the original picture, in the frame of the json's boxes


class Detections(torch.utils.data.Dataset):
    """Images and their objects: `ds[(epoch, index)]` or `ds[index]` -> (image (3, h, w), Target).

    `coco` is the whole json, crowds included, for evaluation; `image_ids` are the chosen images;
    `categories` the chosen classes by ascending json id: the position there is the label.
    Flip, size and crop are a pure function of (seed, epoch, index): workers, ranks and resumed runs
    see the same pictures. `read(json image)` gives a PIL picture; it is kept while there is room.
    """

    is_held_out = False        # True: a part of the training json, which alone is there

    def __init__(self, coco, image_ids, categories, read, transform, seed):
        self.coco, self.image_ids, self.categories = coco, image_ids, categories
        self.read, self.transform, self.seed = read, transform, seed
        self.label_of = {category["id"]: label for label, category in enumerate(categories)}
        self.cache, self.cached_bytes = {}, 0

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (0, key)
        image = self.coco.imgs[self.image_ids[i]]
        picture, objects = tv_tensors.Image(self.picture(image)), self.objects(image)
        with torch.random.fork_rng(devices=[]):          # the global random stream is left alone
            torch.default_generator.manual_seed(batches.mixed_seed(self.seed, epoch, i))
            picture, objects = self.transform(picture, objects)
        objects, (h, w) = transforms.keep_visible(objects), picture.shape[-2:]
        boxes = ops.box_convert(objects["boxes"].as_subclass(torch.Tensor), "xyxy", "cxcywh")
        target = Target(objects["labels"], boxes / torch.tensor([w, h, w, h]), image["id"],
                        (image["height"], image["width"]))
        return transforms.normalise(picture), target

    def picture(self, image):
        """The decoded picture, uint8 (3, h, w)."""
        if image["id"] in self.cache:
            return self.cache[image["id"]]
        picture = v2.functional.pil_to_tensor(self.read(image))
        worker = torch.utils.data.get_worker_info()      # each worker process has its own cache
        limit = CACHE_BYTES // (worker.num_workers if worker else 1)
        if self.cached_bytes + picture.numel() <= limit:
            self.cache[image["id"]] = picture
            self.cached_bytes += picture.numel()
        return picture

    def annotations(self, image_id):
        """What the json says of an image's objects: those of a chosen class that are no crowd."""
        return [a for a in self.coco.imgToAnns.get(image_id, [])
                if not a["iscrowd"] and a["category_id"] in self.label_of]

    def objects(self, image):
        """Labels and boxes of one image, as v2 transforms want them."""
        found = self.annotations(image["id"])
        labels = torch.tensor([self.label_of[a["category_id"]] for a in found], dtype=torch.int64)
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
        boxes = tv_tensors.BoundingBoxes(ops.box_convert(boxes, "xywh", "xyxy"), format="XYXY",
                                         canvas_size=(image["height"], image["width"]))
        return transforms.keep_visible({"labels": labels, "boxes": boxes})


def open_shapes(split, transform, num_images, size_px=128, seed=0):
    """Synthetic shapes: the first `num_images` images of a split, each drawn when first read."""
    if num_images < 1:
        raise coco_json.DataError(f"asked for {num_images} images of shapes: one is the least")
    coco = coco_json.index(shapes.coco_dict(split, num_images, size_px, seed))
    read = functools.partial(draw_shapes, split, size_px, seed)
    return Detections(coco, list(coco.imgs), coco.dataset["categories"], read, transform, seed)


def draw_shapes(split, size_px, seed, image):
    return shapes.draw(shapes.scene(seed, split, image["id"] - 1, size_px))


def open_folder(root, split, transform, num_images=0, class_names=(), seed=0, val_share=0.2):
    """A folder in COCO's layout or one near it (docs/data.md), its "train" or "val" split.

    Args:
        num_images   how many, drawn by the seed; 0 is all. Fewer images are a part of more images
        class_names  none is all. train: only images with one of these classes; val: all images
        val_share    where there is no validation json: the share of all images that are val
    Raises:
        DataError, FileNotFoundError: one sentence, for all that can be known without decoding.
    """
    root = pathlib.Path(root)
    part = layouts.find(root, split)
    path = part.path
    coco = coco_json.index(coco_json.check(coco_json.read(path), path))
    categories = chosen_categories(coco, class_names, path)
    image_ids = list(coco.imgs)
    if part.is_shared and len(image_ids) == 1:
        raise coco_json.DataError(f"{path} has 1 image, and there is no validation json: two "
                                  "images are the least, one to train on and one to validate")
    if part.is_shared:
        held = held_out(image_ids, val_share, seed)
        image_ids = [i for i in image_ids if (i in held) == (split == "val")]
    if class_names and split == "train":
        ids = {category["id"] for category in categories}
        image_ids = [i for i in image_ids if any(a["category_id"] in ids and not a["iscrowd"]
                                                 for a in coco.imgToAnns.get(i, []))]
    if not image_ids or not 0 <= num_images <= len(image_ids):
        of = f" with {', '.join(class_names)}" if class_names and split == "train" else ""
        rest = f" beside the {len(held)} held out for validation" if part.is_shared else ""
        raise coco_json.DataError(f"{path} has {len(image_ids)} images{of}{rest}; asked for "
                                  + (f"{num_images} (0 means all)" if image_ids else "one or more"))
    if num_images:
        order = torch.randperm(len(image_ids), generator=batches.generator(seed))
        image_ids = [image_ids[i] for i in order[:num_images].sort().values.tolist()]
    first = coco.imgs[image_ids[0]]["file_name"]
    folder = next((f for f in part.folders if os.path.isfile(f / first)), part.folders[0])
    coco_folder.check_pictures(root, folder, [coco.imgs[i] for i in image_ids], path)
    read = functools.partial(coco_folder.read_picture, folder)
    opened = Detections(coco, image_ids, categories, read, transform, seed)
    opened.is_held_out = part.is_shared and split == "val"
    return opened


def chosen_categories(coco, class_names, path):
    """The classes of a json by ascending id: all, or those of these names."""
    categories = sorted(coco.dataset["categories"], key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    for name in set(class_names) - set(names):
        lower = {known.lower(): known for known in names}
        near = difflib.get_close_matches(name.lower(), lower, 1)
        hint = f", did you mean {lower[near[0]]!r}?" if near else "."
        raise coco_json.DataError(f"{path} has no class {name!r}{hint} It has: "
                                  + ", ".join(map(repr, names)))
    return [{"id": category["id"], "name": category["name"]} for category in categories
            if not class_names or category["name"] in class_names]


def held_out(image_ids, share, seed):
    """The ids that validate where a folder has no validation json: the same for the same images,
    share and seed, whatever their order and whichever of the rest are trained on."""
    order = torch.randperm(len(image_ids), generator=batches.generator(seed)).tolist()
    number = min(max(round(share * len(image_ids)), 1), len(image_ids) - 1)
    return {sorted(image_ids)[i] for i in order[:number]}


def relabel(dataset, categories):
    """Give a data set the labels of another, or of a checkpoint: classes are matched by name.

    Args:
        categories  [{"id", "name"}], position = label; ids may differ from the data set's
    Raises:
        DataError: it has objects of a class that is not among them
    """
    names, ids = [c["name"] for c in categories], {c["name"]: c["id"] for c in dataset.categories}
    used = {a["category_id"] for i in dataset.image_ids for a in dataset.coco.imgToAnns.get(i, [])}
    unknown = [name for name in ids if ids[name] in used and name not in names]
    if unknown:
        raise coco_json.DataError("the images to evaluate hold objects of classes that were not "
                                  f"trained: {', '.join(unknown)}; trained: {', '.join(names)}")
    dataset.categories = [{"id": ids.get(name), "name": name} for name in names]
    dataset.label_of = {ids[name]: label for label, name in enumerate(names) if name in ids}
