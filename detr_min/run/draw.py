"""Pictures of a run: its curves, its detections, and where its last layer looks.

Made through matplotlib's objects, without pyplot: no global state, no window. Each function writes
a png and returns the Figure. Read after `evaluate.py`.
"""
import colorsys
import itertools
import json
import pathlib

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .. import attention, boxes
from ..data import transforms
from . import evaluate

DPI = 120
PART_COLOURS = {"loss": "black", "O": "tab:blue", "C": "tab:orange", "encoder": "tab:green",
                "O_denoising": "tab:cyan", "C_denoising": "tab:olive"}
BRANCHES = {"cls": "classification branch", "loc": "localization branch"}       # by module's name


def colour_of(label):
    """A colour for a class: neighbouring labels are far apart on the colour circle."""
    return colorsys.hsv_to_rgb((0.58 + label * 0.381966) % 1, 0.85, 0.95)


def curves(log_path, out_png):
    """The loss with its parts, and AP, over steps, from a run's log.jsonl."""
    lines = [json.loads(line) for line in pathlib.Path(log_path).read_text().splitlines()]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    loss_axes, ap_axes = figure.subplots(1, 2)
    for name, colour in PART_COLOURS.items():
        points = [(line["step"], total(line[name])) for line in lines if name in line]
        if points:
            loss_axes.plot(*zip(*points), label=name, color=colour, linewidth=2 - (name != "loss"))
    for name, style in (("AP50", "o--"), ("AP", "o-"), ("AP75", "o:")):
        points = [(line["step"], line["val"][name]) for line in lines
                  if "val" in line and line["val"][name] is not None]           # None: no objects
        if points:
            ap_axes.plot(*zip(*points), style, label=f"{name} {points[-1][1]:.3f}", markersize=4)
    for axes, title in ((loss_axes, "training loss and its parts"), (ap_axes, "validation AP")):
        axes.set(title=title, xlabel="step", ylim=(0, None))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    return save(figure, out_png)


def total(part):
    """A part of the loss: the sum of its terms, which are weighted; `pairs` is none of them."""
    return sum(part[term] for term in ("cls", "l1", "giou")) if isinstance(part, dict) else part


