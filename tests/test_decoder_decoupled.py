"""SD-DETR's decoders: ties to the plain one, permutation, whose gradient goes where."""
import math

import helpers
import pytest
import torch
from torch.testing import assert_close

from detr_min import (attention_conditional, boxes, decoder_conditional, decoder_decoupled,
                      proposals_conditional)
from helpers import EXACT, f64

D, H, N, C = 32, 4, 6, 3
SIZES = dict(num_layers=3, num_classes=C, d_model=D, num_heads=H, d_ffn=48)


@pytest.fixture
def plain(generator):
    return helpers.shaken(decoder_conditional.ConditionalDecoder(**SIZES), generator)


@pytest.fixture
def decoupled(generator):
    return helpers.shaken(decoder_decoupled.DecoupledDecoder(**SIZES), generator)


@pytest.fixture
def split(generator):
    return helpers.shaken(decoder_decoupled.SplitDecoder(**SIZES), generator)


# --- by hand: width 1, weights 1, and two cells that hold 4 and 8 and lie at 0 and 1 --------------

def attends_by_position(cross_attn):
    """A cross-attention whose shares are as exp(log 3 * spatial query * position of the cell)."""
    cross_attn.q_content.weight.data.zero_()
    cross_attn.q_spatial.weight.data.fill_(2 ** .5 * math.log(3))           # / sqrt(2D/H) below
    if hasattr(cross_attn, "q_pos"):
        cross_attn.q_pos.weight.data.zero_()


def ask_by_log_3(self_attn):
    self_attn.q_content.weight.data.fill_(math.log(3))
    self_attn.q_pos.weight.data.fill_(math.log(3))


def memory_on_paper():
    return helpers.memory_of([f64(4, 8)[None, None, None]])._replace(pos=f64([[0], [1]]))


def layer_on_paper():
    layer = helpers.on_paper(decoder_decoupled.DecoderLayer(
        attention_conditional.ConditionalAttention, 1, 1, 1))
    ask_by_log_3(layer.self_attn)
    for branch in (layer.cls, layer.loc):
        attends_by_position(branch.cross_attn)
        branch.ffn[0].bias.data.fill_(-16)                  # FFN(x) = x + max(x - 16, 0)
    layer.loc.cross_attn.v_proj.weight.data.fill_(2)
    return layer


def test_disperse_worked_by_hand():
    """[SD Eq. 3]  One pair: the class token holds 2, the box token 6."""
    x, pos = f64(2, 6)[None, :, None], f64(-2, -5)[None, :, None]
    # with positions 0 and 1; times log 3, the queries are 0 and log 3, the keys 0 and 1
    # class: shares 1/2, 1/2, reads 4, 2 + 4 = 6;   box: shares 1/4, 3/4, reads 5, 6 + 5 = 11
    assert_close(layer_on_paper().disperse(x, pos), f64(6, 11)[None, :, None], **EXACT)


def test_disperse_drops_out_what_it_reads():
    """With dropout 1 nothing of the 4 and 5 of the case above is left; without training all is."""
    layer, (x, pos) = layer_on_paper(), (f64(*n)[None, :, None] for n in ((2, 6), (-2, -5)))
    layer.drop.p = 1.0
    assert_close(layer.train().disperse(x, pos), x, **EXACT)
    assert_close(layer.eval().disperse(x, pos), f64(6, 11)[None, :, None], **EXACT)


def test_gather_worked_by_hand():
    """[SD Eq. 3]  The class token looks at the second cell, the box token at both; v_loc = 2."""
    x, pos, spatial = (f64(*numbers)[None, :, None] for numbers in ((6, 11), (-2, -5), (1, 0)))
    # class: shares 1/4, 3/4 of 4 and 8, reads 7;           6 + 7 = 13;    FFN: 13
    # box:   shares 1/2, 1/2 of 2 * 4 and 2 * 8, reads 12;  11 + 12 = 23;  FFN: 23 + 7 = 30
    found = layer_on_paper().gather(x, pos, spatial, memory_on_paper())
    assert_close(found, f64(13, 30)[None, :, None], **EXACT)


