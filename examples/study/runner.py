"""Does it disentangle, and what decides it? Runs a grid of configurations and seeds, and makes docs/results.md of it.

    python examples/study run latents --workers 2                       # resumes: finished runs are not repeated
    python examples/study run sprites --workers 2
    python examples/study run cifar imagenet --workers 2 --cifar DIR --imagenet DIR
    python examples/study list                                          # what has been run, what is missing
    python examples/study tables                                        # the tables and pictures of docs/results.md

Every finished run is one line of docs/results/study.jsonl: experiment, name, configuration (differences from the
defaults), seed, commit, what each space encodes, the last terms of the loss, seconds. A run has one thread, so that two
workers on two cores do not disturb each other. Its length is given in steps, never in minutes. The grid is in grid.py.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import re
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from result_lines import append, commit, key, read
from study import findings, grid, pictures, report
from study.methods import METHODS, build_model
from study.worlds import WORLDS
from synthetic import learning_rate
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ssd_addon.losses import resolve_family
from ssd_addon.metrics import embed

LINES = Path(__file__).parents[2] / "docs" / "results" / "study.jsonl"


def train(config: dict[str, Any], seed: int, device: str = "cpu", keep: str = "", label: str = "") -> dict[str, Any]:
    """One run; returns its line of the results."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    c = grid.DEFAULTS | grid.OF_WORLD[config["world"]] | config | {"device": device, "keep": keep, "label": label}
    g = torch.Generator().manual_seed(seed)
    world: Any = WORLDS[c["world"]](c, seed)
    if c["method"] == "truth":  # how well the factors themselves predict each other
        return {"seconds": 0.0, **world.scores(None, None, False)}
    model = build_model(c, world).to(device)
    method: Any = METHODS[c["method"]](c, world).to(device)
    parameters = [*model.parameters(), *(p for p in method.parameters() if p.requires_grad)]
    optimizer = torch.optim.AdamW(parameters, lr=c["lr"], weight_decay=1e-4, fused=device != "cpu")
    start, terms, history, curve = time.monotonic(), None, [], []
    unit = resolve_family(c["family"]).on_sphere and c["method"] != "cube"
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True) if c["curve"] else None
    for step in range(c["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / c["steps"], c["lr"])
        batch = world.batch(c["batch"], g)
        with torch.autocast("cpu", torch.bfloat16, enabled=c["amp"] and device == "cpu"):
            noted = bool(c["history"]) and step % c["history"] == 0
            loss, found = method(model, batch, noted or step == c["steps"] - 1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        terms = found or terms
        if noted and found is not None:
            of_content = {k: v for k, v in found.scalars().items() if k.endswith("/content")}
            history.append({"step": step, **{k: round(v, 4) for k, v in of_content.items()}})
        if hasattr(method, "after"):
            method.after(found)
        looked_at = (
            device == "cpu" or step % 50 == 49 or step == c["steps"] - 1
        )  # reading a value makes the host wait for a GPU
        if looked_at and not torch.isfinite(loss):
            raise FloatingPointError(f"step {step}: the loss is {loss.item()}")
        if average is not None:
            average.update_parameters(model)
            if step % c["curve"] == c["curve"] - 1:
                averaged: Any = average.module
                read = {"last": model, "average": averaged}
                found_now = {
                    k: world.quick(lambda x, m=m: embed(m, x, batch_size=500, on_sphere=unit)) for k, m in read.items()
                }
                curve.append({"step": step + 1, **{k: v["linear"] for k, v in found_now.items()}})
                model.train()
    seconds = time.monotonic() - start

    def scored(x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every space, and the backbone itself even if all heads share a hidden layer after it."""
        features = model.features(x)
        z = model.project(features)
        if c["method"] == "cube":
            z = {n: torch.tanh(t) for n, t in z.items()}
        return z | {"backbone": model.backbone.backbone(x) if c["heads"] == "one projector" else features}

    model.eval()
    if c["keep"]:  # a file beside the lines, with weights in 16 bits
        Path(c["keep"]).mkdir(parents=True, exist_ok=True)
        halves = {
            k: v.half() if v.ndim > 1 else v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)
        }
        name = re.sub(r"\W+", "-", f"{c['label']}-{seed}")
        torch.save({k: v.cpu() for k, v in halves.items()}, Path(c["keep"]) / f"{name}.pt")
    line = {
        "seconds": round(seconds, 1),
        **world.scores(lambda x: embed(scored, x, batch_size=500, on_sphere=unit), scored, unit),
    }
    if terms is not None:
        line["terms"] = {k: round(v, 4) for k, v in terms.scalars().items()}
    if history:
        line["history"] = history
    if curve:
        line["curve"] = curve
    if device != "cpu":
        line["device"] = torch.cuda.get_device_name()
    if c["dual"] is not None and hasattr(method, "criterion"):
        line["lambda"] = [round(float(w), 3) for w in method.criterion.lambdas(world.plan).values()]
    return line


def attempt(run: dict[str, Any], places: dict[str, str], device: str = "cpu", keep: str = "") -> dict[str, Any]:
    config = dict(run["config"])
    if config.get("data"):
        config["data"] = places[config["data"]]
    label = f"{run['experiment']} {run['name']}"
    return run | train(config, run["seed"], device, keep, label)


def end_with(parent: int) -> None:
    """In a worker: stop when the runner has stopped, even by a signal that it could not pass on."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=("run", "list", "tables"))
    p.add_argument("experiments", nargs="*", help=f"of {', '.join(grid.EXPERIMENTS)}, or how they begin; none: all")
    p.add_argument("--workers", type=int, default=1, help="runs at the same time, one thread each")
    p.add_argument("--seeds", type=int, default=3, help="only the first so many seeds of every row")
    p.add_argument("--rows", default="", metavar="REGEX", help="only rows whose name holds it")
    p.add_argument("--cifar", default="", help="DIR with train/CLASS/* and val/CLASS/*, 32 pixels")
    p.add_argument("--imagenet", default="", help="DIR with train/CLASS/*")
    p.add_argument("--device", default="cpu", help="cuda: the runs share the device, in 32 bits without autocast")
    p.add_argument("--keep", default="", metavar="DIR", help="folder that also gets the trained weights")
    p.add_argument("--minutes", type=float, help="minutes after which no run is started and running ones are ended")
    p.add_argument("--steps", type=int, help="steps instead of the grid's, to try it; needs --out")
    p.add_argument("--out", type=Path, default=LINES)
    args = p.parse_args(argv)
    if args.steps and args.out == LINES:
        p.error(f"--steps: expected --out beside it, as runs of other lengths are no results: got none, so {LINES}")
    done = {key(line) for line in read(args.out)}
    try:
        chosen = re.compile(args.rows)
    except re.error as error:
        p.error(f"--rows: expected a regular expression: got {args.rows!r}, which is none ({error})")
    runs = [r for r in grid.runs(args.experiments) if r["seed"] < args.seeds and chosen.search(r["name"])]
    if not runs:
        p.error(f"--rows: expected a part of a row's name: got {args.rows!r}, which is in none of the chosen")
    runs = [r for r in runs if args.command != "run" or key(r) not in done]
    if args.command == "tables":
        report.write(read(args.out))
        found, folder = read(args.out), report.DOCS / "results"
        for draw in (pictures.draw, findings.without_cost, findings.of_sprites, findings.of_keys):
            draw(found, folder)
        return 0
    if args.command == "list":
        for r in runs:
            print("done" if key(r) in done else "-   ", r["experiment"], r["name"], "seed", r["seed"])
        return 0
    places = {"cifar": args.cifar, "imagenet": args.imagenet}
    if lacking := {r["config"]["data"] for r in runs if r["config"].get("data")} - {k for k, v in places.items() if v}:
        p.error(f"expected the folder of --{' and --'.join(sorted(lacking))}: got none")
    if args.steps:
        runs = [r | {"config": r["config"] | {"steps": args.steps}} for r in runs]
    runs = [r | {"commit": commit()} for r in runs]
    failed, start = 0, time.monotonic()
    context = multiprocessing.get_context("spawn")
    workers = {"mp_context": context, "initializer": end_with, "initargs": (os.getpid(),)}
    with concurrent.futures.ProcessPoolExecutor(args.workers, **workers) as pool:
        waiting = {pool.submit(attempt, r, places, args.device, args.keep): r for r in runs}
        limit = 60 * args.minutes if args.minutes else None
        count = 0
        try:
            for count, future in enumerate(concurrent.futures.as_completed(waiting, timeout=limit), 1):
                run = waiting[future]
                try:
                    append(args.out, future.result())
                except Exception:
                    failed += 1
                    traceback.print_exc()
                elapsed = (time.monotonic() - start) / 60
                print(
                    f"{count} of {len(runs)}  {elapsed:.1f} min, {elapsed / count * (len(runs) - count):.0f} min left  "
                    f"{run['experiment']}: {run['name']}, seed {run['seed']}",
                    flush=True,
                )
                if failed == count >= 2 * args.workers:
                    raise SystemExit(f"the first {count} runs have all failed: see above")
        except TimeoutError:
            failed += len(runs) - count
            print(f"{args.minutes} minutes are over: {len(runs) - count} runs are missing", flush=True)
        finally:
            if count < len(runs):  # do not wait for runs
                for future in waiting:
                    future.cancel()
                for process in list((pool._processes or {}).values()):
                    process.kill()
    return 1 if failed else 0
