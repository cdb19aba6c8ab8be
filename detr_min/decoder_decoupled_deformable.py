"""SD-DETR's decoder and queries ported to deformable attention. This is not in the paper.

[SD Eq. 2-5] with `attention.DeformableAttention` in place of dense attention, several feature
levels, and a reference box that the localization branch refines layer by layer.
`DACDecoupledDecoder` combines both papers. Read `decoder_dac.py` and `decoder_decoupled.py` before.
"""
import torch
from torch import nn

from . import attention, boxes, decoder_base, encoder, proposals, query_gen


class Branch(nn.Module):
    """Cross-attention and FFN of one task."""

    def __init__(self, d_model, num_heads, num_levels, num_points, d_ffn):
        super().__init__()
        self.cross_attn = attention.DeformableAttention(d_model, num_heads, num_levels, num_points)
        self.norm_cross = nn.LayerNorm(d_model)
        self.ffn = encoder.feed_forward(d_model, d_ffn)
        self.norm_ffn = nn.LayerNorm(d_model)

    def gather(self, queries, query_pos, ref_boxes, memory):
        """Each query reads the image on its own, around its reference. (B, N, D) -> (B, N, D)

        After [SD Eq. 3]  FFN_t(cross-att_t(Q_t)),  t = cls or loc
        """
        read = self.cross_attn(queries + query_pos, ref_boxes, memory)
        queries = self.norm_cross(queries + read)
        return self.norm_ffn(queries + self.ffn(queries))


class DecoderLayer(nn.Module):
    """One self-attention over both tasks' queries, then each task's own branch."""

    def __init__(self, d_model, num_heads, num_levels, num_points, d_ffn):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, num_heads, batch_first=True)
        self.norm_self = nn.LayerNorm(d_model)
        self.cls = Branch(d_model, num_heads, num_levels, num_points, d_ffn)
        self.loc = Branch(d_model, num_heads, num_levels, num_points, d_ffn)

    def disperse(self, queries, query_pos, is_blocked=None):
        """Self-attention over the tokens of both tasks. (B, 2N, D) -> (B, 2N, D)

        [SD Eq. 3]  self-att(cat(Q_cls, Q_loc)), joined as 2N tokens of width D

        is_blocked is (N, N): if i may not look at j, neither token of i sees either token of j.
        """
        qk = queries + query_pos
        mask = None if is_blocked is None else is_blocked.repeat(2, 2)                  # (2N, 2N)
        read, _ = self.self_attn(qk, qk, queries, attn_mask=mask, need_weights=False)
        return self.norm_self(queries + read)

    def gather(self, queries, query_pos, ref_boxes, memory):
        """Split the tokens; each task reads the image on its own. (B, 2N, D) -> (B, 2N, D)

        After [SD Eq. 3]  cat(FFN_cls(cross-att_cls(Q_cls)), FFN_loc(cross-att_loc(Q_loc)))
        """
        (x_cls, x_loc), (pos_cls, pos_loc) = queries.chunk(2, dim=1), query_pos.chunk(2, dim=1)
        return torch.cat([self.cls.gather(x_cls, pos_cls, ref_boxes, memory),
                          self.loc.gather(x_loc, pos_loc, ref_boxes, memory)], dim=1)


