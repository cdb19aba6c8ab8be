"""From predictions to one number: [DETR Eq. 2] by hand, in loops, and by torchvision."""
import itertools
import math

import pytest
import torch
import torchvision.ops as ops
from torch.testing import assert_close

from detr_min import boxes, criterion, matcher, model
from detr_min.data import dataset
from helpers import EXACT, f64, iou_and_giou, l1_distance, sigmoid

LOSSES = {"focal": criterion.focal_loss, "tal": criterion.task_aligned_loss}


def random_boxes(generator, *shape):
    return torch.rand(*shape, 4, generator=generator, dtype=torch.float64) * .5 + .25


def random_layer(generator, B=2, N=6, C=3):
    """Predictions that require a gradient."""
    logits = torch.randn(B, N, C, generator=generator, dtype=torch.float64)
    pred_boxes = random_boxes(generator, B, N)
    return boxes.Predictions(logits.requires_grad_(), pred_boxes.requires_grad_())


def random_targets(generator, objects=(3, 2), C=3):
    return [dataset.Target(torch.randint(C, (M,), generator=generator), random_boxes(generator, M),
                           i, (64, 64)) for i, M in enumerate(objects)]


def pairs_of(layer, targets, rule="one_to_one"):
    """criterion.Pairs of one layer, by the functions of matcher.py, image by image."""
    rows, first = [], 0
    for b, target in enumerate(targets):
        logits, pred_boxes = layer.logits[b].detach(), layer.boxes[b].detach()
        image = pred_boxes, target.labels, target.boxes
        found = (matcher.one_to_one(matcher.match_cost(logits, *image)) if rule == "one_to_one" else
                 matcher.one_to_many(matcher.match_quality(logits.sigmoid(), *image)))
        rows += [(b, i, first + j, target.labels[j].item(), target.boxes[j])
                 for i, j in zip(*(index.tolist() for index in found))]
        first += len(target.labels)
    *indices, gt_boxes = zip(*rows) if rows else [()] * 5
    return criterion.Pairs(*(torch.tensor(index, dtype=torch.int64) for index in indices),
                           torch.stack(gt_boxes) if rows else torch.zeros(0, 4).double())


def class_0(targets):
    return [target._replace(labels=torch.zeros_like(target.labels)) for target in targets]


# --- one layer [DETR Eq. 2] -----------------------------------------------------------------------

def test_layer_loss_by_hand():
    """[DETR Eq. 2], [SD Eq. 6-7]  One query, and one object of class 1."""
    layer = boxes.Predictions(f64(0., math.log(4))[None, None], f64(.6, .5, .2, .8)[None, None])
    zero = torch.tensor([0])
    pairs = criterion.Pairs(zero, zero, zero, torch.tensor([1]), f64([.5, .5, .4, .4]))
    cls, l1, giou = criterion.focal_loss(layer, pairs)
    # p = .5 where nothing is, .75 * .5^2 * ln 2;  p = .8 where the object is, .25 * .2^2 * -ln .8
    assert_close(cls, f64(2 * (.75 * .25 * math.log(2) - .25 * .04 * math.log(.8)))[0])     # .2644
    assert_close(l1, f64(5 * .7)[0])                        # .1 + 0 + .2 + .4
    assert_close(giou, f64(2 * 11 / 12)[0])                 # IoU 1/3, GIoU 1/3 - 1/4 = 1/12
    cls, l1, giou = criterion.task_aligned_loss(layer, pairs)
    # t = .8^.25 * (1/3)^.75 = .4149, BCE(.8, t) = -t ln .8 - (1 - t) ln .2 = 1.0343
    t = .8 ** .25 * (1 / 3) ** .75
    bce = -t * math.log(.8) - (1 - t) * math.log(.2)
    assert_close(cls, f64(8 * ((.8 - t) ** 2 * bce + .5 ** 2 * math.log(2)))[0])            # 2.6135
    assert_close(l1, f64(5 * .7)[0])
    assert_close(giou, f64(2 * 11 / 12)[0])


def rank_weight(pair, quality):
    """[Align-DETR Eq. 4-7]  exp(-rank / 1.5), the rank of a pair among those of its object."""
    rivals = [other for other in quality if other[2] == pair[2]]
    return math.exp(-sum(quality[other] > quality[pair] for other in rivals) / 1.5)


