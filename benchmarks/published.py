"""The published models at full size: loading, one image, one training step; seconds and memory.

    python -m benchmarks.published load r50                      # or swin_l: load a file, one image
    python -m benchmarks.published detect paper_r50              # images a second
    python -m benchmarks.published step release                  # a training step
    python -m benchmarks.published step paper_r50 --height 800 --width 1333 --device cuda \\
        --precision bf16

Weights are random, files have the release's keys. Each line is of a process of its own.
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))
import test_published as layout  # noqa: E402
from benchmarks import clock, memory  # noqa: E402
from detr_min import checkpoints, config, criterion, data, denoising, evaluate  # noqa: E402
from detr_min import model, optim  # noqa: E402

BODIES = {"r50": layout.resnet_50,
          "swin_l": lambda: layout.swin(192, (2, 2, 18, 2), (6, 12, 24, 48), 12)}
OBJECTS, REPEATS = 7, 3             # COCO's mean of objects in an image


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


def make(preset, device):
    """A detector of a preset with random weights, and its Config."""
    cfg = config.preset(preset, num_classes=91, steps=10, loss="align")
    torch.manual_seed(0)
    return model.build(cfg).to(device), cfg


def images_of(args, device):
    """A batch of noise without padding: images, is_pad."""
    size = args.batch, args.height, args.width
    return (torch.randn(args.batch, 3, *size[1:], device=device),
            torch.zeros(size, dtype=torch.bool, device=device))


@torch.no_grad()
def detect(preset, args, device):
    """Images a second of the forward pass."""
    detector, _ = make(preset, device)
    images, is_pad = images_of(args, device)
    seconds = []
    for _ in range(1 + REPEATS):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            seconds.append(clock.once(lambda: detector.eval()(images, is_pad), 1, device).wall)
    print(f"{preset} {args.precision} {tuple(images.shape)}: "
          f"{args.batch / min(seconds[1:]):.2f} images/s, peak {peak(device):.2f} GiB")


def step(preset, args, device):
    """Seconds of training steps: denoising queries, both decoders, Align loss, AdamW."""
    detector, cfg = make(preset, device)
    optimizer = optim.make_optimizer(detector.train(), cfg)
    images, is_pad = images_of(args, device)
    targets = [data.Target(torch.randint(91, (OBJECTS,), device=device),
                           torch.rand(OBJECTS, 4, device=device) * 0.3 + 0.3, i,
                           (args.height, args.width)) for i in range(args.batch)]
    assign_c = criterion.C_ASSIGNMENTS.get(cfg.model, criterion.paper_assignment)

    def once(number):
        noisy = denoising.noisy_copies(targets, 91, data.generator(0, number, 0),
                                       cfg.recipe.dn_number)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            output = detector(images, is_pad, noisy)
        parts = criterion.detection_loss(output, targets, float(OBJECTS * args.batch),
                                         criterion.CLASS_LOSSES[cfg.loss], assign_c)
        optimizer.zero_grad()
        criterion.total(parts).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), cfg.recipe.clip)
        optimizer.step()

    seconds = [clock.once(lambda n=n: once(n), 1, device).wall for n in range(1 + REPEATS)]
    print(f"{preset} {args.precision} {tuple(images.shape)}: {min(seconds[1:]):.2f} s a step, "
          f"{args.batch / min(seconds[1:]):.2f} images/s, peak {peak(device):.2f} GiB")


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
