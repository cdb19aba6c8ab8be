"""Hugging Face transformers' Deformable DETR at the sizes of a Config, behind our own backbone.

`copy_weights` gives our detector their weights, so both must answer alike. The backbone is common
to both, so what is measured is the rest. Needs `pip install transformers`. Read `cases.py` next.
"""
import copy
import importlib
import importlib.util

import torch
from torch import nn

from detr_min import boxes, model

MISSING = "Hugging Face transformers is missing: pip install transformers"

RENAMED_LAYERS = [                                              # ours, theirs
    (".ffn.0.", ".mlp.fc1."), (".ffn.2.", ".mlp.fc2."), (".norm_ffn.", ".final_layer_norm."),
    (".cross_attn.", ".encoder_attn."), (".norm_cross.", ".encoder_attn_layer_norm."),
    (".norm_self.", ".self_attn_layer_norm."), (".self_attn.out_proj.", ".self_attn.o_proj."),
    (".attn.", ".self_attn."), (".norm_attn.", ".self_attn_layer_norm.")]
RENAMED = [                                     # the encoder's own heads are their last ones, {L}
    ("backbone.", "model.backbone.body."),
    ("projections.levels.", "model.input_proj."), ("encoder.level_embed", "model.level_embed"),
    ("queries.pos_and_content", "model.query_position_embeddings.weight"),
    ("queries.reference_points.", "model.reference_points."),
    ("queries.mini_detector.project.", "model.enc_output."),
    ("queries.mini_detector.norm.", "model.enc_output_norm."),
    ("queries.mini_detector.class_head.", "class_embed.{L}."),
    ("queries.mini_detector.box_head.", "bbox_embed.{L}."),
    ("queries.pos_project.", "model.pos_trans."), ("queries.pos_norm.", "model.pos_trans_norm."),
    ("decoder.class_heads.", "class_embed."), ("decoder.box_heads.", "bbox_embed."),
    ("encoder.layers.", "model.encoder.layers."), ("decoder.layers.", "model.decoder.layers.")]
ALIASES = "model.decoder.bbox_embed", "model.decoder.class_embed"       # of the heads above


def is_there():
    """Whether transformers can be imported; it is not imported yet."""
    return importlib.util.find_spec("transformers") is not None


def transformers():
    """The module transformers.

    Raises:
        ValueError: it is not installed
    """
    if not is_there():
        raise ValueError(MISSING)
    return importlib.import_module("transformers")


def attention(value, spatial_shapes, locations, weights):
    """Their deformable attention in pure PyTorch: arguments and result as ours."""
    module = importlib.import_module("transformers.models.deformable_detr.modeling_deformable_detr")
    return module.MultiScaleDeformableAttention()(value, None, spatial_shapes, None, locations,
                                                  weights, 64)


