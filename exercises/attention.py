"""To fill in: exercise 2 of exercises/README.md. Graded by

    pytest --mine attention.neighbours
    pytest --mine attention.deformable_attention
"""
import math  # noqa: F401
import warnings  # noqa: F401
from typing import NamedTuple  # noqa: F401
import scipy.sparse  # noqa: F401
import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
from torch import nn  # noqa: F401


def neighbours(position, size):
    """Find the two cells beside a position on an axis, and the share of each: 0 beyond the map.

    Args:
        position  in cells, 0 = the centre of the first
        size      number of cells on that axis, broadcast over the last dimension
    Yields:
        twice: cell, int32, kept on the map; share, with gradient
    """
    raise NotImplementedError(
        "exercise 2, attention.neighbours: "
        "yield the cell below and the cell above the position, each with its share")


def deformable_attention(value, spatial_shapes, locations, weights):
    """Sum the values at a query's sampling points, each times its attention weight.

    [Deformable DETR Eq. 3]  out[n, m] = sum_l sum_k  A[n,m,l,k] * value_l,m(location[n,m,l,k])
    where m counts the heads; W_m and the sum over m are DeformableAttention.output_proj

    Args:
        value           W'x  (B, S, H, D/H)       cells of all levels, projected, split into heads
        spatial_shapes       [(h, w), ...]        L pairs of python ints, sum of h*w = S
        locations            (B, N, H, L, K, 2)   (x, y) in [0, 1] of each level
        weights         A    (B, N, H, L, K)      softmax over L, K in DeformableAttention
    Returns:
        (B, N, D)  bilinear between the centres of cells, (x, y) = ((j + .5)/w, (i + .5)/h) for row
        i and column j; zero beyond the map
    Raises:
        ValueError: the shapes do not add up to S
    """
    raise NotImplementedError(
        "exercise 2, attention.deformable_attention: "
        "return the (B, N, D) sums of what is found at the sampling points")
