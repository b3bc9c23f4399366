"""The snippets of README and pages run as they stand."""

import re
from pathlib import Path

import kornia.augmentation as K
import torch
from torch import nn

from ssd_addon import StructuredViews, StyleHeads

README = Path(__file__).parents[2] / "README.md"


def small_backbone() -> nn.Module:
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone.num_features = 8
    return backbone


def test_quick_start():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    backbone = small_backbone()
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    names = {"backbone": backbone, "images": images}
    exec(compile(blocks[0], str(README), "exec"), names)
    assert torch.isfinite(names["terms"].loss)
    assert backbone[0].weight.grad.abs().sum() > 0
    assert list(names["terms"].invariance) == ["content", "color", "spatial"]


def test_the_recipe_as_it_is_written_down():
    page = README.parent / "docs" / "choose-your-groups.md"
    block = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)[0]
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    names = {"backbone": small_backbone(), "images": images, "torch": torch}
    exec(compile(block, str(page), "exec"), names)
    assert torch.isfinite(names["loss"]) and names["views"].cross_image == ("blur",)


def test_extending_it_as_it_is_written_down():
    page = README.parent / "docs" / "extend.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    views = StructuredViews({"color": [K.ColorJitter(hue=0.1)]}, seed=0)
    names = {"model": StyleHeads(small_backbone(), {"content": 4, "color": 3}, hidden=(8,))}
    names |= {"images": torch.rand(6, 3, 8, 8), "batch": views(torch.rand(6, 3, 8, 8))}
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert torch.isfinite(names["terms"].loss) and names["ascent"].steps == 1
    for part in ("std", "field"):
        query, _, _, noise = (p["noise"]["0.Noise"][part] for p in names["batch"].parameters)
        assert torch.equal(query, noise)
