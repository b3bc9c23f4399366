"""Timing for `tune` and benchmarks/gpu.py: recorded launches of a kernel in a CUDA graph, and complete steps."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssd_addon.kernels import launch, table, tiles
from ssd_addon.kernels.table import Configuration


def rows(device: torch.device, n: int, width: int) -> tuple[Tensor, Tensor]:
    """L2-normalized embeddings in float16, two per image, and their ids."""
    g = torch.Generator(device).manual_seed(n + width)
    z = torch.randn(n, width, generator=g, device=device)
    return torch.nn.functional.normalize(z, dim=1).half(), torch.arange(n, device=device, dtype=torch.int32) // 2


def clocked(
    f: Callable[[], Any], device: torch.device, repeats: tuple[int, int] = (3, 30), seconds: float = 0.3
) -> float:
    """Median time of f in milliseconds, after three untimed calls."""
    return statistics.median(timings(f, device, repeats, seconds))


def timings(f: Callable[[], Any], device: torch.device, repeats: tuple[int, int], seconds: float) -> list[float]:
    """Times of calls in milliseconds: at least repeats[0] and at most repeats[1] calls, for about `seconds`."""
    for _ in range(min(3, repeats[0])):
        f()
    found: list[float] = []
    until = time.monotonic() + seconds
    while len(found) < repeats[0] or (len(found) < repeats[1] and time.monotonic() < until):
        found.append(once(f, device))
    return found


def once(f: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        f()
        return 1000 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    f()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


class _Recorder:
    """Replaces a kernel: launches it and stores the launch."""

    def __init__(self, kernel: Any, kept: list[Callable[[], Any]]) -> None:
        self.kernel, self.kept = kernel, kept

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launched(*args: Any, **options: Any) -> Any:
            self.kept.append(lambda: self.kernel[grid](*args, **options))
            return self.kernel[grid](*args, **options)

        return launched


@contextlib.contextmanager
def recorded(kernels: Sequence[str], products: bool = False) -> Iterator[list[Callable[[], Any]]]:
    """The launches of these kernels (and the products of `launch.add_product`, in order) as repeatable calls, which
    hold their operands."""
    kept: list[Callable[[], Any]] = []
    with contextlib.ExitStack() as stack:
        for module in (tiles, getattr(launch, "resident", None)):
            for name in kernels:
                if hasattr(module, name):
                    stack.enter_context(replaced(module, name, _Recorder(getattr(module, name), kept)))
        if products and hasattr(launch, "add_product"):
            whole = launch.add_product

            def add(*args: Any) -> None:
                kept.append(lambda: whole(*args))
                whole(*args)

            stack.enter_context(replaced(launch, "add_product", add))
        yield kept


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def replayed(launches: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], Any]:
    """All launches as one call: a CUDA graph, so that host time is not measured."""

    def one_by_one() -> None:
        for launched in launches:
            launched()

    if device.type != "cuda":
        return one_by_one
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        one_by_one()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph):
        one_by_one()
    return graph.replay


@contextlib.contextmanager
def using(configurations: Mapping[str, Mapping[str, Sequence[Any]]]) -> Iterator[None]:
    """Run the kernels with these tiles, by mode and width, and with the table's tiles in other modes."""
    whole = table.configuration

    def configuration(arch: str, mode: str, width: int, own: Any = None) -> Configuration:
        if mode in configurations:
            return Configuration(*table.bucket(dict(configurations[mode]), width))
        return whole(arch, mode, width, own)

    with replaced(table, "configuration", configuration):
        yield


def release(device: torch.device) -> None:
    """Release memory; errors after a device fault are ignored here, as the next step raises them."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()
