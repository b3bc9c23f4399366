"""Sizes that no run means, such as 60,000 pixels or a width of 10**9: refused before memory is taken for them."""

import os
from typing import Any

LARGEST_EDGE = 2**14
"""Of an image, in pixels."""
MOST = 1000
"""Spaces of a model, groups of views, and operations of a group."""
TRIAL = 27
"""Times a float32 image that the trial of a preset's operations takes at once, as measured from 1024 to 4096 pixels."""


def memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows; a system without the name
        return None


def fits(size: int, argument: str, what: str) -> None:
    """Refuse what is larger than the machine's memory.

    Args:
        size: in bytes.
        argument: that asks for it.
        what: would be made.
    """
    there = memory()
    if there is not None and size > there:
        expected = f"{what} that fit into this machine's {there // 10**9:,} GB of memory"
        raise ValueError(f"{argument}: expected {expected}: got {size // 10**9:,} GB")


def edge(value: Any, what: str) -> int:
    """An edge of an image in pixels."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} in whole pixels, 1 or more: got {value!r}")
    if value > LARGEST_EDGE:
        raise ValueError(f"{what} of at most {LARGEST_EDGE} pixels: got {value}")
    return value


def crop(size: Any, what: str) -> None:
    """The output of an operation, an edge or (height, width): its trial, when views are built, fits into memory."""
    edges = (size, size) if isinstance(size, int) else size
    if isinstance(edges, list | tuple) and len(edges) == 2 and all(isinstance(s, int) for s in edges):
        fits(TRIAL * 12 * edges[0] * edges[1], what, f"views of {edges[0]} x {edges[1]} pixels")


def few(value: Any, what: str) -> None:
    """At most `MOST` of something."""
    if len(value) > MOST:
        raise ValueError(f"{what}: expected at most {MOST}: got {len(value)}")


def numbers(value: Any, what: str) -> None:
    """No whole number beyond `LARGEST_EDGE` in arguments of an operation: sizes, kernels, paddings, counts."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_EDGE:
        raise ValueError(f"{what}: expected whole numbers up to {LARGEST_EDGE}: got {value}")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        numbers(part, what)