def slow_layer_loss(layer, pairs, kind):
    """[DETR Eq. 2], pair by pair and entry by entry; kind is focal, tal or align."""
    (logits, pred), wanted, quality = (t.tolist() for t in layer), {}, {}
    cls = l1 = giou = 0.0
    for b, i, j, label, gt in zip(*(column.tolist() for column in pairs)):
        s, u = sigmoid(logits[b][i][label]), iou_and_giou(pred[b][i], gt)[0]
        quality[b, i, j] = max(s ** .25 * u ** .75, .01)                            # [SD Eq. 6]
    for b, i, j, label, gt in zip(*(column.tolist() for column in pairs)):
        w = rank_weight((b, i, j), quality) if kind == "align" else 1
        wanted[b, i, label] = quality[b, i, j] * w
        l1 += w * l1_distance(pred[b][i], gt)
        giou += w * (1 - iou_and_giou(pred[b][i], gt)[1])
    B, N, C = layer.logits.shape
    for b, i, c in itertools.product(range(B), range(N), range(C)):
        s, t = sigmoid(logits[b][i][c]), wanted.get((b, i, c))
        if kind == "focal":                                                     # [Focal Loss Eq. 5]
            cls += (-.75 * s ** 2 * math.log(1 - s) if t is None else
                    -.25 * (1 - s) ** 2 * math.log(s))
        elif t is None:
            cls += s ** 2 * -math.log(1 - s)                                        # [SD Eq. 7]
        else:
            focus = (t - s) ** 2 if kind == "tal" else 1                    # [Align-DETR Eq. 4-7]
            cls += focus * (-t * math.log(s) - (1 - t) * math.log(1 - s))
    return f64({"focal": 2, "tal": 8, "align": 1}[kind] * cls, 5 * l1, 2 * giou)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("rule", ["one_to_one", "one_to_many"])
def test_layer_loss_by_definition(generator, kind, rule):
    """[DETR Eq. 2], with [SD Eq. 6-7] for the class term; one image has no object."""
    layer, targets = random_layer(generator, B=3), random_targets(generator, (3, 0, 2))
    pairs = pairs_of(layer, targets, rule)
    assert set(pairs.image_idx.tolist()) == {0, 2}
    found = LOSSES[kind](layer, pairs)
    assert_close(torch.stack(found).detach(), slow_layer_loss(layer, pairs, kind), **EXACT)


def test_box_terms_are_torchvisions(generator):
    """[DETR Eq. 2]  5 * L1 and 2 * (1 - GIoU) of the matched pairs, each times its weight."""
    layer, targets = random_layer(generator, B=1), random_targets(generator, (4,))
    pairs = pairs_of(layer, targets)
    a, b = layer.boxes[0, pairs.query_idx], pairs.boxes
    pairwise = ops.generalized_box_iou(*(ops.box_convert(t, "cxcywh", "xyxy") for t in (a, b)))
    for weights in (torch.ones(4).double(), f64(1, .5, 2, .25)):
        l1, giou = criterion.box_loss(layer, pairs, weights)
        each = torch.nn.functional.l1_loss(a, b, reduction="none")                   # (4, 4)
        assert_close(l1, 5 * (weights[:, None] * each).sum(), **EXACT)
        assert_close(giou, 2 * (weights * (1 - pairwise.diagonal())).sum(), **EXACT)
    for layer_loss in LOSSES.values():
        assert_close(layer_loss(layer, pairs)[1:], criterion.box_loss(layer, pairs))


def test_boxes_of_a_few_pixels_are_not_rounded():
    """GIoU without torchvision's 1e-7 in the denominators, which is much for 4 pixels of 1333."""
    small = f64([.5, .5, .003, .003])
    zero = torch.tensor([0])
    pairs = criterion.Pairs(zero, zero, zero, zero, small + .0005)
    _, giou = criterion.box_loss(boxes.Predictions(f64(0.)[None, None], small[None]), pairs)
    expected = 2 * (1 - iou_and_giou(small[0].tolist(), pairs.boxes[0].tolist())[1])
    assert_close(giou.item(), expected, atol=0, rtol=1e-9)


def test_a_query_without_overlap_keeps_a_target_of_a_hundredth():
    """[SD Eq. 6]  u = 0 would make t = 0, a negative: it is at least .01, as in Align-DETR."""
    layer = boxes.Predictions(f64(0.)[None, None], f64(.2, .2, .1, .1)[None, None])
    zero = torch.tensor([0])
    pairs = criterion.Pairs(zero, zero, zero, zero, f64([.8, .8, .1, .1]))
    cls, _, _ = criterion.task_aligned_loss(layer, pairs)
    assert_close(cls, f64(8 * .49 ** 2 * math.log(2))[0])           # BCE(.5, t) is ln 2 for every t


@pytest.mark.parametrize("kind", LOSSES)
def test_class_term_sends_no_gradient_to_boxes(generator, kind):
    """[SD Eq. 6-7]  Not even where the target is made of their IoU; nor the box terms to logits."""
    layer, targets = random_layer(generator), random_targets(generator)
    cls, l1, giou = LOSSES[kind](layer, pairs_of(layer, targets))
    to_logits, to_boxes = torch.autograd.grad(cls, layer, retain_graph=True, allow_unused=True)
    assert to_boxes is None and to_logits.abs().min() > 0
    to_logits, to_boxes = torch.autograd.grad(l1 + giou, layer, allow_unused=True)
    assert to_logits is None and to_boxes.abs().max() > 0


