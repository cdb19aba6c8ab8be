"""SD-DETR on deformable attention: one self-attention, a cross-attention for each task [SD Eq. 3].

Everything in float64, on two feature levels; the second image is padded.
"""
import math

import pytest
import torch
import torchvision.ops as ops
from torch.testing import assert_close
from torchvision.ops.poolers import LevelMapper

import helpers
from detr_min import boxes, decoder_base, query_gen
from detr_min import decoder_decoupled_deformable as decoupled
from helpers import EXACT, f64, memory_of, padded_memory, random, reordered, shaken

SHAPE = dict(d_model=32, num_heads=4, num_levels=2, num_points=2, d_ffn=48)
SIZES = dict(num_layers=3, num_classes=3, **SHAPE)
N = 6


def a_memory():
    return padded_memory(32, [(6, 8), (3, 4)])


def some_queries():
    return helpers.some_queries(32, N, T=2)


@pytest.fixture
def decoder(generator):
    return shaken(decoupled.DACDecoupledDecoder(**SIZES), generator)


def gradient_sizes(number, module):
    """Name -> largest absolute gradient of a number in that parameter; 0 where there is none."""
    names, parameters = zip(*module.named_parameters())
    gradients = torch.autograd.grad(number, parameters, retain_graph=True, allow_unused=True)
    return {n: 0.0 if g is None else g.abs().max().item() for n, g in zip(names, gradients)}


def within(sizes, prefix):
    found = [size for name, size in sizes.items() if prefix in name]
    assert found, prefix
    return found


# --- by definition [SD Eq. 3] ---------------------------------------------------------------------

def test_o_decoder_by_definition(decoder):
    """[SD Eq. 3] {self-att(cat(Q_cls, Q_loc)), cross-att_t(Q_t), FFN_t(Q_t)} x L, written out."""
    queries, memory = some_queries(), a_memory()
    (x_cls, x_loc), (pos_cls, pos_loc), ref = queries.content, queries.pos, queries.ref_boxes
    for depth, (layer, p) in enumerate(zip(decoder.layers, decoder.o_decoder(queries, memory))):
        x = torch.cat([x_cls, x_loc], dim=1)                            # 2N tokens of width D
        pos = torch.cat([pos_cls, pos_loc], dim=1)
        x = layer.norm_self(x + layer.self_attn(x + pos, x + pos, x)[0])
        x_cls, x_loc = x[:, :N], x[:, N:]
        x_cls = layer.cls.norm_cross(x_cls + layer.cls.cross_attn(x_cls + pos_cls, ref, memory))
        x_loc = layer.loc.norm_cross(x_loc + layer.loc.cross_attn(x_loc + pos_loc, ref, memory))
        x_cls = layer.cls.norm_ffn(x_cls + layer.cls.ffn(x_cls))
        x_loc = layer.loc.norm_ffn(x_loc + layer.loc.ffn(x_loc))
        ref = torch.sigmoid(torch.log(ref / (1 - ref)) + decoder.box_heads[depth](x_loc))
        expected = boxes.Predictions(decoder.class_heads[depth](x_cls), ref)
        assert_close(p, expected, **EXACT)
        assert p.logits.shape == (2, N, 3)                                  # N answers, never 2N


def test_c_decoder_by_definition(decoder):
    """[DAC Eq. 3] over [SD Eq. 3]  The same without self-attention. In neither paper."""
    queries, memory = some_queries(), a_memory()
    x, ref = list(queries.content), queries.ref_boxes
    for depth, (layer, p) in enumerate(zip(decoder.layers, decoder.c_decoder(queries, memory))):
        x = [branch.gather(x_t, pos_t, ref, memory)
             for branch, x_t, pos_t in zip((layer.cls, layer.loc), x, queries.pos)]
        ref = torch.sigmoid(torch.log(ref / (1 - ref)) + decoder.box_heads[depth](x[1]))
        expected = boxes.Predictions(decoder.class_heads[depth](x[0]), ref)
        assert_close(p, expected, **EXACT)


