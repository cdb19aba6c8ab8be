"""The whole of Deformable DETR after the backbone, against the one in Hugging Face transformers.

Both get the same random weights and the same features, a batch of two of which one is padded on two
sides; once directly, once by way of a file under the official names. Needs `pip install
transformers`, else it is skipped.

Known difference, 1.5e-5 in these numbers: of a cell that is no good (padding, or too near the
border) their proposal is exactly 1, ours 1 - 1e-5, the most that `boxes.logit` returns.
"""
import copy

import pytest
import test_published
import torch
from torch import nn
from torch.testing import assert_close

from detr_min import checkpoints, config, model, proposals, query_gen

transformers = pytest.importorskip("transformers")

CLOSE = dict(atol=1e-5, rtol=0)                 # float32 through 6 layers; measured: 2e-6
CHANNELS, D, LAYERS, N, C = [128, 128, 128], 64, 3, 10, 7       # what ConvNet(width=32) gives
SIZES = [(12, 20), (6, 10), (3, 5)]                             # of an image of 96 x 160 pixels
VARIANTS = {"plain": "deformable_fixed", "refined": "deformable", "two_stage": "deformable"}

RENAMED_LAYERS = [                                              # ours, theirs
    (".ffn.0.", ".mlp.fc1."), (".ffn.2.", ".mlp.fc2."), (".norm_ffn.", ".final_layer_norm."),
    (".cross_attn.", ".encoder_attn."), (".norm_cross.", ".encoder_attn_layer_norm."),
    (".norm_self.", ".self_attn_layer_norm."), (".self_attn.out_proj.", ".self_attn.o_proj."),
    (".attn.", ".self_attn."), (".norm_attn.", ".self_attn_layer_norm.")]
RENAMED = [
    ("projections.levels.", "model.input_proj."), ("encoder.level_embed", "model.level_embed"),
    ("queries.pos_and_content", "model.query_position_embeddings.weight"),
    ("queries.reference_points.", "model.reference_points."),
    ("queries.mini_detector.project.", "model.enc_output."),
    ("queries.mini_detector.norm.", "model.enc_output_norm."),
    ("queries.mini_detector.class_head.", f"class_embed.{LAYERS}."),
    ("queries.mini_detector.box_head.", f"bbox_embed.{LAYERS}."),
    ("queries.pos_project.", "model.pos_trans."), ("queries.pos_norm.", "model.pos_trans_norm."),
    ("decoder.class_heads.", "class_embed."), ("decoder.box_heads.", "bbox_embed."),
    ("encoder.layers.", "model.encoder.layers."), ("decoder.layers.", "model.decoder.layers.")]


def their_key(key):
    """Where transformers keeps the parameter that we call `key`."""
    start, renamed = next((ours, theirs) for ours, theirs in RENAMED if key.startswith(ours))
    key = renamed + key.removeprefix(start)
    if ".layers." in key:
        for ours, theirs in RENAMED_LAYERS:
            key = key.replace(ours, theirs)
    if "bbox_embed" in key:                                     # layers 0, 2, 4 of our Sequential
        embed, number, layer, kind = key.split(".")
        key = f"{embed}.{number}.layers.{int(layer) // 2}.{kind}"
    return key


