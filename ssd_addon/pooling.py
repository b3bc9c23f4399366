"""Pools a backbone's output to one feature vector per image. Legend: N images, F width, [H, W] map, T tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ssd_addon import _checks

Pool = Literal["auto", "mean", "cls", "flatten"]
POOLS: tuple[Pool, ...] = ("auto", "mean", "cls", "flatten")


@dataclass(frozen=True)
class Pooling:
    """How the features of a backbone are pooled.

    Attributes:
        in_features: F.
        pool: as for `StyleHeads`.
        output: key or index of the features in the backbone's output; None if it returns a tensor.
        class_token: whether an output [N, F] is the class token.
        name: name of the backbone, for messages.
        axis: dimension of the features in maps, tokens or series, 1 or -1. None reads it off each output: the one of
            F entries; where both have F, tokens [N, T, F] and maps [N, F, H, W].
    """

    in_features: int
    pool: Pool
    output: str | int | None
    class_token: bool
    name: str
    axis: int | None = None

    def __call__(self, returned: Any, images: int) -> Tensor:
        """Pool the backbone's output for N images to features [N, F]."""
        y, f = picked(returned, self.output, self.name), self.in_features
        if self.pool == "cls" and y.ndim != 3 and not self.class_token:
            raise ValueError(
                f"pool: expected a backbone that returns tokens [N, T, F] for 'cls': got {_checks.shape(y)} from "
                f"{self.name}; use 'auto'"
            )
        axis = self._axis(y)
        if self.pool == "flatten":
            y = y.flatten(1)
        elif y.ndim == 4:
            y = y.mean(dim=(2, 3) if axis == 1 else (1, 2))
        elif y.ndim == 3 and self.pool == "cls":
            y = y[:, 0]
        elif y.ndim == 3:  # tokens [N, T, F], or series [N, F, T]
            y = y.mean(dim=2 if axis == 1 else 1)
        if y.ndim != 2 or y.shape[1] != f or y.shape[0] != images:
            raise ValueError(
                f"backbone: expected {f} features per image (in_features), [N, F], maps [N, F, H, W] or tokens "
                f"[N, T, F]: got {_checks.shape(y)} from {self.name} after pool={self.pool!r}"
            )
        return y

    def _axis(self, y: Tensor) -> int:
        """The dimension of the features, 1 or -1."""
        f = self.in_features
        if y.ndim < 3 or self.axis is not None:
            return self.axis or 1
        first, end = y.shape[1] == f, y.shape[-1] == f
        if y.ndim == 4:
            return -1 if end and not first else 1
        return 1 if first and not end else -1


def picked(returned: Any, output: str | int | None, name: str) -> Tensor:
    """The tensor of features in a backbone's output.

    Raises:
        TypeError: there is no such tensor; the message lists the parts of the output.
    """
    found, there = returned, _parts(returned)
    if output is not None:
        output = _chosen(returned, output)
        if output not in there:
            got = f"a {type(returned).__name__} with {_checks.names(there)}" if there else type(returned).__name__
            raise TypeError(f"output: expected a part of what {name} returns: got {output!r}, but it returned {got}")
        found = there[output]
    if isinstance(found, Tensor):
        return found
    if output is not None:
        raise TypeError(f"output: expected a tensor of features in {output!r} of {name}: got {type(found).__name__}")
    tensors = [key for key, value in there.items() if isinstance(value, Tensor) and key not in ("loss", "logits")]
    inside = f" with {'keys ' if isinstance(returned, Mapping) else ''}{_checks.names(there)}" if there else ""
    choose = f"choose one with output={tensors[0]!r}" if tensors else "wrap it in a module that returns the features"
    raise TypeError(
        f"backbone: expected one tensor of features: got {type(returned).__name__}{inside} from {name}; {choose}"
    )


def _parts(returned: Any) -> dict[Any, Any]:
    """The parts of a dictionary, a Hugging Face ModelOutput or a tuple, by key or index."""
    if isinstance(returned, Mapping):
        return dict(returned)
    if isinstance(returned, tuple | list):
        names = getattr(returned, "_fields", ())
        return dict(enumerate(returned)) | dict(zip(names, returned, strict=False))
    return {}


def _chosen(returned: Any, output: str | int) -> str | int:
    """The key of a part that an index names: also from the end, and in a ModelOutput, which is a tuple too."""
    if not isinstance(output, int):
        return output
    if isinstance(returned, Mapping) and callable(getattr(returned, "to_tuple", None)):
        keys = list(returned)
        return keys[output] if -len(keys) <= output < len(keys) else output
    counted = isinstance(returned, tuple | list) and -len(returned) <= output < 0
    return output + len(returned) if counted else output
