"""Check the numbers in the prose of the pages against the data files: `python docs/check_numbers.py [PAGE ...]`.

numbers.toml ties a number to an expression that reads it from a data file, or says why a number needs none. What is
checked of README.md and docs/**/*.md:

    the quoted text is on the page, once (an exempt one: at least once)
    each {number} in it equals its expression, rounded to as many digits as are printed
    each other number with two or more decimals is in no entry: it is listed, with its line

Code, links, and tables that a script fills (between `<!-- NAME -->` and `<!-- end -->`) are left out, and so are the
pages in `written`, which a script writes whole from a data file. An entry is one of

    [["docs/page.md"]]
    text = "the backbone keeps {0.91}, content {0.01}"     # line breaks of the page do not matter
    values = ["score('cifar/finals', RECIPE, 'each', 'backbone', 'gray')", "..."]

    [["docs/page.md"]]
    table = "| space | waveform"                            # how the head of a table begins
    values = ["[...]"]                                      # its numbers, row by row

    [["docs/page.md"]]                                      # or [["*"]]: on every page
    text = "temperature {0.15}"                             # or table = "..."
    reason = "a setting"

The expressions see the functions of numbers_data.py and the names of [names]. On the pages in `pending`, the test does
not refuse numbers that are in no entry.
"""

import argparse
import importlib.util
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SIDECAR = DOCS / "numbers.toml"
MINUS = "\N{MINUS SIGN}"
NUMBER = rf"[-{MINUS}]?\d+(?:,\d{{3}})*(?:\.\d+)?"
REPORTED = re.compile(r"(?<![\w.,/])" + rf"[-{MINUS}]?" + r"\d{1,3}(?:,\d{3})*\.\d{2,4}(?![\w]|\.\d)")
"""A number that reports something: two to four decimals, and no part of a name or of a version such as 2.14.1."""
LEFT_OUT = re.compile(
    r"```.*?```|<!-- [^\n]+? -->\n.*?<!-- end -->|`[^`\n]*`|(?<=\])\([^)\s]+\)|https?://\S+", re.DOTALL
)
Span = tuple[int, int]


class Wrong(Exception):
    """An entry that does not hold."""


def load_data() -> dict[str, Any]:
    """The functions that expressions may call."""
    spec = importlib.util.spec_from_file_location("numbers_data", DOCS / "numbers_data.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: getattr(module, name) for name in module.__all__}


def evaluate(expression: str, names: dict[str, Any]) -> list[float]:
    """The value of an expression, as a flat list."""
    value = eval(expression, dict(names))
    return [float(x) for x in flat(value)]


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple) and not hasattr(value, "mean"):
        for each in value:
            yield from flat(each)
    else:
        yield value.mean if hasattr(value, "mean") else value


def equals(printed: str, value: float) -> bool:
    """Whether the value, rounded to as many digits as are printed, is the printed number."""
    text = printed.replace(",", "").replace(MINUS, "-")
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10**-digits + 1e-9


def masked(page: str) -> str:
    """The page with everything that is not prose blanked out, at the same places."""
    return LEFT_OUT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), page)


def pattern(text: str) -> re.Pattern[str]:
    """An entry's text: line breaks are spaces, and what is in braces is a number."""
    parts = re.split(r"\{(" + NUMBER + r")\}", " ".join(text.split()))
    words = [re.escape(p).replace(r"\ ", r"\s+") for p in parts]
    return re.compile("".join(f"({w})" if k % 2 else w for k, w in enumerate(words)))


def lined(page: str, place: int) -> int:
    return page.count("\n", 0, place) + 1


def rows_of_table(page: str, head: str) -> list[Span]:
    """Where the rows below a head are."""
    starts = [m.start() for m in re.finditer("^" + re.escape(head), page, re.MULTILINE)]
    if len(starts) != 1:
        raise Wrong(f"table {head!r}: expected one such table: got {len(starts)}")
    place, spans = starts[0], []
    while place < len(page) and page[place : place + 4].lstrip(" ").startswith("|"):
        end = page.find("\n", place) + 1 or len(page)
        spans.append((place, end))
        place = end
    return spans[2:]