def test_split_decoder_worked_by_hand():
    """[SD Eq. 2]  Two predictions; each task's self-attention sees the task's own two tokens."""
    decoder = helpers.on_paper(decoder_decoupled.SplitDecoder(1, 1, 1, 1, 1))
    for stack in (decoder.cls, decoder.loc):
        [layer] = stack.layers
        ask_by_log_3(layer.self_attn)
        attends_by_position(layer.cross_attn)
        layer.ffn[0].bias.data.fill_(-16)
    decoder.box_head[0].bias.data.fill_(-9)
    decoder.box_head[-1].weight.data.fill_(math.log(3) / 2)     # delta = max(x - 9, 0) log 3 / 2
    content, pos, spatial = (f64(*x)[:, None, :, None] for x in (
        [(2, 6), (1, 3)], [(-2, -5), (-1, -3)], [(1, 0), (0, 0)]))
    queries = proposals_conditional.Queries(content, pos, spatial, f64([[.5, .5], [.5, .5]]), None)
    # class: as in the decoupled layer, 2 + 4 + 7 = 13 and 6 + 5 + 6 = 17, FFN: 13, 17 + 1 = 18
    # box:   all scores are 0; self-attention reads (1 + 3)/2 = 2, cross-attention (4 + 8)/2 = 6
    #        1 + 2 + 6 = 9, 3 + 2 + 6 = 11;  delta 0 and log 3;  box .5, and 3/(3 + 1) = .75
    [found] = decoder.o_decoder(queries, memory_on_paper())
    assert_close(found.logits[0, :, 0], f64(13, 18), **EXACT)
    assert_close(found.boxes[0], f64([.5] * 4, [.75] * 4), **EXACT)


# --- the invariants -------------------------------------------------------------------------------

def tied(plain):
    """A DecoupledDecoder whose branches both hold the plain decoder's weights."""
    state = {}
    for key, tensor in plain.state_dict().items():
        start, _, rest = key.partition(".")
        if start == "query_scale" or start == "norm":
            names = [f"{start.removeprefix('query_')}_{task}.{rest}" for task in ("cls", "loc")]
        elif start == "layers" and "self" not in rest:
            depth, _, part = rest.partition(".")
            names = [f"layers.{depth}.{task}.{part}" for task in ("cls", "loc")]
        else:
            names = [key]
        state.update(dict.fromkeys(names, tensor))
    decoder = decoder_decoupled.DecoupledDecoder(**SIZES).double()
    decoder.load_state_dict(state)
    return decoder


def test_tied_branches_and_equal_queries_are_the_plain_decoder(plain, generator):
    """[SD Eq. 3] (a)  Every key and value twice leaves the softmax's mean where it was."""
    queries, memory = helpers.conditional_queries(D, N), helpers.conditional_memory(D)
    twice = queries._replace(**{name: getattr(queries, name)[:1].expand(2, -1, -1, -1)
                                for name in ("content", "pos", "spatial")})
    assert_close(tied(plain).o_decoder(twice, memory), plain.o_decoder(queries, memory),
                 atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["plain", "decoupled", "split"])
def test_permuting_the_queries_permutes_the_answers(name, request, generator):
    """[SD Eq. 3] (b); N predictions, never 2N."""
    decoder = request.getfixturevalue(name)
    queries, memory = helpers.conditional_queries(D, N), helpers.conditional_memory(D)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    permuted = queries._replace(ref_points=queries.ref_points[:, order], **{
        part: getattr(queries, part)[:, :, order] for part in ("content", "pos", "spatial")})
    before, after = decoder.o_decoder(queries, memory), decoder.o_decoder(permuted, memory)
    for b, a in zip(before, after, strict=True):
        assert b.logits.shape == (2, N, C) and b.boxes.shape == (2, N, 4)
        assert_close(a, boxes.Predictions(b.logits[:, order], b.boxes[:, order]),
                     atol=1e-11, rtol=0)


def test_o_decoder_by_definition(decoupled):
    """[SD Eq. 3]  Each task has a scale and a norm of its own; T = 1 in the first layer."""
    queries, memory = helpers.conditional_queries(D, N), helpers.conditional_memory(D)
    (x_cls, x_loc), (pos_cls, pos_loc), (e_cls, e_loc) = queries[:3]
    pos, r, T_cls, T_loc = torch.cat([pos_cls, pos_loc], 1), queries.ref_points, 1, 1
    for layer, p in zip(decoupled.layers, decoupled.o_decoder(queries, memory), strict=True):
        x = layer.disperse(torch.cat([x_cls, x_loc], 1), pos)
        x_cls = layer.cls.gather(x[:, :N], pos_cls, e_cls * T_cls, memory)
        x_loc = layer.loc.gather(x[:, N:], pos_loc, e_loc * T_loc, memory)
        T_cls, T_loc = decoupled.scale_cls(x_cls), decoupled.scale_loc(x_loc)
        assert_close(p.logits, decoupled.class_head(decoupled.norm_cls(x_cls)), atol=1e-12, rtol=0)
        expected = decoupled.box_head(decoupled.norm_loc(x_loc))
        expected[..., :2] += torch.log(r / (1 - r))
        assert_close(p.boxes, expected.sigmoid(), atol=1e-12, rtol=0)


