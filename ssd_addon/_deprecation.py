"""Old names that keep working for a while: each warns, says what to write instead, and when it will be removed.

A function, a class or a constant that was renamed, or moved to another module; below the imports of the old module:

    __getattr__ = moved(__name__, {"old_name": "ssd_addon.metrics.new_name"}, removal="0.4")

An argument that was renamed; the function has the new name alone:

    @renamed_argument("old", "new", removal="0.4")
    def f(x, *, new=1): ...

The warning is a `FutureWarning`. Python shows a `DeprecationWarning` only where `__main__` itself makes the call, so
somebody whose model lies in a module of their own would meet the removal without having seen a warning. Python's
default filter shows a `FutureWarning` once for every line that makes the call.

From the version of removal on, tests/project/test_deprecation.py fails until the old name is gone. A type checker does
not see the old name; `from ssd_addon.metrics import new_name as old_name` under `TYPE_CHECKING` shows it.
"""

import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Deprecated:
    """An old name that still works.

    Attributes:
        old: as users write it, such as "ssd_addon.metrics.old_name" or "StyleHeads: argument old".
        new: what to write instead.
        removal: the first version without the old name.
        module: that holds the old name.
    """

    old: str
    new: str
    removal: str
    module: str

    def __post_init__(self) -> None:
        release(self.removal)

    def warn(self, stacklevel: int) -> None:
        """For the line that used the old name, `stacklevel` frames up."""
        warnings.warn(
            f"{self.old} is deprecated and will be removed in ssd_addon {self.removal}: use {self.new}",
            FutureWarning,
            stacklevel=stacklevel + 1,
        )


REGISTERED: list[Deprecated] = []
"""Every old name of the modules that have been imported."""


def moved(module: str, names: Mapping[str, str], *, removal: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module (PEP 562) whose names have been renamed or moved.

    The old name is the new object itself, so `isinstance`, subclasses and pickles work with either.

    Args:
        module: the old module's `__name__`.
        names: old name -> path of the new one, "ssd_addon.metrics.new_name".
        removal: first version without the old names, "0.4".

    >>> old = moved("ssd_addon.plan", {"Plan": "ssd_addon.plan.ViewPlan"}, removal="99.0")
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     old("Plan")
    <class 'ssd_addon.plan.ViewPlan'>
    >>> print(caught[0].message)
    ssd_addon.plan.Plan is deprecated and will be removed in ssd_addon 99.0: use ssd_addon.plan.ViewPlan
    """
    found = {name: Deprecated(f"{module}.{name}", new, removal, module) for name, new in names.items()}
    REGISTERED.extend(found.values())

    def __getattr__(name: str) -> Any:
        if name not in found:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        found[name].warn(stacklevel=2)
        home, _, new = found[name].new.rpartition(".")
        return getattr(import_module(home), new)

    return __getattr__


def renamed_argument(old: str, new: str, *, removal: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator of a function that takes a keyword by its old name too; of a class, decorate `__init__`.

    Args:
        old, new: names of the argument.
        removal: first version that refuses the old name, "0.4".

    >>> @renamed_argument("tint", "color", removal="99.0")
    ... def paint(*, color):
    ...     return color
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     paint(tint="red")
    'red'
    >>> print(caught[0].message)
    paint: argument tint is deprecated and will be removed in ssd_addon 99.0: use color

    Raises:
        TypeError: when it is called, both names are given.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__qualname__.removesuffix(".__init__")
        found = Deprecated(f"{name}: argument {old}", new, removal, function.__module__)
        REGISTERED.append(found)

        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{name}: expected {new} or its old name {old}: got both")
                found.warn(stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapped

    return decorate


def due(names: Sequence[Deprecated], version: str) -> list[str]:
    """What should be gone by a version.

    >>> old = Deprecated("ssd_addon.old", "ssd_addon.new", "0.4", "ssd_addon")
    >>> due([old], "0.3.9"), due([old], "0.4.0")
    ([], ['ssd_addon.old should be gone since 0.4'])
    """
    return [f"{n.old} should be gone since {n.removal}" for n in names if release(version) >= release(n.removal)]


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version without its suffix, so that 0.4.0rc1 counts as 0.4.0.

    >>> release("0.4.0rc1")
    (0, 4, 0)

    Raises:
        ValueError: it does not begin with two numbers.
    """
    found = re.match(r"\d+(\.\d+)+", version)
    if found is None:
        raise ValueError(f"version: expected one such as '0.4': got {version!r}")
    return tuple(map(int, found[0].split(".")))