def test_split_decoder_is_two_decoders(generator):
    """[SD Eq. 2]  Logits from whole baseline layers on one set, boxes from others on the other."""
    queries, memory = some_queries(), a_memory()
    split = shaken(decoupled.SplitDecoder(**SIZES), generator)
    x, ref = list(queries.content), queries.ref_boxes
    for depth, p in enumerate(split.o_decoder(queries, memory)):
        layers = split.layers[depth]["cls"], split.layers[depth]["loc"]
        x = [layer.gather(layer.disperse(x_t, pos_t), pos_t, ref, memory)
             for layer, x_t, pos_t in zip(layers, x, queries.pos)]
        ref = torch.sigmoid(torch.log(ref / (1 - ref)) + split.box_heads[depth](x[1]))
        assert_close(p, boxes.Predictions(split.class_heads[depth](x[0]), ref), **EXACT)


# --- the invariants of [SD Eq. 3] -----------------------------------------------------------------

def test_tied_branches_and_equal_queries_are_the_baseline_layer(generator):
    """[SD Eq. 3] (a)  Every key and value twice leaves the softmax's mean where it was."""
    base = shaken(decoder_base.DecoderLayer(**SHAPE), generator)
    layer = decoupled.DecoderLayer(**SHAPE).double()
    layer.self_attn.load_state_dict(base.self_attn.state_dict())
    layer.norm_self.load_state_dict(base.norm_self.state_dict())
    for branch in (layer.cls, layer.loc):
        branch.load_state_dict({k: v for k, v in base.state_dict().items() if "self" not in k})
    queries, memory = some_queries(), a_memory()
    x, pos, ref = queries.content[0], queries.pos[0], queries.ref_boxes
    expected = base.gather(base.disperse(x, pos), pos, ref, memory)
    xx, pp = torch.cat([x, x], dim=1), torch.cat([pos, pos], dim=1)
    out = layer.gather(layer.disperse(xx, pp), pp, ref, memory)
    assert_close(out, torch.cat([expected, expected], dim=1), **EXACT)


def test_a_blocked_pair_is_blocked_for_both_tasks(decoder):
    """[SD Eq. 3]  Query 1 may not look at query 0: neither of its tokens sees a token of 0."""
    queries, layer = some_queries(), decoder.layers[0]
    x, pos = torch.cat([*queries.content], 1), torch.cat([*queries.pos], 1)
    is_blocked = torch.zeros(N, N, dtype=torch.bool)
    is_blocked[1, 0] = True
    for nudged in (0, N):                                   # query 0's two tokens
        other = x.clone()
        other[:, nudged] += 0.5
        change = layer.disperse(other, pos, is_blocked) - layer.disperse(x, pos, is_blocked)
        change = change.abs().amax((0, 2))                                                  # (2N,)
        assert [token for token in range(2 * N) if change[token] == 0] == [1, N + 1], (
            f"tokens that stay when token {nudged} moves; all moved by {change.tolist()}")


@pytest.mark.parametrize("kind", [decoupled.DecoupledDecoder, decoupled.SplitDecoder])
def test_queries_that_may_look_at_themselves_alone_are_alone_in_every_layer(kind, generator):
    """[SD Eq. 2-3]  is_blocked reaches each self-attention: what happens to query 0 stays there."""
    alone = some_queries()._replace(is_blocked=~torch.eye(N, dtype=torch.bool))
    run = shaken(kind(**SIZES), generator).o_decoder
    for changes in helpers.nudge_query_0(run, alone, a_memory()):
        assert changes[0] > 1e-4 and (changes[1:] == 0).all(), changes


@pytest.mark.parametrize("run", ["o_decoder", "c_decoder"])
def test_permuting_the_pairs_permutes_the_answers(decoder, run):
    """[SD Eq. 3] (b)"""
    queries, memory = some_queries(), a_memory()
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    permuted = reordered(queries, order)
    before, after = getattr(decoder, run)(queries, memory), getattr(decoder, run)(permuted, memory)
    for b, a in zip(before, after):
        expected = boxes.Predictions(b.logits[:, order], b.boxes[:, order])
        assert_close(a, expected, atol=1e-11, rtol=0)


