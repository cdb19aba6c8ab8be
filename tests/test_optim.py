"""The learning rate is a pure function of the step; pre-trained parts learn more slowly."""
import math

import pytest
import torch
from torch import nn

from detr_min.run import config, optim


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.sampling_offsets, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)


def rates(step, **changes):
    """Learning rates of a step: of ordinary parameters, of slow ones."""
    cfg = config.preset("shapes", lr=1.0, steps=100, **changes)
    optimizer = optim.make_optimizer(Net(), cfg)
    lr = optim.set_learning_rate(optimizer, step, cfg)
    fast, slow = (group["lr"] for group in optimizer.param_groups)
    assert lr == fast
    return fast, slow


@pytest.mark.parametrize("step, share", [(0, 1 / 5), (1, 2 / 5), (4, 1.0)])
def test_warm_up_grows_linearly(step, share):
    """warmup = 4: the rates of steps 0 to 4 are 1/5 to 5/5 of what the decay leaves."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / 100))
    assert rates(step, warmup=4)[0] == pytest.approx(share * cosine)


def test_cosine_by_hand():
    """Half way it is half, at the last of 100 steps .5 (1 + cos(.99 pi)) = .000247."""
    assert rates(50, warmup=0)[0] == pytest.approx(0.5)
    assert rates(99, warmup=0)[0] == pytest.approx(0.000247, abs=1e-6)


@pytest.mark.parametrize("drop_at, last_full", [(11 / 12, 91), (20 / 24, 83)])
def test_one_drop_as_the_release(drop_at, last_full):
    """12 epochs: after 11; 24 epochs: after 20. Of 100 steps: from step 92, from step 84."""
    words = dict(decay="step", drop_at=drop_at, warmup=0)
    assert rates(last_full, **words)[0] == 1.0
    assert rates(last_full + 1, **words)[0] == pytest.approx(0.1)


def test_slow_parts_and_frozen_parts():
    fast, slow = rates(0, warmup=0, slow_lr=0.1)
    assert slow == pytest.approx(0.1 * fast)
    net = Net()
    optimizer = optim.make_optimizer(net, config.preset("shapes"))
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    slow_parts = [*net.backbone.parameters(), *net.sampling_offsets.parameters()]
    assert groups == [{id(p) for p in net.head.parameters()}, {id(p) for p in slow_parts}]
    assert isinstance(optimizer, torch.optim.AdamW)


def test_slow_parts_at_a_rate_of_0_stay_as_they_are():
    """Not even weight decay moves them, and no gradient is computed for them."""
    net = Net()
    optimizer = optim.make_optimizer(net, config.preset("shapes", slow_lr=0.0))
    slow = [*net.backbone.parameters(), *net.sampling_offsets.parameters()]
    assert not any(p.requires_grad for p in slow) and optimizer.param_groups[1]["params"] == []
    assert all(p.requires_grad for p in net.head.parameters())
