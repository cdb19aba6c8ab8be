"""Seconds of training until validation AP on synthetic shapes reaches a mark: ours, transformers.

    python -m benchmarks.learn                              # to AP .50, preset shapes, one thread
    python -m benchmarks.learn --sides ours_dac,theirs_one_stage --until 0.4 --out learn.json
    nohup python -m benchmarks.learn > learn.log &          # a line every --every steps

Every side gets the same images in the same order, resolution, backbone, width, depth, number of
queries, optimizer and schedule, of preset shapes; and its own matcher, losses and initial weights,
as shipped. `theirs_from_ours` is a control: their model, matcher and loss, from our initial weights
and with a class head for each layer. Testing stands outside the clock. Exit status: 0 done, 1
failed, 2 flags refused or transformers missing.
"""
import argparse
import dataclasses
import json
import pathlib
import sys
import time

import torch

from benchmarks import cases, clock, speed, theirs
from detr_min.data import batches, shapes
from detr_min.run import config, evaluate, optim, registry, sets

SIDES = {                       # the library, and the model and queries of its Config
    "ours_deformable": ("ours", "deformable", "two_stage"),
    "ours_dac": ("ours", "dac", "two_stage"),
    "ours_one_stage": ("ours", "deformable", "learned"),
    "theirs_one_stage": ("theirs", "deformable", "learned"),
    "theirs_two_stage": ("theirs", "deformable", "two_stage_unmixed"),
    "theirs_from_ours": ("theirs", "deformable", "learned"),
}


def build(side, base):
    """A side's Config, network from the seed, its loss of (batch, step), and what can be tested."""
    library, name, queries = SIDES[side]
    cfg = dataclasses.replace(base, model=name, queries=queries)
    torch.manual_seed(cfg.seed)
    if library == "ours":
        net = registry.build(cfg).train()
        return cfg, net, cases.our_loss(net, cfg), net
    ours = registry.build(cfg)
    net = theirs.build(cfg, ours.backbone).train()
    if side == "theirs_from_ours":
        net = theirs.fill(theirs.untie(net), ours)
    return cfg, net, cases.their_loss(net, cfg), theirs.Detector(net)


def stretches(cfg, net, loss, every):
    """Train, and stop every so many steps.

    Yields:
        step, mean loss since the last stop, and since the start: seconds, CPU-seconds, and of these
        CPU-seconds those spent on reading images. What the caller does meanwhile is not counted.
    """
    train_set, _ = sets.open_train(cfg)
    order = batches.batches(len(train_set), cfg.batch, cfg.seed, 0, cfg.steps)
    loader = iter(torch.utils.data.DataLoader(train_set, batch_sampler=order,
                                              collate_fn=batches.collate))
    optimizer = optim.make_optimizer(net, cfg)
    device, losses, spent = next(net.parameters()).device, [], [0.0, 0.0, 0.0]

    def remembered(batch, step):
        losses.append(loss(batch, step))
        return losses[-1]
    run = cases.training_step(net, remembered, optimizer, cfg.recipe.clip)
    for step in range(1, cfg.steps + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        optim.set_learning_rate(optimizer, step - 1, cfg)
        batch = next(loader)
        read = time.process_time()
        run(batch, step)
        clock.wait(device)
        losses[-1] = losses[-1].detach()
        spent[0] += time.perf_counter() - wall
        spent[1] += time.process_time() - cpu
        spent[2] += read - cpu
        if step % every == 0 or step == cfg.steps:
            yield step, torch.stack(losses).mean().item(), *spent
            losses.clear()


def learn(side, base, args):
    """Train one side up to the mark or to the end.

    Returns:
        a dict: side, seed, reached (bool), step, AP and AP50 there, the best AP, seconds and
        CPU-seconds of training, CPU-seconds of those for reading images, parameters, and `curve`
    """
    cfg, net, loss, tested = build(side, base)
    net.to(args.device)
    val_set, curve = sets.open_val(cfg, [{"name": c} for c in shapes.CLASSES]), []
    for step, mean, wall, cpu, reading in stretches(cfg, net, loss, args.every):
        metrics, _ = evaluate.evaluate(tested, val_set, cfg.batch)
        curve.append({"step": step, "loss": mean, "AP": metrics["AP"], "AP50": metrics["AP50"],
                      "seconds": wall, "cpu_seconds": cpu, "reading_cpu_seconds": reading})
        print(f"{side} step {step} | loss {mean:.2f} | {evaluate.headline(metrics)} | "
              f"{wall:.0f} s, {cpu:.0f} CPU-s", flush=True)
        if metrics["AP"] >= args.until:
            break
    return {"side": side, "seed": cfg.seed, "reached": curve[-1]["AP"] >= args.until, **curve[-1],
            "best_AP": max(point["AP"] for point in curve), "curve": curve,
            "parameters": sum(p.numel() for p in net.parameters() if p.requires_grad)}


def line(found):
    """One line of the table."""
    cost = (f"{found['cpu_seconds']:.0f} | {found['seconds']:.0f} | "
            f"{1000 * (found['cpu_seconds'] - found['reading_cpu_seconds']) / found['step']:.0f}")
    what = (f"step {found['step']}" if found["reached"]
            else f"not in {found['step']} steps, best {found['best_AP']:.3f}")
    return (f"| {found['side']} | {found['seed']} | {what} | {cost} | "
            f"{found['parameters'] / 1e6:.2f} |")


def title(until):
    """The first two lines of the table."""
    return (f"| side | seed | AP {until:g} at | CPU-seconds | seconds | CPU-ms per step without "
            "reading | M parameters |\n|---|--:|---|--:|--:|--:|--:|")


def parse(argv=None):
    """The flags, checked: a wrong one ends in a sentence and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=",".join(SIDES), help="of: " + ", ".join(SIDES))
    parser.add_argument("--until", type=float, default=0.5, help="validation AP to reach")
    parser.add_argument("--every", type=int, default=20, help="steps between tests")
    parser.add_argument("--steps", type=int, default=config.preset("shapes").steps,
                        help="the most; the schedule is of this length")
    parser.add_argument("--size", type=int, default=config.preset("shapes").size, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", help="json file to write")
    parser.add_argument("--table", help="markdown file to write")
    args = parser.parse_args(argv)
    try:
        args.sides = speed.words(args.sides, SIDES, "--sides")
        if min(args.every, args.steps, args.threads) < 1:
            raise ValueError("--every, --steps and --threads are numbers from 1 up")
        if any(SIDES[side][0] == "theirs" for side in args.sides) and not theirs.is_there():
            raise ValueError(f"{theirs.MISSING}; or take --sides of ours")
        args.base = config.preset("shapes", steps=args.steps, size=args.size, seed=args.seed)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv=None):
    """Run the command line; returns what each side reached."""
    args, done = parse(argv), []
    torch.set_num_threads(args.threads)
    for side in args.sides:
        done.append(learn(side, args.base, args))
        if args.out:
            pathlib.Path(args.out).write_text(json.dumps(done, indent=1))
    table = "\n".join([title(args.until), *(line(found) for found in done)])
    print(table)
    if args.table:
        pathlib.Path(args.table).write_text(table + "\n")
    return done


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.learn: {error}")
