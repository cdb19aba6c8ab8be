"""Which images make up which step, and how they become one tensor."""
import time

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from detr_min.data import batches, dataset


def steps_of(*arguments, **more):
    return list(batches.batches(*arguments, **more))


def test_collate_pads_right_and_bottom():
    target = dataset.Target(torch.tensor([1]), torch.tensor([[0.5, 0.4, 0.3, 0.2]]), 7, (2, 3))
    small, wide = torch.rand(3, 4, 2) + 1, torch.rand(3, 3, 5) + 1
    images, is_pad, targets = batches.collate([(small, target), (wide, target)])
    assert images.shape == (2, 3, 4, 5) and is_pad.shape == (2, 4, 5) and is_pad.dtype == torch.bool
    assert_close(images[0, :, :4, :2], small)
    assert_close(images[1, :, :3, :5], wide)
    assert_close(is_pad, images[:, 0] == 0)                          # all real values are above 1
    assert (~is_pad).sum() == 4 * 2 + 3 * 5 and targets == [target, target]


def test_each_epoch_is_one_permutation_across_batch_borders():
    steps = steps_of(5, 2, seed=1, first_step=0, last_step=10)          # 20 slots = 4 epochs of 5
    flat = [key for step in steps for key in step]
    assert all(len(step) == 2 for step in steps)
    assert [epoch for epoch, _ in flat] == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    orders = [tuple(i for e, i in flat if e == epoch) for epoch in range(4)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders) and len(set(orders)) > 1
    assert flat != [key for step in steps_of(5, 2, 2, 0, 10) for key in step]


def test_a_resumed_run_and_several_ranks_see_the_same_steps():
    whole = steps_of(7, 4, 0, 0, 9)
    assert steps_of(7, 4, 0, 0, 4) + steps_of(7, 4, 0, 4, 9) == whole
    shares = [steps_of(7, 4, 0, 0, 9, rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*shares)] == whole
    assert steps_of(2, 5, 0, 0, 1)[0][4][0] == 2                        # three epochs in one batch


def test_batches_of_a_long_run_are_not_made_in_advance():
    """A run of COCO has millions of steps: the first is there at once."""
    start = time.perf_counter()
    first = next(iter(batches.batches(100_000, 16, 0, 10 ** 9, 10 ** 12)))
    assert len(first) == 16 and time.perf_counter() - start < 1


def test_seeds_of_neighbours_differ_and_are_numpys():
    """SeedSequence's numbers are fixed by numpy for ever, so old runs can be repeated."""
    seeds = {batches.mixed_seed(a, b) for a in range(8) for b in range(8)}
    assert len(seeds) == 64
    expected = np.random.SeedSequence((2, 0, 7, 3, 1)).generate_state(1)[0]
    assert batches.mixed_seed(7, 3 * 2**32 + 1) == expected             # two words each, high first


def test_no_two_lists_of_integers_give_one_seed():
    """Zeros at the end count, and so does where one integer ends and the next begins."""
    lists = [(), (0,), (0, 0), (0, 0, 0), (5,), (5, 0), (5, 0, 0), (0, 5), (2**32,), (0, 1), (1, 0),
             (2**32, 0), (5 + 2**32, 7), (5, 1, 7), (2**63 - 1,), (2**32 - 1, 2**31 - 1)]
    assert len({batches.mixed_seed(*integers) for integers in lists}) == len(lists)


def test_batches_that_cannot_be_shared_are_refused():
    for batch_size, world in ((5, 2), (0, 1)):
        with pytest.raises(ValueError, match=f"batch of {batch_size} cannot be shared .* {world} "):
            batches.batches(7, batch_size, 0, 0, 1, world=world)
