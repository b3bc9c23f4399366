"""The tables and the picture of the GPU run: `python benchmarks/gpu_report.py`, from docs/benchmarks/gpu/*.json.

In the pages, `TABLES[NAME]` writes the text between `<!-- gpu: NAME -->` and `<!-- end -->`; a test holds the pages to
the measurement. `--picture` also draws docs/benchmarks/gpu/gpu.png, which needs matplotlib.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "benchmarks" / "gpu"
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks" / "gpu.md", ROOT / "kernels" / "README.md")
METHODS = {
    "ours": "ours", "graph": "ours, in a CUDA graph", "ours, checks": "ours, with checks of values",
    "eager": "eager, 16 bit", "torch.compile": "torch.compile of eager", "NT-Xent": "NT-Xent as lightly computes it",
    "streaming": "our streaming backend, float32", "Inf-CL": "Inf-CL (a quarter of the similarities)",
    "siglip-kernel": "siglip-kernel (two towers)", "memeff": "memeff (two towers)",
}  # fmt: skip
"""Name in gpu.json -> in the tables, in this order."""
RATIOS = {(4096, 256): (5, 1.4), (8192, 2048): (2.8, 1.45), (32768, 256): (9, 2.2), (32768, 2048): (2.7, 1.4)}
"""How many times faster than eager and than torch.compile it was meant to be, on an H100."""


def stages(name: str = "gpu") -> dict[str, Any]:
    """Stage -> its result."""
    found = json.loads((FOLDER / f"{name}.json").read_text())["stages"]
    return {stage: entry["result"] for stage, entry in found.items()}


# ------------------------------------------------------------------------------------------------ cells


def number(ms: float) -> str:
    """Three digits, or two below 1."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 0.1 else f"{ms:.3f}"


def time(t: dict[str, Any] | None) -> str:
    """Median and quartiles."""
    if t is None:
        return "-"
    if "failed" in t:
        return "out of memory" if t["failed"].startswith("OutOfMemoryError") else "failed"
    low, high = number(t["low"]), number(t["high"])
    return number(t["ms"]) + (f" ({low} to {high})" if low != high else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "--|" * left + "--:|" * (len(head) - left)]
    return "\n".join([*lines, *(f"| {' | '.join(r)} |" for r in rows)])


def shape(r: dict[str, Any]) -> str:
    return f"{r['N']:,} x {r['D']:,}"


