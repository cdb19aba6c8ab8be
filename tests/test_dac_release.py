"""The release's loss, term by term, against plain loops written from its description alone.

39 terms: class, L1 and GIoU of six O layers, six C layers and the encoder; 36 more of denoising.
Nothing of detr_min is called in the loops; scipy solves the assignment.
"""
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.testing import assert_close

from detr_min import boxes, criterion, decoder_dac, model
from detr_min.data import dataset
from detr_min.release import dac_release, denoising
from detr_min.run import registry

ALIGN = criterion.CLASS_LOSSES["align"]
LAYERS, N, C, CELLS = 6, 40, 5, 60


# --- the description, in loops --------------------------------------------------------------------

def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def iou_and_giou(a, b):
    """Of two cxcywh boxes."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
        (x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (a, b))
    both = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    either = a[2] * a[3] + b[2] * b[3] - both
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return both / either, both / either - (hull - either) / hull


def l1_distance(a, b):
    return sum(abs(x - y) for x, y in zip(a, b))


def hungarian(logits, pred, labels, gt):
    """cost = 2 (focal_pos - focal_neg) + 5 L1 - 2 GIoU -> [(query, object)]"""
    cost = [[0.0] * len(gt) for _ in pred]
    for i, box in enumerate(pred):
        for m, (label, target) in enumerate(zip(labels, gt)):
            p = sigmoid(logits[i][label])
            positive = .25 * (1 - p) ** 2 * -math.log(p + 1e-8)
            negative = .75 * p ** 2 * -math.log(1 - p + 1e-8)
            cost[i][m] = (2 * (positive - negative) + 5 * l1_distance(box, target)
                          - 2 * iou_and_giou(box, target)[1])
    return list(zip(*linear_sum_assignment(cost))) if gt else []


def one_to_many(c_logits, o_boxes, labels, gt, threshold=.4, k=6):
    """C scores with O boxes; owner, threshold, forced best, c_m, top of the whole row."""
    score = [[.7 * iou_and_giou(box, target)[0] + .3 * sigmoid(z[label])
              for z, box in zip(c_logits, o_boxes)] for label, target in zip(labels, gt)]
    queries = range(len(o_boxes))
    owner = [max(range(len(gt)), key=lambda m: score[m][j]) for j in queries] if gt else []
    positive = {j for j in queries if gt and score[owner[j]][j] >= threshold}
    positive |= {max(queries, key=lambda j: row[j]) for row in score}
    pairs = []
    for m, row in enumerate(score):
        count = sum(owner[j] == m for j in positive)
        pairs += [(j, m) for j in sorted(queries, key=lambda j: -row[j])[:min(count, k)]]
    return pairs                                                        # object by object


def ia_bce_l1_giou(images, pairs_of, Z, rank_weights):
    """The three terms of one layer; images are (logits, pred, labels, gt), as lists."""
    cls = l1 = giou = 0.0
    for (logits, pred, labels, gt), pairs in zip(images, pairs_of):
        quality = {(j, m): max(sigmoid(logits[j][labels[m]]) ** .25
                               * iou_and_giou(pred[j], gt[m])[0] ** .75, .01) for j, m in pairs}
        y, w = {}, {}
        for j, m in pairs:                                              # the last write stays
            better = [q for q, other in quality if other == m and quality[q, m] > quality[j, m]]
            w[j, m] = math.exp(-len(better) / 1.5) if rank_weights else 1.0
            y[j, labels[m]] = quality[j, m] * w[j, m]
            l1 += w[j, m] * l1_distance(pred[j], gt[m])
            giou += w[j, m] * (1 - iou_and_giou(pred[j], gt[m])[1])
        for j, row in enumerate(logits):
            for c, z in enumerate(row):
                p = sigmoid(z)
                a, b = (y[j, c], 1 - y[j, c]) if (j, c) in y else (0, p ** 2)
                cls += -a * math.log(p) - b * math.log(1 - p)
    return 1 * cls / Z, 5 * l1 / Z, 2 * giou / Z


def focal_l1_giou(images, pairs_of, Z):
    """The encoder's three terms: every object in channel 0."""
    cls = l1 = giou = 0.0
    for (logits, pred, _, gt), pairs in zip(images, pairs_of):
        matched = {j for j, _ in pairs}
        for j, row in enumerate(logits):
            for c, z in enumerate(row):
                p = sigmoid(z)
                cls += (.25 * (1 - p) ** 2 * -math.log(p) if j in matched and c == 0 else
                        .75 * p ** 2 * -math.log(1 - p))
        l1 += sum(l1_distance(pred[j], gt[m]) for j, m in pairs)
        giou += sum(1 - iou_and_giou(pred[j], gt[m])[1] for j, m in pairs)
    return 2 * cls / Z, 5 * l1 / Z, 2 * giou / Z


