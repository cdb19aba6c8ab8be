"""Task-aware query generation (TAQ): each task makes its queries from its own points in an anchor.

[SD Eq. 4-5], [SD Fig. 3]. Read `decoder_decoupled.py` before and `tal_loss.py` after.
"""
import math

import torch
import torch.nn.functional as F
import torchvision.ops as ops
from torch import nn

from . import boxes, proposals_conditional


def region_features(memory, ref_boxes, size=7):
    """Sample the features inside each box on a grid of 7 x 7.

    [SD Eq. 4]  F_R = RoIAlign(F, R_box)

    Args:
        memory     a Memory of one feature level
        ref_boxes  (B, N, 4)  cxcywh, in [0, 1] of image size
    Returns:
        (B*N, D, 7, 7)
    Eq. 4 was not readable to us. It is reconstructed from Fig. 3, which draws RoIAlign, and from
    SAM-DETR, on whose point search Eq. 5 builds.
    """
    [(h, w)] = memory.spatial_shapes
    maps = memory.tokens.transpose(1, 2).unflatten(-1, (h, w))                        # (B, D, h, w)
    scale = memory.valid_ratios[:, 0].repeat(1, 2) * ref_boxes.new_tensor([w, h, w, h])     # (B, 4)
    scale = scale.round()                                                           # whole cells
    in_cells = boxes.to_xyxy(ref_boxes) * scale[:, None]                                 # (B, N, 4)
    B, N, _ = ref_boxes.shape
    image = torch.arange(B, device=maps.device).repeat_interleave(N)                        # (B*N,)
    return roi_align(maps, image, in_cells.flatten(0, 1), scale, size)


def roi_align(maps, image, in_cells, scale, size):
    """Read boxes from maps with RoIAlign, image by image, so that none reads an image's padding.

    Args:
        maps      (B, D, h, w)
        image     (P,)    whose box it is, ascending
        in_cells  (P, 4)  xyxy, in cells
        scale     (B, 4)  columns, rows, columns, rows of each image, in whole cells
    Returns:
        (P, D, size, size)
    While torch.compile or torch.export trace, the images' sizes are unknown and padding is read.
    """
    in_cells = in_cells.to(maps.dtype)
    if torch.compiler.is_compiling():
        rois = torch.cat([image[:, None].to(maps.dtype), in_cells], dim=1)                  # (P, 5)
        return ops.roi_align(maps, rois, size, aligned=True)
    return torch.cat([
        ops.roi_align(x[None, :, :rows, :columns], [in_cells[image == i]], size, aligned=True)
        for i, (x, (columns, rows, _, _)) in enumerate(zip(maps, scale.int().tolist()))])


class PointPredictor(nn.Module):
    """Predict K points of interest inside a box from its features. One predictor for each task."""

    def __init__(self, d_model, num_points=8, size=7):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(d_model, d_model // 4, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(d_model // 4 * size * size, d_model), nn.ReLU(),
            nn.Linear(d_model, 2 * d_model), nn.ReLU(),
            nn.Linear(2 * d_model, 2 * d_model), nn.ReLU(),
            nn.Linear(2 * d_model, 2 * num_points))
        angle = torch.arange(num_points) * (2 * math.pi / num_points)
        ring = torch.stack([angle.cos(), angle.sin()], dim=-1) / 2                          # (K, 2)
        # The points start on a ring. A query is the mean over its points, so points that coincide
        # would get the same gradient and never part.
        nn.init.zeros_(self.net[-1].weight)
        self.net[-1].bias.data = ring.atanh().flatten()

    def forward(self, features):
        """[SD Eq. 5]  R_SP = MLP(ConvNet(F_R)), here kept inside the box by tanh

        Args:
            features  F_R  (P, D, 7, 7)
        Returns:
            (P, K, 2)  (x, y) in (-1, 1): (-1, -1) is the box's top left corner, (0, 0) its centre
        The paper prints MLP(ConvNet(F_R)) alone. The layers and the tanh are SAM-DETR's, with
        widths in proportion to D; the start on a ring is ours.
        """
        return self.net(features).unflatten(-1, (-1, 2)).tanh()


def points_to_query(features, points, ref_boxes):
    """Average the features at a box's points, and the sine embeddings of the points.

    After [SD Eq. 5]  content = 1/K sum_k bilinear(F_R, point_k),  position = 1/K sum_k PE(point_k)

    Args:
        features   F_R   (P, D, 7, 7)
        points     R_SP  (P, K, 2)  (x, y) in [-1, 1] of the box
        ref_boxes        (P, 4)     cxcywh, in [0, 1] of image size
    Returns:
        content (P, D), position (P, D)
    [SD Fig. 3] draws a content and a position for each task; bilinear reading and the mean are from
    a reader's note on the web (docs/differences.md 21). Reading F_R rather than the full map, and
    the mean of embeddings rather than the embedding of a mean, are our choice.
    """
    found = F.grid_sample(features, points[:, :, None], align_corners=False, padding_mode="border")
    on_image = ref_boxes[:, None, :2] + points * ref_boxes[:, None, 2:] / 2              # (P, K, 2)
    return found[..., 0].mean(-1), boxes.embed_points(on_image, features.shape[1]).mean(1)


class TaskAwareQueries(nn.Module):
    """SD-DETR's queries: each task reads its own points in the mini-detector's anchors.

    [SD Eq. 4-5]  F_R = RoIAlign(F, R_box),  R_SP = MLP(ConvNet(F_R)), one MLP(ConvNet) per task,
    content = mean of F_R at the points,  p = e = mean of PE at the points,  r = anchor's centre

    Anchors are the mini-detector's best boxes, without gradient. Gradients do pass through the
    features and the points, so the decoder's losses train the point predictors.
    """

    def __init__(self, num_queries, d_model, num_classes, num_sets):
        super().__init__()
        self.num_queries = num_queries
        self.mini_detector = proposals_conditional.MiniDetector(d_model, num_classes)
        self.predictors = nn.ModuleList([PointPredictor(d_model)
                                         for _ in range(num_sets)])

    def forward(self, memory):
        """A Memory -> N Queries, in T sets"""
        found = self.mini_detector(memory)
        cell = self.mini_detector.best(found, self.num_queries, memory.is_pad)             # (B, N)
        anchors = proposals_conditional.pick(found.boxes, cell, 1.0).detach()        # (B, N, 4)
        features = region_features(memory, anchors)                              # (B*N, D, 7, 7)
        sets = [points_to_query(features, predict(features), anchors.flatten(0, 1))
                for predict in self.predictors]
        content, pos = (torch.stack(t).unflatten(1, cell.shape) for t in zip(*sets))
        return proposals_conditional.Queries(content, pos, pos, anchors[..., :2], found)
