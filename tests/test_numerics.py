"""Every equation's gradient against finite differences; extreme numbers; bits that repeat."""
import math
import re

import pytest
import torch
from torch.testing import assert_close

import helpers
from detr_min import (attention, boxes, criterion, decoder_base, decoder_conditional, decoder_dac,
                      decoder_decoupled, decoder_decoupled_deformable, matcher, query_gen, tal_loss)
from detr_min.data import dataset
from detr_min.run import config, registry
from helpers import f64, random
from test_readme_map import ROOT

DEFORMABLE = dict(num_layers=1, d_model=8, num_heads=2, num_levels=2, num_points=2, d_ffn=12,
                  num_classes=3)                # one layer: references are detached between layers
CONDITIONAL = dict(num_layers=2, d_model=8, num_heads=2, d_ffn=12, num_classes=3)


# --- finite differences: the functions of README's table, and a few more --------------------------

def layer_of(decoder, sizes=DEFORMABLE):
    return helpers.randomise(decoder(**sizes)).layers[0]


def of_decoder(decoder, run="o_decoder"):
    """Logits and boxes of the last layer as a function of contents, positions and memory."""
    decode = getattr(helpers.randomise(decoder(**DEFORMABLE)), run)
    queries, memory = helpers.some_queries(8, 2, T=2), helpers.padded_memory(8)
    return (lambda content, pos, tokens: tuple(decode(
        queries._replace(content=content, pos=pos), memory._replace(tokens=tokens))[-1]),
        (queries.content, queries.pos, memory.tokens))


def of_conditional(decoder):
    """The same, of contents, positions, spatial queries, references and memory."""
    decode = helpers.randomise(decoder(**CONDITIONAL)).o_decoder
    queries, memory = helpers.conditional_queries(8, 2), helpers.conditional_memory(8)
    return (lambda *five: tuple(decode(
        queries._replace(content=five[0], pos=five[1], spatial=five[2], ref_points=five[3]),
        memory._replace(tokens=five[4]))[-1]), (*queries[:4], memory.tokens))


def of_disperse(decoder, sizes=DEFORMABLE):
    layer = layer_of(decoder, sizes)
    return layer.disperse, (random(1, 3, 8, seed=1), random(1, 3, 8, seed=2))


def of_gather():
    layer, memory = layer_of(decoder_dac.DACDecoder), helpers.padded_memory(8)
    refs = helpers.some_queries(8, 2).ref_boxes
    return (lambda x, pos, refs, tokens: layer.gather(x, pos, refs, memory._replace(tokens=tokens)),
            (random(2, 2, 8, seed=1), random(2, 2, 8, seed=2), refs, memory.tokens))


def of_decoupled_gather():
    layer = layer_of(decoder_decoupled.DecoupledDecoder, CONDITIONAL)
    memory = helpers.conditional_memory(8)
    return (lambda *three: layer.gather(*three, memory),
            [random(2, 4, 8, seed=seed) for seed in (1, 2, 3)])


def of_quality():
    labels, gt_boxes = torch.tensor([1, 0]), f64([.4, .5, .3, .4], [.6, .6, .4, .2])
    return (lambda z, b: matcher.match_quality(z.sigmoid(), b, labels, gt_boxes),
            (random(3, 2), f64([.45, .52, .2, .3], [.5, .57, .5, .3], [.1, .2, .1, .1])))


def of_regions():
    memory = helpers.padded_memory(4, [(4, 6)])
    ref_boxes = f64([[.3, .4, .3, .5], [.6, .5, .5, .4]]).expand(2, 2, 4)
    return (lambda tokens: query_gen.region_features(memory._replace(tokens=tokens), ref_boxes),
            (memory.tokens,))


def of_points():
    predict = helpers.randomise(query_gen.PointPredictor(4, num_points=2, size=3))
    return predict, (random(1, 4, 3, 3),)


def of_points_to_query():
    return (query_gen.points_to_query, (random(1, 4, 7, 7), random(1, 3, 2, seed=1).tanh(),
                                        f64([.4, .5, .3, .6])))


def of_tal_loss():
    targets = f64([0, .3, .9], [0, 0, .01])
    return (lambda z: tal_loss.tal_loss(z, targets)), (random(2, 3),)


