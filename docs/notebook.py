"""The notebook as a page of these docs, and a way to run it without Jupyter.

    python docs/notebook.py           # write docs/folder-to-report.md from examples/notebooks/folder_to_report.ipynb
    python docs/notebook.py --run     # run it first, about ten minutes, and take its pictures into docs/results

The notebook is committed without outputs. The metadata of a code cell names the "pictures" that it has written to OUT,
with a description of each; the page shows their copies in docs/results below the cell. A test holds the page to the
notebook.
"""

import argparse
import ast
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "notebooks" / "folder_to_report.ipynb"
PAGE = ROOT / "docs" / "folder-to-report.md"
PICTURES = ROOT / "docs" / "results"

Cell = dict[str, Any]


def cells(notebook: Path = NOTEBOOK) -> list[Cell]:
    """The cells, with "source" as one text."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found]


def pictures_of(cell: Cell) -> dict[str, str]:
    """The files that a cell writes to OUT, and what each shows."""
    found: dict[str, str] = cell["metadata"].get("pictures", {})
    return found


def copy_of(picture: str) -> Path:
    """Where the docs have it."""
    return PICTURES / f"notebook-{picture}"


def page(found: list[Cell]) -> str:
    """Markdown of the cells; links that start at the notebook start at the page instead."""
    parts = []
    for cell in found:
        if cell["cell_type"] == "markdown":
            parts.append(cell["source"].replace("](../../docs/", "](").replace("](../../", "](../"))
        else:
            parts.append(f"```python\n{cell['source']}\n```")
        parts += [f"![{text}](results/{copy_of(name).name})" for name, text in pictures_of(cell).items()]
    link = f"../{NOTEBOOK.relative_to(ROOT).as_posix()}"
    parts.insert(
        1,
        f"This page is [a notebook]({link}): open it in Jupyter to run it on your images. The pictures come from one "
        "run on the sprites, with the settings that are shown.",
    )
    return "\n\n".join(parts) + "\n"


class Shown:
    """Stands in for what a notebook displays: an image, a page, or a place on the screen that is updated."""

    def __init__(self, *content: Any, seen: list[Any], **options: Any) -> None:
        self.content, self.seen = content, seen

    def update(self, content: Any) -> None:
        self.seen.append(content)


@contextmanager
def stand_in(seen: list[Any]) -> Iterator[None]:
    """IPython.display for as long as the notebook runs here: nothing is drawn, and `seen` gets what would be."""
    module, kept = ModuleType("IPython.display"), sys.modules.get("IPython.display")

    def make(*content: Any, **options: Any) -> Shown:
        return Shown(*content, seen=seen, **options)

    def display(*content: Any, **options: Any) -> Shown:
        seen.extend(content)
        return make(*content, **options)

    vars(module).update(HTML=make, Image=make, display=display)
    sys.modules["IPython.display"] = module
    try:
        yield
    finally:
        del sys.modules["IPython.display"]
        if kept is not None:
            sys.modules["IPython.display"] = kept


def run(found: list[Cell], **settings: Any) -> tuple[dict[str, Any], list[Any]]:
    """Run the code cells one after another in the notebook's folder, as a kernel does.

    Args:
        found: the notebook's cells.
        settings: what replaces values of the cell that is tagged "parameters".

    Returns:
        The names that the cells have left, and what they have displayed.

    Raises:
        NameError: a setting that the notebook does not have.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    seen: list[Any] = []
    path, folder = list(sys.path), os.getcwd()
    os.chdir(NOTEBOOK.parent)
    try:
        with stand_in(seen):
            for cell in found:
                if cell["cell_type"] != "code":
                    continue
                tree, last = ast.parse(cell["source"]), None
                if isinstance(tree.body[-1], ast.Expr):
                    last = ast.Expression(tree.body.pop().value)
                where = f"{NOTEBOOK.name}, cell {cell['id']}"
                exec(compile(tree, where, "exec"), names)
                if last is not None:
                    seen.append(eval(compile(last, where, "eval"), names))
                if "parameters" in cell["metadata"].get("tags", ()):
                    if unknown := settings.keys() - names.keys():
                        raise NameError(f"settings: expected names of the cell {cell['id']!r}: got {sorted(unknown)}")
                    names |= settings
    finally:
        os.chdir(folder)
        sys.path[:] = path
    return names, seen


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", action="store_true", help="run the notebook first, and copy its pictures")
    args = p.parse_args(argv)
    found = cells()
    if args.run:
        with tempfile.TemporaryDirectory() as folder:
            run(found, OUT=Path(folder), WEIGHTS=None)
            for name in (name for cell in found for name in pictures_of(cell)):
                shutil.copyfile(Path(folder) / name, copy_of(name))
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