def test_each_task_trains_its_own_branch_of_the_last_layer(decoder):
    """[SD Eq. 3] (c)  Exactly zero gradient into the other task's branch.

    In earlier layers not zero: a later self-attention, which both share, lets it through.
    """
    predictions = decoder.o_decoder(some_queries(), a_memory())
    from_cls = gradient_sizes(predictions[-1].logits.square().sum(), decoder)
    from_loc = gradient_sizes(predictions[-1].boxes.square().sum(), decoder)
    assert max(within(from_cls, "layers.2.loc")) == 0 == max(within(from_loc, "layers.2.cls"))
    assert min(within(from_cls, "layers.2.cls")) > 0 and min(within(from_loc, "layers.2.loc")) > 0
    for earlier in "01":
        assert min(within(from_cls, f"layers.{earlier}.loc")) > 0
        assert min(within(from_loc, f"layers.{earlier}.cls")) > 0
    assert max(within(from_cls, "box_heads")) == 0 == max(within(from_loc, "class_heads"))


def test_split_decoder_lets_nothing_through_in_any_layer(generator):
    """[SD Eq. 2]  Between the two decoders only reference boxes pass, and those are detached."""
    split = shaken(decoupled.SplitDecoder(**SIZES), generator)
    queries, memory = some_queries(), a_memory()
    predictions = split.o_decoder(queries, memory)
    from_cls = gradient_sizes(predictions[-1].logits.square().sum(), split)
    from_loc = gradient_sizes(predictions[-1].boxes.square().sum(), split)
    assert max(within(from_cls, ".loc.")) == 0 == max(within(from_loc, ".cls."))
    assert max(within(from_cls, "box_heads")) == 0 == max(within(from_loc, "class_heads"))
    assert min(within(from_cls, ".cls.")) > 0 and min(within(from_loc, ".loc.")) > 0
    with torch.no_grad():                       # yet the boxes do steer where classification looks
        split.box_heads[0][-1].bias += 1
    moved = split.o_decoder(queries, memory)
    assert_close(moved[0].logits, predictions[0].logits, atol=0, rtol=0)
    assert (moved[1].logits - predictions[1].logits).abs().max() > 1e-3


def test_the_tasks_talk_in_self_attention_and_only_there(decoder):
    """[SD Eq. 3]  Nudge classification token 0: all the O-Decoder's boxes move, no C-Decoder's."""
    queries, memory = some_queries(), a_memory()
    content = queries.content.clone()
    content[0, :, 0] += 0.5
    nudged = queries._replace(content=content)
    for run, moves in ((decoder.o_decoder, True), (decoder.c_decoder, False)):
        before, after = run(queries, memory)[-1], run(nudged, memory)[-1]
        changed = (after.boxes - before.boxes).abs().amax(-1)                               # (B, N)
        assert (changed > 1e-6).all() if moves else (changed == 0).all(), (
            f"boxes are to move: {moves}; they moved by {changed.tolist()}")
        changed = (after.logits - before.logits).abs().amax(-1)
        assert (changed[:, 0] > 1e-3).all()
        assert (changed[:, 1:] > 1e-6).all() if moves else (changed[:, 1:] == 0).all(), (
            f"other logits are to move: {moves}; they moved by {changed.tolist()}")


def test_boxes_are_read_off_localization_and_classes_off_classification(decoder):
    """[SD Fig. 2]  Without self-attention, set 0 decides layer 1's logits and set 1 its boxes."""
    queries, memory = some_queries(), a_memory()
    before = decoder.c_decoder(queries, memory)[0]
    for task, same, moved in ((0, "boxes", "logits"), (1, "logits", "boxes")):
        content = queries.content.clone()
        content[task] += 0.5
        after = decoder.c_decoder(queries._replace(content=content), memory)[0]
        assert_close(getattr(after, same), getattr(before, same), atol=0, rtol=0)
        assert (getattr(after, moved) - getattr(before, moved)).abs().amax(-1).min() > 1e-6


