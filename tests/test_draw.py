"""Pictures of a run: they are files that can be read and hold what they should."""
import json

import pytest
import torch
from PIL import Image
from torch import nn

from detr_min import boxes, model
from detr_min.data import dataset, transforms
from detr_min.run import draw

NAMES = ["ellipse", "rectangle", "triangle", "diamond"]


class TwoBoxes(nn.Module):
    """Finds a triangle, score .9, and a diamond, score .3, in every image."""

    def forward(self, images, is_pad):
        logits = torch.full((1, 2, 4), 0.01)
        logits[0, 0, 2], logits[0, 1, 3] = 0.9, 0.3
        pred_boxes = torch.tensor([[[.5, .5, .5, .25], [.9, .02, .1, .04]]])
        return model.Output([boxes.Predictions(logits.logit(), pred_boxes)], [], None)


def check_png(path):
    """A png that can be decoded and is not of a few colours; returns its size."""
    with Image.open(path) as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(2**24)) > 50
        return picture.size


def rectangles(axes):
    """(x, y, width, height, line style) of all boxes drawn, in pixels of the picture."""
    return [(*(round(v, 3) for v in (p.get_x(), p.get_y(), p.get_width(), p.get_height())),
             p.get_linestyle()) for p in axes.patches]


def test_predictions_show_objects_and_what_scores_enough(tmp_path):
    ds = dataset.open_shapes("val", transforms.resize(64, 64), 5, size_px=128)
    figure = draw.predictions(TwoBoxes(), ds, tmp_path / "a.png", num_images=3, threshold=0.5)
    check_png(tmp_path / "a.png")
    assert len(figure.axes) == 3
    for i, axes in enumerate(figure.axes):
        annotations = ds.coco.imgToAnns[ds.image_ids[i]]
        drawn = rectangles(axes)
        assert [r[:4] for r in drawn if r[4] == "--"] == [tuple(a["bbox"]) for a in annotations]
        # .5 .5 .5 .25 of 128 pixels, though the network saw 64; the diamond is below the threshold
        assert [r for r in drawn if r[4] == "-"] == [(32, 48, 64, 32, "-")]
        names = [NAMES[ds.label_of[a["category_id"]]] for a in annotations]
        assert [text.get_text() for text in axes.texts] == [*names, "triangle 0.90"]
        assert axes.get_title() == (f"image {i + 1}: 00000{i + 1}.png\n{len(names)} object"
                                    f"{'s' * (len(names) > 1)}, 1 detection")
    assert figure.get_suptitle().endswith("detections that score 0.5 or more")


def test_predictions_are_of_images_with_objects_first(tmp_path):
    """Only one picture has objects, so the second drawn has none."""
    ds = dataset.open_shapes("val", transforms.resize(64, 64), 5, size_px=128)
    for image_id in (1, 2, 3, 5):
        ds.coco.imgToAnns[image_id] = []
    figure = draw.predictions(TwoBoxes(), ds, tmp_path / "a.png", num_images=2)
    assert [axes.get_title()[:7] for axes in figure.axes] == ["image 4", "image 1"]
    assert figure.axes[1].get_title().endswith("\n0 objects, 1 detection")


def test_tiles_have_the_shape_of_the_pictures(tmp_path):
    ds = dataset.open_shapes("val", transforms.resize(64, 64), 4, size_px=128)
    for image in ds.coco.imgs.values():
        image["width"], image["height"] = 128, 64
    ds.picture = lambda image: torch.zeros(3, 64, 128, dtype=torch.uint8)
    wide = draw.predictions(TwoBoxes(), ds, tmp_path / "a.png")
    assert wide.get_size_inches().tolist() == pytest.approx([4 * 3.2, 3.2 / 2 + .4])


