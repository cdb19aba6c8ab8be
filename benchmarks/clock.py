"""Two calls timed in turn, and what the times say: medians, quartiles, ratios of pairs.

A busy machine slows both calls of a pair alike, so a ratio is taken pair by pair. Read first.
"""
import math
import statistics
import time
from typing import NamedTuple

import torch

LEAST = 0.05            # seconds that one timed stretch lasts; short calls are repeated within it


class Stretch(NamedTuple):
    """Seconds of one call."""
    wall: float         # on the clock
    cpu: float          # of all threads of this process


def wait(device):
    """Until the accelerator has done what it was told to; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(call, number, device):
    """A Stretch: the mean of `number` calls in a row."""
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(number):
        call()
    wait(device)
    return Stretch((time.perf_counter() - wall) / number, (time.process_time() - cpu) / number)


def alternate(ours, theirs, repeats, device):
    """Time two calls in turn, ours first in even rounds, theirs in odd ones; the first warms up.

    Returns:
        (stretches of ours, stretches of theirs), `repeats` each
    """
    first = [once(call, 1, device) for call in (ours, theirs, ours, theirs)][2:]
    number = max(1, math.ceil(LEAST / max(min(stretch.wall for stretch in first), 1e-6)))
    seen = [], []
    for turn in range(repeats):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            seen[side].append(once((ours, theirs)[side], number, device))
    return seen


def spread(values):
    """{"median", "q1", "q3"}: the middle of some numbers, and of their lower and upper half."""
    if len(values) == 1:
        return dict.fromkeys(("median", "q1", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def compare(ours, theirs):
    """What two lists of Stretches say, pair by pair.

    Returns:
        {"ours", "theirs", "ratio"}, each {"wall", "cpu"}, each a spread: seconds, or theirs / ours,
        above 1 where ours is sooner
    """
    kinds = Stretch._fields
    return {"ours": {kind: spread([getattr(s, kind) for s in ours]) for kind in kinds},
            "theirs": {kind: spread([getattr(s, kind) for s in theirs]) for kind in kinds},
            "ratio": {kind: spread([getattr(b, kind) / getattr(a, kind)
                                    for a, b in zip(ours, theirs, strict=True)])
                      for kind in kinds}}
