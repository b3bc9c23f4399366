"""A backbone's own stages lie on its main path, whatever library it came from and whatever the images' shape."""

import math
import warnings

import pages
import pytest
import timm
import torch
import torchvision
from torch import nn

from ssd_addon import audit
from ssd_addon.auditing import layers
from ssd_addon.auditing.stages import positions, stages
from ssd_addon.backbones import prepared
from ssd_addon.pooling import Pooling

RESNET = ["layer1", "layer2", "layer3", "layer4"]
SWIN = ["features.1", "features.3", "features.5", "features.7"]
OWN = {
    "torchvision:resnet18": RESNET,
    "torchvision:resnet50": RESNET,
    "torchvision:resnext50_32x4d": RESNET,
    "torchvision:wide_resnet50_2": RESNET,
    "torchvision:regnet_x_400mf": [f"trunk_output.block{k}" for k in range(1, 5)],
    "torchvision:mobilenet_v2": ["features.3", "features.6", "features.13", "features.18"],
    "torchvision:efficientnet_b0": ["features.2", "features.3", "features.5", "features.8"],
    "torchvision:shufflenet_v2_x0_5": ["maxpool", "stage2", "stage3", "conv5"],
    "torchvision:densenet121": [f"features.denseblock{k}" for k in range(1, 5)],
    "torchvision:convnext_tiny": SWIN,
    "torchvision:swin_v2_t": SWIN,
    "torchvision:vgg11": ["features.9", "features.14", "features.19", "features.20"],
    "timm:resnet50": RESNET,
    "timm:swinv2_cr_tiny_ns_224": [f"stages.{k}" for k in range(4)],
    "timm:tnt_s_legacy_patch16_224": ["blocks.2", "blocks.5", "blocks.8", "blocks.11"],
    "timm:crossvit_9_240": ["blocks.0", "blocks.1", "blocks.2"],
}
ONLY = {"timm:swinv2_cr_tiny_ns_224": 224, "timm:tnt_s_legacy_patch16_224": 224, "timm:crossvit_9_240": 240}
AT_224 = {
    "torchvision:inception_v3": ["Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"],
    "torchvision:maxvit_t": [f"blocks.{k}" for k in range(4)],
    "torchvision:vit_b_32": [f"encoder.layers.encoder_layer_{k}" for k in (2, 5, 8, 11)],
}


def own_stages(spec, *size):
    home, name = spec.split(":")
    place = "cpu" if "regnet" in name else "meta"  # torchvision computes its widths with tensors
    with warnings.catch_warnings(), torch.device(place):
        warnings.simplefilter("ignore")
        more = {"init_weights": False} if name == "inception_v3" else {}
        net = timm.create_model(name) if home == "timm" else torchvision.models.get_model(name, weights=None, **more)
    return of(net, *size)


def of(net, *size):
    net = prepared(net, None, "auto", 3).module.eval()
    if len({t.is_meta for t in (*net.parameters(), *net.buffers())}) > 1:
        net = net.to_empty(device="cpu")
    device = next((p.device for p in net.parameters()), None)
    with torch.no_grad():
        return list(stages(net, torch.zeros(2, 3, *size, device=device), net))


@pytest.mark.parametrize("spec", [*OWN, *AT_224])
def test_stages_are_modules_on_the_main_path(spec):
    for edge in (ONLY[spec],) if spec in ONLY else (224,) if spec in AT_224 else (224, 64):
        assert own_stages(spec, edge, edge) == (OWN | AT_224)[spec]


def test_stages_of_images_that_are_not_square():
    assert own_stages("torchvision:resnet18", 256, 128) == RESNET  # layer1 returns [2, 64, 64, 32]
    assert own_stages("torchvision:swin_t", 256, 128) == SWIN
    steps = [nn.Conv2d(3, 3, 1, (1, 2)), nn.Conv2d(3, 8, 1, (2, 1)), nn.Conv2d(8, 3, 1, 2)]  # 32 x 4, 16 x 4, 8 x 2
    assert of(nn.Sequential(*steps), 32, 8) == ["0", "1", "2"]


