"""The pictures of a COCO folder: found, never outside of it, and read. Errors are one sentence.

Read after `layouts.py` and `coco_json.py`; `dataset.py` serves what is read here.
"""
import os

import numpy as np
from PIL import Image, ImageOps

from . import coco_json


def check_pictures(root, folder, images, path):
    """Refuse images of the json at `path` whose pictures are not there, or not to be used.

    Raises:
        DataError, FileNotFoundError: naming the first such picture and its image's id
    """
    inside, missing = [os.path.join(os.path.realpath(f), "") for f in (folder, root)], []
    for image in images:
        w, h, file = image["width"], image["height"], folder / image["file_name"]
        if not (0 < min(w, h) <= max(w, h) <= coco_json.MOST_PX and 1 / 200 < w / h < 200):
            raise coco_json.DataError(f"{path}: image {image['id']} has {w}x{h} pixels, too thin "
                                      "or too large to be resized: leave it out")
        try:
            real = os.path.realpath(file)
            is_there = os.path.isfile(real) and os.path.getsize(real)
        except (OSError, ValueError):           # a name that is too long, or no name at all
            is_there = False
        if not is_there:
            missing.append(f"{str(file)[:500]} (image id {image['id']})")
        elif not real.startswith(tuple(inside)):
            raise coco_json.DataError(
                f"{file} (image id {image['id']}) is {real}, outside the data set's folder: copy "
                "it there, or link the whole folder of pictures")
    if missing:
        cause = ("an interrupted download?" if len(missing) < len(images)
                 else "do the pictures lie in another folder?")
        raise FileNotFoundError(f"{missing[0]} is in {path} but missing or empty on disk "
                                f"({len(missing)} of {len(images)} pictures): {cause}")


def read_picture(folder, image):
    """An image of the json as a PIL picture, RGB, in the frame of its boxes: the EXIF tag that
    turns pictures counts only if the json's size equals the turned size and not the stored one."""
    path, size, rgb = folder / image["file_name"], (image["width"], image["height"]), None
    try:
        with Image.open(path) as file:
            stored = file.size
            if file.format == "EPS":
                raise ValueError("it is PostScript, a program")
            if size in (stored, stored[::-1]):                  # else it need not be decoded
                rgb = to_rgb(file if stored == size else ImageOps.exif_transpose(file))
    except Exception as error:                                  # Pillow raises many kinds
        raise coco_json.DataError(
            f"{path} (image id {image['id']}) cannot be read "
            f"({str(error) or type(error).__name__}): put a readable copy in its place, and leave "
            "the json as it is") from None
    if not rgb or rgb.size != size:
        raise coco_json.DataError(
            f"{path} (image id {image['id']}) has {stored[0]}x{stored[1]} pixels but "
            f"{size[0]}x{size[1]} in the json: resized without its boxes?")
    return rgb


def to_rgb(picture):
    """Any PIL picture as 8-bit RGB: transparency over white, 16-bit gray scaled, not clipped.

    Raises:
        ValueError: which number is white is not known, as in float pictures
    """
    if picture.mode.startswith(("I", "F")):
        pixels = np.asarray(picture)
        if picture.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its pixels are not numbers of 8 or 16 bits, so which one is white?")
        picture = Image.fromarray((pixels / 257).round().astype(np.uint8))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")
