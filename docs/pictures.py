"""The pictures of docs/pictures.md, drawn by the code that they explain.

    OMP_NUM_THREADS=1 python train.py                       # runs/dac_shapes
    python -m studies sd_detr --seeds 1 --only plain,sd_detr --into runs/pictures   # two more
    python docs/pictures.py                                 # these runs -> docs/pictures/*.png
    python docs/pictures.py --run DAC PLAIN SD_DETR         # of other folders

Two pictures need no run, and are drawn in any case; one needs Chromium, and is left out without.
Every number in a title is measured here.
"""
import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from detr_min import attention, boxes, criterion, matcher, tal_loss  # noqa: E402
from detr_min.data import transforms  # noqa: E402
from detr_min.run import checkpoints, draw, evaluate, explore, looks, sets  # noqa: E402

WIDTH, DPI = 20 / 3, 240                # inches; 1600 pixels wide
NUM_IMAGES = 200                        # validation images that a title's averages are over
NEEDED = {                              # model: how to make a run of it
    "dac": "python train.py",
    "conditional": "python -m studies sd_detr --seeds 1 --only plain --into runs/pictures",
    "decoupled": "python -m studies sd_detr --seeds 1 --only sd_detr --into runs/pictures"}
DOT = dict(marker="o", linestyle="", markeredgecolor="black", markeredgewidth=0.4)


def save(figure, out_png):
    """A small png, with never more than 24 empty rows.

    Of its 256 colours half are those of many pixels, half far apart, so that rare ones stay.
    """
    figure.savefig(out_png)
    with Image.open(out_png) as file:
        rows = numpy.asarray(file.convert("RGB"))
    empty, kept = 0, []
    for is_white in (rows == 255).all((1, 2)):
        empty = empty + 1 if is_white else 0
        kept.append(empty <= 24)
    rows = rows[kept]
    palette = numpy.concatenate([
        numpy.reshape(Image.fromarray(rows).quantize(128, method).getpalette()[:3 * 128], (-1, 3))
        for method in (Image.Quantize.MEDIANCUT, Image.Quantize.MAXCOVERAGE)])
    numbers, which = numpy.unique(rows @ [2**16, 2**8, 1], return_inverse=True)
    colours = numpy.stack([numbers >> 16, numbers >> 8 & 255, numbers & 255], 1)
    nearest = abs(colours[:, None] - palette).sum(2).argmin(1).astype("uint8")
    picture = Image.fromarray(nearest[which].reshape(rows.shape[:2]))
    picture.putpalette(palette.flatten().tolist())
    picture.save(out_png, optimize=True)
    return figure


