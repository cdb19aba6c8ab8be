"""How long ours takes beside Hugging Face transformers' Deformable DETR, equal shapes and weights.

    python -m benchmarks.speed                                      # all of it, on this CPU
    python -m benchmarks.speed --only attention,step --cases shapes --threads 1 --repeats 9
    python -m benchmarks.speed --only attention --against definition        # no transformers needed
    python -m benchmarks.speed --table speed.md --out speed.json
    python -m benchmarks.speed --device cuda                        # with bf16 and torch.compile

Both sides run in turn in one process, after their answers were found alike; memory is measured in
a process a side. Exit status: 0 done, 1 failed, 2 flags refused or transformers missing.
"""
import argparse
import dataclasses
import functools
import json
import pathlib
import platform
import sys

import torch

from benchmarks import cases, clock, memory, theirs
from detr_min import attention

PARTS = "attention", "inference", "step", "memory"
AGAINST = "transformers", "definition"
FORMS = {"fp32": ("fp32", False), "bf16": ("bf16", False),      # precision, is compiled
         "compiled": ("fp32", True), "bf16_compiled": ("bf16", True)}
MIB = 2 ** 20


def words(text, known, flag):
    """A flag's comma-separated words.

    Raises:
        ValueError: one that is not known, with all that are
    """
    found = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in found if word not in known]
    if unknown or not found:
        raise ValueError(f"{flag} {', '.join(unknown) or 'is empty'}: there are {', '.join(known)}")
    return found


def check_alike(what, most):
    """Refuse to time two things that do not compute the same.

    Raises:
        ValueError: they differ by `most`, more than cases.CLOSE
    """
    if not most <= cases.CLOSE:
        raise ValueError(f"{what}: the two answers differ by {most:.2g}, so times mean nothing")


def attention_rows(name, args, precision, compiled):
    """Forward, and forward with backward, of one attention case."""
    case, device = cases.ATTENTIONS[name], torch.device(args.device)
    inputs = cases.attention_inputs(
        case, device, torch.bfloat16 if precision == "bf16" else torch.float32)
    value, *rest = inputs
    sides = [attention.ms_deform_attn, attention.deformable_attention
             if args.against == "definition" else theirs.attention]
    if compiled:
        sides = [torch.compile(side) for side in sides]
    calls = [functools.partial(side, value, case.spatial_shapes, *rest) for side in sides]
    answer = torch.randn_like(calls[0]())
    if precision == "fp32":
        check_alike(name, (calls[0]() - calls[1]()).abs().max().item())

    def forward(call):
        with torch.no_grad():
            call()

    def both(call):
        torch.autograd.grad(call(), inputs, answer)
    for part, run in (("attention forward", forward), ("attention forward + backward", both)):
        seen = clock.alternate(*(functools.partial(run, call) for call in calls), args.repeats,
                               device)
        yield {"part": part, "outside": cases.outside(rest[0]), **clock.compare(*seen)}


def build_pair(case, batch):
    """Ours and theirs with equal weights, both behind a backbone of its own, found alike."""
    ours = cases.build_ours(case)
    net = cases.build_theirs(case, cases.build_ours(case).backbone)
    theirs.copy_weights(net.state_dict(), ours)
    check_alike(case.cfg.queries, cases.difference(ours, net, batch))
    return ours, net


def model_rows(name, args, precision, compiled):
    """One inference and one training step of one model case, as far as they are asked for."""
    case, device = cases.MODELS[name], torch.device(args.device)
    batch = cases.batch_of(case)
    ours, net = (side.to(device) for side in build_pair(case, batch))
    images, is_pad = (t.to(device) for t in batch[:2])

    def answer(runner):
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16,
                                                    enabled=precision == "bf16"):
            runner(images, is_pad)
    if "inference" in args.only and case.encoder_loss:          # else the same as another case's
        runners = [ours.eval(), theirs.Detector(net).eval()]
        if compiled:
            runners = [torch.compile(runner) for runner in runners]
        seen = clock.alternate(*(functools.partial(answer, r) for r in runners), args.repeats,
                               device)
        yield {"part": "inference", **clock.compare(*seen)}
    if "step" in args.only:
        case = case._replace(cfg=dataclasses.replace(case.cfg, precision=precision))
        steps = [cases.step_of(case, side, is_ours, compiled)
                 for side, is_ours in ((ours, True), (net, False))]
        seen = clock.alternate(*(functools.partial(step, batch, 1) for step in steps),
                               args.repeats, device)
        yield {"part": "training step", **clock.compare(*seen)}


def in_all_forms(rows_of, name, args, threads):
    """The rows of a case in each of --forms, with what they are.

    A form other than plain float32 may fail, on either side: that is said, and the rest goes on.
    """
    for precision, compiled in map(FORMS.get, args.forms):
        head = {"case": name, "threads": threads, "precision": precision, "compiled": compiled}
        try:
            for row in rows_of(name, args, precision, compiled):
                yield {**head, **row}
        except Exception as error:
            if (precision, compiled) == ("fp32", False):
                raise
            said = (str(error).strip().splitlines() or [repr(error)])[0]
            print(f"{name}, {precision}{', compiled' * compiled}: {said}", file=sys.stderr)


def memory_rows(name, args, threads):
    """Peak memory of a training step of both sides, the middle of three processes each."""
    found = {}
    for side in ("ours", "transformers"):
        peaks = [memory.in_fresh_process(name, side, torch.device(args.device), threads)
                 for _ in range(min(3, args.repeats))]
        found["ours" if side == "ours" else "theirs"] = {"bytes": clock.spread(peaks)}
    ratio = found["theirs"]["bytes"]["median"] / found["ours"]["bytes"]["median"]
    yield {"part": "memory of a training step", "case": name, "threads": threads,
           "precision": "fp32", "compiled": False, **found, "ratio": ratio}


