"""Scores that say how good a box is: [SD Eq. 6-7] by hand, in loops, and where they lead."""
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.ops as ops
from torch.testing import assert_close

from detr_min import tal_loss
from helpers import EXACT, f64


def logit(p):
    return math.log(p / (1 - p))


# --- the target [SD Eq. 6] ------------------------------------------------------------------------

def test_target_by_hand():
    """[SD Eq. 6]  t = s^(1/4) u^(3/4):  (1/16)^(1/4) = 1/2;  (1/16)^(3/4) = 1/8."""
    s, u = f64(1 / 16, 1., 1 / 16, 1., 0., .5), f64(1., 1 / 16, 1 / 16, 1., .5, 0.)
    assert_close(tal_loss.aligned_target(s, u), f64(1 / 2, 1 / 8, 1 / 16, 1., 0., 0.))


def test_target_by_definition():
    """[SD Eq. 6]"""
    g = torch.Generator().manual_seed(0)
    s, u = torch.rand(2, 20, generator=g, dtype=torch.float64)
    expected = f64(*[a.item() ** .25 * b.item() ** .75 for a, b in zip(s, u)])
    assert_close(tal_loss.aligned_target(s, u), expected, **EXACT)
    expected = f64(*[a.item() ** .4 * b.item() ** .5 for a, b in zip(s, u)])
    assert_close(tal_loss.aligned_target(s, u, alpha=.4, beta=.5), expected, **EXACT)


def test_target_is_the_score_exactly_where_score_and_iou_agree():
    """[SD Eq. 6]  alpha + beta = 1: the target lies between s and u, and all three meet."""
    s = torch.linspace(.05, .95, 19, dtype=torch.float64)
    assert_close(tal_loss.aligned_target(s, s), s)
    u = s.flip(0)
    t = tal_loss.aligned_target(s, u)
    apart = s != u
    assert (t > torch.minimum(s, u))[apart].all() and (t < torch.maximum(s, u))[apart].all(), (
        f"targets {t.tolist()} of scores {s.tolist()} and IoUs {u.tolist()} lie between them")


def test_no_gradient_into_targets():
    """[SD Eq. 6]  Neither the score nor the box learns through the target."""
    s, u = f64(.3, .6).requires_grad_(), f64(.7, .2).requires_grad_()
    for score, iou, mistake in ((s, u.detach(), "score"), (s.detach(), u, "IoU")):
        target = tal_loss.aligned_target(score, iou)
        assert not target.requires_grad, f"the {mistake} learns through the target {target}"
    t = f64(.4, .5).requires_grad_()            # nor through tal_loss, should a caller forget
    z = f64(.1, -.2).requires_grad_()
    tal_loss.tal_loss(z[None], t[None]).backward()
    assert t.grad is None, f"the targets get the gradient {t.grad}"
    assert z.grad.abs().min() > 0, f"the logits get the gradient {z.grad}"


# --- the loss [SD Eq. 7] --------------------------------------------------------------------------

def test_loss_by_hand():
    """[SD Eq. 7]  One positive and one negative, both at logit 0, s = .5."""
    loss = tal_loss.tal_loss(torch.zeros(1, 2).double(), f64(.9, 0.)[None])
    # positive  |.9 - .5|^2 * (-.9 ln .5 - .1 ln .5) = .16 ln 2
    # negative         .5^2 * (-ln .5)               = .25 ln 2
    assert_close(loss, f64(.41 * math.log(2))[0])


@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_loss_by_definition_two_sums_are_the_dense_form(gamma):
    """[SD Eq. 7]  sum_pos |t - s|^gamma BCE(s, t) + sum_neg s^gamma BCE(s, 0), entry by entry."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(6, 4, generator=g, dtype=torch.float64) * 2
    t = torch.zeros(6, 4, dtype=torch.float64)
    t[1, 2], t[4, 0], t[5, 3] = .3, .95, .01
    pos = neg = 0.0
    for i in range(6):
        for c in range(4):
            s, target = 1 / (1 + math.exp(-z[i, c].item())), t[i, c].item()
            if target > 0:
                bce = -target * math.log(s) - (1 - target) * math.log(1 - s)
                pos += abs(target - s) ** gamma * bce
            else:
                neg += s ** gamma * -math.log(1 - s)
    assert_close(tal_loss.tal_loss(z, t, gamma), f64(pos + neg)[0], **EXACT)


def test_alpha_and_beta_of_zero_give_focal_loss_without_alpha():
    """[SD Eq. 6-7]  t = 1: the loss is torchvision's focal loss, its alpha weighting turned off."""
    g = torch.Generator().manual_seed(2)
    z = torch.randn(10, 3, generator=g, dtype=torch.float64) * 3
    matched = torch.tensor([0, 4, 7]), torch.tensor([1, 1, 2])
    t = torch.zeros_like(z)
    t[matched] = tal_loss.aligned_target(z[matched].sigmoid(), f64(.1, .5, .9), alpha=0, beta=0)
    assert_close(t[matched], f64(1., 1., 1.))
    expected = ops.sigmoid_focal_loss(z, t, alpha=-1, gamma=2, reduction="sum")
    assert_close(tal_loss.tal_loss(z, t), expected, **EXACT)


