"""Prose in code and pages uses the field's terms in American spelling, and none of the project's old private words."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKED = ("ssd_addon", "kernels", "examples", "docs", "README.md")
"""Folders and files whose prose is checked: *.py (docstrings, comments, messages) and *.md."""
PENDING: tuple[str, ...] = ()
"""Paths that are not checked yet; empty when all is written."""

BANNED = {
    r"knows|told|tells|tell apart": "encodes; can be decoded from; says",
    r"untwist\w*|twist(?!er)\w*|turned by (?:its|the) content": "content-entangled",
    r"no choice has seen": "held out from every choice",
    r"stubs? of the": "a sentence with a verb",
    r"to be known": "a reference point",
    r"rows? of unit length|unit rows?": "L2-normalized embeddings",
    r"of the training(?=[.,;:)]|$)": "used in training; training step",
    r"as of `": "as for `NAME`, as in `NAME`",
    r"at most so many|for so many|of so many": "at most N, with this many",
    r"passed over": "skipped",
    r"(?:colour|neighbour|behaviour|favour|honour|grey)\w*": "color, neighbor, behavior, favor, honor, gray",
    r"\w*(?:normal|standard|initial|optim|regular|general|recogn|summar|visual|synchron|parametr|symmetr)is(?:e|es|ed|"
    r"ing|er|ation)": "-ize",
    r"solaris\w*|centred?|centres|artefacts?|modell(?:ed|ing)|catalogue|misspelt": "American spelling",
    r"°": "degrees (angles); a dagger (a single seed)",
}
"""Regular expression of whole words or signs -> what to write instead."""

ALLOWED = {
    "Measuring colourfulness in natural images": "the title of a paper",
}
"""Text that may hold banned words -> why."""

WORDS = re.compile("|".join(f"(?:{p})" if p == "°" else rf"(?<![\w`])(?:{p})(?!\w)" for p in BANNED), re.I | re.M)


def files(*places: str) -> list[Path]:
    """The Python files and pages in these places, without what is pending."""
    found = []
    for place in places:
        path = ROOT / place
        some = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".py", ".md"))
        found += [p for p in some if "ssd_addon/kernels" not in p.as_posix()]  # a link: the folder itself is checked
    pending = tuple(str(ROOT / p) for p in PENDING)
    return [p for p in found if not str(p).startswith(pending)]


def prose_of_code(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of comments, docstrings and messages; not of doctests, names of keys and other short strings."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    inside: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            parts = [p.value if isinstance(p, ast.Constant) else "`x`" for p in node.values]
            yield node.lineno, "".join(str(p) for p in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, re.sub(r"^ *(>>>|\.\.\.) .*$", "", node.value, flags=re.M) if " " in node.value else ""


def prose_of_page(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of a page, without code, links' targets and comments."""
    blank = re.sub(r"```.*?```|<!--.*?-->", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    for number, line in enumerate(blank.splitlines(), 1):
        yield number, re.sub(r"\]\([^)]*\)", "]", line)


def wrong_words(path: Path) -> list[str]:
    """ "file:line: word", for every banned word in the prose of a file."""
    text = path.read_text()
    found = []
    for line, prose in prose_of_code(text) if path.suffix == ".py" else prose_of_page(text):
        for allowed in ALLOWED:
            prose = prose.replace(allowed, "")
        prose = re.sub(r"(?<!as of )`[^`\n]*`", "`", prose)
        for match in WORDS.finditer(prose):
            found.append(f"{path.relative_to(ROOT)}:{line + prose[: match.start()].count(chr(10))}: {match[0]!r}")
    return found


def test_no_private_words_and_no_british_spelling():
    wrong = [line for path in files(*CHECKED) for line in wrong_words(path)]
    assert not wrong, "\n".join([*wrong, "write instead:", *(f"  {k}: {v}" for k, v in BANNED.items())])


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ('"""The color space knows the hue."""', "knows"),
        ("x = 1  # a grey image", "grey"),
        ('raise ValueError(f"expected a step of the training: got {x}")', "of the training"),
        ('def f():\n    """As of `StyleHeads`."""', "As of `"),
        ("y = 'rows of unit length are expected'", "rows of unit length"),
    ],
)
def test_the_check_finds_a_word_in_docstrings_comments_and_messages(tmp_path, monkeypatch, source, word):
    monkeypatch.setattr("test_words.ROOT", tmp_path)
    (tmp_path / "some.py").write_text(source)
    assert [line.rpartition(": ")[2] for line in wrong_words(tmp_path / "some.py")] == [repr(word)]


def test_the_check_leaves_code_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("test_words.ROOT", tmp_path)
    (tmp_path / "some.py").write_text('"""Calls `grey`.\n\n>>> colour = grey(x)\n"""\ncolour = {"grey": 1}\n')
    (tmp_path / "page.md").write_text("```python\ncolour = grey(x)  # 90°\n```\nsee [the page](grey.md), `colour`\n")
    assert not wrong_words(tmp_path / "some.py") and not wrong_words(tmp_path / "page.md")
