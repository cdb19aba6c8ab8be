"""What a run is beside its network: its data sets, its folder, its log.

Used by train.py and eval.py. Read after `checkpoints.py`.
"""
import json
import pathlib
import time

import torch
from tqdm import tqdm

from . import data

NUM_VAL_SHAPES = 200
TERMS = "cls", "l1", "giou"


def open_train(cfg):
    """The training set of a run: augmented, and the first 100 images as they are, to test on."""
    test = data.resize(cfg.size, cfg.recipe.max_size)
    if not cfg.coco:
        augmented = data.open_shapes("train", data.flip_only(), cfg.images, cfg.size, cfg.seed)
        return augmented, data.open_shapes("train", test, min(cfg.images, 100), cfg.size, cfg.seed)
    augment = data.multi_scale_and_crop(cfg.size, cfg.recipe.max_size)
    augmented, plain = (data.open_folder(cfg.coco, "train", transform, cfg.images, class_names(cfg),
                                         cfg.seed) for transform in (augment, test))
    plain.image_ids = plain.image_ids[:100]
    return augmented, plain


def open_val(cfg, categories):
    """The validation set of a run, labelled as it was trained; the same shapes for every seed."""
    test = data.resize(cfg.size, cfg.recipe.max_size)
    if cfg.coco:
        dataset = data.open_folder(cfg.coco, "val", test, class_names=class_names(cfg))
    else:
        dataset = data.open_shapes("val", test, NUM_VAL_SHAPES, cfg.size)
    data.relabel(dataset, categories)
    return dataset


def class_names(cfg):
    """--classes as a list."""
    return [name.strip() for name in cfg.classes.split(",") if name.strip()]


def check_queries(dataset, num_queries):
    """Refuse a set where an object would go without a query.

    Raises:
        ValueError: naming the image of most objects
    """
    counts = {image_id: sum(not a["iscrowd"] and a["category_id"] in dataset.label_of
                            for a in dataset.coco.imgToAnns.get(image_id, []))
              for image_id in dataset.image_ids}
    fullest = max(counts, key=counts.get)
    if counts[fullest] > num_queries:
        raise ValueError(f"image {fullest} holds {counts[fullest]} objects but the preset has "
                         f"{num_queries} queries, and each object needs one: take a preset with "
                         "more, or leave that image out")


def new_folder(cfg):
    """The folder of a new run: --out, or a free name under runs/. A run is never overwritten.

    Raises:
        FileExistsError: --out holds a run already
    """
    if cfg.out:
        if (pathlib.Path(cfg.out) / "last.pt").exists():
            raise FileExistsError(f"--out {cfg.out} holds a run already: go on with --resume "
                                  f"{cfg.out}, or take another name")
        return pathlib.Path(cfg.out)
    words = [cfg.model, pathlib.Path(cfg.coco).resolve().name if cfg.coco else "shapes"]
    words += [cfg.loss] * (cfg.loss != "focal") + [cfg.queries] * (cfg.queries != "two_stage")
    name = "_".join(words) + (f"_seed{cfg.seed}" if cfg.seed else "")
    names = [name] + [f"{name}-{i}" for i in range(2, 1000)]
    return next(p for p in (pathlib.Path("runs") / n for n in names) if not p.exists())


def describe(line):
    """One line of log.jsonl for people: what the loss is made of, what each decoder matched."""
    decoders = [name for name in ("O", "C", "encoder") if name in line]
    sums = [f"{name} ({' + '.join(f'{term} {line[name][term]:.2f}' for term in TERMS)})"
            for name in decoders]
    pairs = [f"{name} {line[name]['pairs']:.1f}" for name in decoders if name != "encoder"]
    return (f"step {line['step']} | loss {line['loss']:.2f} = {' + '.join(sums)} | objects "
            f"{line['objects']:.1f}, queries matched {' / '.join(pairs)} | {line['ms']:.0f} ms")


class Log:
    """log.jsonl: means over the steps since the last line.

    Lines after `last_step`, which a crash left behind, are dropped.
    """

    def __init__(self, path, last_step):
        self.path, self.steps = path, []
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines
                if line.endswith("}") and json.loads(line)["step"] <= last_step]
        path.write_text("".join(line + "\n" for line in kept))
        self.restart_clock()

    def restart_clock(self):
        """Time from now on counts as training."""
        self.clock, self.cpu_clock = time.perf_counter(), time.process_time()

    def add(self, parts, **more):
        """Remember a step: criterion's parts, left on their device (nothing waits), and numbers."""
        self.steps.append(({name: torch.stack(part[:3]).detach() for name, part in parts.items()},
                           {name: part.pairs for name, part in parts.items()}, more))

    def line(self, step, **more):
        """The means since the last line, as a dict."""
        terms, pairs, numbers = zip(*self.steps)
        n, line = len(self.steps), {"step": step, **more}
        for name in terms[0]:
            means = (sum(t[name] for t in terms) / n).tolist()
            line[name] = dict(zip(TERMS, means), pairs=sum(p[name] for p in pairs) / n)
        line["loss"] = sum(line[name][term] for name in terms[0] for term in TERMS)
        line.update({key: sum(m[key] for m in numbers) / n for key in numbers[0]})
        line["ms"] = (time.perf_counter() - self.clock) / n * 1000
        line["cpu_s"] = (time.process_time() - self.cpu_clock) / n
        self.steps = []
        return line

    def write(self, line, text, visible=True):
        """Append a line to the file, print its text above the progress bar, restart the clock."""
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if visible:
            tqdm.write(text)
        self.restart_clock()
