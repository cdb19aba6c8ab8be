"""From predictions to one loss: match per layer and per image, then sum the terms.

[DETR Eq. 2], [DAC Fig. 2]. All decoder layers are supervised alike. Training DAC-DETR's two
decoders means calling `decoder_loss` twice. Read `matcher.py` and `tal_loss.py` before, `model.py`
after.
"""
from typing import NamedTuple

import torch
import torchvision.ops as ops

from . import boxes, matcher, tal_loss

L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0       # [DETR App. A.4]
FOCAL_WEIGHT = 2.0                      # [Deformable DETR Sec. 5]
TAL_WEIGHT = 8.0    # ours: at score .01, IoU .9 Eq. 7 has 1/9 of focal loss's gradient
C_NORMALISER = 3.0  # the C-Decoder's sums are divided by this times the number of objects (release)


class Parts(NamedTuple):
    """The weighted terms of one decoder's loss, which is their sum."""
    cls: torch.Tensor
    l1: torch.Tensor
    giou: torch.Tensor
    pairs: int              # (query, object) pairs of the last layer, for the log


class Pairs(NamedTuple):
    """The P matched pairs of one layer, over all images of the batch."""
    image_idx: torch.Tensor     # (P,)
    query_idx: torch.Tensor     # (P,)
    object_idx: torch.Tensor    # (P,)    numbered through the batch; for release/align_loss.py
    labels: torch.Tensor        # (P,)    of the object
    boxes: torch.Tensor         # (P, 4)  of the object, cxcywh


def box_loss(layer, pairs, weights=1.0):
    """Compute the box regression terms of one layer: L1 and GIoU, summed over pairs.

    [DETR Eq. 2]  5 * sum_pairs w |b - g|_1,  2 * sum_pairs w (1 - GIoU(b, g))

    The weights w are 1 in DETR; release/align_loss.py has others.
    """
    matched = layer.boxes[pairs.image_idx, pairs.query_idx]                             # (P, 4)
    l1 = (matched - pairs.boxes).abs().sum(-1)                                          # (P,)
    giou = ops.generalized_box_iou_loss(boxes.to_xyxy(matched), boxes.to_xyxy(pairs.boxes), eps=0)
    return L1_WEIGHT * (weights * l1).sum(), GIOU_WEIGHT * (weights * giou).sum()


def focal_loss(layer, pairs):
    """Compute the loss of one layer: focal classification and box regression.

    [DETR Eq. 2], [Focal Loss Eq. 5]  2 * L_cls + 5 * L_1 + 2 * L_GIoU
        L_cls = sum of -.25 (1-p)^2 log p  where query and class are matched, -.75 p^2 log(1-p) else

    Args:
        layer  Predictions, (B, N, C) logits and (B, N, 4) boxes; p = sigmoid(logit)
        pairs  Pairs
    Returns:
        (cls, l1, giou), sums; the caller divides by the number of objects
    """
    wanted = torch.zeros_like(layer.logits)                                             # (B, N, C)
    wanted[pairs.image_idx, pairs.query_idx, pairs.labels] = 1
    cls = ops.sigmoid_focal_loss(layer.logits, wanted, alpha=0.25, gamma=2.0, reduction="sum")
    return FOCAL_WEIGHT * cls, *box_loss(layer, pairs)


def task_aligned_loss(layer, pairs, class_weight=TAL_WEIGHT):
    """Compute the loss of one layer with SD-DETR's classification. Arguments as focal_loss.

    [SD Eq. 6-7]  class_weight * L_cls + 5 * L_1 + 2 * L_GIoU

    Targets are at least .01, as in Align-DETR's code.
    """
    place = pairs.image_idx, pairs.query_idx, pairs.labels
    ious = boxes.paired_iou(layer.boxes[place[:2]], pairs.boxes)                        # (P,)
    wanted = torch.zeros_like(layer.logits)                                             # (B, N, C)
    wanted[place] = tal_loss.aligned_target(layer.logits[place].sigmoid(), ious).clamp(min=0.01)
    return class_weight * tal_loss.tal_loss(layer.logits, wanted), *box_loss(layer, pairs)


def quality(logits, pred_boxes, gt_labels, gt_boxes):
    """[DAC Eq. 4]  matcher.match_quality of what a layer predicts. -> (N, M)"""
    return matcher.match_quality(logits.sigmoid(), pred_boxes, gt_labels, gt_boxes)


