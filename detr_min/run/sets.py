"""The data sets of a run: what its config says of images, classes and sizes, opened.

Read after `config.py`.
"""
import copy
import pathlib

from ..data import dataset, transforms

NUM_VAL_SHAPES = 200


def check_moved(cfg, run, remedy):
    """Refuse to go on with a run, or to test it, where its data is gone.

    Raises:
        FileNotFoundError
    """
    if cfg.coco and not pathlib.Path(cfg.coco).is_dir():
        raise FileNotFoundError(f"{run} was trained on {cfg.coco}, which is no longer there: "
                                f"{remedy}")


def open_train(cfg):
    """Open the training set: augmented, and its first 100 images as they are, to test on."""
    test = transforms.resize(cfg.size, cfg.recipe.max_size)
    if not cfg.coco:
        return tuple(dataset.open_shapes("train", transform, num_images, cfg.size, cfg.seed)
                     for transform, num_images in ((transforms.flip_only(), cfg.images),
                                                   (test, min(cfg.images, 100))))
    augment = (transforms.flip_and_resize if cfg.augment == "flip"
               else transforms.multi_scale_and_crop)(cfg.size, cfg.recipe.max_size)
    augmented = dataset.open_folder(cfg.coco, "train", augment, cfg.images, class_names(cfg),
                                    cfg.seed, cfg.val_share)
    plain = copy.copy(augmented)            # the json of many images is read and kept once
    plain.transform, plain.image_ids = test, augmented.image_ids[:100]
    return augmented, plain


def open_val(cfg, categories):
    """Open the validation set, labelled as the training set; the same shapes for every seed."""
    test = transforms.resize(cfg.size, cfg.recipe.max_size)
    if cfg.coco:
        val_set, names = dataset.open_folder(cfg.coco, "val", test, seed=cfg.seed,
                                             val_share=cfg.val_share), class_names(cfg)
        val_set.categories = [c for c in val_set.categories if not names or c["name"] in names]
    else:
        val_set = dataset.open_shapes("val", test, NUM_VAL_SHAPES, cfg.size)
    dataset.relabel(val_set, categories)
    return val_set


def said_of_val(cfg, val_set):
    """Where the validation images come from, if that needs to be said; else ""."""
    if val_set.is_held_out:
        return (f" (there is no validation json: --val_share {cfg.val_share:g} of the images, drawn"
                f" by --seed {cfg.seed}, are held out)")
    unused = cfg.coco and cfg.val_share != type(cfg).val_share
    return " (there is a validation json, so --val_share has no effect)" if unused else ""


def said_of_objects(train_set):
    """Sentences on what cannot be learned: classes without an object, boxes without area; or ""."""
    counts, num_flat = dict.fromkeys(train_set.label_of, 0), 0
    for image in map(train_set.coco.imgs.get, train_set.image_ids):
        for a in train_set.annotations(image["id"]):
            x, y, w, h = a["bbox"]
            sides = min(x + w, image["width"]) - max(x, 0), min(y + h, image["height"]) - max(y, 0)
            is_flat = min(sides) < transforms.LEAST_PX
            num_flat += is_flat
            counts[a["category_id"]] += not is_flat
    empty = [c["name"] for c in train_set.categories if not counts[c["id"]]]
    shown = ", ".join(empty[:5]) + ", ..." * (len(empty) > 5)
    return (f"\nboxes without area inside their picture, left out: {num_flat}" * bool(num_flat)
            + f"\nclasses without an object to learn from: {len(empty)} of {len(counts)} ({shown})"
            * bool(empty))


def class_names(cfg):
    """Split --classes into a list."""
    return [name.strip() for name in cfg.classes.split(",") if name.strip()]


def check_queries(train_set, num_queries):
    """Refuse a set without any object, or where an object would go without a query.

    Raises:
        ValueError: naming the image of most objects
    """
    counts = {image_id: len(train_set.annotations(image_id)) for image_id in train_set.image_ids}
    fullest = max(counts, key=counts.get)
    if not counts[fullest]:
        raise ValueError(f"none of the {len(counts)} training images has an object to learn from: "
                         "was the json written before anything was labelled?")
    if counts[fullest] > num_queries:
        raise ValueError(f"image {fullest} holds {counts[fullest]} objects but the preset has "
                         f"{num_queries} queries, and each object needs one: take a preset with "
                         "more, or leave that image out")
