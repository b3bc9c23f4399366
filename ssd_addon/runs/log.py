"""The JSON-lines log of a run."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOG = "log.jsonl"


def cut_log(path: str | Path, step: int, *, unfinished: Sequence[str] = ()) -> None:
    """Keep the entries of a log up to a step, for a run that goes on from there; what is no JSON object is dropped.

    Args:
        path: of the log.
        step: of the checkpoint.
        unfinished: keys of entries that are written again, such as those of an epoch that had not ended.

    A killed run may leave a line that was cut off, empty lines, or zero bytes after a loss of power. The log is written
    anew beside the old one and then renamed; a log that is not there is begun.
    """
    path = Path(os.path.realpath(path))  # a symbolic link stays one
    kept = []
    for line in path.read_text(encoding="utf-8-sig", errors="replace").split("\n") if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict) or any(key in entry for key in unfinished):
            continue
        if isinstance(entry.get("step"), int) and entry["step"] <= step:
            kept.append(line + "\n")
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(beside, "w", encoding="utf-8") as file:
        file.write("".join(kept))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def logged(path: str | Path, step: int, key: str) -> bool:
    """Whether a log has an entry of this step with this key."""
    if not Path(path).is_file():
        return False
    return any(entry.get("step") == step and key in entry for entry in read_log(path))


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Entries of a JSON-lines log. A last line that was cut off (the run was stopped) is left out; bytes that are not
    UTF-8 become U+FFFD.

    Raises:
        ValueError: a line that is no JSON object, with its number.
    """
    lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: expected a JSON object: got {line[:60]!r}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object: got {line[:60]!r}")
        entries.append(entry)
    return entries