def as_lists(predictions, targets):
    return [(z.tolist(), b.tolist(), t.labels.tolist(), t.boxes.tolist())
            for z, b, t in zip(*predictions, targets)]


def slow_terms(output, targets, groups=0):
    """{("O", layer): (cls, l1, giou), ..., ("encoder", 0): ...}, and ("dn_O", layer) with groups"""
    Z, terms = max(1, sum(len(t.labels) for t in targets)), {}
    for layer, (o, c) in enumerate(zip(output.o_decoder, output.c_decoder)):
        o_images, c_images = as_lists(o, targets), as_lists(c, targets)
        pairs = [hungarian(*image) for image in o_images]
        terms["O", layer] = ia_bce_l1_giou(o_images, pairs, Z, rank_weights=False)
        pairs = [one_to_many(c_logits, o_boxes, labels, gt) for (c_logits, *_), (_, o_boxes, labels,
                 gt) in zip(c_images, o_images)]
        terms["C", layer] = ia_bce_l1_giou(c_images, pairs, 3 * Z, rank_weights=True)
    class_0 = [t._replace(labels=0 * t.labels) for t in targets]
    images = as_lists(output.proposals, class_0)
    terms["encoder", 0] = focal_l1_giou(images, [hungarian(*image) for image in images], Z)
    most = max(len(t.labels) for t in targets)
    for name, layers in (("O", output.o_denoised), ("C", output.c_denoised)):
        pairs = [[(group * 2 * most + m, m) for group in range(groups)
                  for m in range(len(t.labels))] for t in targets]
        for layer, p in enumerate(layers):
            terms["dn_" + name, layer] = ia_bce_l1_giou(as_lists(p, targets), pairs, groups * Z,
                                                        rank_weights=False)
    return terms


# --- ours -----------------------------------------------------------------------------------------

def our_terms(output, targets):
    """The same from criterion: a layer's terms are those of an Output of this layer alone."""
    Z, terms = float(max(1, sum(len(t.labels) for t in targets))), {}
    for layer in range(LAYERS):
        alone = output._replace(**{name: getattr(output, name)[layer:layer + 1] for name in (
            "o_decoder", "c_decoder", "o_denoised", "c_denoised")})
        parts = criterion.detection_loss(alone, targets, Z, ALIGN, criterion.release_assignment)
        for ours, theirs in (("O", "O"), ("C", "C"), ("O_denoising", "dn_O"),
                             ("C_denoising", "dn_C"), ("encoder", "encoder")):
            if ours in parts:
                terms[theirs, 0 if ours == "encoder" else layer] = parts[ours][:3]
    return terms


