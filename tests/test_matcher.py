"""Which query answers for which object: [DETR Eq. 1] and [DAC Eq. 4], by hand and by loops."""
import itertools
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from detr_min import matcher
from helpers import EXACT, iou_and_giou, l1_distance, sigmoid


def random_image(seed, N, M, C=3):
    """(logits, pred_boxes, gt_labels, gt_boxes) of one image, float64; boxes overlap often."""
    g = torch.Generator().manual_seed(seed)

    def boxes_(n):
        return torch.rand(n, 4, generator=g, dtype=torch.float64) * 0.5 + 0.25

    logits = torch.randn(N, C, generator=g, dtype=torch.float64) * 2
    return logits, boxes_(N), torch.randint(C, (M,), generator=g), boxes_(M)


# --- one-to-one: the cost [DETR Eq. 1] ------------------------------------------------------------

def test_match_cost_by_hand():
    """[DETR Eq. 1]  Logit log 4 is p = .8; the box is half as wide as the object, twice as high."""
    cost = matcher.match_cost(torch.tensor([[-1., math.log(4)]]), torch.tensor([[.6, .5, .2, .8]]),
                              torch.tensor([1]), torch.tensor([[.5, .5, .4, .4]]))
    # class  2 * (.25 * .2^2 * -ln .8 - .75 * .8^2 * -ln .2) = 2 * (.00223 - .77253) = -1.54060
    # L1     5 * (|.6 - .5| + |.2 - .4| + |.8 - .4|) = 5 * .7 = 3.5
    # GIoU  -2 * (1/3 - 1/4) = -1/6:  x .5 to .7 and .3 to .7, y .1 to .9 and .3 to .7, so
    #        both .2 * .4 = .08, either .16 + .16 - .08 = .24, hull .4 * .8 = .32, neither .08
    assert_close(cost, torch.tensor([[-1.54060 + 3.5 - 1 / 6]]), atol=1e-5, rtol=0)


def test_match_cost_by_definition():
    """[DETR Eq. 1]  The three terms as the docstring has them, with logarithms of p itself."""
    logits, pred_boxes, gt_labels, gt_boxes = random_image(7, N=6, M=3)
    expected = torch.empty(6, 3, dtype=torch.float64)
    for i, j in itertools.product(range(6), range(3)):
        p = sigmoid(logits[i, gt_labels[j]].item())
        focal = -.25 * (1 - p) ** 2 * math.log(p) + .75 * p ** 2 * math.log(1 - p)
        b, g = pred_boxes[i].tolist(), gt_boxes[j].tolist()
        expected[i, j] = 2 * focal + 5 * l1_distance(b, g) - 2 * iou_and_giou(b, g)[1]
    cost = matcher.match_cost(logits, pred_boxes, gt_labels, gt_boxes)
    assert_close(cost, expected, atol=1e-5, rtol=0)         # 1e-8 within the logarithms, or none


def test_match_cost_is_the_published_one_in_loops():
    """[DETR Eq. 1], [Deformable DETR App. A.4]  As transformers' Deformable DETR has it."""
    logits, pred_boxes, gt_labels, gt_boxes = random_image(0, N=7, M=4)
    expected = torch.empty(7, 4, dtype=torch.float64)
    for i, j in itertools.product(range(7), range(4)):
        p = sigmoid(logits[i, gt_labels[j]].item())
        negative = (1 - 0.25) * p ** 2 * -math.log(1 - p + 1e-8)
        positive = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
        b, g = pred_boxes[i].tolist(), gt_boxes[j].tolist()
        bbox_cost = l1_distance(b, g)
        giou_cost = -iou_and_giou(b, g)[1]
        expected[i, j] = 5 * bbox_cost + 2 * (positive - negative) + 2 * giou_cost
    cost = matcher.match_cost(logits, pred_boxes, gt_labels, gt_boxes)
    assert_close(cost, expected, **EXACT)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_match_cost_is_finite_for_certain_scores(logit):
    """[DETR Eq. 1]  A saturated sigmoid must not become log(0), in float32 either."""
    _, pred_boxes, gt_labels, gt_boxes = random_image(1, N=5, M=2)
    cost = matcher.match_cost(torch.full((5, 3), logit), pred_boxes.float(), gt_labels,
                              gt_boxes.float())
    assert cost.isfinite().all(), f"at logit {logit} the cost is {cost}"


