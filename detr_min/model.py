"""The detector: backbone, encoder, queries, one decoder with its heads.

The whole forward pass is `Detector.forward`. Read every file above before, or follow the calls.
"""
import functools
from typing import NamedTuple

import torch
from torch import nn

from . import (backbone, backbone_swin, boxes, decoder_base, decoder_dac, decoder_decoupled,
               decoder_release, denoising, encoder, query_gen)

DECODERS = {                                    # the one place where a name becomes a class
    "deformable": decoder_base.Decoder,
    "deformable_fixed": decoder_base.FixedReferenceDecoder,
    "dac": decoder_dac.DACDecoder,
    "dac_release": decoder_release.DACReleaseDecoder,           # as the authors' code has it
    "decoupled": decoder_decoupled.DecoupledDecoder,
    "dac_decoupled": decoder_decoupled.DACDecoupledDecoder,     # both papers at once, in neither
    "split": decoder_decoupled.SplitDecoder,
}
QUERIES = {
    "learned": query_gen.LearnedQueries,
    "two_stage": query_gen.TwoStageQueries,
    "two_stage_unmixed": query_gen.UnmixedTwoStageQueries,
    "task_aware": query_gen.TaskAwareQueries,
}


class Output(NamedTuple):
    """What the detector says of a batch."""
    o_decoder: list[boxes.Predictions]          # one a layer, the last is the answer
    c_decoder: list[boxes.Predictions]          # DAC-DETR in training; else empty
    proposals: boxes.Predictions | None       # the encoder's, one a cell; None with learned queries
    o_denoised: list[boxes.Predictions] = ()        # of the denoising queries, where there are any
    c_denoised: list[boxes.Predictions] = ()


class Detector(nn.Module):
    """Images in, a list of Predictions out."""

    def __init__(self, body, projections, encoder, queries, decoder, label_embed=None):
        super().__init__()
        self.backbone, self.projections = body, projections
        self.encoder, self.queries, self.decoder = encoder, queries, decoder
        self.label_embed = label_embed                              # of denoising queries, or None

    def forward(self, images, is_pad, noisy=None):
        """Detect.

        Args:
            images  (B, 3, h, w)  normalised as ImageNet's
            is_pad  (B, h, w)     bool, True = padding
            noisy   denoising.Noisy, for training with denoising queries
        Returns:
            Output
        """
        features = self.projections(self.backbone(images))          # [(B, D, h/8, w/8), ...]
        memory = self.encoder(features, is_pad)
        queries = self.queries(memory)
        if noisy is not None:
            pos, _ = self.queries.embed(noisy.boxes)                # (B, E, D)
            queries = denoising.prepend(noisy, queries, self.label_embed, pos)
        if self.training and hasattr(self.decoder, "both_decoders"):
            o_predictions, c_predictions = self.decoder.both_decoders(queries, memory)
        else:
            o_predictions, c_predictions = self.decoder.o_decoder(queries, memory), []
        if noisy is None:
            return Output(o_predictions, c_predictions, queries.proposals)
        o_denoised, o_predictions = denoising.split(o_predictions, noisy.labels.shape[1])
        c_denoised, c_predictions = denoising.split(c_predictions, noisy.labels.shape[1])
        return Output(o_predictions, c_predictions, queries.proposals, o_denoised, c_denoised)


def build(config):
    """A Detector with random weights, as the config, a config.Config, describes it."""
    r = config.recipe
    body = {"convnet": backbone.ConvNet, "resnet50": backbone.ResNet50,
            "swin_l": functools.partial(backbone_swin.Swin, *r.swin)}[config.backbone]()
    attention_shape = r.d_model, r.num_heads, r.num_levels, r.num_points, r.d_ffn
    decoder = DECODERS[config.model](r.decoder_layers, *attention_shape, r.num_classes)
    num_sets = getattr(decoder, "num_sets", 1)
    queries = QUERIES[config.queries](r.num_queries, r.d_model, r.num_classes, num_sets)
    if config.queries == "learned":
        with torch.no_grad():                   # a point has no size: start at sigmoid(-2) = .12
            decoder.box_heads[0][-1].bias[2:] = -2
    return Detector(body, backbone.Projections(body.channels, r.d_model, r.num_levels),
                    encoder.Encoder(r.encoder_layers, *attention_shape), queries, decoder,
                    nn.Embedding(r.num_classes + 1, r.d_model) if r.dn_number else None)
