"""From predictions to one number: [DETR Eq. 2] by hand, in loops, and in a whole training."""
import math

import pytest
import torch
import torchvision.ops as ops
from torch.testing import assert_close

from detr_min import boxes, criterion, matcher, model
from detr_min.data import dataset
from detr_min.run import config, registry

FOCAL, TAL = criterion.CLASS_LOSSES["focal"], criterion.CLASS_LOSSES["tal"]


def f64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def random_boxes(generator, *shape):
    return torch.rand(*shape, 4, generator=generator, dtype=torch.float64) * .5 + .25


def predictions_(generator, B=2, N=6, C=3):
    logits = torch.randn(B, N, C, generator=generator, dtype=torch.float64)
    pred_boxes = random_boxes(generator, B, N)
    return boxes.Predictions(logits.requires_grad_(), pred_boxes.requires_grad_())


def targets_(generator, objects=(3, 2), C=3):
    return [dataset.Target(torch.randint(C, (M,), generator=generator), random_boxes(generator, M),
                        i, (64, 64)) for i, M in enumerate(objects)]


# --- one layer [DETR Eq. 2] -----------------------------------------------------------------------

def test_focal_loss_by_hand():
    """[Focal Loss Eq. 5]  Logit 0 as positive and as negative: (.25 + .75) * .5^2 * ln 2."""
    loss = criterion.focal_loss(torch.zeros(1, 2).double(), f64(1., 0.)[None])
    assert_close(loss, f64(.25 * math.log(2))[0])
    positive = criterion.focal_loss(torch.zeros(1, 1).double(), f64(1.)[None])
    assert_close(positive, f64(.25 * .25 * math.log(2))[0])


def test_focal_loss_by_definition(generator):
    """[Focal Loss Eq. 5]"""
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64) * 2
    targets, expected = torch.zeros(5, 3).double(), 0.0
    targets[1, 2] = targets[4, 0] = 1
    for i in range(5):
        for c in range(3):
            p = 1 / (1 + math.exp(-logits[i, c].item()))
            expected += (-.25 * (1 - p) ** 2 * math.log(p) if targets[i, c] else
                         -.75 * p ** 2 * math.log(1 - p))
    assert_close(criterion.focal_loss(logits, targets), f64(expected)[0], atol=1e-12, rtol=0)


def test_layer_loss_by_hand():
    """[DETR Eq. 2]  One image, one query, one object of the same centre and half the height."""
    predictions = boxes.Predictions(f64(0., 0.)[None, None], f64(.5, .5, .4, .4)[None, None])
    target = dataset.Target(torch.tensor([1]), f64(.5, .5, .4, .2)[None], 0, (64, 64))
    pair = [(torch.tensor([0]), torch.tensor([0]))]
    cls, l1, giou = criterion.layer_loss(predictions, pair, [target], FOCAL)
    assert_close(cls, f64(2 * .25 * math.log(2))[0])        # as test_focal_loss_by_hand, weight 2
    assert_close(l1, f64(5 * .2)[0])                        # only the height is off, by .2
    assert_close(giou, f64(2 * .5)[0])                      # 1 - GIoU = 1 - .5
    cls, _, _ = criterion.layer_loss(predictions, pair, [target], TAL)
    t = .5 ** .25 * .5 ** .75                               # s = .5, u = .5: [SD Eq. 6] t = .5
    assert_close(cls, f64(8 * (abs(t - .5) ** 2 + .25) * math.log(2))[0])


def rank_weight(i, object_of, quality):
    """[Align-DETR Eq. 4-7]  exp(-rank / 1.5), the rank of query i among those of its object."""
    rivals = [other for other in object_of if object_of[other] == object_of[i]]
    return math.exp(-sum(quality[other] > quality[i] for other in rivals) / 1.5)


