"""Train a detector. `python train.py` alone needs no data: DAC-DETR on synthetic shapes, offline.

    python train.py                                        # DAC-DETR
    python train.py --model deformable                     # the decoder it is compared with
    python train.py --images 8 --steps 300                 # can it learn 8 images by heart?
    python train.py --coco DIR --images 500                # a folder in COCO layout
    python train.py --resume runs/dac_shapes               # go on after Ctrl-C or a crash
    torchrun --nproc_per_node=2 train.py                   # the same run on two processes

A run folder gets config.json, log.jsonl, last.pt, best.pt and, at the end, metrics.json, curves.png
and predictions.png. Exit status: 0 done, 1 failed, 2 flags refused, 130 Ctrl-C.
"""
import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from detr_min import checkpoints, config, criterion, data, denoising, draw, evaluate, optim, runs

NUM_LOGS, NUM_SAVES, NUM_EVALS = 40, 20, 5                  # in a whole run
NOT_FINITE = "the loss or its gradient is not finite: a lower --lr may help"
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's


def say(text):
    """Print, from the first process."""
    if RANK == 0:
        print(text, flush=True)


def pick_device(name):
    """--device as a torch.device; under torchrun on GPUs, this process's own one.

    Raises:
        ValueError: this computer has none
    """
    here = [name for name, place in (("cuda", torch.cuda), ("mps", torch.backends.mps),
                                     ("cpu", torch.cpu)) if place.is_available()]
    if name == "auto":
        name = here[0]
    if name not in here:
        raise ValueError(f"--device {name}: this computer has {', '.join(here)}")
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)
    return torch.device(name)


def agree(device, *numbers):
    """Numbers of this process -> their means over all processes."""
    if WORLD == 1:
        return list(numbers)
    means = torch.tensor(numbers, dtype=torch.float32, device=device)
    dist.all_reduce(means)
    return (means / WORLD).tolist()


def losses_of(runner, batch, cfg, step, num_objects):
    """Forward pass and loss of a batch: criterion's parts, or a ValueError naming its images."""
    device = next(runner.parameters()).device
    images, is_pad = (t.to(device) for t in batch[:2])
    targets = [t._replace(labels=t.labels.to(device), boxes=t.boxes.to(device)) for t in batch[2]]
    class_loss = criterion.CLASS_LOSSES[cfg.loss]
    assign_c = criterion.C_ASSIGNMENTS.get(cfg.model, criterion.paper_assignment)
    noisy = None
    if cfg.recipe.dn_number:
        generator = data.generator(cfg.seed, step, RANK)    # so a resumed run sees the same noise
        noisy = denoising.noisy_copies(targets, cfg.recipe.num_classes, generator,
                                       cfg.recipe.dn_number)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            output = runner(images, is_pad, noisy)
        parts = criterion.detection_loss(output, targets, num_objects, class_loss, assign_c)
        if not criterion.total(parts).isfinite():
            raise ValueError(NOT_FINITE)
    except ValueError as error:
        raise ValueError(f"{error} (images {[t.image_id for t in targets]})") from error
    return parts


