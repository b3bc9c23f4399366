"""What the two files of a release hold, and what their page on PyPI says: `python tests/support/distributions.py DIST`.

tests/wheel.sh calls it after the build, from the project's root.
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = {"ssd_addon/py.typed", "ssd_addon/kernels/README.md", "ssd_addon/kernels/table.json"}
DATA |= {"ssd_addon/report/page.css", "ssd_addon/report/page.js"}
MADE = {"PKG-INFO", "setup.cfg"}
"""By the build, beside the folder ssd_addon.egg-info."""
LEFT_OUT = (".gitignore", "ssd_addon/kernels")
"""Of the repository: the second is a symbolic link, for which the package-dir of pyproject.toml stands."""
NOT_SOURCE = re.compile(r"^(runs|data|site|\.[a-z_]*cache)/|\.(pt|pth|ckpt|safetensors|npz|npy|tar|onnx|whl)$")
LARGEST = 10 * 2**20
"""Bytes of the source distribution; its documentation's pictures and tables of results take most of it."""


def tracked() -> set[str]:
    """The repository's files."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {*listed.rstrip("\0").split("\0")}


def in_wheel(files: set[str]) -> set[str]:
    """What the wheel should hold beside its metadata, of the repository's files."""
    installed = {f.replace("kernels/", "ssd_addon/kernels/", 1) if f.startswith("kernels/") else f for f in files}
    return {f for f in installed if f.startswith("ssd_addon/") and (f.endswith(".py") or f in DATA)}


def check_wheel(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
    code = {name for name in names if not name.startswith(f"{info}/")}
    same("the wheel's files", code, in_wheel(tracked()))
    assert f"{info}/licenses/LICENSE" in names, f"the wheel should hold the license: it has {sorted(names - code)}"
    return metadata


def check_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()}
    made = {name for name in names if name in MADE or name.startswith("ssd_addon.egg-info/")}
    expected = {name for name in tracked() if not name.startswith(LEFT_OUT)}
    same("the files of the source distribution", names - made, expected)
    wrong = sorted(filter(NOT_SOURCE.search, names))
    assert not wrong, f"the source distribution should hold neither data nor runs: got {wrong}"
    assert sdist.stat().st_size < LARGEST, f"the source distribution should be below {LARGEST} bytes"


def check_page(metadata: Message) -> None:
    """Of the readers of PyPI: Markdown whose links and pictures lead somewhere."""
    assert metadata["Description-Content-Type"] == "text/markdown", metadata["Description-Content-Type"]
    relative = relative_addresses(str(metadata.get_payload(decode=True), "utf-8"))
    assert not relative, f"PyPI cannot follow relative addresses: got {relative}"


def relative_addresses(markdown: str) -> list[str]:
    """Of links and pictures, in the HTML that PyPI makes of a page."""
    from readme_renderer.markdown import render

    html = render(markdown)
    assert html, "PyPI should be able to render the page"
    return [a for a in re.findall(r'\b(?:href|src)="([^"]*)"', html) if not re.match(r"https?://|mailto:|#", a)]


def same(what: str, found: set[str], expected: set[str]) -> None:
    missing, more = sorted(expected - found), sorted(found - expected)
    assert not missing and not more, f"{what} should be those of the repository: missing {missing}, not in it {more}"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_page(check_wheel(wheel))
    check_source(sdist)
    sys.stdout.write(f"{wheel.name}, {sdist.name}: they hold what they should\n")