def test_predictions_at_a_lower_threshold_have_a_colour_for_each_class(tmp_path):
    ds = dataset.open_shapes("val", transforms.resize(64, 64), 2)
    figure = draw.predictions(TwoBoxes(), ds, tmp_path / "a.png", threshold=0.2)
    found = [patch for patch in figure.axes[0].patches if patch.get_linestyle() == "-"]
    assert len(found) == 2 and found[0].get_edgecolor() != found[1].get_edgecolor()
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[-2:] == ["diamond 0.30", "triangle 0.90"]


def test_neighbouring_classes_differ_in_colour():
    colours = [draw.colour_of(label) for label in range(80)]
    assert all(max(abs(a - b) for a, b in zip(colours[i], colours[j])) > 0.25
               for i in range(80) for j in range(i + 1, min(i + 5, 80)))


@pytest.mark.parametrize("h, w, size", [
    (64, 128, (640, 320)), (700, 7, (24, 700)),
    pytest.param(900, 800, (800, 900), marks=pytest.mark.slow),
    pytest.param(200, 3200, (1600, 100), marks=pytest.mark.slow)])
def test_photo_is_large_enough_to_read_and_small_enough_to_open(tmp_path, h, w, size):
    """All that a Predictor found is drawn, the surest on top."""
    picture = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
    found = {"scores": torch.tensor([.9, .5]), "labels": torch.tensor([0, 3]),
             "boxes": torch.tensor([[0., 0., w, h], [0., 0., w / 2, h]])}
    figure = draw.photo(picture, found, NAMES, tmp_path / "a.png")
    assert check_png(tmp_path / "a.png") == pytest.approx(size, abs=1)
    assert rectangles(figure.axes[0]) == [(0, 0, w / 2, h, "-"), (0, 0, w, h, "-")]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["diamond 0.50", "ellipse 0.90"]


def test_curves_show_the_parts_of_the_loss_and_ap(tmp_path):
    lines = []
    for step in (10, 20, 30):
        terms = {"cls": 1.0, "l1": 2.0, "giou": step / 10, "pairs": 500}
        lines.append({"step": step, "loss": 9.0, "O": terms, "encoder": {**terms, "cls": 0.5}})
    empty = {"AP": 0.1, "AP50": 0.2, "AP75": None}
    lines[1:1] = [{"step": 15, "val": empty},
                  {"step": 30, "val": {**empty, "AP": 0.3, "AP75": 0.25}}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = draw.curves(tmp_path / "log.jsonl", tmp_path / "a.png")
    check_png(tmp_path / "a.png")
    losses, aps = ({line.get_label().split()[0]: line.get_xydata().tolist()
                    for line in axes.lines} for axes in figure.axes)
    assert losses == {"loss": [[10, 9], [20, 9], [30, 9]],                  # there is no C-Decoder
                      "O": [[10, 4], [20, 5], [30, 6]],                     # pairs is not summed
                      "encoder": [[10, 3.5], [20, 4.5], [30, 5.5]]}
    assert aps == {"AP": [[15, .1], [30, .3]], "AP50": [[15, .2], [30, .2]], "AP75": [[30, .25]]}


def test_curves_of_a_run_that_was_stopped_at_once(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    draw.curves(tmp_path / "log.jsonl", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size


@pytest.mark.filterwarnings("error")
def test_names_in_any_script_are_drawn_without_complaint(tmp_path):
    ds = dataset.open_shapes("val", transforms.resize(64, 64), 2)
    ds.coco.imgs[1]["file_name"] = "a\\b/照片$x^$\n.jpg"             # no formula of matplotlib's
    ds.coco.imgs[2]["file_name"] = "0123456789abc" + "é" * 60 + "123456789.jpg"
    ds.categories = [{"id": i, "name": "猫"} for i in range(4)]
    figure = draw.predictions(TwoBoxes(), ds, tmp_path / "a.png")
    assert check_png(tmp_path / "a.png")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0].startswith("image 1: 照片$x^$\n.jpg\n")
    assert titles[1].startswith("image 2: 0123456789abc...123456789.jpg\n")