def slow_layer_loss(predictions, assigned, targets, kind):
    """[DETR Eq. 2], entry by entry and pair by pair."""
    cls = l1 = giou = 0.0
    for b, (pairs, target) in enumerate(zip(assigned, targets)):
        object_of, quality = dict(zip(*(t.tolist() for t in pairs))), {}
        for i, j in object_of.items():
            s = predictions.logits[b, i, target.labels[j]].sigmoid().item()
            u = boxes.iou(predictions.boxes[b, i, None], target.boxes[j, None]).item()
            quality[i] = max(s ** .25 * u ** .75, .01)                              # [SD Eq. 6]
        for i in range(predictions.logits.shape[1]):
            j = object_of.get(i)
            for c in range(predictions.logits.shape[2]):
                s = 1 / (1 + math.exp(-predictions.logits[b, i, c].item()))
                is_positive = j is not None and target.labels[j] == c
                if kind == "focal":
                    cls += (-.25 * (1 - s) ** 2 * math.log(s) if is_positive else
                            -.75 * s ** 2 * math.log(1 - s))
                elif is_positive:
                    t, focus = quality[i], abs(quality[i] - s) ** 2
                    if kind == "align":                                     # [Align-DETR Eq. 4-7]
                        t, focus = t * rank_weight(i, object_of, quality), 1
                    cls += focus * (-t * math.log(s) - (1 - t) * math.log(1 - s))
                else:
                    cls += s ** 2 * -math.log(1 - s)                                # [SD Eq. 7]
            if j is not None:
                w = rank_weight(i, object_of, quality) if kind == "align" else 1
                l1 += w * (predictions.boxes[b, i] - target.boxes[j]).abs().sum().item()
                giou += w * (1 - boxes.giou(predictions.boxes[b, i, None],
                                            target.boxes[j, None]).item())
    return f64({"focal": 2, "tal": 8, "align": 1}[kind] * cls, 5 * l1, 2 * giou)


@pytest.mark.parametrize("kind", ["focal", "tal", "align"])
@pytest.mark.parametrize("assign", ["assign_one_to_one", "assign_one_to_many"])
def test_layer_loss_by_definition(generator, kind, assign):
    """[DETR Eq. 2], with [SD Eq. 6-7] for the class term; one image has no object."""
    predictions, targets = predictions_(generator, B=3), targets_(generator, (3, 0, 2))
    assigned = getattr(criterion, assign)([predictions], [targets])[0]
    assert len(assigned[0][0]) > 0 and len(assigned[1][0]) == 0
    found = criterion.layer_loss(predictions, assigned, targets, criterion.CLASS_LOSSES[kind])
    expected = slow_layer_loss(predictions, assigned, targets, kind)
    assert_close(torch.stack(found).detach(), expected, atol=1e-12, rtol=0)


def test_box_terms_are_torchvisions(generator):
    """[DETR Eq. 2]  5 * L1 and 2 * (1 - GIoU) of the matched pairs."""
    predictions, targets = predictions_(generator, B=1), targets_(generator, (4,))
    assigned, = criterion.assign_one_to_one([predictions], [targets])
    (query_idx, gt_idx), = assigned
    _, l1, giou = criterion.layer_loss(predictions, assigned, targets, FOCAL)
    a, b = predictions.boxes[0, query_idx], targets[0].boxes[gt_idx]
    assert_close(l1, 5 * torch.nn.functional.l1_loss(a, b, reduction="sum"))
    pairwise = ops.generalized_box_iou(*(ops.box_convert(t, "cxcywh", "xyxy") for t in (a, b)))
    assert_close(giou, 2 * (1 - pairwise.diagonal()).sum(), atol=1e-12, rtol=0)


def test_a_query_without_overlap_keeps_a_target_of_a_hundredth(generator):
    """[SD Eq. 6]  u = 0 would make t = 0, a negative: it is at least .01, as in Align-DETR."""
    gt_idx = torch.tensor([0, 1])
    assert_close(TAL.target(f64(.5, .9), f64(0., .9), gt_idx), (f64(.01, .9), f64(1., 1.)))
    assert_close(FOCAL.target(f64(.5, .9), f64(0., .9), gt_idx), (f64(1., 1.), f64(1., 1.)))


