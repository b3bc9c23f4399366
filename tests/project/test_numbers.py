"""Numbers in the prose of README.md and docs/ are those of the data files (docs/check_numbers.py)."""

import importlib.util
import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SPEC = importlib.util.spec_from_file_location("check_numbers", DOCS / "check_numbers.py")
numbers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(numbers)
MINUS = numbers.MINUS
PAGE = f"""# A page

The backbone keeps
  gray (R² = 0.91), content 1,024 rows
and {MINUS}0.02 of hue.

| space | gray |
|---|--:|
| content | 0.25 |
| color | 0.75, 2 |
"""
NAMES = {"A": 0.9149, "B": 1024.0, "C": -0.0151}
ENTRY = {"text": "gray (R² = {0.91}), content {1,024} rows and {-0.02}".replace("-", MINUS), "values": ["A", "[B, C]"]}
TABLE = {"table": "| space |", "values": ["[[0.25], [0.75]]"]}


def checked(*entries, page=PAGE, everywhere=(), names=NAMES):
    return numbers.check("page.md", page, {"page.md": entries, "*": everywhere}, names)


@pytest.fixture(scope="module")
def found():
    return numbers.report()


def test_every_entry_holds(found):
    assert [each for wrong, _ in found.values() for each in wrong] == []


def test_every_number_of_a_page_is_tied_or_exempt(found):
    waiting = numbers.pending()
    assert set(waiting) <= set(found)
    assert [each for name, (_, loose) in found.items() if name not in waiting for each in loose] == []


def test_a_page_whose_numbers_are_tied_passes():
    assert checked(ENTRY, TABLE) == ([], [])


@pytest.mark.parametrize("name, value", [("A", 0.9151), ("B", 1025.0), ("C", 0.0151)])
def test_a_number_that_differs_from_the_data_is_found(name, value):
    wrong, loose = checked(ENTRY, TABLE, names=NAMES | {name: value})
    assert len(wrong) == 1 and f"the data has {value:.4f}" in wrong[0] and not loose


def test_a_cell_that_differs_from_the_data_is_found():
    wrong, _ = checked(ENTRY, TABLE | {"values": ["[0.25, 0.76]"]})
    assert wrong == ["page.md: | space |: number 2 is 0.75, the data has 0.7600"]
    wrong, _ = checked(ENTRY, TABLE | {"values": ["[0.25]"]})
    assert "expected 1 numbers: got 2" in wrong[0]


def test_a_text_that_is_not_on_the_page_is_found():
    wrong, loose = checked(ENTRY | {"text": "gray (R² = {0.92})"}, TABLE)
    assert "expected this text once on the page: got 0" in wrong[0] and len(loose) == 2
    wrong, _ = checked(ENTRY, TABLE | {"table": "| nothing |"})
    assert "expected one such table: got 0" in wrong[0]


def test_a_text_that_is_twice_on_the_page_is_found():
    assert "got 2" in checked(ENTRY, TABLE, page=PAGE + PAGE.replace("| space", "| other"))[0][0]


def test_an_expression_that_cannot_be_evaluated_is_found():
    assert "ValueError('no run')" in checked(ENTRY | {"values": ["run()"]}, TABLE, names={"run": fail})[0][0]


def fail():
    raise ValueError("no run")


def test_a_number_in_no_entry_is_named_with_its_line():
    wrong, loose = checked(TABLE)
    assert not wrong and loose == ["page.md:4: 0.91", f"page.md:5: {MINUS}0.02"]
    assert checked(ENTRY)[1] == ["page.md:9: 0.25", "page.md:10: 0.75"]


def test_an_exempt_number_needs_a_reason():
    assert checked({"text": "keeps gray (R² = {0.91})", "reason": "a setting"}, page="keeps gray (R² = 0.91)") == (
        [],
        [],
    )
    assert "expected either values or a reason" in checked({"text": "{0.91})"}, TABLE)[0][0]
    assert checked(everywhere=[{"text": "R² = {0.91}", "reason": "a setting"}], page="R² = 0.91") == ([], [])


@pytest.mark.parametrize(
    "text",
    [
        "torch 2.14.1 and arXiv 2311.08815",
        "`temperature=0.15`",
        "```python\nx = 0.15\n```",
        "<!-- name -->\n| 0.15 |\n<!-- end -->",
        "[a link](results/0.15.json)",
    ],
)
def test_versions_code_links_and_generated_tables_are_left_out(text):
    assert checked(page=f"Before {text} after") == ([], [])


def test_scores_stand_for_their_mean_over_seeds():
    data = numbers.load_data()
    seeds = data["Seeds"]([0.2, 0.4, float("nan")])
    names = {"x": seeds, "sd": data["sd"], "high": data["high"]}
    assert numbers.evaluate("[x, sd(x), high(x, 0.1)]", names) == pytest.approx([0.3, 0.1414, 0.3], abs=1e-4)
    with pytest.raises(ValueError, match="n/a for every seed"):
        _ = data["Seeds"]([float("nan")]).mean


WRITTEN = {"equality": "page", "exclusivity": "page", "shards": "page", "survive": "page", "views": "table"}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_page_that_a_script_writes_whole_is_what_it_makes_of_the_data(name):
    script = pytest.importorskip(f"benchmarks.{name}")
    found = json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())
    made = getattr(script, WRITTEN[name])(found)
    assert (DOCS / "benchmarks" / f"{name}.md").read_text() == made, f"write it anew with benchmarks/{name}.py"


def test_the_page_on_views_has_the_table_of_equality():
    def rows(page):
        return [line for line in page.splitlines() if line.startswith("| ")]

    block = (DOCS / "views.md").read_text().split("<!-- equality -->")[1].split("<!-- end -->")[0]
    assert rows(block) == rows((DOCS / "benchmarks" / "equality.md").read_text())
