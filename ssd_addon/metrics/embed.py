"""From a model and images to one embedding per space: evaluation mode, no gradient, bounded memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssd_addon import _checks

Model = Callable[[Tensor], Mapping[str, Tensor]]
Images = Tensor | Iterable[Any]
BACKBONE = "backbone"


def embed(
    model: Model, images: Images, *, batch_size: int = 256, backbone: bool = True, unit: bool = False
) -> dict[str, Tensor]:
    """Embeddings of whole images, a row per image: what the matrices and `StyleIndex` take.

    Args:
        model: `StyleHeads` (also inside DistributedDataParallel), or any callable [b, C, H, W] -> name -> [b, d]. A
            module runs in evaluation mode, and every part of it returns to the mode that it was in.
        images: [n, C, H, W] as the model takes them (normalised if it was trained so), or batches of them, such as a
            data loader yields: tensors, or tuples that begin with one. Each batch is copied to the model's device.
        batch_size: images at a time, where `images` is one tensor.
        backbone: add the pooled features of a `StyleHeads` under "backbone".
        unit: scale every row of every space to unit length, as the SimCLR family's loss sees it. The length of a row
            is free there and may tell what the direction does not (docs/method.md, "Lengths").

    Returns:
        name -> [n, d] float32, on the model's device.

    Raises:
        TypeError, ValueError: no images, or a model that returns something else.
    """
    parts: list[dict[str, Tensor]] = []
    with evaluation(model), torch.no_grad():
        for x in batches(images, batch_size):
            parts.append(spaces_of(model, x, backbone=backbone, unit=unit))
    return joined(parts)


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batches of every space one below the other."""
    if not parts:
        raise ValueError("images: expected at least one batch: got none")
    for p in parts:
        if p.keys() != parts[0].keys():
            raise ValueError(
                f"model: expected the spaces {_checks.names(parts[0])} of its first batch: got {_checks.names(p)}"
            )
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def batches(images: Images, batch_size: int) -> Iterator[Tensor]:
    """Images [b, ...] of a tensor, or of an iterable of tensors or of tuples that begin with one."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number of images, 1 or more: got {batch_size!r}")
    if not isinstance(images, Iterable):
        raise TypeError(f"images: expected a tensor [n, C, H, W] or batches of them: got {type(images).__name__}")
    if isinstance(images, Tensor):
        if images.ndim < 2 or len(images) == 0:
            raise ValueError(f"images: expected [n, C, H, W] with an image or more: got {_checks.shape(images)}")
        yield from images.split(batch_size)
        return
    for batch in images:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(x, Tensor):
            got = type(x).__name__
            raise TypeError(f"images: expected batches [b, C, H, W], or tuples that begin with one: got {got}")
        yield x


def spaces_of(model: Model, x: Tensor, *, backbone: bool, unit: bool) -> dict[str, Tensor]:
    """One batch: name -> [b, d] float32, with the backbone's features where asked for and there are some."""
    x = x.to(device_of(model, x.device))
    inner = getattr(model, "module", model)  # out of DistributedDataParallel
    if backbone and hasattr(inner, "features") and hasattr(inner, "project"):
        features = inner.features(x)
        z: Mapping[str, Tensor] = inner.project(features)
        if BACKBONE in z:
            raise ValueError(f"model: a space named {BACKBONE!r} and the backbone's features (backbone=True) collide")
        z = {**z, BACKBONE: features}
    else:
        z = inner(x) if isinstance(model, DistributedDataParallel) else model(x)  # nothing is exchanged between ranks
    if not isinstance(z, Mapping):
        raise TypeError(f"model: expected images [b, C, H, W] -> space -> [b, d]: got {type(z).__name__}")
    if not z:
        raise ValueError("model: expected images [b, C, H, W] -> space -> [b, d]: got no space")
    for name, t in z.items():
        if not isinstance(t, Tensor) or t.ndim != 2 or len(t) != len(x):
            got = _checks.shape(t) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"model: expected space {name!r} as [{len(x)}, d], a row per image: got {got}")
    return {name: F.normalize(t.float(), dim=1) if unit else t.float() for name, t in z.items()}


def device_of(model: Model, default: torch.device) -> torch.device:
    """Where a module's weights are."""
    if isinstance(model, nn.Module):
        for p in (*model.parameters(), *model.buffers()):
            return p.device
    return default


@contextmanager
def evaluation(model: Model) -> Iterator[None]:
    """Evaluation mode; afterwards every part of the module is in the mode that it was in."""
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for m, mode in modes:
            m.training = mode