def leave_ctrl_c_to_the_main_process(worker):
    """Ctrl-C reaches the workers that read pictures as well; it is the training loop that stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)           # by which the loader ends its workers


def save(name, cfg, detector, optimizer, categories, progress):
    """A checkpoint, from the first process; last.pt is what --resume goes on from."""
    progress["saved"] = progress["step"]
    if RANK == 0:
        path = pathlib.Path(cfg.out) / name
        checkpoints.save(path, detector, optimizer, cfg, categories, progress)


def validate(cfg, detector, optimizer, val_set, progress, log):
    """AP on the validation set, into the log; the best model to best.pt. Returns metrics, table."""
    metrics, table = evaluate.evaluate(detector, val_set, cfg.batch, precision=cfg.precision)
    if RANK == 0:
        scores = {name: value for name, value in metrics.items() if name.startswith("AP")}
        log.write({"step": progress["step"], "val": scores},
                  f"step {progress['step']} | validation {evaluate.headline(metrics)}")
        if (metrics["AP"] or 0) >= progress["best_AP"]:         # None where nothing is to be found
            progress["best_AP"] = metrics["AP"] or 0
            save("best.pt", cfg, detector, optimizer, val_set.categories, progress)
    log.restart_clock()
    return metrics, table


def train(cfg, detector, optimizer, train_set, val_set, progress, log):
    """The training loop, from the step after progress["step"] to the last or to the first Ctrl-C.

    Returns the last validation's (metrics, table); None where it was stopped.
    """
    device = next(detector.parameters()).device
    runner = DistributedDataParallel(detector) if WORLD > 1 else detector
    batches = data.batches(len(train_set), cfg.batch, cfg.seed, progress["step"], cfg.steps,
                           RANK, WORLD)
    loader = torch.utils.data.DataLoader(
        train_set, batch_sampler=batches, collate_fn=data.collate, pin_memory=device.type == "cuda",
        worker_init_fn=leave_ctrl_c_to_the_main_process,
        num_workers=min(4, os.cpu_count() // 2) if cfg.coco else 0)
    every_log, every_save, every_eval = (math.ceil(cfg.steps / n)
                                         for n in (NUM_LOGS, NUM_SAVES, NUM_EVALS))
    stop = []                           # Ctrl-C is looked at between steps, so that no step is torn
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: sys.exit("stopped at once") if stop else stop.append(1))
    result = None
    bar = tqdm(total=cfg.steps, initial=progress["step"], unit="step",
               disable=None if RANK == 0 else True)         # None: only where there is a terminal
    for step, batch in enumerate(loader, start=progress["step"] + 1):
        lr = optim.set_learning_rate(optimizer, step - 1, cfg)
        objects, stopping = agree(device, sum(len(t.labels) for t in batch[2]), len(stop))
        try:
            parts = losses_of(runner, batch, cfg, step, objects)
            optimizer.zero_grad()
            criterion.total(parts).backward()
            norm = torch.nn.utils.clip_grad_norm_(detector.parameters(), cfg.recipe.clip)
            if not norm.isfinite():             # before the weights are spoilt, and saved
                raise ValueError(f"{NOT_FINITE} (images {[t.image_id for t in batch[2]]})")
        except ValueError as error:
            raise ValueError(f"step {step}, learning rate {lr:.2g}: {error}; step "
                             f"{progress['saved']} is the last one saved") from error
        optimizer.step()
        bar.update()
        log.add(parts, objects=objects)
        progress["step"], halt = step, stopping > 0 or step == cfg.pause
        if step % every_log == 0 or step == cfg.steps or halt:
            steps = len(log.steps)
            line = log.line(step, functools.partial(agree, device), lr=lr,
                            epoch=step * cfg.batch / len(train_set))
            progress["seconds"] += line["ms"] * steps / 1000
            progress["cpu_seconds"] += line["cpu_s"] * steps
            log.write(line, runs.describe(line), visible=RANK == 0)
        if step % every_eval == 0 or step == cfg.steps:
            result = validate(cfg, detector, optimizer, val_set, progress, log)
        if step % every_save == 0 or step == cfg.steps or halt:
            save("last.pt", cfg, detector, optimizer, val_set.categories, progress)
        if halt:
            break
    bar.close()
    if progress["step"] < cfg.steps:
        return None
    return result or validate(cfg, detector, optimizer, val_set, progress, log)


def finish(cfg, detector, plain_set, val_set, progress, metrics):
    """metrics.json, curves.png and predictions.png of a run that is through."""
    out = pathlib.Path(cfg.out)
    train_metrics, _ = evaluate.evaluate(detector, plain_set, cfg.batch, precision=cfg.precision)
    if RANK == 0:
        numbers = {**metrics, "train_AP": train_metrics["AP"], "seconds": progress["seconds"],
                   "cpu_seconds": progress["cpu_seconds"], "steps": cfg.steps, "seed": cfg.seed,
                   "images_seen": cfg.steps * cfg.batch,
                   "parameters": sum(p.numel() for p in detector.parameters())}
        draw.curves(out / "log.jsonl", out / "curves.png")
        draw.predictions(detector, val_set, out / "predictions.png", threshold=0.35)
        (out / "metrics.json").write_text(json.dumps(numbers, indent=2))
        say(f"{evaluate.headline(train_metrics)} on {len(plain_set)} training images as they are\n"
            f"{cfg.steps} steps of {cfg.batch} images in {progress['seconds']:.0f} s "
            f"({progress['cpu_seconds']:.0f} CPU-seconds); see {out}/predictions.png, curves.png\n"
            f"{evaluate.headline(metrics)}")


def main():
    """Run the command line."""
    cfg, given = config.parse(__doc__)
    other = given - {"resume", "pause", "device"}
    if "resume" in given and not cfg.resume:
        raise ValueError("--resume is empty: the name of a run folder is missing")
    if cfg.resume and other:
        raise ValueError("--resume goes on with the run's own flags; leave out "
                         f"--{' --'.join(sorted(other))}")
    if WORLD > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    cfg, detector, optimizer, (train_set, plain_set, val_set), progress = runs.start(
        cfg, pick_device(cfg.device), say)
    out = pathlib.Path(cfg.out)
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(
            {**dataclasses.asdict(cfg), "categories": train_set.categories,
             "train_image_ids": train_set.image_ids if cfg.coco else "1 and up"}, indent=2))
    say(f"{cfg.model} on {cfg.coco or 'synthetic shapes'}: {len(train_set)} training and "
        f"{len(val_set)} validation images, {len(train_set.categories)} classes; {cfg.steps} "
        f"steps of {cfg.batch} images, lr {cfg.lr:g}, seed {cfg.seed}, "
        f"{next(detector.parameters()).device}; run folder {out}")
    log = runs.Log(out / "log.jsonl" if RANK == 0 else pathlib.Path(os.devnull), progress["step"])
    result = train(cfg, detector, optimizer, train_set, val_set, progress, log)
    if not result:
        say(f"stopped after step {progress['step']} of {cfg.steps}; nothing is lost, go on with\n"
            f"    python train.py --resume {out}")
        sys.exit(0 if progress["step"] == cfg.pause else 130)
    say(result[1])
    finish(cfg, detector, plain_set, val_set, progress, result[0])
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:        # what a person can mend: a sentence, no traceback
        said = str(error).strip().splitlines()[-1]          # a worker's error ends in the sentence
        sys.exit(f"train.py: {said.removeprefix('detr_min.coco_folder.DataError: ')}")
