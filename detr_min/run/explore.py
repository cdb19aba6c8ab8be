"""A page that shows what the queries do on one picture, layer by layer, in both decoders.

[DAC Eq. 4] and [SD Eq. 6-7] can be played with on it, where the objects are known. The page is
`explorer.html`; this file fills in, as json, what the model computed. Read after `looks.py`.
"""
import base64
import inspect
import io
import json
import pathlib

import torch
from torchvision.transforms.v2 import functional

from .. import attention, boxes, matcher, tal_loss
from ..data import transforms
from . import evaluate, looks

TEMPLATE = pathlib.Path(__file__).with_name("explorer.html")
LONGEST = 1000          # pixels of the picture's long side, at most
TOP = 3                 # best classes that are kept of each query in each layer
LOOKS = 600_000         # characters for sampling points or maps; with them most queries go without
PARTS = 1000, 10_000    # positions are stored in 1/1000 of the image, weights in 1/10000


def answers(model, image):
    """Run all decoders of a model on one image.

    Returns:
        references (N, 2|4), where the queries start;
        {"o" and perhaps "c": (logits and boxes of each layer, {branch: calls of each layer})}
    Raises:
        ValueError: an answer is not finite
    """
    image, seen = image[None].to(next(model.parameters()).device), []
    is_pad = torch.zeros_like(image[:, 0], dtype=torch.bool)
    hook = model.queries.register_forward_hook(lambda _, args, queries: seen.extend(
        [queries, *args]))
    try:
        with evaluate.answering(model), looks.noted(model.decoder) as calls:
            found = {"o": (model(image, is_pad).o_decoder, calls)}
    finally:
        hook.remove()
    queries, memory = seen
    if hasattr(model.decoder, "c_decoder"):
        with evaluate.answering(model), looks.noted(model.decoder) as calls:
            found["c"] = model.decoder.c_decoder(queries, memory), calls
    found = {name: ([[t[0].float().cpu() for t in layer] for layer in layers], calls)
             for name, (layers, calls) in found.items()}
    if not all(t.isfinite().all() for layers, _ in found.values() for layer in layers
               for t in layer):
        raise ValueError("the model's answers are not finite: did a learning rate too high spoil "
                         "its weights?")
    references = queries.ref_boxes if hasattr(queries, "ref_boxes") else queries.ref_points
    return references[0].float().cpu(), found


def rounded(tensor, digits):
    """A tensor as nested lists, with so many digits after the point."""
    return (tensor.double() * 10 ** digits).round().div(10 ** digits).tolist()


def look(call, chosen):
    """Where one branch of one layer looks, for some of the queries.

    Returns:
        {"points": [[[x, y, weight], ...]]} in PARTS, the heaviest first; a place may lie outside
        the image; or {"cells": [[...]], in percent of the largest; "largest": [weight of it];
        "grid": [h, w]}
    """
    module, (*of_queries, memory) = call
    args = *(t[:, chosen] for t in of_queries), memory      # here no query depends on another
    if isinstance(module, attention.DeformableAttention):
        _, points, weights = looks.sampling_points(module, *args)
        order = weights.argsort(dim=1, descending=True)
        numbers = torch.cat([points * PARTS[0], weights[..., None] * PARTS[1]], dim=-1)
        return {"points": numbers.round().long().take_along_dim(order[..., None], 1).tolist()}
    cells = looks.attention_map(module, *args)                                      # (n, h, w)
    largest = cells.flatten(1).amax(1)
    percent = (100 * cells / largest[:, None, None]).round().long()
    return {"cells": percent.flatten(1).tolist(), "largest": rounded(largest, 5),
            "grid": list(cells.shape[1:])}


def near(pred_boxes, target, scores=None):
    """Count the queries that overlap an object, IoU >= .5, and those of them that are sure of it.

    Args:
        pred_boxes (N, 4); scores (N, M) for the objects' classes, sure from .3 on, or None
    Returns:
        [sure, near], means of the objects, or [near] without scores; [] without objects
    """
    if not len(target.labels):
        return []
    is_near = boxes.iou(pred_boxes, target.boxes) >= 0.5
    counts = [is_near] if scores is None else [is_near & (scores >= 0.3), is_near]
    return [found.sum(0).double().mean().item() for found in counts]


