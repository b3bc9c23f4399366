"""The lowest versions that pyproject.toml allows, as constraints for pip: `python tests/support/lowest.py`.

Of what the library and the extras for users need. What only the tests need stays at its newest.
"""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
FOR_DEVELOPERS = ("test", "lint", "docs")


def lowest(project: dict) -> list[str]:
    """`name==version` for every requirement `name>=version`, sorted.

    Raises:
        ValueError: a requirement has no lower bound, so that nobody could say what is supported.
    """
    wanted = [*project["dependencies"]]
    for extra, lines in project["optional-dependencies"].items():
        wanted += lines if extra not in FOR_DEVELOPERS else []
    found = set()
    for line in wanted:
        match = re.fullmatch(r"([\w.-]+)>=([\w.]+)", line)
        if match is None:
            raise ValueError(f"dependency: expected 'name>=version': got {line!r}")
        found.add(f"{match[1]}=={match[2]}")
    return sorted(found)


if __name__ == "__main__":
    sys.stdout.write("\n".join(lowest(tomllib.loads(PROJECT.read_text())["project"])) + "\n")
