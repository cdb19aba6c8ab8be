"""Conditional DETR's decoder by definition, and the whole model against transformers."""
import helpers
import pytest
import torch
from torch.testing import assert_close

from detr_min import backbone, decoder_conditional
from detr_min.run import config, registry

D, H, N, C = 32, 4, 6, 3
SIZES = dict(num_layers=3, num_classes=C, d_model=D, num_heads=H, d_ffn=48)

@pytest.fixture
def plain(generator):
    return helpers.shaken(decoder_conditional.ConditionalDecoder(**SIZES), generator)


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


def test_padding_changes_nothing(plain, generator):
    queries, memory = helpers.conditional_queries(D, N), helpers.conditional_memory(D)
    noise = memory._replace(tokens=memory.tokens + 9 * memory.is_pad[..., None],
                            pos=memory.pos - 9 * memory.is_pad[..., None])
    assert_close(plain.o_decoder(queries, memory), plain.o_decoder(queries, noise), atol=0, rtol=0)


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
