"""The studies: which variants are trained, with which flags of train.py, and how many seeds."""
from studies.harness import Study

STUDIES = {study.name: study for study in (
    Study(
        name="dac",
        question="What do the C-Decoder and SD-DETR's parts add on deformable attention?",
        common="--preset shapes",
        variants={
            "plain": "--model deformable",
            "dac": "--model dac",
            "dac_release": "--model dac_release",
            "plain_tal": "--model deformable --loss tal",
            "dfl_port": "--model decoupled",
            "split_port": "--model split",
            "sd_detr_port": "--model decoupled --queries task_aware --loss tal",
            "dac_decoupled": "--model dac_decoupled",
        },
        seeds=5),
    Study(
        name="sd_detr",
        question="What do SD-DETR's parts add on Conditional DETR?",
        first="--preset shapes --model deformable --size 96 --seed 1000",
        common="--preset shapes_conditional --slow_lr 0 --steps 1000",
        variants={
            "plain": "--model conditional --queries anchor_cells",
            "dfl": "--model decoupled --queries anchor_cells",
            "dfl_taq": "--model decoupled --queries task_aware",
            "sd_detr": "--model decoupled --queries task_aware --loss tal",
            "plain_tal": "--model conditional --queries anchor_cells --loss tal",
            "split": "--model split --queries anchor_cells",
            "plain_zero": "--model conditional --queries anchors",
            "plain_taq": "--model conditional --queries task_aware",
        },
        seeds=5),
)}
