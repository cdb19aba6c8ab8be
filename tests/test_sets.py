"""The data sets of a run: what its config says of images, classes and sizes."""
import pytest

from detr_min.data import coco_folder, dataset, transforms
from detr_min.run import config, sets
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
    train_set, plain_set = sets.open_train(config.preset("coco", coco=folder, size=64))
    assert train_set.image_ids == plain_set.image_ids == [11, 12, 13, 14]
    sizes = {train_set[epoch, 0][0].shape for epoch in range(8)}
    assert len(sizes) > 1
    assert {plain_set[epoch, 0][0].shape for epoch in range(8)} == {(3, 64, 96)}


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
    with pytest.raises(coco_folder.DataError, match="not trained: bird; trained: dog, cat"):
        sets.open_val(config.preset("coco", coco=folder), trained[1:])


def test_an_object_without_a_query_is_refused_before_training(tmp_path):
    """Of 11 only two count: the third is a crowd. With one query it names the fullest image."""
    write_coco(tmp_path, GOOD | {"annotations": [
        *GOOD["annotations"], annotation(7, 14, 7, [1, 1, 5, 5])]})
    data_set = dataset.open_folder(tmp_path, "val", transforms.resize(60, 60))
    sets.check_queries(data_set, 3)
    with pytest.raises(ValueError, match="image 14 holds 3 objects but the preset has 2 queries"):
        sets.check_queries(data_set, 2)