class DecoupledDecoder(nn.Module):
    """Classification tokens give the scores, localization tokens the boxes."""

    num_sets = 2        # of queries it wants: [classification, localization]

    def __init__(self, num_layers, d_model, num_heads, num_levels, num_points, d_ffn, num_classes):
        super().__init__()
        self.layers = nn.ModuleList([
            DecoderLayer(d_model, num_heads, num_levels, num_points, d_ffn)
            for _ in range(num_layers)])
        self.class_heads = nn.ModuleList([
            proposals.class_head(d_model, num_classes) for _ in range(num_layers)])
        self.box_heads = nn.ModuleList([proposals.box_head(d_model) for _ in range(num_layers)])

    def o_decoder(self, queries, memory):
        """[SD Eq. 3]  Decode two sets of Queries and a Memory to [Predictions], N per layer."""
        x, pos = torch.cat([*queries.content], 1), torch.cat([*queries.pos], 1)     # (B, 2N, D)
        ref_boxes = queries.ref_boxes                                 # (B, N, 4)  one for each pair
        base, predictions = ref_boxes, []
        for layer, class_head, box_head in zip(self.layers, self.class_heads, self.box_heads):
            x = layer.disperse(x, pos, queries.is_blocked)              # (B, 2N, D)
            x = layer.gather(x, pos, ref_boxes, memory)                 # (B, 2N, D)
            x_cls, x_loc = x.chunk(2, dim=1)                            # (B, N, D) each
            delta = box_head(x_loc)                                     # (B, N, 4)
            predictions.append(boxes.Predictions(class_head(x_cls), boxes.refine(base, delta)))
            base = boxes.refine(ref_boxes, delta)
            ref_boxes = base.detach()
        return predictions


class DACDecoupledDecoder(DecoupledDecoder):
    """Ours, in neither paper: the decoupled layers run again without self-attention."""

    def c_decoder(self, queries, memory):
        """[DAC Eq. 3] over [SD Eq. 3]  No token sees another, not even its partner. Ours."""
        x, pos = torch.cat([*queries.content], 1), torch.cat([*queries.pos], 1)     # (B, 2N, D)
        ref_boxes = queries.ref_boxes
        base, predictions = ref_boxes, []
        for layer, class_head, box_head in zip(self.layers, self.class_heads, self.box_heads):
            x = layer.gather(x, pos, ref_boxes, memory)                 # (B, 2N, D)
            x_cls, x_loc = x.chunk(2, dim=1)
            delta = box_head(x_loc)
            predictions.append(boxes.Predictions(class_head(x_cls), boxes.refine(base, delta)))
            base = boxes.refine(ref_boxes, delta)
            ref_boxes = base.detach()
        return predictions


class SplitDecoder(nn.Module):
    """[SD Eq. 2]  Two decoders that share nothing but reference boxes, one for each task.

    Eq. 2 was not readable to us; this is what Fig. 1 and Table 3 of the paper say of it.
    """

    num_sets = 2

    def __init__(self, num_layers, d_model, num_heads, num_levels, num_points, d_ffn, num_classes):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({
            task: decoder_base.DecoderLayer(d_model, num_heads, num_levels, num_points, d_ffn)
            for task in ("cls", "loc")}) for _ in range(num_layers)])
        self.class_heads = nn.ModuleList([
            proposals.class_head(d_model, num_classes) for _ in range(num_layers)])
        self.box_heads = nn.ModuleList([proposals.box_head(d_model) for _ in range(num_layers)])

    def o_decoder(self, queries, memory):
        """Decode two sets of Queries and a Memory to [Predictions], N per layer."""
        (x_cls, x_loc), (pos_cls, pos_loc) = queries.content, queries.pos                # (B, N, D)
        ref_boxes, mask = queries.ref_boxes, queries.is_blocked
        base, predictions = ref_boxes, []
        for layer, class_head, box_head in zip(self.layers, self.class_heads, self.box_heads):
            x_cls = layer["cls"].disperse(x_cls, pos_cls, mask)
            x_cls = layer["cls"].gather(x_cls, pos_cls, ref_boxes, memory)
            x_loc = layer["loc"].disperse(x_loc, pos_loc, mask)
            x_loc = layer["loc"].gather(x_loc, pos_loc, ref_boxes, memory)
            delta = box_head(x_loc)
            predictions.append(boxes.Predictions(class_head(x_cls), boxes.refine(base, delta)))
            base = boxes.refine(ref_boxes, delta)
            ref_boxes = base.detach()
        return predictions


