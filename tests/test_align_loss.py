"""The IoU-aware loss of "DAC-DETR + Align" [Align-DETR Eq. 4-7]: by hand, by loops, saturated."""
import math

import pytest
import torch
from torch.testing import assert_close

from detr_min import boxes, criterion
from detr_min.release import align_loss
from helpers import EXACT, f64
from test_criterion import pairs_of, random_layer, random_targets, slow_layer_loss


# --- ranks ----------------------------------------------------------------------------------------

def test_ranks_by_hand():
    """Object 0 has .9 > .7 > .5, object 2 has .8 > .6, each counted on its own."""
    quality, gt_idx = f64(.5, .8, .9, .6, .7), torch.tensor([0, 2, 0, 2, 0])
    assert align_loss.rank_within_object(quality, gt_idx).tolist() == [2, 0, 0, 1, 1]


def test_equal_qualities_rank_by_position():
    """Pairs come sorted by query, so the lower query wins; and there is no rank twice."""
    gt_idx = torch.tensor([1, 0, 1, 0, 1])
    assert align_loss.rank_within_object(torch.full((5,), .3), gt_idx).tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("steps", [3, 1000])
def test_ranks_by_definition(steps):
    """The position among the pairs of the same object, sorted; with 3 steps most are tied."""
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        quality = torch.randint(steps, (20,), generator=g).double() / steps
        gt_idx, expected = torch.randint(4, (20,), generator=g), [0] * 20
        for j in range(4):
            pairs = [i for i in range(20) if gt_idx[i] == j]
            for rank, i in enumerate(sorted(pairs, key=lambda i: (-quality[i].item(), i))):
                expected[i] = rank
        assert align_loss.rank_within_object(quality, gt_idx).tolist() == expected


def test_no_pair_has_no_rank():
    empty = torch.zeros(0, dtype=torch.long)
    assert align_loss.rank_within_object(torch.zeros(0), empty).shape == (0,)
    targets, weights = align_loss.ranked_target(torch.zeros(0), torch.zeros(0), empty)
    assert targets.shape == weights.shape == (0,)


# --- targets and weights --------------------------------------------------------------------------

def test_target_by_hand():
    """[Align-DETR Eq. 4-7]  u = .5^.25 * .5^.75 = .5 and .25; w = 1 and exp(-1/1.5) = .5134."""
    targets, weights = align_loss.ranked_target(f64(.25, .5), f64(.25, .5), torch.tensor([0, 0]))
    assert_close(weights, f64(math.exp(-1 / 1.5), 1), **EXACT)
    assert_close(targets, f64(.25 * math.exp(-1 / 1.5), .5), **EXACT)
    assert_close(align_loss.ranked_target(f64(.2), f64(.9), torch.tensor([0]))[0],
                 f64(.2 ** .25 * .9 ** .75), **EXACT)        # .62 in Align-DETR's Fig. 3


def test_the_weights_of_six_candidates():
    """The docstring's table: 1, .51, .26, .14, .07, .04."""
    u = f64(.9, .8, .7, .6, .5, .4)
    _, weights = align_loss.ranked_target(u, u, torch.zeros(6, dtype=torch.long))
    assert_close(weights, f64(1, .513, .264, .135, .069, .036), atol=5e-4, rtol=0)


def test_one_to_one_pairs_all_weigh_one():
    """The O-Decoder's: one pair an object, so the same code serves and the target is u itself."""
    u = f64(.9, .1, .5)
    assert_close(align_loss.ranked_target(u, u, torch.tensor([2, 0, 1])), (u, f64(1, 1, 1)))


def test_a_pair_without_overlap_keeps_a_target_of_a_hundredth_and_ranks_last():
    targets, weights = align_loss.ranked_target(f64(.9, .5), f64(0, .5), torch.tensor([0, 0]))
    assert_close(weights, f64(math.exp(-1 / 1.5), 1))
    assert_close(targets, f64(.01 * math.exp(-1 / 1.5), .5))


@pytest.mark.parametrize("steps, tau", [(3, 1.5), (1000, 1.5), (1000, .7)])
def test_target_by_definition(steps, tau):
    """[Align-DETR Eq. 4-7]  Pair by pair, ranked among those of its object."""
    g = torch.Generator().manual_seed(1)
    s, iou = torch.randint(steps + 1, (2, 15), generator=g).double() / steps
    gt_idx = torch.randint(3, (15,), generator=g)
    u = [max(a ** .25 * b ** .75, .01) for a, b in zip(s.tolist(), iou.tolist())]
    weights = []
    for i in range(15):
        rivals = [j for j in range(15) if gt_idx[j] == gt_idx[i]]
        rank = sorted(rivals, key=lambda j: (-u[j], j)).index(i)
        weights.append(math.exp(-rank / tau))
    targets, found = align_loss.ranked_target(s, iou, gt_idx, tau)
    assert_close(found, f64(*weights), **EXACT)
    assert_close(targets, f64(*[a * b for a, b in zip(u, weights)]), **EXACT)


def test_targets_and_weights_have_no_gradient():
    scores, ious = f64(.5, .6).requires_grad_(), f64(.5, .7).requires_grad_()
    targets, weights = align_loss.ranked_target(scores, ious, torch.tensor([0, 0]))
    assert not targets.requires_grad, f"the targets {targets} have a gradient"
    assert not weights.requires_grad, f"the weights {weights} have a gradient"


