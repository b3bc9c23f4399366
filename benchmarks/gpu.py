"""Everything about the kernels that needs a GPU, in one unattended run of under ten minutes.

    python benchmarks/gpu.py --out docs/benchmarks/gpu    from the root of the repository; needs torch and triton alone
    python benchmarks/gpu.py --out dry --dry              the same stages on a CPU, in the interpreter, at toy sizes

Writes gpu.json (after every stage, so that a run cut short leaves what it has) and table.json: the configurations that
were fastest here, and from which size on "auto" should pick triton. Copy it to kernels/table.json to use it. A stage
that fails says so in the json and the next one runs. Times are CUDA events around forward + backward, after warm-up;
the methods of a shape take turns, and each figure is a median with its quartiles. u = 2 N^2 D operations.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ssd_addon.kernels import launch, negative_lse, off_diagonal_energy, operators, table
from ssd_addon.kernels.operands import scaled_rows
from ssd_addon.kernels.table import Configuration
from ssd_addon.losses import JointEntropyLoss

DEVICE = torch.device("cpu" if DRY else "cuda")
TAU = 0.1
SHAPES = [(64, 16), (96, 32)] if DRY else [(4096, 256), (8192, 2048), (32768, 256), (32768, 2048), (131072, 512)]
AIMS = {(4096, 256): 0.07, (8192, 2048): 0.9, (32768, 256): 2.8, (32768, 2048): 15.0, (131072, 512): 65.0}  # ms
CORRECT = [(40, 13), (64, 16), (70, 24)] if DRY else [(4096, 256), (8191, 2040), (32768, 512)]
WIDTHS = [16] if DRY else [256, 512, 1024, 2048]
SECONDS = 560.0  # of the whole run
REPEATS = 2 if DRY else 100

# Tried for each kernel and width: tile, warps, stages, descriptors, group, registers.
CANDIDATES = [
    (128, 128, 64, 8, 3, False, 8, 128),
    (128, 128, 64, 8, 4, False, 8, 0),
    (128, 128, 64, 8, 3, True, 8, 128),
    (128, 128, 64, 4, 3, False, 8, 0),
    (64, 128, 64, 4, 4, False, 8, 0),
    (128, 256, 64, 8, 3, False, 8, 0),
    (128, 256, 64, 8, 3, True, 8, 0),
    (128, 128, 128, 8, 2, False, 8, 0),
]
if DRY:
    CANDIDATES = [(16, 16, 16, 4, 2, False, 8, 0), (16, 32, 16, 4, 2, False, 8, 0)]

report: dict[str, Any] = {"stages": {}}


def left() -> float:
    return SECONDS - (time.monotonic() - STARTED)


def synchronise() -> None:
    if not DRY:
        torch.cuda.synchronize()


def data(n: int, d: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    """Rows of unit length in instance-major order, two views an image; ids."""
    g = torch.Generator(DEVICE).manual_seed(n + d)
    z = F.normalize(torch.randn(n, d, generator=g, device=DEVICE), dim=1)
    return z.to(dtype), torch.arange(n, device=DEVICE, dtype=torch.int32) // 2


def clock(f: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    if DRY:
        start = time.perf_counter()
        f()
        return 1000 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def times(methods: dict[str, Callable[[], Any]], seconds: float = 4.0, most: int = 50) -> dict[str, dict[str, float]]:
    """Median and quartiles per method, which take turns; a method that fails says why."""
    found: dict[str, list[float]] = {}
    result: dict[str, Any] = {}
    for name, f in list(methods.items()):
        try:
            for _ in range(1 if DRY else 3):
                f()
            synchronise()
            found[name] = []
        except Exception as e:
            result[name] = {"failed": f"{type(e).__name__}: {str(e)[:300]}"}
            release()
    until = time.monotonic() + (0.0 if DRY else seconds)
    for repeat in range(2 if DRY else most):
        for name in found if repeat % 2 == 0 else reversed(list(found)):
            found[name].append(clock(methods[name]))
        if time.monotonic() > until and repeat >= 4:
            break
    for name, ms in found.items():
        low, middle, high = statistics.quantiles(ms, n=4)
        result[name] = {"ms": middle, "low": low, "high": high, "n": len(ms)}
    return result


def release() -> None:
    if not DRY:
        try:
            torch.cuda.empty_cache()
        except Exception as e:  # after a fault of the device nothing works any more in this process
            report["device_fault"] = str(e)[:300]


def peak(f: Callable[[], Any]) -> float:
    """MiB beside what is allocated already and the gradient."""
    if DRY:
        f()
        return math.nan
    leaf = getattr(f, "leaf", None)
    gradient = 0
    if leaf is not None:
        leaf.grad, gradient = None, leaf.numel() * leaf.element_size()
    release()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    synchronise()
    return (torch.cuda.max_memory_allocated() - before - gradient) / 2**20


def stage(f: Callable[[], Any]) -> None:
    name = f.__name__
    begin = time.monotonic()
    entry: dict[str, Any] = {}
    if left() < 5:
        entry["skipped"] = "the time was used up"
    else:
        try:
            entry["result"] = f()
        except Exception as e:
            entry |= {"failed": f"{type(e).__name__}: {str(e)[:500]}", "where": traceback.format_exc()[-1500:]}
    entry["seconds"] = round(time.monotonic() - begin, 1)
    report["stages"][name] = entry
    write()
    release()
    state = next((k for k in ("failed", "skipped") if k in entry), "done")
    print(f"{name}: {state}, {entry['seconds']} s, {left():.0f} s left", flush=True)
    if "failed" in entry:
        print("   ", entry["failed"], flush=True)


OUT = Path()


def write() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------- methods


def ours(z: Tensor, ids: Tensor, tau: float = TAU, **options: Any) -> Tensor:
    return negative_lse(z, ids, tau, backend="triton", validate=False, **options).mean()


def eager(z: Tensor, ids: Tensor) -> Tensor:
    """The readable formula in 16 bit: product in the type of z, the rest in float32."""
    s = (z @ z.T).float() / TAU
    return s.masked_fill(ids[:, None] == ids[None, :], -math.inf).logsumexp(dim=1).mean()


def ntxent(z: Tensor, ids: Tensor) -> Tensor:
    """NT-Xent as lightly computes it: two views, all similarities without the diagonal, cross entropy."""
    n = len(z)
    a, b = z[0::2], z[1::2]
    z = torch.cat([a, b])
    s = (z @ z.T).float() / TAU
    s = s[~torch.eye(n, dtype=torch.bool, device=z.device)].view(n, n - 1)
    labels = torch.arange(n // 2, device=z.device)
    return F.cross_entropy(s, torch.cat([labels + n // 2 - 1, labels]))


def step(f: Callable[[Tensor, Tensor], Tensor], z: Tensor, ids: Tensor) -> Callable[[], Any]:
    leaf = z.detach().requires_grad_()

    def run() -> None:
        leaf.grad = None
        f(leaf, ids).backward()

    run.leaf = leaf  # type: ignore[attr-defined]
    return run


# ------------------------------------------------------------------------------------------------- stages


def machine() -> dict[str, Any]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    found |= {"addmm_out_dtype": hasattr(torch.ops.aten.addmm, "dtype_out")}
    if not DRY:
        p = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": p.name,
            "memory_GiB": round(p.total_memory / 2**30, 1),
            "multiprocessors": p.multi_processor_count,
        }
        found |= {"cuda": torch.version.cuda, "architecture": table.architecture(DEVICE)}
        try:
            query = [
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit",
                "--format=csv,noheader",
            ]
            found["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
        except Exception as e:
            found["nvidia-smi"] = str(e)
    report["machine"] = found
    return found


def correctness() -> list[dict[str, Any]]:
    """Against float64, at three real sizes, with random cotangents; what is allowed is docs' error budget."""
    found = []
    for n, d in CORRECT:
        for tau, prefix in ((0.1, None), (0.1, d // 3 // 8 * 8 or 4), (0.01, None)):
            z, ids = data(n, d)
            cotangent = torch.randn((n,) if prefix is None else (n, 2), device=DEVICE, dtype=torch.float64)
            results = []
            for backend, dtype in (("streaming", torch.float64), ("triton", torch.float16)):
                leaf = z.to(dtype).requires_grad_()
                t = torch.tensor(tau, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=DEVICE)
                t.requires_grad_()
                lse = negative_lse(leaf, ids, t, prefix=prefix, backend=backend)
                grads = torch.autograd.grad((lse * cotangent.to(lse.dtype)).sum(), (leaf, t))
                results.append([lse.detach().double(), *(g.double() for g in grads)])
            (lse, dz, dtau), (lse_, dz_, dtau_) = results
            r = {"N": n, "D": d, "tau": tau, "prefix": prefix, "lse": (lse_ - lse).abs().max().item()}
            r |= {"dz": ((dz_ - dz).norm() / dz.norm()).item(), "finite": bool(dz_.isfinite().all())}
            r["dtau"] = ((dtau_ - dtau).abs() / (dtau.abs() + dz.norm() / tau)).item()
            r["ok"] = r["finite"] and r["lse"] < 3e-4 / tau and r["dz"] < 2e-3 and r["dtau"] < 2e-3
            found.append(r)
            release()
    found += [other_paths()]
    n, d = (40, 24) if DRY else (2048, 4096)
    for cross, rows in ((False, n), (True, n), (False, 4 * d), (True, 4 * d)):
        x = torch.randn(rows, d, device=DEVICE)
        y = x + torch.randn_like(x) if cross else None
        want = off_diagonal_energy(x.double(), None if y is None else y.double(), backend="streaming").item()
        got = off_diagonal_energy(x, y, backend="triton").item()
        error = abs(got - want) / want
        found.append(
            {"energy": "cross" if cross else "symmetric", "N": rows, "D": d, "error": error, "ok": error < 2e-3}
        )
    if not all(r["ok"] for r in found):
        report["wrong"] = [r for r in found if not r["ok"]]
    return found


def other_paths() -> dict[str, Any]:
    """Two fp16 parts, float32 and bfloat16 rows, and the rectangle that a rank computes."""
    n, d = CORRECT[1]
    z, ids = data(n, d)
    exact = negative_lse(z.double(), ids, 0.005, backend="streaming")
    r: dict[str, Any] = {"split": (negative_lse(z, ids, 0.005, backend="triton") - exact).abs().max().item()}
    want = negative_lse(z, ids, TAU, backend="triton")
    r["float32"] = (negative_lse(z.float(), ids, TAU, backend="triton") - want).abs().max().item()
    b = z.bfloat16()
    b_want = negative_lse(b.double(), ids, TAU, backend="streaming")
    r["bfloat16"] = (negative_lse(b, ids, TAU, backend="triton") - b_want).abs().max().item()
    one, tau = torch.ones((), device=DEVICE), torch.tensor(TAU, device=DEVICE)
    x, g = scaled_rows(z, one, exact=False), torch.ones(1, n, device=DEVICE)
    lse = operators.lse_rows(x, None, ids, ids, tau, one, 0, False)
    r["rectangle"] = (operators.lse_rows(x, x.clone(), ids, ids, tau, one, 0, False) - lse).abs().max().item()
    dx = operators.lse_rows_grad(x, None, ids, ids, tau, one, lse, lse, g, g, 0, False)
    other = operators.lse_rows_grad(x, x.clone(), ids, ids, tau, one, lse, lse, g, g, 0, False)
    r["rectangle, gradient"] = ((other - dx).norm() / dx.norm()).item()
    r["ok"] = r["split"] < 2e-3 and r["float32"] < 1e-3 and r["bfloat16"] < 3e-3 and r["rectangle"] < 1e-4
    r["ok"] = r["ok"] and r["rectangle, gradient"] < 2e-3
    return r


def determinism() -> dict[str, Any]:
    """The same bits, however often it is computed."""
    found = {}
    for n, d in CORRECT[:2]:
        z, ids = data(n, d)
        first, differing = None, 0
        for _ in range(REPEATS):
            leaf = z.detach().requires_grad_()
            lse = negative_lse(leaf, ids, TAU, backend="triton", validate=False)
            bits = (lse.detach(), torch.autograd.grad(lse.sum(), leaf)[0])
            first = first or bits
            differing += not all(torch.equal(a, b) for a, b in zip(first, bits, strict=True))
        found[f"{n}, {d}"] = {"repeats": REPEATS, "differing": differing}
    return found


def sanitizer() -> Any:
    """compute-sanitizer on a small case, in a process of its own."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return "compute-sanitizer is not installed"
    found = {}
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "7", sys.executable, __file__, "--small-case"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=min(75, max(left() - 60, 10)))
            found[kind] = {"rc": done.returncode, "tail": (done.stdout + done.stderr)[-600:]}
        except subprocess.TimeoutExpired:
            found[kind] = "ran out of time"
    return found


def tuning() -> dict[str, Any]:
    """The fastest tile per kernel and width, on the arithmetic that the loss does most of: the triangle."""
    found: dict[str, Any] = {}
    own: dict[str, dict[str, list[Any]]] = {}
    n = 64 if DRY else 8192
    whole = table.configuration
    budget = min(150.0, left() / 2)
    begin = time.monotonic()
    for mode in ("sums", "weights"):
        for d in WIDTHS:
            z, ids = data(n, d)
            one, tau = torch.ones((), device=DEVICE), torch.tensor(TAU, device=DEVICE)
            x = scaled_rows(z, one, exact=False)

            def sums() -> Tensor:
                return operators.lse_rows(x, None, ids, ids, tau, one, 0, False)

            lse = sums()
            g = torch.full_like(lse, 1.0)

            def weights() -> Tensor:
                return operators.lse_rows_grad(x, None, ids, ids, tau, one, lse, lse, g, g, 0, False)

            right = weights()
            tried = []
            for values in CANDIDATES:
                if time.monotonic() - begin > budget:
                    break
                c = Configuration(*values)
                table.configuration = lambda *_, c=c: c  # type: ignore[misc, assignment]
                try:
                    result = times({"t": sums if mode == "sums" else weights}, 0.3, 15)
                    if "ms" in result["t"]:  # only what computes the same may be fast
                        if mode == "sums":
                            off = (sums() - lse).abs().max().item()
                        else:
                            off = ((weights() - right).norm() / right.norm()).item()
                        if not off < 1e-3:
                            result["t"] = {"failed": f"differs by {off}"}
                finally:
                    table.configuration = whole
                tried.append({"configuration": list(values), **result["t"]})
            worked = [t for t in tried if "ms" in t]
            if worked:
                best = min(worked, key=lambda t: t["ms"])
                own.setdefault(mode, {})[str(d)] = best["configuration"]
            found[f"{mode}, {d}"] = tried
    for buckets in own.values():
        last = max(buckets, key=int)
        buckets["inf"] = buckets.pop(last)
    report["table"] = own
    if own and not DRY:
        mine = table.table()["configurations"].setdefault(table.architecture(DEVICE), {})
        mine |= own  # the stages after this one run with what was found
    return found


def blocks() -> dict[str, Any]:
    """How many rows a block of W should have."""
    found = {}
    whole = launch.block_rows
    for n, d in SHAPES[:1] if DRY else [(8192, 2048), (32768, 256), (32768, 2048)]:
        z, ids = data(n, d)
        for rows in (2048, 4096, 8192, 16384):
            launch.block_rows = lambda d, unit, rows=rows: rows  # type: ignore[assignment, misc]
            try:
                found[f"{n}, {d}, {rows}"] = times({"t": step(ours, z, ids)}, 1.0, 20)["t"]
            finally:
                launch.block_rows = whole
        release()
    return found


def speed() -> list[dict[str, Any]]:
    """The five shapes beside their peers, forward + backward: time, memory, rate."""
    found = []
    report["speed"] = found  # as far as it came
    compiled = torch.compile(eager, dynamic=False) if not DRY else eager
    try:
        from inf_cl import cal_inf_loss

        def infcl(z: Tensor, ids: Tensor) -> Tensor:
            return cal_inf_loss(
                z[0::2].contiguous(), z[1::2].contiguous(), scale=torch.tensor(1 / TAU, device=z.device)
            )

    except Exception as e:
        infcl = None  # type: ignore[assignment]
        report["inf_cl"] = f"not importable: {type(e).__name__}"
    for n, d in SHAPES:
        if left() < 60:
            found.append({"N": n, "D": d, "skipped": "the time was used up"})
            continue
        z, ids = data(n, d)
        methods = {"ours": step(ours, z, ids)}
        room = n * n * 4 * 5  # bytes that a matrix in float32 and its kin take
        if DRY or room < 0.8 * torch.cuda.get_device_properties(0).total_memory:
            methods |= {
                "eager": step(eager, z, ids),
                "torch.compile": step(compiled, z, ids),
                "NT-Xent": step(ntxent, z, ids),
            }
        methods["streaming"] = step(lambda z, ids: negative_lse(z, ids, TAU, backend="streaming").mean(), z, ids)
        if infcl is not None:
            methods["Inf-CL"] = step(infcl, z, ids)
        result: dict[str, Any] = {"N": n, "D": d, "aim_ms": AIMS.get((n, d)), "times": times(methods, 8.0)}
        result["memory_MiB"] = {k: peak(f) for k, f in methods.items() if "ms" in result["times"][k]}
        u = 2 * n * n * d
        for name, t in result["times"].items():
            if "ms" in t:
                t |= {"TFLOPs_2u": 2 * u / t["ms"] / 1e9, "TFLOPs_3u": 3 * u / t["ms"] / 1e9}
                if name != "ours" and "ms" in result["times"]["ours"]:
                    t["over_ours"] = t["ms"] / result["times"]["ours"]["ms"]
        product = {"matmul": lambda z=z: z[: min(n, 16384)] @ z.T}
        result["matmul_TFLOPs"] = (
            2 * min(n, 16384) * n * d / times(product, 1.0, 10)["matmul"].get("ms", math.nan) / 1e9
        )
        if "ms" in result["times"].get("Inf-CL", {}):
            result["note"] = "Inf-CL computes one direction of N/2 x N/2 similarities, a quarter of the entries"
        found.append(result)
        write()
        print(
            f"    {n}, {d}: " + ", ".join(f"{k} {t.get('ms', math.nan):.3f}" for k, t in result["times"].items()),
            flush=True,
        )
        release()
    return found


def covariance() -> list[dict[str, Any]]:
    found = []
    for n, d in [(20, 48)] if DRY else [(1024, 4096), (4096, 8192), (4096, 2048)]:
        x = torch.randn(n, d, device=DEVICE).half()
        methods = {
            b: step(lambda x, _, b=b: off_diagonal_energy(x, backend=b) / d, x, x)
            for b in ("triton", "streaming", "eager")
        }
        found.append(
            {"N": n, "D": d, "times": times(methods, 2.0), "memory_MiB": {k: peak(f) for k, f in methods.items()}}
        )
    return found


def crossing() -> dict[str, Any]:
    """From how many rows on triton is faster than eager and streaming, checks included as users run them."""
    found: dict[str, Any] = {}
    auto = {}
    for d in WIDTHS:
        smallest = None
        for n in (64, 128) if DRY else (512, 1024, 2048, 4096, 8192):
            z, ids = data(n, d)
            methods = {
                b: step(lambda z, ids, b=b: negative_lse(z, ids, TAU, backend=b).mean(), z, ids)
                for b in ("triton", "eager", "streaming")
            }
            t = times(methods, 0.6, 20)
            found[f"{n}, {d}"] = t
            faster = "ms" in t["triton"] and all(
                t["triton"]["ms"] < o["ms"] for k, o in t.items() if "ms" in o and k != "triton"
            )
            smallest = (smallest or n) if faster else None
        auto[str(d)] = smallest or 10**18  # a width where it lost must not fall into the next one's bucket
    if auto:
        auto["inf"] = auto.pop(max(auto, key=int))
    report["auto"] = auto
    return found


def training_step() -> dict[str, Any]:
    """JointEntropyLoss of three spaces under autocast, and the kernels in a CUDA graph."""
    b = 16 if DRY else 4096
    spaces = {"content": 16, "color": 8, "spatial": 8} if DRY else {"content": 1024, "color": 256, "spatial": 256}
    found: dict[str, Any] = {}
    for family in ("simclr", "vicreg", "barlow"):
        z = {n: torch.randn(4, b, d, device=DEVICE, requires_grad=True) for n, d in spaces.items()}

        def run(criterion: JointEntropyLoss, z: dict[str, Tensor] = z) -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16 if DRY else torch.float16):
                loss = criterion(z)
            torch.autograd.grad(loss, list(z.values()))

        criteria = {k: JointEntropyLoss(family, backend=k) for k in ("triton", "streaming")}
        found[f"autocast, {family}"] = times({k: lambda c=c: run(c) for k, c in criteria.items()}, 3.0, 20)
        losses = {k: c(z).item() for k, c in criteria.items()}
        found[f"loss, {family}"] = losses
    if DRY:
        return found
    for n, d in SHAPES[:2]:
        z, ids = data(n, d)
        found[f"graph, {n}, {d}"] = {
            **captured([z], lambda z, ids=ids: negative_lse(z, ids, TAU, backend="triton", validate="auto").mean()),
            "aim_ms": AIMS[n, d],
        }
    z = [torch.randn(4, b, d, device=DEVICE) for d in spaces.values()]
    criterion = JointEntropyLoss("simclr", backend="triton")
    found["graph, JointEntropyLoss"] = captured(z, lambda *z: criterion(dict(zip(spaces, z, strict=True))))
    return found


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
    synchronise()
    differ = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))
    return {**times({"t": graph.replay}, 2.0)["t"], "loss": loss.item(), "gradient_differs": differ}


def colors() -> dict[str, Any]:
    """Instructions on the colors of a batch of views: the kernel beside the torch functions that define it."""
    from ssd_addon.kernels import color_tiles
    from ssd_addon.kernels import colors as table_of_colors

    found: dict[str, Any] = {}
    for n, edge in ((3, 20),) if DRY else ((1024, 64), (1024, 224)):
        g = torch.Generator().manual_seed(n)
        codes = torch.stack([torch.tensor([1, 1, 1, 2])[torch.randperm(4, generator=g)] for _ in range(n)])
        numbers = torch.rand(n, 4, 4, generator=g) * torch.tensor([1.4, 0.4, 0.4, 0.1])
        chain = table_of_colors.Chain(codes, numbers)
        x = torch.rand(n, 3, edge, edge, generator=g).to(DEVICE)
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


def small_case() -> None:
    z, ids = data(300, 72)
    for tau in (0.1, 0.01):
        leaf = z.detach().requires_grad_()
        negative_lse(leaf, ids, tau, prefix=24, backend="triton").sum().backward()
    x = torch.randn(200, 72, device=DEVICE, requires_grad=True)
    off_diagonal_energy(x, backend="triton").backward()
    synchronise()


def write_table() -> None:
    """What was found, over the table that is there; nothing of a run that computed something wrong."""
    wanted = json.loads(table.PATH.read_text())
    right = "wrong" not in report and "result" in report["stages"].get("correctness", {})
    if not DRY and right and "device_fault" not in report:
        arch = table.architecture(DEVICE)
        wanted["configurations"].setdefault(arch, {}).update(report.get("table", {}))
        wanted["auto"][arch] = report.get("auto", {})
        wanted["measured"] = report["machine"]
    (OUT / "table.json").write_text(json.dumps(wanted, indent=1) + "\n")


def main() -> None:
    global OUT, SECONDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "gpu")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run")
    parser.add_argument("--dry", action="store_true", help="on a CPU, in triton's interpreter, at toy sizes")
    parser.add_argument("--small-case", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small_case:
        small_case()
        return
    OUT, SECONDS = args.out, args.seconds
    if not DRY and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: expected a CUDA device: torch sees none (--dry tries the script without one)")
    report["dry"] = DRY
    for f in (machine, correctness, determinism, tuning, speed, training_step, covariance, crossing, blocks, colors):
        if "device_fault" not in report:
            stage(f)
    write_table()
    stage(sanitizer)  # last, as it may be slow; in a process of its own
    report["seconds"] = round(time.monotonic() - STARTED, 1)
    write()
    bad = [n for n, e in report["stages"].items() if "failed" in e] + ["correctness"] * ("wrong" in report)
    print(
        f"Written to {OUT}: gpu.json, table.json; {report['seconds']} s"
        + (f"; FAILED: {', '.join(bad)}" if bad else "")
    )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