def level_of(ref_boxes, memory):
    """Choose the feature level that a box reads: coarser for larger boxes.

    [Feature Pyramid Networks Eq. 1]  level = floor(log2(sqrt(w * h) / 14)), within 0 .. L-1,
    w and h in cells of level 0. (14 cells of stride 8 are the 112 pixels up to which FPN reads the
    level below.)

    Args:
        ref_boxes (B, N, 4); memory a Memory
    Returns:
        (B, N) int64
    """
    h, w = memory.spatial_shapes[0]
    size = memory.valid_ratios[:, None, 0] * ref_boxes.new_tensor([w, h])                # (B, 1, 2)
    cells = ref_boxes[..., 2:] * size.round()                                            # (B, N, 2)
    level = (cells.prod(-1).sqrt() / 14).log2().floor()
    return level.clamp(0, len(memory.spatial_shapes) - 1).long()


def region_features(memory, ref_boxes, size=7):
    """Sample the features inside each box on a grid of 7 x 7, on the level that FPN would choose.

    [SD Eq. 4]  F_R = RoIAlign(F, R_box)

    Args:
        memory     a Memory
        ref_boxes  (B, N, 4)  cxcywh, in [0, 1] of image size
    Returns:
        (B*N, D, 7, 7)
    """
    B, N, _ = ref_boxes.shape
    D, level = memory.tokens.shape[-1], level_of(ref_boxes, memory).flatten()               # (B*N,)
    image = torch.arange(B, device=level.device).repeat_interleave(N)                       # (B*N,)
    features = memory.tokens.new_zeros(B * N, D, size, size)
    levels = memory.tokens.split([h * w for h, w in memory.spatial_shapes], dim=1)
    for index, ((h, w), tokens) in enumerate(zip(memory.spatial_shapes, levels)):
        here = (level == index).nonzero()[:, 0]                                             # (P,)
        scale = memory.valid_ratios[:, index].repeat(1, 2) * ref_boxes.new_tensor([w, h, w, h])
        scale = scale.round()                                               # (B, 4)  whole cells
        in_cells = boxes.to_xyxy(ref_boxes) * scale[:, None]                             # (B, N, 4)
        maps = tokens.transpose(1, 2).unflatten(-1, (h, w))                           # (B, D, h, w)
        features = features.index_copy(0, here, query_gen.roi_align(
            maps, image[here], in_cells.flatten(0, 1)[here], scale, size))
    return features


class TaskAwareQueries(nn.Module):
    """Task-aware queries on several feature levels, with two-stage anchors.

    [SD Eq. 4-5]. Anchors are the mini-detector's best boxes, without gradient. Gradients do pass
    through features and points, so the decoder's losses train the point predictors.

    Differs: the learned contents of TwoStageQueries are added to the points'. Content n
    belongs to the n-th best anchor, so it tells queries their rank; without it two anchors on one
    object look alike, and a short training on synthetic shapes ends at a lower AP.
    """

    def __init__(self, num_queries, d_model, num_classes, num_sets):
        super().__init__()
        self.num_queries = num_queries
        self.mini_detector = proposals.MiniDetector(d_model, num_classes)
        self.predictors = nn.ModuleList([query_gen.PointPredictor(d_model)
                                         for _ in range(num_sets)])
        self.content = nn.ParameterList(torch.randn(num_queries, d_model) for _ in range(num_sets))

    def forward(self, memory):
        """A Memory -> N Queries in T sets"""
        found = self.mini_detector(memory)
        ref_boxes = self.mini_detector.best(found, self.num_queries)                     # (B, N, 4)
        features = region_features(memory, ref_boxes)                     # (B*N, D, 7, 7)
        sets = [query_gen.points_to_query(features, predict(features), ref_boxes.flatten(0, 1))
                for predict in self.predictors]
        content, pos = (torch.stack(t).unflatten(1, ref_boxes.shape[:2]) for t in zip(*sets))
        ranks = torch.stack(list(self.content))                                         # (T, N, D)
        return proposals.Queries(content + ranks[:, None], pos, ref_boxes, found)
