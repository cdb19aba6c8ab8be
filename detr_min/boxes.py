"""Boxes: formats, overlap, the step by which a layer moves a box, and its sine embedding.

Everywhere in this package a box is cxcywh: centre and size, in [0, 1] of the image that the
network sees. Any other format has a suffix, `_xyxy` for corners, `_px` for pixels. `iou` and `giou`
call torchvision. Read `attention.py` next.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.ops as ops


class Predictions(NamedTuple):
    """The predictions of one decoder layer: N boxes, and for each a logit per class."""
    logits: torch.Tensor        # (B, N, C)  before the sigmoid; there is no background class
    boxes: torch.Tensor         # (B, N, 4)  cxcywh, in [0, 1] of image size


def to_xyxy(boxes):
    """Convert centre and size to corners, in the same unit. (..., 4) -> (..., 4)"""
    centre, half_size = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half_size, centre + half_size], dim=-1)


def to_cxcywh(boxes_xyxy):
    """Convert corners to centre and size, in the same unit. (..., 4) -> (..., 4)"""
    top_left, bottom_right = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], dim=-1)


def iou(boxes, others):
    """Compute the intersection over union of every box with every other. Higher is better.

    IoU(a, b) = |a and b| / |a or b|

    Args:
        boxes   a  (N, 4)  cxcywh
        others  b  (M, 4)  cxcywh, of positive area (the data sets see to that)
    Returns:
        (N, M), in [0, 1]
    """
    return ops.box_iou(to_xyxy(boxes), to_xyxy(others))


def giou(boxes, others):
    """Generalized IoU: it also ranks boxes that do not overlap, by how far apart they are.

    GIoU(a, b) = IoU(a, b) - |hull without a and b| / |hull|    [Generalized IoU, CVPR 2019, Alg. 1]

    The hull is the smallest box around both.

    Args and Returns as `iou`; (N, M), in (-1, 1].
    """
    return ops.generalized_box_iou(to_xyxy(boxes), to_xyxy(others))


def paired_iou(boxes, others):
    """IoU of box i with other i: the diagonal of `iou`, without the matrix. (P, 4) x 2 -> (P,)"""
    a, b = to_xyxy(boxes), to_xyxy(others)
    top_left = torch.maximum(a[:, :2], b[:, :2])                                # (P, 2)
    bottom_right = torch.minimum(a[:, 2:], b[:, 2:])                            # (P, 2)
    both = (bottom_right - top_left).clamp(min=0).prod(-1)                      # (P,)
    return both / (boxes[:, 2:].prod(-1) + others[:, 2:].prod(-1) - both)


def refine(ref_boxes, delta):
    """Move a reference by a correction that is added before the sigmoid.

    [Deformable DETR App. A.4; for a point App. A.3]  box = sigmoid(logit(ref) + delta)

    The logit keeps its argument 1e-5 away from 0 and 1, as the release does.

    Args:
        ref_boxes  (..., 4)  cxcywh in [0, 1]; or (..., 2), a point: size = sigmoid(delta[2:])
        delta      (..., 4)  the output of a box head, any real number
    Returns:
        (..., 4)  cxcywh in [0, 1]; delta = 0 leaves a box where it is, up to the 1e-5
    """
    missing = delta.shape[-1] - ref_boxes.shape[-1]         # 2 for a point, 0 for a box
    return (F.pad(torch.logit(ref_boxes, eps=1e-5), (0, missing)) + delta).sigmoid()


def sine(x, num_channels):
    """Embed a number in [0, 1] as sines and cosines of ever longer waves.

    [Attention Is All You Need 3.5], with DETR's 2 pi
        PE(x)[2i] = sin(2 pi x / 10000^(2i/d)),  PE(x)[2i+1] = cos(2 pi x / 10000^(2i/d))

    Args:
        x             (...)  in [0, 1] of image size
        num_channels  d      even
    Returns:
        (..., d), in [-1, 1]
    """
    exponent = torch.arange(0, num_channels, 2, dtype=x.dtype, device=x.device) / num_channels
    angle = 2 * math.pi * x[..., None] / 10000 ** exponent                             # (..., d/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)                   # (..., d)


def embed_points(points, d_model):
    """Embed points (x, y), (..., 2) -> (..., D): the y half first, as DETR has it."""
    return torch.cat([sine(points[..., 1], d_model // 2), sine(points[..., 0], d_model // 2)], -1)
