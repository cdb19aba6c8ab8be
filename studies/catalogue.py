"""The studies: which variants are trained, with which flags of train.py, and how many seeds."""
from studies import measures
from studies.harness import Claim, Study

PLAIN, CONDITIONAL = "--model deformable", "--model conditional --queries anchor_cells"
CONSTANTS = {                       # variant -> what differs, as studies.constants reads it
    "k_1": "matcher.one_to_many.k=1",
    "k_12": "matcher.one_to_many.k=12",
    "t_0.2": "matcher.one_to_many.threshold=0.2",
    "t_0.6": "matcher.one_to_many.threshold=0.6",
    "printed": "matcher.match_quality.class_weight=1 matcher.match_quality.iou_weight=1 "
               "matcher.one_to_many.threshold=0.8",
    "points_1": "run.config.Recipe.__init__.num_points=1",
    "points_8": "run.config.Recipe.__init__.num_points=8",
}
WEIGHTS = {
    "tal_4": "criterion.task_aligned_loss.class_weight=4",
    "tal_2": "criterion.task_aligned_loss.class_weight=2",
    "sd_tal_4": "criterion.task_aligned_loss.class_weight=4",
}
TARGETS = {
    "tal_iou": "tal_loss.aligned_target.alpha=0 tal_loss.aligned_target.beta=1",
    "tal_even": "tal_loss.aligned_target.alpha=0.5 tal_loss.aligned_target.beta=0.5",
}
DECODERS = {"above_0.7": "queries per object above .7", "O_AP_nms": "AP after NMS",
            "O_finds": "finds per object", "C_AP": "C-Decoder's AP",
            "C_AP_nms": "its AP after NMS", "C_finds": "its finds per object"}
SD_COMMON = "--preset shapes_conditional --slow_lr 0 --steps 1000"
SD_ALIKE = dict(
    first="--preset shapes --model deformable --size 96 --seed 1000",
    measures=(measures.score_iou_correlation, measures.boxes_alone, measures.best_boxes_recall),
    columns={"correlation": "correlation of score and IoU", "recall_1": "recall of the best boxes",
             "boxes_AP": "AP if scores were perfect"})
SD_VARIANTS = {
    "plain": CONDITIONAL,
    "dfl": "--model decoupled --queries anchor_cells",
    "dfl_taq": "--model decoupled --queries task_aware",
    "sd_detr": "--model decoupled --queries task_aware --loss tal",
    "plain_tal": f"{CONDITIONAL} --loss tal",
    "split": "--model split --queries anchor_cells",
}
SD_CONTROLS = {
    "plain": CONDITIONAL,
    "plain_zero": "--model conditional --queries anchors",
    "plain_taq": "--model conditional --queries task_aware",
}
SD_CLAIMS = (
    Claim("SD-DETR beats Conditional DETR [SD Table 1]", "+7.3 AP in 12 epochs, +4.5 in 50",
          "sd_detr", "learned"),
    Claim("the whole of SD-DETR beats its baseline", "+3.8 AP", "sd_detr", "plain"),
    Claim("split cross-attention (DFL) helps", "+1.4", "dfl", "plain"),
    Claim("two decoders that share nothing (split) gain less than DFL",
          "+0.5 against +1.4", "dfl", "split"),
    Claim("task-aware queries (TAQ) help after DFL", "+0.5", "dfl_taq", "dfl"),
    Claim("task alignment (TAL) helps after DFL and TAQ", "+1.9", "sd_detr", "dfl_taq"),
    Claim("task alignment (TAL) helps the plain decoder", "–", "plain_tal", "plain"))

