"""Queries of Conditional DETR and SD-DETR: anchors on the image, contents of each kind."""
import helpers
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detr_min import boxes, proposals_conditional, query_gen

D, N, C = 32, 6, 3
SETS = dict(num_queries=N, d_model=D, num_classes=C)

QUERIES = [proposals_conditional.AnchorQueries, proposals_conditional.AnchorCellQueries,
           query_gen.TaskAwareQueries]


@pytest.mark.parametrize("kind", QUERIES)
def test_anchors_lie_on_the_image_best_first(kind, generator):
    """The second image has 8 cells: of its 30 queries 8 are cells, the others have no cell."""
    memory = helpers.conditional_memory(D)
    make = helpers.shaken(kind(**{**SETS, "num_queries": 30}, num_sets=2), generator)
    queries = make(memory)
    assert queries.content.shape == queries.pos.shape == queries.spatial.shape == (2, 2, 30, D)
    assert queries.ref_points.shape == (2, 30, 2) and not queries.ref_points.requires_grad
    cell = make.mini_detector.best(queries.proposals, 30, memory.is_pad)
    S = memory.is_pad.shape[1]
    assert (queries.proposals.logits[memory.is_pad] == -100).all()
    for image, num_cells in enumerate((S, 8)):
        here = cell[image, :num_cells]
        assert len(here.unique()) == len(here) and not memory.is_pad[image, here].any()
        assert (queries.proposals.logits[image].amax(-1)[here].diff() <= 0).all()
    assert (cell[1, 8:] == S).all() and (queries.ref_points[1, 8:] == 1).all()


def test_contents_of_the_three_kinds(generator):
    memory = helpers.conditional_memory(D)
    tokens = memory.tokens.requires_grad_()
    for kind, trains in zip(QUERIES, (False, False, True)):
        make = helpers.shaken(kind(**SETS, num_sets=2), generator)
        content = make(memory).content
        assert content.requires_grad == trains
        assert (content.abs().max() > 0) == (kind is not QUERIES[0])
        if kind is QUERIES[1]:
            cell = make.mini_detector.best(make(memory).proposals, N, memory.is_pad)
            assert_close(content[1], proposals_conditional.pick(tokens, cell, 0.0))
        if trains:
            assert (content[0] - content[1]).abs().max() > 1e-3         # a predictor for each task


def test_positions_of_plain_queries_are_those_of_their_points(generator):
    memory = helpers.conditional_memory(D)
    learned = proposals_conditional.LearnedQueries(**SETS, num_sets=1).double()
    anchors = proposals_conditional.AnchorQueries(**SETS, num_sets=2).double()
    for queries in (learned(memory), anchors(memory)):
        expected = boxes.embed_points(queries.ref_points, D).expand_as(queries.spatial)
        assert_close(queries.spatial, expected, atol=1e-12, rtol=0)


def test_anchor_queries_start_at_the_centres_of_the_best_boxes(generator):
    """r = centre of the anchor, without gradient,  p = e = PE(r)"""
    memory = helpers.conditional_memory(D)
    queries = helpers.shaken(proposals_conditional.AnchorQueries(**SETS, num_sets=2),
                             generator)(memory)
    for b, scores in enumerate(queries.proposals.logits.amax(-1).tolist()):
        best = sorted(range(24), key=lambda cell: -scores[cell])[:N]
        centres = queries.proposals.boxes[b, best, :2].detach()
        assert_close(queries.ref_points[b], centres, atol=0, rtol=0)
        for pos in (queries.pos, queries.spatial):
            expected = boxes.embed_points(centres, D).expand(2, N, D)
            assert_close(pos[:, b], expected, atol=1e-12, rtol=0)


def test_learned_queries_by_definition(generator):
    """[Conditional DETR]  r = sigmoid(MLP(p)), e = PE(r); content is zero, images are alike."""
    learned = helpers.shaken(proposals_conditional.LearnedQueries(**SETS, num_sets=2), generator)
    queries, (first, _, last) = learned(helpers.conditional_memory(D)), learned.reference
    hidden = (learned.pos @ first.weight.T + first.bias).clamp(min=0)
    points = 1 / (1 + (-(hidden @ last.weight.T + last.bias)).exp())
    assert_close(queries.ref_points, points.expand(2, N, 2), atol=1e-12, rtol=0)
    spatial = boxes.embed_points(points, D).expand(2, 2, N, D)
    assert_close(queries.spatial, spatial, atol=1e-12, rtol=0)
    assert_close(queries.pos, learned.pos.expand(2, 2, N, D), atol=0, rtol=0)
    assert queries.content.shape == (2, 2, N, D) and not queries.content.any()


def test_learned_points_are_placed_in_float32_under_autocast():
    learned = proposals_conditional.LearnedQueries(**SETS, num_sets=1)
    memory = helpers.conditional_memory(D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = learned(memory)
    points = learned.reference(learned.pos).sigmoid()
    assert_close(half.ref_points, points.expand(2, N, 2), atol=0, rtol=0)
    assert_close(half.spatial[0], boxes.embed_points(half.ref_points, D), atol=0, rtol=0)


def test_mini_detector_by_definition(generator):
    """[DESTR]  Four times 3x3 convolution, GroupNorm and ReLU for each task; then its head."""
    net = helpers.shaken(proposals_conditional.MiniDetector(D, C), generator)
    memory = helpers.conditional_memory(D)
    found, cells = net(memory), memory.tokens[:1].mT.unflatten(-1, (4, 6))      # has no padding
    answers = []
    for tower in (net.class_tower, net.box_tower):
        x, layers = cells, list(tower)
        for conv, norm in zip(layers[::3], layers[1::3], strict=True):
            x = F.conv2d(x, conv.weight, conv.bias, padding=1)
            x = F.group_norm(x, 32, norm.weight, norm.bias).clamp(min=0)
        answers.append(x.flatten(2).mT)
        assert len(layers) == 12
    assert_close(found.logits[:1], net.class_head(answers[0]), atol=1e-12, rtol=0)
    delta = net.box_head(answers[1])[0]
    for cell in range(24):
        centre = torch.tensor([(cell % 6 + .5) / 6, (cell // 6 + .5) / 4], dtype=torch.float64)
        logit = torch.cat([torch.log(centre / (1 - centre)), torch.zeros(2).double()])
        assert_close(found.boxes[0, cell], (logit + delta[cell]).sigmoid(), atol=1e-7, rtol=0)
