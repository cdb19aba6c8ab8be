"""Test a trained detector: COCO AP on a data set, detections on photos, and where it looks.

    python eval.py runs/dac_shapes                            # AP on the run's own validation set
    python eval.py runs/dac_shapes/best.pt --coco DIR         # on a COCO folder's, classes by name
    python eval.py RUN --photos holiday/ --threshold 0.3      # a png per photo, and detections.json
    python eval.py RUN --points photo.jpg                     # where the last layer looks
    python eval.py RUN --explore photo.jpg                    # a page to play with, every layer
    python eval.py RUN --explore 12                           # ... of a validation image, by its id

Pictures and pages go into --out, else RUN/photos. With --out, so does AP, as eval.json.
"""
import argparse
import collections
import dataclasses
import functools
import json
import pathlib
import sys

import torch

import detr_min
from detr_min.run import config, draw, ending, evaluate, explore, looks, predictor, sets


def parse(argv=None):
    """Read the command line, as argparse gives it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", metavar="RUN_OR_WEIGHTS", help="run folder, or .pt or .pth file")
    parser.add_argument("--coco", metavar="DIR", help="COCO folder; its val split is used")
    parser.add_argument("--images", type=int, default=0, help="only the first N; 0 = all")
    parser.add_argument("--photos", metavar="FILE_OR_FOLDER", nargs="+",
                        help="draw detections on these")
    parser.add_argument("--points", metavar="FILE", help="draw where the last layer looks")
    parser.add_argument("--explore", metavar="FILE_OR_ID", help="a page of what the queries do on "
                        "a photo, or on the validation image of this id, with its objects")
    parser.add_argument("--threshold", type=float, default=evaluate.THRESHOLD,
                        help="smallest score that is drawn")
    parser.add_argument("--top_k", type=int, default=0, help="detections an image; 0: preset's")
    parser.add_argument("--nms", type=float, metavar="IOU", help="drop boxes that overlap a better "
                        "one of their class by more; DAC-DETR's release is tested with .8")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--dc5", action="store_true", help="the file is a published DC5 model of "
                        "Conditional DETR and does not say so itself")
    parser.add_argument("--out", metavar="DIR", help="folder of results")
    args = parser.parse_args(config.plain_numbers(argv))
    for name in ("images", "top_k"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)}: it must be at least 0")
    for name in ("threshold", "nms"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)}: it must be from 0 to 1")
    for name in ("weights", "coco", "photos", "points", "explore", "out"):
        if getattr(args, name) in ("", [""]):
            what = "RUN_OR_WEIGHTS" if name == "weights" else f"--{name}"
            parser.error(f"{what} is empty: is it an unset variable of your shell?")
    if args.out and pathlib.Path(args.out).is_file():
        parser.error(f"--out {args.out} is a file: a folder is expected")
    return args


def readable(*paths):
    """Yield (name, picture) of files, or of each file in a folder; say which cannot be read.

    Raises:
        ValueError: there is none that can be read, or two have the same name
    """
    files, num_folders, count = [], 0, 0
    for root in map(pathlib.Path, paths):
        if not root.exists():
            raise FileNotFoundError(f"{root}: there is no such file or folder")
        inside = sorted(root.iterdir()) if root.is_dir() else [root]
        files += [path for path in inside if path.is_file()]
        num_folders += sum(path.is_dir() for path in inside)
    names = collections.Counter(file.name for file in files)
    if len(names) < len(files):
        raise ValueError(f"two files are called {names.most_common(1)[0][0]}, and so would their "
                         "results be: run each folder with an --out of its own")
    for file in files:
        try:
            picture = predictor.read(file)
        except (ValueError, OSError) as error:
            print(f"eval.py: {error}, skipped", file=sys.stderr)
        else:
            count += 1
            yield file.name, picture
    left_out = f"subfolders, which were not searched: {num_folders}"
    if not count:
        raise ValueError(f"{' '.join(paths)}: no readable picture among {len(files)} files"
                         + f"; {left_out}" * bool(num_folders))
    if num_folders:
        print(f"eval.py: {' '.join(paths)}: {left_out}", file=sys.stderr)


def draw_photos(detector, args, out):
    """--photos: a png each, and all that was drawn in detections.json."""
    rows = []
    for name, picture in readable(*args.photos):
        out.mkdir(parents=True, exist_ok=True)
        found = detector.detect(picture, args.threshold, args.top_k or None, args.nms)
        draw.photo(picture, found, detector.names, out / f"{name}.png")
        columns = (found[key].tolist() for key in ("labels", "scores", "boxes"))
        rows += [{"file": name, "label": detector.names[label], "score": score, "box_xyxy": box}
                 for label, score, box in zip(*columns)]
        print(f"{out / name}.png")
    (out / "detections.json").write_text(json.dumps(rows, indent=1))
    if not rows:
        print(f"eval.py: nothing scores {args.threshold:g} or more: try a lower --threshold",
              file=sys.stderr)


def draw_points(detector, args, out):
    """--points: where the last layer's cross-attention looks, one png per photo."""
    for name, picture in readable(args.points):
        out.mkdir(parents=True, exist_ok=True)
        image, png = detector.network_image(picture), out / f"{name}.points.png"
        is_pad = torch.zeros(image.shape[1:], dtype=torch.bool)
        looks.where_it_looks(detector.model, image, is_pad, png, detector.names)
        print(png)


