"""To fill in: exercise 8 of exercises/README.md. Graded by

    pytest --mine query_gen.points_to_query
"""
import math  # noqa: F401
import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
import torchvision.ops as ops  # noqa: F401
from torch import nn  # noqa: F401
from detr_min import boxes, proposals_conditional  # noqa: F401


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
    raise NotImplementedError(
        "exercise 8, query_gen.points_to_query: "
        "return the mean feature and the mean position embedding of a box's points")
