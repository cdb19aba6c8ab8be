"""What holds for any input: assignments by brute force, orders that must not matter, bounds.

Each property is tried on a few random inputs by default and on many more with -m slow.
"""
import itertools
import math

import pytest
import torch
from torch.testing import assert_close

import helpers
from detr_min import (attention, boxes, criterion, decoder_base, decoder_conditional, decoder_dac,
                      decoder_decoupled, decoder_decoupled_deformable, matcher, tal_loss)
from detr_min.data import dataset
from helpers import EXACT, f64, iou_and_giou
from test_attention import by_definition

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SEEDS = st.integers(0, 2 ** 31 - 1)
SHARES = st.floats(0, 1)                        # 0 and 1 included
NUMBERS = st.floats(-8, 8)
SIDES = st.floats(1e-3, 1)
BOXES = st.tuples(SHARES, SHARES, SIDES, SIDES)
STEPS = st.integers(0, 4)                       # few values: many ties


def table(rows, columns, numbers):
    """Matrices (N, M) as lists of rows."""
    return st.tuples(rows, columns).flatmap(lambda size: st.lists(
        st.lists(numbers, min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0]))


# --- assignments ----------------------------------------------------------------------------------

def one_to_one_is_the_cheapest_of_all(cost):
    """[DETR Eq. 1]  No other choice of queries costs less; with ties several cost the same."""
    N, M = len(cost), len(cost[0])
    hypothesis.assume(M <= N)
    query_idx, gt_idx = (index.tolist() for index in matcher.one_to_one(f64(*cost)))
    assert sorted(gt_idx) == list(range(M)) and query_idx == sorted(set(query_idx))
    least = min(sum(cost[i][j] for j, i in enumerate(sigma))
                for sigma in itertools.permutations(range(N), M))
    found = sum(cost[i][j] for i, j in zip(query_idx, gt_idx))
    assert_close(float(found), float(least), **EXACT)


def one_to_many_by_definition(quality, threshold, k):
    """[DAC Eq. 4]  Above the threshold, of the k best of its column, the best of its row."""
    expected = []
    for i, row in enumerate(quality):
        for j, value in enumerate(row):
            rivals = sum(other[j] > value or (other[j] == value and n < i)
                         for n, other in enumerate(quality))
            is_own = all(other < value or (other == value and j <= m)
                         for m, other in enumerate(row))
            if value >= threshold and rivals < k and is_own:
                expected.append((i, j))
    found = matcher.one_to_many(f64(*quality), threshold, k)
    assert list(zip(*(index.tolist() for index in found))) == expected


def match_quality_by_definition(pairs, objects):
    """[DAC Eq. 4]  .3 p_i[c_j] + .7 IoU(b_i, g_j)"""
    probs, pred_boxes = zip(*pairs)
    labels, gt_boxes = zip(*objects)
    found = matcher.match_quality(f64(*probs), f64(*pred_boxes), torch.tensor(labels),
                                  f64(*gt_boxes))
    expected = f64(*[[.3 * p[label] + .7 * iou_and_giou(b, g)[0] for label, g in objects]
                     for p, b in pairs])
    assert_close(found, expected, atol=1e-9, rtol=0)        # corners of a box of .001 cancel


# --- boxes ----------------------------------------------------------------------------------------

def refine_undoes_itself(box, delta):
    """[Deformable DETR App. A.4]  A step and the same step back, where the logit is not clamped."""
    there = boxes.refine(f64(box).clamp(.001, .999), f64(delta) / 2)
    back = boxes.refine(there, -f64(delta) / 2)
    assert_close(back, f64(box).clamp(.001, .999), atol=1e-9, rtol=0)
    assert ((there > 0) & (there < 1)).all()


def refine_starts_from_the_logit(logits, delta):
    """[Deformable DETR App. A.4]  sigmoid(logit(sigmoid(z)) + delta) = sigmoid(z + delta)"""
    z, step = f64(logits), f64(delta)
    assert_close(boxes.refine(z.sigmoid(), step), (z + step).sigmoid(), atol=1e-9, rtol=0)
    half = boxes.refine(z[:, :2].sigmoid(), step)                       # a point has no size yet
    assert_close(half, torch.cat([z[:, :2] + step[:, :2], step[:, 2:]], 1).sigmoid(), atol=1e-9,
                 rtol=0)


