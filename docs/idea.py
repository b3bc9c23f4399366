"""The figures of docs/idea.md: `python docs/idea.py`. Each is drawn twice, for light and dark pages (NAME-dark.png).

views    one image, its query and keys, and which augmentation parameters each key shares with the query
spaces   the pair that each space compares, and what the space becomes invariant to
entropy  what would go wrong without the joint entropy, and what it does
"""

import sys
from collections.abc import Callable
from pathlib import Path

import kornia.augmentation as K
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from ssd_addon import StructuredViews, ViewBatch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from sprites import render

OUT = Path(__file__).parent / "idea"
LIGHT = {"ground": "white", "ink": "#1b1b1f", "faint": "#6b6b76", "same": "#0072b2", "on": "white", "new": "#d55e00"}
DARK = {"ground": "#0c0c12", "ink": "#e9e9ee", "faint": "#a0a0ad", "same": "#56b4e9", "on": "#0c0c12", "new": "#e69f00"}
SIZE = 96
Theme = dict[str, str]


def sprites(shape: list[int], hue: list[float], **more: list[float]) -> Tensor:
    """Images [n, 3, SIZE, SIZE] of given shapes (square, ellipse, heart, triangle) and hues."""
    n = len(shape)
    still = {"scale": 0.4, "rotation": 0.0, "x": 0.0, "y": 0.0, "brightness": 1.0}
    factors = {k: torch.full((n,), v) for k, v in still.items()} | {k: torch.tensor(v) for k, v in more.items()}
    return render(factors | {"shape": torch.tensor(shape), "hue": torch.tensor(hue)}, SIZE)


def heart() -> tuple[Tensor, ViewBatch]:
    """A sprite, and its query and keys for the groups color and spatial."""
    image = sprites([2], [0.95])
    color = [K.ColorJitter(brightness=(0.75, 1.0), hue=(-0.5, 0.5), p=1.0)]
    spatial = [K.RandomAffine(60.0, translate=(0.22, 0.22), scale=(0.6, 1.3), p=1.0)]
    return image[0], StructuredViews({"color": color, "spatial": spatial}, seed=11)(image)


def show(ax: Axes, image: Tensor, x: float, y: float, edge: float, theme: Theme, cut_out: bool = False) -> None:
    """The image with its center at (x, y), in a frame, or the sprite alone without its black ground."""
    ends = (x - edge / 2, x + edge / 2, y - edge / 2, y + edge / 2)
    if cut_out:
        opaque = image.amax(0, keepdim=True)
        image = torch.cat([image / opaque.clamp(min=1e-3), opaque])
    ax.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), extent=ends, zorder=2)
    if cut_out:
        return
    ax.add_patch(
        FancyBboxPatch((ends[0], ends[2]), edge, edge, "square,pad=0", fill=False, ec=theme["faint"], zorder=3)
    )


def chip(ax: Axes, text: str, x: float, y: float, same: bool, theme: Theme, width: float = 1.3) -> None:
    """A label: filled where it says that something is the same."""
    fill, ink = (theme["same"], theme["on"]) if same else ("none", theme["new"])
    edge = theme["same"] if same else theme["new"]
    box = FancyBboxPatch((x - width / 2, y - 0.15), width, 0.3, "round,pad=0.02,rounding_size=0.12", fc=fill, ec=edge)
    ax.add_patch(box)
    ax.text(x, y, text, ha="center", va="center", color=ink, fontsize=9.5)


def canvas(width: float, height: float, theme: Theme) -> tuple[Figure, Axes]:
    """A figure of this size in inches, with axes in inches over all of it."""
    figure = Figure(figsize=(width, height), facecolor=theme["ground"])
    ax = figure.add_axes((0, 0, 1, 1))
    ax.axis("off")
    ax.set(xlim=(0, width), ylim=(0, height))
    return figure, ax


def finish(ax: Axes, width: float, height: float, bottom: float = 0.0) -> None:
    """Images have set the limits: back to inches."""
    ax.set(xlim=(0, width), ylim=(bottom, bottom + height), aspect="auto")


