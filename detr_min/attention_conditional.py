"""Conditional attention: the cross-attention compares content with content, position with position.

[Conditional DETR], the attention of SD-DETR's decoder. It is dense: every query weighs every
cell of one feature map, so an attention map can be drawn. Read `attention.py` before, for `Memory`,
and `encoder_conditional.py` after.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


def xavier_uniform(module):
    """Initialise every matrix in a module as DETR does; biases and norms stay. Returns it."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return module


class MultiHead(nn.Module):
    """The parts of both attentions: heads, values, output projection, dropout of the weights."""

    def __init__(self, d_model, num_heads, dropout=0.0):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} cannot be split over {num_heads} heads")
        self.num_heads, self.dropout = num_heads, dropout
        self.q_content, self.k_content = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.k_pos = nn.Linear(d_model, d_model)
        self.v_proj, self.out_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        nn.init.zeros_(self.out_proj.bias)                  # as in nn.MultiheadAttention

    def split(self, x):
        """(B, N, D) -> (B, H, N, D/H)"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, q, k, v, may_attend=None):
        """softmax(q k^T / sqrt(width of q)) v, the heads side by side, projected. -> (B, N, D)

        may_attend: bool, broadcast to (B, H, queries, keys)
        """
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend,
                                              dropout_p=self.dropout * self.training)
        return self.out_proj(read.transpose(1, 2).flatten(-2))


class SelfAttention(MultiHead):
    """Self-attention in which content f and position p have projections of their own.

    [Conditional DETR, code]  q = Wqc f + Wqp p,  k = Wkc f + Wkp p,  v = Wv f
    """

    def __init__(self, d_model, num_heads, dropout=0.0):
        super().__init__(d_model, num_heads, dropout)
        self.q_pos = nn.Linear(d_model, d_model)

    def forward(self, queries, query_pos):
        """(B, N, D), (B, N, D) -> (B, N, D)"""
        q = self.q_content(queries) + self.q_pos(query_pos)
        k = self.k_content(queries) + self.k_pos(query_pos)
        return self.attend(*map(self.split, (q, k, self.v_proj(queries))))


class ConditionalAttention(MultiHead):
    """Cross-attention whose heads compare a content half and a spatial half.

    [Conditional DETR]  q = [c_q ; p_q],  k = [c_k ; p_k],  A = softmax(q.k / sqrt(2D/H))
    c_q = Wqc f,  p_q = Wqs (e * scale),  c_k = Wkc F,  p_k = Wkp P,  v = Wv F

    f is a query's content, e its position, F a cell of the memory and P the cell's position. The
    decoder computes the scale and passes e * scale, the spatial query.
    [;] puts two halves side by side within each head, so q.k = c_q.c_k + p_q.p_k: here no content
    is compared with a position. `SelfAttention` and `FirstConditionalAttention` do compare them.
    """

    def __init__(self, d_model, num_heads, dropout=0.0):
        super().__init__(d_model, num_heads, dropout)
        self.q_spatial = nn.Linear(d_model, d_model)

    def contents(self, queries, query_pos, tokens, key_pos):
        """c_q (B, N, D) and c_k (B, S, D); positions play no part here."""
        return self.q_content(queries), self.k_content(tokens)

    def queries_and_keys(self, queries, query_pos, spatial, memory):
        """Build queries (B, H, N, 2D/H) and keys (B, H, S, 2D/H) of content and spatial halves."""
        key_pos = self.k_pos(memory.pos)
        contents = self.contents(queries, query_pos, memory.tokens, key_pos)
        positions = self.q_spatial(spatial), key_pos
        q, k = (torch.cat([self.split(c), self.split(p)], dim=-1)
                for c, p in zip(contents, positions))
        return q, k

    def forward(self, queries, query_pos, spatial, memory):
        """Read the image.

        Args:
            queries    f  (B, N, D)  content
            query_pos  p  (B, N, D)  positional query; of the cross-attentions only the first
                                     layer's reads it
            spatial       (B, N, D)  e * scale, the spatial query
            memory                   a Memory with pos
        Returns:
            (B, N, D)
        """
        q, k = self.queries_and_keys(queries, query_pos, spatial, memory)
        v = self.split(self.v_proj(memory.tokens))                              # (B, H, S, D/H)
        return self.attend(q, k, v, ~memory.is_pad[:, None, None])

    def attention_map(self, queries, query_pos, spatial, memory):
        """Compute the weights that `forward` uses. -> (B, H, N, S), rows sum to 1, 0 on padding"""
        q, k = self.queries_and_keys(queries, query_pos, spatial, memory)
        similarity = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return similarity.masked_fill(memory.is_pad[:, None, None], -math.inf).softmax(-1)


class FirstConditionalAttention(ConditionalAttention):
    """The first layer's cross-attention: positions are added to the content of queries and keys.

    [Conditional DETR, code]  c_q = Wqc f + Wqp p,  c_k = Wkc F + Wkp P
    """

    def __init__(self, d_model, num_heads, dropout=0.0):
        super().__init__(d_model, num_heads, dropout)
        self.q_pos = nn.Linear(d_model, d_model)

    def contents(self, queries, query_pos, tokens, key_pos):
        """c_q (B, N, D) and c_k (B, S, D), each with its position added."""
        c_q, c_k = super().contents(queries, query_pos, tokens, key_pos)
        return c_q + self.q_pos(query_pos), c_k + key_pos


def of_layers(num_layers):
    """Find the class of each layer's cross-attention: the first layer has its own."""
    return [FirstConditionalAttention] + [ConditionalAttention] * (num_layers - 1)
