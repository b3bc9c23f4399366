"""The pages "add it to my pipeline" show the scripts that the tests run, and the diffs are as short as they say."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("diffs", ROOT / "docs" / "diffs.py")
diffs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(diffs)
PAGES = sorted(diffs.PAGES.glob("*.md"))
LIMITS: dict[str, int] = {
    "lightning_simclr": 9,
    "checkpoint": 23,
    "lightly_plain": 10,
    "lightly_lightning": 10,
    "lightly_distributed": 10,
    "lightly_benchmark": 10,
    "lightly_gpu": 15,
}
"""Script -> lines that may be new in it; a page says the number."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_the_scripts_as_they_are(page):
    text = page.read_text()
    assert text == diffs.filled(text), "run python docs/diffs.py"
    assert diffs.BLOCK.search(text), f"{page.name} shows no diff"


@pytest.mark.parametrize("name", LIMITS)
def test_a_diff_is_short(name):
    _, new, _ = diffs.changes(name)
    assert new <= LIMITS[name]


def test_every_pair_of_scripts_is_on_a_page():
    shown = {match[3] for page in PAGES for match in diffs.BLOCK.finditer(page.read_text()) if match[2] == "diff"}
    pairs = {file.stem for file in (diffs.SCRIPTS / "before").glob("*.py")}
    assert shown == pairs
