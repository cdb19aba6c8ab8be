"""DAC-DETR as the authors' code has it: its C-Decoder, its assignment, and the loss over both.

After [DAC Eq. 3-4]. The C-Decoder starts after the first self-attention; its pairs are chosen by
another rule, from the C-Decoder's scores and the O-Decoder's boxes. Read `decoder_dac.py`,
`matcher.py` and `criterion.py` before.
"""
import torch

from .. import criterion, decoder_dac


class DACReleaseDecoder(decoder_dac.DACDecoder):
    """The weights and the O-Decoder of DACDecoder; the C-Decoder follows one self-attention."""

    def c_decoder(self, queries, memory):
        """Decode Queries and a Memory to Predictions, one per layer; the first is the O-Decoder's.

        Differs from [DAC Eq. 3]: x starts as the output of layer 1's self-attention and norm, so
        layer 1 predicts the same in both decoders and gets labels of both kinds. From layer 2 on no
        query sees another, but through that start each knows of all.
        """
        x = self.layers[0].disperse(queries.content[0], queries.pos[0], queries.is_blocked)
        return super().c_decoder(queries._replace(content=x[None]), memory)


def one_to_many(quality, threshold=0.4, k=6):
    """Assign queries to objects by the rule of the authors' code. A query may serve two objects.

    After [DAC Eq. 4]. Each query belongs to the object it explains best, and it is positive if that
    quality reaches the threshold, or if it is some object's best query. An object that owns c
    positives gets its min(c, k) best queries, even if they belong to other objects. So an object
    whose best query belongs to another may get none, and a query may serve two objects. Ties go to
    the lower index.

    Args:
        quality  M  (N, M)  higher is better
        threshold   in the unit of M
        k           most queries an object gets
    Returns:
        query_idx, gt_idx, int64 (P,) each, sorted by query, then by object; P = 0 without objects
    Differs: the release first drops all but a random 75 positives (a quarter of 300, whatever N
        is). Up to 75 the pairs are the same; beyond, objects lose pairs there by
        chance, while here all positives stay and the answer is deterministic.
    """
    owner = quality.sort(dim=1, descending=True, stable=True).indices[:, :1]    # (N, 1); or (N, 0)
    best_first = quality.sort(dim=0, descending=True, stable=True).indices[:k]  # (min(k, N), M)
    is_positive = quality.gather(1, owner) >= threshold                         # (N, 1)
    is_positive[best_first[:1].flatten()] = True
    owned = torch.zeros_like(quality, dtype=torch.long).scatter_(1, owner, is_positive.long())
    rank = torch.arange(len(best_first), device=quality.device)[:, None]
    is_pair = torch.zeros_like(quality, dtype=torch.bool)
    is_pair.scatter_(0, best_first, rank < owned.sum(0))
    return is_pair.nonzero(as_tuple=True)


def is_last_claim(pairs):
    """Mark the pairs whose class target is written. criterion.Pairs -> (P,) bool

    A query may serve two objects. If their classes differ, both are learned. If not, they share one
    entry of the target: the release writes it twice and the later object's value stays. Here only
    that one is written, so the result does not depend on the order of writing.
    """
    place = torch.stack([pairs.image_idx, pairs.query_idx, pairs.labels])               # (3, P)
    same = (place[:, :, None] == place[:, None]).all(0)                                 # (P, P)
    return ~same.triu(1).any(1)


def detection_loss(output, targets, num_objects, layer_loss=criterion.focal_loss):
    """criterion.detection_loss with the release's pairs for the C-Decoder.

    They follow from the C-Decoder's scores and the O-Decoder's boxes, of the same query and layer.
    """
    parts = criterion.detection_loss(output._replace(c_decoder=[]), targets, num_objects,
                                     layer_loss)
    if output.c_decoder:
        mixed = [c._replace(boxes=o.boxes) for o, c in zip(output.o_decoder, output.c_decoder)]
        parts["C"] = criterion.decoder_loss(
            output.c_decoder, targets, criterion.quality, one_to_many, layer_loss,
            max(criterion.C_NORMALISER * num_objects, 1.0), judged=mixed)
    return parts
