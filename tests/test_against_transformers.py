"""The whole of Deformable DETR after the backbone, against the one in Hugging Face transformers.

Both get the same random weights and the same features, a batch of two of which one is padded on two
sides; once directly, once by way of a file under the official names. Needs `pip install
transformers`, else it is skipped.
"""
import dataclasses

import pytest
import test_published
import torch
from torch import nn
from torch.testing import assert_close

from benchmarks import theirs
from detr_min import proposals
from detr_min.run import checkpoints, config, registry

pytest.importorskip("transformers")

CLOSE = dict(atol=1e-5, rtol=0)                 # float32 through 6 layers; measured: 2e-6
CHANNELS, D, LAYERS, N, C = [512, 1024, 2048], 64, 3, 10, 7     # what ResNet50 gives
SIZES = [(12, 20), (6, 10), (3, 5)]                             # of an image of 96 x 160 pixels
VARIANTS = {"plain": "deformable_fixed", "refined": "deformable", "two_stage": "deformable"}


class Stub(nn.Module):
    """In place of a backbone: features made beforehand."""

    def __init__(self, features):
        super().__init__()
        self.features, self.channels = features, [x.shape[1] for x in features]

    def forward(self, images):
        return self.features


def sizes(variant):
    """The Config of both sides."""
    return config.preset(
        "shapes", backbone="resnet50", model=VARIANTS[variant], d_model=D, num_heads=4,
        num_levels=4, d_ffn=96, encoder_layers=LAYERS, decoder_layers=LAYERS, num_queries=N,
        num_classes=C, queries="two_stage_unmixed" if variant == "two_stage" else "learned")


