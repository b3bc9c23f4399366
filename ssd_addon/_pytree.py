"""Our containers as nodes of torch's pytrees, which DDP, FSDP, checkpointing and user code walk."""

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


def integers_again(ids: Any, what: str) -> Any:
    """Ids that went through a cast of all tensors (`tree_map(lambda t: t.float(), ...)`) as integers again.

    Raises:
        TypeError: the floating-point type does not hold every id exactly, so that two images might have become one.
    """
    if not isinstance(ids, Tensor) or not ids.is_floating_point():
        return ids
    exact = 2 / torch.finfo(ids.dtype).eps  # every integer below is a number of the type
    if ids.numel() and not bool(ids.abs().max() < exact):
        raise TypeError(
            f"{what}: expected integers: got {ids.dtype}, a cast of all tensors that does not hold every id exactly; "
            "cast the embeddings alone, and give the loss the batch: criterion(z, batch)"
        )
    return ids.long()
