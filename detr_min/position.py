"""Where a cell or a box is, as a vector of sines: what attention knows of geometry.

[Attention Is All You Need 3.5, in the 2-D form of DETR]. No parameters. Read `attention.py`
before and `backbone.py` after.
"""
import math

import torch

TEMPERATURE = 10000     # the longest wave is this many times the shortest


def sine(x, num_channels):
    """A number in [0, 1] as a vector of sines and cosines of ever longer waves.

    PE(x)[2i] = sin(2 pi x / T^(2i/d)),  PE(x)[2i+1] = cos(2 pi x / T^(2i/d))        T = 10000

    Args:
        x             (...)  in [0, 1] of image size
        num_channels  d      even
    Returns:
        (..., d), in [-1, 1]
    """
    i = torch.arange(0, num_channels, 2, dtype=x.dtype, device=x.device)                    # (d/2,)
    angle = 2 * math.pi * x[..., None] / TEMPERATURE ** (i / num_channels)             # (..., d/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)                   # (..., d)


def of_points(points, d_model):
    """(..., 2) points (x, y) -> (..., D): the y half first, as DETR has it."""
    return torch.cat([sine(points[..., 1], d_model // 2), sine(points[..., 0], d_model // 2)], -1)


def of_boxes(boxes, d_model):
    """(..., 4) boxes cxcywh -> (..., 2D): D/2 channels each for cx, cy, w, h, in this order."""
    return sine(boxes, d_model // 2).flatten(-2)


def of_cells(is_pad, d_model):
    """The cells of a feature level, measured on the image alone, not on its padding.

    Args:
        is_pad  (B, h, w)  True = padding
        d_model D
    Returns:
        (B, h, w, D)
    """
    is_image = (~is_pad).float()
    y, x = is_image.cumsum(1), is_image.cumsum(2)           # (B, h, w)  1, 2, 3, ... on the image
    y = (y - 0.5) / (y[:, -1:, :] + 1e-6)                   # centres of cells, in [0, 1]
    x = (x - 0.5) / (x[:, :, -1:] + 1e-6)
    return of_points(torch.stack([x, y], dim=-1), d_model)
