"""Where a trained decoder looks: numbers of the attention itself, and drawings that show them."""
import pytest
import torch
from PIL import Image
from torch import nn

from detr_min import attention
from detr_min.data import dataset, transforms
from detr_min.run import config, looks, registry
from test_draw import NAMES, rectangles

def tiny(name="dac", base="shapes", **changes):
    torch.manual_seed(0)
    changes = {"model": name, **changes}
    return registry.build(config.preset(base, d_model=32, num_heads=4, num_points=2, d_ffn=32,
                                        decoder_layers=2, num_queries=6, **changes))


def a_picture(h=64, w=96):
    torch.manual_seed(0)
    return torch.rand(3, h, w), torch.zeros(h, w, dtype=torch.bool)


@pytest.mark.parametrize("words, branches", [
    (dict(name="decoupled"), ["classification branch", "localization branch"]),
    (dict(base="shapes_conditional", name="conditional"), ["cross-attention"]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (dict(), ["cross-attention"]),
        (dict(name="split"), ["classification branch", "localization branch"]),
        (dict(base="shapes_sd", name="decoupled"),
         ["classification branch", "localization branch"])))])
def test_a_panel_for_each_branch_beside_the_picture(tmp_path, words, branches):
    detector = tiny(**words).train()
    image, _ = dataset.open_shapes("val", transforms.resize(64, 64), 1)[0]
    figure = looks.where_it_looks(detector, image, torch.zeros(64, 64, dtype=torch.bool),
                                  tmp_path / "a.png", NAMES, num_queries=1)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(2**24)) > 50
    assert detector.training and not any(m._forward_hooks for m in detector.modules())
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title in looks.BRANCHES.values()] == branches
    assert titles[0].split()[0] in NAMES                        # the picture alone
    assert [style for *_, style in rectangles(figure.axes[0])] == ["-"]


def test_points_are_those_of_the_attention_itself():
    """Against a spy in place of `look`, called while the model runs: same places, same weights."""
    detector, (image, is_pad) = tiny().eval(), a_picture()
    module, seen = detector.decoder.layers[-1].cross_attn, []
    nn.init.normal_(module.attention_weights.weight)                    # else all weigh the same

    def spy(*args):
        seen.append(attention.DeformableAttention.look(module, *args))
        return seen[-1]
    module.look = spy
    with torch.no_grad():
        answer = detector(image[None], is_pad[None]).o_decoder[-1]
    del module.look
    logits, pred_boxes, calls = looks.last_calls(detector, image, is_pad)
    torch.testing.assert_close((logits, pred_boxes), (answer.logits[0], answer.boxes[0]))
    found, args = calls[""]
    assert found is module and list(calls) == [""]
    references, points, weights = looks.sampling_points(module, *args)
    torch.testing.assert_close(points, seen[0][0][0].flatten(1, 3))     # no padding: the same frame
    torch.testing.assert_close(weights, seen[0][1][0].flatten(1, 3))
    assert references.shape == (6, 4) and weights.std() > 0


def test_points_are_placed_on_the_image_without_its_padding():
    """At first a head's points lie in a ring around the reference's centre: their mean is there,
    with the image padded to twice its width as well."""
    detector, (image, is_pad) = tiny("deformable").eval(), a_picture(64, 128)
    image[:, :, 64:], is_pad[:, 64:] = 0, True
    module, args = looks.last_calls(detector, image, is_pad)[2][""]
    references, points, _ = looks.sampling_points(module, *args)
    torch.testing.assert_close(points.mean(1), references[:, :2], rtol=0, atol=1e-5)


def test_a_map_is_the_mean_of_the_heads_on_the_image_alone():
    """8 x 8 cells are image; a row of the map sums to 1 there, and softmax gives it."""
    detector, (image, is_pad) = tiny("conditional", "shapes_conditional").eval(), a_picture()
    image[:, :, 64:], is_pad[:, 64:] = 0, True
    module, args = looks.last_calls(detector, image, is_pad)[2][""]
    found = looks.attention_map(module, *args)
    assert found.shape == (6, 8, 8)
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(6))
    with torch.no_grad():
        q, k = (x[0] for x in module.queries_and_keys(*args))           # (H, N, d), (H, S, d)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores[..., args[-1].is_pad[0]] = -float("inf")
        expected = scores.softmax(-1).mean(0).unflatten(-1, args[-1].spatial_shapes[0])[..., :8]
    torch.testing.assert_close(found, expected)


def test_a_name_is_no_formula(tmp_path):
    """To matplotlib $x^$ is mathematics, and wrong."""
    figure = looks.where_it_looks(tiny("deformable"), *a_picture(), tmp_path / "a.png",
                                  ["$x^$"] * 4, num_queries=1)
    assert figure.axes[0].get_title().startswith("$x^$ ")


def test_points_and_boxes_are_drawn_in_pixels(tmp_path):
    """On an image of 64 x 96 pixels: the mean of the points is the centre of the dashed box."""
    figure = looks.where_it_looks(tiny("deformable"), *a_picture(), tmp_path / "a.png", NAMES)
    panels = figure.axes[1::2]
    assert len(panels) == 3
    for axes in panels:
        assert axes.collections[0].get_offsets().shape == (4 * 3 * 2, 2)            # H*L*K points
        [(x, y, w, h, _)] = [r for r in rectangles(axes) if r[4] == "--"]
        x_mean, y_mean = axes.collections[0].get_offsets().mean(0)
        assert (x_mean, y_mean) == pytest.approx((x + w / 2, y + h / 2), abs=0.01)


@pytest.mark.slow
def test_a_map_is_drawn_over_the_whole_picture(tmp_path):
    detector = tiny("conditional", "shapes_conditional")
    figure = looks.where_it_looks(detector, *a_picture(), tmp_path / "a.png", num_queries=2)
    for axes in figure.axes[1::2]:
        _, over = axes.get_images()
        assert tuple(over.get_extent()) == (0, 96, 64, 0) and over.get_array().shape == (8, 12)
        assert over.get_array().sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_reference_points_are_drawn_as_crosses(tmp_path):
    detector, (image, is_pad) = tiny("deformable_fixed", queries="learned"), a_picture(64, 64)
    figure = looks.where_it_looks(detector, image, is_pad, tmp_path / "a.png", num_queries=2)
    for picture, axes in zip(figure.axes[::2], figure.axes[1::2]):
        assert [r[4] for r in rectangles(axes)] == ["-"] and len(axes.lines) == 1
        assert picture.get_title().startswith("class ")
