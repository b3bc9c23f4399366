"""Tile configurations and measured thresholds for "auto", read from table.json.

Keys of configurations: architecture ("sm_90", else "default"), mode (the kernel's task), largest D of the bucket
("inf": any). Keys of "auto": architecture, arithmetic of the other backends ("float32" or "tf32"), largest D; values
are the numbers of rows from which triton is fastest. `benchmarks/gpu.py` writes both.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

PATH = Path(__file__).with_name("table.json")


class Configuration(NamedTuple):
    """The shape of a tile and its launch parameters."""

    block_m: int  # rows of a tile
    block_n: int  # columns: block_m, or twice that (resident: any)
    block_k: int  # columns of the operands in shared memory at a time
    warps: int
    stages: int  # stages of the pipeline that loads them
    descriptor: bool  # tensor descriptors (sm_90) instead of pointers
    group: int  # row tiles that share a column tile in the L2 cache
    registers: int = 0  # limit per thread, 0 leaves it to the compiler; fewer let more programs share a multiprocessor
    resident: bool = False  # weights: keep the gradient in registers (`resident`), for up to block_k columns of z

    def options(self) -> dict[str, int]:
        """Options of a launch other than the constants."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        return found | {"maxnreg": self.registers} if self.registers else found


_TABLE: dict[str, Any] = json.loads(PATH.read_text())  # at import, as torch.compile cannot trace reading a file


def table() -> dict[str, Any]:
    return _TABLE


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" and so on; "default" if it is not a CUDA device."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def bucket(entries: dict[str, Any], size: int) -> Any:
    """The entry with the smallest key that is at least `size`."""
    return entries[min((k for k in entries if size <= float(k)), key=float)]


def configuration(arch: str, mode: str, width: int, own: Mapping[str, Any] | None = None) -> Configuration:
    """The configuration for operands of `width` columns; architectures without an entry use "default".

    own: configurations by mode that were measured on this machine (`cache`), which have priority.
    """
    every = table()["configurations"]
    found = next(modes[mode] for modes in (own, every.get(arch), every["default"]) if modes and mode in modes)
    return Configuration(*bucket(found, width))


def is_configuration(values: Any) -> bool:
    """Whether a list from a file is a `Configuration` with which the kernels compile."""
    fields = Configuration._fields
    if not isinstance(values, list) or not 7 <= len(values) <= len(fields):
        return False
    kinds = [Configuration.__annotations__[name] for name in fields]
    if any(type(v) is not kind for v, kind in zip(values, kinds, strict=False)):
        return False
    c = Configuration(*values)
    powers = all(v > 0 and v & (v - 1) == 0 for v in (c.block_m, c.block_n, c.block_k, c.warps))
    square = c.block_n in (c.block_m, 2 * c.block_m) or bool(getattr(c, "resident", False))
    fit = all(16 <= v <= 256 for v in (c.block_m, c.block_n, c.block_k)) and c.warps <= 16 and 1 <= c.stages <= 8
    return powers and square and fit and 1 <= c.group <= 64 and 0 <= c.registers <= 255


def candidates(arch: str, mode: str, width: int) -> list[Configuration]:
    """Further configurations worth timing; only those of buckets above 128 accept rows of any width."""
    every = table()["candidates"]
    buckets = {**every["default"], **every.get(arch, {})}.get(mode, {})
    return [Configuration(*c) for size, values in buckets.items() if width <= float(size) for c in values]