def predictions(logits, pred_boxes, labels, target=None):
    """What one layer answers, and which queries are matched one-to-one. -> dict for json

    Args:
        logits (N, C); pred_boxes (N, 4); labels, of which all logits are kept; a dataset.Target
    """
    best, label = logits.topk(min(TOP, logits.shape[1]), dim=1)                     # (N, TOP)
    layer = {"boxes": rounded(pred_boxes, 5), "logits": rounded(logits[:, labels], 4),
             "best": [[*zip(*row)] for row in zip(label.tolist(), rounded(best, 4))],
             "pairs": [], "near": [], "looks": {}}
    if target:
        cost = matcher.match_cost(logits, pred_boxes, target.labels, target.boxes)
        layer["pairs"] = torch.stack(matcher.one_to_one(cost), dim=1).tolist()
        layer["near"] = near(pred_boxes, target, logits[:, target.labels].sigmoid())
    return layer


def as_png_or_jpeg(image):
    """A normalised image as a data URI: a small one without loss, a photograph as a JPEG."""
    picture = functional.to_pil_image(transforms.denormalise(image))
    picture.thumbnail((LONGEST, LONGEST))
    kind, file = "PNG" if max(picture.size) <= 256 else "JPEG", io.BytesIO()
    picture.save(file, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def defaults():
    """Collect the constants of [DAC Eq. 4] and [SD Eq. 6-7] from the code. -> {name: number}"""
    return {name: parameter.default
            for function in (matcher.match_quality, matcher.one_to_many, tal_loss.aligned_target,
                             tal_loss.tal_loss)
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.default is not parameter.empty}


def numbers(model, image, target=None):
    """Collect everything that the page shows of a model on one image. -> dict for json

    All queries keep their boxes and scores. If a page would become too large, only some keep their
    looks: those that are matched in the last layer, then those of highest score.

    Args:
        model   a trained Detector
        image   (3, h, w)  normalised as ImageNet's
        target  a dataset.Target, or None where the objects are not known
    """
    references, decoders = answers(model, image)
    labels = sorted(set(target.labels.tolist())) if target else []
    found = {"before": rounded(references, 5), "object_labels": labels, "objects": None,
             "near": []}
    if target:
        found["objects"] = [{"label": label, "box": box} for label, box in
                            zip(target.labels.tolist(), rounded(target.boxes, 5))]
        found["near"] = near(references, target) if references.shape[1] == 4 else []
    for name, (layers, _) in decoders.items():
        found[name] = [predictions(*layer, labels, target) for layer in layers]
    score = torch.stack([layers[-1][0].amax(1) for layers, _ in decoders.values()]).amax(0)
    found["order"] = score.argsort(descending=True, stable=True).tolist()           # best first
    first = [query for query, _ in found["o"][-1]["pairs"]] + found["order"]
    calls = [(layer, branch, call) for name, (_, branches) in decoders.items()
             for branch in branches for layer, call in zip(found[name], branches[branch])]
    size = sum(len(json.dumps(look(call, first[:1]))) for _, _, call in calls)      # of one query
    found["kept"] = list(dict.fromkeys(first))[:max(LOOKS // size, 1)]
    for layer, branch, call in calls:
        layer["looks"][branch] = look(call, found["kept"])
    return found


def write(model, image, name, out_html, target=None):
    """Write the page of one image: one file, which needs nothing else.

    Args:
        model   a trained Detector, of checkpoints.load_model
        image   (3, h, w)  normalised as ImageNet's
        name    of the picture, as people know it
        target  a dataset.Target, or None
    """
    cfg, (h, w) = model.config, image.shape[-2:]
    data = {"name": name, "model": cfg.model, "base": cfg.recipe.base, "loss": cfg.loss,
            "classes": [category["name"] for category in model.categories], "parts": PARTS,
            "picture": {"w": w, "h": h, "src": as_png_or_jpeg(image)}, "defaults": defaults(),
            **numbers(model, image, target)}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace('"DATA"', text)
    pathlib.Path(out_html).write_text(page, encoding="utf-8")
