"""Conditional DETR's published files: every tensor used, answers as transformers gives them."""
import argparse
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from detr_min.run import checkpoints, config, registry

SMALL = dict(d_model=64, num_heads=4, d_ffn=96, num_queries=10, encoder_layers=2, decoder_layers=3,
             num_classes=7)


def official(body, d=64, ffn=96, queries=10, encoder_layers=2, decoder_layers=3, classes=7):
    """A state dict of random numbers with the names and shapes of the authors' files.

    The names are spelled out here from the authors' code, not taken from the table under test.
    """
    shapes = {"input_proj": (d, 2048, 1, 1), "class_embed": (classes, d),
              "bbox_embed.layers.0": (d, d), "bbox_embed.layers.1": (d, d),
              "bbox_embed.layers.2": (4, d)}
    for layer in range(encoder_layers):
        start = f"transformer.encoder.layers.{layer}"
        shapes |= {f"{start}.self_attn.out_proj": (d, d), f"{start}.linear1": (ffn, d),
                   f"{start}.linear2": (d, ffn), f"{start}.norm1": (d,), f"{start}.norm2": (d,)}
    for layer in range(decoder_layers):
        start = f"transformer.decoder.layers.{layer}"
        names = ("sa_qcontent_proj sa_qpos_proj sa_kcontent_proj sa_kpos_proj sa_v_proj "
                 "self_attn.out_proj ca_qcontent_proj ca_kcontent_proj ca_kpos_proj ca_v_proj "
                 "ca_qpos_sine_proj cross_attn.out_proj").split()
        shapes |= {f"{start}.{name}": (d, d) for name in names}
        shapes |= {f"{start}.linear1": (ffn, d), f"{start}.linear2": (d, ffn)}
        shapes |= {f"{start}.norm{i}": (d,) for i in (1, 2, 3)}
    shapes |= {"transformer.decoder.layers.0.ca_qpos_proj": (d, d),
               "transformer.decoder.norm": (d,),
               "transformer.decoder.query_scale.layers.0": (d, d),
               "transformer.decoder.query_scale.layers.1": (d, d),
               "transformer.decoder.ref_point_head.layers.0": (d, d),
               "transformer.decoder.ref_point_head.layers.1": (2, d)}
    state = {"query_embed.weight": torch.randn(queries, d)}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape) / max(shape[-1], 1) ** 0.5
        state[f"{name}.bias"] = torch.randn(shape[0]) / 4
    for layer in range(encoder_layers):
        start = f"transformer.encoder.layers.{layer}.self_attn.in_proj"
        state[f"{start}_weight"], state[f"{start}_bias"] = torch.randn(3 * d, d) / 8, torch.randn(
            3 * d) / 4
    return state | {f"backbone.0.{name}": tensor for name, tensor in body.state_dict().items()}


@functools.cache
def body_of(dilated):
    """Our ResNet-50 with random weights that keep its features small; no test changes it."""
    name = "paper_conditional_dc5" if dilated else "paper_conditional_r50"
    body = registry.build(config.preset(name, **SMALL)).backbone
    for name, module in body.named_modules():           # no BatchNorm tames random weights
        if name.endswith("bn3"):
            module.weight.fill_(0.2)
    return body


@pytest.fixture
def write(tmp_path):
    def write(content):
        torch.save(content, tmp_path / "theirs.pth")
        return tmp_path / "theirs.pth"
    return write


def test_the_real_thing_has_564_tensors(generator):
    """As the official code's state dict for R50, 91 classes."""
    state = official(body_of(False), 256, 2048, 300, 6, 6, 91)
    assert len(state) == 564


@pytest.mark.parametrize("dilated", [pytest.param(False, marks=pytest.mark.slow), True],
                         ids=["r50", "dc5"])
def test_a_file_loads_and_says_itself_whether_it_is_dc5(dilated, write, generator):
    state = official(body_of(dilated))
    args = argparse.Namespace(nheads=4, dilation=dilated)
    detector = checkpoints.load_model(write({"model": state, "args": args}))
    assert detector.config.backbone == ("resnet50_dc5" if dilated else "resnet50")
    own = detector.state_dict()
    assert len(own) == len(state)
    assert sum(t.double().sum() for t in own.values()) == pytest.approx(
        float(sum(t.double().sum() for t in state.values())))
    assert_close(own["decoder.layers.2.cross_attn.q_spatial.weight"],
                 state["transformer.decoder.layers.2.ca_qpos_sine_proj.weight"])


@pytest.mark.slow
def test_a_file_without_args_is_dc5_if_told_so(write, generator):
    path = write({"model": official(body_of(True)), "args": {"nheads": 4}})
    assert checkpoints.load_model(path).config.backbone == "resnet50"
    assert checkpoints.load_model(path, dc5=True).config.backbone == "resnet50_dc5"


