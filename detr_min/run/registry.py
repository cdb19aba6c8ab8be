"""What the names in a config stand for: the one place where a name becomes a class or a function.

A new decoder, query, backbone or loss is one line in a table here. Read after the papers' files.
"""
import functools
from typing import Callable, NamedTuple

import torch

from .. import (backbone, criterion, decoder_base, decoder_conditional, decoder_dac,
                decoder_decoupled, decoder_decoupled_deformable, encoder, encoder_conditional,
                model, proposals, proposals_conditional, query_gen)
from ..data import batches
from ..release import align_loss, dac_release, deformable, denoising, swin

DECODERS = {                        # by what they stand on, then by name
    "deformable": {
        "deformable": decoder_base.Decoder,
        "deformable_once": deformable.OnceDecoder,
        "deformable_fixed": deformable.FixedReferenceDecoder,
        "dac": decoder_dac.DACDecoder,
        "dac_once": deformable.OnceDACDecoder,
        "dac_release": dac_release.DACReleaseDecoder,
        "decoupled": decoder_decoupled_deformable.DecoupledDecoder,
        "dac_decoupled": decoder_decoupled_deformable.DACDecoupledDecoder,
        "split": decoder_decoupled_deformable.SplitDecoder,
    },
    "conditional": {
        "conditional": decoder_conditional.ConditionalDecoder,
        "decoupled": decoder_decoupled.DecoupledDecoder,
        "split": decoder_decoupled.SplitDecoder,
    },
}
QUERIES = {
    "deformable": {
        "two_stage": proposals.TwoStageQueries,
        "two_stage_unmixed": deformable.UnmixedTwoStageQueries,
        "learned": deformable.LearnedQueries,
        "task_aware": decoder_decoupled_deformable.TaskAwareQueries,
    },
    "conditional": {
        "learned": proposals_conditional.LearnedQueries,
        "anchors": proposals_conditional.AnchorQueries,
        "anchor_cells": proposals_conditional.AnchorCellQueries,
        "task_aware": query_gen.TaskAwareQueries,
    },
}
DENOISABLE = "two_stage", "two_stage_unmixed"       # queries whose positions are made of boxes
BACKBONES = {                       # each takes a config.Recipe
    "deformable": {
        "convnet": lambda r: backbone.ConvNet(),
        "resnet50": lambda r: backbone.ResNet50(),
        "swin_l": lambda r: swin.Swin(*r.swin),
    },
    "conditional": {
        "convnet": lambda r: backbone.ConvNetStride8(),
        "resnet50": lambda r: backbone.ResNet50(),
        "resnet50_dc5": lambda r: backbone.ResNet50DC5(),
    },
}
LOSSES = {
    "focal": criterion.focal_loss,
    "tal": criterion.task_aligned_loss,
    "align": align_loss.layer_loss,
}


def names(table):
    """All names of a table that is sorted by base, each once."""
    return tuple(dict.fromkeys(name for here in table.values() for name in here))


def build(cfg):
    """Build a model.Detector with random weights, as a config.Config describes it."""
    return {"deformable": build_deformable, "conditional": build_conditional}[cfg.recipe.base](cfg)


def reads_padding(body):
    """Whether a backbone runs on the padded batch, as published ones do, or on each image alone."""
    return getattr(body, "reads_padding", False)


def on_batch(body):
    """The function of backbone.py by which a backbone runs on a batch."""
    return backbone.padded_batch if reads_padding(body) else backbone.per_image


def build_deformable(cfg):
    """Build a Detector on deformable attention and several feature levels."""
    r = cfg.recipe
    body = BACKBONES["deformable"][cfg.backbone](r)
    sizes = r.d_model, r.num_heads, r.num_levels, r.num_points, r.d_ffn
    decoder = DECODERS["deformable"][cfg.model](r.decoder_layers, *sizes, r.num_classes)
    queries = QUERIES["deformable"][cfg.queries](r.num_queries, r.d_model, r.num_classes,
                                                 getattr(decoder, "num_sets", 1))
    if reads_padding(body) and hasattr(queries, "mini_detector"):
        deformable.propose_padding(queries.mini_detector)
    parts = (body, backbone.Projections(body.channels, r.d_model, r.num_levels),
             encoder.Encoder(r.encoder_layers, *sizes), queries, decoder, on_batch(body))
    detector = (denoising.DenoisingDetector(*parts, num_classes=r.num_classes, d_model=r.d_model)
                if cfg.dn_number else model.Detector(*parts))
    if r.start == "published":
        deformable.start_as_published(detector)
    if r.dropout:
        deformable.add_dropout(detector, r.dropout)
    if cfg.queries == "learned":
        from_points = len(decoder.box_heads) if cfg.model == "deformable_fixed" else 1   # layers
        with torch.no_grad():                   # a point has no size: start at sigmoid(-2) = .12
            for head in decoder.box_heads[:from_points]:
                head[-1].bias[2:] = -2
    return detector


def build_conditional(cfg):
    """Build a Detector on dense attention and one feature level."""
    r = cfg.recipe
    body = BACKBONES["conditional"][cfg.backbone](r)
    sizes = r.d_model, r.num_heads, r.d_ffn
    decoder = DECODERS["conditional"][cfg.model](r.decoder_layers, *sizes, r.num_classes,
                                                 r.dropout)
    queries = QUERIES["conditional"][cfg.queries](r.num_queries, r.d_model, r.num_classes,
                                                  getattr(decoder, "num_sets", 1))
    return model.Detector(
        body, encoder_conditional.Projection(body.channels, r.d_model),
        encoder_conditional.Encoder(r.encoder_layers, *sizes, r.dropout), queries, decoder,
        on_batch(body))


class Training(NamedTuple):
    """How the detector of a config is trained, beside its weights."""
    inputs: Callable        # (images, is_pad, targets, step, rank) -> arguments of the detector
    loss: Callable          # (output, targets, num_objects) -> criterion's parts


def training(cfg):
    """Find the inputs and the loss of a config.Config. -> Training"""
    layer_loss = LOSSES[cfg.loss]
    base_loss = (dac_release if cfg.model == "dac_release" else criterion).detection_loss
    if cfg.recipe.base == "conditional":
        base_loss = functools.partial(criterion.conditional_loss,
                                      cell_weight=cfg.recipe.cell_weight)

    def inputs(images, is_pad, targets, step, rank):
        return images, is_pad

    def noisy_inputs(images, is_pad, targets, step, rank):
        generator = batches.generator(cfg.seed, step, rank)     # so a resumed run sees the same
        return images, is_pad, denoising.noisy_copies(targets, cfg.recipe.num_classes, generator,
                                                      cfg.dn_number)

    def denoising_loss(output, targets, num_objects, layer_loss):
        parts = base_loss(output, targets, num_objects, layer_loss)
        return denoising.add_losses(parts, output, targets, num_objects, layer_loss)

    if cfg.dn_number:
        return Training(noisy_inputs, functools.partial(denoising_loss, layer_loss=layer_loss))
    return Training(inputs, functools.partial(base_loss, layer_loss=layer_loss))
