"""The page that shows what queries do: its numbers are the model's, and in a browser it works.

The browser is driven through its DevTools protocol over two pipes, which needs no other package.
"""
import base64
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import time

import pytest
import torch
from helpers import f64
from PIL import Image

from detr_min import attention, boxes, criterion, matcher, tal_loss
from detr_min.data import dataset, transforms
from detr_min.run import config, explore, predictor, registry

ROOT = pathlib.Path(__file__).parent.parent
MODELS = {"dac": ("shapes", "dac"), "decoupled": ("shapes", "decoupled"),
          "conditional": ("shapes_conditional", "conditional"), "sd": ("shapes_sd", "decoupled")}


def model_of(kind, names=("ellipse", "rectangle", "triangle", "diamond")):
    """A small random Detector whose scores differ and whose boxes move from layer to layer."""
    preset, decoder = MODELS[kind]
    torch.manual_seed(0)
    cfg = config.preset(preset, model=decoder, d_model=32, num_heads=4, num_points=2, d_ffn=32,
                        decoder_layers=2, num_queries=12)
    model = registry.build(cfg).eval()
    for name, parameter in model.decoder.named_parameters():
        if "class_head" in name or "box_head" in name or "attention_weights" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.config, model.categories = cfg, [{"id": i, "name": n} for i, n in enumerate(names)]
    return model


@pytest.fixture(scope="module")
def shape():
    """An image of several objects, and them."""
    return dataset.open_shapes("val", transforms.resize(96, 96), 6, size_px=96)[5]


