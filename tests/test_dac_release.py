"""DAC-DETR as released: its assignment by hand, its loss term by term, its C-Decoder.

The loss has 39 terms: class, L1 and GIoU of six O layers, six C layers and the encoder; 36 more of
denoising. They are compared with plain loops written from the release's description alone: nothing
of detr_min is called there, scipy solves the assignment.
"""
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.testing import assert_close

from detr_min import boxes, criterion, decoder_dac, matcher
from detr_min.data import dataset
from detr_min.release import align_loss, dac_release, denoising
from helpers import EXACT, f64, iou_and_giou, l1_distance, nudge_query_0, shaken, sigmoid
from test_decoder_dac import SIZES, N, a_memory, some_queries

LAYERS, QUERIES, C, CELLS = 6, 40, 5, 60


# --- its assignment -------------------------------------------------------------------------------

def released(quality, **arguments):
    query_idx, gt_idx = dac_release.one_to_many(quality, **arguments)
    assert query_idx.dtype == gt_idx.dtype == torch.int64
    pairs = list(zip(query_idx.tolist(), gt_idx.tolist()))
    assert pairs == sorted(pairs)
    return pairs


def papers(quality):
    """What the paper's reading assigns."""
    return list(zip(*(index.tolist() for index in matcher.one_to_many(quality))))


def test_forces_the_best_query_of_an_object_below_the_threshold():
    """Case A: nothing passes .4, yet the single best query is assigned. Not so by the paper's."""
    quality = torch.tensor([[.10], [.30], [.20]])
    assert released(quality) == [(1, 0)] and papers(quality) == []


def test_starves_an_object_whose_candidates_all_prefer_another():
    """Case C: two objects that overlap, three candidates, all a little better for object 0."""
    quality = torch.tensor([[.70, .60], [.65, .55], [.60, .50]])
    assert released(quality) == [(0, 0), (1, 0), (2, 0)]


def test_does_not_force_a_query_that_belongs_to_another_object():
    """Case F: none passes for object 1, and its best query, q0, is object 0's: it gets none."""
    quality = torch.tensor([[.50, .30], [.10, .05]])
    assert released(quality) == [(0, 0)]


def test_lets_a_query_serve_two_objects():
    """Case H: object 1 owns q1 and q2, so it gets two queries, its two best: q0 and q1, not q2."""
    quality = torch.tensor([[.70, .31, .30], [.54, .42, .40]]).T
    assert released(quality) == [(0, 0), (0, 1), (1, 1)]
    assert papers(quality) == [(0, 0), (1, 1), (2, 1)]                # by the paper's reading


