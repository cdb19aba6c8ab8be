"""The encoder's own detections, one a cell, and the two heads that every layer ends in.

[Deformable DETR App. A.4] "two-stage": the best of these boxes are where queries start. DESTR calls
such a network a mini-detector, and SD-DETR, a reading note says, takes up the word. Read
`encoder.py` before and `query_gen.py` after.
"""
import math

import torch
from torch import nn

from . import boxes, encoder


def box_head(d_model):
    """Three linear layers that say how far a reference moves; at first not at all."""
    head = nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU(),
                         nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, 4))
    nn.init.zeros_(head[-1].weight)
    nn.init.zeros_(head[-1].bias)
    return head


def class_head(d_model, num_classes, prior=0.01):
    """One linear layer to C logits, all at probability `prior` at first [Focal Loss Sec. 3.3]."""
    head = nn.Linear(d_model, num_classes)
    nn.init.constant_(head.bias, math.log(prior / (1 - prior)))
    return head


def anchors(memory):
    """The box each cell starts from: its centre, 5 % of the image wide on level 0, then doubling.

    [Deformable DETR App. A.4]  anchor of a cell of level l = (x, y, 0.05 * 2^l, 0.05 * 2^l)

    Args:
        memory  a Memory
    Returns:
        (B, S, 4)  cxcywh; and (B, S) bool, False on padding and where a number leaves (.01, .99)
    """
    centres = encoder.cell_centres(memory.spatial_shapes, memory.valid_ratios)           # (B, S, 2)
    sizes = torch.cat([centres.new_full((h * w,), 0.05 * 2 ** level)
                       for level, (h, w) in enumerate(memory.spatial_shapes)])                # (S,)
    anchor = torch.cat([centres, sizes[:, None].expand_as(centres)], dim=-1)             # (B, S, 4)
    is_good = ((anchor > 0.01) & (anchor < 0.99)).all(-1) & ~memory.is_pad                # (B, S)
    return anchor, is_good


class MiniDetector(nn.Module):
    """A detector of one layer on every cell of the encoder's output; the best become queries."""

    def __init__(self, d_model, num_classes):
        super().__init__()
        self.project = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.class_head = class_head(d_model, num_classes)
        self.box_head = box_head(d_model)

    def forward(self, memory):
        """A Memory -> Predictions, one a cell: logits (B, S, C), boxes (B, S, 4)

        Trained with every object in class 0, so logit 0 is "there is an object here".
        """
        anchor, is_good = anchors(memory)
        cells = memory.tokens.masked_fill(~is_good[..., None], 0)
        cells = self.norm(self.project(cells))                                           # (B, S, D)
        found = boxes.refine(anchor, self.box_head(cells))
        found = found.masked_fill(~is_good[..., None], 1)   # the release: sigmoid(inf + delta) = 1
        return boxes.Predictions(self.class_head(cells), found)

    def best(self, proposals, num_queries):
        """The N boxes of highest logit 0, best first, no gradient; all S if N > S. (B, N, 4)"""
        objectness = proposals.logits[..., 0]                                               # (B, S)
        cell = objectness.topk(min(num_queries, objectness.shape[1]), dim=1).indices        # (B, N)
        return proposals.boxes.detach().gather(1, cell[..., None].expand(-1, -1, 4))
