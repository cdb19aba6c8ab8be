"""The data sets of a run: what its config says of images, classes and sizes."""
import dataclasses
import json

import pytest
import torch
from torch.testing import assert_close

import eval as eval_program
from detr_min.data import coco_json, dataset, transforms
from detr_min.run import config, folder as run_folder, sets
from helpers import GOOD, annotation, write_coco


@pytest.fixture
def folder(tmp_path):
    write_coco(tmp_path, GOOD, "train")
    write_coco(tmp_path, GOOD, "val")
    return str(tmp_path)


def ids(data_set):
    return [category["id"] for category in data_set.categories]


def test_shapes_follow_images_size_and_seed():
    train_set, plain_set = sets.open_train(config.preset("shapes", images=120, size=64, seed=3))
    assert (len(train_set), len(plain_set)) == (120, 100)           # 100 to test on are enough
    assert train_set[0, 0][0].shape == (3, 64, 64)
    other, _ = sets.open_train(config.preset("shapes", images=120, size=64, seed=4))
    assert (train_set[0, 0][0] != other[0, 0][0]).any()


def test_validation_shapes_are_the_same_for_every_seed(monkeypatch):
    monkeypatch.setattr(sets, "NUM_VAL_SHAPES", 3)
    one, other = (sets.open_val(config.preset("shapes", size=64, seed=seed),
                                sets.open_train(config.preset("shapes", images=1))[0].categories)
                  for seed in (0, 1))
    assert len(one) == len(other) == 3 and (one[2][0] == other[2][0]).all()


def test_a_folder_is_augmented_for_training_and_plain_to_test_on(folder):
    train_set, plain_set = sets.open_train(config.preset("coco", coco=folder, size=64,
                                                         augment="crop"))
    assert train_set.image_ids == plain_set.image_ids == [11, 12, 13, 14]
    sizes = {train_set[epoch, 0][0].shape for epoch in range(8)}
    assert len(sizes) > 1
    assert {plain_set[epoch, 0][0].shape for epoch in range(8)} == {(3, 64, 96)}


def test_without_crops_an_image_is_only_mirrored(folder):
    """As it is tested, or that with left and right swapped; both happen, and so to the boxes."""
    train_set, plain_set = sets.open_train(config.preset("coco", coco=folder, size=64,
                                                         augment="flip"))
    image, target = plain_set[0]
    mirrored = target.boxes * torch.tensor([-1, 1, 1, 1]) + torch.tensor([1, 0, 0, 0])
    seen = set()
    for epoch in range(8):
        found, labels = train_set[epoch, 0]
        as_it_is = torch.equal(found, image)
        assert_close(found, image if as_it_is else image.flip(-1), atol=.02, rtol=0)
        assert_close(labels.boxes, target.boxes if as_it_is else mirrored)
        seen.add(as_it_is)
    assert seen == {True, False}


def test_images_and_classes_choose(folder):
    cfg = config.preset("coco", coco=folder, images=2, classes=" cat, bird ", size=64)
    assert sets.class_names(cfg) == ["cat", "bird"]
    train_set, plain_set = sets.open_train(cfg)
    assert len(train_set) == 2 and train_set.image_ids == plain_set.image_ids
    assert ids(train_set) == [3, 90]
    val_set = sets.open_val(cfg, train_set.categories)
    assert len(val_set) == 4 and ids(val_set) == [3, 90]            # all images, these classes
    assert [target.labels.tolist() for _, target in val_set] == [[0], [], [1], [0, 0]]
    assert sets.class_names(config.preset("coco")) == []


def test_validation_is_labelled_as_training_was(folder):
    """Labels are the positions of names in what was trained, in whatever order."""
    trained = [{"id": 5, "name": "bird"}, {"id": 6, "name": "dog"}, {"id": 7, "name": "cat"}]
    val_set = sets.open_val(config.preset("coco", coco=folder), trained)
    assert [target.labels.tolist() for _, target in val_set] == [[1, 2], [], [0], [2, 2]]
    with pytest.raises(coco_json.DataError, match="not trained: bird; trained: dog, cat"):
        sets.open_val(config.preset("coco", coco=folder), trained[1:])


