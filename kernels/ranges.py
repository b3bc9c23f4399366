"""Decides which form of the log-sums keeps exp(s_ij) inside the range of float32.

|s_ij| <= R/tau, with R the largest squared length of a row. If 2 R/tau + log N <= 160, one constant serves all rows,
c = max(0, R/tau + log N - 80): every exp(s_ij - c), and every sum of N of them, lies between exp(-80) and exp(80).
Otherwise each row's own maximum is subtracted. float32 ranges from exp(-87) to exp(88), so underestimating the length
of the longest row by 1 % is harmless. Legend: N rows over all ranks, tau temperature.
"""

import math

from torch import Tensor

LOG2E = math.log2(math.e)
"""The backends compute exp as exp2 of s_ij / log 2, which takes a third of the time of exp on a CPU."""

EXPONENT = 80.0
"""Bound of exponents: exp(80), N exp(80) and their inverses are normal numbers of float32."""

RESOLVED = 128.0
"""Products of fp16 rows have errors up to 2^-11 R/tau: above this R/tau they are computed from two fp16 parts."""

UNIT_ROW = 1.01
"""Largest length that counts as unit length if lengths are not read from the device."""


def largest_exponent(squared: float, temperature: float) -> float:
    """R/tau, the bound of |s_ij|, from the squared length of the longest row."""
    return squared * (1.0 / temperature)


def constant_shift(bound: float | None, rows: int) -> float | None:
    """The constant shift c; None if each row needs its own maximum, or the bound R/tau is unknown."""
    if bound is None or not 2 * bound + math.log(max(rows, 1)) <= 2 * EXPONENT:
        return None
    return max(0.0, bound + math.log(max(rows, 1)) - EXPONENT)


def shift_on_device(temperature: Tensor, longest: Tensor, rows: int) -> Tensor:
    """c / log 2 (0-dim float32), without a read from the device."""
    return (longest.square() / temperature.float() + (math.log(rows) - EXPONENT)).clamp(min=0) * LOG2E


def needs_two_parts(bound: float | None) -> bool:
    """Whether products of fp16 rows would be too coarse for this R/tau."""
    return bound is not None and bound > RESOLVED
