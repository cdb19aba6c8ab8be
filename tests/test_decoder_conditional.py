"""Conditional DETR's decoder by definition, and the whole model against transformers."""
import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import nn
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


# ---- against transformers ----

CLOSE = dict(atol=1e-5, rtol=0)                 # float32; measured: 1e-9

RENAMED = [                                                     # ours, theirs; tried in this order
    ("backbone.", "model.backbone.body."), ("projections.conv.", "model.input_projection."),
    ("queries.pos", "model.query_position_embeddings.weight"),
    ("queries.reference.0.", "model.decoder.ref_point_head.layers.0."),
    ("queries.reference.2.", "model.decoder.ref_point_head.layers.1."),
    ("decoder.query_scale.0.", "model.decoder.query_scale.layers.0."),
    ("decoder.query_scale.2.", "model.decoder.query_scale.layers.1."),
    ("decoder.norm.", "model.decoder.layernorm."),
    ("decoder.class_head.", "class_labels_classifier."),
    *[(f"decoder.box_head.{2 * i}.", f"bbox_predictor.layers.{i}.") for i in range(3)],
    ("encoder.layers.", "model.encoder.layers."), ("decoder.layers.", "model.decoder.layers."),
    (".attn.", ".self_attn."), (".norm_attn.", ".self_attn_layer_norm."),
    (".ffn.0.", ".mlp.fc1."), (".ffn.3.", ".mlp.fc2."), (".norm_ffn.", ".final_layer_norm."),
    (".norm_self.", ".self_attn_layer_norm."), (".norm_cross.", ".encoder_attn_layer_norm."),
    (".cross_attn.", ".encoder_attn."), (".q_content.", ".q_content_proj."),
    (".k_content.", ".k_content_proj."), (".q_pos.", ".q_pos_proj."), (".k_pos.", ".k_pos_proj."),
    (".q_spatial.", ".q_pos_sine_proj."), (".out_proj.", ".o_proj.")]


def their_key(key):
    for ours, theirs in RENAMED:
        key = key.replace(ours, theirs)
    return key


def copy_weights(state, net):
    """Our detector with their weights: all of ours are filled, all of theirs are used."""
    state, ours = dict(state), {}
    for key in net.state_dict():
        if key.endswith(("in_proj_weight", "in_proj_bias")):
            start, kind = their_key(key).rsplit("in_proj_", 1)
            ours[key] = torch.cat([state.pop(f"{start}{part}_proj.{kind}") for part in "qkv"])
        else:
            ours[key] = state.pop(their_key(key))
    assert not state, list(state)
    net.load_state_dict(ours)
    return net


class Body(nn.Module):
    """Our backbone in the place of theirs: features and their masks, True = image."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, pixels, pixel_mask):
        return [(x, F.interpolate(pixel_mask[None].float(), size=x.shape[-2:])[0].bool())
                for x in self.body(pixels)]


@pytest.mark.parametrize("backbone", ["resnet50", "resnet50_dc5"])
@torch.no_grad()
def test_answers_as_transformers_does(backbone):
    """A padded batch of two, equal random weights. Their auxiliary_loss=True norms between layers,
    as the official code does not: it stays off, so only the last layer is compared."""
    lib = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = registry.build(paper(backbone=backbone, d_model=64, num_heads=4, d_ffn=96, num_queries=10,
                             encoder_layers=2, decoder_layers=3, num_classes=7)).eval()
    stand_in = lib.ResNetConfig(embedding_size=8, depths=[1] * 4, hidden_sizes=[8, 8, 8, 2048],
                                out_features=["stage4"])
    theirs = lib.ConditionalDetrForObjectDetection(lib.ConditionalDetrConfig(
        backbone_config=stand_in, num_labels=7, num_queries=10, d_model=64, encoder_layers=2,
        decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
        decoder_ffn_dim=96, auxiliary_loss=False, dropout=0.0)).eval()
    for parameter in theirs.parameters():
        parameter += 0.25 * torch.randn_like(parameter)
    theirs.model.query_position_embeddings.weight *= 6          # queries that differ
    for name, module in ours.backbone.named_modules():          # no BatchNorm tames random weights
        if name.endswith("bn3"):
            module.weight.fill_(0.2)
    theirs.model.backbone = Body(ours.backbone)
    copy_weights(theirs.state_dict(), ours)
    images, is_pad = torch.randn(2, 3, 192, 256), torch.zeros(2, 192, 256, dtype=torch.bool)
    is_pad[1, 130:], is_pad[1, :, 170:] = True, True         # padded at the bottom and at the right
    expected, answer = theirs(images, (~is_pad).long()), ours(images, is_pad)
    memory = ours.encoder(ours.projections(ours.backbone(images)), is_pad)
    assert memory.spatial_shapes == [{"resnet50": (6, 8), "resnet50_dc5": (12, 16)}[backbone]]
    assert memory.is_pad.any() and 0.1 < ours.projections.conv.weight.std()
    on_image = ~memory.is_pad
    assert_close(memory.tokens[on_image], expected.encoder_last_hidden_state[on_image],
                 **CLOSE)
    assert len(answer.o_decoder) == 3
    last = answer.o_decoder[-1]
    assert_close(last.logits, expected.logits, **CLOSE)
    assert_close(last.boxes, expected.pred_boxes, **CLOSE)
    assert last.boxes.std(dim=1).mean() > 10 * CLOSE["atol"]        # a mix-up of queries would show
