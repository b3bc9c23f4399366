"""Score a trained model's features by linear probes, nearest neighbors and few labels, space by space.

    python examples/linear_probe.py runs/imagenet --data DIR --out runs/imagenet/probes.json
    python examples/linear_probe.py runs/imagenet --data DIR --labels 0.01 0.1        # with 1 % and 10 % of the labels

RUN is a run's folder or a file of StyleHeads.save; DIR holds train/CLASS/*.jpg and val/CLASS/*.jpg. The model is in
evaluation mode and is not trained. Whole images are embedded once. Every space, and the backbone, is scored by
- a linear probe: softmax regression on standardized features, SGD with a cosine schedule. One probe for each learning
  rate of a grid is trained at the same time, and the rate is chosen on a tenth of the training images;
- k nearest neighbors by cosine, k = 20 and 200, each with the weight exp(cosine / 0.07);
- the linear probe again with a part of the labels, the same share of every class.

OUT gets a JSON object: "probes" (space -> measure -> accuracy on val) and, if the run stores how its views are drawn,
"parameters" (which augmentations each space encodes, `metrics.parameter_matrix`; for content-only runs, those of the
preset color_spatial). Expect a minute for 4,000 photographs of 32 pixels on two cores.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from arguments import count, share, whole
from shard_files import image_files, same_classes
from torch import Tensor
from torch.utils.data import DataLoader

from ssd_addon import StructuredCollate, StructuredViews, presets, runs
from ssd_addon.metrics import embed, parameter_matrix
from ssd_addon.metrics.images import scaled

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
NEIGHBORS, TEMPERATURE = (20, 200), 0.07


def linear_probe(x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor, epochs: int, seed: int) -> tuple[float, float]:
    """Accuracy on new images and the learning rate that was chosen on a tenth of the training images."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, x_new = (x - mean) / std, (x_new - mean) / std
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    checked, fitted = order[: max(1, len(x) // 10)], order[max(1, len(x) // 10) :]
    rates = torch.tensor(RATES)
    w = torch.zeros(len(RATES), x.shape[1] + 1, int(y.max()) + 1, requires_grad=True)  # [rates, d and bias, classes]
    velocity, steps = torch.zeros_like(w), epochs * -(-len(fitted) // 256)
    for step in range(steps):
        if step % -(-len(fitted) // 256) == 0:
            shuffled = fitted[torch.randperm(len(fitted), generator=generator)].split(256)
        rows = shuffled[step % len(shuffled)]
        logits = F.pad(x[rows], (0, 1), value=1.0) @ w  # [rates, rows, classes]
        loss = F.cross_entropy(logits.flatten(0, 1), y[rows].repeat(len(RATES)), reduction="none")
        (gradient,) = torch.autograd.grad(loss.view(len(RATES), -1).mean(1).sum(), w)
        velocity = 0.9 * velocity + gradient
        decay = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)))
        with torch.no_grad():
            w -= (rates * decay)[:, None, None] * velocity
    with torch.no_grad():
        sides = ((x[checked], y[checked]), (x_new, y_new))
        right = [(F.pad(t, (0, 1), value=1.0) @ w).argmax(2) == c for t, c in sides]
    best = int(right[0].float().mean(1).argmax())
    return float(right[1][best].float().mean()), RATES[best]


def neighbors(x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor, k: int) -> float:
    """Accuracy of weighted k-NN by cosine."""
    x, x_new, classes = F.normalize(x, dim=1), F.normalize(x_new, dim=1), int(y.max()) + 1
    right = 0
    for part, labels in zip(x_new.split(1024), y_new.split(1024), strict=True):
        cosine, near = (part @ x.T).topk(min(k, len(x)), dim=1)
        votes = F.one_hot(y[near], classes) * (cosine / TEMPERATURE).softmax(1)[:, :, None]
        right += int((votes.sum(1).argmax(1) == labels).sum())
    return right / len(x_new)


def few(y: Tensor, part: float, seed: int) -> Tensor:
    """Rows with this share of every class, at least one each."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    return torch.cat([(own := order[y[order] == c])[: max(1, round(part * len(own)))] for c in y.unique()])


def main(argv: list[str] | None = None) -> dict:
    """Embed, probe and write; returns what is written."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, metavar="RUN")
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path)
    p.add_argument("--size", type=whole, help="edge of the images (default: that of the run)")
    p.add_argument(
        "--labels", type=share, nargs="*", default=[0.01, 0.1], help="shares of the labels for further probes"
    )
    p.add_argument("--epochs", type=whole, default=30, help="of the linear probes")
    p.add_argument("--batch-size", type=whole, default=128)
    p.add_argument("--workers", type=count, default=0)
    p.add_argument(
        "--measure", type=count, default=1000, help="number of val images for the label-free matrix; 0: none"
    )
    p.add_argument("--seed", type=count, default=0)
    args = p.parse_args(argv)
    opened = runs.load(args.run)
    size = args.size or opened.card.get("size") or 224
    embedded, kept = {}, []
    splits = {split: image_files(args.data / split, short_side=size) for split in ("train", "val")}
    same_classes(args.data, *(files.classes for files in splits.values()))
    drawn = torch.randperm(len(splits["val"]), generator=torch.Generator().manual_seed(args.seed))[: args.measure]
    measured = set(drawn.tolist())  # files are in the order of their classes
    for split, files in splits.items():
        loader = DataLoader(files, args.batch_size, collate_fn=StructuredCollate(size), num_workers=args.workers)
        parts: list[dict[str, Tensor]] = []
        for images, _, _ in loader:
            ready = opened.views.plain(images) if opened.views is not None else scaled(images)
            parts.append(embed(opened.model, ready, batch_size=args.batch_size))
            done = sum(len(next(iter(z.values()))) for z in parts)
            if split == "val":
                kept.append(images[[k for k in range(len(images)) if done - len(images) + k in measured]])
            if len(parts) % 20 == 0 or done == len(files):
                print(f"embedded {done}/{len(files)} images of {split}", flush=True)
        embedded[split] = {s: torch.cat([z[s] for z in parts]) for s in parts[0]}, torch.tensor(files.targets)
    (seen, y), (new, y_new) = embedded["train"], embedded["val"]
    found: dict[str, dict[str, float]] = {}
    for space, x in seen.items():
        given = (x, y, new[space], y_new)
        accuracy, rate = linear_probe(*given, args.epochs, args.seed)
        found[space] = {"linear": accuracy, "learning rate": rate}
        found[space] |= {f"{k}-NN": neighbors(*given, k) for k in NEIGHBORS}
        for part in args.labels:
            rows = few(y, part, args.seed)
            accuracy, _ = linear_probe(x[rows], y[rows], new[space], y_new, args.epochs, args.seed)
            found[space][f"linear, {part:.0%} of labels"] = accuracy
        print(space, "  ".join(f"{name} {value:.3f}" for name, value in found[space].items()), flush=True)
    out: dict = {"probes": found, "images": {"train": len(y), "val": len(y_new)}}
    shown = torch.cat(kept) if kept else torch.zeros(0)
    if opened.views is not None and len(shown) >= 10:
        alone = len(opened.views.plan.spaces) == 1  # content-only: what does it encode of the same groups?
        views = StructuredViews(**presets("color_spatial", size=size), seed=args.seed) if alone else opened.views
        table = parameter_matrix(opened.model, views, shown, backbone=True)
        print(table, flush=True)
        out["parameters"] = table.to_json()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(out, indent=1) + "\n")
    return out


if __name__ == "__main__":
    main()