# --- one-to-one: the assignment -------------------------------------------------------------------

def test_one_to_one_by_hand():
    """[DETR Eq. 1]  Both objects like query 0; to object 1 it costs 1 + 2 = 3, less than 0 + 9."""
    query_idx, gt_idx = matcher.one_to_one(torch.tensor([[0., 1.], [2., 9.], [8., 9.]]))
    assert_close(query_idx, torch.tensor([0, 1]))
    assert_close(gt_idx, torch.tensor([1, 0]))


@pytest.mark.parametrize("N, M", [(N, M) for N in range(1, 7) for M in range(1, 4) if M <= N])
def test_one_to_one_is_the_best_of_all_permutations(N, M):
    """[DETR Eq. 1]  argmin over sigma, by trying every sigma: all N!/(N-M)! of them."""
    for seed in range(5):
        cost = torch.randn(N, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = min(itertools.permutations(range(N), M),
                   key=lambda sigma: sum(cost[i, j].item() for j, i in enumerate(sigma)))
        query_idx, gt_idx = matcher.one_to_one(cost)
        assert query_idx.dtype == gt_idx.dtype == torch.int64
        assert sorted(gt_idx.tolist()) == list(range(M))                # each object once
        assert query_idx.tolist() == sorted(set(query_idx.tolist()))    # no query twice, in order
        assert dict(zip(gt_idx.tolist(), query_idx.tolist())) == dict(enumerate(best)), (
            f"object: query, found and best, for the cost {cost.tolist()}")


def test_one_to_one_follows_a_permutation_of_queries_and_of_objects():
    cost = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, columns = torch.tensor([3, 1, 4, 0, 8, 5, 2, 7, 6]), torch.tensor([2, 0, 3, 1])
    pairs = set(zip(*(t.tolist() for t in matcher.one_to_one(cost))))
    query_idx, gt_idx = matcher.one_to_one(cost[rows][:, columns])
    assert set(zip(rows[query_idx].tolist(), columns[gt_idx].tolist())) == pairs


def test_one_to_one_without_objects_is_empty():
    query_idx, gt_idx = matcher.one_to_one(torch.zeros(5, 0))
    assert query_idx.shape == gt_idx.shape == (0,)
    assert query_idx.dtype == gt_idx.dtype == torch.int64


def test_match_cost_without_objects_is_empty():
    logits, pred_boxes, gt_labels, gt_boxes = random_image(2, N=5, M=0)
    assert matcher.match_cost(logits, pred_boxes, gt_labels, gt_boxes).shape == (5, 0)


def test_one_to_one_refuses_more_objects_than_queries():
    with pytest.raises(ValueError, match="3 objects but only 2 queries"):
        matcher.one_to_one(torch.zeros(2, 3))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_to_one_refuses_a_cost_that_is_no_number(bad):
    cost = torch.ones(4, 2)
    cost[3, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        matcher.one_to_one(cost)


# --- one-to-many: the quality [DAC Eq. 4] ---------------------------------------------------------

def test_quality_worked_by_hand():
    """[DAC Eq. 4]  The box has the object's centre and twice its height: IoU = .5."""
    p = torch.tensor([[.8, .2]])
    b = torch.tensor([[.5, .5, .4, .4]])
    g = torch.tensor([[.5, .5, .4, .2]])
    released = matcher.match_quality(p, b, torch.tensor([0]), g)
    assert_close(released, torch.tensor([[.59]]))                       # .3 * .8 + .7 * .5
    as_printed = matcher.match_quality(p, b, torch.tensor([0]), g, class_weight=1, iou_weight=1)
    assert_close(as_printed, torch.tensor([[1.3]]))                     # .8 + .5


def test_quality_by_definition():
    """[DAC Eq. 4]"""
    logits, pred_boxes, gt_labels, gt_boxes = random_image(3, N=8, M=3)
    probs, expected = logits.sigmoid(), torch.empty(8, 3, dtype=torch.float64)
    for i, j in itertools.product(range(8), range(3)):
        iou, _ = iou_and_giou(pred_boxes[i].tolist(), gt_boxes[j].tolist())
        expected[i, j] = 0.3 * probs[i, gt_labels[j]] + 0.7 * iou
    quality = matcher.match_quality(probs, pred_boxes, gt_labels, gt_boxes)
    assert_close(quality, expected, **EXACT)
    assert quality.min() >= 0 and quality.max() <= 1


def test_quality_refuses_logits():
    """[DAC Eq. 4]  p is a probability. Logits above 1 and logits below 0 are both noticed."""
    _, pred_boxes, gt_labels, gt_boxes = random_image(4, N=2, M=1)
    for bad in (2., -3.):
        logits = torch.tensor([[bad, .5, .5], [.1, .1, .1]])
        with pytest.raises(ValueError, match="logits\\?"):
            matcher.match_quality(logits, pred_boxes.float(), gt_labels, gt_boxes.float())


def test_quality_without_objects_or_queries_is_empty():
    logits, pred_boxes, gt_labels, gt_boxes = random_image(5, N=4, M=0)
    assert matcher.match_quality(logits.sigmoid(), pred_boxes, gt_labels, gt_boxes).shape == (4, 0)
    logits, pred_boxes, gt_labels, gt_boxes = random_image(5, N=0, M=2)
    assert matcher.match_quality(logits.sigmoid(), pred_boxes, gt_labels, gt_boxes).shape == (0, 2)


# --- one-to-many: the assignment [DAC Eq. 4] ------------------------------------------------------

def pairs_of(quality, **arguments):
    query_idx, gt_idx = matcher.one_to_many(quality, **arguments)
    assert query_idx.dtype == gt_idx.dtype == torch.int64
    assert query_idx.tolist() == sorted(query_idx.tolist())
    return list(zip(query_idx.tolist(), gt_idx.tolist()))


def test_one_to_many_by_hand():
    """[DAC Eq. 4]  threshold .4, k = 2."""
    quality = torch.tensor([[.9, .0, .0],       # q0  the best of object 0
                            [.7, .5, .0],       # q1  good for 0 and 1: goes to 0, its better one
                            [.6, .0, .0],       # q2  third of object 0: one too many
                            [.0, .4, .0],       # q3  exactly the threshold: counts
                            [.0, .0, .3]])      # q4  the best of object 2, and not good enough
    assert pairs_of(quality, k=2) == [(0, 0), (1, 0), (3, 1)]


def slow_one_to_many(quality, threshold, k):
    """Object by object: rank all queries, keep of the first k those that pass and like it best."""
    N, M = quality.shape
    pairs = []
    for j in range(M):
        ranked = sorted(range(N), key=lambda i: (-quality[i, j].item(), i))
        for i in ranked[:k]:
            favourite = min(range(M), key=lambda m: (-quality[i, m].item(), m))
            if quality[i, j].item() >= threshold and favourite == j:
                pairs.append((i, j))
    return sorted(pairs)


@pytest.mark.parametrize("N, M", [(1, 1), (3, 2), (5, 7), (12, 3), (40, 5)])
@pytest.mark.parametrize("steps", [4, 1000])
def test_one_to_many_by_definition(N, M, steps):
    """[DAC Eq. 4]  With 4 steps nearly all qualities are tied, and many lie on the threshold."""
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        quality = torch.randint(steps + 1, (N, M), generator=g).double() / steps
        for threshold, k in ((0.4, 6), (0.5, 2), (0.75, 1)):
            pairs = pairs_of(quality, threshold=threshold, k=k)
            assert pairs == slow_one_to_many(quality, threshold, k), (
                f"pairs (query, object), found and expected: threshold {threshold}, k {k}, seed "
                f"{seed}, quality {quality.tolist() if N * M < 40 else (N, M)}")
    assert pairs_of(quality) == slow_one_to_many(quality, 0.4, 6)       # the release's constants


def test_one_to_many_keeps_its_promises():
    """[DAC Eq. 4]  At most k an object, none below the threshold, one object a query."""
    quality = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    query_idx, gt_idx = matcher.one_to_many(quality, threshold=0.4, k=6)
    assert len(query_idx), "60 queries and 4 objects, and no pair at all"
    assert (quality[query_idx, gt_idx] >= 0.4).all(), f"{quality[query_idx, gt_idx].min()} < .4"
    assert gt_idx.bincount().max() == 6         # here some object has its fill: k binds
    assert len(query_idx.unique()) == len(query_idx)


def test_one_to_many_ties_go_to_the_lower_index():
    """[DAC Eq. 4]  Long ties, where an unstable sort would shuffle."""
    assert pairs_of(torch.full((500, 3), 0.5)) == [(i, 0) for i in range(6)]


def test_one_to_many_follows_a_permutation_of_queries_and_of_objects():
    g = torch.Generator().manual_seed(1)
    quality = torch.rand(30, 4, generator=g, dtype=torch.float64)       # no ties
    rows, columns = torch.randperm(30, generator=g), torch.tensor([2, 0, 3, 1])
    pairs = pairs_of(quality[rows][:, columns])
    assert {(rows[i].item(), columns[j].item()) for i, j in pairs} == set(pairs_of(quality))


def test_one_to_many_with_fewer_queries_than_k():
    assert pairs_of(torch.tensor([[.5], [.6]]), k=6) == [(0, 0), (1, 0)]


def test_one_to_many_without_objects_or_queries_is_empty():
    assert pairs_of(torch.zeros(5, 0)) == [] == pairs_of(torch.zeros(0, 3))


def test_one_to_many_lets_a_query_gather_where_one_to_one_does_not():
    """[DAC Fig. 1]  Four good queries: the C-Decoder's labels keep all, the O-Decoder's one."""
    quality = torch.tensor([[.8], [.79], [.78], [.77]])
    assert len(pairs_of(quality)) == 4
    assert matcher.one_to_one(-quality)[0].tolist() == [0]


# --- wrong answers that were given ----------------------------------------------------------------

def test_quality_of_the_less_likely_class_by_hand():
    """[DAC Eq. 4]  Both boxes are the objects', IoU = 1; the best class is not always theirs."""
    box, probs = torch.tensor([[.5, .5, .4, .4]] * 2), torch.tensor([[.8, .2], [.1, .9]])
    quality = matcher.match_quality(probs, box, torch.tensor([1, 0]), box)
    # object 0 is of class 1, object 1 of class 0
    # q0  .3 * .2 + .7 = .76    .3 * .8 + .7 = .94
    # q1  .3 * .9 + .7 = .97    .3 * .1 + .7 = .73
    assert_close(quality, torch.tensor([[.76, .94], [.97, .73]]))


def test_quality_accepts_probabilities_of_0_and_1():
    """[DAC Eq. 4]  A saturated sigmoid gives exactly these; IoU = 1."""
    box = torch.tensor([[.5, .5, .4, .4]])
    quality = matcher.match_quality(torch.tensor([[0., 1.]]), box, torch.tensor([0, 1]),
                                    box.repeat(2, 1))
    assert_close(quality, torch.tensor([[.7, 1.]]))


@pytest.mark.parametrize("assign", ["one_to_one", "one_to_many"])
def test_an_assignment_leaves_its_argument_as_it_is(assign):
    given = torch.tensor([[.9, .1], [.6, .3], [.2, .7]])
    kept = given.clone()
    getattr(matcher, assign)(given)
    assert torch.equal(given, kept), f"{assign} changed {kept.tolist()} to {given.tolist()}"


def test_one_to_one_of_a_cost_that_requires_gradient():
    query_idx, gt_idx = matcher.one_to_one(torch.tensor([[9., 0.], [1., 9.]], requires_grad=True))
    assert query_idx.tolist() == [0, 1] and gt_idx.tolist() == [1, 0]