def panels(columns, height, **more):
    """A Figure 1600 px wide and its axes in a row."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)
    return figure, figure.subplots(1, columns, squeeze=False, **more)[0]


def show_grey(axes, image, box_xyxy=None):
    """Show a normalised image (3, h, w) in grey, so that colours stand out.

    With a box in pixels, contrast is stretched to what is around it: a pale object becomes clear.
    """
    std, mean = (torch.tensor(n)[:, None, None] for n in (transforms.STD, transforms.MEAN))
    grey = (image * std + mean).clamp(0, 1).mean(0)
    if box_xyxy is not None:
        x1, y1, x2, y2 = box_xyxy.round().long().tolist()
        near = grey[max(y1 - 8, 0):y2 + 8, max(x1 - 8, 0):x2 + 8]
        grey = ((grey - near.min()) / (near.max() - near.min()).clamp(min=0.05)).clamp(0, 1)
    axes.set_axis_off()
    draw.show(axes, (255 * (0.35 + 0.65 * grey)).byte().expand(3, -1, -1))


def picture_axes(columns, height, image, box_xyxy=None):
    """A Figure and its axes in a row, each showing the image in grey."""
    figure, row = panels(columns, height)
    for axes in row:
        show_grey(axes, image, box_xyxy)
    return figure, row


def legend(figure, handles, columns=2):
    """Say below the panels what lines and dots are."""
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8,
                  frameon=False)


def pixels(boxes_or_points, image):
    """cxcywh or (x, y) in [0, 1] -> xyxy or (x, y) in pixels of an image (3, h, w)."""
    h, w = image.shape[-2:]
    if boxes_or_points.shape[-1] == 4:
        return boxes.to_xyxy(boxes_or_points) * torch.tensor([w, h, w, h])
    return boxes_or_points * torch.tensor([w, h])


def answers(model, image):
    """Predictions of each layer of the O- and of the C-Decoder, and the queries, of one image."""
    with evaluate.answering(model):
        is_pad = torch.zeros(1, *image.shape[-2:], dtype=torch.bool)
        network = torch.nn.Sequential(model.backbone, model.projections)
        memory = model.encoder(*model.on_batch(network, image[None], is_pad))
        queries = model.queries(memory)
        return (model.decoder.o_decoder(queries, memory), model.decoder.c_decoder(queries, memory),
                queries)


def initial_points(out_png, num_heads=8, num_points=4):
    """(a) Where a new DeformableAttention looks: around a point, and inside a box."""
    side = 12
    module = attention.DeformableAttention(num_heads * 8, num_heads, 1, num_points)
    cells = torch.zeros(1, side * side, num_heads * 8)
    memory = attention.Memory(cells, cells[..., 0].bool(), [(side, side)], torch.ones(1, 1, 2))
    figure, row = panels(2, 4.5)
    box = torch.tensor([0.5, 0.5, 0.7, 0.4])
    for axes, reference in zip(row, (box[:2], box)):
        with torch.no_grad():
            points, _ = module.look(torch.zeros(1, 1, num_heads * 8), reference[None, None], memory)
        points = points.flatten(0, 4).unflatten(0, (num_heads, num_points)) * side      # (H, K, 2)
        far = (points - side / 2).abs().amax((0, 1))            # along x and y, in cells
        for head, (x, y) in enumerate(points.transpose(1, 2)):
            axes.plot([side / 2, *x], [side / 2, *y], color=draw.colour_of(head), linewidth=0.8)
            axes.scatter(x, y, 30, [draw.colour_of(head)], zorder=3)
        axes.set(xlim=(0, side), ylim=(side, 0), aspect="equal", xticks=range(side + 1),
                 yticks=range(side + 1))
        axes.grid(alpha=0.4)
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        if len(reference) == 2:
            axes.plot(side / 2, side / 2, "k+", markersize=12)
            axes.set_title(f"around a point: {num_heads} heads, {num_points} steps of a cell\n"
                           f"the last is {far[0]:g} cells away", fontsize=9)
        else:
            draw.frame(axes, boxes.to_xyxy(box) * side, "black", "--")
            reach = far / (box[2:] * side / 2)
            axes.set_title(f"inside a box: {num_points} steps to its edge\n"
                           f"the last is at {reach[0]:.0%} of its half width", fontsize=9)
    legend(figure, [
        Line2D([], [], color="black", marker="+", linestyle="", label="reference point"),
        Line2D([], [], color="black", linestyle="--", linewidth=1.2, label="reference box"),
        Line2D([], [], color=draw.colour_of(0), marker="o", linewidth=0.8,
               label="sampling points of one head"),
        Line2D([], [], color="grey", alpha=0.4, label="cells of the feature level")])
    return save(figure, out_png)


def zoom(axes, box_xyxy, share=0.35, points=None):
    """Show a box in pixels with some of what is around it, and all points, as a square."""
    x1, y1, x2, y2 = box_xyxy.tolist()
    centre = torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2])
    half = (0.5 + share) * max(x2 - x1, y2 - y1)
    if points is not None:
        half = max(half, 1.05 * (points - centre).abs().max().item())
    x, y = centre.tolist()
    axes.set(xlim=(x - half, x + half), ylim=(y + half, y - half))


def look(axes, image, reference, points, weights, answer):
    """Points (P, 2) in [0, 1], larger and lighter the more they weigh; dashed: the reference."""
    order = weights.argsort()                                           # the heaviest on top
    axes.scatter(*pixels(points[order], image).T, 8 + 150 * weights[order], weights[order],
                 cmap="plasma", edgecolors="black", linewidths=0.3, zorder=4)
    draw.frame(axes, pixels(reference, image), "black", "--")
    draw.frame(axes, pixels(answer, image), draw.colour_of(0), "-")


LOOK_LEGEND = [
    Line2D([], [], color="black", linestyle="--", linewidth=1.2,
           label="box that the layer starts from"),
    Line2D([], [], color=draw.colour_of(0), linewidth=1.8, label="box that the layer predicts"),
    Line2D([], [], color="#0d0887", markersize=3, **DOT, label="sampling point of small weight"),
    Line2D([], [], color="#f0f921", markersize=8, **DOT, label="sampling point of large weight")]


def last_looks(model, image):
    """Logits and boxes of one image, and where the last layer's branches looked.

    Returns:
        (N, C); (N, 4); {"" or "cls" and "loc": what looks.sampling_points returns}
    """
    is_pad = torch.zeros(image.shape[1:], dtype=torch.bool)
    logits, pred_boxes, calls = looks.last_calls(model, image, is_pad)
    return logits, pred_boxes, {branch: looks.sampling_points(module, *args)
                                for branch, (module, args) in calls.items()}


def largest(target, number):
    """Indices of the largest objects of an image."""
    return target.boxes[:, 2:].prod(-1).argsort(descending=True, stable=True)[:number]


def matched(logits, pred_boxes, target):
    """The query of each object of one image, (M,)."""
    cost = matcher.match_cost(logits, pred_boxes, target.labels, target.boxes)
    query_idx, gt_idx = matcher.one_to_one(cost)
    return query_idx[gt_idx.argsort()]


def layers_of_a_query(model, dataset, out_png, index=4):
    """(b) Where the query of an image's largest object looks, layer by layer, and its answers."""
    image, target = dataset[index]
    is_pad = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
    with looks.noted(model.decoder) as calls, evaluate.answering(model):
        layers = model(image[None], is_pad).o_decoder
    seen = [(logits[0], pred_boxes[0], looks.sampling_points(module, *args))
            for (logits, pred_boxes), (module, args) in zip(layers, calls[""])]
    [gt] = largest(target, 1)
    query = matched(*seen[-1][:2], target)[gt]
    box = pixels(target.boxes[gt], image)
    all_points = pixels(torch.cat([points[query] for *_, (_, points, _) in seen]), image)
    figure, row = picture_axes(len(seen), 3.2, image, box)
    for layer, (axes, (logits, pred_boxes, found)) in enumerate(zip(row, seen), start=1):
        reference, points, weights = (t[query] for t in found)
        before, after = (boxes.iou(b[None], target.boxes[gt, None]).item()
                         for b in (reference, pred_boxes[query]))
        look(axes, image, reference, points, weights, pred_boxes[query])
        zoom(axes, box, points=all_points)
        word = "better" if after > before else "worse" if after < before else "no better"
        score = logits[query, target.labels[gt]].sigmoid()
        axes.set_title(f"layer {layer} makes the box {word}\nIoU {before:.3f} to "
                       f"{after:.3f}, score {score:.2f}", fontsize=9)
    legend(figure, LOOK_LEGEND)
    return save(figure, out_png)