STUDIES = {study.name: study for study in (
    Study(
        name="dac",
        question="What does the C-Decoder add? [DAC Table 1]",
        common="--preset shapes --size 96",
        variants={
            "plain": PLAIN,
            "dac": "--model dac",
            "dac_align": "--model dac --loss align",
            "plain_long": f"{PLAIN} --steps 1210",
            "one_stack": PLAIN,
            "plain_dn": f"{PLAIN} --dn_number 20",
            "dac_dn": "--model dac --dn_number 20",
        },
        seeds=5,
        more_seeds={"plain": 8, "dac": 8},
        programs={"one_stack": "studies.one_stack"},
        measures=(measures.gathered, measures.decoders),
        columns=DECODERS,
        watched=("plain", "dac"),
        watch=measures.gathered,
        claims=(
            Claim("DAC-DETR beats Deformable DETR at equal steps", "+3.4 AP", "dac", "plain"),
            Claim("DAC-DETR beats it at equal training time", "–", "dac", "plain_long"),
            Claim("Align's loss adds to DAC-DETR", "+0.9", "dac_align", "dac"),
            Claim("DAC-DETR also helps beside denoising queries", "+1.0", "dac_dn", "plain_dn"),
            Claim("the second decoder is needed: both kinds of labels on one decoder's "
                  "predictions do worse", "–", "dac", "one_stack"))),
    Study(
        name="sensitivity",
        question="How much do the constants of DAC-DETR matter? [DAC Eq. 4]",
        common="--preset shapes --size 96",
        variants={
            "dac": "--model dac",
            **dict.fromkeys(CONSTANTS, "--model dac"),
            "release": "--model dac_release",
        },
        seeds=3,
        programs={name: f"studies.constants {words}" for name, words in CONSTANTS.items()},
        borrows={"dac": "dac"},
        claims=(
            Claim("up to six queries per object are better than one (k)", "–", "dac", "k_1"),
            Claim("a threshold of .4 is better than .6 (t)", "–", "dac", "t_0.6"))),
    Study(
        name="bccd",
        question="What do both methods add on photographs of blood cells?",
        common="--preset coco --steps 400",
        variants={
            "plain": PLAIN,
            "dac": "--model dac",
            "dac_align": "--model dac --loss align",
            "plain_align": f"{PLAIN} --loss align",
            "sd_detr": "--model decoupled --queries task_aware --loss tal",
        },
        seeds=3,
        real=True,
        measures=(measures.gathered, measures.decoders),
        columns=DECODERS,
        claims=(
            Claim("DAC-DETR beats Deformable DETR at equal steps", "+3.4 AP", "dac", "plain"),
            Claim("Align's loss adds to DAC-DETR", "+0.9", "dac_align", "dac"),
            Claim("DAC-DETR helps beside Align's loss", "+0.7", "dac_align", "plain_align"),
            Claim("the whole of SD-DETR, ported, beats its baseline", "+3.8 AP", "sd_detr",
                  "plain"))),
    Study(
        name="port",
        question="Do SD-DETR's parts help on deformable attention?",
        common="--preset shapes --size 96",
        variants={
            "plain": PLAIN,
            "dfl": "--model decoupled",
            "sd_detr": "--model decoupled --queries task_aware --loss tal",
            "plain_cells": PLAIN,
            "dfl_cells": "--model decoupled",
        },
        seeds=3,
        programs={"plain_cells": "studies.cell_content", "dfl_cells": "studies.cell_content"},
        borrows={"plain": "dac"},
        claims=(
            Claim("DFL helps on deformable attention", "–", "dfl", "plain"),
            Claim("so does the whole of SD-DETR", "–", "sd_detr", "plain"),
            Claim("DFL helps if the content tells anchors apart", "–", "dfl_cells",
                  "plain_cells"))),
    Study(
        name="sd_detr",
        question="What do SD-DETR's parts add on Conditional DETR?",
        common=f"{SD_COMMON} --lr 2e-3",
        variants={**SD_VARIANTS, "learned": "--model conditional --queries learned",
                  "plain_lr_4": f"{CONDITIONAL} --lr 4e-3"},
        seeds=5,
        more_seeds={"learned": 3, "plain_lr_4": 1},
        claims=SD_CLAIMS,
        **SD_ALIKE),
    Study(
        name="sd_detr_long",
        question="The same with twice the steps",
        common="--preset shapes_conditional --slow_lr 0 --steps 2000 --lr 2e-3",
        variants={
            **SD_VARIANTS,
            "plain_longer": f"{CONDITIONAL} --steps 3000",
            "tal_4": SD_VARIANTS["plain_tal"],
            "tal_2": SD_VARIANTS["plain_tal"],
            "sd_tal_4": SD_VARIANTS["sd_detr"],
        },
        seeds=3,
        more_seeds=dict.fromkeys(["plain_longer", *WEIGHTS], 1),
        programs={name: f"studies.constants {words}" for name, words in WEIGHTS.items()},
        claims=SD_CLAIMS,
        **SD_ALIKE),
    Study(
        name="sd_detr_plateau",
        question="The same with four times the steps",
        common="--preset shapes_conditional --slow_lr 0 --steps 4000 --lr 2e-3",
        variants={name: SD_VARIANTS[name] for name in ("plain", "sd_detr", "plain_tal")},
        seeds=3,
        claims=SD_CLAIMS,
        **SD_ALIKE),
    Study(
        name="sd_detr_lr1",
        question="The same at half the learning rate",
        common=f"{SD_COMMON} --lr 1e-3",
        variants=SD_VARIANTS,
        seeds=5,
        claims=SD_CLAIMS,
        **SD_ALIKE),
    Study(
        name="sd_controls",
        question="How much of it is the content, the points, the target of TAL?",
        common=f"{SD_COMMON} --lr 2e-3",
        variants={
            **SD_CONTROLS,
            "plain_tal": SD_VARIANTS["plain_tal"],
            **dict.fromkeys(TARGETS, SD_VARIANTS["plain_tal"]),
        },
        seeds=3,
        programs={name: f"studies.constants {words}" for name, words in TARGETS.items()},
        borrows={"plain": "sd_detr", "plain_tal": "sd_detr"},
        claims=(
            Claim("the cell's feature is better content than zeros", "–", "plain", "plain_zero"),
            Claim("task-aware queries help a decoder of one branch", "–", "plain_taq", "plain"),
            Claim("the target s^.25 u^.75 is better than u alone", "–", "plain_tal", "tal_iou"),
            Claim("that target is better than s^.5 u^.5", "–", "plain_tal", "tal_even")),
        **SD_ALIKE),
    Study(
        name="sd_controls_lr1",
        question="How much was it at half the learning rate?",
        common=f"{SD_COMMON} --lr 1e-3",
        variants={
            **SD_CONTROLS,
            "plain_lr_half": f"{CONDITIONAL} --lr 5e-4",
            "plain_lr_double": f"{CONDITIONAL} --lr 2e-3",
        },
        seeds=3,
        more_seeds={"plain_lr_half": 2, "plain_lr_double": 2},
        **SD_ALIKE),
)}
