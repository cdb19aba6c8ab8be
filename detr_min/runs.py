"""What a run is beside its network: its data sets, its folder, its log.

Used by train.py and eval.py. Read after `checkpoints.py`.
"""
import dataclasses
import json
import math
import pathlib
import time

import torch
from tqdm import tqdm

from . import checkpoints, config, data, model, optim

NUM_VAL_SHAPES = 200
TERMS = "cls", "l1", "giou"
FILES = "config.json", "log.jsonl", "last.pt", "best.pt", "metrics.json"


def open_train(cfg):
    """The training set of a run: augmented, and the first 100 images as they are, to test on."""
    test = data.resize(cfg.size, cfg.recipe.max_size)
    if not cfg.coco:
        augmented = data.open_shapes("train", data.flip_only(), cfg.images, cfg.size, cfg.seed)
        return augmented, data.open_shapes("train", test, min(cfg.images, 100), cfg.size, cfg.seed)
    augment = data.multi_scale_and_crop(cfg.size, cfg.recipe.max_size)
    augmented, plain = (data.open_folder(cfg.coco, "train", transform, cfg.images, class_names(cfg),
                                         cfg.seed) for transform in (augment, test))
    plain.image_ids = plain.image_ids[:100]
    return augmented, plain


def open_val(cfg, categories):
    """The validation set of a run, labelled as it was trained; the same shapes for every seed."""
    test = data.resize(cfg.size, cfg.recipe.max_size)
    if cfg.coco:
        dataset, names = data.open_folder(cfg.coco, "val", test), class_names(cfg)
        dataset.categories = [c for c in dataset.categories if not names or c["name"] in names]
    else:
        dataset = data.open_shapes("val", test, NUM_VAL_SHAPES, cfg.size)
    data.relabel(dataset, categories)
    return dataset


def class_names(cfg):
    """--classes as a list."""
    return [name.strip() for name in cfg.classes.split(",") if name.strip()]


def check_queries(dataset, num_queries):
    """Refuse a set where an object would go without a query.

    Raises:
        ValueError: naming the image of most objects
    """
    counts = {image_id: sum(not a["iscrowd"] and a["category_id"] in dataset.label_of
                            for a in dataset.coco.imgToAnns.get(image_id, []))
              for image_id in dataset.image_ids}
    fullest = max(counts, key=counts.get)
    if counts[fullest] > num_queries:
        raise ValueError(f"image {fullest} holds {counts[fullest]} objects but the preset has "
                         f"{num_queries} queries, and each object needs one: take a preset with "
                         "more, or leave that image out")


def new_folder(cfg):
    """The folder of a new run: --out, or a free name under runs/. A run is never overwritten.

    Raises:
        FileExistsError: --out holds a run already
    """
    if cfg.out:
        out = pathlib.Path(cfg.out)
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"--out {out} is a file: a folder is expected")
        held = [name for name in FILES if (out / name).exists()]
        log = out / "log.jsonl"         # empty: a run that failed before its first step
        never_began = held == ["config.json", "log.jsonl"] and not log.stat().st_size
        if held and not never_began:
            raise FileExistsError(f"--out {out} holds a run already ({', '.join(held)}): go on "
                                  f"with --resume {out}, or take another name")
        return out
    words = [cfg.model, pathlib.Path(cfg.coco).resolve().name if cfg.coco else "shapes"]
    words += [cfg.loss] * (cfg.loss != "focal") + [cfg.queries] * (cfg.queries != "two_stage")
    name = "_".join(words) + (f"_seed{cfg.seed}" if cfg.seed else "")
    names = [name] + [f"{name}-{i}" for i in range(2, 1000)]
    return next(p for p in (pathlib.Path("runs") / n for n in names) if not p.exists())