GRADIENTS = {
    "decoder_base.DecoderLayer.disperse": lambda: of_disperse(decoder_base.Decoder),
    "decoder_dac.DecoderLayer.disperse": lambda: of_disperse(decoder_dac.DACDecoder),
    "decoder_dac.DecoderLayer.gather": of_gather,
    "decoder_dac.DACDecoder.o_decoder": lambda: of_decoder(decoder_dac.DACDecoder),
    "decoder_dac.DACDecoder.c_decoder": lambda: of_decoder(decoder_dac.DACDecoder, "c_decoder"),
    "matcher.match_quality": of_quality,
    "decoder_conditional.ConditionalDecoder":
        lambda: of_conditional(decoder_conditional.ConditionalDecoder),
    "decoder_decoupled.SplitDecoder": lambda: of_conditional(decoder_decoupled.SplitDecoder),
    "decoder_decoupled.DecoderLayer.disperse":
        lambda: of_disperse(decoder_decoupled.DecoupledDecoder, CONDITIONAL),
    "decoder_decoupled.DecoderLayer.gather": of_decoupled_gather,
    "decoder_decoupled.DecoupledDecoder.o_decoder":
        lambda: of_conditional(decoder_decoupled.DecoupledDecoder),
    "query_gen.region_features": of_regions,
    "query_gen.PointPredictor.forward": of_points,
    "tal_loss.tal_loss": of_tal_loss,
    "query_gen.points_to_query": of_points_to_query,
    "decoder_decoupled_deformable.DecoupledDecoder.o_decoder":
        lambda: of_decoder(decoder_decoupled_deformable.DecoupledDecoder),
    "boxes.refine": lambda: (boxes.refine, (f64([.2, .5, .9, .4]), random(1, 4))),
    "boxes.giou": lambda: (boxes.giou, (f64([.4, .5, .3, .4], [.1, .2, .1, .3]),
                                        f64([.5, .6, .2, .5], [.8, .7, .3, .2]))),
    "boxes.paired_iou": lambda: (boxes.paired_iou, (f64([.4, .5, .3, .4]), f64([.5, .6, .2, .5])))}


@pytest.mark.parametrize("function", GRADIENTS)
def test_gradcheck(function):
    """The gradient is the slope, in float64 and in every input."""
    forward, inputs = GRADIENTS[function]()
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


def test_gradcheck_has_every_function_of_the_readme_s_table():
    rows = re.findall(r"^\| \[(?:DAC|SD) Eq\. \d\].*", (ROOT / "README.md").read_text(), re.M)
    functions = {name for row in rows for name in re.findall(r"`([\w.]+)`", row.split("|")[3])}
    # one_to_many answers with integers, aligned_target without gradient
    assert functions - {"matcher.one_to_many", "tal_loss.aligned_target"} <= set(GRADIENTS)


# --- extreme numbers ------------------------------------------------------------------------------

HOSTILE = {     # cxcywh of all queries: (0, 0) and (1, 1), no size, the whole image, hardly any
    "border": [0., 1., .5, .5], "no size": [.5, .5, 0., 0.], "a line": [.5, .5, 0., 1.],
    "all": [.5, .5, 1., 1.], "outside": [1., 1., 1e-30, 1e-30], "huge": [0., 1., 1., 1.]}


@pytest.mark.parametrize("box", HOSTILE)
@pytest.mark.parametrize("logit", [-1e4, -30., 0., 30., 1e4])
@pytest.mark.parametrize("loss", [criterion.focal_loss, criterion.task_aligned_loss])
def test_losses_are_finite_for_certain_scores_and_boxes_without_size(box, logit, loss):
    """In float32, for both assignments; the other image has no object."""
    output = boxes.Predictions(
        torch.full((2, 4, 3), logit, requires_grad=True),
        torch.tensor(HOSTILE[box]).expand(2, 4, 4).clone().requires_grad_())
    objects = torch.tensor([[.5, .5, 1., 1.], [.999, .001, .002, .002]])
    targets = [dataset.Target(torch.tensor([0, 2]), objects, 0, (64, 64)),
               helpers.emptied(dataset.Target(torch.tensor([0, 2]), objects, 1, (64, 64)))]
    for score, pair in ((matcher.match_cost, matcher.one_to_one),
                        (criterion.quality, matcher.one_to_many)):
        parts = criterion.decoder_loss([output], targets, score, pair, loss, 2.0)
        total = criterion.total({"O": parts})
        gradients = torch.autograd.grad(total, list(output))
        assert total.isfinite() and total >= 0, f"parts {parts}"
        assert all(g.isfinite().all() for g in gradients), f"gradients {gradients}"


