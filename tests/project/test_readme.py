"""The README's quick start runs as it stands; links lead somewhere; the API page is the docstrings'."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kornia.augmentation as K
import numpy as np
import PIL.Image
import torch
from torch import nn

from ssd_addon import JointEntropyLoss, StructuredTransform, StructuredViews, StyleHeads, presets, recipe

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
    assert torch.isfinite(names["loss"])
    assert backbone[0].weight.grad.abs().sum() > 0
    assert {n: tuple(t.shape) for n, t in names["z"].items()} == {
        "content": (4, 4, 64), "spatial": (4, 4, 32), "color": (4, 4, 32),
    }  # fmt: skip
    defaults = recipe("color_spatial")  # what the page calls the recommended settings
    assert str(names["criterion"]) == str(JointEntropyLoss(**defaults.loss))


def diff_of_the_readme() -> tuple[list[str], list[str]]:
    """The lines that go and the lines that come."""
    (diff,) = re.findall(r"```diff\n(.*?)```", README.read_text(), flags=re.DOTALL)
    lines = diff.splitlines()
    return [x[1:].strip() for x in lines if x[0] == "-"], [x[1:].strip() for x in lines if x[0] == "+"]


def loss_of(lines: list[str], names: dict[str, Any], views: int) -> torch.Tensor:
    """Of a small lightly pipeline whose head, transform, criterion and step are these lines."""
    head, transform, criterion, *step = lines
    owner = SimpleNamespace()
    exec(head, {"self": owner, **names})
    scope = {**names, "device": "cpu", "model": owner.projection_head}
    exec(transform, scope)
    exec(criterion, scope)
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    samples = [scope["transform"](image) for _ in range(4)]
    pooled = [torch.stack(v).flatten(1)[:, :512] for v in zip(*samples, strict=True)]
    assert len(pooled) == views
    scope["batch"] = [pooled]
    exec("\n".join(step), scope)
    return scope["loss"]


def test_the_lines_of_lightly_that_change_are_those_of_a_pipeline_that_runs():
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    gone, come = diff_of_the_readme()
    theirs = {"SimCLRProjectionHead": SimCLRProjectionHead, "SimCLRTransform": SimCLRTransform}
    ours = {"StructuredTransform": StructuredTransform, "StyleHeads": StyleHeads, "presets": presets, "torch": torch}
    assert torch.isfinite(loss_of(gone, theirs | {"NTXentLoss": NTXentLoss}, views=2))
    assert torch.isfinite(loss_of(come, ours | {"JointEntropyLoss": JointEntropyLoss}, views=4))
    before, after = (
        README.parent / "examples" / "pipelines" / p for p in ("before/lightly_plain.py", "lightly_plain.py")
    )
    for lines, script in ((gone[3:], before), (come[3:], after)):  # the step, word for word that of the full example
        written = [x.strip() for x in script.read_text().splitlines()]
        assert all(x in written for x in lines)


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


def test_links_lead_somewhere():
    for page in (README, *README.parent.glob("docs/**/*.md"), README.parent / "kernels" / "README.md"):
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#]+)\)", prose):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_api_page_is_current():
    spec = importlib.util.spec_from_file_location("build", README.parent / "docs" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert build.PAGE.read_text() == build.page(), "run python docs/build.py"
