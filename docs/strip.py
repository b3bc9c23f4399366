"""The README's first picture: the same object in any color, and the same color in any object.

    python examples/demo.py --out runs/demo
    python docs/strip.py runs/demo docs/results

Searches 2,000 sprites that the run was not trained on, and writes retrieval.png and retrieval.json.

At the left of the picture are the queries: the first held-out sprite of each shape, in the order of the generator's
shapes, so nobody chose them. Beside each query are its nearest neighbors among the other held-out sprites, nearest
first, by the cosine similarity of the content space, of the color space, and of the backbone's pooled features. Sprites
are drawn at twice the 48 pixels that the model sees, from the same factors.

The percentages in the picture and the numbers in the file are precisions at 5, averaged over all held-out sprites as
queries: the share of the five nearest neighbors that have the query's shape, and the share whose hue is within 20
degrees of the query's on the color circle. "chance" is the same share among all other held-out sprites. A run has one
seed, and so do these numbers.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from sprites import SHAPES, draw_factors, render

from ssd_addon import runs
from ssd_addon.metrics import StyleIndex, embed

SAMPLES, SEED = 2000, 20_000
"""Held-out sprites and the seed that draws them; examples/demo.py draws from its own seed, 30,000 and 10,000 on."""
NEAREST, TOLERANCE = 5, 20.0
"""Neighbors that count, and how far in degrees a hue may be from the query's to count as the same."""
SEARCHES = {
    "content": ("Same object, any color", "nearest in the content space"),
    "color": ("Same color, any object", "nearest in the color space"),
    "backbone": ("A mix of everything", "nearest by backbone features"),
}
"""Space -> what stands above its neighbors."""
WIDTH, PAPER, INK, SOFT = 1200, "#f6f8fa", "#1f2328", "#57606a"

Scores = dict[str, dict[str, float]]


def same(factors: Mapping[str, Tensor], rows: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Whether others [q, k] have the shape, and the hue within the tolerance, of rows [q]: name -> [q, k]."""
    apart = (factors["hue"][others] - factors["hue"][rows][:, None]).remainder(1)
    apart = torch.minimum(apart, 1 - apart) * 360
    return {"shape": factors["shape"][others] == factors["shape"][rows][:, None], "hue": apart <= TOLERANCE}


def precision(z: Mapping[str, Tensor], factors: Mapping[str, Tensor], k: int = NEAREST) -> Scores:
    """Space -> "shape", "hue" -> the share of the k nearest neighbors that have the query's; and "chance"."""
    index, n = StyleIndex(z), len(factors["shape"])
    rows = torch.arange(n)
    found = {s: same(factors, rows, index.search(rows, s, k=k)[1].cpu()) for s in z}
    scores = {s: {f: hits.double().mean().item() for f, hits in each.items()} for s, each in found.items()}
    everything = same(factors, rows, rows.expand(n, n))
    scores["chance"] = {f: (int(hits.sum()) - n) / (n * (n - 1)) for f, hits in everything.items()}
    return scores


def first_of_each(shape: Tensor) -> Tensor:
    """The row of the first image of each shape, [q]."""
    return torch.stack([(shape == k).nonzero()[0, 0] for k in shape.unique()])


def strip(
    path: Path,
    images: Tensor,
    queries: Tensor,
    neighbors: Mapping[str, Tensor],
    headings: Mapping[str, Sequence[str]],
    note: str,
) -> None:
    """Draw queries and their neighbors.

    Args:
        path: where to write the PNG, 1,200 pixels wide.
        images: [n, 3, H, W] in [0, 1].
        queries: rows [q], one below the other.
        neighbors: search -> rows [q, k], the groups of columns from left to right.
        headings: search -> a title and the lines below it.
        note: what stands below the picture.
    """
    columns = 1 + sum(found.shape[1] for found in neighbors.values())
    margin, aisle, gap, head = 24, 32, 4, 126
    tile = (WIDTH - 2 * margin - len(neighbors) * aisle - (columns - 1 - len(neighbors)) * gap) / columns
    height = round(head + len(queries) * (tile + gap) + 26 + 30 * (note.count("\n") + 1))
    fig = Figure(figsize=(WIDTH / 100, height / 100), dpi=100)
    FigureCanvasAgg(fig)
    fig.patch.set_alpha(0)
    card = FancyBboxPatch((0, 0), 1, 1, boxstyle="round,pad=0,rounding_size=0.012", mutation_aspect=WIDTH / height)
    card.set(facecolor=PAPER, edgecolor="none", transform=fig.transFigure, zorder=-1)
    fig.add_artist(card)

    def write(x: float, y: float, text: str, size: float, color: str = INK, **more: Any) -> None:
        fig.text(x / WIDTH, 1 - y / height, text, fontsize=size * 0.72, color=color, va="top", **more)

    def place(row: int, x: float, line: int, framed: bool = False) -> None:
        y = head + line * (tile + gap)
        ax = fig.add_axes((x / WIDTH, 1 - (y + tile) / height, tile / WIDTH, tile / height))
        ax.imshow(images[row].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="lanczos")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(visible=framed, color=SOFT, linewidth=2.5)

    write(margin, 26, "Query", 24, weight="bold")
    for line, row in enumerate(queries.tolist()):
        place(row, margin, line, framed=True)
    x = margin + tile + aisle
    for search, found in neighbors.items():
        title, *lines = headings[search]
        write(x, 26, title, 24, weight="bold")
        for k, text in enumerate(lines):
            write(x, 61 + 29 * k, text, 19, INK if k == 0 else SOFT)
        for line, rows in enumerate(found.tolist()):
            for k, row in enumerate(rows):
                place(row, x + k * (tile + gap), line)
        x += found.shape[1] * (tile + gap) - gap + aisle
    write(margin, height - 12 - 30 * (note.count("\n") + 1), note, 18, SOFT, linespacing=1.35)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)


def percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def headings(scores: Scores) -> dict[str, tuple[str, ...]]:
    """What stands above each group of columns, with its measured shares."""
    return {
        s: (*words, f"same shape {percent(scores[s]['shape'])}, same hue {percent(scores[s]['hue'])}")
        for s, words in SEARCHES.items()
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="the folder of a run of examples/demo.py")
    p.add_argument("out", type=Path, help="where retrieval.png and retrieval.json are written")
    p.add_argument("--samples", type=int, default=SAMPLES, help="held-out sprites")
    p.add_argument("--shown", type=int, default=4, help="neighbors in the picture")
    args = p.parse_args(argv)

    factors = draw_factors(args.samples, torch.Generator().manual_seed(SEED))
    z = embed(runs.load(args.run, backbone="examples/demo.py:Net").model, render(factors), on_sphere=True)
    scores = precision(z, factors)
    queries = first_of_each(factors["shape"])
    index = StyleIndex(z)
    found = {s: index.search(queries, s, k=args.shown)[1] for s in SEARCHES}
    chance = scores["chance"]
    note = (
        "Sprites that the model was not trained on; each query is the first of its shape. Percentages are of the\n"
        f"{NEAREST} nearest neighbors of each of {args.samples:,} sprites. Same hue: within {TOLERANCE:.0f} degrees. "
        f"Chance: same shape {percent(chance['shape'])}, same hue {percent(chance['hue'])}."
    )
    strip(args.out / "retrieval.png", render(factors, 96), queries, found, headings(scores), note)
    trained = json.loads((args.run / "metrics.json").read_text())
    config = trained["config"]
    threads = f" --threads {config['threads']}" if config["threads"] else ""
    result = {
        "commands": [
            f"python examples/demo.py --out runs/demo --seed {config['seed']}" + threads,
            "python docs/strip.py runs/demo docs/results",
        ],
        "training": {k: config[k] for k in ("seed", "batch_size", "lr", "threads")} | {"steps": trained["steps"]},
        "held_out": {"images": args.samples, "seed": SEED},
        "nearest": NEAREST,
        "hue_tolerance_degrees": TOLERANCE,
        "queries": dict(zip(SHAPES, queries.tolist(), strict=True)),
        "precision": {s: {f: round(v, 4) for f, v in each.items()} for s, each in scores.items()},
    }
    (args.out / "retrieval.json").write_text(json.dumps(result, indent=1) + "\n")
    for space, each in scores.items():
        print(f"{space:<9}" + "".join(f"  same {f} {v:.3f}" for f, v in each.items()))
    return result


if __name__ == "__main__":
    main()
