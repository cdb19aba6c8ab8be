"""DAC-DETR as the authors' code has it: the C-Decoder starts after the first self-attention.

After [DAC Eq. 3]. Of the paper's drawing [DAC Fig. 2] this differs in one place, the start of the
C-Decoder; what else the release does differently is in `matcher.one_to_many_release` and
`criterion.release_assignment`. Read `decoder_dac.py` before.
"""
from . import decoder_dac


class DACReleaseDecoder(decoder_dac.DACDecoder):
    """The weights and the O-Decoder of DACDecoder; the C-Decoder follows one self-attention."""

    def c_decoder(self, queries, memory):
        """Queries and a Memory -> [Predictions], one a layer; the first is the O-Decoder's.

        DEVIATION from [DAC Eq. 3]: x starts as what layer 1's self-attention and norm make of the
        queries, so layer 1 says the same in both decoders and gets labels of both kinds. From layer
        2 on no query sees another, but through that start each knows of all.
        """
        x = self.layers[0].disperse(queries.content[0], queries.pos[0], queries.is_blocked)
        return super().c_decoder(queries._replace(content=x[None]), memory)

    def both_decoders(self, queries, memory):
        """o_decoder and c_decoder, one after the other."""
        return self.o_decoder(queries, memory), self.c_decoder(queries, memory)