def test_operations_of_one_resolution_are_stages_only_where_no_blocks_are():
    flat = [nn.Conv2d(3, 3, 1) if k % 2 == 0 else nn.ReLU() for k in range(8)]
    assert of(nn.Sequential(*flat), 16, 16) == ["0", "2", "4", "6"]
    stem = [nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)]
    assert of(nn.Sequential(*stem, nn.Sequential(block(3), block(3))), 16, 16) == ["2", "3.0", "3.1"]


def block(width):
    return nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())


class Inside(nn.Module):
    """A network inside a part whose name is that of a row."""

    def __init__(self, name, *parts):
        super().__init__()
        self.add_module(name, nn.Sequential(*parts))
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.pool(next(self.children())(x)).flatten(1)


class Path(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.backbone = (block(3) for _ in range(4))

    def forward(self, x):
        return self.backbone(self.third(self.second(self.first(x)))).mean((2, 3))


def test_no_stage_vanishes_because_of_its_name():
    for name in ("backbone", "pixels", "untrained"):
        inside = of(Inside(name, nn.Conv2d(3, 3, 3, padding=1), block(3), block(3)), 32, 32)
        assert inside == [f"{name}.0", f"{name}.1", f"{name}.2"]
    assert of(Path(), 64, 64) == ["first", "second", "third"]
    assert len(of(nn.Sequential(Path(), nn.Identity()), 64, 64)) == 4


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.num_features = nn.Conv2d(3, 16, 4, 4), 16
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 4, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(self.patches(x).flatten(2).permute(2, 0, 1)).mean(0)


def test_what_has_no_images_in_its_first_dimension_is_no_stage():
    images, net = pages.squares(20).images, SequenceFirst()
    assert of(net, 16, 16) == ["patches"]
    options = {"size": 16, "draws": 1, "bootstrap": 0}
    assert audit(net, images, **options).spaces == ("pixels", "patches", "backbone", "untrained")
    with pytest.raises(ValueError, match=r"layers: .* has the images in its first dimension: got \[16, 40, 16\]"):
        audit(net, images, layers=("encoder.layers.1",), **options)


# ---- rows of layers for images that are not square


@pytest.mark.parametrize(
    "shape,size,grid",
    [
        ((2, 64, 64, 32), (256, 128), (64, 32)),
        ((2, 8, 4, 96), (256, 128), (8, 4)),
        ((2, 8, 12, 96), (64, 96), (8, 12)),
        ((2, 12, 12, 6), (64, 32), (12, 6)),
        ((2, 7, 7, 64), (224, 224), (7, 7)),
        ((2, 64, 7, 7), (224, 224), (7, 7)),
    ],
)
def test_the_channels_of_a_map_are_found_by_the_images_aspect_ratio(shape, size, grid):
    assert positions(shape, size) == math.prod(grid)
    y = torch.rand(shape)
    first = y if tuple(shape[2:]) == grid else y.permute(0, 3, 1, 2)
    expected = nn.functional.adaptive_avg_pool2d(first, (2, 2)).flatten(1)
    torch.testing.assert_close(layers.row(y, size), expected)


@pytest.mark.parametrize("before,grid,size", [(1, (8, 4), (256, 128)), (0, (16, 8), (256, 128)), (5, (6, 9), (64, 96))])
def test_tokens_of_images_that_are_not_square_lie_in_a_grid(before, grid, size):
    y = torch.rand(2, before + math.prod(grid), 3)
    there = y[:, before:].unflatten(1, grid).permute(0, 3, 1, 2)
    expected = nn.functional.adaptive_avg_pool2d(there, (2, 2)).flatten(1)
    torch.testing.assert_close(layers.row(y, size), expected)
    assert layers.row(torch.rand(2, 40, 3), (97, 64)).shape == (2, 3)


def test_an_audit_of_images_that_are_not_square_reads_maps_as_they_are():
    net = nn.Conv2d(3, 16, 3, padding=1)
    model = layers.Layers(net, Pooling(16, "auto", None, False, "net"), {"map": net}, None)
    x = torch.rand(2, 3, 16, 8)
    torch.testing.assert_close(model(x)["map"], nn.functional.adaptive_avg_pool2d(net(x), (2, 2)).flatten(1))
