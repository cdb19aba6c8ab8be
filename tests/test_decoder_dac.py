"""DAC-DETR's claims as tests: [DAC Eq. 1-2] with self-attention, [DAC Eq. 3] without it.

Everything in float64, on two feature levels; the second image of the batch is padded.
"""
import difflib
import inspect
import math
import pathlib
import re

import pytest
import torch
from torch.testing import assert_close

import helpers
from detr_min import boxes, decoder_base, decoder_dac, proposals
from helpers import EXACT, f64, memory_of, nudge_query_0, on_paper, padded_memory, reordered, shaken

SIZES = dict(num_layers=3, d_model=32, num_heads=4, num_levels=2, num_points=2, d_ffn=48,
             num_classes=3)
N = 7


def a_memory():
    return padded_memory(32, [(6, 8), (3, 4)])


def some_queries():
    return helpers.some_queries(32, N)


@pytest.fixture
def decoder(generator):
    return shaken(decoder_dac.DACDecoder(**SIZES), generator)


# --- by hand: two queries of width 1, and four cells that hold 2, 6, 4 and 5 ----------------------

def decoder_on_paper(num_layers):
    """Weights are 1, but Que's of the self-attention log 3; FFN(x) = x + max(x - 8, 0).

    A query of value x looks (x + position)/4 cells to the right of the first cell. The class heads
    answer x, the box heads move nothing. Returns the decoder, its queries 2 and 6, the memory.
    """
    decoder = on_paper(decoder_dac.DACDecoder(num_layers, 1, 1, 1, 1, 1, 1))
    for layer, box_head in zip(decoder.layers, decoder.box_heads):
        layer.self_attn.in_proj_weight.data[0] = math.log(3)
        layer.cross_attn.sampling_offsets.weight.data = f64([.25], [0])           # x, y
        layer.ffn[0].bias.data.fill_(-8)
        box_head[-1].weight.data.zero_()
    content, pos = f64(2, 6)[None, None, :, None], f64(-2, -5)[None, None, :, None]
    box = f64(.125, .5, .5, .5).expand(1, 2, 4)         # offsets count half its width, one cell
    return (decoder, proposals.Queries(content, pos, box, None),
            memory_of([f64(2, 6, 4, 5)[None, None, None]]))


def test_o_decoder_worked_by_hand():
    """[DAC Eq. 1-2]  One layer."""
    decoder, queries, memory = decoder_on_paper(num_layers=1)
    # Eq. 1: with positions 0 and 1; shares 1/2, 1/2 and 1/4, 3/4;  2 + 4 = 6,  6 + 5 = 11
    # Eq. 2: (6 - 2)/4 = 1 cell on is 6, (11 - 5)/4 = 1.5 cells on is 5;  6 + 6 = 12,  11 + 5 = 16
    #        FFN: 12 + 4 = 16,  16 + 8 = 24
    [found] = decoder.o_decoder(queries, memory)
    assert_close(found.logits[0, :, 0], f64(16, 24), **EXACT)


def test_c_decoder_worked_by_hand():
    """[DAC Eq. 3]  Two layers: the same queries, memory and weights, no self-attention."""
    decoder, queries, memory = decoder_on_paper(num_layers=2)
    # layer 1: (2 - 2)/4 = 0 cells on is 2, (6 - 5)/4 = 1/4 on is 3/4 * 2 + 1/4 * 6 = 3
    #          2 + 2 = 4,  6 + 3 = 9;     FFN: 4,  9 + 1 = 10
    # layer 2: (4 - 2)/4 = 1/2 on is 4, (10 - 5)/4 = 1 1/4 on is 3/4 * 6 + 1/4 * 4 = 5.5
    #          4 + 4 = 8,  10 + 5.5 = 15.5;     FFN: 8,  15.5 + 7.5 = 23
    for layer, expected in zip(decoder.c_decoder(queries, memory), [(4, 10), (8, 23)], strict=True):
        assert_close(layer.logits[0, :, 0], f64(*expected), **EXACT)
        assert_close(layer.boxes, queries.ref_boxes, **EXACT)


