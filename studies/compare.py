"""The papers' tables in miniature: every variant on synthetic shapes, several seeds, equal steps.

    python studies/compare.py                              # train what is missing, then the table
    python studies/compare.py --only plain,dac --seeds 1   # two runs
    python studies/compare.py --dry                        # the table of the runs that are there

Runs go to runs/compare/NAME_SEED; the table to stdout and studies/compare.md, AP over steps to
studies/compare.png. Numbers in studies/compare.md were made by this command.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys

from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).parent.parent
VARIANTS = {
    "plain": "--model deformable",
    "dac": "--model dac",
    "dfl": "--model decoupled",
    "dfl_taq": "--model decoupled --queries task_aware",
    "sd_detr": "--model decoupled --queries task_aware --loss tal",
    "plain_tal": "--model deformable --loss tal",
    "split": "--model split",
    "dac_decoupled": "--model dac_decoupled",
}


def train(name, seed, extra, folder):
    """Train one variant with one seed; does nothing for a run that is through."""
    if not (folder / "metrics.json").exists():
        command = [sys.executable, str(ROOT / "train.py")]
        command += ["--resume", str(folder)] if (folder / "last.pt").exists() else [
            *VARIANTS[name].split(), "--seed", str(seed), "--out", str(folder), *extra]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)


def row(name, runs, plain):
    """One line of the table, from {seed: metrics} of a variant and of the plain decoder."""
    aps = [run["AP"] for run in runs.values()]
    cost = statistics.mean(run["cpu_seconds"] / run["steps"] for run in runs.values())
    gains = [run["AP"] - plain[seed]["AP"] for seed, run in runs.items() if seed in plain]
    against = f"{statistics.mean(gains):+.3f}" if gains else ""
    return (f"| {name} | `{VARIANTS[name]}` | {' '.join(f'{ap:.3f}' for ap in aps)} | "
            f"{statistics.mean(aps):.3f} | {against} | {1000 * cost:.0f} | "
            f"{runs[min(runs)]['parameters'] / 1e6:.2f} |")


def plot(done, path):
    """Mean validation AP of each variant over the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="validation AP")
    for name, folders in done.items():
        lines = [[line for line in map(json.loads, (f / "log.jsonl").read_text().splitlines())
                  if "val" in line] for f in folders.values()]
        axes.plot([line["step"] for line in lines[0]],
                  [statistics.mean(line["val"]["AP"] for line in at) for at in zip(*lines)],
                  marker="o", markersize=3, label=f"{name} ({len(folders)})")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(VARIANTS), help="of: " + ", ".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", default=str(ROOT / "runs" / "compare"))
    parser.add_argument("--dry", action="store_true", help="train nothing")
    args, extra = parser.parse_known_args()             # the rest goes to train.py
    names = args.only.split(",")
    if set(names) - VARIANTS.keys():
        parser.error(f"--only {args.only}: there are {', '.join(VARIANTS)}")
    done = {}
    for seed in range(args.seeds):
        for name in names:
            folder = pathlib.Path(args.folder) / f"{name}_{seed}"
            if not args.dry:
                train(name, seed, extra, folder)
            if (folder / "metrics.json").exists():
                done.setdefault(name, {})[seed] = folder
    metrics = {name: {seed: json.loads((folder / "metrics.json").read_text())
                      for seed, folder in folders.items()} for name, folders in done.items()}
    table = ["| variant | flags of train.py | AP of each seed | mean | against plain, same seeds | "
             "CPU-ms a step | M parameters |", "|---|---|---|--:|--:|--:|--:|"]
    table += [row(name, metrics[name], metrics.get("plain", {})) for name in names if name in done]
    print("\n".join(table))
    (ROOT / "studies" / "compare.md").write_text("\n".join(table) + "\n")
    plot(done, ROOT / "studies" / "compare.png")


if __name__ == "__main__":
    main()
