"""Examples on other data than RGB photographs: operations against loops, what is drawn, a few steps of training."""

import json

import pytest
import series
import torch

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
