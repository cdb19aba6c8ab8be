"""The detector as a whole: it learns two images by heart, in half precision, empty, and traced."""
import helpers
import pytest
import torch
from torch.testing import assert_close

from detr_min import boxes, criterion, decoder_base, decoder_dac, matcher, model
from detr_min.data import dataset
from detr_min.run import config, registry
from helpers import emptied, two_pictures

TINY = dict(d_model=32, num_heads=4, num_points=2, d_ffn=64, encoder_layers=1, decoder_layers=2,
            num_queries=8, num_classes=3)
PRESETS = {"deformable": "shapes", "conditional": "shapes_conditional"}


def marked(base, name, *words):
    """Parameters of a test. Decoders that look forward once differ in gradients alone: slow."""
    return pytest.param(base, name, *words, marks=[pytest.mark.slow] * name.endswith("_once"))


ALL = [marked(base, name, queries) for base in registry.DECODERS
       for name in registry.DECODERS[base] for queries in registry.QUERIES[base]]


ONE_OF_EACH = [                         # the others differ in what two of these have
    ("deformable", "dac", "two_stage"), ("deformable", "decoupled", "task_aware"),
    ("conditional", "decoupled", "task_aware")]


def config_of(base, name, queries, loss="focal", **changes):
    return config.preset(PRESETS[base], model=name, queries=queries, loss=loss,
                         **{**TINY, **changes})


def a_detector(base, name, queries, **changes):
    torch.manual_seed(0)
    return registry.build(config_of(base, name, queries, **changes))


def shaken(detector):
    """Its weights off their start, so that no term is zero."""
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return detector


def a_batch(seed):
    """Two images of 64 x 96, a third of the second is padding."""
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))
    is_pad = torch.zeros(2, 64, 96, dtype=torch.bool)
    is_pad[1, :, 64:] = True
    return images, is_pad


# --- what forward puts together -------------------------------------------------------------------

def test_the_c_decoder_runs_in_training_only():
    """[DAC Fig. 2]  In eval mode DAC-DETR is the detector it is built on, bit for bit."""
    detector, batch = shaken(a_detector("deformable", "dac", "two_stage")), a_batch(0)
    with torch.no_grad():
        trained, tested = detector.train()(*batch), detector.eval()(*batch)
    assert len(trained.c_decoder) == 2 and tested.c_decoder == []
    base = decoder_base.Decoder(2, 32, 4, 3, 2, 64, 3)
    base.load_state_dict(detector.decoder.state_dict())
    assert isinstance(detector.decoder, decoder_dac.DACDecoder)
    detector.decoder = base
    with torch.no_grad():
        answers = detector.train()(*batch), detector.eval()(*batch)
    for answer in answers:
        assert answer.c_decoder == []
        assert_close(answer.o_decoder, tested.o_decoder, atol=0, rtol=0)
        assert_close(answer.proposals, tested.proposals, atol=0, rtol=0)


# --- every combination ----------------------------------------------------------------------------

@pytest.mark.parametrize("base, name, queries", [
    pytest.param(*words.values, marks=[*words.marks, *[pytest.mark.slow] * (
        words.values not in ONE_OF_EACH)]) for words in ALL])
@torch.no_grad()
def test_bf16_is_near_full_precision(base, name, queries):
    """Both decoders. Proposals differ by rounding; the N best of them may be others."""
    detector, batch = shaken(a_detector(base, name, queries)).train(), a_batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        half = detector(*batch)
    full = detector(*batch)
    assert len(half.c_decoder) == (2 if name.startswith("dac") else 0)
    for layer in (*half.o_decoder, *half.c_decoder):
        assert layer.logits.isfinite().all() and layer.boxes.isfinite().all()
        assert layer.boxes.min() >= 0 and layer.boxes.max() <= 1
        assert layer.boxes.dtype == torch.float32               # bf16: 1/256 of an image apart
    one, other = (o.proposals or o.o_decoder[0] for o in (half, full))
    assert_close(one.boxes.float(), other.boxes, atol=.02, rtol=0)


EMPTY = [pytest.param(*words.values, empty, marks=[*words.marks, *[pytest.mark.slow] * (
    empty == "one image" or words.values not in ONE_OF_EACH)])
         for words in ALL for empty in ("one image", "whole batch")]


@pytest.mark.parametrize("base, name, queries, empty", EMPTY)
def test_images_without_objects_are_a_normal_case(base, name, queries, empty):
    """Finite losses and gradients, and every parameter has one: no process of many may lack any."""
    images, is_pad, targets = two_pictures()
    targets = [emptied(targets[0]), emptied(targets[1]) if empty == "whole batch" else targets[1]]
    detector = a_detector(base, name, queries).train()
    output = detector(images, is_pad)
    for kind in registry.LOSSES:
        loss = criterion.total(registry.training(config_of(base, name, queries, kind)).loss(
            output, targets, 1.0))
        assert loss.isfinite() and loss > 0, kind
        detector.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        for parameter_name, parameter in detector.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name


