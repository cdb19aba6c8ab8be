"""train.py, but two-stage queries on deformable attention have their cell's features as content.

    python -m studies.cell_content --preset shapes --model decoupled

On Conditional DETR the content of an anchor comes from the encoder's cell that proposed it. Here
the port of SD-DETR gets the same, in place of a content that is learned for each rank.
Its checkpoint can be read by this program alone.
"""
import torch.nn.functional as F

import train
from detr_min import proposals
from detr_min.run import ending, registry


class CellQueries(proposals.TwoStageQueries):
    """Queries at the encoder's N best boxes, with the detached features of their cells."""

    def __init__(self, num_queries, d_model, num_classes, num_sets):
        super().__init__(num_queries, d_model, num_classes, num_sets)
        self.content = None

    def forward(self, memory):
        """A Memory -> N Queries; all sets have the same content."""
        found = self.mini_detector(memory)
        N, objectness = self.num_queries, found.logits[..., 0]                          # (B, S)
        ref_boxes = self.mini_detector.best(found, N)                                   # (B, N, 4)
        cell = objectness.topk(min(N, objectness.shape[1]), dim=1).indices              # (B, <= N)
        content = memory.tokens.detach().gather(1, cell[..., None].expand(-1, -1, self.d_model))
        content = F.pad(content, (0, 0, 0, N - cell.shape[1]))                          # (B, N, D)
        pos, _ = self.embed(ref_boxes)
        sets = (self.num_sets, -1, -1, -1)
        return proposals.Queries(content.expand(sets), pos.expand(sets), ref_boxes, found)


if __name__ == "__main__":
    registry.QUERIES["deformable"]["two_stage"] = CellQueries
    with ending.in_a_sentence("studies.cell_content"):
        train.main()
