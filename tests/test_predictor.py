"""detr_min.load(path).detect(pictures): all kinds of pictures; dicts that other libraries take."""
import re

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import detr_min
from detr_min.data import dataset, shapes, transforms
from detr_min.run import checkpoints, config, evaluate, predictor, registry

NAMES = ["ellipse", "rectangle", "triangle", "diamond"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder of a small detector with random weights, whose scores differ."""
    path = tmp_path_factory.mktemp("run")
    cfg = config.preset("shapes", size=64, d_model=32, num_heads=4, d_ffn=32, decoder_layers=1,
                        num_queries=9)
    torch.manual_seed(0)
    detector = registry.build(cfg)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        detector.decoder.box_heads[0][-1].bias[2:] = 4.0                # boxes that overlap
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]
    checkpoints.save(path / "last.pt", detector, torch.optim.SGD(detector.parameters()), cfg,
                     categories, {"step": 1})
    return path


@pytest.fixture(scope="module")
def detector(folder):
    return detr_min.load(folder, device="cpu")


def pixels(h=60, w=90, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys() == {"boxes", "labels", "scores", "names"}
    for key in ("boxes", "labels", "scores"):
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=0)
    assert found["names"] == wanted["names"]


# --- what it takes --------------------------------------------------------------------------------

def test_a_picture_is_the_same_picture_in_every_form(detector, tmp_path):
    """Path, str, PIL, array, tensor; alone, in a list, in a tuple."""
    array, path = pixels(), tmp_path / "a.png"
    image = Image.fromarray(array)
    image.save(path)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    [expected] = detector.detect([path], threshold=0)
    assert len(expected["scores"]) == 9 * 4
    for form in (path, str(path), image, array, tensor):
        assert_same(detector.detect(form, threshold=0), expected)
        [found] = detector.detect((form,), threshold=0)
        assert_same(found, expected)


def test_pictures_of_several_sizes_are_answered_each_as_if_alone(detector):
    pictures = [pixels(60, 90), pixels(80, 40, seed=1), pixels(33, 33, seed=2)]
    together = detector.detect(pictures, threshold=0)
    for picture, found in zip(pictures, together, strict=True):
        assert_same(found, detector.detect(picture, threshold=0))
        h, w, _ = picture.shape
        assert (found["boxes"] <= torch.tensor([w, h, w, h])).all() and (found["boxes"] >= 0).all()
    assert detector.detect([]) == []


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb(detector, mode):
    picture = Image.fromarray(pixels()).convert(mode)
    expected = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)
    assert_same(detector.detect(picture, threshold=0), detector.detect(expected, threshold=0))


def test_a_gray_array_is_repeated_in_three_channels(detector):
    gray = pixels()[:, :, 0]
    assert_same(detector.detect(gray, threshold=0),
                detector.detect(np.stack([gray] * 3, axis=2), threshold=0))


def test_a_picture_is_turned_as_its_exif_tag_says(detector, tmp_path):
    """Tag 6: to be shown turned by 90 degrees, so boxes are in a picture of 60 x 90."""
    exif, image = Image.Exif(), Image.fromarray(pixels(60, 90))
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    upright = detector.detect(np.rot90(pixels(60, 90), -1).copy(), threshold=0)
    assert_same(detector.detect(tmp_path / "turned.png", threshold=0), upright)
    with Image.open(tmp_path / "turned.png") as opened:
        assert_same(detector.detect(opened, threshold=0), upright)
    assert upright["boxes"][:, 3].max() > 60


# --- what it gives --------------------------------------------------------------------------------

def test_what_is_found_is_what_the_evaluation_finds(detector, tmp_path):
    """Through the data set, in a padded batch of one size: the same detections, pixel by pixel."""
    shapes.write_folder(tmp_path, 1, 3, size_px=96)
    val_set = dataset.open_folder(tmp_path, "val", transforms.resize(64, 64))
    images, targets = zip(*val_set)
    expected = evaluate.detect(detector.model, images, [t.size_px for t in targets])
    files = sorted((tmp_path / "val").iterdir())
    for found, wanted in zip(detector.detect(files, threshold=0), expected, strict=True):
        torch.testing.assert_close(found["scores"], wanted["scores"])
        torch.testing.assert_close(found["labels"], wanted["labels"])
        torch.testing.assert_close(found["boxes"], wanted["boxes_xyxy"])


def test_threshold_top_k_and_names(detector):
    everything = detector.detect(pixels(), threshold=0)
    scores = everything["scores"]
    assert (scores.diff() <= 0).all() and scores[0] > scores[20] > scores[-1]
    assert everything["names"] == [NAMES[label] for label in everything["labels"].tolist()]
    threshold = scores[5].item()
    kept = detector.detect(pixels(), threshold=threshold)
    assert_same(kept, {key: value[:6] for key, value in everything.items()})    # >=, not >
    assert_same(detector.detect(pixels(), threshold=0, top_k=4),
                {key: value[:4] for key, value in everything.items()})
    nothing = detector.detect(pixels(), threshold=1)
    assert nothing["boxes"].shape == (0, 4) and nothing["labels"].dtype == torch.int64
    assert nothing["names"] == []


def test_nms_is_the_evaluations(detector):
    [expected] = evaluate.detect(detector.model, [detector.network_image(predictor.read(pixels()))],
                                 [(60, 90)], nms=0.3)
    found = detector.detect(pixels(), threshold=0, nms=0.3)
    assert 0 < len(found["scores"]) < 36
    torch.testing.assert_close(found["boxes"], expected["boxes_xyxy"], rtol=0, atol=0)


def test_load_takes_a_folder_or_a_file(folder, detector):
    by_file = detr_min.load(folder / "last.pt", "cpu")
    assert_same(by_file.detect(pixels(), 0), detector.detect(pixels(), 0))
    assert by_file.names == NAMES and by_file.config == detector.config
    assert not by_file.model.training


# --- other libraries take it as it is -------------------------------------------------------------

def test_torchvision_draws_it(detector):
    picture = torch.from_numpy(pixels()).permute(2, 0, 1)
    found = detector.detect(picture, threshold=0, top_k=3)
    drawn = torchvision.utils.draw_bounding_boxes(picture, found["boxes"], labels=found["names"])
    assert drawn.shape == picture.shape and (drawn != picture).any()


def test_torchmetrics_scores_it(detector):
    """Its own answers as the truth: mean AP 1."""
    detection = pytest.importorskip("torchmetrics.detection")
    pytest.importorskip("pycocotools")
    found = detector.detect([pixels(), pixels(seed=1)], threshold=0, top_k=5)
    metric = detection.MeanAveragePrecision(backend="pycocotools")
    metric.update(found, [{"boxes": f["boxes"], "labels": f["labels"]} for f in found])
    assert metric.compute()["map"] == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_supervision_makes_detections_of_it(detector):
    supervision = pytest.importorskip("supervision")
    found = detector.detect(pixels(), threshold=0, top_k=5)
    detections = supervision.Detections.from_transformers(found, dict(enumerate(detector.names)))
    assert np.array_equal(detections.xyxy, found["boxes"].numpy())
    assert np.array_equal(detections.confidence, found["scores"].numpy())
    assert [*detections["class_name"]] == found["names"]


# --- what is refused ------------------------------------------------------------------------------

@pytest.mark.parametrize("picture, sentence", [
    (torch.rand(3, 8, 8),
     "(3, 8, 8) of torch.float32 is not a picture: uint8 (3, h, w) is expected"),
    (torch.zeros(8, 8, 3, dtype=torch.uint8), "(8, 8, 3) of torch.uint8 is not a picture"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "(1, 3, 8, 8) of torch.uint8 is not a picture"),
    (np.zeros((8, 8, 3)), "(8, 8, 3) of float64 is not a picture: uint8 (h, w, 3) is expected"),
    (np.zeros((3, 8, 9), np.uint8), "(3, 8, 9) of uint8 is not a picture"),
    (np.zeros((8, 8, 1), np.uint8), "(8, 8, 1) of uint8 is not a picture"),
    (np.zeros(8, np.uint8), "(8,) of uint8 is not a picture"),
    (None, "NoneType is not a picture: a path, a PIL image"), (5, "int is not a picture"),
    ("nowhere.jpg", "nowhere.jpg: there is no such file")])
def test_what_is_no_picture_is_refused_in_a_sentence(detector, picture, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)):
        detector.detect(picture)


def test_an_unreadable_file_is_named(detector, tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    Image.fromarray(pixels()).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    for name in ("text.jpg", "cut.png"):
        with pytest.raises(ValueError, match=f"{name} is not a readable picture"):
            detector.detect(tmp_path / name)


@pytest.mark.parametrize("wrong, sentence", [
    *(({name: share}, f"{name} {share}: scores and IoUs are in .0, 1.")
      for name in ("threshold", "nms") for share in (-0.1, 1.5, float("nan"))),
    ({"top_k": 0}, "top_k 0: one detection is the least"), ({"top_k": -1}, "top_k -1")])
def test_numbers_that_cannot_be_meant_are_refused(detector, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        detector.detect(pixels(), **wrong)


@pytest.mark.parametrize("picture", [pixels()[:0], torch.zeros(3, 5, 0, dtype=torch.uint8)])
def test_a_picture_without_a_pixel_is_refused(detector, picture):
    with pytest.raises(ValueError, match="has no pixel: is it cut out beside what there is"):
        detector.detect(picture)


def test_a_missing_or_foreign_file_is_refused_by_load(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        detr_min.load(tmp_path / "nowhere")
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this package"):
        detr_min.load(tmp_path / "foreign.pt")


def test_a_device_that_is_not_there_is_refused(folder):
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"device {absent} is not available here"):
        predictor.Predictor(folder, absent)
