"""Compare time and memory of the losses with lightly's, in one run: python benchmarks/losses.py --out docs/benchmarks

First checks that what is timed is the same loss (value and gradient), then measures forward + backward on the CPU in
float32. Methods take turns, in reversed order every second round, so that a busy machine slows all of them alike. With
--threads 1 the clock is processor time, which other work on the machine does not affect; else it is the wall clock.
Times are medians; a ratio is the median of the ratios within a round; brackets are the smallest and the largest.

Memory is the peak of the resident set in a fresh process per method. The process makes the inputs, runs a tiny batch,
resets the high-water mark to the present size and runs one forward + backward; the bytes of the gradients are
subtracted. The work space of the matrix product counts as the method's.

Legend: B images, D width of the space, V = 2 views, N = V * B rows, u = 2 N^2 D operations of one N x N product.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightly
import torch
from lightly.loss import BarlowTwinsLoss, DCLLoss, NTXentLoss, VICRegLoss
from torch import Tensor, nn

import ssd_addon
from ssd_addon import JointEntropyLoss

OURS = "ssd_addon"
TEMPERATURE = 0.15
Method = Callable[[Tensor], Tensor]

SIMILARITY = [(512, 128), (1024, 128), (2048, 128), (4096, 128), (8192, 128)]
SIMILARITY += [(512, 512), (1024, 512), (2048, 512), (4096, 512)]
COVARIANCE = [(128, 1024), (256, 1024), (1024, 1024), (128, 2048), (256, 2048), (1024, 2048), (1024, 4096)]
QUICK = {"simclr": [(128, 32), (256, 32)], "vicreg": [(64, 256)], "barlow": [(64, 256)]}


def methods(family: str) -> dict[str, Method]:
    """Name -> loss of z [2, B, D]; ours first, then the one that it equals."""

    def of_pair(loss: nn.Module) -> Method:
        return lambda z: loss(z[0], z[1])

    def of_space(**options: Any) -> Method:
        loss = JointEntropyLoss(family, **options)
        return lambda z: loss({"content": z})

    if family == "simclr":
        return {
            OURS: of_space(temperature=TEMPERATURE, backend="streaming"),
            "DCLLoss": of_pair(DCLLoss(temperature=TEMPERATURE)),
            "NTXentLoss": of_pair(NTXentLoss(temperature=TEMPERATURE)),
        }
    if family == "vicreg":
        return {OURS: of_space(), "VICRegLoss": of_pair(VICRegLoss(nu_param=0.5))}
    return {OURS: of_space(), "BarlowTwinsLoss": of_pair(BarlowTwinsLoss(lambda_param=0.0051))}


def inputs(b: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, b, d, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()


def step(method: Method, z: Tensor) -> Tensor:
    """Forward and backward; the loss."""
    z.grad = None
    loss = method(z)
    loss.backward()
    return loss.detach()


def check(family: str, b: int, d: int, dtype: torch.dtype, tolerance: float) -> float:
    """Ours against lightly's formula; the largest deviation of value and gradient, relative to their size."""
    z = inputs(b, d, dtype)
    ours, equal = list(methods(family).values())[:2]
    value = step(ours, z)
    gradient = z.grad.clone()
    want = step(equal, z)
    error = max(
        ((value - want).abs() / want.abs()).item(), ((gradient - z.grad).abs().max() / z.grad.abs().max()).item()
    )
    if not error <= tolerance:
        raise SystemExit(f"{family}, B={b}, D={d}, {dtype}: not the same loss, relative deviation {error:.1e}")
    return error


