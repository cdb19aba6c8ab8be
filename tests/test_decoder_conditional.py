"""Conditional DETR's decoder by definition, and the whole model against transformers."""
import math

import helpers
import pytest
import torch
from torch.testing import assert_close

from detr_min import attention_conditional, backbone, decoder_conditional, proposals_conditional
from detr_min.run import config, registry
from helpers import f64

D, H, N, C = 32, 4, 6, 3
SIZES = dict(num_layers=3, num_classes=C, d_model=D, num_heads=H, d_ffn=48)

@pytest.fixture
def plain(generator):
    return helpers.shaken(decoder_conditional.ConditionalDecoder(**SIZES), generator)


def test_plain_decoder_worked_by_hand():
    """[SD Eq. 1]  Two layers of width 1, where two cells hold 4 and 8 and lie at 0 and 1.

    Weights are 1, except: self-attention's queries log 3, cross-attention compares positions only.
    """
    decoder = helpers.on_paper(decoder_conditional.ConditionalDecoder(2, 1, 1, 1, 1))
    first, second = decoder.layers
    first.self_attn.q_content.weight.data.fill_(math.log(3))
    first.self_attn.q_pos.weight.data.fill_(math.log(3))
    second.self_attn.v_proj.weight.data.zero_()         # the second's self-attention reads 0
    first.cross_attn.q_pos.weight.data.zero_()
    for layer in decoder.layers:
        layer.cross_attn.q_content.weight.data.zero_()
        layer.cross_attn.q_spatial.weight.data.fill_(2 ** .5 * math.log(3))     # / sqrt(2D/H) below
        layer.ffn[0].bias.data.fill_(-16)                       # FFN(x) = x + max(x - 16, 0)
    decoder.query_scale[0].bias.data.fill_(-11)                 # T = max(x - 11, 0)
    memory = helpers.memory_of([f64(4, 8)[None, None, None]])._replace(pos=f64([[0], [1]]))
    content, pos, spatial = (f64(*x)[None, None, :, None] for x in ((2, 6), (-2, -5), (1, 0)))
    queries = proposals_conditional.Queries(content, pos, spatial, f64([[.5, .5], [.5, .5]]), None)
    # layer 1, self-attention: with positions 0 and 1; shares 1/2, 1/2 and 1/4, 3/4
    #          2 + 4 = 6,  6 + 5 = 11
    #          cross-attention, T = 1: exp(log 3 * 1 * position) = 1, 3; shares 1/4, 3/4, reads 7
    #          the other query's e is 0: shares 1/2, 1/2, reads 6;  6 + 7 = 13,  11 + 6 = 17
    #          FFN: 13,  17 + 1 = 18
    # layer 2, T = 13 - 11 = 2: exp(log 3 * 2 * position) = 1, 9; reads (4 + 9 * 8)/10 = 7.6
    #          13 + 7.6 = 20.6,  18 + 6 = 24;     FFN: 20.6 + 4.6 = 25.2,  24 + 8 = 32
    for layer, expected in zip(decoder.o_decoder(queries, memory), [(13, 18), (25.2, 32)],
                               strict=True):
        assert_close(layer.logits[0, :, 0], f64(*expected), **helpers.EXACT)


def test_plain_decoder_by_definition(plain, generator):
    """[SD Eq. 1]  Norm for the heads only; T = 1, then MLP of the state that enters the layer."""
    queries, memory = helpers.conditional_queries(D, N), helpers.conditional_memory(D)
    x, pos, spatial, T = queries.content[0], queries.pos[0], queries.spatial[0], 1
    for layer, p in zip(plain.layers, plain.o_decoder(queries, memory), strict=True):
        x = layer.norm_self(x + layer.self_attn(x, pos))
        x = layer.norm_cross(x + layer.cross_attn(x, pos, spatial * T, memory))
        x = layer.norm_ffn(x + layer.ffn(x))
        T = plain.query_scale(x)
        out, r = plain.norm(x), queries.ref_points
        expected = plain.box_head(out)
        expected[..., :2] += torch.log(r / (1 - r))
        assert_close(p.boxes, expected.sigmoid(), atol=1e-12, rtol=0)
        assert_close(p.logits, plain.class_head(out), atol=1e-12, rtol=0)


def test_dropout_drops_what_was_read_and_the_ffn_and_keeps_the_residual(generator):
    layer = decoder_conditional.DecoderLayer(
        attention_conditional.ConditionalAttention, D, H, 48, dropout=1.0).double()
    layer.self_attn.dropout = layer.cross_attn.dropout = 0.0        # of attention weights: another
    x, pos, spatial = (t[0] for t in helpers.conditional_queries(D, N)[:3])
    normed = torch.nn.functional.layer_norm(x, (D,))
    assert_close(layer.disperse(x, pos), normed, atol=1e-12, rtol=0)
    found = layer.gather(x, pos, spatial, helpers.conditional_memory(D))
    assert_close(found, torch.nn.functional.layer_norm(normed, (D,)), atol=1e-12, rtol=0)
    assert (layer.eval().disperse(x, pos) - normed).abs().max() > 1e-3


def test_padding_changes_nothing(plain, generator):
    queries, memory = helpers.conditional_queries(D, N), helpers.conditional_memory(D)
    noise = memory._replace(tokens=memory.tokens + 9 * memory.is_pad[..., None],
                            pos=memory.pos - 9 * memory.is_pad[..., None])
    assert_close(plain.o_decoder(queries, memory), plain.o_decoder(queries, noise), atol=0, rtol=0)


@pytest.mark.parametrize("name", registry.DECODERS["conditional"])
def test_a_single_layer_has_no_parameter_without_a_gradient(name):
    """T is 1 in the first layer. Several processes stop at a parameter that gets no gradient."""
    decoder = registry.DECODERS["conditional"][name](1, D, H, 48, C)
    queries = helpers.conditional_queries(D, N)
    [answer] = decoder.double().o_decoder(queries, helpers.conditional_memory(D))
    (answer.logits.square().sum() + answer.boxes.sum()).backward()
    assert not [key for key, p in decoder.named_parameters() if p.grad is None]


def paper(**changes):
    return config.preset("paper_conditional_r50", **{**dict(
        num_classes=91), **changes})


def test_parameters_at_the_size_of_the_paper():
    """43,418,401: what the official code counts for R50 and 91 classes."""
    count = sum(p.numel() for p in registry.build(paper()).parameters())
    assert count == 43_418_401


def test_dc5_has_the_same_weights_and_twice_the_cells():
    dilated, image = backbone.ResNet50DC5(), torch.randn(1, 3, 64, 96)
    c5 = dilated(image)[-1]
    assert c5.shape == (1, 2048, 4, 6)
    assert backbone.ConvNetStride8()(image)[-1].shape == (1, 128, 8, 12)
