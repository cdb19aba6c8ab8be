"""Contrastive denoising queries: noisy copies of the objects, to be restored without any matching.

[DINO Sec. 3.3], as in the DAC-DETR release (its "DINO" rows). In training, G groups of queries go
in front of the others. A group holds each object twice: a positive, whose box is a little off, must
find the object again; a negative, further off, must predict that there is none. Read `model.py` and
`criterion.py` before.
"""
import functools
from typing import NamedTuple

import torch
from torch import nn

from .. import boxes, criterion, model


class Noisy(NamedTuple):
    """What a batch's denoising queries start from; E = G * 2 * (most objects of an image) slots.

    In each group first the positives, then the negatives. An image with fewer objects than another
    leaves slots empty: label C, box (.5, .5, .5, .5), content 0, trained as background.
    """
    labels: torch.Tensor        # (B, E)     int64 in [0, C]
    boxes: torch.Tensor         # (B, E, 4)  cxcywh, in [0, 1] of image size
    num_groups: int             # G


def noisy_copies(targets, num_classes, generator, dn_number=100, label_noise=0.25, box_noise=0.4):
    """Copy the objects of a batch with noise; a pure function of targets and generator state.

    A label is replaced by a random one with probability label_noise. Each corner coordinate of a
    box moves by u * box_noise half sizes, up or down; u in [0, 1) if positive, [1, 2) if negative.

    Args:
        targets      [data.Target], one an image
        num_classes  C
        generator    torch.Generator on the CPU, so that every device gets the same noise
        dn_number    positives of the image of most objects; G = max(1, dn_number // its objects)
        label_noise  the release's .5 * .5
        box_noise    in half widths and heights
    Returns:
        Noisy, on the targets' device; a batch without objects gives G = 1 and E = 0
    """
    B, most = len(targets), max(len(target.labels) for target in targets)
    G = max(1, dn_number // most) if most else 1
    shape = B, G, 2, most
    labels = targets[0].labels.new_full(shape, num_classes)                         # empty slots
    noisy_xyxy = boxes.to_xyxy(targets[0].boxes.new_full((*shape, 4), 0.5))
    is_random = (torch.rand(shape, generator=generator) < label_noise).to(labels.device)
    random_labels = torch.randint(num_classes, shape, generator=generator).to(labels.device)
    sign = torch.randint(2, (*shape, 4), generator=generator) * 2 - 1
    u = torch.rand(*shape, 4, generator=generator) + torch.tensor([0, 1])[:, None, None]
    shift = (sign * u * box_noise).to(noisy_xyxy)                               # (B, G, 2, most, 4)
    for b, target in enumerate(targets):
        M, half_size = len(target.labels), target.boxes[:, 2:].repeat(1, 2) / 2             # (M, 4)
        labels[b, ..., :M] = torch.where(is_random[b, ..., :M], random_labels[b, ..., :M],
                                         target.labels)
        noisy_xyxy[b, ..., :M, :] = (boxes.to_xyxy(target.boxes) + shift[b, ..., :M, :] * half_size
                                     ).clamp(0, 1)
    return Noisy(labels.flatten(1), boxes.to_cxcywh(noisy_xyxy).flatten(1, 3), G)


def blocked(num_slots, num_groups, num_queries):
    """Mask self-attention between groups. -> (E + N, E + N) bool, True: row may not see column.

    Denoising queries know the answers, so the N matching queries do not see them, nor does a group
    see another. They see the matching queries.
    """
    group = torch.arange(num_groups).repeat_interleave(num_slots // num_groups)             # (E,)
    group = torch.cat([group, group.new_full((num_queries,), -1)])                      # (E + N,)
    return (group[:, None] != group) & (group >= 0)


class Output(NamedTuple):
    """model.Output and, in training, the predictions of the denoising queries."""
    o_decoder: list[boxes.Predictions]
    c_decoder: list[boxes.Predictions]
    proposals: boxes.Predictions | None
    o_denoised: list[boxes.Predictions] = ()
    c_denoised: list[boxes.Predictions] = ()


class DenoisingDetector(model.Detector):
    """A Detector that in training also decodes denoising queries."""

    def __init__(self, *parts, num_classes, d_model):
        super().__init__(*parts)
        self.label_embed = nn.Embedding(num_classes + 1, d_model)       # the last row is never used

    def forward(self, images, is_pad, noisy=None):
        """Predict as model.Detector does; with `noisy`, a Noisy, also for its E slots. -> Output"""
        memory = self.encoder(self.projections(self.backbone(images)), is_pad)
        queries = self.queries(memory)
        if noisy is None:
            return Output(*self.decode(queries, memory))
        both = self.decode(self.prepend(noisy, queries), memory)
        (o_denoised, o_layers), (c_denoised, c_layers) = (
            split(layers, noisy.labels.shape[1]) for layers in (both.o_decoder, both.c_decoder))
        return Output(o_layers, c_layers, queries.proposals, o_denoised, c_denoised)

    def prepend(self, noisy, queries):
        """Put E denoising queries in front of N others. -> proposals.Queries; two sets get the same

        A denoising query's content is the embedding of its label, its position that of its box.
        """
        pos, _ = self.queries.embed(noisy.boxes)                                        # (B, E, D)
        is_empty = noisy.labels == self.label_embed.num_embeddings - 1                     # (B, E)
        content = self.label_embed(noisy.labels).masked_fill(is_empty[..., None], 0)    # (B, E, D)
        (T, _, N, _), E = queries.content.shape, noisy.labels.shape[1]
        return queries._replace(
            content=torch.cat([content.expand(T, -1, -1, -1), queries.content], dim=2),
            pos=torch.cat([pos.expand(T, -1, -1, -1), queries.pos], dim=2),
            ref_boxes=torch.cat([noisy.boxes, queries.ref_boxes], dim=1),
            is_blocked=blocked(E, noisy.num_groups, N).to(content.device))


def split(layers, num_slots):
    """Separate [Predictions] of E + N queries: the E denoising queries, then the other N."""
    return ([boxes.Predictions(*(t[:, :num_slots] for t in p)) for p in layers],
            [boxes.Predictions(*(t[:, num_slots:] for t in p)) for p in layers])


def restore(logits, pred_boxes, target, num_groups, most):
    """The pairs of one image: each positive slot and the object that it is a copy of.

    Args:
        logits, pred_boxes  not looked at: nothing is matched
        target              of G * M objects, G copies of the M
        num_groups          G
        most                objects of the image of most objects, M <= most
    Returns:
        slot_idx, gt_idx, int64 (G * M,) each
    """
    device, M = logits.device, len(target.labels) // num_groups
    first = torch.arange(num_groups, device=device)[:, None] * 2 * most             # each group's
    slots = (first + torch.arange(M, device=device)).flatten()
    return slots, torch.arange(len(slots), device=device)


def add_losses(parts, output, targets, num_objects, layer_loss=criterion.focal_loss):
    """Add the denoising queries' losses to a loss's parts: "O_denoising" and "C_denoising".

    Sums are divided by groups times objects. Arguments as criterion.detection_loss.
    """
    most = max(len(target.labels) for target in targets)
    for name, layers in (("O_denoising", output.o_denoised), ("C_denoising", output.c_denoised)):
        if layers:
            groups = layers[0].boxes.shape[1] // (2 * most) if most else 1
            copies = [t._replace(labels=t.labels.repeat(groups), boxes=t.boxes.repeat(groups, 1))
                      for t in targets]
            pairs = functools.partial(restore, num_groups=groups, most=most)
            parts[name] = criterion.decoder_loss(layers, copies, pairs, layer_loss,
                                                 groups * max(num_objects, 1.0))
    return parts