def compare(printed: list[str], values: list[float], where: str) -> Iterator[str]:
    if len(printed) != len(values):
        yield f"{where}: expected {len(values)} numbers: got {len(printed)} ({', '.join(printed[:8])})"
        return
    for k, (text, value) in enumerate(zip(printed, values, strict=True), 1):
        if not equals(text, value):
            yield f"{where}: number {k} is {text}, the data has {value:.4f}"


def check_entry(entry: dict[str, Any], page: str, prose: str, names: dict[str, Any]) -> tuple[list[Span], list[str]]:
    """Which places an entry covers, and what is wrong with it."""
    where = entry.get("text", entry.get("table", "?"))
    where = where if len(where) < 70 else where[:67] + "..."
    values = [x for e in entry.get("values", ()) for x in evaluate(e, names)]
    if "table" in entry:
        found = [
            (m.start() + a, m.end() + a, m[0])
            for a, b in rows_of_table(page, entry["table"])
            for m in REPORTED.finditer(prose[a:b])
        ]
        spans, printed = [(a, b) for a, b, _ in found], [text for _, _, text in found]
    else:
        matches = list(pattern(entry["text"]).finditer(page))
        if not matches or ("values" in entry and len(matches) > 1):
            raise Wrong(f"{where}: expected this text once on the page: got {len(matches)}")
        spans = [m.span(k) for m in matches for k in range(1, len(m.groups()) + 1)]
        printed = list(matches[0].groups())
    wrong = list(compare(printed, values, where)) if "values" in entry else []
    if ("values" in entry) == ("reason" in entry):
        wrong.append(f"{where}: expected either values or a reason")
    return spans, wrong


def check(name: str, page: str, sidecar: dict[str, Any], names: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What is wrong with a page's entries, and its lines with numbers that are in none."""
    prose = masked(page)
    covered: list[Span] = []
    wrong: list[str] = []
    for entry in sidecar.get(name, ()):
        try:
            spans, its = check_entry(entry, page, prose, names)
        except (Wrong, KeyError, ValueError, AttributeError, TypeError, IndexError) as error:
            wrong.append(f"{name}: {error if isinstance(error, Wrong) else f'{entry}: {error!r}'}")
            continue
        covered += spans
        wrong += [f"{name}: {each}" for each in its]
    for entry in sidecar.get("*", ()):
        covered += [m.span(1) for m in pattern(entry["text"]).finditer(page)]
    loose = [
        f"{name}:{lined(page, m.start())}: {m[0]}"
        for m in REPORTED.finditer(prose)
        if not any(a < m.end() and m.start() < b for a, b in covered)
    ]
    return wrong, loose


def pages() -> dict[str, Path]:
    files = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]
    return {str(file.relative_to(ROOT)): file for file in files}


def report(chosen: Sequence[str] = ()) -> dict[str, tuple[list[str], list[str]]]:
    """Page -> what is wrong, and what is not tied."""
    sidecar = tomllib.loads(SIDECAR.read_text(encoding="utf-8"))
    names = load_data() | sidecar["names"]
    known = pages()
    if unknown := [k for k in sidecar if k not in (*known, "names", "pending", "written", "*")]:
        raise SystemExit(f"numbers.toml: expected pages of the repository: got {', '.join(unknown)}")
    wanted = [name for name in known if name not in sidecar["written"]]
    wanted = [name for name in wanted if not chosen or any(part in name for part in chosen)]
    return {name: check(name, known[name].read_text(encoding="utf-8"), sidecar, names) for name in wanted}


def pending() -> list[str]:
    return list(tomllib.loads(SIDECAR.read_text(encoding="utf-8"))["pending"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the numbers that differ from the data, or that no entry ties.")
    parser.add_argument("pages", nargs="*", help="parts of the pages' names; all pages if none is given")
    found = report(parser.parse_args().pages)
    for wrong, loose in found.values():
        print(*(f"WRONG {each}" for each in wrong), *loose, sep="\n", end="\n" if wrong or loose else "")
    wrongs, loose = (sum(len(each[k]) for each in found.values()) for k in (0, 1))
    print(f"{len(found)} pages: {wrongs} entries do not hold, {loose} numbers are in no entry")
    raise SystemExit(bool(wrongs))


if __name__ == "__main__":
    main()
