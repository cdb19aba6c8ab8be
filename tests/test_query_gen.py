"""Task-aware queries: what a box holds [SD Eq. 4] and which points of it matter [SD Eq. 5]."""
import math

import pytest
import torch
import torchvision.ops as ops
from torch.testing import assert_close

from detr_min import boxes, query_gen
from helpers import EXACT, f64, memory_of, on_paper, padded_memory, random, shaken

D = 16


# --- region features [SD Eq. 4] -------------------------------------------------------------------

def test_region_features_by_hand():
    """[SD Eq. 4]  On a map that says its own column, a box 7 columns wide reads the 7."""
    columns = torch.arange(16.).double().expand(1, 1, 8, 16)            # value = column number
    box = f64(8.5 / 16, .5, 7 / 16, 7 / 8)[None, None]      # columns 5 to 12: 7 cells wide
    found = query_gen.region_features(memory_of([columns]), box)
    # bin i is one cell wide, its centre is 5 + i + .5 cells from the left: cell number 5 + i
    assert_close(found, f64(5, 6, 7, 8, 9, 10, 11).expand(1, 1, 7, 7), **EXACT)


def test_region_features_of_a_constant_map_are_the_constant():
    """[SD Eq. 4]"""
    level = f64(*range(D))[None, :, None, None].expand(1, D, 32, 32)
    ref_boxes = f64([.5, .5, .2, .3], [.4, .6, .7, .6])[None]
    found = query_gen.region_features(memory_of([level]), ref_boxes)
    assert_close(found, f64(*range(D))[None, :, None, None].expand(2, D, 7, 7))


