"""The page on PyPI, which setup.py makes from README.md."""

import importlib.util
import re
from pathlib import Path

import pytest
from distributions import relative_addresses

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
REPOSITORY = {"Repository": "https://example.org/owner/name/"}


@pytest.fixture(scope="module")
def page():
    """The function of setup.py, which runs the build only as __main__."""
    spec = importlib.util.spec_from_file_location("setup_of_the_project", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return lambda text, urls: setup.long_description(text, urls, "0.2.0")


@pytest.mark.parametrize("urls", [{}, {"Homepage": "https://example.org"}, REPOSITORY])
def test_the_readme_has_no_relative_address_on_pypi(page, urls):
    assert relative_addresses(README), "a README without relative addresses needs no setup.py"
    assert relative_addresses(page(README, urls)) == []


def test_with_a_repository_every_link_and_picture_of_the_readme_leads_to_a_file_of_it(page):
    found = re.findall(r"https://example\.org/owner/name/(blob|raw)/v0\.2\.0/([^)#\s\"']+)", page(README, REPOSITORY))
    assert len(found) >= len(relative_addresses(README))
    for kind, path in found:
        assert (ROOT / path).exists(), path
        assert kind == "blob" or path.endswith((".png", ".svg", ".gif", ".jpg", ".webp")), path


@pytest.mark.parametrize(
    "text,without,with_one",
    [
        ("see [the docs](docs/a.md#top).", "see the docs.", "see [the docs](AT/blob/v0.2.0/docs/a.md#top)."),
        ("![A picture](a.png)", "*A picture*", "![A picture](AT/raw/v0.2.0/a.png)"),
        ("[![A](a.png)](b.md)", "*A*", "[![A](AT/raw/v0.2.0/a.png)](AT/blob/v0.2.0/b.md)"),
        ("[`code`](a.py 'title')", "`code`", "[`code`](AT/blob/v0.2.0/a.py)"),
        ('<img alt="A" src="./a.png">', "<em>A</em>", '<img alt="A" src="AT/raw/v0.2.0/a.png">'),
        (
            '<picture><source srcset="d.png"><img src="a.png"></picture>',
            "<picture></picture>",
            '<picture><source srcset="AT/raw/v0.2.0/d.png"><img src="AT/raw/v0.2.0/a.png"></picture>',
        ),
        ('<a href="a.md"><b>A</b></a>', "<b>A</b>", '<a href="AT/blob/v0.2.0/a.md"><b>A</b></a>'),
    ],
)
def test_relative_links_and_pictures(page, text, without, with_one):
    assert page(text, {}).startswith(f"{without}\n\nThe pictures and the pages that are named here are in the source")
    assert page(text, REPOSITORY) == with_one.replace("AT", "https://example.org/owner/name")


@pytest.mark.parametrize(
    "text",
    [
        "[an address](https://arxiv.org/abs/2311.08815), [an anchor](#top), [mail](mailto:a@b.c), ![A](https://a.b/c.png)",
        "`[a](b.md)` and `<img src='a.png'>`",
        "```\nx[i](b.md) ![A](a.png)\n```\n",
        "a list [1, 2] (and more)",
    ],
)
def test_absolute_addresses_and_code_stay_as_they_are(page, text):
    assert page(text, {}) == page(text, REPOSITORY) == text