@pytest.mark.parametrize("kind", ["focal", "tal", "align"])
def test_class_term_sends_no_gradient_to_boxes(generator, kind):
    """[SD Eq. 6-7]  Not even where the target is made of their IoU; nor the box terms to logits."""
    predictions, targets = predictions_(generator), targets_(generator)
    assigned, = criterion.assign_one_to_one([predictions], [targets])
    class_loss = criterion.CLASS_LOSSES[kind]
    cls, l1, giou = criterion.layer_loss(predictions, assigned, targets, class_loss)
    to_logits, to_boxes = torch.autograd.grad(cls, predictions, retain_graph=True,
                                              allow_unused=True)
    assert to_boxes is None and to_logits.abs().min() > 0
    to_logits, to_boxes = torch.autograd.grad(l1 + giou, predictions, allow_unused=True)
    assert to_logits is None and to_boxes.abs().max() > 0


# --- assignment -----------------------------------------------------------------------------------

def test_each_image_is_matched_on_its_own(generator):
    """[DETR Eq. 1], [DAC Eq. 4]  matcher.py's functions, with a branch's own logits and boxes."""
    predictions, targets = predictions_(generator), targets_(generator)
    o, = criterion.assign_one_to_one([predictions], [targets])
    c, = criterion.assign_one_to_many([predictions], [targets])
    for b, target in enumerate(targets):
        logits, pred_boxes = predictions.logits[b].detach(), predictions.boxes[b].detach()
        image = pred_boxes, target.labels, target.boxes
        assert_close(o[b], matcher.one_to_one(matcher.match_cost(logits, *image)))
        assert_close(c[b], matcher.one_to_many(matcher.match_quality(logits.sigmoid(), *image)))


def test_the_order_of_objects_does_not_matter(generator):
    """[DETR Eq. 2]"""
    predictions, targets = predictions_(generator, B=1), targets_(generator, (4,))
    order = torch.tensor([2, 0, 3, 1])
    shuffled = [targets[0]._replace(labels=targets[0].labels[order], boxes=targets[0].boxes[order])]
    for assign in (criterion.assign_one_to_one, criterion.assign_one_to_many):
        a, b = (criterion.decoder_loss([predictions], assign([predictions], [t]), t, 4.0, TAL)
                for t in (targets, shuffled))
        assert_close(a, b)


def test_layers_and_images_are_matched_each_alone_in_one_transfer(generator, monkeypatch):
    """Layers of several sizes, images with and without objects; there and back once for all."""
    layers = [predictions_(generator) for _ in range(3)]
    layers[1] = boxes.Predictions(*(t[:, :4] for t in layers[1]))
    targets, trips, travel = targets_(generator, (3, 0)), [], criterion.travel
    monkeypatch.setattr(criterion, "travel", lambda *args, **names: trips.append(1) or travel(
        *args, **names))
    assigned = criterion.assign_one_to_one(layers, [targets] * 3)
    assert len(trips) == 2 and {len(target.labels) for target in targets} >= {0}
    for layer, pairs in zip(layers, assigned, strict=True):
        for logits, pred_boxes, target, found in zip(*layer, targets, pairs, strict=True):
            cost = matcher.match_cost(logits, pred_boxes, target.labels, target.boxes)
            for one, other in zip(found, matcher.one_to_one(cost), strict=True):
                assert_close(one, other)


# --- a decoder, and the whole [DAC Fig. 2] --------------------------------------------------------

