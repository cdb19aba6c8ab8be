"""Contrastive denoising queries: noisy copies of the objects, to be restored without any matching.

[DINO Sec. 3.3], as in the DAC-DETR release (its "DINO" rows). In training, G groups of queries go
in front of the others. A group holds each object twice: a positive, whose box is a little off, must
find the object again; a negative, further off, must predict that there is none. Read `model.py` and
`criterion.py` before.
"""
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
        targets      [dataset.Target], one per image
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
        if noisy is None:
            return Output(*super().forward(images, is_pad))
        levels, pads = self.on_batch(nn.Sequential(self.backbone, self.projections), images, is_pad)
        memory = self.encoder(levels, pads)
        queries = self.queries(memory)
        both, E = self.prepend(noisy, queries), noisy.labels.shape[1]
        o_denoised, o_layers = split(self.decoder.o_decoder(both, memory), E)
        c_decoder = getattr(self.decoder, "c_decoder", lambda *_: [])
        c_denoised, c_layers = split(c_decoder(both, memory), E)
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


def to_restore(targets, num_slots):
    """Pair each positive slot with the object that it is a copy of.

    Args:
        targets    [dataset.Target], one per image
        num_slots  E
    Returns:
        criterion.Pairs, in which every copy is an object of its own; and the number of groups, G
    """
    device, most = targets[0].labels.device, max(len(target.labels) for target in targets)
    G = num_slots // (2 * most) if most else 1
    first_slot = torch.arange(G, device=device)[:, None] * 2 * most                     # (G, 1)
    slots = [(first_slot + torch.arange(len(target.labels), device=device)).flatten()
             for target in targets]                                                     # (G * M,)
    return criterion.Pairs(
        image_idx=torch.cat([torch.full_like(slot, image) for image, slot in enumerate(slots)]),
        query_idx=torch.cat(slots),
        object_idx=torch.arange(sum(map(len, slots)), device=device),
        labels=torch.cat([target.labels.repeat(G) for target in targets]),
        boxes=torch.cat([target.boxes.repeat(G, 1) for target in targets])), G


def add_losses(parts, output, targets, num_objects, layer_loss=criterion.focal_loss):
    """Add the denoising queries' losses to a loss's parts: "O_denoising" and "C_denoising".

    Nothing is matched. Sums are divided by groups times objects. Arguments as
    criterion.detection_loss.
    """
    for name, layers in (("O_denoising", output.o_denoised), ("C_denoising", output.c_denoised)):
        if layers:
            pairs, groups = to_restore(targets, layers[0].boxes.shape[1])
            terms = [layer_loss(layer._replace(logits=layer.logits.to(layer.boxes.dtype)), pairs)
                     for layer in layers]
            normaliser = groups * max(num_objects, 1.0)
            parts[name] = criterion.Parts(*(sum(term) / normaliser for term in zip(*terms)),
                                          len(pairs.query_idx))
    return parts
