"""Multi-scale deformable attention: each query reads a few points of each feature level.

[Deformable DETR Eq. 2-3]. `deformable_attention` is the arithmetic, `DeformableAttention` the
module that decides where to look. Everything from `ms_deform_attn` on computes the same numbers
faster on a CPU; skip it on a first reading. Read `boxes.py` before and `backbone.py` after.

The file needs only torch and scipy. Copied into another project, `ms_deform_attn` replaces the
pure PyTorch function of Deformable-DETR and mmcv, with the same arguments.
"""
import math
import warnings
from typing import NamedTuple

import scipy.sparse
import torch
import torch.nn.functional as F
from torch import nn

warnings.filterwarnings("ignore", "Sparse CSR tensor support")      # torch calls it beta


class Memory(NamedTuple):
    """The image as the attention reads it: the cells of all levels in one row."""
    tokens: torch.Tensor                        # (B, S, D)  level after level, row after row
    is_pad: torch.Tensor                        # (B, S)     True = padding, holds nothing
    spatial_shapes: list[tuple[int, int]]       # [(h, w)] of each of the L levels, python ints
    valid_ratios: torch.Tensor                  # (B, L, 2)  (x, y) share of a level that is image
    pos: torch.Tensor | None = None             # (B, S, D)  where each cell is


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
    if sum(h * w for h, w in spatial_shapes) != value.shape[1]:
        raise ValueError(f"spatial_shapes {spatial_shapes} do not add up to the {value.shape[1]} "
                         "cells of value: levels missing, or the sizes of another image?")
    B, N, H, L, K, _ = locations.shape
    value = value.permute(0, 2, 3, 1).flatten(0, 1)                             # (B*H, D/H, S)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)                   # (B*H, N, L, K, 2)
    weights = weights.transpose(1, 2).flatten(0, 1).flatten(2)                  # (B*H, N, L*K)
    found = []
    for level, cells in enumerate(value.split([h * w for h, w in spatial_shapes], dim=-1)):
        found.append(F.grid_sample(cells.unflatten(-1, spatial_shapes[level]), grids[:, :, level],
                                   align_corners=False, padding_mode="zeros"))  # (B*H, D/H, N, K)
    out = (torch.cat(found, dim=-1) * weights[:, None]).sum(-1)                 # (B*H, D/H, N)
    return out.unflatten(0, (B, H)).flatten(1, 2).transpose(1, 2)               # (B, N, D)


