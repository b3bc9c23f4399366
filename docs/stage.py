"""Lay out the pages of the site in build/site, where Zensical builds them: `make docs` does both.

The pages of docs/ are copied, and README.md, CHANGELOG.md, kernels/README.md and others that lie outside join them.
Links are changed so that they work on the site too: a link to code leads to a page that shows the file (`joint.py#L40`
to its line 40), and a figure or a data file that is linked is copied. A picture with a dark version (`NAME-dark.png`
beside `NAME.png`) changes with the color scheme. A link to a file that does not exist is an error.
"""

import os
import re
import shutil
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
STAGE = ROOT / "build" / "site"
OUTSIDE = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contribute.md",
    "SECURITY.md": "security.md",
    "kernels/README.md": "kernels.md",
}
"""Files outside docs/ -> pages of the site, where they exist; they take the place of a page of that name."""
CODE = re.compile(r"^( *)(`{3,}|~{3,})[^\n]*\n.*?^ *\2[^\n]*$|(`+)[^`].*?\3", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?P<before>\]\(|(?:src|srcset|href)=\")(?P<path>[^)\"#\s]*)(?P<anchor>#[^)\"\s]*)?(?P<after>[)\"])")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)#\s]+)\.png\)")
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"
LANGUAGES = {
    ".py": "python",
    ".json": "json",
    ".jsonl": "json",
    ".ipynb": "json",
    ".toml": "toml",
    ".sh": "bash",
    ".css": "css",
}


def pages() -> dict[str, str]:
    """Path in the repository -> path on the site, of every page."""
    found = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))
    outside = {path: page for path, page in OUTSIDE.items() if (ROOT / path).exists()}
    return {path: path.removeprefix("docs/") for path in found} | outside


def outside_code(text: str) -> list[tuple[str, bool]]:
    """The text in pieces, and whether each is code, in which no link is meant."""
    pieces, at = [], 0
    for found in CODE.finditer(text):
        pieces += [(text[at : found.start()], False), (found[0], True)]
        at = found.end()
    return [*pieces, (text[at:], False)]


def links(text: str) -> list[tuple[str, str]]:
    """(path, anchor) of every link of a page that stays within the repository; a path may be empty."""
    found = [m for piece, code in outside_code(text) if not code for m in LINK.finditer(piece)]
    return [(m["path"], m["anchor"] or "") for m in found if not re.match(r"[a-z]+:|$", m["path"] or m["anchor"] or "")]


class Stage:
    """The pages as they are laid out, and what their links ask for."""

    def __init__(self) -> None:
        self.pages = pages()
        self.shown: set[str] = set()
        self.files: set[str] = set()

    def target(self, path: str, anchor: str, source: str, page: str) -> str:
        """Where a link of the page leads on the site."""
        full = (ROOT / source).parent.joinpath(path).resolve()
        if not full.exists() or not full.is_relative_to(ROOT) or full.is_dir():
            raise SystemExit(f"{source}: expected a link to a file of this repository: got {path}")
        name = full.relative_to(ROOT).as_posix()
        if name in self.pages:
            to = self.pages[name]
        elif name.startswith("docs/") and full.suffix != ".py":
            self.files.add(name)
            to = name.removeprefix("docs/")
        else:
            self.shown.add(name)
            to = f"source/{name}.md"
            anchor = re.sub(r"^#L(\d+).*", r"#__codelineno-0-\1", anchor)
        return os.path.relpath(to, PurePosixPath(page).parent).replace(os.sep, "/") + anchor

    def text(self, source: str, page: str) -> str:
        """The page with its pictures and links as the site needs them."""

        def twins(match: re.Match[str]) -> str:
            if not (ROOT / source).parent.joinpath(f"{match[2]}-dark.png").exists():
                return match[0]
            return f"![{match[1]}]({match[2]}.png#only-light)![{match[1]}]({match[2]}-dark.png#only-dark)"

        def link(match: re.Match[str]) -> str:
            if not match["path"] or re.match(r"[a-z]+:", match["path"]):
                return match[0]
            to = self.target(match["path"], match["anchor"] or "", source, page)
            return f"{match['before']}{to}{match['after']}"

        text = (ROOT / source).read_text(encoding="utf-8")
        return "".join(
            piece if code else LINK.sub(link, PICTURE.sub(twins, piece)) for piece, code in outside_code(text)
        )

    def write(self) -> None:
        shutil.rmtree(STAGE, ignore_errors=True)
        for source, page in self.pages.items():
            text = self.text(source, page)
            if source == "README.md":
                text = UNSEARCHED + text  # it says again what the pages say
            out = STAGE / page
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text, encoding="utf-8")
        for name in sorted(self.shown):
            file = ROOT / name
            out = STAGE / "source" / f"{name}.md"
            out.parent.mkdir(parents=True, exist_ok=True)
            code = file.read_text(encoding="utf-8").rstrip()
            fence = f'````{{.{LANGUAGES.get(file.suffix, "text")} linenums="1"}}\n{code}\n````\n'
            out.write_text(f"{UNSEARCHED}# {name}\n\n{fence}", encoding="utf-8")
        for name in sorted(self.files):
            out = STAGE / name.removeprefix("docs/")
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, out)
        shutil.copytree(ROOT / "docs" / "assets", STAGE / "assets", dirs_exist_ok=True)


if __name__ == "__main__":
    stage = Stage()
    stage.write()
    print(f"{len(stage.pages)} pages, {len(stage.shown)} of code: {STAGE.relative_to(ROOT)}")
