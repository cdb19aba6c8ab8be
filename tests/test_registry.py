"""What the words of a config stand for: classes, inputs and losses."""
import dataclasses
import pickle

import pytest
import torch
from torch.testing import assert_close

from detr_min import backbone, boxes, criterion, decoder_dac, decoder_decoupled, model, query_gen
from detr_min.data import dataset
from detr_min.release import align_loss, dac_release, denoising
from detr_min.run import config, registry
from helpers import two_pictures

TINY = dict(d_model=32, num_heads=4, num_points=2, d_ffn=32, encoder_layers=1, decoder_layers=1,
            num_queries=5, num_classes=3)


def a_config(preset="shapes", **changes):
    return config.preset(preset, **{**TINY, **changes})


# --- what is built --------------------------------------------------------------------------------

def test_words_become_classes():
    detector = registry.build(a_config(model="dac"))
    assert type(detector) is model.Detector and type(detector.decoder) is decoder_dac.DACDecoder
    detector = registry.build(a_config("shapes_sd"))
    assert type(detector.decoder) is decoder_decoupled.DecoupledDecoder
    assert type(detector.queries) is query_gen.TaskAwareQueries
    assert len(detector.queries.predictors) == 2                            # one per task
    detector = registry.build(a_config(model="dac_release", dn_number=5))
    assert type(detector) is denoising.DenoisingDetector
    assert type(detector.decoder) is dac_release.DACReleaseDecoder
    assert detector.label_embed.num_embeddings == 3 + 1


@pytest.mark.parametrize("base", registry.DECODERS)
def test_every_name_of_a_table_is_accepted_by_its_flag(base):
    preset = {"deformable": "shapes", "conditional": "shapes_conditional"}[base]
    for name, table in (("model", registry.DECODERS), ("queries", registry.QUERIES),
                        ("backbone", registry.BACKBONES)):
        for word in table[base]:
            assert getattr(config.preset(preset, **{name: word}), name) == word
        assert set(table[base]) <= set(registry.names(table))


def test_a_backbone_of_ones_own_runs_on_each_picture_alone(monkeypatch):
    """Only published networks read the padding of a batch, and let its cells become queries."""
    monkeypatch.setitem(registry.BACKBONES["deformable"], "mine", lambda r: backbone.ConvNet(8))
    for name, on_batch in ("mine", backbone.per_image), ("resnet50", backbone.padded_batch):
        detector = registry.build(dataclasses.replace(a_config(), backbone=name))
        assert detector.on_batch is on_batch
        assert bool(detector.queries.mini_detector._forward_pre_hooks) == (name == "resnet50")


def test_a_detector_with_dropout_can_be_pickled():
    detector = registry.build(a_config(backbone="resnet50", dropout=0.1)).eval()
    images, is_pad, _ = two_pictures()
    again = pickle.loads(pickle.dumps(detector))
    assert torch.equal(again(images, is_pad).o_decoder[-1].boxes,
                       detector(images, is_pad).o_decoder[-1].boxes)


def test_names_lists_each_once():
    assert registry.names({"a": {"x": 1, "y": 2}, "b": {"y": 3, "z": 4}}) == ("x", "y", "z")


def test_a_learned_point_starts_with_a_small_box():
    """A point has no size: the first layer answers sigmoid(-2) = .12 of the image at first."""
    detector = registry.build(a_config(model="deformable", queries="learned")).eval()
    images, is_pad, _ = two_pictures()
    with torch.no_grad():
        answer = detector(images, is_pad).o_decoder[0]
    assert_close(answer.boxes[..., 2:], torch.full((2, 5, 2), 0.1192), atol=1e-4, rtol=0)


# --- how it is trained ----------------------------------------------------------------------------

def test_noise_is_a_function_of_seed_step_and_process():
    """So a resumed run sees the same, and two processes do not."""
    images, is_pad, targets = two_pictures()

    def noise(seed, step, rank):
        training = registry.training(a_config(seed=seed, dn_number=6))
        given_images, given_pads, noisy = training.inputs(images, is_pad, targets, step, rank)
        assert given_images is images and given_pads is is_pad
        return noisy.boxes
    first = noise(0, 1, 0)
    assert first.shape == (2, 12, 4) and torch.equal(noise(0, 1, 0), first)
    for other in ((0, 2, 0), (0, 1, 1), (1, 1, 0)):
        assert not torch.equal(noise(*other), first), other


def test_without_denoising_the_inputs_are_the_batch():
    images, is_pad, targets = two_pictures()
    assert registry.training(a_config()).inputs(images, is_pad, targets, 1, 0) == (images, is_pad)


def an_output(cls=model.Output):
    """One query of IoU .2 with the one object: below the paper's threshold, the object's best."""
    layer = boxes.Predictions(torch.zeros(1, 1, 3), torch.tensor([[[.5, .5, .4, .08]]]))
    target = dataset.Target(torch.tensor([1]), torch.tensor([[.5, .5, .4, .4]]), 0, (64, 64))
    return cls([layer], [layer], layer), [target]


@pytest.mark.parametrize("name, pairs", [("dac", 0), ("dac_decoupled", 0), ("dac_release", 1)])
def test_the_c_decoder_is_assigned_by_the_rule_of_its_model(name, pairs):
    """The release's rule, which forces an object's best query, is for dac_release alone."""
    parts = registry.training(a_config(model=name)).loss(*an_output(), 1.0)
    assert set(parts) == {"O", "C", "encoder"} and parts["C"].pairs == pairs


@pytest.mark.parametrize("loss, layer_loss", [
    ("focal", criterion.focal_loss), ("tal", criterion.task_aligned_loss),
    ("align", align_loss.layer_loss)])
def test_the_loss_is_the_flags(loss, layer_loss):
    output, targets = an_output()
    parts = registry.training(a_config(loss=loss)).loss(output, targets, 1.0)
    expected = criterion.detection_loss(output, targets, 1.0, layer_loss)
    assert_close(parts, expected, atol=0, rtol=0)
    others = {word: registry.training(a_config(loss=word)).loss(output, targets, 1.0)["O"].cls
              for word in registry.LOSSES if word != loss}
    assert parts["O"].cls not in others.values()


def test_denoising_adds_its_losses():
    output, targets = an_output(denoising.Output)
    output = output._replace(o_denoised=output.o_decoder * 2, c_denoised=output.c_decoder)
    parts = registry.training(a_config(dn_number=1)).loss(output, targets, 1.0)
    assert list(parts) == ["O", "C", "encoder", "O_denoising", "C_denoising"]


@pytest.mark.parametrize("preset, share", [("shapes_conditional", 1.0), ("shapes_sd", 1.0),
                                           ("paper_sd_r50", 0.1)])
def test_on_conditional_detr_the_loss_is_its_own(preset, share):
    """The mini-detector's cells learn classes, at the weight of the preset."""
    output, targets = an_output()
    output = output._replace(c_decoder=[])
    cfg = config.preset(preset)
    parts = registry.training(cfg).loss(output, targets, 1.0)
    layer_loss = registry.LOSSES[cfg.loss]
    expected = criterion.conditional_loss(output, targets, 1.0, layer_loss, cell_weight=share)
    assert_close(parts, expected, atol=0, rtol=0)
