"""DETR's encoder: dense self-attention among all cells of one feature map.

[DETR], unchanged in Conditional DETR. Read `attention_conditional.py` before and
`proposals_conditional.py` after.
"""
import torch
from torch import nn

from . import attention, attention_conditional, boxes


def feed_forward(d_model, d_ffn, dropout=0.0):
    """Linear, ReLU, dropout, Linear, on each token alone. (..., D) -> (..., D)"""
    return nn.Sequential(nn.Linear(d_model, d_ffn), nn.ReLU(), nn.Dropout(dropout),
                         nn.Linear(d_ffn, d_model))


def cell_positions(is_pad, d_model, dtype=torch.float32):
    """Embed the cells of a feature map, counted on the image alone, not on its padding.

    [DETR, code]  PE of (j / columns, i / rows), i and j count from 1, so the last cell is at (1, 1)

    Args:
        is_pad  (B, h, w)  True = padding
        d_model D
        dtype   of the result
    Returns:
        (B, h, w, D)
    Deformable DETR embeds the centres of cells instead, which lie half a cell before.
    """
    is_image = (~is_pad).to(dtype)
    y, x = is_image.cumsum(1), is_image.cumsum(2)           # (B, h, w)  1, 2, 3, ... on the image
    y = y / (y[:, -1:, :] + 1e-6)
    x = x / (x[:, :, -1:] + 1e-6)
    return boxes.embed_points(torch.stack([x, y], dim=-1), d_model)


class Projection(nn.Module):
    """The backbone's last level, brought to D channels: a 1x1 convolution with bias, no norm."""

    def __init__(self, channels, d_model):
        super().__init__()
        self.conv = nn.Conv2d(channels[-1], d_model, 1)

    def forward(self, features):
        """[..., (B, C, h, w)] of the backbone -> [(B, D, h, w)], one level"""
        return [self.conv(features[-1])]


class EncoderLayer(nn.Module):
    """LN(x + attention(x + position)), then LN(x + FFN(x))."""

    def __init__(self, d_model, num_heads, d_ffn, dropout=0.0):
        super().__init__()
        self.attn = nn.MultiheadAttention(d_model, num_heads, dropout, batch_first=True)
        self.norm_attn = nn.LayerNorm(d_model)
        self.ffn = feed_forward(d_model, d_ffn, dropout)
        self.norm_ffn = nn.LayerNorm(d_model)
        self.drop = nn.Dropout(dropout)

    def forward(self, memory):
        """A Memory with pos -> a Memory"""
        x = memory.tokens                                                               # (B, S, D)
        qk = x + memory.pos
        read, _ = self.attn(qk, qk, x, key_padding_mask=memory.is_pad, need_weights=False)
        x = self.norm_attn(x + self.drop(read))
        return memory._replace(tokens=self.norm_ffn(x + self.drop(self.ffn(x))))


class Encoder(nn.Module):
    """Turn one feature level into the decoder's Memory."""

    def __init__(self, num_layers, d_model, num_heads, d_ffn, dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList([
            EncoderLayer(d_model, num_heads, d_ffn, dropout) for _ in range(num_layers)])
        attention_conditional.xavier_uniform(self)

    def forward(self, features, pads):
        """Encode one projected level.

        Args:
            features  [(B, D, h, w)]
            pads      [(B, h, w)]     True = padding
        Returns:
            Memory, of S = h*w cells, with pos
        """
        [x], [pad] = features, pads
        dtype = torch.promote_types(x.dtype, torch.float32)             # bf16 would move points
        shares = [(~pad[:, 0]).to(dtype).mean(-1), (~pad[:, :, 0]).to(dtype).mean(-1)]  # (x, y)
        memory = attention.Memory(
            tokens=x.flatten(2).transpose(1, 2),                                        # (B, S, D)
            is_pad=pad.flatten(1),                                                      # (B, S)
            spatial_shapes=[tuple(x.shape[-2:])],
            valid_ratios=torch.stack(shares, dim=-1)[:, None],                          # (B, 1, 2)
            pos=cell_positions(pad, x.shape[1], dtype).flatten(1, 2))                   # (B, S, D)
        for layer in self.layers:
            memory = layer(memory)
        return memory
