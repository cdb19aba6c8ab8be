"""Begin a run in a folder of its own, or go on with one where it stopped.

Read after `loop.py`; train.py uses it.
"""
import collections
import dataclasses
import json
import math
import os
import pathlib

import torch

from . import checkpoints, contents, logfile, loop, optim, processes, registry, sets

try:
    import fcntl
except ImportError:                     # Windows: two runs in one folder are not noticed
    fcntl = None

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
        if held and held != ["config.json", "log.jsonl"]:       # these two: it never saved anything
            how = f"go on with --resume {out}"
            how = how if "last.pt" in held else "delete it, for no run goes on without last.pt"
            raise FileExistsError(f"--out {out} holds a run already ({', '.join(held)}): {how}, or "
                                  "take another name")
        return out
    model = [cfg.model] + ["conditional"] * (cfg.recipe.base == "conditional" != cfg.model)
    words = ["_".join(model), pathlib.Path(cfg.coco).resolve().name if cfg.coco else "shapes"]
    words += [cfg.loss] * (cfg.loss != "focal") + [cfg.queries] * (cfg.queries != "two_stage")
    name = "_".join(words) + (f"_seed{cfg.seed}" if cfg.seed else "")
    names = [name] + [f"{name}-{i}" for i in range(2, 1000)]
    return next(p for p in (pathlib.Path("runs") / n for n in names) if not p.exists())


def read_resumed(cfg):
    """Read the checkpoint that --resume goes on from.

    Returns:
        the run's own Config, with this command's --pause and --device; the checkpoint's dict
    """
    folder = pathlib.Path(cfg.resume)
    if folder.name == "last.pt":
        folder = folder.parent
    elif folder.is_file():
        raise ValueError(f"--resume {folder}: a run goes on from its last.pt, so name its folder; "
                         f"to start a new run from this file's weights, use --init_from {folder}")
    elif not folder.exists():
        raise FileNotFoundError(f"--resume {folder} does not exist: the folder of a run is expected"
                                ", as train.py names it when it starts and stops")
    content = checkpoints.read(folder)
    own, _, content["model"] = checkpoints.weights_of(content, folder / "last.pt")
    contents.refuse(folder / "last.pt", contents.progress_fault(content["progress"], own))
    step = content["progress"]["step"]
    if 0 < cfg.pause <= step:
        raise ValueError(f"--pause {cfg.pause}: the run is at step {step} already")
    return dataclasses.replace(own, out=str(folder), resume=str(folder), pause=cfg.pause,
                               device=cfg.device), content


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
        sets.check_moved(cfg, cfg.resume, "put it back, or link to it")
    else:               # what can be refused at once, before the json of many images is read
        cfg = dataclasses.replace(cfg, coco=cfg.coco and str(pathlib.Path(cfg.coco).absolute()))
        if cfg.out:
            new_folder(cfg)
        if cfg.init_from:
            contents.find(cfg.init_from)
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
        contents.refuse(f"{cfg.resume}/last.pt", contents.optimizer_fault(
            content["optimizer"], optimizer, progress["step"]))
        optimizer.load_state_dict({**optimizer.state_dict(),        # rates follow from the config
                                   "state": content["optimizer"]["state"]})
    run = loop.Run(cfg, device, detector, optimizer, train_set, plain_set, val_set, progress)
    return open_folder(run)


def first_weights(detector, cfg, categories):
    """Fill a new detector with the weights that --init_from or its backbone start from."""
    if cfg.init_from:
        left = checkpoints.init_from(detector, categories, cfg.init_from)
        parts = collections.Counter(name.split(".")[0] for name in left)
        shown = left if len(left) < 10 else [f"{n} of {part}" for part, n in parts.items()]
        processes.say(f"weights from {cfg.init_from}; {len(left)} of "
                      f"{len(detector.state_dict())} tensors start at random: "
                      f"{', '.join(shown) or '-'}")
    elif cfg.backbone.startswith("resnet50"):
        detector.backbone.load_imagenet()
    elif cfg.backbone == "swin_l":
        processes.say("the Swin starts at random: --init_from takes ImageNet's weights, or a "
                      "detector's")


def claim(path, text):
    """Write config.json and keep it locked until this process ends, however it ends. -> open file

    Raises:
        ValueError: another process trains in this folder
    """
    file = open(path, "a+")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(f"another process trains in {path.parent}: take another --out") from None
    except OSError:
        pass                            # a file system without locks: as on Windows
    file.truncate(0)
    file.write(text)
    file.flush()
    return file


def open_folder(run):
    """Make the run's folder and config.json, open its log, say what will be done. -> Run"""
    cfg, out = run.cfg, pathlib.Path(run.cfg.out)
    if processes.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        run.config_file = claim(out / "config.json", json.dumps(
            {**dataclasses.asdict(cfg), "categories": run.train_set.categories,
             "train_image_ids": run.train_set.image_ids if cfg.coco else "1 and up",
             "held_out_image_ids": run.val_set.image_ids if run.val_set.is_held_out else []},
            indent=2))
        for name in ("last", "best", "log"):                        # of a process that was killed
            (out / f"{name}.unfinished").unlink(missing_ok=True)
    path = out / "log.jsonl" if processes.rank() == 0 else pathlib.Path(os.devnull)
    run.log = logfile.Log(path, run.progress["step"])
    processes.say(
        f"{cfg.model} on {cfg.coco or 'synthetic shapes'}: {len(run.train_set)} training and "
        f"{len(run.val_set)} validation images of {cfg.size} to {cfg.recipe.max_size} px"
        f"{sets.said_of_val(cfg, run.val_set)}, {len(run.train_set.categories)} classes; "
        f"{cfg.steps} steps of {cfg.batch} images, lr {cfg.lr:g}, seed {cfg.seed}, {run.device}; "
        f"run folder {out}{sets.said_of_objects(run.train_set)}")
    return run