# --- the loss -------------------------------------------------------------------------------------

def test_loss_by_hand():
    """[Align-DETR Eq. 4-7]  Logit 0: positive of target .3, and a negative. Both logs are ln 2."""
    loss = align_loss.align_loss(f64(0, 0)[None], f64(.3, 0)[None])
    assert_close(loss, f64((.3 + .7) * math.log(2) + .25 * math.log(2))[0], **EXACT)


def test_loss_by_definition():
    """[Align-DETR Eq. 4-7]  -a log p - b log(1-p), entry by entry."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=g, dtype=torch.float64) * 3
    targets, expected = torch.zeros(6, 4, dtype=torch.float64), 0.0
    targets[0, 1], targets[3, 3], targets[5, 0] = .8, .01, .3
    for z, y in zip(logits.flatten().tolist(), targets.flatten().tolist()):
        p = 1 / (1 + math.exp(-z))
        a, b = (y, 1 - y) if y > 0 else (0, p ** 2)
        expected += -a * math.log(p) - b * math.log(1 - p)
    assert_close(align_loss.align_loss(logits, targets), f64(expected)[0], **EXACT)


def test_gradient_of_a_negative_flows_through_its_weight():
    """d/dz [-p^2 log(1-p)] = p^3 - 2 p^2 (1-p) log(1-p); with b detached only p^3 would be left."""
    logits = f64(-1., .5, 2.).requires_grad_()
    p = logits.detach().sigmoid()
    gradient, = torch.autograd.grad(align_loss.align_loss(logits, torch.zeros(3).double()), logits)
    assert_close(gradient, p ** 3 - 2 * p ** 2 * (1 - p) * (1 - p).log(), **EXACT)


def test_gradient_of_a_positive_vanishes_at_its_target():
    """Plain cross-entropy: p - y, pulled up below the target and down above, no focal factor."""
    logits, targets = f64(-1., .5, 2.).requires_grad_(), f64(.9, .6, .1)
    gradient, = torch.autograd.grad(align_loss.align_loss(logits, targets), logits)
    assert_close(gradient, logits.detach().sigmoid() - targets, **EXACT)


@pytest.mark.parametrize("logit", [-1e4, -120., 120., 1e4])
def test_saturated_logits_are_finite_unlike_the_release(logit):
    """The release takes log(sigmoid(z)): at z = -120 in float32 that is log(0)."""
    logits = torch.full((3, 2), logit, requires_grad=True)
    targets = torch.tensor([[.5, 0.], [0., 0.], [1., .01]])
    loss = align_loss.align_loss(logits, targets)
    gradient, = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and gradient.isfinite().all()
    assert not (targets * logits.sigmoid().log() + (1 - targets) * (1 - logits.sigmoid()).log()
                ).sum().isfinite()                                      # what the release computes


def test_no_query_at_all():
    loss = align_loss.align_loss(torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3))
    assert loss == 0 and loss.requires_grad


# --- one layer ------------------------------------------------------------------------------------

def test_layer_loss_by_hand():
    """[Align-DETR Eq. 4-7]  One object, two queries of p = .8: its own box, and half its height.

    u = .8^.25 * 1^.75 = .9457, w = 1, y = .9457;  u = .8^.25 * .5^.75 = .5623, w = exp(-1/1.5) =
    .5134, y = .2887; |b - g|_1 = .2, GIoU = .5.
    """
    layer = boxes.Predictions(f64([math.log(4)], [math.log(4)])[None],
                              f64([.5, .5, .4, .4], [.5, .5, .4, .2])[None])
    zero, gt = torch.tensor([0, 0]), f64([.5, .5, .4, .4]).expand(2, 4)
    cls, l1, giou = align_loss.layer_loss(
        layer, criterion.Pairs(zero, torch.tensor([0, 1]), zero, zero, gt))
    w = math.exp(-1 / 1.5)
    y = f64(.8 ** .25, .8 ** .25 * .5 ** .75 * w)
    assert_close(cls, (-y * math.log(.8) - (1 - y) * math.log(.2)).sum())
    assert_close(l1, f64(5 * w * .2)[0])
    assert_close(giou, f64(2 * w * .5)[0])


@pytest.mark.parametrize("rule", ["one_to_one", "one_to_many"])
def test_layer_loss_by_definition(generator, rule):
    """[Align-DETR Eq. 4-7]  Pair by pair and entry by entry; one image has no object."""
    layer, targets = random_layer(generator, B=3, N=12), random_targets(generator, (3, 0, 2))
    pairs = pairs_of(layer, targets, rule)
    if rule == "one_to_many":
        assert pairs.object_idx.bincount().max() > 1                    # so ranks count
    found = align_loss.layer_loss(layer, pairs)
    expected = slow_layer_loss(layer, pairs, "align")
    assert_close(torch.stack(found).detach(), expected, **EXACT)


def test_class_term_sends_no_gradient_to_boxes(generator):
    layer, targets = random_layer(generator), random_targets(generator)
    cls, l1, giou = align_loss.layer_loss(layer, pairs_of(layer, targets))
    to_logits, to_boxes = torch.autograd.grad(cls, layer, retain_graph=True, allow_unused=True)
    assert to_boxes is None and to_logits.abs().min() > 0
    to_logits, to_boxes = torch.autograd.grad(l1 + giou, layer, allow_unused=True)
    assert to_logits is None and to_boxes.abs().max() > 0
