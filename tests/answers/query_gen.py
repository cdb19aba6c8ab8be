"""A right answer to exercise 8, other than the package's: four cells a point, gathered."""
import torch

from detr_min import boxes


def points_to_query(features, points, ref_boxes):
    P, D, size, _ = features.shape
    cell = ((points + 1) / 2 * size - 0.5).clamp(0, size - 1)                   # (P, M, 2)
    low = cell.detach().floor().clamp(max=size - 2)
    share = cell - low
    (x, y), box = low.long().unbind(-1), torch.arange(P)[:, None]
    (right, down), content = share[..., None].unbind(-2), 0
    for i, share_y in ((y, 1 - down), (y + 1, down)):
        for j, share_x in ((x, 1 - right), (x + 1, right)):
            content = content + share_y * share_x * features[box, :, i, j]      # (P, M, D)
    x = ref_boxes[:, None, 0] + points[..., 0] * ref_boxes[:, None, 2] * 0.5
    y = ref_boxes[:, None, 1] + points[..., 1] * ref_boxes[:, None, 3] * 0.5
    pos = torch.cat([boxes.sine(y, D // 2), boxes.sine(x, D // 2)], dim=-1)
    return content.sum(1) / points.shape[1], pos.sum(1) / points.shape[1]
