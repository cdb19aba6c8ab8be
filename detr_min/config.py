"""Every number a run depends on: what a person sets, and what a preset fills in.

`Config` is the command line of train.py, one flag a field; the comment beside a field is its help.
`Recipe` is architecture and schedule. Both are stored in every checkpoint.
"""
import argparse
import dataclasses
import inspect


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a preset fills in: the network and how it is trained."""
    d_model: int = 256
    num_heads: int = 8
    num_levels: int = 4
    num_points: int = 4             # sampling points a head and level
    d_ffn: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_queries: int = 900
    num_classes: int = 80           # set from the data; nobody types it
    max_size: int = 1333            # longest side of an image, pixels
    warmup: int = 0                 # steps of linearly growing learning rate
    decay: str = "step"             # step: x0.1 for the last 1/12 of the run; cosine: to 0
    slow_lr: float = 0.1            # factor on the learning rate of backbone and sampling offsets
    weight_decay: float = 1e-4
    clip: float = 0.1               # largest L2 norm of the gradient
    focal_steps: int = 0         # first steps with focal loss whatever --loss; ours, for --loss tal


@dataclasses.dataclass(frozen=True)
class Config:
    """What a person sets, one flag a field. A preset fills in whatever is not given."""
    preset: str = "shapes"          # shapes | coco | paper_r50; with --coco alone, coco
    model: str = "dac"              # deformable | dac | decoupled | dac_decoupled | split
    loss: str = "focal"             # focal | tal: how class scores are trained
    queries: str = "two_stage"      # learned | two_stage | task_aware
    backbone: str = "convnet"       # convnet, from random weights | resnet50, from ImageNet's
    coco: str = ""                  # folder in COCO layout; empty = synthetic shapes, no download
    images: int = 0                 # training images drawn from it, seeded; 0 = all
    classes: str = ""               # person,dog: only these classes; empty = all
    epochs: int = 0                 # passes over the training images; 0 = go by steps
    steps: int = 1000               # optimiser steps
    batch: int = 8                  # images a step, all processes together
    size: int = 128                 # short side of an image, pixels
    lr: float = 1e-3                # AdamW's learning rate, for this batch
    seed: int = 0                   # weights, subset, order and augmentation follow from it
    device: str = "auto"            # auto | cpu | cuda | mps
    precision: str = "fp32"         # fp32 | bf16
    out: str = ""                   # run folder; empty = runs/ and a name made of the flags
    init_from: str = ""             # checkpoint whose weights a new run starts from
    resume: str = ""        # run folder to go on with, exactly; only --pause and --device beside it
    pause: int = 0                  # stop after this step as Ctrl-C would; 0 = never
    recipe: Recipe = Recipe()


PRESETS = {
    "shapes": dict(steps=600, batch=8, size=128, lr=1e-3, images=2000, max_size=128,
                   d_model=128, num_heads=4, num_levels=3, d_ffn=256, encoder_layers=1,
                   decoder_layers=3, num_queries=50, num_classes=4, warmup=50, decay="cosine",
                   clip=1.0, slow_lr=1.0),
    "coco": dict(steps=700, batch=8, size=256, lr=1e-3, max_size=427, d_model=128, num_heads=4,
                 num_levels=4, d_ffn=512, encoder_layers=1, decoder_layers=3, num_queries=100,
                 warmup=50, decay="cosine", clip=1.0, slow_lr=1.0),
    "paper_r50": dict(backbone="resnet50", epochs=12, batch=16, size=800, lr=2e-4, max_size=1333),
}


def preset(name, **changes):
    """The Config of a preset, with fields of Config or Recipe changed.

    Args:
        name     shapes | coco | paper_r50
        changes  any field of either class
    Returns:
        Config
    Raises:
        ValueError: no such preset, or no such field
    """
    if name not in PRESETS:
        raise ValueError(f"--preset {name} is unknown; there are {', '.join(PRESETS)}")
    values = {"preset": name, **PRESETS[name], **changes}
    names = [{field.name for field in dataclasses.fields(cls)} for cls in (Config, Recipe)]
    unknown = values.keys() - names[0] - names[1]
    if unknown:
        raise ValueError(f"no such field: {', '.join(sorted(unknown))}")
    check(values)
    recipe = dataclasses.replace(values.pop("recipe", Recipe()),
                                 **{k: v for k, v in values.items() if k in names[1]})
    return Config(recipe=recipe, **{k: v for k, v in values.items() if k in names[0]})


CHOICES = {"model": ("deformable", "deformable_fixed", "dac", "decoupled", "dac_decoupled",
                     "split"),
           "loss": ("focal", "tal"), "queries": ("learned", "two_stage", "task_aware"),
           "backbone": ("convnet", "resnet50"), "device": ("auto", "cpu", "cuda", "mps"),
           "precision": ("fp32", "bf16")}


def check(values):
    """Refuse a value that no run could mean.

    Raises:
        ValueError: the flag, the value and what would do
    """
    for name, choices in CHOICES.items():
        if values.get(name, choices[0]) not in choices:
            raise ValueError(f"--{name} {values[name]} is none of {', '.join(choices)}")
    for name in ("steps", "batch", "size", "lr"):
        if not values.get(name, 1) > 0:
            raise ValueError(f"--{name} {values[name]}: a number above 0 is needed")
    for name in ("images", "epochs", "seed", "pause"):
        if values.get(name, 0) < 0:
            raise ValueError(f"--{name} {values[name]}: 0 or more is needed")


def from_dict(values):
    """A Config from what dataclasses.asdict made of it, as checkpoints store it.

    Raises:
        ValueError: fields that this version does not know, or lacks
    """
    values = dict(values)
    try:
        return Config(recipe=Recipe(**values.pop("recipe")), **values)
    except (TypeError, KeyError) as error:
        raise ValueError(f"a config of another version of this package: {error}") from error


def parse(doc, argv=None):
    """The Config that a command line asks for; --help is this file's own comments.

    Args:
        doc   the program's description
        argv  words of the command line; None = this process's
    Returns:
        Config, and the set of fields that were given
    """
    parser = argparse.ArgumentParser(description=doc, epilog=inspect.getsource(Config),
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        if field.name != "recipe":
            parser.add_argument(f"--{field.name}", type=field.type)
    given = vars(parser.parse_args(argv))
    if given.get("steps") and "epochs" not in given:
        given = {**given, "epochs": 0}
    name = given.get("preset", "coco" if given.get("coco") else "shapes")
    try:
        return preset(name, **{k: v for k, v in given.items() if k != "preset"}), set(given)
    except ValueError as error:
        parser.error(str(error))
