"""The tables of docs/results/identifiability.md, from the lines of the runs.

`TABLES[NAME]` writes the block of the page between `<!-- NAME -->` and `<!-- end -->`; the rest is written by hand.
Cells are means over seeds with the standard deviation.
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import result_lines
from identifiability import grid
from identifiability.generators import VIEWS
from result_lines import Line, Table, cell, mean

table = functools.partial(result_lines.table, names=2)
PROBES = {"theirs": "kernel ridge", "theirs, linear": "linear", "linear": "linear", "kernel": "kernel"}
PAGE = Path(__file__).parents[2] / "docs" / "results" / "identifiability.md"


def found(lines: Iterable[Line], experiment: str, config: grid.Config) -> list[Line]:
    """The lines of one row, by seed; the last one if a seed has several."""
    wanted = {"world": grid.EXPERIMENTS[experiment][0], **config}
    rows = [x for x in lines if x["experiment"] == experiment and x.get("config") == wanted]
    by_seed = {x["seed"]: x for x in rows if x["seed"] < grid.SEEDS}
    return [by_seed[seed] for seed in sorted(by_seed)]


def named(name: str, rows: list[Line]) -> str:
    """The name of a row, with a dagger for a single seed and a note if seeds are missing."""
    if len(rows) == 1:
        return f"{name} †"
    return name + ("" if len(rows) == grid.SEEDS else f" ({len(rows)} of {grid.SEEDS} seeds)")


Measure = Callable[[dict[str, Any]], float]


def rows_of(lines: list[Line], prefix: str, columns: dict[str, Measure]) -> str:
    rows = []
    for experiment, (_, its) in grid.EXPERIMENTS.items():
        if experiment.startswith(prefix):
            for name, config in its:
                if runs := found(lines, experiment, config):
                    cells = [cell([measure(x["scores"]) for x in runs]) for measure in columns.values()]
                    rows.append([experiment.split("/")[1], named(name, runs), *cells])
    return table(["setting", "method", *columns], rows)


def of(kind: str, space: str, factor: str) -> Measure:
    return lambda scores: float(scores[kind].get(space, {}).get(factor, math.nan))


def pair(prefix: str, *kinds: str) -> Table:
    """What each space encodes of content and style, by each kind of score."""
    cells = [("content", "content"), ("content", "style"), ("style", "style"), ("style", "content")]
    columns = {
        f"{factor} from {space} code" + (f", {PROBES[kind]}" if len(kinds) > 1 else ""): of(kind, space, factor)
        for space, factor in cells
        for kind in kinds
    }
    return lambda lines: rows_of(lines, prefix, columns)


def conditional(lines: list[Line]) -> str:
    columns = {
        "style from style code": of("kernel", "style", "style"),
        "style from style code and true content": of("conditional", "style", "style"),
        "style from content code": of("kernel", "content", "style"),
    }
    return rows_of(lines, "pair/", columns)


def latents_of(subset: str) -> tuple[set[str], set[str]]:
    """The latents that all views of a subset observe, and the others."""
    shared = set.intersection(*(set(VIEWS[int(k)]) for k in subset))
    return {str(j) for j in shared}, {str(j) for j in range(6)} - {str(j) for j in shared}


def by_latent(row: dict[str, float]) -> dict[str, float]:
    """A row of scores by latent; in this library's tables, the latents 0 and 1 are one factor."""
    return {**row, "0": row["content"], "1": row["content"]} if "content" in row else row


def over(kind: str, size: int, which: int) -> Measure:
    """Mean over the subsets of this many views, and over the latents that they share (0) or do not (1)."""

    def measure(scores: dict[str, Any]) -> float:
        tables = {s: by_latent(row) for s, row in scores[kind].items() if len(s) == size}
        return mean(float(row[j]) for s, row in tables.items() for j in sorted(latents_of(s)[which]) if j in row)

    return measure


def partial(kind: str) -> Table:
    sizes = {4: "all four views", 3: "three views", 2: "two views"}
    columns = {
        f"{what}, {name}": over(kind, size, which)
        for size, name in sizes.items()
        for which, what in enumerate(("shared", "not shared"))
    }
    return lambda lines: rows_of(lines, "partial/", columns)


def finer(lines: list[Line]) -> str:
    """Codes of three views: latents that only these three share, and latents that all four share."""

    def measure(kind: str, common: bool) -> Measure:
        def of_scores(scores: dict[str, Any]) -> float:
            rows = {s: row for s, row in scores[kind].items() if len(s) == 3}
            return mean(float(row[j]) for s, row in rows.items() for j in latents_of(s)[0] if (j in "01") == common)

        return of_scores

    kinds = {"kernel ridge": "theirs", "linear": "theirs, linear"}
    what = {"what only the three share": False, "what all four share": True}
    columns = {f"{name}, {k}": measure(kind, c) for name, c in what.items() for k, kind in kinds.items()}
    return rows_of(lines, "partial/", columns)


def budgets(lines: list[Line]) -> str:
    rows = []
    for prefix in ("pair/", "longer/", "partial/"):
        seen = {}
        for experiment, (_, its) in grid.EXPERIMENTS.items():
            for name, config in its if experiment.startswith(prefix) else ():
                runs = [x for x in found(lines, experiment, config) if "budget" in x]
                seen.setdefault(name, []).extend(runs)
        for name, runs in seen.items():
            if runs:
                b = runs[0]["budget"]
                seconds = statistics.median(x["cpu_seconds"] for x in runs)
                numbers = [b["steps"], b["samples"], b["passes"], b["weights"]]
                rows.append([prefix[:-1], name, *(f"{n:,}" for n in numbers), f"{seconds:.0f}"])
    head = [
        "experiment",
        "method",
        "steps",
        "samples a step",
        "encoder passes a step",
        "weights",
        "seconds of one core",
    ]
    return table(head, rows)


def agreement(lines: list[Line]) -> str:
    its = [x for x in lines if x["experiment"] == "agreement"]
    if not its:
        return "*Not run yet.*"
    rows = []
    for name in ("pair", "partial"):
        for what, value in its[-1][name].items():
            text = (
                ", ".join(f"{k} {v}" for k, v in value.items())
                if isinstance(value, dict)
                else f"{value:,}"
                if isinstance(value, int)
                else f"{value:.4g}"
            )
            rows.append([name, what, text])
    return table(["experiment", "compared", "value"], rows)


TABLES: dict[str, Table] = {
    "budgets": budgets,
    "agreement": agreement,
    "pair: their protocol": pair("pair/", "theirs"),
    "pair: their linear probe": pair("pair/", "theirs, linear"),
    "pair: our protocol": pair("pair/", "linear", "kernel"),
    "pair: conditional": conditional,
    "pair: longer": pair("longer/", "theirs", "theirs, linear"),
    "partial: their protocol": partial("theirs"),
    "partial: their linear probe": partial("theirs, linear"),
    "partial: our protocol, linear": partial("linear"),
    "partial: our protocol, kernel": partial("kernel"),
    "partial: finer": finer,
}


def write(lines: list[Line], page: Path = PAGE) -> None:
    """Fill the blocks of the page."""
    page.write_text(result_lines.filled(page.read_text(), TABLES, lines))
    print(f"written: {page}")