def open_val(detector, args):
    """The validation set of --coco, or the run's own, labelled as the detector was trained."""
    cfg = detector.config
    if not cfg.preset.startswith("shapes") and not (args.coco or cfg.coco):
        raise ValueError(f"{args.weights} is a published file, which names no data: give "
                         "--coco DIR or --photos FILE")
    if not args.coco:
        sets.check_moved(cfg, args.weights, "give --coco DIR")
    val_set = sets.open_val(dataclasses.replace(cfg, coco=args.coco or cfg.coco),
                            detector.categories)
    if val_set.is_held_out:
        print(f"{args.coco or cfg.coco}{sets.said_of_val(cfg, val_set)}")
    return val_set


def write_pages(detector, args, out):
    """--explore: one page per photo, or the page of one validation image with its objects."""
    if args.explore.isdecimal():
        val_set, image_id = open_val(detector, args), int(args.explore)
        if image_id not in val_set.image_ids:
            first = ", ".join(map(str, val_set.image_ids[:5]))
            raise ValueError(f"--explore {image_id}: the validation set has no image of this id; "
                             f"its first ids are {first}")
        image, target = val_set[val_set.image_ids.index(image_id)]
        pages = [(f"image {image_id}", f"val_{image_id}", image, target)]
    else:
        pages = ((name, name, detector.network_image(picture), None)
                 for name, picture in readable(args.explore))
    for name, stem, image, target in pages:
        out.mkdir(parents=True, exist_ok=True)
        explore.write(detector.model, image, name, out / f"{stem}.html", target)
        print(out / f"{stem}.html")


def main(argv=None):
    """Run the command line. Raises ValueError or OSError for what a person can mend."""
    args = parse(argv)
    detector = detr_min.load(args.weights, args.device, args.dc5)
    cfg, run = detector.config, pathlib.Path(args.weights)
    out = pathlib.Path(args.out or (run if run.is_dir() else run.parent) / "photos")
    if args.photos and out.resolve() in (pathlib.Path(path).resolve() for path in args.photos):
        raise ValueError(f"--out {out} is where the photos are: take another folder for drawings")
    if args.coco and not args.explore or not (args.photos or args.points or args.explore):
        val_set = open_val(detector, args)
        val_set.image_ids = val_set.image_ids[:args.images or None]
        find = functools.partial(evaluate.detect, top_k=args.top_k or cfg.recipe.detections,
                                 nms=args.nms)
        metrics, table = evaluate.evaluate(detector.model, val_set, cfg.batch, find, cfg.precision)
        print(table)
        if args.out:
            out.mkdir(parents=True, exist_ok=True)
            (out / "eval.json").write_text(json.dumps(metrics, indent=1))
    if args.photos:
        draw_photos(detector, args, out)
    if args.points:
        draw_points(detector, args, out)
    if args.explore:
        write_pages(detector, args, out)


if __name__ == "__main__":
    with ending.in_a_sentence("eval.py"):
        main()