OVERFIT = [
    ("deformable", "dac", "two_stage", "focal"),
    *(pytest.param(*words, marks=pytest.mark.slow) for words in (
        ("conditional", "decoupled", "task_aware", "tal"),
        *(("deformable", name, "two_stage", "focal")
          for name in registry.DECODERS["deformable"] if name != "dac"),
        ("deformable", "decoupled", "task_aware", "tal"),
        ("deformable", "dac", "task_aware", "focal"),
        ("deformable", "dac_release", "two_stage", "align"),
        ("conditional", "conditional", "anchor_cells", "focal"),
        ("conditional", "split", "task_aware", "focal")))]


@pytest.mark.parametrize("base, name, queries, kind", OVERFIT)
def test_overfits_two_images(base, name, queries, kind):
    """[DAC Fig. 2], [SD Fig. 3]  From pixels to boxes: if this fails, nothing else matters."""
    images, is_pad, targets = two_pictures()
    detector = a_detector(base, name, queries).train()
    loss_of = registry.training(config_of(base, name, queries, kind)).loss
    lr, steps = {"deformable": (3e-3, 50), "tal": (4e-3, 200), "focal": (4e-3, 300)}[
        base if base == "deformable" else kind]
    optimizer = torch.optim.AdamW(detector.parameters(), lr=lr)
    for _ in range(steps):
        output = detector(images, is_pad)
        assert bool(output.c_decoder) == ("dac" in name)
        loss = criterion.total(loss_of(output, targets, 3.0))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        output = detector.eval()(images, is_pad)
    assert isinstance(output, model.Output) and output.c_decoder == []      # in training only
    ious, scores = [], []
    for logits, pred_boxes, target in zip(*output.o_decoder[-1], targets):
        query_idx, gt_idx = matcher.one_to_one(
            matcher.match_cost(logits, pred_boxes, target.labels, target.boxes))
        wanted = target.labels[gt_idx]
        assert logits[query_idx].argmax(-1).tolist() == wanted.tolist()
        ious += boxes.paired_iou(pred_boxes[query_idx], target.boxes[gt_idx]).tolist()
        scores += logits[query_idx, wanted].sigmoid().tolist()
    assert min(ious) > .65 and sum(ious) / 3 > .8, ious
    assert min(scores) > .3, scores


# --- padding --------------------------------------------------------------------------------------

PADDED = [pytest.param(base, name, queries,
                       marks=[pytest.mark.slow] * ((base, name, queries) not in ONE_OF_EACH))
          for base in registry.DECODERS for name in registry.DECODERS[base]
          for queries in registry.QUERIES[base]]


def padded(sizes, generator):
    """Noise on 110 x 120 pixels, of which an image has (h, w) at the upper left. -> images, is_pad
    """
    images = torch.randn(len(sizes), 3, 110, 120, generator=generator)
    is_pad = torch.ones(len(sizes), 110, 120, dtype=torch.bool)
    for pad, (h, w) in zip(is_pad, sizes):
        pad[:h, :w] = False
    return images, is_pad


