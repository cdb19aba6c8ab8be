"""SD-DETR's decoders: ties to the plain one, permutation, whose gradient goes where."""
import helpers
import pytest
import torch
from torch.testing import assert_close

from detr_min import boxes, decoder_conditional, decoder_decoupled

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
