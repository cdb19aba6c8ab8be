"""Flags, presets and their stored form."""
import dataclasses
import re

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
    assert (r.clip, r.weight_decay, cfg.slow_lr, r.decay) == (0.1, 1e-4, 0.1, "step")
    assert (r.d_model, r.num_heads, r.num_levels, r.num_points, r.warmup) == (256, 8, 4, 4, 0)


def test_a_config_survives_being_stored():
    cfg = config.preset("coco", classes="person,dog", num_classes=2)
    assert config.from_dict(dataclasses.asdict(cfg)) == cfg


def test_stored_configs_that_no_run_can_have_are_refused():
    """A model that is gone, a field that is gone, and one that is missing."""
    values = dataclasses.asdict(config.preset("coco"))
    with pytest.raises(ValueError, match="--model dino: it must be one of deformable, "):
        config.from_dict({**values, "model": "dino"})
    with pytest.raises(ValueError, match="another version of this package: .*mosaic"):
        config.from_dict({**values, "mosaic": True})
    with pytest.raises(ValueError, match="another version of this package: 'recipe'"):
        config.from_dict({name: value for name, value in values.items() if name != "recipe"})


def test_checkpoints_from_before_two_fields_were_flags_still_load():
    """dn_number and slow_lr were stored with the recipe."""
    cfg = config.preset("paper_r50")
    values = dataclasses.asdict(cfg)
    for name in ("dn_number", "slow_lr"):
        values["recipe"][name] = values.pop(name)
    assert config.from_dict(values) == cfg


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
    assert (cfg.size, cfg.recipe.max_size) == (512, 853)                # 320 * 512 / 192
    assert config.preset("shapes", size=200).recipe.max_size == 200


@pytest.mark.parametrize("words", [
    ["--classes", "cat"], ["--augment", "flip"], ["--preset", "coco"], ["--images", "0"],
    ["--steps", "5", "--epochs", "2"],
    ["--size", "16"], ["--seed", str(2 ** 64)], ["--lr", "inf"], ["--lr", "nan"],
    ["--lr", "1e300"], ["--images", "2147483647"], ["--steps", "2000000000000"],
    ["--resume", ""], ["--coco", ""], ["--init_from", ""], ["--classes", ",,,"], ["--out", ""]])
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


def test_help_prints_every_flag_with_its_text_and_what_it_accepts(capsys):
    with pytest.raises(SystemExit):
        config.parse("doc", ["--help"])
    words = " ".join(capsys.readouterr().out.split())
    for field in config.FLAGS:
        assert f"--{field.name} " in words and field.metadata["help"] in words, field.name
    assert "of class scores; align weighs boxes too (one of focal, tal, align)" in words
    assert "AdamW's learning rate, for this batch (a number from" in words


@pytest.mark.parametrize("words, sentence", [
    (["--model", "dca"], "--model dca: it must be one of deformable, deformable_once, "),
    (["--lr", "-1"], "--lr -1.0: it must be a number from 1e-37 to"),
    (["--lr", "-1e-3"], "--lr -0.001: it must be a number from 1e-37 to"),
    (["--lr=-2.5E+2"], "--lr -250.0: it must be a number from 1e-37 to"),
    (["--preset", "nope"], "--preset nope is unknown; there are shapes, coco, paper_r50"),
    (["--preset", "nope", "--coco", "x"], "--preset nope is unknown; there are shapes, coco"),
    (["--queries", "learned", "--dn_number", "5"],
     "--queries learned takes no denoising queries, .*: add --dn_number 0"),
    (["--preset", "paper_r50", "--coco", "x", "--queries", "learned"], "add --dn_number 0"),
    (["--model", "conditional"], "--model conditional does not exist for preset shapes, which "
                                 "stands on deformable attention: it must be one of deformable"),
    (["--preset", "shapes_sd", "--model", "dac"], "--model dac does not exist for preset shapes_sd"
                                                  ".* one of conditional, decoupled, split")])
