"""Train every variant of a study with several seeds, keep the numbers as json, and tabulate them.

A run is `train.py` with the variant's flags in a process of one thread; two run at a time. A run
that was interrupted goes on, and a run whose json is there is not trained again.
"""
import concurrent.futures
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from typing import Callable, NamedTuple

import scipy.stats
import torch
import torchvision

from detr_min.run import checkpoints, config, sets

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "studies" / "results"
RUNS = ROOT / "runs" / "studies"
QUICK = ROOT / "runs" / "quick", "--steps 8 --images 40 --size 64 --batch 2".split()


class Claim(NamedTuple):
    """A sentence about two variants, judged by their paired difference in AP."""
    text: str
    paper: str              # what the paper has for it, on COCO
    better: str             # a variant
    worse: str              # another


class Study(NamedTuple):
    """Variants that are trained alike and compared with the first of them."""
    name: str
    question: str
    common: str             # flags of train.py for all variants
    variants: dict          # {name: flags of train.py}; the first is the baseline
    seeds: int
    more_seeds: dict = {}   # {variant: seeds} of those that get another number
    first: str = ""         # flags of a run whose backbone all variants start from
    programs: dict = {}     # {variant: module that is run in place of train.py, and its words}
    borrows: dict = {}      # {variant: study that trains it}
    real: bool = False      # on the folder of --coco
    measures: tuple = ()    # functions of (model, dataset) -> dict, beside AP
    columns: dict = {}      # {a number of theirs: its column's title}
    watched: tuple = ()     # variants that stop at every sixth of the run, to be measured by
    watch: Callable = None  # this function
    claims: tuple = ()

    def seeds_of(self, variant):
        """How many seeds a variant gets."""
        return self.more_seeds.get(variant, self.seeds)


STOPS, WATCHED_SEEDS = 6, 2         # of a run that is watched; of a variant


def command(program, *flags):
    """Run train.py, or a module, in a process of one thread; its output goes to the run's log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = ["train.py"] if program == "train.py" else ["-m", *program.split()]
    subprocess.run([sys.executable, *start, *flags], cwd=ROOT, env=environment, check=True,
                   stdout=subprocess.DEVNULL)


def train(folder, flags, program="train.py", watch=None):
    """Train a run, or go on with it; nothing is done for one that is through.

    With `watch` the run stops STOPS times, and the file watched.jsonl of its folder gets what
    `watch` finds then in its model.
    """
    seen, flags = folder / "watched.jsonl", [*flags, "--out", str(folder)]
    while not (folder / "metrics.json").exists() or watch and lines(seen) < STOPS:
        begun = (folder / "last.pt").exists()
        pause = []
        if watch:
            if not begun:
                seen.unlink(missing_ok=True)
            stop = config.parse("", flags)[0].steps * (lines(seen) + 1) // STOPS
            pause = ["--pause", str(stop)]
        if not (folder / "metrics.json").exists():
            command(program, *(["--resume", str(folder)] if begun else flags), *pause)
        if watch:
            model = checkpoints.load_model(folder / "last.pt")
            found = watch(model, sets.open_val(model.config, model.categories))
            with seen.open("a") as file:
                file.write(json.dumps({"step": stop, **found}) + "\n")


def lines(path):
    """How many lines a file has; 0 if there is none."""
    return path.read_text().count("\n") if path.exists() else 0


def tree():
    """The git tree of detr_min/, which names its content; `+edits` if files differ from it."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, text=True, capture_output=True).stdout
    return git("rev-parse", "--short", "HEAD:detr_min").strip() + "+edits" * bool(
        git("status", "--porcelain", "detr_min"))


def said(flags):
    """Flags as a json keeps them: of --coco the folder's name, since its place is the machine's."""
    return [pathlib.Path(word).name if before == "--coco" else word
            for before, word in zip(["", *flags], flags)]