def decoder_loss(layers, targets, compare, assign, layer_loss, normaliser, judged=None):
    """Sum the losses of a decoder's layers; in each layer, queries and objects are matched anew.

    Args:
        layers      [Predictions], one per layer
        targets     [dataset.Target], one per image: labels (M,), boxes (M, 4) cxcywh
        compare     match_cost or `quality`: of one image's queries and objects -> (N, M)
        assign      one_to_one of a cost, or one_to_many of a quality -> query_idx, gt_idx
        layer_loss  focal_loss, task_aligned_loss, or another of the same form
        normaliser  a float >= 1, by which the sums are divided
        judged      [Predictions] that are matched in place of the layers; for dac_release.py
    Returns:
        Parts
    """
    terms = []
    for layer, judged_layer in zip(layers, judged or layers):
        pairs, first_object = [], 0
        for image, (logits, pred_boxes, target) in enumerate(zip(*judged_layer, targets)):
            with torch.no_grad():
                matrix = compare(logits.to(pred_boxes.dtype), pred_boxes, target.labels,
                                 target.boxes)
                query_idx, gt_idx = assign(matrix)
            pairs.append((torch.full_like(query_idx, image), query_idx, first_object + gt_idx,
                          target.labels[gt_idx], target.boxes[gt_idx]))
            first_object += len(target.labels)
        pairs = Pairs(*(torch.cat(column) for column in zip(*pairs)))
        layer = layer._replace(logits=layer.logits.to(layer.boxes.dtype))   # autocast's are bf16
        terms.append(layer_loss(layer, pairs))
    return Parts(*(sum(term) / normaliser for term in zip(*terms)), len(pairs.query_idx))


def detection_loss(output, targets, num_objects, layer_loss=focal_loss):
    """Compute the training loss of DAC-DETR or of the decoder it is built on, as named parts.

    L = L_O(one-to-one) + L_C(one-to-many) + L_encoder(one-to-one, every object in class 0)

    Args:
        output       model.Output
        targets      [dataset.Target], one per image
        num_objects  objects in the batch, averaged over processes; sums are divided by it, the
                     C-Decoder's by 3 times it, but never by less than 1
        layer_loss   focal_loss, task_aligned_loss or another; the encoder keeps focal loss
    Returns:
        {"O", "C", "encoder": Parts}, of which the last two only if the model has them
    """
    normaliser, c_normaliser = max(num_objects, 1.0), max(C_NORMALISER * num_objects, 1.0)
    one_to_one = matcher.match_cost, matcher.one_to_one         # [DETR Eq. 1]
    one_to_many = quality, matcher.one_to_many                  # [DAC Eq. 4]
    parts = {"O": decoder_loss(output.o_decoder, targets, *one_to_one, layer_loss, normaliser)}
    if output.c_decoder:
        parts["C"] = decoder_loss(output.c_decoder, targets, *one_to_many, layer_loss, c_normaliser)
    if output.proposals is not None:
        objects = [t._replace(labels=torch.zeros_like(t.labels)) for t in targets]
        parts["encoder"] = decoder_loss([output.proposals], objects, *one_to_one, focal_loss,
                                        normaliser)
    return parts


def conditional_loss(output, targets, num_objects, layer_loss=focal_loss, cell_weight=0.1):
    """Compute the training loss of Conditional DETR or SD-DETR. Arguments as detection_loss.

    L = L_O(one-to-one) + cell_weight * L_cells(one-to-one, the objects' own classes)

    .1 is DESTR's weight, for an ImageNet backbone; the presets for random weights use 1.

    Returns:
        {"O", "encoder": Parts}, the second only with a mini-detector, which keeps focal loss
    """
    normaliser, one_to_one = max(num_objects, 1.0), (matcher.match_cost, matcher.one_to_one)
    parts = {"O": decoder_loss(output.o_decoder, targets, *one_to_one, layer_loss, normaliser)}
    if output.proposals is not None:
        *terms, num_pairs = decoder_loss([output.proposals], targets, *one_to_one, focal_loss,
                                         normaliser)
        parts["encoder"] = Parts(*(cell_weight * term for term in terms), num_pairs)
    return parts


def total(parts):
    """Add up the parts: the one number to minimise."""
    return sum(part.cls + part.l1 + part.giou for part in parts.values())
