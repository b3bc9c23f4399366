"""Small Triton tiles for the interpreter, so that inputs of a few dozen rows reach every path of a kernel."""

import math

import torch

from ssd_addon.kernels import launch, launch_around, table

SQUARE = table.Configuration(16, 16, 16, 4, 2, False, 2)
DESCRIPTORS = table.Configuration(16, 32, 16, 4, 2, True, 3)
WIDE = table.Configuration(16, 32, 16, 4, 2, False, 3)


def shrink(monkeypatch, configuration=SQUARE):
    """Small tiles, strips of a few tiles, blocks of two, and every fresh tensor poisoned."""
    monkeypatch.setattr(table, "configuration", lambda *_: configuration)
    monkeypatch.setattr(launch, "STRIP_ELEMENTS", 300)
    monkeypatch.setattr(launch, "block_rows", lambda d, unit: 32)
    monkeypatch.setattr(launch_around, "empty", poisoned)


def poisoned(x, shape, dtype=torch.float32):
    """Fresh tensors hold NaN, and integers what no id is."""
    return x.new_full(shape, math.nan if dtype.is_floating_point else -(2**30), dtype=dtype)
