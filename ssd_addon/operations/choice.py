"""Chooses the wrapper for each operation that a user puts into a group."""

import inspect
from typing import Any

from kornia.augmentation import AugmentationBase2D

from ssd_addon.operations.torchvision import TorchvisionOperation, is_transform
from ssd_addon.operations.wrap import KorniaOperation, Operation


def wrapped(operation: Any, where: str) -> tuple[str, Operation]:
    """The name and the wrapped operation for an entry of a group."""
    if isinstance(operation, AugmentationBase2D):
        made = KorniaOperation(operation, where)
        return made.name, made
    if is_transform(operation):
        transform = TorchvisionOperation(operation, where)
        return transform.name, transform
    if isinstance(operation, Operation) and not inspect.isclass(operation):
        return str(getattr(operation, "name", type(operation).__name__)), operation
    name = operation.__name__ if inspect.isclass(operation) else type(operation).__name__
    what = f"the class {name}; make one: {name}(...)" if inspect.isclass(operation) else name
    raise TypeError(
        f"{where}: expected Kornia's 2-D operations on single images (no container, no mixing of images), v2 "
        "transforms of torchvision, objects with draw and apply, or operations.seeded(function) of anything else: got "
        + what
    )
