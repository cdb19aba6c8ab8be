"""The detector: backbone, encoder, queries, one decoder with its heads.

The whole forward pass is `Detector.forward`. Read every file above before, or follow the calls.
"""
from typing import NamedTuple

from torch import nn

from . import boxes


class Output(NamedTuple):
    """The predictions for a batch."""
    o_decoder: list[boxes.Predictions]          # one a layer, the last is the answer
    c_decoder: list[boxes.Predictions]          # DAC-DETR in training; else empty
    proposals: boxes.Predictions | None     # the encoder's, one a cell; None with learned queries


class Detector(nn.Module):
    """Turn images into predictions, layer by layer."""

    def __init__(self, backbone, projections, encoder, queries, decoder):
        super().__init__()
        self.backbone, self.projections = backbone, projections
        self.encoder, self.queries, self.decoder = encoder, queries, decoder

    def forward(self, images, is_pad):
        """Predict classes and boxes for a batch.

        Args:
            images  (B, 3, h, w)  normalised as ImageNet's
            is_pad  (B, h, w)     bool, True = padding
        Returns:
            Output
        """
        features = self.projections(self.backbone(images))          # [(B, D, h/8, w/8), ...]
        memory = self.encoder(features, is_pad)
        queries = self.queries(memory)
        o_predictions = self.decoder.o_decoder(queries, memory)
        trains_both = self.training and hasattr(self.decoder, "c_decoder")
        c_predictions = self.decoder.c_decoder(queries, memory) if trains_both else []
        return Output(o_predictions, c_predictions, queries.proposals)