def test_finite_where_the_sigmoid_is_saturated():
    """[SD Eq. 7]  Loss and gradient at logits of +-1e4, with every kind of target."""
    z = torch.tensor([[1e4, -1e4]]).repeat(4, 1).requires_grad_()
    t = torch.tensor([[0., 0.], [1., 1.], [.5, .5], [.01, .99]])
    loss = tal_loss.tal_loss(z, t)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all(), f"loss {loss}, gradient {z.grad}"


# --- where it leads [SD Eq. 6-7] ------------------------------------------------------------------

def gradient_of(s, u):
    """d L / d z of one matched query of score s, its target made of its own score and the IoU u."""
    z = f64(logit(s)).requires_grad_()
    target = tal_loss.aligned_target(z.sigmoid(), f64(u))
    tal_loss.tal_loss(z[None], target[None]).backward()
    return z.grad.item()


def test_gradient_by_hand():
    """[SD Eq. 6-7]  dL/dz = |t-s|^2 (s - t) - 2 (t - s) s (1-s) BCE(s, t),  for t > s."""
    # s = .5, u = .9:   t = .5^.25 .9^.75 = .8409 * .9240 = .7770,   t - s = .2770,   BCE = ln 2
    #     .2770^2 * -.2770 - 2 * .2770 * .25 * .6931 = -.0213 - .0960 = -.1173
    assert_close(gradient_of(.5, .9), -.1173, atol=5e-5, rtol=0)        # printed to four decimals


@pytest.mark.parametrize("s, at_5, at_7, at_9, negative", [
    (.01, -.0087, -.0176, -.0300, 3e-6),
    (.10, -.0483, -.0985, -.1681, .0029),
    (.30, -.0457, -.1125, -.2075, .072),
    (.50, 0,      -.0527, -.1173, .298),
    (.90, .0925,   .0222,  0,     1.102)])
def test_gradient_table(s, at_5, at_7, at_9, negative):
    """[SD Eq. 6-7]  Pull on the logit of a matched query of IoU .5, .7, .9, and an unmatched one.

    At the initial score of .01 the pull is 9 to 30 times weaker than focal loss's -.265.
    """
    for u, expected in ((.5, at_5), (.7, at_7), (.9, at_9)):
        assert_close(gradient_of(s, u), float(expected), atol=5.1e-5, rtol=0)
    z = f64(logit(s)).requires_grad_()
    tal_loss.tal_loss(z[None], f64(0.)[None]).backward()
    assert_close(z.grad.item(), negative, atol={.01: 5e-8, .1: 5e-5}.get(s, 5e-4), rtol=0)


def test_a_negative_has_focal_loss_without_its_alpha():
    """docs/differences.md 21: with weights 8 and 2, negatives weigh 8 / (2 * .75) times as much."""
    z = torch.linspace(-6, 6, 13, dtype=torch.float64)
    ours = torch.stack([tal_loss.tal_loss(one[None, None], f64(0.)[None]) for one in z])
    focal = ops.sigmoid_focal_loss(z, torch.zeros_like(z), alpha=.25, gamma=2.0)
    assert_close(8 * ours, 8 / (2 * .75) * 2 * focal)


@pytest.mark.parametrize("u", [.1, .3, .5, .9])
def test_stationary_exactly_where_the_score_equals_the_iou(u):
    """[SD Eq. 6-7]  t = s there, and every term has a factor t - s."""
    assert_close(gradient_of(u, u), 0., **EXACT)


def test_gradient_has_the_sign_of_score_less_iou():
    """[SD Eq. 6-7]  s = u is the only place where it vanishes."""
    for s in (.05, .2, .5, .8, .95):
        for u in (.1, .3, .6, .9):
            assert math.copysign(1, gradient_of(s, u)) == math.copysign(1, s - u)


def test_descent_ends_where_the_score_equals_the_iou():
    """[SD Eq. 6-7]  From z = -2, s = .12, the scores of three queries climb to their own IoUs."""
    ious, z = f64(.3, .6, .9), torch.full((3,), -2., dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([z], lr=3.0)
    for _ in range(1000):
        optimizer.zero_grad()
        tal_loss.tal_loss(z[None], tal_loss.aligned_target(z.sigmoid(), ious)[None]).backward()
        optimizer.step()
    assert_close(z.sigmoid().detach(), ious, atol=5e-4, rtol=0)         # .300 .600 .900
    z.data.fill_(-2.)
    for _ in range(100):                        # with hard targets all go on towards 1 instead
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(z, torch.ones_like(z), reduction="sum").backward()
        optimizer.step()
    assert z.sigmoid().min() > .99


def test_a_confident_mistake_keeps_its_loss_and_its_gradient():
    """[SD Eq. 7]  In float32 s is exactly 1 and 0 here, and BCE is |z|, of slope 1."""
    z = torch.tensor([[200., -200.]]).requires_grad_()
    loss = tal_loss.tal_loss(z, torch.tensor([[0., 1.]]))
    loss.backward()
    # negative  1^2 * 200    positive  |1 - 0|^2 * 200
    assert_close(loss.detach(), torch.tensor(400.))
    assert_close(z.grad, torch.tensor([[1., -1.]]))