def test_decoder_loss_is_the_mean_over_objects_summed_over_layers(generator):
    """[DETR Eq. 2]  Every layer is matched anew, the last is not special."""
    layers, targets = [predictions_(generator) for _ in range(3)], targets_(generator)
    assigned = criterion.assign_one_to_many(layers, [targets] * 3)
    parts = criterion.decoder_loss(layers, assigned, targets, 5.0, TAL)
    expected = sum(torch.stack(criterion.layer_loss(p, pairs, targets, TAL))
                   for p, pairs in zip(layers, assigned)) / 5
    assert_close(torch.stack(parts[:3]), expected)
    assert parts.pairs == sum(len(query_idx) for query_idx, _ in assigned[-1]) > 0


def test_detection_loss_is_three_losses(generator):
    """[DAC Fig. 2]  O one-to-one, C one-to-many over 3 M, the encoder's with class 0."""
    targets = targets_(generator, (3, 3))
    assert any(target.labels.any() for target in targets)               # not all of class 0 already
    o, c = [[predictions_(generator) for _ in range(2)] for _ in range(2)]
    proposals = predictions_(generator, N=20)
    parts = criterion.detection_loss(model.Output(o, c, proposals), targets, 6.0, TAL)
    class_0 = [target._replace(labels=0 * target.labels) for target in targets]
    one, many = criterion.assign_one_to_one, criterion.assign_one_to_many
    assert list(parts) == ["O", "C", "encoder"]
    for name, layers, assign, labelled, normaliser, class_loss in (
            ("O", o, one, targets, 6.0, TAL), ("C", c, many, targets, 18.0, TAL),
            ("encoder", [proposals], one, class_0, 6.0, FOCAL)):
        assigned = assign(layers, [labelled] * len(layers))
        assert_close(parts[name], criterion.decoder_loss(layers, assigned, labelled, normaliser,
                                                         class_loss))
    assert_close(criterion.total(parts), sum(x for part in parts.values() for x in part[:3]))
    assert list(criterion.detection_loss(model.Output(o, [], None), targets, 6.0, FOCAL)) == ["O"]


@pytest.mark.parametrize("num_objects, o, c", [(0.0, 1, 1), (0.2, 1, 1), (0.5, 1, 1.5), (2., 2, 6)])
def test_sums_are_divided_by_objects_and_by_nothing_below_1(generator, num_objects, o, c):
    """As released: max(M, 1) for O and encoder, max(3 M, 1) for C, M a mean over processes."""
    layers, targets = [predictions_(generator)], targets_(generator, (0, 0))
    output = model.Output(layers, layers, layers[0])
    parts = criterion.detection_loss(output, targets, num_objects, FOCAL)
    whole = FOCAL.weight * criterion.focal_loss(layers[0].logits, 0 * layers[0].logits)
    for name, normaliser in (("O", o), ("C", c), ("encoder", o)):
        assert_close(parts[name].cls, whole / normaliser)


def test_the_encoder_learns_that_there_is_an_object_not_which(generator):
    """Positive in channel 0: certainty there lowers the loss, in every other channel raises it."""
    proposals, targets = predictions_(generator, B=1, N=8), targets_(generator, (2,))
    targets[0].labels.copy_(torch.tensor([1, 2]))
    parts = criterion.detection_loss(model.Output([proposals], [], proposals), targets, 2.0, FOCAL)
    gradient, = torch.autograd.grad(parts["encoder"].cls, proposals.logits)
    class_0 = [targets[0]._replace(labels=torch.zeros(2, dtype=torch.long))]
    ((query_idx, _),), = criterion.assign_one_to_one([proposals], [class_0])
    assert (gradient[0, query_idx, 0] < 0).all() and (gradient[0, :, 1:] > 0).all()


