"""The tables of docs/results.md, from the lines of the study; its pictures are in pictures.py.

`TABLES[NAME]` writes the block of the page between `<!-- NAME -->` and `<!-- end -->`; the rest is written by hand.
Cells are means over seeds with the standard deviation; a row of one seed has a † and no spread.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import result_lines
from result_lines import Line, Table, mean, table
from study import grid
from study.reach import shared

from ssd_addon.report.verdict import short

DOCS = Path(__file__).parent.parent.parent / "docs"
cell = functools.partial(result_lines.cell, unknown="n/a")


def rows_of(lines: Iterable[Line], experiment: str) -> dict[str, list[Line]]:
    """Name -> its lines by seed, in the order of the grid; only rows that are still in the grid."""
    out: dict[str, list[Line]] = {}
    for name, config, seeds in grid.EXPERIMENTS[experiment]:
        wanted = {"world": grid.world(experiment), **config}
        found = [x for x in lines if x["experiment"] == experiment and x["config"] == wanted and x["seed"] < seeds]
        by_seed = {x["seed"]: x for x in found}  # a line for each seed, the last one if there are several
        if found:
            out[name] = [by_seed[seed] for seed in sorted(by_seed)]
    return out


SHORT = {
    "all keys, content entropy, equivariance 0.5, 64 and 32": "the recipe",
    "content-only": "ordinary SSL",
    "content-only, 256 wide": "ordinary SSL, 256 wide",
}


def named(name: str, found: list[Line], seeds: int) -> str:
    missing = seeds - len(found)
    mark = "" if seeds > 1 and not missing else "†" if len(found) == 1 else f" ({len(found)} seeds)"
    return SHORT.get(name, name) + mark


def score(line: Line, kind: str, space: str, factor: str) -> float:
    return float(line["tables"][kind].get(space, {}).get(factor, math.nan))


# ---------------------------------------------------------------------------------------------------- latents


def latent_numbers(line: Line) -> dict[str, float]:
    """Summaries of a matrix, each a mean over style blocks (kernel probe unless stated otherwise)."""
    spaces = list(line["tables"]["kernel"])
    factors = list(line["tables"]["kernel"]["backbone"])
    styles = [f for f in factors if f != "content"]
    own = [s for s in spaces if s in styles]

    def get(kind: str, pairs: Iterable[tuple[str, str]]) -> float:
        return mean(score(line, kind, s, f) for s, f in pairs)

    return {
        "content": get("kernel", [("content", "content")]),
        "styles, linear": get("linear", [(s, s) for s in own]),
        "styles": get("kernel", [(s, s) for s in own]),
        "styles given content": get("conditional", [(s, s) for s in own]),
        "content in styles, linear": get("linear", [(s, "content") for s in own]),
        "content in styles": get("kernel", [(s, "content") for s in own]),
        "styles in content": get("kernel", [("content", s) for s in styles]),
        "other styles": get("kernel", [(s, f) for s in own for f in styles if f != s]),
        "styles in backbone": get("kernel", [("backbone", s) for s in styles]),
    }


def latents(*experiments: str) -> Table:
    def make(lines: list[Line]) -> str:
        rows, head = [], [""]
        for e in experiments:
            seeds = {name: n for name, _, n in grid.EXPERIMENTS[e]}
            for name, found in rows_of(lines, e).items():
                numbers = [latent_numbers(x) for x in found]
                head = ["", *numbers[0]]
                rows.append([named(name, found, seeds[name]), *(cell([n[k] for n in numbers]) for k in numbers[0])])
        return table(head, rows)

    return make


# ---------------------------------------------------------------------------------------------------- images


SPRITE_FACTORS = {
    "shape": ("shape",),
    "scale": ("scale",),
    "position": ("x", "y"),
    "hue": ("hue",),
    "brightness": ("brightness",),
}


OBJECT_FACTORS = {"shape": ("shape",), "ground": ("ground",), "texture": ("texture",)} | {
    k: v for k, v in SPRITE_FACTORS.items() if k != "shape"
}


def sprites(kind: str, *experiments: str, factors: Mapping[str, tuple[str, ...]] = SPRITE_FACTORS) -> Table:
    """Rows (method, space), columns factors, for one probe."""

    def make(lines: list[Line]) -> str:
        rows = []
        for e in experiments:
            seeds = {name: n for name, _, n in grid.EXPERIMENTS[e]}
            for name, found in rows_of(lines, e).items():
                for space in found[0]["tables"][kind]:
                    cells = [
                        cell([mean(score(x, kind, space, f) for f in fs) for x in found]) for fs in factors.values()
                    ]
                    rows.append([named(name, found, seeds[name]), space, *cells])
        return table(["", "space", *factors], rows)

    return make


def told(parameters: Iterable[str]) -> tuple[str, ...]:
    """The parameters without whether an operation was applied, except for grayscale, which has no other."""
    return tuple(p for p in parameters if not p.endswith("batch_prob") or "Grayscale" in p)


def label_free(*experiments: str) -> Table:
    """Rows (method, space), columns the parameters of the augmentations; a table for each set of parameters."""

    def make(lines: list[Line]) -> str:
        rows: dict[tuple[str, ...], list[list[str]]] = {}
        for e in experiments:
            seeds = {name: n for name, _, n in grid.EXPERIMENTS[e]}
            for name, found in rows_of(lines, e).items():
                kind = found[0]["tables"]["label-free, each"]
                parameters = told(kind["backbone"])
                for space in kind:
                    cells = [cell([score(x, "label-free, each", space, p) for x in found]) for p in parameters]
                    rows.setdefault(parameters, []).append([named(name, found, seeds[name]), space, *cells])
        made = [table(["", "space", *map(short, parameters)], its) for parameters, its in rows.items()]
        return "\n\n".join(made) or table([], [])

    return make


def accuracy(*experiments: str) -> Table:
    """Rows methods, columns backbone, content and the mean over style spaces, by both classifiers."""

    def make(lines: list[Line]) -> str:
        rows, kinds = [], {"linear": "linear", "neighbours": "20 neighbors"}
        for e in experiments:
            seeds = {name: n for name, _, n in grid.EXPERIMENTS[e]}
            for name, found in rows_of(lines, e).items():
                found = [x for x in found if "accuracy" in x]
                if not found:
                    continue
                styles = [s for s in found[0]["accuracy"] if s not in ("content", "backbone")]
                cells = [
                    cell([mean(x["accuracy"][s][k] for s in spaces) for x in found])
                    for spaces in (["backbone"], ["content"], styles)
                    for k in kinds
                ]
                rows.append([named(name, found, seeds[name]), *cells])
        head = [f"{what}, {k}" for what in ("backbone", "content", "styles") for k in kinds.values()]
        return table(["", *head], rows)

    return make


def tasks(half: str, columns_of: Mapping[str, tuple[str, ...]], *experiments: str) -> Table:
    """Rows tasks, columns (method, space) of name -> spaces: accuracies on one half of the held-out images."""

    def make(lines: list[Line]) -> str:
        columns: dict[tuple[str, str], list[Line]] = {}
        for e in experiments:
            for name, its in rows_of(lines, e).items():
                if found := [x for x in its if "tasks" in x]:
                    columns |= {(name, space): found for space in columns_of.get(name, ())}
        if not columns:
            return table([], [])
        rows = [
            [task, *(cell([x["tasks"][task][space][half] for x in found]) for (_, space), found in columns.items())]
            for task in next(iter(columns.values()))[0]["tasks"]
        ]
        head = [f"{named(name, found, 3)}, {space}" for (name, space), found in columns.items()]
        return table(["", *head], rows)

    return make


LEVEL, SMALLEST = 0.05, 0.02
"""A leak: its corrected p is at most the first, and its effect (partial R^2) at least the second."""


def tested(experiment: str) -> Table:
    """Rows (method, space), columns factors that are not its own: the effect, and in how many seeds it is a leak."""

    def make(lines: list[Line]) -> str:
        rows, columns = [], {}
        seeds = {name: n for name, _, n in grid.EXPERIMENTS[experiment]}
        for name, its in rows_of(lines, experiment).items():
            if not (found := [x["leaks"] for x in its if "leaks" in x]):
                continue
            factors = told(dict.fromkeys(f for of_space in found[0].values() for f in of_space))
            columns |= {f: short(f) if "/" in f else f for f in factors}
            for space in found[0]:
                cells = {}
                for f in factors:
                    tests = [x[space][f] for x in found if f in x.get(space, {})]
                    count = sum(p <= LEVEL and effect >= SMALLEST for p, effect in tests)
                    cells[f] = f"{cell([effect for _, effect in tests])}, {count} of {len(tests)}" if tests else ""
                rows.append((named(name, its, seeds[name]), space, cells))
        made = [[name, space, *(cells.get(f, "") for f in columns)] for name, space, cells in rows]
        return table(["", "space", *columns.values()], made)

    return make


def searches(experiment: str) -> Table:
    """Rows (method, space), columns what the images show: how similar the nearest neighbors in the space are in it."""

    def make(lines: list[Line]) -> str:
        rows: list[list[str]] = []
        names: list[str] = []
        seeds = {name: n for name, _, n in grid.EXPERIMENTS[experiment]}
        for name, its in rows_of(lines, experiment).items():
            if found := [x["retrieval"] for x in its if "retrieval" in x]:
                names = list(found[0]["backbone"])
                for space in found[0]:
                    cells = [cell([x[space].get(a, math.nan) for x in found]) for a in names]
                    rows.append([named(name, its, seeds[name]), space, *cells])
        return table(["", "space", *names], rows)

    return make


def trials(*experiments: str) -> Table:
    """Rows trials, columns what the choice among them is made by: the backbone's tasks on the half for choosing."""

    def make(lines: list[Line]) -> str:
        rows = []
        for e in experiments:
            for name, found in rows_of(lines, e).items():
                tasks = found[0]["tasks"]
                chosen = {task: its["backbone"]["choose"] for task, its in tasks.items()}
                cells = [
                    mean(chosen.values()),
                    chosen["classes, linear"],
                    tasks["classes, linear"]["content"]["choose"],
                ]
                rows.append([named(name, found, 1), *(cell([c]) for c in cells)])
        return table(["", "mean of all tasks, backbone", "classes, backbone", "classes, content"], rows)

    return make


