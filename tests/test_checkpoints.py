"""A checkpoint is never broken, is never code, and gives the same model back."""
import pathlib

import pytest
import torch

from detr_min import checkpoints, config, model

TINY = dict(d_model=32, num_heads=4, d_ffn=32, encoder_layers=1, decoder_layers=2, num_queries=5,
            num_levels=3)
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def saved(path, categories=CATEGORIES, **changes):
    """A detector with random weights, saved to path."""
    cfg = config.preset("shapes", **TINY, num_classes=len(categories), **changes)
    detector = model.build(cfg)
    optimizer = torch.optim.AdamW(detector.parameters())
    checkpoints.save(path, detector, optimizer, cfg, categories, {"step": 4})
    return detector.eval()


@pytest.mark.parametrize("name", list(model.DECODERS))
def test_load_model_gives_the_same_detector_back(name, tmp_path):
    detector = saved(tmp_path / "last.pt", model=name)
    loaded = checkpoints.load_model(tmp_path)                # a run folder means its last.pt
    images = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    is_pad = torch.zeros(1, 64, 48, dtype=torch.bool)
    for ours, theirs in zip(loaded(images, is_pad).o_decoder, detector(images, is_pad).o_decoder):
        assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.boxes, theirs.boxes)
    assert loaded.categories == CATEGORIES and loaded.config.model == name and not loaded.training


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

    torch.save({"format": checkpoints.FORMAT, "model": Harm()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError):
        checkpoints.load_model(tmp_path / "evil.pt")
    assert not (tmp_path / "harm").exists()


def test_init_from_other_classes_leaves_the_class_heads_at_random(tmp_path):
    trained = saved(tmp_path / "a.pt")
    three = CATEGORIES + [{"id": 9, "name": "cow"}]
    detector = model.build(config.preset("shapes", **TINY, num_classes=3))
    left = checkpoints.init_from(detector, three, tmp_path / "a.pt")
    assert left and all("class_head" in name for name in left)
    for name, tensor in detector.state_dict().items():
        if name not in left:
            assert torch.equal(tensor, trained.state_dict()[name])


def test_as_many_classes_under_other_names_are_other_classes(tmp_path):
    saved(tmp_path / "a.pt")
    detector = model.build(config.preset("shapes", **TINY, num_classes=2))
    birds = [{"id": 1, "name": "hen"}, {"id": 2, "name": "tit"}]
    assert any("class_head" in n for n in checkpoints.init_from(detector, birds, tmp_path / "a.pt"))
    assert checkpoints.init_from(detector, CATEGORIES, tmp_path / "a.pt") == []


def test_init_from_another_kind_of_network_is_refused(tmp_path):
    saved(tmp_path / "a.pt")
    with torch.no_grad():
        other = torch.nn.Linear(3, 5)
    with pytest.raises(ValueError, match="no tensor fits"):
        checkpoints.init_from(other, CATEGORIES, tmp_path / "a.pt")
