"""From predictions to one number: assign, then classify, then fit the boxes.

[DETR Eq. 2], [DAC Fig. 2]. Each decoder layer is supervised alike; training DAC-DETR's two decoders
is calling `decoder_loss` twice. Read `matcher.py` and `tal_loss.py` before, `model.py` after.
"""
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
import torchvision.ops as ops

from . import boxes, matcher, tal_loss

L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0       # [DETR App. A.4]
C_NORMALISER = 3.0  # the C-Decoder's sums are divided by this times the number of objects (release)


class ClassLoss(NamedTuple):
    """One way to train class scores."""
    target: Callable        # (scores (P,), ious (P,)) -> (P,) targets of the matched entries
    loss: Callable          # (logits (N, C), targets (N, C)) -> scalar sum
    weight: float           # in the total


class Parts(NamedTuple):
    """The terms of one decoder's loss, weighted, summed over layers: they make up its total."""
    cls: torch.Tensor
    l1: torch.Tensor
    giou: torch.Tensor
    pairs: int              # (query, object) pairs of the last layer, for people to read


def hard_target(scores, ious):
    """A matched query's score should be 1, however its box fits. (P,), (P,) -> (P,)"""
    return torch.ones_like(scores)


def focal_loss(logits, targets):
    """[Focal Loss Eq. 5]  sum of -.25 (1-p)^2 log p where target = 1, -.75 p^2 log(1-p) else."""
    return ops.sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0, reduction="sum")


def clamped_aligned_target(scores, ious):
    """[SD Eq. 6], at least .01 so that no matched query is lost (Align-DETR's safeguard)."""
    return tal_loss.aligned_target(scores, ious).clamp(min=0.01)


CLASS_LOSSES = {
    "focal": ClassLoss(hard_target, focal_loss, 2.0),
    "tal": ClassLoss(clamped_aligned_target, tal_loss.tal_loss, 2.0),
}


@torch.no_grad()
def assign_one_to_one(predictions, targets):
    """One layer's Predictions and the batch's targets -> [(query_idx, gt_idx)], one an image."""
    return [matcher.one_to_one(matcher.match_cost(logits, pred_boxes, target.labels, target.boxes))
            for logits, pred_boxes, target in zip(*predictions, targets)]


@torch.no_grad()
def assign_one_to_many(predictions, targets):
    """[DAC Eq. 4]  The C-Decoder's own logits and boxes decide; same form as assign_one_to_one."""
    return [matcher.one_to_many(matcher.match_quality(logits.sigmoid(), pred_boxes,
                                                      target.labels, target.boxes))
            for logits, pred_boxes, target in zip(*predictions, targets)]


def layer_loss(predictions, assigned, targets, class_loss):
    """Loss of one decoder layer, not yet normalised.

    [DETR Eq. 2]  weight * L_cls  +  5 * sum_pairs |b - g|_1  +  2 * sum_pairs (1 - GIoU(b, g))

    Args:
        predictions  Predictions of one layer, (B, N, C) and (B, N, 4)
        assigned     [(query_idx, gt_idx)] of each image
        targets      [labels (M,), boxes (M, 4)] of each image
        class_loss   a ClassLoss
    Returns:
        (cls, l1, giou), scalars; without any pair l1 and giou are 0 and still part of the graph
    """
    class_targets, matched, wanted = torch.zeros_like(predictions.logits), [], []
    for b, ((query_idx, gt_idx), target) in enumerate(zip(assigned, targets)):    # one image a time
        pred_boxes, gt_boxes = predictions.boxes[b, query_idx], target.boxes[gt_idx]        # (P, 4)
        with torch.no_grad():
            entry = query_idx, target.labels[gt_idx]
            class_targets[b][entry] = class_loss.target(
                predictions.logits[b][entry].sigmoid(), boxes.paired_iou(pred_boxes, gt_boxes))
        matched.append(pred_boxes)
        wanted.append(gt_boxes)
    matched, wanted = torch.cat(matched), torch.cat(wanted)                         # (all pairs, 4)
    cls = class_loss.loss(predictions.logits, class_targets)
    l1 = F.l1_loss(matched, wanted, reduction="sum")
    giou = ops.generalized_box_iou_loss(boxes.to_xyxy(matched), boxes.to_xyxy(wanted),
                                        reduction="sum")
    return class_loss.weight * cls, L1_WEIGHT * l1, GIOU_WEIGHT * giou


def decoder_loss(layers, assign, targets, normaliser, class_loss):
    """Sum over a decoder's layers, each matched anew. Lower is better.

    Args:
        layers      [Predictions], one a layer
        assign      assign_one_to_one or assign_one_to_many
        targets     [data.Target], one an image
        normaliser  number of objects, a float >= 1
        class_loss  a ClassLoss
    Returns:
        Parts
    """
    terms = []
    for predictions in layers:
        assigned = assign(predictions, targets)
        terms.append(layer_loss(predictions, assigned, targets, class_loss))
    cls, l1, giou = (sum(term) / normaliser for term in zip(*terms))
    return Parts(cls, l1, giou, sum(len(query_idx) for query_idx, _ in assigned))


def detection_loss(output, targets, num_objects, class_loss):
    """The whole training loss, as named parts that add up to it.

    L = L_O(one-to-one) + L_C(one-to-many) + L_encoder(one-to-one, every object in class 0)

    Args:
        output       model.Output
        targets      [data.Target], one an image
        num_objects  mean over processes of the objects in a process's batch, at least 1
        class_loss   a ClassLoss; the encoder's proposals keep focal loss
    Returns:
        {"O": Parts, "C": Parts, "encoder": Parts}, those that the model has
    """
    parts = {"O": decoder_loss(output.o_decoder, assign_one_to_one, targets,
                               num_objects, class_loss)}
    if output.c_decoder:
        parts["C"] = decoder_loss(output.c_decoder, assign_one_to_many, targets,
                                  C_NORMALISER * num_objects, class_loss)
    if output.proposals is not None:
        any_object = [target._replace(labels=torch.zeros_like(target.labels)) for target in targets]
        parts["encoder"] = decoder_loss([output.proposals], assign_one_to_one, any_object,
                                        num_objects, CLASS_LOSSES["focal"])
    return parts


def total(parts):
    """The one number to minimise."""
    return sum(part.cls + part.l1 + part.giou for part in parts.values())
