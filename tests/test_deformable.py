"""Deformable DETR as published: queries, refinement or none, dropout, first weights."""
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detr_min import decoder_base, decoder_dac, encoder, proposals
from detr_min.release import deformable
from detr_min.run import config, registry
from helpers import EXACT, f64, nudge_query_0, padded_memory, randomise, some_queries
from test_decoder_base import steps

D, C, N = 8, 3, 5


def a_decoder():
    return randomise(deformable.FixedReferenceDecoder(3, D, 2, 2, 3, 16, C))


# Queries; UnmixedTwoStageQueries is also tested beside proposals.TwoStageQueries


def test_learned_queries():
    """[Deformable DETR Sec. 4.1] the same for every image; the point is read off the position."""
    ask = randomise(deformable.LearnedQueries(5, D, 4, num_sets=2))
    queries = ask(padded_memory(D))
    pos, content = ask.pos_and_content[:, :D], ask.pos_and_content[:, D:]
    linear = ask.reference_points
    for image in range(2):
        assert_close(queries.pos[0, image], pos, **EXACT)
        assert_close(queries.content[0, image], content, **EXACT)
        points = (pos @ linear.weight.T + linear.bias).sigmoid()
        assert_close(queries.ref_boxes[image], points, **EXACT)
    assert queries.content.shape == queries.pos.shape == (2, 2, 5, D)
    assert queries.ref_boxes.shape == (2, 5, 2) and queries.proposals is None
    queries.ref_boxes.sum().backward()                  # points are learned: nothing is detached
    assert linear.weight.grad.abs().max() > 1e-3 and ask.pos_and_content.grad.abs().max() > 1e-3


def test_unmixed_queries_learn_no_content():
    assert "content.0" in dict(proposals.TwoStageQueries(5, D, C, 1).named_parameters())
    assert "content" not in deformable.UnmixedTwoStageQueries(5, D, C, 1).state_dict()


# The decoder without refinement


def test_boxes_worked_by_hand():
    """Each layer starts from the same .5: + log 3 -> 3/4, - log 12 -> 1/13, + log 4 -> 4/5."""
    decoder = steps(a_decoder(), [math.log(3), -math.log(12), math.log(4)])
    queries = some_queries(D, N)._replace(ref_boxes=torch.full((2, N, 4), .5).double())
    answer = decoder.o_decoder(queries, padded_memory(D))
    for prediction, box in zip(answer, [3 / 4, 1 / 13, 4 / 5], strict=True):
        assert_close(prediction.boxes, f64(box).expand(2, N, 4), **EXACT)


def test_it_takes_the_weights_of_the_refined_one_and_layer_1_is_the_same():
    """By definition: every layer adds to the first reference, and reads the image around it."""
    queries, memory = some_queries(D, N), padded_memory(D)
    base, fixed = randomise(decoder_base.Decoder(3, D, 2, 2, 3, 16, C)), a_decoder()
    fixed.load_state_dict(base.state_dict())
    refined, answer = base.o_decoder(queries, memory), fixed.o_decoder(queries, memory)
    assert_close(refined[0], answer[0], atol=0, rtol=0)
    assert (refined[1].boxes - answer[1].boxes).abs().max() > 1e-3
    x = queries.content[0]
    for layer, class_head, box_head, found in zip(
            fixed.layers, fixed.class_heads, fixed.box_heads, answer, strict=True):
        x = layer.disperse(x, queries.pos[0])
        x = layer.gather(x, queries.pos[0], queries.ref_boxes, memory)
        expected = torch.sigmoid(torch.logit(queries.ref_boxes) + box_head(x))
        assert_close(tuple(found), (class_head(x), expected), **EXACT)


def test_from_points_the_size_is_the_box_heads_alone():
    queries, fixed = some_queries(D, N, size=2), steps(a_decoder(), [-math.log(4)] * 3)
    for prediction in fixed.o_decoder(queries, padded_memory(D)):
        assert_close(prediction.boxes[..., 2:], f64(.2).expand(2, N, 2), **EXACT)
        moved = torch.sigmoid(torch.logit(queries.ref_boxes) - math.log(4))
        assert_close(prediction.boxes[..., :2], moved, **EXACT)


def test_every_answer_depends_on_every_query():
    decoder, queries = a_decoder(), some_queries(D, N, size=2)
    for change in nudge_query_0(decoder.o_decoder, queries, padded_memory(D)):
        assert (change > 1e-7).all()


# Look forward once


PASSES = pytest.mark.parametrize("twice, once, name", [
    (decoder_base.Decoder, deformable.OnceDecoder, "o_decoder"),
    (decoder_dac.DACDecoder, deformable.OnceDACDecoder, "o_decoder"),
    (decoder_dac.DACDecoder, deformable.OnceDACDecoder, "c_decoder")])


@PASSES
def test_looking_forward_once_changes_gradients_and_no_answer(twice, once, name):
    """Layer 3's boxes teach its own box head alone; looking twice, also that of layer 2."""
    queries, memory = some_queries(D, N), padded_memory(D)
    twice, once = (randomise(cls(3, D, 2, 2, 3, 16, C)) for cls in (twice, once))
    once.load_state_dict(twice.state_dict())
    for decoder, taught in ((twice, [False, True, True]), (once, [False, False, True])):
        getattr(decoder, name)(queries, memory)[2].boxes.sum().backward()
        reached = [head[-1].weight.grad for head in decoder.box_heads]
        assert [g is not None and bool(g.abs().max() > 1e-6) for g in reached] == taught
    assert_close(getattr(once, name)(queries, memory), getattr(twice, name)(queries, memory),
                 **EXACT)


