"""train.py, but with both kinds of labels for one decoder's predictions.

    python -m studies.one_stack --preset shapes --model deformable

DAC-DETR gives its one-to-many labels to a second pass without self-attention. Here the plain
decoder's own predictions are trained one-to-one and one-to-many at once. Its checkpoint is that
of a plain decoder.
"""
import train
from detr_min import decoder_base
from detr_min.run import ending, registry


class OneStack(decoder_base.Decoder):
    """Deformable DETR's decoder; its layers also get DAC-DETR's one-to-many loss [DAC Eq. 4]."""

    def c_decoder(self, queries, memory):
        """The predictions that `o_decoder` makes, self-attention included. In training only."""
        return self.o_decoder(queries, memory)


if __name__ == "__main__":
    registry.DECODERS["deformable"]["deformable"] = OneStack
    with ending.in_a_sentence("studies.one_stack"):
        train.main()