@pytest.mark.parametrize("base, name, queries", PADDED)
@torch.no_grad()
def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(base, name, queries, generator):
    """Pictures alone, beside larger ones, and beside one so small that it has too few cells."""
    cfg = config.preset(PRESETS[base], model=name, queries=queries, **{**TINY, "d_model": 64})
    detector = shaken(registry.build(cfg)).eval()
    sizes = [(40, 57), (61, 90), (9, 12), (101, 33)]
    images, is_pad = padded(sizes, generator)
    together = detector(images, is_pad).o_decoder[-1]
    for i, (h, w) in enumerate(sizes):
        alone = detector(images[i:i + 1, :, :h, :w], is_pad[i:i + 1, :h, :w]).o_decoder[-1]
        for found, expected in zip(together, alone):
            assert_close(found[i:i + 1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("base, name, queries", PADDED)
def test_the_gradient_of_a_batch_is_the_sum_of_its_pictures_own(base, name, queries, generator):
    """Of the whole loss, in float64: no parameter learns from padding, or from the neighbours."""
    cfg = config.preset(PRESETS[base], model=name, queries=queries, **{**TINY, "d_model": 64})
    detector = helpers.shaken(registry.build(cfg), generator)
    sizes = [(40, 57), (61, 90), (9, 12)]
    images, is_pad = padded(sizes, generator)
    targets = [dataset.Target(torch.arange(M) % 3, .1 + .8 * torch.rand(
        M, 4, generator=generator).double(), i, sizes[i]) for i, M in enumerate((3, 2, 0))]

    def gradients(images, is_pad, targets):
        output = detector(images.double(), is_pad)
        loss = criterion.total(registry.training(cfg).loss(output, targets, num_objects=5.0))
        return torch.autograd.grad(loss, detector.parameters())
    alone = [gradients(images[i:i + 1, :, :h, :w], is_pad[i:i + 1, :h, :w], targets[i:i + 1])
             for i, (h, w) in enumerate(sizes)]
    for found, *parts in zip(gradients(images, is_pad, targets), *alone, strict=True):
        assert_close(found, sum(parts), atol=1e-11, rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("preset, changes", [
    ("paper_r50", dict(model="deformable", queries="learned", dn_number=0)),
    ("paper_conditional_r50", {}), ("paper_conditional_dc5", {})])
@torch.no_grad()
def test_published_models_read_padding_but_little(preset, changes):
    """docs/troubleshooting.md: less than 0.01 of a score, 1 % of a box, with random weights."""
    torch.manual_seed(0)
    detector = registry.build(config.preset(preset, num_queries=100, **changes)).eval()
    for part in detector.backbone.modules():
        if hasattr(part, "running_var"):            # a norm whose shift makes padding nonzero
            part.running_var.copy_(.5 + torch.rand_like(part.running_var))
            part.bias.copy_(.3 * torch.randn_like(part.bias))
            part.running_mean.copy_(.3 * torch.randn_like(part.running_mean))
    for parameter in detector.decoder.parameters():
        parameter += .02 * torch.randn_like(parameter)
    images, is_pad = torch.zeros(1, 3, 448, 448), torch.ones(1, 448, 448, dtype=torch.bool)
    images[:, :, :256, :320], is_pad[:, :256, :320] = torch.randn(1, 3, 256, 320), False
    padded = detector(images, is_pad).o_decoder[-1]
    alone = detector(images[:, :, :256, :320], is_pad[:, :256, :320]).o_decoder[-1]
    assert 1e-3 < (padded.logits.sigmoid() - alone.logits.sigmoid()).abs().max() < 1e-2
    assert 1e-3 < (padded.boxes - alone.boxes).abs().max() < 1e-2


# --- traced ---------------------------------------------------------------------------------------

VARIANTS = (
    ("deformable", "dac", "two_stage"),
    ("deformable", "deformable", "learned"), ("deformable", "decoupled", "task_aware"),
    ("deformable", "split", "two_stage"), ("conditional", "conditional", "learned"),
    ("conditional", "decoupled", "task_aware"))


def assert_same(found, wanted):
    assert wanted.o_decoder and not found.c_decoder
    for one, other in zip(found.o_decoder, wanted.o_decoder, strict=True):
        assert_close(one.logits, other.logits, atol=1e-4, rtol=0)
        assert_close(one.boxes, other.boxes, atol=1e-5, rtol=0)


def as_traced(detector, images, is_pad):
    """Answer as a graph does, which reads padding as published models do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return detector(images, is_pad)


@pytest.mark.slow
@pytest.mark.parametrize("base, name, queries", VARIANTS)
@torch.no_grad()
def test_export(base, name, queries):
    """torch.export, any batch size; the graph must not remember the images it was made with."""
    detector = shaken(a_detector(base, name, queries, decoder_layers=2)).eval()
    batch = torch.export.Dim("batch", max=64)
    exported = torch.export.export(detector, a_batch(0), strict=False,
                                   dynamic_shapes=({0: batch}, {0: batch})).module()
    images, is_pad = (torch.cat([one, other]) for one, other in zip(a_batch(1), a_batch(2)))
    assert_same(exported(images, is_pad), as_traced(detector, images, is_pad))


@pytest.mark.skipif(torch.__version__.startswith("2.5."),
                    reason="the compiler of torch 2.5 does not know _replace of a named tuple")
@pytest.mark.slow
@pytest.mark.parametrize("base, name, queries", VARIANTS)
@torch.no_grad()
def test_compile(base, name, queries):
    """torch.compile in one graph, without a break; aot_eager needs no C++ compiler."""
    detector = shaken(a_detector(base, name, queries, decoder_layers=2)).eval()
    compiled = torch.compile(detector, backend="aot_eager", fullgraph=True)
    for seed in (0, 1):
        assert_same(compiled(*a_batch(seed)), as_traced(detector, *a_batch(seed)))
