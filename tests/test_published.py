"""Published weights: random checkpoints, laid out by the release's key table, find their places.

The tables below are written from the published layouts, by hand; no line of them comes from the
loader. Every tensor is random, so none can be mistaken for another.
"""
import argparse
import dataclasses
import functools
import json
import pathlib
import re
import types

import pytest
import torch
import torchvision.ops as ops

import detr_min
import eval as program
from detr_min.data import coco_json, shapes
from detr_min.run import checkpoints, config, contents, evaluate, registry

D, FFN, N, LAYERS = 32, 48, 60, 2               # small; the release has 256, 2048, 900, 6
CASES = ["dac", "two_stage", "refined", "plain"]


# The key tables


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def resnet_50():
    """53 convolutions, 53 frozen BatchNorms of four tensors: 265 keys."""
    convs = {"conv1": ("bn1", (64, 3, 7, 7))}
    before = 64
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        w = 32 * 2 ** stage
        for block in range(blocks):
            at = f"layer{stage}.{block}."
            convs[f"{at}conv1"] = f"{at}bn1", (w, before, 1, 1)
            convs[f"{at}conv2"] = f"{at}bn2", (w, w, 3, 3)
            convs[f"{at}conv3"] = f"{at}bn3", (4 * w, w, 1, 1)
            if block == 0:
                convs[f"{at}downsample.0"] = f"{at}downsample.1", (4 * w, before, 1, 1)
            before = 4 * w
    keys = {}
    for conv, (bn, shape) in convs.items():
        keys[f"backbone.0.body.{conv}.weight"] = shape
        for kind in ("weight", "bias", "running_mean", "running_var"):
            keys[f"backbone.0.body.{bn}.{kind}"] = shape[:1]
    return keys, [512, 1024, 2048]


def swin(width=8, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=3):
    """Swin-L: 192, (2, 2, 18, 2), (6, 12, 24, 48), 12."""
    keys = {"patch_embed.proj.weight": (width, 3, 4, 4), "patch_embed.proj.bias": (width,),
            **norm("patch_embed.norm", width)}
    for s in range(4):
        C = width * 2 ** s
        for b in range(depths[s]):
            at = f"layers.{s}.blocks.{b}."
            keys |= {**norm(f"{at}norm1", C), **norm(f"{at}norm2", C),
                     f"{at}attn.relative_position_bias_table": ((2 * window - 1) ** 2, heads[s]),
                     f"{at}attn.relative_position_index": (window ** 2, window ** 2),
                     **linear(f"{at}attn.qkv", 3 * C, C), **linear(f"{at}attn.proj", C, C),
                     **linear(f"{at}mlp.fc1", 4 * C, C), **linear(f"{at}mlp.fc2", C, 4 * C)}
        if s < 3:
            keys |= {f"layers.{s}.downsample.reduction.weight": (2 * C, 4 * C),
                     **norm(f"layers.{s}.downsample.norm", 4 * C)}
        if s > 0:
            keys |= norm(f"norm{s}", C)
    return ({f"backbone.0.body.{key}": shape for key, shape in keys.items()},
            [2 * width, 4 * width, 8 * width])


def attention(name, d, levels=4, heads=8, points=4):
    n = heads * levels * points
    return {**linear(f"{name}.sampling_offsets", 2 * n, d),
            **linear(f"{name}.attention_weights", n, d), **linear(f"{name}.value_proj", d, d),
            **linear(f"{name}.output_proj", d, d)}


