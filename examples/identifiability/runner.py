"""Two published identifiability experiments: their methods and this library's on equal budgets.

    python examples/identifiability run                      # resumes: rows that have a line are not run again
    python examples/identifiability run pair --device cuda
    python examples/identifiability agree --pair DIR --partial DIR
    python examples/identifiability list
    python examples/identifiability tables                   # fills docs/results/identifiability.md

Generators: von Kügelgen et al. 2021 (arXiv 2106.04619; pairs of content and style) and Yao et al. 2024 (arXiv
2311.04056; partially observed views). Everything is written from the papers' equations. `agree` compares it with
checkouts (DIR) of the authors' code (github.com/ysharma1126/ssl_identifiability,
github.com/CausalLearningAI/multiview-crl). Every run is one line of docs/results/identifiability.jsonl and has one
thread.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from identifiability import agreement, grid, report
from identifiability.generators import ContentStyle, PartialViews
from identifiability.methods import METHODS
from identifiability.scores import of_pair, of_views
from result_lines import ROOT, append, commit, key, read

LINES = ROOT / "docs" / "results" / "identifiability.jsonl"
HELD_OUT = 10_000  # seed of the samples for the scores


def world_of(c: dict[str, Any], seed: int) -> Any:
    if c["world"] == "pair":
        return ContentStyle(seed, change=c["change"], statistical=c["statistical"], causal=c["causal"])
    return PartialViews(seed, dependent=c["dependent"])


def rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """A linear warm-up over the first steps, then a cosine to zero."""
    return peak * min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def train(config: dict[str, Any], seed: int, device: str = "cpu") -> dict[str, Any]:
    """One run: budget, seconds and scores."""
    torch.set_num_threads(1)
    c = grid.DEFAULTS[config["world"]] | config
    world: Any = world_of(c, seed)
    if c["method"] == "truth":
        return {"n": c["samples"], "seconds": 0.0, "scores": score(c, world, None)}
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed + 1)
    method = METHODS[c["world"]][c["method"]](c, world).to(device)
    samples = c["passes"] // method.passes(1)
    optimizer = torch.optim.Adam(method.parameters(), lr=c["lr"])
    clock, cpu = time.monotonic(), time.process_time()
    for step in range(c["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, c["steps"], c["lr"])
        loss = method.loss(world, samples, g)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if hasattr(method, "after"):
            method.after()
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()}")
    return {
        "n": c["samples"],
        "budget": {
            "steps": c["steps"],
            "passes": method.passes(samples),
            "samples": samples,
            "weights": sum(p.numel() for p in method.parameters()),
        },
        "seconds": round(time.monotonic() - clock, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "device": device,
        "loss": round(loss.item(), 4),
        "scores": score(c, world, method.eval()),
    }


@torch.no_grad()
def score(c: dict[str, Any], world: Any, method: Any) -> dict[str, Any]:
    """Scores by both protocols on samples not used in training; of the true latents if there is no method."""
    g = torch.Generator().manual_seed(HELD_OUT)
    like = None if method is None else next(method.parameters())
    if c["world"] == "pair":
        x, factors = world.labelled(c["samples"], g)
        z = factors if method is None else {n: t.cpu() for n, t in method.encode(x.to(like)).items()}
        return of_pair(z, factors, c["fit"], c["rows"])
    z = world.latents(c["samples"], g)
    common = world.shared(range(len(world.latents_of)))
    if method is None:
        names = METHODS["partial"]["theirs"](c, world).places
        codes = {s: {k: z[:, list(world.shared(s))] for k in s} for s in names}
    else:
        codes = method.encode([x.to(like) for x in world.observe(z)])
        codes = {s: {k: t.cpu() for k, t in by_view.items()} for s, by_view in codes.items()}
    return of_views(codes, z, common, c["fit"], c["rows"])


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=("run", "list", "tables", "agree"))
    p.add_argument("experiments", nargs="*", help=f"of {', '.join(grid.EXPERIMENTS)}, or how they begin; none: all")
    p.add_argument("--device", default="cpu", help="device for training; scores are computed on the CPU")
    p.add_argument("--steps", type=int, help="steps instead of the grid's, to try it; needs --out")
    p.add_argument("--pair", type=Path, metavar="DIR", help="agree: a checkout of ssl_identifiability")
    p.add_argument("--partial", type=Path, metavar="DIR", help="agree: a checkout of multiview-crl")
    p.add_argument("--out", type=Path, default=LINES)
    args = p.parse_args(argv)
    if args.steps and args.out == LINES:
        p.error(f"--steps: expected --out beside it, as runs of other lengths are no results: got none, so {LINES}")
    if args.command == "tables":
        report.write(read(args.out))
        return 0
    if args.command == "agree":
        if not (args.pair and args.partial):
            p.error("agree: expected --pair DIR and --partial DIR, the checkouts of the authors' code: got one or none")
        found = {"experiment": "agreement", "commit": commit(), **agreement.compare(args.pair, args.partial)}
        append(args.out, found)
        print(json.dumps(found, indent=1))
        return 0
    runs, done = grid.runs(args.experiments), {key(x) for x in read(args.out) if "config" in x}
    for count, run in enumerate(runs, 1):
        if args.steps:
            run = run | {"config": run["config"] | {"steps": args.steps}}
        name = f"{run['experiment']}: {run['name']}, seed {run['seed']}"
        if args.command == "list":
            print("done" if key(run) in done else "-   ", name)
        elif key(run) not in done:
            append(args.out, run | {"commit": commit()} | train(run["config"], run["seed"], args.device))
            print(f"{count} of {len(runs)}  {name}", flush=True)
    return 0
