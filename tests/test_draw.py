"""detr_min/draw.py: the pictures are files that can be read and hold what they should."""
import json

import pytest
import torch
from PIL import Image
from torch import nn

from detr_min import attention, boxes, model
from detr_min.data import dataset, transforms
from detr_min.run import config, draw, registry

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
    dataset = dataset.open_shapes("val", transforms.resize(64, 64), 5, size_px=128)
    figure = draw.predictions(TwoBoxes(), dataset, tmp_path / "a.png", num_images=3, threshold=0.5)
    check_png(tmp_path / "a.png")
    assert len(figure.axes) == 3
    for i, axes in enumerate(figure.axes):
        annotations = dataset.coco.imgToAnns[dataset.image_ids[i]]
        drawn = rectangles(axes)
        assert [r[:4] for r in drawn if r[4] == "--"] == [tuple(a["bbox"]) for a in annotations]
        # .5 .5 .5 .25 of 128 pixels, though the network saw 64; the diamond is below the threshold
        assert [r for r in drawn if r[4] == "-"] == [(32, 48, 64, 32, "-")]
        assert [text.get_text() for text in axes.texts] == ["triangle 0.90"]
        assert axes.get_title() == f"image {i + 1}: {len(annotations)} objects, 1 found above 0.5"


def test_predictions_at_a_lower_threshold_have_a_colour_for_each_class(tmp_path):
    dataset = dataset.open_shapes("val", transforms.resize(64, 64), 9)
    figure = draw.predictions(TwoBoxes(), dataset, tmp_path / "a.png", threshold=0.2)
    assert len(figure.axes) == 8                        # in two rows of four
    found = [patch for patch in figure.axes[0].patches if patch.get_linestyle() == "-"]
    assert len(found) == 2 and found[0].get_edgecolor() != found[1].get_edgecolor()
    assert [text.get_text() for text in figure.axes[0].texts] == ["diamond 0.30", "triangle 0.90"]


def test_neighbouring_classes_differ_in_colour():
    colours = [draw.colour_of(label) for label in range(80)]
    assert all(max(abs(a - b) for a, b in zip(colours[i], colours[j])) > 0.25
               for i in range(80) for j in range(i + 1, min(i + 5, 80)))


@pytest.mark.parametrize("h, w, size", [(64, 128, (640, 320)), (900, 800, (800, 900)),
                                        (1000, 3200, (1600, 500)), (700, 7, (24, 700))])
def test_photo_is_large_enough_to_read_and_small_enough_to_open(tmp_path, h, w, size):
    picture = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
    found = {"scores": torch.tensor([.9, .5, .4]), "labels": torch.tensor([0, 3, 1]),
             "boxes_xyxy": torch.tensor([[0., 0., w, h]] * 3)}
    figure = draw.photo(picture, found, NAMES, tmp_path / "a.png", threshold=0.5)
    assert check_png(tmp_path / "a.png") == pytest.approx(size, abs=1)
    assert rectangles(figure.axes[0]) == [(0, 0, w, h, "-")] * 2         # .5 is enough, .4 is not


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


# ---- sampling points ----

def tiny(name, **changes):
    torch.manual_seed(0)
    return registry.build(config.preset("shapes", model=name, d_model=32, num_heads=4, num_points=2,
                                     d_ffn=32, decoder_layers=2, num_queries=6, **changes))


@pytest.mark.parametrize("name, titles", [
    ("dac", ["cross-attention"] * 3),
    ("decoupled", ["classification branch", "localization branch"] * 3)])
def test_sampling_points_of_each_branch(tmp_path, name, titles):
    detector = tiny(name).train()
    image, _ = dataset.open_shapes("val", transforms.resize(64, 64), 1)[0]
    figure = draw.sampling_points(detector, image, torch.zeros(64, 64, dtype=torch.bool),
                                  tmp_path / "a.png", NAMES)
    check_png(tmp_path / "a.png")
    assert detector.training
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == titles
    assert all(axes.get_title().split("\n")[1].split()[0] in NAMES for axes in figure.axes)
    for axes in figure.axes:
        assert axes.collections[0].get_offsets().shape == (4 * 3 * 2, 2)            # H*L*K points
        assert [r[4] for r in rectangles(axes)] == ["--", "-"]          # reference, answer
    assert not any(module._forward_hooks for module in detector.modules())          # hooks are gone


def test_looks_are_those_of_the_attention_itself():
    """Against a spy in place of `look`, called while the model runs: same places, same weights."""
    detector = tiny("dac").eval()
    module, seen = detector.decoder.layers[-1].cross_attn, []
    nn.init.normal_(module.attention_weights.weight)                    # else all weigh the same
    image, is_pad = torch.rand(3, 64, 96), torch.zeros(64, 96, dtype=torch.bool)

    def spy(*args):
        seen.append(attention.DeformableAttention.look(module, *args))
        return seen[-1]
    module.look = spy
    with torch.no_grad():
        logits = detector(image[None], is_pad[None]).o_decoder[-1].logits[0]
    del module.look
    found_logits, _, looks = draw.last_looks(detector, image, is_pad)
    torch.testing.assert_close(found_logits, logits)
    references, points, weights = looks["cross_attn"]
    torch.testing.assert_close(points, seen[0][0][0].flatten(1, 3))     # no padding: the same frame
    torch.testing.assert_close(weights, seen[0][1][0].flatten(1, 3))
    assert references.shape == (6, 4) and weights.std() > 0


def test_points_are_placed_on_the_image_without_its_padding():
    """At first a head's points lie in a ring around the reference's centre: their mean is there,
    with the image padded to twice its width as well."""
    detector = tiny("deformable").eval()
    image, is_pad = torch.rand(3, 64, 128), torch.zeros(64, 128, dtype=torch.bool)
    image[:, :, 64:], is_pad[:, 64:] = 0, True
    _, _, looks = draw.last_looks(detector, image, is_pad)
    references, points, _ = looks["cross_attn"]
    torch.testing.assert_close(points.mean(1), references[:, :2], rtol=0, atol=1e-5)


def test_points_and_boxes_are_drawn_in_pixels(tmp_path):
    """On an image of 64 x 96 pixels: the mean of the points is the centre of the dashed box."""
    detector = tiny("deformable")
    image, is_pad = torch.rand(3, 64, 96), torch.zeros(64, 96, dtype=torch.bool)
    figure = draw.sampling_points(detector, image, is_pad, tmp_path / "a.png", NAMES)
    for axes in figure.axes:
        [(x, y, w, h, _)] = [r for r in rectangles(axes) if r[4] == "--"]
        x_mean, y_mean = axes.collections[0].get_offsets().mean(0)
        assert (x_mean, y_mean) == pytest.approx((x + w / 2, y + h / 2), abs=0.01)


def test_reference_points_are_drawn_as_crosses(tmp_path):
    detector = tiny("deformable_fixed", queries="learned")
    image, is_pad = torch.rand(3, 64, 64), torch.zeros(64, 64, dtype=torch.bool)
    figure = draw.sampling_points(detector, image, is_pad, tmp_path / "a.png", num_queries=2)
    for axes in figure.axes:
        assert [r[4] for r in rectangles(axes)] == ["-"] and len(axes.lines) == 1
        assert axes.get_title().split("\n")[1].startswith("class ")