def key_table(case, body=swin, d=D, ffn=FFN, queries=N, layers=LAYERS, classes=91):
    """{key: shape} of "model" in a published file; case is one of CASES."""
    keys, channels = body()
    for level, source in enumerate(channels + channels[-1:]):
        size = 3 if level == 3 else 1
        keys |= {f"input_proj.{level}.0.weight": (d, source, size, size),
                 f"input_proj.{level}.0.bias": (d,), **norm(f"input_proj.{level}.1", d)}
    keys["transformer.level_embed"] = (4, d)
    for i in range(layers):
        encoder, decoder = f"transformer.encoder.layers.{i}", f"transformer.decoder.layers.{i}"
        keys |= {**attention(f"{encoder}.self_attn", d), **attention(f"{decoder}.cross_attn", d),
                 f"{decoder}.self_attn.in_proj_weight": (3 * d, d),
                 f"{decoder}.self_attn.in_proj_bias": (3 * d,),
                 **linear(f"{decoder}.self_attn.out_proj", d, d), **norm(f"{decoder}.norm3", d)}
        for layer in (encoder, decoder):
            keys |= {**norm(f"{layer}.norm1", d), **norm(f"{layer}.norm2", d),
                     **linear(f"{layer}.linear1", ffn, d), **linear(f"{layer}.linear2", d, ffn)}
    two_stage = case in ("dac", "two_stage")
    if two_stage:
        keys |= {**linear("transformer.enc_output", d, d), **norm("transformer.enc_output_norm", d),
                 **linear("transformer.pos_trans", 2 * d, 2 * d),
                 **norm("transformer.pos_trans_norm", 2 * d)}
    else:
        keys |= linear("transformer.reference_points", 2, d)
    heads = {}
    for i in range(layers + two_stage):
        heads |= linear(f"class_embed.{i}", classes, d)
        for j, rows in enumerate((d, d, 4)):
            heads |= linear(f"bbox_embed.{i}.layers.{j}", rows, d)
    keys |= heads
    repeated = {"plain": "-", "refined": "bbox"}.get(case, "")
    keys |= {f"transformer.decoder.{key}": shape for key, shape in heads.items()
             if key.startswith(repeated)}
    if case != "two_stage":
        keys["query_embed.weight"] = (queries, d if case == "dac" else 2 * d)
    if case == "dac":
        keys["label_enc.weight"] = (classes + 1, d)
    return keys


def random_state(table, seed=0):
    """Random tensors of these shapes; what must be positive is, copies are copies."""
    return dict(drawn(tuple(table.items()), seed))


@functools.cache
def drawn(shapes, seed):
    """As random_state. Tests share the tensors, none of which may change."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for key, shape in shapes:
        if key.endswith("relative_position_index"):
            side = round(shape[0] ** 0.5)
            state[key] = torch.randint((2 * side - 1) ** 2, shape, generator=generator)
        elif key.startswith("transformer.decoder.") and "_embed." in key:
            state[key] = state[key.removeprefix("transformer.decoder.")]
        else:
            fan_in = max(1, torch.Size(shape[1:]).numel())
            state[key] = torch.randn(shape, generator=generator) / fan_in ** 0.5
            if key.endswith("running_var"):
                state[key] = state[key].abs() + 0.5
    return state


def save(path, state, **args):
    """As the authors' main.py does."""
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 2e-4}]},
                "lr_scheduler": {"last_epoch": 11}, "epoch": 11,
                "args": argparse.Namespace(lr=2e-4, lr_drop_epochs=None, **args)}, path)
    return path


def is_copy(key):
    return key.startswith("transformer.decoder.") and "_embed." in key


def swin_l():
    return swin(192, (2, 2, 18, 2), (6, 12, 24, 48), 12)


@pytest.mark.parametrize("body, count, parameters", [(resnet_50, 632, 47_739_225),
                                                     (swin_l, 722, 218_076_109)])
def test_the_table_has_the_releases_keys_and_parameters(body, count, parameters):
    """The counts that others found in the real files."""
    table = key_table("dac", body, 256, 2048, 900, 6)
    assert len(table) == count
    buffers = r"backbone.*(bn\d|downsample\.1)\.|relative_position_index"
    assert sum(torch.Size(shape).numel() for key, shape in table.items()
               if not is_copy(key) and not re.search(buffers, key)) == parameters


@pytest.mark.parametrize("body, count, preset", [(resnet_50, 632, "paper_r50"),
                                                 (swin_l, 722, "paper_swin_l")])
def test_full_size_files_give_the_preset_and_leave_no_tensor_unused(body, count, preset):
    """Every key but the 56 copies: 14 of class heads, 42 of box heads. Each number is one float,
    seen in every place of its tensor, so no memory is needed; its address tells which it is."""
    state = {key: torch.zeros(()).expand(shape)
             for key, shape in key_table("dac", body, 256, 2048, 900, 6).items()}
    cfg, names, ours = checkpoints.convert(state)
    assert cfg == config.preset(preset, model="dac_release", num_classes=91, batch=2)
    assert len(names) == 91 and len(ours) == len(state) - 56 == count - 56
    theirs = {tensor.data_ptr() for key, tensor in state.items() if not is_copy(key)}
    assert {tensor.data_ptr() for tensor in ours.values()} == theirs and len(theirs) == len(ours)


# Every tensor has one place


def fingerprint(tensor):
    return tensor.numel(), tensor.double().sum().item()


def padded_batch(h=75, w=101):
    """Two images, the second of them smaller; no side is a multiple of 32, or of 4."""
    is_pad = torch.zeros(2, h, w, dtype=torch.bool)
    is_pad[1, h * 2 // 3:], is_pad[1, :, w * 3 // 4:] = True, True
    images = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(0))
    return images.masked_fill(is_pad[:, None], 0), is_pad


def check_every_tensor_is_used_once(detector, state):
    theirs = sorted(fingerprint(tensor) for key, tensor in state.items() if not is_copy(key))
    ours = sorted(fingerprint(tensor) for tensor in detector.state_dict().values())
    assert len(set(theirs)) == len(theirs) and ours == theirs


@pytest.mark.parametrize("case, body", [
    *((case, swin) for case in CASES),
    *(pytest.param(case, resnet_50, marks=pytest.mark.slow) for case in CASES)])
@torch.no_grad()
def test_every_tensor_is_used_once(case, body, tmp_path):
    state = random_state(key_table(case, body))
    detector = checkpoints.load_model(save(tmp_path / "checkpoint.pth", state, num_queries=N))
    check_every_tensor_is_used_once(detector, state)
    assert not detector.training
    cfg, r = detector.config, detector.config.recipe
    assert (cfg.model, cfg.queries) == {
        "dac": ("dac_release", "two_stage"), "two_stage": ("deformable", "two_stage_unmixed"),
        "refined": ("deformable", "learned"), "plain": ("deformable_fixed", "learned")}[case]
    assert (r.d_model, r.d_ffn, r.num_queries, r.num_classes) == (D, FFN, N, 91)
    assert (r.num_heads, r.num_levels, r.num_points) == (8, 4, 4)
    assert (r.encoder_layers, r.decoder_layers) == (LAYERS, LAYERS)
    assert (cfg.size, r.max_size) == (800, 1333)                    # as published
    assert r.detections == (300 if case == "dac" else 100)
    answer = detector(*padded_batch()).o_decoder                    # 10 x 13 + 5 x 7 + ... cells
    assert len(answer) == LAYERS
    assert answer[-1].logits.shape == (2, N, 91) and answer[-1].boxes.shape == (2, N, 4)
    assert all(t.isfinite().all() for layer in answer for t in layer)
    again = registry.build(config.from_dict(dataclasses.asdict(cfg)))
    again.load_state_dict(detector.state_dict())                    # the config alone rebuilds it
    assert torch.equal(again.eval()(*padded_batch()).o_decoder[-1].boxes, answer[-1].boxes)


def test_the_way_back_of_the_page_gives_the_same_tensors(tmp_path, monkeypatch):
    """docs/release.md writes a model of ours in the release's layout; loaded again, it is equal."""
    page = (pathlib.Path(__file__).parents[1] / "docs" / "release.md").read_text()
    [code] = re.findall("```python\n(.*?)```", page, re.S)
    ours = registry.build(config.preset(
        "release", num_queries=N, num_classes=7, d_model=D, d_ffn=FFN, encoder_layers=LAYERS,
        decoder_layers=LAYERS))
    monkeypatch.setattr(detr_min, "load", lambda run: types.SimpleNamespace(model=ours))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    again = checkpoints.load_model(tmp_path / "theirs.pth")
    assert (again.config.model, again.config.dn_number) == ("dac_release", 100)
    assert again.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    theirs = torch.load(tmp_path / "theirs.pth")["model"]       # as DistributedDataParallel has it
    torch.save({f"module.{name}": tensor for name, tensor in theirs.items()}, tmp_path / "ddp.pth")
    ddp = checkpoints.load_model(tmp_path / "ddp.pth").state_dict()
    assert all(torch.equal(tensor, ddp[name]) for name, tensor in ours.state_dict().items())