def giou_is_bounded(a, b):
    """[Generalized IoU, CVPR 2019]  -1 < GIoU <= IoU <= 1, symmetric, 1 for a box with itself."""
    a, b = f64(*a), f64(*b)
    iou, giou = boxes.iou(a, b).item(), boxes.giou(a, b).item()
    assert -1 < giou <= iou + 1e-12 and 0 <= iou <= 1 + 1e-12
    assert_close(boxes.giou(b, a).item(), giou, **EXACT)
    assert_close(boxes.giou(a, a).item(), 1., atol=1e-9, rtol=0)
    assert_close((iou, giou), iou_and_giou(*a.tolist(), *b.tolist()), atol=1e-9, rtol=0)
    assert_close(boxes.paired_iou(a, b).item(), iou, atol=1e-9, rtol=0)
    assert_close(boxes.to_cxcywh(boxes.to_xyxy(a)), a, **EXACT)


# --- task alignment -------------------------------------------------------------------------------

def target_lies_between_score_and_iou(s, u, more):
    """[SD Eq. 6]  A weighted geometric mean: between the two, and it rises with each."""
    t, = tal_loss.aligned_target(f64(s), f64(u)).tolist()
    assert min(s, u) - 1e-12 <= t <= max(s, u) + 1e-12 and 0 <= t <= 1
    higher = max(u, more)
    assert tal_loss.aligned_target(f64(s), f64(higher)).item() >= t
    assert tal_loss.aligned_target(f64(max(s, more)), f64(u)).item() >= t


def tal_loss_by_definition(entries, gamma):
    """[SD Eq. 7]  Every entry by itself; none is negative; 0 where the score is the target."""
    z, t = zip(*entries)
    expected = 0.0
    for logit, target in entries:
        s = helpers.sigmoid(logit)
        entropy = -target * math.log(s) - (1 - target) * math.log(1 - s)
        expected += abs(target - s) ** gamma * entropy
    found = tal_loss.tal_loss(f64(z), f64(t), gamma).item()
    assert found >= 0
    assert_close(found, expected, atol=1e-9, rtol=1e-9)
    agreed = tal_loss.tal_loss(f64(z), f64(z).sigmoid(), gamma)
    assert_close(agreed.item(), 0., **EXACT)


# --- deformable attention -------------------------------------------------------------------------

def attention_by_definition(shapes, seed, form):
    """[Deformable DETR Eq. 3]  Any levels, one cell included; points on and beyond the map."""
    generator = torch.Generator().manual_seed(seed)
    S, L = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(2, S, 2, 3, generator=generator, dtype=torch.float64)
    locations = torch.randint(-2, 11, (2, 2, 2, L, 2, 2), generator=generator).double() / 8
    weights = torch.randn(2, 2, 2, L, 2, generator=generator, dtype=torch.float64)
    assert_close(form(value, shapes, locations, weights),
                 by_definition(value, shapes, locations, weights), **EXACT)


# --- orders that must not matter ------------------------------------------------------------------

DEFORMABLE = dict(num_layers=2, d_model=8, num_heads=2, num_levels=2, num_points=2, d_ffn=12,
                  num_classes=3)
CONDITIONAL = dict(num_layers=2, d_model=8, num_heads=2, d_ffn=12, num_classes=3)
DECODERS = [
    (decoder_base.Decoder, DEFORMABLE, "o_decoder"),
    (decoder_dac.DACDecoder, DEFORMABLE, "o_decoder"),
    (decoder_dac.DACDecoder, DEFORMABLE, "c_decoder"),
    (decoder_decoupled_deformable.DecoupledDecoder, DEFORMABLE, "o_decoder"),
    (decoder_decoupled_deformable.DACDecoupledDecoder, DEFORMABLE, "o_decoder"),
    (decoder_decoupled_deformable.DACDecoupledDecoder, DEFORMABLE, "c_decoder"),
    (decoder_decoupled_deformable.SplitDecoder, DEFORMABLE, "o_decoder"),
    (decoder_conditional.ConditionalDecoder, CONDITIONAL, "o_decoder"),
    (decoder_decoupled.DecoupledDecoder, CONDITIONAL, "o_decoder"),
    (decoder_decoupled.SplitDecoder, CONDITIONAL, "o_decoder")]


def moved(record, images, queries):
    """Queries of other images and in another order."""
    return record._replace(**{name: tensor[..., images, :, :][..., queries, :]
                              for name, tensor in record._asdict().items()
                              if isinstance(tensor, torch.Tensor)})


def answers_move_along(seed, decoder, sizes, run):
    """Another order of the queries and of the images gives the answers in that order."""
    is_deformable, N = sizes is DEFORMABLE, 5
    memory = helpers.padded_memory(8) if is_deformable else helpers.conditional_memory(8)
    queries = (helpers.some_queries(8, N, T=2) if is_deformable else
               helpers.conditional_queries(8, N))
    decode = getattr(helpers.randomise(decoder(**sizes), seed), run)
    generator = torch.Generator().manual_seed(seed)
    order, images = torch.randperm(N, generator=generator), torch.randperm(2, generator=generator)
    turned = memory._replace(**{name: tensor[images] for name, tensor in memory._asdict().items()
                                if isinstance(tensor, torch.Tensor)})
    before, after = decode(queries, memory), decode(moved(queries, images, order), turned)
    for b, a in zip(before, after, strict=True):
        assert_close(a, boxes.Predictions(*(x[images][:, order] for x in b)), atol=1e-10, rtol=0)


