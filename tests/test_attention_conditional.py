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


def test_self_attention_by_definition(generator):
    """[Conditional DETR, code]  q = Wqc f + Wqp p,  k = Wkc f + Wkp p,  v = Wv f"""
    attend = helpers.shaken(attention_conditional.SelfAttention(D, H), generator)
    f, p = (t[0] for t in helpers.conditional_queries(D, N)[:2])
    q, k = attend.q_content(f) + attend.q_pos(p), attend.k_content(f) + attend.k_pos(p)
    read = torch.zeros_like(f)
    for part in torch.arange(D).chunk(H):
        scores = q[..., part] @ k[..., part].mT / (D // H) ** .5
        read[..., part] = scores.softmax(-1) @ attend.v_proj(f)[..., part]
    assert_close(attend(f, p), attend.out_proj(read), atol=1e-12, rtol=0)


def test_dropout_drops_attention_weights_in_training_alone(generator):
    attend = attention_conditional.SelfAttention(D, H, dropout=1.0).double()
    f, p = (t[0] for t in helpers.conditional_queries(D, N)[:2])
    assert_close(attend(f, p), attend.out_proj.bias.expand_as(f), atol=0, rtol=0)
    answer = attend.eval()(f, p)
    attend.dropout = 0.0
    assert answer.abs().max() > 1e-3
    assert_close(attend.train()(f, p), answer, atol=1e-12, rtol=0)


def test_width_is_a_multiple_of_the_heads_and_the_output_starts_without_a_bias():
    with pytest.raises(ValueError, match="d_model 32 cannot be split over 5 heads"):
        attention_conditional.ConditionalAttention(32, 5)
    assert (attention_conditional.ConditionalAttention(32, 4).out_proj.bias == 0).all()


def test_xavier_is_for_every_matrix_and_for_nothing_else():
    """[DETR, code]  Uniform within sqrt(6 / (in + out)); a bias and a norm keep what they had."""
    net = torch.nn.Sequential(torch.nn.Linear(40, 200), torch.nn.LayerNorm(200))
    bias, limit = net[0].bias.detach().clone(), (6 / 240) ** .5
    torch.nn.init.zeros_(net[0].weight)
    assert attention_conditional.xavier_uniform(net) is net
    assert .98 * limit < net[0].weight.max() <= limit and (net[0].bias == bias).all()
    assert (net[1].weight == 1).all() and (net[1].bias == 0).all()


def test_the_first_layer_adds_positions_to_contents(generator):
    """[Conditional DETR, code]  c_q = Wqc f + Wqp p,  c_k = Wkc F + Wkp P; the others add none."""
    memory = helpers.conditional_memory(D)
    content, pos, spatial = (t[0] for t in helpers.conditional_queries(D, N)[:3])
    for kind, adds in zip(attention_conditional.of_layers(3), (True, False, False), strict=True):
        attend = helpers.shaken(kind(D, H), generator)
        q, k = attend.queries_and_keys(content, pos, spatial, memory)
        c_q, c_k = attend.q_content(content), attend.k_content(memory.tokens)
        p_q, p_k = attend.q_spatial(spatial), attend.k_pos(memory.pos)
        if adds:
            c_q, c_k = c_q + attend.q_pos(pos), c_k + p_k
        for h, part in enumerate(torch.arange(D).chunk(H)):     # a head's content, then its place
            expected = torch.cat([c_q[..., part], p_q[..., part]], -1)
            assert_close(q[:, h], expected, atol=1e-12, rtol=0)
            expected = torch.cat([c_k[..., part], p_k[..., part]], -1)
            assert_close(k[:, h], expected, atol=1e-12, rtol=0)