PLACES = {                              # by hand: theirs, ours; same shapes that could be swapped
    "backbone.0.body.patch_embed.norm.bias": "backbone.patches.2.bias",
    "backbone.0.body.layers.1.blocks.1.norm2.bias": "backbone.stages.1.1.norm2.bias",
    "backbone.0.body.layers.2.blocks.0.mlp.fc1.weight": "backbone.stages.2.0.mlp.0.weight",
    "backbone.0.body.layers.2.blocks.0.mlp.fc2.bias": "backbone.stages.2.0.mlp.3.bias",
    "backbone.0.body.layers.3.blocks.0.attn.qkv.weight": "backbone.stages.3.0.attn.qkv.weight",
    "backbone.0.body.layers.3.blocks.1.attn.qkv.bias": "backbone.stages.3.1.attn.qkv.bias",
    "backbone.0.body.layers.3.blocks.0.attn.proj.weight": "backbone.stages.3.0.attn.proj.weight",
    "backbone.0.body.layers.3.blocks.1.attn.proj.bias": "backbone.stages.3.1.attn.proj.bias",
    "backbone.0.body.layers.0.downsample.norm.bias": "backbone.merges.0.norm.bias",
    "backbone.0.body.norm2.weight": "backbone.norms.1.weight",
    "input_proj.1.1.weight": "projections.levels.1.1.weight",
    "transformer.encoder.layers.1.norm1.weight": "encoder.layers.1.norm_attn.weight",
    "transformer.encoder.layers.1.norm2.weight": "encoder.layers.1.norm_ffn.weight",
    "transformer.encoder.layers.0.self_attn.value_proj.bias":
        "encoder.layers.0.attn.value_proj.bias",
    "transformer.encoder.layers.0.linear1.weight": "encoder.layers.0.ffn.0.weight",
    "transformer.encoder.layers.1.linear1.bias": "encoder.layers.1.ffn.0.bias",
    "transformer.encoder.layers.0.linear2.weight": "encoder.layers.0.ffn.2.weight",
    "transformer.encoder.layers.1.linear2.bias": "encoder.layers.1.ffn.2.bias",
    "transformer.decoder.layers.1.norm1.weight": "decoder.layers.1.norm_cross.weight",
    "transformer.decoder.layers.1.norm2.weight": "decoder.layers.1.norm_self.weight",
    "transformer.decoder.layers.1.norm3.bias": "decoder.layers.1.norm_ffn.bias",
    "transformer.decoder.layers.0.linear1.bias": "decoder.layers.0.ffn.0.bias",
    "transformer.decoder.layers.0.self_attn.in_proj_weight":
        "decoder.layers.0.self_attn.in_proj_weight",
    "transformer.decoder.layers.1.self_attn.in_proj_bias":
        "decoder.layers.1.self_attn.in_proj_bias",
    "transformer.decoder.layers.0.self_attn.out_proj.weight":
        "decoder.layers.0.self_attn.out_proj.weight",
    "transformer.decoder.layers.0.cross_attn.output_proj.weight":
        "decoder.layers.0.cross_attn.output_proj.weight",
    "transformer.enc_output_norm.weight": "queries.mini_detector.norm.weight",
    "transformer.enc_output.weight": "queries.mini_detector.project.weight",
    "transformer.pos_trans.weight": "queries.pos_project.weight",
    "transformer.pos_trans.bias": "queries.pos_project.bias",
    "transformer.pos_trans_norm.weight": "queries.pos_norm.weight",
    "transformer.pos_trans_norm.bias": "queries.pos_norm.bias",
    "class_embed.2.weight": "queries.mini_detector.class_head.weight",          # after the last
    "class_embed.1.weight": "decoder.class_heads.1.weight",
    "bbox_embed.2.layers.1.weight": "queries.mini_detector.box_head.2.weight",
    "bbox_embed.0.layers.2.weight": "decoder.box_heads.0.4.weight",
    "query_embed.weight": "queries.content.0", "label_enc.weight": "label_embed.weight"}


