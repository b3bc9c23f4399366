"""The calibration tables of docs/report.md have the numbers of docs/benchmarks/exclusivity.json."""

import json
import math
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "report.md").read_text()
LINES = json.loads((DOCS / "benchmarks" / "exclusivity.json").read_text())["lines"]
SHOWN = [x for x in LINES if (x["n"], x["d"]) == (500, 16)]


def wilson(count, n, z=1.96):
    """Percent, with the 95 % interval."""
    middle, half = count + z * z / 2, z * math.sqrt(count * (n - count) / n + z * z / 4)
    low, high = (100 * (middle + sign * half) / (n + z * z) for sign in (-1, 1))
    return f"{100 * count / n:.1f} % ({low:.1f} to {high:.1f})"


def rows(head):
    """The cells below a table's head, as they stand on the page."""
    lines = PAGE[PAGE.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def expected_null(x):
    case = x["case"] + (" (permutations)" if x["null"] == "permutations" else "")
    return [case, wilson(x["rejected"], x["repetitions"]), f"{100 * x['leaks'] / x['repetitions']:.1f} %"]


def expected_leak(x):
    shares = [f"{100 * x[k] / x['repetitions']:.0f} %" for k in ("rejected", "leaks")]
    return [x["case"], x["leak"], f"{x['share']:g}", *shares, f"{x['effect']:.3f} ± {x['effect_std']:.3f}"]


def test_where_there_is_nothing_to_find():
    null = [x for x in SHOWN if not x["share"]]
    assert rows("no dependence: factor, given | rejected, of 300 | leaks") == [expected_null(x) for x in null]
    assert {x["repetitions"] for x in null} == {300}


def test_where_there_is_a_leak():
    leaks = [x for x in SHOWN if x["share"]]
    head = "a leak: factor, given | encoded | partial R² | rejected, of 100 | leaks | effect, mean ± std"
    assert rows(head) == [expected_leak(x) for x in leaks]
    assert {x["repetitions"] for x in leaks} == {100}


@pytest.mark.parametrize("case", ["all", "wide"])
def test_the_sentences_below_the_tables(case):
    text = " ".join(PAGE.split())
    if case == "all":
        signs = [x for x in SHOWN if not x["share"] and x["null"] == "signs"]
        count, n = sum(x["rejected"] for x in signs), sum(x["repetitions"] for x in signs)
        assert len(signs) == 9 and f"the test rejected {count} times of {n:,}, {wilson(count, n)}" in text
    else:
        case, size = "number of an own number", (1000, 128)
        (wide,) = (x for x in LINES if (x["n"], x["d"]) == size and x["case"] == case and not x["share"])
        count, n = wide["rejected"], wide["repetitions"]
        assert f"for a {wide['case']}, it rejected {count} times of {n}, {wilson(count, n)}" in text
