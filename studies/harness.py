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
from typing import NamedTuple

import scipy.stats
import torch
import torchvision
from matplotlib.figure import Figure

from detr_min import boxes, matcher
from detr_min.run import checkpoints, evaluate, sets

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "studies" / "results"
RUNS = ROOT / "runs" / "studies"


class Study(NamedTuple):
    """Variants that are trained alike and compared with the first of them."""
    name: str
    question: str
    common: str             # flags of train.py for all variants
    variants: dict          # {name: flags of train.py}; the first is the baseline
    seeds: int
    first: str = ""         # flags of a run whose backbone all variants start from


def command(*flags):
    """Run train.py in a process of one thread; its output goes to the run's own log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, env=environment, check=True,
                   stdout=subprocess.DEVNULL)


def train(folder, flags):
    """Train a run, or go on with it; nothing is done for one that is through."""
    if not (folder / "metrics.json").exists():
        if (folder / "last.pt").exists():
            command("--resume", str(folder))
        else:
            command(*flags, "--out", str(folder))


@torch.no_grad()
def score_iou_correlation(model, dataset):
    """Pearson's correlation of class score and IoU over the matched predictions of a data set.

    Predictions of the last layer are matched one-to-one [DETR Eq. 1]; the score is the object's
    class's. None if it is not defined.
    """
    scores, ious = [], []
    for batch in torch.utils.data.DataLoader(dataset, batch_size=20, collate_fn=list):
        images, targets = zip(*batch)
        for logits, pred_boxes, target in zip(*evaluate.predict(model, images), targets):
            query_idx, gt_idx = matcher.one_to_one(matcher.match_cost(
                logits, pred_boxes, target.labels, target.boxes))
            scores += logits[query_idx, target.labels[gt_idx]].sigmoid().tolist()
            ious += boxes.paired_iou(pred_boxes[query_idx], target.boxes[gt_idx]).tolist()
    return statistics.correlation(scores, ious) if len(set(scores)) > 1 else None


def measure(study, variant, seed, folder):
    """Write the json of a finished run: its numbers, and what they were made with."""
    model = checkpoints.load_model(folder)
    val_set = sets.open_val(model.config, model.categories)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((folder / "metrics.json").read_text())
    numbers = {name: metrics[name] for name in ("AP", "AP50", "AP75", "cpu_seconds", "steps",
                                                "parameters", "train_AP")}
    tree = subprocess.run(["git", "rev-parse", "--short", "HEAD:detr_min"], cwd=ROOT, text=True,
                          capture_output=True).stdout.strip()
    content = {"study": study.name, "variant": variant, "seed": seed,
               "flags": f"{study.common} {study.variants[variant]} --seed {seed}".split(),
               **numbers, "correlation": score_iou_correlation(model, val_set),
               "curve": [[line["step"], line["val"]["AP"]] for line in lines if "val" in line],
               "tree_of_detr_min": tree, "python": platform.python_version(),
               "torch": torch.__version__, "torchvision": torchvision.__version__}
    path = RESULTS / study.name / f"{variant}_{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def run(study, names, seeds, extra=(), jobs=2, again=False):
    """Train and measure what is missing of some variants, seed by seed, so that seeds are whole.

    With `again`, what has its json but no run folder on this machine is missing too.
    """
    start = []
    if study.first:
        folder = RUNS / study.name / "backbone"
        train(folder, [*study.first.split(), *extra])
        start = ["--init_from", str(folder / "backbone.pt")]
        if not (folder / "backbone.pt").exists():
            keep_backbone(folder)

    def one(job):
        seed, variant = job
        folder = RUNS / study.name / f"{variant}_{seed}"
        train(folder, [*study.common.split(), *study.variants[variant].split(), *start,
                       "--seed", str(seed), *extra])
        return job, folder

    todo = [(seed, variant) for seed in range(seeds) for variant in names
            if again or not (RESULTS / study.name / f"{variant}_{seed}.json").exists()]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for number, ((seed, variant), folder) in enumerate(pool.map(one, todo), 1):
            measure(study, variant, seed, folder)
            print(f"{number} of {len(todo)}: {study.name} {variant} seed {seed}", flush=True)


def keep_backbone(folder):
    """Write backbone.pt: the checkpoint of a run without everything but its backbone."""
    content = checkpoints.read(folder)
    content["model"] = {name: tensor for name, tensor in content["model"].items()
                        if name.startswith("backbone.")}
    torch.save(content, folder / "backbone.pt")


def results(study):
    """Read the json files of a study. -> {variant: {seed: content}}"""
    found = {variant: {} for variant in study.variants}
    for path in sorted((RESULTS / study.name).glob("*.json")):
        content = json.loads(path.read_text())
        found[content["variant"]][content["seed"]] = content
    return {variant: seeds for variant, seeds in found.items() if seeds}


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


def mean(runs, name):
    """The mean of a number over seeds, n/a where a run has none."""
    values = [run[name] for run in runs.values()]
    return "n/a" if None in values else f"{statistics.mean(values):.3f}"


def table(study):
    """The Markdown table of a study, from its json files."""
    found = results(study)
    base = found.get(next(iter(study.variants)), {})
    rows = ["| variant | flags of train.py | seeds | AP of each seed | AP | AP50 | AP75 | "
            "correlation of score and IoU | AP against the first row | CPU-ms per step | "
            "M parameters |", "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|"]
    for variant, runs in found.items():
        gain, half = paired(runs, base)
        against = "" if gain is None or runs is base else (
            f"{gain:+.3f}" + ("" if half is None else f" ± {half:.3f}"))
        cost = statistics.mean(1000 * r["cpu_seconds"] / r["steps"] for r in runs.values())
        rows.append(
            f"| {variant} | `{study.variants[variant]}` | {len(runs)} | "
            f"{' '.join(format(runs[seed]['AP'], '.3f') for seed in sorted(runs))} | "
            f"{mean(runs, 'AP')} | {mean(runs, 'AP50')} | {mean(runs, 'AP75')} | "
            f"{mean(runs, 'correlation')} | {against} | {cost:.0f} | "
            f"{runs[min(runs)]['parameters'] / 1e6:.2f} |")
    return "\n".join(rows)


def plot(study, path):
    """Draw validation AP over steps, the mean over seeds and the range between them."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="validation AP", title=study.question)
    for variant, runs in results(study).items():
        curves = [run["curve"] for run in runs.values()]
        steps = [step for step, _ in curves[0]]
        columns = list(zip(*[[ap for _, ap in curve] for curve in curves]))
        [line] = axes.plot(steps, [statistics.mean(c) for c in columns], marker="o", markersize=3,
                           label=f"{variant} ({len(curves)} seeds)")
        axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15,
                          color=line.get_color(), linewidth=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
