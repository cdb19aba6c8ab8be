"""Deformable DETR as published: learned queries, two-stage without mixing, and no refinement.

[Deformable DETR Sec. 4.1, App. A.4]. Its weights load into these, and its rows of the papers'
tables are trained with them. Read `proposals.py` and `decoder_base.py` before.
"""
import torch
from torch import nn

from .. import boxes, decoder_base, proposals


class LearnedQueries(nn.Module):
    """Content, position and a reference point learned for each query: the same for every image.

    [Deformable DETR Sec. 4.1], without two-stage.
    """

    def __init__(self, num_queries, d_model, num_classes, num_sets):
        super().__init__()
        self.num_sets = num_sets
        self.pos_and_content = nn.Parameter(torch.randn(num_queries, 2 * d_model))
        self.reference_points = nn.Linear(d_model, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory):
        """A Memory -> Queries whose references are points, (B, N, 2)"""
        B = memory.tokens.shape[0]
        pos, content = self.pos_and_content.expand(B, -1, -1).chunk(2, dim=-1)           # (B, N, D)
        with torch.autocast(pos.device.type, enabled=False):     # float32: bf16 moves points
            points = self.reference_points(pos).sigmoid()                                # (B, N, 2)
        sets = (self.num_sets, -1, -1, -1)
        return proposals.Queries(content.expand(sets), pos.expand(sets), points, proposals=None)


class UnmixedTwoStageQueries(proposals.TwoStageQueries):
    """Two-stage queries whose content also comes from the box [Deformable DETR App. A.4]."""

    def __init__(self, num_queries, d_model, num_classes, num_sets):
        super().__init__(num_queries, d_model, num_classes, num_sets)
        self.content = None

    def forward(self, memory):
        """A Memory -> min(N, S) Queries"""
        found = self.mini_detector(memory)
        ref_boxes = self.mini_detector.best(found, self.num_queries)
        pos, content = self.embed(ref_boxes)
        sets = (self.num_sets, -1, -1, -1)
        return proposals.Queries(content.expand(sets), pos.expand(sets), ref_boxes, found)


class FixedReferenceDecoder(decoder_base.Decoder):
    """Deformable DETR without refinement: every layer looks around the same point."""

    def o_decoder(self, queries, memory):
        """Decode Queries and a Memory to Predictions, one a layer; the last is the answer."""
        x, pos, predictions = queries.content[0], queries.pos[0], []
        for layer, class_head, box_head in zip(self.layers, self.class_heads, self.box_heads):
            x = layer.disperse(x, pos, queries.is_blocked)
            x = layer.gather(x, pos, queries.ref_boxes, memory)
            predictions.append(boxes.Predictions(
                class_head(x), boxes.refine(queries.ref_boxes, box_head(x))))
        return predictions