def of(page):
    """The numbers that a page holds."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S).group(1))


def tensors(data, layer):
    """A layer's numbers as the package's functions take them: probs, boxes, labels, boxes."""
    labels = torch.tensor([thing["label"] for thing in data["objects"]])
    logits = torch.full((len(layer["boxes"]), len(data["classes"])), -9.0, dtype=torch.float64)
    logits[:, data["object_labels"]] = f64(*layer["logits"])
    return logits.sigmoid(), f64(*layer["boxes"]), labels, f64(*[thing["box"] for thing in
                                                                 data["objects"]])


# ---- the numbers ----

@pytest.mark.parametrize("kind", MODELS)
def test_numbers_are_those_of_the_model_in_every_layer(kind, shape):
    image, target = shape
    model = model_of(kind)
    found = explore.numbers(model, image, target)
    is_pad = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
    with torch.no_grad():
        output = model.train()(image[None], is_pad)             # both decoders run in training
    assert ("c" in found) == bool(output.c_decoder)
    for name, layers in (("o", output.o_decoder), ("c", output.c_decoder)):
        for ours, layer in zip(found.get(name, []), layers, strict=True):
            logits, pred_boxes = layer.logits[0], layer.boxes[0]
            torch.testing.assert_close(torch.tensor(ours["boxes"]), pred_boxes, atol=6e-6, rtol=0)
            torch.testing.assert_close(torch.tensor(ours["logits"]),
                                       logits[:, found["object_labels"]], atol=6e-5, rtol=0)
            label, logit = zip(*(row[0] for row in ours["best"]))
            assert list(label) == logits.argmax(1).tolist()
            torch.testing.assert_close(torch.tensor(logit), logits.amax(1), atol=6e-5, rtol=0)
            cost = matcher.match_cost(logits, pred_boxes, target.labels, target.boxes)
            assert ours["pairs"] == torch.stack(matcher.one_to_one(cost), 1).tolist()
    assert sorted(found["order"]) == sorted(found["kept"]) == list(range(len(found["before"])))


def test_sampling_points_are_those_of_each_layer_heaviest_first(shape, monkeypatch):
    """Against a spy on `look`: layer 1 and 2 of the O-Decoder, then of the C-Decoder."""
    model, seen, look = model_of("dac"), [], attention.DeformableAttention.look
    inside = set(model.decoder.modules())

    def spy(module, *args):
        answer = look(module, *args)
        if module in inside:
            seen.append(answer)
        return answer
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(attention.DeformableAttention, "look", spy)
        model.train()(shape[0][None], torch.zeros(1, 96, 96, dtype=torch.bool))
    found = explore.numbers(model, *shape)
    layers = [*found["o"], *found["c"]]
    for layer, (locations, weights) in zip(layers, seen, strict=True):
        for query, points in zip(found["kept"], layer["looks"][""]["points"], strict=True):
            order = weights[0, query].flatten().argsort(descending=True)
            places = locations[0, query].flatten(0, 2)[order]
            ours = f64(*points) / f64(1000, 1000, 10_000)
            torch.testing.assert_close(ours[:, 2], weights[0, query].flatten()[order].double(),
                                       atol=6e-5, rtol=0)
            heavy = ours[:, 2] - ours[:, 2].roll(-1) > 1e-4              # no ties in the order
            torch.testing.assert_close(ours[heavy][:5, :2], places[heavy][:5].double(),
                                       atol=6e-4, rtol=0)


def test_maps_are_in_percent_of_their_largest_cell(shape):
    found = explore.numbers(model_of("sd"), *shape)
    for layer in found["o"]:
        assert list(layer["looks"]) == ["cls", "loc"]
        for look in layer["looks"].values():
            assert look["grid"] == [12, 12]
            for cells, largest in zip(look["cells"], look["largest"], strict=True):
                assert max(cells) == 100 and min(cells) >= 0 and len(cells) == 144
                assert sum(cells) / 100 * largest == pytest.approx(1, abs=0.08)     # a softmax


def test_near_by_hand(shape):
    """Two objects; one is overlapped by two queries, of which one is sure, the other by none."""
    target = shape[1]._replace(labels=torch.tensor([0, 1]),
                               boxes=torch.tensor([[.5, .5, .4, .4], [.1, .1, .1, .1]]))
    pred_boxes = torch.tensor([[.5, .5, .4, .4], [.5, .5, .4, .3], [.5, .5, .4, .1]])
    scores = torch.tensor([[.9, .9], [.29, .9], [.9, .9]])
    assert explore.near(pred_boxes, target, scores) == [0.5, 1.0]
    assert explore.near(pred_boxes, target) == [1.0]


def test_a_large_page_keeps_all_boxes_and_fewer_looks(shape, monkeypatch):
    model = model_of("dac")
    whole = explore.numbers(model, *shape)
    monkeypatch.setattr(explore, "LOOKS", 1)
    found = explore.numbers(model, *shape)
    assert found["kept"] == whole["kept"][:1] == [whole["o"][-1]["pairs"][0][0]]
    assert [layer["boxes"] for layer in found["c"]] == [layer["boxes"] for layer in whole["c"]]
    assert all(len(layer["looks"][""]["points"]) == 1 for layer in found["o"] + found["c"])


@pytest.mark.parametrize("objects", [None, 0])
def test_a_picture_without_objects(objects, shape, tmp_path):
    image, target = shape
    target = target._replace(labels=target.labels[:0], boxes=target.boxes[:0])
    explore.write(model_of("dac"), image, "a.jpg", tmp_path / "a.html",
                  None if objects is None else target)
    data = of(tmp_path / "a.html")
    assert data["objects"] == (None if objects is None else [])
    assert data["o"][0]["pairs"] == data["near"] == []


def test_answers_that_are_not_finite_are_told(shape):
    model = model_of("dac")
    model.decoder.class_heads[0].bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        explore.numbers(model, shape[0])
    assert not any(module._forward_hooks for module in model.modules())


def test_a_page_is_one_file_that_asks_for_nothing(shape, tmp_path):
    """Names that would end the script are data, and the template is short enough to read."""
    names = ["</script><script>alert(1)</script>", "<!--<script>", '"DATA"', "a & b"]
    explore.write(model_of("dac", names), shape[0], "<img src=x>.jpg", tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2 and "<!--" not in text
    assert of(tmp_path / "a.html")["classes"] == names
    assert of(tmp_path / "a.html")["name"] == "<img src=x>.jpg"
    outside = set(re.findall(r"https?:[^\"'`)\s]*", text))
    assert outside == {"http://www.w3.org/${isSvg"}                     # namespaces, not addresses
    template = explore.TEMPLATE.read_text()
    assert not re.search(r"\b(src|href)=|@import|url\(|fetch\(|innerHTML|<link", template)
    assert len(template.splitlines()) <= 500


# ---- in a browser ----

class Browser:
    """Headless Chromium, spoken to in json messages that end in a zero byte."""

    def __init__(self, program, profile):
        self.program = program
        commands, self.writer = os.pipe()
        self.reader, answers = os.pipe()
        self.process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" 3</dev/fd/{commands} 4>/dev/fd/{answers}', "sh", program,
             "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(commands), os.close(answers)
        self.count, self.pending, self.events, self.session = 0, b"", [], {}
        [page] = [target for target in self("Target.getTargets")["targetInfos"]
                  if target["type"] == "page"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=page["targetId"],
                                          flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **self.session}
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.pending:
                part = os.read(self.reader, 2 ** 20)
                assert part, "Chromium has ended"
                self.pending += part
            one, self.pending = self.pending.split(b"\0", 1)
            answer = json.loads(one)
            if answer.get("id") == self.count:
                return answer["result"]
            self.events.append(answer)

    def js(self, expression):
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True,
                      awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, path, width=1280, still=True, scheme="light"):
        self.events.clear()
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
             mobile=False)
        self("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
            {"name": "prefers-color-scheme", "value": scheme}])
        self("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:' && px !== 1")

    def wait(self, condition):
        end = time.monotonic() + 60
        while not self("Runtime.evaluate", expression=condition)["result"].get("value"):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def key(self, name):
        text = {"text": name} if len(name) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, code=name, **text,
                 windowsVirtualKeyCode={"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
                                        "ArrowDown": 40}.get(name, ord(name[0].upper())))

    def slide(self, **values):
        for key, value in values.items():
            self.js(f"{{ const input = $('{key}'); input.value = {value};"
                    "input.dispatchEvent(new Event('input')) }")

    def rows(self, table):
        """The words of a table's cells without its first row; between buttons stands a space."""
        return self.js(f"[...$('{table}').rows].slice(1).map(row => [...row.cells].map(cell =>"
                       "[...cell.querySelectorAll('button')].map(button => button.innerText)"
                       ".join(' ') || cell.innerText))")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                   "google-chrome"))), None)
    if not program:
        pytest.skip("no chromium here")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found("Browser.close")
    found.process.wait(20)


@pytest.fixture(scope="module")
def pages(tmp_path_factory, shape):
    """A page for each model, with objects close to boxes that it predicts."""
    folder = tmp_path_factory.mktemp("pages")
    for kind in MODELS:
        model = model_of(kind)
        first, second = [f64(*layer["boxes"]).float()[::4]
                          for layer in explore.numbers(model, shape[0])["o"]]
        target = shape[1]._replace(boxes=torch.cat([first, second * f64(1, 1, 0.8, 0.9).float()]),
                                   labels=torch.tensor([0, 1, 2, 3, 0, 1]))
        explore.write(model, shape[0], f"{kind}.jpg", folder / f"{kind}.html", target)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dac", "sd"])
def test_pairs_follow_the_sliders_as_the_matcher_says(kind, pages, browser):
    """[DAC Eq. 4] on the page's own numbers, read from the page's own table, in every layer."""
    browser.open(pages / f"{kind}.html")
    data, counts = of(pages / f"{kind}.html"), set()
    for number, layer in enumerate(data.get("c", data["o"]), start=1):
        browser.js(f"document.querySelector('[data-step=o{number}]').click()")
        for a, b, threshold, k in [(.3, .7, .4, 6), (1, 1, .4, 6), (0, 1, .1, 3), (1, 0, .3, 12),
                                   (.5, .25, .2, 1), (.1, .9, 0, 2), (.3, .7, 2, 6),
                                   *((.3, .7, part / 20, 12) for part in range(4, 18))]:
            browser.slide(class_weight=a, iou_weight=b, threshold=threshold, k=k)
            quality = matcher.match_quality(*tensors(data, layer), a, b)
            found = browser.js("matchQuality(layerOf(data.c ? 'c' : 'o'), chosen.class_weight,"
                               "chosen.iou_weight)")
            torch.testing.assert_close(f64(*found), quality, atol=1e-12, rtol=0)
            expected = set(zip(*(t.tolist() for t in matcher.one_to_many(quality, threshold, k))))
            shown = set()
            for gt, (name, one, many) in enumerate(browser.rows("pairs")):
                assert name.split() == [str(gt + 1), data["classes"][data["objects"][gt]["label"]]]
                assert [[int(one), gt]] == [p for p in data["o"][number - 1]["pairs"] if p[1] == gt]
                for query, value in re.findall(r"(\d+) · (\d\.\d+)", many):
                    shown.add((int(query), gt))
                    assert float(value) == pytest.approx(quality[int(query), gt].item(), abs=6e-4)
            assert shown == expected
            counts.add(len(shown))
            assert f"and {len(shown)} one-to-many" in browser.js("$('count').innerText")
    assert 0 in counts and len(counts) > 3 and max(counts) >= 8        # the sliders do something
    browser.js("$('printed').click()")
    assert browser.js("[$('class_weight').value, $('iou_weight').value]") == ["1", "1"]
    browser.js("$('released').click()")
    assert browser.js("[$('class_weight').value, $('iou_weight').value]") == ["0.3", "0.7"]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["o", "c"])