@pytest.mark.parametrize("part", ["logits", "boxes"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_prediction_ends_in_a_sentence(part, bad):
    """One-to-one matching is the first to see it."""
    output = boxes.Predictions(torch.zeros(1, 4, 3), torch.full((1, 4, 4), .5))
    getattr(output, part)[0, 3, 1] = bad
    target = dataset.Target(torch.tensor([1]), torch.tensor([[.5, .5, .2, .2]]), 0, (64, 64))
    if part == "logits" and not math.isnan(bad):        # a certain score; the loss is for the loop
        assert matcher.match_cost(output.logits[0], output.boxes[0], *target[:2]).isfinite().all()
        return
    with pytest.raises(ValueError, match="NaN or\n? *infinite"):
        criterion.decoder_loss([output], [target], matcher.match_cost, matcher.one_to_one,
                               criterion.focal_loss, 1.0)


@pytest.mark.parametrize("delta", [-1e4, 1e4])
@pytest.mark.parametrize("edge", [0., 1.])
def test_refine_is_finite_for_any_step_from_any_border(edge, delta):
    ref = torch.full((3, 4), edge, requires_grad=True)
    step = torch.full((3, 4), delta, requires_grad=True)
    box = boxes.refine(ref, step)
    box.sum().backward()
    assert_close(box.detach(), torch.full((3, 4), float(delta > 0)))
    assert ref.grad.isfinite().all() and step.grad.isfinite().all()


@pytest.mark.parametrize("form", [attention.deformable_attention, attention.ms_deform_attn])
@pytest.mark.parametrize("far", [1e6, 1e30, -1e30])
def test_points_far_beyond_the_map_read_nothing(form, far):
    value = torch.ones(1, 5, 2, 3, requires_grad=True)                      # 2 x 2 cells and one
    locations = torch.full((1, 3, 2, 2, 2, 2), far, requires_grad=True)
    out = form(value, [(2, 2), (1, 1)], locations, torch.ones(1, 3, 2, 2, 2))
    out.sum().backward()
    assert (out == 0).all() and (value.grad == 0).all() and (locations.grad == 0).all()


@pytest.mark.parametrize("box", HOSTILE)
def test_regions_and_queries_of_such_boxes_are_finite(box):
    ref_boxes = torch.tensor(HOSTILE[box], dtype=torch.float64).expand(2, 3, 4)
    for shapes, module in (([(3, 5)], query_gen), ([(1, 1)], query_gen),
                           ([(4, 6), (1, 1)], decoder_decoupled_deformable)):
        memory = helpers.memory_of([random(2, 8, h, w) for h, w in shapes])
        features = module.region_features(memory, ref_boxes)
        assert features.isfinite().all() and features.shape == (6, 8, 7, 7)
        content, pos = query_gen.points_to_query(features, f64([1, -1]).expand(6, 2, 2),
                                                 ref_boxes.flatten(0, 1))
        assert content.isfinite().all() and pos.isfinite().all()


# --- whole detectors ------------------------------------------------------------------------------

MODELS = {"dac": dict(model="dac"), "decoupled": dict(name="shapes_sd"),
          "dac_decoupled": dict(model="dac_decoupled", queries="task_aware")}


def a_step(changes, images, targets, precision=torch.float32):
    """One training step of a tiny detector of seed 0: its loss and all its gradients."""
    torch.manual_seed(0)
    changes = {"name": "shapes", "num_classes": 4, "num_queries": 5, **changes}
    detector = registry.build(config.preset(**changes)).train()
    is_pad = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        output = detector(images, is_pad)
    loss_of = (criterion.conditional_loss if changes["name"] == "shapes_sd" else
               criterion.detection_loss)
    loss = criterion.total(loss_of(output, targets, float(sum(len(t.labels) for t in targets)),
                                   criterion.task_aligned_loss))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in detector.named_parameters()
                           if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 8, 33])
def test_a_step_on_tiny_images_is_finite(model, precision, size):
    """One cell a level, or hardly more; then without objects. Not the gradients of one cell in
    bf16: torch's convolution leaves part of them unwritten on some processors."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    targets = [dataset.Target(torch.tensor([0]), torch.tensor([[.5, .5, 1., 1.]]), i, (size, size))
               for i in range(2)]
    for objects in (targets, [helpers.emptied(target) for target in targets]):
        loss, gradients = a_step(MODELS[model], images, objects, precision)
        assert loss.isfinite()
        for name, gradient in gradients.items():
            assert gradient.isfinite().all() or precision != torch.float32 and size < 33, name


@pytest.mark.parametrize("model", ["dac", *(pytest.param(name, marks=pytest.mark.slow)
                                            for name in ("decoupled", "dac_decoupled"))])
def test_two_runs_are_equal_in_bits(model):
    images, _, targets = helpers.two_pictures()
    first, second = (a_step(MODELS[model], images, targets) for _ in range(2))
    assert_close(second, first, atol=0, rtol=0)
