"""Right answers to exercise 10, other than the package's: pair by pair."""
import math

import torch


def rank_within_object(quality, gt_idx):
    u, gt = quality.tolist(), gt_idx.tolist()
    ranks = [sum(gt[j] == gt[i] and (u[j] > u[i] or (u[j] == u[i] and j < i))
                 for j in range(len(u))) for i in range(len(u))]
    return torch.tensor(ranks, dtype=torch.int64, device=quality.device)


def ranked_target(scores, ious, gt_idx, tau=1.5):
    u = [max(s ** 0.25 * iou ** 0.75, 0.01) for s, iou in zip(scores.tolist(), ious.tolist())]
    ranks = rank_within_object(scores.new_tensor(u), gt_idx).tolist()
    w = scores.new_tensor([math.exp(-rank / tau) for rank in ranks])
    return scores.new_tensor(u) * w, w
