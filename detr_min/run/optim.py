"""AdamW for a detector, and its learning rate as a pure function of the step.

[Deformable DETR Sec. 5], as in the DAC-DETR release. Read after `config.py`.
"""
import math

import torch

SLOW_NAMES = "backbone.", "sampling_offsets", "reference_points"


def make_optimizer(detector, cfg):
    """Make AdamW; backbone and sampling offsets learn at a fraction of the rate, or not at all.

    [Deformable DETR Sec. 5]. With a fraction of 0 their parameters need no gradient any more.
    """
    fast, slow = [], []
    for name, parameter in detector.named_parameters():
        is_slow = any(word in name for word in SLOW_NAMES)
        if is_slow and cfg.slow_lr == 0:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            (slow if is_slow else fast).append(parameter)
    groups = [{"params": fast, "factor": 1.0}, {"params": slow, "factor": cfg.slow_lr}]
    device = next(detector.parameters()).device.type
    return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.recipe.weight_decay,
                             fused=device in ("cpu", "cuda"))       # one loop, not one a tensor


def set_learning_rate(optimizer, step, cfg):
    """A pure function of the step: linear warm-up, then cosine or one drop. Returns the rate."""
    r, share = cfg.recipe, step / cfg.steps
    drop, cosine = 0.1 ** (share >= r.drop_at), 0.5 * (1 + math.cos(math.pi * share))
    decay = cosine if r.decay == "cosine" else drop
    lr = cfg.lr * min(1.0, (step + 1) / (r.warmup + 1)) * decay
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    return lr
