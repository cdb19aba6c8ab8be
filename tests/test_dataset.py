"""From a COCO folder or shapes to pictures and targets: what is read, and repeatable chance."""
import copy
import itertools
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision import ops

from detr_min.data import batches, coco_json, dataset, shapes, transforms
from helpers import GOOD, annotation, to_pixels, write_coco

KEEP_SIZE = transforms.resize(60, 60)       # long side to 60 px, which nearly all pictures have


# ---------------------------------------------------------------- what is read

def test_target_worked_by_hand(tmp_path):
    ds = dataset.open_folder(write_coco(tmp_path, GOOD), "val", KEEP_SIZE)
    picture, target = ds[0]
    # dog, id 7 -> label 1: x 6..36 of 60, y 4..24 of 40: centre (.35, .35), size (.5, .5)
    # cat, id 3 -> label 0: x 30..45, y 10..30: centre (.625, .5), size (.25, .5)
    # the crowd of cats is not a target
    assert_close(target.labels, torch.tensor([1, 0]))
    assert_close(target.boxes, torch.tensor([[0.35, 0.35, 0.5, 0.5], [0.625, 0.5, 0.25, 0.5]]))
    assert (target.image_id, target.size_px) == (11, (40, 60))
    expected = np.random.default_rng(11).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_pixels(picture), expected)
    assert picture.dtype == target.boxes.dtype == torch.float32
    assert type(picture) is type(target.boxes) is torch.Tensor      # no tv_tensor leaves the file


def test_categories_are_mapped_by_ascending_id_and_the_json_stays_whole(tmp_path):
    ds = dataset.open_folder(write_coco(tmp_path, GOOD), "val", KEEP_SIZE)
    assert ds.categories == [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"},
                             {"id": 90, "name": "bird"}]
    assert ds.image_ids == [11, 12, 13, 14]
    assert [a["iscrowd"] for a in ds.coco.loadAnns(ds.coco.getAnnIds(imgIds=11))] == [0, 0, 1]
    assert ds.coco.getCatIds() == [90, 3, 7]


def test_image_without_objects_is_kept(tmp_path):
    for transform in (KEEP_SIZE, transforms.flip_only(), transforms.multi_scale_and_crop(64, 100)):
        ds = dataset.open_folder(write_coco(tmp_path / str(id(transform)), GOOD), "val", transform)
        target = ds[1][1]
        assert target.boxes.shape == (0, 4) and target.boxes.dtype == torch.float32
        assert target.labels.shape == (0,) and target.labels.dtype == torch.int64


def test_json_without_any_annotation_is_no_error(tmp_path):
    ds = dataset.open_folder(write_coco(tmp_path, GOOD | {"annotations": []}), "val", KEEP_SIZE)
    assert [len(target.labels) for _, target in ds] == [0, 0, 0, 0]


