"""To fill in: exercise 7 of exercises/README.md. Graded by

    pytest --mine decoder_decoupled.DecoderLayer.disperse
    pytest --mine decoder_decoupled.DecoderLayer.gather
"""
import torch  # noqa: F401
from torch import nn  # noqa: F401
from detr_min import attention_conditional, boxes  # noqa: F401
from detr_min import decoder_conditional, encoder_conditional, proposals  # noqa: F401


class DecoderLayer:
    # its other parts: detr_min/decoder_decoupled.py

    def disperse(self, queries, query_pos):
        """Self-attention over the tokens of both tasks. (B, 2N, D) -> (B, 2N, D)

        [SD Eq. 3]  self-att(cat(Q_cls, Q_loc)), joined as 2N tokens of width D

        Nothing marks a token's task. If the two tokens of each pair are equal, every key and value
        occurs twice, softmax's mean stays the same, and this is the plain decoder's self-attention.
        """
        raise NotImplementedError(
            "exercise 7, decoder_decoupled.DecoderLayer.disperse: "
            "return what one self-attention over the tokens of both tasks makes of them")

    def gather(self, queries, query_pos, spatial, memory):
        """Split the tokens; each task reads the image on its own. (B, 2N, D) -> (B, 2N, D)

        After [SD Eq. 3]  cat(FFN_cls(cross-att_cls(Q_cls)), FFN_loc(cross-att_loc(Q_loc)))
        """
        raise NotImplementedError(
            "exercise 7, decoder_decoupled.DecoderLayer.gather: "
            "return what each task's own branch makes of its half of the tokens")
