"""Where and at what sizes the stages work, and how they measure."""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssd_addon.kernels import choice, negative_lse, timing, tune

TAU = 0.1
AIMS = {
    (4096, 256): 0.07, (8192, 2048): 0.9, (32768, 256): 2.8, (32768, 2048): 15.0, (131072, 512): 65.0,
    (65536, 768): 22.5,
}  # fmt: skip
"""Milliseconds of forward + backward on an H100, by N, D."""


class Here:
    """Where and at what sizes this process works; `set_up` fills it."""

    device = torch.device("cuda")
    rehearsal = False
    out = Path()
    until = math.inf
    shapes: ClassVar = list(AIMS)
    correct: ClassVar = [(4096, 256), (8191, 2040), (32768, 512)]
    repeats = 100
    plan: tune.Plan | None = None


def set_up(out: Path, until: float, rehearsal: bool) -> None:
    Here.out, Here.until, Here.rehearsal = out, until, rehearsal
    if rehearsal:
        Here.device, Here.repeats = torch.device("cpu"), 2
        Here.shapes, Here.correct = [(64, 16), (96, 32)], [(40, 13), (64, 16), (70, 24)]
        Here.plan = dataclasses.replace(tune.REHEARSAL, rows=24, widths=(8,), sizes=(32,), repeats=(1, 1))
    else:
        Here.plan = tune.Plan(choice.gpu_of(Here.device))


def left() -> float:
    return Here.until - time.time()


def synchronize() -> None:
    if not Here.rehearsal:
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ measuring


def times(methods: dict[str, Callable[[], Any]], seconds: float = 4.0, most: int = 50) -> dict[str, dict[str, Any]]:
    """Median and quartiles per method, which take turns; a method that fails says why."""
    found: dict[str, list[float]] = {}
    result: dict[str, Any] = {}
    for name, f in methods.items():
        try:
            for _ in range(1 if Here.rehearsal else 3):
                f()
            synchronize()
            found[name] = []
        except Exception as error:
            result[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            tune.release(Here.device)
    until = time.monotonic() + (0.0 if Here.rehearsal else seconds)
    for repeat in range(2 if Here.rehearsal else most):
        for name in found if repeat % 2 == 0 else reversed(list(found)):
            found[name].append(timing.once(methods[name], Here.device))
        if time.monotonic() > until and repeat >= 4:
            break
    for name, ms in found.items():
        low, middle, high = statistics.quantiles(ms, n=4)
        result[name] = {"ms": middle, "low": low, "high": high, "n": len(ms)}
    return {name: result[name] for name in methods}


def peak(f: Callable[[], Any]) -> float:
    """MiB beside what is allocated already and the gradients."""
    if Here.rehearsal:
        f()
        return math.nan
    leaves = getattr(f, "leaves", ())
    for leaf in leaves:
        leaf.grad = None
    tune.release(Here.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    synchronize()
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves if leaf.grad is not None)
    return (torch.cuda.max_memory_allocated() - before - gradients) / 2**20


def step(f: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], Any]:
    """Forward and backward of f, whose floating-point tensors are leaves."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        f(*leaves).backward()

    call.leaves = [t for t in leaves if t.requires_grad]  # type: ignore[attr-defined]
    return call


def lse(backend: Any, validate: Any = False, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, ids: negative_lse(z, ids, TAU, backend=backend, validate=validate, **options).mean()


def attempt(f: Callable[[], Any]) -> Any:
    """What f returns, or why it does not."""
    if Here.rehearsal:
        return "not in a rehearsal"
    try:
        return f()
    except Exception as error:
        tune.release(Here.device)
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def keep(name: str, found: Any) -> None:
    """What a stage has so far: it stays where the stage is stopped."""
    (Here.out / "parts" / f"{name}.partial").write_text(json.dumps(found))


def captured(inputs: list[Tensor], f: Callable[..., Tensor]) -> dict[str, Any]:
    """Forward and backward of f in a CUDA graph: time of a replay, and whether it gives what the plain step gives."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            want = torch.autograd.grad(f(*leaves), leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = f(*leaves)
        got = torch.autograd.grad(loss, leaves)
    graph.replay()
    synchronize()
    differ = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))
    return {**times({"t": graph.replay}, 2.0)["t"], "loss": loss.item(), "gradient_differs": differ}
