"""`ScoreTable`: the type of every matrix of scores, with spaces as rows and factors as columns."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ssd_addon import _checks

Cell = tuple[str, str]


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores of every factor from every space: `table[space, factor]`, NaN if there is no score.

    Attributes:
        spaces, factors: names, in order.
        scores: (space, factor) -> score.
        intervals: (space, factor) -> (low, high), 95 %; no entry without a score or with bootstrap=0.
        notes: (space, factor) -> why a cell has no score, or what was left out of it.
        probe, given: the probe and the given names.
        n_train, n_test: number of samples on which probes were fitted and scored; a note says where a factor has
            fewer.
        unit: what a sample is, "samples" or "pairs of views".
        parts: a table of finer factors (the parameters within each group), or None. `table[space, factor]` finds its
            cells too, by their own names.

    >>> table = ScoreTable(("content",), ("hue",), {("content", "hue"): 0.018}, {}, {}, "ridge", (), 50, 50)
    >>> print(table)
              hue
    content  0.02
    ridge probe, 50 samples to train, 50 held out
    """

    spaces: tuple[str, ...]
    factors: tuple[str, ...]
    scores: Mapping[Cell, float]
    intervals: Mapping[Cell, tuple[float, float]]
    notes: Mapping[Cell, str]
    probe: str
    given: tuple[str, ...]
    n_train: int
    n_test: int
    unit: str = "samples"
    parts: "ScoreTable | None" = None

    def __getitem__(self, cell: Cell) -> float:
        if self.parts is not None and cell in self.parts.scores:
            return self.parts.scores[cell]
        if cell not in self.scores:
            known = f"spaces {_checks.names(self.spaces)}; factors {_checks.names(self.factors)}"
            raise KeyError(f"table[space, factor]: expected {known}: got {cell!r}")
        return self.scores[cell]

    def to_json(self) -> dict[str, Any]:
        """The table as dictionaries, lists, strings and numbers; numbers that are not finite become None."""

        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        out: dict[str, Any] = {name: getattr(self, name) for name in ("probe", "n_train", "n_test", "unit")}
        out |= {name: list(getattr(self, name)) for name in ("spaces", "factors", "given")}
        out["cells"] = [{"space": s, "factor": f, "score": number(v)} for (s, f), v in self.scores.items()]
        for cell in out["cells"]:
            key = cell["space"], cell["factor"]
            cell["interval"] = [number(v) for v in self.intervals[key]] if key in self.intervals else None
            cell["note"] = self.notes.get(key)
        if self.parts is not None:
            out["parts"] = self.parts.to_json()
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ScoreTable":
        """The table that `to_json` wrote."""

        def number(value: float | None) -> float:
            return math.nan if value is None else value

        cells = {(c["space"], c["factor"]): c for c in data["cells"]}
        return cls(
            tuple(data["spaces"]),
            tuple(data["factors"]),
            {k: number(c["score"]) for k, c in cells.items()},
            {k: (number(c["interval"][0]), number(c["interval"][1])) for k, c in cells.items() if c["interval"]},
            {k: c["note"] for k, c in cells.items() if c["note"]},
            data["probe"],
            tuple(data["given"]),
            data["n_train"],
            data["n_test"],
            data.get("unit", "samples"),
            cls.from_json(data["parts"]) if data.get("parts") else None,
        )

    def only(self, *, spaces: Sequence[str] | None = None, factors: Sequence[str] | None = None) -> "ScoreTable":
        """The table restricted to these spaces and factors, in this order; None keeps all.

        Raises:
            KeyError: the table does not have a name.
        """
        rows = self.spaces if spaces is None else tuple(spaces)
        columns = self.factors if factors is None else tuple(factors)
        cells = [(s, f) for s in rows for f in columns]
        scores = {cell: self[cell] for cell in cells}
        own = [self] if self.parts is None else [self, self.parts]
        intervals = {c: t.intervals[c] for t in own for c in cells if c in t.intervals}
        notes = {c: t.notes[c] for t in own for c in cells if c in t.notes}
        return replace(self, spaces=rows, factors=columns, scores=scores, intervals=intervals, notes=notes, parts=None)

    def __str__(self) -> str:
        def shown(value: float) -> str:
            return "n/a" if math.isnan(value) else f"{value:.2f}".replace("-0.00", "0.00")

        rows = [["", *self.factors], *([s, *(shown(self[s, f]) for f in self.factors)] for s in self.spaces)]
        left, *widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join([r[0].ljust(left), *(c.rjust(w) for c, w in zip(r[1:], widths, strict=True))]) for r in rows]
        lines.append(self.footer())
        return "\n".join([*lines, *dict.fromkeys(f"{f}: {note}" for (_, f), note in self.notes.items())])

    def footer(self) -> str:
        """The line below the table: the probe and the numbers of samples."""
        given = f" given {_checks.names(self.given)}" if self.given else ""
        return f"{self.probe} probe{given}, {self.n_train} {self.unit} to train, {self.n_test} held out"
