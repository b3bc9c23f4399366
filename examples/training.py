"""The training loop, the scores and the files of a run that series.py, domains.py and frozen.py share."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssd_addon import CollapseAlarm, EquivarianceLoss, JointEntropyLoss, StructuredViews, StyleHeads, plots
from ssd_addon.metrics import Factor, ScoreTable, embed, parameter_matrix, r2_matrix
from ssd_addon.recipes import Recipe

Samples = Callable[[int, torch.Generator], tuple[Tensor, dict[str, Factor]]]
"""(n, generator) -> n new samples [n, ...] and their factors."""


def learning_rate(progress: float, base: float) -> float:
    """Linear warm-up over 5 % of the run, then cosine to 0.1 %."""
    warm = min(1.0, progress / 0.05)
    return base * warm * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(
    net: nn.Module,
    views: StructuredViews,
    r: Recipe,
    samples: Samples,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    every: int = 20,
    hidden: Sequence[int] = (256,),
    frozen: bool = False,
) -> tuple[StyleHeads, list[dict[str, Any]]]:
    """Train a backbone with the recommended settings and AdamW; prints the progress and returns the logged terms.

    If the backbone is `frozen`, only the heads are trained.
    """
    generator = torch.Generator().manual_seed(seed)
    views(samples(2, generator)[0])  # which shows it what the samples are like
    model = StyleHeads(net, r.spaces, hidden=hidden, sample_ndim=views.samples.ndim)
    if frozen:
        model.freeze()
    criterion = JointEntropyLoss(**r.loss)
    model.on_sphere = criterion.on_sphere
    equivariance = EquivarianceLoss(r.spaces, views, **r.equivariance) if r.equivariance else None
    parameters = [*model.parameters(), *(equivariance.parameters() if equivariance else ())]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=lr, weight_decay=1e-4)
    log: list[dict[str, Any]] = []
    alarm = CollapseAlarm(steps, r.spaces)
    start, shown = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((step + 1) / steps, lr)
        batch = views(samples(batch_size, generator)[0])
        z = model(batch)
        terms = criterion.terms(z)
        loss = terms.loss if equivariance is None else terms.loss + equivariance(z, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        criterion.weights.step(terms)
        elapsed = time.monotonic() - start
        if step % every == 0 or step == steps - 1:
            log.append(alarm.watch({"step": step, "seconds": round(elapsed, 2), **terms.scalars()}))
        if elapsed - shown > 5 or step == steps - 1:
            shown, left = elapsed, elapsed * (steps / (step + 1) - 1)
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {left:.0f} s left", flush=True)
    return model, log


def score(
    model: StyleHeads, views: StructuredViews, samples: Tensor, factors: Mapping[str, Factor], changed: Tensor
) -> dict[str, ScoreTable]:
    """Score the known factors of `samples` by two probes, and the changes by augmentations of `changed`."""
    z = embed(model, views.plain(samples), batch_size=500, on_sphere=True)
    tables = {name: r2_matrix(z, factors, probe=kind) for name, kind in (("linear", "ridge"), ("nonlinear", "kernel"))}
    made = parameter_matrix(model, views, changed, on_sphere=True, backbone=True)
    return tables | {"label-free": made} | ({"label-free, each parameter": made.parts} if made.parts else {})


def write(
    out: Path,
    model: StyleHeads,
    tables: Mapping[str, ScoreTable],
    log: list[dict[str, Any]],
    config: Mapping[str, Any],
    card: Mapping[str, Any],
) -> dict[str, Any]:
    """Write metrics.json, matrix.png, curves.png, log.jsonl and model.pt; prints the tables."""
    for title, table in tables.items():
        print(f"\n{title}\n{table}")
    result = {
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in config.items()},
        "steps": log[-1]["step"] + 1,
        "seconds": log[-1]["seconds"],
        "tables": {k: t.to_json() for k, t in tables.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(result, indent=1))
    (out / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    plots.matrix({k: t for k, t in tables.items() if not k.endswith("parameter")}, out / "matrix.png")
    plots.curves(log, out / "curves.png")
    model.save(out / "model.pt", card={"name": out.name, "family": "simclr", **card})
    return result