def gathering(model, dataset, out_png, index=5, num_images=NUM_IMAGES, near=0.5, sure=0.3):
    """(c) The same queries before the decoder, after the C-Decoder and after the O-Decoder.

    A query is near an object if its box overlaps the object's by IoU >= `near`. Drawn are those
    that are near an image's largest object in any stage, each in its colour, above bars of their
    scores for the object's class. The heading has means over all objects: the queries near
    it, and those of them whose score is at least `sure`.
    """
    counts, objects = torch.zeros(2, 3), 0
    stages = "before the decoder", "after the C-Decoder", "after the O-Decoder"

    def stages_of(target, o, c, queries):
        """Boxes (N, 4) and the scores of each object's class (N, M), of the three stages."""
        nothing = torch.zeros(queries.ref_boxes.shape[1], len(target.labels))
        return [(queries.ref_boxes[0], nothing)] + [
            (p.boxes[0], p.logits[0].sigmoid()[:, target.labels]) for p in (c[-1], o[-1])]
    for i in range(min(num_images, len(dataset))):
        image, target = dataset[i]
        objects += len(target.labels)
        for stage, (pred_boxes, scores) in enumerate(stages_of(target, *answers(model, image))):
            is_near = boxes.iou(pred_boxes, target.boxes) >= near                       # (N, M)
            counts[:, stage] += torch.stack([is_near.sum(), (is_near & (scores >= sure)).sum()])
    (a, b, c), (_, sure_c, sure_o) = (counts / objects).tolist()
    image, target = dataset[index]
    shown, [gt] = stages_of(target, *answers(model, image)), largest(target, 1)
    overlaps = [boxes.iou(pred_boxes, target.boxes[gt, None])[:, 0] for pred_boxes, _ in shown]
    chosen = (torch.stack(overlaps) >= near).any(0).nonzero()[:, 0]
    chosen = chosen[shown[1][1][chosen, gt].argsort(descending=True, stable=True)]
    colours, box = [draw.colour_of(n) for n in range(len(chosen))], pixels(target.boxes[gt], image)
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained", dpi=DPI)
    tops, bottoms = figure.subplots(2, 3, height_ratios=(2.2, 1))
    for top, bars, name, (pred_boxes, scores), overlap in zip(tops, bottoms, stages, shown,
                                                              overlaps):
        show_grey(top, image, box)
        draw.frame(top, box, "white", "-")
        for query, colour in zip(chosen, colours):
            draw.frame(top, pixels(pred_boxes[query], image), colour, "-")
        draw.frame(top, box, "black", "--")
        top.set_title(f"{name}\n{(overlap[chosen] >= near).sum()} of {len(chosen)} queries near",
                      fontsize=9)
        zoom(top, box)
        heights = scores[chosen, gt].tolist()
        for number, (height, is_near) in enumerate(zip(heights, overlap[chosen] >= near)):
            bars.bar(number, height, color=colours[number], alpha=1 if is_near else 0.3)
            bars.text(number, height + 0.02, f"{height:.2f}"[1:] if height < 0.995 else "1.0",
                      ha="center", fontsize=6 if len(heights) < 12 else 4)
        bars.axhline(sure, color="grey", linewidth=0.6, linestyle=":")
        bars.set(ylim=(0, 1.15), xticks=[], yticks=[0, 0.5, 1])
        bars.set_xlabel("score for the object's class", fontsize=8)
        bars.tick_params(labelsize=7)
    bottoms[0].clear()
    bottoms[0].set_axis_off()
    bottoms[0].legend(handles=[
        Line2D([], [], color="black", linestyle="--", linewidth=1.2, label="the object"),
        Line2D([], [], color=draw.colour_of(0), linewidth=1.8,
               label="box of a query; its colour\nis the same everywhere"),
        Patch(color=draw.colour_of(0), alpha=0.3, label="pale bar: not near"),
        Line2D([], [], color="grey", linewidth=0.6, linestyle=":", label=f"score {sure:g}")],
        loc="center", fontsize=8, frameon=False, title=f"near: IoU with the object ≥ {near:g}",
        title_fontsize=8)
    figure.suptitle(
        f"queries near an object, mean of {objects} objects: {a:.1f} before, {b:.1f} after the "
        f"C-, {c:.1f} after the O-Decoder;\nof these with a score of at least {sure:g} for its "
        f"class: {sure_c:.1f} after the C-, {sure_o:.1f} after the O-Decoder", fontsize=9)
    return save(figure, out_png)