def test_tensors_are_where_they_belong():
    state = random_state(key_table("dac"))
    _, _, ours = checkpoints.convert(state)
    for key, name in PLACES.items():
        assert torch.equal(ours[name], state[key]), key


@torch.no_grad()
def test_fewer_cells_than_queries_is_handled(tmp_path):
    """The release crashes on 128 x 160 pixels: 426 cells, 900 queries. Here the rest have none."""
    table = key_table("dac", queries=900)
    detector = checkpoints.load_model(save(tmp_path / "checkpoint.pth", random_state(table)))
    images, is_pad = padded_batch(128, 160)
    assert detector(images, is_pad).o_decoder[-1].logits.shape == (2, 900, 91)


def test_queries_and_heads_that_no_shape_tells():
    """From the file's command line; without one, 300 queries and 8 heads."""
    state = random_state(key_table("two_stage"))
    assert checkpoints.convert(state)[0].recipe.num_queries == 300
    args = argparse.Namespace(num_queries=70, nheads=4)
    recipe = checkpoints.convert({"model": state, "args": args})[0].recipe
    assert (recipe.num_queries, recipe.num_heads, recipe.num_points) == (70, 4, 8)


# What is refused


@pytest.mark.parametrize("key", [
    *PLACES.keys() - {"label_enc.weight"}, "transformer.level_embed", "class_embed.0.bias",
    "transformer.encoder.layers.0.linear1.bias", "backbone.0.body.patch_embed.proj.bias",
    "backbone.0.body.layers.0.blocks.0.attn.relative_position_bias_table",
    "backbone.0.body.layers.3.blocks.1.attn.relative_position_index",
    "transformer.decoder.class_embed.2.bias", "transformer.decoder.bbox_embed.0.layers.1.weight",
    "transformer.encoder.layers.0.self_attn.attention_weights.bias"])
def test_a_missing_key_is_refused_by_name(key):
    state = random_state(key_table("dac"))
    del state[key]
    with pytest.raises(ValueError, match=re.escape(key)):
        checkpoints.convert(state)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key", [
    "transformer.foo", "class_embed.9.weight", "bbox_attention.bias", "backbone.0.body.fc.bias",
    "transformer.decoder.class_embed.9.weight", "transformer.decoder.layers.0.norm4.weight"])
def test_a_key_left_over_is_refused_by_name(case, key):
    state = {**random_state(key_table(case)), key: torch.ones(3)}
    with pytest.raises(ValueError, match=f"left over .*{re.escape(key)}"):
        checkpoints.convert(state)


@pytest.mark.parametrize("key", ["transformer.decoder.class_embed.2.bias",
                                 "transformer.decoder.bbox_embed.0.layers.1.weight"])
def test_a_copy_that_differs_is_refused_by_name(key):
    state = random_state(key_table("dac"))
    state[key] = state[key] + 1e-3
    with pytest.raises(ValueError, match=f"1 unlike the tensor it copies .{re.escape(key)}"):
        checkpoints.convert(state)


@pytest.mark.parametrize("key", [
    "transformer.decoder.layers.1.linear1.weight", "input_proj.2.0.bias", "class_embed.1.weight",
    "label_enc.weight", "backbone.0.body.norm1.weight"])
def test_a_wrong_shape_is_refused_by_name(key):
    state = random_state(key_table("dac"))
    state[key] = torch.cat([state[key], state[key]])
    with pytest.raises(ValueError, match=f"of another shape .*{re.escape(key)}"):
        checkpoints.convert(state)


