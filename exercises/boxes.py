"""To fill in: exercise 1 of exercises/README.md. Graded by

    pytest --mine boxes.giou
    pytest --mine boxes.refine
"""
import math  # noqa: F401
from typing import NamedTuple  # noqa: F401
import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
import torchvision.ops as ops  # noqa: F401
from detr_min.boxes import to_xyxy  # noqa: F401


def giou(boxes, others):
    """Generalized IoU: it also ranks boxes that do not overlap, by how far apart they are.

    GIoU(a, b) = IoU(a, b) - |hull without a and b| / |hull|    [Generalized IoU, CVPR 2019, Alg. 1]

    The hull is the smallest box around both.

    Args and Returns as `iou`; (N, M), in (-1, 1].
    """
    raise NotImplementedError(
        "exercise 1, boxes.giou: "
        "return the (N, M) GIoU of every box with every other")


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
    raise NotImplementedError(
        "exercise 1, boxes.refine: "
        "return the boxes that the references become when moved by delta")