def test_boxes_are_clipped_and_those_without_area_dropped(tmp_path):
    boxes = [[-10, -5, 30, 25],          # over the top left corner -> 0..20, 0..20
             [50, 30, 20, 20],           # over the bottom right corner -> 50..60, 30..40
             [5, 5, 0, 9], [5, 5, 9, 0], [9, 9, -4, 5],              # no width, no height, negative
             [60, 3, 8, 9], [-9, 3, 9, 9],                           # touch the image from outside
             [30.25, 20.25, 0.5, 0.5]]   # half a pixel is a box
    coco = GOOD | {"annotations": [annotation(i, 12, 90, box) for i, box in enumerate(boxes, 1)]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # 3 of 8 leave the image
        target = dataset.open_folder(write_coco(tmp_path, coco), "val", KEEP_SIZE)[1][1]
    expected = torch.tensor([[0, 0, 20, 20], [50, 30, 60, 40], [30.25, 20.25, 30.75, 20.75]])
    xyxy_px = ops.box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor([60, 40, 60, 40])
    assert_close(xyxy_px, expected)
    assert_close(target.labels, torch.tensor([2, 2, 2]))


@pytest.mark.parametrize("layout", ["{}2017", "{}"])
def test_both_layouts(tmp_path, layout):
    write_coco(tmp_path, GOOD, "train", layout)
    write_coco(tmp_path, GOOD | {"images": GOOD["images"][:3], "annotations": []}, "val", layout)
    assert len(dataset.open_folder(tmp_path, "train", transforms.flip_only())) == 4
    assert len(dataset.open_folder(str(tmp_path), "val", transforms.flip_only())) == 3     # a str


def test_ids_of_0_missing_keys_and_pycocotools_chatter(tmp_path, capsys):
    """pycocotools counts no object with id 0 as found and needs iscrowd, area and info."""
    coco = copy.deepcopy(GOOD)
    for number, a in enumerate(coco["annotations"]):
        a["id"] = number
        del a["iscrowd"], a["area"]
    ds = dataset.open_folder(write_coco(tmp_path, coco), "val", KEEP_SIZE)
    assert sorted(ds.coco.anns) == [1, 2, 3, 4, 5, 6]
    assert ds.coco.anns[1]["area"] == 600 and ds.coco.anns[1]["iscrowd"] == 0
    assert "info" in ds.coco.dataset
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- parts of a data set

def test_class_names_choose_images_in_train_and_targets_everywhere(tmp_path):
    write_coco(tmp_path, GOOD, "train")
    write_coco(tmp_path, GOOD, "val")
    train = dataset.open_folder(tmp_path, "train", KEEP_SIZE, class_names=("cat", "bird"))
    assert train.categories == [{"id": 3, "name": "cat"}, {"id": 90, "name": "bird"}]
    assert train.image_ids == [11, 13, 14]
    assert [target.labels.tolist() for _, target in train] == [[0], [1], [0, 0]]
    dogs = dataset.open_folder(tmp_path, "train", KEEP_SIZE, class_names=("dog",))
    assert dogs.image_ids == [11]
    val = dataset.open_folder(tmp_path, "val", KEEP_SIZE, class_names=("dog",))
    assert [target.labels.tolist() for _, target in val] == [[0], [], [], []]


def test_a_crowd_alone_makes_no_training_image(tmp_path):
    coco = GOOD | {"annotations": [annotation(1, 12, 3, [5, 5, 50, 30], iscrowd=1),
                                   annotation(2, 13, 3, [5, 5, 9, 9])]}
    write_coco(tmp_path, coco, "train")
    ds = dataset.open_folder(tmp_path, "train", KEEP_SIZE, class_names=("cat",))
    assert ds.image_ids == [13]


def test_subsets_are_seeded_nested_and_in_order(tmp_path):
    write_coco(tmp_path, GOOD)
    chosen = [dataset.open_folder(tmp_path, "val", KEEP_SIZE, n, seed=1).image_ids
              for n in (1, 2, 3, 4)]
    assert [len(ids) for ids in chosen] == [1, 2, 3, 4]
    for smaller, larger in itertools.pairwise(chosen):
        assert set(smaller) < set(larger) and larger == sorted(larger)
    assert dataset.open_folder(tmp_path, "val", KEEP_SIZE, 2, seed=1).image_ids == chosen[1]
    others = {tuple(dataset.open_folder(tmp_path, "val", KEEP_SIZE, 2, seed=seed).image_ids)
              for seed in range(8)}
    assert len(others) > 1


def test_only_chosen_pictures_need_be_on_disk(tmp_path):
    write_coco(tmp_path, GOOD)
    [kept] = dataset.open_folder(tmp_path, "val", KEEP_SIZE, 1).image_ids
    for i in {11, 12, 13, 14} - {kept}:
        (tmp_path / "val" / f"{i}.png").unlink()
    assert len(dataset.open_folder(tmp_path, "val", KEEP_SIZE, 1)) == 1


def test_impossible_parts_are_refused(tmp_path):
    write_coco(tmp_path, GOOD, "train")
    write_coco(tmp_path, GOOD, "val")
    for arguments, sentence in (
            ({"num_images": 5}, "has 4 images; asked for 5 .0 means all"),
            ({"num_images": -1}, "has 4 images; asked for -1"),
            ({"num_images": 2, "class_names": ("dog",)}, "has 1 images with dog; asked for 2"),
            ({"class_names": ("birds",)}, r"no class 'birds', did you mean 'bird'\? It has: 'cat'"),
            ({"class_names": ("cat", "zebra")}, r"no class 'zebra'\. It has: 'cat', 'dog'")):
        with pytest.raises(coco_json.DataError, match=sentence):
            dataset.open_folder(tmp_path, "train", KEEP_SIZE, **arguments)
    with pytest.raises(coco_json.DataError, match="asked for 0 images of shapes"):
        dataset.open_shapes("train", KEEP_SIZE, 0)


# ---------------------------------------------------------------- no validation json

def many(n):
    """A json of n images without objects, two classes."""
    return {"images": [{"id": i, "file_name": "11.png", "width": 60, "height": 40}
                       for i in range(1, n + 1)],
            "categories": GOOD["categories"], "annotations": [annotation(1, n, 3, [1, 1, 9, 9])]}


def test_a_share_is_held_out_where_there_is_no_validation_json(tmp_path):
    write_coco(tmp_path, many(20), "train")
    train, val = (dataset.open_folder(tmp_path, split, KEEP_SIZE) for split in ("train", "val"))
    assert (len(train), len(val)) == (16, 4)                            # a fifth
    assert sorted(train.image_ids + val.image_ids) == list(range(1, 21))
    assert val.is_held_out and not train.is_held_out
    for share, number in ((0.01, 1), (0.12, 2), (0.5, 10), (0.99, 19)):     # never none, never all
        val = dataset.open_folder(tmp_path, "val", KEEP_SIZE, val_share=share)
        assert len(val) == number


def test_held_out_images_follow_from_the_seed_alone(tmp_path):
    """Not from how many or which classes are trained, nor from the order of the json."""
    write_coco(tmp_path / "a", many(20), "train")
    coco = many(20)
    coco["images"].reverse()
    write_coco(tmp_path / "b", coco, "train")
    val = {seed: set(dataset.open_folder(tmp_path / "a", "val", KEEP_SIZE, seed=seed).image_ids)
           for seed in range(4)}
    assert len({tuple(sorted(ids)) for ids in val.values()}) > 1
    for seed, ids in val.items():
        again = dataset.open_folder(tmp_path / "b", "val", KEEP_SIZE, seed=seed)
        assert set(again.image_ids) == ids
        for n in (1, 7, 16):
            part = dataset.open_folder(tmp_path / "a", "train", KEEP_SIZE, n, seed=seed)
            assert len(part) == n and not ids & set(part.image_ids)
        if 20 not in ids:                                               # where the only cat is
            cats = dataset.open_folder(tmp_path / "a", "train", KEEP_SIZE, 0, ["cat"], seed)
            assert cats.image_ids == [20]


def test_too_few_images_to_hold_some_out_are_refused(tmp_path):
    write_coco(tmp_path / "one", many(1), "train")
    with pytest.raises(coco_json.DataError, match="has 1 image.* and there is no validation"):
        dataset.open_folder(tmp_path / "one", "train", KEEP_SIZE)
    write_coco(tmp_path / "ten", many(10), "train")
    with pytest.raises(coco_json.DataError, match="has 8 images beside the 2 held out for valid"
                                                    "ation; asked for 9"):
        dataset.open_folder(tmp_path / "ten", "train", KEEP_SIZE, 9)


# ---------------------------------------------------------------- chance

def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1].boxes, b[1].boxes)


