"""How long ours takes beside Hugging Face transformers' Deformable DETR; see README.md.

    clock      alternating measurement, medians, ratios
    theirs     their model at the sizes of a Config, weights to and fro
    cases      what is measured: attentions and whole models
    memory     peak memory of a training step, one side a process
    speed      the command: attention, training step, inference, memory
    learn      the command: seconds of training to an AP
    published  the command: the published models at full size, ours alone

Nothing in detr_min/ needs this folder.
"""