def of(r: dict[str, Any], method: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = r["graph"] if method == "graph" else r["times"].get(method)
    return found


def rate(r: dict[str, Any], ms: float) -> float:
    """TFLOP/s of the 2u operations that our forward and backward take."""
    return float(4 * r["N"] ** 2 * r["D"] / ms / 1e9)


# ------------------------------------------------------------------------------------------------ tables


def times(s: dict[str, Any]) -> str:
    speed = s["speed"]
    rows = [[told, *(time(of(r, name)) for r in speed)] for name, told in METHODS.items()]
    return table(["ms, N x D", *map(shape, speed)], rows)


def memory(s: dict[str, Any]) -> str:
    speed = s["speed"]

    def cell(r: dict[str, Any], name: str) -> str:
        found = r["memory_MiB"].get(name)
        failed = (of(r, name) or {}).get("failed", "")
        return "out of memory" if failed.startswith("OutOf") else "-" if found is None else f"{found:,.0f}"

    rows = [[told, *(cell(r, n) for r in speed)] for n, told in METHODS.items() if n not in ("graph", "ours, checks")]
    return table(["MiB, N x D", *map(shape, speed)], rows)


def aims(s: dict[str, Any]) -> str:
    rows = []
    for r in s["speed"]:
        called, graph = r["times"]["ours"]["ms"], r["graph"]["ms"]
        best = min(called, graph)
        over = best / r["aim_ms"] - 1
        reached = "reached" if over <= 0 else f"missed by {100 * over:.0f} %"
        # of the H200 at its highest clock, and of what the matrix library does with a product of this shape
        shares = (rate(r, best) / s["machine"]["peak16_TFLOPs"], rate(r, best) / r["matmul_TFLOPs"])
        ratios = []
        for name, aim in zip(("eager", "torch.compile"), RATIOS.get((r["N"], r["D"]), ("", "")), strict=True):
            t = of(r, name)
            ratios.append("-" if t is None else f"{t['ms'] / called:.2f}" + (f" ({aim})" if aim else ""))
        cells = [shape(r), f"{r['aim_ms']:g}", number(called), number(graph), reached]
        rows.append([*cells, *(f"{100 * x:.0f} %" for x in shares), *ratios])
    head = ["N x D", "goal, ms", "as called, ms", "in a graph, ms", "goal", "of the peak", "of the library's rate"]
    return table([*head, "eager / ours (goal)", "torch.compile / ours (goal)"], rows)


def training(s: dict[str, Any]) -> str:
    found = s["training_step"]
    rows = []
    for family in ("simclr", "vicreg", "barlow"):
        t = found[f"autocast, {family}"]
        graph = found["graph, JointEntropyLoss"] if family == "simclr" else None
        losses = found[f"loss, {family}"]
        cells = [time(t["triton"]), time(graph), time(t["streaming"])]
        rows.append([family, *cells, f"{abs(losses['triton'] / losses['streaming'] - 1):.0e}".replace("0e+00", "0")])
    return table(["family", "triton, ms", "in a CUDA graph, ms", "streaming, ms", "losses differ by"], rows)


def auto(s: dict[str, Any]) -> str:
    rows = []
    for name, entry in s["chosen"].items():
        n, d = (int(x) for x in name.split(", "))
        t = entry["times"]
        takes = "triton" if n >= entry["triton_from"] else "eager" if n <= 4096 else "streaming"
        fastest = min(("triton", "streaming", "eager"), key=lambda k: float(t[k]["ms"]))
        cells = [time(t[k]) for k in ("auto", "triton", "streaming", "eager")]
        rows.append([f"{n:,} x {d:,}", takes, fastest, *cells])
    return table(["N x D", "auto takes", "fastest", "auto, ms", "triton", "streaming", "eager, float32"], rows, 3)


def covariance(s: dict[str, Any]) -> str:
    names = ("triton", "streaming", "eager")
    rows = [
        [shape(r), *(time(r["times"][n]) for n in names), *(f"{r['memory_MiB'][n]:.0f}" for n in names)]
        for r in s["covariance"]
    ]
    return table(["N x D", *(f"{n}, ms" for n in names), *(f"{n}, MiB" for n in names)], rows)


def blocks(s: dict[str, Any]) -> str:
    found: dict[str, dict[str, str]] = {}
    for name, t in s["blocks"].items():
        n, d, rows = name.split(", ")
        found.setdefault(f"{int(n):,} x {int(d):,}", {})[rows] = time(t)
    sizes = ("2048", "4096", "8192", "16384")
    return table(["N x D; ms with blocks of", *sizes], [[k, *(v[x] for x in sizes)] for k, v in found.items()])


def tiles(s: dict[str, Any]) -> str:
    found: dict[str, list[str]] = {}
    for name, entry in s["variants"].items():
        mode, _, _ = name.split(", ")
        m, b_n, k, warps, _, descriptor, *_ = entry["configuration"]
        tile = f"{m} x {b_n} x {k}, {warps} warps{', descriptors' if descriptor else ''}"
        told = number(entry["ms"]) + (f" ({entry['TFLOPs']:.0f})" if "TFLOPs" in entry else "")
        found.setdefault(mode, []).extend([tile, told])
    head = ["kernel", "tile at D = 256", "ms (TFLOP/s)", "tile at D = 2,048", "ms (TFLOP/s)"]
    return table(head, [[mode, *cells] for mode, cells in found.items()])


def candidates(s: dict[str, Any]) -> str:
    """How much longer each tile took than the fastest, sums and weights together with the products of the gradient."""
    widths = ("128", "256", "512", "1024", "2048")
    rows = {}
    for mode in ("sums", "weights", "sums_maximum", "weights_maximum", "sums_two", "weights_two"):
        for width in widths:
            tried = s["tune"]["candidates"][f"{mode}, {width}"]
            best = min(t["ms"] for t in tried)
            for t in tried:
                m, n, k, warps, stages, descriptor, _, most, resident = t["configuration"]
                notes = [x for x, on in (("descriptors", descriptor), ("in registers", resident)) if on]
                notes += [f"at most {most} registers"] * bool(most)
                tile = ", ".join([f"{m} x {n} x {k}", f"{warps} warps", f"{stages} stages", *notes])
                rows.setdefault((mode, tile), {})[width] = f"+{100 * (t['ms'] / best - 1):.0f} %"
    cells = [[mode, tile, *(v.get(w, "-") for w in widths)] for (mode, tile), v in rows.items()]
    return table(["kernel", "tile", *(f"{int(w):,}" for w in widths)], cells, 2)


def colors(s: dict[str, Any]) -> str:
    rows = [
        [name, *(time(r[k]) for k in ("triton", "torch", "copy")), f"{r['torch']['ms'] / r['triton']['ms']:.1f}",
         f"{r['largest_difference']:.0e}"]
        for name, r in s["colors"].items()
    ]  # fmt: skip
    head = ["images", "one kernel, ms", "torch's functions, ms", "a copy, ms", "torch / ours", "largest difference"]
    return table(head, rows)


def right(s: dict[str, Any]) -> str:
    """What was compared, with the worst of it."""
    sums = [r for r in s["correctness"] if "lse" in r]
    energies = [r for r in s["correctness"] if "energy" in r]
    other = next(r for r in s["correctness"] if "split" in r)
    worst = {k: max(r[k] for r in sums) for k in ("lse", "dz", "dtau")}
    repeats = sum(r["repeats"] for r in s["determinism"].values())
    differing = sum(r["differing"] for r in s["determinism"].values())
    checks = s["self_check"]
    cold = stages("cold")["self_check"]
    tools = " and ".join(f"{k}: {'clean' if v['rc'] == 0 else 'not clean'}" for k, v in s["sanitizer"].items())
    shapes = ", ".join(f"{n:,} x {d:,}" for n, d in dict.fromkeys((r["N"], r["D"]) for r in sums))
    rows = [
        [f"log-sums against float64, {len(sums)} cases ({shapes}; temperature 0.1 and 0.01; one space and two)",
         f"lse off by {worst['lse']:.0e} at most"],
        ["their gradients in the rows", f"off by {worst['dz']:.1e} of their norm at most"],
        ["their gradient in the temperature", f"off by {worst['dtau']:.0e} at most"],
        ["rows split in two fp16 parts; bfloat16; a rank's share of the rows over NCCL",
         f"lse off by {other['split']:.0e}; {other['bfloat16']:.0e}; {other['rectangle']:.0e}"],
        [f"covariance energies against float64, {len(energies)} cases",
         f"off by {max(r['error'] for r in energies):.0e} at most"],
        [f"{repeats} repeats of {len(s['determinism'])} cases", f"{differing} that differ in a bit"],
        ["compute-sanitizer on a small case", tools],
        ["self-check of `auto`, once for each process, device and width",
         f"{1000 * max(c['again_s'] for c in checks):.0f} ms at most; with kernels still to be compiled up to "
         f"{max(c['first_s'] for c in cold):.1f} s"],
    ]  # fmt: skip
    return table(["what", "found"], rows, 2)


def head(s: dict[str, Any]) -> str:
    """Three lines of the kernels' summary."""
    by = {(r["N"], r["D"]): r for r in s["speed"]}
    large, most, small = by[32768, 2048], by[131072, 512], by[4096, 256]

    def ms(r: dict[str, Any], name: str) -> str:
        return number((of(r, name) or {})["ms"])

    rows = [
        [f"{shape(large)}, N x D",
         f"{ms(large, 'ours')} ms; torch.compile {ms(large, 'torch.compile')}, eager {ms(large, 'eager')}; "
         f"{large['memory_MiB']['ours']:.0f} MiB, {large['memory_MiB']['torch.compile']:,.0f}, "
         f"{large['memory_MiB']['eager']:,.0f}"],
        [shape(most),
         f"{ms(most, 'ours')} ms in {most['memory_MiB']['ours']:.0f} MiB; Inf-CL {ms(most, 'Inf-CL')} for a quarter of "
         "the similarities"],
        [f"{shape(small)}: bound by the host",
         f"{ms(small, 'ours')} ms, **slower** than eager's {ms(small, 'eager')} and torch.compile's "
         f"{ms(small, 'torch.compile')}; in a CUDA graph {ms(small, 'graph')}"],
    ]  # fmt: skip
    return table(["on one H200, forward and backward (measured)", ""], rows, 2)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    f.__name__: f
    for f in (times, memory, aims, training, auto, covariance, blocks, tiles, candidates, colors, right, head)
}


