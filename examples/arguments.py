"""Types of command-line arguments whose errors say what was expected and what was given."""

import argparse
import math
import os


def whole(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more: got {text!r}")
    if int(text) >= 2**62:  # torch uses 64 bits; ranks and epochs are added to seeds
        raise argparse.ArgumentTypeError(f"expected a whole number below 2**62: got {text}")
    return int(text)


def count(text: str) -> int:
    return whole(text, 0)


def wholes(text: str) -> list[int]:
    return [whole(part) for part in text.split(",") if part]


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number, 0 or more: got {text!r}")
    return value


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def named_widths(text: str) -> dict[str, int]:
    pairs = [part.partition("=") for part in names(text)]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise argparse.ArgumentTypeError(f"expected NAME=WIDTH,...: got {', '.join(wrong)} without a width")
    return {name: whole(width) for name, _, width in pairs}


def edge(text: str) -> int:
    """Pixels, at most 16384: a larger view takes gigabytes."""
    if (pixels := whole(text)) > 2**14:
        raise argparse.ArgumentTypeError(f"expected an edge of at most {2**14} pixels: got {text}")
    return pixels


def too_large(size: int) -> str:
    """Why so many bytes do not fit this machine; "" if they do, or if its memory is not known."""
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return ""
    return f"into {there // 10**9:,} GB of memory: got {size // 10**9:,} GB" if size > there else ""


def share(text: str) -> float:
    if (value := number(text)) > 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1: got {text!r}")
    return value
