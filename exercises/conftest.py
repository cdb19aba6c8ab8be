"""A sentence for those who type `pytest --mine ...` in this folder."""
import pathlib
import sys

import pytest


def pytest_addoption():
    if "--mine" in sys.argv and pathlib.Path.cwd() == pathlib.Path(__file__).resolve().parent:
        raise pytest.UsageError("`pytest --mine` runs in the repository's root folder: cd ..")
