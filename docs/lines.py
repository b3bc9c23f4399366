"""Set the line numbers in docs/method.md: `python docs/lines.py`. A test holds the page to the code.

A link such as [simclr.py:94](../ssd_addon/losses/simclr.py#L94) `scaled = -means / tau` names a file and an expression
that stands on one of its lines; the number of that line is filled in.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "method.md"
LINE = re.compile(r"\[\w+\.py:\d+\]\(\.\./(?P<path>[\w/]+\.py)#L\d+\) `(?P<code>[^`]+)`")


def filled(page: str) -> str:
    """The page with the numbers of the lines as they are now.

    Raises:
        ValueError: an expression that stands on no line of its file, or on several.
    """

    def line(match: re.Match[str]) -> str:
        lines = (ROOT / match["path"]).read_text(encoding="utf-8").splitlines()
        found = [k for k, text in enumerate(lines, 1) if match["code"] in text]
        if len(found) != 1:
            raise ValueError(f"{match['path']}: expected one line with {match['code']!r}: got lines {found}")
        name = Path(match["path"]).name
        return f"[{name}:{found[0]}](../{match['path']}#L{found[0]}) `{match['code']}`"

    return LINE.sub(line, page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
