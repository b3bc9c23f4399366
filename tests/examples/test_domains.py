"""Examples on other data than RGB photographs: operations against loops, what is drawn, a few steps of training."""

import json

import domains
import numpy as np
import pytest
import scenes
import series
import torch

from ssd_addon.__main__ import main as command

FILES = {"metrics.json", "matrix.png", "curves.png", "log.jsonl", "model.pt"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_operations_of_series_against_loops():
    x = torch.randn(5, 4, 160, generator=generator())
    gain, shift, window = series.Gain(), series.Shift(), series.Window()
    k, o, w = (op.draw(tuple(x.shape), generator(1)) for op in (gain, shift, window))
    scaled, shifted, cut = gain.apply(x, k), shift.apply(x, o), window.apply(x, w)
    assert cut.shape == (5, 4, 128)
    for b in range(5):
        factor, offset, start = float(k["log_gain"][b].exp()), float(o["offset"][b]), int(w["start"][b])
        assert 1 / 3 <= factor <= 3 and -2 <= offset <= 2 and 0 <= start <= 32
        for c in range(4):
            mean = sum(x[b, c].tolist()) / 160
            expected = torch.tensor([mean + factor * (v - mean) for v in x[b, c].tolist()])
            torch.testing.assert_close(scaled[b, c], expected)
            assert torch.equal(shifted[b, c], x[b, c] + offset)
            assert torch.equal(cut[b, c], x[b, c, start : start + 128])


def test_series_are_what_their_factors_say():
    x, f = series.record(400, generator())
    assert x.shape == (400, 4, 160)
    torch.testing.assert_close(x.mean((1, 2)), f["shift"], atol=0.05, rtol=0)
    torch.testing.assert_close(x.std(-1).mean(1), f["gain"].exp() * 1.01**0.5, atol=0, rtol=0.05)
    sines = f["waveform"] == 0
    spectrum = torch.fft.rfft(x[sines][:, 0] - x[sines][:, 0].mean(-1, keepdim=True)).abs()
    assert ((spectrum.argmax(1) - f["frequency"][sines]).abs() <= 1).all()


def test_a_key_of_series_shares_what_its_space_is_named_after():
    views = series.structured_views()
    batch = views(series.record(6, generator())[0])
    assert batch.views.shape == (4, 6, 4, 128) and batch.plan.spaces == ("content", "gain", "shift")
    drawn = [(p["gain"]["0.Gain"]["log_gain"], p["shift"]["0.Shift"]["offset"]) for p in batch.parameters]
    for view, shared in ((1, (False, False)), (2, (True, False)), (3, (False, True))):
        assert tuple(torch.equal(a, b) for a, b in zip(drawn[view], drawn[0], strict=True)) == shared


@pytest.mark.slow
def test_series_train_for_a_few_steps(tmp_path):
    arguments = ["--steps", "3", "--batch-size", "16", "--samples", "200"]
    result = series.main([*arguments, "--out", str(tmp_path)])
    assert {*FILES, "series.png"} == {p.name for p in tmp_path.iterdir()}
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["steps"] == 3 and stored["config"]["content"] == 8
    cells = {(c["space"], c["factor"]) for c in stored["tables"]["linear"]["cells"]}
    assert ("gain", "shift") in cells and ("content", "waveform") in cells
    assert stored["tables"] == json.loads(json.dumps(result["tables"]))


def test_a_sensor_against_loops():
    x, op = torch.rand(3, 12, 4, 4, generator=generator()), scenes.BandGain()
    p = op.draw(tuple(x.shape), generator(1))
    y = op.apply(x, p)
    assert p["log_gain"].shape == p["offset"].shape == (3, 12)
    for b in range(3):
        for c in range(12):
            gain, offset = float(p["log_gain"][b, c].exp()), float(p["offset"][b, c])
            assert 1 / 1.5 <= gain <= 1.5 and abs(offset) <= 0.03
            torch.testing.assert_close(y[b, c], (gain * x[b, c] + offset).clamp(0, 1))


def test_stain_jitter_against_loops():
    x, op = 0.1 + 0.8 * torch.rand(2, 3, 3, 3, generator=generator()), scenes.StainJitter()
    p = op.draw(tuple(x.shape), generator(1))
    y = op.apply(x, p)
    matrix = scenes.STAINS.double().numpy()
    np.testing.assert_allclose((matrix**2).sum(1), 1, rtol=1e-6)
    for b in range(2):
        scale, offset = p["log_scale"][b].exp().tolist(), p["offset"][b].tolist()
        for i in range(3):
            for j in range(3):
                stains = np.linalg.solve(matrix.T, -np.log10(x[b, :, i, j].double().numpy()))
                for s in range(2):
                    stains[s] = scale[s] * stains[s] + offset[s]
                expected = np.clip(10 ** -(matrix.T @ stains), 0, 1)
                np.testing.assert_allclose(y[b, :, i, j].numpy(), expected, atol=1e-4)


def test_no_jitter_leaves_a_stained_image_as_it_is():
    x = scenes.DOMAINS["histology"].draw(4, generator())[0]
    none = {"log_scale": torch.zeros(4, 2), "offset": torch.zeros(4, 2)}
    torch.testing.assert_close(scenes.StainJitter().apply(x, none), x, atol=1e-4, rtol=0)
    assert torch.isfinite(
        scenes.StainJitter().apply(torch.zeros(1, 3, 4, 4), {k: v[:1] for k, v in none.items()})
    ).all()


@pytest.mark.parametrize("name", scenes.DOMAINS)
def test_pictures_and_views_of_every_domain(name):
    domain = scenes.DOMAINS[name]
    x, factors = domain.draw(40, generator())
    assert x.shape == (40, domain.channels, 32, 32) and 0 <= x.min() <= x.max() <= 1
    data = domains.data(name, 40)
    data.check()
    assert set(data.factors) == set(factors) and set(domain.classes) <= set(factors)
    batch = domains.views(name)(x)
    assert batch.views.shape == (4, 40, *x.shape[1:])
    for view, group in enumerate(batch.plan.spaces[1:], 2):
        for op, drawn in batch.parameters[0][group].items():
            for parameter, value in drawn.items():
                assert torch.equal(value, batch.parameters[view][group][op][parameter])


def test_stains_of_a_picture_are_what_its_factors_say():
    x, f = scenes.DOMAINS["histology"].draw(200, generator())
    eosin = scenes.concentrations(x)[:, 1].flatten(1).median(1).values
    assert np.corrcoef(eosin.numpy(), f["eosin"].exp().numpy())[0, 1] > 0.7
    white = (x.amin(1) > 0.97).float()
    middle = [white[:, 12:20, -2:], white[:, :2, 12:20], white[:, 12:20, :2], white[:, -2:, 12:20]]
    side = torch.stack([m.mean((1, 2)) for m in middle], 1).argmax(1)
    assert torch.equal(side, f["edge"])


@pytest.mark.slow
@pytest.mark.parametrize("name", scenes.DOMAINS)
def test_domains_train_for_a_few_steps(name, tmp_path):
    arguments = ["--domain", name, "--steps", "3", "--batch-size", "12", "--samples", "200"]
    result = domains.main([*arguments, "--out", str(tmp_path)])
    assert {*FILES, "views.png"} == {p.name for p in tmp_path.iterdir()}
    assert result["steps"] == 3 and {"linear", "nonlinear", "label-free"} <= set(result["tables"])


@pytest.mark.slow
def test_a_page_about_twelve_bands(tmp_path):
    domains.main(
        ["--domain", "multispectral", "--steps", "2", "--batch-size", "12", "--samples", "60", "--out", str(tmp_path)]
    )
    script, out = domains.__file__, tmp_path / "report.html"
    named = [f"--{what}={script}:multispectral_{made}" for what, made in (("data", "data"), ("backbone", "net"))]
    more = [f"--views={script}:multispectral_views", "--samples=60", "--bands=3,2,1", "--explore=8"]
    assert command(["report", str(tmp_path), *named, *more, f"--out={out}"]) == 0
    assert "bands 3, 2, 1 of 0 to 11 as red, green and blue" in out.read_text()
