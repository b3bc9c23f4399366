"""Tile configurations and what was measured for the choice of "auto", read from table.json.

Keys of configurations: architecture ("sm_90", else "default"), mode (what the kernel does), largest D of the bucket
("inf": any). Of "auto": architecture, arithmetic of the other backends ("float32" or "tf32"), largest D; values are
the rows from which on triton is the fastest. `benchmarks/gpu.py` writes both.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

PATH = Path(__file__).with_name("table.json")


class Configuration(NamedTuple):
    """Shape of a tile and how it is run."""

    block_m: int  # rows of a tile
    block_n: int  # columns: block_m, or twice that (resident: any)
    block_k: int  # columns of the operands that are in shared memory at a time
    warps: int
    stages: int  # of the pipeline that loads them
    descriptor: bool  # tensor descriptors (sm_90) instead of pointers
    group: int  # row tiles that share a column tile in the L2 cache
    registers: int = 0  # most per thread, 0 leaves it to the compiler: fewer let more programs share a multiprocessor
    resident: bool = False  # weights: their gradient stays in registers (`resident`), for up to block_k columns of z

    def options(self) -> dict[str, int]:
        """What a launch takes beside the constants."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        return found | {"maxnreg": self.registers} if self.registers else found


_TABLE: dict[str, Any] = json.loads(PATH.read_text())  # at import: torch.compile cannot trace the reading of a file


def table() -> dict[str, Any]:
    return _TABLE


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" and so on; "default" for what is no CUDA device."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def bucket(entries: dict[str, Any], size: int) -> Any:
    """The entry with the smallest key that is at least `size`."""
    return entries[min((k for k in entries if size <= float(k)), key=float)]


def configuration(arch: str, mode: str, width: int, own: Mapping[str, Any] | None = None) -> Configuration:
    """The configuration for operands of `width` columns; architectures without an entry of their own use "default".

    own: configurations by mode that were measured on this machine, which come first (`cache`).
    """
    every = table()["configurations"]
    found = next(modes[mode] for modes in (own, every.get(arch), every["default"]) if modes and mode in modes)
    return Configuration(*bucket(found, width))


def is_configuration(values: Any) -> bool:
    """Whether a list from a file can be a `Configuration` that the kernels compile with."""
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
    """What is worth timing beside `configuration`; only those of a bucket above 128 take rows of any width."""
    every = table()["candidates"]
    buckets = {**every["default"], **every.get(arch, {})}.get(mode, {})
    return [Configuration(*c) for size, values in buckets.items() if width <= float(size) for c in values]