def test_without_its_random_cap():
    """Case E: 100 objects with 5 good queries each. The release keeps 75 pairs, and 45 objects go
    without (or another number, by chance); here all 500 pairs stay, the same each time."""
    quality = torch.zeros(500, 100)
    quality[torch.arange(500), torch.arange(500) // 5] = 0.8
    pairs = released(quality)
    assert pairs == [(i, i // 5) for i in range(500)] == released(quality)


def slow_one_to_many(quality, threshold, k):
    """The release's steps, without its random cap: one query and one object at a time."""
    N, M = quality.shape
    q = quality.tolist()
    owner = [max(range(M), key=lambda j: (q[i][j], -j)) for i in range(N)]                  # 1
    positive = {i for i in range(N) if q[i][owner[i]] >= threshold}                         # 2
    for j in range(M):
        positive.add(max(range(N), key=lambda i: (q[i][j], -i)))                            # 3
    pairs = []
    for j in range(M):
        owned = sum(owner[i] == j for i in positive)                                        # 5
        ranked = sorted(range(N), key=lambda i: (-q[i][j], i))
        pairs += [(i, j) for i in ranked[:min(owned, k)]]                                   # 6
    return sorted(pairs)


@pytest.mark.parametrize("N, M", [(1, 1), (3, 2), (5, 7), (12, 3), (40, 5), (200, 4)])
@pytest.mark.parametrize("steps", [4, 1000])
def test_one_to_many_by_definition(N, M, steps):
    """Fewer queries than k, more objects than queries, ties, qualities on the threshold."""
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        quality = torch.randint(steps + 1, (N, M), generator=g).double() / steps
        for threshold, k in ((0.4, 6), (0.75, 2), (0.99, 1)):
            pairs = released(quality, threshold=threshold, k=k)
            assert pairs == slow_one_to_many(quality, threshold, k)
    assert released(quality) == slow_one_to_many(quality, 0.4, 6)


def test_equals_the_papers_reading_where_nothing_is_forced_or_claimed_twice():
    """Objects apart, a good query for each: forcing and sharing change nothing."""
    quality = torch.tensor([[.9, .0], [.5, .1], [.3, .0], [.0, .8], [.1, .41]])
    assert released(quality) == papers(quality) == [(0, 0), (1, 0), (3, 1), (4, 1)]


def test_without_objects_or_queries_is_empty():
    assert released(torch.zeros(5, 0)) == [] == released(torch.zeros(0, 3))


def test_ties_go_to_the_lower_index():
    assert released(torch.full((500, 3), 0.5)) == [(i, 0) for i in range(6)]


# --- its loss: the description, in loops ----------------------------------------------------------

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


def pairs_in_loops(c_logits, o_boxes, labels, gt, threshold=.4, k=6):
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
    for layer, both in enumerate(zip(output.o_decoder, output.c_decoder)):
        o_images, c_images = (as_lists(predictions, targets) for predictions in both)
        pairs = [hungarian(*image) for image in o_images]
        terms["O", layer] = ia_bce_l1_giou(o_images, pairs, Z, rank_weights=False)
        pairs = [pairs_in_loops(c[0], *o[1:]) for o, c in zip(o_images, c_images)]
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

def our_loss(output, targets, num_objects):
    """As run/registry.py puts it together for dac_release with align."""
    parts = dac_release.detection_loss(output, targets, num_objects, align_loss.layer_loss)
    return denoising.add_losses(parts, output, targets, num_objects, align_loss.layer_loss)


def our_terms(output, targets):
    """A layer's terms are those of an Output of this layer alone."""
    Z, terms = float(max(1, sum(len(t.labels) for t in targets))), {}
    for layer in range(LAYERS):
        alone = output._replace(**{name: getattr(output, name)[layer:layer + 1] for name in (
            "o_decoder", "c_decoder", "o_denoised", "c_denoised")})
        parts = our_loss(alone, targets, Z)
        for ours, theirs in (("O", "O"), ("C", "C"), ("O_denoising", "dn_O"),
                             ("C_denoising", "dn_C"), ("encoder", "encoder")):
            if ours in parts:
                terms[theirs, 0 if ours == "encoder" else layer] = parts[ours][:3]
    return terms


def assert_same_terms(found, expected):
    assert found.keys() == expected.keys()
    for name, terms in expected.items():
        assert_close(torch.stack(found[name]), f64(*terms), atol=1e-12, rtol=1e-6,
                     msg=lambda m, name=name: f"{name}: {m}")


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
    o, c = ([near(targets, QUERIES, generator) for _ in range(LAYERS)] for _ in range(2))
    dn_o, dn_c = ([near(targets, 2 * most * groups, generator)
                   for _ in range(LAYERS * bool(groups))] for _ in range(2))
    return denoising.Output(o, c, near(targets, CELLS, generator), dn_o, dn_c)


@pytest.mark.parametrize("seed", range(4))
def test_the_releases_39_loss_terms(seed):
    """O 18, C 18 with O's boxes and rank weights over 3 Z, encoder 3; to 1e-6 of each."""
    generator = torch.Generator().manual_seed(seed)
    targets = crowd(generator, (7, 0, 4))
    output = everything(generator, targets)
    expected = slow_terms(output, targets)
    assert sum(map(len, expected.values())) == 39
    assert_same_terms(our_terms(output, targets), expected)
    total = sum(sum(terms) for terms in expected.values())
    assert_close(criterion.total(our_loss(output, targets, 11.0)).item(), total, atol=0, rtol=1e-6)


def test_those_inputs_hold_what_the_release_is_special_in():
    """Queries claimed twice in one class and in two, forced ones, other pairs than the paper's.

    A pair of quality below .4 is there only because the best query of some object was forced.
    """
    seen = set()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        targets = crowd(generator, (7, 0, 4))
        output = everything(generator, targets)
        for o, c in zip(output.o_decoder, output.c_decoder):
            for logits, pred_boxes, target in zip(c.logits, o.boxes, targets):
                quality = matcher.match_quality(logits.sigmoid(), pred_boxes, target.labels,
                                                target.boxes)
                query_idx, gt_idx = dac_release.one_to_many(quality)
                labels = target.labels[gt_idx]
                twice = (query_idx[:, None] == query_idx).triu(1)
                alike = labels[:, None] == labels
                seen |= {"forced"} if (quality[query_idx, gt_idx] < .4).any() else set()
                seen |= {"twice, one class"} if (twice & alike).any() else set()
                seen |= {"twice, two classes"} if (twice & ~alike).any() else set()
                seen |= {"other pairs"} if papers(quality) != released(quality) else set()
    assert seen == {"twice, one class", "twice, two classes", "forced", "other pairs"}


def test_the_36_denoising_terms():
    """Each positive restores its own object: weight 1 in every group, over G Z, both decoders."""
    generator = torch.Generator().manual_seed(0)
    targets = crowd(generator, (4, 0, 3))
    output = everything(generator, targets, groups=3)
    expected = slow_terms(output, targets, groups=3)
    assert sum(map(len, expected.values())) == 75
    assert_same_terms(our_terms(output, targets), expected)


def test_the_last_object_wins_a_query_claimed_twice_in_one_class():
    """Query 0 serves objects 0 and 1, both of class 2: object 1's target stays, the box gets both.

    u = s^.25 * IoU^.75 with IoU 1 and .5; each object has one pair, so w = 1.
    """
    box, zeros = f64([.5, .5, .4, .4]), torch.tensor([0, 0])
    pairs = criterion.Pairs(zeros, zeros, torch.tensor([0, 1]), torch.tensor([2, 2]),
                            f64([.5, .5, .4, .4], [.5, .5, .4, .2]))
    layer = boxes.Predictions(f64(-9, -9, 2)[None, None], box[None])
    cls, l1, _ = align_loss.layer_loss(layer, pairs)
    p = sigmoid(2.)
    y = p ** .25 * .5 ** .75                                            # not p ** .25 * 1
    negatives = 2 * sigmoid(-9.) ** 2 * -math.log(1 - sigmoid(-9.))
    assert_close(cls.item(), -y * math.log(p) - (1 - y) * math.log(1 - p) + negatives)
    assert_close(l1.item(), 5 * .2)


def test_is_last_claim_by_hand():
    """The first and third pair are one query and one class of one image: the third stays."""
    image_idx, query_idx = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 0])
    labels = torch.tensor([2, 1, 2, 2, 2])
    pairs = criterion.Pairs(image_idx, query_idx, torch.arange(5), labels, torch.zeros(5, 4))
    assert dac_release.is_last_claim(pairs).tolist() == [False, True, True, True, True]


# --- the release's traps --------------------------------------------------------------------------

@pytest.mark.parametrize("objects", [(0, 0), (0,), (1, 0)])
def test_batches_without_objects(objects):
    """The release's boxes collapse there; ours are finite, in all terms and gradients."""
    generator = torch.Generator().manual_seed(0)
    targets = crowd(generator, objects)
    output = everything(generator, targets, groups=1)
    leaves = [t.requires_grad_() for p in (*output.o_decoder, *output.c_decoder) for t in p]
    total = criterion.total(our_loss(output, targets, 1.0))
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
    parts = our_loss(denoising.Output([layer], [layer], layer), targets, 1.0)
    assert criterion.total(parts).isfinite() and parts["C"].pairs >= 1


def test_a_model_without_c_decoder_has_the_other_terms():
    generator = torch.Generator().manual_seed(0)
    targets = crowd(generator, (2,))
    layer = near(targets, 9, generator)
    assert list(our_loss(denoising.Output([layer], [], layer), targets, 2.0)) == ["O", "encoder"]


# --- its decoder ----------------------------------------------------------------------------------

@pytest.fixture
def decoder(generator):
    return shaken(dac_release.DACReleaseDecoder(**SIZES), generator)


def test_layer_1_is_the_same_in_both_decoders_and_layer_2_is_not(decoder):
    """Bit for bit, as measured on the release; so one prediction gets labels of both kinds."""
    queries, memory = some_queries(), a_memory()
    o, c = decoder.o_decoder(queries, memory), decoder.c_decoder(queries, memory)
    assert_close(o[0], c[0], atol=0, rtol=0)
    for layer in (1, 2):
        assert (o[layer].logits - c[layer].logits).abs().amax(-1).min() > 1e-3


def test_c_decoder_by_definition(decoder):
    """c_1 = gather(disperse(q)), then gather alone; references of its own from layer 1 on."""
    queries, memory = some_queries(), a_memory()
    x, pos, ref = queries.content[0], queries.pos[0], queries.ref_boxes
    x = decoder.layers[0].disperse(x, pos)
    for layer, class_head, box_head, found in zip(
            decoder.layers, decoder.class_heads, decoder.box_heads,
            decoder.c_decoder(queries, memory)):
        x = layer.gather(x, pos, ref, memory)
        ref = torch.sigmoid(torch.logit(ref) + box_head(x))
        assert_close(tuple(found), (class_head(x), ref), **EXACT)


def test_the_o_decoder_and_the_weights_are_the_papers(decoder):
    queries, memory = some_queries(), a_memory()
    paper = decoder_dac.DACDecoder(**SIZES).double()
    paper.load_state_dict(decoder.state_dict())
    assert_close(decoder.o_decoder(queries, memory), paper.o_decoder(queries, memory),
                 atol=0, rtol=0)


def test_each_query_of_the_c_decoder_knows_of_all_unlike_the_papers(decoder):
    """Through the first self-attention the nudge of query 0 reaches every query."""
    for change in nudge_query_0(decoder.c_decoder, some_queries(), a_memory()):
        assert (change > 1e-7).all()


def test_the_c_decoder_respects_the_mask_at_its_start(decoder):
    """Query 0 hidden from the others: nudging it moves it alone."""
    is_blocked = torch.zeros(N, N, dtype=torch.bool)
    is_blocked[1:, 0] = True
    queries = some_queries()._replace(is_blocked=is_blocked)
    for change in nudge_query_0(decoder.c_decoder, queries, a_memory()):
        assert change[0] > 1e-3 and (change[1:] < 1e-12).all()
