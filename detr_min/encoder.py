"""Deformable encoder: every cell of every level reads a few points around itself, on all levels.

[Deformable DETR Sec. 4.1]. Read `backbone.py` before and `proposals.py` after.
"""
import torch
from torch import nn

from . import attention, boxes


def feed_forward(d_model, d_ffn):
    """Linear, ReLU, Linear, on each query alone. (..., D) -> (..., D)"""
    return nn.Sequential(nn.Linear(d_model, d_ffn), nn.ReLU(), nn.Linear(d_ffn, d_model))


def cell_centres(spatial_shapes, valid_ratios):
    """The centre of every cell, as a share of the image without its padding.

    Args:
        spatial_shapes  [(h, w), ...]
        valid_ratios    (B, L, 2)   (x, y)
    Returns:
        (B, S, 2)  (x, y); beyond 1 on padding
    """
    centres = []
    for level, (h, w) in enumerate(spatial_shapes):
        y = torch.arange(h, dtype=valid_ratios.dtype, device=valid_ratios.device) + 0.5
        x = torch.arange(w, dtype=valid_ratios.dtype, device=valid_ratios.device) + 0.5
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)    # (h*w, 2)
        cells = (valid_ratios[:, level, None] * x.new_tensor([w, h])).round()           # (B, 1, 2)
        centres.append(grid / cells)                                                  # (B, h*w, 2)
    return torch.cat(centres, dim=1)


def cell_positions(is_pad, d_model, dtype=torch.float32):
    """Embed the cells of a feature level, measured on the image alone, not on its padding.

    Args:
        is_pad  (B, h, w)  True = padding
        d_model D
        dtype   of the result
    Returns:
        (B, h, w, D)  the sine embedding of each cell's centre
    """
    is_image = (~is_pad).to(dtype)
    y, x = is_image.cumsum(1), is_image.cumsum(2)           # (B, h, w)  1, 2, 3, ... on the image
    y = (y - 0.5) / (y[:, -1:, :] + 1e-6)                   # centres of cells, in [0, 1]
    x = (x - 0.5) / (x[:, :, -1:] + 1e-6)
    return boxes.sine(torch.stack([y, x], dim=-1), d_model // 2).flatten(-2)    # the y half first


class EncoderLayer(nn.Module):
    """LN(x + attention(x + position)), then LN(x + FFN(x))."""

    def __init__(self, d_model, num_heads, num_levels, num_points, d_ffn):
        super().__init__()
        self.attn = attention.DeformableAttention(d_model, num_heads, num_levels, num_points)
        self.norm_attn = nn.LayerNorm(d_model)
        self.ffn = feed_forward(d_model, d_ffn)
        self.norm_ffn = nn.LayerNorm(d_model)

    def forward(self, memory, centres):
        """A Memory and the centres of its cells, (B, S, 2) -> a Memory"""
        x = memory.tokens
        x = self.norm_attn(x + self.attn(x + memory.pos, centres, memory))           # (B, S, D)
        return memory._replace(tokens=self.norm_ffn(x + self.ffn(x)))


class Encoder(nn.Module):
    """Turn feature levels into the decoder's Memory."""

    def __init__(self, num_layers, d_model, num_heads, num_levels, num_points, d_ffn):
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(num_levels, d_model))
        self.layers = nn.ModuleList([
            EncoderLayer(d_model, num_heads, num_levels, num_points, d_ffn)
            for _ in range(num_layers)])

    def forward(self, features, pads):
        """Encode feature levels.

        Args:
            features  [(B, D, h, w), ...]  L levels, any sizes
            pads      [(B, h, w), ...]     True = padding
        Returns:
            Memory, of S = sum of h*w cells
        """
        dtype = torch.promote_types(features[0].dtype, torch.float32)   # bf16 would move points
        shares = [torch.stack([(~pad[:, 0]).to(dtype).mean(-1),           # x: the first row
                               (~pad[:, :, 0]).to(dtype).mean(-1)], dim=-1)    # y: the first column
                  for pad in pads]                                                       # (B, 2)
        memory = attention.Memory(
            tokens=torch.cat([x.flatten(2).transpose(1, 2) for x in features], dim=1),   # (B, S, D)
            is_pad=torch.cat([pad.flatten(1) for pad in pads], dim=1),                      # (B, S)
            spatial_shapes=[tuple(x.shape[-2:]) for x in features],
            valid_ratios=torch.stack(shares, dim=1),                                     # (B, L, 2)
            pos=torch.cat([cell_positions(pad, x.shape[1], dtype).flatten(1, 2) + embed  # (B, S, D)
                           for pad, x, embed in zip(pads, features, self.level_embed)], dim=1))
        centres = cell_centres(memory.spatial_shapes, memory.valid_ratios)               # (B, S, 2)
        for layer in self.layers:
            memory = layer(memory, centres)
        return memory
