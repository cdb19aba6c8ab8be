"""From an image to feature levels, and from feature levels to the width of the transformer.

[Deformable DETR App. A.2]  C3, C4 and C5, the backbone's maps of strides 8, 16 and 32, go through
1x1 convolutions; further levels come from C5 by 3x3 convolutions of stride 2. `ConvNet` learns from
random weights in minutes; `ResNet50` needs ImageNet weights. Read `attention.py` before and
`encoder.py` after.
"""
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d


def conv_gn(channels_in, channels_out, stride):
    """3x3 convolution and GroupNorm, which works with any batch size."""
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
                         nn.GroupNorm(8, channels_out))


class ConvNet(nn.Module):
    """Ten 3x3 convolutions with GroupNorm, for training from random weights. Strides 8, 16, 32.

    Five times a convolution halves the map and another adds to it, as in [ResNet Eq. 1]. Without
    that sum it learns more slowly (benchmarks/README.md).
    """

    num_halvings, first_level = 5, 2        # levels before the first are not returned

    def __init__(self, width=32):
        super().__init__()
        channels = [3, width, 2 * width, 4 * width, 4 * width, 4 * width][:self.num_halvings + 1]
        self.halve = nn.ModuleList([conv_gn(a, b, 2) for a, b in zip(channels, channels[1:])])
        self.add = nn.ModuleList([conv_gn(c, c, 1) for c in channels[1:]])
        self.channels = channels[self.first_level + 1:]

    def forward(self, images):
        """(B, 3, h, w) -> [(B, C3, h/8, w/8), (B, C4, h/16, w/16), (B, C5, h/32, w/32)]"""
        x, levels = images, []
        for halve, add in zip(self.halve, self.add):
            x = halve(x).relu()
            x = (x + add(x)).relu()                                 # [ResNet Eq. 1]
            levels.append(x)
        return levels[self.first_level:]


class ConvNetStride8(ConvNet):
    """ConvNet up to its first level: one map of stride 8."""

    num_halvings = 3


class ResNet50(nn.Module):
    """torchvision's ResNet-50 without its classifier; BatchNorm, stem and stage 1 stay frozen."""

    reads_padding = True                        # of a batch, as published: see padded_batch
    dilation = False, False, False              # in place of the stride, in stages 2 to 4

    def __init__(self):
        super().__init__()
        net = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d,
                                          replace_stride_with_dilation=self.dilation)
        self.body = nn.ModuleDict({name: part for name, part in net.named_children()
                                   if name not in ("avgpool", "fc")})
        self.channels = [512, 1024, 2048]
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))

    def load_imagenet(self):
        """Load torchvision's ImageNet weights, from torch's cache or by download.

        Raises:
            OSError: they are not cached and cannot be downloaded; says what to do
        """
        weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
        try:
            state = weights.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:         # no network; or a broken file in the cache
            raise OSError(
                f"ImageNet weights of ResNet-50 could not be loaded ({error}). On a machine with "
                f"internet access download {weights.url}, put it into "
                f"{torch.hub.get_dir()}/checkpoints/ and run the same command; or start from a "
                "trained detector with --init_from FILE; or train a small network from "
                "random weights with --backbone convnet.") from error
        self.body.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")
                                   and not k.endswith("num_batches_tracked")})

    def forward(self, images):
        """(B, 3, h, w) -> [(B, 512, h/8, w/8), (B, 1024, h/16, w/16), (B, 2048, h/32, w/32)]"""
        body = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        c2 = body.layer1(x)
        c3 = body.layer2(c2)
        c4 = body.layer3(c3)
        return [c3, c4, body.layer4(c4)]


class ResNet50DC5(ResNet50):
    """ResNet-50 whose last stage has dilation in place of the stride: C5 has stride 16."""

    dilation = False, False, True


class Projections(nn.Module):
    """Project every level to D channels, and add coarser ones until there are L."""

    def __init__(self, channels, d_model, num_levels):
        super().__init__()
        channels = list(channels[:num_levels])
        extra = num_levels - len(channels)
        sources = channels + [channels[-1]] * min(extra, 1) + [d_model] * (extra - 1)
        self.num_from_backbone = len(channels)
        self.levels = nn.ModuleList()
        for level, source in enumerate(sources):
            size, stride, padding = (1, 1, 0) if level < len(channels) else (3, 2, 1)
            conv = nn.Conv2d(source, d_model, size, stride, padding)
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
            self.levels.append(nn.Sequential(conv, nn.GroupNorm(32, d_model)))

    def forward(self, features):
        """[(B, C, h, w), ...] of the backbone -> [(B, D, h, w), ...], L of them"""
        levels, x = [], features[-1]       # the first extra level reads C5, the next one that level
        for level, project in enumerate(self.levels):
            if level < self.num_from_backbone:
                levels.append(project(features[level]))
            else:
                x = project(x)
                levels.append(x)
        return levels


def padded_batch(network, x, is_pad):
    """Apply a network to a padded batch as the authors of DETR do: its convolutions read padding.

    Args:
        network  (B, C, h, w) -> [(B, C', h', w'), ...], one map per level
        x        (B, C, h, w)
        is_pad   (B, h, w)     True = padding
    Returns:
        the levels, and their masks [(B, h', w'), ...]
    """
    levels = network(x)
    return levels, [F.interpolate(is_pad[:, None].float(), size=level.shape[-2:]).bool()[:, 0]
                    for level in levels]


def per_image(network, x, is_pad):
    """Apply a network to each picture as if it were alone; pictures of one size go together.

    So neither padding nor the other pictures change a picture's features, as they would through the
    means of GroupNorm. Arguments and result as in `padded_batch`, with 0 on padding. While
    torch.compile or torch.export trace, it is `padded_batch`.
    """
    if torch.compiler.is_compiling():
        return padded_batch(network, x, is_pad)
    sizes = list(zip((~is_pad[:, :, 0]).sum(1).tolist(), (~is_pad[:, 0]).sum(1).tolist()))
    groups = {size: [i for i, other in enumerate(sizes) if other == size] for size in sizes}
    answers = [network(x[group, :, :h, :w]) for (h, w), group in groups.items()]
    place = torch.tensor(sum(groups.values(), [])).argsort()        # from groups to the batch
    levels, pads = [], []
    for maps in zip(*answers):                                      # one level, group by group
        h, w = (max(level.shape[axis] for level in maps) for axis in (2, 3))
        borders = [(0, w - level.shape[3], 0, h - level.shape[2]) for level in maps]
        levels.append(torch.cat([F.pad(level, border)
                                 for level, border in zip(maps, borders)])[place])
        pads.append(torch.cat([F.pad(torch.zeros_like(level[:, 0]), border, value=1)
                               for level, border in zip(maps, borders)])[place].bool())
    return levels, pads
