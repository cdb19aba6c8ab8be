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
    decay: str = "step"             # step: x0.1 once; cosine: to 0
    drop_at: float = 11 / 12        # share of the run before that step
    slow_lr: float = 0.1            # factor on the learning rate of backbone and sampling offsets
    weight_decay: float = 1e-4
    clip: float = 0.1               # largest L2 norm of the gradient
    dn_number: int = 0       # denoising copies of objects (denoising.py); needs two_stage queries
    detections: int = 100           # kept of an image, best first, when it is tested
    swin: tuple = (192, (2, 2, 18, 2), (6, 12, 24, 48), 12, 0.2)    # backbone_swin.Swin: Swin-L


@dataclasses.dataclass(frozen=True)
class Config:
    """What a person sets, one flag a field. A preset fills in whatever is not given."""
    preset: str = "shapes"  # PRESETS below; --coco alone means coco
    model: str = "dac"     # deformable | dac | dac_release | decoupled | dac_decoupled | split
    loss: str = "focal"             # focal | tal | align: of class scores
    queries: str = "two_stage"      # learned | two_stage | two_stage_unmixed | task_aware
    backbone: str = "convnet"       # convnet | resnet50, from ImageNet's weights | swin_l
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
    "coco": dict(steps=1000, batch=8, size=256, lr=1e-3, max_size=427, d_model=128, num_heads=4,
                 num_levels=4, d_ffn=512, encoder_layers=1, decoder_layers=3, num_queries=100,
                 warmup=50, decay="cosine", clip=1.0, slow_lr=1.0),
    "paper_r50": dict(backbone="resnet50", epochs=12, batch=16, size=800, lr=2e-4, max_size=1333,
                      detections=300, dn_number=100),
    "paper_swin_l": dict(backbone="swin_l", epochs=12, batch=16, size=800, lr=2e-4, max_size=1333,
                         detections=300, dn_number=100),
}
LONG = dict(epochs=24, drop_at=20 / 24)
PRESETS["paper_r50_24"] = {**PRESETS["paper_r50"], **LONG}
PRESETS["paper_swin_l_24"] = {**PRESETS["paper_swin_l"], **LONG, "weight_decay": 0.05,
                              "swin": (*Recipe().swin[:4], 0.5)}
PRESETS["release"] = {**PRESETS["paper_r50"], "model": "dac_release", "loss": "align"}


def preset(name, **changes):
    """The Config of a preset, with fields of Config or Recipe changed.

    Args:
        name     a key of PRESETS
        changes  any field of either class
    Returns:
        Config
    Raises:
        ValueError: no such preset, or no such field
    """
    if name not in PRESETS:
        raise ValueError(f"--preset {name} is unknown; there are {', '.join(PRESETS)}")
    values = {"preset": name, **PRESETS[name], **changes}
    if "size" in changes and "max_size" not in changes:         # the same shape, larger or smaller
        share = changes["size"] / PRESETS[name]["size"]
        values["max_size"] = max(round(share * PRESETS[name]["max_size"]), 1)
    if values.get("queries") in ("learned", "task_aware"):
        values = {**values, "dn_number": changes.get("dn_number", 0)}
    names = [{field.name for field in dataclasses.fields(cls)} for cls in (Config, Recipe)]
    unknown = values.keys() - names[0] - names[1]
    if unknown:
        raise ValueError(f"no such field: {', '.join(sorted(unknown))}")
    check(values)
    recipe = dataclasses.replace(values.pop("recipe", Recipe()),
                                 **{k: v for k, v in values.items() if k in names[1]})
    return Config(recipe=recipe, **{k: v for k, v in values.items() if k in names[0]})


CHOICES = {"model": ("deformable", "deformable_fixed", "dac", "dac_release", "decoupled",
                     "dac_decoupled", "split"),
           "loss": ("focal", "tal", "align"),
           "queries": ("learned", "two_stage", "two_stage_unmixed", "task_aware"),
           "backbone": ("convnet", "resnet50", "swin_l"), "device": ("auto", "cpu", "cuda", "mps"),
           "precision": ("fp32", "bf16")}


def check(values):
    """Refuse a value that no run could mean.

    Raises:
        ValueError: the flag, the value and what would do
    """
    for name, choices in CHOICES.items():
        if values.get(name, choices[0]) not in choices:
            raise ValueError(f"--{name} {values[name]} is none of {', '.join(choices)}")
    for name, least, most in (("steps", 1, 2 ** 40), ("batch", 1, 2 ** 20), ("lr", 1e-300, 1e300),
                              ("size", 32, 10000), ("images", 0, 2 ** 31), ("epochs", 0, 2 ** 31),
                              ("seed", 0, 2 ** 63 - 1), ("pause", 0, 2 ** 40)):
        if not least <= values.get(name, least) <= most:
            raise ValueError(f"--{name} {values[name]}: a number from {least} to {most} is needed")
    if values.get("dn_number") and values.get("queries") in ("learned", "task_aware"):
        raise ValueError(f"--queries {values['queries']} takes no denoising queries, which need a "
                         "position made of their boxes, as two_stage makes it: take dn_number 0")


def from_dict(values):
    """A Config from what dataclasses.asdict made of it, as checkpoints store it.

    Raises:
        ValueError: fields or values that this version does not know, or lacks
    """
    values = dict(values)
    check(values)
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
    if given.get("steps") and given.get("epochs"):
        parser.error("--steps and --epochs both say how long to train: give one")
    if given.get("steps"):
        given = {**given, "epochs": 0}
    if not given.get("coco"):
        if given.get("classes"):
            parser.error("--classes chooses among the classes of --coco DIR, which is missing")
        if given.get("preset", "shapes") != "shapes":
            parser.error(f"--preset {given['preset']} needs --coco DIR, a folder in COCO layout")
        if given.get("images") == 0:
            parser.error("--images 0 means all, and there is no end of shapes: say how many")
    name = given.get("preset", "coco" if given.get("coco") else "shapes")
    try:
        return preset(name, **{k: v for k, v in given.items() if k != "preset"}), set(given)
    except ValueError as error:
        parser.error(str(error))
