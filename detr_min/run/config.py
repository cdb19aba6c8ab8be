"""Every number a run depends on: what a person sets, and what a preset fills in.

`Config` is the command line of train.py, one flag a field; `--help` prints each field's text and
what it accepts, from the same place that checks it. `Recipe` is architecture and schedule. Both
are stored in every checkpoint. Read after `registry.py`.
"""
import argparse
import dataclasses
import re
import sys

from . import registry


@dataclasses.dataclass(frozen=True)
class Between:
    """A number from `least` to `most`, both included; or nested tuples of such numbers."""
    least: float
    most: float

    def __contains__(self, number):
        if isinstance(number, tuple):
            return all(n in self for n in number)
        return type(number) in (int, float) and self.least <= number <= self.most

    def __str__(self):
        ends = (f"{n:,}" if isinstance(n, int) else f"{n:g}" for n in (self.least, self.most))
        return "a number from " + " to ".join(ends)


class OneOf(tuple):
    """One of several words."""

    def __str__(self):
        return f"one of {', '.join(self)}"


def flag(default, text, accepted=None):
    """A field of Config: its default, its help, and what it accepts (None = any text)."""
    return dataclasses.field(default=default, metadata={"help": text, "accepted": accepted})


SIZE, SHARE, IMAGES = Between(1, 2 ** 16), Between(0, 1), Between(0, 2 ** 31)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a preset fills in: the network and how it is trained."""
    base: str = "deformable"        # deformable | conditional: the attention the model stands on
    d_model: int = 256
    num_heads: int = 8
    num_levels: int = 4
    num_points: int = 4             # sampling points per head and level
    d_ffn: int = 2048
    dropout: float = 0.0
    start: str = "torch"            # published: release.deformable.start_as_published
    cell_weight: float = 0.1        # of the mini-detector's loss on the conditional base
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_queries: int = 900
    num_classes: int = 80           # set from the data
    max_size: int = 1333            # longest side of an image, pixels
    warmup: int = 0                 # steps of linearly growing learning rate
    decay: str = "step"             # step: x0.1 once; cosine: to 0
    drop_at: float = 11 / 12        # share of the run before that step
    weight_decay: float = 1e-4
    clip: float = 0.1               # largest L2 norm of the gradient
    detections: int = 100           # kept of an image, best first, when it is tested
    swin: tuple = (192, (2, 2, 18, 2), (6, 12, 24, 48), 12, 0.2)    # release.swin.Swin: Swin-L


@dataclasses.dataclass(frozen=True)
class Config:
    """What a person sets, one flag a field. A preset fills in whatever is not given."""
    preset: str = flag("shapes", "a named set of values; --coco alone means coco")
    model: str = flag("dac", "the decoder", OneOf(registry.names(registry.DECODERS)))
    loss: str = flag("focal", "of class scores; align weighs boxes too", OneOf(registry.LOSSES))
    queries: str = flag("two_stage", "where queries come from",
                        OneOf(registry.names(registry.QUERIES)))
    backbone: str = flag("convnet", "resnet50 starts from ImageNet's weights",
                         OneOf(registry.names(registry.BACKBONES)))
    coco: str = flag("", "folder in COCO layout; empty = synthetic shapes, no download")
    images: int = flag(0, "training images drawn from it, seeded; 0 = all", IMAGES)
    val_share: float = flag(0.2, "share of the training images that is held out for validation, "
                            "where --coco has no validation json", Between(0.01, 0.9))
    classes: str = flag("", "person,dog: only these classes; empty = all")
    epochs: int = flag(0, "passes over the training images; 0 = go by steps", Between(0, 2 ** 31))
    steps: int = flag(1000, "optimiser steps; replaces a preset's epochs", Between(1, 2 ** 40))
    batch: int = flag(8, "images per step, all processes together", Between(1, 2 ** 20))
    size: int = flag(128, "short side of an image, pixels; the longest side follows in proportion",
                     Between(32, 10000))
    augment: str = flag("crop", "of --coco: flips, or DETR's crops too", OneOf(("flip", "crop")))
    lr: float = flag(1e-3, "AdamW's learning rate, for this batch", Between(1e-37, 1e37))
    slow_lr: float = flag(0.1, "factor on the learning rate of backbone and sampling offsets; "
                          "0 = they stay as they are", Between(0, 1))
    dn_number: int = flag(0, "denoising copies of the objects of an image; 0 = none",
                          Between(0, 10000))
    seed: int = flag(0, "weights, subset, order and augmentation follow from it",
                     Between(0, 2 ** 63 - 1))
    device: str = flag("auto", "where to compute", OneOf(("auto", "cpu", "cuda", "mps")))
    precision: str = flag("fp32", "bf16 needs no scaler", OneOf(("fp32", "bf16")))
    out: str = flag("", "run folder; empty = runs/ and a name made of the flags")
    init_from: str = flag("", "checkpoint whose weights a new run starts from")
    resume: str = flag("", "run folder to go on with, exactly; only --pause and --device beside it")
    pause: int = flag(0, "stop after this step as Ctrl-C would; 0 = never", Between(0, 2 ** 40))
    recipe: Recipe = Recipe()


FACTOR = Between(0, 1e6)
ACCEPTED = {                        # of a Recipe's fields, the others being a SIZE
    "base": OneOf(registry.DECODERS), "decay": OneOf(("step", "cosine")),
    "start": OneOf(("torch", "published")), "dropout": SHARE, "drop_at": SHARE,
    "cell_weight": FACTOR, "weight_decay": FACTOR, "clip": FACTOR, "warmup": Between(0, 2 ** 40),
    "swin": Between(0, 4096), "encoder_layers": Between(0, 1000),
    "decoder_layers": Between(1, 1000)}
MOST_SHAPES = 1_000_000
FLAGS = [field for field in dataclasses.fields(Config) if field.name != "recipe"]
PRESETS = {
    "shapes": dict(steps=1000, batch=4, size=128, lr=7e-4, images=2000, max_size=128,
                   d_model=128, num_heads=4, num_levels=3, d_ffn=256, encoder_layers=1,
                   decoder_layers=3, num_queries=50, num_classes=4, warmup=50, decay="cosine",
                   clip=1.0, slow_lr=1.0),
    "coco": dict(steps=1000, batch=4, size=192, lr=7e-4, max_size=320, augment="flip", d_model=128,
                 num_heads=4, num_levels=4, d_ffn=512, encoder_layers=1, decoder_layers=3,
                 num_queries=100, warmup=50, decay="cosine", clip=1.0, slow_lr=1.0),
    "paper_r50": dict(backbone="resnet50", epochs=12, batch=16, size=800, max_size=1333, lr=2e-4,
                      detections=300, dn_number=100, start="published"),
    "paper_swin_l": dict(backbone="swin_l", epochs=12, batch=16, size=800, max_size=1333, lr=2e-4,
                         detections=300, dn_number=100, start="published"),
}
CONDITIONAL = dict(base="conditional", model="conditional", num_levels=1)
SD_DETR = dict(model="decoupled", queries="task_aware", loss="tal")
PRESETS["shapes_conditional"] = dict(
    **CONDITIONAL, queries="anchor_cells", steps=2000, batch=8, size=96, max_size=96, lr=1e-3,
    images=2000, d_model=64, num_heads=4, d_ffn=192, encoder_layers=1, decoder_layers=3,
    num_queries=30, num_classes=4, warmup=50, decay="cosine", clip=1.0, slow_lr=1.0,
    cell_weight=1.0)
PRESETS["shapes_sd"] = {**PRESETS["shapes_conditional"], **SD_DETR}
PRESETS["paper_conditional_r50"] = dict(                        # Conditional DETR's code
    **CONDITIONAL, queries="learned", backbone="resnet50", epochs=50, drop_at=40 / 50, batch=16,
    size=800, max_size=1333, lr=1e-4, num_queries=300, dropout=0.1)
PRESETS["paper_conditional_dc5"] = {**PRESETS["paper_conditional_r50"], "backbone": "resnet50_dc5"}
PRESETS["paper_sd_r50"] = {**PRESETS["paper_conditional_r50"], **SD_DETR}   # its schedules are the
PRESETS["paper_sd_dc5"] = {**PRESETS["paper_conditional_dc5"], **SD_DETR}   # paper's, the rest its
for name in ("paper_conditional_r50", "paper_conditional_dc5", "paper_sd_r50", "paper_sd_dc5"):
    PRESETS[f"{name}_12"] = {**PRESETS[name], "epochs": 12, "drop_at": 10 / 12}     # base's code
PRESETS["paper_deformable_plus_r50"] = {                    # H-DETR's two baselines: with tricks,
    **PRESETS["paper_r50"], "num_queries": 300, "dn_number": 0, "detections": 100}
PRESETS["paper_deformable_r50"] = {                         # and plain two-stage Deformable DETR
    **PRESETS["paper_deformable_plus_r50"], "model": "dac_once", "queries": "two_stage_unmixed",
    "dropout": 0.1}
LONG = dict(epochs=24, drop_at=20 / 24)
for name in ("paper_deformable_plus_r50", "paper_deformable_r50"):
    PRESETS[f"{name}_24"] = {**PRESETS[name], **LONG}
    PRESETS[f"{name}_36"] = {**PRESETS[name], "epochs": 36, "drop_at": 30 / 36}
PRESETS["paper_r50_24"] = {**PRESETS["paper_r50"], **LONG}
PRESETS["paper_swin_l_24"] = {**PRESETS["paper_swin_l"], **LONG, "weight_decay": 0.05,
                              "swin": (*Recipe().swin[:4], 0.5)}
PRESETS["release"] = {**PRESETS["paper_r50"], "model": "dac_release", "loss": "align"}


def preset(name, **changes):
    """Build the Config of a preset, with fields of Config or Recipe changed.

    A changed size takes the longest side with it, in proportion, unless max_size is given too.

    Args:
        name     a key of PRESETS
        changes  any field of either class
    Returns:
        Config
    Raises:
        ValueError: no such preset, no such field, or values that no run can have
    """
    if name not in PRESETS:
        raise ValueError(f"--preset {name} is unknown; there are {', '.join(PRESETS)}")
    values = {"preset": name, **PRESETS[name], **changes}
    if fits(changes.get("size"), int) and "max_size" not in changes:
        share = changes["size"] / PRESETS[name]["size"]
        values["max_size"] = max(round(share * PRESETS[name]["max_size"]), 1)
    names = [{field.name for field in dataclasses.fields(cls)} for cls in (Config, Recipe)]
    unknown = values.keys() - names[0] - names[1]
    if unknown:
        raise ValueError(f"no such field: {', '.join(sorted(unknown))}")
    recipe = dataclasses.replace(values.pop("recipe", Recipe()),
                                 **{k: v for k, v in values.items() if k in names[1]})
    return checked(Config(recipe=recipe, **{k: v for k, v in values.items() if k in names[0]}))


def fits(value, kind, accepted=None):
    """Whether a value is of a type, an int also being a float, and is accepted (None = any is)."""
    return ((type(value) is kind or (kind is float and type(value) is int))
            and (accepted is None or value in accepted))


def checked(cfg):
    """Return the Config, or refuse a value or combination that no run can have.

    Raises:
        ValueError: the flag, the value and what is accepted
    """
    for field in FLAGS:
        value, accepted = getattr(cfg, field.name), field.metadata["accepted"]
        if not fits(value, field.type, accepted):
            raise ValueError(f"--{field.name} {value}: it must be {accepted or field.type}")
    for field in dataclasses.fields(Recipe):
        value, accepted = getattr(cfg.recipe, field.name), ACCEPTED.get(field.name, SIZE)
        if not fits(value, field.type, accepted):
            raise ValueError(f"{field.name} {value}: it must be {accepted}")
    if cfg.recipe.d_model % cfg.recipe.num_heads or cfg.recipe.d_model % 4:
        raise ValueError(f"d_model {cfg.recipe.d_model}: it must be a multiple of 4 and of "
                         f"num_heads {cfg.recipe.num_heads}")
    for name, table in (("model", registry.DECODERS), ("queries", registry.QUERIES),
                        ("backbone", registry.BACKBONES)):
        here = table[cfg.recipe.base]
        if getattr(cfg, name) not in here:
            raise ValueError(f"--{name} {getattr(cfg, name)} does not exist for preset {cfg.preset}"
                             f", which stands on {cfg.recipe.base} attention: it must be one of "
                             f"{', '.join(here)}")
    if cfg.dn_number and cfg.queries not in registry.DENOISABLE:
        raise ValueError(f"--queries {cfg.queries} takes no denoising queries, whose position is "
                         f"made of their boxes, as two_stage makes it: add --dn_number 0")
    return cfg


def from_dict(values):
    """Rebuild a Config from what dataclasses.asdict made of it, as checkpoints store it.

    Raises:
        ValueError: fields or values that this version does not know, or lacks
    """
    try:
        values, recipe = dict(values), dict(**values["recipe"])
        del values["recipe"]
        for name in {"dn_number", "slow_lr"} & recipe.keys():       # before they were flags
            values[name] = recipe.pop(name)
        return checked(Config(recipe=Recipe(**recipe), **values))
    except (TypeError, KeyError) as error:
        raise ValueError(f"a config of another version of this package: {error}") from error


def plain_numbers(argv=None):
    """The words of a command line, -1e-3 spelled out: argparse takes it for a flag."""
    return [f"{float(word):.40f}" if re.fullmatch(r"-[\d.]+e[-+]?\d+", word, re.I) else word
            for word in (sys.argv[1:] if argv is None else argv)]


def parse(doc, argv=None):
    """Read a command line.

    Args:
        doc   the program's description
        argv  words of the command line; None = this process's
    Returns:
        Config, and the set of fields that were given
    """
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in FLAGS:
        accepted = OneOf(PRESETS) if field.name == "preset" else field.metadata["accepted"]
        parser.add_argument(
            f"--{field.name}", type=field.type, metavar=field.type.__name__.upper(),
            help=field.metadata["help"] + (f" ({accepted})" if accepted else ""))
    given = vars(parser.parse_args(plain_numbers(argv)))
    if given.get("steps") and given.get("epochs"):
        parser.error("--steps and --epochs both say how long to train: give one")
    for name in ("coco", "classes", "init_from", "resume", "out"):
        if name in given and not given[name].strip(", "):
            parser.error(f"--{name} is empty: is it an unset variable of your shell?")
    values = {**given, "epochs": 0} if given.get("steps") else given
    name = given.get("preset", "coco" if given.get("coco") else "shapes")
    if given.get("coco"):
        values = {"images": 0, **values}                    # whatever the preset has of shapes
    if not given.get("coco"):
        for word in sorted({"classes", "augment"} & given.keys()):
            parser.error(f"--{word} is about the images of --coco DIR, which is missing")
        if name in PRESETS and not name.startswith("shapes"):
            parser.error(f"--preset {name} needs --coco DIR, a folder in COCO layout")
        if given.get("images") == 0:
            parser.error("--images 0 means all, and there is no end of shapes: say how many")
        if given.get("images", 0) > MOST_SHAPES:
            parser.error(f"--images {given['images']}: at most {MOST_SHAPES:,} shapes are drawn")
    try:
        return preset(name, **{k: v for k, v in values.items() if k != "preset"}), set(given)
    except ValueError as error:
        parser.error(str(error))


def check_resume(cfg, given):
    """Return the Config, or refuse flags that a resumed run cannot take.

    Raises:
        ValueError
    """
    other = given - {"resume", "pause", "device"}
    if cfg.resume and other:
        raise ValueError("--resume goes on with the run's own flags; leave out "
                         f"--{' --'.join(sorted(other))}, or train anew: --init_from {cfg.resume}")
    return cfg
