"""To fill in: exercise 12 of exercises/README.md. Graded by

    python exercises/kill.py matcher.one_to_many

or by another of the functions that `python exercises/kill.py` lists.
"""
import torch  # noqa: F401
from detr_min import matcher  # noqa: F401


def test_one_to_many():
    raise NotImplementedError("exercise 12: write tests that pass on matcher.one_to_many and fail "
                              "on every wrong version of it")
