"""The public names and their arguments are those of api.txt, which changes only on purpose."""

import subprocess
import sys
from pathlib import Path

import pytest
from public_api import PAGE, lines

ROOT = Path(__file__).parents[2]
COMMAND = "python tests/support/public_api.py"


def changes(before: list[str], now: list[str]) -> str:
    """What a developer has to know of the difference, "" where there is none."""

    def by_name(found: list[str]) -> dict[str, str]:
        return {line.partition("(")[0].partition(" ")[0]: line for line in found}

    old, new = by_name(before), by_name(now)
    removed = [f"  removed: {old[name]}" for name in sorted(old.keys() - new.keys())]
    changed = [f"  changed: {old[n]}\n      now: {new[n]}" for n in sorted(old.keys() & new.keys()) if old[n] != new[n]]
    added = [f"  added:   {new[name]}" for name in sorted(new.keys() - old.keys())]
    if not removed + changed + added:
        return ""
    advice = [f"Accept it with `{COMMAND}`, and name it in CHANGELOG.md."]
    if removed or changed:
        advice.append(
            "Where code that works with the last release would stop working, semantic versioning asks for a "
            "deprecation first: see ssd_addon/_deprecation.py and CONTRIBUTING.md."
        )
    return "\n".join(["The public API differs from tests/project/api.txt:", *removed, *changed, *added, *advice])


def test_the_public_api_is_the_one_that_was_frozen():
    found = changes(PAGE.read_text().splitlines(), lines())
    if found:
        pytest.fail(found, pytrace=False)


BEFORE = ["ssd_addon.a(x, *, y=1)", "ssd_addon.b (value)", "ssd_addon.c (property)"]


@pytest.mark.parametrize(
    "now,said,deprecation",
    [
        (BEFORE[1:], "  removed: ssd_addon.a(x, *, y=1)\n", True),
        (["ssd_addon.a(x)", *BEFORE[1:]], "  changed: ssd_addon.a(x, *, y=1)\n      now: ssd_addon.a(x)\n", True),
        ([*BEFORE, "ssd_addon.d()"], "  added:   ssd_addon.d()\n", False),
    ],
)  # fmt: skip
def test_a_change_is_named_with_the_command_that_accepts_it(now, said, deprecation):
    message = changes(BEFORE, now)
    assert said in message and COMMAND in message
    assert ("asks for a deprecation" in message) == deprecation


def test_the_same_names_are_no_change():
    assert changes(BEFORE, [*BEFORE]) == ""


@pytest.mark.slow
def test_the_command_writes_what_the_test_reads(tmp_path):
    """In a new interpreter, whose functions conftest.py has not wrapped for the checks of shapes."""
    code = f"import pathlib, public_api as p; pathlib.Path({str(tmp_path / 'a')!r}).write_text('\\n'.join(p.lines()))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT / "tests" / "support", check=True,
                   env={"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert (tmp_path / "a").read_text().splitlines() == lines()
