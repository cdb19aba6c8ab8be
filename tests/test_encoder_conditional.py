"""DETR's encoder: cells counted from one, padding that changes nothing."""
import helpers
import torch
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
    memory = encoder([x], is_pad)
    assert memory.spatial_shapes == [(4, 6)] and memory.is_pad[1].sum() == 16
    assert_close(memory.valid_ratios[1, 0], torch.tensor([4 / 6, 2 / 4]))
    noise = encoder([x + 9 * memory.is_pad.unflatten(1, (4, 6))[:, None]], is_pad)
    on_image = ~memory.is_pad
    assert_close(memory.tokens[on_image], noise.tokens[on_image], atol=1e-12, rtol=0)
