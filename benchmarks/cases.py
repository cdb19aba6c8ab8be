"""What is measured: deformable attentions, and whole models with a batch to learn from.

Sizes of preset shapes are read from the preset. Read `theirs.py` before, `speed.py` after.
"""
import dataclasses
import math
from typing import NamedTuple

import torch
from torch import nn

from benchmarks import theirs
from detr_min import attention, criterion, encoder
from detr_min.data import batches, dataset, transforms
from detr_min.run import config, optim, registry

CLOSE = 1e-3            # most that two answers may differ, in logits or in shares of the image


class AttentionCase(NamedTuple):
    """The sizes of one deformable attention; letters as in detr_min/__init__.py."""
    B: int
    spatial_shapes: list[tuple[int, int]]
    N: int              # 0: the encoder's, every cell is a query
    H: int = 8
    width: int = 32     # channels of a head
    K: int = 4


class ModelCase(NamedTuple):
    """A whole model and its batch."""
    cfg: config.Config
    h: int              # of an image, pixels
    w: int
    encoder_loss: bool = True       # False: ours without the loss of proposals, which they lack


def levels(h, w, num_levels):
    """The (h, w) of feature levels of an image: strides 8, 16, 32, ..., rounded up."""
    return [(math.ceil(h / 2 ** s), math.ceil(w / 2 ** s)) for s in range(3, 3 + num_levels)]


