"""What the expressions of numbers.toml may call: functions that read the data files under docs/.

Scores that are read from several seeds come as `Seeds`. Written in an expression by itself, it stands for its mean;
`sd`, `low` and `high` take its spread. The means of the study are formed as its tables form them (study/report.py).
"""

import json
import math
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent / "examples")]

from identifiability import grid as identifiability_grid  # noqa: E402
from identifiability import report as identifiability_report  # noqa: E402
from study import report  # noqa: E402

__all__ = [
    "audited",
    "Seeds",
    "accuracy",
    "budget",
    "color_change",
    "data",
    "domain",
    "effective_rank",
    "example",
    "first_objects",
    "frozen",
    "gpu",
    "high",
    "identified",
    "latents",
    "lines",
    "loss_memory",
    "loss_ratio",
    "low",
    "overwritten",
    "pairs",
    "partial",
    "probes",
    "rows",
    "score",
    "sd",
    "speeds",
    "task",
    "tile_ms",
    "tile_share",
]


class Seeds(list[float]):
    """A number for each seed."""

    @property
    def mean(self) -> float:
        known = [v for v in self if not math.isnan(v)]
        if not known:
            raise ValueError("expected a score: got n/a for every seed")
        return statistics.mean(known)


def sd(values: Seeds) -> float:
    """Standard deviation over seeds."""
    return statistics.stdev(v for v in values if not math.isnan(v))


def low(*values: Any) -> float:
    """The smallest of numbers, or of the means of several scores."""
    return min(v.mean if isinstance(v, Seeds) else v for v in _several(values))


def high(*values: Any) -> float:
    """The largest of numbers, or of the means of several scores."""
    return max(v.mean if isinstance(v, Seeds) else v for v in _several(values))


def _several(values: tuple[Any, ...]) -> Any:
    if len(values) == 1 and isinstance(values[0], list) and not isinstance(values[0], Seeds):
        return values[0]
    return values


@cache
def data(path: str) -> Any:
    """A JSON file, by its path under docs/."""
    return json.loads((DOCS / path).read_text(encoding="utf-8"))