def test_look_forward_twice(decoder, generator):
    """[DINO Sec. 3.5]  A box loss trains its own layer's box head and the one before, no more."""
    split = shaken(decoupled.SplitDecoder(**SIZES), generator)
    queries, memory = some_queries(), a_memory()
    for module, run in ((decoder, decoder.o_decoder), (decoder, decoder.c_decoder),
                        (split, split.o_decoder)):
        for depth, p in enumerate(run(queries, memory)):
            sizes = gradient_sizes(p.boxes.square().sum(), module)
            reached = [max(within(sizes, f"box_heads.{head}")) > 0 for head in range(3)]
            assert reached == [depth - 1 <= head <= depth for head in range(3)]


# --- what it costs --------------------------------------------------------------------------------

def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_at_the_size_of_the_paper():
    """Six layers of width 256: self-attention is shared, all else of a layer is double."""
    sizes = dict(num_layers=6, d_model=256, num_heads=8, num_levels=4, num_points=4, d_ffn=2048,
                 num_classes=91)
    with torch.device("meta"):
        base, ours, split, both = (cls(**sizes) for cls in (
            decoder_base.Decoder, decoupled.DecoupledDecoder, decoupled.SplitDecoder,
            decoupled.DACDecoupledDecoder))
    layer = base.layers[0]
    private = count(layer) - count(layer.self_attn) - count(layer.norm_self)
    assert count(ours) - count(base) == 6 * private
    assert count(split) - count(base) == 6 * count(layer)
    assert {k: v.shape for k, v in both.state_dict().items()} == {      # the C-pass owns nothing
        k: v.shape for k, v in ours.state_dict().items()}


# --- its task-aware queries [SD Eq. 4-5] ----------------------------------------------------------