def build_theirs(variant, features):
    """Random in every parameter, no two parameters tied, features in place of the backbone."""
    net = theirs.untie(theirs.build(sizes(variant), Stub(features)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        if variant == "two_stage":              # pulls hard: cells that are no good must not follow
            net.bbox_embed[-1].layers[-1].bias -= 4
    return net.eval()


def build_ours(variant, features, state):
    """Our detector with their weights: all of ours are filled, all of theirs are used."""
    net = registry.build(sizes(variant))
    net.backbone = Stub(features)
    return theirs.copy_weights(state, net).eval()


def their_answers(net, images, is_pad):
    """Their output and every layer's Predictions, the last of which is the output's own."""
    out, predictions = theirs.answers(net, images, is_pad)
    assert_close(predictions[-1].logits, out.logits, atol=0, rtol=0)
    assert_close(predictions[-1].boxes, out.pred_boxes)
    return out, predictions


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_layer_answers_as_transformers_does(variant):
    """[DAC Eq. 1-2], [Deformable DETR Eq. 2-3], [Deformable DETR App. A.2], and its App. A.4."""
    torch.manual_seed(0)
    features = [torch.randn(2, c, h, w) for c, (h, w) in zip(CHANNELS, SIZES)]
    images, is_pad = torch.randn(2, 3, 96, 160), torch.zeros(2, 96, 160, dtype=torch.bool)
    is_pad[1, 70:], is_pad[1, :, 101:] = True, True         # padded at the bottom and at the right
    net = build_theirs(variant, features)
    ours = build_ours(variant, features, net.state_dict())
    out, predictions = their_answers(net, images, is_pad)
    answer = ours(images, is_pad)
    assert len(answer.o_decoder) == LAYERS
    for ours_of_layer, theirs_of_layer in zip(answer.o_decoder, predictions):
        assert_close(ours_of_layer, theirs_of_layer, **CLOSE)
    network = torch.nn.Sequential(ours.backbone, ours.projections)
    memory = ours.encoder(*ours.on_batch(network, images, is_pad))
    on_image = ~memory.is_pad
    assert 0 < memory.is_pad.sum() < on_image.sum()
    theirs_there = out.encoder_last_hidden_state[on_image]
    assert_close(memory.tokens[on_image], theirs_there, **CLOSE)
    if variant == "two_stage":
        their_boxes = out.enc_outputs_coord_logits.sigmoid()
        is_good = proposals.anchors(memory)[1]
        assert_close(answer.proposals.logits, out.enc_outputs_class, **CLOSE)
        assert_close(answer.proposals.boxes, their_boxes, **CLOSE)
        assert 0 < is_good.sum() < is_good.numel()
    references = ours.queries(memory).ref_boxes
    assert_close(references, out.init_reference_points, **CLOSE)


@pytest.mark.slow
def test_looking_forward_once_has_transformers_gradients():
    """[Deformable DETR App. A.4]  Of the last layer's answer, in every parameter."""
    torch.manual_seed(0)
    features = [torch.randn(2, c, h, w) for c, (h, w) in zip(CHANNELS, SIZES)]
    images, is_pad = torch.randn(2, 3, 96, 160), torch.zeros(2, 96, 160, dtype=torch.bool)
    net = build_theirs("two_stage", features)
    cfg = dataclasses.replace(sizes("two_stage"), model="deformable_once")
    ours, gradients = registry.build(cfg), registry.build(cfg)
    ours.backbone = gradients.backbone = Stub(features)
    theirs.copy_weights(net.state_dict(), ours.eval())
    out = net(images, pixel_mask=(~is_pad).long())
    answer = ours(images, is_pad).o_decoder[-1]
    for logits, found in ((out.logits, out.pred_boxes), answer):
        (logits.sigmoid().square().sum() + found.square().sum()).backward()
    theirs.copy_weights({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p
                         in net.named_parameters(remove_duplicate=False)}, gradients)
    for name, parameter in ours.named_parameters():
        expected = gradients.get_parameter(name)
        found = torch.zeros_like(expected) if parameter.grad is None else parameter.grad
        assert_close(found, expected, atol=1e-4, rtol=1e-3, msg=lambda text: f"{name}: {text}")
    assert gradients.get_parameter("decoder.box_heads.2.0.weight").abs().max() > 1e-3
    assert gradients.get_parameter("decoder.box_heads.1.0.weight").abs().max() == 0


OFFICIAL = [                            # theirs, the official repository's; tried in this order
    ("model.query_position_embeddings.", "query_embed."), ("model.input_proj.", "input_proj."),
    ("model.", "transformer."), (".mlp.fc", ".linear"), (".encoder_attn.", ".cross_attn."),
    (".encoder_attn_layer_norm.", ".norm1."), (".o_proj.", ".out_proj.")]


def official_state(state):
    """Their state dict under the names of the official repository."""
    found = {}
    for key, tensor in state.items():
        for their_name, official in OFFICIAL:
            key = key.replace(their_name, official)
        is_decoder = "decoder.layers" in key
        key = key.replace(".self_attn_layer_norm.", ".norm2." if is_decoder else ".norm1.")
        key = key.replace(".final_layer_norm.", ".norm3." if is_decoder else ".norm2.")
        found[key] = tensor
    for layer in range(LAYERS):
        start = f"transformer.decoder.layers.{layer}.self_attn."
        for kind in ("weight", "bias"):
            parts = [found.pop(f"{start}{part}_proj.{kind}") for part in "qkv"]
            found[f"{start}in_proj_{kind}"] = torch.cat(parts)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_an_official_file_answers_as_transformers_does(variant, tmp_path):
    """Through checkpoints.load_model: names, halves of query_embed, heads, kind of references."""
    torch.manual_seed(0)
    body, channels = test_published.swin(width=16)          # its weights are not what is tested
    features = [torch.randn(2, c, h, w) for c, (h, w) in zip(channels, SIZES)]
    images, is_pad = torch.randn(2, 3, 96, 160), torch.zeros(2, 96, 160, dtype=torch.bool)
    is_pad[1, 70:], is_pad[1, :, 101:] = True, True
    net = build_theirs(variant, features)
    state = {**official_state(net.state_dict()), **test_published.random_state(body)}
    path = test_published.save(tmp_path / "official.pth", state, nheads=4, num_queries=N)
    ours = checkpoints.load_model(path)
    ours.backbone = Stub(features)
    assert ours.config.model == VARIANTS[variant]
    _, predictions = their_answers(net, images, is_pad)
    answer = ours(images, is_pad).o_decoder
    for ours_of_layer, theirs_of_layer in zip(answer, predictions, strict=True):
        assert_close(ours_of_layer, theirs_of_layer, **CLOSE)
