"""DAC-DETR's decoders: the same layers run with self-attention, and in training also without it.

[DAC Eq. 1-3], [DAC Fig. 2]. The C-Decoder, whose labels are one-to-many (`matcher.py`), teaches the
cross-attention to gather queries around an object. Read `decoder_base.py` before.
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


class DACDecoder(nn.Module):
    """One stack of layers and heads, two passes through it."""

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

    def c_decoder(self, queries, memory):
        """Decode as `o_decoder` does, but no query ever sees another. In training only.

        [DAC Eq. 3]  Q_C^(l+1) = FFN(Q_C^l + Att_cross(Que(Q_C^l), Key(Z), Val(Z))),  Q_C^0 = Q_O^0

        It shares all layers and heads but self_attn and norm_self, starts from the same queries,
        and then has states and boxes of its own.
        Differs: the release starts after the O-Decoder's first self-attention (dac_release.py).
        """
        x, pos, ref_boxes = queries.content[0], queries.pos[0], queries.ref_boxes
        base, predictions = ref_boxes, []
        for layer, class_head, box_head in zip(self.layers, self.class_heads, self.box_heads):
            x = layer.gather(x, pos, ref_boxes, memory)                 # (B, N, D)  [DAC Eq. 3]
            delta = box_head(x)                                         # (B, N, 4)
            predictions.append(boxes.Predictions(class_head(x), boxes.refine(base, delta)))
            base = boxes.refine(ref_boxes, delta)       # same numbers, gradient to this delta only
            ref_boxes = base.detach()
        return predictions                                              # labels: one-to-many
