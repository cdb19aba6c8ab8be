"""Deformable DETR as published: learned queries, two-stage without mixing, no refinement."""
import math

import torch
from torch.testing import assert_close

from detr_min import decoder_base, proposals
from detr_min.release import deformable
from helpers import EXACT, f64, nudge_query_0, padded_memory, randomise, some_queries
from test_decoder_base import steps

D, C, N = 8, 3, 5


def a_decoder():
    return randomise(deformable.FixedReferenceDecoder(3, D, 2, 2, 3, 16, C))


# Queries; UnmixedTwoStageQueries is also tested beside proposals.TwoStageQueries


def test_learned_queries():
    """[Deformable DETR Sec. 4.1] the same for every image; the point is read off the position."""
    ask = randomise(deformable.LearnedQueries(5, D, 4, num_sets=2))
    queries = ask(padded_memory(D))
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


def test_unmixed_queries_learn_no_content():
    assert "content.0" in dict(proposals.TwoStageQueries(5, D, C, 1).named_parameters())
    assert "content" not in deformable.UnmixedTwoStageQueries(5, D, C, 1).state_dict()


# The decoder without refinement


def test_boxes_worked_by_hand():
    """Each layer starts from the same .5: + log 3 -> 3/4, - log 12 -> 1/13, + log 4 -> 4/5."""
    decoder = steps(a_decoder(), [math.log(3), -math.log(12), math.log(4)])
    queries = some_queries(D, N)._replace(ref_boxes=torch.full((2, N, 4), .5).double())
    answer = decoder.o_decoder(queries, padded_memory(D))
    for prediction, box in zip(answer, [3 / 4, 1 / 13, 4 / 5], strict=True):
        assert_close(prediction.boxes, f64(box).expand(2, N, 4), **EXACT)


def test_it_takes_the_weights_of_the_refined_one_and_layer_1_is_the_same():
    """By definition: every layer adds to the first reference, and reads the image around it."""
    queries, memory = some_queries(D, N), padded_memory(D)
    base, fixed = randomise(decoder_base.Decoder(3, D, 2, 2, 3, 16, C)), a_decoder()
    fixed.load_state_dict(base.state_dict())
    refined, answer = base.o_decoder(queries, memory), fixed.o_decoder(queries, memory)
    assert_close(refined[0], answer[0], atol=0, rtol=0)
    assert (refined[1].boxes - answer[1].boxes).abs().max() > 1e-3
    x = queries.content[0]
    for layer, class_head, box_head, found in zip(
            fixed.layers, fixed.class_heads, fixed.box_heads, answer, strict=True):
        x = layer.disperse(x, queries.pos[0])
        x = layer.gather(x, queries.pos[0], queries.ref_boxes, memory)
        expected = torch.sigmoid(torch.logit(queries.ref_boxes) + box_head(x))
        assert_close(tuple(found), (class_head(x), expected), **EXACT)


def test_from_points_the_size_is_the_box_heads_alone():
    queries, fixed = some_queries(D, N, size=2), steps(a_decoder(), [-math.log(4)] * 3)
    for prediction in fixed.o_decoder(queries, padded_memory(D)):
        assert_close(prediction.boxes[..., 2:], f64(.2).expand(2, N, 2), **EXACT)
        moved = torch.sigmoid(torch.logit(queries.ref_boxes) - math.log(4))
        assert_close(prediction.boxes[..., :2], moved, **EXACT)


def test_every_answer_depends_on_every_query():
    decoder, queries = a_decoder(), some_queries(D, N, size=2)
    for change in nudge_query_0(decoder.o_decoder, queries, padded_memory(D)):
        assert (change > 1e-7).all()