def views(theme: Theme) -> Figure:
    image, batch = heart()
    figure, ax = canvas(6.8, 4.4, theme)
    show(ax, image, 3.75, 4.0, 1.1, theme)
    ax.text(3.1, 4.0, "an image", ha="right", va="center", color=theme["ink"], fontsize=11)
    names = ("query", "content key", "color key", "spatial key")
    shared = {"color": (True, False, True, False), "spatial": (True, False, False, True)}
    for k, (name, view) in enumerate(zip(names, batch, strict=True)):
        x = 1.5 + 1.5 * k
        ax.annotate("", (x, 2.98), (3.75, 3.42), arrowprops={"arrowstyle": "->", "color": theme["faint"], "shrinkA": 2})
        ax.text(x, 2.83, name, ha="center", va="center", color=theme["ink"], fontsize=11, fontweight="bold")
        show(ax, view[0], x, 2.0, 1.3, theme)
        for row, (group, same) in enumerate(shared.items()):
            word = "drawn" if k == 0 else "the same" if same[k] else "drawn anew"
            chip(ax, word, x, 1.05 - 0.45 * row, same[k], theme)
            ax.text(0.75, 1.05 - 0.45 * row, group, ha="right", va="center", color=theme["ink"], fontsize=11)
    finish(ax, 6.8, 4.4, bottom=0.28)
    return figure


def spaces(theme: Theme) -> Figure:
    _, batch = heart()
    figure, ax = canvas(6.6, 4.7, theme)
    rows = {
        "content": (1, "color and place differ", "must ignore color and place", "can keep the shape"),
        "color": (2, "place differs", "must ignore place and size", "can keep color (and shape)"),
        "spatial": (3, "color differs", "must ignore color", "can keep place and size (and shape)"),
    }
    for k, (name, (key, pair, ignores, keeps)) in enumerate(rows.items()):
        y = 3.95 - 1.5 * k
        show(ax, batch[0][0], 0.8, y, 1.25, theme)
        show(ax, batch[key][0], 2.75, y, 1.25, theme)
        ax.annotate("", (2.08, y), (1.47, y), arrowprops={"arrowstyle": "<->", "color": theme["same"], "lw": 1.8})
        ax.text(3.6, y + 0.48, f"{name} space", color=theme["ink"], fontsize=12, fontweight="bold", va="center")
        ax.text(3.6, y + 0.17, pair, color=theme["faint"], fontsize=10, va="center")
        ax.text(3.6, y - 0.17, ignores, color=theme["new"], fontsize=11, va="center")
        ax.text(3.6, y - 0.46, keeps, color=theme["same"], fontsize=11, va="center")
    finish(ax, 6.6, 4.7)
    return figure


def entropy(theme: Theme) -> Figure:
    shape = torch.arange(4).repeat(4)
    hue = torch.arange(4).repeat_interleave(4)
    images = sprites(shape.tolist(), (hue / 4).tolist(), scale=[0.7] * 16)
    figure, ax = canvas(6.6, 3.1, theme)
    aside = (hue - 1.5) / 28  # so that those below show
    middle, along = 0.5 + aside, 0.07 + 0.86 * (shape + 0.5) / 4 + aside
    panels = {
        "collapsed": (middle, middle.flip(0), "all images in one place"),
        "repeated": (along, along - 2 * aside, "color copies content, hue is lost"),
        "spread out": ((shape + 0.5) / 4, (hue + 0.5) / 4, "shape and hue both kept"),
    }
    for k, (name, (x, y, says)) in enumerate(panels.items()):
        left, bottom, edge = 0.5 + 2.12 * k, 0.75, 1.75
        box = FancyBboxPatch((left, bottom), edge, edge, "square,pad=0", fill=False, ec=theme["faint"])
        ax.add_patch(box)
        for i in range(16):
            show(ax, images[i], left + float(x[i]) * edge, bottom + float(y[i]) * edge, 0.42, theme, cut_out=True)
        weight = "bold" if k == 2 else "normal"
        ax.text(left + edge / 2, 2.72, name, ha="center", color=theme["ink"], fontsize=11.5, fontweight=weight)
        ax.text(left + edge / 2, 0.56, "content", ha="center", va="center", color=theme["faint"], fontsize=9.5)
        ax.text(
            left - 0.16,
            bottom + edge / 2,
            "color",
            rotation=90,
            ha="center",
            va="center",
            color=theme["faint"],
            fontsize=9.5,
        )
        ax.text(
            left + edge / 2,
            0.22,
            says,
            ha="center",
            va="center",
            color=theme["same" if k == 2 else "new"],
            fontsize=9.5,
        )
    finish(ax, 6.6, 3.1)
    return figure


FIGURES: dict[str, Callable[[Theme], Figure]] = {"views": views, "spaces": spaces, "entropy": entropy}


def draw(out: Path = OUT, dpi: int = 200) -> None:
    """Write all figures, light and dark."""
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES.items():
        for ending, theme in (("", LIGHT), ("-dark", DARK)):
            figure(theme).savefig(out / f"{name}{ending}.png", dpi=dpi, facecolor=theme["ground"])


if __name__ == "__main__":
    draw()
