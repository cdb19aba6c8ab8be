"""Weights that others published, under our names: DAC-DETR's release and Deformable DETR's.

A state dict is recognised and measured by its keys and shapes alone. Every key has a place: it
fills one tensor of ours, or is a known copy and must equal its original, or is needed only in
training.
Loading fails if a tensor is unmatched. `run/checkpoints.py` uses it.
"""
import re

import torch

from ..data import coco_json
from . import swin

# Ours on the left, theirs on the right; {l} is any number, {last} the number of decoder layers.
# A row also holds for every longer name that goes on with a dot, as with `.weight`.
NAMES = """
backbone                                backbone.0
projections.levels.{l}                  input_proj.{l}
label_embed                             label_enc

encoder.level_embed                     transformer.level_embed
encoder.layers.{l}.attn                 transformer.encoder.layers.{l}.self_attn
encoder.layers.{l}.norm_attn            transformer.encoder.layers.{l}.norm1
encoder.layers.{l}.ffn.0                transformer.encoder.layers.{l}.linear1
encoder.layers.{l}.ffn.2                transformer.encoder.layers.{l}.linear2
encoder.layers.{l}.norm_ffn             transformer.encoder.layers.{l}.norm2

queries.content.0                       query_embed.weight
queries.pos_and_content                 query_embed.weight
queries.reference_points                transformer.reference_points
queries.mini_detector.project           transformer.enc_output
queries.mini_detector.norm              transformer.enc_output_norm
queries.mini_detector.class_head        class_embed.{last}
queries.mini_detector.box_head.0        bbox_embed.{last}.layers.0
queries.mini_detector.box_head.2        bbox_embed.{last}.layers.1
queries.mini_detector.box_head.4        bbox_embed.{last}.layers.2
queries.pos_project                     transformer.pos_trans
queries.pos_norm                        transformer.pos_trans_norm

decoder.layers.{l}.self_attn            transformer.decoder.layers.{l}.self_attn
decoder.layers.{l}.norm_self            transformer.decoder.layers.{l}.norm2
decoder.layers.{l}.cross_attn           transformer.decoder.layers.{l}.cross_attn
decoder.layers.{l}.norm_cross           transformer.decoder.layers.{l}.norm1
decoder.layers.{l}.ffn.0                transformer.decoder.layers.{l}.linear1
decoder.layers.{l}.ffn.2                transformer.decoder.layers.{l}.linear2
decoder.layers.{l}.norm_ffn             transformer.decoder.layers.{l}.norm3
decoder.class_heads.{l}                 class_embed.{l}
decoder.box_heads.{l}.0                 bbox_embed.{l}.layers.0
decoder.box_heads.{l}.2                 bbox_embed.{l}.layers.1
decoder.box_heads.{l}.4                 bbox_embed.{l}.layers.2
"""
COPIES = r"transformer\.decoder\.(class|bbox)_embed\."      # of the same names without this start
NOT_TAKEN = r"label_enc\.weight|backbone\.0\.body\..*\.num_batches_tracked"     # served training
DROP_PATH = 0.2         # of Swin-L, for training on
INCOMPLETE = "not a complete checkpoint of DAC-DETR, Deformable DETR or Conditional DETR"


def state_of(content):
    """The state dict that a file's content is, or holds as "model"; {} if it is not a dict.

    Without "module.", with which DistributedDataParallel begins each name.
    """
    state = content.get("model", content) if isinstance(content, dict) else {}
    return ({str(key).removeprefix("module."): value for key, value in state.items()}
            if isinstance(state, dict) else {})


def recognises(content):
    """Whether a file's content is, or holds as "model", a state dict of this family."""
    return any(key.startswith("transformer.encoder.layers.") for key in state_of(content))


def their_name(name, last, table=NAMES):
    """Find the published name of a tensor that our Detector calls `name`, by a table as NAMES."""
    if name.startswith("backbone.") and not name.startswith("backbone.body."):
        return f"backbone.0.body.{swin.original_name(name.removeprefix('backbone.'))}"
    for row in table.split("\n"):
        if row:
            ours, theirs = row.split()
            found = re.fullmatch(ours.replace(".", r"\.").replace("{l}", r"(?P<l>\d+)")
                                 + r"(?P<rest>(\..*)?)", name)
            if found:
                numbers = {"last": last, **found.groupdict()}
                return theirs.format(**numbers) + found["rest"]
    raise KeyError(name)


def categories(num_classes):
    """[{"id", "name"}], id = label; 91 classes are COCO's."""
    if num_classes == 91:
        return coco_json.all_ids()
    return [{"id": i, "name": f"class {i}"} for i in range(num_classes)]


def kind_of(theirs):
    """Model and queries of a published state dict, in the words of `config.Config`."""
    def has(start):
        return any(key.startswith(start) for key in theirs)
    if not has("transformer.enc_output") and not has("transformer.pos_trans"):
        refined = has("transformer.decoder.bbox_embed.")
        return ("deformable" if refined else "deformable_fixed"), "learned"
    if has("query_embed.") or has("label_enc."):
        return "dac_release", "two_stage"
    return "deformable", "two_stage_unmixed"


def shape_of(theirs, key, num_dims):
    """The shape of a tensor that must have so many dimensions.

    Raises:
        KeyError, ValueError: it is missing, or has not; both name it
    """
    shape = [*theirs[key].shape]
    if len(shape) != num_dims:
        raise ValueError(f"{key} {shape}")
    return shape