# ------------------------------------------------------------------------------------------------- time


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(family: str, b: int, d: int, seconds: float, most: int) -> dict[str, Any]:
    """Rounds of all methods, at least 3, until `seconds` or `most` rounds are used up."""
    z = inputs(b, d)
    runs: dict[str, Callable[[], Any]] = {name: lambda m=m: step(m, z) for name, m in methods(family).items()}
    if family == "simclr":
        rows, product = torch.randn(2 * b, d), torch.empty(2 * b, 2 * b)
        runs["matmul"] = lambda: torch.mm(rows, rows.T, out=product)
    for run in runs.values():
        run()
    z.grad = None
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for r in range(most):
        if r >= 3 and time.perf_counter() > end:
            break
        for name in list(runs) if r % 2 == 0 else reversed(runs):
            start = clock()
            runs[name]()
            times[name].append(clock() - start)
    ours = times[OURS]
    out = {
        "family": family,
        "B": b,
        "D": d,
        "repeats": len(ours),
        "seconds": {name: spread(t) for name, t in times.items()},
        "speedup": {
            name: spread([t / o for t, o in zip(theirs, ours, strict=True)])
            for name, theirs in times.items()
            if name not in (OURS, "matmul")
        },
    }
    if "matmul" in times:
        # The streaming loss needs 2u (u/2 forward, u/2 again and u for the gradient in the backward).
        out["share_of_matmul_rate"] = spread([2 * t / o for t, o in zip(times["matmul"], ours, strict=True)])
    return out


