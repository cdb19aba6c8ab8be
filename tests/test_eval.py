"""The evaluation program: the table of a run again, other data, photos, and where it looks."""
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import eval as program
import train
from detr_min.data import coco_json, shapes
from detr_min.run import checkpoints, config, draw, evaluate, registry, sets


def two_steps(folder, *more):
    """A run of two steps on shapes of 64 pixels, its folder and its table."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sets, "NUM_VAL_SHAPES", 4)
    words = "train.py --images 4 --batch 2 --size 64 --steps 2 --device cpu --out"
    patch.setattr(sys, "argv", [*words.split(), str(folder), *more])
    for name in ("curves", "predictions"):
        patch.setattr(draw, name, lambda *args, **words: None)
    tables = []
    run_it = evaluate.evaluate
    patch.setattr(evaluate, "evaluate", lambda *a, **k: tables.append(run_it(*a, **k))
                  or tables[-1])
    train.main()
    patch.undo()
    return folder, tables[1][1]         # of the validation at the last step; then comes train AP


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """DAC-DETR."""
    return two_steps(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def sd_run(tmp_path_factory):
    """SD-DETR."""
    return two_steps(tmp_path_factory.mktemp("runs") / "sd", "--preset", "shapes_sd")


@pytest.fixture(autouse=True)
def few_validation_images(monkeypatch):
    monkeypatch.setattr(sets, "NUM_VAL_SHAPES", 4)


def photo(path, size=(90, 60), mode="RGB", seed=0):
    """A picture of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


SD_SLOW = ["run", pytest.param("sd_run", marks=pytest.mark.slow)]


@pytest.mark.parametrize("which", SD_SLOW)
def test_a_run_gives_its_own_table_again(which, request, capsys):
    folder, table = request.getfixturevalue(which)
    capsys.readouterr()                                         # what the training printed
    program.main([str(folder), "--device", "cpu"])
    assert capsys.readouterr().out.strip() == table.strip()


def test_another_folder_is_read_by_class_name(run, tmp_path, capsys):
    """Categories under other ids, in another order: names decide."""
    shapes.write_folder(tmp_path / "data", 2, 3, size_px=64)
    path = tmp_path / "data" / "annotations" / "instances_val.json"
    coco = json.loads(path.read_text())
    new = {c["id"]: 90 - 10 * i for i, c in enumerate(coco["categories"])}
    for category in coco["categories"]:
        category["id"] = new[category["id"]]
    for annotation in coco["annotations"]:
        annotation["category_id"] = new[annotation["category_id"]]
    program.main([str(run[0]), "--coco", str(tmp_path / "data"), "--out", str(tmp_path / "before")])
    path.write_text(json.dumps(coco))
    program.main([str(run[0]), "--coco", str(tmp_path / "data"), "--out", str(tmp_path / "after")])
    before, after = (json.loads((tmp_path / name / "eval.json").read_text())
                     for name in ("before", "after"))
    assert before == after and "3 images" in capsys.readouterr().out


def test_classes_that_were_not_trained_are_named(run, tmp_path):
    shapes.write_folder(tmp_path, 2, 3, size_px=64)
    path = tmp_path / "annotations" / "instances_val.json"
    path.write_text(path.read_text().replace('"ellipse"', '"zebra"'))
    with pytest.raises(ValueError, match="zebra.*trained: .*ellipse"):
        program.main([str(run[0]), "--coco", str(tmp_path)])


def test_photos_of_any_kind_are_drawn_and_listed(run, tmp_path, capsys):
    for i, name in enumerate(("RGB.jpg", "L.jpg", "RGBA.png", "CMYK.jpg", "P.png")):
        photo(tmp_path / name, mode=name.split(".")[0], seed=i)
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "sub").mkdir()
    out = tmp_path / "sub" / "out"
    program.main([str(run[0]), "--photos", str(tmp_path), "--threshold", "0", "--top_k", "3",
                  "--out", str(out)])
    rows = json.loads((out / "detections.json").read_text())
    assert {row["file"] for row in rows} == {"RGB.jpg", "L.jpg", "RGBA.png", "CMYK.jpg", "P.png"}
    assert len(rows) == 5 * 3 and len(list(out.glob("*.png"))) == 5
    for row in rows:
        x1, y1, x2, y2 = row["box_xyxy"]
        assert 0 <= x1 <= x2 <= 90 and 0 <= y1 <= y2 <= 60 and row["label"] in shapes.CLASSES
    said = capsys.readouterr().err
    assert "notes.txt is not a readable picture" in said
    assert f"{tmp_path}: subfolders, which were not searched: 1" in said


