"""The one table of the exercises: which function, which tests grade it, what to train through it.

exercises/README.md describes them; tests/test_exercises.py checks that the two agree.
"""
import ast
import importlib
import importlib.util
import inspect
import pathlib
import textwrap
from typing import NamedTuple

FOLDERS = "detr_min", "detr_min.release"        # where `module` looks, in this order

DAC = dict(model="dac")
SD = dict(name="shapes_sd", num_levels=1)
ALIGN = dict(model="dac", loss="align")


def module(name):
    """The package's module that an exercise's file is named after.

    "align_loss" -> "detr_min.release.align_loss"; also of "align_loss.ranked_target".
    """
    name = name.split(".")[0]
    for folder in FOLDERS:
        if importlib.util.find_spec(f"{folder}.{name}"):
            return f"{folder}.{name}"
    raise ModuleNotFoundError(f"{' and '.join(FOLDERS)} hold no module {name}")


def path(name):
    """The file of `module`, as a path from the repository's root."""
    return pathlib.Path(*module(name).split(".")).with_suffix(".py")


class Exercise(NamedTuple):
    """How one function is asked for and graded."""
    number: int         # in exercises/README.md
    todo: str           # what the stub's error tells the student to write
    variant: dict       # the tiny detector that is trained through it, for config.preset
    tests: list         # "test_matcher.py::test_quality_worked_by_hand", those by hand first


def tests_of(file, names):
    return [f"{file}::{name}" for name in names.split()]


EXERCISES = {
    "boxes.giou": Exercise(
        1, "return the (N, M) GIoU of every box with every other", DAC,
        tests_of("test_boxes.py", """test_iou_and_giou_worked_by_hand
            test_iou_and_giou_by_counting_pixels test_giou_tells_near_from_far_where_iou_does_not
            test_overlaps_without_objects""")),
    "boxes.refine": Exercise(
        1, "return the boxes that the references become when moved by delta", DAC,
        tests_of("test_boxes.py", """test_refine_worked_by_hand
            test_refine_of_a_point_takes_the_size_from_delta_alone test_refine_by_definition
            test_refine_adds_up test_refine_sends_gradient_to_reference_and_delta
            test_refine_can_leave_the_border""")),
    "attention.neighbours": Exercise(
        2, "yield the cell below and the cell above the position, each with its share", DAC,
        tests_of("test_attention.py", """test_neighbours_worked_by_hand
            test_neighbours_by_definition test_neighbours_beyond_the_map test_by_rows_by_definition
            test_by_rows_has_the_same_gradients""")),
    "attention.deformable_attention": Exercise(
        2, "return the (B, N, D) sums of what is found at the sampling points", DAC,
        tests_of("test_attention.py", """test_worked_by_hand test_zero_beyond_the_map
            test_the_centre_of_a_cell_gives_the_cell test_a_constant_map_gives_the_constant
            test_a_map_of_coordinates_gives_the_point test_by_definition
            test_each_head_reads_its_own_channels test_gradients
            test_shapes_that_do_not_add_up_are_named""")),
    "matcher.match_cost": Exercise(
        3, "return the (N, M) cost of every prediction for every object", DAC,
        tests_of("test_matcher.py", """test_match_cost_by_hand
            test_match_cost_by_definition test_match_cost_is_finite_for_certain_scores
            test_match_cost_without_objects_is_empty""")),
    "matcher.one_to_one": Exercise(
        3, "return the cheapest assignment, by trying every one or with scipy", DAC,
        tests_of("test_matcher.py", """test_one_to_one_by_hand
            test_one_to_one_is_the_best_of_all_permutations
            test_one_to_one_without_objects_is_empty
            test_one_to_one_refuses_more_objects_than_queries
            test_one_to_one_refuses_a_cost_that_is_no_number
            test_one_to_one_of_a_cost_that_requires_gradient
            test_an_assignment_leaves_its_argument_as_it_is[one_to_one]""")),
    "matcher.match_quality": Exercise(
        4, "return the (N, M) quality of every prediction for every object", DAC,
        tests_of("test_matcher.py", """test_quality_worked_by_hand
            test_quality_of_the_less_likely_class_by_hand test_quality_by_definition
            test_quality_refuses_logits test_quality_accepts_probabilities_of_0_and_1
            test_quality_without_objects_or_queries_is_empty""")),
    "matcher.one_to_many": Exercise(
        5, "return the pairs that pass the threshold, the top k and the best object", DAC,
        tests_of("test_matcher.py", """test_one_to_many_by_hand test_one_to_many_by_definition
            test_one_to_many_keeps_its_promises test_one_to_many_ties_go_to_the_lower_index
            test_one_to_many_with_fewer_queries_than_k
            test_an_assignment_leaves_its_argument_as_it_is[one_to_many]
            test_one_to_many_without_objects_or_queries_is_empty""")),
    "decoder_dac.DACDecoder.c_decoder": Exercise(
        6, "return the predictions of every layer when no query ever sees another", DAC,
        tests_of("test_decoder_dac.py", """test_c_decoder_worked_by_hand
            test_c_decoder_queries_are_independent
            test_c_decoder_sends_no_gradient_into_self_attention
            test_the_first_layer_differs_unlike_the_release test_c_decoder_by_definition
            test_look_forward_twice[c_decoder]""")),
    "decoder_decoupled.DecoderLayer.disperse": Exercise(
        7, "return what one self-attention over the tokens of both tasks makes of them", SD,
        tests_of("test_decoder_decoupled.py", """test_disperse_worked_by_hand
            test_disperse_by_definition test_disperse_drops_out_what_it_reads
            test_tied_branches_and_equal_queries_are_the_plain_decoder
            test_permuting_the_queries_permutes_the_answers[decoupled]
            test_each_task_trains_its_own_branch_of_the_last_layer""")),
    "decoder_decoupled.DecoderLayer.gather": Exercise(
        7, "return what each task's own branch makes of its half of the tokens", SD,
        tests_of("test_decoder_decoupled.py", """test_gather_worked_by_hand
            test_gather_by_definition
            test_tied_branches_and_equal_queries_are_the_plain_decoder
            test_permuting_the_queries_permutes_the_answers[decoupled]
            test_each_task_trains_its_own_branch_of_the_last_layer""")),
    "query_gen.points_to_query": Exercise(
        8, "return the mean feature and the mean position embedding of a box's points", SD,
        tests_of("test_query_gen.py", """test_points_to_query_by_hand
            test_points_in_the_centre_read_the_centre test_points_to_query_by_definition""")
        + tests_of("test_decoder_decoupled_deformable.py",
                   "test_anchors_get_no_gradient_points_and_features_do")),
    "tal_loss.aligned_target": Exercise(
        9, "return what the score of each matched query should be", SD,
        tests_of("test_tal_loss.py", """test_target_by_hand test_target_by_definition
            test_no_gradient_into_targets
            test_target_is_the_score_exactly_where_score_and_iou_agree""")),
    "tal_loss.tal_loss": Exercise(
        9, "return the sum of the weighted cross-entropies, a scalar", SD,
        tests_of("test_tal_loss.py", """test_loss_by_hand
            test_loss_by_definition_two_sums_are_the_dense_form test_no_gradient_into_targets
            test_alpha_and_beta_of_zero_give_focal_loss_without_alpha
            test_finite_where_the_sigmoid_is_saturated
            test_a_confident_mistake_keeps_its_loss_and_its_gradient test_gradient_by_hand
            test_gradient_table test_stationary_exactly_where_the_score_equals_the_iou""")),
    "align_loss.rank_within_object": Exercise(
        10, "return how many pairs of the same object are better than each pair", ALIGN,
        tests_of("test_align_loss.py", """test_ranks_by_hand test_equal_qualities_rank_by_position
            test_ranks_by_definition test_no_pair_has_no_rank""")),
    "align_loss.ranked_target": Exercise(
        10, "return the target and the weight of each pair", ALIGN,
        tests_of("test_align_loss.py", """test_target_by_hand test_the_weights_of_six_candidates
            test_one_to_one_pairs_all_weigh_one test_target_by_definition
            test_a_pair_without_overlap_keeps_a_target_of_a_hundredth_and_ranks_last
            test_targets_and_weights_have_no_gradient test_no_pair_has_no_rank""")),
}