# ------------------------------------------------------------------------------------------------- memory


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    with open("/proc/self/status") as f:
        line = next(line for line in f if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak_memory(family: str, name: str, b: int, d: int) -> int:
    """Bytes at the peak of one step, beside the inputs and their gradient. Meant for a fresh process."""
    method, z = methods(family)[name], inputs(b, d)
    step(method, inputs(8, d))
    try:
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # sets the high-water mark back to the present size
        step(method, z)
        peak = resident("VmHWM")
    except OSError:  # no such files: the peak since the start of the process, in KiB
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        step(method, z)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak - before - z.numel() * z.element_size()


def outside_memory(name: str, b: int, d: int) -> int:
    """The memory as a user's script sees it: two separate embeddings, which ours has to stack, and no warm-up."""
    method = methods("simclr")[name]
    x, y = (torch.randn(b, d).requires_grad_() for _ in range(2))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(lambda z: method(torch.stack([x, y]) if name == OURS else (x, y)), x)
    return resident("VmHWM") - before - 2 * x.numel() * x.element_size()


def memory_in_fresh_process(family: str, name: str, b: int, d: int) -> int:
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads())]
    command += ["--memory", family, name, str(b), str(d)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


# ------------------------------------------------------------------------------------------------- report


def machine() -> dict[str, Any]:
    return {
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "clock": "processor time" if torch.get_num_threads() == 1 else "wall clock",
        "load": os.getloadavg()[1],
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightly": lightly.__version__,
        "ssd_addon": ssd_addon.__version__,
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """One line per shape and rival."""
    lines = [
        "| B | D | lightly's | ours, s | theirs, s | ratio of time | ours, MiB | theirs, MiB | share of memory "
        "| of matmul rate | n |",
        "|--:|--:|:--|--:|--:|:--|--:|--:|--:|--:|--:|",
    ]
    for r in results:
        for name, ratio in r["speedup"].items():
            faster = "faster" if ratio["median"] >= 1 else "slower"
            ours, theirs = r["memory"][OURS] / 2**20, r["memory"][name] / 2**20
            rate = f"{100 * r['share_of_matmul_rate']['median']:.0f} %" if "share_of_matmul_rate" in r else ""
            lines.append(
                f"| {r['B']} | {r['D']} | {name} | {r['seconds'][OURS]['median']:.3f} "
                f"| {r['seconds'][name]['median']:.3f} "
                f"| {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}), {faster} "
                f"| {ours:.0f} | {theirs:.0f} | {f'{100 * ours / theirs:.1f} %' if theirs >= 1 else ''} "
                f"| {rate} | {r['repeats']} |"
            )
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {  # Okabe-Ito colors, and a marker each
        OURS: ("#0072B2", "o", "ssd_addon (streaming)"),
        "DCLLoss": ("#009E73", "s", "lightly DCLLoss"),
        "NTXentLoss": ("#D55E00", "^", "lightly NTXentLoss"),
    }
    rows = [r for r in results if r["family"] == "simclr"]
    widths = sorted({r["D"] for r in rows})
    figure, axes = plt.subplots(2, len(widths), figsize=(4.8 * len(widths), 7.4), sharex="col", sharey="row")
    for (above, below), d in zip(axes.T.reshape(-1, 2), widths, strict=True):
        own = [r for r in rows if r["D"] == d]
        n = [2 * r["B"] for r in own]
        for name, (color, marker, label) in style.items():
            t = [r["seconds"][name] for r in own]
            middle = [x["median"] for x in t]
            bars = [[x["median"] - x["min"] for x in t], [x["max"] - x["median"] for x in t]]
            above.errorbar(n, middle, yerr=bars, color=color, marker=marker, label=label, capsize=3)
            below.plot(n, [r["memory"][name] / 2**20 for r in own], color=color, marker=marker, label=label)
        repeats = [r["repeats"] for r in own]
        above.set_title(f"D = {d}, n = {min(repeats)} to {max(repeats)} repeats")
        below.set_xlabel("N = 2B rows")
        for axis in (above, below):
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(n, [str(k) for k in n])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    first = axes.reshape(2, -1)[:, 0]
    first[0].set_ylabel("forward + backward, s (median, min to max)")
    first[1].set_ylabel("peak memory beside inputs and gradients, MiB")
    first[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="folder for losses.json and losses.png, or losses-<families>.json; without, print only"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: seconds, and no figures to quote")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing per shape; 3 rounds run in any case")
    parser.add_argument("--repeats", type=int, default=15, help="most rounds per shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch; default all cores")
    parser.add_argument("--only", nargs="+", default=list(QUICK), choices=list(QUICK), help="families; no picture")
    parser.add_argument("--largest", type=int, default=8192, help="leave out more images than this (8192: 5 GB)")
    parser.add_argument("--outside", nargs=3, metavar=("METHOD", "B", "D"), help="memory of simclr as a script sees it")
    parser.add_argument("--memory", nargs=4, metavar=("FAMILY", "METHOD", "B", "D"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        family, name, b, d = args.memory
        print(peak_memory(family, name, int(b), int(d)))
        return

    if args.outside:
        print(outside_memory(args.outside[0], *map(int, args.outside[1:])))
        return

    shapes = QUICK if args.quick else {"simclr": SIMILARITY, "vicreg": COVARIANCE, "barlow": COVARIANCE}
    shapes = {family: [s for s in shapes[family] if s[0] <= args.largest] for family in args.only}
    checks, used = {}, machine()
    for family, wanted in shapes.items():
        exact = check(family, 33, 24, torch.float64, 1e-9)
        rounded = check(family, *wanted[-1 if family != "simclr" else len(wanted) // 2], torch.float32, 1e-4)
        checks[family] = {"float64": exact, "float32": rounded}
        print(f"{family}: equals lightly's to {exact:.0e} in float64, {rounded:.0e} in float32")

    results = []
    for family, wanted in shapes.items():
        for b, d in wanted:
            r = measure(family, b, d, args.seconds, args.repeats)
            r["memory"] = {name: memory_in_fresh_process(family, name, b, d) for name in methods(family)}
            results.append(r)
            print("\n".join(markdown([r]).splitlines()[2:]), flush=True)
    print("\n" + markdown(results))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        report = {"machine": used, "temperature": TEMPERATURE, "checks": checks, "results": results}
        if args.only == list(QUICK):
            (args.out / "losses.json").write_text(json.dumps(report, indent=1) + "\n")
            draw(results, args.out / "losses.png")
        else:
            (args.out / f"losses-{'-'.join(args.only)}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