TABLE = "backbone.0.body.layers.0.blocks.0.attn.relative_position_bias_table"
STRANGE = {             # what a file holds, given a good state dict; what the sentence says
    "model None": (lambda good: {"model": None}, "not a checkpoint of this package; it holds mod"),
    "model 5": (lambda good: {"model": 5}, "not a checkpoint of this package"),
    "model str": (lambda good: {"model": "swin", "epoch": 3}, "package; it holds model, epoch"),
    "model list": (lambda good: {"model": [*good]}, "not a checkpoint of this package"),
    "model tensor": (lambda good: {"model": torch.ones(2)}, "not a checkpoint of this package"),
    "list": (lambda good: [1, 2], "it holds list"),
    "tensor": (lambda good: torch.ones(3), "it holds Tensor"),
    "nothing": (lambda good: {}, "it holds nothing"),
    "ours, model None": (lambda good: {**OURS, "model": None}, "lacks model: an incomplete"),
    "ours, config None": (lambda good: {**OURS, "config": None}, "lacks config: an incomplete"),
    "state None": (lambda good: {"model": {**good, "class_embed.0.weight": None}},
                   "1 not a tensor .class_embed.0.weight"),
    "state number": (lambda good: {**good, "transformer.level_embed": 3.},
                     "1 not a tensor .transformer.level_embed"),
    "state index": (lambda good: {**good, TABLE.replace("bias_table", "index"): 3.},
                    "1 not a tensor"),
    "key number": (lambda good: {**good, 7: torch.ones(2)}, "1 left over .7"),
    "table 1-d": (lambda good: {**good, TABLE: torch.ones(25)}, re.escape(f"{TABLE} [25]")),
    "bias 0-d": (lambda good: {**good, "class_embed.0.bias": torch.tensor(1.)},
                 r"read off class_embed.0.bias \[\]"),
    "weight 0-d": (lambda good: {**good, "class_embed.1.weight": torch.tensor(1.)},
                   r"of another shape .class_embed.1.weight \[\], not \[91, 32\]"),
    "no levels": (lambda good: {**good, "transformer.level_embed": torch.ones(0, D)},
                  "is missing or has other dimensions"),
    "heads None": (lambda good: {"model": good, "args": argparse.Namespace(nheads=None)},
                   "nheads=None in its args"),
    "heads 0": (lambda good: {"model": good, "args": {"nheads": 0}}, "nheads=0 in its args"),
    "heads 7": (lambda good: {"model": good, "args": {"nheads": 7}}, "not a complete checkpoint"),
    "heads str": (lambda good: {"model": good, "args": {"nheads": "8"}}, "nheads=8 in its args"),
}
OURS = {"format": contents.FORMAT, "config": {}, "categories": [], "model": {}, "optimizer": {},
        "progress": {}}