def measure(study, variant, seed, folder, extra=()):
    """Write the json of a finished run: its numbers, and what they were made with."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((folder / "metrics.json").read_text())
    numbers = {name: metrics[name] for name in ("AP", "AP50", "AP75", "cpu_seconds", "steps",
                                                "parameters", "train_AP")}
    if study.measures:
        model = checkpoints.load_model(folder)
        val_set = sets.open_val(model.config, model.categories)
    for function in study.measures:
        numbers.update(function(model, val_set))
    if (folder / "watched.jsonl").exists():
        numbers["watched"] = [json.loads(line) for line in
                              (folder / "watched.jsonl").read_text().splitlines()]
    content = {"study": study.name, "variant": variant, "seed": seed,
               "program": study.programs.get(variant, "train.py"),
               "flags": [*f"{study.common} {study.variants[variant]} --seed {seed}".split(),
                         *said(extra)],
               **numbers,
               "curve": [[line["step"], line["val"]["AP"]] for line in log if "val" in line],
               "tree_of_detr_min": tree(), "python": platform.python_version(),
               "torch": torch.__version__, "torchvision": torchvision.__version__}
    path = RESULTS / study.name / f"{variant}_{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def run(study, names, seeds=0, extra=(), jobs=2):
    """Train and measure what is missing of some variants, seed by seed, so that seeds are whole.

    `seeds` is the study's own number if 0; `extra` are more flags of train.py.
    """
    start = []
    if study.first:
        folder = RUNS / "_".join(study.first.replace("--", "").split())
        train(folder, [*study.first.split(), *extra])
        start = ["--init_from", str(folder / "backbone.pt")]
        if not (folder / "backbone.pt").exists():
            keep_backbone(folder)

    def one(job):
        seed, variant = job
        folder = RUNS / study.name / f"{variant}_{seed}"
        flags = [*study.common.split(), *study.variants[variant].split(), *start,
                 "--seed", str(seed), *extra]
        train(folder, flags, study.programs.get(variant, "train.py"),
              study.watch if variant in study.watched and seed < WATCHED_SEEDS else None)
        return job, folder

    todo = sorted((seed, number, variant) for number, variant in enumerate(names)
                  if variant not in study.borrows
                  for seed in range(seeds or study.seeds_of(variant))
                  if not (RESULTS / study.name / f"{variant}_{seed}.json").exists())
    todo = [(seed, variant) for seed, _, variant in todo]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for number, ((seed, variant), folder) in enumerate(pool.map(one, todo), 1):
            measure(study, variant, seed, folder, extra)
            print(f"{number} of {len(todo)}: {study.name} {variant} seed {seed}", flush=True)


def keep_backbone(folder):
    """Write backbone.pt: the checkpoint of a run without everything but its backbone."""
    content = checkpoints.read(folder)
    content["model"] = {name: tensor for name, tensor in content["model"].items()
                        if name.startswith("backbone.")}
    torch.save(content, folder / "backbone.pt")


def results(study):
    """Read the json files of a study. -> {variant: {seed: content}}"""
    found = {}
    for variant in study.variants:
        folder = RESULTS / study.borrows.get(variant, study.name)
        for content in map(json.loads, map(pathlib.Path.read_text, folder.glob("*.json"))):
            if content["variant"] == variant:
                found.setdefault(variant, {})[content["seed"]] = content
    return found


def paired(ours, base):
    """Mean difference over the seeds that two variants share, and half its 95 % interval.

    Student's t for paired samples. Returns (mean, half width); the half width is None for one seed.
    """
    gains = [ours[seed]["AP"] - base[seed]["AP"] for seed in sorted(ours.keys() & base.keys())]
    if not gains:
        return None, None
    if len(gains) == 1:
        return gains[0], None
    half = statistics.stdev(gains) / len(gains) ** 0.5 * scipy.stats.t.ppf(0.975, len(gains) - 1)
    return statistics.mean(gains), half


def verdict(ours, base, is_printed=True):
    """What a claim that `ours` beats `base` is worth here, over the seeds that both have.

    reproduced: the 95 % interval of the difference lies above 0; direction only: it does not, but
    every seed gains; contradicted: it lies below 0; not seen: all else. If no paper prints the
    claim (`is_printed`), the first is called gain seen and the third loss seen.
    """
    gain, half = paired(ours, base)
    gains = [ours[seed]["AP"] > base[seed]["AP"] for seed in ours.keys() & base.keys()]
    if half is None:
        return "not seen"
    if abs(gain) > half:
        above, below = (("reproduced", "contradicted") if is_printed else
                        ("gain seen", "loss seen"))
        return above if gain > 0 else below
    return "direction only" if all(gains) else "not seen"


def difference(ours, base):
    """`+0.027 ± 0.028, 5 of 5 seeds`: the paired difference and how many seeds gain."""
    gain, half = paired(ours, base)
    shared = ours.keys() & base.keys()
    wins = sum(ours[seed]["AP"] > base[seed]["AP"] for seed in shared)
    return f"{signed(gain, half)}, {wins} of {len(shared)} seed{'s' * (len(shared) != 1)}"


def signed(gain, half):
    """`+0.027 ± 0.028`, without the second number if there is none."""
    return f"{gain:+.3f}" + ("" if half is None else f" ± {half:.3f}")


def mean(runs, name):
    """The mean of a number over the seeds that have it, n/a if none has."""
    values = [run[name] for run in runs.values() if run.get(name) is not None]
    return f"{statistics.mean(values):.3f}" if values else "n/a"


def table(study):
    """The Markdown table of a study, from its json files, and its claims' with their verdicts."""
    found = results(study)
    base = found.get(next(iter(study.variants)), {})
    titles = ["variant", "flags", "seeds", "AP of each seed", "AP", "AP50", "AP75",
              *study.columns.values(), "AP against the first row", "CPU-ms per step",
              "M parameters"]
    rows = [f"| {' | '.join(titles)} |",
            "|---|---|--:|---|" + "--:|" * (len(titles) - 4)]
    for variant, runs in found.items():
        gain, half = paired(runs, base)
        cost = statistics.mean(1000 * r["cpu_seconds"] / r["steps"] for r in runs.values())
        program = study.programs.get(variant, "")
        cells = [variant, f"`{program} {study.variants[variant]}`".replace("` ", "`"),
                 str(len(runs)),
                 " ".join(format(runs[seed]["AP"], ".3f") for seed in sorted(runs)),
                 *(mean(runs, name) for name in ("AP", "AP50", "AP75", *study.columns)),
                 "" if gain is None or runs is base else signed(gain, half), f"{cost:.0f}",
                 f"{runs[min(runs)]['parameters'] / 1e6:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    judged = [claim for claim in study.claims if {claim.better, claim.worse} <= found.keys()]
    if judged:
        rows += ["", "| claim | paper, COCO | here | verdict |", "|---|--:|--:|---|"]
    for claim in judged:
        ours, worse = found[claim.better], found[claim.worse]
        judgement = verdict(ours, worse, is_printed=claim.paper != "–")
        rows.append(f"| {claim.text} | {claim.paper} | `{claim.better}` - `{claim.worse}`: "
                    f"{difference(ours, worse)} | {judgement} |")
    return "\n".join(rows)
