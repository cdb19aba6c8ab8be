"""SD-DETR's decoder: one self-attention for both tasks, a cross-attention for each.

[SD Eq. 3]  Q^ = { self-att(cat(Q_cls, Q_loc)), cross-att_cls(Q_cls), FFN_cls(Q_cls),
                   cross-att_loc(Q_loc), FFN_loc(Q_loc) } x L

The braces list the steps of one layer, without residuals, norms, positions, keys and values. Fig. 2
draws the norms inside each branch. Our choice: the scale and the final norm are per branch too.
Each prediction is a pair of tokens from one anchor, with one fixed reference: token i for the
class, token N + i for the box. `SplitDecoder`, whose tasks share no layer, is what the paper
compares with [SD Eq. 2, Table 3]. Read `decoder_conditional.py` before and `query_gen.py` after.
"""
import torch
from torch import nn

from . import attention_conditional, boxes, decoder_conditional, encoder_conditional, proposals


class Branch(nn.Module):
    """Cross-attention and FFN of one task."""

    def __init__(self, cross_attention, d_model, num_heads, d_ffn, dropout=0.0):
        super().__init__()
        self.cross_attn = cross_attention(d_model, num_heads, dropout)
        self.norm_cross = nn.LayerNorm(d_model)
        self.ffn = encoder_conditional.feed_forward(d_model, d_ffn, dropout)
        self.norm_ffn = nn.LayerNorm(d_model)
        self.drop = nn.Dropout(dropout)

    def gather(self, queries, query_pos, spatial, memory):
        """Each query reads the image on its own. (B, N, D) -> (B, N, D)

        After [SD Eq. 3]  FFN_t(cross-att_t(Q_t)),  t = cls or loc
        """
        read = self.cross_attn(queries, query_pos, spatial, memory)
        queries = self.norm_cross(queries + self.drop(read))
        return self.norm_ffn(queries + self.drop(self.ffn(queries)))


class DecoderLayer(nn.Module):
    """One self-attention over both tasks' queries, then each task's own branch."""

    def __init__(self, cross_attention, d_model, num_heads, d_ffn, dropout=0.0):
        """cross_attention: the class of this layer's, from attention_conditional.of_layers"""
        super().__init__()
        self.self_attn = attention_conditional.SelfAttention(d_model, num_heads, dropout)
        self.norm_self = nn.LayerNorm(d_model)
        self.cls = Branch(cross_attention, d_model, num_heads, d_ffn, dropout)
        self.loc = Branch(cross_attention, d_model, num_heads, d_ffn, dropout)
        self.drop = nn.Dropout(dropout)

    def disperse(self, queries, query_pos):
        """Self-attention over the tokens of both tasks. (B, 2N, D) -> (B, 2N, D)

        [SD Eq. 3]  self-att(cat(Q_cls, Q_loc)), joined as 2N tokens of width D

        Nothing marks a token's task. If the two tokens of each pair are equal, every key and value
        occurs twice, softmax's mean stays the same, and this is the plain decoder's self-attention.
        """
        return self.norm_self(queries + self.drop(self.self_attn(queries, query_pos)))

    def gather(self, queries, query_pos, spatial, memory):
        """Split the tokens; each task reads the image on its own. (B, 2N, D) -> (B, 2N, D)

        After [SD Eq. 3]  cat(FFN_cls(cross-att_cls(Q_cls)), FFN_loc(cross-att_loc(Q_loc)))
        """
        cls, loc = zip(*(x.chunk(2, dim=1) for x in (queries, query_pos, spatial)))
        return torch.cat([self.cls.gather(*cls, memory), self.loc.gather(*loc, memory)], dim=1)


class DecoupledDecoder(nn.Module):
    """Classification tokens give the scores, localization tokens the boxes."""

    num_sets = 2        # of queries it wants: [classification, localization]

    def __init__(self, num_layers, d_model, num_heads, d_ffn, num_classes, dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList([
            DecoderLayer(cross_attention, d_model, num_heads, d_ffn, dropout)
            for cross_attention in attention_conditional.of_layers(num_layers)])
        self.scale_cls = decoder_conditional.scale_network(num_layers, d_model)
        self.scale_loc = decoder_conditional.scale_network(num_layers, d_model)
        self.norm_cls, self.norm_loc = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        attention_conditional.xavier_uniform(self)
        self.class_head = proposals.class_head(d_model, num_classes)
        self.box_head = proposals.box_head(d_model)

    def o_decoder(self, queries, memory):
        """[SD Eq. 3]  Decode two sets of Queries and a Memory to [Predictions], N per layer."""
        sets = queries.content, queries.pos, queries.spatial
        x, pos, spatial = (torch.cat([cls, loc], dim=1) for cls, loc in sets)       # (B, 2N, D)
        scale, predictions = torch.ones_like(spatial), []
        for layer in self.layers:
            x = layer.disperse(x, pos)                                  # (B, 2N, D)
            x = layer.gather(x, pos, spatial * scale, memory)           # (B, 2N, D)
            x_cls, x_loc = x.chunk(2, dim=1)                            # (B, N, D) each
            scale = torch.cat([self.scale_cls(x_cls), self.scale_loc(x_loc)], dim=1)
            delta = self.box_head(self.norm_loc(x_loc))                 # (B, N, 4)
            predictions.append(boxes.Predictions(
                self.class_head(self.norm_cls(x_cls)), boxes.refine(queries.ref_points, delta)))
        return predictions


class SplitDecoder(nn.Module):
    """[SD Eq. 2]  Two decoders, one per task, that share the memory and reference points alone.

    Eq. 2 was not readable to us; this is what Fig. 1 and Table 3 of the paper say of it.
    """

    num_sets = 2

    def __init__(self, num_layers, d_model, num_heads, d_ffn, num_classes, dropout=0.0):
        super().__init__()
        self.cls = decoder_conditional.Stack(num_layers, d_model, num_heads, d_ffn, dropout)
        self.loc = decoder_conditional.Stack(num_layers, d_model, num_heads, d_ffn, dropout)
        self.class_head = proposals.class_head(d_model, num_classes)
        self.box_head = proposals.box_head(d_model)

    def o_decoder(self, queries, memory):
        """Decode two sets of Queries and a Memory to [Predictions], N per layer."""
        cls, loc = zip(queries.content, queries.pos, queries.spatial)   # three of (B, N, D) each
        return [boxes.Predictions(self.class_head(x_cls),
                                  boxes.refine(queries.ref_points, self.box_head(x_loc)))
                for x_cls, x_loc in zip(self.cls.states(*cls, memory),
                                        self.loc.states(*loc, memory))]
