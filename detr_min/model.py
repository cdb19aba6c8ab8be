"""The detector: backbone, encoder, queries, one decoder with its heads.

The whole forward pass is `Detector.forward`. Read every file above before, or follow the calls.
"""
from typing import NamedTuple

import torch
from torch import nn

from . import backbone, boxes, decoder_base, decoder_dac, decoder_decoupled, encoder, query_gen

DECODERS = {                                    # the one place where a name becomes a class
    "deformable": decoder_base.Decoder,
    "deformable_fixed": decoder_base.FixedReferenceDecoder,
    "dac": decoder_dac.DACDecoder,
    "decoupled": decoder_decoupled.DecoupledDecoder,
    "dac_decoupled": decoder_decoupled.DACDecoupledDecoder,     # both papers at once, in neither
    "split": decoder_decoupled.SplitDecoder,
}
QUERIES = {
    "learned": query_gen.LearnedQueries,
    "two_stage": query_gen.TwoStageQueries,
    "task_aware": query_gen.TaskAwareQueries,
}


class Output(NamedTuple):
    """What the detector says of a batch."""
    o_decoder: list[boxes.Predictions]          # one a layer, the last is the answer
    c_decoder: list[boxes.Predictions]          # DAC-DETR in training; else empty
    proposals: boxes.Predictions | None       # the encoder's, one a cell; None with learned queries


class Detector(nn.Module):
    """Images in, a list of Predictions out."""

    def __init__(self, body, projections, encoder, queries, decoder):
        super().__init__()
        self.backbone, self.projections = body, projections
        self.encoder, self.queries, self.decoder = encoder, queries, decoder

    def forward(self, images, is_pad):
        """Detect.

        Args:
            images  (B, 3, h, w)  normalised as ImageNet's
            is_pad  (B, h, w)     bool, True = padding
        Returns:
            Output
        """
        features = self.projections(self.backbone(images))          # [(B, D, h/8, w/8), ...]
        memory = self.encoder(features, is_pad)
        queries = self.queries(memory)
        if self.training and hasattr(self.decoder, "both_decoders"):
            o_predictions, c_predictions = self.decoder.both_decoders(queries, memory)
        else:
            o_predictions, c_predictions = self.decoder.o_decoder(queries, memory), []
        return Output(o_predictions, c_predictions, queries.proposals)


def build(config):
    """A Detector with random weights, as the config, a config.Config, describes it."""
    r = config.recipe
    body = {"convnet": backbone.ConvNet, "resnet50": backbone.ResNet50}[config.backbone]()
    attention_shape = r.d_model, r.num_heads, r.num_levels, r.num_points, r.d_ffn
    decoder = DECODERS[config.model](r.decoder_layers, *attention_shape, r.num_classes)
    num_sets = getattr(decoder, "num_sets", 1)
    queries = QUERIES[config.queries](r.num_queries, r.d_model, r.num_classes, num_sets)
    if config.queries == "learned":
        with torch.no_grad():                   # a point has no size: start at sigmoid(-2) = .12
            decoder.box_heads[0][-1].bias[2:] = -2
    return Detector(body, backbone.Projections(body.channels, r.d_model, r.num_levels),
                    encoder.Encoder(r.encoder_layers, *attention_shape), queries, decoder)
