"""Whether the kernels compute the right numbers on this machine, the same ones every time."""

import itertools
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from gpu_stages import peers
from gpu_stages.here import TAU, Here, left, synchronize
from ssd_addon.kernels import check, choice, negative_lse, off_diagonal_energy, tune


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"triton": triton.__version__, "addmm_out_dtype": hasattr(torch.ops.aten.addmm, "dtype_out")}
    found["peers"] = peers.importable()
    if Here.rehearsal:
        return found
    gpu = choice.gpu_of(Here.device)
    found |= {"gpu": gpu.name, "memory_GiB": round(gpu.memory / 2**30, 1), "multiprocessors": gpu.multiprocessors}
    found |= {"cuda": gpu.cuda, "architecture": gpu.architecture, "clock_GHz": gpu.clock / 1e9}
    found |= {"peak16_TFLOPs": gpu.peak16 / 1e12, "bandwidth_TBs": gpu.bandwidth / 1e12}
    found["estimated_rows"] = {d: choice.decide(gpu, d, tf32=False) for d in Here.plan.widths} if Here.plan else {}
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except Exception as error:
        found["nvidia-smi"] = str(error)
    return found


def correctness() -> list[dict[str, Any]]:
    """Against float64, at three real sizes, with random cotangents; what is allowed is docs' error budget."""
    found = []
    for n, d in Here.correct:
        for tau, prefix in ((0.1, None), (0.1, d // 3 // 8 * 8 or 4), (0.01, None)):
            z, ids = tune.rows(Here.device, n, d)
            cotangent = torch.randn((n,) if prefix is None else (n, 2), device=Here.device, dtype=torch.float64)
            results = []
            for backend, dtype in (("streaming", torch.float64), ("triton", torch.float16)):
                leaf = z.to(dtype).requires_grad_()
                t = torch.tensor(
                    tau, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=Here.device
                )
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
            tune.release(Here.device)
    found += [other_paths()]
    n, d = (40, 24) if Here.rehearsal else (2048, 4096)
    for cross, rows in ((False, n), (True, n), (False, 4 * d), (True, 4 * d)):
        x = torch.randn(rows, d, device=Here.device)
        y = x + torch.randn_like(x) if cross else None
        want = off_diagonal_energy(x.double(), None if y is None else y.double(), backend="streaming").item()
        got = off_diagonal_energy(x, y, backend="triton").item()
        error = abs(got - want) / want
        found.append(
            {"energy": "cross" if cross else "symmetric", "N": rows, "D": d, "error": error, "ok": error < 2e-3}
        )
    return found


def other_paths() -> dict[str, Any]:
    """Two fp16 parts, float32 and bfloat16 rows, and the rectangle that a rank computes."""
    n, d = Here.correct[1]
    z, ids = tune.rows(Here.device, n, d)
    exact = negative_lse(z.double(), ids, 0.005, backend="streaming")
    r: dict[str, Any] = {"split": (negative_lse(z, ids, 0.005, backend="triton") - exact).abs().max().item()}
    want = negative_lse(z, ids, TAU, backend="triton")
    r["float32"] = (negative_lse(z.float(), ids, TAU, backend="triton") - want).abs().max().item()
    b = z.bfloat16()
    b_want = negative_lse(b.double(), ids, TAU, backend="streaming")
    r["bfloat16"] = (negative_lse(b, ids, TAU, backend="triton") - b_want).abs().max().item()
    r |= rectangle(z, ids)
    r["ok"] = r["split"] < 2e-3 and r["float32"] < 1e-3 and r["bfloat16"] < 3e-3 and r["rectangle"] < 1e-4
    r["ok"] = r["ok"] and r["rectangle, gradient"] < 2e-3
    return r


def rectangle(z: Tensor, ids: Tensor) -> dict[str, float]:
    """What a rank computes, its rows against those of all ranks: a group of this one process, with NCCL on a GPU."""
    results = []
    dist.init_process_group("gloo" if Here.rehearsal else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for group in (None, dist.group.WORLD):
            leaf = z.detach().requires_grad_()
            lse = negative_lse(leaf, ids, TAU, backend="triton", group=group)
            results.append((lse.detach(), torch.autograd.grad(lse.sum(), leaf)[0].float()))
    finally:
        dist.destroy_process_group()
    (lse, dz), (lse_, dz_) = results
    gradient = ((dz_ - dz).norm() / dz.norm()).item()
    return {"rectangle": (lse_ - lse).abs().max().item(), "rectangle, gradient": gradient}


def self_check() -> list[dict[str, Any]]:
    """What users' processes run at first use, with its time: of a fresh kernel, and compiled already."""
    found = []
    with tune.shrunk(Here.plan):
        for width, prefix in [(16, 0), (16, 8)] if Here.rehearsal else itertools.product((256, 768, 2048), (0, 128)):
            begin = time.monotonic()
            problem = check.run(Here.device, width, prefix)
            first = time.monotonic() - begin
            check.run(Here.device, width, prefix)
            again = time.monotonic() - begin - first
            found.append({"D": width, "prefix": prefix, "problem": problem, "first_s": first, "again_s": again})
    if bad := [f for f in found if f["problem"]]:
        raise RuntimeError(f"self-check: {bad}")
    return found


def determinism() -> dict[str, Any]:
    """The same bits, however often it is computed."""
    found = {}
    for (n, d), prefix, tau in itertools.product(Here.correct[:2], (None, 8), (TAU, 0.01)):
        z, ids = tune.rows(Here.device, n, d)
        first, differing = None, 0
        for _ in range(Here.repeats):
            leaf = z.detach().requires_grad_()
            out = negative_lse(leaf, ids, tau, prefix=prefix, backend="triton", validate=False)
            bits = (out.detach(), torch.autograd.grad(out.sum(), leaf)[0])
            first = first or bits
            differing += not all(torch.equal(a, b) for a, b in zip(first, bits, strict=True))
        found[f"{n}, {d}, prefix {prefix}, {tau}"] = {"repeats": Here.repeats, "differing": differing}
    return found


def small_case() -> None:
    z, ids = tune.rows(Here.device, 300, 72)
    for tau in (0.1, 0.01):
        leaf = z.detach().requires_grad_()
        negative_lse(leaf, ids, tau, prefix=24, backend="triton").sum().backward()
    x = torch.randn(200, 72, device=Here.device, requires_grad=True)
    off_diagonal_energy(x, backend="triton").backward()
    synchronize()


def sanitizer() -> Any:
    """compute-sanitizer on a small case, in processes of its own."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or Here.rehearsal:
        return "compute-sanitizer is not on the path"
    found = {}
    script = Path(__file__).parents[1] / "gpu.py"
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "7", sys.executable, str(script)]
        command += ["--small-case", "--out", str(Here.out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=min(75, max(left() - 5, 5)))
            found[kind] = {"rc": done.returncode, "tail": (done.stdout + done.stderr)[-600:]}
        except subprocess.TimeoutExpired:
            found[kind] = {"rc": None, "tail": "ran out of time"}
    if any(f["rc"] == 7 for f in found.values()):
        raise RuntimeError(f"compute-sanitizer: {found}")
    return found
