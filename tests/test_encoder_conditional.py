"""DETR's encoder: cells counted from one, padding that changes nothing."""
import helpers
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detr_min import boxes, encoder_conditional

D = 32
SHAPE = dict(d_model=D, num_heads=4, d_ffn=48)

def test_positions_count_cells_of_the_image_from_one(generator):
    is_pad = torch.zeros(1, 3, 5, dtype=torch.bool)
    is_pad[0, 2:], is_pad[0, :, 4:] = True, True                    # 2 rows and 4 columns are image
    found = encoder_conditional.cell_positions(is_pad, D)[0, 0, 1]
    assert_close(found, boxes.embed_points(torch.tensor([2 / 4, 1 / 2]), D), atol=1e-5, rtol=0)


def test_encoder_ignores_padding(generator):
    encoder = helpers.shaken(encoder_conditional.Encoder(2, **SHAPE), generator)
    x, is_pad = torch.randn(2, D, 4, 6).double(), torch.zeros(2, 32, 48, dtype=torch.bool)
    is_pad[1, 16:], is_pad[1, :, 32:] = True, True
    pads = [is_pad[:, ::8, ::8]]
    memory = encoder([x], pads)
    assert memory.spatial_shapes == [(4, 6)] and memory.is_pad[1].sum() == 16
    assert_close(memory.valid_ratios[1, 0], helpers.f64(4 / 6, 2 / 4))
    noise = encoder([x + 9 * memory.is_pad.unflatten(1, (4, 6))[:, None]], pads)
    on_image = ~memory.is_pad
    assert_close(memory.tokens[on_image], noise.tokens[on_image], atol=1e-12, rtol=0)


def test_a_cell_s_position_has_y_from_its_row_and_x_from_its_column(generator):
    """Of 2 x 3 cells: the lower left lies at x = 1/3, y = 2/2, counted from one."""
    found = encoder_conditional.cell_positions(torch.zeros(1, 2, 3, dtype=torch.bool), D)[0, 1, 0]
    assert_close(found, boxes.embed_points(torch.tensor([1 / 3, 2 / 2]), D), atol=1e-5, rtol=0)


def test_layer_by_definition(generator):
    """[DETR]  LN(x + attention(x + position)), then LN(x + FFN(x)); padding is no key."""
    layer = helpers.shaken(encoder_conditional.EncoderLayer(**SHAPE), generator)
    memory = helpers.conditional_memory(D)
    x, qk = memory.tokens, memory.tokens + memory.pos                   # values have no position
    q, k, v = (source @ w.T + b for source, w, b in zip(
        (qk, qk, x), layer.attn.in_proj_weight.chunk(3), layer.attn.in_proj_bias.chunk(3)))
    read = torch.zeros_like(x)
    for b in range(2):
        real = ~memory.is_pad[b]
        for part in torch.arange(D).chunk(4):                           # heads of width 8
            scores = q[b][:, part] @ k[b, real][:, part].T / 8 ** .5
            read[b, :, part] = scores.softmax(-1) @ v[b, real][:, part]
    x = F.layer_norm(x + layer.attn.out_proj(read), (D,), layer.norm_attn.weight,
                     layer.norm_attn.bias)
    hidden = (x @ layer.ffn[0].weight.T + layer.ffn[0].bias).clamp(min=0)
    x = F.layer_norm(x + hidden @ layer.ffn[3].weight.T + layer.ffn[3].bias, (D,),
                     layer.norm_ffn.weight, layer.norm_ffn.bias)
    assert_close(layer(memory).tokens, x, atol=1e-12, rtol=0)


def test_each_layer_reads_what_the_one_before_made(generator):
    encoder, seen = helpers.shaken(encoder_conditional.Encoder(2, **SHAPE), generator), []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda layer, args, out: seen.append((args[0], out)))
    pad = torch.zeros(1, 2, 3, dtype=torch.bool)
    memory = encoder([torch.randn(1, D, 2, 3).double()], [pad])
    assert len(seen) == 2 and seen[1][0] is seen[0][1] and memory is seen[1][1]


def test_dropout_is_applied_to_the_hidden_units_in_training_alone():
    ffn, x = encoder_conditional.feed_forward(D, 48, dropout=1.0), torch.randn(5, D)
    assert_close(ffn(x), ffn[3].bias.expand(5, D))                      # all of them are dropped
    assert not torch.equal(ffn.eval()(x), ffn(x) * 0 + ffn[3].bias)


def test_projection_is_a_convolution_of_the_last_level(generator):
    project = encoder_conditional.Projection([4, 6], D)
    fine, coarse = torch.randn(2, 4, 8, 12), torch.randn(2, 6, 4, 6)
    [level] = project([fine, coarse])
    expected = torch.einsum("bchw,dc->bdhw", coarse, project.conv.weight[:, :, 0, 0])
    assert_close(level, expected + project.conv.bias[:, None, None], atol=1e-5, rtol=0)
