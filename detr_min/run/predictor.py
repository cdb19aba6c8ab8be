"""A trained detector for other people's programs: pictures in, boxes, labels and scores out.

`detr_min.load(path)` makes one. Read after `checkpoints.py` and `evaluate.py`.
"""
import pathlib

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional

from ..data import coco_folder, transforms
from . import checkpoints, evaluate, processes


def read(picture):
    """Turn a picture into a uint8 tensor (3, h, w), RGB, turned as its EXIF tag says.

    Args:
        picture  a path, a PIL image, a uint8 array (h, w, 3) or (h, w), or a uint8 tensor (3, h, w)
    Raises:
        ValueError, OSError: it is none of these, or cannot be read; names it
    """
    if isinstance(picture, torch.Tensor):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or len(picture) != 3:
            raise ValueError(f"a tensor {tuple(picture.shape)} of {picture.dtype} is not a picture:"
                             " uint8 (3, h, w) is expected, RGB in 0..255")
        return picture.cpu()
    if isinstance(picture, np.ndarray):
        channels = picture.shape[2:]                        # () of a gray picture
        if picture.dtype != np.uint8 or picture.ndim < 2 or channels not in ((), (3,), (4,)):
            raise ValueError(f"an array {picture.shape} of {picture.dtype} is not a picture: uint8 "
                             "(h, w, 3) is expected, RGB in 0..255")
        picture = Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        return functional.pil_to_tensor(coco_folder.to_rgb(ImageOps.exif_transpose(picture)))
    if not isinstance(picture, (str, pathlib.Path)):
        raise ValueError(f"{type(picture).__name__} is not a picture: a path, a PIL image, a uint8 "
                         "array or a uint8 tensor is expected")
    if not pathlib.Path(picture).is_file():
        raise FileNotFoundError(f"{picture}: there is no such file")
    try:
        with Image.open(picture) as file:
            return functional.pil_to_tensor(coco_folder.to_rgb(ImageOps.exif_transpose(file)))
    except Exception as error:                              # Pillow raises many kinds
        raise ValueError(f"{picture} is not a readable picture ({error})") from error


class Predictor:
    """A detector in eval mode with the config and the classes that it was trained with."""

    def __init__(self, path, device="auto", dc5=False):
        self.model = checkpoints.load_model(path, dc5)
        self.config, self.categories = self.model.config, self.model.categories
        self.names = [category["name"] for category in self.categories]     # position = label
        self.model.to(processes.device(device))

    def network_image(self, picture):
        """Resize and normalise a picture of `read` as the network was tested. -> (3, h, w)"""
        if not picture.numel():
            raise ValueError(f"a picture {tuple(picture.shape)} has no pixel: is it cut out beside "
                             "what there is?")
        resize = transforms.resize(self.config.size, self.config.recipe.max_size)
        return transforms.normalise(resize(picture))

    def detect(self, pictures, threshold=evaluate.THRESHOLD, top_k=None, nms=None):
        """Find the objects in a picture or in each of several.

        Args:
            pictures   one of what `read` takes, or a list of them
            threshold  the smallest score that is kept
            top_k      most detections of a picture; None: as many as it was tested with
            nms        IoU above which the worse of two boxes of a class is dropped; None: no NMS
        Returns:
            a dict, or a list of dicts, on the CPU, best first, with torchvision's keys:
            boxes (k, 4) xyxy in pixels of the picture; labels (k,) int64; scores (k,) in [0, 1];
            and names, a list of k class names
        Raises:
            ValueError, OSError: as `read`; or a threshold or nms outside [0, 1], or top_k below 1
        """
        for name, share in (("threshold", threshold), ("nms", 0 if nms is None else nms)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} {share}: scores and IoUs are in [0, 1]")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k {top_k}: one detection is the least")
        if not isinstance(pictures, (list, tuple)):
            return self.detect([pictures], threshold, top_k, nms)[0]
        answers = []
        for picture in map(read, pictures):             # one by one: no padding changes an answer
            [found] = evaluate.detect(self.model, [self.network_image(picture)],
                                      [tuple(picture.shape[-2:])],
                                      top_k or self.config.recipe.detections, nms)
            kept = found["scores"] >= threshold
            labels = found["labels"][kept]
            answers.append({"boxes": found["boxes_xyxy"][kept], "labels": labels,
                            "scores": found["scores"][kept],
                            "names": [self.names[label] for label in labels.tolist()]})
        return answers
