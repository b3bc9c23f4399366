"""Embeds images in every space of a model: in evaluation mode, without gradients, with bounded memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssd_addon import _checks
from ssd_addon._types import as_weights
from ssd_addon.backbones import WRAPPERS
from ssd_addon.metrics.evaluation import evaluation
from ssd_addon.metrics.spaces import unit_rows

Model = Callable[[Tensor], Mapping[str, Tensor] | Tensor]
"""A callable from images [b, C, H, W] to name -> [b, d], or to the features [b, F] of a plain backbone."""
Images = Tensor | Iterable[Any]
BACKBONE = "backbone"
RETURNS = "model: expected images [b, C, H, W] -> space -> [b, d], or features [b, F]"


@runtime_checkable
class Heads(Protocol):
    """A model that also gives its backbone's features, such as `StyleHeads`; `spaces` is a mapping name -> width."""

    def features(self, x: Tensor) -> Tensor: ...
    def project(self, features: Tensor) -> dict[str, Tensor]: ...


def embed(
    model: Model, images: Images, *, batch_size: int = 256, backbone: bool = True, on_sphere: bool | None = None
) -> dict[str, Tensor]:
    """Embeddings of images in every space, one per image, for the matrices and `StyleIndex`.

    The model is left unchanged. All its networks run in evaluation mode, also inside functions or objects; afterwards
    their modes and buffers, the images and the global generators of torch, numpy and Python are as before. Not
    protected are statistics that a function keeps in tensors outside any module, and networks that compiled code runs
    and that a search of closures, attributes and globals does not find.

    Args:
        model: `StyleHeads`, also compiled or inside DistributedDataParallel, or any callable [b, C, H, W] -> name ->
            [b, d]. The output [b, F] of a plain backbone is read as {"backbone": features}.
        images: [n, C, H, W] as the model takes them (normalized if it was trained that way), or batches of them, such
            as from a data loader: tensors, or tuples that start with one. Each batch is copied to the model's device
            and cast to the floating-point dtype of the weights.
        batch_size: number of images at a time, if `images` is one tensor.
        backbone: add the pooled features of a `StyleHeads` under "backbone".
        on_sphere: True L2-normalizes every embedding, as the SimCLR family's loss does (the loss leaves the length of
            an embedding free, so it may encode what the direction does not, see docs/method.md). None uses the model's
            attribute `on_sphere`, False if it has none.

    Returns:
        name -> [n, d] float32, on the model's device.

    Raises:
        TypeError, ValueError: there are no images, or the model returns something else.

    >>> embed(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)), torch.rand(7, 3, 2, 2))["backbone"].shape
    torch.Size([7, 5])
    """
    sphere = is_on_sphere(model) if on_sphere is None else on_sphere
    parts: list[dict[str, Tensor]] = []
    with evaluation(model), torch.no_grad():
        for x in batches(images, batch_size):
            parts.append(spaces_of(model, x, backbone=backbone, on_sphere=sphere))
    return joined(parts)


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the batches of every space."""
    if not parts:
        raise ValueError("images: expected at least one batch: got none")
    for p in parts:
        if p.keys() != parts[0].keys():
            raise ValueError(
                f"model: expected the spaces {_checks.names(parts[0])} of its first batch: got {_checks.names(p)}"
            )
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def batches(images: Images, batch_size: int) -> Iterator[Tensor]:
    """Batches [b, ...] of a tensor, or of an iterable of tensors or of tuples that start with one."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number of images, 1 or more: got {batch_size!r}")
    if not isinstance(images, Iterable):
        raise TypeError(f"images: expected a tensor [n, C, H, W] or batches of them: got {type(images).__name__}")
    if isinstance(images, Tensor):
        if images.ndim < 2 or len(images) == 0:
            raise ValueError(f"images: expected [n, C, H, W] with at least one image: got {_checks.shape(images)}")
        yield from torch.split(images, min(batch_size, len(images)))
        return
    for batch in images:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(x, Tensor):
            got = type(x).__name__
            raise TypeError(f"images: expected batches [b, C, H, W], or tuples that start with one: got {got}")
        yield x


def spaces_of(model: Model, x: Tensor, *, backbone: bool, on_sphere: bool) -> dict[str, Tensor]:
    """Embed one batch: name -> [b, d] float32, with the backbone's features if requested and available."""
    *outer, inner = unwrapped(model)
    moved = x.to(device_of(model, x.device))
    if isinstance(inner, nn.Module) and moved.is_floating_point():
        moved = as_weights(moved, inner)
    x = (
        moved.clone() if moved is x else moved
    )  # so that a model that works in place does not change the caller's images
    if backbone and isinstance(inner, Heads) and isinstance(getattr(inner, "spaces", None), Mapping):
        features = inner.features(x)
        z = inner.project(features)
        if BACKBONE in z:
            raise ValueError(f"model: expected no space named {BACKBONE!r}, which is the name of the features: got one")
        return _rows({**z, BACKBONE: features}, len(x), on_sphere)
    over_ranks = any(isinstance(each, DistributedDataParallel) for each in outer)
    out = inner(x) if over_ranks else model(x)  # avoids communication between ranks
    if isinstance(out, Tensor):
        if out.ndim != 2 or len(out) != len(x):
            hint = "; pool it to one vector per image" if out.ndim > 2 else ""
            raise ValueError(f"{RETURNS}: got {_checks.shape(out)} for {len(x)} images{hint}")
        out = {BACKBONE: out}
    if not isinstance(out, Mapping):
        raise TypeError(f"{RETURNS}: got {type(out).__name__}")
    if not out:
        raise ValueError(f"{RETURNS}: got no space")
    return _rows(out, len(x), on_sphere)


def _rows(z: Mapping[str, Tensor], n: int, on_sphere: bool) -> dict[str, Tensor]:
    """Every space as [n, d] float32, L2-normalized if requested."""
    for name, t in z.items():
        if not isinstance(t, Tensor) or t.ndim != 2 or len(t) != n:
            got = _checks.shape(t) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"model: expected space {name!r} as [{n}, d], one vector per image: got {got}")
    if on_sphere:  # before the cast, as float64 values may exceed the range of float32
        return {name: unit_rows(t if t.dtype == torch.float64 else t.float()).float() for name, t in z.items()}
    return {name: t.float() for name, t in z.items()}


def unwrapped(model: Model) -> list[Model]:
    """The model, followed by the modules inside it if it is compiled or wrapped (DistributedDataParallel)."""
    out = [model]
    while isinstance(out[-1], nn.Module):
        kind = next((c.__name__ for c in type(out[-1]).__mro__ if c.__name__ in WRAPPERS), "")
        inner = out[-1]._modules.get(WRAPPERS[kind]) if kind else None
        if inner is None:
            break
        out.append(inner)
    return out


def is_on_sphere(model: Model) -> bool:
    """The attribute `on_sphere` of a model, or of the module inside a wrapper."""
    for each in unwrapped(model):
        said = getattr(each, "on_sphere", None)
        if isinstance(said, bool):
            return said
    return False


def device_of(model: Model, default: torch.device) -> torch.device:
    """The device of a module's weights."""
    if isinstance(model, nn.Module):
        for p in (*model.parameters(), *model.buffers()):
            return p.device
    return default
