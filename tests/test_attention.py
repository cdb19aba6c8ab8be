"""Deformable attention against hands, loops and analytic maps [Deformable DETR Eq. 2-3]."""
import ast
import importlib.util
import math
import pathlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detr_min import attention
from helpers import EXACT, memory_of, padded_memory, random, randomise

SHAPES = [(4, 6), (2, 3)]                   # not square, so that h and w cannot be confused


def bilinear(cells, x, y):
    """What a map (h, w, d) holds at (x, y) in [0, 1]: its four cells, none beyond the border."""
    h, w, _ = cells.shape
    column, row = x * w - 0.5, y * h - 0.5          # a cell's centre lies at a whole number
    found = cells.new_zeros(cells.shape[2])
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < h and 0 <= j < w:
                found += (1 - abs(row - i)) * (1 - abs(column - j)) * cells[i, j]
    return found


def by_definition(value, spatial_shapes, locations, weights):
    """[Deformable DETR Eq. 3] in loops."""
    B, N, H, L, K, _ = locations.shape
    out = value.new_zeros(B, N, H, value.shape[-1])
    for b in range(B):
        start = 0
        for level, (h, w) in enumerate(spatial_shapes):
            cells = value[b, start:start + h * w].reshape(h, w, H, -1)
            start += h * w
            for n in range(N):
                for head in range(H):
                    for k in range(K):
                        x, y = locations[b, n, head, level, k].tolist()
                        found = bilinear(cells[:, :, head], x, y)
                        out[b, n, head] += weights[b, n, head, level, k] * found
    return out.flatten(2)


def one_map(cells):
    """A single map (h, w, d) as value, one head."""
    return cells.flatten(0, 1)[None, :, None], [tuple(cells.shape[:2])]


def read(cells, points):
    """What each of the points (N, 2) finds on a map (h, w, d): (N, d)"""
    value, shapes = one_map(cells)
    locations = points[None, :, None, None, None]
    weights = locations.new_ones(1, len(points), 1, 1, 1)
    return attention.deformable_attention(value, shapes, locations, weights)[0]


def random_inputs(B=2, N=5, H=2, K=3, d=3, seed=0):
    """Values, locations (a third of them outside the map) and weights for SHAPES."""
    value = random(B, 30, H, d, seed=seed)
    locations = 0.5 + 0.5 * random(B, N, H, 2, K, 2, seed=seed + 1)
    weights = random(B, N, H, 2 * K, seed=seed + 2).softmax(-1).unflatten(-1, (2, K))
    return value, locations, weights


# deformable_attention: the arithmetic


def test_worked_by_hand():
    """[Deformable DETR Eq. 3] one query, one head, two levels, two points."""
    value = torch.tensor([1., 3., 10.]).reshape(1, 3, 1, 1)
    shapes = [(1, 2), (1, 1)]                       # level 0: the row 1, 3; level 1: a single 10
    # level 0: between 1 and 3, 2; half over the left edge of 1, .5
    # level 1: the cell's centre, 10; half over its lower edge, 5
    locations = torch.tensor([[[.5, .5], [0., .5]], [[.5, .5], [.5, 1.]]])
    weights = torch.tensor([[.1, .2], [.3, .4]])
    out = attention.deformable_attention(value, shapes, locations.reshape(1, 1, 1, 2, 2, 2),
                                         weights.reshape(1, 1, 1, 2, 2))
    assert_close(out, torch.tensor([[[.1 * 2 + .2 * .5 + .3 * 10 + .4 * 5]]]))              # 5.3


def test_by_definition():
    """[Deformable DETR Eq. 3] in loops, non-square levels, points inside and outside."""
    value, locations, weights = random_inputs()
    outside = ((locations < 0) | (locations > 1)).any(-1).double().mean()
    assert 0.2 < outside < 0.8
    assert_close(attention.deformable_attention(value, SHAPES, locations, weights),
                 by_definition(value, SHAPES, locations, weights), **EXACT)


def test_a_constant_map_gives_the_constant():
    cells = torch.tensor([2.0, -7.0]).expand(5, 3, 2)
    points = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    inner = torch.stack([1 / 6 + points[:, 0] * 4 / 6, 0.1 + points[:, 1] * 0.8], dim=1)
    assert_close(read(cells, inner), cells[0, 0].expand(20, 2))     # inside the outermost centres


def test_a_map_of_coordinates_gives_the_point():
    """Channel 0 holds each centre's x, channel 1 its y: bilinear reading is exact on them."""
    y, x = torch.meshgrid((torch.arange(5) + 0.5) / 5, (torch.arange(3) + 0.5) / 3, indexing="ij")
    points = torch.tensor([[0.2, 0.7], [0.5, 0.5], [0.81, 0.13], [0.33, 0.9]])
    assert_close(read(torch.stack([x, y], dim=-1), points), points)


