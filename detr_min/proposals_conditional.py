"""Object queries on one feature map: learned ones, or the anchors of a mini-detector.

[Conditional DETR], and SD-DETR's anchors [SD Fig. 3], which DESTR introduced.
`AnchorQueries` and `AnchorCellQueries` are the controls beside SD-DETR's task-aware queries: the
same anchors, a plainer content. Read `encoder_conditional.py` before and `decoder_conditional.py`
after.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import attention_conditional, backbone, boxes, encoder, proposals


class Queries(NamedTuple):
    """N queries per image, in as many sets as the decoder has branches (SD-DETR: 2, else 1)."""
    content: torch.Tensor             # (T, B, N, D)  T sets: one, or [classification, localization]
    pos: torch.Tensor                       # (T, B, N, D)  p, for self-attention and layer 1
    spatial: torch.Tensor                   # (T, B, N, D)  e, for every cross-attention
    ref_points: torch.Tensor                # (B, N, 2)  r, (x, y) in [0, 1], the same for all sets
    proposals: boxes.Predictions | None     # the mini-detector's, one per cell: (B, S, ...)


class LearnedQueries(nn.Module):
    """A position learned for each query, the same for every image; content starts at zero.

    [Conditional DETR]  r = sigmoid(MLP(p)),  e = PE(r)
    """

    def __init__(self, num_queries, d_model, num_classes, num_sets):
        super().__init__()
        self.num_sets = num_sets
        self.pos = nn.Parameter(torch.randn(num_queries, d_model))
        self.reference = attention_conditional.xavier_uniform(nn.Sequential(
            nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, 2)))

    def forward(self, memory):
        """A Memory -> Queries"""
        with torch.autocast(self.pos.device.type, enabled=False):    # float32: bf16 moves points
            points = self.reference(self.pos).sigmoid()                                    # (N, 2)
            spatial = boxes.embed_points(points, self.pos.shape[1])                        # (N, D)
        B = memory.tokens.shape[0]
        sets = (self.num_sets, B, -1, -1)
        return Queries(torch.zeros_like(self.pos).expand(sets), self.pos.expand(sets),
                       spatial.expand(sets), points.expand(B, -1, -1), proposals=None)


def tower(d_model, num_layers=4):
    """Four times 3x3 convolution, GroupNorm, ReLU. (B, D, h, w) -> (B, D, h, w)"""
    return nn.Sequential(*(part for _ in range(num_layers) for part in (
        nn.Conv2d(d_model, d_model, 3, padding=1), nn.GroupNorm(32, d_model), nn.ReLU())))


def pick(tensor, cell, nothing):
    """Pick rows of a tensor, for each image its own. Index S means no cell: a row of `nothing`.

    (B, S, X), (B, N) -> (B, N, X)
    """
    tensor = F.pad(tensor, (0, 0, 0, 1), value=nothing)
    return tensor.gather(1, cell[..., None].expand(-1, -1, tensor.shape[-1]))


class MiniDetector(nn.Module):
    """A small convolutional detector on the encoder's map: each cell predicts a class and a box.

    [DESTR], whose term SD-DETR uses. It is trained one-to-one on all cells.
    Differs: the prior of a box is the centre of its cell; DESTR regresses it from the position.
        The heads are the mini-detector's own; in DESTR it shares the decoder's.
    """

    def __init__(self, d_model, num_classes):
        super().__init__()
        self.class_tower, self.box_tower = tower(d_model), tower(d_model)
        self.class_head = proposals.class_head(d_model, num_classes)
        self.box_head = proposals.box_head(d_model)

    def forward(self, memory):
        """A Memory -> Predictions, one per cell: logits (B, S, C), boxes (B, S, 4)

        box = sigmoid(MLP(f) + [logit(centre of the cell), 0, 0]); on padding no class is likely
        """
        [shape] = memory.spatial_shapes
        cells = memory.tokens.transpose(1, 2).unflatten(-1, shape)                   # (B, D, h, w)
        maps, _ = backbone.per_image(lambda x: [self.class_tower(x), self.box_tower(x)], cells,
                                     memory.is_pad.unflatten(-1, shape))
        for_class, for_box = (x.flatten(2).transpose(1, 2) for x in maps)               # (B, S, D)
        centres = encoder.cell_centres(memory.spatial_shapes, memory.valid_ratios)      # (B, S, 2)
        logits = self.class_head(for_class).masked_fill(memory.is_pad[..., None], -100)
        return boxes.Predictions(logits, boxes.refine(centres, self.box_head(for_box)))

    def best(self, found, num_queries, is_pad):
        """The N cells of highest score in any class, best first. (B, N) int64

        If an image has fewer cells than N, the rest are S, which means no cell (see `pick`).
        """
        S = is_pad.shape[1]
        score = found.logits.amax(-1).masked_fill(is_pad, -math.inf)                        # (B, S)
        cell = score.topk(min(num_queries, S), dim=1).indices                          # (B, <= N)
        cell = cell.masked_fill(is_pad.gather(1, cell), S)
        return F.pad(cell, (0, num_queries - cell.shape[1]), value=S)


class AnchorQueries(nn.Module):
    """Queries at the centres of the mini-detector's best boxes, with zero content.

    r = centre of the anchor, without gradient,  p = e = PE(r)
    """

    def __init__(self, num_queries, d_model, num_classes, num_sets):
        super().__init__()
        self.num_queries, self.num_sets, self.d_model = num_queries, num_sets, d_model
        self.mini_detector = MiniDetector(d_model, num_classes)

    def content(self, tokens):
        """Make contents of the features at the anchors' cells. (B, N, D) -> (B, N, D)"""
        return torch.zeros_like(tokens)

    def forward(self, memory):
        """A Memory -> N Queries"""
        found = self.mini_detector(memory)
        cell = self.mini_detector.best(found, self.num_queries, memory.is_pad)             # (B, N)
        points = pick(found.boxes, cell, 1.0).detach()[..., :2]                     # (B, N, 2)
        pos = boxes.embed_points(points, self.d_model)                                  # (B, N, D)
        sets = (self.num_sets, -1, -1, -1)
        return Queries(
            self.content(pick(memory.tokens, cell, 0.0)).expand(sets), pos.expand(sets),
            pos.expand(sets), points, found)


class AnchorCellQueries(AnchorQueries):
    """Queries whose content is the encoder's feature at the anchor's cell, without gradient."""

    def content(self, tokens):
        """The features themselves. (B, N, D) -> (B, N, D)"""
        return tokens.detach()