def predictions(model, dataset, out_png, num_images=8, threshold=0.5):
    """Draw the first images of a data set: objects in dashed white, and what scores enough."""
    chosen = range(min(num_images, len(dataset)))
    figure, grid = tiles(-(-len(chosen) // 4), min(4, len(chosen)))
    for index, axes in zip(chosen, grid):
        image, target = dataset[index]
        [found] = evaluate.detect(model, [image], [target.size_px])
        entry = dataset.coco.imgs[target.image_id]
        objects = dataset.objects(entry)["boxes"].tolist()
        show(axes, dataset.picture(entry))
        for box in objects:
            frame(axes, box, "white", "--")
        kept = found["scores"] >= threshold
        shown = detections(axes, {"scores": found["scores"][kept], "labels": found["labels"][kept],
                                  "boxes": found["boxes_xyxy"][kept]},
                           [c["name"] for c in dataset.categories])
        axes.set_title(f"image {entry['id']}: {len(objects)} objects, {shown} found above "
                       f"{threshold:g}", fontsize=8)
    return save(figure, out_png)


def photo(picture, found, names, out_png):
    """Draw a picture, uint8 (3, h, w), with a Predictor's detections; long side 640 to 1600 px."""
    h, w = picture.shape[-2:]
    inch = min(max(h, w, 640), 1600) / max(h, w) / DPI                              # of one pixel
    figure = Figure(figsize=(max(w * inch, 0.2), max(h * inch, 0.2)))
    axes = figure.add_axes((0, 0, 1, 1), frame_on=False)
    show(axes, picture)
    detections(axes, found, names)
    return save(figure, out_png)


def last_looks(model, image, is_pad):
    """Logits (N, C) and boxes (N, 4) of one image, and where the last cross-attentions looked.

    Each DeformableAttention's arguments are noted by a hook; its `look`, called again, tells the
    rest: {name in the layer: references (N, 2|4), points (N, H*L*K, 2) in [0, 1] of the image
    without padding, weights (N, H*L*K)}.
    """
    calls, looks = [], {}
    modules = {name: module for name, module in model.decoder.layers[-1].named_modules()
               if isinstance(module, attention.DeformableAttention)}
    hooks = [module.register_forward_hook(lambda _, args, out, n=name: calls.append((n, args)))
             for name, module in modules.items()]
    device = next(model.parameters()).device
    with evaluate.answering(model):
        answer = model(image[None].to(device), is_pad[None].to(device)).o_decoder[-1]
        for name, (queries, references, memory) in calls:
            locations, weights = modules[name].look(queries, references, memory)
            points = locations / memory.valid_ratios[:, None, None, :, None]        # undoes look's
            looks[name] = references, points.flatten(2, 4), weights.flatten(2, 4)
    for hook in hooks:
        hook.remove()
    return *(t[0].float().cpu() for t in answer), {
        name: [t[0].float().cpu() for t in look] for name, look in looks.items()}


def sampling_points(model, image, is_pad, out_png, names=None, num_queries=3):
    """Where the last layer's cross-attention looks, for the queries of highest score.

    A dot is a point of any head and level, larger and lighter the more it weighs. Dashed in white:
    the reference the layer starts from; in colour: the box it answers with. image (3, h, w) is
    normalised as ImageNet's, in is_pad (h, w) True = padding; two branches stand side by side.
    """
    logits, pred_boxes, looks = last_looks(model, image, is_pad)
    score, label = logits.sigmoid().max(-1)                                         # (N,), (N,)
    best = score.argsort(descending=True, stable=True)[:num_queries].tolist()
    figure, grid = tiles(*((len(best), len(looks)) if len(looks) > 1 else (1, len(best))))
    h, w = int((~is_pad[:, 0]).sum()), int((~is_pad[0]).sum())
    std, mean = (torch.tensor(numbers)[:, None, None]
                 for numbers in (transforms.STD, transforms.MEAN))
    picture = ((image[:, :h, :w].cpu() * std + mean).clamp(0, 1) * 255).byte()
    for axes, (query, name) in zip(grid, itertools.product(best, looks)):
        reference, points, weight = (t[query] for t in looks[name])
        branch = next((BRANCHES[p] for p in name.split(".") if p in BRANCHES), "cross-attention")
        word = names[label[query]] if names else f"class {int(label[query])}"
        axes.set_title(f"{branch}\n{word} {score[query]:.2f}", fontsize=9)
        show(axes, picture)
        order = weight.argsort()                                            # the heaviest on top
        x, y = (points[order] * torch.tensor([w, h])).unbind(-1)            # pixels
        axes.scatter(x, y, 4 + 50 * weight[order] / weight.max(), weight[order], cmap="plasma",
                     edgecolors="black", linewidths=0.3)
        if len(reference) == 2:                                             # a point, not a box
            axes.plot(*(reference * torch.tensor([w, h])).tolist(), "w+", markersize=12)
        for box, colour, style in ((reference, "white", "--"),
                                   (pred_boxes[query], colour_of(int(label[query])), "-")):
            if len(box) == 4:
                frame(axes, boxes.to_xyxy(box) * torch.tensor([w, h, w, h]), colour, style)
    return save(figure, out_png)


def tiles(rows, columns):
    """A Figure and its axes, row after row, for as many pictures."""
    figure = Figure(figsize=(3.2 * columns, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    return figure, grid


def show(axes, picture):
    """A uint8 picture (3, h, w) in pixel coordinates: box edges lie on the edges of pixels."""
    h, w = picture.shape[-2:]
    axes.imshow(picture.permute(1, 2, 0).numpy(), extent=(0, w, h, 0), interpolation="bicubic")
    axes.set(xlim=(0, w), ylim=(h, 0), autoscale_on=False)


def frame(axes, box_xyxy, colour, style):
    x1, y1, x2, y2 = map(float, box_xyxy)
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, zorder=3,
                             linewidth=1.2 if style == "--" else 1.8, linestyle=style))


def detections(axes, found, names):
    """Draw detections, a dict as a Predictor gives it, the surest on top. Returns how many."""
    w, h = axes.get_xlim()[1], axes.get_ylim()[0]
    for i in reversed(range(len(found["scores"]))):                 # they are sorted, best first
        label, (x1, y1, x2, _) = int(found["labels"][i]), found["boxes"][i].tolist()
        colour = colour_of(label)
        frame(axes, found["boxes"][i], colour, "-")
        is_right, is_top = x1 > 0.7 * w, y1 < 0.08 * h              # the words stay in the picture
        axes.text(x2 if is_right else x1, y1, f"{names[label]} {found['scores'][i]:.2f}",
                  parse_math=False,
                  ha="right" if is_right else "left", va="top" if is_top else "bottom",
                  fontsize=7, color="black" if colour[1] > 0.6 else "white", clip_on=True,
                  bbox={"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.85})
    return len(found["scores"])


def save(figure, out_png):
    figure.savefig(out_png, dpi=DPI)
    return figure
