"""log.jsonl: one line for people and machines every so many steps. Read after nothing."""
import json
import math
import os
import time

import torch
from tqdm import tqdm

TERMS = "cls", "l1", "giou"
SCORES = "AP", "AP50", "AP75"
RISE = 0.01                         # of AP; a smaller one may be chance


def parts_of(line):
    """The names of a line's parts of the loss, in the order in which they are added."""
    return [name for name, value in line.items()
            if name != "val" and (isinstance(value, dict) or name == "O")]


def describe(line):
    """One line of log.jsonl for people: what the loss is made of, what each decoder matched."""
    sums = [f"{name} ({' + '.join(f'{term} {line[name][term]:.2f}' for term in TERMS)})"
            for name in parts_of(line)]
    pairs = [f"{name} {line[name]['pairs']:.1f}" for name in ("O", "C") if name in line]
    return (f"step {line['step']} | loss {line['loss']:.2f} = {' + '.join(sums)} | objects "
            f"{line['objects']:.1f}, queries matched {' / '.join(pairs)} | {line['ms']:.0f} ms")


def step_of(line):
    """The step of a line of log.jsonl; of one torn by a crash, or edited by hand, infinity."""
    try:
        line = json.loads(line)
        numbers = [line[name][term] for name in parts_of(line) for term in TERMS]
        numbers += [line["val"][name] or 0 for name in SCORES if "val" in line]
        is_whole = type(line["step"]) is int and all(
            math.isfinite(number) for number in (*numbers, line.get("loss", 0)))
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
        return math.inf
    return line["step"] if is_whole else math.inf


def best_before(path):
    """The best AP before the last validation of a log.jsonl: {"AP", "step"}, or None."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    scores = [{"AP": line["val"]["AP"], "step": line["step"]} for line in lines if "val" in line]
    return max((score for score in scores[:-1] if score["AP"] is not None),
               key=lambda score: score["AP"], default=None)


def trend(ap, before):
    """Whether AP was still rising, in words: the last one, against `best_before`."""
    if ap is None:
        return "there is no object to find"
    if before is None:
        return "validated once, so whether it was still rising is not known"
    rise, was = round(ap - before["AP"], 3), f"{before['AP']:.3f} at step {before['step']}"
    if rise < -RISE:
        return f"below its best: it was {was}, in best.pt"
    return f"{'still' if rise > RISE else 'not'} rising: it was {was}" + ", in best.pt" * (rise < 0)


class Log:
    """log.jsonl: means over the steps since the last line.

    Lines after `last_step`, which a crash left behind, are dropped.
    """

    def __init__(self, path, last_step):
        self.path, self.steps = path, []
        text = path.read_text(errors="replace") if path.exists() else ""
        kept = [line for line in text.splitlines() if step_of(line) <= last_step]
        self.validated = {step_of(line) for line in kept if "val" in json.loads(line)}
        left = "".join(line + "\n" for line in kept)
        if left != text:                # in one move, so that a crash here loses no line
            path.with_suffix(".unfinished").write_text(left)
            os.replace(path.with_suffix(".unfinished"), path)
        path.touch()
        self.restart_clock()

    def restart_clock(self):
        """Time from now on counts as training."""
        self.clock, self.cpu_clock = time.perf_counter(), time.process_time()

    def add(self, parts, **more):
        """Remember a step: criterion's parts, left on their device (nothing waits), and numbers."""
        self.steps.append(({name: torch.stack(part[:3]).detach() for name, part in parts.items()},
                           {name: part.pairs for name, part in parts.items()}, more))

    def line(self, step, mean, **more):
        """The means since the last line, a dict; `mean(numbers)` averages over processes."""
        terms, pairs, numbers = zip(*self.steps)
        n, line = len(self.steps), {"step": step, **more}
        for name in terms[0]:
            means = mean([*(sum(t[name] for t in terms) / n).tolist(),
                          sum(p[name] for p in pairs) / n])
            line[name] = dict(zip((*TERMS, "pairs"), means))
        line["loss"] = sum(line[name][term] for name in terms[0] for term in TERMS)
        line.update({key: sum(m[key] for m in numbers) / n for key in numbers[0]})
        line["ms"] = (time.perf_counter() - self.clock) / n * 1000
        line["cpu_s"] = (time.process_time() - self.cpu_clock) / n
        self.steps = []
        return line

    def write(self, line, text, visible=True):
        """Append a line to the file, print its text above the progress bar, restart the clock.

        A validation that the file has already, of a run resumed after its last step, is printed.
        """
        if "val" not in line or line["step"] not in self.validated:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise OSError(f"{self.path} could not be written ({error}): is the disk full?"
                              ) from error
        if visible:
            tqdm.write(text)
        self.restart_clock()
