"""The page on PyPI, which setup.py makes from README.md; versions and pins that several files have to agree on."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from distributions import relative_addresses
from lowest import lowest

import ssd_addon

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
REPOSITORY = {"Repository": "https://example.org/owner/name/"}


@pytest.fixture(scope="module")
def page():
    """The function of setup.py, which runs the build only as __main__."""
    spec = importlib.util.spec_from_file_location("setup_of_the_project", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return lambda text, urls: setup.long_description(text, urls, "0.2.0")


@pytest.mark.parametrize("urls", [{}, {"Homepage": "https://example.org"}, REPOSITORY])
def test_the_readme_has_no_relative_address_on_pypi(page, urls):
    assert relative_addresses(README), "a README without relative addresses needs no setup.py"
    assert relative_addresses(page(README, urls)) == []


def test_with_a_repository_every_link_and_picture_of_the_readme_leads_to_a_file_of_it(page):
    found = re.findall(r"https://example\.org/owner/name/(blob|raw)/v0\.2\.0/([^)#\s\"']+)", page(README, REPOSITORY))
    assert len(found) >= len(relative_addresses(README))
    for kind, path in found:
        assert (ROOT / path).exists(), path
        assert kind == "blob" or path.endswith((".png", ".svg", ".gif", ".jpg", ".webp")), path


@pytest.mark.parametrize(
    "text,without,with_one",
    [
        ("see [the docs](docs/a.md#top).", "see the docs.", "see [the docs](AT/blob/v0.2.0/docs/a.md#top)."),
        ("![A picture](a.png)", "*A picture*", "![A picture](AT/raw/v0.2.0/a.png)"),
        ("[![A](a.png)](b.md)", "*A*", "[![A](AT/raw/v0.2.0/a.png)](AT/blob/v0.2.0/b.md)"),
        ("[`code`](a.py 'title')", "`code`", "[`code`](AT/blob/v0.2.0/a.py)"),
        ('<img alt="A" src="./a.png">', "<em>A</em>", '<img alt="A" src="AT/raw/v0.2.0/a.png">'),
        (
            '<picture><source srcset="d.png"><img src="a.png"></picture>',
            "<picture></picture>",
            '<picture><source srcset="AT/raw/v0.2.0/d.png"><img src="AT/raw/v0.2.0/a.png"></picture>',
        ),
        ('<a href="a.md"><b>A</b></a>', "<b>A</b>", '<a href="AT/blob/v0.2.0/a.md"><b>A</b></a>'),
    ],
)
def test_relative_links_and_pictures(page, text, without, with_one):
    assert page(text, {}).startswith(f"{without}\n\nThe pictures and the pages that are named here are in the source")
    assert page(text, REPOSITORY) == with_one.replace("AT", "https://example.org/owner/name")


@pytest.mark.parametrize(
    "text",
    [
        "[an address](https://arxiv.org/abs/2311.08815), [an anchor](#top), [mail](mailto:a@b.c), ![A](https://a.b/c.png)",
        "`[a](b.md)` and `<img src='a.png'>`",
        "```\nx[i](b.md) ![A](a.png)\n```\n",
        "a list [1, 2] (and more)",
    ],
)
def test_absolute_addresses_and_code_stay_as_they_are(page, text):
    assert page(text, {}) == page(text, REPOSITORY) == text


def test_tools_that_ci_and_pre_commit_run_have_one_exact_version_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert all("==" in line for line in extras["lint"]), "a range would give CI another version than pre-commit"
    assert any(line.startswith("ssd-addon[") and "lint" in line for line in extras["test"])
    tools = {re.split(r"[\[=]", line)[0] for line in extras["lint"]}
    assert not tools & {re.split(r"[\[<>=]", line)[0] for line in extras["test"]}
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert {hook["entry"].split()[2] for hook in hooks} <= tools
    assert all(hook["entry"].startswith(".venv/bin/python -m ") for hook in hooks)


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert (citation["version"], str(citation["date-released"])) == (newest[1], newest[2])
    assert newest[1] == ssd_addon.__version__


def test_workflows_run_commands_that_there_are():
    targets = set(re.findall(r"^([a-z][\w -]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    targets = {name for line in targets for name in line.split()}
    ci, versions = (
        yaml.safe_load((ROOT / ".github" / "workflows" / f).read_text()) for f in ("ci.yml", "versions.yml")
    )
    assert {*ci[True]} == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as true
    assert ci["jobs"]["ci"]["steps"][-1]["run"] == "bash .ci/run" and (ROOT / ".ci" / "run").is_file()
    assert {*versions[True]} == {"schedule", "workflow_dispatch"}
    assert {row["target"] for row in versions["jobs"]["versions"]["strategy"]["matrix"]["include"]} <= targets


def test_the_lowest_versions_are_those_of_every_requirement_of_users():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = lowest(project)
    assert len(found) == len({line.partition("==")[0] for line in found}), "two extras ask for different versions"
    assert {"torch==2.5.1", "kornia==0.9"} <= {*found} and not any("pytest" in line for line in found)
    with pytest.raises(ValueError, match="^dependency: expected 'name>=version': got 'numpy'$"):
        lowest({"dependencies": ["numpy"], "optional-dependencies": {}})