def features(model, image):
    """Features (N, D) of the queries in three stages, the first boxes, and two Predictions (N, .).

    Before the decoder they are content + position, which is what attention sees; after the C- and
    the O-Decoder, what the last layer's heads see and make predictions of.
    """
    seen = []
    handle = model.decoder.class_heads[-1].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0][0]))
    o, c, queries = answers(model, image)
    handle.remove()
    after_o, after_c = seen
    return ([queries.content[0, 0] + queries.pos[0, 0], after_c, after_o], queries.ref_boxes[0],
            *(boxes.Predictions(p[-1].logits[0], p[-1].boxes[0]) for p in (c, o)))


def main_plane(points):
    """Find the axes of most spread of (N, D): a function that projects others to two, (M, 2)."""
    centre = points.mean(0)
    axes = torch.linalg.svd(points - centre, full_matrices=False)[2][:2]
    return lambda others: (others - centre) @ axes.T


def features_in_a_plane(model, dataset, out_png, index=5, num_images=NUM_IMAGES, near=0.5):
    """(h) [DAC Fig. 1]  The features of all queries of an image, before and after the decoders.

    A query has an object's colour if its box overlaps it by IoU >= `near`; a star is the query of
    the highest score for it among these. The two planes on the right are one: the main axes of both
    decoders' features. The heading has the mean distance, in all dimensions, between the star and
    an object's other queries.
    """
    stages = "before the decoder", "after the C-Decoder", "after the O-Decoder"

    def stars(target, predicted):
        """Which queries are near which object (N, M), and the best of each (M,)."""
        is_near = boxes.iou(predicted.boxes, target.boxes) >= near
        return is_near, (predicted.logits[:, target.labels].sigmoid() * is_near).argmax(0)
    totals = torch.zeros(2, 2)                              # of distances, and how many there are
    for i in range(min(num_images, len(dataset))):
        image, target = dataset[i]
        (_, *after), _, *predicted = features(model, image)
        for row, x, (is_near, best) in zip(totals, after, (stars(target, p) for p in predicted)):
            others = is_near.scatter(0, best[None], False)
            row += torch.stack([(torch.cdist(x, x[best]) * others).sum(), others.sum()])
    distance_c, distance_o = (totals[:, 0] / totals[:, 1]).tolist()
    image, target = dataset[index]
    found, ref_boxes, *predicted = features(model, image)
    project = main_plane(torch.cat(found[1:]))
    planes = [main_plane(found[0])(found[0]), project(found[1]), project(found[2])]
    figure, row = panels(3, 3.1)
    nearby = [(boxes.iou(ref_boxes, target.boxes) >= near, None),
              *(stars(target, p) for p in predicted)]
    for axes, name, xy, (is_near, best) in zip(row, stages, planes, nearby):
        axes.plot(*xy.T, marker="o", linestyle="", markersize=3, color="lightgrey")
        for gt in range(len(target.labels)):
            axes.plot(*xy[is_near[:, gt]].T, **DOT, markersize=5, color=draw.colour_of(gt))
        for gt in is_near.any(0).nonzero()[:, 0].tolist() if best is not None else ():
            axes.plot(*xy[best[gt]], **{**DOT, "marker": "*"}, markersize=12,
                      color=draw.colour_of(gt))
        axes.set_title(name, fontsize=9)
        axes.set(xticks=[], yticks=[])
    both = torch.cat(planes[1:])
    for axes in row[1:]:
        margin = 0.08 * (both.amax(0) - both.amin(0))
        low, high = (both.amin(0) - margin).tolist(), (both.amax(0) + margin).tolist()
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    legend(figure, [
        Line2D([], [], **{**DOT, "marker": "*"}, markersize=10, color="white",
               label="the query that scores highest for an object"),
        Line2D([], [], **DOT, color="white", label=f"another near it (IoU ≥ {near:g})"),
        Line2D([], [], marker="o", linestyle="", markersize=3, color="lightgrey",
               label="near no object")], columns=3)
    figure.suptitle(f"distance of an object's other queries from the star, mean over {num_images} "
                    f"images:\n{distance_c:.1f} after the C-Decoder, {distance_o:.1f} after the "
                    "O-Decoder", fontsize=9)
    return save(figure, out_png)


