"""A run: its folder, its progress, what it works on. New, or resumed where it stopped.

Read after `checkpoints.py` and `logfile.py`; train.py and eval.py use it.
"""
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import signal

import torch
from torch import nn

from ..data import batches, dataset
from . import checkpoints, config, draw, evaluate, logfile, optim, processes, registry, sets

NUM_LOGS, NUM_SAVES, NUM_EVALS = 40, 20, 5                  # in a whole run
NOT_FINITE = "the loss or its gradient is not finite: a lower --lr may help"
FILES = "config.json", "log.jsonl", "last.pt", "best.pt", "metrics.json"


def new_folder(cfg):
    """Find the folder of a new run: --out, or a free name under runs/. No run is overwritten.

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


@dataclasses.dataclass
class Run:
    """What a training loop works on; `cfg` is complete, with class count and number of steps."""
    cfg: config.Config
    device: torch.device
    detector: nn.Module
    optimizer: torch.optim.Optimizer
    train_set: dataset.Detections
    plain_set: dataset.Detections           # training images without augmentation
    val_set: dataset.Detections
    progress: dict                          # numbers that are saved: step, best_AP, seconds, ...
    log: logfile.Log = None
    result: tuple = None                    # the last validation's metrics and table

    def batches(self):
        """Yield (step, (images, is_pad, targets)), on the device, from the step after the last."""
        chosen = batches.batches(len(self.train_set), self.cfg.batch, self.cfg.seed,
                                 self.progress["step"], self.cfg.steps, processes.rank(),
                                 processes.world())
        loader = torch.utils.data.DataLoader(
            self.train_set, batch_sampler=chosen, collate_fn=batches.collate,
            pin_memory=self.device.type == "cuda", worker_init_fn=leave_signals_to_the_loop,
            num_workers=min(4, os.cpu_count() // 2) if self.cfg.coco else 0)
        for step, (images, is_pad, targets) in enumerate(loader, start=self.progress["step"] + 1):
            targets = [t._replace(labels=t.labels.to(self.device), boxes=t.boxes.to(self.device))
                       for t in targets]
            yield step, (images.to(self.device), is_pad.to(self.device), targets)

    def is_due(self, step, times):
        """Whether something that happens so many times in a run happens at this step."""
        return step % math.ceil(self.cfg.steps / times) == 0 or step == self.cfg.steps

    @contextlib.contextmanager
    def faults_named(self, step, lr, targets):
        """Add to an error inside: which step and images, and what is saved."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"step {step}, learning rate {lr:.2g}: {error} (images "
                             f"{[t.image_id for t in targets]}); step {self.progress['saved']} is "
                             "the last one saved") from error

    def write_log(self, step, lr):
        """A line of means since the last one, into the log and to the terminal."""
        steps = len(self.log.steps)
        line = self.log.line(step, functools.partial(processes.mean, on=self.device), lr=lr,
                             epoch=step * self.cfg.batch / len(self.train_set))
        self.progress["seconds"] += line["ms"] * steps / 1000
        self.progress["cpu_seconds"] += line["cpu_s"] * steps
        self.log.write(line, logfile.describe(line), visible=processes.rank() == 0)

    def save(self, name):
        """Write a checkpoint; last.pt is what --resume goes on from."""
        self.progress["saved"] = self.progress["step"]
        if processes.rank() == 0:
            checkpoints.save(pathlib.Path(self.cfg.out) / name, self.detector, self.optimizer,
                             self.cfg, self.val_set.categories, self.progress)

    def validate(self):
        """Measure AP on the validation set, log it, and keep the best model as best.pt."""
        self.result = metrics, _ = evaluate.evaluate(
            self.detector, self.val_set, self.cfg.batch, precision=self.cfg.precision)
        if processes.rank() == 0:
            step, scores = self.progress["step"], {
                name: value for name, value in metrics.items() if name.startswith("AP")}
            self.log.write({"step": step, "val": scores},
                           f"step {step} | validation {evaluate.headline(metrics)}")
            if (metrics["AP"] or 0) >= self.progress["best_AP"]:    # None: nothing is to be found
                self.progress["best_AP"] = metrics["AP"] or 0
                self.save("best.pt")
        self.log.restart_clock()

    def finish(self):
        """Write metrics.json, curves.png and predictions.png; print the result."""
        cfg, out, (metrics, table) = self.cfg, pathlib.Path(self.cfg.out), self.result
        processes.say(table)
        train_metrics, _ = evaluate.evaluate(self.detector, self.plain_set, cfg.batch,
                                             precision=cfg.precision)
        if processes.rank() == 0:
            seconds, cpu_seconds = self.progress["seconds"], self.progress["cpu_seconds"]
            numbers = {**metrics, "train_AP": train_metrics["AP"], "seconds": seconds,
                       "cpu_seconds": cpu_seconds, "steps": cfg.steps, "seed": cfg.seed,
                       "images_seen": cfg.steps * cfg.batch,
                       "parameters": sum(p.numel() for p in self.detector.parameters())}
            draw.curves(out / "log.jsonl", out / "curves.png")
            draw.predictions(self.detector, self.val_set, out / "predictions.png", threshold=0.35)
            (out / "metrics.json").write_text(json.dumps(numbers, indent=2))
            processes.say(
                f"{evaluate.headline(train_metrics)} on {len(self.plain_set)} training images as "
                f"they are\n{cfg.steps} steps of {cfg.batch} images in {seconds:.0f} s "
                f"({cpu_seconds:.0f} CPU-seconds); see {out}/predictions.png, curves.png\n"
                f"{evaluate.headline(metrics)}")


