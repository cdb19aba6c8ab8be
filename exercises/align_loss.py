"""To fill in: exercise 10 of exercises/README.md. Graded by

    pytest --mine align_loss.rank_within_object
    pytest --mine align_loss.ranked_target
"""
import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
from detr_min import boxes, criterion, tal_loss  # noqa: F401
from detr_min.release import dac_release  # noqa: F401
from detr_min.release import align_loss  # noqa: F401


def rank_within_object(quality, gt_idx):
    """Count the better pairs of the same object: 0 for its best. Of equals the earlier is better.

    rank[i] = #{j : gt[j] = gt[i], and u[j] > u[i] or (u[j] = u[i] and j < i)}

    Args:
        quality  u  (P,)  higher is better
        gt_idx      (P,)  the object of each pair; sorted by query, so ties go to the lower query
    Returns:
        (P,) int64
    """
    raise NotImplementedError(
        "exercise 10, align_loss.rank_within_object: "
        "return how many pairs of the same object are better than each pair")


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
    raise NotImplementedError(
        "exercise 10, align_loss.ranked_target: "
        "return the target and the weight of each pair")
