"""Which images make up which step, and how they become one tensor. A pure function of the seed.

Workers, processes and resumed runs therefore see the same pictures. Read after nothing.
"""
import functools

import numpy as np
import torch


def mixed_seed(*integers):
    """One 32-bit seed from several integers below 2^64; neighbours give unrelated seeds.

    Their number comes first and each is two words: SeedSequence itself ignores zeros at the end.
    """
    words = [word for number in integers for word in divmod(number, 2**32)]
    return int(np.random.SeedSequence((len(integers), *words)).generate_state(1)[0])


def generator(*integers):
    return torch.Generator().manual_seed(mixed_seed(*integers))


def collate(batch):
    """Pictures padded with 0 at the right and bottom to the largest.
    -> images (B, 3, h, w), is_pad (B, h, w) True = padding, list of B Targets"""
    pictures, targets = zip(*batch)
    h, w = (max(picture.shape[side] for picture in pictures) for side in (1, 2))
    images = torch.zeros(len(batch), 3, h, w)
    is_pad = torch.ones(len(batch), h, w, dtype=torch.bool)
    for i, picture in enumerate(pictures):
        images[i, :, :picture.shape[1], :picture.shape[2]] = picture
        is_pad[i, :picture.shape[1], :picture.shape[2]] = False
    return images, is_pad, list(targets)


def batches(num_images, batch_size, seed, first_step, last_step, rank=0, world=1):
    """Yield, for each step from first_step to last_step - 1, the (epoch, index) of its images.

    Every epoch is a permutation from (seed, epoch). Step s is the s-th slice of `batch_size` of all
    epochs in a row, and rank r of `world` takes the r-th share of each slice.
    """
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"a batch of {batch_size} cannot be shared equally by {world} processes")

    @functools.lru_cache(maxsize=2)
    def permutation(epoch):
        return torch.randperm(num_images, generator=generator(seed, epoch)).tolist()
    share = batch_size // world
    starts = (step * batch_size + rank * share for step in range(first_step, last_step))
    return ([(p // num_images, permutation(p // num_images)[p % num_images])
             for p in range(start, start + share)] for start in starts)
