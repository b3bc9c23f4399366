"""Kill a training run at random moments, start it again each time, and compare it with one that was never killed.

    python benchmarks/survive.py --kills 50 --out docs/benchmarks

examples/imagenet.py trains a small network on pictures of noise and saves every step. A quarter of the kills waits
until a checkpoint is being written. With one process, that process is killed; with two, one rank, or all of them with
their launcher. In the end the weights, probes, losses and the state of the views must equal those of an uninterrupted
run bit for bit, and no step may be missing from the log or appear in it twice.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
TRAINS = re.compile(r"step \d+/")
WRITING = ".*checkpoint.pt*"
"""Files that are there while a checkpoint is written."""
SMALL = (
    "--backbone timm:test_resnet --size 32 --hidden 16 --widths content=16,spatial=8,color=8 --epochs 20 --workers 0 "
    f"--warmup-epochs 1 --log-every 1 --save-every 1 --measure 0 --resume --ema 0.9 --steps {STEPS}"
)


def draw(folder: Path, count: int) -> None:
    noise = np.random.default_rng(count)
    for k in range(count):
        path = folder / "abc"[k % 3] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


def start(data: Path, out: Path, processes: int) -> subprocess.Popen:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", "localhost:0"]
    command += ["examples/imagenet.py", *SMALL.split(), "--data", str(data), "--out", str(out)]
    command += ["--batch-size", str(12 // processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def run(data: Path, out: Path, processes: int, choose: random.Random | None) -> tuple[str, str]:
    """Run until it ends or is killed at a random moment: ("ended" or how it was killed, its output)."""
    process, lines = start(data, out, processes), []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    if choose is None:
        reader.join()
        return ("ended" if process.wait() == 0 else "failed"), "".join(lines)
    while process.poll() is None and not any(TRAINS.search(line) for line in list(lines)):  # importing takes seconds
        time.sleep(0.01)
    writing = choose.random() < 0.25
    until = time.perf_counter() + choose.uniform(0, 1.5)
    before, met = set(out.glob(WRITING)), False  # what an earlier kill left
    while process.poll() is None and not met and time.perf_counter() < until:
        met = writing and bool(set(out.glob(WRITING)) - before)
        time.sleep(0 if writing else 0.01)
    how = "while a checkpoint was written" if met else "at any moment"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if process.poll() is not None:
        reader.join()
        return ("ended" if process.returncode == 0 else "failed"), "".join(lines)
    if processes > 1 and choose.random() < 0.5 and (ranks := children.read_text().split()):
        os.kill(int(choose.choice(ranks)), signal.SIGKILL)  # the launcher ends the others
        how += ", one rank"
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pid in _left(process.pid):
        os.kill(pid, signal.SIGKILL)
    reader.join(timeout=10)
    return how, "".join(lines)


def _left(session: int) -> list[int]:
    """Processes of a session that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            found.append(int(stat.parent.name))
    return found


def different(a: object, b: object) -> int:
    """How many tensors of two states differ in any bit."""
    if isinstance(a, torch.Tensor):
        return int(not torch.equal(a, b))
    if isinstance(a, dict):
        return sum(different(a[k], b[k]) for k in a) + len(a.keys() ^ b.keys())
    if isinstance(a, list | tuple):
        return sum(different(x, y) for x, y in zip(a, b, strict=True))
    return int(a != b and not (a != a and b != b))


def survive(processes: int, kills: int, seed: int) -> dict:
    choose, killed, runs = random.Random(seed), {}, 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        draw(home / "data" / "train", 36), draw(home / "data" / "val", 6)
        how, said = run(home / "data", home / "straight", processes, None)
        assert how == "ended", said
        started = time.perf_counter()
        bits, wrong = 0, 0
        straight = torch.load(home / "straight" / "checkpoint.pt", weights_only=True)
        while sum(killed.values()) < kills:
            runs += 1
            out = home / f"run{runs}"
            for _ in range(kills + 2):
                left = sum(killed.values()) < kills
                how, said = run(home / "data", out, processes, choose if left else None)
                assert how != "failed", said
                if how == "ended":
                    break
                killed[how] = killed.get(how, 0) + 1
                print(f"{processes} processes: {sum(killed.values())}/{kills} kills ({how})", flush=True)
            last = torch.load(out / "checkpoint.pt", weights_only=True)
            bits += sum(different(straight[k], last[k]) for k in straight if k not in ("card", "config"))
            entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            plain = [json.loads(line) for line in (home / "straight" / "log.jsonl").read_text().splitlines()]
            losses = [[(e["step"], e["loss"]) for e in each if "loss" in e] for each in (entries, plain)]
            epochs = [[e["step"] for e in each if "epoch" in e] for each in (entries, plain)]
            wrong += losses[0] != losses[1] or epochs[0] != epochs[1]
    return {
        "processes": processes,
        "kills": killed,
        "runs": runs,
        "steps of each run": STEPS,
        "tensors that differ": bits,
        "logs that differ": wrong,
        "seconds": round(time.perf_counter() - started),
    }


def page(about: dict) -> str:
    """The figures as a page."""
    rows = []
    bits, logs = (sum(each[f"{what} that differ"] for each in about["results"]) for what in ("tensors", "logs"))
    kills = sum(n for each in about["results"] for n in each["kills"].values())
    for each in about["results"]:
        how_often = ", ".join(f"{n} {how}" for how, n in sorted(each["kills"].items()))
        same = f"{each['tensors that differ']} tensors, {each['logs that differ']} logs"
        rows.append(f"| {each['processes']} | {sum(each['kills'].values())} ({how_often}) | {each['runs']} | {same} |")
    return "\n".join(
        [
            "<!-- written by benchmarks/survive.py -->",
            "",
            "# Training runs that were killed",
            "",
            f"{bits} tensors and {logs} logs differ between runs that were killed {kills} times in all and a run that "
            "was never killed.",
            "",
            f"Every run has {about['results'][0]['steps of each run']} steps and saves each of them. Results are "
            f"compared bit for bit at the end. torch {about['torch'].split('+')[0]}, CPU, gloo.",
            "",
            "| processes | kills | runs | what differs |",
            "|--:|---|--:|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    found = [survive(n, args.kills, args.seed) for n in args.processes]
    for each in found:
        print(json.dumps(each, indent=1))
    if args.out:
        about = {"torch": torch.__version__, "results": found}
        (args.out / "survive.json").write_text(json.dumps(about, indent=1) + "\n")
        (args.out / "survive.md").write_text(page(about))
    if any(each["tensors that differ"] or each["logs that differ"] for each in found):
        sys.exit("a run that was killed differs from one that was not")


if __name__ == "__main__":
    main()