def number_of(args, name, otherwise):
    """What a command line says of `name`, an integer from 1 on. ValueError: something else."""
    number = args.get(name, otherwise)
    if type(number) is not int or number < 1:
        raise ValueError(f"{name}={number} in its args")
    return number


def count(theirs, start):
    """How many layers or blocks there are whose keys go on with a number after `start`."""
    return 1 + max((int(key.removeprefix(start).split(".")[0])
                    for key in theirs if key.startswith(start)), default=-1)


def swin_of(theirs):
    """Arguments of swin.Swin; a window of w x w cells has (2w - 1)^2 rows of bias."""
    stages = [f"backbone.0.body.layers.{stage}.blocks." for stage in range(4)]
    (rows, *_), heads = zip(*(shape_of(theirs, f"{stage}0.attn.relative_position_bias_table", 2)
                              for stage in stages))
    return (*shape_of(theirs, "backbone.0.body.patch_embed.proj.bias", 1),
            tuple(count(theirs, stage) for stage in stages), heads,
            (round(rows ** 0.5) + 1) // 2, DROP_PATH)


def settings_of(theirs, args):
    """Read the preset and its changes, a dict, off a published state dict's shapes.

    Two numbers no shape tells: the heads and, where no query is learned, the queries. `args`, their
    command line as a dict, may hold them; else it is 8 and 300. KeyError, ValueError: what tells
    a size is missing or odd, and is named. Sizes that no network can have raise other errors.
    """
    is_swin = any(key.startswith("backbone.0.body.patch_embed.") for key in theirs)
    sizes = {"swin": swin_of(theirs)} if is_swin else {}
    kind, queries = kind_of(theirs)
    num_levels, d_model = shape_of(theirs, "transformer.level_embed", 2)
    num_heads, layers = number_of(args, "nheads", 8), "transformer.encoder.layers."
    [points] = shape_of(theirs, f"{layers}0.self_attn.attention_weights.bias", 1)
    [d_ffn] = shape_of(theirs, f"{layers}0.linear1.bias", 1)
    [num_classes] = shape_of(theirs, "class_embed.0.bias", 1)
    num_labels = (shape_of(theirs, "label_enc.weight", 2)[0]    # 92 whatever the release trains
                  if "label_enc.weight" in theirs else 0)
    has_labels = num_labels > 0 and (num_labels != 92 or num_classes == 91)
    return dict(
        name="paper_swin_l" if is_swin else "paper_r50", model=kind, queries=queries, batch=2,
        **sizes,
        d_model=d_model, num_heads=num_heads, num_levels=num_levels,
        num_points=points // (num_heads * num_levels), d_ffn=d_ffn,
        encoder_layers=count(theirs, layers),
        decoder_layers=count(theirs, "transformer.decoder.layers."),
        num_queries=(number_of(args, "num_queries", 300) if queries == "two_stage_unmixed"
                     else shape_of(theirs, "query_embed.weight", 2)[0]),
        num_classes=num_classes, dn_number=100 if has_labels else 0,
        detections=300 if kind == "dac_release" else 100)       # as each of the two was tested


def tensors_of(content):
    """Take the tensors out of a file's content: {"model": state dict, "args": ...}, or state dict.

    Returns:
        {their name: tensor}
    Raises:
        ValueError: something in the state dict is no tensor
    """
    theirs = state_of(content)
    odd = [key for key, value in theirs.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise ValueError(f"{INCOMPLETE}: {len(odd)} not a tensor ({', '.join(odd[:20])})")
    return {key: tensor.flatten() if key.endswith(".relative_position_index") else tensor
            for key, tensor in theirs.items()}


def args_of(content):
    """Their command line as a dict, empty where the file holds none."""
    args = content.get("args")                          # a Namespace, a dict, or nothing to be read
    return args if isinstance(args, dict) else getattr(args, "__dict__", {})


def renamed(theirs, own, last, table=NAMES):
    """Give published tensors our names.

    Args:
        theirs  {their name: tensor}
        own     {our name: tensor} of the Detector that is to take them; only shapes are looked at
        last    the number of decoder layers
        table   as NAMES
    Returns:
        {our name: their tensor}
    Raises:
        ValueError: tensors that are missing, left over, of another shape, or copies that differ
    """
    wanted = {their_name(name, last, table): name for name in own}
    copies = {key: re.sub(COPIES, r"\1_embed.", key) for key in theirs if re.match(COPIES, key)}
    for kind in {original.split(".")[0] for original in copies.values()}:   # all of them, or none
        copies |= {f"transformer.decoder.{key}": key
                   for key in wanted if key.startswith(f"{kind}.")}
    taken = {name: theirs[key] for key, name in wanted.items() if key in theirs}
    refused = {
        "missing": (wanted.keys() | copies.keys()) - theirs.keys(),
        "left over": {key for key in theirs.keys() - wanted.keys()
                      if copies.get(key) not in wanted and not re.fullmatch(NOT_TAKEN, key)},
        "of another shape": {f"{key} {[*theirs[key].shape]}, not {[*own[name].shape]}" for key, name
                             in wanted.items() if name in taken
                             and taken[name].shape != own[name].shape},
        "unlike the tensor it copies": {
            key for key, original in copies.items() if {key, original} <= theirs.keys()
            and not torch.equal(theirs[key], theirs[original])}}
    if any(refused.values()):
        raise ValueError(f"{INCOMPLETE}: " + "; ".join(
            f"{len(keys)} {problem} ({', '.join(sorted(keys)[:20])}{', ...' * (len(keys) > 20)})"
            for problem, keys in refused.items() if keys))
    return taken
