"""Photographs in shards as a data set; shards.py writes the shards."""

import json
import os
import sys
import tarfile
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

import numpy as np

from ssd_addon._listing import SUFFIXES, Scan
from ssd_addon._optional import needs
from ssd_addon.files import ImageFiles

TABLE, CLASSES = "samples.npz", "classes.json"
OPEN = 64  # shards that a process keeps open


def image_files(root: Path, **options: Any) -> ImageFiles:
    """The photographs of a folder: `ShardFiles` if it holds shards, `ImageFiles` otherwise."""
    return ShardFiles(root, **options) if root.is_dir() and kind_of(root) else ImageFiles(root, **options)


def same_classes(folder: Path, train: list[str], val: list[str]) -> None:
    """Refuse class folders that differ: classes are numbered in the order of their own folders.

    Raises:
        ValueError: names the classes of one that the other lacks.
    """
    if train != val:
        raise ValueError(
            f"{folder}: expected the same class folders in train and val, as classes are numbered by them: got "
            f"{sorted(set(train) - set(val))} in train alone and {sorted(set(val) - set(train))} in val alone"
        )


def kind_of(folder: Path) -> Literal["litdata", "webdataset"] | None:
    """The kind of shards in a folder.

    Raises:
        ValueError: shards of two kinds, or shards and images.
    """
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    tars = [entry.name for entry in entries if entry.name.endswith(".tar")]
    index = folder / "index.json"
    chunks = (
        ["index.json"]
        if index.is_file() and isinstance(read_json(index), dict) and "chunks" in read_json(index)
        else []
    )
    if not tars and not chunks:
        return None
    below = [e for e in entries if e.is_dir() and not e.name.startswith(".")]
    names = [e.name for e in entries] + [f"{e.name}/{name}" for e in below for name in os.listdir(e.path)]
    beside = (chunks if tars else []) + [name for name in names if name.lower().endswith(SUFFIXES)]
    if beside:
        first = (tars or chunks)[0]
        raise ValueError(f"{folder}: expected shards of one kind, or images in folders: got {first} and {beside[0]}")
    return "webdataset" if tars else "litdata"


class _Table:
    """The place of each sample in the shards, with the interface of `_listing.Listing`."""

    def __init__(self, root: Path, classes: list[str], columns: dict[str, np.ndarray]) -> None:
        self.root, self.classes, self.columns = root, classes, columns
        self.labels = columns["labels"].tolist()
        self.files = _unpacked(columns["files"])
        self._names, self._ends = columns["names"].tobytes(), np.flatnonzero(columns["names"] == 0)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        return self._names[int(self._ends[i - 1]) + 1 if i else 0 : int(self._ends[i])].decode()

    def path(self, i: int) -> Path:
        return self.root / self.files[self.columns["shards"][i]] / self.name(i)

    def sample(self, i: int) -> tuple[Path, int]:
        return self.path(i), self.labels[i]


