"""How fast the kernels are on this machine, and what is the fastest on it."""

import itertools
import math
import time
from typing import Any

import torch
from torch import Tensor

from gpu_stages import peers
from gpu_stages.here import AIMS, Here, attempt, captured, keep, left, lse, peak, step, times
from ssd_addon.kernels import cache, launch, off_diagonal_energy, table, tune
from ssd_addon.kernels.dispatch import rows_for_triton
from ssd_addon.losses import JointEntropyLoss


def tune_() -> dict[str, Any]:
    """What `python -m ssd_addon tune` does, with twice its time; the stages after it run with what it found."""
    seconds = min(600.0 if Here.rehearsal else 125.0, left() * (1 if Here.rehearsal else 0.4))
    report = tune.measure(Here.device, Here.plan, seconds=seconds, say=lambda line: print("   ", line, flush=True))
    file = cache.save((Here.plan or tune.REHEARSAL).gpu, report.record)
    return {"record": report.record, "candidates": report.candidates, "backends": report.backends, "file": file.name}


def variants() -> dict[str, Any]:
    """Every kernel alone, with the tiles that it has now, in a CUDA graph: milliseconds and TFLOP/s of its u / 2."""
    found: dict[str, Any] = {}
    plan = Here.plan or tune.REHEARSAL
    with tune.shrunk(plan):
        for d, mode in itertools.product(plan.widths[:1] if Here.rehearsal else (256, 2048), tune.MODES):
            own = cache.of_device(Here.device)
            tiles = None if own is None else own["configurations"]
            c = table.configuration(plan.gpu.architecture, mode, d, tiles)
            entry = {"configuration": list(c), **tune.Step(Here.device, plan, mode, d).timed(c, products=False)}
            if "ms" in entry and mode != "products":
                entry["TFLOPs"] = plan.rows**2 * d / entry["ms"] / 1e9
            found[f"{mode}, {plan.rows}, {d}"] = entry
            tune.release(Here.device)
    return found


def speed() -> list[dict[str, Any]]:
    """The six shapes beside their peers, forward + backward: time, memory, rate."""
    found: list[dict[str, Any]] = []
    until = time.time() + 150
    compiled = peers.eager if Here.rehearsal else torch.compile(peers.eager, dynamic=False)
    for n, d in Here.shapes:
        if min(left(), until - time.time()) < 20:
            found.append({"N": n, "D": d, "skipped": "the time was used up"})
            continue
        z, ids = tune.rows(Here.device, n, d)
        methods = {"ours": step(lse("triton"), z, ids), "ours, checks": step(lse("triton", "auto"), z, ids)}
        room = n * n * 4 * 5  # bytes that a matrix in float32 and its kin take
        if Here.rehearsal or room < 0.8 * torch.cuda.get_device_properties(0).total_memory:
            dense = {"eager": peers.eager, "torch.compile": compiled, "NT-Xent": peers.ntxent}
            methods |= {name: step(f, z, ids) for name, f in dense.items()}
        methods["streaming"] = step(lse("streaming"), z, ids)
        methods |= {name: step(f, *inputs) for name, (f, inputs) in peers.of_shape(z).items()}
        result: dict[str, Any] = {"N": n, "D": d, "aim_ms": AIMS.get((n, d)), "times": times(methods, 8.0)}
        result["memory_MiB"] = {k: peak(f) for k, f in methods.items() if "ms" in result["times"][k]}
        u = 2 * n * n * d
        ours = result["times"]["ours"].get("ms")
        for t in result["times"].values():
            if "ms" in t:
                t |= {"TFLOPs_2u": 2 * u / t["ms"] / 1e9, "over_ours": t["ms"] / ours if ours else None}
        result["graph"] = attempt(lambda z=z, ids=ids: captured([z], lambda z: lse("triton")(z, ids)))
        product = times({"matmul": lambda z=z: z[: min(n, 16384)] @ z.T}, 0.5, 10)["matmul"]
        result["matmul_TFLOPs"] = 2 * min(n, 16384) * n * d / product.get("ms", math.nan) / 1e9
        found.append(result)
        told = ", ".join(f"{k} {told_of(t)}" for k, t in result["times"].items())
        print(f"    {n}, {d}: {told}", flush=True)
        keep("speed", found)
        del methods
        tune.release(Here.device)
    return found


def told_of(t: dict[str, Any]) -> str:
    """Milliseconds, or the kind of error."""
    return f"{t['ms']:.3f}" if "ms" in t else str(t["failed"]).partition(":")[0]


def chosen() -> dict[str, Any]:
    """What "auto" takes for embeddings in fp16, and whether that is the fastest of what it may take."""
    found: dict[str, Any] = {}
    sizes = ((64,), (16,)) if Here.rehearsal else ((2048, 4096, 8192, 16384), (256, 1024))
    for n, d in itertools.product(*sizes):
        z, ids = tune.rows(Here.device, n, d)
        names = ("auto", "triton", "streaming", "eager")
        options = {"came_as": z.dtype, "prefix": 0, "rows": n}
        entry: dict[str, Any] = {"triton_from": rows_for_triton("auto", Here.device, d, **options)}
        found[f"{n}, {d}"] = entry | {"times": times({b: step(lse(b, "auto"), z, ids) for b in names}, 1.0, 20)}
    return found


