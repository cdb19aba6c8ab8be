"""Right answers to exercise 7, other than the package's: a mask tile by tile, slices for chunks."""
import torch


class DecoderLayer:
    def disperse(self, queries, query_pos, is_blocked=None):
        mask = None
        if is_blocked is not None:
            row = torch.cat([is_blocked, is_blocked], dim=1)
            mask = torch.cat([row, row], dim=0)
        where = query_pos + queries
        read = self.self_attn(query=where, key=where, value=queries, attn_mask=mask)[0]
        return self.norm_self(read + queries)

    def gather(self, queries, query_pos, ref_boxes, memory):
        N, halves = ref_boxes.shape[1], []
        for branch, part in ((self.cls, slice(0, N)), (self.loc, slice(N, 2 * N))):
            halves.append(branch.gather(queries[:, part], query_pos[:, part], ref_boxes, memory))
        return torch.cat(halves, dim=1)