def test_augmentation_is_a_pure_function_of_seed_epoch_and_index(tmp_path):
    write_coco(tmp_path, GOOD)
    transform = transforms.multi_scale_and_crop(64, 100)
    ds = dataset.open_folder(tmp_path, "val", transform, seed=3)
    again = dataset.open_folder(tmp_path, "val", transform, seed=3)
    keys = [(epoch, i) for epoch in range(4) for i in range(4)]
    first = {key: ds[key] for key in keys}
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for key in reversed(keys):                        # another order, data set and global seed
        assert same(again[key], first[key])
    assert torch.equal(torch.get_rng_state(), state)  # and the global stream is where it was
    assert same(ds[2], first[0, 2])
    assert len({first[epoch, 0][0].shape for epoch in range(4)}) > 1
    other = dataset.open_folder(tmp_path, "val", transform, seed=4)
    assert not all(same(other[key], first[key]) for key in keys)


def test_worker_processes_see_the_same_pictures():
    ds = dataset.open_shapes("train", transforms.flip_only(), 6, size_px=48)
    steps = list(batches.batches(6, 2, 0, 0, 4))
    loader = torch.utils.data.DataLoader(ds, batch_sampler=steps, num_workers=1,
                                         collate_fn=batches.collate)
    for keys, (images, _, targets) in zip(steps, loader, strict=True):
        for key, picture, target in zip(keys, images, targets):
            assert same((picture, target), ds[key])


def test_data_sets_can_be_sent_to_spawned_workers(tmp_path):
    write_coco(tmp_path, GOOD)
    folder = dataset.open_folder(tmp_path, "val", transforms.multi_scale_and_crop(64, 100))
    for ds in (folder, dataset.open_shapes("val", transforms.flip_only(), 2, size_px=48)):
        assert same(pickle.loads(pickle.dumps(ds))[1, 1], ds[1, 1])


def test_the_sentence_survives_a_worker_process(tmp_path):
    ds = dataset.open_folder(write_coco(tmp_path, GOOD), "val", KEEP_SIZE)
    (tmp_path / "val" / "13.png").write_bytes(b"spoiled after opening")
    loader = iter(torch.utils.data.DataLoader(ds, batch_sampler=[[(0, 2)], [(0, 1)]], num_workers=1,
                                              collate_fn=batches.collate))
    with pytest.raises(coco_json.DataError, match=r"13.png \(image id 13\) cannot be read"):
        next(loader)
    assert len(list(loader)) == 1                                    # the worker itself lives on


