"""examples/retrieval.py: a model of known spaces and a run are opened and searched."""

import json
import math

import numpy as np
import pytest
import retrieval
import torch
from imagenet_runs import run
from PIL import Image


@pytest.fixture
def colors(tmp_path):
    """40 images in two classes, each of one color, or gray in the second class."""
    g = torch.Generator().manual_seed(0)
    for i in range(40):
        folder = tmp_path / "images" / ("gray" if i % 2 else "colored")
        folder.mkdir(parents=True, exist_ok=True)
        levels = torch.rand(3, generator=g) if i % 2 == 0 else torch.rand(1, generator=g).expand(3)
        pixels = (levels * 255).round().to(torch.uint8).view(1, 1, 3).expand(12, 12, 3)
        Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(folder / f"{i}.png")
    (tmp_path / "spaces.py").write_text(
        "import torch\n"
        "class Spaces(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        m = x.mean((2, 3))\n"
        "        light = m.mean(1, keepdim=True)\n"
        "        light_or_dark = torch.cat([light, 1 - light], 1)\n"
        "        return {'content': torch.ones(len(x), 2), 'light': light_or_dark, 'color': m - light}\n"
    )
    return tmp_path


def test_a_model_of_known_spaces(colors):
    out = colors / "out" / "table.json"
    given = [f"{colors / 'spaces.py'}:Spaces", "--data", str(colors / "images"), "--size", "8", "-k", "2"]
    table = retrieval.main([*given, "--out", str(out)])
    assert table.spaces == ("content", "light", "color", "pixels")
    assert table["light", "brightness"] > 0.8 > table["color", "brightness"]
    assert table["color", "hue"] > 0.8 > table["content", "hue"]
    assert "defined for 20 of 40 images" in table.notes["color", "hue"], "gray images have no hue"
    assert table["color", "class"] > 0.3 and math.isnan(table["color", "sharpness"]), "even images"
    stored = json.loads(out.read_text())
    assert stored["factors"][-1] == "class" and {"distance", "chance", "ideal"} <= stored["cells"][0].keys()
    assert retrieval.main([*given, "--images", "30"]).n_train == 30


@pytest.mark.slow
def test_a_run_is_opened_and_searched(data, capsys):
    run(data, "run", "--steps", "1", "--measure", "0")
    table = retrieval.main([str(data.parent / "run"), "--data", str(data / "train"), "-k", "2"])
    assert table.spaces == ("content", "spatial", "color", "backbone", "pixels") and table.n_train == 12
    assert "2 nearest of 12 images" in capsys.readouterr().out
