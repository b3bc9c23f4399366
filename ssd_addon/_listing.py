"""Lists the image files in a folder and their classes, in little memory, and records what is left out."""

import errno
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, overload

import numpy as np
import numpy.typing as npt

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")

# Reasons, as `ImageFiles.left_out` names them.
HIDDEN = "hidden files and folders"
HELPERS = "system files and folders"
OTHER = "files without an image extension"
EMPTY = "folders without images"
BESIDE = "images outside the class folders"
LOOPS = "links back to a folder that contains them"
BROKEN_LINK = "broken links"
SPECIAL = "pipes, sockets and devices"

# Names, in lower case, of files that operating systems, file servers and tools create among a user's files.
_HELPER_NAMES = frozenset(
    (
        *("__macosx", "icon\r", "temporary items", "network trash folder"),  # macOS
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),  # Windows
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb", "@tmp"),  # Synology, QNAP
        *("lost+found", "__pycache__"),
    )
)

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

T = TypeVar("T")


def printable(text: str) -> str:
    r"""A file name that can be printed and encoded: bytes that are not UTF-8 are written as \xNN."""
    return _LONE_SURROGATE.sub(lambda m: rf"\x{ord(m[0]) & 0xFF:02x}", text)


def _printables(names: Sequence[str]) -> list[str]:
    """Unique printable names for the entries of one folder."""
    taken, shown = set(names), []
    for name in names:
        text = printable(name)
        while text != name and text in taken:
            text += "~"
        taken.add(text)
        shown.append(text)
    return shown


class Column(Sequence[T]):
    """A sequence whose items are created on access."""

    def __init__(self, item: Callable[[int], T], length: int) -> None:
        self._item, self._length = item, length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        where = range(self._length)[index]
        return [self._item(i) for i in where] if isinstance(where, range) else self._item(where)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class _Folder(NamedTuple):
    """The images of one folder."""

    path: str  # below the root, as the file system has it: bytes that are not UTF-8 are lone surrogates
    shown: str  # the same, printable
    names: list[str]


class Listing:
    """The files below a root, with names in one block of bytes: a million files take about 40 MB, shared by workers."""

    def __init__(self, root: Path, groups: Iterable[tuple[str | None, list[_Folder]]]) -> None:
        """`groups` holds the folders of each class; the class is None for a root folder without classes."""
        self.root = root
        self.classes: list[str] = []
        self.labels: list[int] = []
        self.folders: list[tuple[str, str]] = []
        self._odd: dict[int, str] = {}  # printable names that `printable` alone would not make unique
        starts, names, lengths = [], bytearray(), array("H")
        for name, folders in groups:
            self.classes += [] if name is None else [name]
            label = max(0, len(self.classes) - 1)
            for folder in folders:
                starts.append(len(lengths))
                self.folders.append((folder.path, folder.shown))
                for file, shown in zip(folder.names, _printables(folder.names), strict=True):
                    if shown != printable(file):
                        self._odd[len(lengths)] = shown
                    encoded = os.fsencode(file)
                    names += encoded
                    lengths.append(len(encoded))
                self.labels += [label] * len(folder.names)
        self._starts: npt.NDArray[np.int64] = np.asarray(starts, np.int64)
        self._ends: npt.NDArray[np.int64] = np.cumsum(lengths, dtype=np.int64)
        self._names = bytes(names)

    def __len__(self) -> int:
        return len(self.labels)

    def _parts(self, i: int) -> tuple[str, str, str]:
        """The folder's path, its printable form, and the file's name."""
        path, shown = self.folders[int(np.searchsorted(self._starts, i, side="right")) - 1]
        return path, shown, os.fsdecode(self._names[int(self._ends[i - 1]) if i else 0 : int(self._ends[i])])

    def path(self, i: int) -> Path:
        folder, _, name = self._parts(i)
        return self.root / folder / name

    def name(self, i: int) -> str:
        """The path below the root, printable and unique."""
        _, folder, name = self._parts(i)
        return os.path.join(folder, self._odd.get(i) or printable(name))

    def sample(self, i: int) -> tuple[Path, int]:
        return self.path(i), self.labels[i]


class Scan(NamedTuple):
    """The images below a folder, and irregularities to report."""

    listing: Listing
    left_out: Counter[str]  # what was left out and how often
    empty: list[str]  # class folders that hold no image
    repeated: dict[str, str]  # folders that links list again: where -> where they are listed first


