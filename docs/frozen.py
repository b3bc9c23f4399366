"""Fill docs/pipelines/checkpoint.md's tables and draw its picture from results/frozen.jsonl: `python docs/frozen.py`.

    <!-- frozen: NAME -->   one of TABLES
    <!-- end -->

The lines are those of examples/frozen.py, one for each row and seed. A test holds the page to them.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
LINES, PAGE, PICTURE = (ROOT / p for p in ("results/frozen.jsonl", "pipelines/checkpoint.md", "results/frozen.png"))
BLOCK = re.compile(r"(<!-- frozen: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
ROWS = {
    "frozen: linear heads": "frozen, linear heads",
    "frozen: 1 hidden layer": "frozen, heads with a hidden layer",
    "frozen: 2 hidden layers": "frozen, heads with two hidden layers",
    "frozen: layers averaged": "frozen, four layers, averaged",
    "frozen: layers in 2 x 2 cells": "frozen, four layers in 2 x 2 cells",
    "fine-tuned": "fine-tuned with the heads",
    "trained in full": "trained in full",
    "untrained: 1 hidden layer": "untrained and frozen",
    "untrained: layers in 2 x 2 cells": "untrained and frozen, four layers in 2 x 2 cells",
}
PARAMETERS = {
    "crop": "spatial/0.RandomResizedCrop/src",
    "flip": "spatial/1.RandomHorizontalFlip/batch_prob",
    "brightness": "color/0.ColorJitter/brightness_factor",
    "contrast": "color/0.ColorJitter/contrast_factor",
    "saturation": "color/0.ColorJitter/saturation_factor",
    "hue": "color/0.ColorJitter/hue_factor",
    "grayscale": "color/1.RandomGrayscale/batch_prob",
}
SHOWN = ("crop", "brightness", "contrast", "hue", "grayscale")
"""Parameters in the picture."""

Line = dict[str, Any]
Cell = Callable[[Line], float]


def lines() -> dict[str, list[Line]]:
    """Row -> its lines, one for each seed."""
    found: dict[str, list[Line]] = {}
    for line in map(json.loads, LINES.read_text(encoding="utf-8").splitlines()):
        found.setdefault(line["row"], []).append(line)
    return found


def group(space: str, name: str) -> Cell:
    return lambda line: line["tables"]["groups"][space][name]


def parameter(space: str, name: str) -> Cell:
    return lambda line: line["tables"]["parameters"][space][PARAMETERS[name]]


def accuracy(space: str, probe: str) -> Cell:
    return lambda line: line["accuracy"][space][probe]


def mean(found: list[Line], cell: Cell) -> float:
    return sum(map(cell, found)) / len(found)


def shown(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")


def table(columns: dict[str, list[Cell]], rows: Iterable[str], found: dict[str, list[Line]]) -> list[str]:
    """Markdown; several cells of a column are divided by a slash."""
    out = ["| | " + " | ".join(columns) + " |", "| --- |" + " --: |" * len(columns)]
    for row in rows:
        cells = [" / ".join(shown(mean(found[row], cell)) for cell in each) for each in columns.values()]
        out.append(f"| {ROWS.get(row, 'the checkpoint')} | " + " | ".join(cells) + " |")
    return out


def own(name: str) -> str:
    return PARAMETERS[name].partition("/")[0]


COLUMNS: dict[str, dict[str, list[Cell]]] = {
    "groups": {
        "spatial: its space / backbone": [group("spatial", "spatial"), group("backbone", "spatial")],
        "spatial in color space, in content": [group("color", "spatial"), group("content", "spatial")],
        "color: its space / backbone": [group("color", "color"), group("backbone", "color")],
        "color in spatial space, in content": [group("spatial", "color"), group("content", "color")],
    },
    "parameters": {name: [parameter(own(name), name), parameter("backbone", name)] for name in PARAMETERS},
    "accuracy": {
        f"{space}, {words}": [accuracy(space, probe)]
        for space in ("content", "backbone")
        for words, probe in (("linear", "linear"), ("20 neighbors", "neighbors"))
    },
}


def block(name: str) -> list[str]:
    """The lines of one table, or of the sentence on the seeds."""
    found = lines()
    if name == "seeds":
        cells = [c for columns in COLUMNS.values() for each in columns.values() for c in each]
        spread = {row: max(max(map(c, found[row])) - min(map(c, found[row])) for c in cells) for row in ROWS}
        widest, *others = sorted(spread, key=spread.__getitem__, reverse=True)
        seeds = sorted({len(each) for each in found.values()})
        return [
            f"The numbers are means over {' or '.join(map(str, seeds))} seeds, which differ by at most",
            f"{shown(spread[widest])} in the row *{ROWS[widest]}* and {shown(spread[others[0]])} in the others.",
        ]
    rows = [row for row in ROWS if row in found]
    return table(COLUMNS[name], ["checkpoint", *rows] if name == "accuracy" else rows, found)


def filled(page: str) -> str:
    """The page with its tables written anew."""
    return BLOCK.sub(lambda match: match[1] + "\n".join([*block(match[2]), ""]) + match[3], page)


def draw() -> None:
    """For each parameter and row, what its style space encodes beside what the backbone has."""
    from matplotlib.figure import Figure

    found = lines()
    rows = [row for row in ROWS if row in found][::-1]
    figure = Figure(figsize=(11, 0.42 * len(rows) + 1.3), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(SHOWN), sharey=True), SHOWN, strict=True):
        for y, row in enumerate(rows):
            cells = parameter(own(name), name), parameter("backbone", name)
            space, backbone = (mean(found[row], cell) for cell in cells)
            axis.plot([space, backbone], [y, y], color="0.8", zorder=1)
            for cell, color, face, size in zip(
                cells, ("#D55E00", "#0072B2"), ("#D55E00", "white"), (9, 5), strict=True
            ):
                each = [cell(line) for line in found[row]]
                axis.plot(each, [y] * len(each), "|", color=color, alpha=0.6)
                axis.plot(mean(found[row], cell), y, "o", color=color, mfc=face, markersize=size, zorder=3)
        axis.set_title(name, fontsize=11)
        axis.set_xlim(-0.08, 1.02)
        axis.set_xticks([0, 0.5, 1])
        axis.grid(axis="x", color="0.92")
        axis.set_yticks(range(len(rows)), [ROWS[row] for row in rows])
        axis.tick_params(length=0)
    axis.plot([], [], "o", color="#D55E00", markersize=9, label="its style space")
    axis.plot([], [], "o", color="#0072B2", mfc="white", markersize=5, label="the backbone")
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    figure.supxlabel("R² of the change between two views", fontsize=10)
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw()
