"""Right answers to exercise 1, other than the package's: no torchvision, numbers one by one."""
import torch


def giou(boxes, others):
    x0, y0 = (boxes[:, 0] - boxes[:, 2] / 2)[:, None], (boxes[:, 1] - boxes[:, 3] / 2)[:, None]
    x1, y1 = (boxes[:, 0] + boxes[:, 2] / 2)[:, None], (boxes[:, 1] + boxes[:, 3] / 2)[:, None]
    u0, v0 = others[:, 0] - others[:, 2] / 2, others[:, 1] - others[:, 3] / 2
    u1, v1 = others[:, 0] + others[:, 2] / 2, others[:, 1] + others[:, 3] / 2
    both = ((torch.minimum(x1, u1) - torch.maximum(x0, u0)).clamp(min=0)
            * (torch.minimum(y1, v1) - torch.maximum(y0, v0)).clamp(min=0))
    either = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - both
    hull = ((torch.maximum(x1, u1) - torch.minimum(x0, u0))
            * (torch.maximum(y1, v1) - torch.minimum(y0, v0)))
    return both / either - (hull - either) / hull


def refine(ref_boxes, delta):
    p = ref_boxes.clamp(1e-5, 1 - 1e-5)
    odds = p / (1 - p)
    if ref_boxes.shape[-1] == 2:
        odds = torch.cat([odds, torch.ones_like(odds)], dim=-1)
    return 1 / (1 + torch.exp(-delta) / odds)