def some_boxes(generator, *shape):
    centre, size = torch.rand(2, *shape, 2, generator=generator, dtype=torch.float64)
    return torch.cat([centre, size / 2 + .05], dim=-1)


def the_loss_stays(seed, rule, layer_loss):
    """Another order of the images, of the queries and of an image's objects: the same loss."""
    generator = torch.Generator().manual_seed(seed)
    B, N, C = 3, 6, 2
    layer = boxes.Predictions(torch.randn(B, N, C, generator=generator, dtype=torch.float64),
                              some_boxes(generator, B, N))
    targets = [dataset.Target(torch.randint(C, (M,), generator=generator), some_boxes(generator, M),
                              i, (64, 64))
               for i, M in enumerate(torch.randint(0, 5, (B,), generator=generator).tolist())]
    images, order = torch.randperm(B, generator=generator), torch.randperm(N, generator=generator)
    mixed = []
    for i in images.tolist():
        objects = torch.randperm(len(targets[i].labels), generator=generator)
        mixed.append(targets[i]._replace(labels=targets[i].labels[objects],
                                         boxes=targets[i].boxes[objects]))
    score, pair = ((matcher.match_cost, matcher.one_to_one) if rule == "one_to_one" else
                   (criterion.quality, matcher.one_to_many))
    before = criterion.decoder_loss([layer], targets, score, pair, layer_loss, 1.0)
    turned = boxes.Predictions(*(x[images][:, order] for x in layer))
    after = criterion.decoder_loss([turned], mixed, score, pair, layer_loss, 1.0)
    assert_close(after, before, atol=1e-9, rtol=0)
    assert after.pairs == before.pairs


# --- all of them ----------------------------------------------------------------------------------

LABELS = st.integers(0, 2)
SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)
ROWS = st.lists(st.tuples(*[NUMBERS] * 4), min_size=2, max_size=2)
PROPERTIES = [
    (one_to_one_is_the_cheapest_of_all,
     dict(cost=table(st.integers(1, 5), st.integers(1, 4), st.one_of(STEPS, NUMBERS)))),
    (one_to_many_by_definition, dict(
        quality=table(st.integers(1, 7), st.integers(1, 4), STEPS.map(lambda i: i / 4)),
        threshold=STEPS.map(lambda i: i / 4), k=st.integers(1, 4))),
    (match_quality_by_definition, dict(
        pairs=st.lists(st.tuples(st.tuples(*[SHARES] * 3), BOXES), min_size=1, max_size=4),
        objects=st.lists(st.tuples(LABELS, BOXES), min_size=1, max_size=3))),
    (refine_undoes_itself, dict(box=BOXES.map(lambda b: [b]),
                                delta=st.tuples(*[NUMBERS] * 4).map(lambda d: [d]))),
    (refine_starts_from_the_logit, dict(logits=ROWS, delta=ROWS)),
    (giou_is_bounded, dict(a=BOXES.map(lambda b: [b]), b=BOXES.map(lambda b: [b]))),
    (target_lies_between_score_and_iou, dict(s=SHARES, u=SHARES, more=SHARES)),
    (tal_loss_by_definition, dict(
        entries=st.lists(st.tuples(NUMBERS, SHARES), min_size=1, max_size=5),
        gamma=st.sampled_from([1., 1.5, 2., 3.]))),
    (attention_by_definition, dict(
        shapes=SHAPES, seed=SEEDS,
        form=st.sampled_from([attention.deformable_attention, attention.by_rows]))),
    (the_loss_stays, dict(
        seed=SEEDS, rule=st.sampled_from(["one_to_one", "one_to_many"]),
        layer_loss=st.sampled_from([criterion.focal_loss, criterion.task_aligned_loss]))),
    *((answers_move_along, dict(seed=SEEDS, decoder=st.just(decoder), sizes=st.just(sizes),
                                run=st.just(run))) for decoder, sizes, run in DECODERS)]


@pytest.mark.parametrize("examples", [5, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", range(len(PROPERTIES)),
                         ids=[holds.__name__ for holds, _ in PROPERTIES])
def test_property(number, examples, tmp_path):
    holds, inputs = PROPERTIES[number]
    hypothesis.configuration.set_hypothesis_home_dir(tmp_path)      # no folder in the repository
    settings = hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink])
    settings(hypothesis.given(**inputs)(holds))()
