"""python -m studies                       # what there is
python -m studies sd_detr                   # train what is missing, then table and plot
python -m studies sd_detr --seeds 1         # fewer seeds
python -m studies sd_detr --only plain,dfl  # some variants
python -m studies sd_detr --dry             # table and plot of the json files that are there

A study's runs go to runs/studies/, its numbers to studies/results/NAME/*.json, its table to
studies/results/NAME.md and its plot to studies/results/NAME.png. Flags that this program does not
know go to train.py, such as --steps 20.
"""
import argparse

import torch

from studies import catalogue, figures, harness


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__,
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=catalogue.STUDIES)
    parser.add_argument("--seeds", type=int, default=0, help="0: as many as the study asks for")
    parser.add_argument("--only", default="", help="variants, with commas; empty: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--again", action="store_true",
                        help="also train what has its json but no folder in runs/studies")
    parser.add_argument("--dry", action="store_true", help="train nothing")
    args, extra = parser.parse_known_args(argv)
    if not args.study:
        for study in catalogue.STUDIES.values():
            print(f"{study.name:10} {study.question} ({len(study.variants)} variants, "
                  f"{study.seeds} seeds)")
        return
    torch.set_num_threads(1)                    # the cores are the runs'
    study = catalogue.STUDIES[args.study]
    names = args.only.split(",") if args.only else list(study.variants)
    if set(names) - study.variants.keys():
        parser.error(f"--only {args.only}: there are {', '.join(study.variants)}")
    if not args.dry:
        harness.run(study, names, args.seeds, extra, args.jobs, args.again)
    text = harness.table(study)
    print(text)
    if harness.results(study):
        (harness.RESULTS / f"{study.name}.md").write_text(text + "\n")
        figures.curves(study, harness.RESULTS / f"{study.name}.png")
        if study.watched:
            figures.gathered(study, harness.RESULTS / f"{study.name}_gathered.png")


if __name__ == "__main__":
    main()
