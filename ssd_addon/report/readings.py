"""What a table of scores says of one space: readings above chance, and how they are worded."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ssd_addon.metrics import Dependence, Exclusivity, ScoreTable

ENCODES, TRACE = 0.5, 0.1
"""A score from which a space is said to encode something, and below which it is not; between them it does so weakly.

What leaks is decided by the tests of `Findings.tests`, and by TRACE where there are none.
"""


@dataclass(frozen=True, order=True)
class Reading:
    """How well something can be decoded from a space; a score that is not above 0 beyond chance is 0.

    Where a test decided, the score is its effect (partial R^2), and p its corrected p-value.
    """

    score: float
    name: str
    p: float | None = field(default=None, compare=False)


def sure(table: ScoreTable, space: str, factor: str) -> float:
    """The score, or 0 where its interval does not lie above 0; NaN counts as 0."""
    score = table[space, factor]
    low, _ = table.intervals.get((space, factor), (score, score))
    return 0.0 if math.isnan(score) else score if low > 0 else min(score, 0.0)


def parameters_of(t: ScoreTable, group: str) -> tuple[ScoreTable, list[str]]:
    """The parameters of a group and the table that holds them; the group itself where there are none."""
    if t.parts is not None and (parts := [p for p in t.parts.factors if p.rsplit("/", 2)[0] == group]):
        return t.parts, parts
    return t, [group]


def table_of(t: ScoreTable, factor: str) -> ScoreTable:
    """The table that has the interval of a group, or of a parameter."""
    return t.parts if t.parts is not None and factor in t.parts.factors else t


def tested(tests: Exclusivity | None, space: str, factor: str) -> Dependence | None:
    """What the test says of a cell; None where there is no test of it."""
    for table in (tests, tests.parts if tests is not None else None):
        if table is not None and (space, factor) in table.tests and not math.isnan(table.tests[space, factor].p):
            return table.tests[space, factor]
    return None


# ---- names and numbers


def short(parameter: str) -> str:
    """ "color/0.ColorJitter/hue_factor" -> "hue", "color/1.RandomGrayscale/batch_prob" -> "grayscale on or off"."""
    parts = parameter.rsplit("/", 2)
    if len(parts) < 3:
        return parameter
    op, name = parts[1].split(".")[-1].removeprefix("Random").removeprefix("Resized"), parts[2]
    op = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", op).lower()
    if name == "batch_prob":
        return f"{op} on or off"
    if name == "src":
        return f"place and size of the {op}"
    return name.removesuffix("_factor").replace("_", " ")


def named(t: ScoreTable, parameter: str) -> str:
    """A parameter as a sentence names it: with its group where another group has a parameter of that name."""
    group, name = parameter.rsplit("/", 2)[0], short(parameter)
    every = t.parts.factors if t.parts is not None else ()
    twice = any(short(p) == name and p.rsplit("/", 2)[0] != group for p in every)
    return f"{group}'s {name}" if twice and group != parameter else name


def is_or_are(name: str) -> str:
    """The verb after the name of a parameter: "hue is", "translations are"."""
    return "are" if plural([name]) else "is"


def plural(names: Sequence[str]) -> bool:
    """Whether a verb after these names of parameters is plural: several of them, or such as "translations"."""
    one = names[0]
    return len(names) > 1 or (one.endswith("s") and not one.endswith("ss")) or " and " in one


def said(table: ScoreTable, space: str, factor: str) -> str:
    """ "R² = 0.31"; with a remark where the interval includes 0 although the score looks like one."""
    score = table[space, factor]
    doubtful = score >= TRACE and sure(table, space, factor) < TRACE
    return r2(score) + (", with an interval that includes 0" if doubtful else "")


def r2(score: float) -> str:
    return f"R² = {score:.2f}".replace("-0.00", "0.00")


def p_value(p: float) -> str:
    """ "p = 0.03", "p ≤ 0.001"; rounded up, so that none is said to be smaller than it is."""
    if p <= 0.001:
        return "p ≤ 0.001"
    return f"p = {min(1.0, math.ceil(p * 1000 - 1e-9) / 1000 if p < 0.1 else math.ceil(p * 100 - 1e-9) / 100):.3g}"


def listed(readings: Sequence[Reading]) -> str:
    """ "hue (R² = 0.90), brightness (0.70) and contrast (0.60)"."""
    first, *rest = readings
    head = r2(first.score) if first.p is None else f"partial {r2(first.score)}, {p_value(first.p)}"
    return names([f"{first.name} ({head})", *(f"{r.name} ({_further(r)})" for r in rest)])


def _further(r: Reading) -> str:
    return r2(r.score).removeprefix("R² = ") + ("" if r.p is None else f", {p_value(r.p)}")


def names(items: Iterable[str]) -> str:
    """ "a, b and c"."""
    each = list(items)
    return each[0] if len(each) == 1 else f"{', '.join(each[:-1])} and {each[-1]}"
