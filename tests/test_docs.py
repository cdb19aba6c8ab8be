"""docs/: links, names and commands are true, pictures show what they say, the pages are whole."""
import ast
import functools
import html
import importlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageChops

import eval as eval_program
from detr_min import boxes, matcher, tal_loss
from detr_min.data import dataset as data_sets
from detr_min.data import shapes, transforms
from detr_min.run import checkpoints, config, registry

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = "", "release", "data", "run"
MODULES = {path.stem: ".".join(filter(None, ["detr_min", folder, path.stem]))   # "boxes": full name
           for folder in FOLDERS for path in sorted((ROOT / "detr_min" / folder).glob("*.py"))
           if path.stem != "__init__"}
DOCS = sorted((ROOT / "docs").glob("*.md"))
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.png"))
by_file = pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)


def load(name):
    """A program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


pictures = load("pictures")
TINY = dict(d_model=32, num_heads=4, num_points=2, d_ffn=32, decoder_layers=2, num_queries=8)


def tiny(name):
    torch.manual_seed(0)
    return registry.build(config.preset("shapes", model=name, **TINY)).eval()


# ---- what the Markdown says ----

def anchors(path):
    """Those that GitHub makes of the headings of a Markdown file."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.M)}


def code_of(path):
    """What a Markdown file sets as code: lines of blocks without their comments, then words.

    Blocks of Python and diffs are run by tests of their own.
    """
    text = path.read_text()
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.M | re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [line.split("  #")[0].strip() for line in "".join(blocks).splitlines()] + inline


def blocks_of(name, kind):
    """[(rest of the first line, text)] of the code blocks of one kind in a Markdown file."""
    text = (ROOT / "docs" / f"{name}.md").read_text()
    return re.findall(rf"^```{kind}\b ?(.*)\n((?:.*\n)*?)```", text, re.M)


@by_file
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = link.partition("#")
        if not file.startswith("https://"):
            assert (path.parent / file).exists(), link
            assert not anchor or anchor in anchors(path.parent / file if file else path), link


@by_file
def test_names_in_backticks_exist(path):
    written = {file for file, _ in blocks_of(path.stem, "python")}         # by the reader
    for word in code_of(path):
        if re.fullmatch(r"[\w/]+\.py", word) and word not in written:
            assert (ROOT / word).exists() or (ROOT / "detr_min" / word).exists(), word
        name, _, rest = word.partition(".")
        if name in MODULES and re.fullmatch(r"[\w.]+", rest) and rest not in ("py", "json"):
            found = importlib.import_module(MODULES[name])
            for part in rest.split("."):
                found = getattr(found, part)


def test_every_entry_of_the_glossary_says_where_it_lives():
    entries = re.findall(r"^\* (.*(?:\n  .*)*)", (ROOT / "docs/glossary.md").read_text(), re.M)
    assert len(entries) >= 45
    for entry in entries:
        assert re.match(r"\*\*.+?\*\* — [^`]{30,}", entry), entry
        names = re.findall(r"`(\w+)\.\w[\w.]*`", entry)
        assert names and set(names) <= set(MODULES), entry


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
                if "--help" in rest:
                    assert (ROOT / program).exists()
                elif program == "train.py":
                    config.parse("", rest)
                elif program == "eval.py":
                    eval_program.parse(rest)
                elif program not in ("-c", "-m"):
                    source = (ROOT / program).read_text()
                    assert all(f'"{word}"' in source for word in rest if word.startswith("--"))
                for file in rest:
                    theirs = file.startswith(("runs/", "my_"))          # made by the reader
                    assert "/" not in file or theirs or (ROOT / file).exists(), file