def measure(args):
    """Yield the rows that the flags ask for, each a dict."""
    for threads in args.threads:
        torch.set_num_threads(threads)
        if "attention" in args.only:
            for name in set_in_order(args.cases, cases.ATTENTIONS):
                yield from in_all_forms(attention_rows, name, args, threads)
        for name in set_in_order(args.cases, cases.MODELS):
            if {"inference", "step"} & set(args.only):
                yield from in_all_forms(model_rows, name, args, threads)
    if "memory" in args.only:
        for name in set_in_order(args.cases, cases.MODELS):
            yield from memory_rows(name, args, args.threads[0])


def set_in_order(chosen, known):
    """Of the chosen names, or of all but the hidden, those that are known here."""
    return [name for name in known
            if name in chosen or not chosen and name not in cases.HIDDEN]


def number(value):
    """Two decimals below 10, one below 100, none above: 1.23, 12.3, 123."""
    return f"{value:.{max(0, 2 - max(0, len(str(int(value))) - 1))}f}"


def cell(spread, unit):
    """`12.3 (12.1 to 12.9)`: the median and the quartiles, in units of so much."""
    median, q1, q3 = (number(spread[key] / unit) for key in ("median", "q1", "q3"))
    return f"{median} ({q1} to {q3})"


def line(row):
    """One line of the table."""
    form = "" if (row["precision"], row["compiled"]) == ("fp32", False) else (
        f", {row['precision']}{', compiled' * row['compiled']}")
    start = f"| {row['part']}{form} | {row['case']} | {row['threads']} | "
    if "bytes" in row["ours"]:
        ours, other = (cell(row[side]["bytes"], MIB) + " MiB" for side in ("ours", "theirs"))
        return start + f"{ours} | {other} | {row['ratio']:.2f} | |"
    ours, other = (cell(row[side]["wall"], 1e-3) + " ms" for side in ("ours", "theirs"))
    wall, cpu = (cell(row["ratio"][kind], 1) for kind in ("wall", "cpu"))
    return start + f"{ours} | {other} | {wall} | {cpu} |"


def title(against):
    """The first two lines of the table."""
    other = "our definition" if against == "definition" else "transformers"
    return (f"| what | case | threads | ours | {other} | {other} / ours, wall | CPU |\n"
            "|---|---|--:|--:|--:|--:|--:|")


def about(args):
    """What the numbers hang on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if args.against == "transformers":
        versions["transformers"] = theirs.transformers().__version__
    place = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    return {"device": args.device, "place": place, **versions, "repeats": args.repeats}


def parse(argv=None):
    """The flags, checked: a wrong one ends in a sentence and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(dict.fromkeys([*cases.ATTENTIONS, *cases.MODELS]))
    shown = ", ".join(name for name in known if name not in cases.HIDDEN)
    parser.add_argument("--only", help="of: " + ", ".join(PARTS))
    parser.add_argument("--cases", default="", help="of: " + shown)
    parser.add_argument("--against", default="transformers", help="of: " + ", ".join(AGAINST))
    parser.add_argument("--repeats", type=int, default=11, help="pairs measured for each row")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, as 1,2")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--forms", help="of: " + ", ".join(FORMS) + "; all on cuda, fp32 on cpu")
    parser.add_argument("--out", help="json file to write")
    parser.add_argument("--table", help="markdown file to write")
    args = parser.parse_args(argv)
    try:
        check(args, known)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args, known):
    """Turn lists into lists, and refuse what cannot be measured.

    Raises:
        ValueError: the flag, the word and what would do
    """
    args.against = words(args.against, AGAINST, "--against")[0]
    default = "attention" if args.against == "definition" else ",".join(PARTS)
    args.only = words(default if args.only is None else args.only, PARTS, "--only")
    args.cases = words(args.cases, known, "--cases") if args.cases else []
    args.device = words(args.device, ("cpu", "cuda"), "--device")[0]
    default = ",".join(FORMS) if args.device == "cuda" else "fp32"
    args.forms = words(default if args.forms is None else args.forms, FORMS, "--forms")
    numbers = args.threads.split(",")
    if not all(n.isdecimal() and int(n) for n in numbers) or args.repeats < 1:
        raise ValueError(f"--threads {args.threads} --repeats {args.repeats}: numbers from 1 up")
    args.threads = [int(n) for n in numbers]
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this computer has none")
    if args.against == "definition" and args.only != ["attention"]:
        raise ValueError("--against definition measures --only attention: there is no second model")
    if args.against == "transformers" and not theirs.is_there():
        raise ValueError(f"{theirs.MISSING}; or measure --against definition")


def main(argv=None):
    """Run the command line; returns the rows."""
    args, rows = parse(argv), []
    print(title(args.against), flush=True)
    for row in measure(args):
        rows.append(row)
        print(line(row), flush=True)
        if args.out:
            content = {"about": about(args), "against": args.against, "rows": rows}
            pathlib.Path(args.out).write_text(json.dumps(content, indent=1))
    if args.table:
        notes = ", ".join(f"{name} {value}" for name, value in about(args).items())
        table = "\n".join([title(args.against), *map(line, rows)])
        pathlib.Path(args.table).write_text(f"{table}\n\n{notes}\n")
    return rows


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.speed: {error}")
