"""Python snippets of pages without a test of their own run as they stand, and every page with snippets is tested."""

import re
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import pytest
import torch
from series import Gain, SeriesNet, Shift, Window
from torch import nn
from torch.utils.data import DataLoader

from ssd_addon import (
    CollapseAlarm,
    JointEntropyLoss,
    Monitor,
    StructuredCollate,
    StructuredViews,
    StyleHeads,
    ViewBatch,
    ViewPlan,
    recipe,
    runs,
)
from ssd_addon.collate import ImageFiles

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TESTED_ELSEWHERE = {
    "README.md": "test_readme.py",
    "docs/start.md": "test_readme.py",
    "docs/faq.md": "test_readme.py",
    "docs/extend.md": "test_readme.py",
    "docs/results/recipe.md": "test_readme.py",
    "docs/pipelines/lightly.md": "tests/pipelines/test_lightly.py",
    "docs/pipelines/checkpoint.md": "the page holds examples/layers.py, which tests/pipelines tests",
    "docs/folder-to-report.md": "tests/examples/test_notebook.py",
}
HERE = (
    "docs/choose-your-groups.md",
    "docs/deploy.md",
    "docs/domains.md",
    "docs/training.md",
    "docs/views.md",
    "kernels/README.md",
)


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)


def run(block: str, page: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(block, page, "exec"), names)
    return names


def backbone() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.num_features = 8
    return net


def test_every_page_with_snippets_is_tested():
    pages = [ROOT / "README.md", ROOT / "kernels" / "README.md", *DOCS.glob("**/*.md")]
    found = {str(p.relative_to(ROOT)) for p in pages if "```python" in p.read_text()}
    assert found == {*TESTED_ELSEWHERE, *HERE}


def test_choose_your_groups():
    _, _, crossed, asked = blocks("docs/choose-your-groups.md")
    groups = {"color": [K.ColorJitter(hue=0.2, p=1.0)], "blur": [K.RandomGaussianBlur((5, 5), (0.1, 2.0), p=1.0)]}
    names = run(crossed, "choose-your-groups.md", {"StructuredViews": StructuredViews, "groups": groups})
    assert names["views"].cross_image == ("blur",)
    images = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    names = run(asked, "choose-your-groups.md", {"groups": groups, "images": images})
    assert list(names["r"].spaces) == ["content", "color", "blur"] and names["r"].tested is not None


def test_domains():
    (block,) = blocks("docs/domains.md")
    names = {"StructuredViews": StructuredViews, "StyleHeads": StyleHeads, "backbone": SeriesNet()}
    names = run(block, "domains.md", names | {"Gain": Gain, "Shift": Shift, "Window": Window})
    z = names["model"](names["views"](torch.rand(4, 4, 160)))
    assert {n: t.shape[-1] for n, t in z.items()} == {"content": 8, "gain": 4, "shift": 4}


@pytest.mark.slow
def test_deploy(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import torchvision

    monkeypatch.chdir(tmp_path)
    r = recipe("color_spatial", size=64)
    views, model = StructuredViews(**r.views, seed=0), StyleHeads(torchvision.models.resnet18(), r.spaces, hidden=(8,))
    model(views(torch.rand(4, 3, 64, 64)))  # batch statistics that are not 0 and 1
    names = {"model": model, "views": views, "loader": [torch.rand(2, 3, 64, 64)] * 2}
    for block in blocks("docs/deploy.md"):
        names = run(block, "deploy.md", names)
    x = torch.rand(5, 3, 64, 64)
    expected = torch.nn.functional.normalize(model(views.plain(x))["color"], dim=1)
    found = [torch.export.load("color.pt2").module()(x)]
    session = onnxruntime.InferenceSession("color.onnx", providers=["CPUExecutionProvider"])
    found.append(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]))
    for z in found:
        torch.testing.assert_close(z, expected, rtol=1e-3, atol=1e-4)
    assert names["z"]["color"].shape == (4, 32)


