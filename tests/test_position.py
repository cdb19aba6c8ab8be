"""Sine embeddings: values, order of channels, padding [Attention Is All You Need 3.5]."""
import math

import torch
from torch.testing import assert_close

from detr_min import boxes, encoder

EXACT = dict(atol=1e-12, rtol=0)


def by_definition(x, d):
    """PE(x)[2i] = sin(2 pi x / T^(2i/d)), PE(x)[2i+1] = cos of the same, for one number."""
    out = torch.zeros(d, dtype=torch.float64)
    for channel in range(d):
        angle = 2 * math.pi * x / 10000 ** (2 * (channel // 2) / d)
        out[channel] = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
    return out


def test_sine_worked_by_hand():
    # d = 4: wavelengths 1 and 10000^(2/4) = 100. x = 1/4: angles pi/2 and pi/200
    slow = math.pi / 200
    expected = torch.tensor([1, 0, math.sin(slow), math.cos(slow)], dtype=torch.float64)
    assert_close(boxes.sine(torch.tensor(0.25, dtype=torch.float64), 4), expected, **EXACT)


def test_sine_by_definition():
    x = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([by_definition(v, 12) for v in x.flatten().tolist()]).reshape(3, 5, 12)
    assert_close(boxes.sine(x, 12), expected, **EXACT)


def test_a_shift_is_the_same_everywhere():
    """Why sines: the inner product of two positions depends on their distance alone."""
    x = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    products = (boxes.sine(x, 16) * boxes.sine(x + 0.07, 16)).sum(-1)
    assert_close(products, products[:1].expand(3), **EXACT)
    assert products[0] < 8 - 1e-3               # at distance 0 it is d/2 = 8


def test_points_have_the_y_half_first():
    point = torch.tensor([[0.2, 0.7]], dtype=torch.float64)                         # x = .2, y = .7
    expected = torch.cat([by_definition(0.7, 8), by_definition(0.2, 8)])
    assert_close(boxes.embed_points(point, 16)[0], expected, **EXACT)


def test_boxes_are_in_the_order_cx_cy_w_h():
    box = torch.tensor([[0.2, 0.7, 0.1, 0.4]], dtype=torch.float64)
    expected = torch.cat([by_definition(v, 8) for v in (0.2, 0.7, 0.1, 0.4)])
    assert_close(boxes.embed_boxes(box, 16)[0], expected, **EXACT)       # 2 D = 32 channels


def test_cells_are_measured_on_the_image():
    """Of 3 x 5 cells 2 x 4 are image: cell (i, j) lies at x = (j + .5)/4, y = (i + .5)/2."""
    is_pad = torch.ones(1, 3, 5, dtype=torch.bool)
    is_pad[0, :2, :4] = False
    found = encoder.cell_positions(is_pad, 16)
    assert found.shape == (1, 3, 5, 16)
    for i in range(2):
        for j in range(4):
            expected = torch.cat([by_definition((i + .5) / 2, 8), by_definition((j + .5) / 4, 8)])
            # float32, and the 1e-6 that keeps all-padding rows from dividing by zero: 2 pi * 5e-7
            assert_close(found[0, i, j].double(), expected, atol=1e-5, rtol=0)


def test_padding_changes_no_cell_of_the_image():
    is_pad = torch.ones(2, 6, 7, dtype=torch.bool)
    is_pad[0, :4, :5] = False
    is_pad[1] = False
    alone = encoder.cell_positions(torch.zeros(1, 4, 5, dtype=torch.bool), 32)
    padded = encoder.cell_positions(is_pad, 32)
    assert_close(padded[:1, :4, :5], alone, atol=0, rtol=0)
    assert padded.isfinite().all()
