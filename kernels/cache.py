"""Cache of measurements on this machine: one file per GPU, set of versions and version of the kernels.

    ${SSD_ADDON_CACHE:-${XDG_CACHE_HOME:-~/.cache}/ssd-addon}/kernels/<key of `choice.key`>.json

`python -m ssd_addon tune` writes it under a temporary name and then renames it, so that readers find a complete file or
none. A file that cannot be read, or that was measured on another GPU, is ignored with a warning.
"""

import functools
import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssd_addon.kernels import choice, table
from ssd_addon.kernels.choice import Gpu

FORMAT = 1
NOT_MEASURED = {
    "__init__.py", "cache.py", "check.py", "choice.py", "color_tiles.py", "colors.py", "dispatch.py", "timing.py",
    "tune.py",
}  # fmt: skip
"""Files of this package on which no measurement depends."""


def directory() -> Path:
    """The folder of the files; the environment is read at every call."""
    if own := os.environ.get("SSD_ADDON_CACHE"):
        return Path(own) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ssd-addon" / "kernels"


@functools.cache
def kernels_hash() -> str:
    """A hash of the kernels' source, 12 digits; measurements are only used for the same source."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.name not in NOT_MEASURED:
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:12]


def path(gpu: Gpu) -> Path:
    """The file of a GPU."""
    return directory() / f"{choice.key(gpu, kernels_hash())}.json"


def load(gpu: Gpu) -> dict[str, Any] | None:
    """The record of a GPU; None if there is no file, or, with a warning, if it cannot be used.

    A record has "format", "key", "auto" {"float32" | "tf32": {width: rows}}, "configurations" {mode: {width: tile}} and
    "measured", with details of the measurement.
    """
    try:
        file = path(gpu)
        text = file.read_text()
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: no home folder
        _warn(f"the cache of measurements cannot be read ({error})")
        return None
    try:
        record = json.loads(text)
        problem = _problem(record, file.stem)
    except ValueError as error:
        problem = str(error)
    if problem:
        _warn(f"{file} is ignored ({problem}); `python -m ssd_addon tune` measures again")
        return None
    return dict(record)


def save(gpu: Gpu, record: Mapping[str, Any]) -> Path:
    """Write the record of a GPU, with its format and key.

    Raises:
        ValueError: `load` would refuse the record.
        OSError: the folder cannot be written.
    """
    file = path(gpu)
    whole = {"format": FORMAT, "key": file.stem, **record}
    if problem := _problem(whole, file.stem):
        raise ValueError(f"record: expected one that can be loaded again: got {problem}")
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=file.parent)
    try:
        with os.fdopen(handle, "w") as f:
            f.write(json.dumps(whole, indent=1) + "\n")
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    forget()
    return file


@functools.cache
def of_device(device: torch.device) -> dict[str, Any] | None:
    """The record of a device, read once per process; None if it is not a CUDA device."""
    return load(choice.gpu_of(device)) if device.type == "cuda" else None


def forget() -> None:
    """Read the files again on the next use."""
    of_device.cache_clear()


def _problem(record: Any, stem: str) -> str | None:
    """The reason why a record cannot be used here, or None."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return f"it is not of format {FORMAT}"
    if record.get("key") != stem:
        return f"it was measured for {record.get('key')!r}"
    auto, tiles = record.get("auto"), record.get("configurations")
    if not isinstance(auto, dict) or not isinstance(tiles, dict):
        return "it has no 'auto' or no 'configurations'"
    for name, rows in auto.items():
        if name not in ("float32", "tf32") or not _buckets(rows):
            return f"'auto' has {name!r}: {rows!r}"
        if not all(type(n) is int and n > 0 for n in rows.values()):
            return f"'auto' has {rows!r}"
    for mode, buckets in tiles.items():
        if not _buckets(buckets) or not all(table.is_configuration(v) for v in buckets.values()):
            return f"'configurations' has {mode!r}: {buckets!r}"
    return None


def _buckets(entries: Any) -> bool:
    """Whether these are entries by width, with one for all larger widths."""
    if not isinstance(entries, dict) or "inf" not in entries:
        return False
    return all(k == "inf" or (k.isdecimal() and math.isfinite(float(k))) for k in entries)


def _warn(message: str) -> None:
    warnings.warn(f"ssd_addon.kernels: {message}", RuntimeWarning, stacklevel=3)
