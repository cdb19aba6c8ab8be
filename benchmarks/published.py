"""The published models at full size: loading, one image, one training step; seconds and memory.

    python -m benchmarks.published load r50                      # or swin_l: load a file, one image
    python -m benchmarks.published detect paper_r50              # images per second
    python -m benchmarks.published step release                  # a training step
    python -m benchmarks.published step paper_r50 --height 800 --width 1333 --device cuda \\
        --precision bf16 --compile

Weights are random, files have the release's keys. Each line is of a process of its own.
"""
import argparse
import dataclasses
import pathlib
import subprocess
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))
import test_published as layout  # noqa: E402
from benchmarks import cases, clock, memory  # noqa: E402
from detr_min.run import checkpoints, config, evaluate  # noqa: E402

BODIES = {"r50": layout.resnet_50,
          "swin_l": lambda: layout.swin(192, (2, 2, 18, 2), (6, 12, 24, 48), 12)}
REPEATS = 3


def peak(device):
    """GiB: the most this process has held; on a GPU, the most tensors have taken there."""
    most = (torch.cuda.max_memory_allocated(device) if device.type == "cuda"
            else memory.of_process("VmHWM"))
    return most / 2 ** 30


def write(body, path):
    """A file of random weights under the release's names."""
    table = layout.key_table("dac", BODIES[body], 256, 2048, 900, 6)
    layout.save(path, layout.random_state(table))


def load(body, args, device):
    """Load a file and detect on one image, 300 detections."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "released.pth"
        subprocess.run([sys.executable, "-m", "benchmarks.published", "write", body,
                        "--file", str(path)], cwd=ROOT, check=True)
        start = time.perf_counter()
        detector = checkpoints.load_model(path).to(device)
        loaded = time.perf_counter()
        size = args.height, args.width
        evaluate.detect(detector, [torch.randn(3, *size, device=device)], [size], top_k=300)
        clock.wait(device)
        done = time.perf_counter()
    print(f"{body} {size}: loading {loaded - start:.1f} s, image {done - loaded:.1f} s, together "
          f"{done - start:.1f} s, peak {peak(device):.2f} GiB")


def case_of(preset, args):
    """A preset with the authors' loss, at the size, batch and precision asked for."""
    cfg = config.preset(preset, num_classes=91, loss="align", batch=args.batch)
    cfg = dataclasses.replace(cfg, precision=args.precision)
    return cases.ModelCase(cfg, args.height, args.width)


def report(preset, args, seconds, device):
    """The fastest of a few rounds, after one that warms up."""
    best = min(seconds[1:])
    form = args.precision + ", compiled" * args.compile
    print(f"{preset} {form} {args.batch} x {args.height} x {args.width}: {best:.3g} s, "
          f"{args.batch / best:.2f} images/s, peak {peak(device):.2f} GiB")


@torch.no_grad()
def detect(preset, args, device):
    """The forward pass alone."""
    case = case_of(preset, args)
    detector = cases.build_ours(case).to(device).eval()
    runner = torch.compile(detector) if args.compile else detector
    images, is_pad = (t.to(device) for t in cases.batch_of(case)[:2])
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        seconds = [clock.once(lambda: runner(images, is_pad), 1, device).wall
                   for _ in range(1 + REPEATS)]
    report(preset, args, seconds, device)


def step(preset, args, device):
    """A training step: denoising queries, both decoders, Align loss, AdamW."""
    case = case_of(preset, args)
    batch = cases.batch_of(case)
    run = cases.step_of(case, cases.build_ours(case).to(device), True, args.compile)
    seconds = [clock.once(lambda n=n: run(batch, n), 1, device).wall
               for n in range(1, 2 + REPEATS)]
    report(preset, args, seconds, device)


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load", "detect", "step", "write"))
    parser.add_argument("which", help="r50 | swin_l for load; a preset for detect and step")
    parser.add_argument("--height", type=int, default=640)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="of detect and step")
    parser.add_argument("--file", help="of write")
    args = parser.parse_args()
    known = BODIES if args.what in ("load", "write") else config.PRESETS
    if args.which not in known:
        parser.error(f"{args.what} {args.which}: there are {', '.join(known)}")
    if args.what == "write":
        write(args.which, args.file)
    else:
        {"load": load, "detect": detect, "step": step}[args.what](
            args.which, args, torch.device(args.device))


if __name__ == "__main__":
    main()
