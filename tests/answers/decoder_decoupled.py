"""Right answers to exercise 7, other than the package's: slices for chunks, names written out."""
import torch


class DecoderLayer:
    def disperse(self, queries, query_pos):
        read = self.self_attn(queries=queries, query_pos=query_pos)
        return self.norm_self(self.drop(read) + queries)

    def gather(self, queries, query_pos, spatial, memory):
        N, halves = queries.shape[1] // 2, []
        for branch, part in ((self.cls, slice(0, N)), (self.loc, slice(N, 2 * N))):
            halves.append(branch.gather(queries[:, part], query_pos[:, part], spatial[:, part],
                                        memory))
        return torch.cat(halves, dim=1)
