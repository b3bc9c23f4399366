"""The documentation: links and anchors, the pages of the site, the API, the lines of code that the method names."""

import importlib
import importlib.util
import inspect
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest

import ssd_addon

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stage, lines = script("stage"), script("lines")
PAGES = stage.pages()
TEXTS = {path: (ROOT / path).read_text(encoding="utf-8") for path in PAGES}
DESCRIBED = re.compile(r"^::: ssd_addon\.(\S+)$", re.MULTILINE)
API = {path: DESCRIBED.findall(text) for path, text in TEXTS.items() if "/api/" in path}
"""Page -> what it describes, modules too."""
OPTIONS = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]


def anchors(file):
    """What a link may name: a page's headings, as GitHub and the site write them, or lines of code."""
    text, found = file.read_text(encoding="utf-8"), {}
    if file.suffix != ".md":
        return {f"L{k + 1}" for k in range(len(text.splitlines()))}
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose, re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {name if not k else f"{name}-{k}" for name, n in found.items() for k in range(n + 1)}


@pytest.mark.parametrize("path", PAGES)
def test_every_link_and_anchor_leads_somewhere(path):
    wrong = []
    for to, anchor in stage.links(TEXTS[path]):
        file = (ROOT / path).parent.joinpath(to).resolve() if to else ROOT / path
        if not file.is_file() or (anchor and anchor[1:] not in anchors(file)):
            wrong.append(to + anchor)
    assert wrong == []


def test_links_in_code_are_none_and_those_of_html_are_links():
    text = 'see [a](a.md#b) and `[c](c.md)`\n\n```\n[d](d.md)\n```\n\n<img src="e.png"> [f](https://f.org) [g](#h)\n'
    assert stage.links(text) == [("a.md", "#b"), ("e.png", ""), ("", "#h")]


def test_every_page_is_in_the_navigation_once():
    def flat(nav):
        for entry in nav:
            for value in [entry] if isinstance(entry, str) else entry.values():
                yield from [value] if isinstance(value, str) else flat(value)

    in_nav = [*flat(OPTIONS["nav"])]
    assert len(in_nav) == len({*in_nav})
    assert {*PAGES.values()} - {"readme.md", "security.md"} == {*in_nav}


def test_the_site_asks_for_nothing_outside():
    assert OPTIONS["theme"]["font"] is False and "offline" in OPTIONS["plugins"]
    assert not {"repo_url", "edit_uri", "site_url"} & OPTIONS.keys()
    assert (ROOT / "docs" / OPTIONS["extra"]["polyfills"][0]["path"]).is_file()


def test_the_pages_are_laid_out_with_links_that_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "STAGE", tmp_path)
    stage.Stage().write()
    made = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert {*PAGES.values()} <= made
    assert {"source/ssd_addon/losses/joint.py.md", "results/audit.png", "assets/site.css"} <= made
    for page in tmp_path.rglob("*.md"):
        for to, _ in stage.links(page.read_text(encoding="utf-8")):
            assert not to or (page.parent / to).is_file(), f"{page.relative_to(tmp_path)}: {to}"
    method = (tmp_path / "method.md").read_text()
    assert re.search(r"\(source/ssd_addon/losses/joint\.py\.md#__codelineno-0-\d+\)", method)
    assert "(changelog.md)" in (tmp_path / "readme.md").read_text()
    assert "](idea/views.png#only-light)![" in (tmp_path / "idea.md").read_text()
    assert (tmp_path / "idea" / "views-dark.png").is_file()


def test_a_link_to_nothing_stops_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("[b](b.md)")
    with pytest.raises(SystemExit, match=r"docs/a.md: expected a link to a file of this repository: got b.md"):
        stage.Stage().text("docs/a.md", "a.md")


def test_a_file_outside_takes_the_place_of_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    monkeypatch.setattr(stage, "STAGE", tmp_path / "stage")
    (tmp_path / "docs" / "assets").mkdir(parents=True)
    (tmp_path / "docs" / "contribute.md").write_text("the old page")
    (tmp_path / "docs" / "index.md").write_text("[contribute](../CONTRIBUTING.md#tests)")
    (tmp_path / "CONTRIBUTING.md").write_text("the file, [home](docs/index.md)")
    stage.Stage().write()
    assert (tmp_path / "stage" / "contribute.md").read_text() == "the file, [home](index.md)"
    assert (tmp_path / "stage" / "index.md").read_text() == "[contribute](contribute.md#tests)"


