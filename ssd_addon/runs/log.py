"""The JSON-lines log of a run."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOG = "log.jsonl"


def cut_log(path: str | Path, step: int, *, unfinished: Sequence[str] = ()) -> None:
    """Truncate a log after a step, for a run that resumes there; lines that are not JSON objects are removed.

    Args:
        path: path of the log.
        step: step of the checkpoint.
        unfinished: keys; entries that have one of them are removed too, as the resumed run writes them again, such as
            those of an epoch that had not ended.

    A killed run may leave a truncated line, empty lines, or zero bytes after a loss of power. The new log is written
    under a temporary name and then renamed; a missing log is created.
    """
    path = Path(os.path.realpath(path))  # keeps a symbolic link
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
    """Whether a log has an entry for this step with this key."""
    if not Path(path).is_file():
        return False
    return any(entry.get("step") == step and key in entry for entry in read_log(path))


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a JSON-lines log.

    A truncated last line (of a run that was stopped) is left out; bytes that are not UTF-8 become U+FFFD.

    Raises:
        ValueError: a line is not a JSON object; the message has its number.
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