class TestTraining:
    def test_monitor_and_runs(self, tmp_path, monkeypatch):
        alarm, guarded, _, _ = blocks("docs/training.md")
        monkeypatch.chdir(tmp_path)
        model = StyleHeads(backbone(), {"content": 4, "color": 2}, hidden=())
        names = {"CollapseAlarm": CollapseAlarm, "Monitor": Monitor, "total_steps": 400, "model": model}
        run(alarm, "training.md", names)
        names = {"model": model, "parts": {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}, "config": {}}
        assert run(guarded, "training.md", names)["stored"] is None and (tmp_path / "runs" / "mine").is_dir()

    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9 or newer")
    def test_muon(self):
        *_, block = blocks("docs/training.md")
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        assert len(run(block, "training.md", {"model": model, "torch": torch})["optimizers"]) == 2

    @pytest.mark.slow
    def test_shards(self, tmp_path, monkeypatch):
        pytest.importorskip("webdataset")
        import PIL.Image
        from shard_files import ShardFiles
        from shards import write

        for k in range(8):
            folder = tmp_path / "data" / "ab"[k % 2]
            folder.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (20, 20), (30 * k, 9, 9)).save(folder / f"{k}.png")
        monkeypatch.chdir(tmp_path)
        write(ImageFiles("data"), Path("OUT/train"), "webdataset", shard_bytes=4000, workers=1, seed=0)
        _, _, block, _ = blocks("docs/training.md")
        names = {"ShardFiles": ShardFiles, "runs": runs, "StructuredCollate": StructuredCollate, "world": 1, "rank": 0}
        names |= {"DataLoader": DataLoader, "epoch": 0, "begin": 0, "batch_size": 4}
        fewer = block.replace("num_workers=8", "num_workers=0").replace(
            "StructuredCollate(224)", "StructuredCollate(16)"
        )
        assert next(iter(run(fewer, "training.md", names)["loader"]))


class TestViews:
    def test_other_libraries(self):
        pytest.importorskip("albumentations")
        first, *_ = blocks("docs/views.md")
        assert run(first, "views.md", {})["views"](torch.rand(2, 3, 32, 32)).views.shape[:2] == (4, 2)

    def test_lightly(self, tmp_path, monkeypatch):
        import PIL.Image

        (tmp_path / "images").mkdir()
        for k in range(4):
            PIL.Image.new("RGB", (40, 40), (60 * k, 9, 9)).save(tmp_path / "images" / f"{k}.png")
        monkeypatch.chdir(tmp_path)
        _, block, *_ = blocks("docs/views.md")
        for old, new in (
            ('[...], "color": [...]', '[K.RandomResizedCrop((32, 32))], "color": [K.ColorJitter(hue=0.2)]'),
            ("batch_size=256, num_workers=8", "batch_size=4"),
        ):
            assert old in block
            block = block.replace(old, new)
        model = StyleHeads(backbone(), {"content": 4, "spatial": 2, "color": 2}, hidden=())
        names = run(block, "views.md", {"K": K, "model": model, "criterion": JointEntropyLoss("simclr")})
        assert torch.isfinite(names["loss"])

    def test_pairs_of_ones_own(self):
        *_, crops, scanners, dates = blocks("docs/views.md")
        g = torch.Generator().manual_seed(0)
        images, color = torch.rand(4, 3, 40, 40, generator=g), [K.ColorJitter(hue=0.2, p=1.0)]
        model = StyleHeads(backbone(), {"content": 4, "color": 2}, hidden=())
        names = {"K": K, "StructuredViews": StructuredViews, "ViewBatch": ViewBatch, "ViewPlan": ViewPlan}
        names |= {
            "torch": torch,
            "color": color,
            "images": images,
            "model": model,
            "criterion": JointEntropyLoss("simclr"),
        }
        assert torch.isfinite(run(crops, "views.md", dict(names))["loss"])
        a, b, c = torch.rand(3, 4, 3, 16, 16, generator=g)
        names |= {"scanner_a": a, "scanner_b": b, "scanner_a_other_slides": c}
        made = run(scanners, "views.md", names | {"own": torch.arange(4), "other": torch.arange(4) + 4})["batch"]
        assert made.plan.spaces == ("content", "scanner")
        made = run(dates, "views.md", names | {"first_date": a, "second_date": b})["batch"]
        assert len(made) == 4


def test_the_kernels():
    (block,) = blocks("kernels/README.md")
    z = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    assert run(block, "kernels/README.md", {"z": z, "image_ids": torch.arange(3).repeat(2)})["lse"].shape == (6,)