def test_steps_and_exercises_of_the_reading_path_are_all_there():
    text = (ROOT / "docs/reading_path.md").read_text()
    assert len(text.splitlines()) <= 150
    steps = re.findall(r"^\| (\d+) \|.*?\|(.*?)\| (\d+) \|", text, re.M)
    assert [int(step) for step, _, _ in steps] == list(range(1, 12))
    files = {name for _, cell, _ in steps for name in re.findall(r"`(\w+)\.py`", cell)}
    papers = {path.stem for path in (ROOT / "detr_min").glob("*.py")} - {"__init__"}
    assert papers - {"decoder_decoupled_deformable"} <= files           # the port may be skipped
    table = text[text.index("| step | exercise"):text.index("To make a picture")]
    cells = " ; ".join(row.split("|")[2] for row in table.splitlines()[2:] if row)
    numbers = [int(n) for n in re.findall(r"(?:^|;) *(\d+) [a-zA-Z]", cells)]
    assert sorted(numbers) == list(range(1, 14))


# ---- the examples ----

USE = dict(zip(("load", "csv", "torchvision", "torchmetrics", "supervision"),
               (block for _, block in blocks_of("use", "python")), strict=True))


@pytest.fixture
def in_use(tmp_path, monkeypatch):
    """A folder with a run of a detector that is sure of many things, and a photo. -> its names"""
    detector = tiny("dac")
    for head in detector.decoder.class_heads:
        torch.nn.init.normal_(head.weight)
        torch.nn.init.zeros_(head.bias)
    cfg = config.preset("shapes", model="dac", size=64, **TINY)
    run = tmp_path / "runs" / "dac_shapes"
    run.mkdir(parents=True)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(shapes.CLASSES)]
    checkpoints.save(run / "last.pt", detector, torch.optim.SGD(detector.parameters()), cfg,
                     categories, {})
    shapes.draw(shapes.scene(0, "val", 0)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(USE["load"], names := {})
    return names


def test_the_detections_of_the_first_example(in_use, capsys):
    found = in_use["found"]
    k = len(found["names"])
    assert k > 3 and found["boxes"].shape == (k, 4) and found["boxes"].dtype == torch.float32
    assert found["labels"].dtype == torch.int64 and found["scores"].dtype == torch.float32
    documented = re.findall(r"^\| `(\w+)` \| [(l]", (ROOT / "docs/use.md").read_text(), re.M)
    assert sorted(documented) == sorted(found)


def test_the_example_of_a_table(in_use):
    exec(USE["csv"], in_use)
    first, *rows = pathlib.Path("triangles.csv").read_text().split()
    assert first == "name,score,x1,y1,x2,y2"
    assert len(rows) == in_use["found"]["names"].count("triangle") > 0
    assert all(row.startswith("triangle,") and row.count(",") == 5 for row in rows)


def test_the_example_of_torchvision(in_use):
    exec(USE["torchvision"], in_use)
    with Image.open("drawn.png") as drawn, Image.open("photo.jpg") as photo:
        assert drawn.size == photo.size
        difference = ImageChops.difference(drawn, photo)
        assert difference.point(lambda value: 255 * (value > 200)).getbbox()        # bright lines


def test_the_example_of_torchmetrics(in_use, capsys):
    """Also with the detections themselves as the objects, whose mAP is 1."""
    pytest.importorskip("torchmetrics", reason="pip install torchmetrics")
    exec(USE["torchmetrics"], in_use)
    assert "tensor(" in capsys.readouterr().out
    best = {key: in_use["found"][key][:1] for key in ("boxes", "labels", "scores")}
    metric = in_use["MeanAveragePrecision"]()
    metric.update([in_use["found"]], [best])
    assert metric.compute()["map"] == 1


def test_the_example_of_supervision(in_use):
    supervision = pytest.importorskip("supervision", reason="pip install supervision")
    exec(USE["supervision"], in_use)
    detections, found = in_use["detections"], in_use["found"]
    assert isinstance(detections, supervision.Detections)
    torch.testing.assert_close(torch.tensor(detections.xyxy), found["boxes"])
    torch.testing.assert_close(torch.tensor(detections.confidence), found["scores"])
    assert detections.class_id.tolist() == found["labels"].tolist()
    assert list(detections["class_name"]) == found["names"]


def edited(text, diff):
    """A source file with a hunk of a diff applied, which must fit one place."""
    old, new = ("".join(f"{line[1:]}\n" for line in diff.splitlines() if line[:1] in kept)
                for kept in (" -", " +"))
    assert text.count(old) == 1, old
    return text.replace(old, new)


@pytest.fixture
def with_ideas(tmp_path):
    """A folder with a copy of the package in which all edits of researcher.md are made."""
    shutil.copytree(ROOT / "detr_min", tmp_path / "detr_min")
    for file, diff in blocks_of("researcher", "diff"):
        path = tmp_path / file
        path.write_text(edited(path.read_text(), diff))
    [(file, code)] = blocks_of("researcher", "python")
    (tmp_path / file).write_text(code)
    return tmp_path


def test_every_edit_of_an_idea_fits_one_place(with_ideas):
    for path in with_ideas.rglob("*.py"):
        compile(path.read_text(), path, "exec")


@pytest.mark.slow
def test_every_idea_builds_and_trains(with_ideas):
    """The copy takes a step with both decoders."""
    (with_ideas / "step.py").write_text(f"""if True:
        import torch
        from detr_min import criterion
        from detr_min.data import batches, dataset, transforms
        from detr_min.run import config, registry
        data = dataset.open_shapes("train", transforms.resize(64, 64), 2, size_px=64)
        for model, loss in ("dac", "focal"), ("late", "focal"), ("dac", "varifocal"):
            cfg = config.preset("shapes", model=model, loss=loss, size=64, **{TINY!r})
            detector, training = registry.build(cfg), registry.training(cfg)
            images, is_pad, targets = batches.collate([data[0], data[1]])
            objects = sum(len(target.labels) for target in targets)
            output = detector(*training.inputs(images, is_pad, targets, 1, 0))
            parts = training.loss(output, targets, objects)
            criterion.total(parts).backward()
            before = [p.clone() for p in detector.parameters()]
            torch.optim.AdamW(detector.parameters()).step()
            assert any((p != q).any() for p, q in zip(before, detector.parameters()))
            if loss == "varifocal":         # at logit 0: .5 of ln 2 for an IoU of .5, .75 * .5^2
                layer = criterion.boxes.Predictions(torch.zeros(1, 2, 1, dtype=torch.float64),
                                                    torch.tensor([[[.5, .5, .4, .4]] * 2]).double())
                one, half = torch.tensor([0]), torch.tensor([[.5, .5, .4, .2]]).double()
                pairs = criterion.Pairs(one, one, one, one, half)
                found = criterion.varifocal_loss(layer, pairs)[0]
                expected = (.5 + .75 * .25) * torch.log(torch.tensor(2.).double())
                torch.testing.assert_close(found, expected)
            elif model == "dac":
                assert detector.decoder.c_gates.grad.abs().min() > 0
                assert parts["C"].pairs == 3 * parts["O"].pairs == 3 * objects
            else:
                used = [layer.self_attn.in_proj_weight.grad is not None
                        for layer in detector.decoder.layers]
                assert used == [False, True], used
    """)
    subprocess.run([sys.executable, "step.py"], cwd=with_ideas, check=True, timeout=120,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_gates_change_nothing_at_first(tmp_path, dataset, monkeypatch):
    from detr_min import decoder_dac
    source = (ROOT / "detr_min" / "decoder_dac.py").read_text()
    for file, diff in blocks_of("researcher", "diff"):
        source = edited(source, diff) if file.endswith("decoder_dac.py") else source
    gated = {"__name__": "detr_min.decoder_gated", "__package__": "detr_min"}
    exec(source, gated)
    detector, image = tiny("dac"), dataset[0][0]
    assert isinstance(detector.decoder, decoder_dac.DACDecoder)
    _, plain, _ = pictures.answers(detector, image)
    decoder = gated["DACDecoder"](2, 32, 4, 3, 2, 32, 4)
    missing, unexpected = decoder.load_state_dict(detector.decoder.state_dict(), strict=False)
    assert (missing, unexpected) == (["c_gates"], [])
    detector.decoder = decoder.eval()
    for ours, theirs in zip(pictures.answers(detector, image)[1], plain, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- the pictures ----

@pytest.fixture(scope="module")
def dataset():
    return data_sets.open_shapes("val", transforms.resize(64, 64), 3, size_px=64)


@pytest.fixture(autouse=True)
def half_the_size(monkeypatch):
    """Pictures take less time to draw; those of the pages are 1600 pixels wide."""
    monkeypatch.setattr(pictures, "DPI", pictures.DPI // 2)


def boxes_of(axes, style):
    return [patch for patch in axes.patches if patch.get_linestyle() == style]


def check_png(path, figure):
    """A wide png in which no word is cut off or lies on another."""
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width == 800 and picture.height > 200
    words = [axes.title for axes in figure.axes] + figure.legends + [figure._suptitle]
    extents = [word.get_window_extent() for word in words if word and word.get_visible()]
    extents = [extent for extent in extents if extent.width and extent.height]
    assert extents and all(extent.x0 >= 0 and extent.y0 >= 0 and extent.x1 <= figure.bbox.x1
                           and extent.y1 <= figure.bbox.y1 for extent in extents), path
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i]), path


def test_a_saved_picture_keeps_rare_colours_and_no_empty_band(tmp_path):
    """A pale bar of each query's colour beside a picture of many greys; 24 of 500 empty rows."""
    figure = Figure(figsize=(5, 10), dpi=100)
    axes = figure.add_axes((0, 0.75, 1, 0.25))
    axes.set_axis_off()
    axes.imshow(torch.arange(250).expand(50, -1).numpy(), cmap="gray", aspect="auto")
    drawn = [pictures.draw.colour_of(label) for label in range(7)]
    for place, colour in enumerate(drawn):
        figure.add_artist(Rectangle((place / 7, 0), 0.01, 0.25, color=colour, alpha=0.3))
    pictures.save(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as file:
        assert file.width == 500 and file.height < 250 + 24 + 250 + 3
        found = torch.tensor([colour for _, colour in file.convert("RGB").getcolors(256)])
        assert file.convert("RGB").getpixel((90, 250 + 12)) == (255, 255, 255)
    pale = 255 * (1 - 0.3 * (1 - torch.tensor(drawn)))
    wanted = torch.cat([pale, torch.arange(256).expand(3, -1).T])
    assert (wanted[:, None] - found).abs().amax(2).amin(1).max() < 5


def legend_of(figure):
    """The words of a figure's legends."""
    legends = figure.legends + [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    return " ".join(text.get_text() for legend in legends for text in legend.get_texts())


@pytest.mark.slow
def test_initial_points_are_directions_and_steps(tmp_path):
    """A point k steps out is k cells from a point, k / K half sizes from a box's centre."""
    figure = pictures.initial_points(tmp_path / "a.png", num_heads=6, num_points=3)
    check_png(tmp_path / "a.png", figure)
    around, inside = figure.axes
    assert "reference box" in legend_of(figure)
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
    check_png(tmp_path / "a.png", figure)
    assert "the layer starts from" in legend_of(figure)
    assert len(figure.axes) == 2
    for layer, axes in enumerate(figure.axes, start=1):
        assert len(axes.collections[0].get_offsets()) == 4 * 3 * 2                  # H*L*K
        assert len(boxes_of(axes, "--")) == len(boxes_of(axes, "-")) == 1
        before, after = re.findall(r"\d\.\d\d\d", axes.get_title())
        word = "better" if after > before else "worse" if after < before else "no better"
        assert axes.get_title().startswith(f"layer {layer} makes the box {word}\nIoU ")
    end, start = (re.findall(r"\d\.\d\d\d", axes.get_title())[i]
                  for i, axes in zip((1, 0), figure.axes))
    assert end == start                             # a layer starts where the one before it ended


@pytest.mark.slow
def test_gathering_shows_the_same_queries_three_times(tmp_path, dataset):
    detector = tiny("dac")
    figure = pictures.gathering(detector, dataset, tmp_path / "a.png", index=0, near=0, sure=0)
    check_png(tmp_path / "a.png", figure)
    tops, bars = figure.axes[:3], figure.axes[3:]
    colours = [patch.get_edgecolor() for patch in boxes_of(tops[0], "-")[1:]]
    for axes in tops:                       # near = 0: all queries are; the object has two frames
        assert len(boxes_of(axes, "-")) == 9 and len(boxes_of(axes, "--")) == 1
        assert [patch.get_edgecolor() for patch in boxes_of(axes, "-")[1:]] == colours
        assert "8 of 8 queries near" in axes.get_title()
    image, target = dataset[0]
    o, c, _ = pictures.answers(detector, image)
    [gt] = pictures.largest(target, 1)
    for axes, layer in zip(bars[1:], (c[-1], o[-1])):               # a bar and a number each
        heights = [bar.get_height() for bar in axes.patches]
        scores = layer.logits[0, :, target.labels[gt]].sigmoid()
        assert sorted(heights) == pytest.approx(scores.sort().values.tolist())
        assert [text.get_text() for text in axes.texts] == [f"{h:.2f}"[1:] for h in heights]
        assert [bar.get_facecolor()[:3] for bar in axes.patches] == [c[:3] for c in colours]
    assert bars[0].get_legend().get_title().get_text() == "near: IoU with the object ≥ 0"
    objects = sum(len(dataset[i][1].labels) for i in range(3))
    said = figure.get_suptitle()
    assert f"mean of {objects} objects: 8.0 before, 8.0 after the C-, 8.0 after the O" in said
    figure = pictures.gathering(detector, dataset, tmp_path / "a.png", index=0, near=0, sure=1)
    assert figure.get_suptitle().endswith("0.0 after the C-, 0.0 after the O-Decoder")


@pytest.mark.slow
def test_bars_of_queries_that_left_the_object_are_pale(tmp_path, dataset, monkeypatch):
    image, target = dataset[0]
    [gt] = pictures.largest(target, 1)

    def answers(model, image):
        away = torch.tensor([0.05, 0.05, 0.02, 0.02])
        def layer(*rows):
            return [boxes.Predictions(torch.zeros(1, 2, 4), torch.stack(rows)[None])]
        here = target.boxes[gt]
        queries = registry.proposals.Queries(None, None, torch.stack([away, away])[None], None)
        return layer(here, away), layer(here, here), queries
    monkeypatch.setattr(pictures, "answers", answers)
    figure = pictures.gathering(None, dataset, tmp_path / "a.png", index=0, num_images=1)
    assert [axes.get_title().split("\n")[1] for axes in figure.axes[:3]] == [
        f"{n} of 2 queries near" for n in (0, 2, 1)]
    assert [[bar.get_alpha() for bar in axes.patches] for axes in figure.axes[4:]] == [
        [1, 1], [1, 0.3]]


def test_features_are_what_the_last_heads_see(dataset):
    detector, image = tiny("dac"), dataset[0][0]
    (before, c, o), ref_boxes, predicted_c, predicted_o = pictures.features(detector, image)
    _, _, queries = pictures.answers(detector, image)
    assert torch.equal(before, queries.content[0, 0] + queries.pos[0, 0])
    assert torch.equal(ref_boxes, queries.ref_boxes[0])
    for x, predicted in ((c, predicted_c), (o, predicted_o)):
        with torch.no_grad():
            torch.testing.assert_close(detector.decoder.class_heads[-1](x), predicted.logits)
    assert not torch.equal(c, o)


def test_the_plane_of_features_is_that_of_most_spread():
    """Points along x by 4, along z by 2, along y by 1: the axes are x and z, up to sign."""
    points = torch.tensor([[4., 0, 0], [-4, 0, 0], [0, 0, 2], [0, 0, -2], [0, 1, 0], [0, -1, 0]])
    xy = pictures.main_plane(points + 7)(points + 7)
    torch.testing.assert_close(xy.abs(), points[:, [0, 2]].abs())


def test_stars_are_the_best_queries_and_distances_go_from_them(tmp_path, dataset, monkeypatch):
    """Two queries on the largest object; the second scores higher. 5 apart after C, 13 after O.

    The other queries are near nothing, and objects that no query is near have neither dot nor star.
    """
    image, target = dataset[0]
    [gt] = pictures.largest(target, 1)

    def features(model, image):
        here, away = target.boxes[gt], torch.tensor([.02, .02, .01, .01])
        pred_boxes = torch.stack([here, here, away, away])
        logits = torch.tensor([0., 1, 5, 5])[:, None].expand(4, 4)
        after_c = torch.tensor([[0., 0, 0], [3, 4, 0], [9, 9, 9], [8, 9, 9]])
        after_o = torch.tensor([[0., 0, 0], [5, 12, 0], [9, 9, 9], [8, 9, 9]])
        predicted = boxes.Predictions(logits, pred_boxes)
        return [after_c, after_c, after_o], pred_boxes, predicted, predicted
    monkeypatch.setattr(pictures, "features", features)
    figure = pictures.features_in_a_plane(None, dataset, tmp_path / "a.png", 0, num_images=1)
    check_png(tmp_path / "a.png", figure)
    assert "5.0 after the C-Decoder, 13.0 after the O-Decoder" in figure.get_suptitle()
    before, *after = figure.axes
    assert not [line for line in before.lines if line.get_marker() == "*"]
    project = pictures.main_plane(torch.cat(features(None, image)[0][1:]))
    for axes, x in zip(after, features(None, image)[0][1:]):
        [star] = [line for line in axes.lines if line.get_marker() == "*"]
        assert star.get_xydata()[0] == pytest.approx(project(x[1:2])[0].tolist())
        assert axes.get_xlim() == after[0].get_xlim() and axes.get_ylim() == after[0].get_ylim()


def test_answers_are_those_of_the_model_itself(dataset):
    detector, image = tiny("dac"), dataset[0][0]
    o, c, _ = pictures.answers(detector, image)
    with torch.no_grad():
        output = detector.train()(image[None], torch.zeros(1, 64, 64, dtype=torch.bool))
    for ours, theirs in zip([*o, *c], [*output.o_decoder, *output.c_decoder], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_assignments_draw_every_pair(tmp_path, dataset, monkeypatch):
    pairs = torch.tensor([0, 5]), torch.tensor([1, 1])
    monkeypatch.setattr(matcher, "one_to_many", lambda quality: pairs)
    figure = pictures.assignments(tiny("dac"), dataset, tmp_path / "a.png", index=0)
    check_png(tmp_path / "a.png", figure)
    left, right = figure.axes
    M = len(dataset[0][1].labels)
    assert len(boxes_of(left, "--")) == len(boxes_of(right, "--")) == M
    assert len(boxes_of(left, "-")) == M and len(boxes_of(right, "-")) == 2
    assert f"{M} of 8 queries learn an object" in left.get_title()
    assert "2 of 8 queries learn an object" in right.get_title()
    assert [text.get_text() for text in left.texts] == ["1"] * M
    assert [text.get_text() for text in right.texts] == ["0", "2", *["0"] * (M - 2)]
    assert "object, with its number of queries" in legend_of(figure)


def test_spread_by_hand():
    """Two cells of a map 1 x 4: at x = .125 and .375 of the image, about a box of width .5."""
    attention = torch.tensor([[0.25, 0.75, 0.0, 0.0]])
    far, out = pictures.spread(attention, torch.tensor([0.5, 0.5, 0.5, 1.0])).tolist()
    assert far == pytest.approx(0.25 * 1.5 + 0.75 * 0.5) and out == pytest.approx(0.25)


@pytest.mark.slow
def test_branches_stand_beside_the_ordinary_decoder(tmp_path):
    """A row is an object: image, then three maps of 12 x 12 cells with the object and a box."""
    plain, decoupled = (registry.build(config.preset(name)).eval()
                        for name in ("shapes_conditional", "shapes_sd"))
    shapes = data_sets.open_shapes("val", transforms.resize(96, 96), 1, size_px=96)
    figure = pictures.branches(plain, decoupled, shapes, tmp_path / "a.png", index=0, num_images=1,
                               num_objects=2)
    check_png(tmp_path / "a.png", figure)
    assert len(figure.axes) == 8
    assert [len(axes.images) for axes in figure.axes] == [1] * 8
    assert [axes.images[0].get_array().shape for axes in figure.axes[1:4]] == [(12, 12)] * 3
    assert [axes.get_title().split("\n")[0] for axes in figure.axes[:4]] == [
        "image and object", "ordinary decoder", "localization branch", "classification branch"]
    assert "box that the query predicts most attention on a map" in legend_of(figure)


@pytest.mark.slow
def test_aligned_targets_say_how_hard_each_loss_pulls(tmp_path):
    """Against the gradients at s = .01, u = .9, worked out one entry at a time."""
    figure = pictures.aligned_targets(tmp_path / "a.png")
    check_png(tmp_path / "a.png", figure)
    pulls, focal = [], functools.partial(torchvision.ops.sigmoid_focal_loss, reduction="sum")
    for loss, wanted in ((focal, 1.0), (tal_loss.tal_loss, 0.01**0.25 * 0.9**0.75)):
        z = torch.tensor([[0.01]], dtype=torch.float64).logit().requires_grad_()
        loss(z, torch.full_like(z, wanted)).backward()
        pulls.append(-z.grad.item())
    assert f"{pulls[0] / pulls[1]:.1f} times" in figure.axes[1].get_title()
    assert "dashed: t = s = u" in figure.axes[0].get_title()
    assert len(figure.axes[1].lines) == 5                           # three IoUs, focal loss, zero


@pytest.mark.slow
def test_a_missing_run_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(SystemExit, match="`python -m studies .* --only sd_detr --into runs/p"):
        pictures.main(["--run", str(tmp_path / "no"), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"initial_points.png",
                                                          "aligned_targets.png"}


def test_committed_pictures_are_small_and_all_shown():
    text = "".join(path.read_text() for path in DOCS)
    assert {path.name for path in PICTURES} == set(re.findall(r"\(pictures/(\w+\.png)\)", text))
    assert all(path.stat().st_size <= 130_000 for path in PICTURES)
    assert sum(path.stat().st_size for path in PICTURES) <= 600_000
    for path in PICTURES:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width == 1600


# ---- the pages ----

@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    pytest.importorskip("pycco", reason="pip install pycco")
    return {path.stem: path for path in load("browse").write(tmp_path_factory.mktemp("html"))}


def test_there_is_a_page_for_every_file_and_every_link_leads_somewhere(pages):
    guides = {path.stem for path in DOCS} & set(load("browse").GUIDES)
    assert set(pages) == {"index", *MODULES, "train", "eval", *guides}
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


@pytest.mark.parametrize("name", [*MODULES, "train", "eval"])
def test_a_page_holds_all_of_its_file(pages, name):
    """Every line of code, every docstring from its first to its last word."""
    page = pages[name].read_text()
    text = squeezed(html.unescape(re.sub(r"<[^>]+>", "", page)))
    source = (ROOT / f"{MODULES.get(name, name).replace('.', '/')}.py").read_text()
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


def test_no_page_of_a_guide_shows_a_fence(pages):
    """The name of a file behind a language, as in researcher.md, must not turn code into text."""
    assert "```diff detr_min" in (ROOT / "docs" / "researcher.md").read_text()
    assert not [name for name, path in pages.items() if "```" in path.read_text()]


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
