"""Pictures of a run: its curves and its detections.

Made through matplotlib's objects, without pyplot: no global state, no window. Each function writes
a png and returns the Figure. Read after `evaluate.py`.
"""
import colorsys
import json
import pathlib
import warnings

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from . import evaluate

DPI = 120
PART_COLOURS = {"loss": "black", "O": "tab:blue", "C": "tab:orange", "encoder": "tab:green",
                "O_denoising": "tab:cyan", "C_denoising": "tab:olive"}


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


def predictions(model, dataset, out_png, num_images=8, threshold=evaluate.THRESHOLD):
    """Draw the first images with objects, these in dashed white, and what scores enough.

    If too few images have objects, others follow.
    """
    entries = [dataset.coco.imgs[image_id] for image_id in dataset.image_ids]
    has_none = [not dataset.annotations(image_id) for image_id in dataset.image_ids]
    chosen = sorted(range(len(entries)), key=has_none.__getitem__)[:num_images]
    names = [category["name"] for category in dataset.categories]
    ratio = max(entries[i]["height"] / entries[i]["width"] for i in chosen)
    figure, grid = tiles(-(-len(chosen) // 4), min(4, len(chosen)), min(max(ratio, 0.3), 2))
    for index, axes in zip(chosen, grid):
        (image, target), objects = dataset[index], dataset.objects(entries[index])
        [found] = evaluate.detect(model, [image], [target.size_px])
        show(axes, dataset.picture(entries[index]))
        for box, label in zip(objects["boxes"].tolist(), objects["labels"].tolist()):
            frame(axes, box, "white", "--")
            axes.text(box[2], box[3], names[label], color="white", fontsize=5, parse_math=False,
                      ha="right", va="bottom", clip_on=True,
                      bbox={"facecolor": "black", "edgecolor": "none", "pad": 0.5, "alpha": 0.5})
        kept = found["scores"] >= threshold
        shown = detections(axes, {"scores": found["scores"][kept], "labels": found["labels"][kept],
                                  "boxes": found["boxes_xyxy"][kept]}, names)
        name = entries[index]["file_name"].replace("\\", "/").split("/")[-1]
        name = name if len(name) < 30 else f"{name[:13]}...{name[-13:]}"
        axes.set_title(f"image {target.image_id}: {name}\n"
                       f"{counted(len(objects['labels']), 'object')}, "
                       f"{counted(shown, 'detection')}", fontsize=8, parse_math=False)
    end = "\n" if len(chosen) == 1 else " "                         # one picture is narrow
    figure.suptitle(f"dashed: objects; solid:{end}detections that score {threshold:g} or more",
                    fontsize=9)
    return save(figure, out_png)


def counted(number, noun):
    """`1 object`, `2 objects`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def photo(picture, found, names, out_png):
    """Draw a picture, uint8 (3, h, w), with a Predictor's detections; long side 640 to 1600 px."""
    h, w = picture.shape[-2:]
    inch = min(max(h, w, 640), 1600) / max(h, w) / DPI                              # of one pixel
    figure = Figure(figsize=(max(w * inch, 0.2), max(h * inch, 0.2)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    show(axes, picture)
    detections(axes, found, names)
    return save(figure, out_png)


def tiles(rows, columns, ratio=1):
    """A Figure and its axes, row after row, for as many pictures of this height to width."""
    figure = Figure(figsize=(3.2 * columns, (3.2 * ratio + 0.4) * rows), layout="constrained")
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
    """Write a png. Letters that the font lacks, as in Chinese names, are drawn as empty boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing|Matplotlib currently does not support")
        figure.savefig(out_png, dpi=DPI)
    return figure