def test_the_centre_of_a_cell_gives_the_cell():
    cells = random(4, 7, 2)
    points = torch.tensor([[(j + 0.5) / 7, (i + 0.5) / 4] for i in range(4) for j in range(7)],
                          dtype=torch.float64)
    assert_close(read(cells, points), cells.flatten(0, 1), **EXACT)


def test_zero_beyond_the_map():
    """Half a cell beyond the border a map has faded to zero, not stopped at its last value."""
    cells = torch.full((2, 4, 1), 8.0)                      # a cell is 1/4 wide and 1/2 high
    # half a cell beyond each side; far away; on an edge: half of 8; in a corner: a quarter
    points = torch.tensor([[-1 / 8, .5], [1 + 1 / 8, .5], [.5, -1 / 4], [.5, 1 + 1 / 4],
                           [9., 9.], [0., .5], [0., 0.]])
    assert_close(read(cells, points)[:, 0], torch.tensor([0., 0., 0., 0., 0., 4., 2.]))


def test_the_order_of_levels_does_not_matter():
    value, locations, weights = random_inputs()
    swapped = torch.cat([value[:, 24:], value[:, :24]], dim=1)
    out = attention.deformable_attention(swapped, SHAPES[::-1], locations.flip(3), weights.flip(3))
    assert_close(out, attention.deformable_attention(value, SHAPES, locations, weights), **EXACT)


def test_each_head_reads_its_own_channels():
    value, locations, weights = random_inputs(H=2, d=3)
    out = attention.deformable_attention(value, SHAPES, locations, weights)
    value[:, :, 1] += 1
    change = attention.deformable_attention(value, SHAPES, locations, weights) - out
    assert_close(change[..., :3], torch.zeros(2, 5, 3, dtype=torch.float64))
    assert (change[..., 3:].abs() > 1e-3).all(), f"head 1's channels changed by {change[..., 3:]}"


def test_gradients():
    """Against finite differences, in every input; points keep off the kinks between centres."""
    value, locations, weights = random_inputs(B=1, N=2, H=2, K=2, d=2)
    size = torch.tensor([[6, 4], [3, 2]])[:, None].double()                 # (w, h) of each level
    cell = locations * size - 0.5
    locations = (cell.floor() + (cell - cell.floor()).clamp(0.1, 0.9) + 0.5) / size
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    assert torch.autograd.gradcheck(
        lambda value, *at: attention.deformable_attention(value, SHAPES, *at), inputs)


def shares_of(position, size):
    """attention.neighbours as one row of cells for each position: the share of each. (P, size)"""
    pairs = list(attention.neighbours(position, torch.tensor(size)))
    assert len(pairs) == 2, f"two cells a position are wanted, got {len(pairs)}"
    row = position.new_zeros(len(position), size)
    for cell, share in pairs:
        assert cell.dtype == torch.int32, f"cells count rows of a table, in int32: {cell.dtype}"
        assert 0 <= cell.min() and cell.max() < size, f"{cell.tolist()} is not on 0 .. {size - 1}"
        row = row.scatter_add(1, cell[:, None].long(), share[:, None])
    return row


def test_neighbours_worked_by_hand():
    """A quarter of the way from cell 1 to cell 2 of four, and at the centre of cell 3."""
    row = shares_of(torch.tensor([1.25, 3.]), 4)
    assert_close(row, torch.tensor([[0, .75, .25, 0], [0, 0, 0, 1]]))


def test_neighbours_beyond_the_map():
    """Half a cell over the edge half is left, a whole cell over it nothing, and so on for ever."""
    row = shares_of(torch.tensor([-.5, -.75, 2.25, -1., 3., 1e6, -1e6]), 3)
    assert_close(row, torch.tensor([[.5, 0, 0], [.25, 0, 0], [0, 0, .75]] + [[0, 0, 0]] * 4))


def test_a_position_that_is_no_number_reads_cells_of_the_map_and_no_number_of_them():
    """In C++ the integer of NaN may be any: rows beyond the table would be read."""
    for cell, share in attention.neighbours(torch.tensor([math.nan]), torch.tensor(3)):
        assert 0 <= cell.item() < 3 and share.isnan().all()
    value, locations, weights = (x.float() for x in random_inputs())
    locations[0, 2] = math.nan
    out = attention.ms_deform_attn(value, SHAPES, locations, weights)
    assert out[0, 2].isnan().all() and out.isnan().any(-1).sum() == 1


