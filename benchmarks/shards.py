"""How fast photographs are read from a folder and from shards of both formats: images/s of reading and of batches.

    python benchmarks/shards.py --data DIR --out docs/benchmarks

First every byte is compared. Then the sources take turns, each read in the same random order on one thread. Reads from
memory are timed in processor seconds. Reads from disk, for which the system is first asked to drop the files from
memory, are timed by the wall clock. "Few shards at a time" is the order of `runs.ShardSampler` (`imagenet.py
--mix-shards 4`), which requests whole shards.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import litdata
from shard_files import ShardFiles
from shards import write

from ssd_addon.collate import ImageFiles, StructuredCollate
from ssd_addon.runs import ShardSampler

KINDS = ("folder", "webdataset", "litdata")
SIZES = (96, 224)


def drop(folder: Path) -> None:
    """Ask the system to forget the files of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(home: Path, rounds: int) -> dict[str, list[float]]:
    """What was timed -> images/s of every round."""
    found: dict[str, list[float]] = {}
    files = {kind: ImageFiles(home / kind) if kind == "folder" else ShardFiles(home / kind) for kind in KINDS}
    plain = files["folder"]
    n = len(plain)
    for kind in KINDS[1:]:
        if any(files[kind].stored(i) != plain.samples[i][0].read_bytes() for i in range(n)):
            sys.exit(f"{kind}: other bytes than in the folder")

    def timed(name: str, clock: Callable[[], float], do: Callable[[], int]) -> None:
        started = clock()
        done = do()
        found.setdefault(name, []).append(done / (clock() - started))

    def read(some: ImageFiles, order: list[int]) -> int:
        for i in order:
            some.stored(i) if isinstance(some, ShardFiles) else some.samples[i][0].read_bytes()
        return len(order)

    def batches(some: ImageFiles, order: list[int], size: int) -> int:
        collate = StructuredCollate(size)
        some.short_side = size
        for k in range(0, len(order), 50):
            collate([some[i] for i in order[k : k + 50]])
        return len(order)

    for r in range(rounds):
        order = random.Random(r).sample(range(n), n)
        kinds = random.Random(r).sample(KINDS, len(KINDS))
        for kind in kinds:
            timed(f"read|{kind}", time.process_time, lambda: read(files[kind], order))
        for size in SIZES:
            for kind in kinds:
                timed(f"{size}|{kind}", time.process_time, lambda: batches(files[kind], order[:1000], size))
        for kind in kinds:
            drop(home / kind)
            timed(f"cold|{kind}", time.perf_counter, lambda: read(files[kind], order))
            if kind != "folder":
                ahead = ShardFiles(home / kind, ahead=True)
                few = list(ShardSampler(ahead.shards, mixed=4, num_replicas=1, rank=0, seed=r))
                drop(home / kind)
                timed(f"few|{kind}", time.perf_counter, lambda: read(ahead, few))
        print(f"round {r + 1} of {rounds}", flush=True)
    return found


def page(about: dict) -> str:
    """The figures as a page."""
    lines = {
        "read": "read, in memory",
        "96": "read, decode, batches of 96 px",
        "224": "read, decode, batches of 224 px",
        "cold": "read, from disk, random order",
        "few": "read, from disk, few shards at a time",
    }

    def shown(name: str) -> str:
        if name not in about["images/s"]:
            return "-"
        each = about["images/s"][name]
        return f"{statistics.median(each):,.0f} ({min(each):,.0f} - {max(each):,.0f})"

    def gain(name: str, of: str = "cold|folder") -> float:
        return statistics.median(about["images/s"][name]) / statistics.median(about["images/s"][of])

    rows = [f"| {text} | {' | '.join(shown(f'{key}|{kind}') for kind in KINDS)} |" for key, text in lines.items()]
    return "\n".join(
        [
            "<!-- written by benchmarks/shards.py -->",
            "",
            "# Reading photographs from folders and from shards",
            "",
            f"From a disk, WebDataset shards are read {gain('cold|webdataset'):.1f} times as fast as a folder in "
            f"random order, and {gain('few|webdataset'):.1f} times with a few shards at a time. Once photographs are "
            f"decoded, little of that is left ({gain('224|webdataset', '224|folder'):.2f} times at 224 px).",
            "",
            f"The table gives images/s on one thread: the median (and range) of {about['rounds']} rounds in which the "
            f"sources took turns, for {about['images']:,} photographs of {about['kilobytes']:.0f} kB on average, in "
            f"shards of {about['shard MiB']} MiB. The first three rows are per processor second. torch "
            f"{about['torch']}, litdata {about['litdata']}.",
            "",
            "| | folder | WebDataset | litdata |",
            "|---|--:|--:|--:|",
            *rows,
            "",
        ]
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="class folders of photographs")
    p.add_argument("--copies", type=int, default=8, help="how often they are copied, for reading from disk")
    p.add_argument("--shard-mb", type=int, default=16)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        source = ImageFiles(args.data)
        for name, (path, _) in zip(source.names, source.samples, strict=True):
            for k in range(args.copies):
                copy = home / "folder" / Path(name).parent / f"{k}-{path.name}"
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        files = ImageFiles(home / "folder")
        for kind in KINDS[1:]:
            write(files, home / kind, kind, shard_bytes=args.shard_mb * 2**20)
        os.sync()
        bytes_ = sum(path.stat().st_size for path, _ in files.samples)
        about = {"torch": torch.__version__.split("+")[0], "litdata": litdata.__version__, "rounds": args.rounds}
        about |= {"images": len(files), "kilobytes": bytes_ / len(files) / 1000, "shard MiB": args.shard_mb}
        about["images/s"] = measure(home, args.rounds)
    print(page(about))
    if args.out:
        (args.out / "shards.json").write_text(json.dumps(about, indent=1) + "\n")
        (args.out / "shards.md").write_text(page(about))


if __name__ == "__main__":
    main()
