"""From image to feature levels: strides, sizes, torchvision's ResNet-50, and the extra levels."""
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.testing import assert_close
from torchvision.models import _api
from torchvision.models.feature_extraction import create_feature_extractor

from detr_min import backbone
from helpers import EXACT, randomise


@pytest.mark.parametrize("h, w", [(64, 96), (37, 50), (8, 5), (1, 1)])
def test_levels_have_strides_8_16_32(h, w):
    """Sizes are rounded up, so even an image smaller than a stride keeps a cell on every level."""
    net = backbone.ConvNet(width=8)
    levels = net(torch.randn(2, 3, h, w))
    assert [tuple(x.shape) for x in levels] == [
        (2, channels, -(-h // stride), -(-w // stride))
        for channels, stride in zip(net.channels, (8, 16, 32))]
    assert all(x.isfinite().all() for x in levels)


def test_convnet_is_ten_convolutions():
    convs = [m for m in backbone.ConvNet(width=8).modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 10 and {conv.kernel_size for conv in convs} == {(3, 3)}


def test_convnet_needs_no_large_batch():
    """GroupNorm: an image's features in training do not depend on who else is in the batch."""
    net, images = backbone.ConvNet(width=8).train(), torch.randn(3, 3, 64, 96)
    for together, alone in zip(net(images), net(images[1:2])):
        assert_close(together[1:2], alone, atol=1e-5, rtol=0)   # float32, sums in another order


def test_conv_gn_by_definition():
    block, x = backbone.conv_gn(3, 16, stride=2).double(), torch.randn(2, 3, 7, 9).double()
    torch.nn.init.normal_(block[1].weight)
    conv = F.conv2d(x, block[0].weight, stride=2, padding=1)                # (2, 16, 4, 5)
    expected = torch.zeros_like(conv)
    for image in range(2):
        for c in range(0, 16, 2):                       # 8 groups of 2 channels, one mean for each
            group = conv[image, c:c + 2]
            group = (group - group.mean()) / (group.var(unbiased=False) + 1e-5).sqrt()
            expected[image, c:c + 2] = group * block[1].weight[c:c + 2, None, None]
    assert_close(block(x), expected, **EXACT)


def test_convnet_by_definition():
    """[ResNet Eq. 1]  relu(y + GN(conv(y))) of y = relu(GN(conv(x))), five times over."""
    net, images = backbone.ConvNet(width=8).double(), torch.randn(2, 3, 37, 50).double()
    x, levels = images, []
    for number in range(5):
        (conv, norm), (more, more_norm) = net.halve[number], net.add[number]
        y = F.group_norm(F.conv2d(x, conv.weight, stride=2, padding=1), 8, norm.weight, norm.bias)
        y = y.relu()
        z = F.group_norm(F.conv2d(y, more.weight, padding=1), 8, more_norm.weight, more_norm.bias)
        x = (y + z).relu()
        levels.append(x)
    for found, expected in zip(net(images), levels[2:], strict=True):
        assert_close(found, expected, **EXACT)


@pytest.fixture(scope="module")
def torchvision_resnet():
    """torchvision's own, with normalisation statistics that an error would show in."""
    torch.manual_seed(0)
    net = torchvision.models.resnet50(weights=None).eval()
    for name, buffer in net.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(0.5 + torch.rand_like(buffer))
    return net


def test_resnet_is_torchvisions(torchvision_resnet, monkeypatch):
    """Its ImageNet weights load, and C3, C4, C5 are what torchvision's own network computes."""
    monkeypatch.setattr(_api.WeightsEnum, "get_state_dict",
                        lambda self, **kwargs: torchvision_resnet.state_dict())
    ours = backbone.ResNet50()
    ours.load_imagenet()
    theirs = create_feature_extractor(torchvision_resnet, ["layer2", "layer3", "layer4"])
    images = torch.randn(1, 3, 40, 70)
    with torch.no_grad():
        levels, expected = ours.train()(images), theirs(images).values()    # all norms are frozen
        tiny = ours(torch.randn(1, 3, 8, 5))
    assert [x.shape[1] for x in levels] == ours.channels == [512, 1024, 2048]
    assert [tuple(x.shape[2:]) for x in levels] == [(5, 9), (3, 5), (2, 3)]
    for level, reference in zip(levels, expected):
        assert_close(level, reference, atol=1e-5, rtol=1e-4)        # float32 through 50 layers
    assert [tuple(x.shape[2:]) for x in tiny] == [(1, 1)] * 3
    trained = {name.split(".")[0] for name, p in ours.body.named_parameters() if p.requires_grad}
    frozen = {name.split(".")[0] for name, p in ours.body.named_parameters() if not p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"} and frozen == {"conv1", "layer1"}
    assert not any("bn" in name for name, _ in ours.named_parameters())


@pytest.mark.slow
def test_dc5_has_dilation_in_place_of_the_last_stride():
    """The same weights as ResNet-50's; torchvision's own dilated network; C5 has stride 16."""
    torch.manual_seed(0)
    ours, plain = backbone.ResNet50DC5().eval(), backbone.ResNet50()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {
        n: t.shape for n, t in plain.state_dict().items()}
    theirs = torchvision.models.resnet50(
        weights=None, replace_stride_with_dilation=[False, False, True],
        norm_layer=torchvision.ops.FrozenBatchNorm2d).eval()
    theirs.load_state_dict(ours.body.state_dict(), strict=False)
    theirs = create_feature_extractor(theirs, ["layer3", "layer4"])
    images = torch.randn(1, 3, 40, 70)
    with torch.no_grad():
        _, c4, c5 = ours(images)
        expected = theirs(images).values()
    assert c4.shape[2:] == c5.shape[2:] == (3, 5)
    for level, reference in zip((c4, c5), expected):
        assert_close(level, reference, atol=1e-5, rtol=1e-4)        # float32 through 50 layers


def test_the_small_network_of_one_level_is_the_start_of_the_other():
    torch.manual_seed(0)
    whole, part = backbone.ConvNet(width=8), backbone.ConvNetStride8(width=8)
    part.load_state_dict({name: t for name, t in whole.state_dict().items()
                          if name in part.state_dict()})
    images = torch.randn(2, 3, 37, 50)
    [level] = part(images)
    assert part.channels == [level.shape[1]] and level.shape[2:] == (5, 7)          # stride 8
    assert_close(level, whole(images)[0], atol=0, rtol=0)
    convs = [m for m in part.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 6


@pytest.mark.parametrize("error", [OSError("no network"), RuntimeError("invalid hash value")])
def test_without_imagenet_weights_it_says_what_to_do(monkeypatch, error):
    def fail(self, **kwargs):
        raise error

    monkeypatch.setattr(_api.WeightsEnum, "get_state_dict", fail)
    sentence = f"could not be loaded ({error}). On a machine with internet access download https://"
    with pytest.raises(OSError, match=re.escape(sentence)) as caught:
        backbone.ResNet50.load_imagenet(None)
    assert "--init_from FILE" in str(caught.value) and "--backbone convnet" in str(caught.value)


def test_projections_by_definition():
    """[Deformable DETR App. A.2] 1x1 on C3 to C5; 3x3 stride 2 on C5; then on the level before."""
    torch.manual_seed(0)
    project = backbone.Projections([4, 6, 10], d_model=64, num_levels=5).double()
    for parameter in project.parameters():
        torch.nn.init.normal_(parameter)
    features = [torch.randn(2, 4, 12, 20).double(), torch.randn(2, 6, 6, 10).double(),
                torch.randn(2, 10, 3, 5).double()]

    def level(number, x, **how):
        conv, norm = project.levels[number]
        x = F.conv2d(x, conv.weight, conv.bias, **how)
        return F.group_norm(x, 32, norm.weight, norm.bias)

    expected = [level(number, features[number]) for number in range(3)]
    expected.append(level(3, features[2], stride=2, padding=1))             # C5, not its projection
    expected.append(level(4, expected[3], stride=2, padding=1))
    found = project(features)
    assert [tuple(x.shape) for x in found] == [(2, 64, 12, 20), (2, 64, 6, 10), (2, 64, 3, 5),
                                               (2, 64, 2, 3), (2, 64, 1, 2)]
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, **EXACT)


def test_projections_without_extra_levels():
    project = backbone.Projections([4, 6, 10], d_model=32, num_levels=3)
    features = [torch.randn(1, 4, 4, 4), torch.randn(1, 6, 2, 2), torch.randn(1, 10, 1, 2)]
    assert [tuple(x.shape[1:]) for x in project(features)] == [(32, 4, 4), (32, 2, 2), (32, 1, 2)]
    assert all(block[0].kernel_size == (1, 1) for block in project.levels)


# Padded batches


def padded(pictures, h, w, generator):
    """Pictures (3, ., .) on h x w pixels, noise where padding is. -> images, is_pad of a batch"""
    images = torch.randn(len(pictures), 3, h, w, generator=generator).to(pictures[0])
    is_pad = torch.ones(len(pictures), h, w, dtype=torch.bool)
    for image, pad, picture in zip(images, is_pad, pictures):
        image[:, :picture.shape[1], :picture.shape[2]] = picture
        pad[:picture.shape[1], :picture.shape[2]] = False
    return images, is_pad


@pytest.mark.parametrize("body, num_levels", [(backbone.ConvNet, 5), (backbone.ConvNetStride8, 1)])
@pytest.mark.parametrize("h, w", [(64, 96), (37, 50), (8, 5), (61, 33)])
def test_per_image_gives_a_picture_its_own_levels(body, num_levels, h, w, generator):
    """Beside a larger one, padded with noise to sizes that no stride divides; gradients as well."""
    body = randomise(body(width=8))
    project = randomise(backbone.Projections(body.channels, 64, num_levels))
    picture, other = (torch.randn(3, *size, generator=generator).double()
                      for size in ((h, w), (90, 101)))
    levels, pads = backbone.per_image(torch.nn.Sequential(body, project),
                                  *padded([picture, other], 90, 101, generator))
    alone = project(body(picture[None]))
    for level, pad, one in zip(levels, pads, alone, strict=True):
        rows, columns = one.shape[2:]
        assert_close(level[:1, :, :rows, :columns], one, **EXACT)
        assert not level[0, :, rows:].any() and not level[0, :, :, columns:].any()
        assert not pad[0, :rows, :columns].any() and (~pad[0]).sum() == rows * columns
        assert not pad[1].any()
    weights = [torch.randn_like(one) for one in alone]

    def gradients(levels):
        loss = sum((x[:1, :, :g.shape[2], :g.shape[3]] * g).sum() for x, g in zip(levels, weights))
        return torch.autograd.grad(loss, [*body.parameters(), *project.parameters()])
    for together, one in zip(gradients(levels), gradients(alone)):
        assert_close(together, one, atol=1e-9, rtol=1e-9)


def test_per_image_takes_pictures_of_one_size_together_and_keeps_the_order(generator):
    seen = []
    body = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1).double()
    body.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    sizes = [(5, 12), (9, 12), (5, 12), (9, 7)]
    pictures = [torch.randn(3, *size, generator=generator).double() for size in sizes]
    [level], [pad] = backbone.per_image(lambda x: [body(x)], *padded(pictures, 9, 12, generator))
    assert seen == [(2, 3, 5, 12), (1, 3, 9, 12), (1, 3, 9, 7)]
    assert level.shape == (4, 4, 5, 6) and pad.shape == (4, 5, 6)
    for found, picture in zip(level, pictures):
        one = body(picture[None])[0]
        assert_close(found, F.pad(one, (0, 6 - one.shape[2], 0, 5 - one.shape[1])), **EXACT)


def test_per_image_of_full_pictures_is_padded_batch_bit_for_bit():
    body, images = backbone.ConvNet(width=8), torch.randn(3, 3, 64, 96)
    network = torch.nn.Sequential(body, backbone.Projections(body.channels, 32, 4))
    is_pad = torch.zeros(3, 64, 96, dtype=torch.bool)
    for ours, theirs in zip(backbone.per_image(network, images, is_pad),
                            backbone.padded_batch(network, images, is_pad)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_padded_batch_reads_the_nearest_pixel_of_the_mask():
    """[DETR, code] Cell i of n reads pixel floor(i * h / n), as nearest interpolation has it."""
    is_pad = torch.ones(1, 100, 90, dtype=torch.bool)
    is_pad[0, :62, :41] = False
    _, [pad] = backbone.padded_batch(lambda x: [torch.zeros(1, 4, 13, 12)], None, is_pad)
    assert pad[0].tolist() == [[bool(is_pad[0, i * 100 // 13, j * 90 // 12]) for j in range(12)]
                               for i in range(13)]


def test_while_torch_traces_padding_is_read_as_published(monkeypatch, generator):
    body = torch.nn.Conv2d(3, 4, 3, padding=1)
    batch = padded([torch.randn(3, 5, 4, generator=generator)], 8, 8, generator)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    [level], _ = backbone.per_image(lambda x: [body(x)], *batch)
    assert torch.equal(level, body(batch[0]))