def test_level_of_is_that_of_feature_pyramid_networks(generator):
    """[Feature Pyramid Networks Eq. 1]  torchvision's own map, for levels of stride 8, 16, 32."""
    w, h = 800, 640
    levels = [torch.zeros(1, 1, h // s, w // s, dtype=torch.float64) for s in (8, 16, 32)]
    side = 2 ** (torch.rand(200, generator=generator).double() * 7 + 3)         # 8 to 1024 px
    ref_boxes = torch.stack([side * 0, side * 0, side / w, side / h], -1).clamp(max=1)
    xyxy_px = torch.stack([side * 0, side * 0, ref_boxes[:, 2] * w, ref_boxes[:, 3] * h], -1)
    expected = LevelMapper(3, 5)([xyxy_px]).to(torch.int64)         # 0, 1, 2 for strides 8, 16, 32
    found = decoupled.level_of(ref_boxes[None], memory_of(levels))[0]
    assert_close(found, expected)
    assert found.unique().tolist() == [0, 1, 2]


def test_level_of_by_hand():
    """[Feature Pyramid Networks Eq. 1]  A side of 14 cells begins level 0, of 28 level 1, ..."""
    memory = memory_of([torch.zeros(1, 1, side, side).double() for side in (256, 128, 64)])
    sides = f64(0., 13.9, 27.9, 28.1, 55.9, 56.1, 111.9, 112.1, 256.) / 256  # 112: no level 3
    ref_boxes = torch.stack([sides, sides, sides, sides], -1)[None]
    assert decoupled.level_of(ref_boxes, memory)[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_region_features_are_roi_align_on_the_level_of_each_box(generator):
    """[SD Eq. 4]  torchvision's RoIAlign, box by box, in cells of the image without padding.

    Levels of 32 x 40 and 16 x 20 cells; of the second image only 24 x 20 and 12 x 10 are image.
    """
    levels = [random(2, 16, 32, 40, seed=1), random(2, 16, 16, 20, seed=2)]
    pads = [torch.zeros(2, h, w, dtype=torch.bool) for h, w in ((32, 40), (16, 20))]
    for pad in pads:
        h, w = pad.shape[1:]
        pad[1, 3 * h // 4:], pad[1, :, w // 2:] = True, True
    memory = memory_of(levels, pads)
    ref_boxes = torch.rand(2, 12, 4, generator=generator, dtype=torch.float64) * .5 + .3
    ref_boxes[:, :4, 2:] = .9                                               # large: from level 1
    ref_boxes[:, 4:8, 2:] *= .3
    found, n = decoupled.region_features(memory, ref_boxes), 0
    used = set()
    for b in range(2):
        h0, w0 = (32, 40) if b == 0 else (24, 20)                           # image cells of level 0
        for cx, cy, w, h in ref_boxes[b].tolist():
            level = 0 if math.sqrt(w * w0 * h * h0) < 28 else 1             # 14 * 2^1
            corners = f64(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            in_cells = corners * f64(w0, h0, w0, h0) / 2 ** level
            image = levels[level][b:b + 1, :, :h0 >> level, :w0 >> level]
            expected = ops.roi_align(image, [in_cells[None]], 7, aligned=True)
            assert_close(found[n:n + 1], expected, **EXACT)
            n, used = n + 1, used | {level}
    assert used == {0, 1} and n == len(found)


def test_two_tasks_get_two_queries_from_one_anchor(generator):
    """[SD Eq. 4-5]  One set a task, by its own predictor, from the same features and box."""
    memory = a_memory()
    queries = shaken(decoupled.TaskAwareQueries(5, 32, 3, num_sets=2), generator)
    out = queries(memory)
    assert out.content.shape == out.pos.shape == (2, 2, 5, 32) and out.ref_boxes.shape == (2, 5, 4)
    features = decoupled.region_features(memory, out.ref_boxes)
    ref_boxes = out.ref_boxes.flatten(0, 1)
    for task in range(2):
        points = queries.predictors[task](features)
        content, pos = query_gen.points_to_query(features, points, ref_boxes)
        rank = queries.content[task].repeat(2, 1)       # differs: anchor n has learned content n
        assert_close(out.content[task].flatten(0, 1), content + rank, **EXACT)
        assert_close(out.pos[task].flatten(0, 1), pos, **EXACT)
    assert (out.content[0] - out.content[1]).abs().max() > 1e-2


def test_queries_start_at_the_most_objectlike_cells(generator):
    """[SD Eq. 4]  R_box: the N proposals of highest logit 0, best first."""
    memory = a_memory()
    out = shaken(decoupled.TaskAwareQueries(5, 32, 3, num_sets=2), generator)(memory)
    for b in range(2):
        objectness = out.proposals.logits[b, :, 0].tolist()
        best = sorted(range(len(objectness)), key=lambda cell: -objectness[cell])[:5]
        assert_close(out.ref_boxes[b], out.proposals.boxes[b, best].detach(), atol=0, rtol=0)


def test_anchors_get_no_gradient_points_and_features_do(generator):
    """[SD Eq. 4-5]  The decoder's losses teach where to look in a box, not where the box is."""
    memory = a_memory()
    memory = memory._replace(tokens=memory.tokens.clone().requires_grad_())
    queries = shaken(decoupled.TaskAwareQueries(5, 32, 3, num_sets=2), generator)
    out = queries(memory)
    assert not out.ref_boxes.requires_grad, "the anchors have a gradient"
    (out.content.square().sum() + out.pos.square().sum()).backward()
    assert all(p.grad is None for p in queries.mini_detector.parameters())
    for predictor in queries.predictors:
        for name, p in predictor.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, (
                f"the points learn nothing: {name} of their predictor has gradient {p.grad}")
    assert memory.tokens.grad.abs().max() > 0


def test_fewer_cells_than_queries(generator):
    """[SD Eq. 4]  A small image has S < N cells: each becomes a query; then boxes of padding."""
    memory = memory_of([torch.randn(2, 32, h, w, generator=generator) for h, w in ((2, 3), (1, 2))])
    out = decoupled.TaskAwareQueries(50, 32, 3, num_sets=2)(memory)
    assert out.content.shape == (2, 2, 50, 32) and out.ref_boxes.shape == (2, 50, 4)
    cells = out.ref_boxes[:, :8]
    assert_close(cells.sort(dim=1).values, out.proposals.boxes.detach().sort(dim=1).values)
    assert (out.ref_boxes[:, 8:] == 1).all()
    assert out.content.isfinite().all() and out.pos.isfinite().all()
