"""Pictures of where a trained decoder looks: sampling points, or attention maps.

After [SD Fig. 1]. Read after `draw.py`.
"""
import contextlib

import torch

from .. import attention, attention_conditional, boxes
from ..data import transforms
from . import draw, evaluate

BRANCHES = {"": "cross-attention", "cls": "classification branch", "loc": "localization branch"}
KINDS = attention.DeformableAttention, attention_conditional.ConditionalAttention


@contextlib.contextmanager
def noted(decoder):
    """Note what each cross-attention is called with inside; one branch has a call for each layer.

    Yields:
        {"" or "cls" and "loc": [(module, its arguments)]}, filled as the decoder runs
    """
    calls, hooks = {}, []
    for name, module in decoder.named_modules():
        if isinstance(module, KINDS):
            branch = next((part for part in name.split(".") if part in BRANCHES), "")
            hooks.append(module.register_forward_hook(
                lambda module, args, _, branch=branch: calls.setdefault(branch, []).append(
                    (module, args))))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def last_calls(model, image, is_pad):
    """Run a model on one image and note what its last cross-attentions were called with.

    Returns:
        logits (N, C) and boxes (N, 4), on the CPU; {branch: (module, its arguments)}
    """
    device = next(model.parameters()).device
    with noted(model.decoder) as calls, evaluate.answering(model):
        answer = model(image[None].to(device), is_pad[None].to(device)).o_decoder[-1]
    return *(t[0].float().cpu() for t in answer), {branch: layers[-1]
                                                   for branch, layers in calls.items()}


@torch.inference_mode()
def sampling_points(module, queries, references, memory):
    """Where a DeformableAttention looks in one image.

    Returns:
        references (N, 2|4); points (N, H*L*K, 2), (x, y) in [0, 1] of the image without padding;
        weights (N, H*L*K); all on the CPU
    """
    locations, weights = module.look(queries, references, memory)
    points = locations / memory.valid_ratios[:, None, None, :, None]        # undoes look's
    return (references[0].float().cpu(), points[0].flatten(1, 3).float().cpu(),
            weights[0].flatten(1, 3).float().cpu())


@torch.inference_mode()
def attention_map(module, queries, query_pos, spatial, memory):
    """Where a ConditionalAttention looks in one image, the mean over heads.

    Returns:
        (N, h, w), of the cells that are image; a query's numbers sum to 1; on the CPU
    """
    weights = module.attention_map(queries, query_pos, spatial, memory)[0].mean(0)       # (N, S)
    (h, w), is_pad = memory.spatial_shapes[0], memory.is_pad[0]
    rows, columns = (~is_pad.view(h, w)).any(1), (~is_pad.view(h, w)).any(0)
    return weights.unflatten(-1, (h, w))[:, rows][:, :, columns].float().cpu()


def draw_points(axes, size, query, call):
    """Dots at the sampling points of a query, larger and lighter the more they weigh."""
    module, args = call
    references, points, weights = (t[query] for t in sampling_points(module, *args))
    order = weights.argsort()                                               # the heaviest on top
    x, y = (points[order] * size).unbind(-1)                                # pixels
    axes.scatter(x, y, 4 + 50 * weights[order] / weights.max(), weights[order], cmap="plasma",
                 edgecolors="black", linewidths=0.3)
    if len(references) == 2:                                                # a point, not a box
        axes.plot(*(references * size).tolist(), "w+", markersize=12)
    else:
        draw.frame(axes, boxes.to_xyxy(references) * size.repeat(2), "white", "--")


def draw_map(axes, size, query, call):
    """The attention map of a query over the picture, lighter the more a cell weighs."""
    module, args = call
    w, h = size.tolist()
    axes.imshow(attention_map(module, *args)[query].numpy(), extent=(0, w, h, 0), cmap="viridis",
                alpha=0.75, interpolation="nearest")


def where_it_looks(model, image, is_pad, out_png, names=None, num_queries=3):
    """Draw where the last layer's cross-attention looks, for the queries of highest score.

    The picture itself stands first in each row. Solid: the box that the query answers with. On
    deformable attention, dots are the sampling points of all heads and levels, and dashed is the
    reference they lie around. On dense attention the map is the mean over heads.

    Args:
        model    a trained Detector
        image    (3, h, w)  normalised as ImageNet's
        is_pad   (h, w)     bool, True = padding
        out_png  where to write
        names    of the classes
    Returns:
        the Figure
    """
    logits, pred_boxes, calls = last_calls(model, image, is_pad)
    score, label = logits.sigmoid().max(-1)                                         # (N,), (N,)
    best = score.argsort(descending=True, stable=True)[:num_queries].tolist()
    figure, grid = draw.tiles(len(best), 1 + len(calls))
    h, w = int((~is_pad[:, 0]).sum()), int((~is_pad[0]).sum())
    picture = transforms.denormalise(image[:, :h, :w])
    size, panels = torch.tensor([w, h]), iter(grid)
    for query in best:
        word = names[label[query]] if names else f"class {int(label[query])}"
        for branch in (None, *calls):
            axes = next(panels)
            draw.show(axes, picture)
            if branch is None:
                axes.set_title(f"{word} {score[query]:.2f}", fontsize=9, parse_math=False)
            else:
                axes.set_title(BRANCHES[branch], fontsize=9)
                is_dense = isinstance(calls[branch][0], KINDS[1])
                (draw_map if is_dense else draw_points)(axes, size, query, calls[branch])
            draw.frame(axes, boxes.to_xyxy(pred_boxes[query]) * size.repeat(2),
                       draw.colour_of(int(label[query])), "-")
    return draw.save(figure, out_png)
