"""The pictures of a COCO folder: which are read how, and which faults are told in one sentence.

COCO_SAMPLE names a folder of sample data sets (bccd, coco_cc, tiny_fixture and
coco_edge_cases_synthetic); without it the tests on those are skipped, and small folders written
here prove nearly the same.
"""
import shutil

import numpy as np
import pytest
from PIL import Image

from detr_min.data import coco_folder, coco_json, dataset, transforms
from helpers import GOOD, write_coco

KEEP_SIZE = transforms.resize(60, 60)       # long side to 60 px, which nearly all pictures have


# ---------------------------------------------------------------- all kinds of pictures

def gradient(h=40, w=60):
    """(h, w, 3) uint8, different in every corner and channel, so that a turn or a swap shows."""
    ys, xs = np.mgrid[0:h, 0:w]
    return np.stack((xs * 255 // w, ys * 255 // h, (xs + ys) * 255 // (h + w)), 2).astype(np.uint8)


def read(folder, picture, name="p.png", size=(60, 40), **options):
    picture.save(folder / name, **options)
    image = {"id": 5, "file_name": name, "width": size[0], "height": size[1]}
    return np.asarray(coco_folder.read_picture(folder, image))


def test_gray_palette_and_bilevel_become_rgb(tmp_path):
    gray = gradient()[:, :, 0]
    expected = np.repeat(gray[:, :, None], 3, 2)
    np.testing.assert_array_equal(read(tmp_path, Image.fromarray(gray)), expected)
    palette = Image.fromarray(gray).convert("P")
    np.testing.assert_array_equal(read(tmp_path, palette), expected)
    bilevel = Image.fromarray(gray > 127)
    np.testing.assert_array_equal(read(tmp_path, bilevel), np.where(expected > 127, 255, 0))


def test_16_bit_gray_is_scaled_not_clipped(tmp_path):
    gray = gradient()[:, :, 0]
    wide = Image.fromarray(gray.astype(np.uint16) * 257)             # 0..65535 = 257 * (0..255)
    np.testing.assert_array_equal(read(tmp_path, wide), np.repeat(gray[:, :, None], 3, 2))


@pytest.mark.parametrize("pixels", [gradient()[:, :, 0].astype(np.float32) / 255,
                                    gradient()[:, :, 0].astype(np.int32) * 300])
def test_numbers_whose_white_is_not_known_are_refused(tmp_path, pixels):
    """Else 0 to 1 would be read as black, without a word."""
    with pytest.raises(coco_json.DataError, match="p.tiff .*of 8 or 16 bits, so"):
        read(tmp_path, Image.fromarray(pixels), "p.tiff")


def test_transparency_is_laid_over_white(tmp_path):
    alpha = np.full((40, 60, 1), 255, np.uint8)
    alpha[:20] = 0                                                   # the upper half is invisible
    rgba = np.concatenate((gradient(), alpha), 2)
    expected = np.where(alpha > 0, gradient(), 255)
    np.testing.assert_array_equal(read(tmp_path, Image.fromarray(rgba)), expected)
    gray_alpha = read(tmp_path, Image.fromarray(rgba).convert("LA"))
    assert (gray_alpha[:20] == 255).all() and (gray_alpha[20:] < 255).any()
    gray = Image.fromarray(gradient()[:, :, 0]).convert("P")         # one palette entry transparent
    turned_white = read(tmp_path, gray, transparency=int(np.asarray(gray)[0, 30]))
    assert (turned_white[:, 30] == 255).all() and (turned_white[:, 0] == 0).all()


def test_cmyk_is_not_inverted(tmp_path):
    difference = read(tmp_path, Image.fromarray(gradient()).convert("CMYK"), "p.jpg", quality=95)
    assert np.abs(difference.astype(int) - gradient()).mean() < 5    # of 255; JPEG is not exact


@pytest.mark.parametrize(("tag", "size", "turned"), [
    (6, (60, 40), False),        # the json has the stored size: the boxes are in the stored frame
    (6, (40, 60), True),         # the json has the turned size: the boxes are in the turned frame
    (3, (60, 40), False)])       # upside down: the size cannot tell, so the tag is ignored
def test_the_json_size_decides_about_the_exif_tag(tmp_path, tag, size, turned):
    exif = Image.Exif()
    exif[0x0112] = tag
    picture = read(tmp_path, Image.fromarray(gradient()), size=size, exif=exif)
    expected = np.rot90(gradient(), -1) if turned else gradient()    # tag 6: show turned clockwise
    np.testing.assert_array_equal(picture, expected)


def test_unreadable_pictures_are_named_with_file_and_image_id(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png"):
        noise.save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1500])
    (tmp_path / "text.jpg").write_text("<html>404 not found</html>")
    for name in ("cut.jpg", "cut.png", "text.jpg"):
        image = {"id": 5, "file_name": name, "width": 60, "height": 40}
        with pytest.raises(coco_json.DataError, match=rf"{name} \(image id 5\) cannot be read"):
            coco_folder.read_picture(tmp_path, image)
    with pytest.raises(coco_json.DataError,
                       match=r"p.png \(image id 5\) has 60x40 pixels but 40x60"):
        read(tmp_path, noise, size=(40, 60))                         # turned in the json, no tag


# ---------------------------------------------------------------- what is missing

def test_missing_folders_and_files_are_named(tmp_path):
    def refused(sentence, split="val"):
        with pytest.raises(FileNotFoundError, match=sentence):
            dataset.open_folder(tmp_path / "coco", split, KEEP_SIZE)
    refused("coco is not a folder")
    write_coco(tmp_path / "coco", GOOD)
    refused("instances_train2017.json nor .*instances_train.json exists; if you have only", "train")
    (tmp_path / "coco" / "val" / "13.png").write_bytes(b"")
    refused(r"13.png \(image id 13\) .*missing or empty")
    (tmp_path / "coco" / "val" / "13.png").unlink()
    refused(r"13.png \(image id 13\) .*missing or empty")
    (tmp_path / "coco" / "val" / "14.png").unlink()
    refused(r"13.png \(image id 13\) .*missing or empty on disk \(2 of 4 pictures\): an int")
    for picture in (tmp_path / "coco" / "val").iterdir():
        picture.unlink()
    refused(r"11.png .*\(4 of 4 pictures\): do the pictures lie in another folder")
    shutil.rmtree(tmp_path / "coco" / "val")
    refused("instances_val.json is there but not its pictures")
    (tmp_path / "coco" / "annotations" / "instances_val.json").unlink()
    refused("instances_val2017.json nor .*instances_val.json exists; no json of boxes")


# ---------------------------------------------------------------- sample data

# each file of annotations/broken: when it is caught, and by which words; None: it is read
BROKEN_FILES = {
    "dangling_image_id": ("open", "annotation 32 of image 9999: there is no image with id 9999"),
    "duplicate_annotation_ids": ("open", "annotations has the id 1 more than once"),
    "duplicate_image_ids": ("open", "images has the id 8 more than once"),
    "missing_image_file": ("open", r"not_there.jpg \(image id 8\) .*missing"),
    "nan_box": ("open", "annotation 32 of image 8: bbox must be four finite numbers"),
    "no_annotations_key": ("open", "needs the lists images, annotations, categories"),
    "no_bbox_key": ("open", "annotation 32 of image 8: it has no bbox"),
    "no_iscrowd_key": (None, ""),
    "three_number_box": ("open", "annotation 32 of image 8: bbox must be four finite numbers"),
    "truncated_jpeg": ("read", r"truncated.jpg \(image id 8\) cannot be read"),
    "unknown_category": ("open", "annotation 32 of image 8: there is no category with id 12"),
    "wrong_image_size": ("read", r"08_duplicates.jpg \(image id 8\) has 240x160 pixels but 480x"),
}


def test_no_broken_file_is_left_out(coco_sample):
    folder = coco_sample / "coco_edge_cases_synthetic" / "annotations" / "broken"
    assert sorted(path.stem for path in folder.iterdir()) == sorted(BROKEN_FILES)


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_every_broken_file_is_caught_by_name(coco_sample, tmp_path, name):
    root, (moment, sentence) = coco_sample / "coco_edge_cases_synthetic", BROKEN_FILES[name]
    (tmp_path / "annotations").mkdir()
    for folder in ("val", "broken"):
        shutil.copytree(root / folder, tmp_path / folder)
    (tmp_path / "annotations" / "instances_val.json").symlink_to(
        root.resolve() / "annotations" / "broken" / f"{name}.json")
    if moment == "open":
        with pytest.raises((coco_json.DataError, FileNotFoundError), match=sentence):
            dataset.open_folder(tmp_path, "val", KEEP_SIZE)
        return
    ds = dataset.open_folder(tmp_path, "val", KEEP_SIZE)
    if moment == "read":
        with pytest.raises(coco_json.DataError, match=sentence):
            ds[0]
    else:
        assert len(ds[0][1].labels) == 5 and ds.coco.anns[32]["iscrowd"] == 0
