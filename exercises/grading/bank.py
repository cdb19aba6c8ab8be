"""SPOILERS. Functions with one line changed for a plausible wrong one.

They are the bugs of exercise 11, what the tests of exercise 12 have to notice, and the wrong
answers by which tests/test_exercises.py grades the graders.
"""
import ast
from typing import NamedTuple

from exercises.grading import catalogue


class Mutant(NamedTuple):
    """A function of the package with `old`, found in it once, replaced by `new`."""
    function: str
    mistake: str
    old: str
    new: str

    def source(self):
        """The whole function, changed."""
        text = catalogue.source(self.function)
        if text.count(self.old) != 1:
            raise ValueError(f"{self.function} holds {text.count(self.old)} times: {self.old}")
        return text.replace(self.old, self.new)

    def make(self):
        """The function, callable, in the module of the original."""
        space = dict(catalogue.find(self.function).__globals__)
        exec(self.source(), space)
        return space[ast.parse(self.source()).body[0].name]


def of(function, *changes):
    return [Mutant(function, *change) for change in changes]


MUTANTS = [
    *of("boxes.giou",
        ("cxcywh read as corners", "to_xyxy(boxes), to_xyxy(others)", "boxes, others"),
        ("IoU instead", "ops.generalized_box_iou", "ops.box_iou"),
        ("a loss instead", "return ops", "return 1 - ops"),
        ("rows and columns swapped", "to_xyxy(boxes), to_xyxy(others)",
         "to_xyxy(others), to_xyxy(boxes)")),
    *of("boxes.refine",
        ("no sigmoid", ".sigmoid()", ""),
        ("no logit", "torch.logit(ref_boxes, eps=1e-5)", "ref_boxes"),
        ("a point's missing size goes through the logit",
         "F.pad(torch.logit(ref_boxes, eps=1e-5), (0, missing))",
         "torch.logit(F.pad(ref_boxes, (0, missing)), eps=1e-5)"),
        ("infinite at the border", "(ref_boxes, eps=1e-5)", "(ref_boxes)")),
    *of("attention.neighbours",
        ("shares swapped", "(low, 1 - beyond), (low + 1, beyond)",
         "(low, beyond), (low + 1, 1 - beyond)"),
        ("the nearest cell instead of the one below", ".floor()", ".round()"),
        ("the rim goes on beyond the map", " * (kept == cell)", ""),
        ("no gradient to the position", "beyond, last = position - low",
         "beyond, last = position.detach() - low"),
        ("off by one at the end", "last = position - low, size - 1",
         "last = position - low, size")),
    *of("attention.deformable_attention",
        ("off by half a cell", "align_corners=False", "align_corners=True"),
        ("the rim goes on beyond the map", '"zeros"', '"border"'),
        ("x and y swapped", "(2 * locations - 1)", "(2 * locations - 1).flip(-1)"),
        ("[0, 1] read as [-1, 1]", "(2 * locations - 1)", "locations"),
        ("weights in the order of points, not of levels", ".flatten(0, 1).flatten(2)",
         ".flatten(0, 1).transpose(2, 3).flatten(2)")),
    *of("matcher.match_cost",
        ("a quality added to a cost", "- 2 * boxes.giou", "+ 2 * boxes.giou"),
        ("class term upside down", "2 * (focal_1 - focal_0)", "2 * (focal_0 - focal_1)"),
        ("Euclidean distance", "p=1", "p=2"),
        ("weights of L1 and GIoU swapped", "5 * l1 - 2 *", "2 * l1 - 5 *"),
        ("logits for probabilities", ".sigmoid()", "")),
    *of("matcher.one_to_one",
        ("the dearest", ".numpy())", ".numpy(), maximize=True)"),
        ("each object its cheapest query, taken or not",
         "linear_sum_assignment(cost.detach().cpu().numpy())",
         "zip(*sorted(zip(cost.argmin(0).tolist(), range(num_objects)))) if num_objects else "
         "(cost.new_zeros(0).long(),) * 2"),
        ("queries and objects swapped", "torch.as_tensor(rows), torch.as_tensor(columns)",
         "torch.as_tensor(columns), torch.as_tensor(rows)"),
        ("infinity goes through", "cost.isfinite()", "~cost.isnan()")),
    *of("matcher.match_quality",
        ("weights swapped", "class_weight * class_term + iou_weight *",
         "iou_weight * class_term + class_weight *"),
        ("cxcywh read as corners", "boxes.iou(", "boxes.ops.box_iou("),
        ("the best class instead of the object's", "probs[:, gt_labels]",
         "probs.amax(1, keepdim=True)"),
        ("GIoU instead of IoU", "boxes.iou", "boxes.giou"),
        ("negative logits go through", "probs.min() < 0 or ", "")),
    *of("matcher.one_to_many",
        ("a quality read as a cost",
         "best_first = quality.sort(dim=0, descending=True, stable=True)",
         "best_first = quality.sort(dim=0, descending=False, stable=True)"),
        ("exactly the threshold does not count", "quality >= threshold", "quality > threshold"),
        ("a query may serve two objects", "(is_positive & is_own)", "is_positive"),
        ("one too many", "[:k]", "[:k + 1]"),
        ("each query to its worst object", "[:, :1]", "[:, -1:]")),
    *of("decoder_dac.DACDecoder.c_decoder",
        ("self-attention is still there", "layer.gather(x, pos,",
         "layer.gather(layer.disperse(x, pos), pos,"),
        ("references not detached", "ref_boxes = base.detach()", "ref_boxes = base"),
        ("looks forward once", "base = boxes.refine(ref_boxes, delta)",
         "base = boxes.refine(ref_boxes, delta).detach()"),
        ("references never move", "ref_boxes = base.detach()", "pass"),
        ("starts after the first self-attention, as the release", "= queries.content[0],",
         "= self.layers[0].disperse(queries.content[0], queries.pos[0]),")),
    *of("decoder_decoupled.DecoderLayer.disperse",
        ("each task among its own", "self.self_attn(queries, query_pos)",
         "torch.cat([self.self_attn(*half) for half in zip(queries.chunk(2, 1), "
         "query_pos.chunk(2, 1))], 1)"),
        ("positions in the values", "self.self_attn(queries,",
         "self.self_attn(queries + query_pos,"),
        ("no residual", "queries + self.drop(", "self.drop("),
        ("no norm", "self.norm_self(", "(")),
    *of("decoder_decoupled.DecoderLayer.gather",
        ("one branch for both", "self.loc.gather(", "self.cls.gather("),
        ("the other task's positions", "self.loc.gather(*loc,",
         "self.loc.gather(loc[0], *cls[1:],"),
        ("halves swapped", "cls, loc = zip", "loc, cls = zip"),
        ("tokens read as interleaved", "x.chunk(2, dim=1)", "(x[:, ::2], x[:, 1::2])")),
    *of("query_gen.points_to_query",
        ("x and y swapped", "points[:, :, None]", "points.flip(-1)[:, :, None]"),
        ("zero beyond the outermost centres", '"border"', '"zeros"'),
        ("off by half a cell", "align_corners=False", "align_corners=True"),
        ("points counted in whole boxes", "ref_boxes[:, None, 2:] / 2", "ref_boxes[:, None, 2:]"),
        ("the embedding of the mean", "boxes.embed_points(on_image, features.shape[1]).mean(1)",
         "boxes.embed_points(on_image.mean(1), features.shape[1])"),
        ("the largest instead of the mean", "found[..., 0].mean(-1)", "found[..., 0].amax(-1)")),
    *of("tal_loss.aligned_target",
        ("exponents swapped", "** alpha * ious.detach() ** beta",
         "** beta * ious.detach() ** alpha"),
        ("IoU not detached", "ious.detach()", "ious"),
        ("score not detached", "scores.detach()", "scores"),
        ("a weighted sum", "scores.detach() ** alpha * ious.detach() ** beta",
         "alpha * scores.detach() + beta * ious.detach()")),
    *of("tal_loss.tal_loss",
        ("logits for probabilities", "targets - logits.sigmoid()", "targets - logits"),
        ("target not detached", "targets = targets.detach()", "pass"),
        ("a mean", ".sum()", ".mean()"),
        ("the focus is detached", ".abs() **", ".abs().detach() **"),
        ("the sigmoid twice", "with_logits(logits,", "with_logits(logits.sigmoid(),")),
    *of("align_loss.rank_within_object",
        ("the worst first", "quality > quality[:, None]", "quality < quality[:, None]"),
        ("over all objects", "(gt_idx == gt_idx[:, None]) & ", ""),
        ("equals share a rank", "is_better | is_earlier", "is_better"),
        ("summed over the wrong axis", ".sum(1)", ".sum(0)")),
    *of("align_loss.ranked_target",
        ("no least target", ".clamp(min=0.01)", ""),
        ("the last counts most", "torch.exp(-", "torch.exp("),
        ("ranked by IoU alone", "rank_within_object(quality,", "rank_within_object(ious,"),
        ("rank times tau", "(quality.dtype) / tau", "(quality.dtype) * tau"),
        ("target without the weight", "return quality * weights", "return quality")),
    *of("attention.DeformableAttention.look",
        ("x and y swapped", "[(w, h) for", "[(h, w) for"),
        ("offsets count whole boxes", "/ (2 * K)", "/ K")),
    *of("query_gen.region_features", ("x and y swapped", "[w, h, w, h]", "[h, w, h, w]")),
    *of("query_gen.roi_align",
        ("off by half a cell", "== i]], size, aligned=True", "== i]], size, aligned=False"),
        ("padding is read", "x[None, :, :rows, :columns]", "x[None]"),
        ("rows and columns swapped", ":rows, :columns", ":columns, :rows")),
    *of("criterion.task_aligned_loss",
        ("the IoU of an object with itself", "layer.boxes[place[:2]], pairs.boxes",
         "pairs.boxes, pairs.boxes"),
        ("no least target", ".clamp(min=0.01)", "")),
]


def one(function, mistake):
    return next(m for m in MUTANTS if (m.function, m.mistake) == (function, mistake))


BUGS = {f"bug_{number}": one(*which) for number, which in enumerate((
    ("attention.DeformableAttention.look", "x and y swapped"),
    ("tal_loss.tal_loss", "logits for probabilities"),
    ("matcher.one_to_many", "a quality read as a cost"),
    ("tal_loss.aligned_target", "IoU not detached"),
    ("decoder_dac.DACDecoder.c_decoder", "references not detached"),
    ("criterion.task_aligned_loss", "the IoU of an object with itself"),
    ("decoder_decoupled.DecoderLayer.gather", "the other task's positions"),
    ("query_gen.roi_align", "off by half a cell")), start=1)}
