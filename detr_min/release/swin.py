"""Swin Transformer, the release's large backbone: cells attend to one another window by window.

[Swin Sec. 3]. Every other block moves the windows by half their size, so that what one block keeps
apart the next one joins. Blocks and patch merging are torchvision's; the attention is written out,
because torchvision leaves out the move where a map is one window high or wide, and the published
weights were trained with it. Read `backbone.py` before.
"""
import functools
import re

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils import checkpoint
from torchvision.models import swin_transformer

ORIGINAL_NAMES = [                                              # ours, the Swin repository's
    (r"^patches\.0", r"patch_embed.proj"), (r"^patches\.2", r"patch_embed.norm"),
    (r"^stages\.(\d)\.", r"layers.\1.blocks."), (r"^merges\.(\d)", r"layers.\1.downsample"),
    (r"^norms\.0", r"norm1"), (r"^norms\.1", r"norm2"), (r"^norms\.2", r"norm3"),
    (r"\.mlp\.0", r".mlp.fc1"), (r"\.mlp\.3", r".mlp.fc2")]


def original_name(name):
    """What published files call the tensor `name` of a `Swin`."""
    for ours, original in ORIGINAL_NAMES:
        name = re.sub(ours, original, name)
    return name


def pretrained(theirs, names):
    """What an ImageNet classifier of the Swin repository holds of a Detector's tensors, or {}.

    Args:
        theirs  its state dict, or any other dict
        names   of the Detector's tensors
    """
    found = {name: theirs.get(original_name(name.removeprefix("backbone.")))
             for name in names if name.startswith("backbone.")}
    return {name: tensor.flatten() if name.endswith(".relative_position_index") else tensor
            for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def split(x, size):
    """A map, cut into square windows. (B, h, w, C) -> (B, windows, size * size, C)"""
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))     # (B, h/size, size, w/size, size, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join(windows, h, w, size):
    """The inverse of `split`. (B, windows, size * size, C) -> (B, h, w, C)"""
    x = windows.unflatten(2, (size, size)).unflatten(1, (h // size, w // size))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def rolled_apart(h, w, size, shift, device=None):
    """What to add to a score: -100 where only the roll brought two cells into one window, else 0.

    A roll by `shift` puts the first rows behind the last ones, where they share a window; so do
    columns. On each axis 0 numbers the windows before the last, 1 and 2 the last one's two parts.

    Args:
        h, w  of the rolled map, whole windows
    Returns:
        (windows, 1, size * size, size * size)
    """
    places = torch.arange(h, device=device), torch.arange(w, device=device)
    rows, columns = ((place >= len(place) - size).int() + (place >= len(place) - shift).int()
                     for place in places)
    part = split((3 * rows[:, None] + columns)[None, ..., None], size)[0]  # (windows, size*size, 1)
    return -100.0 * (part != part.mT)[:, None]


class WindowAttention(swin_transformer.ShiftedWindowAttention):
    """torchvision's parameters; windows are moved on every map, however small, as released.

    [Swin Eq. 4]  softmax(Q K^T / sqrt(d) + B) V, in each window; B depends on where j is from i
    """

    def forward(self, x):
        """(B, h, w, C) -> (B, h, w, C)"""
        (h, w), size, shift = x.shape[1:3], self.window_size[0], self.shift_size[0]
        x = F.pad(x, (0, 0, 0, -w % size, 0, -h % size))        # whole windows; zeros do take part
        padded = x.shape[1:3]
        bias = self.get_relative_position_bias()                # (1, heads, size*size, size*size)
        if shift:
            bias = bias + rolled_apart(*padded, size, shift, bias.device).to(bias)
        qkv = self.qkv(split(x.roll((-shift, -shift), (1, 2)), size))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).transpose(2, 4).unbind(3)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)     # (B, windows, heads, ., d)
        x = join(self.proj(x.transpose(2, 3).flatten(3)), *padded, size)
        return x.roll((shift, shift), (1, 2))[:, :h, :w]


class Swin(nn.Module):
    """Swin-L by default. Strides 8, 16, 32; nothing is frozen.

    In training a block keeps its input alone and runs again in the backward pass, as released: the
    same gradients in a fraction of the memory.
    """

    reads_padding = True                # of a batch, as published: see backbone.padded_batch

    def __init__(self, width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12,
                 drop_path=0.2):
        super().__init__()
        net = torchvision.models.SwinTransformer(
            [4, 4], width, list(depths), list(heads), [window, window], num_classes=1,
            stochastic_depth_prob=drop_path, block=functools.partial(
                swin_transformer.SwinTransformerBlock, attn_layer=WindowAttention))
        self.patches = net.features[0]
        self.stages = nn.ModuleList(net.features[1::2])
        self.merges = nn.ModuleList(net.features[2::2])
        self.channels = [2 * width, 4 * width, 8 * width]
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for channels in self.channels])

    def forward(self, images):
        """(B, 3, h, w) -> [(B, 2C, h/8, w/8), (B, 4C, h/16, w/16), (B, 8C, h/32, w/32)]"""
        h, w = images.shape[-2:]
        x = self.patches(F.pad(images, (0, -w % 4, 0, -h % 4)))         # (B, h/4, w/4, C)
        x, levels = self.blocks(self.stages[0], x), []
        for merge, stage, norm in zip(self.merges, self.stages[1:], self.norms):
            x = self.blocks(stage, merge(x))        # merging pads odd sizes
            levels.append(norm(x).permute(0, 3, 1, 2))
        return levels

    def blocks(self, stage, x):
        """Run the blocks of a stage. (B, h, w, C) -> (B, h, w, C)"""
        for block in stage:
            x = checkpoint.checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return x