def test_a_run_holds_out_the_same_images_when_resumed_and_tested(tmp_path, capsys):
    """10 images, no validation json: 3 are held out, and the first line and config.json say so."""
    coco = GOOD | {"images": [{**GOOD["images"][0], "id": i} for i in range(1, 11)],
                   "annotations": [annotation(i, i, 3, [1, 1, 9, 9]) for i in range(1, 11)]}
    data = write_coco(tmp_path / "data", coco, "train")
    cfg = config.preset("coco", coco=str(data), val_share=0.3, seed=5, images=4, size=32, steps=2,
                        out=str(tmp_path / "run"), d_model=32, num_heads=4, d_ffn=32, device="cpu")
    run = run_folder.start(cfg)
    said = capsys.readouterr().out.splitlines()[0]
    assert "4 training and 3 validation images of 32 to 53 px (there is no validation json: " \
           "--val_share 0.3 of the images, drawn by --seed 5, are held out), 3 classes;" in said
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    held = run.val_set.image_ids
    assert len(held) == 3 and not set(held) & set(run.train_set.image_ids)
    assert (stored["val_share"], stored["held_out_image_ids"]) == (0.3, held)
    run.save("last.pt")
    run.config_file.close()
    resumed = run_folder.start(config.preset("coco", resume=str(tmp_path / "run"), device="cpu"))
    resumed.config_file.close()
    assert resumed.val_set.image_ids == held
    assert resumed.train_set.image_ids == run.train_set.image_ids
    more = dataclasses.replace(cfg, images=7)
    assert sets.open_val(more, run.train_set.categories).image_ids == held
    capsys.readouterr()
    eval_program.main([str(tmp_path / "run"), "--device", "cpu"])
    said = capsys.readouterr().out
    assert said.startswith(f"{data} (there is no validation json: --val_share 0.3 of the images, "
                           "drawn by --seed 5, are held out)\n") and "3 images" in said
    moved = data.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="was trained on .* no longer there: give"):
        eval_program.main([str(tmp_path / "run"), "--device", "cpu"])
    eval_program.main([str(tmp_path / "run"), "--device", "cpu", "--coco", str(moved)])


def test_a_folder_with_a_validation_json_says_nothing_of_it(folder):
    cfg = config.preset("coco", coco=folder)
    assert sets.said_of_val(cfg, sets.open_val(cfg, GOOD["categories"])) == ""


def test_a_share_beside_a_validation_json_is_said_to_have_no_effect(folder):
    cfg = config.preset("coco", coco=folder, val_share=0.3)
    assert "--val_share has no effect" in sets.said_of_val(cfg, sets.open_val(cfg,
                                                                              GOOD["categories"]))


def test_a_set_without_any_object_is_refused(tmp_path):
    for split in ("train", "val"):
        write_coco(tmp_path, GOOD | {"annotations": []}, split)
    train_set = dataset.open_folder(tmp_path, "train", transforms.resize(60, 60))
    with pytest.raises(ValueError, match="none of the .* training images has an object to learn"):
        sets.check_queries(train_set, 9)


@pytest.mark.filterwarnings("ignore:.*boxes reach outside")
def test_what_cannot_be_learned_is_said(folder, tmp_path):
    """Of 11 and 12: a box beside its picture, one without width, and no bird; crowds count as
    nothing."""
    whole = dataset.open_folder(folder, "train", transforms.resize(60, 60))
    assert sets.said_of_objects(whole) == ""
    coco = GOOD | {"categories": [*GOOD["categories"], {"id": 91, "name": "egg"}],
                   "annotations": [annotation(1, 11, 3, [1, 1, 5, 5]),
                                   annotation(2, 11, 7, [60, 1, 5, 5]),
                                   annotation(3, 12, 7, [9, 9, 0, 5]),
                                   annotation(4, 12, 90, [1, 1, 5, 5]) | {"iscrowd": 1}]}
    for split in ("train", "val"):
        write_coco(tmp_path / "b", coco, split)
    train_set = dataset.open_folder(tmp_path / "b", "train", transforms.resize(60, 60))
    assert sets.said_of_objects(train_set) == (
        "\nboxes without area inside their picture, left out: 2"
        "\nclasses without an object to learn from: 3 of 4 (dog, bird, egg)")
    objects = [train_set.objects(image) for image in train_set.coco.imgs.values()]
    assert sum(len(found["boxes"]) for found in objects) == 1       # the data set agrees


def test_configs_from_before_val_share_still_load():
    values = dataclasses.asdict(config.preset("coco"))
    del values["val_share"]
    assert config.from_dict(values) == config.preset("coco")
    assert config.preset("coco").val_share == 0.2


def test_an_object_without_a_query_is_refused_before_training(tmp_path):
    """Of 11 only two count: the third is a crowd. With one query it names the fullest image."""
    write_coco(tmp_path, GOOD | {"annotations": [
        *GOOD["annotations"], annotation(7, 14, 7, [1, 1, 5, 5])]})
    data_set = dataset.open_folder(tmp_path, "val", transforms.resize(60, 60))
    sets.check_queries(data_set, 3)
    with pytest.raises(ValueError, match="image 14 holds 3 objects but the preset has 2 queries"):
        sets.check_queries(data_set, 2)
