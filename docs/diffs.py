"""Fill the diffs and listings of docs/pipelines from the scripts that the tests run: `python docs/diffs.py`.

    <!-- diff NAME -->      from examples/pipelines/before/NAME.py to examples/pipelines/NAME.py
    <!-- code FILE -->      a whole file of the repository
    <!-- end -->

What stands between a marker and its end is replaced. A test holds the pages to the scripts.
"""

import ast
import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "pipelines"
SCRIPTS = ROOT / "examples" / "pipelines"
BLOCK = re.compile(r"(<!-- (diff|code) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def body(file: Path) -> list[str]:
    """The lines of a script below its docstring and above its command line, where it has one."""
    text = file.read_text(encoding="utf-8")
    first = ast.parse(text).body[0]
    lines = text.splitlines()[first.end_lineno :]
    return lines[next(k for k, line in enumerate(lines) if line.strip()) :]


def changes(name: str) -> tuple[list[str], int, int]:
    """The lines of the diff without its head, and how many lines are new and how many are gone."""
    before, after = body(SCRIPTS / "before" / f"{name}.py"), body(SCRIPTS / f"{name}.py")
    lines = [line.rstrip() for line in difflib.unified_diff(before, after, n=2, lineterm="")][2:]
    lines = ["..." if line.startswith("@@") else line for line in lines]
    return lines, sum(line.startswith("+") for line in lines), sum(line.startswith("-") for line in lines)


def filled(page: str) -> str:
    """The page with its blocks written anew."""

    def block(match: re.Match[str]) -> str:
        kind, what = match[2], match[3]
        lines = changes(what)[0] if kind == "diff" else (ROOT / what).read_text(encoding="utf-8").splitlines()
        language = "diff" if kind == "diff" else "python"
        return match[1] + "\n".join([f"```{language}", *lines, "```", ""]) + match[4]

    return BLOCK.sub(block, page)


if __name__ == "__main__":
    for file in sorted(PAGES.glob("*.md")):
        file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")
