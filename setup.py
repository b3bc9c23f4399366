"""The page on PyPI: README.md, whose relative links and pictures PyPI cannot follow. Everything else: pyproject.toml.

With a `Repository` among pyproject's `[project.urls]`, links and pictures lead to the tag of this version there.
Without one, a relative link is left as its text and a picture as its caption.
"""

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
ABSOLUTE = r"(?![a-z][a-z0-9+.-]*:|#|//)"  # what follows is none: neither https:, nor an anchor of the page itself
TITLE = r"""(?:\s+(?:"[^"]*"|'[^']*'))?"""
NOTE = "The pictures and the pages that are named here are in the source distribution (`docs/`)."
CODE = re.compile(r"(^```.*?^```[^\n]*$|`[^`\n]+`)", flags=re.DOTALL | re.MULTILINE)
PICTURE = re.compile(rf"!\[([^\]]*)\]\({ABSOLUTE}([^)\s]+){TITLE}\)")
LINK = re.compile(rf"(?<!!)\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\({ABSOLUTE}([^)\s]+){TITLE}\)")
HTML = re.compile(rf"""(<[^>]*?\b(?:href|src|srcset)=["']){ABSOLUTE}([^"']+)(["'])""")
HTML_PICTURE = re.compile(rf"""<img\b(?=[^>]*\bsrc=["']{ABSOLUTE})[^>]*>""")
HTML_SOURCE = re.compile(rf"""<source\b(?=[^>]*\bsrcset=["']{ABSOLUTE})[^>]*>""")
HTML_LINK = re.compile(rf"""<a\b(?=[^>]*\bhref=["']{ABSOLUTE})[^>]*>(.*?)</a>""", flags=re.DOTALL)


def long_description(text: str, urls: Mapping[str, str], version: str) -> str:
    """A Markdown page without relative addresses; code stays as it is.

    Args:
        text: the page.
        urls: of the project, as in `[project.urls]`; "Repository" is read, such as https://github.com/OWNER/NAME.
        version: whose tag v<version> the links lead to.
    """
    repository = urls.get("Repository", "").rstrip("/")
    if repository:
        return _outside_code(text, lambda prose: _absolute(prose, repository, version))
    changed = _outside_code(text, _without_links)
    return changed if changed == text else f"{changed.rstrip()}\n\n{NOTE}\n"


def _absolute(prose: str, repository: str, version: str) -> str:
    def at(kind: str, path: str) -> str:
        return f"{repository}/{kind}/v{version}/{path.removeprefix('./')}"

    def html(found: re.Match[str]) -> str:
        return found[1] + at("blob" if "href" in found[1] else "raw", found[2]) + found[3]

    prose = PICTURE.sub(lambda found: f"![{found[1]}]({at('raw', found[2])})", prose)
    prose = LINK.sub(lambda found: f"[{found[1]}]({at('blob', found[2])})", prose)
    return HTML.sub(html, prose)


def _without_links(prose: str) -> str:
    def html_caption(found: re.Match[str]) -> str:
        alt = re.search(r"""\balt=["']([^"']*)["']""", found[0])
        return f"<em>{alt[1]}</em>" if alt else ""

    prose = PICTURE.sub(lambda found: f"*{found[1]}*" if found[1] else "", prose)
    prose = HTML_PICTURE.sub(html_caption, HTML_SOURCE.sub("", prose))
    return HTML_LINK.sub(r"\1", LINK.sub(r"\1", prose))


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """Fenced blocks and spans of code stand between marks while the prose around them is changed."""
    code: list[str] = []

    def keep(found: re.Match[str]) -> str:
        code.append(found[0])
        return f"\0{len(code) - 1}\0"

    changed = change(CODE.sub(keep, text))
    return re.sub(r"\0(\d+)\0", lambda found: code[int(found[1])], changed)


if __name__ == "__main__":  # as setuptools runs it
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "ssd_addon" / "__init__.py").read_text(), flags=re.MULTILINE)
    assert found is not None, "ssd_addon/__init__.py should hold the version"
    setup(
        long_description=long_description((ROOT / "README.md").read_text(), project.get("urls", {}), found[1]),
        long_description_content_type="text/markdown",
    )
