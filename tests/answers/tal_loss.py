"""Right answers to exercise 9, other than the package's: logarithms, and two sums."""
import torch
import torch.nn.functional as F


def aligned_target(scores, ious, alpha=0.25, beta=0.75):
    with torch.no_grad():
        return torch.pow(scores, alpha) * torch.pow(ious, beta)


def tal_loss(logits, targets, gamma=2.0):
    t, s = targets.detach(), logits.sigmoid()
    cross_entropy = -(t * F.logsigmoid(logits) + (1 - t) * F.logsigmoid(-logits))
    is_positive = t > 0
    positive = ((t - s).abs() ** gamma * cross_entropy)[is_positive].sum()
    negative = (s ** gamma * cross_entropy)[~is_positive].sum()
    return positive + negative
