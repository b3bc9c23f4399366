"""Shared checks of shapes and values, with error messages of the form "what: expected X: got Y"."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ssd_addon import _limits

T = TypeVar("T")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SLACK = 1e-6
"""How far outside [0, 1] a value may lie because of rounding."""


class Diverged(ValueError):
    """Embeddings that are not finite, or too large for the loss: a training loop may skip the step.

    Attributes:
        spaces: the spaces of these embeddings.
    """

    def __init__(self, message: str, spaces: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.spaces = tuple(spaces)


def shape(t: Tensor) -> str:
    return "[" + ", ".join(map(str, t.shape)) + "]"


def names(values: Iterable[object]) -> str:
    return ", ".join(map(str, values)) or "nothing"


def spaces(value: Sequence[str], what: str) -> tuple[str, ...]:
    """Check space names: at least one, unique strings, content first."""
    if isinstance(value, str):
        raise TypeError(f"{what}: expected a sequence of space names, such as ('content', 'color'): got {value!r}")
    out = tuple(value)
    _limits.few(out, what)
    if not out:
        raise ValueError(f"{what}: expected at least the space 'content': got none")
    for name in out:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{what}: expected a non-empty string as the name of a space: got {name!r}")
    if len(set(out)) != len(out):
        raise ValueError(f"{what}: expected every space to have its own name: got {names(out)}")
    if "content" not in out:
        raise ValueError(f"{what}: expected the space 'content', which is invariant to every group: got {names(out)}")
    if out[0] != "content":
        raise ValueError(f"{what}: expected 'content' as the first space, then the styles: got {names(out)}")
    return out


def same_names(got: Iterable[str], expected: Sequence[str], what: str, owner: str) -> None:
    """Check that two sets of space names agree; the message lists missing and unknown ones."""
    got = list(got)
    missing = [n for n in expected if n not in got]
    extra = [n for n in got if n not in expected]
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"missing: {names(missing)}")
        if extra:
            parts.append(f"not named by the {owner}: {names(extra)}")
        raise ValueError(f"{what}: expected the spaces {names(expected)} of the {owner}: {'; '.join(parts)}")


def positive(value: float, what: str, meaning: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{what}: expected a finite number above 0 ({meaning}): got {value!r}")
    return float(value)


def not_negative(value: float, what: str, meaning: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{what}: expected a finite number, 0 or more ({meaning}): got {value!r}")
    return float(value)


def width(value: Any, what: str) -> int:
    return count(value, what, 1)


def count(value: Any, what: str, least: int = 0) -> int:
    """Check an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what}: expected a whole number, {least} or more: got {value!r}")
    return value


def widths(value: Sequence[int], whose: str) -> tuple[int, ...]:
    if isinstance(value, int | str):
        raise TypeError(f"hidden: expected a sequence of widths for {whose}, such as (2048, 2048): got {value!r}")
    return tuple(width(h, f"hidden width of {whose}") for h in value)


def choice(value: T, allowed: Sequence[T], what: str) -> T:
    if value not in allowed:
        raise ValueError(f"{what}: expected one of {', '.join(map(repr, allowed))}: got {value!r}")
    return value


def floating(t: Tensor, what: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{what}: expected a floating-point tensor: got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{what}: expected float16, bfloat16, float32 or float64: got {t.dtype}")


def in_unit_range(t: Tensor, expected: str, hint: str = "") -> None:
    """Check that values are in [0, 1], without NaN."""
    low, high = float(t.min()), float(t.max())
    if not (low >= -SLACK and high <= 1 + SLACK):
        raise ValueError(f"{expected}: got values from {low:.4g} to {high:.4g}{hint}")


def embeddings(tensors: Mapping[str, Tensor], num_views: int, plan: str) -> tuple[int, torch.device]:
    """Check that every space is [V, B, d] with the plan's V, and the same B and device. Returns (B, device)."""
    batch: int | None = None
    device: torch.device | None = None
    first = ""
    for name, t in tensors.items():
        floating(t, f"embeddings of space {name!r}")
        if t.ndim == 2:
            raise ValueError(
                f"space {name!r}: expected views [V, B, d]: got {shape(t)}, a plain batch; the loss compares views of "
                "an image, so pass views [V, B, ...] to the heads, or, if these are the embeddings of all views "
                "[V*B, d], pass the plan too, criterion(z, transform.plan)"
            )
        if t.ndim != 3:
            raise ValueError(f"space {name!r}: expected [V, B, d]: got {t.ndim} dimensions {shape(t)}")
        if t.shape[0] != num_views:
            raise ValueError(f"{plan} need {num_views} views: got {t.shape[0]} in space {name!r} {shape(t)}")
        if t.shape[2] < 1:
            raise ValueError(f"space {name!r}: expected a width of at least 1: got {shape(t)}")
        if batch is None:
            batch, device, first = t.shape[1], t.device, name
        if t.shape[1] != batch:
            raise ValueError(
                f"space {name!r}: expected the {batch} images of space {first!r}: got {t.shape[1]} {shape(t)}"
            )
        if t.device != device:
            raise ValueError(f"space {name!r}: expected the device {device} of space {first!r}: got {t.device}")
    assert batch is not None and device is not None
    return batch, device
