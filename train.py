"""Train a detector. `python train.py` alone needs no data: DAC-DETR on synthetic shapes, offline.

    python train.py                                        # DAC-DETR
    python train.py --model deformable                     # the decoder it is compared with
    python train.py --images 8 --steps 300                 # can it learn 8 images by heart?
    python train.py --coco DIR --images 500                # a folder in COCO layout
    python train.py --resume runs/dac_shapes               # go on after Ctrl-C or a crash
    torchrun --nproc_per_node=2 train.py                   # on two processes

A run folder gets config.json, log.jsonl, last.pt and, at each validation, curves.png,
predictions.png and, if AP is the best so far, best.pt; at the end, metrics.json. Exit status:
0 done, 1 failed, 2 wrong flags, 130 Ctrl-C.
"""
import sys

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from detr_min import criterion
from detr_min.run import config, ending, folder, loop, optim, processes, registry


def train(run):
    """The training loop, from the step after the last one to the end, or to the first Ctrl-C."""
    cfg, device, progress = run.cfg, run.device, run.progress
    detector = DistributedDataParallel(run.detector) if processes.world() > 1 else run.detector
    training, interrupt = registry.training(cfg), loop.Interrupt()
    bar = tqdm(total=cfg.steps, initial=progress["step"], unit="step",
               disable=None if processes.rank() == 0 else True)     # None: only on a terminal
    for step, (images, is_pad, targets) in run.batches():
        lr = optim.set_learning_rate(run.optimizer, step - 1, cfg)
        [num_objects] = processes.mean([sum(len(t.labels) for t in targets)], device)
        with run.faults_named(step, lr, targets):
            inputs = training.inputs(images, is_pad, targets, step, processes.rank())
            with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
                output = detector(*inputs)
            parts = training.loss(output, targets, num_objects)     # as in criterion.detection_loss
            loss = criterion.total(parts)
            loop.check_finite(loss)

            run.optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(run.detector.parameters(), cfg.recipe.clip)
            loop.check_finite(norm)
        run.optimizer.step()

        progress["step"] = step
        run.log.add(parts, objects=num_objects)
        bar.update()
        stops = processes.any_of(interrupt.requested, device) or step == cfg.pause
        saves = stops or run.is_due(step, loop.NUM_SAVES)
        if saves or run.is_due(step, loop.NUM_LOGS):    # log lines end at saves too
            run.write_log(step, lr)
        if run.is_due(step, loop.NUM_EVALS):
            run.validate()
        if saves:
            run.save("last.pt")
        if stops:
            break
    bar.close()
    interrupt.release()


def main():
    """Run the command line."""
    cfg, given = config.parse(__doc__)
    processes.join()
    run = folder.start(config.check_resume(cfg, given))     # builds the detector and opens the data
    if run.progress["step"] == run.cfg.steps:
        processes.say(f"all steps of this run are done; to train longer, --init_from {run.cfg.out}")
    with run.saved_named():
        train(run)
        step, steps = run.progress["step"], run.cfg.steps
        if step < steps:
            processes.say(f"stopped after step {step} of {steps}; nothing is lost, go on with\n"
                          f"    python train.py --resume {run.cfg.out}")
            sys.exit(0 if step == run.cfg.pause else 130)
        if run.result is None:          # resumed after its last step
            run.validate()
        run.finish()
    processes.leave()


if __name__ == "__main__":
    with ending.in_a_sentence("train.py"):
        main()
