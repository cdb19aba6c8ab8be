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
def test_anchors_lie_on_the_image_and_are_at_most_its_cells(kind, generator):
    """The second image has 8 cells: of 30 queries 8 are left, none of them padding."""
    memory = helpers.conditional_memory(D)
    make = helpers.shaken(kind(**{**SETS, "num_queries": 30}, num_sets=2), generator)
    queries = make(memory)
    assert queries.content.shape == queries.pos.shape == queries.spatial.shape == (2, 2, 8, D)
    assert queries.ref_points.shape == (2, 8, 2) and not queries.ref_points.requires_grad
    cell = make.mini_detector.best(queries.proposals, 30, memory.is_pad)
    assert not memory.is_pad.gather(1, cell).any()
    assert (queries.proposals.logits[memory.is_pad] == -100).all()
    score = queries.proposals.logits.amax(-1).gather(1, cell)
    assert (score.diff(dim=1) <= 0).all()                                           # best first


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
            assert_close(content[1], proposals_conditional.pick(tokens, cell))
        if trains:
            assert (content[0] - content[1]).abs().max() > 1e-3         # a predictor for each task


def test_positions_of_plain_queries_are_those_of_their_points(generator):
    memory = helpers.conditional_memory(D)
    learned = proposals_conditional.LearnedQueries(**SETS, num_sets=1).double()
    anchors = proposals_conditional.AnchorQueries(**SETS, num_sets=2).double()
    for queries in (learned(memory), anchors(memory)):
        expected = boxes.embed_points(queries.ref_points, D).expand_as(queries.spatial)
        assert_close(queries.spatial, expected, atol=1e-12, rtol=0)
