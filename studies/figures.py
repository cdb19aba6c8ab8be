"""The plots of a study, from its json files."""
import statistics

from matplotlib.figure import Figure

from studies import harness

THRESHOLDS = 0.6, 0.7, 0.8
# [DAC Fig. 3], queries per object above each threshold at epochs 1 to 12, read off the figure
PAPER = {
    "DAC-DETR": {0.6: (8.70, 9.83, 8.05, 5.53, 7.10, 6.33, 5.80, 6.29, 4.63, 5.87, 5.36, 5.48),
                 0.7: (3.82, 4.98, 4.41, 3.26, 3.78, 3.64, 3.52, 3.66, 2.80, 3.20, 3.26, 3.54),
                 0.8: (.74, 1.13, 1.33, 1.19, 1.10, 1.08, 1.34, 1.38, 1.21, 1.14, 1.38, 1.72)},
    "Deformable DETR": {0.6: (3.90, 3.41, 3.13, 3.63, 3.06, 3.66, 3.50, 2.66, 2.49, 3.46, 3.10,
                              2.92),
                        0.7: (.71, .70, .43, .81, .51, .79, .53, .36, .18, .61, .61, .36),
                        0.8: (.20, .24, .10, .35, .17, .30, .20, .12, .05, .26, .25, .10)}}


def band(axes, curves, label):
    """The mean over several [(x, y), ...], and the range between them."""
    columns = list(zip(*[[y for _, y in curve] for curve in curves]))
    xs = [x for x, _ in curves[0]]
    [line] = axes.plot(xs, [statistics.mean(c) for c in columns], marker="o", markersize=3,
                       label=label)
    axes.fill_between(xs, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15,
                      color=line.get_color(), linewidth=0)


def seeds(runs):
    """`1 seed`, `5 seeds`."""
    return f"{len(runs)} seed{'s' * (len(runs) != 1)}"


def curves(study, path):
    """Validation AP over steps. A run of another length ends elsewhere."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="validation AP", title=study.question)
    for variant, runs in harness.results(study).items():
        band(axes, [run["curve"] for run in runs.values()], f"{variant} ({seeds(runs)})")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=200)


def gathered(study, path):
    """[DAC Fig. 3]  queries per object above three thresholds: here above, the paper's below.

    Returns the figure.
    """
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panels = figure.subplots(2, len(THRESHOLDS), sharex="row")
    for (ours, theirs), threshold in zip(panels.T, THRESHOLDS):
        for variant in study.watched:
            runs = [run["watched"] for run in harness.results(study).get(variant, {}).values()
                    if "watched" in run]
            if runs:
                band(ours, [[(stop["step"], stop[f"above_{threshold}"]) for stop in run]
                            for run in runs], f"{variant} ({seeds(runs)})")
        for name, numbers in reversed(PAPER.items()):
            theirs.plot(range(1, 13), numbers[threshold], marker="o", markersize=3, label=name)
        ours.set(title=f"match quality above {threshold}", xlabel="step")
        theirs.set(xlabel="epoch")
        for axes in (ours, theirs):
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("queries per object, here")
    panels[1, 0].set_ylabel("the paper's, on COCO")
    for axes in panels[:, -1]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=200)
    return figure
