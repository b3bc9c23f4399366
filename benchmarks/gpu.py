"""Everything about the kernels that needs a GPU, in one unattended run of under ten minutes.

    python benchmarks/gpu.py --out docs/benchmarks/gpu     from the root of the repository; needs torch and triton alone
    python benchmarks/gpu.py --out tried --rehearse        the same stages on a CPU, in the interpreter, at toy sizes

Writes gpu.json (after every stage, so that an interrupted run keeps its results) and table.json: the tiles that were
fastest here, and from which size on "auto" should use triton. Copy it to kernels/table.json to use it. The losses of
siglip-kernel, memeff and inf-cl are timed too if they can be imported or lie as *.whl beside this file.

The stages (gpu_stages/) run in a process of their own. If a stage raises, the error goes into the json and the next
stage runs. If it takes too long, ends the process or breaks the device, a fresh process continues with the next stage.
Times are CUDA events after warm-up, medians with quartiles; the methods of a shape take turns. u = 2 N^2 D operations.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "machine": 60, "self_check": 60, "tune": 150, "correctness": 90, "determinism": 60, "variants": 60, "speed": 170,
    "training_step": 60, "chosen": 45, "covariance": 40, "blocks": 40, "colors": 40, "sanitizer": 160,
}  # fmt: skip
"""In their order, and the seconds that each may take. Tiles are chosen first, after a check of a few rows; the
correctness of what was chosen comes before its time."""
BROKEN = 3
"""The worker's exit status where the device does not answer any more."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "gpu")
    parser.add_argument("--seconds", type=float, default=560.0, help="of the whole run")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, by name")
    parser.add_argument("--rehearse", "--dry", action="store_true", help="on a CPU, in triton's interpreter, toy sizes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=0.0, help=argparse.SUPPRESS)  # seconds of every stage, for tests
    parser.add_argument("--small-case", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--break", dest="broken", default="", help=argparse.SUPPRESS
    )  # STAGE=raise|exit|hang, for tests
    args = parser.parse_args()
    names = args.stages.split(",")
    if unknown := [n for n in names if n not in STAGES]:
        parser.error(f"--stages: expected some of {', '.join(STAGES)}: got {', '.join(unknown)}")
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    args.out.mkdir(parents=True, exist_ok=True)
    if args.worker or args.small_case:
        work(args, names)
    else:
        sys.exit(watch(args, names))


# ------------------------------------------------------------------------------------------------ the worker


def work(args: argparse.Namespace, names: list[str]) -> None:
    """Run stages one after the other, each into parts/NAME.json."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), *unpacked(args.out)]
    import gpu_stages

    gpu_stages.set_up(args.out, args.until or time.time() + args.seconds, args.rehearse)
    if args.small_case:
        gpu_stages.small_case()
        return
    stage, _, how = args.broken.partition("=")
    for name in names:
        (args.out / "parts" / "now").write_text(f"{name} {time.time()}")
        entry = gpu_stages.run(name, how if name == stage else "")
        save(args.out / "parts" / f"{name}.json", entry)
        if entry.get("device_fault"):
            os._exit(BROKEN)  # an orderly end would wait for the device


def unpacked(out: Path) -> list[str]:
    """Folders of the wheels that lie beside this file, to import from."""
    found = []
    for wheel in sorted(Path(__file__).parent.glob("*.whl")):
        folder = out / "peers" / wheel.stem
        if not folder.exists():
            with zipfile.ZipFile(wheel) as z:
                z.extractall(folder)
        found.append(str(folder))
    return found


def save(path: Path, content: Any) -> None:
    """Written beside and renamed: whoever reads it finds a whole file."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)


# ------------------------------------------------------------------------------------------------ the watcher


def watch(args: argparse.Namespace, names: list[str]) -> int:
    """Workers until every stage has an entry; the exit status of the run."""
    begin = time.time()
    until = begin + args.seconds
    if not args.rehearse and (problem := no_gpu()):
        print(
            f"benchmarks/gpu.py: expected a CUDA device: {problem} (--rehearse tries the script without one)",
            file=sys.stderr,
        )
        return 1
    parts = args.out / "parts"
    parts.mkdir(exist_ok=True)
    for old in (*parts.glob("*.json"), *parts.glob("*.partial"), parts / "now"):
        old.unlink(missing_ok=True)
    limits = {n: args.limit or s * (4.0 if args.rehearse else 1.0) for n, s in STAGES.items()}
    report: dict[str, Any] = {"rehearsal": args.rehearse, "stages": {}}
    entries: dict[str, Any] = report["stages"]
    while rest := [n for n in names if n not in entries]:
        if until - time.time() < 5:
            entries |= {n: {"skipped": "the time was used up"} for n in rest}
            break
        (parts / "now").unlink(missing_ok=True)
        command = [sys.executable, __file__, "--worker", "--stages", ",".join(rest), "--out", str(args.out)]
        command += ["--until", str(until), "--break", args.broken, *["--rehearse"] * args.rehearse]
        environment = {**os.environ, "SSD_ADDON_CACHE": str(args.out / "cache")}
        worker = subprocess.Popen(command, env=environment)
        why = watched(worker, args.out, rest, entries, report, until, limits)
        collect(args.out, rest, entries, report)
        missing = [n for n in rest if n not in entries]
        if missing and why:  # it was at work on the first of these, or could not even start
            entries[missing[0]] = {"failed": why, **partial(args.out, missing[0])}
            print(f"{missing[0]}: {why}", flush=True)
    report["seconds"] = round(time.time() - begin, 1)
    save(args.out / "gpu.json", report)
    write_table(args.out, report)
    bad = [n for n, e in entries.items() if "failed" in e]
    wrong = any(e.get("wrong") for e in entries.values())
    told = [f"FAILED: {', '.join(bad)}"] * bool(bad) + ["WRONG NUMBERS: see correctness"] * wrong
    print("; ".join([f"Written to {args.out}: gpu.json, table.json; {report['seconds']} s", *told]))
    return 1 if bad or wrong else 0


def no_gpu() -> str | None:
    """Asked in another process: this one must not hold the device."""
    question = "import torch; print(torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, timeout=120)
    return None if done.stdout.strip() == "True" else f"torch sees none {done.stderr[-300:]}".strip()


def watched(
    worker: "subprocess.Popen[bytes]", out: Path, rest: list[str], entries: dict[str, Any], report: dict[str, Any],
    until: float, limits: dict[str, float],
) -> str | None:  # fmt: skip
    """Wait for a worker, stop it where a stage takes too long; why it ended early, or None."""
    started = time.time()
    while (status := worker.poll()) is None:
        collect(out, rest, entries, report)
        name, since = at_work(out, started)
        limit = limits.get(name, 60.0)
        if time.time() - since > limit or time.time() > until + 10:
            worker.kill()
            worker.wait()
            return f"stopped after {time.time() - since:.0f} s"
        time.sleep(0.2)
    return None if status == 0 else f"the process ended with status {status}"


def partial(out: Path, name: str) -> dict[str, Any]:
    """What a stage that was stopped had found until then."""
    kept = out / "parts" / f"{name}.partial"
    return {"partial": json.loads(kept.read_text())} if kept.exists() else {}


def at_work(out: Path, started: float) -> tuple[str, float]:
    """The stage that runs, and since when."""
    try:
        name, since = (out / "parts" / "now").read_text().split()
        return name, float(since)
    except (OSError, ValueError):
        return "", started


def collect(out: Path, rest: list[str], entries: dict[str, Any], report: dict[str, Any]) -> None:
    """Take up what has been written since, and write gpu.json."""
    for name in rest:
        part = out / "parts" / f"{name}.json"
        if name not in entries and part.exists():
            entries[name] = json.loads(part.read_text())
            save(out / "gpu.json", report)


def write_table(out: Path, report: dict[str, Any]) -> None:
    """What was found, over the table that is there; nothing of a run that computed something wrong."""
    table = json.loads((ROOT / "kernels" / "table.json").read_text())
    stages = report["stages"]
    machine, tuned = (stages.get(n, {}).get("result") for n in ("machine", "tune"))
    right = "result" in stages.get("correctness", {}) and not stages["correctness"].get("wrong")
    if machine and tuned and right and not report["rehearsal"]:
        arch = machine["architecture"]
        for mode, buckets in tuned["record"]["configurations"].items():
            replace_tiles(table, arch, mode, merged(buckets))
        table["auto"][arch] = {name: merged(rows) for name, rows in tuned["record"]["auto"].items()}
        table["measured"] = machine
    (out / "table.json").write_text(compact(table) + "\n")


def replace_tiles(table: dict[str, Any], arch: str, mode: str, buckets: dict[str, Any]) -> None:
    """New tiles of a mode; those that were in use until now stay candidates, as they may win on the next machine."""
    tiles, tried = (
        {**table[kind]["default"], **table[kind].get(arch, {})} for kind in ("configurations", "candidates")
    )
    more = {size: list(values) for size, values in tried.get(mode, {}).items()}
    listed = more.setdefault("inf", [])
    known = {tuple(c) for c in listed}
    listed += [c for c in tiles[mode].values() if tuple(c) not in known]
    table["candidates"].setdefault(arch, {})[mode] = more
    table["configurations"].setdefault(arch, {})[mode] = buckets


def merged(buckets: dict[str, Any]) -> dict[str, Any]:
    """Entries by width without those that the next wider one repeats."""
    widths = sorted(buckets, key=float)
    return {
        w: buckets[w] for w, wider in zip(widths, [*widths[1:], None], strict=True) if buckets[w] != buckets.get(wider)
    }


def compact(content: Any, depth: int = 0) -> str:
    """JSON with what fits a line on one."""
    line = json.dumps(content)
    if depth + len(line) <= 110 or not isinstance(content, dict | list):
        return line
    inner = (
        [f"{json.dumps(k)}: {compact(v, depth + 1)}" for k, v in content.items()]
        if isinstance(content, dict)
        else [compact(v, depth + 1) for v in content]
    )
    opening, closing = "{}" if isinstance(content, dict) else "[]"
    indent = " " * (depth + 1)
    return f"{opening}\n{indent}" + f",\n{indent}".join(inner) + f"\n{' ' * depth}{closing}"


if __name__ == "__main__":
    main()