class Body(nn.Module):
    """Our backbone in the place of theirs: features and their masks, True = image."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, pixels, pixel_mask):
        """(B, 3, h, w), (B, h, w) 1 = image -> [((B, C, h, w), (B, h, w) bool), ...]"""
        features = self.body(pixels)
        masks = [nn.functional.interpolate(pixel_mask[None].float(), size=x.shape[-2:])[0].bool()
                 for x in features]
        return list(zip(features, masks))


def build(cfg, body):
    """Their detector, as they initialise it, at the sizes of a Config; no dropout, as with ours.

    Args:
        cfg   a config.Config; queries learned (their one-stage form) or two_stage_unmixed (their
              two-stage form); model deformable, or deformable_fixed for boxes not refined
        body  a backbone of ours, with .channels
    Raises:
        ValueError: they have no such model, or transformers is missing
    """
    lib, r = transformers(), cfg.recipe
    if (cfg.queries not in ("learned", "two_stage_unmixed")
            or cfg.model not in ("deformable", "deformable_fixed")):
        raise ValueError(f"transformers has no model {cfg.model} with queries {cfg.queries}")
    stand_in = lib.ResNetConfig(embedding_size=8, depths=[1] * 4, hidden_sizes=[8, *body.channels],
                                out_features=["stage2", "stage3", "stage4"])
    net = lib.DeformableDetrForObjectDetection(lib.DeformableDetrConfig(
        backbone_config=stand_in, num_labels=r.num_classes, num_queries=r.num_queries,
        two_stage_num_proposals=r.num_queries, d_model=r.d_model, encoder_layers=r.encoder_layers,
        decoder_layers=r.decoder_layers, encoder_attention_heads=r.num_heads,
        decoder_attention_heads=r.num_heads, encoder_ffn_dim=r.d_ffn, decoder_ffn_dim=r.d_ffn,
        num_feature_levels=r.num_levels, encoder_n_points=r.num_points,
        decoder_n_points=r.num_points, with_box_refine=cfg.model == "deformable",
        two_stage=cfg.queries == "two_stage_unmixed", auxiliary_loss=True, dropout=0.0,
        disable_custom_kernels=True))
    net.model.backbone = Body(body)
    return net


def untie(net):
    """Give each layer a class head and a box head of its own, as ours has; in place.

    As shipped (5.23) all layers of the one-stage form share one class head, refined or not.
    """
    net.bbox_embed = nn.ModuleList([copy.deepcopy(head) for head in net.bbox_embed])
    net.class_embed = nn.ModuleList([copy.deepcopy(head) for head in net.class_embed])
    net.model.decoder.bbox_embed = net.bbox_embed if net.config.with_box_refine else None
    net.model.decoder.class_embed = net.class_embed if net.config.two_stage else None
    return net


def their_key(key, num_layers):
    """Where transformers keeps the parameter that we call `key`, of so many decoder layers."""
    start, renamed = next((ours, theirs) for ours, theirs in RENAMED if key.startswith(ours))
    key = renamed.format(L=num_layers) + key.removeprefix(start)
    if key.startswith("model.backbone."):
        return key
    if ".layers." in key:
        for ours, theirs in RENAMED_LAYERS:
            key = key.replace(ours, theirs)
    if "bbox_embed" in key:                                     # layers 0, 2, 4 of our Sequential
        embed, number, layer, kind = key.split(".")
        key = f"{embed}.{number}.layers.{int(layer) // 2}.{kind}"
    return key


def copy_weights(state, ours):
    """Fill our detector from their state dict.

    Raises:
        ValueError: a tensor of theirs has no place in ours
    """
    values, used, num_layers = {}, set(), len(ours.decoder.layers)
    for key in ours.state_dict():
        found = [their_key(key, num_layers)]
        if ".self_attn.in_proj_" in key:
            before, kind = found[0].split("in_proj_")
            found = [f"{before}{part}_proj.{kind}" for part in "qkv"]
        values[key] = torch.cat([state[name] for name in found]) if len(found) > 1 else state[
            found[0]]
        used.update(found)
    left = {key for key in state if not key.startswith(ALIASES)} - used
    if left:
        raise ValueError(f"no place in ours for: {', '.join(sorted(left))}")
    ours.load_state_dict(values)
    return ours


def fill(net, ours):
    """Fill their detector, untied, from ours: the way back of `copy_weights`. Returns it."""
    values, num_layers = {}, len(ours.decoder.layers)
    for key, value in ours.state_dict().items():
        name = their_key(key, num_layers)
        if ".self_attn.in_proj_" in key:
            before, kind = name.split("in_proj_")
            values.update(zip((f"{before}{part}_proj.{kind}" for part in "qkv"), value.chunk(3)))
        else:
            values[name] = value
    missing, left = net.load_state_dict(values, strict=False)
    assert not left and all(key.startswith(ALIASES) for key in missing), (missing, left)
    return net


def answers(net, images, is_pad):
    """Their output, and the logits and boxes of every layer, which they only return in training.

    Args:
        images  (B, 3, h, w); is_pad (B, h, w) True = padding
    Returns:
        their output; [boxes.Predictions], one per layer
    """
    out = net(images, pixel_mask=(~is_pad).long())
    predictions = []
    for layer, head in enumerate(net.class_embed[:net.config.decoder_layers]):
        states = out.intermediate_hidden_states[:, layer]
        found = out.intermediate_reference_points[:, layer]
        if not net.config.with_box_refine:
            delta = net.bbox_embed[layer](states)
            delta[..., :2] += torch.logit(out.init_reference_points, eps=1e-5)
            found = delta.sigmoid()
        predictions.append(boxes.Predictions(head(states), found))
    return out, predictions


def labels(targets):
    """[data.Target] in their words."""
    return [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]


class Detector(nn.Module):
    """Their detector called as ours is, so that `evaluate.py` can test it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images, is_pad, noisy=None):
        """As model.Detector.forward; only the last layer's predictions."""
        out = self.net(images, pixel_mask=(~is_pad).long())
        return model.Output([boxes.Predictions(out.logits, out.pred_boxes)], [], None)