def reached(number, module):
    """Name -> largest absolute gradient of a number in that parameter; 0 where there is none.

    Without the biases of keys: added to all keys alike, they change no softmax.
    """
    names, parameters = zip(*((n, p) for n, p in module.named_parameters()
                              if not (".k_" in n and n.endswith("bias"))))
    gradients = torch.autograd.grad(number, parameters, retain_graph=True, allow_unused=True)
    return {n: 0.0 if g is None else g.abs().max().item() for n, g in zip(names, gradients)}


def within(sizes, *parts):
    found = [size for name, size in sizes.items() if any(part in name for part in parts)]
    assert found, parts
    return found


def test_each_task_trains_its_own_branch_of_the_last_layer(decoupled, generator):
    """[SD Eq. 3] (c)  Exactly zero gradient into the other task's branch, norm and head.

    In earlier layers not zero: the shared self-attention lets it through.
    """
    last = decoupled.o_decoder(helpers.conditional_queries(D, N), helpers.conditional_memory(D))[-1]
    from_cls = reached(last.logits.square().sum(), decoupled)
    from_loc = reached(last.boxes.square().sum(), decoupled)
    assert max(within(from_cls, "layers.2.loc", "norm_loc.", "box_head")) == 0
    assert max(within(from_loc, "layers.2.cls", "norm_cls.", "class_head")) == 0
    assert min(within(from_cls, "layers.2.cls", "scale_cls", "class_head")) > 0
    assert min(within(from_loc, "layers.2.loc", "scale_loc", "box_head")) > 0
    for sizes in (from_cls, from_loc):
        assert min(within(sizes, "layers.0.", "layers.1.")) > 1e-9


def test_split_decoder_lets_nothing_through(split, generator):
    """[SD Eq. 2]  Two plain decoders: one gives the logits, the other the boxes."""
    queries, memory = helpers.conditional_queries(D, N), helpers.conditional_memory(D)
    predictions = split.o_decoder(queries, memory)
    for task, number in (("loc", predictions[-1].logits), ("cls", predictions[-1].boxes)):
        sizes = reached(number.square().sum(), split)
        assert max(size for name, size in sizes.items() if name.startswith(f"{task}.")) == 0
    plain = decoder_conditional.ConditionalDecoder(**SIZES).double()
    state = {**split.state_dict(), **{k.removeprefix("loc."): v
                                      for k, v in split.state_dict().items() if "loc." in k}}
    plain.load_state_dict({k: state[k] for k in plain.state_dict()})
    second = queries._replace(**{name: getattr(queries, name)[1:]
                                 for name in ("content", "pos", "spatial")})
    for p, q in zip(predictions, plain.o_decoder(second, memory), strict=True):
        assert_close(p.boxes, q.boxes, atol=1e-12, rtol=0)


# --- one layer by definition, graded in exercise 7 ------------------------------------------------

def test_disperse_by_definition(decoupled, generator):
    """[SD Eq. 3]  self-att(cat(Q_cls, Q_loc)): softmax(q k^T / sqrt d) v over 2N tokens."""
    layer, (x, pos) = decoupled.layers[1], torch.randn(2, 2, 2 * N, D, generator=generator).double()
    att = layer.self_attn
    que, key = att.q_content(x) + att.q_pos(pos), att.k_content(x) + att.k_pos(pos)
    val, read = att.v_proj(x), torch.zeros_like(x)
    for h in range(H):
        part = slice(h * D // H, (h + 1) * D // H)
        scores = que[..., part] @ key[..., part].transpose(1, 2) / (D // H) ** .5
        read[..., part] = scores.softmax(-1) @ val[..., part]
    expected = layer.norm_self(x + att.out_proj(read))
    assert_close(layer.disperse(x, pos), expected, atol=1e-12, rtol=0)


def test_gather_by_definition(decoupled, generator):
    """[SD Eq. 3]  cat(FFN_t(cross-att_t(Q_t))), each task with positions and width of its own."""
    memory = helpers.conditional_memory(D)
    x, pos, spatial = torch.randn(3, 2, 2 * N, D, generator=generator).double()
    for layer in decoupled.layers[:2]:          # only the first layer's cross-attention reads pos
        expected = []
        for branch, part in ((layer.cls, slice(N)), (layer.loc, slice(N, None))):
            read = branch.cross_attn(x[:, part], pos[:, part], spatial[:, part], memory)
            y = branch.norm_cross(x[:, part] + read)
            expected.append(branch.norm_ffn(y + branch.ffn(y)))
        assert_close(layer.gather(x, pos, spatial, memory), torch.cat(expected, 1), atol=1e-12,
                     rtol=0)