def test_photos_on_which_nothing_is_found_are_no_riddle(run, tmp_path, capsys):
    photo(tmp_path / "a.jpg", seed=0)
    program.main([str(run[0]), "--photos", str(tmp_path / "a.jpg"), "--threshold", "1",
                  "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == []
    assert "nothing scores 1 or more: try a lower --threshold" in capsys.readouterr().err


def test_a_photo_is_turned_as_its_exif_says(run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                    # to be shown turned by 90 degrees
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    program.main([str(run[0]), "--photos", str(tmp_path / "turned.jpg"), "--threshold", "0",
                  "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert max(row["box_xyxy"][3] for row in rows) > 60         # 60 wide and 90 high now
    assert max(row["box_xyxy"][2] for row in rows) <= 60


def test_two_photos_of_one_name_do_not_overwrite_each_other(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        photo(tmp_path / folder / "1.png")
    paths = [str(tmp_path / folder) for folder in ("a", "b")]
    with pytest.raises(ValueError, match="two files are called 1.png"):
        list(program.readable(*paths))
    assert [name for name, _ in program.readable(paths[0])] == ["1.png"]


def test_no_readable_photo_is_an_error(run, tmp_path):
    """It says that subfolders are left out, and leaves no empty folder behind."""
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "photos" / "notes.txt").write_text("not a picture")
    with pytest.raises(ValueError, match="no readable picture among 1 files; subfolders, .*: 1"):
        program.main([str(run[0]), "--photos", str(tmp_path / "photos"),
                      "--out", str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such file or folder"):
        program.main([str(run[0]), "--points", str(tmp_path / "nowhere"),
                      "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", SD_SLOW)
def test_detections_and_sampling_points_are_drawn(which, request, tmp_path):
    photo(tmp_path / "a.png")
    program.main([str(request.getfixturevalue(which)[0]), "--points", str(tmp_path / "a.png"),
                  "--photos", str(tmp_path / "a.png"), "--threshold", "0", "--top_k", "3",
                  "--out", str(tmp_path / "out")])
    for name in ("a.png.png", "a.png.points.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) >= 60
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(rows) == 3 and {row["label"] for row in rows} <= set(shapes.CLASSES)


@pytest.mark.parametrize("which", SD_SLOW)
def test_pages_of_a_photo_and_of_a_validation_image(which, request, tmp_path, capsys):
    """Digits are an image's id, of the run's set or of --coco's; its objects come with it."""
    photo(tmp_path / "a.png")
    shapes.write_folder(tmp_path / "data", 2, 3, size_px=64)
    folder, out = str(request.getfixturevalue(which)[0]), tmp_path / "out"
    capsys.readouterr()                                         # what the training printed
    for words in (["--explore", str(tmp_path / "a.png")], ["--explore", "4"],
                  ["--explore", "3", "--coco", str(tmp_path / "data")]):
        program.main([folder, "--out", str(out), *words])
    assert capsys.readouterr().out.split() == [f"{out / name}.html"
                                               for name in ("a.png", "val_4", "val_3")]
    pages = [json.loads(re.search('json">(.*?)</script>', path.read_text(), re.S)[1])
             for path in (out / "a.png.html", out / "val_4.html", out / "val_3.html")]
    assert [page["name"] for page in pages] == ["a.png", "image 4", "image 3"]
    assert pages[0]["objects"] is None and [len(page["objects"]) for page in pages[1:]] == [
        len(shapes.scene(0, "val", index, 64).labels) for index in (3, 2)]
    with pytest.raises(ValueError, match="--explore 7: .* no image of this id; .* 1, 2, 3, 4$"):
        program.main([folder, "--out", str(out), "--explore", "7"])


@pytest.mark.parametrize("words, message", [
    (["nowhere"], "nowhere does not exist"),
    (["--threshold", "2", "x"], "--threshold 2.0: it must be from 0 to 1"),
    (["--threshold", "-1e-3", "x"], "--threshold -0.001: it must be from 0 to 1"),
    (["--images", "-1", "x"], "--images -1"), (["x", "--photos", ""], "--photos is empty"),
    ([""], "RUN_OR_WEIGHTS is empty: is it an unset variable"),
    (["x", "--out", __file__], "--out .*test_eval.py is a file: a folder is expected")])
def test_mistakes_are_told_in_a_sentence(words, message, capsys):
    with pytest.raises((ValueError, OSError, SystemExit)) as stop:
        program.main(words)
    assert re.search(message, str(stop.value) + capsys.readouterr().err)


def test_a_published_file_needs_to_be_told_its_data(tmp_path):
    """It is not a run on shapes, so its own validation set cannot be tested again."""
    sizes = dict(d_model=32, num_heads=4, d_ffn=32, encoder_layers=1, decoder_layers=1,
                 num_queries=5, backbone="convnet", num_classes=91)
    cfg = config.preset("paper_r50", **sizes)               # as checkpoints.convert makes it
    detector = registry.build(cfg)
    checkpoints.save(tmp_path / "released.pth", detector, torch.optim.SGD(detector.parameters()),
                     cfg, coco_json.all_ids(), {"step": 0})
    with pytest.raises(ValueError, match="released.pth .*give --coco DIR or --photos FILE"):
        program.main([str(tmp_path / "released.pth"), "--device", "cpu"])


def test_the_answer_does_not_depend_on_the_unused_half(run):
    """In eval mode there is no C-Decoder; only its O-Decoder answers."""
    detector = checkpoints.load_model(run[0])
    images, is_pad = torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    output = detector(images, is_pad)
    assert output.c_decoder == [] and len(output.o_decoder) == detector.config.recipe.decoder_layers
    assert pathlib.Path(run[0], "config.json").exists()
