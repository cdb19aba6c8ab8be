"""Conditional DETR's decoder, on which SD-DETR is built.

[Conditional DETR; SD Eq. 1]. A query has a content f, a position p and a reference point r.
Cross-attention looks around e, which is PE(r) here, times a scale computed from f; `query_gen.py`
makes another e. Boxes are not refined: every layer starts from the same r. `decoder_decoupled.py`
repeats this file and changes it. Read `proposals_conditional.py` before.

The methods have DAC-DETR's names, so that all decoders look alike: `disperse` is self-attention,
`gather` is cross-attention and FFN, `o_decoder` is the ordinary decoder. In SD-DETR the two tasks
exchange information through self-attention.
"""
import torch
from torch import nn

from . import attention_conditional, boxes, encoder, encoder_conditional, proposals


class DecoderLayer(nn.Module):
    """Self-attention among the queries, then cross-attention to the image and an FFN."""

    def __init__(self, cross_attention, d_model, num_heads, d_ffn, dropout=0.0):
        """cross_attention: the class of this layer's, from attention_conditional.of_layers"""
        super().__init__()
        self.self_attn = attention_conditional.SelfAttention(d_model, num_heads, dropout)
        self.norm_self = nn.LayerNorm(d_model)
        self.cross_attn = cross_attention(d_model, num_heads, dropout)
        self.norm_cross = nn.LayerNorm(d_model)
        self.ffn = encoder_conditional.feed_forward(d_model, d_ffn, dropout)
        self.norm_ffn = nn.LayerNorm(d_model)
        self.drop = nn.Dropout(dropout)

    def disperse(self, queries, query_pos):
        """Self-attention: queries see one another and compete. (B, N, D) -> (B, N, D)"""
        return self.norm_self(queries + self.drop(self.self_attn(queries, query_pos)))

    def gather(self, queries, query_pos, spatial, memory):
        """Cross-attention and FFN: each query reads the image on its own. (B, N, D) -> (B, N, D)"""
        read = self.cross_attn(queries, query_pos, spatial, memory)
        queries = self.norm_cross(queries + self.drop(read))
        return self.norm_ffn(queries + self.drop(self.ffn(queries)))


def scale_network(num_layers, d_model):
    """The network that scales the spatial query from the second layer on; one layer needs none."""
    return encoder.feed_forward(d_model, d_model) if num_layers > 1 else nn.Identity()


class Stack(nn.Module):
    """Layers, the network for their scales, and the norm before the heads."""

    def __init__(self, num_layers, d_model, num_heads, d_ffn, dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList([
            DecoderLayer(cross_attention, d_model, num_heads, d_ffn, dropout)
            for cross_attention in attention_conditional.of_layers(num_layers)])
        self.query_scale = scale_network(num_layers, d_model)
        self.norm = nn.LayerNorm(d_model)
        attention_conditional.xavier_uniform(self)

    def states(self, x, pos, spatial, memory):
        """Run the layers. (B, N, D) x 3, a Memory -> [(B, N, D)], one per layer, for the heads

        [Conditional DETR]  spatial query of layer l = e * scale_l      (the paper's T)
        scale_1 = 1,  scale_l = MLP(f)  with f the state that enters layer l
        """
        scale, states = torch.ones_like(spatial), []
        for layer in self.layers:
            x = layer.disperse(x, pos)                                  # (B, N, D)
            x = layer.gather(x, pos, spatial * scale, memory)           # (B, N, D)
            states.append(self.norm(x))             # for the heads; the next layer gets x itself
            scale = self.query_scale(x)                                 # (B, N, D)
        return states


class ConditionalDecoder(Stack):
    """[SD Eq. 1]  Conditional DETR's decoder: one class head and one box head for all layers.

    The text of Eq. 1 was not readable to us; the paper's base is Conditional DETR.
    """

    def __init__(self, num_layers, d_model, num_heads, d_ffn, num_classes, dropout=0.0):
        super().__init__(num_layers, d_model, num_heads, d_ffn, dropout)
        self.class_head = proposals.class_head(d_model, num_classes)
        self.box_head = proposals.box_head(d_model)

    def o_decoder(self, queries, memory):
        """Decode Queries and a Memory to [Predictions], one per layer; the last is the answer.

        [Conditional DETR]  b = sigmoid(MLP(f) + [logit(r), 0, 0])

        The reference point is the same for all layers: a box is not refined.
        """
        states = self.states(queries.content[0], queries.pos[0], queries.spatial[0], memory)
        return [boxes.Predictions(self.class_head(x),
                                  boxes.refine(queries.ref_points, self.box_head(x)))
                for x in states]
