"""The decoder both papers start from: [DAC Eq. 1-2], and boxes moved layer by layer."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import helpers
from detr_min import boxes, decoder_base, encoder, proposals
from helpers import (EXACT, f64, memory_of, nudge_query_0, on_paper, padded_memory, random,
                     randomise, reordered)

B, N, D, C = 2, 5, 8, 3


def a_memory():
    return padded_memory(D)


def some_queries(size=4):
    return helpers.some_queries(D, N, size=size)


def a_decoder():
    return randomise(decoder_base.Decoder(3, D, 2, 2, 3, 16, C))


def a_layer():
    return randomise(decoder_base.DecoderLayer(D, 2, 2, 3, 16))


def test_disperse_worked_by_hand():
    """[DAC Eq. 1] Two queries of width 1; every weight is 1, but Que's is log 3."""
    layer = on_paper(decoder_base.DecoderLayer(1, 1, 1, 1, 1))
    layer.self_attn.in_proj_weight.data[0] = math.log(3)
    queries, pos = f64(2, 6)[None, :, None], f64(-2, -5)[None, :, None]
    # with positions they are 0 and 1, so Que is 0 and log 3, Key is 0 and 1
    # query 1: Que Key = 0, 0;      shares 1/2, 1/2;  reads (2 + 6)/2 = 4;    2 + 4 = 6
    # query 2: Que Key = 0, log 3;  shares 1/4, 3/4;  reads 2/4 + 18/4 = 5;   6 + 5 = 11
    assert_close(layer.disperse(queries, pos), f64(6, 11)[None, :, None], **EXACT)


def test_gather_worked_by_hand():
    """[DAC Eq. 2] Two queries at the first of four cells, which hold 2, 6, 4 and 5."""
    layer = on_paper(decoder_base.DecoderLayer(1, 1, 1, 1, 1))
    layer.cross_attn.sampling_offsets.weight.data = f64([.25], [0])       # x, y
    layer.ffn[0].bias.data.fill_(-8)                                    # FFN(x) = x + max(x - 8, 0)
    memory = memory_of([f64(2, 6, 4, 5)[None, None, None]])
    queries, pos = f64(6, 11)[None, :, None], f64(-2, -5)[None, :, None]
    points = f64(.125, .5).expand(1, 2, 2)
    # query 1: (6 - 2)/4 = 1 cell to the right, 6;           6 + 6 = 12;   FFN: 12 + 4 = 16
    # query 2: (11 - 5)/4 = 1.5 cells, (6 + 4)/2 = 5;        11 + 5 = 16;  FFN: 16 + 8 = 24
    assert_close(layer.gather(queries, pos, points, memory), f64(16, 24)[None, :, None], **EXACT)


def test_disperse_by_definition():
    """[DAC Eq. 1] softmax attention over all queries, in loops; positions in Que and Key only."""
    layer = a_layer().requires_grad_(False)
    queries, pos = some_queries().content[0], some_queries().pos[0]
    wq, wk, wv = layer.self_attn.in_proj_weight.chunk(3)
    bq, bk, bv = layer.self_attn.in_proj_bias.chunk(3)
    out = torch.zeros_like(queries)
    for b in range(B):
        for n in range(N):
            heads = []
            for head in (slice(0, 4), slice(4, 8)):
                query = (wq @ (queries[b, n] + pos[b, n]) + bq)[head]
                keys = [(wk @ (queries[b, m] + pos[b, m]) + bk)[head] for m in range(N)]
                values = [(wv @ queries[b, m] + bv)[head] for m in range(N)]
                scores = [math.exp(query @ key / math.sqrt(4)) for key in keys]
                heads.append(sum(s / sum(scores) * v for s, v in zip(scores, values)))
            out[b, n] = queries[b, n] + layer.self_attn.out_proj(torch.cat(heads))
    expected = F.layer_norm(out, (D,), layer.norm_self.weight, layer.norm_self.bias)
    assert_close(layer.disperse(queries, pos), expected, **EXACT)


