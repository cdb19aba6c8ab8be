"""What several test files build on: random weights, and a memory with a padded image."""
import torch

from detr_min import attention


def randomise(module, seed=0):
    """Random in every parameter, in float64: zeros and ones hide mistakes."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double()


def shaken(module, generator):
    """In float64, every parameter off its initial value: no zeros, no symmetry to hide behind."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).double()
    return module


def share(is_pad):
    """Of a row or a column of cells, the share that is image."""
    return (~is_pad).double().mean(-1)


def padded_memory(D, shapes=((4, 6), (2, 3)), B=2):
    """Random cells; of the second image half of the rows and a third of the columns are padding."""
    pads = [torch.zeros(B, h, w, dtype=torch.bool) for h, w in shapes]
    for pad, (h, w) in zip(pads, shapes):
        pad[1:, h // 2:], pad[1:, :, w * 2 // 3:] = True, True
    ratios = [torch.stack([share(p[:, 0]), share(p[:, :, 0])], -1) for p in pads]       # (x, y)
    tokens = torch.randn(B, sum(h * w for h, w in shapes), D, dtype=torch.float64,
                         generator=torch.Generator().manual_seed(0))
    is_pad = torch.cat([p.flatten(1) for p in pads], dim=1)
    return attention.Memory(tokens, is_pad, list(shapes), torch.stack(ratios, dim=1))
