"""Results as JSON lines, one for each run, and Markdown pages whose tables are made from them.

A page holds blocks between `<!-- NAME -->` and `<!-- end -->`, which `filled` rewrites; the rest is written by hand.
"""

import contextlib
import json
import math
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Table = Callable[[list[Line]], str]
ROOT = Path(__file__).parent.parent


def key(run: Line) -> str:
    """What a run is recognized by when runs are resumed: experiment, configuration and seed."""
    return json.dumps([run["experiment"], run["config"], run["seed"]], sort_keys=True)


def read(path: Path) -> list[Line]:
    """The finished runs, without lines that were cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def append(path: Path, line: Line) -> None:
    """Add a run; one that was cut off before it keeps a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    with open(path, "a") as file:
        file.write("\n" * (bool(text) and not text.endswith("\n")) + json.dumps(line) + "\n")


def commit() -> str | None:
    """The commit of the code that runs, with "-dirty" if code was changed since; None outside a repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        asked = [*git, "describe", "--always", "--exclude", "*"]
        name = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        asked = [*git, "status", "--porcelain", "--", "examples", "ssd_addon"]
        changed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + ("-dirty" if changed else "")


def mean(values: Iterable[float]) -> float:
    """The mean of the values that are numbers; NaN if there is none."""
    known = [v for v in values if not math.isnan(v)]
    return statistics.mean(known) if known else math.nan


def cell(values: Iterable[float], unknown: str = "") -> str:
    """Mean and standard deviation over seeds, to two digits."""
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return unknown
    text = f"{statistics.mean(known):.2f}"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):.2f}"
    return text.replace("-0.00", "0.00")


def table(head: list[str], rows: list[list[str]], names: int = 1) -> str:
    """A Markdown table whose first columns are names and whose other columns are numbers."""
    if not rows:
        return "*Not run yet.*"
    lines = [head, [*["---"] * names, *["--:"] * (len(head) - names)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(text: str, tables: Mapping[str, Table], lines: list[Line]) -> str:
    """The page with every block rewritten."""

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables:
            raise ValueError(f"a page of results: expected a block of {', '.join(tables)}: got {name!r}")
        return f"<!-- {name} -->\n{tables[name](lines)}\n<!-- end -->"

    return re.sub(r"<!-- ([^\n]+?) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)
