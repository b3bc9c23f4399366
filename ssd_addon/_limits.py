"""Limits that refuse absurd sizes, such as 60,000 pixels or a width of 10**9, before memory is allocated."""

import os
from typing import Any

LARGEST_EDGE = 2**14
"""Largest edge of an image, in pixels."""
MOST = 1000
"""Largest number of spaces of a model, of groups of views, and of operations of a group."""
TRIAL = 27
"""Peak memory of the trial of a preset's operations, in float32 images; measured from 1024 to 4096 pixels."""


def memory() -> int | None:
    """This machine's memory in bytes; None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows; a system without the name
        return None


def fits(size: int, argument: str, what: str) -> None:
    """Refuse sizes that exceed the machine's memory.

    Args:
        size: required memory in bytes.
        argument: name of the argument that determines it.
        what: what would be created.
    """
    there = memory()
    if there is not None and size > there:
        expected = f"{what} that fit into this machine's {there // 10**9:,} GB of memory"
        raise ValueError(f"{argument}: expected {expected}: got {size // 10**9:,} GB")


def edge(value: Any, what: str) -> int:
    """Check the edge of an image in pixels."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} in whole pixels, 1 or more: got {value!r}")
    if value > LARGEST_EDGE:
        raise ValueError(f"{what} of at most {LARGEST_EDGE} pixels: got {value}")
    return value


def crop(size: Any, what: str) -> None:
    """Check that the trial of an operation with this output, an edge or (height, width), fits into memory."""
    edges = (size, size) if isinstance(size, int) else size
    if isinstance(edges, list | tuple) and len(edges) == 2 and all(isinstance(s, int) for s in edges):
        fits(TRIAL * 12 * edges[0] * edges[1], what, f"views of {edges[0]} x {edges[1]} pixels")


def few(value: Any, what: str) -> None:
    """Check that there are at most `MOST` items."""
    if len(value) > MOST:
        raise ValueError(f"{what}: expected at most {MOST}: got {len(value)}")


def numbers(value: Any, what: str) -> None:
    """Check that no integer in an operation's arguments exceeds `LARGEST_EDGE`: sizes, kernels, paddings, counts."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_EDGE:
        raise ValueError(f"{what}: expected whole numbers up to {LARGEST_EDGE}: got {value}")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        numbers(part, what)