def assignments(model, dataset, out_png, index=5):
    """(d) Which queries are taught by which object: one-to-one, and one-to-many."""
    image, target = dataset[index]
    o, c, _ = answers(model, image)
    figure, row = picture_axes(2, 4.5, image)
    cost = matcher.match_cost(o[-1].logits[0], o[-1].boxes[0], target.labels, target.boxes)
    quality = matcher.match_quality(c[-1].logits[0].sigmoid(), c[-1].boxes[0], target.labels,
                                    target.boxes)
    for axes, name, pred_boxes, (query_idx, gt_idx) in (
            (row[0], "one-to-one, O-Decoder", o[-1].boxes[0], matcher.one_to_one(cost)),
            (row[1], "one-to-many, C-Decoder", c[-1].boxes[0], matcher.one_to_many(quality))):
        centres = pixels(pred_boxes[:, :2], image)
        axes.scatter(*centres.T, 7, "white", edgecolors="black", linewidths=0.5)
        for query, gt in zip(query_idx.tolist(), gt_idx.tolist()):
            colour = draw.colour_of(gt)
            draw.frame(axes, pixels(pred_boxes[query], image), colour, "-")
            axes.plot(*centres[query], "o", color=colour, markersize=5, markeredgecolor="black")
        for gt, box in enumerate(pixels(target.boxes, image)):
            draw.frame(axes, box, "black", "--")
            x, y = (box[:2] + 1).tolist()
            axes.text(x, y, (gt_idx == gt).sum().item(), fontsize=7, va="top", parse_math=False,
                      bbox={"facecolor": draw.colour_of(gt), "edgecolor": "none", "pad": 1})
        axes.set_title(f"{name}\n{len(gt_idx)} of {len(centres)} queries learn an object",
                       fontsize=9)
    legend(figure, [
        Line2D([], [], color="black", linestyle="--", linewidth=1.2,
               label="object, with its number of queries"),
        Line2D([], [], color=draw.colour_of(0), linewidth=1.8, markersize=5, marker="o",
               markeredgecolor="black", label="query that learns the object of this colour"),
        Line2D([], [], color="white", markersize=3, **DOT,
               label="query that learns “no object”")])
    return save(figure, out_png)


