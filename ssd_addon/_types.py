"""Floating-point dtypes: modules that keep theirs when a surrounding module is cast (`.half()`, `.bfloat16()`,
Lightning's bf16-true), and casting of a batch to the dtype of a module's weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class KeepsType(nn.Module):
    """A module that moves with its parent, but whose parameters and buffers keep at least their precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda t: _kept(t, fn(t)), recurse)  # type: ignore[no-untyped-call]


def _kept(before: Tensor, after: Tensor) -> Tensor:
    narrower = after.dtype.itemsize < before.dtype.itemsize
    return before.to(after.device) if before.is_floating_point() and narrower else after


def as_weights(x: Tensor, module: nn.Module) -> Tensor:
    """Cast a batch to the floating-point dtype of a module's weights, but not under autocast, which casts itself."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return x
    layers = (p for m in module.modules() if isinstance(m, _LAYERS) for p in m.parameters() if p.is_floating_point())
    first = next(layers, None)  # position embeddings may have another dtype than the layers
    if first is None:
        first = next((p for p in module.parameters() if p.is_floating_point()), None)
    return x if first is None else x.to(first.dtype)