def test_the_method_names_the_lines_where_its_equations_stand():
    text = TEXTS["docs/method.md"]
    assert text == lines.filled(text), "run python docs/lines.py"
    assert len(lines.LINE.findall(text)) >= 21
    for row in re.findall(r"^\|.*$", text, re.MULTILINE):
        assert "Σ" not in row or lines.LINE.search(row), f"expected a line of code: {row}"


def test_a_line_that_is_gone_is_an_error():
    page = "[alarm.py:1](../ssd_addon/alarm.py#L1) `this is not there`"
    with pytest.raises(ValueError, match="expected one line with 'this is not there': got lines \\[\\]"):
        lines.filled(page)


def test_every_public_name_is_on_one_page_of_the_api():
    described = [re.sub(r"\.(\w+)\.\1$", r".\1", name) for names in API.values() for name in names]
    assert len(described) == len({*described})
    last = [name.rpartition(".")[2] for name in described]
    for name in {*ssd_addon.__all__} - {"__version__"}:
        home = ssd_addon._HOME.get(name)
        full = f"{home.partition('.')[0]}.{name}" if home else name
        assert full in described and (last.count(name) == 1 or home is None), full
    for module in ("augment", "auditing", "kernels", "losses", "metrics", "operations", "report", "runs"):
        home = importlib.import_module(f"ssd_addon.{module}")
        public = {n for n in home.__all__ if inspect.isclass(x := getattr(home, n)) or inspect.isfunction(x)}
        missing = public - {*last}
        assert not missing, f"ssd_addon.{module}: {sorted(missing)}"


@pytest.mark.parametrize("path", [p for p, names in API.items() if names])
def test_what_the_api_describes_is_there_and_its_docstring_names_its_own_arguments(path):
    for name in API[path]:
        home, _, last = name.rpartition(".")
        path = ROOT / "ssd_addon" / name.replace(".", "/")
        is_module = path.is_dir() or path.with_suffix(".py").is_file()
        assert is_module == (not home), f"{name}: expected a module, or a name in it: got the other"
        if not home:
            continue
        thing = getattr(importlib.import_module(f"ssd_addon.{home}"), last)
        assert thing.__doc__, name
        if isinstance(thing, type) and issubclass(thing, Exception):
            continue
        known = {*inspect.signature(thing).parameters}
        for section in re.findall(r"^Args:\n((?:    .*\n|\n)*)", inspect.getdoc(thing) + "\n", re.MULTILINE):
            given = {n for line in re.findall(r"^    (\w[\w, *]*): ", section, re.MULTILINE) for n in line.split(", ")}
            assert given and given <= known, f"{name}: {sorted(given - known)}"


@pytest.mark.slow
def test_the_figures_of_the_idea_come_from_their_script(tmp_path):
    idea = script("idea")
    idea.draw(tmp_path, dpi=20)
    drawn = {p.name for p in tmp_path.iterdir()}
    assert drawn == {p.name for p in idea.OUT.iterdir()}
    shown = {Path(to).name for to, _ in stage.links(TEXTS["docs/idea.md"]) if to.startswith("idea/")}
    assert shown == {name for name in drawn if "-dark" not in name} and all(
        f"{n[:-4]}-dark.png" in drawn for n in shown
    )


def test_doctests_are_shown_as_code(monkeypatch):
    monkeypatch.setitem(sys.modules, "griffe", types.SimpleNamespace(Extension=object, Object=object))
    fenced = script("docstrings").fenced
    text = "Adds.\n\n>>> 1 + 1\n2\n\nArgs:\n    a: one.\n        >>> 2\n        2\n"
    code = ("```pycon\n>>> 1 + 1\n2\n```", "        ```pycon\n        >>> 2\n        2\n        ```")
    assert fenced(text) == f"Adds.\n\n{code[0]}\n\nArgs:\n    a: one.\n{code[1]}\n"


def test_home_says_how_many_lines_change_in_a_pipeline():
    diffs = script("diffs")
    new = [diffs.changes(file.stem)[1] for file in (diffs.SCRIPTS / "before").glob("*.py")]
    assert f": {min(new)} to {max(new)} new lines" in TEXTS["docs/index.md"]
