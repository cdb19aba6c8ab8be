"""The release's C-Decoder: the paper's, started after the first self-attention."""
import helpers
import pytest
import torch
from test_decoder_dac import SIZES, N, a_memory, nudge_query_0, some_queries
from torch.testing import assert_close

from detr_min import decoder_dac
from detr_min.release import dac_release


@pytest.fixture
def decoder(generator):
    return helpers.shaken(dac_release.DACReleaseDecoder(**SIZES), generator)


def test_layer_1_is_the_same_in_both_decoders_and_layer_2_is_not(decoder, generator):
    """Bit for bit, as measured on the release; so one prediction gets labels of both kinds."""
    o, c = decoder.both_decoders(some_queries(generator), a_memory(generator))
    assert_close(o[0], c[0], atol=0, rtol=0)
    for layer in (1, 2):
        assert (o[layer].logits - c[layer].logits).abs().amax(-1).min() > 1e-3


def test_c_decoder_by_definition(decoder, generator):
    """c_1 = gather(disperse(q)), then gather alone; references of its own from layer 1 on."""
    queries, memory = some_queries(generator), a_memory(generator)
    x, pos, ref = queries.content[0], queries.pos[0], queries.ref_boxes
    x = decoder.layers[0].disperse(x, pos)
    for layer, class_head, box_head, found in zip(
            decoder.layers, decoder.class_heads, decoder.box_heads,
            decoder.c_decoder(queries, memory)):
        x = layer.gather(x, pos, ref, memory)
        ref = torch.sigmoid(torch.logit(ref) + box_head(x))
        assert_close(tuple(found), (class_head(x), ref), atol=1e-12, rtol=0)


def test_both_decoders_are_the_two_passes(decoder, generator):
    queries, memory = some_queries(generator), a_memory(generator)
    two = decoder.o_decoder(queries, memory), decoder.c_decoder(queries, memory)
    assert_close(decoder.both_decoders(queries, memory), two, atol=0, rtol=0)


def test_the_o_decoder_and_the_weights_are_the_papers(decoder, generator):
    queries, memory = some_queries(generator), a_memory(generator)
    paper = decoder_dac.DACDecoder(**SIZES).double()
    paper.load_state_dict(decoder.state_dict())
    assert_close(decoder.o_decoder(queries, memory), paper.o_decoder(queries, memory),
                 atol=0, rtol=0)


def test_each_query_of_the_c_decoder_knows_of_all_unlike_the_papers(decoder, generator):
    """Through the first self-attention the nudge of query 0 reaches every query."""
    for change in nudge_query_0(decoder.c_decoder, some_queries(generator), a_memory(generator)):
        assert (change > 1e-4).all()


def test_the_c_decoder_respects_the_mask_at_its_start(decoder, generator):
    """Query 0 hidden from the others: nudging it moves it alone."""
    is_blocked = torch.zeros(N, N, dtype=torch.bool)
    is_blocked[1:, 0] = True
    queries = some_queries(generator)._replace(is_blocked=is_blocked)
    for change in nudge_query_0(decoder.c_decoder, queries, a_memory(generator)):
        assert change[0] > 1e-3 and (change[1:] < 1e-12).all()