def test_neighbours_by_definition():
    """A cell's share is 1 - its distance, if that is positive; its slope is 1 up and 1 down."""
    position = 3 * random(50, seed=3) + 2
    position.requires_grad_()
    row, weights = shares_of(position, 5), random(5, seed=4)
    gradient, = torch.autograd.grad((row * weights).sum(), position)
    expected, slope = torch.zeros(50, 5).double(), torch.zeros(50).double()
    for n, at in enumerate(position.tolist()):
        for cell in range(5):
            expected[n, cell] = max(0, 1 - abs(at - cell))
            slope[n] += weights[cell] * (abs(at - cell) < 1) * math.copysign(1, cell - at)
    assert_close(row.detach(), expected, **EXACT)
    assert_close(gradient, slope, **EXACT)


def test_by_rows_by_definition():
    """The CPU's form of [Deformable DETR Eq. 3], far points and points on borders included."""
    value, locations, weights = random_inputs()
    locations[0, 0, 0, 0] = torch.tensor([[0., 1.], [1e6, -1e6], [0.5, -0.125]])
    assert_close(attention.by_rows(value, SHAPES, locations, weights),
                 by_definition(value, SHAPES, locations, weights), **EXACT)


def test_by_rows_has_the_same_gradients():
    """Value has 2 * 30 * 2 = 120 rows; a sum has 4 * 2 * K terms: fewer, then more than that."""
    for K in (3, 20):
        inputs, found = random_inputs(K=K), []
        for form in (attention.deformable_attention, attention.by_rows):
            value, locations, weights = [x.clone().requires_grad_() for x in inputs]
            out = form(value, SHAPES, locations, weights)
            (out * random(*out.shape, seed=9)).sum().backward()
            found.append([out, value.grad, locations.grad, weights.grad])
        for plain, rows in zip(*found):
            assert_close(rows, plain, **EXACT)


@pytest.mark.parametrize("attend", [attention.deformable_attention, attention.ms_deform_attn])
def test_shapes_that_do_not_add_up(attend):
    value, locations, weights = (x.float() for x in random_inputs())
    with pytest.raises(ValueError, match="30 cells.*levels missing"):
        attend(value, SHAPES[:1], locations[:, :, :, :1], weights[:, :, :, :1])


# ms_deform_attn: the same for other projects


