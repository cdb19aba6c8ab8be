"""From predictions to one number: assign, then classify, then fit the boxes.

[DETR Eq. 2], [DAC Fig. 2]. Each decoder layer is supervised alike; training DAC-DETR's two decoders
is calling `decoder_loss` twice. Read `matcher.py`, `tal_loss.py` and `align_loss.py` before,
`model.py` after.
"""
from typing import Callable, NamedTuple

import torch
import torchvision.ops as ops

from . import align_loss, boxes, denoising, matcher, tal_loss

L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0       # [DETR App. A.4]
TAL_WEIGHT = 8.0    # ours, unknown of the paper: with focal loss's 2, scores learn late (README)
C_NORMALISER = 3.0  # the C-Decoder's sums are divided by this times the number of objects (release)


class ClassLoss(NamedTuple):
    """One way to train class scores."""
    target: Callable        # (scores, ious, gt_idx) of one image -> targets, weights of its pairs
    loss: Callable          # (logits (N, C), targets (N, C)) -> scalar sum
    weight: float           # in the total


class Parts(NamedTuple):
    """The terms of one decoder's loss, weighted, summed over layers: they make up its total."""
    cls: torch.Tensor
    l1: torch.Tensor
    giou: torch.Tensor
    pairs: int              # (query, object) pairs of the last layer, for people to read


def hard_target(scores, ious, gt_idx):
    """A matched query's score should be 1, however its box fits. (P,) x 3 -> (P,), (P,)"""
    return torch.ones_like(scores), torch.ones_like(scores)


def focal_loss(logits, targets):
    """[Focal Loss Eq. 5]  sum of -.25 (1-p)^2 log p where target = 1, -.75 p^2 log(1-p) else."""
    return ops.sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0, reduction="sum")


def clamped_aligned_target(scores, ious, gt_idx):
    """[SD Eq. 6], at least .01 so that no matched query is lost (Align-DETR's safeguard)."""
    return tal_loss.aligned_target(scores, ious).clamp(min=0.01), torch.ones_like(scores)


CLASS_LOSSES = {
    "focal": ClassLoss(hard_target, focal_loss, 2.0),
    "tal": ClassLoss(clamped_aligned_target, tal_loss.tal_loss, TAL_WEIGHT),
    "align": ClassLoss(align_loss.ranked_target, align_loss.align_loss, 1.0),
}


def image_by_image(predictions, targets):
    """One layer's Predictions and the batch's targets -> of each image, match_cost's arguments."""
    logits = predictions.logits.to(predictions.boxes.dtype)         # half precision under autocast
    return [(*image, target.labels, target.boxes)
            for *image, target in zip(logits, predictions.boxes, targets)]


def travel(tensors, device, dim):
    """Move tensors that differ in size along `dim` alone to a device, in one transfer."""
    there = torch.cat(tensors, dim).to(device)
    return there.split([t.shape[dim] for t in tensors], dim)


@torch.no_grad()
def assign(score, pair, layers, targets):
    """Pairs for every image of every layer. A GPU is waited for once, not once an image.

    Args:
        score    arguments as match_cost -> (N, M)
        pair     (N, M) -> query_idx, gt_idx
        layers   [Predictions]
        targets  [[data.Target]]  of each layer those of the batch
    Returns:
        of each layer [(query_idx, gt_idx)], one an image
    """
    images = [image for layer in zip(layers, targets) for image in image_by_image(*layer)]
    scores = [score(*image) for image in images]                                    # (N, M) each
    flat = travel([matrix.flatten() for matrix in scores], "cpu", dim=0)
    pairs = [torch.stack(pair(on_cpu.view_as(matrix))) for on_cpu, matrix in zip(flat, scores)]
    pairs = [tuple(p) for p in travel(pairs, layers[0].boxes.device, dim=1)]
    B = len(targets[0])
    return [pairs[first:first + B] for first in range(0, len(pairs), B)]


def assign_one_to_one(layers, targets):
    """[DETR Eq. 1]  Arguments and result as those of `assign`."""
    return assign(matcher.match_cost, matcher.one_to_one, layers, targets)


def quality_of_logits(logits, *boxes_and_objects):
    """match_quality of what a layer says."""
    return matcher.match_quality(logits.sigmoid(), *boxes_and_objects)


def assign_one_to_many(layers, targets):
    """[DAC Eq. 4]  Arguments and result as those of `assign`."""
    return assign(quality_of_logits, matcher.one_to_many, layers, targets)


def paper_assignment(output, targets):
    """The C-Decoder's own logits and boxes decide. A model.Output -> assignments, one a layer."""
    return assign_one_to_many(output.c_decoder, [targets] * len(output.c_decoder))


def release_assignment(output, targets):
    """The C-Decoder's logits and the O-Decoder's boxes decide, of the same query and layer."""
    mixed = [c._replace(boxes=o.boxes) for o, c in zip(output.o_decoder, output.c_decoder)]
    return assign(quality_of_logits, matcher.one_to_many_release, mixed, [targets] * len(mixed))


C_ASSIGNMENTS = {"dac_release": release_assignment}         # by model; all others: paper_assignment


