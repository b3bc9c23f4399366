"""Compare structured views with lightly's, torchvision's and Kornia's pipelines of the same operations, in one run.

    python benchmarks/views.py --out docs/benchmarks              writes views.json, views.md and views.png
    python benchmarks/views.py --threads 2 --out docs/benchmarks  adds the gain of two threads (wall clock)

Operations: crop 0.08-1, flip, jitter 0.8/0.8/0.8/0.2 with p 0.8, grayscale 0.2, blur 0.5, normalize. Methods take
turns, in reversed order every second round, so that a busy machine slows all of them alike. One thread is measured in
processor time, which other work on the machine does not affect. Numbers are medians over rounds of views per second;
ratios are medians of the ratios within a round. Memory is the peak of the resident set of a call in a new process,
above the state before it. A step is resnet18 at 64 px, batch 64: views, forward, backward and SGD. "plain" is SimCLR
with two of our views and lightly's NTXentLoss.
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

import kornia.augmentation as K
import lightly
import numpy as np
import torch
from lightly.loss import NTXentLoss
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.transforms import v2

import ssd_addon
from ssd_addon import JointEntropyLoss, StructuredTransform, StructuredViews, StyleHeads, ViewBatch
from ssd_addon.augment.drawing import Drawing
from ssd_addon.augment.fast import blur, geometry, work
from ssd_addon.kernels import colors as chain

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(128, 96, 64), (128, 32, 32), (32, 256, 224)]
SPACES = {"content": 64, "spatial": 32, "color": 32}
Run = tuple[Callable[[], Any], int]  # what is timed, and how many views it makes


def odd(size: int) -> int:
    return max(3, int(0.1 * size) // 2 * 2 + 1)


def groups(size: int) -> dict[str, Any]:
    b = odd(size)
    return {
        "groups": {
            "spatial": [K.RandomResizedCrop((size, size), scale=(0.08, 1.0)), K.RandomHorizontalFlip()],
            "color": [
                K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
                K.RandomGrayscale(p=0.2),
                K.RandomGaussianBlur((b, b), (0.1, 2.0), p=0.5),
            ],
        },
        "then": [K.Normalize(torch.tensor(MEAN), torch.tensor(STD))],
    }


def pictures(n: int, edge: int) -> Tensor:
    """Smooth random pictures, uint8 [n, 3, edge, edge]."""
    x = torch.rand(n, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return (255 * nn.functional.interpolate(x, (edge, edge), mode="bicubic").clamp(0, 1)).byte()


def batched(n: int, edge: int, size: int) -> dict[str, Run]:
    """Pipelines of whole batches, and those of single PIL images, on the same pictures."""
    x = pictures(n, edge)
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in x]
    made = groups(size)
    shared, interleaved = (StructuredViews(**made, plan=p, seed=0) for p in ("shared_query", "interleaved"))
    slow = StructuredViews(**made, fast=False, seed=0)
    theirs = nn.Sequential(*made["groups"]["spatial"], *made["groups"]["color"], *made["then"])
    per_image = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(odd(size), (0.1, 2.0))], p=0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    lightlys = SimCLRTransform(input_size=size)
    some = images[: max(8, n // 4)]
    return {
        "ssd_addon, shared query": (lambda: shared(x), n * shared.plan.num_views),
        "ssd_addon, interleaved": (lambda: interleaved(x), n * 2),
        "ssd_addon, one by one": (lambda: slow(x), n * slow.plan.num_views),
        "lightly SimCLRTransform": (lambda: [lightlys(i) for i in some], 2 * len(some)),
        "torchvision v2, image by image": (lambda: [per_image(i) for i in x[: len(some)]], len(some)),
        "Kornia, batch": (lambda: theirs(x.float() / 255), n),
    }


def per_sample(edge: int, size: int) -> dict[str, Run]:
    """Transforms of one PIL image, as data-loader workers run them."""
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures(16, edge)]
    ours, theirs = StructuredTransform(**groups(size)), SimCLRTransform(input_size=size)
    return {
        "StructuredTransform": (lambda: [ours(i) for i in images], 16 * ours.plan.num_views),
        "lightly SimCLRTransform": (lambda: [theirs(i) for i in images], 32),
    }


# ------------------------------------------------------------------------------------------------- time


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure(runs: dict[str, Run], seconds: float, least: int = 5) -> dict[str, list[float]]:
    """Views per second of every method, round by round."""
    for run, _ in runs.values():
        run()
    out: dict[str, list[float]] = {name: [] for name in runs}
    end, r = time.perf_counter() + seconds, 0
    while r < least or time.perf_counter() < end:
        for name in list(runs) if r % 2 == 0 else reversed(runs):
            run, views = runs[name]
            begin = clock()
            run()
            out[name].append(views / (clock() - begin))
        r += 1
    return out


def summary(rates: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    return {
        name: {
            "views_per_s": round(statistics.median(values), 1),
            "ours_over_it": round(statistics.median(b / v for b, v in zip(rates[base], values, strict=True)), 2),
        }
        for name, values in rates.items()
    }


def stages(n: int, edge: int, size: int) -> dict[str, float]:
    """Milliseconds for 128 views, by stage, of the shared query."""
    views, x, took = StructuredViews(**groups(size), seed=0), pictures(n, edge), dict.fromkeys(STAGES, 0.0)
    kept = {(home, name): getattr(home, name) for home, name in STAGES.values()}

    def timed(what: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            begin = time.process_time()
            result = f(*args, **more)
            took[what] += time.process_time() - begin
            return result

        return run

    rounds = 10
    try:
        views(x)
        for what, (home, name) in STAGES.items():
            setattr(home, name, timed(what, kept[home, name]))
        begin = time.process_time()
        for _ in range(rounds):
            views(x)
        whole = time.process_time() - begin
    finally:
        for (home, name), f in kept.items():
            setattr(home, name, f)
    scale = 1e3 * 128 / (rounds * n * views.plan.num_views)
    found = {what: round(seconds * scale, 2) for what, seconds in took.items()}
    return found | {"everything else": round((whole - sum(took.values())) * scale, 2), "all": round(whole * scale, 2)}


STAGES: dict[str, tuple[Any, str]] = {
    "drawing": (Drawing, "views"),
    "crop, flip, resize": (geometry, "pixels"),
    "colors, normalize": (chain, "run"),
    "blur": (blur, "blur"),
    "writing": (work.Views, "put"),
}


# ------------------------------------------------------------------------------------------------- memory


def memory(n: int, edge: int, size: int, plan: str) -> float:
    """Peak of the resident set above what there was before, over the bytes of the views; in a fresh process."""
    code = (
        "import sys, torch; sys.path.insert(0, 'benchmarks'); torch.set_num_threads(1); import views as b; "
        f"print(b.peak({n}, {edge}, {size}, {plan!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak(n: int, edge: int, size: int, plan: str) -> float:
    views, x = StructuredViews(**groups(size), plan=plan, seed=0), pictures(n, edge)
    views(x[:2])
    status = Path("/proc/self/status")
    before = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins at the present size
    batch = views(x)
    highest = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return (highest - before) * 1024 / (batch.views.numel() * 4)


# ------------------------------------------------------------------------------------------------- a step


def steps(batch: int = 64) -> dict[str, Run]:
    x = pictures(batch, 96)
    torch.manual_seed(0)

    def network(spaces: dict[str, int]) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = StyleHeads(resnet18(), spaces, hidden=(512,))
        return model, torch.optim.SGD(model.parameters(), 0.01)

    def step(
        views: StructuredViews, model: nn.Module, optimizer: Any, loss: Callable[[Any, ViewBatch], Tensor]
    ) -> None:
        optimizer.zero_grad()
        made = views(x)
        loss(model(made), made).backward()
        optimizer.step()

    both, ntx, ours = groups(64), NTXentLoss(0.15), JointEntropyLoss()
    plain = StructuredViews({}, then=[*both["groups"]["spatial"], *both["groups"]["color"], *both["then"]], seed=0)
    shared, interleaved = (StructuredViews(**both, plan=p, seed=0) for p in ("shared_query", "interleaved"))
    one, several, again = network({"content": 128}), network(SPACES), network(SPACES)
    return {
        "plain": (lambda: step(plain, *one, lambda z, _: ntx(z["content"][0], z["content"][1])), 1),
        "interleaved": (lambda: step(interleaved, *several, lambda z, _: ours(z)), 1),
        "shared query": (lambda: step(shared, *again, lambda z, _: ours(z)), 1),
    }


# ------------------------------------------------------------------------------------------------- report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=25.0, help="for each size")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "views.json"
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    machine = {"torch": torch.__version__, "lightly": lightly.__version__, "ssd_addon": ssd_addon.__version__}
    machine |= {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if args.threads > 1:
        report["threads"] = two_threads(args.threads, args.seconds)
    else:
        report = {"machine": machine, "sizes": {}, "threads": report.get("threads", {})}
        for n, edge, size in SIZES:
            label = f"{edge} px to {size} px"
            rates = measure(batched(n, edge, size), args.seconds)
            base = "ssd_addon, shared query"
            report["sizes"][label] = {
                "images": n,
                "batch": summary(rates, base),
                "sample": summary(measure(per_sample(edge, size), args.seconds / 3), "StructuredTransform"),
                "stages": stages(n, edge, size),
                "memory": {p: round(memory(n, edge, size, p), 2) for p in ("shared_query", "interleaved")},
            }
            print(label, json.dumps(report["sizes"][label], indent=1), flush=True)
        rates = measure(steps(), 3 * args.seconds)
        seconds = {name: round(statistics.median(1 / v for v in values), 3) for name, values in rates.items()}
        over = {
            name: statistics.median(b / v for b, v in zip(rates["plain"], rates[name], strict=True)) for name in rates
        }
        report["step"] = {"seconds": seconds, "over_plain": {name: round(v, 3) for name, v in over.items()}}
        print("step", report["step"], flush=True)
    report["peak_of_this_run_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    file.write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "views.md").write_text(table(report))
    picture(report, args.out / "views.png")
    print(f"written: {file}")


def two_threads(threads: int, seconds: float) -> dict[str, Any]:
    """Wall-clock rates of one thread and of several, in turns."""
    out = {}
    for n, edge, size in SIZES:
        views, x = StructuredViews(**groups(size), seed=0), pictures(n, edge)
        rates: dict[int, list[float]] = {1: [], threads: []}
        end = time.perf_counter() + seconds
        while len(rates[1]) < 5 or time.perf_counter() < end:
            for k in rates:
                torch.set_num_threads(k)
                views(x)
                begin = time.perf_counter()
                for _ in range(3):
                    views(x)
                rates[k].append(3 * n * views.plan.num_views / (time.perf_counter() - begin))
        gain = statistics.median(b / a for a, b in zip(rates[1], rates[threads], strict=True))
        best = max(rates[threads]) / max(rates[1])
        out[f"{edge} px to {size} px"] = {"threads": threads, "gain": round(gain, 2), "gain_of_best": round(best, 2)}
        print(edge, size, out[f"{edge} px to {size} px"], flush=True)
    return out


def table(report: dict[str, Any]) -> str:
    """What was measured, in Markdown; written by this script."""
    ratios = [s["batch"]["lightly SimCLRTransform"]["ours_over_it"] for s in report["sizes"].values()]
    lines = [
        "<!-- written by benchmarks/views.py -->",
        "",
        "# How fast views are made",
        "",
        f"On one CPU core, `StructuredViews` makes {min(ratios):.1f} to {max(ratios):.1f} times as many views a second",
        "as lightly's `SimCLRTransform`, whole batches at a time. What limits it: [views](../views.md#speed).",
        "",
    ]
    for label, found in report["sizes"].items():
        lines += [f"**{label}**, {found['images']} images, one thread", ""]
        ours = "speed of ours (shared query) relative to it, 2 = twice as fast"
        lines += [f"| pipeline | views a second | {ours} |", "| --- | --: | --: |"]
        lines += [f"| {n} | {r['views_per_s']:,.0f} | {r['ours_over_it']:.2f} |" for n, r in found["batch"].items()]
        lines += ["", "| one PIL image at a time | views a second | speed of ours relative to it |"]
        lines += ["| --- | --: | --: |"]
        lines += [f"| {n} | {r['views_per_s']:,.0f} | {r['ours_over_it']:.2f} |" for n, r in found["sample"].items()]
        shown = ", ".join(f"{what} {ms:.2f}" for what, ms in found["stages"].items())
        peaks = ", ".join(f"{p.replace('_', ' ')} {x:.2f}" for p, x in found["memory"].items())
        lines += [
            "",
            f"Milliseconds for 128 views, by stage: {shown}. Peak memory over that of the views: {peaks}.",
            "",
        ]
    if "step" in report:
        step = report["step"]
        lines += ["| step of resnet18 | seconds | time relative to plain SimCLR |", "| --- | --: | --: |"]
        lines += [f"| {n} | {s:.2f} | {step['over_plain'][n]:.2f} |" for n, s in step["seconds"].items()]
    if report.get("threads"):
        lines += ["", "| size, threads | times as fast as one thread (wall clock) |", "| --- | --: |"]
        lines += [f"| {label}, {t['threads']} | {t['gain']:.2f} |" for label, t in report["threads"].items()]
    return "\n".join(lines) + "\n"


def picture(report: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = report["sizes"]
    fig = Figure(figsize=(4.2 * len(sizes), 3.2), layout="constrained")
    FigureCanvasAgg(fig)
    for ax, (label, found) in zip(np.atleast_1d(fig.subplots(1, len(sizes))), sizes.items(), strict=True):
        names = list(found["batch"])[::-1]
        values = [found["batch"][n]["views_per_s"] for n in names]
        ax.barh(names, values, color=["#2b6cb0" if n.startswith("ssd") else "#a0aec0" for n in names])
        for i, v in enumerate(values):
            ax.text(v, i, f" {v:,.0f}", va="center", fontsize=8)
        ax.set_xlim(0, 1.25 * max(values))
        ax.set_title(f"{label}: views per second, one thread", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in fig.axes[1:]:
        ax.set_yticklabels([])
    fig.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
