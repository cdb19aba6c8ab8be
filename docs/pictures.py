"""The pictures of docs/pictures.md, drawn by the code that they explain.

    OMP_NUM_THREADS=1 python train.py                          # runs/dac_shapes, 3 CPU-minutes
    OMP_NUM_THREADS=1 python train.py --model decoupled        # runs/decoupled_shapes, the same
    python docs/pictures.py                                    # both runs -> docs/pictures/*.png
    python docs/pictures.py --run MY_DAC_RUN MY_DECOUPLED_RUN  # of other folders

Two pictures need no run, and are drawn in any case. Every number in a title is measured here.
"""
import argparse
import copy
import itertools
import pathlib
import sys

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from detr_min import attention, boxes, criterion, matcher, tal_loss  # noqa: E402
from detr_min.data import transforms  # noqa: E402
from detr_min.run import checkpoints, draw, evaluate, sets  # noqa: E402

WIDTH = 800 / draw.DPI                  # inches
NUM_IMAGES = 200                        # validation images that a title's averages are over
NEEDED = {                              # model: how to make a run of it
    "dac": "python train.py", "decoupled": "python train.py --model decoupled"}


def save(figure, out_png):
    """A small png: 128 colours at most, no empty rows above and below."""
    draw.save(figure, out_png)
    with Image.open(out_png) as file:
        picture = file.convert("RGB")
    _, top, _, bottom = ImageOps.invert(picture).getbbox()
    picture = picture.crop((0, max(top - 8, 0), picture.width, min(bottom + 8, picture.height)))
    picture.quantize(128, dither=Image.Dither.NONE).save(out_png, optimize=True)
    return figure


