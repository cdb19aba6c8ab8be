"""What the training loop works on: a run with its batches, its log, its checkpoints, its result.

The loop itself is in train.py. Read after `checkpoints.py` and `logfile.py`.
"""
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import sys

import torch
from torch import multiprocessing, nn

from ..data import batches, coco_json, dataset
from . import checkpoints, config, draw, ending, evaluate, logfile, processes

NUM_LOGS, NUM_SAVES, NUM_EVALS = 40, 20, 5                  # in a whole run
NOT_FINITE = "the loss or its gradient is not finite: a lower --lr may help"


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
    config_file: object = None              # open, locked for this process
    result: tuple = None                    # the last validation's metrics and table

    def batches(self):
        """Yield (step, (images, is_pad, targets)), on the device, from the step after the last.

        What a step leaves to chance, such as dropout, follows from the seed and the step.
        """
        chosen = batches.batches(len(self.train_set), self.cfg.batch, self.cfg.seed,
                                 self.progress["step"], self.cfg.steps, processes.rank(),
                                 processes.world())
        ended = multiprocessing.Event()
        loader = torch.utils.data.DataLoader(
            self.train_set, batch_sampler=chosen, collate_fn=batches.collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=functools.partial(leave_signals_to_the_loop, ended),
            num_workers=min(4, os.cpu_count() // 2) if self.cfg.coco else 0)
        try:
            for step, (images, is_pad, targets) in enumerate(loader, self.progress["step"] + 1):
                torch.manual_seed(batches.mixed_seed(self.cfg.seed, step, processes.rank(), 1))
                targets = [t._replace(labels=t.labels.to(self.device),
                                      boxes=t.boxes.to(self.device)) for t in targets]
                yield step, (images.to(self.device), is_pad.to(self.device), targets)
        finally:
            ended.set()

    def is_due(self, step, times):
        """Whether something that happens so many times in a run happens at this step."""
        return step % math.ceil(self.cfg.steps / times) == 0 or step == self.cfg.steps

    @contextlib.contextmanager
    def faults_named(self, step, lr, targets):
        """Add to an error inside: which step and images, and what is saved."""
        try:
            yield
        except ValueError as error:
            if not ending.is_said(error):
                raise
            raise ValueError(f"step {step}, learning rate {lr:.2g}: {error} (images "
                             f"{[t.image_id for t in targets]}); step {self.progress['saved']} is "
                             "the last one saved") from error

    @contextlib.contextmanager
    def saved_named(self):
        """Say of a full disk or memory, a broken picture or a process that is gone, what is saved.

        At the end the folder is free for another process.
        """
        try:
            yield
        except (OSError, RuntimeError, EOFError, MemoryError, coco_json.DataError) as error:
            cause = ending.cause(error)
            if isinstance(error, RuntimeError) and not cause:
                raise
            step, out = self.progress["saved"], self.cfg.out
            saved = (f"step {step} is the last one saved in {out}: go on with --resume {out}"
                     if step else f"nothing is saved yet in {out}: begin anew")
            raise OSError(f"{cause or ending.what_is_said(error)}; {saved}") from error
        finally:
            if self.config_file:
                self.config_file.close()

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
        step = {"saved": self.progress["step"]} if name == "last.pt" else {}
        if processes.rank() == 0:
            checkpoints.save(pathlib.Path(self.cfg.out) / name, self.detector, self.optimizer,
                             self.cfg, self.train_set.categories, {**self.progress, **step})
        self.progress.update(step)                          # only once it is written

    def validate(self):
        """Measure AP on the validation set, log and draw it, keep the best model as best.pt."""
        find = functools.partial(evaluate.detect, top_k=self.cfg.recipe.detections)
        self.result = metrics, _ = evaluate.evaluate(
            self.detector, self.val_set, self.cfg.batch // processes.world(), find,
            self.cfg.precision)
        if processes.rank() == 0:
            step, scores = self.progress["step"], {
                name: value for name, value in metrics.items() if name.startswith("AP")}
            self.log.write({"step": step, "val": scores},
                           f"step {step} | validation {evaluate.headline(metrics)}")
            if (metrics["AP"] or 0) >= self.progress["best_AP"]:    # None: nothing is to be found
                self.progress["best_AP"] = metrics["AP"] or 0
                self.save("best.pt")
            out = pathlib.Path(self.cfg.out)
            draw.curves(out / "log.jsonl", out / "curves.png")
            draw.predictions(self.detector, self.val_set, out / "predictions.png")
        self.log.restart_clock()

    def finish(self):
        """Write metrics.json; print the result, and whether AP was still rising."""
        cfg, out, (metrics, table) = self.cfg, pathlib.Path(self.cfg.out), self.result
        processes.say(table)
        train_metrics, _ = evaluate.evaluate(
            self.detector, self.plain_set, cfg.batch // processes.world(), precision=cfg.precision)
        if processes.rank() == 0:
            seconds, cpu_seconds = self.progress["seconds"], self.progress["cpu_seconds"]
            before = logfile.best_before(out / "log.jsonl")
            numbers = {**metrics, "best_before": before, "train_AP": train_metrics["AP"],
                       "seconds": seconds, "cpu_seconds": cpu_seconds, "steps": cfg.steps,
                       "seed": cfg.seed, "images_seen": cfg.steps * cfg.batch,
                       "parameters": sum(p.numel() for p in self.detector.parameters())}
            (out / "metrics.json").write_text(json.dumps(numbers, indent=2))
            processes.say(
                f"{evaluate.headline(train_metrics)} on {len(self.plain_set)} training images as "
                f"they are\n{cfg.steps} steps of {cfg.batch} images in {seconds:.0f} s "
                f"({cpu_seconds:.0f} CPU-seconds), validation not counted; see "
                f"{out}/predictions.png, curves.png\n"
                f"{evaluate.headline(metrics)}  {logfile.trend(metrics['AP'], before)}")


def leave_signals_to_the_loop(ended, worker):
    """Keep a worker that reads pictures alive until the loop has ended, which alone decides when.

    Ctrl-C and SIGTERM may reach all processes. With SIGTERM the loader also ends its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: ended.is_set() and os._exit(0))


class Interrupt:
    """Ctrl-C or SIGTERM, asked for between steps so that no step is torn; a second one ends all."""

    def __init__(self):
        self.requested = False
        self.before = {name: signal.signal(name, self.request)
                       for name in (signal.SIGINT, signal.SIGTERM)}

    def release(self):
        """Give the signals back to what they did before."""
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def request(self, number, frame):
        """Called by the signal."""
        if self.requested:
            sys.exit(130)
        self.requested = True
        os.write(2, b"\nstopping once this step is saved; a second signal stops at once, and loses"
                    b" the steps since the last save\n")       # print could be interrupted itself


def check_finite(number):
    """Refuse a loss or gradient norm that is not finite, before it spoils the weights.

    Raises:
        ValueError
    """
    if not number.isfinite():
        raise ValueError(NOT_FINITE)
