"""Test a trained detector: COCO AP on a data set, detections on photos, and where it looks.

    python eval.py runs/dac_shapes                            # AP on the run's own validation set
    python eval.py runs/dac_shapes/best.pt --coco DIR         # on a COCO folder's, classes by name
    python eval.py RUN --photos holiday/ --threshold 0.4      # a png a photo, and detections.json
    python eval.py RUN --points photo.jpg                     # sampling points of the last layer

Photos are drawn into --out, else RUN/photos. With --out, AP is also written there, as eval.json.
"""
import argparse
import dataclasses
import functools
import json
import pathlib
import sys

import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

import train
from detr_min import checkpoints, coco_folder, data, draw, evaluate, runs


def parse(argv=None):
    """The command line, as argparse gives it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", metavar="RUN_OR_WEIGHTS", help="run folder, or .pt or .pth file")
    parser.add_argument("--coco", metavar="DIR", help="COCO folder; its val split is used")
    parser.add_argument("--images", type=int, default=0, help="only the first N; 0 = all")
    parser.add_argument("--photos", metavar="FILE_OR_FOLDER", help="draw detections on these")
    parser.add_argument("--points", metavar="FILE", help="draw the sampling points of this photo")
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest score that is drawn")
    parser.add_argument("--top_k", type=int, default=0, help="detections an image; 0: preset's")
    parser.add_argument("--nms", type=float, metavar="IOU", help="drop boxes that overlap a better "
                        "one of their class by more; DAC-DETR's release is tested with .8")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--out", metavar="DIR", help="folder of results")
    args = parser.parse_args(argv)
    if min(args.images, args.top_k) < 0 or not 0 <= args.threshold <= 1 or not (
            args.nms is None or 0 < args.nms <= 1):
        parser.error("--images and --top_k are at least 0, --threshold and --nms in [0, 1]")
    return args


def photos(root, cfg):
    """Name, uint8 picture (3, h, w) turned as EXIF says, network image, of each readable file."""
    paths = sorted(p for p in root.iterdir() if p.is_file()) if root.is_dir() else [root]
    readable = 0
    for path in paths:
        try:
            with Image.open(path) as file:
                picture = pil_to_tensor(coco_folder.to_rgb(ImageOps.exif_transpose(file)))
            image = data.normalise(data.resize(cfg.size, cfg.recipe.max_size)(picture))
        except Exception as error:                      # Pillow raises many kinds
            print(f"eval.py: {path} is no readable picture, skipped ({error})", file=sys.stderr)
        else:
            readable += 1
            yield path.name, picture, image
    if not readable:
        raise ValueError(f"{root}: no readable picture among {len(paths)} files")


def draw_photos(detector, find, names, args, out):
    """--photos: a png each, and all that was drawn in detections.json."""
    rows = []
    for file, picture, image in photos(pathlib.Path(args.photos), detector.config):
        [found] = find(detector, [image], [tuple(picture.shape[-2:])])
        draw.photo(picture, found, names, out / f"{file}.png", args.threshold)
        columns = (found[key].tolist() for key in ("labels", "scores", "boxes_xyxy"))
        rows += [{"file": file, "label": names[label], "score": score, "box_xyxy": box}
                 for label, score, box in zip(*columns) if score >= args.threshold]
        print(f"{out / file}.png")
    (out / "detections.json").write_text(json.dumps(rows, indent=1))


def main(argv=None):
    """Run the command line. Raises ValueError or OSError for what a person can mend."""
    args = parse(argv)
    detector = checkpoints.load_model(args.weights)
    cfg, names = detector.config, [category["name"] for category in detector.categories]
    detector.to(train.pick_device(args.device))
    find = functools.partial(evaluate.detect, top_k=args.top_k or cfg.recipe.detections,
                             nms=args.nms)
    run = pathlib.Path(args.weights)
    out = pathlib.Path(args.out or (run if run.is_dir() else run.parent) / "photos")
    if args.photos and out.resolve() == pathlib.Path(args.photos).resolve():
        raise ValueError(f"--out {out} is where the photos are: take another folder for drawings")
    if args.out or args.photos or args.points:
        out.mkdir(parents=True, exist_ok=True)
    if args.coco or not (args.photos or args.points):
        if cfg.preset != "shapes" and not (args.coco or cfg.coco):
            raise ValueError(f"{args.weights} is a published file, which names no data: give "
                             "--coco DIR or --photos FILE")
        dataset = runs.open_val(dataclasses.replace(cfg, coco=args.coco or cfg.coco),
                                detector.categories)
        dataset.image_ids = dataset.image_ids[:args.images or None]
        metrics, table = evaluate.evaluate(detector, dataset, cfg.batch, find, cfg.precision)
        print(table)
        if args.out:
            (out / "eval.json").write_text(json.dumps(metrics, indent=1))
    if args.photos:
        draw_photos(detector, find, names, args, out)
    for file, _, image in photos(pathlib.Path(args.points), cfg) if args.points else ():
        is_pad, png = torch.zeros(image.shape[1:], dtype=torch.bool), out / f"{file}.points.png"
        draw.sampling_points(detector, image, is_pad, png, names)
        print(png)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:              # a person's mistake: one sentence
        sys.exit(f"eval.py: {error}")
