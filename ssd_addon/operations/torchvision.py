"""Wrapper for torchvision's v2 transforms: `make_params` draws, `transform` applies, one image at a time.

Parameters are stored by name, so that other views can share them and probes can predict them. Legend: B images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssd_addon.operations.draws import Parameters, Refused, in_place_of_the_global
from ssd_addon.operations.draws import generator as fresh
from ssd_addon.operations.wrap import GATE, WrappedOperation, changes_size

HOME = "torchvision.transforms.v2"
NOTHING = torch.iinfo(torch.int64).min
"""Stands for None in an integer parameter."""
BY_SEED = "share it by seed: operations.seeded"
_KINDS: tuple[tuple[type, torch.dtype], ...] = ((bool, torch.bool), (int, torch.int64), (float, torch.float32))


def is_transform(op: object) -> bool:
    """Whether `op` is a torchvision v2 transform or a subclass; does not import torchvision."""
    return any(kind.__module__.startswith(HOME) and kind.__name__ == "Transform" for kind in type(op).__mro__)


@dataclass(frozen=True)
class Kind:
    """How a value returned by `make_params` is stored as a tensor and converted back.

    Attributes:
        dtype: dtype of the stored tensor.
        shape: shape of the value of one image.
        container: list or tuple; None for a number or a tensor.
        number: Python type of its numbers; None for a tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    container: type | None
    number: type | None


class TorchvisionOperation(WrappedOperation):
    """A transform of torchvision.transforms.v2 that draws in `make_params`, or a RandomApply of such transforms.

    The probabilities of the transform and of RandomApply become one gate per image. A value that is None for some
    images (such as the fill value of RandomErasing) is stored as NaN for them.

    Raises:
        TypeError: the transform draws elsewhere (AutoAugment and similar, RandomChoice, MixUp); wrap it with
            `operations.seeded` instead. Also for a Compose: list its transforms one by one.
    """

    def __init__(self, op: Any, where: str) -> None:
        self.op = op
        together = type(op).__name__ == "RandomApply" and type(op).__module__.startswith(HOME)
        self.leaves: list[Any] = list(op.transforms) if together else [op]
        self.shared = float(op.p) if together else 1.0
        self.chances = [_chance(leaf, where) for leaf in self.leaves]
        alone = len(self.leaves) == 1
        self.name = type(self.leaves[0]).__name__ if alone else type(op).__name__
        self.prefixes = [""] if alone else [f"{i}.{type(leaf).__name__}." for i, leaf in enumerate(self.leaves)]
        self.kinds: dict[tuple[int, ...], dict[str, Kind]] = {}  # image shape -> parameter name -> kind

    @property
    def always(self) -> bool:
        return self.shared == 1 and all(p == 1 for p in self.chances)

    @property
    def never(self) -> bool:
        return self.shared == 0 or all(p == 0 for p in self.chances)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Parameters:
        b, out = shape[0], {}
        image = torch.zeros(()).expand(shape[1:])
        drawn: dict[str, list[Any]] = {}
        with in_place_of_the_global(generator):
            together = torch.rand(b) < self.shared
            for p, prefix in zip(self.chances, self.prefixes, strict=True):
                out[prefix + GATE] = (together & (torch.rand(b) < p)).float()
            for _ in range(b):
                for leaf, prefix in zip(self.leaves, self.prefixes, strict=True):
                    for name, value in _made(leaf, image).items():
                        drawn.setdefault(prefix + name, []).append(value)
        kinds = self.kinds.setdefault(tuple(shape[1:]), {})
        for name, values in drawn.items():
            for value in values:
                if value is not None and kinds.setdefault(name, _kind(value, name)) != (kind := _kind(value, name)):
                    raise Refused(
                        f"draws {name} with another type or shape every time, so views cannot share it: got "
                        f"{kinds[name]} and {kind}; {BY_SEED}"
                    )
        return out | {name: _rows(kind, drawn.get(name, [None] * b)) for name, kind in kinds.items()}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        y: list[Tensor] = []
        if tuple(x.shape[1:]) not in self.kinds:
            self.draw((16, *x.shape[1:]), fresh(0))  # to learn the kinds of its values
        kinds = self.kinds[tuple(x.shape[1:])]
        for i, image in enumerate(x):
            for leaf, prefix in zip(self.leaves, self.prefixes, strict=True):
                if parameters[prefix + GATE][i] > 0.5:
                    mine = {k.removeprefix(prefix): t[i] for k, t in parameters.items() if k.startswith(prefix)}
                    image = _transformed(leaf, image, _values(kinds, prefix, mine))
            if not isinstance(image, Tensor):
                raise TypeError(f"expected a tensor for each image, like its input: got {type(image).__name__}")
            y.append(image)
        if any(t.shape != y[0].shape for t in y):
            other = next(t for t in y if t.shape != x.shape[1:])
            raise ValueError(f"it {changes_size(x, other[None])}")
        return torch.stack(y)