def lone_file(tmp_path):
    """attention.py copied away from its package, as a module of another project."""
    copy = tmp_path / "attention_of_another_project.py"
    copy.write_text(pathlib.Path(attention.__file__).read_text())
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_needs_torch_and_scipy_alone():
    names = set()
    for node in ast.walk(ast.parse(pathlib.Path(attention.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch", "scipy"}


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_lone_file_takes_the_place_of_the_shared_function(tmp_path, dtype, atol):
    """Its arguments by position and by name, shapes as the tensor that other projects pass."""
    value, locations, weights = (x.to(dtype) for x in random_inputs())
    shapes = torch.tensor(SHAPES)
    drop_in = lone_file(tmp_path).ms_deform_attn
    want = by_definition(value, SHAPES, locations, weights)
    assert_close(drop_in(value, shapes, locations, weights), want, atol=atol, rtol=0)
    assert_close(drop_in(value=value, value_spatial_shapes=shapes, sampling_locations=locations,
                         attention_weights=weights), want, atol=atol, rtol=0)


def test_the_fast_form_has_the_definition_s_gradients_in_float32():
    found = []
    for form in (attention.deformable_attention, attention.ms_deform_attn):
        inputs = [x.float().requires_grad_() for x in random_inputs(N=60, d=8)]
        value, locations, weights = inputs
        out = form(value, SHAPES, locations, weights)
        (out * random(*out.shape, seed=9).float()).sum().backward()
        found.append([out, *(x.grad for x in inputs)])
    for plain, fast in zip(*found):
        assert_close(fast, plain, atol=1e-5 * plain.abs().max().item(), rtol=0)


def test_the_fast_form_is_chosen_where_it_is_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(attention, "by_rows", lambda *args: chosen.append("rows"))
    monkeypatch.setattr(attention, "deformable_attention", lambda *args: chosen.append("plain"))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        value, locations, weights = (x.to(dtype) for x in random_inputs())
        attention.ms_deform_attn(value, SHAPES, locations, weights)
    assert chosen == ["rows", "plain", "plain"]


# DeformableAttention: where to look


def a_memory():
    """Of the second image half the rows and a third of the columns are padding."""
    return padded_memory(16, SHAPES)


def a_module(D=16, H=4, L=2, K=3):
    return randomise(attention.DeformableAttention(D, H, L, K))


def test_initial_points_form_a_ring_in_eight_directions():
    """At first every query looks alike: head h in direction h/8 of a turn, point k at k steps."""
    module = attention.DeformableAttention(16, 8, 2, 4)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    ring = torch.tensor([[[(k * x, k * y) for k in (1, 2, 3, 4)]] * 2 for x, y in directions])
    offsets = module.sampling_offsets(torch.randn(3, 5, 16)).unflatten(-1, (8, 2, 4, 2))
    assert_close(offsets, ring.float().expand(3, 5, 8, 2, 4, 2))
    assert_close(module.attention_weights(torch.randn(5, 16)), torch.zeros(5, 64))


def test_initial_points_reach_from_the_centre_to_the_edge_of_a_box():
    """8 heads, K = 4: to the right at 1/4, 2/4, 3/4, 4/4 of half the width. Each weighs 1/(L K)."""
    module, memory = attention.DeformableAttention(16, 8, 2, 4), padded_memory(16, SHAPES, B=1)
    memory = memory._replace(valid_ratios=memory.valid_ratios.float())
    box = torch.tensor([[[0.5, 0.4, 0.2, 0.6]]])
    locations, weights = module.look(torch.randn(1, 1, 16), box, memory)
    right = torch.tensor([[.525, .4], [.55, .4], [.575, .4], [.6, .4]])
    down = torch.tensor([[.5, .475], [.5, .55], [.5, .625], [.5, .7]])
    assert_close(locations[0, 0, 0, 0], right)
    assert_close(locations[0, 0, 2, 1], down)
    assert_close(weights, torch.full((1, 1, 8, 2, 4), 1 / 8))


def test_look_worked_by_hand():
    """[Deformable DETR Eq. 2-3] around a point, then around a box; the left half is image."""
    module = attention.DeformableAttention(4, 1, 1, 2)
    module.sampling_offsets.bias.data = torch.tensor([1., 3., -1., 0.])             # K = 2 points
    memory = attention.Memory(torch.randn(1, 40, 4), torch.zeros(1, 40, dtype=torch.bool),
                              [(4, 10)], valid_ratios=torch.tensor([[[0.5, 1.0]]]))
    queries = torch.randn(1, 1, 4)
    point, box = torch.tensor([[[0.4, 0.2]]]), torch.tensor([[[0.4, 0.2, 0.4, 0.8]]])
    # centre (.4 * .5, .2 * 1) = (.2, .2); a cell is 1/10 wide and 1/4 high
    locations, _ = module.look(queries, point, memory)
    assert_close(locations.flatten(0, 4), torch.tensor([[.2 + .1, .2 + .75], [.2 - .1, .2]]))
    # half the box is .2 * .5 = .1 wide, .4 high; an offset counts halves of that, K = 2
    locations, _ = module.look(queries, box, memory)
    assert_close(locations.flatten(0, 4), torch.tensor([[.2 + .05, .2 + .6], [.2 - .05, .2]]))


@pytest.mark.parametrize("size", [2, 4])
def test_module_by_definition(size):
    """[Deformable DETR Eq. 2-3] the module in loops, padded, around points and around boxes."""
    D, H, L, K, N = 16, 4, 2, 3, 5
    module, memory = a_module(D, H, L, K), a_memory()
    queries, references = random(2, N, D, seed=1), random(2, N, size, seed=2).sigmoid()

    def linear(layer, x):
        return x @ layer.weight.T + layer.bias

    value = linear(module.value_proj, memory.tokens)
    for b in range(2):
        for s in range(30):
            if memory.is_pad[b, s]:
                value[b, s] = 0
    locations, weights = torch.zeros(2, N, H, L, K, 2).double(), torch.zeros(2, N, H, L, K).double()
    for b in range(2):
        for n in range(N):
            offset = linear(module.sampling_offsets, queries[b, n]).reshape(H, L, K, 2)
            score = linear(module.attention_weights, queries[b, n]).reshape(H, L * K).exp()
            for head in range(H):
                weights[b, n, head] = (score[head] / score[head].sum()).reshape(L, K)
                for level, (h, w) in enumerate(SHAPES):
                    for k in range(K):
                        for axis, cells in ((0, w), (1, h)):
                            ratio = memory.valid_ratios[b, level, axis]
                            step = 1 / cells
                            if size == 4:
                                step = references[b, n, 2 + axis] * ratio / K / 2
                            centre = references[b, n, axis] * ratio
                            move = offset[head, level, k, axis] * step
                            locations[b, n, head, level, k, axis] = centre + move
    expected = by_definition(value.reshape(2, 30, H, D // H), SHAPES, locations, weights)
    assert_close(module(queries, references, memory), linear(module.output_proj, expected),
                 **EXACT)


@pytest.mark.parametrize("size", [2, 4])
def test_padding_changes_nothing(size):
    """The top left part of a padded level, or that part alone: the same answer."""
    module, full = a_module(), [(8, 12), (4, 6)]
    memory = padded_memory(16, full)            # 4 x 8 and 2 x 4 cells of the second are image
    levels = memory.tokens[1:].split([96, 24], dim=1)
    alone = memory_of([x.transpose(1, 2).unflatten(2, cells)[:, :, :h, :w]
                       for x, cells, (h, w) in zip(levels, full, [(4, 8), (2, 4)])])
    queries, references = random(2, 5, 16, seed=1), random(2, 5, size, seed=2).sigmoid()
    expected = module(queries[1:], references[1:], alone)
    assert_close(module(queries, references, memory)[1:], expected, **EXACT)


def test_what_lies_on_padding_is_not_seen():
    module, memory = a_module(), a_memory()
    queries, references = random(2, 5, 16, seed=1), random(2, 5, 4, seed=2).sigmoid()
    out = module(queries, references, memory)
    noisy = memory._replace(tokens=memory.tokens + 1e6 * memory.is_pad[..., None])
    assert_close(module(queries, references, noisy), out, atol=0, rtol=0)


def test_each_query_is_read_alone():
    """Nudge query 0: no other output moves."""
    module, memory = a_module(), a_memory()
    queries, references = random(2, 5, 16, seed=1), random(2, 5, 4, seed=2).sigmoid()
    nudged = queries.clone()
    nudged[:, 0] += 0.1
    change = module(nudged, references, memory) - module(queries, references, memory)
    change = change.abs().amax((0, 2))                                                      # (N,)
    assert change[0] > 1e-3 and (change[1:] == 0).all()


def test_points_are_placed_in_float32_under_autocast(monkeypatch):
    """bfloat16 has 8 bits: between 1/2 and 1 its numbers are 1/256 apart, 0.4 of 100 cells."""
    seen, plain, rows = [], attention.deformable_attention, attention.by_rows

    def spy_on(arithmetic):
        def spy(value, spatial_shapes, locations, weights):
            seen.extend([value.dtype, locations.dtype, weights.dtype])
            seen.append(torch.is_autocast_enabled("cpu"))
            return arithmetic(value, spatial_shapes, locations, weights)
        return spy

    monkeypatch.setattr(attention, "deformable_attention", spy_on(plain))
    monkeypatch.setattr(attention, "by_rows", spy_on(rows))
    memory = a_memory()
    memory = memory._replace(tokens=memory.tokens.float(), valid_ratios=memory.valid_ratios.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        references = random(2, 5, 4).sigmoid().float()
        out = a_module().float()(random(2, 5, 16).float(), references, memory)
    assert seen == [torch.float32, torch.float32, torch.float32, False]
    assert out.isfinite().all()


def test_wrong_references_and_widths():
    with pytest.raises(ValueError, match="references .* 3 numbers: points"):
        a_module()(random(2, 5, 16), random(2, 5, 3), a_memory())
    with pytest.raises(ValueError, match="d_model 16 cannot be split over 3 heads"):
        attention.DeformableAttention(16, 3, 2, 4)


def test_one_point_on_every_cell_is_ordinary_attention():
    """With a point on each cell's centre it is softmax attention over the cells."""
    cells, scores = random(12, 3, seed=1), random(2, 12, seed=2)            # 3 x 4 cells, 2 queries
    centres = torch.tensor([[(j + .5) / 4, (i + .5) / 3] for i in range(3) for j in range(4)],
                           dtype=torch.float64)
    out = attention.deformable_attention(cells[None, :, None], [(3, 4)],
                                         centres.expand(1, 2, 1, 1, 12, 2),
                                         scores.softmax(-1)[None, :, None, None])
    keys = torch.eye(12, dtype=torch.float64)               # so that query . key = score
    expected = F.scaled_dot_product_attention(scores, keys, cells, scale=1.0)
    assert_close(out[0], expected, **EXACT)


def test_shapes_that_do_not_add_up_are_named():
    """Level 0 has 24 cells, value 30: the error is a ValueError and says one of these numbers."""
    value, locations, weights = random_inputs()
    with pytest.raises(ValueError) as error:
        attention.deformable_attention(value, SHAPES[:1], locations[:, :, :, :1],
                                       weights[:, :, :, :1])
    says = str(error.value)
    assert any(number in says for number in ("24", "30", str(SHAPES[0]))), f"no number in: {says}"