def attention_maps(model, image):
    """Logits, boxes and the last layer's attention maps of one image. -> {branch: (N, h, w)}"""
    is_pad = torch.zeros(image.shape[1:], dtype=torch.bool)
    logits, pred_boxes, calls = looks.last_calls(model, image, is_pad)
    return logits, pred_boxes, {branch: looks.attention_map(module, *args)
                                for branch, (module, args) in calls.items()}


def spread(attention, box):
    """Where a map (h, w) lies about a cxcywh box: the mean distance, and the share outside it.

    The distance is from the box's centre, in half sizes: 1 = at its edge.
    """
    h, w = attention.shape
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    far = torch.maximum((x - box[0]).abs() / (box[2] / 2), (y - box[1]).abs() / (box[3] / 2))
    return torch.stack([(attention * far).sum(), attention[far > 1].sum()])


def branches(plain, decoupled, dataset, out_png, index=2, num_images=NUM_IMAGES, num_objects=3):
    """(e) [SD Fig. 1] Attention maps of the ordinary decoder and of SD-DETR's two branches.

    A row is an object, its maps are those of the queries that are matched to it. Titles have means
    over all matched queries of `spread`.
    """
    columns = {"ordinary decoder": (plain, ""), "localization branch": (decoupled, "loc"),
               "classification branch": (decoupled, "cls")}
    sums, objects = torch.zeros(len(columns), 2), 0
    for i in range(min(num_images, len(dataset))):
        image, target = dataset[i]
        found = {id(model): attention_maps(model, image) for model in (plain, decoupled)}
        objects += len(target.labels)
        for total, (model, branch) in zip(sums, columns.values()):
            logits, pred_boxes, maps = found[id(model)]
            for query, box in zip(matched(logits, pred_boxes, target), target.boxes):
                total += spread(maps[branch][query], box)
    image, target = dataset[index]
    figure = Figure(figsize=(WIDTH, 1.65 * num_objects + 0.9), layout="constrained", dpi=DPI)
    rows = figure.subplots(num_objects, 1 + len(columns), squeeze=False)
    h, w = image.shape[-2:]
    found = {id(model): attention_maps(model, image) for model in (plain, decoupled)}
    for row, gt in zip(rows, largest(target, num_objects)):
        show_grey(row[0], image)
        draw.frame(row[0], pixels(target.boxes[gt], image), "black", "--")
        for axes, (model, branch) in zip(row[1:], columns.values()):
            logits, pred_boxes, maps = found[id(model)]
            query = matched(logits, pred_boxes, target)[gt]
            axes.set_axis_off()
            axes.imshow(maps[branch][query].numpy(), extent=(0, w, h, 0), cmap="viridis")
            draw.frame(axes, pixels(target.boxes[gt], image), "white", "--")
            draw.frame(axes, pixels(pred_boxes[query], image), draw.colour_of(0), "-")
    rows[0][0].set_title("image and object", fontsize=9)
    for axes, name, (far, out) in zip(rows[0][1:], columns, (sums / objects).tolist()):
        axes.set_title(f"{name}\n{far:.1f} half sizes away\n{out:.0%} outside the box", fontsize=8)
    figure.suptitle(f"attention of the last layer, mean over heads; numbers are means over "
                    f"{objects} objects", fontsize=9)
    legend(figure, [
        Line2D([], [], color="black", linestyle="--", linewidth=1.2,
               label="object (white on the maps)"),
        Line2D([], [], color=draw.colour_of(0), linewidth=1.8,
               label="box that the query predicts"),
        Patch(color="#fde725", label="most attention on a map")], columns=3)
    return save(figure, out_png)