def start(cfg, device, say):
    """A run from its flags, new or resumed.

    Args:
        cfg     config.Config
        device  torch.device
        say     a function that prints, or does not
    Returns:
        the run's full Config, detector, optimizer, (training set, the same as it is, validation
        set), and progress, a dict of numbers
    """
    progress = {"step": 0, "saved": 0, "seconds": 0.0, "cpu_seconds": 0.0, "best_AP": 0.0}
    content = None
    if cfg.resume:
        folder = pathlib.Path(cfg.resume)
        folder = folder if folder.is_dir() else folder.parent
        content = checkpoints.read(folder)
        progress = content["progress"]
        if 0 < cfg.pause <= progress["step"]:
            raise ValueError(f"--pause {cfg.pause}: the run is at step {progress['step']} already")
        cfg = dataclasses.replace(config.from_dict(content["config"]), out=str(folder),
                                  resume=str(folder), pause=cfg.pause, device=cfg.device)
    elif cfg.coco:
        cfg = dataclasses.replace(cfg, coco=str(pathlib.Path(cfg.coco).absolute()))
    train_set, plain_set = open_train(cfg)
    if content and (content["categories"] != train_set.categories
                    or progress["images"] != len(train_set)):
        raise ValueError(f"{cfg.coco} changed since {cfg.resume} started on it, then of "
                         f"{progress['images']} images and {len(content['categories'])} classes: "
                         f"train anew, with --init_from {cfg.resume}")
    progress["images"] = len(train_set)
    val_set = open_val(cfg, train_set.categories)
    check_queries(train_set, cfg.recipe.num_queries)
    epoch_steps = math.ceil(len(train_set) / cfg.batch)
    recipe = dataclasses.replace(cfg.recipe, num_classes=len(train_set.categories))
    cfg = dataclasses.replace(cfg, out=cfg.resume or str(new_folder(cfg)), recipe=recipe,
                              steps=epoch_steps * cfg.epochs or cfg.steps)
    torch.manual_seed(cfg.seed)
    detector = model.build(cfg)
    if content:
        detector.load_state_dict(content["model"])
    elif cfg.init_from:
        left = checkpoints.init_from(detector, train_set.categories, cfg.init_from)
        say(f"weights from {cfg.init_from}; {len(left)} tensors start at random: "
            f"{', '.join(left) or '-'}")
    elif cfg.backbone == "resnet50":
        detector.backbone.load_imagenet()
    elif cfg.backbone == "swin_l":
        say("the Swin starts at random: --init_from takes ImageNet's weights, or a detector's")
    optimizer = optim.make_optimizer(detector.to(device), cfg)
    if content:
        optimizer.load_state_dict(content["optimizer"])
    return cfg, detector, optimizer, (train_set, plain_set, val_set), progress


def describe(line):
    """One line of log.jsonl for people: what the loss is made of, what each decoder matched."""
    decoders = [name for name in ("O", "C", "encoder", "O_denoising", "C_denoising")
                if name in line]
    sums = [f"{name} ({' + '.join(f'{term} {line[name][term]:.2f}' for term in TERMS)})"
            for name in decoders]
    pairs = [f"{name} {line[name]['pairs']:.1f}" for name in ("O", "C") if name in line]
    return (f"step {line['step']} | loss {line['loss']:.2f} = {' + '.join(sums)} | objects "
            f"{line['objects']:.1f}, queries matched {' / '.join(pairs)} | {line['ms']:.0f} ms")


def step_of(line):
    """The step of a line of log.jsonl; of one torn by a crash, infinity."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


class Log:
    """log.jsonl: means over the steps since the last line.

    Lines after `last_step`, which a crash left behind, are dropped.
    """

    def __init__(self, path, last_step):
        self.path, self.steps = path, []
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if step_of(line) <= last_step]
        path.write_text("".join(line + "\n" for line in kept))
        self.restart_clock()

    def restart_clock(self):
        """Time from now on counts as training."""
        self.clock, self.cpu_clock = time.perf_counter(), time.process_time()

    def add(self, parts, **more):
        """Remember a step: criterion's parts, left on their device (nothing waits), and numbers."""
        self.steps.append(({name: torch.stack(part[:3]).detach() for name, part in parts.items()},
                           {name: part.pairs for name, part in parts.items()}, more))

    def line(self, step, agree, **more):
        """The means since the last line, a dict; `agree(*numbers)` takes theirs over processes."""
        terms, pairs, numbers = zip(*self.steps)
        n, line = len(self.steps), {"step": step, **more}
        for name in terms[0]:
            means = agree(*(sum(t[name] for t in terms) / n).tolist(),
                          sum(p[name] for p in pairs) / n)
            line[name] = dict(zip((*TERMS, "pairs"), means))
        line["loss"] = sum(line[name][term] for name in terms[0] for term in TERMS)
        line.update({key: sum(m[key] for m in numbers) / n for key in numbers[0]})
        line["ms"] = (time.perf_counter() - self.clock) / n * 1000
        line["cpu_s"] = (time.process_time() - self.cpu_clock) / n
        self.steps = []
        return line

    def write(self, line, text, visible=True):
        """Append a line to the file, print its text above the progress bar, restart the clock."""
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if visible:
            tqdm.write(text)
        self.restart_clock()