# Functions that no exercise asks to write but in which a bug of exercise 11 may hide.
ONLY_BUGS = {
    "attention.DeformableAttention.look": Exercise(
        11, "", DAC, tests_of("test_attention.py", """test_look_worked_by_hand
            test_initial_points_reach_from_the_centre_to_the_edge_of_a_box
            test_module_by_definition""")),
    **dict.fromkeys(("query_gen.region_features", "query_gen.roi_align"), Exercise(
        11, "", SD, tests_of("test_query_gen.py", """test_region_features_by_hand
            test_region_features_of_a_constant_map_are_the_constant
            test_region_features_are_roi_align_box_by_box"""))),
    "criterion.task_aligned_loss": Exercise(
        11, "", SD, tests_of("test_criterion.py", """test_layer_loss_by_hand
            test_layer_loss_by_definition test_box_terms_are_torchvisions
            test_class_term_sends_no_gradient_to_boxes""")),
}
GRADED = EXERCISES | ONLY_BUGS


def find(function):
    """ "matcher.one_to_many" -> the package's function."""
    found = importlib.import_module(module(function))
    for part in function.split(".")[1:]:
        found = getattr(found, part)
    return found


def source(function):
    """The text of a function of the package, from the left margin on."""
    return textwrap.dedent(inspect.getsource(find(function)))


def lines(function):
    """Lines of code in its body: no docstring, no comment, no blank."""
    text = source(function)
    body = ast.parse(text).body[0].body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    rows = text.splitlines()[body[0].lineno - 1:body[-1].end_lineno]
    return sum(bool(row.strip()) and not row.strip().startswith("#") for row in rows)
