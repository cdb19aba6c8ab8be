"""What all tests share: one thread, long tests, the folder of sample data sets, and --mine."""
import gc
import os
import pathlib

import pytest
import torch

from exercises.grading import mine


def pytest_addoption(parser):
    mine.add_options(parser)


def pytest_configure(config):
    torch.set_num_threads(1)        # small tensors: threads cost more than they give
    if config.option.mine:          # a student's function takes the place of the package's
        config.pluginmanager.register(mine.Grader(config), "grader")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr and not config.option.mine:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


def pytest_collection_finish():
    gc.freeze()                     # what is imported stays: no search for garbage in it


@pytest.fixture
def coco_sample():
    """The folder that holds bccd/, coco_cc/ and the other sample sets; skips without it."""
    if not os.environ.get("COCO_SAMPLE"):
        pytest.skip("set COCO_SAMPLE to a folder with sample data sets")
    return pathlib.Path(os.environ["COCO_SAMPLE"])


@pytest.fixture
def no_pictures(monkeypatch):
    """A run's pictures are empty files, as drawing them takes longer than a few steps."""
    from detr_min.run import draw       # not above: few tests draw, and matplotlib is large
    for name, place in (("curves", 1), ("predictions", 2)):
        monkeypatch.setattr(draw, name, lambda *args, place=place, **words: open(
            args[place], "w").close())


@pytest.fixture
def generator():
    """Chance that is the same in every run."""
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)
