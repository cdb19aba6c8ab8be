"""How soon a detector finds something: ours and torchvision's, from random weights, your images.

    python -m benchmarks.detectors --coco DIR                         # 300 CPU-seconds each
    python -m benchmarks.detectors --coco DIR --sides ours,ssdlite --budget 120 --until 0.5

Every side gets the images of preset coco with the same augmentation, AdamW with our schedule, one
thread, and the same CPU-seconds of training. Testing stands outside the clock. The learning rate is
our preset's, and for the others the better one of 1e-3 and 3e-4 after 100 CPU-seconds on BCCD.
Exit status: 0 done, 1 failed, 2 flags refused.
"""
import argparse
import dataclasses
import json
import math
import pathlib
import sys
import time

import torch
import torchvision
from torch import nn

from benchmarks import cases, speed
from detr_min import boxes
from detr_min.data import batches
from detr_min.run import config, evaluate, optim, registry, sets

MODELS = torchvision.models.detection
BUILDERS = {                    # torchvision's
    "fasterrcnn_mobilenet": MODELS.fasterrcnn_mobilenet_v3_large_fpn,
    "ssdlite": MODELS.ssdlite320_mobilenet_v3_large,
    "fcos_resnet50": MODELS.fcos_resnet50_fpn,
}
SIDES = ("ours", *BUILDERS)
RATES = {"ours": config.preset("coco").lr, **dict.fromkeys(BUILDERS, 1e-3)}
MOST_STEPS = 10 ** 6


class Theirs(nn.Module):
    """One of torchvision's detectors, with our batches and our targets."""

    def __init__(self, name, cfg):
        super().__init__()
        size = {} if name == "ssdlite" else {"min_size": cfg.size, "max_size": cfg.recipe.max_size}
        self.net = BUILDERS[name](weights=None, weights_backbone=None,
                                  num_classes=cfg.recipe.num_classes + (name != "fcos_resnet50"),
                                  image_mean=[0.0] * 3, image_std=[1.0] * 3, **size)
        self.first_label = int(name != "fcos_resnet50")         # of the others, 0 is background

    def loss(self, images, targets):
        """The sum of its losses. [(3, h, w)], [dataset.Target] -> a number"""
        wanted = []
        for image, target in zip(images, targets):
            h, w = image.shape[-2:]
            wanted.append({"labels": target.labels + self.first_label, "boxes":
                           boxes.to_xyxy(target.boxes) * torch.tensor([w, h, w, h])})
        return sum(self.net(list(images), wanted).values())

    def detect(self, images, sizes_px):
        """As evaluate.detect."""
        with evaluate.answering(self):
            answers = self.net(list(images))
        return [{"scores": a["scores"], "labels": a["labels"] - self.first_label,
                 "boxes_xyxy": a["boxes"] * torch.tensor([w, h, w, h])
                 / torch.tensor(image.shape[:0:-1]).repeat(2)}
                for a, image, (h, w) in zip(answers, images, sizes_px)]


def build(side, cfg):
    """A side's network, its loss of a batch [(image, target)], and its `find` for evaluate."""
    torch.manual_seed(cfg.seed)
    if side == "ours":
        net = registry.build(cfg).train()
        loss = cases.our_loss(net, cfg)
        return net, lambda batch, step: loss(batches.collate(batch), step), evaluate.detect
    net = Theirs(side, cfg).train()
    return (net, lambda batch, step: net.loss(*zip(*batch)),
            lambda model, images, sizes_px: net.detect(images, sizes_px))