class ShardFiles(ImageFiles):
    """Photographs in shards, like `ImageFiles` for folders; arguments and attributes are the same.

    An image is broken if it cannot be decoded, if it differs from the length or the checksum that was written, or if
    its shard can no longer be read.

    Args:
        ahead: request the whole shard when its first sample is read, which helps if the samples of few shards are read
            at a time (`runs.ShardSampler`).

    Attributes:
        shards: the number of every sample's shard, for `runs.ShardSampler`.

    Raises:
        ValueError: shards that differ from those that were written: missing, added, or of another length.
    """

    def __init__(self, root: str | Path, *, ahead: bool = False, **options: Any) -> None:
        self.ahead = ahead
        self._reader: tuple[int, Any] = (0, None)  # process, and what reads there
        self._asked: deque[int] = deque(maxlen=OPEN)
        super().__init__(root, **options)
        self.shards = self._listing.columns["shards"]

    def _scan(self) -> Scan:
        kind = kind_of(self.root)
        if kind == "litdata":
            with needs("shards in litdata's format"):
                import litdata  # noqa: F401
        table = self.root / TABLE
        if table.is_file():
            with np.load(table, allow_pickle=False) as stored:
                columns, classes = dict(stored), read_json(self.root / CLASSES)
        elif kind == "webdataset":
            columns, classes = _listed(self.root)
        else:
            raise ValueError(f"{self.root}: expected {TABLE}, which examples/shards.py writes: got none")
        sizes = dict(zip(_unpacked(columns["files"]), columns["bytes"].tolist(), strict=True))
        there = {p.name: p.stat().st_size for p in self.root.iterdir() if p.name in sizes or p.suffix == ".tar"}
        if there != sizes:
            name = sorted(n for n in sizes.keys() | there if sizes.get(n) != there.get(n))[0]
            words = [f"{s[name]} bytes" if name in s else "none" for s in (sizes, there)]
            raise ValueError(f"{self.root / name}: expected {words[0]}, as {TABLE} says: got {words[1]}")
        self._kind = kind
        return Scan(_Table(self.root, classes, columns), Counter(), [], {})

    def __repr__(self) -> str:
        shards = f"{len(self._listing.files)} shards ({self._kind})"
        return f"ShardFiles({str(self.root)!r}: {len(self)} images, {len(self.classes)} classes, {shards})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": (0, None)}

    def stored(self, k: int) -> bytes:
        """The bytes of a photograph's file.

        Raises:
            OSError: they differ from what was written, or cannot be read.
        """
        columns = self._listing.columns
        if self._reader[0] != os.getpid():  # processes cannot share handles
            self._reader = os.getpid(), _Tars(self._listing) if self._kind == "webdataset" else _Chunks(self.root)
        shard = int(self.shards[k])
        if self.ahead and shard not in self._asked:
            self._asked.append(shard)
            with open(self.root / self._listing.files[shard], "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        size = int(columns["sizes"][k])
        data = self._reader[1](shard, int(columns["starts"][k]), size)
        if len(data) != size or ("crc32" in columns and zlib.crc32(data) != columns["crc32"][k]):
            raise OSError(f"expected {size} bytes as they were written: got {len(data)} bytes, not the same")
        return data

    def _source(self, k: int) -> IO[bytes]:
        return BytesIO(self.stored(k))


class _Tars:
    """Reads parts of files, and keeps a few files open."""

    def __init__(self, table: _Table) -> None:
        self.table, self.open = table, OrderedDict[int, BinaryIO]()

    def __call__(self, shard: int, start: int, size: int) -> bytes:
        if shard not in self.open:
            if len(self.open) == OPEN:
                self.open.popitem(last=False)[1].close()
            self.open[shard] = open(self.table.root / self.table.files[shard], "rb", buffering=0)  # noqa: SIM115
        self.open.move_to_end(shard)
        return os.pread(self.open[shard].fileno(), size, start)

    def __del__(self) -> None:
        for file in self.open.values():
            file.close()


class _Chunks:
    """Reads samples of litdata's chunks by index."""

    def __init__(self, root: Path) -> None:
        from litdata import StreamingDataset

        # By default up to 256 neighbors of a sample are read with it, which is useless in a random order.
        self.samples = StreamingDataset(str(root.resolve()), batch_decode=0, shuffle=False, drop_last=True)

    def __call__(self, shard: int, start: int, size: int) -> bytes:
        try:
            return bytes(self.samples[start]["image"])
        except OSError:
            raise
        except Exception as error:  # a damaged header gives IndexError, struct.error, ...
            raise OSError(f"sample {start} of litdata: {type(error).__name__}: {error}") from error


def _listed(folder: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The columns of the table of .tar files that have none, and their classes; stored beside them if possible."""
    print(f"{folder}: listing .tar files, once", file=sys.stderr, flush=True)
    written = sorted(p.name for p in folder.glob("*.tar"))
    found: dict[str, list[int]] = {"starts": [], "sizes": [], "shards": []}
    names, labels = [], []
    for shard, file in enumerate(written):
        images: dict[str, tuple[str, tarfile.TarInfo]] = {}
        more: dict[tuple[str, str], str] = {}
        try:
            with tarfile.open(folder / file, "r:") as tar:
                for member in tar:
                    base = member.name.rpartition("/")
                    stem, _, end = base[2].partition(".")
                    key, end = f"{base[0]}{base[1]}{stem}", f".{end.lower()}"
                    if not member.isfile():
                        continue
                    if end.endswith(SUFFIXES):
                        if key in images:
                            raise ValueError(f"{folder / file}: expected one image of each key: got two of {key}")
                        images[key] = end, member
                    elif end in (".cls", ".name"):
                        more[key, end] = tar.extractfile(member).read().decode()  # type: ignore[union-attr]
        except tarfile.TarError as error:
            raise ValueError(f"{folder / file}: expected a whole .tar file: {error}") from error
        for key, (end, member) in images.items():
            found["starts"].append(member.offset_data)
            found["sizes"].append(member.size)
            found["shards"].append(shard)
            names.append(more.get((key, ".name"), f"{Path(file).stem}/{key}{end}"))
            labels.append(more.get((key, ".cls"), "").strip())
    if not names:
        raise FileNotFoundError(f"{folder}: expected images ({', '.join(SUFFIXES)}) in its .tar files: got none")
    if bad := [n for n, label in zip(names, labels, strict=True) if not label.isdecimal()]:
        if any(labels):
            raise ValueError(f"{folder}: expected a class number (.cls) for every image: got none for {bad[0]}")
        labels = ["0"] * len(names)
    named = folder / CLASSES
    numbers = [int(label) for label in labels]
    listed = read_json(named) if named.is_file() else [] if bad else [str(k) for k in range(max(numbers) + 1)]
    if max(numbers) >= max(1, len(listed)):
        raise ValueError(f"{named}: expected names of at least {max(numbers) + 1} classes: got {len(listed)}")
    columns = complete(folder, written, {name: np.asarray(column) for name, column in found.items()}, names, numbers)
    try:
        save(folder, columns, listed)
    except OSError as error:
        print(f"{folder}: the list could not be kept: {error}", file=sys.stderr, flush=True)
    return columns, listed


def complete(
    folder: Path, files: list[str], columns: dict[str, np.ndarray], names: Sequence[str], labels: list[int]
) -> dict[str, np.ndarray]:
    """The columns of the table, with the shards and their bytes."""
    sizes = np.asarray([(folder / file).stat().st_size for file in files])
    return columns | {"files": _packed(files), "bytes": sizes, "names": _packed(names), "labels": np.asarray(labels)}


def save(folder: Path, columns: dict[str, np.ndarray], classes: list[str]) -> None:
    """Store the table; several processes may do so at once."""
    for name in (CLASSES, TABLE):
        beside = folder / f".{os.getpid()}-{name}"
        with open(beside, "wb") as file:
            np.savez(file, **columns) if name == TABLE else file.write(json.dumps(classes).encode())
        beside.replace(folder / name)


def _packed(texts: Sequence[str]) -> np.ndarray:
    return np.frombuffer("".join(f"{text}\0" for text in texts).encode(), np.uint8)


def _unpacked(packed: np.ndarray) -> list[str]:
    return packed.tobytes().decode().split("\0")[:-1]


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