def of_preset(cfg, queries):
    """The attention of a preset's encoder (queries 0) or decoder."""
    r = cfg.recipe
    return AttentionCase(cfg.batch, levels(cfg.size, cfg.size, r.num_levels), queries, r.num_heads,
                         r.d_model // r.num_heads, r.num_points)


SHAPES = config.preset("shapes", model="deformable", queries="two_stage_unmixed", batch=8)
R50 = config.preset("paper_r50", model="deformable", queries="two_stage_unmixed", num_queries=300,
                    dn_number=0, batch=1, size=480, max_size=640)
COCO = config.preset("coco", model="deformable", queries="two_stage_unmixed")
TINY = config.preset("shapes", model="deformable", queries="two_stage_unmixed", size=64, batch=2,
                     d_model=32, num_heads=2, d_ffn=32, decoder_layers=2,
                     num_queries=12)
ATTENTIONS = {
    "decoder_800_300": AttentionCase(1, levels(800, 1333, 4), 300),
    "decoder_800_900": AttentionCase(1, levels(800, 1333, 4), 900),
    "encoder_512": AttentionCase(1, levels(512, 512, 4), 0),
    "encoder_shapes": of_preset(SHAPES, 0),
    "decoder_shapes": of_preset(SHAPES, SHAPES.recipe.num_queries),
    "tiny": of_preset(TINY, 0),
}


MODELS = {
    "shapes": ModelCase(SHAPES, 128, 128),
    "shapes_equal_losses": ModelCase(SHAPES, 128, 128, encoder_loss=False),
    "shapes_one_stage": ModelCase(dataclasses.replace(SHAPES, queries="learned"), 128, 128),
    "coco": ModelCase(COCO, 192, 256),
    "r50": ModelCase(R50, 480, 640),
    "r50_equal_losses": ModelCase(R50, 480, 640, encoder_loss=False),
    "r50_one_stage": ModelCase(dataclasses.replace(R50, queries="learned"), 480, 640),
    "tiny": ModelCase(TINY, 64, 64),
}
HIDDEN = ("tiny",)                  # only where it is asked for: it is the tests'


def attention_inputs(case, device, dtype=torch.float32):
    """Random values, and the locations and weights of a module that has learned a little.

    Offsets are the initial ring of 1 to K cells (around boxes: to half the box) and noise that
    differs from query to query; encoder queries sit on their cells, decoder queries on boxes.

    Returns:
        value (B, S, H, width), locations (B, N, H, L, K, 2), weights (B, N, H, L, K), with gradient
    """
    torch.manual_seed(0)
    B, shapes, D = case.B, case.spatial_shapes, case.H * case.width
    module = attention.DeformableAttention(D, case.H, len(shapes), case.K)
    for layer, std in ((module.sampling_offsets, 0.8), (module.attention_weights, 1.0)):
        nn.init.normal_(layer.weight, std=std / math.sqrt(D))
    ratios = torch.ones(B, len(shapes), 2)
    memory = attention.Memory(None, None, shapes, ratios)
    references = encoder.cell_centres(shapes, ratios)                                   # (B, S, 2)
    value = torch.randn(B, references.shape[1], case.H, case.width)
    if case.N:
        references = torch.rand(B, case.N, 4)
        references[..., 2:] = 0.05 + 0.45 * references[..., 2:]
    with torch.no_grad():
        locations, weights = module.look(torch.randn(B, references.shape[1], D), references, memory)
    return [t.to(device, dtype).requires_grad_() for t in (value, locations, weights)]


def outside(locations):
    """The share of sampling points that lie beyond the map."""
    return ((locations < 0) | (locations > 1)).any(-1).float().mean().item()


def batch_of(case):
    """images, is_pad, targets: shapes as a run reads them, or noise with seven objects an image."""
    cfg = case.cfg
    if cfg.preset == "shapes":
        shapes = dataset.open_shapes("train", transforms.flip_only(), cfg.batch, cfg.size, cfg.seed)
        return batches.collate([shapes[i] for i in range(cfg.batch)])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(cfg.batch, 3, case.h, case.w, generator=generator)
    targets = []
    for i in range(cfg.batch):
        found = torch.rand(7, 4, generator=generator)
        found[:, 2:] = 0.05 + 0.45 * found[:, 2:]
        found[:, :2] = found[:, 2:] / 2 + found[:, :2] * (1 - found[:, 2:])         # on the image
        labels = torch.randint(cfg.recipe.num_classes, (7,), generator=generator)
        targets.append(dataset.Target(labels, found, i, (case.h, case.w)))
    return images, torch.zeros(cfg.batch, case.h, case.w, dtype=torch.bool), targets


def build_ours(case):
    """Our detector, from seed 0."""
    torch.manual_seed(0)
    return registry.build(case.cfg)


def build_theirs(case, body):
    """Theirs, from seed 0, heads of its own for each layer, off its initial symmetry.

    As it starts, all queries look to the same places and score alike: noise on every parameter but
    the backbone's makes offsets differ by about a cell.
    """
    torch.manual_seed(0)
    net = theirs.untie(theirs.build(case.cfg, body))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not name.startswith("model.backbone."):
                parameter += 0.8 / math.sqrt(case.cfg.recipe.d_model) * torch.randn_like(parameter)
    return net


@torch.no_grad()
def difference(ours, net, batch):
    """The most that logits and boxes of any layer differ, both asked for answers, not to learn.

    Queries are compared as a set, each number sorted: of two proposals that score alike either may
    come first.
    """
    images, is_pad = batch[:2]
    predictions = theirs.answers(net.eval(), images, is_pad)[1]
    most = 0.0
    for a, b in zip(ours.eval()(images, is_pad).o_decoder, predictions, strict=True):
        for x, y in zip(a, b):
            most = max(most, (x.sort(1).values - y.sort(1).values).abs().max().item())
    return most


class WithoutProposals(nn.Module):
    """Our detector, its proposals kept from the loss."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, *inputs):
        """As model.Detector.forward"""
        return self.detector(*inputs)._replace(proposals=None)


def our_loss(detector, cfg):
    """A function of (batch, step): our training loss, as train.py has it."""
    training, device = registry.training(cfg), next(detector.parameters()).device

    def loss(batch, step):
        images, is_pad = (t.to(device) for t in batch[:2])
        targets = [t._replace(labels=t.labels.to(device), boxes=t.boxes.to(device))
                   for t in batch[2]]
        inputs = training.inputs(images, is_pad, targets, step, 0)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            output = detector(*inputs)
        num_objects = float(sum(len(target.labels) for target in targets))
        return criterion.total(training.loss(output, targets, num_objects))
    return loss


def their_loss(net, cfg):
    """The same of theirs, with their own matcher and losses."""
    def loss(batch, step):
        device = next(net.parameters()).device
        images, is_pad = (t.to(device) for t in batch[:2])
        targets = [{name: t.to(device) for name, t in target.items()}
                   for target in theirs.labels(batch[2])]
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            return net(images, pixel_mask=(~is_pad).long(), labels=targets).loss
    return loss


def training_step(net, loss, optimizer, clip):
    """A function of (batch, step): forward, loss, backward, clip, optimizer; as train.py."""
    def step(batch, number):
        value = loss(batch, number)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return step


def step_of(case, net, is_ours, compiled=False):
    """training_step of a case's model, at a learning rate too low to change what it costs."""
    cfg = case.cfg
    optimizer = optim.make_optimizer(net.train(), dataclasses.replace(cfg, lr=1e-8))
    if is_ours:
        runner = torch.compile(net) if compiled else net
        runner = runner if case.encoder_loss else WithoutProposals(runner)
        return training_step(net, our_loss(runner, cfg), optimizer, cfg.recipe.clip)
    if compiled:
        net.model = torch.compile(net.model)
    return training_step(net, their_loss(net, cfg), optimizer, cfg.recipe.clip)