@pytest.mark.parametrize("program_part", [
    "load_model", pytest.param("init_from", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", STRANGE)
def test_strange_content_is_refused_in_a_sentence(case, program_part, tmp_path):
    """A ValueError, which the programs print, and no traceback."""
    content, sentence = STRANGE[case]
    torch.save(content(random_state(key_table("dac"))), tmp_path / "some.pth")
    with pytest.raises(ValueError, match=f"some.pth.*{sentence}"):
        if program_part == "load_model":
            checkpoints.load_model(tmp_path / "some.pth")
        else:
            detector = registry.build(config.preset("shapes"))
            checkpoints.init_from(detector, [{"id": 1, "name": "cat"}], tmp_path / "some.pth")


@pytest.mark.parametrize("args", [None, "--nheads 4", 5])
def test_a_command_line_of_another_kind_is_not_read(args):
    state = random_state(key_table("dac"))
    assert checkpoints.convert({"model": state, "args": args})[0].recipe.num_heads == 8


def test_what_served_training_only_may_be_there_or_not():
    state = random_state(key_table("dac", resnet_50))
    state["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(7)
    assert checkpoints.convert(state)[0].dn_number == 100
    del state["label_enc.weight"]
    cfg, _, ours = checkpoints.convert(state)
    assert cfg.dn_number == 0 and "label_embed.weight" not in ours
    other = random_state(key_table("dac", classes=20))              # the release's label book
    other["label_enc.weight"] = torch.randn(92, D)                  # has 92 rows whatever it learns
    cfg, names, ours = checkpoints.convert(other)
    assert cfg.dn_number == 0 and "label_embed.weight" not in ours
    assert cfg.recipe.num_classes == 20 and names[3] == {"id": 3, "name": "class 3"}


# Files


def test_the_namespace_in_a_file_is_let_through_and_nothing_else(tmp_path):
    class Harm:
        def __reduce__(self):
            return pathlib.Path(tmp_path / "harm").touch, ()

    state = random_state(key_table("dac"))
    path = save(tmp_path / "release.pth", state)
    torch.save(state, tmp_path / "bare.pth", _use_new_zipfile_serialization=False)  # as before 2020
    for file in (path, tmp_path / "bare.pth"):
        check_every_tensor_is_used_once(checkpoints.load_model(file), state)
    save(path, state, harm=Harm())
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoints.load_model(path)
    assert not (tmp_path / "harm").exists()
    with pytest.raises(Exception, match="argparse.Namespace"):      # elsewhere it stays forbidden
        save(path, state)
        torch.load(path, weights_only=True)


def test_a_refused_file_is_named(tmp_path):
    state = random_state(key_table("dac"))
    del state["class_embed.1.bias"]
    with pytest.raises(ValueError, match=r"is not a complete.*1 missing .class_embed.1"):
        checkpoints.load_model(save(tmp_path / "release.pth", state))


def test_a_run_on_other_classes_starts_from_a_published_file(tmp_path):
    state = random_state(key_table("dac"))
    path = save(tmp_path / "release.pth", state)
    cfg = checkpoints.load_model(path).config
    changes = dict(model="dac", num_classes=2, num_queries=N, d_model=D, d_ffn=FFN,
                   encoder_layers=LAYERS, decoder_layers=LAYERS, swin=cfg.recipe.swin)
    detector = registry.build(config.preset("paper_swin_l", **changes))
    cats = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    left = checkpoints.init_from(detector, cats, path)
    assert left == sorted(
        [f"decoder.class_heads.{i}.{kind}" for i in range(LAYERS) for kind in ("weight", "bias")]
        + [f"queries.mini_detector.class_head.{kind} but for row 0" for kind in ("weight", "bias")]
        + ["label_embed.weight"])
    assert torch.equal(detector.queries.mini_detector.class_head.weight[0],
                       state[f"class_embed.{LAYERS}.weight"][0])
    assert torch.equal(detector.queries.content[0], state["query_embed.weight"])
    own_names = coco_json.all_ids()
    detector = registry.build(config.preset("paper_swin_l", **{**changes, "num_classes": 91}))
    assert checkpoints.init_from(detector, own_names, path) == []


def test_a_swin_backbone_starts_from_the_swin_repositorys_imagenet_file(tmp_path):
    """Its classifiers have no norms of levels, but a norm, a head and attention masks of no use."""
    backbone = {key.removeprefix("backbone.0.body."): tensor for key, tensor
                in random_state(swin()[0]).items() if "body.norm" not in key}
    more = {"norm.weight": torch.ones(64), "head.bias": torch.ones(9),
            "layers.0.blocks.1.attn_mask": torch.ones(4, 9, 9)}
    torch.save({"model": {**backbone, **more}}, tmp_path / "swin.pth")
    size = checkpoints.convert(random_state(key_table("dac")))[0].recipe.swin
    detector = registry.build(config.preset("paper_swin_l", swin=size, d_model=D, d_ffn=FFN,
                                            encoder_layers=1, decoder_layers=1, num_queries=9))
    left = checkpoints.init_from(detector, [{"id": 1, "name": "cat"}], tmp_path / "swin.pth")
    norms = [f"backbone.norms.{i}.{kind}" for i in range(3) for kind in ("bias", "weight")]
    assert [name for name in left if name.startswith("backbone.")] == norms
    taken = [t for name, t in detector.state_dict().items() if name not in left]
    assert sorted(map(fingerprint, taken)) == sorted(map(fingerprint, backbone.values()))
    assert torch.equal(detector.backbone.stages[1][0].mlp[3].bias,
                       backbone["layers.1.blocks.0.mlp.fc2.bias"])
    with pytest.raises(ValueError, match="not a checkpoint of this package"):
        checkpoints.load_model(tmp_path / "swin.pth")
    torch.save({"model": {key: 3. for key in backbone}}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="not a checkpoint of this package"):
        checkpoints.init_from(detector, [{"id": 1, "name": "cat"}], tmp_path / "numbers.pth")


# Classes


def test_labels_are_cocos_own_ids():
    names = {c["id"]: c["name"] for c in coco_json.all_ids()}
    assert list(names) == list(range(91)) and len(set(names.values())) == 91
    unused = [i for i, name in names.items() if name.startswith("unused")]
    assert unused == [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    known = {1: "person", 2: "bicycle", 3: "car", 10: "traffic light", 11: "fire hydrant",
             13: "stop sign", 17: "cat", 18: "dog", 25: "giraffe", 27: "backpack", 31: "handbag",
             44: "bottle", 46: "wine glass", 62: "chair", 65: "bed", 67: "dining table",
             70: "toilet", 72: "tv", 75: "remote", 82: "refrigerator", 84: "book",
             90: "toothbrush"}
    assert {i: names[i] for i in known} == known


@pytest.mark.parametrize("words, most", [
    ([], 300), pytest.param(["--top_k", "7"], 7, marks=pytest.mark.slow)])
def test_the_evaluation_program_takes_a_published_file(words, most, tmp_path, monkeypatch):
    """One picture with objects of three of COCO's classes: by name, at 800 pixels, 300 detections;
    with --nms .8 none of them overlaps a better one of its class by more."""
    path = save(tmp_path / "checkpoint.pth", random_state(key_table("dac")))
    shapes.write_folder(tmp_path, 0, 1, size_px=64)
    json_path = tmp_path / "annotations" / "instances_val.json"
    coco = json.loads(json_path.read_text())
    new = {c["id"]: i for c, i in zip(coco["categories"], (44, 1, 18, 90))}
    coco["categories"] = [{"id": i, "name": coco_json.all_ids()[i]["name"]}
                          for i in new.values()]
    for annotation in coco["annotations"]:
        annotation["category_id"] = new[annotation["category_id"]]
    json_path.write_text(json.dumps(coco))
    found, sizes, detect = [], [], evaluate.detect

    def listen(detector, images, sizes_px, **how):
        sizes.extend(image.shape[-2:] for image in images)
        found.extend(detect(detector, images, sizes_px, **how))
        return found

    monkeypatch.setattr(evaluate, "detect", listen)
    for nms in [], ["--nms", ".8"]:
        program.main([str(path), "--coco", str(tmp_path), "--out", str(tmp_path / "out"),
                      "--device", "cpu", *words, *nms])
        per_class = json.loads((tmp_path / "out" / "eval.json").read_text())["per_class"]
        assert list(per_class) == ["person", "dog", "bottle", "toothbrush"]
        first = found.pop()
        overlap = ops.box_iou(first["boxes_xyxy"], first["boxes_xyxy"]).triu(1)
        is_same = first["labels"][:, None] == first["labels"]
        assert len(first["scores"]) == most or nms and 0 < len(first["scores"]) < most
        assert nms == [] or (overlap * is_same).max() <= 0.8
    assert sizes == [(800, 800)] * 2


# Full size: python -m pytest -m slow


@pytest.mark.slow
@torch.no_grad()
def test_full_size_release_r50(tmp_path):
    state = random_state(key_table("dac", resnet_50, 256, 2048, 900, 6))
    detector = checkpoints.load_model(save(tmp_path / "checkpoint0011.pth", state))
    check_every_tensor_is_used_once(detector, state)
    assert sum(p.numel() for p in detector.parameters()) == 47_739_225
    default = config.preset("paper_r50", model="dac_release", num_classes=91, batch=2)
    assert detector.config == default
    [found] = evaluate.detect(detector, [torch.randn(3, 330, 470)], [(330, 470)], top_k=300)
    assert found["scores"].shape == (300,) and found["boxes_xyxy"].isfinite().all()