def test_twice_the_batch_and_twice_the_objects_leave_the_loss(generator):
    """A batch of the same images twice, divided by twice the objects: every part stays."""
    targets = targets_(generator)
    three = [predictions_(generator, N=N) for N in (6, 6, 20)]          # O, C, proposals
    twice = [boxes.Predictions(*(torch.cat([t, t]) for t in p)) for p in three]
    once, again = (criterion.detection_loss(model.Output([o], [c], proposals), t, num_objects, TAL)
                   for (o, c, proposals), t, num_objects in ((three, targets, 5.0),
                                                             (twice, targets * 2, 10.0)))
    for name, part in once.items():
        assert_close(again[name][:3], part[:3])
        assert again[name].pairs == 2 * part.pairs


# --- images without objects -----------------------------------------------------------------------

def tiny(name, queries):
    sizes = dict(d_model=32, num_heads=4, num_points=2, d_ffn=64, encoder_layers=1,
                 decoder_layers=2, num_queries=8, num_classes=3, num_levels=3)
    torch.manual_seed(0)
    return registry.build(config.preset("shapes", model=name, queries=queries, **sizes)).train()


def two_pictures():
    """A red and a green rectangle in one image, a blue one in the other; 64 x 64 pixels."""
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
    return target._replace(labels=target.labels[:0], boxes=target.boxes[:0])


ALL_PAIRS = [(name, queries) for name in registry.DECODERS for queries in registry.QUERIES]


@pytest.mark.parametrize("kind", ["focal", "tal", "align"])
@pytest.mark.parametrize("empty", ["one image", "whole batch"])
@pytest.mark.parametrize("name, queries", ALL_PAIRS)
def test_images_without_objects_are_a_normal_case(name, queries, empty, kind):
    """Finite loss and gradients, and every parameter has one: no process of many may lack any."""
    images, is_pad, targets = two_pictures()
    targets = [emptied(targets[0]), emptied(targets[1]) if empty == "whole batch" else targets[1]]
    detector, class_loss = tiny(name, queries), criterion.CLASS_LOSSES[kind]
    parts = criterion.detection_loss(detector(images, is_pad), targets, 1.0, class_loss)
    loss = criterion.total(parts)
    loss.backward()
    assert loss.isfinite() and loss > 0
    for parameter_name, parameter in detector.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    if empty == "whole batch":
        for part in parts.values():
            assert part.l1 == 0 == part.giou and part.l1.requires_grad and part.giou.requires_grad
            assert part.cls > 0 and part.pairs == 0


# --- the whole: every model learns two images by heart --------------------------------------------

OVERFIT = [(name, "two_stage", "focal") for name in registry.DECODERS] + [
    ("decoupled", "task_aware", "tal"), ("dac", "task_aware", "focal"),
    ("dac_release", "two_stage", "align")]


@pytest.mark.parametrize("name, queries, kind", OVERFIT)
def test_overfits_two_images(name, queries, kind):
    """[DAC Fig. 2], [SD Fig. 3]  From pixels to boxes: if this fails, nothing else matters."""
    images, is_pad, targets = two_pictures()
    detector = tiny(name, queries)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    for _ in range(60):
        output = detector(images, is_pad)
        assert bool(output.c_decoder) == ("dac" in name)
        parts = criterion.detection_loss(output, targets, 3.0, criterion.CLASS_LOSSES[kind])
        loss = criterion.total(parts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
    detector.eval()
    with torch.no_grad():
        output = detector(images, is_pad)
    assert output.c_decoder == []                           # in training only
    answer, ious, scores = output.o_decoder[-1], [], []
    for b, (query_idx, gt_idx) in enumerate(criterion.assign_one_to_one([answer], [targets])[0]):
        found, wanted = answer.logits[b, query_idx], targets[b].labels[gt_idx]
        assert found.argmax(-1).tolist() == wanted.tolist()
        ious += boxes.paired_iou(answer.boxes[b, query_idx], targets[b].boxes[gt_idx]).tolist()
        scores += found.gather(1, wanted[:, None]).sigmoid()[:, 0].tolist()
    assert min(ious) > .65 and sum(ious) / 3 > .8, ious
    assert min(scores) > .3, scores
