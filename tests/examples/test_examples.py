"""The examples run: two steps of each, and what they write."""

import json

import pytest
import sprites
import synthetic
import torch

from ssd_addon.metrics import Circular, Exclusivity

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dataset", ["sprites", "latents"])
@pytest.mark.parametrize("method", ["ours", "content-only"])
def test_synthetic(dataset, method, tmp_path):
    arguments = ["--dataset", dataset, "--method", method, "--steps", "2", "--samples", "200", "--batch-size", "12"]
    result = synthetic.main([*arguments, "--size", "32", "--out", str(tmp_path)])
    assert result["steps"] == 2
    expected = {"metrics.json", "matrix.png", "curves.png", "log.jsonl", "model.pt"}
    assert expected <= {p.name for p in tmp_path.iterdir()}
    assert (tmp_path / "views.png").exists() == (dataset == "sprites")
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["config"]["method"] == method
    if dataset == "latents":
        assert stored["exclusivity"] is None
    else:
        tests = Exclusivity.from_json(stored["exclusivity"])
        assert tests.n == 200 and tests.null == "permutations" and tests.own["content"] == ("shape",)


def test_a_run_is_scored_again_with_its_own_configuration(tmp_path, capsys):
    arguments = ["--dataset", "latents", "--dependent", "--seed", "3", "--amp", "--steps", "2", "--samples", "200"]
    first = synthetic.main([*arguments, "--batch-size", "12", "--out", str(tmp_path)])
    again = synthetic.main(["--evaluate", "--out", str(tmp_path)])  # neither latents nor the seed is said again
    assert again["config"] == first["config"] and again["steps"] == 2
    assert again["tables"] == json.loads(json.dumps(first["tables"]))
    with pytest.raises(SystemExit):
        synthetic.main(["--evaluate", "--out", str(tmp_path / "none")])
    assert "expected metrics.json and model.pt of a finished run" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_sprites_are_where_and_what_their_factors_say():
    f = sprites.draw_factors(64, torch.Generator().manual_seed(0))
    x = sprites.render(f)
    assert x.shape == (64, 3, 48, 48) and x.min() >= 0 and x.max() <= 1
    weight = x.sum(dim=1)
    line = (torch.arange(48) + 0.5) / 24 - 1
    for axis, name in ((1, "x"), (2, "y")):
        centre = (weight.sum(dim=axis) * line).sum(dim=1) / weight.sum(dim=(1, 2))
        symmetric = f["shape"] < 2  # square and ellipse: the centre of mass is the position
        torch.testing.assert_close(centre[symmetric], f[name][symmetric], atol=0.02, rtol=0)
    turned = sprites.render(f | {"rotation": f["rotation"] + torch.pi / 2})
    square = f["shape"] == 0
    torch.testing.assert_close(turned[square], x[square], atol=1e-3, rtol=0)


def test_dsprites_file_of_another_kind(tmp_path):
    import numpy as np

    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="dSprites arrays"):
        sprites.load_dsprites(tmp_path / "other.npz", 2, torch.Generator())


def test_shares_of_the_variance_tell_how_much_of_a_space_a_factor_takes():
    g = torch.Generator().manual_seed(0)
    angle, kind = torch.rand(500, generator=g) * 6.2831853, torch.randint(3, (500,), generator=g)
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    noise = torch.randn(500, 2, generator=g)
    embeddings = {"circle": circle, "noise": noise, "mostly": torch.cat([circle, 0.1 * noise], dim=1)}
    found = synthetic.shares(embeddings, {"hue": Circular(angle), "shape": kind})
    assert found["circle"]["hue"] > 0.999 and found["circle"]["shape"] < 0.05
    assert found["noise"]["hue"] < 0.1 and 0.9 < found["mostly"]["hue"] < 1


@pytest.mark.parametrize("given", ["content", "content=x", "content=0", "colour=4", "content=-3"])
def test_widths_that_make_no_sense_are_refused(given, tmp_path):
    with pytest.raises(SystemExit, match="expected NAME=D .*names of content, color, spatial: got"):
        synthetic.main(["--steps", "1", "--widths", given, "--out", str(tmp_path)])