def near(targets, num, generator, spread=.04):
    """Predictions that crowd around the objects, some of them, as a trained decoder's do.

    Of three objects or more the last one has none near: its best query overlaps by a third.
    """
    logits = torch.randn(len(targets), num, C, generator=generator, dtype=torch.float64) * 2 - 1
    pred = torch.rand(len(targets), num, 4, generator=generator, dtype=torch.float64) * .4 + .3
    for b, target in enumerate(targets):
        M = len(target.labels) - (len(target.labels) > 2)
        for j in range(num // 2 if M else 0):
            gt = target.boxes[j % M]
            pred[b, j] = gt + spread * torch.randn(4, generator=generator, dtype=torch.float64)
            logits[b, j, target.labels[j % M]] += 2
        if M < len(target.labels):
            pred[b, -1] = target.boxes[-1]
            pred[b, -1, 0] -= target.boxes[-1, 2] / 2                   # half of each box is common
    return boxes.Predictions(logits, pred.clamp(.05, .95))


def crowd(generator, objects):
    """Objects in overlapping pairs, mostly of one class: queries get claimed twice.

    Of three objects or more the last one is far from all others, at the lower right.
    """
    targets = []
    for i, M in enumerate(objects):
        gt = torch.rand(M, 4, generator=generator, dtype=torch.float64) * .3 + .35
        gt[1::2] = gt[:2 * (M // 2):2] + .02                          # a near copy of its neighbour
        if M > 2:
            gt[-1] = torch.tensor([.85, .85, .15, .2])
        labels = torch.randint(C, (M,), generator=generator)
        labels[1::4] = labels[:4 * ((M + 2) // 4):4][:len(labels[1::4])]        # half of them alike
        targets.append(dataset.Target(labels, gt, i, (64, 64)))
    return targets


def everything(generator, targets, groups=0):
    """An Output of six layers, with denoising queries of `groups` groups."""
    most = max(len(t.labels) for t in targets)
    o, c = ([near(targets, N, generator) for _ in range(LAYERS)] for _ in range(2))
    dn_o, dn_c = ([near(targets, 2 * most * groups, generator)
                   for _ in range(LAYERS * bool(groups))] for _ in range(2))
    return model.Output(o, c, near(targets, CELLS, generator), dn_o, dn_c)


@pytest.mark.parametrize("seed", range(4))
def test_the_releases_39_loss_terms(seed):
    """O 18, C 18 with O's boxes and rank weights over 3 Z, encoder 3; to 1e-6 of each."""
    generator = torch.Generator().manual_seed(seed)
    targets = crowd(generator, (7, 0, 4))
    output = everything(generator, targets)
    expected, found = slow_terms(output, targets), our_terms(output, targets)
    assert sum(map(len, expected.values())) == 39 and found.keys() == expected.keys()
    for name, terms in expected.items():
        assert_close(torch.stack(found[name]), torch.tensor(terms).double(), atol=1e-12, rtol=1e-6,
                     msg=lambda m, name=name: f"{name}: {m}")
    whole = criterion.detection_loss(output, targets, 11.0, ALIGN, criterion.release_assignment)
    total = sum(sum(terms) for terms in expected.values())
    assert_close(criterion.total(whole).item(), total, atol=0, rtol=1e-6)


def test_those_inputs_hold_what_the_release_is_special_in():
    """Queries claimed twice in one class and in two, forced ones, other pairs than the paper's.

    A pair of quality below .4 is there only because the best query of some object was forced.
    """
    seen = set()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        targets = crowd(generator, (7, 0, 4))
        output = everything(generator, targets)
        paper = criterion.paper_assignment(output, targets)
        for layer, assigned in enumerate(criterion.release_assignment(output, targets)):
            for b, (query_idx, gt_idx) in enumerate(assigned):
                labels = targets[b].labels[gt_idx]
                scores = output.c_decoder[layer].logits[b, query_idx, labels].sigmoid()
                ious = boxes.paired_iou(output.o_decoder[layer].boxes[b, query_idx],
                                        targets[b].boxes[gt_idx])
                seen |= {"forced"} if (.3 * scores + .7 * ious < .4).any() else set()
                twice = (query_idx[:, None] == query_idx).triu(1)
                alike = labels[:, None] == labels
                seen |= {"twice, one class"} if (twice & alike).any() else set()
                seen |= {"twice, two classes"} if (twice & ~alike).any() else set()
                if len(query_idx) != len(paper[layer][b][0]):
                    seen.add("other pairs than the paper's")
    assert seen == {"twice, one class", "twice, two classes", "forced",
                    "other pairs than the paper's"}


def test_the_36_denoising_terms():
    """Each positive restores its own object: weight 1 in every group, over G Z, both decoders."""
    generator = torch.Generator().manual_seed(0)
    targets = crowd(generator, (4, 0, 3))
    output = everything(generator, targets, groups=3)
    expected, found = slow_terms(output, targets, groups=3), our_terms(output, targets)
    assert sum(map(len, expected.values())) == 75 and found.keys() == expected.keys()
    for name, terms in expected.items():
        assert_close(torch.stack(found[name]), torch.tensor(terms).double(), atol=1e-12, rtol=1e-6,
                     msg=lambda m, name=name: f"{name}: {m}")
    _, _, groups = denoising.to_restore(targets, 3 * 2 * 4)
    assert groups == 3


def test_boxes_of_a_few_pixels_are_not_rounded():
    """GIoU without torchvision's 1e-7 in the denominators, which is much for 4 pixels of 1333."""
    small = torch.tensor([[.5, .5, .003, .003]], dtype=torch.float64)
    target = dataset.Target(torch.tensor([0]), small + .0005, 0, (1333, 1333))
    predictions = boxes.Predictions(torch.zeros(1, 1, 1).double(), small[None])
    pair = [(torch.tensor([0]), torch.tensor([0]))]
    _, _, giou = criterion.layer_loss(predictions, pair, [target], ALIGN)
    expected = 2 * (1 - iou_and_giou(small[0].tolist(), target.boxes[0].tolist())[1])
    assert_close(giou.item(), expected, atol=0, rtol=1e-9)


def test_the_last_object_wins_a_query_claimed_twice_in_one_class():
    """Query 0 serves objects 0 and 1, both of class 2: object 1's target stays, the box gets both.

    u = .5^.25 * IoU^.75 with IoU 1 and .5; each object has one pair, so w = 1.
    """
    box = torch.tensor([[.5, .5, .4, .4]], dtype=torch.float64)
    target = dataset.Target(torch.tensor([2, 2]), torch.cat([box, box]), 0, (64, 64))
    target.boxes[1, 3] = .2
    predictions = boxes.Predictions(torch.zeros(1, 1, 3).double(), box[None])
    pairs = [(torch.tensor([0, 0]), torch.tensor([0, 1]))]
    cls, l1, _ = criterion.layer_loss(predictions, pairs, [target], ALIGN)
    assert_close(cls.item(), math.log(2) * (1 + .25 + .25))     # y ln 2 + (1 - y) ln 2, 2 negatives
    assert_close(l1.item(), 5 * .2)
    certain = predictions._replace(logits=torch.tensor([[[-9., -9., 2.]]], dtype=torch.float64))
    cls, _, _ = criterion.layer_loss(certain, pairs, [target], ALIGN)
    p = sigmoid(2.)
    y = p ** .25 * .5 ** .75                                            # not p ** .25 * 1
    negatives = 2 * sigmoid(-9.) ** 2 * -math.log(1 - sigmoid(-9.))
    assert_close(cls.item(), -y * math.log(p) - (1 - y) * math.log(1 - p) + negatives)
    keep = criterion.is_last_claim(torch.tensor([0, 0, 0, 1]), torch.tensor([2, 1, 2, 2]))
    assert keep.tolist() == [False, True, True, True]           # same query and same class alone


# --- the release's traps --------------------------------------------------------------------------

@pytest.mark.parametrize("objects", [(0, 0), (0,), (1, 0)])
def test_batches_without_objects(objects):
    """The release's boxes collapse there; ours are finite, in all terms and gradients."""
    generator = torch.Generator().manual_seed(0)
    targets = crowd(generator, objects)
    output = everything(generator, targets, groups=1)
    leaves = [t.requires_grad_() for p in (*output.o_decoder, *output.c_decoder) for t in p]
    parts = criterion.detection_loss(output, targets, 1.0, ALIGN, criterion.release_assignment)
    total = criterion.total(parts)
    assert total.isfinite() and total > 0
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("num, classes", [(1, 1), (3, 2), (50, 20)])
def test_any_number_of_queries_and_classes(num, classes):
    """The release needs 6 queries for its top-k and knows 91 classes, or 20."""
    generator = torch.Generator().manual_seed(0)
    box = torch.tensor([[.5, .5, .4, .4]])
    targets = [dataset.Target(torch.tensor([classes - 1]), box, 0, (64, 64))]
    layer = boxes.Predictions(torch.randn(1, num, classes, generator=generator),
                              torch.rand(1, num, 4, generator=generator) * .2 + .4)
    parts = criterion.detection_loss(model.Output([layer], [layer], layer), targets, 1.0, ALIGN,
                                     criterion.release_assignment)
    assert criterion.total(parts).isfinite() and parts["C"].pairs >= 1


def test_a_crowd_is_assigned_the_same_way_twice():
    """Beyond 75 positives the release draws; ours does not."""
    generator = torch.Generator().manual_seed(0)
    targets = crowd(generator, (30,))
    layer = near(targets, 300, generator, spread=.01)
    output = model.Output([layer], [layer], None)
    (first,), (second,) = (criterion.release_assignment(output, targets) for _ in range(2))
    assert_close(first, second)
    assert len(first[0][0]) > 75


# --- its decoder ----------------------------------------------------------------------------------

def test_release_decoder_is_the_papers_but_for_the_start():
    """Same weights, same O-Decoder; registered as dac_release, with its assignment."""
    assert registry.DECODERS["dac_release"] is dac_release.DACReleaseDecoder
    assert criterion.C_ASSIGNMENTS == {"dac_release": criterion.release_assignment}
    assert issubclass(dac_release.DACReleaseDecoder, decoder_dac.DACDecoder)
    assert "o_decoder" not in vars(dac_release.DACReleaseDecoder)