def written(text: str, s: dict[str, Any]) -> str:
    """A page with its tables rewritten."""

    def made(match: re.Match[str]) -> str:
        return f"<!-- gpu: {match[1]} -->\n{TABLES[match[1]](s)}\n<!-- end -->"

    return re.sub(r"<!-- gpu: (\w+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def picture(s: dict[str, Any], path: Path) -> None:
    """Time of each method over that of ours, by shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = {  # Okabe-Ito colors, and a marker each
        "graph": ("#0072B2", "*"), "torch.compile": ("#009E73", "s"), "eager": ("#E69F00", "o"),
        "Inf-CL": ("#CC79A7", "D"), "NT-Xent": ("#D55E00", "^"), "siglip-kernel": ("#56B4E9", "P"),
        "memeff": ("#000000", "X"),
    }  # fmt: skip
    speed = s["speed"]
    figure, axis = plt.subplots(figsize=(9.0, 4.2))
    for name, (color, marker) in looks.items():
        at = [(i, t["ms"] / r["times"]["ours"]["ms"]) for i, r in enumerate(speed) if "ms" in (t := of(r, name) or {})]
        axis.plot(*zip(*at, strict=True), marker, color=color, label=METHODS[name], markersize=8)
    axis.axhline(1, color="#0072B2", linewidth=1.5, label="ours, as called")
    axis.set_yscale("log")
    axis.set_yticks([0.05, 0.1, 0.3, 1, 3, 10, 30, 100], ["0.05", "0.1", "0.3", "1", "3", "10", "30", "100"])
    axis.minorticks_off()
    axis.set_xticks(range(len(speed)), [f"{shape(r)}\n{number(r['times']['ours']['ms'])} ms" for r in speed])
    axis.set_xlim(-0.5, len(speed) - 0.5)
    axis.set_ylabel("time over ours (log scale; above 1: slower)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axis.set_title(f"Forward + backward on one {s['machine']['gpu']}, N x D, and our time", fontsize=11)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", action="store_true")
    args = parser.parse_args()
    s = stages()
    for page in PAGES:
        page.write_text(written(page.read_text(), s))
    if args.picture:
        picture(s, FOLDER / "gpu.png")


if __name__ == "__main__":
    main()
