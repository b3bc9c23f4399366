"""Writes JSON-lines logs: converts values to JSON, and prepares a file for appending."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def ready(path: Path) -> None:
    """Create the log's folder, raise at once if the log cannot be written, and drop a truncated last line."""
    if path.is_dir():
        raise IsADirectoryError(f"log: expected a file to write, such as {path / 'log.jsonl'}: got a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        whole, end, last = file.read().rpartition(b"\n")
        if last:
            try:
                json.loads(last.decode("utf-8-sig", errors="replace"))
                file.write(b"\n")
            except ValueError:
                file.truncate(len(whole + end))


def plain(value: Any, name: str) -> Any:
    """Convert a value for JSON: numbers that are not finite to None, tensors and arrays to numbers or lists, sets to
    lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{name}/{k}") for k, v in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = item(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v, name) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"write: expected a number, a string, or lists of them as {name!r}: got {type(value).__name__}")


def item(value: Tensor | np.ndarray[Any, Any] | np.generic) -> Any:
    """The number in a tensor, array or scalar with one element, else its numbers as lists."""
    kept = value.detach() if isinstance(value, Tensor) else value
    return kept.item() if math.prod(kept.shape) == 1 else kept.tolist()


def number(name: str, value: Any) -> float | None:
    """Convert a term to a number."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = item(value)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        got = f"{len(value)} numbers" if isinstance(value, list) else repr(value)
        raise TypeError(f"terms: expected a number as {name!r}: got {got}") from error


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the JSON objects in a log; other lines are skipped."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry
