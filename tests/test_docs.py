"""docs/: links, names and commands are true, pictures show what they say, the pages are whole."""
import ast
import html
import importlib.util
import json
import re
import shlex
import shutil
import subprocess

import pytest
import torch
from PIL import Image

import eval as eval_program
from detr_min import criterion, matcher, tal_loss
from detr_min.data import dataset, transforms
from detr_min.run import config, registry
from test_imports import ORDER
from test_readme_map import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.png"))
by_file = pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)


def load(name):
    """A program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


pictures = load("pictures")


# ---- what the Markdown says ----

def anchors(path):
    """Those that GitHub makes of the headings of a Markdown file."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.M)}


def code_of(path):
    """What a Markdown file sets as code: lines of blocks without their comments, then words."""
    text = path.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [line.split("  #")[0].strip() for line in "".join(blocks).splitlines()] + inline


@by_file
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        if not file.startswith("https://"):
            assert (path.parent / file).exists(), link
            assert not anchor or anchor in anchors(path.parent / file if file else path), link


@by_file
def test_names_in_backticks_exist(path):
    for word in code_of(path):
        if re.fullmatch(r"\w+\.py", word):
            assert (ROOT / word).exists() or (ROOT / "detr_min" / word).exists(), word
        name, _, rest = word.partition(".")
        if name in ORDER and re.fullmatch(r"[\w.]+", rest) and rest != "py":
            found = importlib.import_module(f"detr_min.{name}")
            for part in rest.split("."):
                found = getattr(found, part)


def test_every_entry_of_the_glossary_says_where_it_lives():
    entries = re.findall(r"^\* (.*(?:\n  .*)*)", (ROOT / "docs/glossary.md").read_text(), re.M)
    assert len(entries) >= 45
    for entry in entries:
        assert re.match(r"\*\*.+?\*\* — [^`]{30,}", entry), entry
        names = re.findall(r"`(\w+)\.\w[\w.]*`", entry)
        assert names and set(names) <= set(ORDER), entry


@by_file
def test_commands_have_flags_that_exist(path):
    """A whole command is parsed by the program that it calls; a flag alone, by either."""
    for line in code_of(path):
        for command in line.split(" && "):
            words = shlex.split(command) if command.count("'") % 2 == 0 else command.split()
            if command.startswith("--"):
                flags = {word for word in words if word.startswith("--")}
                known = (ROOT / "eval.py").read_text() + " ".join(
                    f'"--{field}"' for field in config.Config.__dataclass_fields__)
                assert all(f'"{flag}"' in known for flag in flags), command
            if "python" in words and len(words) > words.index("python") + 1:
                program, *rest = words[words.index("python") + 1:]
                if program == "train.py":
                    config.parse("", rest)
                elif program == "eval.py":
                    eval_program.parse(rest)
                elif program not in ("-c", "-m"):
                    source = (ROOT / program).read_text()
                    assert all(f'"{word}"' in source for word in rest if word.startswith("--"))
                for file in rest:
                    assert "/" not in file or file.startswith("runs/") or (ROOT / file).exists()


def test_steps_and_exercises_of_the_reading_path_are_all_there():
    text = (ROOT / "docs/reading_path.md").read_text()
    assert len(text.splitlines()) <= 150
    steps = re.findall(r"^\| (\d+) \|.*?\|(.*?)\| (\d+) \|", text, re.M)
    assert [int(step) for step, _, _ in steps] == list(range(1, 11))
    files = {name for _, cell, _ in steps for name in re.findall(r"`(\w+)\.py`", cell)}
    beside = {"backbone_swin", "denoising", "decoder_release", "align_loss"}
    assert set(ORDER[:ORDER.index("model") + 1]) - beside <= files
    table = text[text.index("| step | exercise"):text.index("A picture for")]
    cells = " ; ".join(row.split("|")[2] for row in table.splitlines()[2:] if row)
    numbers = [int(n) for n in re.findall(r"(?:^|;) *(\d+) [a-zA-Z]", cells)]
    assert sorted(numbers) == list(range(1, 14))


# ---- the pictures ----

def tiny(name):
    torch.manual_seed(0)
    return registry.build(config.preset("shapes", model=name, d_model=32, num_heads=4, num_points=2,
                                     d_ffn=32, decoder_layers=2, num_queries=8)).eval()


@pytest.fixture(scope="module")
def dataset():
    return dataset.open_shapes("val", transforms.resize(64, 64), 3, size_px=64)


def boxes_of(axes, style):
    return [patch for patch in axes.patches if patch.get_linestyle() == style]


