"""Conditional attention: its map, by definition, and who reads which position."""
import helpers
import pytest
import torch
from torch.testing import assert_close

from detr_min import attention_conditional

D, H, N = 32, 4, 6

@pytest.mark.parametrize("kind", attention_conditional.of_layers(2))
def test_attention_map_is_what_forward_uses(kind, generator):
    """Rows sum to 1, padding gets exactly 0, and map @ values is the answer."""
    attend, memory = helpers.shaken(kind(D, H), generator), helpers.conditional_memory(D)
    content, pos, spatial = (t[0] for t in helpers.conditional_queries(D, N)[:3])
    weights = attend.attention_map(content, pos, spatial, memory)
    assert weights.shape == (2, H, N, 24)
    assert_close(weights.sum(-1), torch.ones(2, H, N).double(), atol=1e-12, rtol=0)
    on_padding = weights.masked_select(memory.is_pad[:, None, None])
    assert len(on_padding) and (on_padding == 0).all()
    values = attend.v_proj(memory.tokens).unflatten(-1, (H, D // H))
    out = attend.out_proj(torch.einsum("bhns,bshd->bnhd", weights, values).flatten(-2))
    assert_close(attend(content, pos, spatial, memory), out, atol=1e-12, rtol=0)


def test_map_by_definition(generator):
    """[Conditional DETR]  exp((c_q.c_k + p_q.p_k) / sqrt(2D/H)), in loops."""
    attend = attention_conditional.ConditionalAttention(D, H).double()
    memory = helpers.conditional_memory(D)
    content, pos, spatial = (t[0] for t in helpers.conditional_queries(D, N)[:3])
    weights, d = attend.attention_map(content, pos, spatial, memory), D // H
    c_q, p_q = attend.q_content(content), attend.q_spatial(spatial)
    c_k, p_k = attend.k_content(memory.tokens), attend.k_pos(memory.pos)
    for b in range(2):
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            for n in range(N):
                similar = torch.stack([
                    (c_q[b, n, part] @ c_k[b, s, part] + p_q[b, n, part] @ p_k[b, s, part])
                    / (2 * d) ** 0.5 for s in range(24) if not memory.is_pad[b, s]])
                assert_close(weights[b, h, n][~memory.is_pad[b]], similar.softmax(-1))


def test_only_the_first_layers_attention_reads_the_position(generator):
    memory = helpers.conditional_memory(D)
    content, pos, spatial = (t[0] for t in helpers.conditional_queries(D, N)[:3])
    for kind, reads in zip(attention_conditional.of_layers(2), (True, False)):
        attend = helpers.shaken(kind(D, H), generator)
        moved = (attend(content, pos, spatial, memory) - attend(content, -pos, spatial, memory))
        assert (moved.abs().max() > 1e-3) == reads
        assert reads or moved.abs().max() == 0
