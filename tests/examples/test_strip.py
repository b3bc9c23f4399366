"""docs/strip.py: the README's first picture, its rule and its numbers."""

import importlib.util
import json
import math
from pathlib import Path

import demo
import matplotlib.image
import numpy as np
import pytest
import torch
from sprites import SHAPES, draw_factors
from synthetic import GROUPS

from ssd_addon import StyleHeads

DOCS = Path(__file__).parents[2] / "docs"
SPEC = importlib.util.spec_from_file_location("docs_strip", DOCS / "strip.py")
docs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(docs)

STORED = json.loads((DOCS / "results" / "retrieval.json").read_text())


def one_hot(shape):
    return torch.nn.functional.one_hot(shape, len(SHAPES)).float()


def circle(hue):
    return torch.stack([(2 * math.pi * hue).cos(), (2 * math.pi * hue).sin()], dim=1)


def test_a_space_of_shapes_finds_shapes_and_a_space_of_hues_finds_hues():
    f = draw_factors(300, torch.Generator().manual_seed(0))
    found = docs.precision({"content": one_hot(f["shape"]), "color": circle(f["hue"])}, f)
    assert found["content"]["shape"] == 1 and found["color"]["hue"] == 1
    assert abs(found["content"]["hue"] - 2 * docs.TOLERANCE / 360) < 0.05
    assert abs(found["color"]["shape"] - 1 / len(SHAPES)) < 0.1


def test_the_chance_is_that_of_all_other_images():
    f = draw_factors(40, torch.Generator().manual_seed(1))
    chance = docs.precision({"content": one_hot(f["shape"])}, f)["chance"]
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    apart = [abs(float(f["hue"][i] - f["hue"][j])) * 360 for i, j in pairs]
    assert chance["shape"] == pytest.approx(np.mean([bool(f["shape"][i] == f["shape"][j]) for i, j in pairs]))
    assert chance["hue"] == pytest.approx(np.mean([min(d, 360 - d) <= docs.TOLERANCE for d in apart]))


def test_hues_are_compared_around_the_circle():
    f = {"hue": torch.tensor([0.99, 0.01, 0.05, 0.5]), "shape": torch.zeros(4, dtype=torch.long)}
    assert docs.same(f, torch.tensor([0]), torch.tensor([[1, 2, 3]]))["hue"].tolist() == [[True, False, False]]


def test_the_queries_are_the_first_image_of_each_shape():
    assert docs.first_of_each(torch.tensor([2, 0, 2, 1, 0, 3])).tolist() == [1, 3, 0, 5]


def colors_of(row):
    """The colors of a line of pixels that are neither paper nor frames, from left to right, each once in a row."""
    paper = np.array([int(docs.PAPER[i : i + 2], 16) for i in (1, 3, 5)])
    seen = []
    for pixel in row:
        vivid = pixel.max() - pixel.min() > 60 and np.abs(pixel - paper).max() > 60
        if vivid and (not seen or np.abs(seen[-1] - pixel).max() > 40):
            seen.append(pixel)
    return seen


def test_each_query_has_its_neighbors_beside_it_in_their_order(tmp_path):
    vivid = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]])
    images = (vivid / 255)[:, :, None, None].expand(-1, 3, 8, 8)
    neighbors = {"content": torch.tensor([[1, 2], [3, 4]]), "color": torch.tensor([[5, 4], [2, 1]])}
    headings = {"content": ("Same object", "by content"), "color": ("Same color",)}
    docs.strip(tmp_path / "new" / "strip.png", images, torch.tensor([0, 5]), neighbors, headings, "one line\nand two")
    pixels = (matplotlib.image.imread(tmp_path / "new" / "strip.png")[..., :3] * 255).astype(int)
    assert pixels.shape[1] == docs.WIDTH
    lines = [colors_of(row) for row in pixels[::6]]
    shown = [[int((vivid - torch.tensor(c)).abs().sum(1).argmin()) for c in line] for line in lines if len(line) == 5]
    assert [*dict.fromkeys(map(tuple, shown))] == [(0, 1, 2, 5, 4), (5, 3, 4, 2, 1)]


@pytest.mark.slow
def test_the_command_writes_the_picture_and_its_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(DOCS.parent)
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    card = {"backbone": "examples/demo.py:Net", "views": {"groups": GROUPS}, "family": "simclr", "size": 48}
    StyleHeads(demo.Net(), demo.SPACES, hidden=(256,)).save(run / "model.pt", card=card)
    config = {"seed": 3, "batch_size": 8, "lr": 0.1, "threads": 2}
    (run / "metrics.json").write_text(json.dumps({"config": config, "steps": 7}))
    result = docs.main([str(run), str(out), "--samples", "60", "--shown", "2"])
    assert json.loads((out / "retrieval.json").read_text()) == result and (out / "retrieval.png").exists()
    assert result["training"] == config | {"steps": 7} and "--seed 3 --threads 2" in result["commands"][0]
    assert result.keys() == STORED.keys() and "content    same shape" in capsys.readouterr().out


def test_the_stored_numbers_are_of_all_searches_and_the_stated_images():
    scores = STORED["precision"]
    assert [*scores] == ["content", "color", "spatial", "backbone", "chance"]
    assert all(0 <= v <= 1 for each in scores.values() for v in each.values())
    assert scores["content"]["shape"] > 0.9 > 0.2 > scores["content"]["hue"]
    assert scores["color"]["hue"] > 0.9 > 0.5 > scores["color"]["shape"]
    f = draw_factors(STORED["held_out"]["images"], torch.Generator().manual_seed(STORED["held_out"]["seed"]))
    assert STORED["queries"] == dict(zip(SHAPES, docs.first_of_each(f["shape"]).tolist(), strict=True))
    assert {"batch_size", "lr", "seed", "steps", "threads"} == set(STORED["training"])
    assert STORED["nearest"] == docs.NEAREST and STORED["hue_tolerance_degrees"] == docs.TOLERANCE


def test_the_headings_give_the_measured_shares():
    found = docs.headings(STORED["precision"])
    assert found["content"] == (
        "Same object, any color",
        "nearest in the content space",
        "same shape 99%, same hue 11%",
    )
    assert [*found] == [*docs.SEARCHES]