def test_a_refusal_says_what_is_accepted(words, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse("doc", words)
    assert stop.value.code == 2 and re.search(sentence, capsys.readouterr().err)


def test_denoising_is_the_papers_and_not_the_small_presets():
    """And learned or task-aware queries are refused it, unless told to do without."""
    numbers = {name: config.preset(name).dn_number for name in config.PRESETS}
    with_noise = {"paper_r50", "paper_swin_l", "paper_r50_24", "paper_swin_l_24", "release"}
    assert {name: number for name, number in numbers.items() if number} == dict.fromkeys(
        with_noise, 100)
    for queries in ("learned", "task_aware"):
        with pytest.raises(ValueError, match=f"{queries} takes no denoising queries"):
            config.preset("paper_r50", queries=queries)
        assert config.preset("paper_r50", queries=queries, dn_number=0).dn_number == 0


def test_the_release_preset_is_paper_r50_with_the_releases_decoder_and_loss():
    changes = {"preset": "release", "model": "dac_release", "loss": "align"}
    assert config.preset("release") == config.preset("paper_r50", **changes)


def test_a_preset_of_shapes_on_a_folder_takes_all_of_its_images():
    """2000 is a number of shapes, which nobody asked a folder for."""
    for words, images in ((["--coco", "x"], 0), (["--coco", "x", "--images", "7"], 7), ([], 2000)):
        assert config.parse("doc", ["--preset", "shapes", *words])[0].images == images


@pytest.mark.parametrize("changes", [
    dict(size="big"), dict(size=64.0), dict(lr="1"), dict(out=3), dict(seed=True),
    dict(d_model=130), dict(d_model=66), dict(num_heads=0), dict(num_points=1.5),
    dict(encoder_layers=-1), dict(swin=(1, "a")), dict(drop_at=float("nan")),
    dict(base="none"), dict(decay=None)])
def test_values_of_another_type_or_size_are_refused_by_name(changes):
    [name] = changes
    with pytest.raises(ValueError, match=f"{name} .*it must be"):
        config.preset("shapes", **changes)


def test_resume_takes_no_other_flag_but_pause_and_device():
    cfg, given = config.parse("doc", ["--resume", "runs/a", "--pause", "9", "--device", "cpu"])
    assert config.check_resume(cfg, given) is cfg
    with pytest.raises(ValueError, match="leave out --lr --steps"):
        config.check_resume(*config.parse("doc", ["--resume", "a", "--lr", "1", "--steps", "2"]))


@pytest.mark.parametrize("name, epochs, drop_after", [
    ("paper_r50", 12, 11), ("paper_swin_l", 12, 11), ("release", 12, 11),
    ("paper_r50_24", 24, 20), ("paper_swin_l_24", 24, 20), ("paper_deformable_r50", 12, 11),
    ("paper_deformable_r50_24", 24, 20), ("paper_deformable_plus_r50_36", 36, 30)])
def test_schedules_of_the_release(name, epochs, drop_after):
    """--lr_drop 11 of 12 epochs, 20 of 24, 30 of 36, as in H-DETR's scripts too: with 100 steps an
    epoch, step 1100 of 1200 is the first with a tenth of the rate."""
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


def test_the_baselines_of_dac_detr_are_h_detrs():
    """Its scripts: 300 queries, FFN 2048, dropout .1; with tricks, dropout 0."""
    plain, plus = (config.preset(f"paper_deformable{name}_r50") for name in ("", "_plus"))
    assert (plain.model, plain.queries) == ("dac_once", "two_stage_unmixed")
    assert (plus.model, plus.queries) == ("dac", "two_stage")
    assert (plain.recipe.dropout, plus.recipe.dropout) == (0.1, 0)
    for cfg in (plain, plus):
        assert (cfg.recipe.num_queries, cfg.recipe.d_ffn, cfg.dn_number) == (300, 2048, 0)
        assert (cfg.lr, cfg.batch, cfg.epochs, cfg.recipe.detections) == (2e-4, 16, 12, 100)


@pytest.mark.parametrize("name, epochs, drop_after", [
    ("paper_conditional_r50", 50, 40), ("paper_conditional_dc5", 50, 40), ("paper_sd_r50", 50, 40),
    ("paper_sd_dc5", 50, 40), ("paper_conditional_r50_12", 12, 10), ("paper_sd_dc5_12", 12, 10)])
def test_presets_on_conditional_detr_are_its_codes(name, epochs, drop_after):
    """AdamW 1e-4, backbone 1e-5, weight decay 1e-4, clip .1, batch 16, dropout .1, 300 queries."""
    cfg = config.preset(name)
    r = cfg.recipe
    assert (cfg.lr, cfg.slow_lr, r.weight_decay, r.clip, cfg.batch) == (1e-4, 0.1, 1e-4, 0.1, 16)
    assert (r.dropout, r.num_queries, r.d_ffn, r.encoder_layers) == (0.1, 300, 2048, 6)
    assert (cfg.size, r.max_size, r.num_levels, r.cell_weight) == (800, 1333, 1, 0.1)
    assert (cfg.epochs, round(r.drop_at * epochs)) == (epochs, drop_after)
    assert cfg.backbone == ("resnet50_dc5" if "dc5" in name else "resnet50")
    sd = ("decoupled", "task_aware", "tal")
    assert (cfg.model, cfg.queries, cfg.loss) == (
        sd if "sd" in name else ("conditional", "learned", "focal"))


def test_a_model_of_another_base_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="--model dac does not exist for preset shapes_sd.*"
                                         "one of conditional, decoupled, split"):
        config.preset("shapes_sd", model="dac")
