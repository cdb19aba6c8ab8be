"""The encoder's own detections [Deformable DETR App. A.4], and the queries that start from them."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detr_min import boxes, proposals
from detr_min.release import deformable
from helpers import EXACT, f64, padded_memory, randomise

D, C = 8, 3
BOTH = [proposals.TwoStageQueries, deformable.UnmixedTwoStageQueries]


def a_memory(**shape):
    return padded_memory(D, **shape)


# Heads


def test_box_head_moves_nothing_at_first():
    head = proposals.box_head(D)
    assert_close(head(torch.randn(5, D)), torch.zeros(5, 4))
    head = randomise(head)
    x = hidden = torch.randn(5, D).double()
    for layer in (0, 2):
        hidden = (hidden @ head[layer].weight.T + head[layer].bias).clamp(min=0)
    assert_close(head(x), hidden @ head[4].weight.T + head[4].bias, **EXACT)


@pytest.mark.parametrize("prior", [0.01, 0.2])
def test_class_head_starts_at_the_prior(prior):
    """[Focal Loss Sec. 3.3] bias = -log((1 - prior) / prior), so that sigmoid(bias) = prior."""
    head = proposals.class_head(D, C, prior)
    assert_close(head.bias, torch.full((C,), -math.log((1 - prior) / prior)))
    assert_close(head(torch.zeros(1, D)).sigmoid(), torch.full((1, C), prior))
    assert_close(proposals.class_head(D, C).bias.sigmoid(), torch.full((C,), 0.01))


# Anchors


def test_anchors_worked_by_hand():
    """[Deformable DETR App. A.4] (x, y, 0.05 * 2^l, 0.05 * 2^l)"""
    # image 0: cell (1, 2) of 4 x 6 has its centre at (2.5/6, 1.5/4), number 1 * 6 + 2 = 8
    # image 1 fills 4 of 6 columns and 2 of 4 rows: the same cell lies at (2.5/4, 1.5/2)
    # cell (0, 1) of 2 x 3 on level 1, number 24 + 1: (1.5/3, .5/2); of image 1, which fills
    # 2 columns and 1 row: (1.5/2, .5/1)
    anchor, is_good = proposals.anchors(a_memory())
    assert anchor.shape == (2, 30, 4) and is_good.shape == (2, 30)
    level_0 = [[2.5 / 6, 1.5 / 4, .05, .05], [2.5 / 4, 1.5 / 2, .05, .05]]
    level_1 = [[1.5 / 3, 0.5 / 2, .10, .10], [1.5 / 2, 0.5 / 1, .10, .10]]
    assert_close(anchor[:, 8], f64(*level_0), **EXACT)
    assert_close(anchor[:, 25], f64(*level_1), **EXACT)
    assert is_good[0].all()
    expected = [[1, 1, 1, 1, 0, 0]] * 2 + [[0] * 6] * 2
    assert is_good[1, :24].reshape(4, 6).int().tolist() == expected
    assert is_good[1, 24:].reshape(2, 3).int().tolist() == [[1, 1, 0], [0, 0, 0]]


def test_anchors_double_from_level_to_level():
    shapes = [(2, 2)] * 6
    anchor, is_good = proposals.anchors(a_memory(shapes=shapes, B=1))
    sizes = f64(.05, .1, .2, .4, .8, 1.6)
    assert_close(anchor[0, ::4, 2:], sizes[:, None].expand(6, 2), **EXACT)
    assert is_good[0].tolist() == [True] * 20 + [False] * 4         # 1.6 leaves (.01, .99)


def test_anchors_at_the_border_are_no_good():
    """100 cells in a row have their centres at .005, .015, ... .985, .995."""
    _, is_good = proposals.anchors(a_memory(shapes=[(1, 100)], B=1))
    assert is_good[0].tolist() == [False] + [True] * 98 + [False]
    _, is_good = proposals.anchors(a_memory(shapes=[(100, 1)], B=1))
    assert is_good[0].tolist() == [False] + [True] * 98 + [False]


# The mini-detector


def test_mini_detector_by_definition():
    """One linear layer and a norm, two heads; box = sigmoid(logit(anchor) + delta)."""
    net, memory = randomise(proposals.MiniDetector(D, C)), a_memory()
    net.box_head[-1].bias.data.fill_(-6)                    # a box head that pulls hard
    found = net(memory)
    anchor, is_good = proposals.anchors(memory)
    for b in range(2):
        for s in range(30):
            cell = memory.tokens[b, s] if is_good[b, s] else torch.zeros(D).double()
            cell = F.layer_norm(net.project.weight @ cell + net.project.bias, (D,),
                                net.norm.weight, net.norm.bias)
            is_pad = memory.is_pad[b, s]
            logits = torch.full((C,), -100.).double() if is_pad else net.class_head(cell)
            assert_close(found.logits[b, s], logits, **EXACT)
            if is_good[b, s]:
                start = torch.log(anchor[b, s] / (1 - anchor[b, s]))
                box = torch.sigmoid(start + net.box_head(cell))
                assert_close(found.boxes[b, s], box, **EXACT)
    assert (~is_good).sum() > 10 and memory.is_pad.any()
    # no good: sigmoid(inf + delta), whatever the box head says, and nothing to learn from it
    assert (found.boxes[~is_good] == 1).all()
    found.boxes[~is_good].sum().backward()
    assert not net.box_head[-1].bias.grad.any()


def test_cells_of_bad_anchors_are_not_read_on_the_image_either():
    """Anchors of level 5 are 1.6 wide: their features count for nothing, as on padding."""
    net, memory = randomise(proposals.MiniDetector(D, C)), a_memory(shapes=[(2, 2)] * 6, B=1)
    found = net(memory)
    other = memory._replace(tokens=torch.cat([memory.tokens[:, :20], memory.tokens[:, 20:] + 1], 1))
    assert_close(net(other), found, atol=0, rtol=0)
    assert not memory.is_pad.any() and len(found.logits[0, 20:].unique(dim=0)) == 1


def proposals_with(logits):
    """Predictions whose logit 0 is given; a box tells the number of its cell."""
    B, S = logits.shape
    all_logits = torch.stack([logits, -10 * logits, torch.full_like(logits, 4.)], dim=-1)
    numbers = torch.arange(B * S, dtype=logits.dtype).reshape(B, S, 1).expand(-1, -1, 4)
    return boxes.Predictions(all_logits, (numbers / 100).clone().requires_grad_())


def test_best_worked_by_hand():
    """By logit 0 alone, best first, image by image, without gradient."""
    net = proposals.MiniDetector(D, C)
    found = proposals_with(torch.tensor([[0.1, 3.0, -1.0, 2.0], [5.0, -2.0, 6.0, 0.0]]))
    best = net.best(found, 2)
    assert_close(best[..., 0], torch.tensor([[.01, .03], [.06, .04]]))      # cells 1, 3; cells 6, 4
    assert best.shape == (2, 2, 4) and not best.requires_grad and found.boxes.requires_grad


def test_best_of_fewer_cells_than_queries():
    found = proposals_with(torch.tensor([[0.1, 3.0, -1.0]]))
    best = proposals.MiniDetector(D, C).best(found, 5)
    assert_close(best[0, :, 0], torch.tensor([.01, .00, .02, 1, 1]))         # as cells of padding


# Two-stage queries; Deformable DETR's own, without mixing, beside DINO's


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("num_sets", [1, 2])
def test_two_stage_by_definition(cls, num_sets):
    """Content is learned [DINO Sec. 3.4], or comes from the box [Deformable DETR App. A.4]."""
    ask, memory = randomise(cls(5, D, C, num_sets)), a_memory()
    queries = ask(memory)
    found = ask.mini_detector(memory)
    for b in range(2):
        order = sorted(range(30), key=lambda s: -found.logits[b, s, 0].item())[:5]
        for n, s in enumerate(order):
            box = found.boxes[b, s]
            assert_close(queries.ref_boxes[b, n], box, **EXACT)
            sines = torch.cat([boxes.sine(side, D // 2) for side in box])            # (2D,)
            sines = ask.pos_project.weight @ sines + ask.pos_project.bias
            both = F.layer_norm(sines, (2 * D,), ask.pos_norm.weight, ask.pos_norm.bias)
            for t in range(num_sets):           # both tasks start from the same box
                content = ask.content[t][n] if cls is proposals.TwoStageQueries else both[D:]
                assert_close(queries.pos[t, b, n], both[:D], **EXACT)
                assert_close(queries.content[t, b, n], content, **EXACT)
    assert queries.content.shape == queries.pos.shape == (num_sets, 2, 5, D)
    assert_close(queries.proposals.logits, found.logits, **EXACT)


@pytest.mark.parametrize("cls", BOTH)
def test_decoder_losses_do_not_reach_the_mini_detector(cls):
    """It has a loss of its own: references are detached, proposals are not."""
    ask, memory = randomise(cls(5, D, C, 1)), a_memory()
    queries = ask(memory)
    weights = torch.randn(queries.pos.shape).double()
    ((queries.pos + queries.content) * weights).sum().backward()
    assert not queries.ref_boxes.requires_grad
    assert all(p.grad is None for p in ask.mini_detector.parameters())
    assert ask.pos_project.weight.grad.abs().max() > 1e-3
    (queries.proposals.logits.sum() + queries.proposals.boxes.sum()).backward()
    for name, p in ask.mini_detector.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("cls", BOTH)
def test_fewer_cells_than_queries(cls):
    """A small image has 6 + 2 cells, 20 queries are asked for: 8 cells and 12 boxes of padding."""
    memory = a_memory(shapes=[(2, 3), (1, 2)])
    queries = randomise(cls(20, D, C, 2))(memory)
    assert queries.content.shape == queries.pos.shape == (2, 2, 20, D)
    assert queries.ref_boxes.shape == (2, 20, 4) and (queries.ref_boxes[:, 8:] == 1).all()
    assert all(x.isfinite().all() for x in queries[:3])
