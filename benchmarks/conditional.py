"""A training step of Conditional DETR, ours beside transformers', in turn, at equal weights.

    python -m benchmarks.conditional                    # R50, 480 x 640 pixels, one image
    python -m benchmarks.conditional --threads 1 --repeats 9

Both stand on our backbone and have the authors' sizes, without dropout. A step is the forward pass,
the loss of every decoder layer on seven objects, and its gradients. The answers are compared before
anything is timed.
"""
import argparse
import dataclasses
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))
import test_published_conditional as layout  # noqa: E402
from benchmarks import clock, theirs  # noqa: E402
from detr_min import criterion  # noqa: E402
from detr_min.data.dataset import Target  # noqa: E402
from detr_min.run import checkpoints, registry  # noqa: E402

SIZES = dict(d=256, heads=8, ffn=2048, queries=300, encoder_layers=6, decoder_layers=6, classes=91)


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    their_model = layout.hugging_face(theirs.transformers(), layout.body_of(False), **SIZES)
    cfg, _, state = checkpoints.convert(layout.official_state(their_model))
    cfg = dataclasses.replace(cfg, recipe=dataclasses.replace(cfg.recipe, dropout=0.0))
    our_model = registry.build(cfg)
    our_model.load_state_dict(state)
    images = torch.randn(1, 3, args.height, args.width)
    is_pad = torch.zeros(1, args.height, args.width, dtype=torch.bool)

    def ours_answer():
        last = our_model(images, is_pad).o_decoder[-1]
        return last.logits, last.boxes

    def their_answer():
        found = their_model(images, (~is_pad).long())
        return found.logits, found.pred_boxes

    labels, gt_boxes = torch.randint(SIZES["classes"], (7,)), 0.1 + torch.rand(7, 4) / 2
    target = Target(labels, gt_boxes, image_id=1, size_px=(args.height, args.width))

    def our_step():
        our_model.zero_grad()
        criterion.total(criterion.conditional_loss(our_model(images, is_pad), [target],
                                                   num_objects=len(labels))).backward()

    def their_step():
        their_model.zero_grad()
        their_model(images, (~is_pad).long(), labels=[
            {"class_labels": labels, "boxes": gt_boxes}]).loss.backward()

    with torch.no_grad():
        apart = max(float((a - b).abs().max()) for a, b in zip(ours_answer(), their_answer()))
    print(f"answers differ by {apart:.1e}")
    if apart > 1e-3:
        raise SystemExit("the answers differ: nothing is timed")
    their_model.config.auxiliary_loss = True    # the loss of every layer; it changes their answers
    times = clock.alternate(our_step, their_step, args.repeats, torch.device("cpu"))
    seen = clock.compare(*times)
    for name in ("ours", "theirs"):
        print(f"{name:7} {seen[name]['cpu']['median']:.2f} CPU-seconds per step")
    ratio = seen["ratio"]["cpu"]
    print(f"theirs / ours {ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f}), "
          f"{args.repeats} rounds, {args.threads} thread(s)")


if __name__ == "__main__":
    main()
