"""Save a run so that a crash never breaks it, load it again, and take weights from elsewhere.

A checkpoint is one dict of tensors, numbers and strings, so it loads with `weights_only=True`: no
pickle is executed. Read after `contents.py` and `published.py`; used by train.py and eval.py.
"""
import dataclasses
import functools
import os
import pathlib
import re

import torch

from .. import backbone
from ..release import published, published_conditional, swin
from . import config, contents, registry


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
    content = {"format": contents.FORMAT, "config": dataclasses.asdict(run_config),
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
    """The dict in a checkpoint of ours; path and errors as `open_file` and `check_ours`."""
    return contents.check_ours(contents.open_file(path), path)


def weights_of(content, path, dc5=False, partly=False):
    """Find config, categories and state dict in the content of a file, ours or published.

    Args:
        content  what the file holds
        path     of the file, for what is said of it
        dc5      as `convert`
        partly   True: tensors may be missing
    Raises:
        ValueError: as `check_ours` and `convert`; or they do not fit one another
    """
    is_published = published.recognises(content)
    if not is_published:
        contents.check_ours(content, path)
    try:
        if is_published:
            cfg, categories, state = convert(content, dc5)
        else:
            cfg, categories = config.from_dict(content["config"]), content["categories"]
            state = dict(content["model"])          # without what else a state dict may carry
        own = layout(cfg)
    except ValueError as error:
        raise ValueError(f"{path} {'is' if is_published else 'holds'} {error}") from error
    own = {name: tensor for name, tensor in own.items() if name in state or not partly}
    contents.refuse(path, contents.categories_fault(categories, cfg.recipe.num_classes)
                    or contents.state_fault(state, own))
    return cfg, categories, state


@functools.lru_cache(maxsize=8)      # a published file is asked about twice
def layout(cfg):
    """The names and shapes of a Config's tensors, {name: tensor without numbers}.

    Raises:
        ValueError: sizes that no network has
    """
    try:
        with torch.device("meta"):                      # no memory, no numbers
            return registry.build(cfg).state_dict()
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError
            ) as error:
        raise ValueError(f"no network has such sizes ({error})") from error


def convert(content, dc5=False):
    """Turn a published file's content into Config, categories and state dict under our names.

    Args:
        content  what the file holds
        dc5      True: it is a Conditional DETR with dilated C5, where its args do not say so
    Raises:
        ValueError: as published.tensors_of and published.renamed; or sizes that no network has
    """
    theirs, args = published.tensors_of(content), published.args_of(content)
    is_conditional = published_conditional.recognises(content)
    try:
        settings = (published_conditional.settings_of(theirs, args, dc5) if is_conditional
                    else published.settings_of(theirs, args))
        cfg = config.preset(**settings)
        own = layout(cfg)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError
            ) as error:                                 # of a network that cannot be
        raise ValueError(f"{published.INCOMPLETE}: the model's sizes are read off {error}, which "
                         "is missing or has other dimensions") from error
    table = published_conditional.NAMES if is_conditional else published.NAMES
    state = published.renamed(theirs, own, cfg.recipe.decoder_layers, table)
    return cfg, published.categories(cfg.recipe.num_classes), state


def load_model(path, dc5=False):
    """Load a trained detector, in eval mode on the CPU, with its `.config` and `.categories`.

    Args:
        path  a run folder or a .pt or .pth file, ours or published
        dc5   as `convert`
    Raises:
        FileNotFoundError, ValueError: as `contents.open_file` and `weights_of`
    """
    run_config, categories, state = weights_of(contents.open_file(path), path, dc5)
    detector = registry.build(run_config)
    detector.load_state_dict(state)
    detector.config, detector.categories = run_config, categories
    return detector.eval()


def objectness(state, own):
    """The encoder's class head with another's row 0, "an object is here", whatever its classes are.

    Args:
        state, own  {name: tensor} of the other detector and of ours
    Returns:
        {name: tensor}, weight and bias, the other rows ours; {} if one has none, or another width
    """
    names = [f"queries.mini_detector.class_head.{kind}" for kind in ("weight", "bias")]
    if any(name not in own or name not in state or state[name].shape[1:] != own[name].shape[1:]
           for name in names):
        return {}
    return {name: torch.cat([state[name][:1].to(own[name]), own[name][1:]]) for name in names}


def init_from(detector, categories, path):
    """Copy the tensors of a checkpoint that fit another detector.

    Class heads and label embeddings are for the same classes only. But row 0 of the encoder's class
    head says where any object is, and picks the queries: it is taken whatever the classes are.
    A classifier of the Swin repository, trained on ImageNet, fills in a Swin backbone.

    Args:
        detector    model.Detector to fill in
        categories  [{"id", "name"}] it is to learn
        path        a run folder or a .pt or .pth file, ours or published
    Returns:
        names of the tensors of `detector` that stay random, sorted; a head of which row 0 was taken
        is among them, as "NAME but for row 0"
    Raises:
        FileNotFoundError, ValueError: as `load_model`; or nothing fits at all
    """
    own, content = detector.state_dict(), contents.open_file(path)
    state, theirs = swin.pretrained(published.state_of(content), own), ()
    if not state:
        cfg, theirs, state = weights_of(content, path, partly=True)
        is_dc5 = isinstance(detector.backbone, backbone.ResNet50DC5)
        if cfg.backbone == "resnet50_dc5" and not is_dc5:
            raise ValueError(f"{path} is of a DC5 model, whose last stage is dilated: the same "
                             "weights without dilation see another scale. Take a preset of dc5")
    same_classes = [c["name"] for c in theirs] == [c["name"] for c in categories]
    taken = {name: tensor for name, tensor in state.items()
             if name in own and own[name].shape == tensor.shape
             and (same_classes or not re.search("class_head|label_embed", name))}
    if not taken:
        raise ValueError(f"{path}: no tensor fits this model; was it made with another preset?")
    contents.refuse(path, contents.state_fault(taken, {name: own[name] for name in taken}))
    in_part = {} if same_classes else objectness(state, own)
    detector.load_state_dict({**taken, **in_part}, strict=False)
    whole = {name for name, tensor in in_part.items() if len(tensor) == 1}      # the only row
    return sorted(f"{name} but for row 0" if name in in_part else name
                  for name in own.keys() - taken.keys() - whole)
