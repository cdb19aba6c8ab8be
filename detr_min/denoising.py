"""Contrastive denoising queries: noisy copies of the objects, to be restored without any matching.

[DINO Sec. 3.3], as in the DAC-DETR release (its "DINO" rows). In training, G groups of queries go
in front of the others. A group holds each object twice: a positive, whose box is a little off, must
find the object again; a negative, further off, must say that there is none. Read `query_gen.py`
before and `decoder_base.py` after; the losses are in `criterion.py`.
"""
from typing import NamedTuple

import torch

from . import boxes


class Noisy(NamedTuple):
    """What a batch's denoising queries start from; E = G * 2 * (most objects of an image) slots.

    In each group first the positives, then the negatives. An image with fewer objects than another
    leaves slots empty: label C, box (.5, .5, .5, .5), content 0; they must say that there is none.
    """
    labels: torch.Tensor        # (B, E)     int64 in [0, C]
    boxes: torch.Tensor         # (B, E, 4)  cxcywh, in [0, 1] of image size
    num_groups: int             # G


def noisy_copies(targets, num_classes, generator, dn_number=100, label_noise=0.25, box_noise=0.4):
    """The objects of a batch, with noise: a pure function of the targets and the generator's state.

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
    """Who may not look at whom in self-attention. -> (E + N, E + N) bool, True = row may not.

    Denoising queries know the answers, so the N matching queries do not see them, nor does a group
    see another. They see the matching queries.
    """
    group = torch.arange(num_groups).repeat_interleave(num_slots // num_groups)             # (E,)
    group = torch.cat([group, group.new_full((num_queries,), -1)])                      # (E + N,)
    return (group[:, None] != group) & (group >= 0)


def prepend(noisy, queries, label_embed, pos):
    """Denoising queries in front of the matching ones, and the mask that keeps them apart.

    Args:
        noisy        Noisy, E slots
        queries      query_gen.Queries, N of them
        label_embed  nn.Embedding(C + 1, D): what a label looks like; its last row is never used
        pos          (B, E, D)  what noisy.boxes say of a position
    Returns:
        query_gen.Queries, of E + N; with two sets both get the same
    """
    is_empty = noisy.labels == label_embed.num_embeddings - 1                               # (B, E)
    content = label_embed(noisy.labels).masked_fill(is_empty[..., None], 0)              # (B, E, D)
    (T, _, N, _), E = queries.content.shape, noisy.labels.shape[1]
    return queries._replace(
        content=torch.cat([content.expand(T, -1, -1, -1), queries.content], dim=2),
        pos=torch.cat([pos.expand(T, -1, -1, -1), queries.pos], dim=2),
        ref_boxes=torch.cat([noisy.boxes, queries.ref_boxes], dim=1),
        is_blocked=blocked(E, noisy.num_groups, N).to(content.device))


def split(layers, num_slots):
    """[Predictions] of E + N queries -> those of the E denoising queries, and of the other N."""
    return ([boxes.Predictions(*(t[:, :num_slots] for t in p)) for p in layers],
            [boxes.Predictions(*(t[:, num_slots:] for t in p)) for p in layers])


def to_restore(targets, num_slots):
    """Which slot must find which object: the positives; every other slot is background.

    Args:
        targets    [data.Target], one an image
        num_slots  E
    Returns:
        targets with G copies of each object, so that every copy has one slot of its own;
        [(query_idx, gt_idx)] into them, (G * M,) each; and G
    """
    most = max(len(target.labels) for target in targets)
    G = num_slots // (2 * most) if most else 1
    copies = [target._replace(labels=target.labels.repeat(G), boxes=target.boxes.repeat(G, 1))
              for target in targets]
    first = torch.arange(G, device=targets[0].labels.device)[:, None] * 2 * most     # of each group
    slots = [(first + torch.arange(len(target.labels), device=first.device)).flatten()
             for target in targets]
    return copies, [(slot, torch.arange(len(slot), device=slot.device)) for slot in slots], G
