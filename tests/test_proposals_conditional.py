"""Queries of Conditional DETR and SD-DETR: anchors on the image, contents of each kind."""
import helpers
import pytest
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