def test_refusals(write, generator):
    """A sentence each: a missing tensor, one left over, DC5 that is none, DC5 into R50."""
    state = official(body_of(False))
    with pytest.raises(ValueError, match="1 missing .transformer.decoder.norm.bias"):
        checkpoints.convert({k: v for k, v in state.items()
                             if k != "transformer.decoder.norm.bias"})
    with pytest.raises(ValueError, match="1 left over .extra"):
        checkpoints.convert({**state, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="dilation=False.*leave out --dc5"):
        checkpoints.load_model(write({"model": state, "args": {"dilation": False}}), dc5=True)
    small = registry.build(config.preset("paper_conditional_r50", **SMALL))
    with pytest.raises(ValueError, match="DC5 model"):
        checkpoints.init_from(small, [], write({"model": state,
                                                "args": {"nheads": 4, "dilation": True}}))


@pytest.mark.slow
def test_init_from_takes_all_but_the_class_head_for_other_classes(write, generator):
    detector = registry.build(config.preset("paper_conditional_r50", **{**SMALL, "num_classes": 2}))
    left = checkpoints.init_from(detector, [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
                                 write({"model": official(body_of(False)), "args": {"nheads": 4}}))
    assert left == ["decoder.class_head.bias", "decoder.class_head.weight"]


# ---- against transformers ----

HUGGING_FACE = [                                # theirs, the official name; tried in this order
    (r"^model\.input_projection", "input_proj"),
    (r"^model\.query_position_embeddings", "query_embed"),
    (r"^class_labels_classifier", "class_embed"), (r"^bbox_predictor", "bbox_embed"),
    (r"^model\.(en|de)coder", r"transformer.\1coder"), (r"decoder\.layernorm", "decoder.norm"),
    (r"mlp\.fc", "linear"), (r"self_attn_layer_norm", "norm1"),
    (r"encoder_attn_layer_norm", "norm2"), (r"(encoder\..*)final_layer_norm", r"\1norm2"),
    (r"final_layer_norm", "norm3"), (r"encoder_attn\.o_proj", "cross_attn.out_proj"),
    (r"self_attn\.o_proj", "self_attn.out_proj"),
    (r"encoder_attn\.([qk])_(content|pos_sine|pos)_proj", r"ca_\1\2_proj"),
    (r"encoder_attn\.v_proj", "ca_v_proj"),
    (r"(decoder.*)self_attn\.([qk])_(content|pos)_proj", r"\1sa_\2\3_proj"),
    (r"(decoder.*)self_attn\.v_proj", r"\1sa_v_proj")]


def official_name(name):
    for theirs, original in HUGGING_FACE:
        name = re.sub(theirs, original, name)
    return name


class Body(nn.Module):
    """Our backbone in the place of theirs: features and their masks, True = image."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, pixels, pixel_mask):
        return [(x, F.interpolate(pixel_mask[None].float(), size=x.shape[-2:])[0].bool())
                for x in self.body(pixels)]


def hugging_face(lib, body, d=64, heads=4, ffn=96, queries=10, encoder_layers=2, decoder_layers=3,
                 classes=7):
    """Their model around our backbone, without dropout.

    Their auxiliary_loss=True norms between layers, as the official code does not: it stays off.
    """
    stand_in = lib.ResNetConfig(embedding_size=8, depths=[1] * 4, hidden_sizes=[8, 8, 8, 2048],
                                out_features=["stage4"])
    theirs = lib.ConditionalDetrForObjectDetection(lib.ConditionalDetrConfig(
        backbone_config=stand_in, num_labels=classes, num_queries=queries, d_model=d,
        encoder_layers=encoder_layers, decoder_layers=decoder_layers, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=ffn, decoder_ffn_dim=ffn,
        auxiliary_loss=False, dropout=0.0))
    theirs.model.backbone = Body(body)
    return theirs


def official_state(theirs):
    """The weights of `hugging_face` under the names of the authors' files."""
    state, own = {}, theirs.state_dict()
    for name, tensor in own.items():
        if name.startswith("model.backbone.body."):
            state[f"backbone.0.{name.removeprefix('model.backbone.body.')}"] = tensor
        elif not re.match(r"model\.encoder\..*\.[qkv]_proj\.", name):
            state[official_name(name)] = tensor
    for name in [name for name in own if re.match(r"model\.encoder\..*\.q_proj\.", name)]:
        joined = name.removeprefix("model.").replace("q_proj.", "in_proj_")     # one matrix there
        state[f"transformer.{joined}"] = torch.cat(
            [own[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
    return state


@pytest.mark.slow
@pytest.mark.parametrize("dilated", [False, True], ids=["r50", "dc5"])
@torch.no_grad()
def test_a_file_answers_as_transformers_does(dilated, write):
    """A padded batch of two; random weights of theirs, under the official names, in a file."""
    lib = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = hugging_face(lib, body_of(dilated)).eval()
    for name, parameter in theirs.named_parameters():
        if "backbone" not in name:
            parameter += 0.25 * torch.randn_like(parameter)
    theirs.model.query_position_embeddings.weight *= 6          # queries that differ
    ours = checkpoints.load_model(write({"model": official_state(theirs),
                                         "args": {"nheads": 4, "dilation": dilated}}))
    images, is_pad = torch.randn(2, 3, 192, 256), torch.zeros(2, 192, 256, dtype=torch.bool)
    is_pad[1, 130:], is_pad[1, :, 170:] = True, True         # padded at the bottom and at the right
    expected, last = theirs(images, (~is_pad).long()), ours(images, is_pad).o_decoder[-1]
    close = dict(atol=1e-5, rtol=0)                                 # float32
    assert_close(last.logits, expected.logits, **close)
    assert_close(last.boxes, expected.pred_boxes, **close)
    assert last.boxes.std(dim=1).mean() > 1e-4                      # a mix-up of queries would show