def aligned_targets(out_png):
    """(f) What SD-DETR wants a score to be, and how hard it pulls: [SD Eq. 6-7]."""
    steps = torch.arange(1, 200, dtype=torch.float64) / 200     # .005, .01, ... of s and u
    figure, (left, right) = panels(2, 3.3)
    target = tal_loss.aligned_target(steps.expand(199, -1), steps[:, None].expand(-1, 199))
    tenths = [k / 10 for k in range(11)]
    surface = left.contourf(steps, steps, target, levels=tenths, cmap="viridis")
    figure.colorbar(surface, ax=left, label="target t", shrink=0.8)
    left.plot([0, 1], [0, 1], "w--", linewidth=1)
    left.text(0.97, 0.5, "score too high:\nt < s", color="white", ha="right", fontsize=8)
    left.text(0.22, 0.72, "score too low:\nt > s", color="white", ha="left", fontsize=8)
    left.set(xlabel="score s", ylabel="IoU u", aspect="equal", xlim=(0.005, 0.995),
             ylim=(0.005, 0.995))
    is_fixed = (target.diagonal() - steps).abs().max() < 1e-9
    left.set_title("t = s^.25 u^.75" + "; dashed: t = s = u" * bool(is_fixed), fontsize=9)

    def pull(layer_loss, weight, u=1.0):
        """Of a layer loss, without its weight, on 199 matched queries whose boxes have IoU u."""
        number, logits = torch.arange(199), steps.logit()[None, :, None].requires_grad_()
        box = torch.tensor([0.5, 0.5, 0.4, 0.4], dtype=torch.float64).expand(199, -1)
        pairs = criterion.Pairs(0 * number, number, number, 0 * number,
                                box * torch.tensor([1, 1, 1, u]))
        cls, *_ = layer_loss(boxes.Predictions(logits, box[None]), pairs)
        return -torch.autograd.grad(cls, logits)[0].flatten() / weight
    focal = pull(criterion.focal_loss, criterion.FOCAL_WEIGHT)
    for u, colour in ((0.5, "tab:green"), (0.7, "tab:orange"), (0.9, "tab:blue")):
        ours = pull(criterion.task_aligned_loss, criterion.TAL_WEIGHT, u)
        right.plot(steps, ours, color=colour, label=f"[SD Eq. 7], u = {u}")
    right.plot(steps, focal, "k:", label="focal loss, any u")
    right.axhline(0, color="grey", linewidth=0.6)
    right.set(xlabel="score s of a matched query", ylabel="upward pull on its logit",
              xlim=(0, 1), ylim=(-0.35, 0.35))
    right.legend(fontsize=8, frameon=False, loc="lower left")
    right.set_title(f"at s = {steps[1]:g} focal loss pulls {focal[1] / ours[1]:.1f} times\nas hard "
                    "as [SD Eq. 7] with u = 0.9", fontsize=9)
    for axes in (left, right):
        axes.tick_params(labelsize=8)
    return save(figure, out_png)


