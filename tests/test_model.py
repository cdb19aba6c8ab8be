"""The detector as a whole: in half precision, and what torch makes of it when it is traced."""
import pytest
import torch
from torch.testing import assert_close

from detr_min.run import config, registry

TINY = dict(d_model=32, num_heads=2, num_points=2, d_ffn=32, decoder_layers=2, num_queries=9)
VARIANTS = [("dac", "two_stage"), *(pytest.param(*names, marks=pytest.mark.slow) for names in (
    ("deformable", "learned"), ("decoupled", "task_aware"), ("split", "two_stage")))]


def a_batch(seed):
    """Two images of 64 x 96, a third of the second is padding."""
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))
    is_pad = torch.zeros(2, 64, 96, dtype=torch.bool)
    is_pad[1, :, 64:] = True
    return images, is_pad


def a_detector(name, queries):
    """In eval mode; its weights off their start, so that no term is zero."""
    torch.manual_seed(0)
    detector = registry.build(config.preset("shapes", model=name, queries=queries, **TINY)).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return detector


def assert_same(found, wanted):
    assert len(found.o_decoder) == len(wanted.o_decoder) == 2 and not found.c_decoder
    for one, other in zip(found.o_decoder, wanted.o_decoder):
        assert_close(one.logits, other.logits, atol=1e-4, rtol=0)
        assert_close(one.boxes, other.boxes, atol=1e-5, rtol=0)


@pytest.mark.parametrize("queries", registry.QUERIES)
@pytest.mark.parametrize("name", registry.DECODERS)
@torch.no_grad()
def test_bf16_is_near_full_precision(name, queries):
    """Every pair, both decoders. Proposals differ by rounding; the N best of them may be others."""
    detector, batch = a_detector(name, queries).train(), a_batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        half = detector(*batch)
    full = detector(*batch)
    assert len(half.c_decoder) == (2 if name.startswith("dac") else 0)
    for layer in (*half.o_decoder, *half.c_decoder):
        assert layer.logits.isfinite().all() and layer.boxes.isfinite().all()
        assert layer.boxes.min() >= 0 and layer.boxes.max() <= 1
        assert layer.boxes.dtype == torch.float32               # bf16: 1/256 of an image apart
    one, other = (o.proposals or o.o_decoder[0] for o in (half, full))
    assert_close(one.boxes.float(), other.boxes, atol=.02, rtol=0)


@pytest.mark.parametrize("name, queries", VARIANTS)
@torch.no_grad()
def test_export(name, queries):
    """torch.export, any batch size; the graph must not remember the images it was made with."""
    detector, batch = a_detector(name, queries), torch.export.Dim("batch", max=64)
    exported = torch.export.export(detector, a_batch(0), strict=False,
                                   dynamic_shapes=({0: batch}, {0: batch})).module()
    images, is_pad = (torch.cat([one, other]) for one, other in zip(a_batch(1), a_batch(2)))
    assert_same(exported(images, is_pad), detector(images, is_pad))


@pytest.mark.parametrize("name, queries", VARIANTS)
@torch.no_grad()
def test_compile(name, queries):
    """torch.compile in one graph, without a break; aot_eager needs no C++ compiler."""
    detector = a_detector(name, queries)
    compiled = torch.compile(detector, backend="aot_eager", fullgraph=True)
    for seed in (0, 1):
        assert_same(compiled(*a_batch(seed)), detector(*a_batch(seed)))
