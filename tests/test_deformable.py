"""Where queries come from: learned, or from the encoder's best boxes."""
import helpers
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detr_min import boxes, proposals
from detr_min.release import deformable

EXACT = dict(atol=1e-12, rtol=0)
D, C = 8, 3


def a_memory(**shape):
    return helpers.padded_memory(D, **shape)


# Learned queries


def test_learned_queries():
    """[Deformable DETR Sec. 4.1] the same for every image; the point is read off the position."""
    ask = helpers.randomise(deformable.LearnedQueries(5, D, 4, num_sets=2))
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

BOTH = [proposals.TwoStageQueries, deformable.UnmixedTwoStageQueries]


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("num_sets", [1, 2])
def test_two_stage_by_definition(cls, num_sets):
    """Content is learned [DINO Sec. 3.4], or comes from the box [Deformable DETR App. A.4]."""
    ask, memory = helpers.randomise(cls(5, D, C, num_sets)), a_memory()
    queries = ask(memory)
    proposals = ask.mini_detector(memory)
    for b in range(2):
        order = sorted(range(30), key=lambda s: -proposals.logits[b, s, 0].item())[:5]
        for n, s in enumerate(order):
            box = proposals.boxes[b, s]
            assert_close(queries.ref_boxes[b, n], box, **EXACT)
            sines = torch.cat([boxes.sine(side, D // 2) for side in box])            # (2D,)
            sines = ask.pos_project.weight @ sines + ask.pos_project.bias
            both = F.layer_norm(sines, (2 * D,), ask.pos_norm.weight, ask.pos_norm.bias)
            for t in range(num_sets):           # both tasks start from the same box
                content = ask.content[t][n] if cls is proposals.TwoStageQueries else both[D:]
                assert_close(queries.pos[t, b, n], both[:D], **EXACT)
                assert_close(queries.content[t, b, n], content, **EXACT)
    assert queries.content.shape == queries.pos.shape == (num_sets, 2, 5, D)
    assert_close(queries.proposals.logits, proposals.logits, **EXACT)


@pytest.mark.parametrize("cls", BOTH)
def test_decoder_losses_do_not_reach_the_mini_detector(cls):
    """It has a loss of its own: references are detached, proposals are not."""
    ask, memory = helpers.randomise(cls(5, D, C, 1)), a_memory()
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
    memory = a_memory(shapes=[(2, 3), (1, 2)])
    queries = helpers.randomise(cls(20, D, C, 2))(memory)
    assert queries.content.shape == queries.pos.shape == (2, 2, 8, D)
    assert queries.ref_boxes.shape == (2, 8, 4)
    assert all(x.isfinite().all() for x in queries[:3])


def test_unmixed_queries_learn_no_content():
    assert "content.0" in dict(proposals.TwoStageQueries(5, D, C, 1).named_parameters())
    assert "content" not in deformable.UnmixedTwoStageQueries(5, D, C, 1).state_dict()
