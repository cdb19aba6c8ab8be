"""Deformable DETR's decoder with iterative refinement, on which DAC-DETR is built.

[DAC Eq. 1-2]. `diff decoder_base.py decoder_dac.py` shows what DAC-DETR adds. Read `proposals.py`
before.
"""
from torch import nn

from . import attention, boxes, encoder, proposals


class DecoderLayer(nn.Module):
    """Self-attention among the queries, then cross-attention to the image and an FFN."""

    def __init__(self, d_model, num_heads, num_levels, num_points, d_ffn):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, num_heads, batch_first=True)
        self.norm_self = nn.LayerNorm(d_model)
        self.cross_attn = attention.DeformableAttention(d_model, num_heads, num_levels, num_points)
        self.norm_cross = nn.LayerNorm(d_model)
        self.ffn = encoder.feed_forward(d_model, d_ffn)
        self.norm_ffn = nn.LayerNorm(d_model)

    def disperse(self, queries, query_pos, is_blocked=None):
        """Self-attention: queries see one another and compete. (B, N, D) -> (B, N, D)

        [DAC Eq. 1]  Q~_O^l = Q_O^l + Att_self(Que(Q_O^l), Key(Q_O^l), Val(Q_O^l))

        Here Q_O^l is queries, and the result is Q~_O^l. is_blocked as in proposals.Queries.
        """
        qk = queries + query_pos
        read, _ = self.self_attn(qk, qk, queries, attn_mask=is_blocked, need_weights=False)
        return self.norm_self(queries + read)

    def gather(self, queries, query_pos, ref_boxes, memory):
        """Cross-attention and FFN: each query reads the image on its own. (B, N, D) -> (B, N, D)

        [DAC Eq. 2]  Q_O^(l+1) = FFN(Q~_O^l + Att_cross(Que(Q~_O^l), Key(Z), Val(Z)))

        Here Q~_O^l is queries, Z is memory, and the result is Q_O^(l+1). Deformable attention has
        no keys: Que says where to read the values Val(Z). Eq. 1 and 2 leave out positions and
        norms, Eq. 2 also the residual around the FFN. All of these follow the release.
        """
        read = self.cross_attn(queries + query_pos, ref_boxes, memory)
        queries = self.norm_cross(queries + read)
        return self.norm_ffn(queries + self.ffn(queries))


class Decoder(nn.Module):
    """A stack of layers, each with its own heads. Also decoder_decoupled_deformable's baseline."""

    def __init__(self, num_layers, d_model, num_heads, num_levels, num_points, d_ffn, num_classes):
        super().__init__()
        self.layers = nn.ModuleList([
            DecoderLayer(d_model, num_heads, num_levels, num_points, d_ffn)
            for _ in range(num_layers)])
        self.class_heads = nn.ModuleList([
            proposals.class_head(d_model, num_classes) for _ in range(num_layers)])
        self.box_heads = nn.ModuleList([proposals.box_head(d_model) for _ in range(num_layers)])

    def o_decoder(self, queries, memory):
        """Decode Queries and a Memory to [Predictions], one per layer; the last is the answer.

        [Deformable DETR App. A.4]  b_l = sigmoid(logit(b_(l-1)) + delta_l)

        Layer l looks around the detached b_(l-1), but adds delta_l to `base`, not detached. So its
        box loss trains delta_l and delta_(l-1): "look forward twice", [DINO Sec. 3.5].
        """
        x, pos, ref_boxes = queries.content[0], queries.pos[0], queries.ref_boxes
        base, predictions = ref_boxes, []
        for layer, class_head, box_head in zip(self.layers, self.class_heads, self.box_heads):
            x = layer.disperse(x, pos, queries.is_blocked)              # (B, N, D)  [DAC Eq. 1]
            x = layer.gather(x, pos, ref_boxes, memory)                 # (B, N, D)  [DAC Eq. 2]
            delta = box_head(x)                                         # (B, N, 4)
            predictions.append(boxes.Predictions(class_head(x), boxes.refine(base, delta)))
            base = boxes.refine(ref_boxes, delta)       # same numbers, gradient to this delta only
            ref_boxes = base.detach()
        return predictions
