"""The audit's page in a real browser: silent, legible, on phone and desktop, for one model and for two."""

from pathlib import Path

import pages
import pytest
import torch
from chromium import SIZES, opened
from torch import nn

from ssd_addon import auditing


class Light(nn.Module):
    """Two layers, the second of which has lost where things are."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 6, 3, 2)

    def forward(self, x):
        return self.second(self.first(x).relu()).amax((2, 3))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    torch.manual_seed(0)
    data, views = pages.squares(120), pages.views()
    options = {"layers": ("first", "second"), "labels": data.factors["kind"], "draws": 2}
    auditing.write(folder / "one.html", {"light": Light()}, data.images, views, **options)
    names = {"light": Light(), "a model with a long name, as of a file of weights (epoch=99.ckpt)": Light()}
    auditing.write(folder / "two.html", names, data.images, views, **options)
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["one", "two"])
def test_the_audit_loads_in_silence_and_fits(browser, files, name, size, scheme):
    page, complaints, requests = opened(browser, files / f"{name}.html", size, color_scheme=scheme)
    assert complaints == [] and all(url.startswith(("file:", "data:")) for url in requests)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    words = page.locator("body").inner_text()
    assert "The features encode " in page.locator("#verdict").inner_text() and "untrained" in words and "k-NN" in words
    assert page.locator(".plots svg").count() == 2 and page.locator(".plots circle").count() == 8 * (
        1 + (name == "two")
    )
    assert page.locator("#compared li").count() == (name == "two")
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    inside = """() => [...document.querySelectorAll(".plots text")].every((t) => {
      const [a, b] = [t.getBoundingClientRect(), t.closest("svg").getBoundingClientRect()];
      return a.left >= b.left - 1 && a.right <= b.right + 1 && a.bottom <= b.bottom + 1;
    })"""
    assert page.evaluate(inside)
    folder = Path("runs/browser")
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"audit-{name}-{size}-{scheme}.png", full_page=True)


def test_the_audit_says_what_it_knows_without_scripts_and_on_paper(browser, files):
    page, _, _ = opened(browser, files / "two.html", java_script_enabled=False)
    assert page.locator("#verdict").is_visible() and page.locator("td.heat").count() > 20
    page.emulate_media(media="print")
    assert page.locator("#verdict").is_visible() and page.locator(".plots svg").first.is_visible()
