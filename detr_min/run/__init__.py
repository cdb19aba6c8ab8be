"""Everything around the network: a run's config, its training, its answers, its files.

    processes  registry  config  sets  optim  evaluate  draw  looks  explore
    contents  checkpoints  logfile  ending  loop  folder  predictor
"""
from .registry import build  # noqa: F401   run.build(config) -> model.Detector