# --- a decoder ------------------------------------------------------------------------------------

RULES = {"one_to_one": (matcher.match_cost, matcher.one_to_one),
         "one_to_many": (lambda logits, *image: matcher.match_quality(logits.sigmoid(), *image),
                         matcher.one_to_many)}


def test_objects_are_numbered_through_the_batch_and_judged_layers_decide(generator):
    """A loss that ranks the pairs of an object must not mix objects of two images."""
    layer, judged = random_layer(generator, B=3), random_layer(generator, B=3)
    targets, seen = random_targets(generator, (3, 0, 2)), []

    def spy(layer, pairs):
        seen.append((layer, pairs))
        return layer.logits.sum(), layer.boxes.sum(), layer.boxes.sum()

    rule = matcher.match_cost, matcher.one_to_one
    criterion.decoder_loss([layer], targets, *rule, spy, 1.0, judged=[judged])
    criterion.decoder_loss([layer], targets, *rule, spy, 1.0)
    for (scored, pairs), by in zip(seen, (judged, layer), strict=True):
        assert scored.logits is layer.logits and scored.boxes is layer.boxes
        assert_close(pairs, pairs_of(by, targets), **EXACT)
        assert sorted(pairs.object_idx.tolist()) == [0, 1, 2, 3, 4]


def test_predictions_are_scored_in_the_precision_of_their_boxes_and_without_gradient(generator):
    layer = random_layer(generator)
    layer, scored = layer._replace(logits=layer.logits.bfloat16()), []

    def score(logits, pred_boxes, gt_labels, gt_boxes):
        scored.append(logits.dtype)
        found = matcher.match_cost(logits, pred_boxes, gt_labels, gt_boxes)
        assert not found.requires_grad
        return found

    criterion.decoder_loss([layer], random_targets(generator), score, matcher.one_to_one,
                           criterion.focal_loss, 1.0)
    assert scored == [torch.float64] * 2


@pytest.mark.parametrize("rule", RULES)
def test_decoder_loss_is_the_mean_over_objects_summed_over_layers(generator, rule):
    """[DETR Eq. 2]  Every layer and image is matched on its own, the last layer is not special."""
    layers, targets = [random_layer(generator) for _ in range(3)], random_targets(generator)
    parts = criterion.decoder_loss(layers, targets, *RULES[rule], criterion.task_aligned_loss, 5.0)
    every = [pairs_of(layer, targets, rule) for layer in layers]
    assert len({str(pairs.query_idx.tolist()) for pairs in every}) > 1          # they differ
    expected = sum(slow_layer_loss(layer, pairs, "tal") for layer, pairs in zip(layers, every)) / 5
    assert_close(torch.stack(parts[:3]).detach(), expected, **EXACT)
    assert parts.pairs == len(every[-1].query_idx) > 0


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_objects_does_not_matter(generator, rule):
    """[DETR Eq. 2]"""
    layer, [target] = random_layer(generator, B=1), random_targets(generator, (4,))
    order = torch.tensor([2, 0, 3, 1])
    shuffled = target._replace(labels=target.labels[order], boxes=target.boxes[order])
    one, other = (criterion.decoder_loss([layer], [t], *RULES[rule], criterion.task_aligned_loss,
                                         4.0) for t in (target, shuffled))
    assert_close(one, other)


def test_half_precision_logits_are_compared_in_the_precision_of_the_boxes(generator):
    """Under autocast logits are bfloat16 and boxes are not."""
    layer, targets = random_layer(generator), random_targets(generator)
    half = boxes.Predictions(layer.logits.detach().bfloat16(), layer.boxes.detach())
    found, wanted = (criterion.decoder_loss([p], targets, *RULES["one_to_many"],
                                            criterion.focal_loss, 1.0)
                     for p in (half, half._replace(logits=half.logits.double())))
    assert_close(found, wanted, atol=0, rtol=0)


# --- the whole [DAC Fig. 2] -----------------------------------------------------------------------