def test_targets_and_pulls_follow_the_sliders_as_the_loss_says(decoder, pages, browser):
    """[SD Eq. 6-7] against aligned_target and autograd through tal_loss, and as it is trained."""
    browser.open(pages / "dac.html")
    data, seen = of(pages / "dac.html"), []
    browser.slide(threshold=0.1)
    for number, layer in enumerate(data[decoder], start=1):
        browser.js(f"document.querySelector('[data-step={decoder}{number}]').click()")
        for alpha, beta in [(.25, .75), (0, 1), (1, 0), (.5, .5), (1, 1), (0, 0)]:
            browser.slide(alpha=alpha, beta=beta)
            rows = browser.js("targets()")
            query, gt = (torch.tensor([row[key] for row in rows]) for key in ("i", "object"))
            probs, pred_boxes, labels, gt_boxes = tensors(data, layer)
            z = probs[query, labels[gt]].logit().requires_grad_()
            u = boxes.paired_iou(pred_boxes[query], gt_boxes[gt])
            t = tal_loss.aligned_target(z.sigmoid(), u, alpha, beta).clamp(min=0.01)
            tal_loss.tal_loss(z[:, None], t[:, None]).backward()
            for key, expected in (("u", u), ("t", t), ("s", z.sigmoid()), ("pull", -z.grad)):
                torch.testing.assert_close(f64(*[row[key] for row in rows]), expected.detach(),
                                           atol=1e-9, rtol=0)
            shown = browser.rows("targets")
            for (name, _, s, iou, wanted, pull), row in zip(shown, rows, strict=True):
                assert [name, float(s), float(iou), float(wanted)] == [
                    str(row["i"]), *(pytest.approx(row[key], abs=6e-3) for key in "sut")]
                assert pull[0] == ("▲" if row["pull"] > 0 else "▼")
                assert float(pull[2:]) == pytest.approx(abs(row["pull"]), abs=6e-5)
            seen += [row["pull"] for row in rows]
        browser.slide(alpha=.25, beta=.75)
        rows = browser.js("targets()")
        pairs = criterion.Pairs(0 * query, query, gt, labels[gt], gt_boxes[gt])
        logits = probs.logit()[None].requires_grad_()
        cls, *_ = criterion.task_aligned_loss(boxes.Predictions(logits, pred_boxes[None]), pairs)
        cls.backward()
        expected = -logits.grad[0, query, labels[gt]] / criterion.TAL_WEIGHT
        torch.testing.assert_close(f64(*[row["pull"] for row in rows]), expected, atol=1e-9, rtol=0)
    assert min(seen) < -1e-3 and max(seen) > 1e-3                       # both directions were there