def panels(columns, height, **more):
    """A Figure 800 px wide and its axes in a row."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, **more)[0]


def picture_axes(columns, height, image):
    """The same, each showing a normalised image (3, h, w) in grey, for colours to stand out."""
    figure, row = panels(columns, height)
    std, mean = (torch.tensor(numbers)[:, None, None] for numbers in (transforms.STD, transforms.MEAN))
    grey = (image * std + mean).clamp(0, 1).mean(0, keepdim=True).expand(3, -1, -1)
    for axes in row:
        axes.set_axis_off()
        draw.show(axes, (255 * (0.35 + 0.65 * grey)).byte())
    return figure, row


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
        memory = model.encoder(model.projections(model.backbone(image[None])), is_pad)
        queries = model.queries(memory)
        return *model.decoder.both_decoders(queries, memory), queries


def initial_points(out_png, num_heads=8, num_points=4):
    """(a) Where a new DeformableAttention looks: around a point, and inside a box."""
    side = 12
    module = attention.DeformableAttention(num_heads * 8, num_heads, 1, num_points)
    cells = torch.zeros(1, side * side, num_heads * 8)
    memory = attention.Memory(cells, cells[..., 0].bool(), [(side, side)], torch.ones(1, 1, 2))
    figure, row = panels(2, 3.9)
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
    return save(figure, out_png)


def zoom(axes, box_xyxy, image, share=0.35):
    """Show a box in pixels with some of what is around it, as a square."""
    x1, y1, x2, y2 = box_xyxy.tolist()
    half = (0.5 + share) * max(x2 - x1, y2 - y1)
    axes.set(xlim=((x1 + x2) / 2 - half, (x1 + x2) / 2 + half),
             ylim=((y1 + y2) / 2 + half, (y1 + y2) / 2 - half))


def look(axes, image, reference, points, weights, answer):
    """Points (P, 2) in [0, 1], larger and lighter the more they weigh; dashed: the reference."""
    axes.scatter(*pixels(points, image).T, 8 + 150 * weights, weights, cmap="plasma",
                 edgecolors="black", linewidths=0.3, zorder=4)
    draw.frame(axes, pixels(reference, image), "black", "--")
    draw.frame(axes, pixels(answer, image), draw.colour_of(0), "-")


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
    is_pad = torch.zeros(image.shape[1:], dtype=torch.bool)
    seen = []
    for depth in range(1, len(model.decoder.layers) + 1):       # its last layer is layer `depth`
        shallow = copy.deepcopy(model)
        shallow.decoder.layers = shallow.decoder.layers[:depth]
        seen.append(draw.last_looks(shallow, image, is_pad))
    [gt] = largest(target, 1)
    query = matched(*seen[-1][:2], target)[gt]
    figure, row = picture_axes(len(seen), 3.1, image)
    for layer, (axes, (logits, pred_boxes, looks)) in enumerate(zip(row, seen), start=1):
        reference, points, weights = (t[query] for t in looks["cross_attn"])
        before, after = (boxes.iou(box[None], target.boxes[gt, None]).item()
                         for box in (reference, pred_boxes[query]))
        look(axes, image, reference, points, weights, pred_boxes[query])
        zoom(axes, pixels(target.boxes[gt], image), image)
        score = logits[query, target.labels[gt]].sigmoid()
        axes.set_title(f"layer {layer}: IoU {before:.2f} to {after:.2f}\n"
                       f"{len(points)} points, score {score:.2f}", fontsize=9)
    return save(figure, out_png)


def gathering(model, dataset, out_png, index=5, num_images=NUM_IMAGES, near=0.5, sure=0.3):
    """(c) The same queries before the decoder, after the C-Decoder and after the O-Decoder.

    Drawn are those that overlap an image's largest object by IoU >= `near` after the C-Decoder. The
    heading has means over all objects: the queries that reach that IoU, and those of them that give
    the object's class a score of at least `sure`.
    """
    counts, objects, stages = torch.zeros(2, 3), 0, ("before", "C-Decoder", "O-Decoder")

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
    chosen = (overlaps[1] >= near).nonzero()[:, 0]
    figure, row = picture_axes(3, 3.6, image)
    for axes, name, (pred_boxes, scores), overlap in zip(row, stages, shown, overlaps):
        draw.frame(axes, pixels(target.boxes[gt], image), "black", "--")
        for number, query in enumerate(chosen):
            draw.frame(axes, pixels(pred_boxes[query], image), draw.colour_of(number), "-")
        listed = " ".join(f"{s:.2f}"[1:] for s in scores[chosen, gt].sort().values.flip(0)[:6])
        axes.set_title(f"{name}: {(overlap[chosen] >= near).sum()} of {len(chosen)} near\n" + (
            f"scores {listed}" if scores.any() else "the encoder's boxes"), fontsize=8.5)
        zoom(axes, pixels(target.boxes[gt], image), image)
    figure.suptitle(
        f"queries near an object, mean of {objects} objects: {a:.1f} before, {b:.1f} after the "
        f"C-, {c:.1f} after the O-Decoder;\nof these with a score of {sure:g} for its class: "
        f"{sure_c:.1f} after the C-, {sure_o:.1f} after the O-Decoder", fontsize=9)
    return save(figure, out_png)


def assignments(model, dataset, out_png, index=5):
    """(d) Which queries are taught by which object: one-to-one, and one-to-many."""
    image, target = dataset[index]
    o, c, _ = answers(model, image)
    figure, row = picture_axes(2, 3.7, image)
    cost = matcher.match_cost(o[-1].logits[0], o[-1].boxes[0], target.labels, target.boxes)
    quality = matcher.match_quality(c[-1].logits[0].sigmoid(), c[-1].boxes[0], target.labels,
                                    target.boxes)
    for axes, name, pred_boxes, (query_idx, gt_idx) in (
            (row[0], "one-to-one, O-Decoder", o[-1].boxes[0], matcher.one_to_one(cost)),
            (row[1], "one-to-many, C-Decoder", c[-1].boxes[0], matcher.one_to_many(quality))):
        centres = pixels(pred_boxes[:, :2], image)
        axes.scatter(*centres.T, 7, "white", edgecolors="black", linewidths=0.5)
        for box, colour in zip(target.boxes, map(draw.colour_of, range(len(target.boxes)))):
            draw.frame(axes, pixels(box, image), colour, "--")
        for query, gt in zip(query_idx.tolist(), gt_idx.tolist()):
            colour = draw.colour_of(gt)
            draw.frame(axes, pixels(pred_boxes[query], image), colour, "-")
            axes.plot(*centres[query], "o", color=colour, markersize=5, markeredgecolor="black")
        counts = " ".join(str((gt_idx == gt).sum().item()) for gt in range(len(target.labels)))
        axes.set_title(f"{name}: {len(gt_idx)} of {len(centres)} queries\n"
                       f"an object has {counts}", fontsize=9)
    return save(figure, out_png)


def branches(model, dataset, out_png, index=2, num_images=NUM_IMAGES):
    """(e) Where the last layer's two branches look, for an image's two largest objects.

    The heading has means over all matched queries, each point times its attention weight: the
    distance to the object's centre in half sizes (1 = at its edge), and the share outside its box.
    """
    sums, pairs = {"cls": torch.zeros(2), "loc": torch.zeros(2)}, 0
    is_pad = torch.zeros(dataset[index][0].shape[1:], dtype=torch.bool)
    for i in range(min(num_images, len(dataset))):
        image, target = dataset[i]
        logits, pred_boxes, looks = draw.last_looks(model, image, is_pad)
        query_idx, box = matched(logits, pred_boxes, target), target.boxes[:, None]     # (M, 1, 4)
        pairs += len(query_idx)
        for task, total in sums.items():
            _, points, weights = (t[query_idx] for t in looks[f"{task}.cross_attn"])
            weights = weights / weights.sum(-1, keepdim=True)                       # (M, H*L*K)
            far = ((points - box[..., :2]) / (box[..., 2:] / 2)).abs().amax(-1)     # (M, H*L*K)
            total += torch.stack([(weights * far).sum(), (weights * (far > 1)).sum()])
    image, target = dataset[index]
    logits, pred_boxes, looks = draw.last_looks(model, image, is_pad)
    query_idx, objects = matched(logits, pred_boxes, target), largest(target, 2)
    figure, row = picture_axes(2 * len(objects), 2.9, image)
    for axes, (gt, task) in zip(row, itertools.product(objects, sums)):
        reference, points, weights = (t[query_idx[gt]] for t in looks[f"{task}.cross_attn"])
        look(axes, image, reference, points, weights, pred_boxes[query_idx[gt]])
        zoom(axes, pixels(target.boxes[gt], image), image)
        axes.set_title(draw.BRANCHES[task], fontsize=9)
    figure.suptitle("\n".join(
        f"{draw.BRANCHES[task]}: points {far / pairs:.2f} half sizes from the centre, "
        f"{out / pairs:.0%} of the weight outside the box" for task, (far, out) in sums.items()),
        fontsize=9)
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

    def pull(loss, wanted):
        logits = steps.logit()[:, None].requires_grad_()
        return -torch.autograd.grad(loss(logits, wanted[:, None]), logits)[0][:, 0]
    focal = pull(criterion.focal_loss, torch.ones_like(steps))
    for u, colour in ((0.5, "tab:green"), (0.7, "tab:orange"), (0.9, "tab:blue")):
        wanted = tal_loss.aligned_target(steps, torch.full_like(steps, u)).clamp(min=0.01)
        ours = pull(tal_loss.tal_loss, wanted)
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


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", metavar="RUN", help="run folders on shapes",
                        default=[ROOT / "runs" / "dac_shapes", ROOT / "runs" / "decoupled_shapes"])
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
        assignments(*found["dac"], out / "assignments.png")
    if "decoupled" in found:
        branches(*found["decoupled"], out / "branches.png")
    for name in sorted(p.name for p in out.glob("*.png")):
        print(f"{out / name}: {(out / name).stat().st_size / 1000:.0f} KB")
    missing = [f"`{how}`" for kind, how in NEEDED.items() if kind not in found]
    if missing:
        sys.exit(f"pictures.py: some pictures need a run that is not there: make it by "
                 f"{' and '.join(missing)} (3 CPU-minutes each), or name it with --run")


if __name__ == "__main__":
    main()
