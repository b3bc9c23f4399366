"""Lines of a JSON-lines log as they are written: what a value becomes, and a file that is fit to be added to."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def ready(path: Path) -> None:
    """Make the log's folder and say now if it cannot be written; drop a last line that was cut off."""
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
    """Values that JSON has: what is not finite becomes None, a tensor or array a number or a list, a set a list."""
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
    """The number of a tensor, array or scalar that holds one, else its numbers in lists."""
    kept = value.detach() if isinstance(value, Tensor) else value
    return kept.item() if math.prod(kept.shape) == 1 else kept.tolist()


def number(name: str, value: Any) -> float | None:
    """A term as a number."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = item(value)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        got = f"{len(value)} numbers" if isinstance(value, list) else repr(value)
        raise TypeError(f"terms: expected a number as {name!r}: got {got}") from error


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a log, one after the other; lines that are none are passed over."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry
