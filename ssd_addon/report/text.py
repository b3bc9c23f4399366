"""Text that comes from elsewhere (names of files, classes, spaces, factors) on its way into a page or a terminal."""

import re
from html import escape

LONGEST = 200
"""Characters of a name that are shown."""
UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069\ufeff]")
"""Control characters, and marks that turn the direction of the text around them."""


def clean(value: object) -> str:
    """Any text as one that can be encoded and shown.

    Lone surrogates (bytes of a file name that were no UTF-8), controls and marks of direction become U+FFFD.
    """
    text = str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return UNSEEN.sub("\ufffd", text)


def name(value: object, longest: int = LONGEST) -> str:
    """A name, cut where it is very long."""
    text = clean(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def html(value: object) -> str:
    """Text for HTML, between tags and in attributes."""
    return escape(clean(value))


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
