"""Flags, presets and their stored form."""
import dataclasses

import pytest
import torch

from detr_min.run import config, optim


def test_a_preset_takes_changes_of_flags_and_of_the_recipe():
    cfg = config.preset("shapes", model="decoupled", num_queries=7)
    assert (cfg.model, cfg.recipe.num_queries, cfg.preset) == ("decoupled", 7, "shapes")
    assert config.preset("shapes").recipe.num_queries != 7          # presets are not changed by it


def test_unknown_names_are_refused_by_name():
    with pytest.raises(ValueError, match="tiny is unknown; there are shapes, coco, paper_r50"):
        config.preset("tiny")
    with pytest.raises(ValueError, match="no such field: num_qeries"):
        config.preset("shapes", num_qeries=3)


def test_paper_r50_is_the_recipe_of_the_release():
    """The release's settings, as its launch scripts and defaults have them."""
    cfg, r = config.preset("paper_r50"), config.preset("paper_r50").recipe
    assert (r.num_queries, r.d_ffn, r.encoder_layers, r.decoder_layers) == (900, 2048, 6, 6)
    assert (cfg.lr, cfg.batch, cfg.epochs, cfg.size, r.max_size) == (2e-4, 16, 12, 800, 1333)
    assert (r.clip, r.weight_decay, r.slow_lr, r.decay) == (0.1, 1e-4, 0.1, "step")
    assert (r.d_model, r.num_heads, r.num_levels, r.num_points, r.warmup) == (256, 8, 4, 4, 0)


def test_a_config_survives_being_stored():
    cfg = config.preset("coco", classes="person,dog", num_classes=2)
    assert config.from_dict(dataclasses.asdict(cfg)) == cfg


def test_a_stored_config_of_a_model_that_is_gone_is_refused():
    values = dataclasses.asdict(config.preset("coco"))
    with pytest.raises(ValueError, match="--model dino is none of deformable"):
        config.from_dict({**values, "model": "dino"})


def test_the_command_line_has_one_flag_a_field():
    cfg, given = config.parse("doc", ["--model", "deformable", "--lr", "2e-4", "--images", "50"])
    assert (cfg.model, cfg.lr, cfg.images, cfg.preset) == ("deformable", 2e-4, 50, "shapes")
    assert given == {"model", "lr", "images"}
    assert cfg.batch == config.preset("shapes").batch               # the rest is the preset's


def test_coco_alone_chooses_the_coco_preset():
    assert config.parse("doc", ["--coco", "x"])[0].preset == "coco"
    assert config.parse("doc", ["--coco", "x", "--preset", "paper_r50"])[0].preset == "paper_r50"


def test_steps_win_over_the_epochs_of_a_preset():
    words = ["--preset", "paper_r50", "--coco", "x", "--steps", "5"]
    assert config.parse("doc", words)[0].epochs == 0


def test_a_larger_size_raises_the_longest_side_with_it():
    """Or the test images would be shrunk back to the preset's size without a word."""
    cfg = config.preset("coco", size=512)
    assert (cfg.size, cfg.recipe.max_size) == (512, 854)                # 427 * 512 / 256
    assert config.preset("shapes", size=200).recipe.max_size == 200


@pytest.mark.parametrize("words", [
    ["--classes", "cat"], ["--preset", "coco"], ["--images", "0"],
    ["--steps", "5", "--epochs", "2"],
    ["--size", "16"], ["--seed", str(2 ** 64)], ["--lr", "inf"], ["--lr", "nan"]])
def test_flags_that_cannot_be_meant_together_or_at_all(words, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse("doc", words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--batchsize", "8"], ["--mod", "dac"], ["--lr", "fast"],
                                   ["--batch", "0"], ["--images", "-3"], ["--lr", "-1"],
                                   ["--loss", "tall"], ["--precision", "fp8"], ["--model", "dca"]])
def test_unknown_flags_abbreviations_and_nonsense_values_stop_the_program(words, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse("doc", words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


def test_help_prints_every_field_with_its_comment(capsys):
    with pytest.raises(SystemExit):
        config.parse("doc", ["--help"])
    text = capsys.readouterr().out
    assert "AdamW's learning rate" in text
    assert all(f.name in text for f in dataclasses.fields(config.Config))


@pytest.mark.parametrize("name, epochs, drop_after", [
    ("paper_r50", 12, 11), ("paper_swin_l", 12, 11), ("release", 12, 11),
    ("paper_r50_24", 24, 20), ("paper_swin_l_24", 24, 20)])
def test_schedules_of_the_release(name, epochs, drop_after):
    """--lr_drop 11 of 12 epochs, 20 of 24: with 100 steps an epoch, step 1100 or 2000 is x 0.1."""
    cfg = config.preset(name)
    assert cfg.epochs == epochs and cfg.recipe.drop_at == pytest.approx(drop_after / epochs)
    cfg = dataclasses.replace(cfg, steps=100 * epochs)
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "factor": 1.0}], lr=1.0)
    rates = [optim.set_learning_rate(optimizer, step, cfg) for step in range(cfg.steps)]
    assert rates == pytest.approx([cfg.lr] * 100 * drop_after
                                  + [cfg.lr / 10] * 100 * (epochs - drop_after))


def test_what_24_epochs_of_swin_l_change():
    """Weight decay .05 and drop path .5, as the release's script for 24 epochs."""
    long, short = config.preset("paper_swin_l_24").recipe, config.preset("paper_swin_l").recipe
    assert (long.weight_decay, long.swin[-1]) == (0.05, 0.5)
    assert (short.weight_decay, short.swin[-1]) == (1e-4, 0.2) and long.swin[:-1] == short.swin[:-1]


def test_paper_swin_l_is_paper_r50_on_swin_l():
    """The 12-epoch recipe; both are tested on 300 detections an image, as released."""
    swin, r50 = config.preset("paper_swin_l"), config.preset("paper_r50")
    assert swin.backbone == "swin_l" and swin.recipe.detections == 300
    assert dataclasses.replace(swin, preset="paper_r50", backbone="resnet50") == r50
