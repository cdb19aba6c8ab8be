"""A checkpoint is never broken, is never code, and gives the same model back."""
import pathlib

import pytest
import torch

from detr_min import backbone
from detr_min.run import checkpoints, config, contents, registry

TINY = dict(d_model=32, num_heads=4, d_ffn=32, encoder_layers=1, decoder_layers=2, num_queries=5,
            num_levels=3)
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def saved(path, categories=CATEGORIES, **changes):
    """A detector with random weights, saved to path."""
    cfg = config.preset("shapes", **TINY, num_classes=len(categories), **changes)
    detector = registry.build(cfg)
    optimizer = torch.optim.AdamW(detector.parameters())
    checkpoints.save(path, detector, optimizer, cfg, categories, {"step": 4})
    return detector.eval()


@pytest.mark.parametrize("name, queries", [
    ("dac", "two_stage"), ("deformable_fixed", "learned"), ("decoupled", "task_aware"),
    *(pytest.param(*words, marks=pytest.mark.slow) for words in (
        *((name, "two_stage") for name in registry.DECODERS["deformable"] if name != "dac"),
        ("deformable", "two_stage_unmixed"), ("split", "task_aware")))])
def test_load_model_gives_the_same_detector_back(name, queries, tmp_path):
    detector = saved(tmp_path / "last.pt", model=name, queries=queries)
    loaded = checkpoints.load_model(tmp_path)                # a run folder means its last.pt
    images = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    is_pad = torch.zeros(1, 64, 48, dtype=torch.bool)
    for ours, theirs in zip(loaded(images, is_pad).o_decoder, detector(images, is_pad).o_decoder):
        assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.boxes, theirs.boxes)
    assert loaded.categories == CATEGORIES and not loaded.training
    assert (loaded.config.model, loaded.config.queries) == (name, queries)


@pytest.mark.slow
def test_load_model_asks_for_no_weights_but_the_files(tmp_path, monkeypatch):
    """Neither ImageNet's nor a network: a run with ResNet-50 loads on a machine that is offline."""
    def refuse(*args, **kwargs):
        raise AssertionError("load_model asked for ImageNet's weights")

    detector = saved(tmp_path / "last.pt", backbone="resnet50")
    monkeypatch.setattr(backbone.ResNet50, "load_imagenet", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    loaded = checkpoints.load_model(tmp_path / "last.pt")
    assert torch.equal(loaded.backbone.body.conv1.weight, detector.backbone.body.conv1.weight)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()

    def full(content, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="is the disk full.*still holds the state saved before"):
        saved(tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]  # and no half-written one beside it


def test_broken_and_foreign_files_are_refused_in_a_sentence(tmp_path):
    saved(tmp_path / "good.pt")
    half = tmp_path / "half.pt"
    half.write_bytes((tmp_path / "good.pt").read_bytes()[:5000])
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "foreign.pt")
    (tmp_path / "empty").mkdir()
    for path, message in ((half, "broken or half-copied"), (text, "broken or half-copied"),
                          (tmp_path / "foreign.pt", "not a checkpoint of this.*encoder.weight"),
                          (tmp_path / "nowhere.pt", "does not exist"),
                          (tmp_path / "empty", "holds no last.pt")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            checkpoints.load_model(path)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Harm:
        def __reduce__(self):
            return pathlib.Path(tmp_path / "harm").touch, ()

    torch.save({"format": contents.FORMAT, "model": Harm()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError):
        checkpoints.load_model(tmp_path / "evil.pt")
    assert not (tmp_path / "harm").exists()


HEADS = [f"decoder.class_heads.{i}.{kind}" for i in range(2) for kind in ("bias", "weight")]
FIRST_HEAD = [f"queries.mini_detector.class_head.{kind}" for kind in ("bias", "weight")]


def started_from(path, categories, **changes):
    """The state before and after init_from of a detector for `categories`, and what it returned."""
    detector = registry.build(config.preset("shapes", **{**TINY, **changes},
                                            num_classes=len(categories)))
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    return before, detector.state_dict(), checkpoints.init_from(detector, categories, path)


@pytest.mark.parametrize("names", [["hen"], ["hen", "tit"], ["dog", "cat"], ["cat", "dog", "cow"]])
def test_init_from_other_classes_takes_all_but_what_knows_classes(names, tmp_path):
    """Fewer, as many under other names, the same in another order, more: class heads and label
    embeddings stay fresh, but for row 0 of the encoder's head, which means any object."""
    trained = saved(tmp_path / "a.pt", dn_number=4).state_dict()
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    before, after, left = started_from(tmp_path / "a.pt", categories, dn_number=4)
    in_part = [f"{name} but for row 0" for name in FIRST_HEAD] if len(names) > 1 else []
    assert left == sorted([*HEADS, *in_part, "label_embed.weight"])
    for name, tensor in after.items():
        if name in FIRST_HEAD:
            assert torch.equal(tensor[:1], trained[name][:1])
            assert torch.equal(tensor[1:], before[name][1:])
        else:
            assert torch.equal(tensor, (before if name in left else trained)[name]), name


def test_init_from_the_same_classes_takes_all(tmp_path):
    trained = saved(tmp_path / "a.pt", dn_number=4).state_dict()
    _, after, left = started_from(tmp_path / "a.pt", CATEGORIES, dn_number=4)
    assert left == [] and all(torch.equal(after[name], trained[name]) for name in trained)


def test_objectness_of_another_width_or_of_none_is_not_taken(tmp_path):
    """Neither its weight nor its bias, which would fit but means nothing alone."""
    saved(tmp_path / "a.pt")
    saved(tmp_path / "learned.pt", queries="learned")
    three = CATEGORIES + [{"id": 9, "name": "cow"}]
    for path, changes in ((tmp_path / "a.pt", {"d_model": 64}), (tmp_path / "learned.pt", {})):
        before, after, left = started_from(path, three, **changes)
        assert {*FIRST_HEAD} < {*left}
        assert all(torch.equal(before[name], after[name]) for name in FIRST_HEAD)


def test_init_from_another_kind_of_network_is_refused(tmp_path):
    saved(tmp_path / "a.pt")
    with torch.device("meta"):
        other = registry.build(config.preset("paper_conditional_r50", d_model=64))
    with pytest.raises(ValueError, match="no tensor fits"):
        checkpoints.init_from(other, CATEGORIES, tmp_path / "a.pt")
