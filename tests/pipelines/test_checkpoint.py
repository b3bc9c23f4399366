"""A pretrained backbone and a linear probe, before and after: the backbone is left as it was."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import script
from torchvision.models import resnet18

from ssd_addon import StyleHeads, runs
from ssd_addon.metrics import embed

pytestmark = pytest.mark.slow


def test_spaces_come_beside_the_same_features(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for c in ("cat", "dog"):
        (tmp_path / "data" / c).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "data" / c / f"{i}.png")
    torch.manual_seed(0)
    weights = resnet18().state_dict()
    torch.save(weights, tmp_path / "w.pt")
    arguments = ["--data", str(tmp_path / "data"), "--weights", str(tmp_path / "w.pt"), "--size", "32"]
    arguments += ["--batch-size", "16", "--workers", "0"]
    before = script("before/checkpoint").main(arguments)
    ours, net = script("checkpoint"), resnet18()
    ours.resnet18 = lambda: net
    after = ours.main([*arguments, "--epochs", "1"])
    assert set(after) == {"content", "spatial", "color", "backbone"}
    assert after["backbone"] == before["backbone"]
    assert all(torch.equal(t, weights[k]) for k, t in net.state_dict().items())
    assert "color" in capsys.readouterr().out


def test_the_heads_are_saved_and_searched_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "pipelines" / "checkpoint.md").read_text()
    saved = re.search(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE).group(1)
    model = StyleHeads(resnet18(), {"content": 4, "spatial": 2, "color": 2}, hidden=()).freeze().eval()
    model.on_sphere = True
    names = {"model": model, "features": embed(model, torch.rand(8, 3, 32, 32))}
    exec(compile(saved, "checkpoint.md", "exec"), names)
    assert names["rows"].shape == (1, 5) and 0 not in names["rows"]
    opened = runs.load("heads.pt")
    assert opened.model.on_sphere and opened.model.frozen
    assert opened.views.plan.spaces == ("content", "spatial", "color")
