"""The range of exp(s_ij), decided in one place: which form of the log-sums keeps it inside float32.

|s_ij| <= R/tau, with R the largest squared length of a row. Where 2 R/tau + log N <= 160, one constant serves all rows,
c = max(0, R/tau + log N - 80): every exp(s_ij - c), and every sum of N of them, lies between exp(-80) and exp(80).
Elsewhere each row's own maximum is subtracted. float32 reaches from exp(-87) to exp(88), so a length of the longest row
that is 1 % too small does no harm. Legend: N rows over all ranks, tau temperature.
"""

import math

from torch import Tensor

LOG2E = math.log2(math.e)
"""The backends compute exp as exp2 of s_ij / log 2, a third of the time of exp on a CPU."""

EXPONENT = 80.0
"""exp(80), N exp(80) and their inverses are normal numbers of float32."""

RESOLVED = 128.0
"""Products of fp16 rows are off by at most 2^-11 R/tau: beyond this R/tau they are computed from two fp16 parts."""

UNIT_ROW = 1.01
"""The longest row that passes for one of unit length where lengths are not read back from the device."""


def largest_exponent(squared: float, temperature: float) -> float:
    """R/tau, the bound of |s_ij|, from the squared length of the longest row."""
    return squared * (1.0 / temperature)


def constant_shift(bound: float | None, rows: int) -> float | None:
    """The shift c that serves all rows; None: each row needs its own maximum, or the bound R/tau is not known."""
    if bound is None or not 2 * bound + math.log(max(rows, 1)) <= 2 * EXPONENT:
        return None
    return max(0.0, bound + math.log(max(rows, 1)) - EXPONENT)


def shift_on_device(temperature: Tensor, longest: Tensor, rows: int) -> Tensor:
    """c / log 2 (0-dim float32), without a read from the device."""
    return (longest.square() / temperature.float() + (math.log(rows) - EXPONENT)).clamp(min=0) * LOG2E


def needs_two_parts(bound: float | None) -> bool:
    """Whether products of fp16 rows would be too coarse for this R/tau."""
    return bound is not None and bound > RESOLVED
