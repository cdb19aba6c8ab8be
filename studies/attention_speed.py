"""How much sooner attention.by_rows is than attention.deformable_attention, on this CPU.

    OMP_NUM_THREADS=1 python studies/attention_speed.py

Both forms run in turn on the same numbers; medians of CPU time, forward and forward + backward.
"""
import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from detr_min import attention  # noqa: E402

CASES = {       # B, feature levels, N; 4 heads of 32 channels, 4 points
    "encoder, preset shapes": (8, [(16, 16), (8, 8), (4, 4)], 336),
    "decoder, preset shapes": (8, [(16, 16), (8, 8), (4, 4)], 100),
    "encoder, preset coco": (8, [(32, 40), (16, 20), (8, 10), (4, 5)], 1700),
}


def measure(attend, value, shapes, locations, weights):
    """CPU-seconds of a forward pass, and of one with its backward."""
    start = time.process_time()
    out = attend(value, shapes, locations, weights)
    forward = time.process_time() - start
    out.sum().backward()
    return forward, time.process_time() - start


def main(repeats=7):
    """Print one line a case: milliseconds of both forms and their ratios."""
    for name, (B, shapes, N) in CASES.items():
        value = torch.randn(B, sum(h * w for h, w in shapes), 4, 32, requires_grad=True)
        locations = torch.rand(B, N, 4, len(shapes), 4, 2, requires_grad=True)
        weights = torch.rand(B, N, 4, len(shapes), 4, requires_grad=True)
        times = {attention.deformable_attention: [], attention.by_rows: []}
        for _ in range(repeats + 1):                                # the first one warms up
            for attend, seen in times.items():
                seen.append(measure(attend, value, shapes, locations, weights))
        (f0, b0), (f1, b1) = ([1000 * statistics.median(t) for t in zip(*seen[1:])]
                              for seen in times.values())
        print(f"{name}: forward {f0:.1f} / {f1:.1f} ms = {f0 / f1:.1f} x, "
              f"with backward {b0:.1f} / {b1:.1f} ms = {b0 / b1:.1f} x")


if __name__ == "__main__":
    main()
