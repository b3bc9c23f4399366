"""Checks on embeddings [n, d] of one or more spaces, before anything is computed from them.

Legend: n samples, d the width of a space.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ssd_addon import _checks

MIN_ROWS = 5
"""Smallest number of samples on either side of a split."""
CHUNK = 2**23
"""Number of elements in a float64 block: 64 MiB."""


def check_space(what: str, z: Tensor, least: int) -> None:
    """Check one space: a floating-point tensor [n, d] with at least `least` samples."""
    if not isinstance(z, Tensor):
        raise TypeError(f"{what}: expected a tensor [n, d]: got {type(z).__name__}")
    if z.dtype not in _checks.FLOATS:
        raise ValueError(f"{what}: expected floating-point embeddings: got {z.dtype}")
    if z.ndim != 2 or z.shape[1] < 1:
        hint = "; pass one view, z[v]" if z.ndim == 3 else ""
        raise ValueError(f"{what}: expected embeddings [n, d], one per sample: got {_checks.shape(z)}{hint}")
    if len(z) < least:
        raise ValueError(f"{what}: expected at least {least} samples: got {len(z)}")


def check_finite(what: str, z: Tensor) -> None:
    """Refuse NaN and infinity."""
    if not all(bool(rows.isfinite().all()) for rows in torch.split(z, max(1, CHUNK // z.shape[1]))):
        raise ValueError(f"{what}: expected finite embeddings: got NaN or inf, so the network has diverged")


def unit_rows(z: Tensor) -> Tensor:
    """L2-normalize rows of any scale, in z's dtype; zero rows stay zero, and rows with NaN or infinity become NaN."""
    largest = z.abs().amax(1, keepdim=True)
    x = z / torch.where(largest > 0, largest, 1)
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(lengths > 0, lengths, 1)


def binary_scale(largest: Tensor) -> Tensor:
    """The largest power of 2 that is not above each of these absolute values, float64; one half for 0.

    Division by it is exact, and the squares of the result neither overflow nor underflow.
    """
    exponent = torch.frexp(largest.double()).exponent.long().clamp(-1000, 1000)
    return ((exponent + 1022) << 52).view(torch.float64)


def standardized(values: Tensor, rows: Tensor) -> Tensor:
    """Standardize columns [n, k] to mean 0 and standard deviation 1 on these rows, float64, at any scale."""
    values = values.double()
    values = values / binary_scale(values.abs().amax(0))
    return (values - values[rows].mean(0)) / values[rows].std(0)


def check_spaces(embeddings: Mapping[str, Tensor]) -> tuple[int, torch.device]:
    """Check that all spaces [n, d] have the same number of samples and device. Returns (n, device)."""
    for space, z in embeddings.items():
        check_space(f"space {space!r}", z, 2 * MIN_ROWS)
    first, z = next(iter(embeddings.items()))
    n, device = len(z), z.device
    for space, z in embeddings.items():
        if len(z) != n:
            raise ValueError(f"space {space!r}: expected the {n} samples of space {first!r}: got {len(z)}")
        if z.device != device:
            raise ValueError(f"space {space!r}: expected the device {device} of space {first!r}: got {z.device}")
        check_finite(f"space {space!r}", z)
    return n, device