def leave_signals_to_the_loop(worker):
    """Ctrl-C reaches the workers that read pictures as well; it is the training loop that stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)           # by which the loader ends its workers


class Interrupt:
    """Ctrl-C or SIGTERM, asked for between steps so that no step is torn; a second one ends all."""

    def __init__(self):
        self.requested = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.request)

    def request(self, number, frame):
        """Called by the signal."""
        if self.requested:
            raise SystemExit("stopped at once")
        self.requested = True


def check_finite(number):
    """Refuse a loss or gradient norm that is not finite, before it spoils the weights.

    Raises:
        ValueError
    """
    if not number.isfinite():
        raise ValueError(NOT_FINITE)


def read_resumed(cfg):
    """Read the checkpoint that --resume goes on from.

    Returns:
        the run's own Config, with this command's --pause and --device; the checkpoint's dict
    """
    folder = pathlib.Path(cfg.resume)
    folder = folder if folder.is_dir() else folder.parent
    content = checkpoints.read(folder)
    step = content["progress"]["step"]
    if 0 < cfg.pause <= step:
        raise ValueError(f"--pause {cfg.pause}: the run is at step {step} already")
    return dataclasses.replace(config.from_dict(content["config"]), out=str(folder),
                               resume=str(folder), pause=cfg.pause, device=cfg.device), content


def start(cfg):
    """Begin a run from its flags, or go on with the one that --resume names. -> Run

    Raises:
        ValueError, OSError: what a person can mend, in a sentence
    """
    progress = {"step": 0, "saved": 0, "seconds": 0.0, "cpu_seconds": 0.0, "best_AP": 0.0}
    device, content = processes.device(cfg.device), None
    if cfg.resume:
        cfg, content = read_resumed(cfg)
        progress = content["progress"]
    elif cfg.coco:
        cfg = dataclasses.replace(cfg, coco=str(pathlib.Path(cfg.coco).absolute()))
    train_set, plain_set = sets.open_train(cfg)
    if content and (content["categories"] != train_set.categories
                    or progress["images"] != len(train_set)):
        raise ValueError(f"{cfg.coco} changed since {cfg.resume} started on it, then of "
                         f"{progress['images']} images and {len(content['categories'])} classes: "
                         f"train anew, with --init_from {cfg.resume}")
    progress["images"] = len(train_set)
    val_set = sets.open_val(cfg, train_set.categories)
    sets.check_queries(train_set, cfg.recipe.num_queries)
    epoch_steps = math.ceil(len(train_set) / cfg.batch)
    recipe = dataclasses.replace(cfg.recipe, num_classes=len(train_set.categories))
    cfg = dataclasses.replace(cfg, out=cfg.resume or str(new_folder(cfg)), recipe=recipe,
                              steps=epoch_steps * cfg.epochs or cfg.steps)
    torch.manual_seed(cfg.seed)
    detector = registry.build(cfg)
    if content:
        detector.load_state_dict(content["model"])
    else:
        first_weights(detector, cfg, train_set.categories)
    optimizer = optim.make_optimizer(detector.to(device), cfg)
    if content:
        optimizer.load_state_dict(content["optimizer"])
    run = Run(cfg, device, detector, optimizer, train_set, plain_set, val_set, progress)
    return open_folder(run)


def first_weights(detector, cfg, categories):
    """Fill a new detector with the weights that --init_from or its backbone start from."""
    if cfg.init_from:
        left = checkpoints.init_from(detector, categories, cfg.init_from)
        processes.say(f"weights from {cfg.init_from}; {len(left)} tensors start at random: "
                      f"{', '.join(left) or '-'}")
    elif cfg.backbone.startswith("resnet50"):
        detector.backbone.load_imagenet()
    elif cfg.backbone == "swin_l":
        processes.say("the Swin starts at random: --init_from takes ImageNet's weights, or a "
                      "detector's")


def open_folder(run):
    """Make the run's folder and config.json, open its log, say what will be done. -> Run"""
    cfg, out = run.cfg, pathlib.Path(run.cfg.out)
    if processes.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(
            {**dataclasses.asdict(cfg), "categories": run.train_set.categories,
             "train_image_ids": run.train_set.image_ids if cfg.coco else "1 and up"}, indent=2))
    processes.say(
        f"{cfg.model} on {cfg.coco or 'synthetic shapes'}: {len(run.train_set)} training and "
        f"{len(run.val_set)} validation images of {cfg.size} to {cfg.recipe.max_size} px, "
        f"{len(run.train_set.categories)} classes; {cfg.steps} steps of {cfg.batch} images, lr "
        f"{cfg.lr:g}, seed {cfg.seed}, {run.device}; run folder {out}")
    path = out / "log.jsonl" if processes.rank() == 0 else pathlib.Path(os.devnull)
    run.log = logfile.Log(path, run.progress["step"])
    return run
