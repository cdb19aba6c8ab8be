"""Deformable DETR as published: its queries, its refinement or none, dropout and first weights.

[Deformable DETR Sec. 4.1, App. A.4]. Its weights load into these, and its rows of the papers'
tables are trained with them. Read `proposals.py` and `decoder_dac.py` before.
"""
import functools

import torch
import torch.nn.functional as F
from torch import nn

from .. import boxes, decoder_base, decoder_dac, proposals


class LearnedQueries(nn.Module):
    """Content, position and a reference point learned for each query: the same for every image.

    [Deformable DETR Sec. 4.1], without two-stage.
    """

    def __init__(self, num_queries, d_model, num_classes, num_sets):
        super().__init__()
        self.num_sets = num_sets
        self.pos_and_content = nn.Parameter(torch.randn(num_queries, 2 * d_model))
        self.reference_points = nn.Linear(d_model, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory):
        """A Memory -> Queries whose references are points, (B, N, 2)"""
        B = memory.tokens.shape[0]
        pos, content = self.pos_and_content.expand(B, -1, -1).chunk(2, dim=-1)           # (B, N, D)
        with torch.autocast(pos.device.type, enabled=False):     # float32: bf16 moves points
            points = self.reference_points(pos).sigmoid()                                # (B, N, 2)
        sets = (self.num_sets, -1, -1, -1)
        return proposals.Queries(content.expand(sets), pos.expand(sets), points, proposals=None)


class UnmixedTwoStageQueries(proposals.TwoStageQueries):
    """Two-stage queries whose content also comes from the box [Deformable DETR App. A.4]."""

    def __init__(self, num_queries, d_model, num_classes, num_sets):
        super().__init__(num_queries, d_model, num_classes, num_sets)
        self.content = None

    def forward(self, memory):
        """A Memory -> N Queries"""
        found = self.mini_detector(memory)
        ref_boxes = self.mini_detector.best(found, self.num_queries)
        pos, content = self.embed(ref_boxes)
        sets = (self.num_sets, -1, -1, -1)
        return proposals.Queries(content.expand(sets), pos.expand(sets), ref_boxes, found)


class FixedReferenceDecoder(decoder_base.Decoder):
    """Deformable DETR without refinement: every layer looks around the same point.

    Differs: each layer has heads of its own; as released they share one.
    """

    def o_decoder(self, queries, memory):
        """Decode Queries and a Memory to Predictions, one per layer; the last is the answer."""
        x, pos, predictions = queries.content[0], queries.pos[0], []
        for layer, class_head, box_head in zip(self.layers, self.class_heads, self.box_heads):
            x = layer.disperse(x, pos, queries.is_blocked)
            x = layer.gather(x, pos, queries.ref_boxes, memory)
            predictions.append(boxes.Predictions(
                class_head(x), boxes.refine(queries.ref_boxes, box_head(x))))
        return predictions


def look_forward_once(decoder, queries, memory, disperse):
    """Run a decoder's layers so that the loss of a layer does not reach the layer before.

    [Deformable DETR App. A.4]  b_l = sigmoid(logit(detached b_(l-1)) + delta_l)

    Args:
        decoder   a decoder_base.Decoder or decoder_dac.DACDecoder
        queries   Queries; memory a Memory
        disperse  (layer, (B, N, D)) -> (B, N, D), what comes before cross-attention
    Returns:
        [Predictions], one per layer; the boxes are those of the decoder's own pass
    """
    x, pos, ref_boxes, predictions = queries.content[0], queries.pos[0], queries.ref_boxes, []
    for layer, class_head, box_head in zip(decoder.layers, decoder.class_heads, decoder.box_heads):
        x = layer.gather(disperse(layer, x), pos, ref_boxes, memory)                # (B, N, D)
        found = boxes.refine(ref_boxes, box_head(x))                                # (B, N, 4)
        predictions.append(boxes.Predictions(class_head(x), found))
        ref_boxes = found.detach()
    return predictions


class OnceDecoder(decoder_base.Decoder):
    """Deformable DETR with refinement, before DINO's "look forward twice"."""

    def o_decoder(self, queries, memory):
        """Decode Queries and a Memory to [Predictions], one per layer; the last is the answer."""
        return look_forward_once(
            self, queries, memory,
            lambda layer, x: layer.disperse(x, queries.pos[0], queries.is_blocked))


class OnceDACDecoder(decoder_dac.DACDecoder):
    """DAC-DETR's two passes on that decoder, as in the first rows of its Table 1."""

    o_decoder = OnceDecoder.o_decoder

    def c_decoder(self, queries, memory):
        """[DAC Eq. 3]  Decode without self-attention. In training only."""
        return look_forward_once(self, queries, memory, lambda layer, x: x)


def propose_padding(mini_detector):
    """Let cells of padding become queries and train them, as the authors' code does; in place.

    They count as cells at the rim of the picture, with box (1, 1, 1, 1).
    """
    mini_detector.register_forward_pre_hook(without_mask)


def without_mask(part, inputs):
    """For a part's only input, a Memory: the same, without padding."""
    [memory] = inputs
    return memory._replace(is_pad=torch.zeros_like(memory.is_pad)),


def add_dropout(detector, share):
    """Drop a share of what attention and FFNs of a detector put out, in training; in place.

    As in Deformable DETR's code: after every attention, after the FFN and after its ReLU, and of
    the weights of self-attention. No parameter is added or renamed.
    """
    for name, part in [*detector.encoder.named_modules(), *detector.decoder.named_modules()]:
        if name.endswith((".attn", ".self_attn", ".cross_attn", ".ffn", ".ffn.1")):
            part.register_forward_hook(functools.partial(drop, share))
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = share


def drop(share, part, inputs, output):
    """For the output of a part: the same with dropout, in training."""
    if isinstance(output, tuple):                               # nn.MultiheadAttention
        return F.dropout(output[0], share, part.training), output[1]
    return F.dropout(output, share, part.training)


def start_as_published(detector):
    """Draw first weights as Deformable DETR's and DAC-DETR's code do, in place.

    The matrices of FFNs, of self-attention's output and of the two-stage projections are
    Xavier-uniform. All class heads start equal, the encoder's among them; so do the box heads.
    """
    for name, part in detector.named_modules():
        if name.endswith((".ffn.0", ".ffn.2", ".self_attn.out_proj", ".project", ".pos_project")):
            nn.init.xavier_uniform_(part.weight)
    of_encoder = getattr(detector.queries, "mini_detector", None)
    for kind in ("class_head", "box_head"):
        first, *others = getattr(detector.decoder, f"{kind}s")
        for head in others + ([getattr(of_encoder, kind)] if of_encoder else []):
            head.load_state_dict(first.state_dict())