def test_detection_loss_is_three_losses(generator):
    """[DAC Fig. 2]  O one-to-one, C one-to-many over 3 M, the encoder's with class 0."""
    targets = random_targets(generator, (3, 3))
    assert any(target.labels.any() for target in targets)               # not all of class 0 already
    o, c = [[random_layer(generator) for _ in range(2)] for _ in range(2)]
    proposals = random_layer(generator, N=20)
    parts = criterion.detection_loss(model.Output(o, c, proposals), targets, 6.0,
                                     criterion.task_aligned_loss)
    assert list(parts) == ["O", "C", "encoder"]
    for name, layers, rule, labelled, normaliser, kind in (
            ("O", o, "one_to_one", targets, 6, "tal"), ("C", c, "one_to_many", targets, 18, "tal"),
            ("encoder", [proposals], "one_to_one", class_0(targets), 6, "focal")):
        every = [pairs_of(layer, labelled, rule) for layer in layers]
        expected = sum(slow_layer_loss(layer, pairs, kind)
                       for layer, pairs in zip(layers, every)) / normaliser
        assert_close(torch.stack(parts[name][:3]).detach(), expected, **EXACT)
        assert parts[name].pairs == len(every[-1].query_idx)
    assert_close(criterion.total(parts), sum(x for part in parts.values() for x in part[:3]))
    assert list(criterion.detection_loss(model.Output(o, [], None), targets, 6.0)) == ["O"]


def test_conditional_loss_is_two_losses(generator):
    """[SD Fig. 3]  O and a tenth of the mini-detector's, whose cells learn the objects' classes."""
    targets, proposals = random_targets(generator, (3, 3)), random_layer(generator, N=20)
    o = [random_layer(generator) for _ in range(2)]
    parts = criterion.conditional_loss(model.Output(o, [], proposals), targets, 6.0,
                                       criterion.task_aligned_loss)
    assert list(parts) == ["O", "encoder"]
    for name, layers, normaliser, kind in (("O", o, 6, "tal"),
                                           ("encoder", [proposals], 60, "focal")):
        expected = sum(slow_layer_loss(layer, pairs_of(layer, targets), kind) for layer in layers)
        assert_close(torch.stack(parts[name][:3]).detach(), expected / normaliser, **EXACT)
        assert parts[name].pairs == 6
    learned = criterion.conditional_loss(model.Output(o, [], None), targets, 6.0)
    assert list(learned) == ["O"]


@pytest.mark.parametrize("num_objects, o, c", [(0.0, 1, 1), (0.2, 1, 1), (0.5, 1, 1.5), (2., 2, 6)])
def test_sums_are_divided_by_objects_and_by_nothing_below_1(generator, num_objects, o, c):
    """As released: max(M, 1) for O and encoder, max(3 M, 1) for C, M a mean over processes."""
    layer, targets = random_layer(generator), random_targets(generator, (0, 0))
    parts = criterion.detection_loss(model.Output([layer], [layer], layer), targets, num_objects)
    whole = slow_layer_loss(layer, pairs_of(layer, targets), "focal")[0]
    for name, normaliser in (("O", o), ("C", c), ("encoder", o)):
        assert_close(parts[name].cls.detach(), whole / normaliser)


def test_the_encoder_learns_that_there_is_an_object_not_which(generator):
    """Positive in channel 0: certainty there lowers the loss, in every other channel raises it."""
    proposals, targets = random_layer(generator, B=1, N=8), random_targets(generator, (2,))
    targets[0].labels.copy_(torch.tensor([1, 2]))
    parts = criterion.detection_loss(model.Output([proposals], [], proposals), targets, 2.0)
    gradient, = torch.autograd.grad(parts["encoder"].cls, proposals.logits)
    positives = pairs_of(proposals, class_0(targets)).query_idx
    assert (gradient[0, positives, 0] < 0).all() and (gradient[0, :, 1:] > 0).all()


def test_twice_the_batch_and_twice_the_objects_leave_the_loss(generator):
    """A batch of the same images twice, divided by twice the objects: every part stays."""
    targets = random_targets(generator)
    three = [random_layer(generator, N=N) for N in (6, 6, 20)]          # O, C, proposals
    twice = [boxes.Predictions(*(torch.cat([t, t]) for t in p)) for p in three]
    once, again = (criterion.detection_loss(model.Output([o], [c], proposals), t, num_objects,
                                            criterion.task_aligned_loss)
                   for (o, c, proposals), t, num_objects in ((three, targets, 5.0),
                                                             (twice, targets * 2, 10.0)))
    for name, part in once.items():
        assert_close(again[name][:3], part[:3])
        assert again[name].pairs == 2 * part.pairs


def test_batches_without_objects_have_box_terms_of_zero_with_a_gradient(generator):
    """No process of many may lack a gradient; the class term is that of background alone."""
    layer, targets = random_layer(generator), random_targets(generator, (0, 0))
    parts = criterion.detection_loss(model.Output([layer], [layer], layer), targets, 0.0,
                                     criterion.task_aligned_loss)
    for part in parts.values():
        assert part.l1 == 0 == part.giou and part.l1.requires_grad and part.giou.requires_grad
        assert part.cls > 0 and part.pairs == 0
