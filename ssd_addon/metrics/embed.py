"""From a model and images to one embedding per space: evaluation mode, no gradient, bounded memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssd_addon import _checks
from ssd_addon._types import as_weights
from ssd_addon.metrics.evaluation import evaluation
from ssd_addon.metrics.spaces import unit_rows

Model = Callable[[Tensor], Mapping[str, Tensor] | Tensor]
"""Images [b, C, H, W] -> name -> [b, d], or features [b, F] of a plain backbone."""
Images = Tensor | Iterable[Any]
BACKBONE = "backbone"
RETURNS = "model: expected images [b, C, H, W] -> space -> [b, d], or features [b, F]"


@runtime_checkable
class Heads(Protocol):
    """A model whose backbone's features can be had beside its spaces, as `StyleHeads`."""

    def features(self, x: Tensor) -> Tensor: ...
    def project(self, features: Tensor) -> dict[str, Tensor]: ...


def embed(
    model: Model, images: Images, *, batch_size: int = 256, backbone: bool = True, on_sphere: bool | None = None
) -> dict[str, Tensor]:
    """Embeddings of whole images, a row per image: what the matrices and `StyleIndex` take.

    Measuring changes nothing. Every network that the model runs is in evaluation mode, also inside a function or an
    object, and afterwards its parts are in the modes that they were in; its buffers, the images and the global
    generators of torch, numpy and Python are as they were. Not protected are statistics that a function of yours keeps
    in tensors outside any module, and networks that compiled code runs where a search of closures, attributes and
    globals does not find them.

    Args:
        model: `StyleHeads`, also compiled or inside DistributedDataParallel, or any callable [b, C, H, W] -> name ->
            [b, d]. A plain backbone, which returns features [b, F], is read as {"backbone": features}.
        images: [n, C, H, W] as the model takes them (normalized if it was trained so), or batches of them, such as a
            data loader yields: tensors, or tuples that begin with one. Each batch is copied to the model's device, and
            cast to the floating-point type of a module's weights.
        batch_size: images at a time, where `images` is one tensor.
        backbone: add the pooled features of a `StyleHeads` under "backbone".
        on_sphere: True scales every embedding to unit length (L2-normalized embeddings, as the SimCLR family's loss
            sees them; the length of an embedding is free there and may encode what the direction does not, see
            docs/method.md). None asks the model: its attribute `on_sphere`, False where it has none.

    Returns:
        name -> [n, d] float32, on the model's device.

    Raises:
        TypeError, ValueError: no images, or a model that returns something else.

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
        yield from torch.split(images, min(batch_size, len(images)))
        return
    for batch in images:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(x, Tensor):
            got = type(x).__name__
            raise TypeError(f"images: expected batches [b, C, H, W], or tuples that begin with one: got {got}")
        yield x


def spaces_of(model: Model, x: Tensor, *, backbone: bool, on_sphere: bool) -> dict[str, Tensor]:
    """One batch: name -> [b, d] float32, with the backbone's features where asked for and there are some."""
    *outer, inner = unwrapped(model)
    moved = x.to(device_of(model, x.device))
    if isinstance(inner, nn.Module) and moved.is_floating_point():
        moved = as_weights(moved, inner)
    x = moved.clone() if moved is x else moved  # a model that works in place does not change the caller's images
    if backbone and isinstance(inner, Heads):
        features = inner.features(x)
        z = inner.project(features)
        if BACKBONE in z:
            raise ValueError(f"model: a space named {BACKBONE!r} and the backbone's features (backbone=True) collide")
        return _rows({**z, BACKBONE: features}, len(x), on_sphere)
    over_ranks = any(isinstance(each, DistributedDataParallel) for each in outer)
    out = inner(x) if over_ranks else model(x)  # nothing is exchanged between ranks
    if isinstance(out, Tensor):
        if out.ndim != 2 or len(out) != len(x):
            hint = "; pool it to a row per image" if out.ndim > 2 else ""
            raise ValueError(f"{RETURNS}: got {_checks.shape(out)} for {len(x)} images{hint}")
        out = {BACKBONE: out}
    if not isinstance(out, Mapping):
        raise TypeError(f"{RETURNS}: got {type(out).__name__}")
    if not out:
        raise ValueError(f"{RETURNS}: got no space")
    return _rows(out, len(x), on_sphere)


def _rows(z: Mapping[str, Tensor], n: int, on_sphere: bool) -> dict[str, Tensor]:
    """Every space as [n, d] float32, of unit length where asked for."""
    for name, t in z.items():
        if not isinstance(t, Tensor) or t.ndim != 2 or len(t) != n:
            got = _checks.shape(t) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"model: expected space {name!r} as [{n}, d], a row per image: got {got}")
    if on_sphere:  # float64 beyond the range of float32 has a direction as well
        return {name: unit_rows(t if t.dtype == torch.float64 else t.float()).float() for name, t in z.items()}
    return {name: t.float() for name, t in z.items()}


def unwrapped(model: Model) -> list[Model]:
    """A model, what is inside it where it is a compiled module or a wrapper (DistributedDataParallel), and so on."""
    out = [model]
    while isinstance(out[-1], nn.Module):
        inner = dict(out[-1].named_children())
        if list(inner) not in (["module"], ["_orig_mod"]):
            break
        out += inner.values()
    return out


def is_on_sphere(model: Model) -> bool:
    """What a model, or the module inside a wrapper, says of its embeddings: the attribute `on_sphere`."""
    for each in unwrapped(model):
        said = getattr(each, "on_sphere", None)
        if isinstance(said, bool):
            return said
    return False


def device_of(model: Model, default: torch.device) -> torch.device:
    """Where a module's weights are."""
    if isinstance(model, nn.Module):
        for p in (*model.parameters(), *model.buffers()):
            return p.device
    return default
