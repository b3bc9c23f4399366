"""Modules whose numbers keep their type when a surrounding module is cast: `.half()`, `.bfloat16()`, Lightning's
bf16-true."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class KeepsType(nn.Module):
    """Moves with a surrounding module; its floating-point parameters and buffers stay at least as precise."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda t: _kept(t, fn(t)), recurse)  # type: ignore[no-untyped-call]


def _kept(before: Tensor, after: Tensor) -> Tensor:
    narrower = after.dtype.itemsize < before.dtype.itemsize
    return before.to(after.device) if before.is_floating_point() and narrower else after
