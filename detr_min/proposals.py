"""The encoder's own detections, one per cell, and the object queries that start from the best.

[Deformable DETR App. A.4] "two-stage", with [DINO Sec. 3.4]'s mixed query selection, as in the
DAC-DETR release. The class head and the box head are here too, because the detector on the
encoder's cells is the first to use them. Read `encoder.py` before and `decoder_base.py` after.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import boxes, encoder


class Queries(NamedTuple):
    """N queries per image, in as many sets as the decoder has branches (SD-DETR: 2, else 1).

    A query has a content (what is here), a position (where), and a reference to look around.
    """
    content: torch.Tensor             # (T, B, N, D)  T sets: one, or [classification, localization]
    pos: torch.Tensor                           # (T, B, N, D)
    ref_boxes: torch.Tensor               # (B, N, 4) cxcywh; learned queries have points, (B, N, 2)
    proposals: boxes.Predictions | None      # the encoder's own, one per cell: (B, S, ...)
    is_blocked: torch.Tensor | None = None      # (N, N) bool, True: row may not look at column;
                                                # set by release/denoising.py alone


def box_head(d_model):
    """Three linear layers that say how far a reference moves. They start at no move."""
    head = nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU(),
                         nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, 4))
    nn.init.zeros_(head[-1].weight)
    nn.init.zeros_(head[-1].bias)
    return head


def class_head(d_model, num_classes, prior=0.01):
    """One linear layer to C logits, which start at probability `prior` [Focal Loss Sec. 3.3]."""
    head = nn.Linear(d_model, num_classes)
    nn.init.constant_(head.bias, math.log(prior / (1 - prior)))
    return head


def anchors(memory):
    """The box that each cell starts from: 5 % of the image wide and high on level 0, then doubling.

    [Deformable DETR App. A.4]  anchor of a cell of level l = (x, y, .05 * 2^l, .05 * 2^l), l = 0...

    Args:
        memory  a Memory
    Returns:
        (B, S, 4)  cxcywh; and (B, S) bool, False on padding and unless all four are in (.01, .99)
    """
    centres = encoder.cell_centres(memory.spatial_shapes, memory.valid_ratios)           # (B, S, 2)
    sizes = torch.cat([centres.new_full((h * w,), 0.05 * 2 ** level)
                       for level, (h, w) in enumerate(memory.spatial_shapes)])                # (S,)
    anchor = torch.cat([centres, sizes[:, None].expand_as(centres)], dim=-1)             # (B, S, 4)
    is_good = ((anchor > 0.01) & (anchor < 0.99)).all(-1) & ~memory.is_pad                # (B, S)
    return anchor, is_good


class MiniDetector(nn.Module):
    """A small detector on every cell of the encoder's output; queries start at its best boxes."""

    def __init__(self, d_model, num_classes):
        super().__init__()
        self.project = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.class_head = class_head(d_model, num_classes)
        self.box_head = box_head(d_model)

    def forward(self, memory):
        """A Memory -> Predictions, one per cell: logits (B, S, C), boxes (B, S, 4)

        The paper has one logit here, object or not; as released there are C. Every object is
        trained as class 0, so logit 0 says that there is one. On padding no class is likely.
        """
        anchor, is_good = anchors(memory)
        cells = memory.tokens.masked_fill(~is_good[..., None], 0)
        cells = self.norm(self.project(cells))                                           # (B, S, D)
        found = boxes.refine(anchor, self.box_head(cells))
        found = found.masked_fill(~is_good[..., None], 1)       # as released: sigmoid(inf + delta)
        logits = self.class_head(cells).masked_fill(memory.is_pad[..., None], -100)
        return boxes.Predictions(logits, found)

    def best(self, proposals, num_queries):
        """The N boxes with the highest logit of class 0, best first, detached. (B, N, 4)

        An image of fewer cells gets the box of padding, (1, 1, 1, 1), for the rest.
        """
        objectness = proposals.logits[..., 0]                                               # (B, S)
        cell = objectness.topk(min(num_queries, objectness.shape[1]), dim=1).indices   # (B, <= N)
        found = proposals.boxes.detach().gather(1, cell[..., None].expand(-1, -1, 4))
        return F.pad(found, (0, 0, 0, num_queries - cell.shape[1]), value=1)


class TwoStageQueries(nn.Module):
    """Queries that start at the encoder's N best boxes, with a learned content.

    [DINO Sec. 3.4] "mixed query selection", as in the DAC-DETR release. With two sets each task
    learns its own contents; box and position are the same.
    """

    def __init__(self, num_queries, d_model, num_classes, num_sets):
        super().__init__()
        self.num_queries, self.num_sets, self.d_model = num_queries, num_sets, d_model
        self.mini_detector = MiniDetector(d_model, num_classes)
        self.content = nn.ParameterList(torch.randn(num_queries, d_model) for _ in range(num_sets))
        self.pos_project = nn.Linear(2 * d_model, 2 * d_model)
        self.pos_norm = nn.LayerNorm(2 * d_model)

    def embed(self, ref_boxes):
        """Make a position and a content out of boxes. (B, N, 4) -> (B, N, D), (B, N, D)"""
        sines = boxes.sine(ref_boxes, self.d_model // 2).flatten(-2)                    # (B, N, 2D)
        return self.pos_norm(self.pos_project(sines)).chunk(2, dim=-1)

    def forward(self, memory):
        """A Memory -> N Queries"""
        found = self.mini_detector(memory)
        ref_boxes = self.mini_detector.best(found, self.num_queries)                  # (B, N, 4)
        pos, _ = self.embed(ref_boxes)                  # the content half is unused, as released
        content = torch.stack(list(self.content))[:, None].expand(-1, pos.shape[0], -1, -1)
        return Queries(content, pos.expand(self.num_sets, -1, -1, -1), ref_boxes, found)
