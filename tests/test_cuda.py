"""On a GPU: the CPU's losses and gradients, bf16, torch.compile, and runs that change the device.

Skipped where there is none.
"""
import json

import pytest
import torch
from torch.testing import assert_close

import test_model
import test_train
import train
from detr_min import attention, criterion
from detr_min.run import checkpoints, config, evaluate, registry, sets
from helpers import two_pictures

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
COMBINATIONS = [pytest.param(*words.values, marks=[pytest.mark.slow] * (
    words.values[1] not in ("dac", "decoupled"))) for words in test_model.ALL]
NEAR = dict(atol=1e-9, rtol=1e-9)               # float64: another order of sums, no more


def on_gpu(batch):
    """images, is_pad, [Target], moved."""
    images, is_pad, targets = batch
    return images.cuda(), is_pad.cuda(), [
        t._replace(labels=t.labels.cuda(), boxes=t.boxes.cuda()) for t in targets]


def test_deformable_attention_of_all_forms():
    """The fast form of a CPU, and what a GPU computes, compiled and not: values and gradients."""
    shapes = [(9, 13), (5, 7), (2, 3)]
    S = sum(h * w for h, w in shapes)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, S, 4, 8, generator=generator),
              torch.rand(2, 11, 4, 3, 2, 2, generator=generator) * 1.4 - .2,
              torch.rand(2, 11, 4, 3, 2, generator=generator)]
    answers = []
    for place, function in (("cpu", attention.ms_deform_attn), ("cuda", attention.ms_deform_attn),
                            ("cuda", torch.compile(attention.ms_deform_attn))):
        here = [t.to(place).requires_grad_() for t in inputs]
        out = function(here[0], shapes, *here[1:])
        grads = torch.autograd.grad(out.square().sum(), here)
        answers.append([t.detach().cpu() for t in (out, *grads)])
    for other in answers[1:]:
        for found, expected in zip(other, answers[0]):
            assert_close(found, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("base, name, queries", COMBINATIONS)
def test_losses_and_gradients_are_those_of_the_cpu(base, name, queries):
    """Every decoder, query and loss, in float64: forward, matching, loss, backward."""
    found = {}
    for place in ("cpu", "cuda"):
        images, is_pad, targets = two_pictures()
        targets = [t._replace(boxes=t.boxes.double()) for t in targets]
        batch = images.double(), is_pad, targets
        detector = test_model.shaken(test_model.a_detector(base, name, queries)).double().train()
        if place == "cuda":
            detector, batch = detector.cuda(), on_gpu(batch)
        output = detector(*batch[:2])
        for kind in registry.LOSSES:
            parts = registry.training(test_model.config_of(base, name, queries, kind)).loss(
                output, batch[2], 3.0)
            detector.zero_grad()
            criterion.total(parts).backward(retain_graph=True)
            found[place, kind] = [criterion.total(parts).detach().cpu(),
                                  *(p.grad.cpu() for p in detector.parameters())]
    for kind in registry.LOSSES:
        for a, b in zip(found["cuda", kind], found["cpu", kind], strict=True):
            assert_close(a, b, **NEAR)


@pytest.mark.parametrize("base, name, queries", [
    ("deformable", "dac", "two_stage"), ("conditional", "decoupled", "task_aware")])
def test_bf16_and_compile_answer_nearly_the_same(base, name, queries):
    """The proposals' boxes: rounding may make others of them the queries."""
    detector = test_model.a_detector(base, name, queries).cuda().train()
    images, is_pad, _ = on_gpu(two_pictures())
    whole = detector(images, is_pad)
    with torch.autocast("cuda", torch.bfloat16):
        half = detector(images, is_pad)
    compiled = torch.compile(detector)(images, is_pad)
    for layer in (*half.o_decoder, *half.c_decoder):
        assert layer.boxes.dtype == torch.float32 and layer.logits.isfinite().all()
    for output, far in ((half, .02), (compiled, 1e-3)):
        assert_close(output.proposals.boxes.float(), whole.proposals.boxes, atol=far, rtol=0)


@pytest.mark.parametrize("words", [
    ["--preset", "shapes", "--dn_number", 10], ["--preset", "shapes", "--model", "dac_release"],
    ["--preset", "shapes_sd", "--precision", "bf16"], ["--preset", "shapes_conditional"]])
def test_a_run_changes_the_device(words, monkeypatch, tmp_path, no_pictures):
    """Begun on the GPU, gone on with on the CPU, and the other way; evaluated alike on both."""
    monkeypatch.setattr(sets, "NUM_VAL_SHAPES", 4)
    for name in ("shapes", "shapes_conditional", "shapes_sd"):
        monkeypatch.setitem(config.PRESETS, name, {**config.PRESETS[name], **test_train.TINY})
    begin = [*words, "--images", 8, "--batch", 2, "--size", 64, "--steps", 12]
    for first, second in (("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")):
        out = tmp_path / (first + second)
        with pytest.raises(SystemExit):
            test_train.run(monkeypatch, *begin, "--pause", 6, "--device", first, "--out", out)
        test_train.run(monkeypatch, "--resume", out, "--device", second)
        numbers = json.loads((out / "metrics.json").read_text())
        assert numbers["steps"] == 12 and numbers["AP"] is not None
        detectors = [checkpoints.load_model(out / "last.pt").to(place) for place in ("cpu", "cuda")]
        val_set = sets.open_val(detectors[0].config, detectors[0].categories)
        (metrics, _), (others, _) = (evaluate.evaluate(d, val_set, 2) for d in detectors)
        assert metrics["AP"] == pytest.approx(others["AP"], abs=.02)
    assert train.processes.device("auto").type == "cuda"
