"""Write photographs into shards: large files of many photographs, which network file systems read much faster.

    python examples/shards.py DIR OUT --format webdataset      # or litdata, which needs `pip install litdata`
    python examples/imagenet.py --data OUT --out runs/mine

DIR holds class folders, or train/ and val/ with class folders. OUT gets the unchanged bytes of every file, its class
and its name: .tar files for WebDataset (KEY.jpg, KEY.cls, KEY.name), or chunks for litdata (samples {"image", "label",
"name"}), with classes.json and samples.npz, which has the place and the checksum of each photograph. The photographs
are put into shards in random order, so that a few shards are a sample of all classes.

`ShardFiles(OUT)` is a data set for any loop: samples (PIL image, label, name) in the order of the original folder.
Samples are read from the shards in any order, so `runs.ResumableSampler` gives the same batches as with folders. .tar
files from other sources work too, if each key has one image and, for labels, a number as .cls. They are listed once,
and samples.npz is stored beside them.
"""

import argparse
import contextlib
import tarfile
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from arguments import count, number
from shard_files import ShardFiles, complete, read_json, save

from ssd_addon._optional import needs
from ssd_addon.files import ImageFiles

Samples = Iterator[tuple[int, bytes, int, str]]  # index, content, class, name


def write(
    files: ImageFiles,
    out: Path,
    kind: Literal["litdata", "webdataset"],
    *,
    shard_bytes: int = 64 * 2**20,
    workers: int = 8,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Write photographs as shards into a new folder, which appears when it is complete.

    Args:
        files: the photographs.
        out: the folder.
        kind: litdata or webdataset.
        shard_bytes: approximate size of a shard.
        workers: threads that read files.
        seed: seed of the order in which they are put into shards.
        say: is called with lines about the progress.

    Raises:
        FileExistsError: the folder is not empty, or an interrupted command has left one.
        OSError: a file that cannot be read.
    """
    part = out.with_name(out.name + ".part")
    if part.exists() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise FileExistsError(f"expected no folder {out}, or an empty one, and no {part.name} beside it: got one")
    if kind == "litdata":
        with needs("shards in litdata's format"):
            import litdata  # noqa: F401
    part.mkdir(parents=True)
    order = np.random.default_rng(seed).permutation(len(files))
    paths, names = files.samples, files.names
    starts, sizes, shards, crc32 = (np.zeros(len(files), np.int64) for _ in range(4))

    def stream() -> Iterator[tuple[int, bytes]]:
        begun = said = time.monotonic()
        total = 0
        for k, (i, data) in enumerate(zip(order.tolist(), _read([paths[i][0] for i in order], workers), strict=True)):
            sizes[i], crc32[i] = len(data), zlib.crc32(data)
            total += len(data)
            yield i, data
            now = time.monotonic()
            if now - said > 5 or k + 1 == len(files):
                rate = (k + 1) / max(now - begun, 1e-9)
                left = timedelta(seconds=round((len(files) - k - 1) / rate))
                say(f"{k + 1} of {len(files)} images  {total / 1e9:.2f} GB  {rate:.0f} images/s  {left} left")
                said = now

    shown = ((i, data, files.targets[i], names[i]) for i, data in stream())
    writer = _write_tars if kind == "webdataset" else _write_chunks
    written = writer(part, shown, shard_bytes, shards, starts)
    columns = {"starts": starts, "sizes": sizes, "shards": shards.astype(np.int32), "crc32": crc32.astype(np.uint32)}
    save(part, complete(part, written, columns, names, files.targets), files.classes)
    if out.exists():
        out.rmdir()
    part.rename(out)


def _write_tars(out: Path, samples: Samples, most: int, shards: np.ndarray, starts: np.ndarray) -> list[str]:
    written: list[str] = []
    with contextlib.ExitStack() as stack:
        tar = None
        for k, (i, data, label, name) in enumerate(samples):
            if tar is None or tar.offset + len(data) > most:
                stack.close()
                written.append(f"shard-{len(written):06d}.tar")
                tar = stack.enter_context(tarfile.open(out / written[-1], "w", format=tarfile.USTAR_FORMAT))
            shards[i], starts[i] = len(written) - 1, tar.offset + tarfile.BLOCKSIZE
            suffix = Path(name).suffix.lower().replace(".jpeg", ".jpg")
            for end, content in ((suffix, data), (".cls", str(label).encode()), (".name", name.encode())):
                member = tarfile.TarInfo(f"{k:09d}{end}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    return written


def _write_chunks(out: Path, samples: Samples, most: int, shards: np.ndarray, starts: np.ndarray) -> list[str]:
    from litdata.streaming import Cache

    cache, order = Cache(str(out), chunk_bytes=most), []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "An item was larger than the target chunk size")
        for k, (i, data, label, name) in enumerate(samples):
            cache[k] = {"image": data, "label": label, "name": name}
            order.append(i)
        cache.done()
    cache.merge()
    chunks = read_json(out / "index.json")["chunks"]
    starts[order] = np.arange(len(order))
    shards[order] = np.repeat(np.arange(len(chunks)), [chunk["chunk_size"] for chunk in chunks])
    return [chunk["filename"] for chunk in chunks]


def _read(paths: Sequence[Path], workers: int) -> Iterator[bytes]:
    """The contents of files, read a few files ahead."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting = deque(pool.submit(path.read_bytes) for path in paths[: 4 * workers + 4])
        for k in range(len(paths)):
            data = waiting.popleft().result()
            if k + 4 * workers + 4 < len(paths):
                waiting.append(pool.submit(paths[k + 4 * workers + 4].read_bytes))
            yield data


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", type=Path, metavar="DIR")
    p.add_argument("out", type=Path, metavar="OUT")
    p.add_argument("--format", choices=("litdata", "webdataset"), required=True)
    p.add_argument("--workers", type=count, default=8, help="threads that read files")
    p.add_argument("--shard-mb", type=number, default=64, help="approximate size of a shard in MiB")
    p.add_argument("--seed", type=count, default=0, help="seed of the order in which photographs are put into shards")
    args = p.parse_args(argv)
    splits = [split for split in ("train", "val") if (args.data / split).is_dir()]
    for split in splits or ["."]:
        files = ImageFiles(args.data / split)
        print(f"{args.data / split}: {len(files)} images, {len(files.classes)} classes", flush=True)
        options = {"shard_bytes": int(args.shard_mb * 2**20), "workers": args.workers, "seed": args.seed}
        write(files, args.out / split, args.format, **options, say=lambda text: print(text, flush=True))
        print(repr(ShardFiles(args.out / split)), flush=True)


if __name__ == "__main__":
    main()
