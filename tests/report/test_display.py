"""Pictures of images of any number of channels: which bands they show, and that every page and strip has them."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ssd_addon import Monitor, StructuredViews, StyleHeads, plots, report
from ssd_addon.__main__ import main
from ssd_addon.display import display
from ssd_addon.report import Data


def images(channels, n=24, size=8, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


class Gain:
    def draw(self, shape, generator):
        return {"gain": 0.5 + 0.5 * torch.rand(shape[0], generator=generator)}

    def apply(self, x, parameters):
        return x * parameters["gain"].view(-1, 1, 1, 1)


def network(channels):
    return nn.Sequential(nn.Conv2d(channels, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def heads(channels):
    torch.manual_seed(0)
    return StyleHeads(network(channels), {"content": 4, "gain": 3}, in_features=6, hidden=(8,))


def embedded(page):
    """All pictures of a page, as arrays [H, W, 3]."""
    found = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(float) for text in found]


def test_up_to_three_channels_are_shown_as_they_are():
    one, two, three = images(1), images(2), images(3)
    assert torch.equal(display(one)(one), one.expand(-1, 3, -1, -1)) and display(one).text == ""
    torch.testing.assert_close(display(three)(three), three)
    assert display(three).text == ""
    assert torch.equal(display(two)(two), two[:, [0, 1, 0]])
    assert display(two).text == "bands 0, 1 as magenta and green"
    levels = (255 * three).byte()
    torch.testing.assert_close(display(levels)(levels), levels.float() / 255)


def test_principal_directions_against_numpy():
    x = images(12) * torch.linspace(0.2, 1, 12).view(-1, 1, 1)
    shown = display(x)
    pixels = x.movedim(1, -1).reshape(-1, 12).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(pixels.T))
    directions = vectors.T[::-1][:3]
    directions = directions * np.sign(directions.sum(1, keepdims=True))
    torch.testing.assert_close(shown.weights, torch.from_numpy(directions).float(), atol=1e-4, rtol=0)
    scores = pixels @ directions.T
    low, high = np.quantile(scores, [0.01, 0.99], axis=0)
    expected = ((scores - low) / (high - low)).clip(0, 1).reshape(24, 8, 8, 3)
    torch.testing.assert_close(shown(x).movedim(1, -1), torch.from_numpy(expected).float(), atol=1e-3, rtol=0)
    share = 100 * values[::-1][:3] / values.sum()
    assert "the first three principal directions of all pixels' 12 bands" in shown.text
    assert f"({share[0]:.3g} %, {share[1]:.3g} %, {share[2]:.3g} % of their variance)" in shown.text
    assert "as red, green and blue, stretched from the 1st to the 99th percentile" in shown.text


def test_bands_that_are_chosen():
    x = images(12)
    shown = display(x, (3, 2, 1))
    assert shown.text.startswith("bands 3, 2, 1 of 0 to 11 as red, green and blue")
    low, high = (torch.quantile(x[:, 3], q) for q in (0.01, 0.99))
    torch.testing.assert_close(shown(x)[:, 0], ((x[:, 3] - low) / (high - low)).clamp(0, 1), atol=1e-4, rtol=0)
    assert display(x, [7]).text.startswith("band 7 of 0 to 11 as gray")
    three = images(3)  # of up to three channels nothing is stretched
    torch.testing.assert_close(display(three, (2, 1, 0))(three), three[:, [2, 1, 0]])


@pytest.mark.parametrize("varying", [0, 1, 2])
def test_constant_bands(varying):
    x = torch.full((24, 12, 8, 8), 0.25)
    x[:, :varying] = images(varying) if varying else x[:, :0]
    shown = display(x)
    rgb = shown(x)
    assert rgb.isfinite().all() and rgb.shape == (24, 3, 8, 8) and len(shown.weights) == max(1, varying)
    if varying == 0:
        assert "the mean of the 12 bands, which do not vary, as gray" in shown.text
        torch.testing.assert_close(rgb, torch.full_like(rgb, 0.25))
    else:
        assert rgb.std() > 0.1 and ("as gray" if varying == 1 else "as magenta and green") in shown.text
    torch.testing.assert_close(display(x, (11, 10, 9))(x), torch.full_like(rgb, 0.25))  # not stretched


@pytest.mark.parametrize(
    "bands,error,message",
    [
        ((0, 1, 12), ValueError, r"the images have 12, so 0 to 11: got \(0, 1, 12\)"),
        ((-1, 1, 2), ValueError, r"got \(-1, 1, 2\)"),
        ((0, 1, 2, 3), ValueError, r"got \(0, 1, 2, 3\)"),
        ((), ValueError, r"got \(\)"),
        ((0, 1.0, 2), ValueError, r"got \(0, 1.0, 2\)"),
        ((True, False), ValueError, "got"),
        ("321", TypeError, "got '321'"),
        (3, TypeError, "got 3"),
    ],
)
def test_bad_bands(bands, error, message, tmp_path):
    with pytest.raises(error, match=f"bands: expected one to three channels.*{message}"):
        report.write(tmp_path / "r.html", heads(12), images(12), bands=bands)
    batch = StructuredViews({"gain": [Gain()]}, seed=0)(images(12))
    with pytest.raises(error, match="bands: expected"):
        plots.views_strip(batch, tmp_path / "v.png", bands=bands)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
def test_a_page_and_a_strip_of_any_number_of_channels(channels, tmp_path):
    x = images(channels, size=1).expand(-1, -1, 8, 8).clone()  # one color each, which JPEG keeps
    views = StructuredViews({"gain": [Gain()]}, seed=0)
    found = report.write(tmp_path / "r.html", heads(channels), x, views=views, explored=5)
    assert found.label_free is not None and found.views is not None and found.views.views.shape[2] == channels
    page = (tmp_path / "r.html").read_text()
    pictures = embedded(page)
    assert len(pictures) == 6 * 3 + 5 + 1 and all(p.shape == (8, 8, 3) for p in pictures)
    for tile, i in zip(pictures[-6:], [*found.explored.tolist(), 0], strict=True):  # of the explorer
        assert np.abs(tile - (255 * display(x)(x)[i]).movedim(0, -1).numpy()).max() < 8
    assert ("The pictures show" in page) == (channels not in (1, 3))
    assert found.display.text in page.replace("&#x27;", "'")
    plots.views_strip(views(x), tmp_path / "v.png")
    with Image.open(tmp_path / "v.png") as strip:
        assert strip.size[0] > 300


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
def test_a_monitor_measures_images_of_any_number_of_channels(channels):
    views = StructuredViews({"gain": [Gain()]}, seed=0)
    monitor = Monitor(None, views=views, images=images(channels), factors={"light": torch.rand(24)})
    record = monitor.epoch(heads(channels), epoch=0, step=1)
    assert {"parameters/gain/gain", "r2/content/light"} <= set(record) and "note" not in record


def test_a_strip_says_what_it_shows(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: figures.append(figure))
    for channels, bands, text in (
        (3, None, ""),
        (12, (3, 2, 1), "shown: bands 3, 2, 1 of 0 to 11 as red"),
        (1, None, ""),
    ):
        batch = StructuredViews({"gain": [Gain()]}, seed=0)(images(channels))
        plots.views_strip(batch, tmp_path / "v.png", bands=bands)
        assert figures[-1].get_supxlabel().startswith(text) and bool(figures[-1].get_supxlabel()) == bool(text)


def test_bands_on_the_command_line(tmp_path, capsys):
    heads(12).save(tmp_path / "model.pt", card={"family": "simclr"})
    code = "import torch\nfrom torch import nn\n\ndef net():\n    return nn.Sequential(nn.Conv2d(12, 6, 3), nn.ReLU(), "
    code += "nn.AdaptiveAvgPool2d(1), nn.Flatten())\n\ndef data():\n    return torch.rand(24, 12, 8, 8), {}\n"
    (tmp_path / "mine.py").write_text(code)
    mine, out = tmp_path / "mine.py", tmp_path / "r.html"
    common = ["report", str(tmp_path), "--data", f"{mine}:data", "--backbone", f"{mine}:net", "--out", str(out)]
    assert main([*common, "--bands", "3,2,1"]) == 0
    assert "bands 3, 2, 1 of 0 to 11 as red, green and blue" in out.read_text()
    assert main(common) == 0 and "principal directions" in out.read_text()
    assert main([*common, "--bands", "3,2,12"]) == 1
    assert (
        "error: --bands: expected one to three channels, counted from 0; the images have 12" in capsys.readouterr().err
    )
    for bad in ("red", "1,2,3,4", "-1", ""):
        with pytest.raises(SystemExit):
            main([*common, f"--bands={bad}"])
        assert "--bands: expected one to three channels, counted from 0, such as 3,2,1" in capsys.readouterr().err


def test_channels_last_is_found_out():
    with pytest.raises(ValueError, match=r"looks like \[n, H, W, C\]; give images.permute\(0, 3, 1, 2\)"):
        Data(torch.rand(5, 16, 16, 3)).check()
    Data(torch.rand(5, 12, 16, 16)).check()
