"""The loss of the "DAC-DETR + Align" rows: scores learn the IoU, an object's best query most.

[Align-DETR Eq. 4-7], with the constants of the DAC-DETR release (`--loss align`). A sibling of
SD-DETR's: the same target [SD Eq. 6], then discounted by rank. Pure functions. Read `tal_loss.py`
and `criterion.py` before.
"""
import torch
import torch.nn.functional as F

from .. import boxes, criterion, tal_loss
from . import dac_release


def rank_within_object(quality, gt_idx):
    """Count the better pairs of the same object: 0 for its best. Of equals the earlier is better.

    rank[i] = #{j : gt[j] = gt[i], and u[j] > u[i] or (u[j] = u[i] and j < i)}

    Args:
        quality  u  (P,)  higher is better
        gt_idx      (P,)  the object of each pair; sorted by query, so ties go to the lower query
    Returns:
        (P,) int64
    """
    order = torch.arange(len(quality), device=quality.device)
    is_better = quality > quality[:, None]                                              # (P, P)
    is_earlier = (quality == quality[:, None]) & (order < order[:, None])
    return ((gt_idx == gt_idx[:, None]) & (is_better | is_earlier)).sum(1)


def ranked_target(scores, ious, gt_idx, tau=1.5):
    """Compute the score that each pair should have, and how much the pair counts.

    [Align-DETR Eq. 4-7]  u = s^.25 IoU^.75    w = exp(-rank / tau)    y = u w

    u is at least .01, as in Align-DETR's code.
    One pair an object, as in one-to-one assignment, has rank 0 and w = 1; six have w = 1, .51, .26,
    .14, .07, .04.

    Args:
        scores  s    (P,)  probability of the object's class, in [0, 1]
        ious    IoU  (P,)  of the same layer's box with the object, in [0, 1]
        gt_idx       (P,)  the object of each pair; sorted by query
    Returns:
        y (P,) in (0, 1] and w (P,) in (0, 1], both without gradient and of the scores' dtype
    """
    quality = tal_loss.aligned_target(scores, ious).clamp(min=0.01)
    weights = torch.exp(-rank_within_object(quality, gt_idx).to(quality.dtype) / tau)
    return quality * weights, weights


def align_loss(logits, targets):
    """Compute cross-entropy to a soft target; other entries are pushed down as they are wrong.

    [Align-DETR Eq. 4-7]  L = sum over entries of  -a log p - b log(1 - p),    p = sigmoid(z)
        matched, y > 0:  a = y,  b = 1 - y      (no focal factor)
        elsewhere:       a = 0,  b = p^2        (not detached)

    Args:
        logits   z  (N, C)  before the sigmoid
        targets  y  (N, C)  in [0, 1]; 0 for everything that is not matched
    Returns:
        scalar, a sum; the caller divides. Finite for any finite logit, unlike the release's, which
        takes the logarithm of a sigmoid that may be 0.
    """
    b = torch.where(targets > 0, 1 - targets, logits.sigmoid() ** 2)                    # (N, C)
    return -(targets * F.logsigmoid(logits) + b * F.logsigmoid(-logits)).sum()


def layer_loss(layer, pairs):
    """Compute the loss of one decoder layer. Arguments and result as criterion.focal_loss.

    [Align-DETR Eq. 4-7]  L_cls + 5 * sum_pairs w |b - g|_1 + 2 * sum_pairs w (1 - GIoU(b, g))

    A query may serve two objects, as the release's one-to-many rule has it.
    """
    place = pairs.image_idx, pairs.query_idx, pairs.labels
    ious = boxes.paired_iou(layer.boxes[place[:2]], pairs.boxes)                        # (P,)
    soft_targets, weights = ranked_target(layer.logits[place].detach().sigmoid(), ious,
                                          pairs.object_idx)
    kept = dac_release.is_last_claim(pairs)
    wanted = torch.zeros_like(layer.logits)                                             # (B, N, C)
    wanted[tuple(index[kept] for index in place)] = soft_targets[kept]
    return align_loss(layer.logits, wanted), *criterion.box_loss(layer, pairs, weights)