@cache
def lines(path: str) -> list[dict[str, Any]]:
    """A file of one JSON object a line, by its path under docs/."""
    return [json.loads(line) for line in (DOCS / path).read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------- the study


@cache
def _experiment(experiment: str) -> dict[str, list[dict[str, Any]]]:
    return report.rows_of(lines("results/study.jsonl"), experiment)


def rows(experiment: str, name: str) -> list[dict[str, Any]]:
    """A row of the study, a line for each seed, by the name that examples/study/grid.py gives it."""
    found = _experiment(experiment)
    if name not in found:
        raise ValueError(f"{experiment}: expected one of {', '.join(found)}: got {name}")
    return found[name]


def score(experiment: str, name: str, kind: str, space: str, *factors: str) -> Seeds:
    """R^2 of a space by `kind`: "linear", "kernel", "conditional", "label-free", or "each" (label-free, by parameter).

    Several factors are averaged in each seed. A factor may be a part of its name that no other has.
    """
    kind = {"each": "label-free, each"}.get(kind, kind)
    found = rows(experiment, name)
    known = found[0]["tables"][kind][space]
    names = [_named(known, factor) for factor in factors]
    return Seeds(report.mean(report.score(line, kind, space, f) for f in names) for line in found)


def _named(known: dict[str, float], part: str) -> str:
    matching = [f for f in known if f == part] or [f for f in known if part in f]
    if len(matching) != 1:
        raise ValueError(f"expected one of {', '.join(known)}: got {part}")
    return matching[0]


def latents(experiment: str, name: str, number: str) -> Seeds:
    """A column of the tables of latents, such as "styles" or "content in styles"."""
    return Seeds(report.latent_numbers(line)[number] for line in rows(experiment, name))


def accuracy(experiment: str, name: str, space: str, kind: str) -> Seeds:
    """Accuracy of photographs by `"linear"` or by `"neighbours"`; space "styles" is the mean over style spaces."""
    found = [line for line in rows(experiment, name) if "accuracy" in line]
    spaces = [space]
    if space == "styles":
        spaces = [s for s in found[0]["accuracy"] if s not in ("content", "backbone")]
    return Seeds(report.mean(line["accuracy"][s][kind] for s in spaces) for line in found)


def effective_rank(experiment: str, name: str, space: str) -> Seeds:
    return Seeds(line["terms"][f"effective_rank/{space}"] for line in rows(experiment, name))


def task(experiment: str, name: str, which: str, space: str, half: str = "report") -> Seeds:
    """Accuracy on a task of style."""
    return Seeds(line["tasks"][which][space][half] for line in rows(experiment, name) if "tasks" in line)


# ---------------------------------------------------------------------------------------------------- other results


def identified(experiment: str, name: str, kind: str, space: str, factor: str) -> Seeds:
    """Identifiability, pairs: kind "theirs" (kernel ridge), "theirs, linear", "linear", "kernel" or "conditional"."""
    return Seeds(line["scores"][kind][space][factor] for line in _identifiability(experiment, name))


def pairs(experiment: str, name: str, kind: str) -> list[Seeds]:
    """Identifiability, pairs: content from content code, style from content code, style from style code."""
    cells = (("content", "content"), ("content", "style"), ("style", "style"))
    return [identified(experiment, name, kind, *cell) for cell in cells]


def partial(name: str, kind: str, size: int, what: str, experiment: str = "partial/independent") -> Seeds:
    """Identifiability, partial views: what sets of `size` views "share", or do not ("not")."""
    measure = identifiability_report.over(kind, size, ("share", "not").index(what))
    return Seeds(measure(line["scores"]) for line in _identifiability(experiment, name))


def _identifiability(experiment: str, name: str) -> list[dict[str, Any]]:
    configs = dict(identifiability_grid.EXPERIMENTS[experiment][1])
    return identifiability_report.found(lines("results/identifiability.jsonl"), experiment, configs[name])


def domain(name: str, kind: str, space: str, factor: str) -> float:
    """A domain of docs/domains.md; kind "nonlinear" is the kernel probe."""
    table = data("results/domains.json")[name]["tables"][{"each": "label-free, each parameter"}.get(kind, kind)][space]
    return float(table[_named(table, factor)])


def overwritten(images: str, n: int, group: str, parameter: str, column: str = "alone") -> list[float]:
    """Which groups overwrite: R^2 of one parameter for each seed."""
    return [
        part[column]
        for line in data("results/overwrites.json")
        if line["images"] == images and line["n"] == n
        for part in line["found"]["parts"]
        if part["group"] == group and parameter in part["parameter"]
    ]


def probes(method: str, space: str, column: str) -> Seeds:
    """results/linear-probe.json: a method's scores, a number for each seed."""
    return Seeds(float(run["probes"][space][column]) for run in data("results/linear-probe.json")["runs"][method])


def frozen(row: str, table: str, space: str, factor: str) -> Seeds:
    """results/frozen.jsonl: R^2 ("groups", "parameters") or accuracy."""
    found = [line for line in lines("results/frozen.jsonl") if line["row"] == row]
    return Seeds(line["tables"][table][space][_named(line["tables"][table][space], factor)] for line in found)


def speeds(path: str) -> list[list[float]]:
    """Rows of a table of the losses' benchmark: our seconds, theirs, and the ratio with its smallest and largest."""
    return [
        [
            r["seconds"]["ssd_addon"]["median"],
            r["seconds"][name]["median"],
            *(ratio[k] for k in ("median", "min", "max")),
        ]
        for r in data(path)["results"]
        for name, ratio in r["speedup"].items()
    ]


def loss_ratio(path: str, family: str, b: int, d: int, name: str) -> float:
    """How many times as fast our loss is as another one."""
    found = next(r for r in data(path)["results"] if (r["family"], r["B"], r["D"]) == (family, b, d))
    return float(found["speedup"][name]["median"])


def loss_memory(b: int, d: int, name: str) -> float:
    """Our memory in percent of another loss's."""
    found = next(r for r in data("benchmarks/losses.json")["results"] if (r["B"], r["D"]) == (b, d))
    return float(100 * found["memory"]["ssd_addon"] / found["memory"][name])


def gpu(n: int, d: int, method: str, what: str = "ms") -> float:
    """The GPU run: a method's milliseconds at N x D ("graph": ours in a CUDA graph), or its MiB."""
    found = next(r for r in data("benchmarks/gpu/gpu.json")["stages"]["speed"]["result"] if (r["N"], r["D"]) == (n, d))
    if what == "MiB":
        return float(found["memory_MiB"][method])
    return float((found["graph"] if method == "graph" else found["times"][method])["ms"])


def tile_ms(kernel: str, **wanted: Any) -> float:
    """The GPU run: the fastest of a kernel's tiles (such as "weights, 128"), by its warps or place."""
    tried = data("benchmarks/gpu/gpu.json")["stages"]["tune"]["result"]["candidates"][kernel]
    places = {"warps": 3, "resident": 8}
    return float(min(t["ms"] for t in tried if all(t["configuration"][places[k]] == v for k, v in wanted.items())))


def tile_share(name: str) -> float:
    """The GPU run: the share of the card's peak that a kernel's fastest tile reached."""
    found = data("benchmarks/gpu/gpu.json")["stages"]
    return float(found["variants"]["result"][name]["TFLOPs"] / found["machine"]["result"]["peak16_TFLOPs"])


def budget(method: str, space: str) -> list[float]:
    """A row of the table of results/linear-probe.json: each column for each seed."""
    runs = data("results/linear-probe.json")["runs"][method]
    columns = ("linear", "20-NN", "linear, 1% of labels", "linear, 10% of labels")
    return [*(run["probes"][space][c] for c in columns for run in runs), *color_change(method, space)]


def color_change(method: str, space: str) -> Seeds:
    """results/linear-probe.json: label-free R^2 of the color group."""
    return Seeds(
        cell["score"]
        for run in data("results/linear-probe.json")["runs"][method]
        for cell in run["parameters"]["cells"]
        if (cell["space"], cell["factor"]) == (space, "color")
    )


def first_objects(kind: str, space: str) -> float:
    """results/objects-first.jsonl: the largest score of the shape over all runs that have the space."""
    found = [line["tables"][kind] for line in lines("results/objects-first.jsonl")]
    return max(table[space]["shape"] for table in found if space in table)


def example(name: str, kind: str, space: str, factor: str) -> float:
    """results/NAME.json, a run of examples/synthetic.py; kind "nonlinear" is the kernel probe."""
    cells = data(f"results/{name}.json")["tables"][kind]["cells"]
    known = {cell["factor"]: cell["score"] for cell in cells if cell["space"] == space}
    return float(known[_named(known, factor)])


def audited(model: str, row: str, parameter: str) -> float:
    """results/audit.json: R^2 of one parameter of the augmentations from a row of a model's table."""
    (found,) = [m for m in data("results/audit.json")["models"] if m["name"] == model]
    (cell,) = [c for c in found["table"]["parts"]["cells"] if c["space"] == row and parameter in c["factor"]]
    return float(cell["score"])