@pytest.mark.slow
def test_keys_buttons_and_pointer_choose_layer_decoder_and_query(pages, browser):
    browser.open(pages / "dac.html")
    data = of(pages / "dac.html")
    w, h = data["picture"]["w"], data["picture"]["h"]

    def places():
        return f64(*browser.js("rects.map(rect => ['x', 'y', 'width', 'height'].map("
                               "side => Number(rect.getAttribute(side))))"))

    def expected(found):
        x, y, width, height = f64(*found).unbind(-1)
        width, height = (side.clamp(min=5 * browser.js("px")) for side in (width * w, height * h))
        return torch.stack([x * w - width / 2, y * h - height / 2, width, height], dim=-1)
    assert browser.js("[chosen.decoder, chosen.layer, chosen.query]") == ["o", 2, data["kept"][0]]
    browser.js("$('stage').focus()")
    for key, decoder, layer in (("c", "c", 2), ("ArrowLeft", "c", 1), ("ArrowLeft", "c", 0),
                                ("ArrowLeft", "c", 0), ("ArrowRight", "c", 1), ("o", "o", 1)):
        browser.key(key)
        assert browser.js("[chosen.decoder, chosen.layer]") == [decoder, layer]
        found = data[decoder][layer - 1]["boxes"] if layer else data["before"]
        torch.testing.assert_close(places(), expected(found), atol=1e-4, rtol=0)
        pressed = browser.js("[...document.querySelectorAll('#steps [aria-pressed=true]')].map("
                             "node => node.dataset.step)")
        assert pressed == [f"{decoder}{layer}" if layer else "0"]
    browser.key("ArrowDown")
    place = data["order"].index(data["kept"][0])
    assert browser.js("chosen.query") == data["order"][(place + 1) % len(data["order"])]
    browser.key("ArrowUp")
    assert browser.js("chosen.query") == data["kept"][0]
    assert str(data["kept"][0]) == browser.js("$('number').value")
    for query in range(len(data["order"])):                             # point at each box's edge
        x, y = browser.js(f"{{ const r = rects[{query}].getBoundingClientRect();"
                          "[r.left + r.width / 2, r.top] }")
        found = browser.js(f"queryAt({{clientX: {x}, clientY: {y}}})")
        edges = f64(*data["o"][0]["boxes"])
        top = edges[:, 1] - edges[:, 3] / 2
        same = ((top - top[query]).abs() * h < 1.5) & ((edges[:, 0] - edges[query, 0]).abs() < .25)
        assert found == query or same[found] or same.sum() > 1 or x < 1 or y < 1
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    if browser.js(f"document.elementFromPoint({x}, {y})?.closest('#stage') !== null"):
        assert browser.js("query()") == found and browser.js("chosen.query") == data["kept"][0]
        for kind in ("mousePressed", "mouseReleased"):
            browser("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        assert browser.js("chosen.query") == found
    history = browser.rows("history")
    assert [row[0].split("\n")[0] for row in history] == ["before", "layer 1", "layer 2"]
    for row, layer in zip(history[1:], data["o"]):
        score = torch.tensor(layer["best"][found][0][1]).sigmoid().item()
        assert row[1].startswith(f"{data['classes'][layer['best'][found][0][0]]} {score:.2f}")


@pytest.mark.slow
def test_boxes_glide_unless_a_person_wants_no_motion(pages, browser):
    """Halfway a box is between its places; with reduced motion it is there at once."""
    for still in (False, True):
        browser.open(pages / "dac.html", still=still)
        browser.wait("JSON.stringify(places) === JSON.stringify(boxesAt('o', 2))")
        is_there = browser.js("set({layer: 0}); JSON.stringify(places) === "
                              "JSON.stringify(boxesAt('o', 0))")
        assert is_there == still
        browser.wait("JSON.stringify(places) === JSON.stringify(boxesAt('o', 0))")
    browser.js("$('play').click()")
    browser.wait("chosen.layer === 2 && !timer")
    assert browser.js("$('play').innerText") == "▶ Play"


@pytest.mark.slow
@pytest.mark.parametrize("kind, width, scheme", [
    *itertools.product(MODELS, (375, 1280), ("light",)), ("dac", 375, "dark")])
def test_a_page_fits_says_what_it_shows_and_asks_for_nothing(kind, width, scheme, pages, browser):
    browser.open(pages / f"{kind}.html", width, scheme=scheme)
    data = of(pages / f"{kind}.html")
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert f"{len(data['before'])} queries" in browser.js("$('lead').innerText")
    looked = browser.js("[focus.querySelectorAll('circle').length,"
                        " heat.querySelectorAll('image').length]")
    branches = len(data["o"][0]["looks"])
    is_map = "cells" in next(iter(data["o"][0]["looks"].values()))
    assert looked == ([0, branches] if is_map else [branches * 4 * 3 * 2, 0])
    assert browser.js("document.querySelectorAll('#looks i').length") == branches
    browser.js("$('looks').querySelector('label:last-child input').click()")
    assert sum(browser.js("[focus.querySelectorAll('circle').length, "
                          "heat.querySelectorAll('image').length]")) < sum(looked)
    unnamed = browser.js("[...document.querySelectorAll('button, input')].filter(node => !("
                         "node.innerText || node.ariaLabel || node.labels?.length)).length")
    assert unnamed == 0
    shade = browser.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(shade) < 200) == (scheme == "dark")
    asked = [event["params"]["request"]["url"] for event in browser.events
             if event["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("file:", "data:")) for url in asked) and len(asked) >= 1
    assert not [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"]


@pytest.mark.slow
def test_names_are_shown_as_text(shape, tmp_path, browser):
    """Classes and a file whose names are HTML; the picture is the image that the network saw."""
    names = ["</script><b>x</b>", "<img src=x onerror=alert(1)>", "a & b", "'\"`"]
    explore.write(model_of("dac", names), shape[0], "<u>.jpg", tmp_path / "a.html", shape[1])
    browser.open(tmp_path / "a.html")
    assert browser.js("document.querySelectorAll('img, u, #pairs b').length") == 0
    shown = browser.js("$('pairs').innerText + $('source').innerText")
    assert "<u>.jpg" in shown
    assert all(names[label] in shown for label in shape[1].labels.tolist())
    (tmp_path / "a.png").write_bytes(base64.b64decode(
        of(tmp_path / "a.html")["picture"]["src"].split(",")[1]))
    assert (predictor.read(tmp_path / "a.png") == transforms.denormalise(shape[0])).all()


@pytest.mark.slow
def test_the_picture_of_the_documentation_is_made_by_the_browser(tmp_path, browser, shape):
    """1600 px wide, and it shows the colours of the objects and the chosen button."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    spec.loader.exec_module(pictures := importlib.util.module_from_spec(spec))
    pictures.explorer(model_of("dac"), [shape], tmp_path / "a.png", browser.program, index=0)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and picture.width == 1600
        colours = {colour for count, colour in picture.convert("RGB").getcolors(2 ** 16)
                   if count > 200}
    for wanted in ((255, 255, 255), (0x0b, 0x5c, 0xad), (0xff, 0xb0, 0x00)):
        assert any(max(abs(a - b) for a, b in zip(colour, wanted)) < 16 for colour in colours)
