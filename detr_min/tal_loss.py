"""Task alignment learning (TAL): the class score learns how well the box fits.

[SD Eq. 6-7]. SD-DETR's classification loss; it works with every decoder here (`--loss tal`) and
sends no gradient to the boxes. Pure functions. Read `query_gen.py` before and `criterion.py` after.
"""
import torch.nn.functional as F


def aligned_target(scores, ious, alpha=0.25, beta=0.75):
    """Compute the score that a matched query should have, given how well its box fits.

    [SD Eq. 6]  t = s^alpha * u^beta

    With alpha + beta = 1, as here, t = s exactly where s = u: the score is drawn to the IoU, and
    s^alpha only makes the climb gradual. The paper prints the formula. The values of alpha, of beta
    and of gamma below come from a reader's note on the web (docs/differences.md 21).

    Args:
        scores  s  (P,)  probability of the object's class, in [0, 1]
        ious    u  (P,)  IoU of the same layer's box with the object, in [0, 1]
    Returns:
        t  (P,), in [0, 1], without gradient
    """
    return scores.detach() ** alpha * ious.detach() ** beta


def tal_loss(logits, targets, gamma=2.0):
    """Compute cross-entropy to a soft target, weighted by distance^gamma. Lower is better.

    [SD Eq. 7]  L = sum_pos |t - s|^gamma BCE(s, t) + sum_neg s^gamma BCE(s, 0),    s = sigmoid(z)

    One expression covers both sums: a negative is an entry with t = 0, and |0 - s| = s.

    Args:
        logits   z  (N, C)  before the sigmoid
        targets  t  (N, C)  in [0, 1]; 0 for every negative; no gradient flows into it
    Returns:
        scalar, a sum; the caller divides by the number of objects. Finite for any finite logit.
    As printed. Left open by the equation: here gradients pass through |t - s|^gamma, as in focal
    loss, and the caller keeps t at .01 or more.
    """
    targets = targets.detach()
    weight = (targets - logits.sigmoid()).abs() ** gamma                            # (N, C)
    return (weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")).sum()
