"""Style spaces for a checkpoint you have: heads alone on a frozen backbone, compared with full training.

    python examples/frozen.py --data DIR --out runs/frozen.jsonl          # makes the checkpoint first: content-only SSL
    python examples/frozen.py --data DIR --out runs/mine.jsonl --backbone torchvision:resnet18 --weights FILE \
        --layers layer1,layer2,layer3,layer4

DIR has train/CLASS/* and val/CLASS/*. Every row of ROWS is trained and written to OUT as a JSON line: the R2 of the
change of every augmentation's parameters from each space (`parameter_matrix`, images of val), and the accuracy of
linear probes and 20 neighbors on the classes of val. Rows that are in OUT are not run again. The checkpoint sees 2
views of an image in each of --checkpoint-steps, the heads 4 in --steps; "trained in full" sees as many views as both
together.

A seed with all rows takes fifteen minutes of one free core. Expect an R2 of 0.08 (frozen, 1 hidden layer), 0.36
(frozen, layers in cells) and 0.35 (in full) for hue in the color space; docs/pipelines/checkpoint.md has the other
scores.
"""

import argparse
import copy
import hashlib
import json
import time
from pathlib import Path

import torch
from arguments import count, names, number, whole
from layers import Layers
from photographs import in_memory
from study.worlds import knn_accuracy, linear_accuracy, tables
from torch import Tensor, nn
from training import train

from ssd_addon import StructuredViews, StyleHeads, recipe
from ssd_addon.auditing import named_backbones
from ssd_addon.auditing.untrained import untrained
from ssd_addon.metrics import embed, parameter_matrix
from ssd_addon.runs import build_backbone

Labeled = tuple[Tensor, Tensor]  # images and their classes
ROWS: dict[str, dict] = {
    "frozen: 1 hidden layer": {},
    "trained in full": {"frozen": False, "start": "new"},
    "frozen: layers in 2 x 2 cells": {"grid": 2},
    "fine-tuned": {"frozen": False},
    "frozen: linear heads": {"hidden": ()},
    "untrained: 1 hidden layer": {"start": "untrained"},
    "untrained: layers in 2 x 2 cells": {"start": "untrained", "grid": 2},
    "frozen: 2 hidden layers": {"hidden": (512, 512)},
    "frozen: layers averaged": {"grid": 1},
}


def score(model: StyleHeads, views: StructuredViews, seen: Labeled, new: Labeled, draws: int) -> dict:
    """The label-free matrix, by group and by parameter, and the accuracy of content and of the backbone's features."""
    made = parameter_matrix(model, views, new[0], draws=draws, backbone=True, bootstrap=0)
    z, z_new = (embed(model, views.plain(x)) for x, _ in (seen, new))
    probes = {"linear": linear_accuracy, "neighbors": knn_accuracy}
    accuracy = {
        name: {kind: probe(z[name], seen[1], z_new[name], new[1]) for kind, probe in probes.items()}
        for name in ("content", "backbone")
    }
    return {"tables": tables({"groups": made, "parameters": made.parts}), "accuracy": accuracy}


def main(argv: list[str] | None = None) -> list[dict]:
    """Train and score the rows that OUT does not have yet; returns the lines of this configuration."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, default=Path("runs/frozen.jsonl"))
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--backbone", default=f"{Path(__file__).with_name('synthetic.py')}:ConvNet")
    p.add_argument("--weights", type=Path, help="weights of the backbone (default: content-only SSL trains it first)")
    p.add_argument("--layers", type=names, default=["map.2", "map.5", "map.8", "map.11"])
    for name, default in {"checkpoint-steps": 1600, "steps": 400, "size": 32, "batch-size": 128, "draws": 2}.items():
        p.add_argument(f"--{name}", type=whole, default=default)
    p.add_argument("--lr", type=number, default=2e-3)
    p.add_argument("--seed", type=count, default=0)
    args = p.parse_args(argv)
    config = {k: v for k, v in vars(args).items() if k not in ("data", "out", "rows")}
    file = args.weights and f"{args.weights.name} {hashlib.sha256(args.weights.read_bytes()).hexdigest()[:12]}"
    config |= {"backbone": args.backbone.rpartition("/")[2], "weights": file}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    seen, new = in_memory(args.data, args.size)
    views = StructuredViews(**recipe("color_spatial", size=args.size).views, seed=0)
    fresh, kept = build_backbone(args.backbone, code=True), args.out.with_suffix(f".seed{args.seed}.pt")

    def lines() -> dict[str, dict]:
        text = args.out.read_text().splitlines() if args.out.exists() else []
        return {line["row"]: line for line in map(json.loads, text) if line["config"] == config}

    def run(row: str, groups: str, net: nn.Module, steps: int, **options) -> None:
        """Train, score and write one row."""
        print(f"{row}: {steps} steps", flush=True)
        torch.manual_seed(args.seed)
        start, r = time.monotonic(), recipe(groups, size=args.size)
        length = {"steps": steps, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
        model, _ = train(net, StructuredViews(**r.views, seed=args.seed), r, samples, **length, **options)
        seconds = round(time.monotonic() - start, 1)
        line = {"row": row, "config": config, "seconds": seconds, **score(model, views, seen, new, args.draws)}
        print(json.dumps(line["tables"]["groups"]), json.dumps(line["accuracy"]), flush=True)
        with open(args.out, "a") as file:
            file.write(json.dumps(line) + "\n")

    def samples(n: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        return seen[0][torch.randint(len(seen[0]), (n,), generator=generator)], {}

    checkpoint = copy.deepcopy(fresh)
    if args.weights:
        (checkpoint,) = named_backbones([args.backbone], weights=[args.weights]).values()
    elif kept.exists() and (stored := torch.load(kept, weights_only=True))["config"] == config:
        checkpoint.load_state_dict(stored["backbone"])
    else:
        run("checkpoint", "content_only", checkpoint, args.checkpoint_steps, hidden=(512,))
        torch.save({"config": config, "backbone": checkpoint.state_dict()}, kept)
    for row in args.rows:
        if row in lines():
            continue
        options = {"start": "checkpoint", "grid": 0, "frozen": True, "hidden": (512,)} | ROWS[row]
        start, grid = options.pop("start"), options.pop("grid")
        net = copy.deepcopy(checkpoint if start == "checkpoint" else fresh)
        if start == "untrained":
            two_views = StructuredViews(**recipe("content_only", size=args.size).views, seed=0)
            net = untrained(fresh, two_views(seen[0][:256]).views[0], args.seed)
        steps = args.steps + (args.checkpoint_steps // 2 if start == "new" else 0)
        run(row, "color_spatial", Layers(net, args.layers, grid) if grid else net, steps, **options)
    return list(lines().values())


if __name__ == "__main__":
    main()
