"""Weights of Conditional DETR, as its authors published them, under our names.

As `published.py`, with another table of names. No tensor's shape tells DC5 from R50: the file's
`args.dilation` does, or whoever loads it.
"""
from . import published

NAMES = """
backbone                                backbone.0
projections.conv                        input_proj
queries.pos                             query_embed.weight
queries.reference.0                     transformer.decoder.ref_point_head.layers.0
queries.reference.2                     transformer.decoder.ref_point_head.layers.1

encoder.layers.{l}.attn                 transformer.encoder.layers.{l}.self_attn
encoder.layers.{l}.norm_attn            transformer.encoder.layers.{l}.norm1
encoder.layers.{l}.ffn.0                transformer.encoder.layers.{l}.linear1
encoder.layers.{l}.ffn.3                transformer.encoder.layers.{l}.linear2
encoder.layers.{l}.norm_ffn             transformer.encoder.layers.{l}.norm2

decoder.layers.{l}.self_attn.q_content  transformer.decoder.layers.{l}.sa_qcontent_proj
decoder.layers.{l}.self_attn.q_pos      transformer.decoder.layers.{l}.sa_qpos_proj
decoder.layers.{l}.self_attn.k_content  transformer.decoder.layers.{l}.sa_kcontent_proj
decoder.layers.{l}.self_attn.k_pos      transformer.decoder.layers.{l}.sa_kpos_proj
decoder.layers.{l}.self_attn.v_proj     transformer.decoder.layers.{l}.sa_v_proj
decoder.layers.{l}.self_attn.out_proj   transformer.decoder.layers.{l}.self_attn.out_proj
decoder.layers.{l}.norm_self            transformer.decoder.layers.{l}.norm1
decoder.layers.{l}.cross_attn.q_content transformer.decoder.layers.{l}.ca_qcontent_proj
decoder.layers.{l}.cross_attn.q_pos     transformer.decoder.layers.{l}.ca_qpos_proj
decoder.layers.{l}.cross_attn.q_spatial transformer.decoder.layers.{l}.ca_qpos_sine_proj
decoder.layers.{l}.cross_attn.k_content transformer.decoder.layers.{l}.ca_kcontent_proj
decoder.layers.{l}.cross_attn.k_pos     transformer.decoder.layers.{l}.ca_kpos_proj
decoder.layers.{l}.cross_attn.v_proj    transformer.decoder.layers.{l}.ca_v_proj
decoder.layers.{l}.cross_attn.out_proj  transformer.decoder.layers.{l}.cross_attn.out_proj
decoder.layers.{l}.norm_cross           transformer.decoder.layers.{l}.norm2
decoder.layers.{l}.ffn.0                transformer.decoder.layers.{l}.linear1
decoder.layers.{l}.ffn.3                transformer.decoder.layers.{l}.linear2
decoder.layers.{l}.norm_ffn             transformer.decoder.layers.{l}.norm3

decoder.query_scale.0                   transformer.decoder.query_scale.layers.0
decoder.query_scale.2                   transformer.decoder.query_scale.layers.1
decoder.norm                            transformer.decoder.norm
decoder.class_head                      class_embed
decoder.box_head.0                      bbox_embed.layers.0
decoder.box_head.2                      bbox_embed.layers.1
decoder.box_head.4                      bbox_embed.layers.2
"""


def recognises(content):
    """Whether a file's content is, or holds as "model", a state dict of Conditional DETR."""
    return any(".ca_qcontent_proj." in key for key in published.state_of(content))


def settings_of(theirs, args, dc5):
    """Read the preset and its changes, a dict, off a published state dict's shapes.

    Args:
        theirs  {their name: tensor}
        args    their command line as a dict; it may hold nheads (else 8) and dilation
        dc5     True: the file is of a DC5 model, where args do not say so
    Raises:
        KeyError, ValueError: what tells a size is missing or odd, and is named
    """
    layers = "transformer.encoder.layers."
    [d_ffn] = published.shape_of(theirs, f"{layers}0.linear1.bias", 1)
    [num_classes] = published.shape_of(theirs, "class_embed.bias", 1)
    num_queries, d_model = published.shape_of(theirs, "query_embed.weight", 2)
    is_dc5 = bool(args.get("dilation", dc5))
    if dc5 and not is_dc5:
        raise ValueError("dilation=False in its args, so it is no DC5 model: leave out --dc5. It")
    return dict(
        name="paper_conditional_dc5" if is_dc5 else "paper_conditional_r50", batch=2,
        d_model=d_model, num_heads=published.number_of(args, "nheads", 8), d_ffn=d_ffn,
        encoder_layers=published.count(theirs, layers),
        decoder_layers=published.count(theirs, "transformer.decoder.layers."),
        num_queries=num_queries, num_classes=num_classes)
