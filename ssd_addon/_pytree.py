"""Registers this library's containers as torch pytrees, which DDP, FSDP, checkpointing and user code traverse."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


def register(
    kind: type[Any],
    flatten: Callable[[Any], tuple[list[Any], Any]],
    unflatten: Callable[[Any, Any], Any],
) -> None:
    _pytree.register_pytree_node(kind, flatten, unflatten, serialized_type_name=f"{kind.__module__}.{kind.__name__}")


CHANGED = -(2**62)
"""Replaces ids that a mapped function has changed; the loss detects it when it reads the ids."""


class Beside:
    """The static data of a flattened container; ignored when structures are compared."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Beside)

    def __hash__(self) -> int:
        return 0


def restored(leaf: Any, kept: Tensor | None) -> Any:
    """Restore ids after a function was mapped over every tensor, as by `tree_map` and frameworks.

    After moves, casts (`t.half()`), permutations and selections the ids are correct. After arithmetic (`t / 2`) they
    are all `CHANGED`, which the loss refuses. Nothing is read from the device.
    """
    if leaf is kept or not isinstance(leaf, Tensor) or kept is None:
        return leaf
    whole = kept.to(leaf.device)
    numbers = leaf.to(whole.dtype)
    exact = (leaf == numbers).all()
    if leaf.shape != whole.shape:
        return torch.where(exact & torch.isin(numbers, whole).all(), numbers, CHANGED)
    same = (leaf == whole.to(leaf.dtype)).all()  # compare with the same cast, which may round
    moved = exact & (numbers.flatten().sort().values == whole.flatten().sort().values).all()
    return torch.where(same, whole, torch.where(moved, numbers, CHANGED))