def is_last_claim(query_idx, labels):
    """False for a pair whose query a later pair wants in the same class. (P,), (P,) -> (P,) bool

    Only the release's rule gives a query to two objects. Of different classes, both are learned; of
    one class, it would need two targets: the release writes both and the last, of the higher
    object, stays. Here it alone is written, so the result does not hang on the order of writing.
    """
    same = (query_idx[:, None] == query_idx) & (labels[:, None] == labels)              # (P, P)
    return ~same.triu(1).any(1)


def layer_loss(predictions, assigned, targets, class_loss):
    """Loss of one decoder layer, not yet normalised.

    [DETR Eq. 2]  weight * L_cls  +  5 * sum_pairs w |b - g|_1  +  2 * sum_pairs w (1 - GIoU(b, g))

    Args:
        predictions  Predictions of one layer, (B, N, C) and (B, N, 4)
        assigned     [(query_idx, gt_idx)] of each image
        targets      [labels (M,), boxes (M, 4)] of each image
        class_loss   a ClassLoss; w, the weight of a pair, is its business too, mostly 1
    Returns:
        (cls, l1, giou), scalars; without any pair l1 and giou are 0 and still part of the graph
    """
    logits = predictions.logits.to(predictions.boxes.dtype)         # half precision under autocast
    class_targets, matched, wanted, weights = torch.zeros_like(logits), [], [], []
    for b, ((query_idx, gt_idx), target) in enumerate(zip(assigned, targets)):    # one image a time
        pred_boxes, gt_boxes = predictions.boxes[b, query_idx], target.boxes[gt_idx]        # (P, 4)
        labels = target.labels[gt_idx]
        with torch.no_grad():
            soft_targets, pair_weights = class_loss.target(
                logits[b, query_idx, labels].sigmoid(), boxes.paired_iou(pred_boxes, gt_boxes),
                gt_idx)
            last = is_last_claim(query_idx, labels)
            class_targets[b, query_idx[last], labels[last]] = soft_targets[last]
        matched.append(pred_boxes)
        wanted.append(gt_boxes)
        weights.append(pair_weights)
    matched, wanted, weights = torch.cat(matched), torch.cat(wanted), torch.cat(weights)
    cls = class_loss.loss(logits, class_targets)
    l1 = (weights * (matched - wanted).abs().sum(-1)).sum()
    giou = (weights * ops.generalized_box_iou_loss(boxes.to_xyxy(matched), boxes.to_xyxy(wanted),
                                                   eps=0)).sum()
    return class_loss.weight * cls, L1_WEIGHT * l1, GIOU_WEIGHT * giou


def decoder_loss(layers, assigned, targets, normaliser, class_loss):
    """Sum over a decoder's layers, each matched anew. Lower is better.

    Args:
        layers      [Predictions], one a layer
        assigned    what an assign_... gave, one a layer
        targets     [data.Target], one an image
        normaliser  number of objects, a float >= 1
        class_loss  a ClassLoss
    Returns:
        Parts
    """
    terms = [layer_loss(*layer, targets, class_loss) for layer in zip(layers, assigned)]
    cls, l1, giou = (sum(term) / normaliser for term in zip(*terms))
    return Parts(cls, l1, giou, sum(len(query_idx) for query_idx, _ in assigned[-1]))


def detection_loss(output, targets, num_objects, class_loss, assign_c=paper_assignment):
    """The whole training loss, as named parts that add up to it.

    L = L_O(one-to-one) + L_C(one-to-many) + L_encoder(one-to-one, every object in class 0)
        + L_O, L_C of the denoising queries, if there are any

    One layer's terms: give an Output of that layer alone.

    Args:
        output       model.Output
        targets      [data.Target], one an image
        num_objects  mean over processes of the objects in a process's batch; sums are divided by
                     it, the C-Decoder's by 3 times it, but by nothing below 1
        class_loss   a ClassLoss; the encoder's proposals keep focal loss
        assign_c     paper_assignment or release_assignment
    Returns:
        {"O", "C", "encoder", "O_denoising", "C_denoising": Parts}, those that the model has
    """
    any_object = [target._replace(labels=torch.zeros_like(target.labels)) for target in targets]
    o_layers = output.o_decoder
    has_proposals = [] if output.proposals is None else [output.proposals]
    o_assigned = assign_one_to_one([*o_layers, *has_proposals],
                                   [targets] * len(o_layers) + [any_object] * len(has_proposals))
    normaliser, c_normaliser = max(num_objects, 1.0), max(C_NORMALISER * num_objects, 1.0)
    parts = {"O": decoder_loss(o_layers, o_assigned[:len(o_layers)], targets, normaliser,
                               class_loss)}
    if output.c_decoder:
        parts["C"] = decoder_loss(output.c_decoder, assign_c(output, targets), targets,
                                  c_normaliser, class_loss)
    if has_proposals:
        parts["encoder"] = decoder_loss(has_proposals, o_assigned[-1:], any_object, normaliser,
                                        CLASS_LOSSES["focal"])
    for name, layers in (("O_denoising", output.o_denoised), ("C_denoising", output.c_denoised)):
        if layers:                                          # what to restore is known: no matching
            copies, pairs, groups = denoising.to_restore(targets, layers[0].boxes.shape[1])
            parts[name] = decoder_loss(layers, [pairs] * len(layers), copies, groups * normaliser,
                                       class_loss)
    return parts


def total(parts):
    """The one number to minimise."""
    return sum(part.cls + part.l1 + part.giou for part in parts.values())