def test_region_features_are_roi_align_box_by_box(generator):
    """[SD Eq. 4]  torchvision's RoIAlign, box by box, in cells of the image without padding."""
    level, is_pad = random(2, D, 32, 40), torch.zeros(2, 32, 40, dtype=torch.bool)
    is_pad[1, 24:], is_pad[1, :, 20:] = True, True              # 24 x 20 of the second are image
    ref_boxes = torch.rand(2, 12, 4, generator=generator, dtype=torch.float64) * .5 + .3
    found = query_gen.region_features(memory_of([level], [is_pad]), ref_boxes)
    expected = []
    for b, (height, width) in enumerate([(32, 40), (24, 20)]):
        for cx, cy, w, h in ref_boxes[b].tolist():
            corners = f64(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            in_cells = corners * f64(width, height, width, height)
            image = level[b:b + 1, :, :height, :width]
            expected.append(ops.roi_align(image, [in_cells[None]], 7, aligned=True))
    assert_close(found, torch.cat(expected), **EXACT)


# --- points [SD Eq. 5] ----------------------------------------------------------------------------

def test_points_worked_by_hand():
    """[SD Eq. 5]  Every weight is 1 but the last layer's; one point, D = 4, two cells not 0."""
    predict = on_paper(query_gen.PointPredictor(4, num_points=1))
    predict.net[-1].weight.data = (f64([1], [-1]) * math.log(3) / 128).expand(2, 8).clone()  # x, y
    features = torch.zeros(1, 4, 7, 7).double()
    features[0, :, 2, 3] = f64(.1, .2, .3, -.35)            # the convolution adds channels: .25
    features[0, :, 6, 0] = f64(5, 0, 0, -9)                 # -4, and ReLU makes it 0
    # layers of 4, 8 and 8: each adds up the one before, .25, 4 * .25 = 1, 8 * 1 = 8
    # the last: 8 * 8 * log 3 / 128 = log 3 / 2;  tanh(log 3 / 2) = (3 - 1)/(3 + 1) = .5
    assert_close(predict(features), f64([[.5, -.5]]), **EXACT)


def test_points_start_on_a_ring():
    """[SD Eq. 5]  Whatever the box holds, point m starts half way to the rim at 2 pi m / M."""
    points = query_gen.PointPredictor(D, num_points=4)(torch.randn(3, D, 7, 7))
    ring = torch.tensor([[.5, 0], [0, .5], [-.5, 0], [0, -.5]])
    assert_close(points, ring.expand(3, 4, 2), atol=1e-6, rtol=0)


def test_points_by_definition(generator):
    """[SD Eq. 5]  R_SP = MLP(ConvNet(F_R)), then tanh: the layers written out."""
    predict = shaken(query_gen.PointPredictor(D, num_points=5), generator)
    features = torch.randn(3, D, 7, 7, generator=generator, dtype=torch.float64)
    conv, *mlp = [m for m in predict.net if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    x = torch.einsum("pdyx,cd->pcyx", features, conv.weight[:, :, 0, 0]) + conv.bias[:, None, None]
    x = x.clamp(min=0).flatten(1)
    for linear in mlp[:-1]:
        x = (x @ linear.weight.T + linear.bias).clamp(min=0)
    x = x @ mlp[-1].weight.T + mlp[-1].bias
    points = predict(features)
    assert_close(points, torch.tanh(x).reshape(3, 5, 2), **EXACT)
    assert points.flatten(1).std(0).min() > 0               # they depend on what the box holds


@pytest.mark.parametrize("scale", [0, 1, 1e6])
def test_points_stay_inside_the_box_for_any_input(generator, scale):
    """[SD Eq. 5]"""
    predict = shaken(query_gen.PointPredictor(D), generator, by=2)
    points = predict(scale * torch.randn(20, D, 7, 7, generator=generator).double())
    assert points.abs().max() <= 1 and points.shape == (20, 8, 2)


# --- from points to queries, after [SD Eq. 5] -----------------------------------------------------

def test_points_in_the_centre_read_the_centre(generator):
    """After [SD Eq. 5].  R_SP = 0: content is the middle cell of 7 x 7, position is PE(centre)."""
    features = torch.randn(2, D, 7, 7, generator=generator, dtype=torch.float64)
    ref_boxes = f64([.3, .6, .2, .4], [.5, .2, .1, .1])
    content, pos = query_gen.points_to_query(features, torch.zeros(2, 8, 2).double(), ref_boxes)
    assert_close(content, features[:, :, 3, 3], **EXACT)
    assert_close(pos, boxes.embed_points(ref_boxes[:, :2], D), **EXACT)


def test_points_to_query_by_hand():
    """After [SD Eq. 5].  x first. On a map that says its column, x = 4/7 is column 5."""
    columns = torch.arange(7.).double().expand(1, D, 7, 7)
    points = f64([4 / 7, 0], [-2 / 7, 6 / 7])[None]         # columns 3 + 2 and 3 - 1
    content, pos = query_gen.points_to_query(columns, points, f64(.5, .5, .7, .35)[None])
    assert_close(content, torch.full((1, D), 3.5).double(), **EXACT)     # (5 + 2) / 2
    # in the image: .5 + 4/7 * .7/2 = .7 and .5 - 2/7 * .7/2 = .4;  y: .5 and .5 + 6/7 * .35/2 = .65
    expected = (boxes.embed_points(f64(.7, .5), D) + boxes.embed_points(f64(.4, .65), D)) / 2
    assert_close(pos[0], expected, **EXACT)


def test_points_to_query_by_definition(generator):
    """After [SD Eq. 5].  Bilinear between the centres of 7 x 7 cells, constant beyond them."""
    features = torch.randn(2, D, 7, 7, generator=generator, dtype=torch.float64)
    points = torch.rand(2, 3, 2, generator=generator, dtype=torch.float64) * 2 - 1
    points[0, 0] = f64(-1, 1)                                                   # a corner
    ref_boxes = torch.rand(2, 4, generator=generator, dtype=torch.float64)
    content, pos = query_gen.points_to_query(features, points, ref_boxes)
    for p in range(2):
        expected, expected_pos = torch.zeros(D).double(), torch.zeros(D).double()
        for x, y in points[p].tolist():
            column, row = min(max((x + 1) * 3.5 - .5, 0), 6), min(max((y + 1) * 3.5 - .5, 0), 6)
            c, r = min(int(column), 5), min(int(row), 5)
            right, down = column - c, row - r
            f = features[p]
            upper = (1 - right) * f[:, r, c] + right * f[:, r, c + 1]
            lower = (1 - right) * f[:, r + 1, c] + right * f[:, r + 1, c + 1]
            expected += ((1 - down) * upper + down * lower) / 3
            cx, cy, w, h = ref_boxes[p].tolist()
            expected_pos += boxes.embed_points(f64(cx + x * w / 2, cy + y * h / 2), D) / 3
        assert_close(content[p], expected, **EXACT)
        assert_close(pos[p], expected_pos, **EXACT)


def spread_after_training(predict, features, steps=10):
    """Least distance between two points of a box after a few steps of AdamW on some loss."""
    optimizer = torch.optim.AdamW(predict.parameters(), lr=3e-3)
    ref_boxes = torch.tensor([.5, .5, .6, .6]).expand(len(features), 4)
    for _ in range(steps):
        content, pos = query_gen.points_to_query(features, predict(features), ref_boxes)
        optimizer.zero_grad()
        ((content - 1) ** 2).sum().add(pos.sum()).backward()
        optimizer.step()
    points = predict(features).detach()
    return torch.stack([torch.pdist(p).min() for p in points]).min().item()


def test_points_stay_apart_and_where_they_start_equal_stay_equal(generator):
    """[SD Eq. 5]  The trap: in a mean, equal points get equal gradients.

    A zero initialisation never moves them apart; a ring need not.
    """
    features = torch.randn(4, D, 7, 7, generator=generator)
    ring, zero = query_gen.PointPredictor(D), query_gen.PointPredictor(D)
    zero.net[-1].bias.data.zero_()
    before = zero(features).detach()
    assert spread_after_training(ring, features) > .1       # at first 2 * .5 * sin(pi/8) = .38
    assert spread_after_training(zero, features) == 0
    assert (zero(features) - before).abs().max() > 1e-2             # and yet it did learn


# --- the whole [SD Eq. 4-5] -----------------------------------------------------------------------

WIDTH = 32


def one_level():
    """A single map of 6 x 8 cells; of the second image 3 x 5 are image."""
    return padded_memory(WIDTH, [(6, 8)])


def task_aware_queries(generator):
    return shaken(query_gen.TaskAwareQueries(5, WIDTH, 3, num_sets=2), generator)


def best_cells(proposals, is_pad):
    """The 5 cells of highest score of any class, best first, padding left out. [(5,)]"""
    for logits, pad in zip(proposals.logits.tolist(), is_pad.tolist()):
        cells = [cell for cell in range(len(pad)) if not pad[cell]]
        yield sorted(cells, key=lambda cell: -max(logits[cell]))[:5]


def test_two_tasks_get_two_queries_from_one_anchor(generator):
    """[SD Eq. 4-5]  One set a task, by its own predictor, from the same features and box.

    R_box are the boxes of the most object-like cells; the reference point is their centre.
    """
    memory, queries = one_level(), task_aware_queries(generator)
    out = queries(memory)
    assert out.content.shape == out.pos.shape == (2, 2, 5, WIDTH)
    anchors = torch.stack([out.proposals.boxes[b, cells] for b, cells in enumerate(
        best_cells(out.proposals, memory.is_pad))]).detach()                            # (2, 5, 4)
    assert_close(out.ref_points, anchors[..., :2], atol=0, rtol=0)
    features = query_gen.region_features(memory, anchors)
    for task in range(2):
        points = queries.predictors[task](features)
        content, pos = query_gen.points_to_query(features, points, anchors.flatten(0, 1))
        assert_close(out.content[task].flatten(0, 1), content, **EXACT)
        assert_close(out.pos[task].flatten(0, 1), pos, **EXACT)
        assert_close(out.spatial[task], out.pos[task], atol=0, rtol=0)
    assert (out.content[0] - out.content[1]).abs().max() > 1e-2


def test_anchors_get_no_gradient_points_and_features_do(generator):
    """[SD Eq. 4-5]  The decoder's losses teach where to look in a box, not where the box is."""
    memory, queries = one_level(), task_aware_queries(generator)
    memory = memory._replace(tokens=memory.tokens.clone().requires_grad_())
    out = queries(memory)
    assert not out.ref_points.requires_grad, "the anchors have a gradient"
    (out.content.square().sum() + out.pos.square().sum()).backward()
    assert all(p.grad is None for p in queries.mini_detector.parameters())
    for predictor in queries.predictors:
        for name, p in predictor.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, (
                f"the points learn nothing: {name} of their predictor has gradient {p.grad}")
    assert memory.tokens.grad.abs().max() > 0


def test_fewer_cells_than_queries(generator):
    """[SD Eq. 4]  The smaller image of the batch has 2 cells; its other queries have none."""
    memory = padded_memory(WIDTH, [(3, 3)])
    out = query_gen.TaskAwareQueries(50, WIDTH, 3, num_sets=2).double()(memory)
    assert out.content.shape == (2, 2, 50, WIDTH) and out.ref_points.shape == (2, 50, 2)
    assert len(out.ref_points[1, :2].unique(dim=0)) == 2                # none of them twice
    assert (out.ref_points[1, 2:] == 1).all()
    assert out.content.isfinite().all() and out.pos.isfinite().all()
