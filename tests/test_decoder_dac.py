"""DAC-DETR's claims as tests: [DAC Eq. 1-2] with self-attention, [DAC Eq. 3] without it.

Everything in float64, on two feature levels; the second image of the batch is padded on the right.
"""
import difflib
import inspect
import pathlib
import re

import helpers
import pytest
import torch
from torch.testing import assert_close

from detr_min import attention, boxes, decoder_base, decoder_dac, proposals
from detr_min.release import deformable

SIZES = dict(num_layers=3, d_model=32, num_heads=4, num_levels=2, num_points=2, d_ffn=48,
             num_classes=3)
N = 7


def a_memory(generator):
    """Two images; of the second, the last quarter of the columns is padding."""
    spatial_shapes, pads = [(6, 8), (3, 4)], []
    for h, w in spatial_shapes:
        is_pad = torch.zeros(2, h, w, dtype=torch.bool)
        is_pad[1, :, 3 * w // 4:] = True
        pads.append(is_pad.flatten(1))
    tokens = torch.randn(2, 60, 32, generator=generator, dtype=torch.float64)
    valid_ratios = torch.tensor([[[1., 1.]] * 2, [[.75, 1.]] * 2], dtype=torch.float64)
    return attention.Memory(tokens, torch.cat(pads, dim=1), spatial_shapes, valid_ratios)


def some_queries(generator):
    content, pos = torch.randn(2, 1, 2, N, 32, generator=generator, dtype=torch.float64)
    ref_boxes = torch.rand(2, N, 4, generator=generator, dtype=torch.float64) * .6 + .2
    return proposals.Queries(content, pos, ref_boxes, proposals=None)


@pytest.fixture
def decoder(generator):
    return helpers.shaken(decoder_dac.DACDecoder(**SIZES), generator)


def nudge_query_0(run, queries, memory):
    """How far each query's last logits and box move when query 0's content does. (N,), (N,)"""
    content = queries.content.clone()
    content[:, :, 0] += 0.5
    before, after = run(queries, memory)[-1], run(queries._replace(content=content), memory)[-1]
    return [(a - b).abs().amax(dim=(0, 2)) for a, b in zip(after, before)]


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


def test_o_decoder_by_definition(decoder, generator):
    """[DAC Eq. 1], [DAC Eq. 2]"""
    queries, memory = some_queries(generator), a_memory(generator)
    expected = slow_decoder(decoder, queries, memory, with_self_attention=True)
    assert_close(decoder.o_decoder(queries, memory), expected, atol=1e-12, rtol=0)


def test_c_decoder_by_definition(decoder, generator):
    """[DAC Eq. 3]"""
    queries, memory = some_queries(generator), a_memory(generator)
    expected = slow_decoder(decoder, queries, memory, with_self_attention=False)
    assert_close(decoder.c_decoder(queries, memory), expected, atol=1e-12, rtol=0)


def test_both_decoders_are_the_two_passes(decoder, generator):
    """[DAC Eq. 1-3]  Side by side through `gather`: the same values, and the same gradients."""
    queries, memory = some_queries(generator), a_memory(generator)
    for tensor in queries[:3]:
        tensor.requires_grad_()
    leaves = [*decoder.parameters(), *queries[:3]]

    def gradients(o_predictions, c_predictions):
        """Of one number in which every output counts, O and C differently."""
        loss = sum(f * (p.logits.square().sum() + (p.boxes * torch.arange(1, 5)).square().sum())
                   for f, layers in ((1., o_predictions), (3., c_predictions)) for p in layers)
        return torch.autograd.grad(loss, leaves)

    two = decoder.o_decoder(queries, memory), decoder.c_decoder(queries, memory)
    one = decoder.both_decoders(queries, memory)
    assert_close(one, two, atol=1e-12, rtol=0)
    assert_close(gradients(*one), gradients(*two), atol=1e-8, rtol=1e-8)
    in_float32 = decoder.float().both_decoders(queries._replace(
        **{name: t.float() for name, t in queries._asdict().items() if t is not None}),
        memory._replace(tokens=memory.tokens.float(), valid_ratios=memory.valid_ratios.float()))
    assert_close(in_float32, two, atol=1e-4, rtol=0, check_dtype=False)     # three layers' rounding


# --- the paper's theses ---------------------------------------------------------------------------

def test_c_decoder_queries_are_independent(decoder, generator):
    """[DAC Eq. 3]  Nudge query 0: it moves, the others do not."""
    for change in nudge_query_0(decoder.c_decoder, some_queries(generator), a_memory(generator)):
        assert change[0] > 1e-3 and (change[1:] < 1e-12).all(), (
            f"only query 0 may move; the queries moved by {change.tolist()}")


def test_o_decoder_queries_all_answer(decoder, generator):
    """[DAC Eq. 1]  Nudge query 0: self-attention tells every other query."""
    for change in nudge_query_0(decoder.o_decoder, some_queries(generator), a_memory(generator)):
        assert (change > 1e-4).all()


def test_o_decoder_and_c_decoder_follow_a_permutation_of_queries(decoder, generator):
    queries, memory, order = some_queries(generator), a_memory(generator), torch.randperm(N)
    permuted = proposals.Queries(queries.content[:, :, order], queries.pos[:, :, order],
                                 queries.ref_boxes[:, order], None)
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


def test_inference_is_the_baseline_bit_for_bit(decoder, generator):
    """[DAC Fig. 2]  With the C-Decoder deleted, equal weights give equal answers, difference 0."""
    queries, memory = some_queries(generator), a_memory(generator)
    base = decoder_base.Decoder(**SIZES).double()
    base.load_state_dict(decoder.state_dict())
    expected = base.o_decoder(queries, memory)
    assert_close(decoder.o_decoder(queries, memory), expected, atol=0, rtol=0)


def test_c_decoder_sends_no_gradient_into_self_attention(decoder, generator):
    """[DAC Eq. 3]  It trains the cross-attention, FFN and heads that both share, nothing else."""
    last = decoder.c_decoder(some_queries(generator), a_memory(generator))[-1]
    (last.logits.square().sum() + last.boxes.square().sum()).backward()
    for name, parameter in decoder.named_parameters():
        if "layers" in name:
            is_self = "self_attn" in name or "norm_self" in name
            assert (parameter.grad is None) == is_self, (
                f"{name}: a gradient is {'not ' * is_self}wanted, it is {parameter.grad}")


def test_the_first_layer_differs_unlike_the_release(decoder, generator):
    """[DAC Eq. 3]  The C-Decoder starts at the queries themselves: layer 1 already differs."""
    queries, memory = some_queries(generator), a_memory(generator)
    o, c = decoder.o_decoder(queries, memory)[0], decoder.c_decoder(queries, memory)[0]
    change = (o.logits - c.logits).abs().amax(-1)
    assert change.min() > 1e-3, f"every query's logits differ; by {change.tolist()}"


# --- references: each layer looks once, the loss looks twice --------------------------------------

@pytest.mark.parametrize("run", ["o_decoder", "c_decoder", "both_decoders"])
def test_look_forward_twice(decoder, generator, run):
    """[DINO Sec. 3.5]  A box loss trains its own layer's box head and the one before, no more."""
    predictions = getattr(decoder, run)(some_queries(generator), a_memory(generator))
    for layers in predictions if run == "both_decoders" else [predictions]:
        for depth, p in enumerate(layers):
            biases = [head[-1].bias for head in decoder.box_heads]
            gradients = torch.autograd.grad(p.boxes.square().sum(), biases, retain_graph=True,
                                            allow_unused=True)
            reached = [g is not None for g in gradients]
            assert reached == [depth - 1 <= head <= depth for head in range(3)], (
                f"which box heads the box loss of layer {depth} reaches: found, expected")


def test_boxes_start_at_the_references_and_classes_at_the_prior(generator):
    """Untrained, every layer answers with its reference, and every class has probability .01."""
    decoder, queries = decoder_dac.DACDecoder(**SIZES).double(), some_queries(generator)
    for layers in decoder.both_decoders(queries, a_memory(generator)):
        for p in layers:
            assert_close(p.boxes, queries.ref_boxes, atol=1e-12, rtol=0)
    bias = decoder.class_heads[0].bias
    assert_close(bias.sigmoid(), torch.full_like(bias, .01), atol=1e-7, rtol=0)  # set in float32


def test_fixed_references_are_the_ablation(generator):
    """FixedReferenceDecoder takes the same weights; layer 1 is the same, layer 2 is not."""
    queries, memory = some_queries(generator), a_memory(generator)
    base = helpers.shaken(decoder_base.Decoder(**SIZES), generator)
    fixed = deformable.FixedReferenceDecoder(**SIZES).double()
    fixed.load_state_dict(base.state_dict())
    a, b = base.o_decoder(queries, memory), fixed.o_decoder(queries, memory)
    assert_close(a[0], b[0], atol=0, rtol=0)
    x = queries.content[0]                                          # and by definition:
    for depth, p in enumerate(b):
        layer = fixed.layers[depth]
        x = layer.disperse(x, queries.pos[0])
        x = layer.gather(x, queries.pos[0], queries.ref_boxes, memory)
        expected = torch.sigmoid(torch.logit(queries.ref_boxes) + fixed.box_heads[depth](x))
        assert_close(p.boxes, expected, atol=1e-12, rtol=0)
    assert (a[1].boxes - b[1].boxes).abs().max() > 1e-3


def test_padding_is_not_read(decoder, generator):
    """What stands in the padded cells does not matter to either decoder."""
    queries, memory = some_queries(generator), a_memory(generator)
    other = memory._replace(tokens=memory.tokens.masked_fill(memory.is_pad[..., None], 1e3))
    assert_close(decoder.both_decoders(queries, other), decoder.both_decoders(queries, memory),
                 atol=0, rtol=0)


def test_the_difference_from_the_baseline_fits_on_a_screen():
    """`diff decoder_base.py decoder_dac.py` is the paper: the layer is repeated word for word."""
    layers = []
    for module in (decoder_base, decoder_dac):
        source = inspect.getsource(module.DecoderLayer)
        layers.append(re.sub(r'""".*?"""', "", source, flags=re.DOTALL))      # no docstrings
    assert layers[0] == layers[1]
    code = [pathlib.Path(module.__file__).read_text().splitlines()
            for module in (decoder_base, decoder_dac)]
    changed = [line for line in difflib.unified_diff(*code, n=0) if line[0] in "+-"]
    assert len(changed) < 60
