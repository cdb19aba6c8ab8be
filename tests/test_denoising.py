"""Contrastive denoising queries [DINO Sec. 3.3]: layout, noise, the mask by hand, nobody peeps."""
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detr_min import boxes, criterion, proposals
from detr_min.data import dataset
from detr_min.release import align_loss, denoising
from detr_min.run import config, registry
from helpers import emptied, two_pictures
from test_criterion import slow_layer_loss

SIZES = dict(d_model=32, num_heads=4, num_points=2, d_ffn=64, encoder_layers=1, decoder_layers=2,
             num_queries=8, num_classes=3, num_levels=3, dn_number=4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def targets_(*objects, C=3):
    generator = seeded()
    return [dataset.Target(torch.randint(C, (M,), generator=generator),
                           torch.rand(M, 4, generator=generator) * .3 + .35, i, (64, 64))
            for i, M in enumerate(objects)]


def detector_(name="dac", queries="two_stage", **sizes):
    torch.manual_seed(0)
    detector = registry.build(config.preset("shapes", model=name, queries=queries,
                                            **{**SIZES, **sizes})).train()
    with torch.no_grad():                   # off their initial values: box heads start at zero
        for parameter in (*detector.decoder.parameters(), *detector.queries.parameters()):
            parameter += .05 * torch.randn(parameter.shape)
    return detector


# --- how many, and where --------------------------------------------------------------------------

@pytest.mark.parametrize("most, groups", [(1, 100), (3, 33), (7, 14), (100, 1), (101, 1), (300, 1)])
def test_number_of_groups(most, groups):
    """G = max(1, 2 * 100 // (2 * most)); E = 2 * most * G."""
    noisy = denoising.noisy_copies(targets_(most, 1), 3, seeded(), dn_number=100)
    assert noisy.num_groups == groups == max(1, 200 // (2 * most))
    assert noisy.labels.shape == (2, 2 * most * groups) == noisy.boxes.shape[:2]


def test_several_processes_are_not_the_same_run_with_denoising():
    """docs/differences.md, row 13: images of 5 and 1 objects together, then each on its own."""
    cfg = config.preset("shapes", **{**SIZES, "dn_number": 10})
    targets, inputs = targets_(5, 1), registry.training(cfg).inputs
    together = inputs(None, None, targets, 1, 0)[2]
    apart = [inputs(None, None, targets[rank:][:1], 1, rank)[2] for rank in (0, 1)]
    assert together.num_groups == 2 and [noisy.num_groups for noisy in apart] == [2, 10]


def test_layout_without_noise_is_positives_then_negatives_in_each_group():
    """Two images of 2 and 1 objects, G = 2: slots 0-1 positive, 2-3 negative, 4-5, 6-7 again."""
    targets = targets_(2, 1)
    noisy = denoising.noisy_copies(targets, 3, seeded(), 4, label_noise=0, box_noise=0)
    a, b = targets[0].labels.tolist()
    assert noisy.labels.tolist() == [[a, b] * 4, [targets[1].labels.item(), 3] * 4]
    assert_close(noisy.boxes[0], targets[0].boxes.repeat(4, 1))
    empty = torch.full((4, 4), .5)
    assert_close(noisy.boxes[1, 0::2], targets[1].boxes.expand(4, 4))
    assert_close(noisy.boxes[1, 1::2], empty)


def test_what_is_to_be_restored_by_hand():
    """Same batch: image 0's positives are slots 0, 1, 4, 5, image 1's 0 and 4; a copy a slot."""
    targets = targets_(2, 1)
    pairs, groups = denoising.to_restore(targets, 8)
    assert groups == 2
    assert pairs.image_idx.tolist() == [0, 0, 0, 0, 1, 1]
    assert pairs.query_idx.tolist() == [0, 1, 4, 5, 0, 4]
    assert pairs.object_idx.unique().tolist() == [0, 1, 2, 3, 4, 5]         # each copy ranks alone
    assert pairs.labels.tolist() == sum(([*t.labels.tolist()] * 2 for t in targets), [])
    assert_close(pairs.boxes[:4], targets[0].boxes.repeat(2, 1))
    assert_close(pairs.boxes[4:], targets[1].boxes.expand(2, 4))


def test_a_positive_restores_the_object_it_was_made_of():
    """noisy_copies and to_restore agree on the layout, whatever the counts."""
    targets = targets_(3, 0, 5, 1)
    noisy = denoising.noisy_copies(targets, 3, seeded(), 23, label_noise=0, box_noise=0)
    pairs, groups = denoising.to_restore(targets, noisy.labels.shape[1])
    assert groups == noisy.num_groups == 4
    assert pairs.image_idx.bincount().tolist() == [4 * 3, 0, 4 * 5, 4 * 1]
    place = pairs.image_idx, pairs.query_idx
    assert len(set(zip(*(index.tolist() for index in place)))) == 4 * 9         # no slot twice
    assert_close(noisy.labels[place], pairs.labels)
    assert_close(noisy.boxes[place], pairs.boxes)


# --- noise ----------------------------------------------------------------------------------------

def test_corners_move_by_less_than_one_or_one_to_two_noises_of_half_a_side():
    """Positives u in [0, 1), negatives [1, 2), times .4 of half the side, either way."""
    targets = [t._replace(boxes=t.boxes / 2 + .25) for t in targets_(4, 4)]     # nothing to clamp
    noisy = denoising.noisy_copies(targets, 3, seeded(), dn_number=400)
    before = torch.stack([boxes.to_xyxy(t.boxes) for t in targets])[:, None, None]
    half = torch.stack([t.boxes[:, 2:].repeat(1, 2) / 2 for t in targets])[:, None, None]
    after = boxes.to_xyxy(noisy.boxes.unflatten(1, (100, 2, 4)))        # (B, G, 2, M, 4)
    u = (after - before) / half / .4
    positive, negative = u[:, :, 0], u[:, :, 1]
    assert positive.abs().max() < 1 + 1e-4 and positive.abs().max() > .99
    assert negative.abs().min() > 1 - 1e-4 and negative.abs().max() < 2 + 1e-4
    assert negative.abs().max() > 1.99 and positive.abs().min() < .01
    for part in (positive, negative):               # 3200 draws: .5 sigma of a mean is .01
        assert abs((part > 0).float().mean() - .5) < .04
    assert abs(positive.abs().mean() - .5) < .03 and abs(negative.abs().mean() - 1.5) < .03
    corners = u.flatten(0, 3)
    assert abs(torch.corrcoef(corners.T) - torch.eye(4)).max() < .06    # each coordinate its own


def test_noisy_boxes_are_clamped_to_the_image_and_keep_an_area():
    target = dataset.Target(torch.tensor([0]), torch.tensor([[.5, .5, 1., 1.]]), 0, (64, 64))
    noisy = denoising.noisy_copies([target], 3, seeded())
    corners = boxes.to_xyxy(noisy.boxes)
    assert corners.min() >= 0 and corners.max() <= 1 + 1e-6 and noisy.boxes[..., 2:].min() > .1
    assert (corners[..., 0] == 0).any() and (corners[..., 0] > .1).any()


def test_a_quarter_of_the_labels_is_drawn_anew():
    """Probability .5 * .5; a draw hits the old label once in C times, so 1/4 * (1 - 1/C) change."""
    targets = targets_(10, 10, C=4)
    noisy = denoising.noisy_copies(targets, 4, seeded(), dn_number=1000)
    old = torch.stack([t.labels for t in targets])[:, None]
    new = noisy.labels.unflatten(1, (200, 10))                          # 4000 labels, sigma .6 %
    assert abs((new != old).float().mean() - .25 * .75) < .02
    drawn = new[new != old]
    assert sorted(drawn.unique().tolist()) == [0, 1, 2, 3] and new.max() < 4
    for part in noisy.labels.unflatten(1, (100, 2, 10)).unbind(2):      # positives and negatives
        assert abs((part != old).float().mean() - .25 * .75) < .03


def test_noise_is_a_pure_function_of_targets_and_generator():
    targets, state = targets_(3, 2), torch.get_rng_state()
    a, b, c = (denoising.noisy_copies(targets, 3, seeded(seed)) for seed in (1, 1, 2))
    assert_close(tuple(a), tuple(b), atol=0, rtol=0)
    assert (a.boxes != c.boxes).any() and (a.labels != c.labels).any()
    assert torch.equal(state, torch.get_rng_state())                    # the global stream is left


def test_groups_get_noise_of_their_own():
    noisy = denoising.noisy_copies(targets_(2), 3, seeded(), dn_number=6)
    assert len(noisy.boxes[0].unique(dim=0)) == noisy.boxes.shape[1] == 12


# --- the mask -------------------------------------------------------------------------------------

def test_mask_by_hand():
    """Two groups of 2 and 1 matching query; x = may not look."""
    assert denoising.blocked(4, 2, 1).int().tolist() == [[0, 0, 1, 1, 0],       # group 0: itself,
                                                         [0, 0, 1, 1, 0],       # the matching one
                                                         [1, 1, 0, 0, 0],
                                                         [1, 1, 0, 0, 0],
                                                         [1, 1, 1, 1, 0]]       # they see none


def test_mask_without_denoising_queries_blocks_nothing():
    assert denoising.blocked(0, 1, 3).tolist() == [[False] * 3] * 3


def test_prepend_puts_them_in_front():
    """Content is the label's embedding, 0 in empty slots; both sets of SD-DETR get the same."""
    detector, targets = detector_("decoupled"), targets_(2, 1)
    noisy = denoising.noisy_copies(targets, 3, seeded(), 4)
    plain = proposals.Queries(torch.randn(2, 2, 5, 32), torch.randn(2, 2, 5, 32),
                              torch.rand(2, 5, 4), None)
    queries = detector.prepend(noisy, plain)
    pos, _ = detector.queries.embed(noisy.boxes)
    for one_set in range(2):
        content = queries.content[one_set]
        assert_close(content[0, :8], detector.label_embed.weight[noisy.labels[0]])
        assert (content[1, 1:8:2] == 0).all() and (content[1, 0:8:2] != 0).all()
        assert_close(queries.pos[one_set, :, :8], pos)
    assert_close(queries.content[:, :, 8:], plain.content)
    assert_close(queries.pos[:, :, 8:], plain.pos)
    assert_close(queries.ref_boxes, torch.cat([noisy.boxes, plain.ref_boxes], 1))
    assert_close(queries.is_blocked, denoising.blocked(8, 2, 5))


# --- in the model ---------------------------------------------------------------------------------

MODELS = [("deformable", "two_stage"), ("dac", "two_stage"), ("dac_release", "two_stage"),
          ("decoupled", "two_stage"), ("dac_decoupled", "two_stage"), ("split", "two_stage"),
          ("dac", "two_stage_unmixed")]


@pytest.mark.parametrize("name, queries", MODELS)
def test_matching_queries_know_nothing_of_the_denoising_ones(name, queries):
    """Other noise, or none: the detections are the same. The noisy ones do see the others."""
    detector, (images, is_pad, targets) = detector_(name, queries), two_pictures()
    a, b = (denoising.noisy_copies(targets, 3, seeded(seed), 4) for seed in (0, 1))
    with torch.no_grad():
        plain, first, second = (detector(images, is_pad, *noisy) for noisy in ((), (a,), (b,)))
    assert plain.o_denoised == plain.c_denoised == ()
    for branch in ("o_decoder", "c_decoder", "proposals"):
        assert_close(getattr(first, branch), getattr(second, branch), atol=0, rtol=0)
        assert_close(getattr(first, branch), getattr(plain, branch), atol=1e-5, rtol=0)
    assert (first.o_denoised[-1].boxes - second.o_denoised[-1].boxes).abs().max() > 1e-2
    assert len(first.o_denoised) == len(first.o_decoder) == 2
    assert len(first.c_denoised) == len(first.c_decoder) == (2 if "dac" in name else 0)
    assert first.o_denoised[0].boxes.shape == (2, 8, 4)                 # G = 2, E = 2 * 2 * 2
    assert first.o_decoder[0].boxes.shape == (2, 8, 4)


@pytest.mark.parametrize("name, queries", MODELS)
def test_no_copies_are_no_noise(name, queries):
    """A batch without objects has no slot, E = 0: the answer is that of a call without noise."""
    detector, (images, is_pad, targets) = detector_(name, queries), two_pictures()
    noisy = denoising.noisy_copies([emptied(target) for target in targets], 3, seeded(), 4)
    assert noisy.boxes.shape == (2, 0, 4)
    with torch.no_grad():
        plain, output = detector(images, is_pad), detector(images, is_pad, noisy)
    for branch in ("o_decoder", "c_decoder", "proposals"):
        assert_close(getattr(output, branch), getattr(plain, branch), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["dac", "dac_release", "decoupled"])
def test_groups_are_independent(name):
    """Nudge a box of group 0: that group answers otherwise, group 1 does not, to the last bit."""
    detector, (images, is_pad, targets) = detector_(name), two_pictures()
    noisy = denoising.noisy_copies(targets, 3, seeded(), 4)
    nudged = noisy._replace(boxes=noisy.boxes.clone())
    nudged.boxes[0, 0] = torch.tensor([.2, .3, .1, .2])
    with torch.no_grad():
        before, after = (detector(images, is_pad, n).o_denoised[-1] for n in (noisy, nudged))
    change = (before.logits - after.logits).abs().amax(-1)[0]           # (E,) of image 0
    assert (change[:4] > 0).all() and (change[4:] == 0).all()


def test_positions_and_references_come_from_the_noisy_boxes():
    """Untrained, layer 1 answers with its reference: the noisy box itself."""
    torch.manual_seed(0)
    detector = registry.build(config.preset("shapes", **SIZES)).train()
    images, is_pad, targets = two_pictures()
    noisy = denoising.noisy_copies(targets, 3, seeded(), 4)
    output = detector(images, is_pad, noisy)
    for layers in (output.o_denoised, output.c_denoised):
        assert_close(layers[0].boxes, noisy.boxes, atol=2e-5, rtol=0)   # logit clamps at 1e-5


def test_a_noisy_box_has_the_position_that_any_query_with_this_box_has():
    """Noisy boxes set to the proposals of the same image: equal positions, slot by query."""
    detector, (images, is_pad, targets) = detector_(), two_pictures()
    levels = detector.on_batch(torch.nn.Sequential(detector.backbone, detector.projections), images,
                               is_pad)
    queries = detector.queries(detector.encoder(*levels))
    noisy = denoising.noisy_copies(targets, 3, seeded(), 4)._replace(boxes=queries.ref_boxes)
    both = detector.prepend(noisy, queries)                                     # E = N = 8
    assert_close(both.pos[:, :, :8], both.pos[:, :, 8:], atol=1e-5, rtol=0)
    assert (both.pos[0, 0, 0] - both.pos[0, 0, 1]).abs().max() > .01


def test_without_denoising_there_is_no_label_embedding():
    assert not hasattr(registry.build(config.preset("shapes")), "label_embed")
    assert detector_().label_embed.weight.shape == (4, 32)              # classes + 1, as released


# --- losses ---------------------------------------------------------------------------------------

def losses(detector, targets, layer_loss=align_loss.layer_loss):
    images, is_pad, _ = two_pictures()
    output = detector(images, is_pad, denoising.noisy_copies(targets, 3, seeded(), 4))
    num_objects = float(sum(len(t.labels) for t in targets))
    parts = criterion.detection_loss(output, targets, num_objects, layer_loss)
    return output, denoising.add_losses(parts, output, targets, num_objects, layer_loss)


def test_losses_of_both_decoders_are_there_and_normalised_by_all_copies():
    """Positives only: negatives and empty slots are background. Normaliser G * objects."""
    targets = two_pictures()[2]
    output, parts = losses(detector_(), targets)
    assert list(parts) == ["O", "C", "encoder", "O_denoising", "C_denoising"]
    one, two = targets[1], targets[0]
    by_hand = criterion.Pairs(                              # image 0: slots 0 1 4 5; image 1: 0 4
        torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 1, 4, 5, 0, 4]), torch.arange(6),
        torch.cat([two.labels, two.labels, one.labels, one.labels]),
        torch.cat([two.boxes, two.boxes, one.boxes, one.boxes]))
    for name, layers in (("O_denoising", output.o_denoised), ("C_denoising", output.c_denoised)):
        expected = sum(slow_layer_loss(layer, by_hand, "align") for layer in layers) / (2 * 3)
        assert_close(torch.stack(parts[name][:3]).detach().double(), expected, atol=1e-4, rtol=0)
        assert parts[name].pairs == 6                                   # of 16 slots