def covariance() -> list[dict[str, Any]]:
    found = []
    for n, d in [(20, 48)] if Here.rehearsal else [(1024, 4096), (4096, 8192), (4096, 2048)]:
        x = torch.randn(n, d, device=Here.device).half()
        methods = {
            b: step(lambda x, _, b=b: off_diagonal_energy(x, backend=b) / d, x, x)
            for b in ("triton", "streaming", "eager")
        }
        found.append(
            {"N": n, "D": d, "times": times(methods, 2.0), "memory_MiB": {k: peak(f) for k, f in methods.items()}}
        )
    return found


def blocks() -> dict[str, Any]:
    """How many rows a block of W should have."""
    found = {}
    whole = launch.block_rows
    for n, d in Here.shapes[:1] if Here.rehearsal else [(8192, 2048), (32768, 256), (32768, 2048)]:
        z, ids = tune.rows(Here.device, n, d)
        for rows in (2048, 4096, 8192, 16384):
            launch.block_rows = lambda *_, rows=rows: rows  # type: ignore[misc]
            try:
                found[f"{n}, {d}, {rows}"] = times({"t": step(lse("triton"), z, ids)}, 1.0, 20)["t"]
            finally:
                launch.block_rows = whole
    return found


def training_step() -> dict[str, Any]:
    """JointEntropyLoss of three spaces under autocast, and the kernels in a CUDA graph."""
    b = 16 if Here.rehearsal else 4096
    spaces = (
        {"content": 16, "color": 8, "spatial": 8} if Here.rehearsal else {"content": 1024, "color": 256, "spatial": 256}
    )
    found: dict[str, Any] = {}
    for family in ("simclr", "vicreg", "barlow"):
        z = {n: torch.randn(4, b, d, device=Here.device, requires_grad=True) for n, d in spaces.items()}

        def run(criterion: JointEntropyLoss, z: dict[str, Tensor] = z) -> None:
            with torch.autocast(Here.device.type, torch.bfloat16 if Here.rehearsal else torch.float16):
                loss = criterion(z)
            torch.autograd.grad(loss, list(z.values()))

        criteria = {k: JointEntropyLoss(family, backend=k) for k in ("triton", "streaming")}
        found[f"autocast, {family}"] = times({k: lambda c=c: run(c) for k, c in criteria.items()}, 3.0, 20)
        losses = {k: c(z).item() for k, c in criteria.items()}
        found[f"loss, {family}"] = losses
    if Here.rehearsal:
        return found
    for n, d in Here.shapes[:2]:
        z, ids = tune.rows(Here.device, n, d)
        f = lse("triton", "auto")
        graph = attempt(lambda z=z, ids=ids, f=f: captured([z], lambda z: f(z, ids)))
        found[f"graph, {n}, {d}"] = {**graph, "aim_ms": AIMS[n, d]}
    z = [torch.randn(4, b, d, device=Here.device) for d in spaces.values()]
    criterion = JointEntropyLoss("simclr", backend="triton")
    found["graph, JointEntropyLoss"] = attempt(
        lambda: captured(z, lambda *z: criterion(dict(zip(spaces, z, strict=True))))
    )
    return found


def colors() -> dict[str, Any]:
    """Instructions on the colors of a batch of views: the kernel beside the torch functions that define it."""
    from ssd_addon.kernels import color_tiles
    from ssd_addon.kernels import colors as table_of_colors

    found: dict[str, Any] = {}
    for n, edge in ((3, 20),) if Here.rehearsal else ((1024, 64), (1024, 224)):
        g = torch.Generator().manual_seed(n)
        codes = torch.stack([torch.tensor([1, 1, 1, 2])[torch.randperm(4, generator=g)] for _ in range(n)])
        numbers = torch.rand(n, 4, 4, generator=g) * torch.tensor([1.4, 0.4, 0.4, 0.1])
        chain = table_of_colors.Chain(codes, numbers)
        x = torch.rand(n, 3, edge, edge, generator=g).to(Here.device)
        got = color_tiles.colors(x.clone(), codes, numbers)
        want = table_of_colors.run(chain, x.cpu())
        differ = (got.cpu() - want).abs()
        made = {
            "triton": lambda x=x: color_tiles.colors(x, codes, numbers),
            "torch": lambda x=x: table_of_colors.run_in_torch(chain, x),
            "copy": lambda x=x: x.clone(),
        }
        worst = {"largest_difference": differ.max().item(), "share_above_1e-4": (differ > 1e-4).float().mean().item()}
        found[f"{n} of {edge} px"] = {**worst, **times(made, 2.0)}
    return found
