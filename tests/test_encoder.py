"""Deformable encoder: cells, ratios, positions and levels, and that padding changes nothing."""
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detr_min import attention, backbone, encoder
from helpers import EXACT, f64, random, randomise
from test_boxes import sine_by_definition

SHAPES = [(4, 6), (2, 3)]


def random_features(B=2, D=8, shapes=SHAPES, seed=0):
    return [random(B, D, h, w, seed=seed + i) for i, (h, w) in enumerate(shapes)]


def padding(features, h, w, sizes):
    """Masks of the levels of a batch of h x w pixels whose images have the given sizes."""
    is_pad = torch.ones(len(sizes), h, w, dtype=torch.bool)
    for image, (height, width) in enumerate(sizes):
        is_pad[image, :height, :width] = False
    return backbone.padded_batch(lambda x: features, None, is_pad)[1]


def test_cell_centres_worked_by_hand():
    # level 0 of 2 x 4 cells, then 1 x 2; (x, y), row after row
    whole = torch.tensor([[1 / 8, 1 / 4], [3 / 8, 1 / 4], [5 / 8, 1 / 4], [7 / 8, 1 / 4],
                          [1 / 8, 3 / 4], [3 / 8, 3 / 4], [5 / 8, 3 / 4], [7 / 8, 3 / 4],
                          [1 / 4, 1 / 2], [3 / 4, 1 / 2]])
    # image 1 fills half of the columns of both levels, half the rows of level 0, all of level 1's
    ratios = torch.tensor([[[1., 1.], [1., 1.]], [[.5, .5], [.5, 1.]]])
    part = torch.cat([whole[:8] * 2, whole[8:] * torch.tensor([2., 1.])])   # beyond 1 on padding
    assert_close(encoder.cell_centres([(2, 4), (1, 2)], ratios), torch.stack([whole, part]))


def test_padding_moves_no_centre():
    """Not by a bit: of 50 cells the first lies at .01, the bound of two-stage anchors."""
    alone = encoder.cell_centres([(1, 50)], torch.ones(1, 1, 2))
    for width in range(51, 130):
        share = (torch.arange(width) < 50).float().mean()
        padded = encoder.cell_centres([(1, width)], torch.tensor([[[share, 1.]]]))
        assert_close(padded[:, :50], alone, atol=0, rtol=0)


def test_cells_are_measured_on_the_image():
    """Of 3 x 5 cells 2 x 4 are image: cell (i, j) lies at x = (j + .5)/4, y = (i + .5)/2."""
    is_pad = torch.ones(1, 3, 5, dtype=torch.bool)
    is_pad[0, :2, :4] = False
    found = encoder.cell_positions(is_pad, 16)
    assert found.shape == (1, 3, 5, 16)
    for i in range(2):
        for j in range(4):
            expected = torch.cat([sine_by_definition((i + .5) / 2, 8),
                                  sine_by_definition((j + .5) / 4, 8)])
            # float32, and the 1e-6 that keeps all-padding rows from dividing by zero: 2 pi * 5e-7
            assert_close(found[0, i, j].double(), expected, atol=1e-5, rtol=0)


def test_padding_moves_no_cell_of_the_image():
    is_pad = torch.ones(2, 6, 7, dtype=torch.bool)
    is_pad[0, :4, :5] = False
    is_pad[1] = False
    alone = encoder.cell_positions(torch.zeros(1, 4, 5, dtype=torch.bool), 32)
    padded = encoder.cell_positions(is_pad, 32)
    assert_close(padded[:1, :4, :5], alone, atol=0, rtol=0)
    assert padded.isfinite().all()


def test_feed_forward_by_definition():
    ffn = randomise(encoder.feed_forward(8, 32))
    x = random_features()[0].flatten(2).transpose(1, 2)
    hidden = (x @ ffn[0].weight.T + ffn[0].bias).clamp(min=0)
    assert_close(ffn(x), hidden @ ffn[2].weight.T + ffn[2].bias, **EXACT)


def test_layer_by_definition():
    """[Deformable DETR Sec. 4.1] LN(x + attention(x + position)), then LN(x + FFN(x))."""
    layer = randomise(encoder.EncoderLayer(8, 2, 2, 3, 32))
    lay_out = encoder.Encoder(0, 8, 2, 2, 3, 32)
    memory = lay_out(random_features(), padding(random_features(), 32, 48, [(32, 48), (20, 40)]))
    memory = memory._replace(pos=random(2, 30, 8, seed=9))
    centres = encoder.cell_centres(memory.spatial_shapes, memory.valid_ratios.double())
    x = memory.tokens
    read = layer.attn(x + memory.pos, centres, memory)      # values are x, without the position
    x = F.layer_norm(x + read, (8,), layer.norm_attn.weight, layer.norm_attn.bias)
    x = F.layer_norm(x + layer.ffn(x), (8,), layer.norm_ffn.weight, layer.norm_ffn.bias)
    found = layer(memory, centres)
    assert_close(found.tokens, x, **EXACT)
    assert found[1:] == memory[1:]                      # the rest is passed on, the same objects