def learn(side, cfg, args):
    """Train one side for its CPU-seconds, and test it every so many of them and at the end.

    The schedule goes by CPU-seconds too: the run's steps are estimated anew at each step.

    Returns:
        a dict: side, seed, lr, steps, parameters, and `curve`: dicts of step, CPU-seconds, AP, AP50
    """
    cfg = dataclasses.replace(cfg, lr=args.lr or RATES[side])
    train_set, _ = sets.open_train(cfg)
    cfg = dataclasses.replace(cfg, recipe=dataclasses.replace(
        cfg.recipe, num_classes=len(train_set.categories)))
    val_set = sets.open_val(cfg, train_set.categories)
    net, loss, find = build(side, cfg)
    optimizer = optim.make_optimizer(net, cfg)
    run = cases.training_step(net, loss, optimizer, cfg.recipe.clip)
    order = batches.batches(len(train_set), cfg.batch, cfg.seed, 0, MOST_STEPS)
    loader = iter(torch.utils.data.DataLoader(train_set, batch_sampler=order, collate_fn=list))
    spent, step, curve = 0.0, 0, []
    while spent < args.budget:
        start = time.process_time()
        steps = math.ceil(step * args.budget / spent) if step else MOST_STEPS
        optim.set_learning_rate(optimizer, step, dataclasses.replace(cfg, steps=steps))
        step += 1
        run(next(loader), step)
        spent += time.process_time() - start
        if spent >= min((len(curve) + 1) * args.every, args.budget):
            metrics, _ = evaluate.evaluate(net, val_set, cfg.batch, find)
            curve.append({"step": step, "cpu_seconds": spent, "AP": metrics["AP"],
                          "AP50": metrics["AP50"]})
            print(f"{side} step {step}, {spent:.0f} CPU-s: {evaluate.headline(metrics)}",
                  flush=True)
    return {"side": side, "seed": cfg.seed, "lr": cfg.lr, "steps": step, "curve": curve,
            "parameters": sum(p.numel() for p in net.parameters() if p.requires_grad)}


def line(found, until):
    """One line of the table."""
    reached = next((f"{point['cpu_seconds']:.0f}" for point in found["curve"]
                    if (point["AP50"] or 0) >= until), "not reached")
    last = found["curve"][-1]
    return (f"| {found['side']} | {found['parameters'] / 1e6:.1f} | {found['lr']:g} | "
            f"{found['steps']} | {reached} | {last['AP50']:.3f} | {last['AP']:.3f} | "
            f"{last['cpu_seconds']:.0f} |")


def title(until):
    """The first two lines of the table."""
    return (f"| detector | M parameters | learning rate | steps | CPU-seconds to AP50 {until:g} | "
            "AP50 at the end | AP | CPU-seconds |\n|---|--:|--:|--:|--:|--:|--:|--:|")


def parse(argv=None):
    """The flags, checked: a wrong one ends in a sentence and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", required=True, help="folder in COCO layout")
    parser.add_argument("--sides", default=",".join(SIDES), help="of: " + ", ".join(SIDES))
    parser.add_argument("--budget", type=float, default=300, help="CPU-seconds of training each")
    parser.add_argument("--every", type=float, default=30, help="CPU-seconds between two tests")
    parser.add_argument("--until", type=float, default=0.5, help="validation AP50 to reach")
    parser.add_argument("--size", type=int, default=config.preset("coco").size, help="pixels")
    parser.add_argument("--lr", type=float, default=0, help="of every side; 0: each its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="json file to write")
    args = parser.parse_args(argv)
    try:
        args.sides = speed.words(args.sides, SIDES, "--sides")
        if args.budget <= 0 or args.every <= 0:
            raise ValueError("--budget and --every are numbers of seconds above 0")
        args.base = config.preset("coco", coco=args.coco, size=args.size, seed=args.seed)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv=None):
    """Run the command line; returns what each side reached."""
    args, done = parse(argv), []
    torch.set_num_threads(1)
    for side in args.sides:
        done.append(learn(side, args.base, args))
        if args.out:
            pathlib.Path(args.out).write_text(json.dumps(done, indent=1))
    print("\n".join([title(args.until), *(line(found, args.until) for found in done)]))
    return done


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.detectors: {error}")