def scan(root: Path) -> Scan:
    """List the images below a folder.

    Raises:
        OSError: a folder cannot be listed.
    """
    left_out: Counter[str] = Counter()
    empty: list[str] = []
    linked: dict[str, str] = {}
    listing = Listing(root, _groups(root, left_out, empty, linked))
    repeated: dict[str, str] = {}
    if linked:
        base = os.path.realpath(root)
        first = {os.path.join(base, path): shown for path, shown in listing.folders}  # the real paths, without links
        for real, shown in ((linked[shown], shown) for _, shown in listing.folders if shown in linked):
            if first.setdefault(real, shown) != shown:
                repeated[shown] = first[real]
    return Scan(listing, left_out, empty, repeated)


def _groups(
    root: Path, left_out: Counter[str], empty: list[str], linked: dict[str, str]
) -> Iterator[tuple[str | None, list[_Folder]]]:
    """The folders of each class, one class at a time, so that few names are in memory as strings.

    Folders that are reached through a link are recorded in `linked`: printable path -> real path.
    """
    images, folders = _entries(str(root), left_out)
    real, any_class = os.path.realpath(root), False
    for entry, shown in zip(folders, _printables([f.name for f in folders]), strict=True):
        target = _entered(entry, (real,), left_out)
        if target is None:
            continue
        below = _walk(entry, shown, target, left_out, linked)
        if below:
            any_class = True
            yield shown, below
        else:
            empty.append(shown)
            left_out[EMPTY] += 1
    if images and any_class:
        left_out[BESIDE] += len(images)
    elif images:
        yield None, [_Folder("", "", images)]


def _walk(
    top: os.DirEntry[str],
    shown: str,
    target: tuple[str, tuple[str, ...]],
    left_out: Counter[str],
    linked: dict[str, str],
) -> list[_Folder]:
    """The folders from `top` down that contain images, in the order of torchvision's ImageFolder."""
    found: list[_Folder] = []
    # Each folder's path, its path below the root, the printable form of that, and the result of `_entered`.
    todo = [(top.path, top.name, shown, *target)]
    while todo:
        path, below, shown, real, links = todo.pop()
        images, folders = _entries(path, left_out)
        if images:
            found.append(_Folder(below, shown, images))
            if links:
                linked[shown] = real
        for entry, name in zip(folders, _printables([f.name for f in folders]), strict=True):
            entered = _entered(entry, (*links, real), left_out)
            if entered is not None:
                todo.append((entry.path, os.path.join(below, entry.name), os.path.join(shown, name), *entered))
    return sorted(found)


def _entered(
    entry: os.DirEntry[str], way: tuple[str, ...], left_out: Counter[str]
) -> tuple[str, tuple[str, ...]] | None:
    """The real path of a sub-folder, and the real folders whose links led to it; None for a link that forms a loop.

    `way` lists the real folders whose links led here, ending with the real path of the folder that contains the entry.
    A link forms a loop if it leads to one of them or to a folder that contains one: that folder would be found again
    inside itself, endlessly.
    """
    *links, here = way
    if not entry.is_symlink():
        return os.path.join(here, entry.name), tuple(links)
    target = os.path.realpath(entry.path)
    inside = target.rstrip(os.sep) + os.sep
    if any(folder == target or folder.startswith(inside) for folder in way):
        left_out[LOOPS] += 1
        return None
    return target, way


def _entries(folder: str, left_out: Counter[str]) -> tuple[list[str], list[os.DirEntry[str]]]:
    """Names of the images, and sub-folders, both sorted."""
    images, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                reason = _helper(entry.name)
                if reason is None and _unless_loop(entry.is_dir):
                    folders.append(entry)
                    continue
                reason = reason or _not_an_image(entry)
                if reason is None:
                    images.append(entry.name)
                else:
                    left_out[reason] += 1
    except OSError as error:
        what = f"{printable(folder)}: expected a folder that can be listed: got {error.strerror}"
        raise OSError(error.errno, what) from error
    return sorted(images), sorted(folders, key=lambda entry: entry.name)


def _helper(name: str) -> str | None:
    """The reason for leaving out any entry with this name, or None."""
    if name.startswith("."):
        return HIDDEN
    return HELPERS if name.lower() in _HELPER_NAMES else None


def _not_an_image(entry: os.DirEntry[str]) -> str | None:
    """The reason for leaving out an entry that is not a folder, or None."""
    broken = entry.is_symlink() and not os.path.exists(entry.path)
    if not entry.name.lower().endswith(SUFFIXES):
        return BROKEN_LINK if broken else OTHER
    # Like ImageFolder, list a broken link with an image's extension; reading it reports which file is missing.
    return None if broken or _unless_loop(entry.is_file) else SPECIAL


def _unless_loop(kind: Callable[[], bool]) -> bool:
    """The result of is_dir or is_file of an entry; False for a link that leads to itself."""
    try:
        return kind()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise
