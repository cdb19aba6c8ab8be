"""Boxes: formats, overlaps, the refinement step [Deformable DETR App. A.4], and sine embeddings."""
import math

import pytest
import torch
import torchvision.ops as ops
from torch.testing import assert_close

from detr_min import boxes
from helpers import EXACT, f64


def random_boxes(n, seed):
    """n cxcywh boxes inside the image, of sides 0.05 to 0.5, float64."""
    g = torch.Generator().manual_seed(seed)
    size = 0.05 + 0.45 * torch.rand(n, 2, generator=g, dtype=torch.float64)
    centre = size / 2 + (1 - size) * torch.rand(n, 2, generator=g, dtype=torch.float64)
    return torch.cat([centre, size], dim=1)


def test_formats_worked_by_hand():
    box = torch.tensor([[0.5, 0.4, 0.2, 0.6]])          # centre (.5, .4), 0.2 wide, 0.6 high
    corners = torch.tensor([[0.4, 0.1, 0.6, 0.7]])      # .5 - .1, .4 - .3, .5 + .1, .4 + .3
    assert_close(boxes.to_xyxy(box), corners)
    assert_close(boxes.to_cxcywh(corners), box)


def test_formats_are_inverse_for_any_leading_shape():
    some = random_boxes(12, seed=0).reshape(3, 4, 4)
    assert_close(boxes.to_cxcywh(boxes.to_xyxy(some)), some, **EXACT)


def test_iou_and_giou_worked_by_hand():
    a = torch.tensor([[0.25, 0.25, 0.5, 0.5]])          # the top left quarter, x and y in 0 .. .5
    b = torch.tensor([[0.5, 0.25, 0.5, 0.5],            # half a box to the right: x in .25 .. .75
                      [0.75, 0.75, 0.5, 0.5],           # the bottom right quarter: they touch
                      [0.25, 0.25, 0.5, 0.25]])         # same centre, half the height
    # overlap 1/8 of 1/4 + 1/4 - 1/8 = 3/8; nothing; 1/8 of 1/4
    assert_close(boxes.iou(a, b), torch.tensor([[1 / 3, 0, 1 / 2]]))
    # hull: .75 x .5, all covered; 1 x 1, of which half is not covered; a itself
    assert_close(boxes.giou(a, b), torch.tensor([[1 / 3, -1 / 2, 1 / 2]]))
    assert_close(boxes.paired_iou(a.expand(3, 4), b), torch.tensor([1 / 3, 0, 1 / 2]))


