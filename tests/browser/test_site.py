"""The documentation in a real browser, opened from its folder: silent, legible, searchable, on phone and desktop."""

from pathlib import Path

import pytest
from chromium import SIZES, opened

SITE = Path(__file__).parents[2] / "site"
PAGES = ("index", "start", "idea", "method", "results", "benchmarks", "benchmarks/sweep", "api/losses", "faq")


@pytest.fixture(scope="module", autouse=True)
def built():
    assert (SITE / "index.html").is_file(), "expected the documentation in site/: run make docs"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_in_silence_and_fits(browser, name, size, scheme):
    page, complaints, requests = opened(browser, SITE / f"{name}.html", size, color_scheme=scheme)
    assert complaints == [] and all(url.startswith(("file:", "data:")) for url in requests)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    seen = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(seen[:3]) < 60) == (scheme == "dark")
    shown = "[...document.querySelectorAll('article img')].filter((i) => i.checkVisibility())"
    assert page.evaluate(f"{shown}.every((i) => i.complete && i.naturalWidth > 0)")
    twins = page.evaluate(f"{shown}.map((i) => i.src).filter((s) => s.includes('#only-'))")
    assert all(url.endswith(f"#only-{scheme}") for url in twins) and (name != "idea" or len(twins) == 3)
    folder = Path("runs/browser")
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"site-{name.replace('/', '-')}-{size}-{scheme}.png")


def test_a_wide_table_scrolls_within_itself(browser):
    page, _, _ = opened(browser, SITE / "benchmarks.html", "phone")
    table = page.locator("article table").first
    around = table.locator("xpath=ancestor::*[contains(@class, 'scrollwrap')]")
    assert around.evaluate("(e) => e.scrollWidth > e.clientWidth && e.getBoundingClientRect().right <= innerWidth")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("words,page_of_it", [("IndependenceLoss", "api/losses.html"), ("collapsed", "faq.html")])
def test_the_search_finds_without_a_server(browser, size, words, page_of_it):
    page, complaints, requests = opened(browser, SITE / "index.html", size)
    page.locator(".md-search__button:visible, label[for=__search]:visible").first.click()
    page.keyboard.type(words)
    page.get_by_text("results", exact=False).first.wait_for()
    link = page.locator(f"a[href*='{page_of_it}']", has_text=words).first
    link.wait_for()
    link.click()
    page.wait_for_url(f"**/{page_of_it}*")
    assert words.lower() in page.locator("article").inner_text().lower()
    assert complaints == [] and all(url.startswith(("file:", "data:", "about:")) for url in requests)


def test_an_equation_leads_to_its_line_of_code(browser):
    page, _, _ = opened(browser, SITE / "method.html")
    page.locator("article td a[href*='joint.py']").first.click()
    page.wait_for_url("**/source/ssd_addon/losses/joint.py.html#*")
    number = page.url.rpartition("-")[2]
    assert "loss = torch.add(loss, c, alpha=w * share)" in page.locator(f"[id='__span-0-{number}']").inner_text()


def test_pages_are_readable_without_scripts(browser):
    page, _, _ = opened(browser, SITE / "start.html", java_script_enabled=False)
    assert "Start in five minutes" in page.locator("h1").inner_text() and page.locator("nav a").count() > 20
