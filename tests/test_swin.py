"""Swin Transformer: torchvision's where they agree, the definition in loops where they do not."""
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.testing import assert_close
from torchvision.models import swin_transformer

import helpers
from detr_min.release import swin
from helpers import EXACT

TINY = dict(width=8, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=3)


def randomise(module):
    """In eval mode: no path is dropped."""
    return helpers.randomise(module).eval()


# Windows


def test_split_worked_by_hand():
    x = torch.arange(24.).reshape(1, 4, 6, 1)           # rows 0..5, 6..11, 12..17, 18..23
    windows = swin.split(x, 2)
    assert windows.shape == (1, 6, 4, 1)
    assert windows[0, 0].flatten().tolist() == [0, 1, 6, 7]
    assert windows[0, 1].flatten().tolist() == [2, 3, 8, 9]             # to the right, then down
    assert windows[0, 5].flatten().tolist() == [16, 17, 22, 23]


def test_join_undoes_split():
    x = torch.randn(2, 6, 9, 5)
    assert torch.equal(swin.join(swin.split(x, 3), 6, 9, 3), x)


def test_rolled_apart_worked_by_hand():
    """One window of 4 x 4, moved by 2: its four quarters come from the map's four corners."""
    [[apart]] = swin.rolled_apart(4, 4, 4, 2)
    quarter = torch.tensor([0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2)
    assert_close(apart, -100.0 * (quarter[:, None] != quarter))
    # of 2 x 2 windows the first holds no stranger, the last one four parties
    apart = swin.rolled_apart(8, 8, 4, 2)
    assert apart.shape == (4, 1, 16, 16)
    assert [len(a[0].unique(dim=0)) for a in apart] == [1, 2, 2, 4]


def attention_by_definition(net, x, size, shift):
    """Cells attend to one another where the moved grid of windows has them in one cell of it.

    The grid's lines lie at shift, shift + size, ...; what it cuts off at the border are windows
    too, only smaller. No roll, no mask.
    """
    h, w, C = x.shape
    H, W, heads = -(-h // size) * size, -(-w // size) * size, net.num_heads
    padded = torch.zeros(H, W, C).double()
    padded[:h, :w] = x
    q, k, v = (padded @ net.qkv.weight.T + net.qkv.bias).reshape(H, W, 3, heads, -1).unbind(2)
    table, out = net.relative_position_bias_table, torch.zeros(h, w, heads, C // heads).double()
    for i in range(h):
        for j in range(w):
            window = [(a, b) for a in range(H) for b in range(W)
                      if (a - shift) // size == (i - shift) // size
                      and (b - shift) // size == (j - shift) // size]
            for head in range(heads):
                scores = torch.stack([
                    q[i, j, head] @ k[a, b, head] / (C // heads) ** 0.5
                    + table[(i - a + size - 1) * (2 * size - 1) + j - b + size - 1, head]
                    for a, b in window])
                for share, (a, b) in zip(scores.softmax(0), window):
                    out[i, j, head] += share * v[a, b, head]
    return out.flatten(2) @ net.proj.weight.T + net.proj.bias


@pytest.mark.parametrize("h, w", [(7, 5), (6, 6), (2, 3), (3, 7), (1, 1)])
@pytest.mark.parametrize("size, shift", [(3, 1), (3, 0), (4, 2)])
@torch.no_grad()
def test_attention_by_definition(h, w, size, shift):
    """[Swin Eq. 4] also on maps one window high or wide, and on padded ones."""
    net = randomise(swin.WindowAttention(8, [size, size], [shift, shift], 2))
    x = torch.randn(2, h, w, 8).double()
    found = net(x)
    for image in range(2):
        assert_close(found[image], attention_by_definition(net, x[image], size, shift), **EXACT)


@torch.no_grad()
def test_torchvision_does_not_move_a_single_window_and_we_do():
    """[DAC-DETR release] The reason for this file's own attention."""
    ours = randomise(swin.WindowAttention(8, [4, 4], [2, 2], 2))
    theirs = swin_transformer.ShiftedWindowAttention(8, [4, 4], [2, 2], 2).double().eval()
    theirs.load_state_dict(ours.state_dict())
    larger, single = torch.randn(1, 8, 5, 8).double(), torch.randn(1, 4, 4, 8).double()
    assert_close(ours(larger), theirs(larger), **EXACT)
    assert (ours(single) - theirs(single)).abs().max() > 1e-2


# The whole network


def torchvisions(ours, config):
    """torchvision's Swin with the same weights."""
    theirs = torchvision.models.SwinTransformer(
        [4, 4], config["width"], [*config["depths"]], [*config["heads"]], [config["window"]] * 2)
    theirs.features[0].load_state_dict(ours.patches.state_dict())
    for parts, first in ((ours.stages, 1), (ours.merges, 2)):
        for part, their_part in zip(parts, theirs.features[first::2], strict=True):
            their_part.load_state_dict(part.state_dict())
    return theirs.double().eval()


@torch.no_grad()
def test_levels_are_torchvisions_where_no_map_is_one_window():
    """Maps of 26 x 35, 13 x 18, 7 x 9 and 4 x 5 cells, windows of 3: all padded, two merged odd."""
    ours = randomise(swin.Swin(**TINY))
    theirs, images = torchvisions(ours, TINY), torch.randn(2, 3, 101, 138).double()
    x, expected = F.pad(images, (0, 2, 0, 3)), []           # the picture to whole patches of 4 x 4
    for part in theirs.features:
        x = part(x)
        expected.append(x)
    for level, stage, norm in zip(ours(images), expected[3::2], ours.norms, strict=True):
        stage = F.layer_norm(stage, stage.shape[-1:], norm.weight, norm.bias)
        assert_close(level, stage.permute(0, 3, 1, 2), **EXACT)


@torch.no_grad()
def test_merging_joins_four_cells_in_the_original_order():
    """Top left, bottom left, top right, bottom right: torchvision's order is the original's."""
    merge = randomise(swin.Swin(**TINY)).merges[0]
    x = torch.randn(1, 3, 2, 8).double()                    # 3 rows: a row of zeros is added
    zero = torch.zeros(8).double()
    upper = torch.cat([x[0, 0, 0], x[0, 1, 0], x[0, 0, 1], x[0, 1, 1]])
    lower = torch.cat([x[0, 2, 0], zero, x[0, 2, 1], zero])
    expected = [merge.reduction.weight @ F.layer_norm(four, (32,), merge.norm.weight,
                                                      merge.norm.bias) for four in (upper, lower)]
    assert_close(merge(x)[0, :, 0], torch.stack(expected), **EXACT)


@pytest.mark.parametrize("h, w", [(64, 96), (37, 50), (8, 5), (1, 1)])
def test_any_size_has_strides_8_16_32(h, w):
    net = swin.Swin(**TINY).eval()
    levels = net(torch.randn(2, 3, h, w))
    assert [tuple(x.shape) for x in levels] == [
        (2, channels, -(-h // stride), -(-w // stride))
        for channels, stride in zip(net.channels, (8, 16, 32))]
    assert all(x.isfinite().all() for x in levels)


def test_defaults_are_swin_l_and_nothing_is_frozen():
    with torch.device("meta"):
        net = swin.Swin()
    assert net.channels == [384, 768, 1536]
    assert [len(stage) for stage in net.stages] == [2, 2, 18, 2]
    assert [stage[0].attn.num_heads for stage in net.stages] == [6, 12, 24, 48]
    tables = {block.attn.relative_position_bias_table.shape[0]
              for stage in net.stages for block in stage}
    assert tables == {529}                                              # (2 * 12 - 1)^2
    assert [block.attn.shift_size for block in net.stages[2]] == [[0, 0], [6, 6]] * 9
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_every_parameter_gets_a_gradient():
    net = swin.Swin(**TINY, drop_path=0.0)
    levels = net(torch.randn(1, 3, 70, 100))
    sum((level * torch.randn_like(level)).sum() for level in levels).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_drop_path_grows_with_depth_and_is_off_in_eval():
    net = swin.Swin(**TINY, drop_path=0.7)
    drops = [block.stochastic_depth.p for stage in net.stages for block in stage]
    assert_close(torch.tensor(drops), torch.arange(8) * 0.1)
    images = torch.randn(1, 3, 40, 40)
    assert torch.equal(net.eval()(images)[-1], net(images)[-1])
    assert not torch.equal(net.train()(images)[-1], net(images)[-1])


def test_training_keeps_little_and_has_the_gradients_of_the_blocks_run_once():
    """The same random paths are dropped in the second run of a block."""
    net, images = swin.Swin(**TINY, drop_path=0.7).train(), torch.randn(2, 3, 48, 48)

    def train(blocks):
        net.blocks, kept = blocks, []
        torch.manual_seed(1)
        net.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = sum(level.square().sum() for level in net(images))
        loss.backward()
        return sum(kept), [parameter.grad.clone() for parameter in net.parameters()]

    kept_twice, twice = train(net.blocks)
    kept_once, once = train(lambda stage, x: stage(x))
    assert kept_twice < kept_once / 4
    assert all(torch.equal(a, b) for a, b in zip(twice, once))