def test_memory_worked_by_hand():
    """An encoder of no layers only lays out: level after level, row after row."""
    features = random_features()
    pads = padding(features, 32, 48, [(32, 48), (20, 40)])
    memory = encoder.Encoder(0, 8, 2, 2, 3, 32)(features, pads)
    assert memory.spatial_shapes == SHAPES
    for level, start in ((0, 0), (1, 24)):
        h, w = SHAPES[level]
        for i in range(h):
            for j in range(w):
                assert_close(memory.tokens[:, start + i * w + j], features[level][:, :, i, j])
    # image 1: rows 0, 8, 16 of 20 pixels and columns 0 .. 32 of 40: 3 x 5 cells of 4 x 6;
    # rows 0, 16 and columns 0, 16, 32: all 2 x 3 of level 1
    assert memory.is_pad[0].sum() == 0
    expected = [[0, 0, 0, 0, 0, 1]] * 3 + [[1] * 6]
    assert memory.is_pad[1, :24].reshape(4, 6).int().tolist() == expected
    assert memory.is_pad[1, 24:].sum() == 0
    expected = f64([[1., 1.], [1., 1.]], [[5 / 6, 3 / 4], [1., 1.]])
    assert_close(memory.valid_ratios, expected)


def test_what_the_layers_are_given():
    """Position = sines of the cell plus its level's own vector; the same at each layer."""
    net, seen = randomise(encoder.Encoder(2, 8, 2, 2, 3, 32)), []
    for layer in net.layers:
        layer.register_forward_pre_hook(lambda layer, args: seen.append(args))
    pads = padding(random_features(), 32, 48, [(32, 48), (20, 40)])
    memory = net(random_features(), pads)
    expected = torch.cat([encoder.cell_positions(pad, 8, torch.float64).flatten(1, 2) + embed
                          for embed, pad in zip(net.level_embed, pads)], dim=1)
    centres = encoder.cell_centres(SHAPES, memory.valid_ratios)
    for given, references in seen:
        assert_close(given.pos, expected, **EXACT)
        assert_close(references, centres, atol=0, rtol=0)
    assert len(seen) == 2 and seen[1][0].tokens is not seen[0][0].tokens


def test_padding_changes_nothing():
    """A small image in a padded batch, or alone: the same cells come out."""
    net = randomise(encoder.Encoder(2, 8, 2, 2, 3, 32))
    features = random_features(shapes=[(8, 12), (4, 6)])
    pads = padding(features, 64, 96, [(64, 96), (40, 56)])      # the second: 5 x 7 and 3 x 4 cells
    padded = net(features, pads)
    part = [features[0][1:, :, :5, :7], features[1][1:, :, :3, :4]]
    alone = net(part, padding(part, 40, 56, [(40, 56)]))
    assert padded.is_pad[1].logical_not().sum() == 35 + 12
    assert_close(padded.tokens[1][~padded.is_pad[1]], alone.tokens[0], **EXACT)
    other = [x.clone() for x in features]
    for x, h, w in ((other[0], 5, 7), (other[1], 3, 4)):
        x[1, :, h:], x[1, :, :, w:] = 9, 9                  # whatever padding holds is not seen
    on_image = ~padded.is_pad[1]
    assert_close(net(other, pads).tokens[1][on_image], padded.tokens[1][on_image], atol=0, rtol=0)


def test_each_cell_reads_a_few_points_around_itself():
    """[Deformable DETR Sec. 4.1] Fresh, with K = 2: what happens 3 cells away is not seen."""
    torch.manual_seed(0)
    net = encoder.Encoder(1, 16, 8, 1, 2, 32).double()
    features = random_features(B=1, D=16, shapes=[(9, 11)])
    pads = padding(features, 72, 88, [(72, 88)])
    before = net(features, pads).tokens.unflatten(1, (9, 11))
    features[0][0, :, 4, 5] *= -1
    change = (net(features, pads).tokens.unflatten(1, (9, 11)) - before)[0].abs().amax(-1)
    for i in range(9):
        for j in range(11):
            straight = i == 4 or j == 5 or abs(i - 4) == abs(j - 5)         # the eight directions
            is_near = straight and max(abs(i - 4), abs(j - 5)) <= 2
            # offsets start from float32's sines: a point misses its cell's centre by 1e-7 of a cell
            assert (change[i, j] > 1e-3) == is_near and (is_near or change[i, j] < 1e-6)


def test_gradients_reach_every_parameter_and_level():
    net = randomise(encoder.Encoder(1, 8, 2, 2, 3, 32))
    features = [x.requires_grad_() for x in random_features()]
    out = net(features, padding(features, 32, 48, [(32, 48), (20, 40)])).tokens
    assert out.dtype == torch.float64
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6, name
    assert all(x.grad.abs().max() > 1e-3 for x in features)


def test_an_image_smaller_than_a_stride():
    """8 x 5 pixels in a batch beside 64 x 96: one cell on each level, and all numbers finite."""
    net = randomise(encoder.Encoder(2, 8, 2, 2, 3, 32))
    features = random_features(shapes=[(8, 12), (4, 6)])
    memory = net(features, padding(features, 64, 96, [(64, 96), (8, 5)]))
    assert memory.is_pad[1].logical_not().sum() == 2
    assert memory.tokens.isfinite().all()
    assert_close(memory.valid_ratios[1], f64([1 / 12, 1 / 8], [1 / 6, 1 / 4]))
    assert isinstance(memory, attention.Memory)