UNSEEN = {
    "content-only": ("backbone", "content"),
    "the recipe": ("backbone", "content", "spatial", "color"),
    "LooC, tau 0.05, spaces 128 and 128": ("backbone",),
    "AugSelf, weight 1, tau 0.15": ("backbone",),
}


def reach(_: list[Line]) -> str:
    """Rows spaces, columns factors: what the two views of the space's pair share."""
    rows = [
        [f"{space} pair", *(cell([mean(of[f] for f in fs)]) for fs in SPRITE_FACTORS.values())]
        for space, of in shared().items()
    ]
    return table(["R² of one view's factor from the other view", *SPRITE_FACTORS], rows)


TABLES: dict[str, Table] = {
    "reach: sprites": reach,
    "latents: families": latents("latents/families"),
    "latents: cures": latents("latents/cures"),
    "latents: controls": latents("latents/controls"),
    "latents: styles": latents("latents/styles", "latents/dependence"),
    "latents: scans": latents("latents/temperature", "latents/batch", "latents/length", "latents/dimensions"),
    "latents: others": latents("latents/others"),
    "latents: entropy": latents("latents/entropy"),
    "sprites: linear": sprites("linear", "sprites/methods"),
    "sprites: kernel": sprites("kernel", "sprites/methods"),
    "sprites: label-free": label_free("sprites/methods"),
    "sprites: collapse": sprites("kernel", "sprites/collapse"),
    "sprites: families": sprites("linear", "sprites/families"),
    "sprites: families, label-free": label_free("sprites/families"),
    "sprites: ablations": sprites("linear", "sprites/ablations", "sprites/cross"),
    "sprites: ablations, label-free": label_free("sprites/ablations", "sprites/cross"),
    "recipe: sprites, linear": sprites("linear", "sprites/finals"),
    "recipe: sprites, kernel": sprites("kernel", "sprites/finals"),
    "recipe: imagenet": label_free("imagenet/recipe"),
    "recipe: objects, linear": sprites("linear", "objects/finals", factors=OBJECT_FACTORS),
    "recipe: objects, kernel": sprites("kernel", "objects/finals", factors=OBJECT_FACTORS),
    "recipe: objects, leaks": tested("objects/finals"),
    "unseen: accuracy": accuracy("cifar/fresh"),
    "unseen: label-free": label_free("cifar/fresh"),
    "unseen: leaks": tested("cifar/fresh"),
    "unseen: tasks": tasks("all", UNSEEN, "cifar/fresh"),
    "unseen: retrieval": searches("cifar/fresh"),
    "unseen: trials": trials("cifar/looc", "cifar/augself"),
    "families: cifar, accuracy": accuracy("cifar/each"),
    "families: cifar, label-free": label_free("cifar/each"),
    "families: sprites, linear": sprites("linear", "sprites/each"),
    "families: sprites, kernel": sprites("kernel", "sprites/each"),
    "content: accuracy": accuracy("cifar/tuned", "cifar/content"),
    "content: label-free": label_free("cifar/tuned", "cifar/content"),
    "recipe: cifar, accuracy": accuracy("cifar/finals"),
    "recipe: cifar, label-free": label_free("cifar/finals"),
    "scan: sprites, linear": sprites("linear", "sprites/scan"),
    "scan: sprites, kernel": sprites("kernel", "sprites/scan"),
    "scan: cifar, accuracy": accuracy("cifar/scan"),
    "cifar: accuracy": accuracy("cifar/methods", "cifar/weights", "cifar/crop"),
    "cifar: label-free": label_free("cifar/methods"),
    "cifar: settings": label_free("cifar/weights", "cifar/crop"),
    "cifar: kinds": label_free("cifar/cross"),
    "cifar: kinds, accuracy": accuracy("cifar/cross"),
    "imagenet: label-free": label_free("imagenet/cross"),
}


PAGES = (
    "results.md",
    *(f"results/{name}.md" for name in ("recipe", "unseen", "families", "latents", "sprites", "photographs")),
)


def write(lines: list[Line], docs: Path = DOCS) -> None:
    """Fill the blocks of the pages of results."""
    for name in PAGES:
        page = docs / name
        page.write_text(result_lines.filled(page.read_text(), TABLES, lines))
        print(f"written: {page}")