class DeformableAttention(nn.Module):
    """Decide from each query where to look around its reference, and how much each point counts.

    [Deformable DETR Eq. 2-3]  location = reference + offset(query),  A = softmax(linear(query))
    """

    def __init__(self, d_model, num_heads, num_levels, num_points):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} cannot be split over {num_heads} heads")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        points = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(d_model, points * 2)
        self.attention_weights = nn.Linear(d_model, points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self):
        """Start head h in direction 2 pi h/H, its k-th point k steps away; weights are equal."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)               # (H,)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)                         # (H, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)      # onto a square's rim
        steps = torch.arange(1, self.num_points + 1)[:, None]                               # (K, 1)
        ring = direction[:, None, None] * steps                                       # (H, 1, K, 2)
        ring = ring.expand(-1, self.num_levels, -1, -1)                               # (H, L, K, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.data = ring.flatten().clone()
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def look(self, queries, references, memory):
        """Compute where each query looks, and how much each point counts.

        [Deformable DETR Eq. 3]     point:  location = v (x, y) + offset / (columns, rows)
        [Deformable DETR App. A.4]  box:    location = v (x, y) + offset / K * v (w, h) / 2

        v is the level's valid ratio. Around a point an offset counts cells; around a box, K leads
        from the centre to the edge. The initial offsets are 1..K.
        Differs, as released: the paper has 1/(2K) in a box's initial offsets only.

        Args:
            queries     (B, N, D)    content plus position
            references  (B, N, 2|4)  points (x, y) or boxes cxcywh, in [0, 1] of image size
            memory                   a Memory; its valid_ratios lead from the image to padded levels
        Returns:
            locations (B, N, H, L, K, 2), (x, y) in [0, 1] of each level, may lie outside;
            weights (B, N, H, L, K), sum to 1 over L and K
        """
        H, L, K = self.num_heads, self.num_levels, self.num_points
        offsets = self.sampling_offsets(queries).unflatten(-1, (H, L, K, 2))
        weights = self.attention_weights(queries).unflatten(-1, (H, L * K)).softmax(-1)
        valid = memory.valid_ratios[:, None, None, :, None]                     # (B, 1, 1, L, 1, 2)
        centre = references[:, :, None, None, None, :2] * valid                 # (B, N, 1, L, 1, 2)
        if references.shape[-1] == 2:
            size = references.new_tensor([(w, h) for h, w in memory.spatial_shapes])        # (L, 2)
            step = 1 / size[:, None]                                                     # (L, 1, 2)
        else:
            step = references[:, :, None, None, None, 2:] * valid / (2 * K)     # (B, N, 1, L, 1, 2)
        return centre + offsets * step, weights.unflatten(-1, (L, K))

    def forward(self, queries, references, memory):
        """(B, N, D) queries, (B, N, 2|4) references, a Memory -> (B, N, D)

        Raises:
            ValueError: references that are neither points nor boxes
        """
        if references.shape[-1] not in (2, 4):
            raise ValueError(f"references have {references.shape[-1]} numbers: points 2, boxes 4")
        value = self.value_proj(memory.tokens).masked_fill(memory.is_pad[..., None], 0)
        value = value.unflatten(-1, (self.num_heads, -1))                       # (B, S, H, D/H)
        locations, weights = self.look(queries, references, memory)
        with torch.autocast(queries.device.type, enabled=False):  # float32: bf16 moves points
            value, weights = value.to(locations.dtype), weights.to(locations.dtype)
            out = ms_deform_attn(value, memory.spatial_shapes, locations, weights)
        return self.output_proj(out)


# ---- the same numbers, faster on a CPU: skip this on a first reading ----

def ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights):
    """Compute `deformable_attention` in its fastest form, with the arguments other projects use.

    On a CPU in float32 that is `by_rows`; elsewhere, and while torch.compile or torch.export trace,
    it is `deformable_attention` itself. Deformable-DETR calls this function
    ms_deform_attn_core_pytorch, mmcv multi_scale_deformable_attn_pytorch.

    Args, Returns and Raises as there; value_spatial_shapes may also be a tensor (L, 2) of (h, w).
    """
    shapes = value_spatial_shapes
    if isinstance(shapes, torch.Tensor):
        shapes = [(h, w) for h, w in shapes.tolist()]
    rows_are_faster = (value.device.type == "cpu" and value.dtype == torch.float32
                       and not torch.compiler.is_compiling()
                       and sum(h * w for h, w in shapes) == value.shape[1])     # else an error
    attend = by_rows if rows_are_faster else deformable_attention
    return attend(value, shapes, sampling_locations, attention_weights)


def by_rows(value, spatial_shapes, locations, weights):
    """Compute `deformable_attention` as one weighted sum over rows of `value`.

    A sampling point reads four cells, so a query and head read 4*L*K rows of the table that `value`
    becomes, (B*S*H, D/H), each times bilinear share times attention weight.

    Arguments and result as there; the shapes must add up to S.
    """
    B, S, H, d = value.shape
    _, N, _, L, K, _ = locations.shape
    size = locations.new_tensor([(w, h) for h, w in spatial_shapes])                    # (L, 2)
    size = size.repeat_interleave(K, dim=0)                                             # (L*K, 2)
    in_cells = locations.flatten(3, 4) * size - 0.5     # (B, N, H, L*K, 2), 0 = the first's centre
    weights = weights.flatten(3)                                                # (B, N, H, L*K)

    level_start = torch.tensor([0] + [h * w for h, w in spatial_shapes[:-1]]).cumsum(0)     # (L,)
    image_start = S * torch.arange(B).view(B, 1, 1, 1)                               # (B, 1, 1, 1)
    start = (level_start.repeat_interleave(K) + image_start) * H + torch.arange(H)[:, None]
    start = start.int()                                 # (B, 1, H, L*K)  row of cell (0, 0), head h
    row_length = H * size[:, 0].int()                   # (L*K,)  table rows in a row of cells

    columns = list(neighbours(in_cells[..., 0], size[:, 0]))                    # (B, N, H, L*K)
    rows, shares = [], []
    for cell_y, share_y in neighbours(in_cells[..., 1], size[:, 1]):
        line_start, line_share = start + cell_y * row_length, share_y * weights
        for cell_x, share_x in columns:
            rows.append(line_start + cell_x * H)
            shares.append(line_share * share_x)
    rows = torch.cat(rows, dim=-1).view(B * N * H, 4 * L * K)
    shares = torch.cat(shares, dim=-1).view(B * N * H, 4 * L * K)
    return GatherSum.apply(value.reshape(B * S * H, d), rows, shares).view(B, N, H * d)


def neighbours(position, size):
    """Find the two cells beside a position on an axis, and the share of each: 0 beyond the map.

    Args:
        position  in cells, 0 = the centre of the first
        size      number of cells on that axis, broadcast over the last dimension
    Yields:
        twice: cell, int32, kept on the map; share, with gradient
    """
    low = position.detach().floor().nan_to_num()
    beyond, last = position - low, size - 1
    for cell, share in ((low, 1 - beyond), (low + 1, beyond)):
        kept = cell.clamp(min=0).minimum(last)
        yield kept.int(), share * (kept == cell)


class GatherSum(torch.autograd.Function):
    """Weighted sums of table rows:  out[i] = sum over j of share[i, j] * table[row[i, j]]

    F.embedding_bag computes the same, but its own backward is slow. Here the gradient of the shares
    is a sampled matrix product, and that of the table is a product with a sparse matrix.
    """

    @staticmethod
    def forward(ctx, table, row, share):
        """(rows, d), (sums, terms) int32, (sums, terms) -> (sums, d)"""
        ctx.save_for_backward(table, row, share)
        return F.embedding_bag(row, table, mode="sum", per_sample_weights=share)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        table, row, share = ctx.saved_tensors
        grad = grad.contiguous()                                                    # (sums, d)
        (sums, terms), rows = row.shape, len(table)

        # d/d share[i, j] = grad[i] . table[row[i, j]], at the entries of a sparse (sums, rows)
        padded = F.pad(table, (0, 0, 0, max(terms - rows, 0)))      # torch wants terms <= columns
        ends = torch.arange(0, sums * terms + 1, terms, dtype=torch.int32)
        pattern = torch.sparse_csr_tensor(ends, row.flatten(), share.flatten(),
                                          (sums, len(padded)), check_invariants=False)
        grad_share = torch.sparse.sampled_addmm(pattern, grad, padded.T, beta=0.0).values()

        # d/d table[r] = sum of share[i, j] * grad[i] over the entries with row[i, j] = r: that
        # matrix, transposed, times grad (torch's own product would sort the entries first)
        transposed = scipy.sparse.csc_array((share.flatten().numpy(), row.flatten().numpy(),
                                             ends.numpy()), shape=(rows, sums))
        grad_table = torch.from_numpy(transposed @ grad.numpy())
        return grad_table, None, grad_share.view(sums, terms)
