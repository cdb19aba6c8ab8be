"""Label assignment: which query learns which object, one-to-one or one-to-many.

[DETR Eq. 1] for the O-Decoder, [DAC Eq. 4] for the C-Decoder. Pure functions of one image, which
`criterion.decoder_loss` calls without gradient. A cost is minimised, a quality is maximised. Read
`decoder_dac.py` before and, for the loss, `criterion.py` after.
"""
import torch
from scipy.optimize import linear_sum_assignment

from . import boxes


def match_cost(logits, pred_boxes, gt_labels, gt_boxes):
    """Compute how badly prediction i explains object j. Lower is better.

    [DETR Eq. 1], [Deformable DETR Sec. 5]
        cost[i, j] = 2 (focal_1(p) - focal_0(p)) + 5 |b_i - g_j|_1 - 2 GIoU(b_i, g_j),  p = p_i[c_j]
        focal_1(p) = -.25 (1-p)^2 log p    focal_0(p) = -.75 p^2 log(1-p)
    focal_1 is the focal loss of this logit if it is labelled 1, focal_0 if 0: the class term is
    what the classification loss gains or loses by the match. 1e-8 is added inside each logarithm,
    as released.

    Args:
        logits      z  (N, C)  before the sigmoid; p = sigmoid(z)
        pred_boxes  b  (N, 4)  cxcywh, in [0, 1] of image size
        gt_labels   c  (M,)    int64 class ids in [0, C)
        gt_boxes    g  (M, 4)  cxcywh, in [0, 1] of image size
    Returns:
        (N, M); an image without objects gives (N, 0)
    """
    p = logits[:, gt_labels].sigmoid()                                              # (N, M)
    focal_1 = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    focal_0 = 0.75 * p ** 2 * -(1 - p + 1e-8).log()
    l1 = torch.cdist(pred_boxes, gt_boxes, p=1)                                       # (N, M)
    return 2 * (focal_1 - focal_0) + 5 * l1 - 2 * boxes.giou(pred_boxes, gt_boxes)


def one_to_one(cost):
    """Assign one query to each object, at the least total cost; no query serves two objects.

    [DETR Eq. 1]  argmin over sigma of  sum_j cost[sigma(j), j]       (Hungarian method, scipy)

    Args:
        cost  (N, M)  on any device
    Returns:
        query_idx, gt_idx, int64 (M,) each, sorted by query; empty for an image without objects
    Raises:
        ValueError: fewer queries than objects, or a cost that is not finite
    """
    num_queries, num_objects = cost.shape
    if num_objects > num_queries:
        raise ValueError(f"{num_objects} objects but only {num_queries} queries, so some would go "
                         "without: take a preset of more queries, or larger images for more cells")
    if not cost.isfinite().all():
        raise ValueError("the matching cost is not finite: a logit or box of the model is NaN or "
                         "infinite, most often after a learning rate too high")
    rows, columns = linear_sum_assignment(cost.detach().cpu().numpy())
    query_idx, gt_idx = torch.as_tensor(rows), torch.as_tensor(columns)             # (M,), (M,)
    return query_idx.to(cost.device), gt_idx.to(cost.device)


def match_quality(probs, pred_boxes, gt_labels, gt_boxes, class_weight=0.3, iou_weight=0.7):
    """Compute how well prediction i explains object j. Higher is better.

    [DAC Eq. 4]  quality[i, j] = class_weight * p_i[c_j] + iou_weight * IoU(b_i, g_j)

    Args:
        probs       p  (N, C)  class probabilities in [0, 1] (after the sigmoid, not logits)
        pred_boxes  b  (N, 4)  cxcywh, in [0, 1] of image size
        gt_labels   c  (M,)    int64 class ids in [0, C)
        gt_boxes    g  (M, 4)  cxcywh, in [0, 1] of image size
        class_weight, iou_weight   dimensionless
    Returns:
        (N, M), in [0, class_weight + iou_weight]; an image without objects gives (N, 0)
    Raises:
        ValueError: probs outside [0, 1], which almost always means that logits were passed
    Differs: the paper prints weights 1 and 1; the release and we use .3 and .7.
    """
    if probs.numel() and (probs.min() < 0 or probs.max() > 1):
        raise ValueError(f"probs must be in [0, 1], got [{probs.min():.2f}, {probs.max():.2f}]: "
                         "logits?")
    class_term = probs[:, gt_labels]                                                # (N, M)
    return class_weight * class_term + iou_weight * boxes.iou(pred_boxes, gt_boxes)


def one_to_many(quality, threshold=0.4, k=6):
    """Assign up to k queries to each object; a query serves one object at most.

    After [DAC Eq. 4], whose M is `quality` here:  i is positive for j  <=>  quality[i, j] >=
    threshold, i is among the k best of column j, and (ours) j is the best of row i. The k best are
    chosen first, so one that prefers another object is not replaced. Ties go to the lower index.
    An object whose qualities all stay below the threshold gets no query.

    Args:
        quality     (N, M)  higher is better
        threshold   in the unit of quality; .4 is the release's, the paper's own is not known to us
        k           the most queries that an object gets; 6 is the release's
    Returns:
        query_idx, gt_idx, int64 (P,) each, sorted by query; P = 0 is normal
    Differs: as we read the paper, a query may serve two objects; here it serves one, because it has
        only one box. The release has its own rule, `release.dac_release.one_to_many`; the
        comparison >= is from there.
    """
    best_first = quality.sort(dim=0, descending=True, stable=True).indices[:k]      # (k, M)
    is_positive = torch.zeros_like(quality, dtype=torch.bool).scatter_(0, best_first, True)
    is_positive &= quality >= threshold                                             # (N, M)
    # sort, not argmax, which refuses an image without objects
    best_object = quality.sort(dim=1, descending=True, stable=True).indices[:, :1]  # (N, 1)
    is_own = torch.zeros_like(is_positive).scatter_(1, best_object, True)
    return (is_positive & is_own).nonzero(as_tuple=True)
