"""The snippets of README and pages run as they stand."""

import re
import shlex
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from PIL import Image
from sprites import draw_factors, render
from torch import nn

import ssd_addon
from ssd_addon import JointEntropyLoss, StructuredTransform, StructuredViews, StyleHeads, presets, recipe, runs
from ssd_addon.__main__ import main
from ssd_addon.collate import ImageFiles

README = Path(__file__).parents[2] / "README.md"
DOCS = README.parent / "docs"


def small_backbone() -> nn.Module:
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone.num_features = 8
    return backbone


def test_quick_start(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    backbone = small_backbone()
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    names = {"backbone": backbone, "loader": [images]}
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], str(README), "exec"), names)
    assert torch.isfinite(names["loss"])
    assert all(p.grad is not None for p in names["equivariance"].parameters())
    saved = runs.load(tmp_path / "model.pt", backbone=small_backbone())
    assert saved.views is not None and saved.card["size"] == 224
    assert saved.model.on_sphere  # scored as SimCLR's loss compares
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
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
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
    for name in ("choose-your-groups.md", "results/recipe.md"):  # content's own SSL loss
        (added,) = [
            b for b in re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL) if "alone" in b
        ]
        before = names["loss"].item()
        exec(compile(added, name, "exec"), names)
        assert names["loss"].item() != before and torch.isfinite(names["loss"])


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


def blocks_of(page, language=""):
    text = (DOCS / page).read_text()
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A folder of images named as on the page, in the present folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photographs").mkdir()
    images = render(draw_factors(60, torch.Generator().manual_seed(0)), 96)
    for k, image in enumerate(images):
        pixels = (image.permute(1, 2, 0) * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "photographs" / f"{k:02}.png")
    return tmp_path


def smaller(text, **changes):
    """The text with other numbers, each of which stands in it."""
    for old, new in changes.values():
        assert old in text, f"expected {old!r} on the page"
        text = text.replace(old, new)
    return text


@pytest.mark.slow
def test_the_start_page_as_it_is_written_down(photographs, capsys):
    (install, audit_command, report_command), (train, search) = blocks_of("start.md"), blocks_of("start.md", "python")
    assert install.startswith("pip install . torchvision")
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a collapse alarm has nothing to judge in two steps
        fewer = smaller(
            train, batch=("batch_size=128", "batch_size=8"), epochs=("range(20)", "range(1)"),
            size=("size=64", "size=32"), card=('"size": 64', '"size": 32'),
        )  # fmt: skip
        exec(compile(fewer, "start.md", "exec"), names)
        exec(compile(smaller(search, batch=("batch_size=128", "batch_size=30")), "start.md", "exec"), names)
    assert names["step"] == 7 and torch.isfinite(names["loss"]) and len(names["rows"][0]) == 5
    audit_command = smaller(
        audit_command,
        weights=("--pretrained ", ""),
        size=("--size 96", "--size 32"),
        pairs=("--samples 300", "--draws 1"),
    )
    for command in (audit_command, report_command):
        words = shlex.split(command.replace("\\\n", " "))
        assert words[:3] == ["python", "-m", "ssd_addon"]
        assert main(words[3:]) == 0, capsys.readouterr().err
    assert (photographs / "audit.html").is_file() and (photographs / "report.html").is_file()
    assert "training" in (photographs / "report.html").read_text().lower()


def test_the_start_page_refuses_fewer_images_than_a_batch(photographs):
    train, _ = blocks_of("start.md", "python")
    with pytest.raises(ValueError, match="photographs: expected a full batch of images: got 60"):
        exec(compile(train, "start.md", "exec"), {})


@pytest.mark.slow
def test_the_answers_of_the_faq_as_they_are_written_down(photographs):
    flip, jitter = K.RandomHorizontalFlip(), K.ColorJitter(brightness=(0.5, 1.5), hue=0.2, p=1.0)
    names = {name: getattr(ssd_addon, name) for name in ssd_addon.__all__ if name != "__version__"}
    names |= {"ssd_addon": ssd_addon, "torch": torch, "K": K, "overwrites": ssd_addon.recipes.overwrites}
    names |= {"flip": flip, "jitter": jitter, "blur": K.RandomGaussianBlur((3, 3), (0.1, 2.0))}
    names |= {"normalize": K.Normalize(torch.zeros(3), torch.ones(3)), "mean": torch.zeros(3), "std": torch.ones(3)}
    names |= {"files": ImageFiles("photographs"), "DataLoader": torch.utils.data.DataLoader}
    names |= {"backbone": small_backbone(), "monitor": ssd_addon.Monitor("log.jsonl"), "step": 0}
    images = render(draw_factors(120, torch.Generator().manual_seed(1)), 16)
    draws = StructuredViews({"color": [jitter]}, seed=0)
    model = StyleHeads(small_backbone(), {"content": 4, "color": 3}, hidden=(8,), norm="layer")
    names |= {"images": images, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    names["equivariance"] = ssd_addon.EquivarianceLoss(model.spaces, draws, temperature=0.15)
    found = blocks_of("faq.md", "python")
    assert len(found) == (DOCS / "faq.md").read_text().count("\n### ")
    for block in found:
        batch = draws(images)
        names |= {"model": model, "views": draws, "batch": batch, "z": model(batch)}
        names["criterion"] = ssd_addon.JointEntropyLoss()
        if "audit(" in block:
            block = block.replace("images)", "images, size=16, draws=1)")
        exec(compile(block, "faq.md", "exec"), names)
    assert torch.isfinite(names["loss"]) and len(names["rows"][0]) == 5
