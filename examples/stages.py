"""How many images a second each stage of training can process, and which one is the limit: `imagenet.py --stages`."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from photographs import Photographs
from shard_files import ShardFiles
from torch import Tensor, nn

SECONDS = 3.0


def stages(
    data: Photographs,
    loader: Iterable[Any],
    collate: Callable[[Any], Any],
    views: Callable[[Tensor], Any],
    model: nn.Module,
    criterion: nn.Module,
    amp: AbstractContextManager,
    device: torch.device,
) -> dict[str, float]:
    """Stage -> images a second, each measured alone for seconds; "loader" is read, decode and collate together."""
    files = data.files
    batch = next(iter(loader))[0]
    size = len(batch)

    def rate(step: Callable[[int], int]) -> float:
        step(0)  # warm
        _wait(device)
        started, done, k = time.perf_counter(), 0, 0
        while time.perf_counter() - started < SECONDS or not done:
            k += 1
            done += step(k)
        _wait(device)
        return done / (time.perf_counter() - started)

    def read(k: int) -> int:
        k %= len(files)
        files.stored(k) if isinstance(files, ShardFiles) else Path(files.samples[k][0]).read_bytes()
        return 1

    def decode(k: int) -> int:
        collate([files[k % len(files)], files[(k + 1) % len(files)]])
        return 2

    made = views(batch.to(device))

    def draw(k: int) -> int:
        views(batch.to(device, non_blocking=True))
        return size

    @torch.no_grad()
    def forward(k: int) -> int:
        with amp:
            model(made)
        return size

    def both(k: int) -> int:
        with amp:
            z = model(made)
        criterion(z, made).backward()
        model.zero_grad()
        return size

    def load() -> float:
        batches = iter(loader)
        next(batches)
        started, done = time.perf_counter(), 0
        for images, _, _ in batches:
            done += len(images)
            if time.perf_counter() - started > 2 * SECONDS:
                break
        return done / (time.perf_counter() - started) if done else float("nan")

    found = {"read": rate(read), "decode": rate(decode), "loader": load(), "views": rate(draw)}
    found |= {"forward": rate(forward), "forward and backward": rate(both)}
    return {name: round(value, 1) for name, value in found.items()}


def described(found: dict[str, float], workers: int) -> list[str]:
    """The rates as lines, and the limit of the run: the loader works beside the device, views and network in turn."""
    device = 1 / (1 / found["views"] + 1 / found["forward and backward"])
    if workers:
        total, beside = min(found["loader"], device), "beside"
    else:
        total, beside = 1 / (1 / found["loader"] + 1 / device), "before"
    bound = "the loader" if found["loader"] < device else "views and network"
    lines = [f"{name:>22}  {value:10.1f} images/s" for name, value in found.items()]
    return [
        *lines,
        f"{'a step':>22}  {total:10.1f} images/s, bounded by {bound}; the loader works {beside} the network",
    ]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
