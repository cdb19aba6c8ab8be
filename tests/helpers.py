"""What several test files build on: random weights, memories and queries, small data sets."""
import json
import math

import numpy as np
import torch
from PIL import Image

from detr_min import attention, boxes, proposals, proposals_conditional
from detr_min.data import dataset, transforms

EXACT = dict(atol=1e-12, rtol=0)        # what float64 leaves of two ways to the same number


def f64(*numbers):
    """Numbers, or rows of numbers, in float64."""
    return torch.tensor(numbers, dtype=torch.float64)


def random(*shape, seed=0):
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomise(module, seed=0):
    """Random in every parameter, in float64: zeros and ones hide mistakes."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double()


def shaken(module, generator, by=0.2):
    """In float64, every parameter off its initial value: no zeros, no symmetry to hide behind."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator).double()
    return module


def on_paper(module):
    """Every weight 1, every bias 0, no norms: in width 1, a module to follow with a pencil."""
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, torch.nn.LayerNorm):
                setattr(part, name, torch.nn.Identity())
    for name, parameter in module.named_parameters():
        torch.nn.init.constant_(parameter, 0 if "bias" in name else 1)
    return module.double()


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def iou_and_giou(a, b):
    """Of two cxcywh boxes as python floats, from areas."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
        (x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (a, b))
    both = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    either = a[2] * a[3] + b[2] * b[3] - both
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return both / either, both / either - (hull - either) / hull


def l1_distance(a, b):
    return sum(abs(x - y) for x, y in zip(a, b))


def memory_of(levels, pads=None):
    """A Memory of feature levels [(B, D, h, w), ...]; pads [(B, h, w), ...], True = padding."""
    if pads is None:
        pads = [torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.bool) for x in levels]
    ratios = [torch.stack([(~pad[:, 0]).double().mean(-1), (~pad[:, :, 0]).double().mean(-1)], -1)
              for pad in pads]                                                          # (x, y)
    return attention.Memory(torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1),
                            torch.cat([pad.flatten(1) for pad in pads], dim=1),
                            [tuple(x.shape[2:]) for x in levels],
                            torch.stack(ratios, dim=1).to(levels[0]))


def padded_memory(D, shapes=((4, 6), (2, 3)), B=2):
    """Random cells; of all images but the first, half the rows and a third of the columns are
    padding."""
    pads = [torch.zeros(B, h, w, dtype=torch.bool) for h, w in shapes]
    for pad, (h, w) in zip(pads, shapes):
        pad[1:, h // 2:], pad[1:, :, w * 2 // 3:] = True, True
    return memory_of([random(B, D, h, w, seed=i) for i, (h, w) in enumerate(shapes)], pads)


def some_queries(D, N, T=1, B=2, size=4):
    """Random queries in T sets; their references are boxes, or with size=2 points."""
    return proposals.Queries(random(T, B, N, D, seed=1), random(T, B, N, D, seed=2),
                             0.2 + 0.6 * random(B, N, size, seed=3).sigmoid(), proposals=None)


def nudge_query_0(run, queries, memory):
    """How far each query's last logits and box move when query 0's content is negated. (N,) each

    A constant added to it would not do: a layer norm takes that away again.
    """
    content = queries.content.clone()
    content[:, :, 0] *= -1
    before, after = run(queries, memory)[-1], run(queries._replace(content=content), memory)[-1]
    return [(a - b).abs().amax(dim=(0, 2)) for a, b in zip(after, before)]


def reordered(queries, order):
    """The same queries, in another order."""
    return proposals.Queries(queries.content[:, :, order], queries.pos[:, :, order],
                             queries.ref_boxes[:, order], None)


def two_pictures():
    """A red and a green rectangle in one image, a blue one in the other; 64 x 64 pixels.

    Returns images, is_pad, [Target], as a detector and its loss want them.
    """
    two, one = torch.tensor([[.3, .3, .4, .3], [.7, .75, .3, .4]]), torch.tensor([[.6, .4, .5, .6]])
    targets = [dataset.Target(torch.tensor([0, 1]), two, 0, (64, 64)),
               dataset.Target(torch.tensor([2]), one, 1, (64, 64))]
    images = torch.zeros(2, 3, 64, 64)
    for image, target in zip(images, targets):
        corners = (boxes.to_xyxy(target.boxes) * 64).round().int().tolist()
        for label, (x0, y0, x1, y1) in zip(target.labels, corners):
            image[label, y0:y1, x0:x1] = 2
    return images, torch.zeros(2, 64, 64, dtype=torch.bool), targets


def emptied(target):
    """A Target without its objects."""
    return target._replace(labels=target.labels[:0], boxes=target.boxes[:0])


def conditional_memory(D, shape=(4, 6)):
    """A padded_memory of one level, with random positions of its cells."""
    memory = padded_memory(D, [shape])
    return memory._replace(pos=random(*memory.tokens.shape, seed=3))


def conditional_queries(D, N):
    """Two sets of random queries for two images; nothing equal in them, no content zero."""
    points = torch.rand(2, N, 2, generator=torch.Generator().manual_seed(5),
                        dtype=torch.float64) * .6 + .2
    return proposals_conditional.Queries(*random(3, 2, 2, N, D, seed=4), points, None)


def annotation(id_, image_id, category_id, bbox, iscrowd=0):
    return {"id": id_, "image_id": image_id, "category_id": category_id, "bbox": bbox,
            "area": bbox[2] * bbox[3], "iscrowd": iscrowd}


# Four 60x40 images: 11 has a dog, a cat and a crowd of cats; 12 nothing; 13 a bird; 14 two cats.
# The ids have gaps and are not in order: cat 3 -> label 0, dog 7 -> 1, bird 90 -> 2.
GOOD = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40}
               for i in (11, 12, 13, 14)],
    "categories": [{"id": 90, "name": "bird"}, {"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    "annotations": [annotation(1, 11, 7, [6, 4, 30, 20]), annotation(2, 11, 3, [30, 10, 15, 20]),
                    annotation(3, 11, 3, [0, 0, 60, 40], iscrowd=1),
                    annotation(4, 13, 90, [1.5, 2.5, 12, 8]),
                    annotation(5, 14, 3, [10, 10, 9, 9]), annotation(6, 14, 3, [40, 5, 9, 30])],
}


def write_coco(root, coco, split="val", layout="{}"):
    """A COCO folder with a different random picture for each image."""
    name = layout.format(split)
    (root / name).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    text = coco if isinstance(coco, str) else json.dumps(coco)
    (root / "annotations" / f"instances_{name}.json").write_text(text)
    for image in GOOD["images"]:
        pixels = np.random.default_rng(image["id"]).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name / image["file_name"])
    return root


def to_pixels(picture):
    """A normalised image back to uint8 (h, w, 3)."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (transforms.MEAN, transforms.STD))
    return ((picture * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