def test_gather_by_definition():
    """[DAC Eq. 2] LN(Q + cross-attention), then LN(Q + FFN(Q)); positions say where to read."""
    layer, queries, memory = a_layer(), some_queries(), a_memory()
    x, pos, refs = queries.content[0], queries.pos[0], queries.ref_boxes
    expected = x + layer.cross_attn(x + pos, refs, memory)
    expected = F.layer_norm(expected, (D,), layer.norm_cross.weight, layer.norm_cross.bias)
    hidden = (expected @ layer.ffn[0].weight.T + layer.ffn[0].bias).relu()
    expected = expected + hidden @ layer.ffn[2].weight.T + layer.ffn[2].bias
    expected = F.layer_norm(expected, (D,), layer.norm_ffn.weight, layer.norm_ffn.bias)
    assert_close(layer.gather(x, pos, refs, memory), expected, **EXACT)


def move(outputs_before, outputs_after):
    return (outputs_after - outputs_before).abs().amax((0, 2))              # (N,)


def test_self_attention_mixes_queries_and_cross_attention_does_not():
    """[DAC Eq. 1-2] Nudge query 0: `disperse` moves all queries, `gather` only query 0."""
    layer, queries, memory = a_layer(), some_queries(), a_memory()
    x, pos, refs = queries.content[0], queries.pos[0], queries.ref_boxes
    nudged = x.clone()
    nudged[:, 0] += 0.5
    change = move(layer.disperse(x, pos), layer.disperse(nudged, pos))
    assert (change > 1e-4).all()
    change = move(layer.gather(x, pos, refs, memory), layer.gather(nudged, pos, refs, memory))
    assert change[0] > 1e-2 and (change[1:] == 0).all()


def test_every_answer_depends_on_every_query():
    """Duplicates can only be told apart by looking at one another."""
    for change in nudge_query_0(a_decoder().o_decoder, some_queries(2), a_memory()):
        assert (change > 1e-7).all()


def test_the_order_of_queries_does_not_matter():
    queries, decoder, memory = some_queries(), a_decoder(), a_memory()
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = decoder.o_decoder(reordered(queries, order), memory)
    for x, y in zip(decoder.o_decoder(queries, memory), shuffled, strict=True):
        assert_close(y.logits, x.logits[:, order], **EXACT)
        assert_close(y.boxes, x.boxes[:, order], **EXACT)


def steps(decoder, deltas):
    """Let box head l answer deltas[l], whatever it is asked."""
    for head, delta in zip(decoder.box_heads, deltas):
        torch.nn.init.zeros_(head[-1].weight)
        head[-1].bias.data = torch.full((4,), delta, dtype=torch.float64)
    return decoder


def test_boxes_worked_by_hand():
    """[Deformable DETR App. A.4] b_l = sigmoid(delta_l + logit(b_(l-1)))"""
    # from .5 = sigmoid(0): + log 3 -> .75, - log 12 -> sigmoid(-log 4) = .2, + log 4 -> .5
    decoder = steps(a_decoder(), [math.log(3), -math.log(12), math.log(4)])
    queries = some_queries()._replace(ref_boxes=torch.full((B, N, 4), 0.5, dtype=torch.float64))
    answer = decoder.o_decoder(queries, a_memory())
    for prediction, box in zip(answer, [0.75, 0.2, 0.5], strict=True):
        assert_close(prediction.boxes, torch.full((B, N, 4), box, dtype=torch.float64), **EXACT)


def test_o_decoder_by_definition():
    """Layer after layer with heads of their own, [DAC Eq. 1] then [DAC Eq. 2], from points."""
    decoder, queries, memory = a_decoder(), some_queries(2), a_memory()
    x, pos, refs = queries.content[0], queries.pos[0], queries.ref_boxes
    found = decoder.o_decoder(queries, memory)
    assert len(found) == 3
    for number, prediction in enumerate(found):
        layer = decoder.layers[number]
        x = layer.gather(layer.disperse(x, pos), pos, refs, memory)
        delta = decoder.box_heads[number](x)
        start = torch.logit(refs) if refs.shape[-1] == 4 else F.pad(torch.logit(refs), (0, 2))
        refs = torch.sigmoid(start + delta)
        assert_close(prediction.logits, decoder.class_heads[number](x), **EXACT)
        assert_close(prediction.boxes, refs, **EXACT)


