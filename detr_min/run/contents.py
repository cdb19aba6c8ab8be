"""What a checkpoint must hold before any of it is used: files break, and anyone can edit one.

Each check of a part returns the first fault it finds, in words, or None. Read after `config.py`.
"""
import argparse
import pathlib
import re
import zipfile

import torch

from . import config

FORMAT = "detr_min 1"
PARTS = {"config": dict, "categories": list, "model": dict, "optimizer": dict, "progress": dict}


def find(path):
    """Which file is meant by a path: that of a .pt file, or of a run folder, for its last.pt.

    Raises:
        FileNotFoundError: nothing there
        ValueError: a pipe or a device
    """
    path = pathlib.Path(path)
    if path.is_dir():
        if not (path / "last.pt").exists():
            raise FileNotFoundError(f"{path} holds no last.pt: not a run folder, or one that was "
                                    "stopped before its first save")
        path = path / "last.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: a run folder or a .pt file is expected")
    if not path.is_file():
        raise ValueError(f"{path} is not a file but a folder, a pipe or a device")
    return path


def open_file(path):
    """What a file of torch.save holds, all tensors on the CPU. No code in it is executed.

    Published checkpoints hold their command line, an argparse.Namespace: it alone is let through.

    Args:
        path  as `find`
    Raises:
        FileNotFoundError, ValueError: as `find`
        ValueError: it cannot be read, or a byte of it changed since it was written
    """
    path = find(path)
    try:
        if zipfile.is_zipfile(path):                    # torch.load itself ignores the checksums
            with zipfile.ZipFile(path) as parts:
                inside = sum(part.file_size for part in parts.infolist())
                if inside > path.stat().st_size or parts.testzip():
                    raise zipfile.BadZipFile("a checksum, or more inside than the file is long")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                          # torch raises many kinds on strange bytes
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{path} cannot be read without running code: it holds {found[1]}. "
                             "Save the model's state_dict() alone") from None
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): a "
                         "broken or half-copied file, or one not made by torch.save") from error


def check_ours(content, path):
    """The content of a file, or a ValueError where `checkpoints.save` did not make it."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        keys = [*map(str, content)][:4] if isinstance(content, dict) else [type(content).__name__]
        raise ValueError(f"{path} is not a checkpoint of this package; it holds "
                         f"{', '.join(keys) or 'nothing'}")
    missing = {key for key, kind in PARTS.items() if not isinstance(content.get(key), kind)}
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: an incomplete checkpoint")
    return content


def refuse(path, fault):
    """Raise a ValueError that names the file, if there is a fault."""
    if fault:
        raise ValueError(f"{path} is damaged, was edited, or is of another version of this "
                         f"package: {fault}")


def categories_fault(categories, num_classes):
    """They are [{"id", "name"}], one per class, of different names."""
    if not all(isinstance(c, dict) and type(c.get("name")) is str
               and type(c.get("id", "")) in (int, type(None)) for c in categories):
        return "a category is no id and name"
    if not num_classes == len(categories) == len({c["name"] for c in categories}):
        return f"its {num_classes} classes do not have {num_classes} categories of different names"


def tensor_fault(tensor, like):
    """It is a tensor of finite numbers, of the same shape and type as another."""
    if type(tensor) is not torch.Tensor:
        return f"is not a tensor but {type(tensor).__name__}"
    if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
        return f"is {[*tensor.shape]} of {tensor.dtype}, not {[*like.shape]} of {like.dtype}"
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_contiguous():
        return "is not stored number by number"
    if not tensor.isfinite().all():
        return "is not finite"


def state_fault(state, own):
    """Tensor by tensor, it is {name: tensor} of the same names, shapes and types as another."""
    for problem, names in (("lacks", own.keys() - state.keys()),
                           ("has tensors of another network,", state.keys() - own.keys())):
        if names:
            return f"it {problem} {', '.join(sorted(map(str, names))[:4])}" + (
                f" and {len(names) - 4} more" if len(names) > 4 else "")
    faults = ((name, tensor_fault(tensor, own[name])) for name, tensor in state.items())
    return next((f"{name} {fault}" for name, fault in faults if fault), None)


def optimizer_fault(saved, optimizer, step):
    """It is the state of this AdamW after so many steps; its rates are not looked at, nor used."""
    own, state = optimizer.state_dict()["param_groups"], saved.get("state")
    try:
        same = [group["params"] for group in saved["param_groups"]] == [g["params"] for g in own]
    except (TypeError, KeyError):
        same = False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = range(len(parameters))
    if not (same and isinstance(state, dict)
            and all(type(i) is int and i in indices for i in state)):
        return "its optimizer is another one"
    for i, moments in state.items():
        like = {"step": torch.zeros(()), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]}
        fault = (state_fault(moments, like) if isinstance(moments, dict) else "is no moments")
        if not fault and (moments["exp_avg_sq"] < 0).any():
            fault = "exp_avg_sq is negative"
        if fault:
            return f"of the optimizer's state of parameter {i}, {fault}"
    steps = max((float(moments["step"]) for moments in state.values()), default=0)
    if steps != step:
        return f"its optimizer went {steps:g} steps and its weights {step}"


def progress_fault(progress, cfg):
    """It says how far the run came, in numbers that can be."""
    step, time = config.Between(0, cfg.steps), config.Between(0.0, 1e12)
    accepted = {"step": (int, step), "saved": (int, step), "images": (int, config.IMAGES),
                "seconds": (float, time), "cpu_seconds": (float, time),
                "best_AP": (float, config.SHARE)}
    for name, (kind, between) in accepted.items():
        value = progress.get(name)
        if not config.fits(value, kind, between):
            return f"progress {name} {value!r:.40}: it must be {between}"
    if not cfg.coco and not progress["images"] == cfg.images <= config.MOST_SHAPES:
        return f"it saw {progress['images']} images of shapes, its config has {cfg.images}"
