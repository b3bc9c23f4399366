"""Changes to a backbone, made on copies of the modules that contain the changed part; parameters stay shared."""

import copy
from dataclasses import dataclass, field
from types import MethodType

from torch import nn

from ssd_addon.pooling import Pool, Pooling


@dataclass
class Prepared:
    """A backbone that is ready for the heads.

    Attributes:
        module: returns features; shares the parameters of the caller's backbone.
        in_features: F.
        name: name of the caller's backbone, for messages.
        changes: descriptions of the changes.
        dropped: names of the removed parts.
        class_token: whether an output [N, F] is the class token.
        output: key or index of the features in the module's output.
        axis: dimension of the features in maps, tokens or series, 1 or -1; None if it is not known.
    """

    module: nn.Module
    in_features: int
    name: str
    output: str | int | None = None
    changes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    class_token: bool = False
    axis: int | None = None

    def pooling(self, pool: Pool) -> Pooling:
        """The pooling for its features."""
        return Pooling(self.in_features, pool, self.output, self.class_token, self.name, self.axis)

    def drop(self, path: str, new: nn.Module, why: str) -> None:
        """Replace a part by a module without parameters, on a copy."""
        if patched(self.module):
            raise ValueError(
                f"backbone {self.name}: expected a module with the forward of its class, as {path!r} has to be "
                "removed: got one whose forward was replaced on the instance; put nn.Identity() there yourself and "
                "give in_features, or pass the module before it was changed"
            )
        self.module = replaced(self.module, path, new)
        self.dropped.append(path)
        self.changes.append(f"{path!r} removed, {why}")


def copied(module: nn.Module) -> nn.Module:
    """A shallow copy of a module, whose parts and parameters can be replaced; the parts themselves are shared."""
    outer = copy.copy(module)
    outer._modules, outer._parameters = dict(module._modules), dict(module._parameters)
    for attribute, value in vars(module).items():  # rebind replaced methods, such as accelerate's forward
        if isinstance(value, MethodType) and value.__self__ is module:
            vars(outer)[attribute] = MethodType(value.__func__, outer)
    return outer


def replaced(module: nn.Module, path: str, new: nn.Module | None) -> nn.Module:
    """A copy of a module with another part at a dotted path; everything outside the path is shared."""
    head, _, rest = path.partition(".")
    outer, inner = copied(module), module._modules[head]
    outer._modules[head] = replaced(inner, rest, new) if rest and inner is not None else new
    return outer


def patched(net: nn.Module) -> bool:
    """Was a `forward` replaced on the instance in a way that a copy would share with the original?"""
    inside = {id(m) for m in net.modules()}
    patches = [m.__dict__["forward"] for m in net.modules() if "forward" in m.__dict__ and not is_compiled(m)]
    return any(not isinstance(f, MethodType) or id(f.__self__) not in inside for f in patches)


def is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule"