# Dropout


def a_detector(**changes):
    return registry.build(config.preset("shapes", **{**dict(
        model="dac_once", queries="two_stage_unmixed", d_model=32, num_heads=2, num_levels=2,
        d_ffn=24, encoder_layers=1, decoder_layers=2, num_queries=5), **changes}))


def test_dropout_by_definition(monkeypatch):
    """Doubling in place of dropping: x + 2 attention(x), x + 2 W2 2 ReLU(W1 x); in training only.

    The share that self-attention drops of its weights is too small to be seen.
    """
    shares = []
    monkeypatch.setattr("torch.nn.functional.dropout", lambda x, share, training: (
        shares.append(share) or 2 * x) if training else x)
    detector = randomise(a_detector(dropout=1e-13))
    queries, memory = some_queries(32, N), padded_memory(32)
    x, pos, ref_boxes = queries.content[0], queries.pos[0], queries.ref_boxes
    layer, plain = detector.decoder.layers[0], decoder_dac.DecoderLayer(32, 2, 2, 4, 24).double()
    plain.load_state_dict(layer.state_dict())                           # names are as without

    def by_definition(factor):
        def ffn(y, linears):
            return factor * linears[2](factor * linears[0](y).relu())
        qk = x + pos
        y = plain.norm_self(x + factor * plain.self_attn(qk, qk, x)[0])
        y = plain.norm_cross(y + factor * plain.cross_attn(y + pos, ref_boxes, memory))
        return plain.norm_ffn(y + ffn(y, plain.ffn))
    for mode, factor in ((True, 2), (False, 1)):
        layer.train(mode)
        found = layer.gather(layer.disperse(x, pos), pos, ref_boxes, memory)
        assert_close(found, by_definition(factor), atol=1e-10, rtol=0)
    assert shares == [1e-13] * 4
    centres = encoder.cell_centres(memory.spatial_shapes, memory.valid_ratios)
    detector.encoder.layers[0](memory._replace(pos=memory.tokens), centres)
    assert shares == [1e-13] * 7


def test_dropout_drops_its_share():
    detector = a_detector(dropout=0.3)
    assert [part.dropout for part in detector.modules() if isinstance(part, nn.MultiheadAttention)
            ] == [0.3, 0.3]
    out = detector.decoder.layers[0].ffn(torch.randn(1000, 32))
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (detector.eval().decoder.layers[0].ffn(torch.randn(1000, 32)) != 0).all()


@pytest.mark.parametrize("model", registry.DECODERS["deformable"])
def test_every_decoder_takes_dropout_and_first_weights(model):
    detector = a_detector(model=model, queries="two_stage", dropout=0.5, start="published").train()
    images, is_pad = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    first, second = (detector(images, is_pad).o_decoder[-1].logits for _ in range(2))
    assert (first - second).abs().max() > 1e-3
    first, second = (detector.eval()(images, is_pad).o_decoder[-1].logits for _ in range(2))
    assert_close(first, second, atol=0, rtol=0)


# First weights


def test_first_weights_are_those_of_the_authors_code():
    """Uniform within sqrt(6 / (rows + columns)), Glorot's bound; PyTorch's is sqrt(1 / columns)."""
    detector = a_detector(d_model=64, d_ffn=96, start="published")
    mini, layers = detector.queries.mini_detector, detector.decoder.layers
    matrices = [mini.project, detector.queries.pos_project, detector.encoder.layers[0].ffn[0],
                layers[0].self_attn.out_proj, layers[0].ffn[0], layers[1].ffn[2]]
    attention = layers[1].cross_attn
    for linear in (*matrices, attention.value_proj, attention.output_proj):
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert 0.98 * bound < linear.weight.abs().max() <= bound, linear
    in_proj, bound = layers[0].self_attn.in_proj_weight, math.sqrt(6 / (3 * 64 + 64))
    assert 0.98 * bound < in_proj.abs().max() <= bound
    assert not torch.equal(layers[0].ffn[0].weight, layers[1].ffn[0].weight)
    for heads, of_encoder in ((detector.decoder.class_heads, mini.class_head),
                              (detector.decoder.box_heads, mini.box_head)):
        for head in (heads[1], of_encoder):
            assert head is not heads[0]
            assert_close(head.state_dict(), heads[0].state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["paper_r50", "paper_swin_l", "paper_deformable_r50", "release"])
def test_the_papers_presets_start_as_published(name):
    assert config.preset(name).recipe.start == "published"
    assert config.preset("shapes").recipe.start == "torch"


@pytest.mark.parametrize("name, num_heads", [("deformable", 1), ("deformable_fixed", 2)])
def test_boxes_of_learned_queries_start_small_where_a_layer_starts_from_a_point(name, num_heads):
    """Without refinement every layer does: sides of sigmoid(-2) in place of one half."""
    detector = registry.build(config.preset(
        "shapes", model=name, queries="learned", d_model=32, num_heads=4, d_ffn=32,
        encoder_layers=1, decoder_layers=2, num_queries=5, num_classes=3))
    biases = [head[-1].bias[2:].tolist() for head in detector.decoder.box_heads]
    assert biases == [[-2, -2]] * num_heads + [[0, 0]] * (2 - num_heads)
