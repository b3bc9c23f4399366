"""The public API as text: one line for each name, with its arguments. `python tests/support/public_api.py` accepts it.

Types are left out, because their text depends on the versions of Python and torch; tests/typing.sh checks them.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

import ssd_addon

PAGE = Path(__file__).parents[1] / "project" / "api.txt"
WITHOUT_ALL = {
    "alarm": ("CollapseAlarm", "CollapseEvent", "CollapseWarning"),
    "batch": ("ViewBatch",),
    "collate": ("ImageFiles", "StructuredCollate"),
    "crops": ("Cropped", "NativeCrops"),
    "embeddings": ("Embeddings",),
    "encoder": ("Encoder",),
    "heads": ("StyleHeads",),
    "large_batch": ("two_pass",),
    "lightning": ("StructuredStep", "StructuredTraining"),
    "monitor": ("Monitor",),
    "plan": ("ViewPlan",),
    "plots": ("curves", "matrix", "matrix_figure", "views_strip"),
    "projection": ("ProjectionHeads",),
    "recipes": ("Overwrites", "Recipe", "overwrites", "presets", "recipe"),
    "transform": ("StructuredTransform",),
}
"""Public names of the modules that have no `__all__`."""
WITH_ALL = ("auditing", "augment", "checkpoints", "kernels", "losses", "metrics", "operations", "report", "runs")


def lines() -> list[str]:
    """Every public name, `module.name(arguments)`, sorted; the methods of a class below it."""
    things = {}
    for path in sorted({*WITHOUT_ALL, *WITH_ALL}):
        module = import_module(f"ssd_addon.{path}")
        for name in WITHOUT_ALL.get(path) or module.__all__:
            things[f"{module.__name__}.{name}"] = getattr(module, name)
    classes = {thing for thing in things.values() if inspect.isclass(thing)}
    found = [line for path, thing in things.items() for line in _described(path, thing, classes)]
    return sorted(found + [_at_the_top(name, things) for name in ssd_addon.__all__])


def _at_the_top(name: str, things: dict[str, Any]) -> str:
    thing = getattr(ssd_addon, name)
    if isinstance(thing, ModuleType):
        return f"ssd_addon.{name} (module)"
    homes = [path for path, other in things.items() if other is thing]
    return f"ssd_addon.{name} = {min(homes)}" if homes else f"ssd_addon.{name} (value)"


def _described(path: str, thing: Any, classes: set[type]) -> Iterator[str]:
    if inspect.isclass(thing):
        yield path + _arguments(thing)
        members = {n: m for base in reversed(thing.__mro__) if base not in classes - {thing} for n, m in _members(base)}
        for name, member in sorted(members.items()):
            if isinstance(member, property):
                yield f"{path}.{name} (property)"
            elif inspect.isfunction(member):
                yield f"{path}.{name}{_arguments(member)}"
    elif inspect.isroutine(thing):
        yield path + _arguments(thing)
    else:
        yield f"{path} (value)"


def _members(base: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of a class of this package, without what torch asks of every module."""
    for name, member in vars(base).items() if base.__module__.partition(".")[0] == "ssd_addon" else ():
        if not name.startswith("_") and (name == "forward" or not hasattr(nn.Module, name)):
            yield name, member.__func__ if isinstance(member, classmethod | staticmethod) else member


def _arguments(thing: Any) -> str:
    """`(a, /, b, *, c=1)`, as Python writes it, without types."""
    if getattr(thing, "_is_protocol", False):
        return " (protocol)"
    if inspect.isclass(thing) and issubclass(thing, Exception) and "__init__" not in vars(thing):
        return " (exception)"
    parameters = []
    for p in (signature := inspect.signature(thing)).parameters.values():
        if p.name in ("self", "cls"):
            continue
        default = p.default if p.default is p.empty else _Default(p.default)
        parameters.append(p.replace(annotation=p.empty, default=default))
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


class _Default:
    """A default value that is written the same in every process and version."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        if callable(self.value):
            return str(getattr(self.value, "__qualname__", type(self.value).__name__))
        return re.sub(r"<([\w.]+)[^>]*>", r"\1", repr(self.value))  # of an enumeration, its name


if __name__ == "__main__":
    PAGE.write_text("\n".join(lines()) + "\n")
    sys.stdout.write(f"written: {PAGE}\n")
