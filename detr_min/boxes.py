"""Boxes: formats, overlap, and the step by which a decoder layer moves a box.

Everywhere in this package a box is cxcywh: centre and size, in [0, 1] of the image that the
network sees. Any other format has a suffix, `_xyxy` for corners, `_px` for pixels. Overlaps are
torchvision's. Used by every file below; read `attention.py` next.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.ops as ops


class Predictions(NamedTuple):
    """What one decoder layer says: N boxes, and for each a logit per class."""
    logits: torch.Tensor        # (B, N, C)  before the sigmoid; there is no background class
    boxes: torch.Tensor         # (B, N, 4)  cxcywh, in [0, 1] of image size


def to_xyxy(boxes):
    """Centre and size -> corners, same unit. (..., 4) -> (..., 4)"""
    return ops.box_convert(boxes, "cxcywh", "xyxy")


def to_cxcywh(boxes_xyxy):
    """Corners -> centre and size, same unit. (..., 4) -> (..., 4)"""
    return ops.box_convert(boxes_xyxy, "xyxy", "cxcywh")


def iou(boxes, others):
    """Intersection over union of every box with every other. Higher is better.

    IoU(a, b) = |a and b| / |a or b|

    Args:
        boxes   a  (N, 4)  cxcywh
        others  b  (M, 4)  cxcywh, of positive area (data.py sees to that)
    Returns:
        (N, M), in [0, 1]
    """
    return ops.box_iou(to_xyxy(boxes), to_xyxy(others))


def giou(boxes, others):
    """IoU less the share of the enclosing box that neither covers: tells far from near at IoU 0.

    GIoU(a, b) = IoU(a, b) - |hull \\ (a or b)| / |hull|        [Generalized IoU, CVPR 2019, Alg. 1]

    Args and Returns as `iou`; (N, M), in (-1, 1].
    """
    return ops.generalized_box_iou(to_xyxy(boxes), to_xyxy(others))


def paired_iou(boxes, others):
    """IoU of box i with other i: the diagonal of `iou`, no matrix. (P, 4), (P, 4) -> (P,)"""
    a, b = to_xyxy(boxes), to_xyxy(others)
    top_left = torch.maximum(a[:, :2], b[:, :2])                                # (P, 2)
    bottom_right = torch.minimum(a[:, 2:], b[:, 2:])                            # (P, 2)
    both = (bottom_right - top_left).clamp(min=0).prod(-1)                      # (P,)
    return both / (boxes[:, 2:].prod(-1) + others[:, 2:].prod(-1) - both)


def logit(p):
    """Inverse of the sigmoid, log(p / (1 - p)); p is kept 1e-5 away from 0 and 1 (as released)."""
    return torch.logit(p, eps=1e-5)


def refine(ref_boxes, delta):
    """Move a reference by a correction that lives before the sigmoid.

    [Deformable DETR App. A.4]  box = sigmoid(logit(ref) + delta)

    Args:
        ref_boxes  (..., 4)  cxcywh in [0, 1]; or (..., 2), a point: the size is sigmoid(delta) then
        delta      (..., 4)  what a box head says, any real number
    Returns:
        (..., 4)  cxcywh in [0, 1]; delta = 0 gives the reference back
    """
    missing = delta.shape[-1] - ref_boxes.shape[-1]         # 2 for a point, 0 for a box
    return (F.pad(logit(ref_boxes), (0, missing)) + delta).sigmoid()