def test_negatives_and_empty_slots_learn_that_there_is_nothing():
    """Every class of theirs is pushed down; a positive's own is pulled up."""
    targets = two_pictures()[2]
    output, parts = losses(detector_("deformable"), targets, criterion.focal_loss)
    logits = output.o_denoised[-1].logits
    gradient, = torch.autograd.grad(parts["O_denoising"].cls, logits)
    positives = torch.zeros_like(logits, dtype=torch.bool)
    for slot, label in zip((0, 1, 4, 5), targets[0].labels.repeat(2)):
        positives[0, slot, label] = True
    for slot in (0, 4):
        positives[1, slot, targets[1].labels] = True
    assert positives.sum() == 6
    assert (gradient[positives] < 0).all() and (gradient[~positives] > 0).all()


@pytest.mark.parametrize("empty", [pytest.param("one image", marks=pytest.mark.slow),
                                   "whole batch"])
@pytest.mark.parametrize("name, queries", MODELS)
def test_images_without_objects_are_a_normal_case(name, queries, empty):
    """No object in the batch: no slot, loss 0, and still every parameter has a gradient."""
    *_, targets = two_pictures()
    targets = [emptied(targets[0]), emptied(targets[1]) if empty == "whole batch" else targets[1]]
    detector = detector_(name, queries)
    output, parts = losses(detector, targets)
    criterion.total(parts).backward()
    for parameter_name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
    if empty == "whole batch":
        assert output.o_denoised[0].logits.shape == (2, 0, 3)
        assert all(term == 0 for term in parts["O_denoising"])
        assert detector.label_embed.weight.grad.abs().max() == 0
    else:
        assert detector.label_embed.weight.grad.abs().max() > 0


@pytest.mark.slow
def test_noise_is_restored_better_after_some_training():
    """Two images, 60 steps: the denoised boxes come closer than the noisy ones were."""
    torch.manual_seed(0)
    cfg = config.preset("shapes", model="dac_release", loss="align", **{**SIZES, "dn_number": 20})
    detector, training = registry.build(cfg).train(), registry.training(cfg)
    images, is_pad, targets = two_pictures()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=4e-3)
    for step in range(60):
        output = detector(*training.inputs(images, is_pad, targets, step, 0))
        optimizer.zero_grad()
        criterion.total(training.loss(output, targets, 3.)).backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.)
        optimizer.step()
    noisy = denoising.noisy_copies(targets, 3, seeded(99), 40)
    with torch.no_grad():
        output = detector(images, is_pad, noisy)
    pairs, _ = denoising.to_restore(targets, noisy.labels.shape[1])
    place = pairs.image_idx, pairs.query_idx
    before = boxes.paired_iou(noisy.boxes[place], pairs.boxes)
    after = boxes.paired_iou(output.o_denoised[-1].boxes[place], pairs.boxes)
    assert after.mean() > before.mean() + .04