def check_png(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width == 800 and picture.height > 200


def test_initial_points_are_directions_and_steps(tmp_path):
    """A point k steps out is k cells from a point, k / K half sizes from a box's centre."""
    around, inside = pictures.initial_points(tmp_path / "a.png", num_heads=6, num_points=3).axes
    check_png(tmp_path / "a.png")
    for axes in (around, inside):
        assert len(axes.collections) == 6
        assert all(len(dots.get_offsets()) == 3 for dots in axes.collections)
    far = abs(around.collections[0].get_offsets() - 6).max(1)
    assert far.tolist() == pytest.approx([1, 2, 3])
    far = abs((inside.collections[0].get_offsets() - 6) / [0.35 * 12, 0.2 * 12]).max(1)
    assert far.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert "3 cells away" in around.get_title() and "100%" in inside.get_title()


def test_layers_of_a_query(tmp_path, dataset):
    figure = pictures.layers_of_a_query(tiny("dac"), dataset, tmp_path / "a.png", index=0)
    check_png(tmp_path / "a.png")
    assert len(figure.axes) == 2
    for layer, axes in enumerate(figure.axes, start=1):
        assert len(axes.collections[0].get_offsets()) == 4 * 3 * 2                  # H*L*K
        assert len(boxes_of(axes, "--")) == len(boxes_of(axes, "-")) == 1
        assert re.match(rf"layer {layer}: IoU \d\.\d\d to \d\.\d\d\n24 points", axes.get_title())
    end, start = (re.findall(r"\d\.\d\d", axes.get_title())[i]
                  for i, axes in zip((1, 0), figure.axes))
    assert end == start                             # a layer starts where the one before it ended


def test_gathering_shows_the_same_queries_three_times(tmp_path, dataset):
    detector = tiny("dac")
    figure = pictures.gathering(detector, dataset, tmp_path / "a.png", index=0, near=0, sure=0)
    check_png(tmp_path / "a.png")
    for axes in figure.axes:                        # near = 0: all queries are
        assert len(boxes_of(axes, "-")) == 8 and len(boxes_of(axes, "--")) == 1
        assert "8 of 8 near" in axes.get_title()
    objects = sum(len(dataset[i][1].labels) for i in range(3))
    said = figure.get_suptitle()
    assert f"mean of {objects} objects: 8.0 before, 8.0 after the C-, 8.0 after the O" in said
    figure = pictures.gathering(detector, dataset, tmp_path / "a.png", index=0, near=0, sure=1)
    assert figure.get_suptitle().endswith("0.0 after the C-, 0.0 after the O-Decoder")


def test_answers_are_those_of_the_model_itself(dataset):
    detector, image = tiny("dac"), dataset[0][0]
    o, c, _ = pictures.answers(detector, image)
    with torch.no_grad():
        output = detector.train()(image[None], torch.zeros(1, 64, 64, dtype=torch.bool))
    for ours, theirs in zip([*o, *c], [*output.o_decoder, *output.c_decoder], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_assignments_draw_every_pair(tmp_path, dataset, monkeypatch):
    pairs = torch.tensor([0, 5]), torch.tensor([1, 1])
    monkeypatch.setattr(matcher, "one_to_many", lambda quality: pairs)
    left, right = pictures.assignments(tiny("dac"), dataset, tmp_path / "a.png", index=0).axes
    check_png(tmp_path / "a.png")
    M = len(dataset[0][1].labels)
    assert len(boxes_of(left, "--")) == len(boxes_of(right, "--")) == M
    assert len(boxes_of(left, "-")) == M and len(boxes_of(right, "-")) == 2
    assert f"{M} of 8 queries\nan object has 1 1" in left.get_title()
    assert "2 of 8 queries\nan object has 0 2" in right.get_title()


def test_branches_stand_side_by_side(tmp_path, dataset):
    """Untrained: points of 2 steps, at 1/2 and 1 half size, all of one weight: .75 on average."""
    detector = tiny("decoupled")
    with torch.no_grad():
        for head in detector.decoder.box_heads:     # boxes stay where they are: at the object
            torch.nn.init.zeros_(head[-1].weight)
    image, target = dataset[0]
    look = pictures.draw.last_looks

    def at_the_object(*args):
        logits, pred_boxes, looks = look(*args)
        near = pred_boxes.clone()
        near[:len(target.boxes)] = target.boxes
        for name, (references, points, weights) in looks.items():
            moved = (points - references[:, None, :2]) / references[:, None, 2:]
            looks[name] = near, moved * near[:, None, 2:] + near[:, None, :2], weights
        return logits * 0, near, looks
    pictures.draw.last_looks = at_the_object
    try:
        figure = pictures.branches(detector, dataset, tmp_path / "a.png", index=0, num_images=1)
    finally:
        pictures.draw.last_looks = look
    check_png(tmp_path / "a.png")
    assert [axes.get_title() for axes in figure.axes] == [
        "classification branch", "localization branch"] * 2
    assert all(len(axes.collections[0].get_offsets()) == 24 for axes in figure.axes)
    assert figure.get_suptitle().count("points 0.75 half sizes from the centre") == 2


def test_aligned_targets_say_how_hard_each_loss_pulls(tmp_path):
    """Against the gradients at s = .01, u = .9, worked out one entry at a time."""
    figure = pictures.aligned_targets(tmp_path / "a.png")
    check_png(tmp_path / "a.png")
    pulls = []
    for loss, wanted in ((criterion.focal_loss, 1.0), (tal_loss.tal_loss, 0.01**0.25 * 0.9**0.75)):
        z = torch.tensor([[0.01]], dtype=torch.float64).logit().requires_grad_()
        loss(z, torch.full_like(z, wanted)).backward()
        pulls.append(-z.grad.item())
    assert f"{pulls[0] / pulls[1]:.1f} times" in figure.axes[1].get_title()
    assert "dashed: t = s = u" in figure.axes[0].get_title()
    assert len(figure.axes[1].lines) == 5                           # three IoUs, focal loss, zero


def test_a_missing_run_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(SystemExit, match="`python train.py --model decoupled`"):
        pictures.main(["--run", str(tmp_path / "no"), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"initial_points.png",
                                                          "aligned_targets.png"}


def test_committed_pictures_are_small_and_all_shown():
    text = (ROOT / "docs" / "pictures.md").read_text()
    assert {path.name for path in PICTURES} == set(re.findall(r"\(pictures/(\w+\.png)\)", text))
    assert all(path.stat().st_size <= 60_000 for path in PICTURES)
    assert sum(path.stat().st_size for path in PICTURES) <= 350_000
    for path in PICTURES:
        check_png(path)


# ---- the pages ----

@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    pytest.importorskip("pycco", reason="pip install pycco")
    return {path.stem: path for path in load("browse").write(tmp_path_factory.mktemp("html"))}


def test_there_is_a_page_for_every_file_and_every_link_leads_somewhere(pages):
    assert set(pages) == {"index", *ORDER, "train", "eval", *(path.stem for path in DOCS)}
    ids = {path.name: set(re.findall(r' id="([^"]+)"', path.read_text()))
           for path in pages.values()}
    for path in pages.values():
        links = re.findall(r'(?:href|src)="([^"]+)"', path.read_text())
        assert len(links) > 5
        for link in links:
            file, _, anchor = html.unescape(link).partition("#")
            if not file.startswith("https://"):
                name = file or path.name
                inside = file.startswith("../") and (ROOT / "docs" / file[3:]).exists()
                assert inside or (path.parent / name).exists(), f"{path.name}: {link}"
                assert not anchor or anchor in ids[name], f"{path.name}: {link}"


def test_no_page_fetches_anything(pages):
    for path in pages.values():
        assert not re.search(r'<script|@import|url\(|src="https?:|<link[^>]*"https?:',
                             path.read_text())


@pytest.mark.parametrize("name", [*ORDER, "train", "eval"])
def test_a_page_holds_all_of_its_file(pages, name):
    """Every line of code, every docstring from its first to its last word."""
    page = pages[name].read_text()
    text = squeezed(html.unescape(re.sub(r"<[^>]+>", "", page)))
    source = (ROOT / ("" if name in ("train", "eval") else "detr_min") / f"{name}.py").read_text()
    said = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            doc = ast.get_docstring(node)
            if doc:
                said |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
                doc = re.sub(r"^(Args|Returns|Raises|Yields|Differs):", r"\1", doc, flags=re.M)
                assert squeezed(doc) in text, doc
    for row, line in enumerate(source.splitlines(), start=1):
        assert row in said or squeezed(line) in text, line


def squeezed(text):
    return re.sub(r"[\s`]+", "", text)


@pytest.mark.slow
def test_pages_fit_a_window_of_1280_pixels(pages, tmp_path):
    """In a real browser: nothing empty, nothing wider than its place."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                   "google-chrome"))), None)
    if not browser:
        pytest.skip("no chromium here")
    probe = tmp_path / "probe.html"
    frames = "".join(f'<iframe src="{path.as_uri()}" width="1280" height="800"></iframe>'
                     for path in pages.values())
    probe.write_text(f"""<body>{frames}<script>onload = () => {{
        const wide = d => [...d.querySelectorAll(".code, .docs, .eq, pre, td, main")].filter(
            e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 60));
        document.body.textContent = "RESULT" + JSON.stringify([...document.querySelectorAll(
            "iframe")].map(f => {{
            const d = f.contentDocument, r = d.documentElement;
            return {{page: f.src.split("/").pop(), width: r.scrollWidth,
                     height: r.scrollHeight, text: d.body.innerText.length, wide: wide(d),
                     broken: [...d.images].filter(m => !m.naturalWidth).length}} }})) + "END" }}
        </script></body>""")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=300)
    found = json.loads(html.unescape(re.search("RESULT(.*)END", done.stdout, re.S).group(1)))
    assert len(found) == len(pages)
    for page in found:
        assert page["width"] <= 1280 and page["height"] > 300 and page["text"] > 200, page
        assert not page["broken"] and not page["wide"], page