def explorer(model, dataset, out_png, chromium, index=5, view="decoder=c"):
    """(g) The page of `python eval.py RUN --explore 6`, as a browser shows it."""
    image, target = dataset[index]
    with tempfile.TemporaryDirectory() as folder:
        page, png = (pathlib.Path(folder) / name for name in ("page.html", "page.png"))
        explore.write(model, image, f"image {target.image_id}", page, target)
        subprocess.run([chromium, "--headless", "--no-sandbox", "--disable-gpu",
                        "--hide-scrollbars", f"--user-data-dir={folder}/profile",
                        f"--screenshot={png}", "--window-size=1280,900",
                        "--force-device-scale-factor=1.25", f"{page.as_uri()}#{view}"],
                       check=True, capture_output=True, timeout=120)
        with Image.open(png) as file:                   # octree keeps the few pixels of a colour
            picture = file.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
        picture.save(out_png, optimize=True)


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", metavar="RUN", help="run folders on shapes",
                        default=[ROOT / "runs" / "dac_shapes", *(
                            ROOT / "runs" / "pictures" / "runs" / "sd_detr" / f"{name}_0"
                            for name in ("plain", "sd_detr"))])
    parser.add_argument("--out", default=ROOT / "docs" / "pictures", help="folder")
    args = parser.parse_args(argv)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    initial_points(out / "initial_points.png")
    aligned_targets(out / "aligned_targets.png")
    found = {}
    for run in args.run:
        if (pathlib.Path(run) / "last.pt").exists():
            model = checkpoints.load_model(run)
            found[model.config.model] = model, sets.open_val(model.config, model.categories)
    if "dac" in found:
        layers_of_a_query(*found["dac"], out / "layers.png")
        gathering(*found["dac"], out / "gathering.png")
        features_in_a_plane(*found["dac"], out / "features.png")
        assignments(*found["dac"], out / "assignments.png")
        chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
        if chromium:
            explorer(*found["dac"], out / "explorer.png", chromium)
    if {"conditional", "decoupled"} <= found.keys():
        (plain, dataset), (decoupled, _) = found["conditional"], found["decoupled"]
        branches(plain, decoupled, dataset, out / "branches.png")
    for name in sorted(p.name for p in out.glob("*.png")):
        print(f"{out / name}: {(out / name).stat().st_size / 1000:.0f} KB")
    missing = [f"`{how}`" for kind, how in NEEDED.items() if kind not in found]
    if missing:
        sys.exit(f"pictures.py: some pictures need a run that is not there: make it by "
                 f"{' and '.join(missing)}, or name it with --run")


if __name__ == "__main__":
    main()