class Stub(nn.Module):
    """In place of a backbone: features made beforehand, and their masks, 1 = image."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, pixels, pixel_mask):
        masks = [nn.functional.interpolate(pixel_mask[None].float(), size=x.shape[-2:])[0].bool()
                 for x in self.features]
        return list(zip(self.features, masks))


class OurStub(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, images):
        return self.features


def build_theirs(variant, features):
    """Random in every parameter, no two parameters tied, features in place of the backbone."""
    small = transformers.ResNetConfig(embedding_size=8, depths=[1, 1, 1, 1], layer_type="basic",
                                      hidden_sizes=[8, *(x.shape[1] for x in features)],
                                      out_features=["stage2", "stage3", "stage4"])
    refine, two_stage = variant != "plain", variant == "two_stage"
    net = transformers.DeformableDetrForObjectDetection(transformers.DeformableDetrConfig(
        backbone_config=small, num_labels=C, num_queries=N, two_stage_num_proposals=N, d_model=D,
        encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, with_box_refine=refine,
        two_stage=two_stage, disable_custom_kernels=True))
    net.bbox_embed = nn.ModuleList([copy.deepcopy(head) for head in net.bbox_embed])
    net.class_embed = nn.ModuleList([copy.deepcopy(head) for head in net.class_embed])
    net.model.decoder.bbox_embed = net.bbox_embed if refine else None
    net.model.decoder.class_embed = net.class_embed if two_stage else None
    net.model.backbone = Stub(features)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net.eval()


def build_ours(variant, features, state):
    """Our detector with their weights: all of ours are filled, all of theirs are used."""
    net = model.build(config.preset(
        "shapes", model=VARIANTS[variant], queries="learned", d_model=D, num_heads=4, num_levels=4,
        d_ffn=96, encoder_layers=LAYERS, decoder_layers=LAYERS, num_queries=N, num_classes=C))
    if variant == "two_stage":
        net.queries = query_gen.UnmixedTwoStageQueries(N, D, C, num_sets=1)
    net.backbone = OurStub(features)
    values, used = {}, set()
    for key in net.state_dict():
        if ".self_attn.in_proj_" in key:
            before, kind = their_key(key).split("in_proj_")
            theirs = [f"{before}{part}_proj.{kind}" for part in "qkv"]
        else:
            theirs = [their_key(key)]
        values[key] = torch.cat([state[name] for name in theirs])
        used.update(theirs)
    net.load_state_dict(values)
    assert {key for key in state if not key.startswith("model.decoder.bbox_embed")
            and not key.startswith("model.decoder.class_embed")} == used
    return net.eval()


def their_answers(net, images, is_pad):
    """Their logits and boxes of every layer, which they only return when they train."""
    out = net(images, pixel_mask=(~is_pad).long())
    logits, found = [], []
    for layer, head in enumerate(net.class_embed[:LAYERS]):
        logits.append(head(out.intermediate_hidden_states[:, layer]))
        if net.config.with_box_refine:
            found.append(out.intermediate_reference_points[:, layer])
        else:
            delta = net.bbox_embed[layer](out.intermediate_hidden_states[:, layer])
            delta[..., :2] += torch.logit(out.init_reference_points, eps=1e-5)
            found.append(delta.sigmoid())
    assert_close(logits[-1], out.logits, atol=0, rtol=0)
    assert_close(found[-1], out.pred_boxes)
    return out, logits, found


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_layer_answers_as_transformers_does(variant):
    """[DAC Eq. 1-2], [Deformable DETR Eq. 2-3], [Deformable DETR App. A.3], and its App. A.4."""
    torch.manual_seed(0)
    features = [torch.randn(2, c, h, w) for c, (h, w) in zip(CHANNELS, SIZES)]
    images, is_pad = torch.randn(2, 3, 96, 160), torch.zeros(2, 96, 160, dtype=torch.bool)
    is_pad[1, 70:], is_pad[1, :, 101:] = True, True         # padded at the bottom and at the right
    theirs = build_theirs(variant, features)
    ours = build_ours(variant, features, theirs.state_dict())
    out, logits, found = their_answers(theirs, images, is_pad)
    answer = ours(images, is_pad)
    assert len(answer.o_decoder) == LAYERS
    for prediction, their_logits, their_boxes in zip(answer.o_decoder, logits, found):
        assert_close(prediction.logits, their_logits, **CLOSE)
        assert_close(prediction.boxes, their_boxes, **CLOSE)
    memory = ours.encoder(ours.projections(features), is_pad)
    on_image = ~memory.is_pad
    assert 0 < memory.is_pad.sum() < on_image.sum()
    theirs_there = out.encoder_last_hidden_state[on_image]
    assert_close(memory.tokens[on_image], theirs_there, **CLOSE)
    if variant == "two_stage":
        their_boxes = out.enc_outputs_coord_logits.sigmoid()
        is_good = proposals.anchors(memory)[1]
        assert_close(answer.proposals.logits, out.enc_outputs_class, **CLOSE)
        assert_close(answer.proposals.boxes[is_good], their_boxes[is_good], **CLOSE)
        assert_close(answer.proposals.boxes, their_boxes, atol=1e-4, rtol=0)    # 1 against 1 - 1e-5
        assert 0 < is_good.sum() < is_good.numel()
    references = ours.queries(memory).ref_boxes
    assert_close(references, out.init_reference_points, **CLOSE)


OFFICIAL = [                            # theirs, the official repository's; tried in this order
    ("model.query_position_embeddings.", "query_embed."), ("model.input_proj.", "input_proj."),
    ("model.", "transformer."), (".mlp.fc", ".linear"), (".encoder_attn.", ".cross_attn."),
    (".encoder_attn_layer_norm.", ".norm1."), (".o_proj.", ".out_proj.")]


def official_state(state):
    """Their state dict under the names of the official repository."""
    found = {}
    for key, tensor in state.items():
        for theirs, official in OFFICIAL:
            key = key.replace(theirs, official)
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
    theirs = build_theirs(variant, features)
    state = {**official_state(theirs.state_dict()), **test_published.random_state(body)}
    path = test_published.save(tmp_path / "official.pth", state, nheads=4, num_queries=N)
    ours = checkpoints.load_model(path)
    ours.backbone = OurStub(features)
    assert ours.config.model == VARIANTS[variant]
    _, logits, found = their_answers(theirs, images, is_pad)
    answer = ours(images, is_pad).o_decoder
    for prediction, their_logits, their_boxes in zip(answer, logits, found, strict=True):
        assert_close(prediction.logits, their_logits, **CLOSE)
        assert_close(prediction.boxes, their_boxes, **CLOSE)
