"""Where queries come from: learned, or from the encoder's best boxes."""
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detr_min import attention, position, query_gen

EXACT = dict(atol=1e-12, rtol=0)
SHAPES = [(4, 6), (2, 3)]
D, C = 8, 3


def randomise(module, seed=0):
    """Random in every parameter: zeros and ones hide mistakes."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double()


def share(is_pad):
    """Of a row or a column of cells, the share that is image."""
    return (~is_pad).double().mean(-1)


def a_memory(shapes=SHAPES, B=2):
    """Random cells; of the second image 2 x 4 and 1 x 2 cells are image."""
    pads = [torch.zeros(B, h, w, dtype=torch.bool) for h, w in shapes]
    for pad, (h, w) in zip(pads, shapes):
        pad[1:, h // 2:], pad[1:, :, w * 2 // 3:] = True, True
    ratios = [torch.stack([share(p[:, 0]), share(p[:, :, 0])], -1) for p in pads]       # (x, y)
    tokens = torch.randn(B, sum(h * w for h, w in shapes), D, dtype=torch.float64,
                         generator=torch.Generator().manual_seed(0))
    is_pad = torch.cat([p.flatten(1) for p in pads], dim=1)
    return attention.Memory(tokens, is_pad, list(shapes), torch.stack(ratios, dim=1))


# Learned queries


def test_learned_queries():
    """[Deformable DETR Sec. 4.1] the same for every image; the point is read off the position."""
    ask = randomise(query_gen.LearnedQueries(5, D, 4, num_sets=2))
    queries = ask(a_memory())
    pos, content = ask.pos_and_content[:, :D], ask.pos_and_content[:, D:]
    linear = ask.reference_points
    for image in range(2):
        assert_close(queries.pos[0, image], pos, **EXACT)
        assert_close(queries.content[0, image], content, **EXACT)
        points = (pos @ linear.weight.T + linear.bias).sigmoid()
        assert_close(queries.ref_boxes[image], points, **EXACT)
    assert queries.content.shape == queries.pos.shape == (2, 2, 5, D)
    assert queries.ref_boxes.shape == (2, 5, 2) and queries.proposals is None
    queries.ref_boxes.sum().backward()                  # points are learned: nothing is detached
    assert linear.weight.grad.abs().max() > 1e-3 and ask.pos_and_content.grad.abs().max() > 1e-3


# Two-stage queries

BOTH = [query_gen.TwoStageQueries, query_gen.UnmixedTwoStageQueries]


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("num_sets", [1, 2])
def test_two_stage_by_definition(cls, num_sets):
    """Content is learned [DINO Sec. 3.4], or comes from the box [Deformable DETR App. A.4]."""
    ask, memory = randomise(cls(5, D, C, num_sets)), a_memory()
    queries = ask(memory)
    proposals = ask.mini_detector(memory)
    for b in range(2):
        order = sorted(range(30), key=lambda s: -proposals.logits[b, s, 0].item())[:5]
        for n, s in enumerate(order):
            box = proposals.boxes[b, s]
            assert_close(queries.ref_boxes[b, n], box, **EXACT)
            sines = torch.cat([position.sine(side, D // 2) for side in box])            # (2D,)
            sines = ask.pos_project.weight @ sines + ask.pos_project.bias
            both = F.layer_norm(sines, (2 * D,), ask.pos_norm.weight, ask.pos_norm.bias)
            for t in range(num_sets):           # both tasks start from the same box
                content = ask.content[t][n] if cls is query_gen.TwoStageQueries else both[D:]
                assert_close(queries.pos[t, b, n], both[:D], **EXACT)
                assert_close(queries.content[t, b, n], content, **EXACT)
    assert queries.content.shape == queries.pos.shape == (num_sets, 2, 5, D)
    assert_close(queries.proposals.logits, proposals.logits, **EXACT)


@pytest.mark.parametrize("cls", BOTH)
def test_decoder_losses_do_not_reach_the_mini_detector(cls):
    """It has a loss of its own: references are detached, proposals are not."""
    ask, memory = randomise(cls(5, D, C, 1)), a_memory()
    queries = ask(memory)
    weights = torch.randn(queries.pos.shape).double()
    ((queries.pos + queries.content) * weights).sum().backward()
    assert not queries.ref_boxes.requires_grad
    assert all(p.grad is None for p in ask.mini_detector.parameters())
    assert ask.pos_project.weight.grad.abs().max() > 1e-3
    (queries.proposals.logits.sum() + queries.proposals.boxes.sum()).backward()
    for name, p in ask.mini_detector.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("cls", BOTH)
def test_fewer_cells_than_queries(cls):
    """A small image has 6 + 2 cells, 20 queries are asked for: 8 come, and they are all cells."""
    memory = a_memory([(2, 3), (1, 2)])
    queries = randomise(cls(20, D, C, 2))(memory)
    assert queries.content.shape == queries.pos.shape == (2, 2, 8, D)
    assert queries.ref_boxes.shape == (2, 8, 4)
    assert all(x.isfinite().all() for x in queries[:3])


def test_unmixed_queries_learn_no_content():
    assert "content.0" in dict(query_gen.TwoStageQueries(5, D, C, 1).named_parameters())
    assert "content" not in query_gen.UnmixedTwoStageQueries(5, D, C, 1).state_dict()
