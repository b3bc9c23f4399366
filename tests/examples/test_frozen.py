"""Heads alone on a frozen checkpoint: two steps of the example, and its page."""

import importlib.util
import json
from pathlib import Path

import frozen
import numpy as np
import pytest
import synthetic
import torch
from layers import Layers
from photographs import in_memory
from PIL import Image
from torch import nn

from ssd_addon import StructuredViews, StyleHeads, recipe
from ssd_addon.metrics import parameter_matrix

pytestmark = pytest.mark.slow
SPEC = importlib.util.spec_from_file_location("docs_frozen", Path(__file__).parents[2] / "docs" / "frozen.py")
docs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(docs)
TINY = ["--checkpoint-steps", "2", "--steps", "2", "--batch-size", "8", "--draws", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split in ("train", "val"):
        for c in ("cat", "dog"):
            (root / split / c).mkdir(parents=True)
            for i in range(10):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(root / split / c / f"{i}.png")
    return root


def test_rows_are_trained_scored_and_not_run_again(data, tmp_path, capsys):
    out = tmp_path / "frozen.jsonl"
    arguments = ["--data", str(data), "--out", str(out), *TINY, "--rows"]
    first = frozen.main([*arguments, "frozen: 1 hidden layer"])
    assert [line["row"] for line in first] == ["checkpoint", "frozen: 1 hidden layer"]
    assert set(first[0]["tables"]["groups"]) == {"content", "backbone"}
    checkpoint, heads = (line["tables"]["groups"] for line in first)
    assert heads["backbone"] == checkpoint["backbone"] and set(heads) == {"content", "spatial", "color", "backbone"}
    assert first[0]["accuracy"]["backbone"] == first[1]["accuracy"]["backbone"]  # the backbone is as it was
    capsys.readouterr()
    lines = frozen.main([*arguments, "frozen: 1 hidden layer", "trained in full"])
    said = capsys.readouterr().out
    assert "frozen: 1 hidden layer" not in said and "checkpoint:" not in said and "trained in full: 3 steps" in said
    assert len(lines) == 3 == len(out.read_text().splitlines()) and lines[:2] == first
    assert lines[2]["tables"]["groups"]["backbone"] != checkpoint["backbone"]
    assert all(json.loads(line)["config"]["steps"] == 2 for line in out.read_text().splitlines())


def test_weights_of_a_file_are_the_checkpoint(data, tmp_path):
    torch.manual_seed(3)
    net = synthetic.ConvNet()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    arguments = ["--data", str(data), *TINY, "--rows", "frozen: layers in 2 x 2 cells"]
    arguments += ["--out", str(tmp_path / "b.jsonl"), "--weights", str(tmp_path / "w.pt")]
    (line,) = frozen.main(arguments)
    assert line["config"]["weights"].startswith("w.pt ")
    views = StructuredViews(**recipe("color_spatial", size=32).views, seed=0)
    _, (images, _) = in_memory(data, 32)
    made = parameter_matrix(Layers(net, line["config"]["layers"], 2), views, images, draws=1, on_sphere=True)
    expected = {f: round(made["backbone", f], 3) for f in made.factors}
    assert line["tables"]["groups"]["backbone"] == expected


def test_layers_are_averaged_in_cells_and_leave_no_hook():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.Flatten())
    x = torch.rand(2, 3, 8, 8)
    early = net[0](x)
    both = Layers(net, ["0", "1"], grid=2)
    expected = torch.cat([early.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)).flatten(1)], dim=1)
    torch.testing.assert_close(both(x)[:, :16], expected)
    assert both(x).shape == (2, 4 * 4 + 5 * 4)
    assert not net[0]._forward_hooks
    assert StyleHeads(both, {"content": 4, "color": 2}).in_features == 36


def cells(y, grid):
    """A map [N, C, H, W], averaged cell by cell: [N, C * grid * grid]."""
    rows = [part.chunk(grid, 3) for part in y.chunk(grid, 2)]
    return torch.stack([cell.mean((2, 3)) for row in rows for cell in row], dim=2).flatten(1)


@pytest.mark.parametrize("grid", [1, 2])
@pytest.mark.parametrize("before,known", [*((k, known) for k in (0, 1, 2, 4, 5) for known in (True, False)), (3, True)])
def test_the_tokens_of_an_image_are_averaged_in_cells(before, known, grid):
    class Tokens(nn.Module):
        def forward(self, x):
            return torch.cat([torch.full((len(x), before, x.shape[1]), 9.0), x.flatten(2).transpose(1, 2)], 1)

    net, x = nn.Sequential(Tokens(), nn.Identity()), torch.rand(2, 3, 8, 8)
    if known:
        net.num_prefix_tokens = before
    torch.testing.assert_close(Layers(net, ["0"], grid)(x), cells(x, grid))
    wide = torch.rand(2, 3, 4, 9)  # 36 tokens, which are no square
    got = Layers(net, ["0"], grid)(wide)
    every = wide.mean((2, 3)) if known else net(wide).mean(1)
    torch.testing.assert_close(got, every.repeat_interleave(grid * grid, 1))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (8, 4), (4, 8), (2, 2)])
def test_the_channels_of_maps_come_first_or_last(size, last):
    class Maps(nn.Module):
        def forward(self, x):
            return x.movedim(1, -1) if last else x

    x = torch.rand(2, 6, *size)
    torch.testing.assert_close(Layers(nn.Sequential(Maps()), ["0"], 2)(x), cells(x, 2))


def test_layers_of_transformers_are_read_and_others_refused():
    import timm
    import torchvision

    net = timm.create_model("test_vit", img_size=64, num_classes=0)
    model = StyleHeads(Layers(net, ["blocks.1", "blocks.3"], grid=2), {"content": 4}, hidden=())
    assert model.in_features == 2 * 64 * 4
    fresh = timm.create_model("test_vit", img_size=64, num_classes=0)
    fresh.load_state_dict({k.removeprefix("net."): t for k, t in model.export_backbone().items()})
    swin = torchvision.models.swin_t()
    assert StyleHeads(Layers(swin, ["features.1", "features.3"], grid=2), {"content": 4}).in_features == (96 + 192) * 4
    resnet = torchvision.models.resnet18()
    for layers in (["fc"], ["layer1", "fc"]):
        with pytest.raises(ValueError, match=r"layers: expected layers that return maps .* got \[2, 1000\]"):
            Layers(resnet, layers)(torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match="got tuple"):
        Layers(nn.Sequential(nn.LSTM(4, 4)), ["0"])(torch.rand(2, 3, 4))


def test_the_page_shows_the_results_as_they_are(tmp_path, monkeypatch):
    page = docs.PAGE.read_text(encoding="utf-8")
    assert page == docs.filled(page), "run python docs/frozen.py"
    assert {match[2] for match in docs.BLOCK.finditer(page)} == {*docs.COLUMNS, "seeds"}
    assert {"checkpoint", *docs.ROWS} == {"checkpoint", *frozen.ROWS} == set(docs.lines())
    monkeypatch.setattr(docs, "PICTURE", tmp_path / "frozen.png")
    docs.draw()
    with Image.open(tmp_path / "frozen.png") as picture:
        assert picture.size[0] > 1000
