"""Save a run so that a crash never breaks it, load it again, and take weights from elsewhere.

A checkpoint is one dict of tensors, numbers and strings, so it loads with `weights_only=True`: no
pickle is executed. Read after `config.py`; used by train.py and eval.py.
"""
import dataclasses
import os
import pathlib
import pickle

import torch

from . import config, model

FORMAT = "detr_min 1"


def save(path, detector, optimizer, run_config, categories, progress):
    """Write a checkpoint beside `path`, then move it there: a reader sees the old one or the new.

    Args:
        path        of the .pt file
        detector    the model, not wrapped in DistributedDataParallel
        optimizer   of the same parameters
        run_config  config.Config
        categories  [{"id", "name"}], position = label
        progress    a dict of numbers: step, best_AP, seconds, ...
    Raises:
        OSError: it could not be written, as when the disk is full; the old file is untouched.
    """
    path = pathlib.Path(path)
    unfinished = path.with_suffix(".unfinished")
    content = {"format": FORMAT, "config": dataclasses.asdict(run_config),
               "categories": [{"id": c["id"], "name": c["name"]} for c in categories],
               "model": detector.state_dict(), "optimizer": optimizer.state_dict(),
               "progress": progress}
    try:
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())         # on the disk before the name points at it
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        kept = f"; {path} still holds the state saved before" if path.exists() else ""
        raise OSError(f"{path} could not be written ({error}): is the disk full?{kept}") from error


def read(path):
    """The dict in a checkpoint file of ours, all tensors on the CPU.

    Args:
        path  a .pt file, or a run folder, whose last.pt is meant
    Raises:
        FileNotFoundError: nothing there
        ValueError: not a checkpoint, or not one of ours
    """
    path = pathlib.Path(path)
    if path.is_dir():
        if not (path / "last.pt").exists():
            raise FileNotFoundError(f"{path} holds no last.pt: not a run folder, or one that was "
                                    "stopped before its first save")
        path = path / "last.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: a run folder or a .pt file is expected")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]}): a "
                         "broken or half-copied file, or not a file of torch.save") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        keys = [*map(str, content)][:4] if isinstance(content, dict) else [type(content).__name__]
        raise ValueError(f"{path} is not a checkpoint of this package; it holds {', '.join(keys)}")
    return content


def load_model(path):
    """A trained detector, in eval mode on the CPU, with its `.config` and `.categories`.

    Args:
        path  a run folder or a .pt file
    Raises:
        FileNotFoundError, ValueError: as `read`
    """
    content = read(path)
    run_config = config.from_dict(content["config"])
    detector = model.build(run_config)
    detector.load_state_dict(content["model"])
    detector.config, detector.categories = run_config, content["categories"]
    return detector.eval()


def init_from(detector, categories, path):
    """Fill in what of a checkpoint fits another detector; class heads only for the same classes.

    Args:
        detector    model.Detector to fill in
        categories  [{"id", "name"}] it is to learn
        path        a run folder or a .pt file
    Returns:
        names of the tensors of `detector` that were not taken and stay random, sorted
    Raises:
        FileNotFoundError, ValueError: as `read`; or nothing fits at all
    """
    content = read(path)
    same_classes = [c["name"] for c in content["categories"]] == [c["name"] for c in categories]
    own = detector.state_dict()
    taken = {name: tensor for name, tensor in content["model"].items()
             if name in own and own[name].shape == tensor.shape
             and (same_classes or "class_head" not in name)}
    if not taken:
        raise ValueError(f"{path}: no tensor fits this model; was it made with another preset?")
    detector.load_state_dict(taken, strict=False)
    return sorted(own.keys() - taken.keys())