def _rows(kind: Kind, values: Sequence[Any]) -> Tensor:
    nothing = torch.full(kind.shape, NOTHING if kind.dtype == torch.int64 else torch.nan)
    return torch.stack([nothing.to(kind.dtype) if v is None else torch.as_tensor(v, dtype=kind.dtype) for v in values])


def _values(kinds: Mapping[str, Kind], prefix: str, row: Mapping[str, Tensor]) -> dict[str, Any]:
    """The values that `make_params` returned for one image, from that image's stored parameters."""
    out: dict[str, Any] = {}
    for name, t in row.items():
        kind = kinds.get(prefix + name)
        if kind is None:
            continue
        nothing = t.isnan().all() if kind.dtype.is_floating_point else (t == NOTHING).all()
        if bool(nothing) and t.numel():
            out[name] = None
        elif kind.number is None:
            out[name] = t
        else:
            out[name] = kind.number(t.item()) if kind.container is None else kind.container(t.tolist())
    return out


class _Missing(dict[str, Any]):
    """Parameters in which a missing name reads as None: such a value was None for every image so far."""

    def __missing__(self, name: str) -> None:
        return None


def _chance(op: Any, where: str) -> float:
    """The probability with which a transform is applied; refuses one that does not draw in `make_params`."""
    name = type(op).__name__
    if not is_transform(op):
        raise TypeError(
            f"{where}: expected it to contain torchvision v2 transforms: got {name}; share it by seed: "
            "operations.seeded"
        )
    if name in ("Compose", "RandomApply"):
        raise TypeError(f"{where}: expected the transforms of {name} listed one by one: got the {name} itself")
    bases = [k for k in type(op).__mro__ if k.__module__.startswith(HOME)]
    known = {k.__dict__["forward"] for k in bases if k.__name__ in ("Transform", "_RandomApplyTransform")}
    if type(op).forward not in known:
        raise TypeError(
            f"{where}: expected a transform that draws in make_params: got {name}, which draws while it is applied; "
            f"share it by seed: operations.seeded({name}(...))"
        )
    return float(op.p) if any(k.__name__ == "_RandomApplyTransform" for k in bases) else 1.0


def _made(leaf: Any, image: Tensor) -> dict[str, Any]:
    make = getattr(leaf, "make_params", None) or leaf._get_params  # torchvision before 0.21
    drawn: dict[str, Any] = make([image])
    return drawn


def _transformed(leaf: Any, image: Tensor, values: Mapping[str, Any]) -> Tensor:
    apply = getattr(leaf, "transform", None) or leaf._transform
    y: Tensor = apply(image, _Missing(values))
    return y


def _kind(value: Any, name: str) -> Kind:
    if isinstance(value, Tensor):
        return Kind(value.dtype, tuple(value.shape), None, None)
    for number, dtype in _KINDS:
        if isinstance(value, number):
            return Kind(dtype, (), None, number)
    if isinstance(value, list | tuple) and value:
        try:
            t = torch.tensor(value)
        except (TypeError, ValueError) as error:
            raise Refused(f"draws {name}, which is not a list of numbers ({error}); {BY_SEED}") from None
        return Kind(torch.float32 if t.is_floating_point() else t.dtype, tuple(t.shape), type(value), float)
    got = type(value).__name__
    raise Refused(f"draws {name}: expected a number, a tensor or a list of numbers: got {got}; {BY_SEED}")