# --- by definition --------------------------------------------------------------------------------

def slow_decoder(decoder, queries, memory, with_self_attention):
    """[DAC Eq. 1-3] with the release's norms; self-attention is softmax(q k / sqrt d) v."""
    x, pos, ref = queries.content[0], queries.pos[0], queries.ref_boxes
    predictions, H, d = [], 4, 8
    for depth, layer in enumerate(decoder.layers):
        if with_self_attention:                                                     # [DAC Eq. 1]
            weight, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
            que, key, val = [(source @ weight[i * 32:(i + 1) * 32].T + bias[i * 32:(i + 1) * 32])
                             for i, source in enumerate((x + pos, x + pos, x))]
            read = torch.zeros_like(x)
            for h in range(H):
                part = slice(h * d, (h + 1) * d)
                scores = que[..., part] @ key[..., part].transpose(1, 2) / d ** .5
                read[..., part] = scores.softmax(-1) @ val[..., part]
            x = layer.norm_self(x + layer.self_attn.out_proj(read))
        x = layer.norm_cross(x + layer.cross_attn(x + pos, ref, memory))            # [DAC Eq. 2-3]
        x = layer.norm_ffn(x + layer.ffn[2](layer.ffn[0](x).clamp(min=0)))
        ref = torch.sigmoid(torch.log(ref / (1 - ref)) + decoder.box_heads[depth](x))
        predictions.append(boxes.Predictions(decoder.class_heads[depth](x), ref))
    return predictions


def test_o_decoder_by_definition(decoder):
    """[DAC Eq. 1], [DAC Eq. 2]"""
    queries, memory = some_queries(), a_memory()
    expected = slow_decoder(decoder, queries, memory, with_self_attention=True)
    assert_close(decoder.o_decoder(queries, memory), expected, **EXACT)


def test_c_decoder_by_definition(decoder):
    """[DAC Eq. 3]"""
    queries, memory = some_queries(), a_memory()
    expected = slow_decoder(decoder, queries, memory, with_self_attention=False)
    assert_close(decoder.c_decoder(queries, memory), expected, **EXACT)


# --- the paper's theses ---------------------------------------------------------------------------

def test_c_decoder_queries_are_independent(decoder):
    """[DAC Eq. 3]  Nudge query 0: it moves, the others do not."""
    for change in nudge_query_0(decoder.c_decoder, some_queries(), a_memory()):
        assert change[0] > 1e-3 and (change[1:] < 1e-12).all(), (
            f"only query 0 may move; the queries moved by {change.tolist()}")


def test_o_decoder_queries_all_answer(decoder):
    """[DAC Eq. 1]  Nudge query 0: self-attention tells every other query."""
    for change in nudge_query_0(decoder.o_decoder, some_queries(), a_memory()):
        assert (change > 1e-4).all()


def test_o_decoder_and_c_decoder_follow_a_permutation_of_queries(decoder):
    queries, memory, order = some_queries(), a_memory(), torch.tensor([3, 5, 0, 6, 1, 4, 2])
    permuted = reordered(queries, order)
    for run in (decoder.o_decoder, decoder.c_decoder):
        for before, after in zip(run(queries, memory), run(permuted, memory)):
            expected = boxes.Predictions(*(t[:, order] for t in before))
            assert_close(after, expected, atol=1e-11, rtol=0)


def test_c_decoder_owns_no_parameter(decoder):
    """[DAC Fig. 2]  Names, shapes and number of the weights are the baseline's."""
    base = decoder_base.Decoder(**SIZES).double().state_dict()
    ours = decoder.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in base.items()}
    assert len(list(decoder.parameters())) == len(base)         # no buffer, none registered twice


