"""python -m studies                       # what there is
python -m studies sd_detr                   # train what is missing, then table and plot
python -m studies sd_detr --seeds 1         # fewer seeds
python -m studies sd_detr --only plain,dfl  # some variants
python -m studies sd_detr --dry             # table and plot of the json files that are there
python -m studies bccd --coco DIR/bccd      # on a folder of real images
python -m studies sd_detr --into runs/mine  # all of it anew; the committed numbers stay
python -m studies --all --quick             # does everything run? Into runs/quick

A study's runs go to runs/studies/, its numbers to studies/results/NAME/*.json, its table to
studies/results/NAME.md and its plot to studies/results/NAME.png; with --into, all to that folder.
A run that is through is not trained again: after a change of code take another folder. Flags that
this program does not know go to train.py, such as --steps 20.
"""
import argparse
import pathlib
import shutil

import torch

from studies import catalogue, figures, harness


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__,
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=catalogue.STUDIES)
    parser.add_argument("--all", action="store_true", help="every study")
    parser.add_argument("--quick", action="store_true",
                        help="a few steps and one seed, into runs/quick: does it work here?")
    parser.add_argument("--coco", default="", help="folder of a study on real images, as bccd")
    parser.add_argument("--seeds", type=int, default=0, help="0: as many as the study asks for")
    parser.add_argument("--only", default="", help="variants, with commas; empty: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--into", type=pathlib.Path, metavar="FOLDER",
                        help="keep runs, numbers, tables and plots here")
    parser.add_argument("--dry", action="store_true", help="train nothing")
    args, extra = parser.parse_known_args(argv)
    studies = list(catalogue.STUDIES.values())
    if not args.all and not args.study:
        for study in studies:
            runs = [run for name, found in harness.results(study).items()
                    if name not in study.borrows for run in found.values()]
            hours = sum(run["cpu_seconds"] for run in runs) / 3600
            print(f"{study.name:15} {study.question} ({len(study.variants)} variants, "
                  f"{study.seeds} seeds{', needs --coco' if study.real else ''}; "
                  f"{len(runs)} runs are here, {hours:.1f} CPU-hours)")
        return
    if args.study:
        studies = [catalogue.STUDIES[args.study]]
        if set(args.only.split(",")) - {"", *studies[0].variants}:
            parser.error(f"--only {args.only}: there are {', '.join(studies[0].variants)}")
        if studies[0].real and not args.coco and not args.dry:
            parser.error(f"{args.study} needs --coco DIR, the folder of its images")
    if extra and not (args.into or args.quick):
        parser.error(f"{' '.join(extra)}: with flags of train.py the numbers are others than those "
                     "that are committed, so name another folder, as --into runs/mine")
    torch.set_num_threads(1)                    # the cores are the runs'
    if args.quick:
        folder, few = harness.QUICK
        args.into = args.into or folder
        args.seeds, extra = args.seeds or 1, [*few, *extra]
        if not args.dry and args.into == folder:
            shutil.rmtree(folder, ignore_errors=True)       # an old run says nothing of new code
    if args.into:
        harness.RUNS, harness.RESULTS = (args.into.resolve() / n for n in ("runs", "results"))
    for study in studies:
        if study.real and not args.coco and not args.dry:
            print(f"{study.name} is left out: it needs --coco DIR")
            continue
        flags = [*extra, "--coco", args.coco] if study.real else extra
        if not args.dry:
            names = args.only.split(",") if args.only else list(study.variants)
            harness.run(study, names, args.seeds, flags, args.jobs)
        report(study)


def report(study):
    """Print the table of a study and write it and its plots, if a run of its own is through."""
    if harness.results(study).keys() <= study.borrows.keys():
        print(f"{study.name}: no run of its own is through yet")
        return
    text = harness.table(study)
    print(text)
    (harness.RESULTS / f"{study.name}.md").write_text(text + "\n")
    figures.curves(study, harness.RESULTS / f"{study.name}.png")
    if study.watched:
        figures.gathered(study, harness.RESULTS / f"{study.name}_gathered.png")


if __name__ == "__main__":
    main()
