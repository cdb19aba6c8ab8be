"""To fill in: exercises 3, 4, 5 of exercises/README.md. Graded by

    pytest --mine matcher.match_cost
    pytest --mine matcher.one_to_one
    pytest --mine matcher.match_quality
    pytest --mine matcher.one_to_many
"""
import torch  # noqa: F401
from scipy.optimize import linear_sum_assignment  # noqa: F401
from detr_min import boxes  # noqa: F401


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
    raise NotImplementedError(
        "exercise 3, matcher.match_cost: "
        "return the (N, M) cost of every prediction for every object")


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
    raise NotImplementedError(
        "exercise 3, matcher.one_to_one: "
        "return the cheapest assignment, by trying every one or with scipy")


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
    raise NotImplementedError(
        "exercise 4, matcher.match_quality: "
        "return the (N, M) quality of every prediction for every object")


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
    raise NotImplementedError(
        "exercise 5, matcher.one_to_many: "
        "return the pairs that pass the threshold, the top k and the best object")