def test_where_each_layer_looks():
    """[Deformable DETR App. A.4] Around the box of the layer before, detached."""
    decoder, queries, seen = a_decoder(), some_queries(2), []
    for layer in decoder.layers:
        layer.cross_attn.register_forward_pre_hook(lambda layer, args: seen.append(args[1]))
    found = decoder.o_decoder(queries, a_memory())
    assert seen[0] is queries.ref_boxes and len(seen) == 3
    for before, looked_at in zip(found, seen[1:]):
        assert_close(looked_at, before.boxes, **EXACT)
        assert not looked_at.requires_grad and before.boxes.requires_grad


@pytest.mark.parametrize("layer, reached", [(0, [0]), (1, [0, 1]), (2, [1, 2])])
def test_look_forward_twice(layer, reached):
    """[DINO Sec. 3.5] The loss on a layer's boxes teaches its own correction and the one before.

    The heads ignore the queries here and answer their bias: nothing else connects the layers.
    """
    decoder = steps(a_decoder(), [0.3, -0.2, 0.1])
    decoder.o_decoder(some_queries(), a_memory())[layer].boxes.sum().backward()
    got = [i for i, head in enumerate(decoder.box_heads)
           if head[-1].bias.grad is not None and head[-1].bias.grad.abs().max() > 1e-6]
    assert got == reached


def test_the_first_answer_is_the_reference():
    """At first no head moves a box, and every class has probability .01."""
    torch.manual_seed(0)
    decoder, queries = decoder_base.Decoder(3, D, 2, 2, 3, 16, C).double(), some_queries()
    for prediction in decoder.o_decoder(queries, a_memory()):
        assert_close(prediction.boxes, queries.ref_boxes, **EXACT)
    head = decoder.class_heads[0]
    assert_close(head(torch.zeros(1, D).double()).sigmoid(), torch.full((1, C), 0.01).double(),
                 atol=1e-7, rtol=0)                                 # a bias set in float32


def test_gradients_reach_every_parameter():
    decoder, weights = a_decoder(), torch.Generator().manual_seed(0)
    loss = sum((x * torch.randn(x.shape, generator=weights)).sum()
               for prediction in decoder.o_decoder(some_queries(), a_memory()) for x in prediction)
    loss.backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-8, name


def test_padding_changes_nothing():
    """Encoder, two-stage queries and decoder: an image alone, or in a batch with a larger one."""
    net = randomise(encoder.Encoder(1, D, 2, 2, 3, 16))
    ask = randomise(proposals.TwoStageQueries(4, D, C, 1), seed=3)
    decoder = a_decoder()
    features = [random(B, D, 8, 12, seed=5), random(B, D, 4, 6, seed=6)]
    is_pad = torch.zeros(B, 64, 96, dtype=torch.bool)
    is_pad[1, 40:], is_pad[1, :, 56:] = True, True          # 5 x 7 and 3 x 4 cells of the second
    memory = net(features, [is_pad[:, ::8, ::8], is_pad[:, ::16, ::16]])
    part = [features[0][1:, :, :5, :7], features[1][1:, :, :3, :4]]
    alone = net(part, [torch.zeros(1, *x.shape[2:], dtype=torch.bool) for x in part])
    queries, queries_alone = ask(memory), ask(alone)
    objectness, is_good = queries.proposals.logits[1, :, 0], proposals.anchors(memory)[1][1]
    assert objectness[~is_good].max() < objectness.topk(4).values[-1]   # no query starts on padding
    for x, y in zip(decoder.o_decoder(queries, memory), decoder.o_decoder(queries_alone, alone)):
        assert x.logits.dtype == torch.float64
        assert_close(x.logits[1:], y.logits, atol=1e-5, rtol=0)     # positions are float32: 1e-7 in
        assert_close(x.boxes[1:], y.boxes, atol=1e-6, rtol=0)


def test_predictions_are_boxes_predictions():
    for prediction in a_decoder().o_decoder(some_queries(), a_memory()):
        assert isinstance(prediction, boxes.Predictions)
        assert prediction.logits.shape == (B, N, C) and prediction.boxes.shape == (B, N, 4)
        assert ((prediction.boxes > 0) & (prediction.boxes < 1)).all()