def test_inference_is_the_baseline_bit_for_bit(decoder):
    """[DAC Fig. 2]  With the C-Decoder deleted, equal weights give equal answers, difference 0."""
    queries, memory = some_queries(), a_memory()
    base = decoder_base.Decoder(**SIZES).double()
    base.load_state_dict(decoder.state_dict())
    expected = base.o_decoder(queries, memory)
    assert_close(decoder.o_decoder(queries, memory), expected, atol=0, rtol=0)


def test_c_decoder_sends_no_gradient_into_self_attention(decoder):
    """[DAC Eq. 3]  It trains the cross-attention, FFN and heads that both share, nothing else."""
    last = decoder.c_decoder(some_queries(), a_memory())[-1]
    (last.logits.square().sum() + last.boxes.square().sum()).backward()
    for name, parameter in decoder.named_parameters():
        if "layers" in name:
            is_self = "self_attn" in name or "norm_self" in name
            assert (parameter.grad is None) == is_self, (
                f"{name} got {'a' if is_self else 'no'} gradient")


def test_the_first_layer_differs_unlike_the_release(decoder):
    """[DAC Eq. 3]  The C-Decoder starts at the queries themselves: layer 1 already differs."""
    queries, memory = some_queries(), a_memory()
    o, c = decoder.o_decoder(queries, memory)[0], decoder.c_decoder(queries, memory)[0]
    change = (o.logits - c.logits).abs().amax(-1)
    assert change.min() > 1e-3, f"every query's logits differ; by {change.tolist()}"


# --- references: each layer looks once, the loss looks twice --------------------------------------

@pytest.mark.parametrize("run", ["o_decoder", "c_decoder"])
def test_look_forward_twice(decoder, run):
    """[DINO Sec. 3.5]  A box loss trains its own layer's box head and the one before, no more."""
    for depth, p in enumerate(getattr(decoder, run)(some_queries(), a_memory())):
        biases = [head[-1].bias for head in decoder.box_heads]
        gradients = torch.autograd.grad(p.boxes.square().sum(), biases, retain_graph=True,
                                        allow_unused=True)
        reached = [g is not None for g in gradients]
        assert reached == [depth - 1 <= head <= depth for head in range(3)], (
            f"which box heads the box loss of layer {depth} reaches: found, expected")


def test_boxes_start_at_the_references_and_classes_at_the_prior():
    """Untrained, every layer answers with its reference, and every class has probability .01."""
    decoder, queries = decoder_dac.DACDecoder(**SIZES).double(), some_queries()
    for run in (decoder.o_decoder, decoder.c_decoder):
        for p in run(queries, a_memory()):
            assert_close(p.boxes, queries.ref_boxes, **EXACT)
    bias = decoder.class_heads[0].bias
    assert_close(bias.sigmoid(), torch.full_like(bias, .01), atol=1e-7, rtol=0)  # set in float32


def test_padding_is_not_read(decoder):
    """What stands in the padded cells does not matter to either decoder."""
    queries, memory = some_queries(), a_memory()
    other = memory._replace(tokens=memory.tokens.masked_fill(memory.is_pad[..., None], 1e3))
    for run in (decoder.o_decoder, decoder.c_decoder):
        assert_close(run(queries, other), run(queries, memory), atol=0, rtol=0)


def code_of(item):
    """Its source without docstrings."""
    return re.sub(r'""".*?"""', "", inspect.getsource(item), flags=re.DOTALL)


def test_the_difference_from_the_baseline_is_the_paper():
    """`diff decoder_base.py decoder_dac.py` fits on a screen: at most 30 lines are changed.

    The layer and the O-Decoder are repeated word for word.
    """
    texts = [pathlib.Path(module.__file__).read_text().splitlines()
             for module in (decoder_base, decoder_dac)]
    changed = [line for line in difflib.ndiff(*texts) if line[:2] in ("+ ", "- ")]
    assert len(changed) <= 30, "\n".join(changed)
    assert code_of(decoder_base.DecoderLayer) == code_of(decoder_dac.DecoderLayer)
    assert code_of(decoder_base.Decoder.o_decoder) == code_of(decoder_dac.DACDecoder.o_decoder)
