"""Tile configurations and what was measured for the choice of "auto", read from table.json.

Keys of configurations: architecture ("sm_90", else "default"), mode (what the kernel does), largest D of the bucket
("inf": any). Of "auto": architecture, arithmetic of the other backends ("float32" or "tf32"), largest D; values are
the rows from which on triton is the fastest. `benchmarks/gpu.py` writes both.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

PATH = Path(__file__).with_name("table.json")


class Configuration(NamedTuple):
    """Shape of a tile and how it is run."""

    block_m: int  # rows of a tile
    block_n: int  # columns: block_m, or twice that
    block_k: int  # columns of the operands that are in shared memory at a time
    warps: int
    stages: int  # of the pipeline that loads them
    descriptor: bool  # tensor descriptors (sm_90) instead of pointers
    group: int  # row tiles that share a column tile in the L2 cache
    registers: int = 0  # most per thread, 0 leaves it to the compiler: fewer let more programs share a multiprocessor

    def options(self) -> dict[str, int]:
        """What a launch takes beside the constants."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        return found | {"maxnreg": self.registers} if self.registers else found


_TABLE: dict[str, Any] = json.loads(PATH.read_text())  # at import: torch.compile cannot trace the reading of a file


def table() -> dict[str, Any]:
    return _TABLE


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
    return Configuration(*bucket({**every["default"], **every.get(arch, {}), **(own or {})}[mode], width))


def is_configuration(values: Any) -> bool:
    """Whether a list from a file can be a `Configuration` that the kernels compile with."""
    if not isinstance(values, list) or len(values) not in (7, 8):
        return False
    *sizes, descriptor, group = values[:7]
    if not all(type(v) is int for v in (*sizes, group, *values[7:])) or type(descriptor) is not bool:
        return False
    m, n, k, warps, stages = sizes
    powers = all(v > 0 and v & (v - 1) == 0 for v in (m, n, k, warps))
    fit = 16 <= m <= 256 and 16 <= k <= 256 and n in (m, 2 * m) and warps <= 16 and 1 <= stages <= 8
    return powers and fit and 1 <= group <= 64 and all(0 <= v <= 255 for v in values[7:])
