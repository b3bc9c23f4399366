"""Docstrings as the site shows them: an extension of griffe, which reads them for mkdocstrings."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1(?! *$).*)*", re.MULTILINE)


def fenced(docstring: str) -> str:
    """The docstring with its doctests as blocks of code; Markdown would read `>>>` as quotations."""
    return DOCTEST.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", docstring)


class Docstrings(griffe.Extension):
    """Prepares every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
