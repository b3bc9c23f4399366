"""Results of exclusivity tests: a table of spaces (rows) by factors (columns), with a `Dependence` in each cell."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssd_addon import _checks
from ssd_addon.metrics.table import Cell

LEVEL = 0.05
"""Probability that a table without any dependence has a leak."""
SMALLEST = 0.02
"""Smallest effect that counts as a leak, however significant the dependence is."""


@dataclass(frozen=True)
class Dependence:
    """The test result for one space and one factor; all NaN if there is no test.

    Attributes:
        statistic: the statistic, in standard deviations of its distribution under the null hypothesis.
        effect: partial R^2: the share of the factor's variance left by the own factors that the space predicts on
            left-out samples; 0 if it predicts nothing.
        p: p-value of this test alone.
        corrected: p-value corrected for the number of tests in the table (Holm).
    """

    statistic: float
    effect: float
    p: float
    corrected: float


NOTHING = Dependence(math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True, eq=False)
class Exclusivity:
    """The tests of every space and every factor that is not its own: `table[space, factor]` is a `Dependence`.

    Attributes:
        spaces, factors: names, in order.
        own: space -> its own factors, on which tests are conditioned.
        tests: (space, factor) -> result of the test.
        notes: (space, factor) -> why there is no test, or what it leaves out.
        n: number of samples.
        null: "signs" or "permutations": how the null distribution was computed.
        level, smallest: a leak has a corrected p-value of at most `level` and an effect of at least `smallest`.
        unit: what a sample is, "samples" or "pairs of views".
        parts: finer tests (the parameters within each group), or None; `table[space, factor]` finds them too.
    """

    spaces: tuple[str, ...]
    factors: tuple[str, ...]
    own: Mapping[str, tuple[str, ...]]
    tests: Mapping[Cell, Dependence]
    notes: Mapping[Cell, str]
    n: int
    null: str
    level: float = LEVEL
    smallest: float = SMALLEST
    unit: str = "samples"
    parts: "Exclusivity | None" = None

    def __getitem__(self, cell: Cell) -> Dependence:
        if self.parts is not None and cell in self.parts.tests:
            return self.parts.tests[cell]
        if cell not in self.tests:
            known = f"spaces {_checks.names(self.spaces)}; factors {_checks.names(self.factors)}"
            raise KeyError(f"table[space, factor]: expected {known}: got {cell!r}")
        return self.tests[cell]

    def is_leak(self, space: str, factor: str) -> bool:
        """Whether the test rejects and the effect is at least `smallest`."""
        test = self[space, factor]
        return test.corrected <= self.level and test.effect >= self.smallest

    @property
    def leaks(self) -> tuple[Cell, ...]:
        """The cells that are leaks, the largest effect first."""
        return tuple(sorted((c for c in self.tests if self.is_leak(*c)), key=lambda c: -self.tests[c].effect))

    def to_json(self) -> dict[str, Any]:
        """The table as dictionaries, lists, strings and numbers; numbers that are not finite become None."""

        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        out: dict[str, Any] = {name: getattr(self, name) for name in ("n", "unit", "null", "level", "smallest")}
        out |= {"spaces": list(self.spaces), "factors": list(self.factors)}
        out["own"] = {s: list(f) for s, f in self.own.items()}
        out["cells"] = [
            {
                "space": s,
                "factor": f,
                **{name: number(getattr(t, name)) for name in ("statistic", "effect", "p", "corrected")},
                "leak": self.is_leak(s, f),
                "note": self.notes.get((s, f)),
            }
            for (s, f), t in self.tests.items()
        ]
        if self.parts is not None:
            out["parts"] = self.parts.to_json()
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Exclusivity":
        """The table that `to_json` wrote."""
        cells = {(c["space"], c["factor"]): c for c in data["cells"]}
        names = ("statistic", "effect", "p", "corrected")
        return cls(
            tuple(data["spaces"]),
            tuple(data["factors"]),
            {s: tuple(f) for s, f in data["own"].items()},
            {k: Dependence(*(math.nan if c[x] is None else c[x] for x in names)) for k, c in cells.items()},
            {k: c["note"] for k, c in cells.items() if c["note"]},
            data["n"],
            data["null"],
            data["level"],
            data["smallest"],
            data["unit"],
            cls.from_json(data["parts"]) if data.get("parts") else None,
        )

    def __str__(self) -> str:
        def shown(s: str, f: str) -> str:
            effect = self[s, f].effect
            if f in self.own.get(s, ()):
                return "own "
            return "n/a " if math.isnan(effect) else f"{effect:.2f}{'*' if self.is_leak(s, f) else ' '}"

        rows = [["", *(f"{f} " for f in self.factors)]]
        rows += [[s, *(shown(s, f) for f in self.factors)] for s in self.spaces]
        left, *widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join([r[0].ljust(left), *(c.rjust(w) for c, w in zip(r[1:], widths, strict=True))]) for r in rows]
        lines.append(f"partial R^2 given the own factors, n = {self.n} {self.unit}")
        lines.append(f"* leak: Holm-corrected p <= {self.level:g} and partial R^2 >= {self.smallest:g}")
        told = {f"{f}: {note}": None for (s, f), note in self.notes.items() if f not in self.own.get(s, ())}
        return "\n".join([*(line.rstrip() for line in lines), *told])