def test_iou_and_giou_by_counting_pixels():
    """[Generalized IoU, CVPR 2019, Alg. 1] on boxes whose edges lie on a grid of 20 x 30 pixels."""
    g = torch.Generator().manual_seed(1)
    x = torch.randint(0, 31, (60, 2), generator=g).sort(1).values
    y = torch.randint(0, 21, (60, 2), generator=g).sort(1).values
    keep = (x[:, 0] < x[:, 1]) & (y[:, 0] < y[:, 1])
    corners = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)[keep][:12]
    boxes_xyxy = corners.double() / torch.tensor([30, 20, 30, 20])

    def pixels(x1, y1, x2, y2):
        return {(i, j) for i in range(x1, x2) for j in range(y1, y2)}

    iou, giou = torch.zeros(2, 12, 12, dtype=torch.float64)
    for i, a in enumerate(corners.tolist()):
        for j, b in enumerate(corners.tolist()):
            both, either = pixels(*a) & pixels(*b), pixels(*a) | pixels(*b)
            hull = pixels(min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
            iou[i, j] = len(both) / len(either)
            giou[i, j] = iou[i, j] - len(hull - either) / len(hull)
    assert 0 < (iou == 0).sum() < 132 and (giou < 0).any()              # near ones and far ones
    some = boxes.to_cxcywh(boxes_xyxy)
    assert_close(boxes.iou(some, some), iou, **EXACT)
    assert_close(boxes.giou(some, some), giou, **EXACT)


def test_paired_iou_is_the_diagonal():
    a, b = random_boxes(40, seed=2), random_boxes(40, seed=3)
    expected = ops.box_iou(boxes.to_xyxy(a), boxes.to_xyxy(b)).diagonal()
    assert (expected == 0).any() and (expected > 0).any()
    assert_close(boxes.paired_iou(a, b), expected, **EXACT)


def test_giou_tells_near_from_far_where_iou_does_not():
    here = torch.tensor([[0.1, 0.5, 0.1, 0.2]])
    away = torch.tensor([[0.3, 0.5, 0.1, 0.2], [0.6, 0.5, 0.1, 0.2], [0.9, 0.5, 0.1, 0.2]])
    assert_close(boxes.iou(here, away), torch.zeros(1, 3))
    found = boxes.giou(here, away)
    assert (found.diff() < 0).all(), f"the farther, the lower: {found.tolist()}"


def test_overlaps_without_objects():
    some, none = random_boxes(5, seed=4), torch.zeros(0, 4, dtype=torch.float64)
    assert boxes.iou(some, none).shape == boxes.giou(some, none).shape == (5, 0)
    assert boxes.paired_iou(none, none).shape == (0,)


def test_refine_worked_by_hand():
    """[Deformable DETR App. A.4]"""
    # logit(.5) = 0 and sigmoid(log 3) = .75; logit(.25) = -log 3 and sigmoid(0) = .5
    # logit(.2) = -log 4, + log 4 = 0; logit(.5) - log 4 = logit(.2)
    ref = torch.tensor([[0.5, 0.25, 0.2, 0.5]])
    delta = torch.tensor([[math.log(3), math.log(3), math.log(4), -math.log(4)]])
    assert_close(boxes.refine(ref, delta), torch.tensor([[0.75, 0.5, 0.5, 0.2]]))


def test_refine_of_a_point_takes_the_size_from_delta_alone():
    point = torch.tensor([[0.5, 0.25]])
    delta = torch.tensor([[math.log(3), math.log(3), -math.log(4), math.log(4)]])
    assert_close(boxes.refine(point, delta), torch.tensor([[0.75, 0.5, 0.2, 0.8]]))


def test_refine_by_definition():
    g = torch.Generator().manual_seed(5)
    ref = random_boxes(20, seed=6)
    delta = 2 * torch.randn(20, 4, generator=g, dtype=torch.float64)
    for size in (4, 2):                                                     # boxes, then points
        expected = torch.zeros(20, 4, dtype=torch.float64)
        for i in range(20):
            for j in range(4):
                start = math.log(ref[i, j] / (1 - ref[i, j])) if j < size else 0
                expected[i, j] = 1 / (1 + math.exp(-(start + delta[i, j])))
        assert_close(boxes.refine(ref[:, :size], delta), expected, **EXACT)


def test_refine_adds_up():
    """Two small steps are one large step, and no step is none: what makes it a chain of layers."""
    ref, g = random_boxes(20, seed=7), torch.Generator().manual_seed(8)
    first, second = torch.randn(2, 20, 4, generator=g, dtype=torch.float64)
    assert_close(boxes.refine(boxes.refine(ref, first), second), boxes.refine(ref, first + second))
    assert_close(boxes.refine(ref, torch.zeros_like(ref)), ref, **EXACT)


def test_refine_sends_gradient_to_reference_and_delta():
    """At delta 0 the answer is the reference, and d sigmoid / d logit = r (1 - r).

    The decoders detach references themselves, where they want it.
    """
    ref, delta = f64(0.5, 0.25, 0.2, 0.4).requires_grad_(), f64(0, 0, 0, 0).requires_grad_()
    boxes.refine(ref, delta).sum().backward()
    assert_close(ref.grad, f64(1, 1, 1, 1))
    assert_close(delta.grad, f64(1 / 4, 3 / 16, 4 / 25, 6 / 25))


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_refine_can_leave_the_border(edge):
    ref = torch.tensor([[edge, 0.5, edge, 0.5]])
    moved = boxes.refine(ref, torch.full((1, 4), math.log(1e5 - 1) * (1 if edge == 0 else -1)))
    # logit(1e-5) = -log(1e5 - 1); float32 keeps 1 - 1e-5 to 6e-8, its logit therefore to 6e-3
    assert_close(moved[:, ::2], torch.full((1, 2), 0.5), atol=2e-3, rtol=0)


# Sine embeddings [Attention Is All You Need 3.5]


def sine_by_definition(x, d):
    """PE(x)[2i] = sin(2 pi x / T^(2i/d)), PE(x)[2i+1] = cos of the same, for one number."""
    out = torch.zeros(d, dtype=torch.float64)
    for channel in range(d):
        angle = 2 * math.pi * x / 10000 ** (2 * (channel // 2) / d)
        out[channel] = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
    return out


def test_sine_worked_by_hand():
    # d = 4: wavelengths 1 and 10000^(2/4) = 100. x = 1/4: angles pi/2 and pi/200
    slow = math.pi / 200
    expected = f64(1, 0, math.sin(slow), math.cos(slow))
    assert_close(boxes.sine(f64(0.25)[0], 4), expected, **EXACT)


def test_sine_by_definition():
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([sine_by_definition(number, 12) for number in x.flatten().tolist()])
    assert_close(boxes.sine(x, 12), expected.reshape(3, 5, 12), **EXACT)


def test_a_shift_is_the_same_everywhere():
    """Why sines: the inner product of two positions depends on their distance alone."""
    x = f64(0.1, 0.5, 0.9)
    products = (boxes.sine(x, 16) * boxes.sine(x + 0.07, 16)).sum(-1)
    assert_close(products, products[:1].expand(3), **EXACT)
    assert products[0] < 8 - 1e-3               # at distance 0 it is d/2 = 8


def test_points_have_the_y_half_first():
    point = f64([0.2, 0.7])                                     # x = .2, y = .7
    expected = torch.cat([sine_by_definition(0.7, 8), sine_by_definition(0.2, 8)])
    assert_close(boxes.embed_points(point, 16)[0], expected, **EXACT)
