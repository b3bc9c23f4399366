"""Licenses of the packages that this one needs, read from what is installed; CONTRIBUTING.md lists them."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOR_DEVELOPERS = ("test", "lint", "docs")
"""Extras that no user of the library installs."""
PERMISSIVE = {
    "0BSD", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "HPND", "ISC", "LLVM-exception",
    "MIT", "MIT-CMU", "PSF-2.0", "Unlicense", "Zlib",
}  # fmt: skip
NOT_PERMISSIVE = {
    "certifi": "MPL-2.0",
    "cuda-toolkit": "NVIDIA",
    "hypothesis": "MPL-2.0",
    "nvidia-*": "NVIDIA",
    "tqdm": "MPL-2.0",
}
"""Known and named in CONTRIBUTING.md. None of their code is part of this package."""
WITHOUT_METADATA = {"torchcodec": "BSD-3-Clause"}
"""Packages whose metadata name no license, by the license file that they install."""
WORDS = (
    (r"apache", "Apache-2.0"),
    (r"\bmit\b", "MIT"),
    (r"\bhpnd\b", "HPND"),
    (r"\bbsd\b|kiwi licensing terms", "BSD"),
    (r"python software foundation|psf", "PSF-2.0"),
    (r"mozilla public license 2\.0|mpl-2\.0", "MPL-2.0"),
    (r"nvidia", "NVIDIA"),
)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements):
    """Of packages, without those that an extra or another platform asks for."""
    found = (re.match(r"([\w.-]+)[^;]*(?:;(.*))?", line) for line in requirements)
    return [canonical(m[1]) for m in found if not re.search(r"extra|sys_platform ?==|python_version ?<", m[2] or "")]


def direct(*, developers):
    """What pyproject.toml asks for."""
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"]]
    for extra, lines in extras.items():
        if developers or extra not in FOR_DEVELOPERS:
            wanted += lines
    return {*names(wanted)} - {"ssd-addon"}


def with_theirs(wanted):
    """Packages, and what they need in turn, as far as it is installed."""
    found, left = {}, [*wanted]
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # on another platform, or of an extra that is not installed here
            continue
        left += names(found[name].requires or ())
    return found


def licenses(name, data):
    """SPDX names of one package's licenses: its expression, else its classifiers and the first words of its text."""
    if expression := data.get("License-Expression"):
        parts = re.split(r"\s+(?:AND|OR|WITH)\s+|[()]", expression)
        return {"NVIDIA" if "NVIDIA" in part else part for part in parts if part}
    said = [line for line in data.get_all("Classifier") or () if line.startswith("License ::")]
    text = " ".join([*said, (data.get("License") or "")[:200]]).lower()
    found = {spdx for words, spdx in WORDS if re.search(words, text)}
    return found or {WITHOUT_METADATA.get(name, "NVIDIA" if name == "cuda-toolkit" else "unknown")}


def exception(name):
    return NOT_PERMISSIVE.get("nvidia-*" if name.startswith("nvidia-") else name)


def test_every_dependency_has_a_permissive_license_or_is_a_known_exception():
    own = direct(developers=True)
    tools = {name: package for name, package in with_theirs(own).items() if name in own}
    packages = with_theirs(direct(developers=False)) | tools
    assert {"torch", "kornia", "numpy", "pillow"} <= packages.keys()
    wrong = {}
    for name, package in packages.items():
        beyond = licenses(name, package.metadata) - PERMISSIVE
        if beyond - {exception(name)}:
            wrong[name] = sorted(beyond)
    assert wrong == {}, "not permissive: leave it out, or name it in NOT_PERMISSIVE and in CONTRIBUTING.md"


def test_contributing_names_every_direct_dependency_and_every_exception():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    section = page.partition("\n## Licenses of dependencies\n")[2].partition("\n## ")[0]
    named = {canonical(name) for name in re.findall(r"`([\w.*-]+)`", section)}
    assert direct(developers=True) | {*NOT_PERMISSIVE} <= named


class Data(dict):
    def get_all(self, key):
        return [self[key]] if key in self else None


@pytest.mark.parametrize(
    "data,found",
    [
        ({"License-Expression": "MIT AND (Apache-2.0 WITH LLVM-exception)"}, {"MIT", "Apache-2.0", "LLVM-exception"}),
        ({"License-Expression": "LicenseRef-NVIDIA-Proprietary"}, {"NVIDIA"}),
        ({"License-Expression": "GPL-3.0-only"}, {"GPL-3.0-only"}),
        ({"Classifier": "License :: OSI Approved :: BSD License"}, {"BSD"}),
        ({"License": "MPL-2.0 AND MIT"}, {"MPL-2.0", "MIT"}),
        ({"License": "GNU General Public License"}, {"unknown"}),
        ({}, {"unknown"}),
    ],
)
def test_how_metadata_are_read(data, found):
    assert licenses("a-package", Data(data)) == found