def test_flip_moves_boxes_with_the_picture():
    ds = dataset.open_shapes("train", transforms.flip_only(), 1, size_px=64)
    plain = ds[0]
    flipped = next(ds[epoch, 0] for epoch in range(20) if not same(ds[epoch, 0], plain))
    assert_close(flipped[0], plain[0].flip(2))
    mirrored = torch.cat((1 - plain[1].boxes[:, :1], plain[1].boxes[:, 1:]), 1)
    assert_close(flipped[1].boxes, mirrored)
    flips = sum(not same(ds[epoch, 0], plain) for epoch in range(200))
    assert 70 < flips < 130                                          # 100 +- 4 sigma


# ---------------------------------------------------------------- memory

def test_pictures_are_decoded_once_and_only_while_there_is_room(tmp_path, monkeypatch):
    ds = dataset.open_folder(write_coco(tmp_path, GOOD), "val", KEEP_SIZE)
    monkeypatch.setattr(dataset, "CACHE_BYTES", 2 * 3 * 40 * 60)        # room for two pictures
    first = [ds[i] for i in range(4)]
    assert list(ds.cache) == [11, 12] and ds.cached_bytes == 2 * 3 * 40 * 60
    for i in (11, 12):
        (tmp_path / "val" / f"{i}.png").unlink()
    assert all(same(ds[i], first[i]) for i in range(4))              # 11, 12 from memory, unchanged


# ---------------------------------------------------------------- shapes

def test_shapes_are_served_as_drawn(capsys):
    ds = dataset.open_shapes("val", transforms.resize(96, 96), 3, size_px=96, seed=5)
    assert [category["name"] for category in ds.categories] == list(shapes.CLASSES)
    assert (len(ds), ds.image_ids, capsys.readouterr().out) == (3, [1, 2, 3], "")
    for i in range(3):
        picture, target = ds[i]
        scene = shapes.scene(5, "val", i, 96)
        np.testing.assert_array_equal(to_pixels(picture), np.asarray(shapes.draw(scene)))
        assert target.labels.tolist() == scene.labels
        assert_close(ops.box_convert(target.boxes, "cxcywh", "xyxy") * 96,
                     torch.tensor(scene.boxes_xyxy_px, dtype=torch.float32))


def test_a_written_shapes_folder_reads_the_same(tmp_path):
    shapes.write_folder(tmp_path, 2, 2, size_px=48)
    folder = dataset.open_folder(tmp_path, "train", transforms.flip_only())
    drawn = dataset.open_shapes("train", transforms.flip_only(), 2, size_px=48)
    assert all(same(folder[epoch, i], drawn[epoch, i]) for epoch in range(3) for i in range(2))


# ---------------------------------------------------------------- sample data

def test_every_edge_case_is_read_right(coco_sample):
    root = coco_sample / "coco_edge_cases_synthetic"
    ds = dataset.open_folder(root, "val", transforms.resize(128, 128))
    expected = json.loads((root / "expected.json").read_text())
    assert len(ds) == len(expected) == 21 and len(ds.categories) == 80
    for (picture, target), case in zip(ds, expected, strict=True):
        w, h = case["json_size"]
        assert target.size_px == (h, w), case["file_name"]
        assert_close(ops.box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor([w, h, w, h]),
                     torch.tensor(case["valid_boxes_xyxy"], dtype=torch.float32).reshape(-1, 4),
                     atol=1e-4, rtol=0)                              # pixels, from float32 [0, 1]
        assert picture.shape[1:] == transforms.resized_sides(h, w, 128, 128)
        assert picture.isfinite().all()
    with Image.open(root / "val" / "15_gray16.png") as stored:
        expected = np.asarray(stored).mean() / 257                   # clipped it would be above 240
    assert abs(to_pixels(ds[14][0]).mean() - expected) < 1


@pytest.mark.parametrize(("name", "num_train", "num_val", "num_classes"), [
    ("bccd", 292, 72, 3), ("coco_cc", 92, 66, 80), ("tiny_fixture", 8, 4, 17)])
def test_sample_folders_are_read(coco_sample, name, num_train, num_val, num_classes):
    augment = transforms.multi_scale_and_crop(128, 213)
    for split, num_images in (("train", num_train), ("val", num_val)):
        ds = dataset.open_folder(coco_sample / name, split, augment)
        assert len(ds) == num_images and len(ds.categories) == num_classes
        images, is_pad, targets = batches.collate([ds[3, i] for i in range(4)])
        assert images.shape[2:] == is_pad.shape[1:] and max(images.shape) <= 213
        for target in targets:
            xyxy = ops.box_convert(target.boxes, "cxcywh", "xyxy")
            assert (xyxy > -1e-6).all() and (xyxy < 1 + 1e-6).all()
            assert (target.boxes[:, 2:] > 0).all() and (target.labels < num_classes).all()
