"""The detector: backbone, encoder, queries, one decoder with its heads.

The whole forward pass is `Detector.forward`. Read every file above before, or follow the calls.
"""
from typing import NamedTuple

from torch import nn

from . import boxes


class Output(NamedTuple):
    """The predictions for a batch."""
    o_decoder: list[boxes.Predictions]          # one per layer, the last is the answer
    c_decoder: list[boxes.Predictions]          # DAC-DETR in training; else empty
    proposals: boxes.Predictions | None     # the encoder's, one per cell; None with learned queries


class Detector(nn.Module):
    """Turn images into predictions, one per decoder layer."""

    def __init__(self, backbone, projections, encoder, queries, decoder, on_batch):
        """on_batch: backbone.per_image, or padded_batch for ResNet-50 and Swin, as published"""
        super().__init__()
        self.backbone, self.projections = backbone, projections
        self.encoder, self.queries, self.decoder = encoder, queries, decoder
        self.on_batch = on_batch

    def forward(self, images, is_pad):
        """Predict classes and boxes for a batch.

        Args:
            images  (B, 3, h, w)  normalised with ImageNet's mean and deviation
            is_pad  (B, h, w)     bool, True = padding
        Returns:
            Output
        """
        levels, pads = self.on_batch(lambda x: self.projections(self.backbone(x)), images, is_pad)
        memory = self.encoder(levels, pads)         # of [(B, D, h/8, w/8), ...], or of one level
        queries = self.queries(memory)
        o_predictions = self.decoder.o_decoder(queries, memory)
        trains_both = self.training and hasattr(self.decoder, "c_decoder")
        c_predictions = self.decoder.c_decoder(queries, memory) if trains_both else []
        return Output(o_predictions, c_predictions, queries.proposals)
