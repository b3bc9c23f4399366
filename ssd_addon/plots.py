"""Figures of score tables, training logs and views. Needs matplotlib (`pip install ssd-addon[plots]`)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ssd_addon._optional import needs
from ssd_addon.batch import ViewBatch

with needs("ssd_addon.plots"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ssd_addon.display import display
    from ssd_addon.metrics import ScoreTable
    from ssd_addon.report.curves import finite
    from ssd_addon.report.text import name

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colors, which can be distinguished with every kind of color vision."""


def matrix(tables: Mapping[str, ScoreTable] | ScoreTable, path: str | Path) -> None:
    """Heat maps of score tables: spaces down, factors across, the score and its 95 % interval in each cell.

    Args:
        tables: one `ScoreTable`, or title -> table, drawn below each other.
        path: where to write; the suffix chooses the format.
    """
    _write(matrix_figure(tables), path)


def matrix_figure(tables: Mapping[str, ScoreTable] | ScoreTable) -> Figure:
    """What `matrix` writes, as a matplotlib figure: for TensorBoard or a notebook."""
    named = {"": tables} if isinstance(tables, ScoreTable) else dict(tables)
    if not named:
        raise ValueError("matrix: expected at least one score table: got none")
    widest = max(len(t.factors) for t in named.values())
    rows = [len(t.spaces) for t in named.values()]
    fig = Figure(figsize=(2.6 + 1.15 * widest, 1.0 + sum(0.62 * r + 1.0 for r in rows)), layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(len(named), 1, squeeze=False, gridspec_kw={"height_ratios": [r + 1 for r in rows]})[:, 0]
    image: Any = None
    for ax, (title, table) in zip(axes, named.items(), strict=True):
        score = torch.tensor([[table[s, f] for f in table.factors] for s in table.spaces])
        image = ax.imshow(score.clamp(0, 1).numpy(), vmin=0, vmax=1, cmap="cividis", aspect="auto")
        ax.set_xticks(range(len(table.factors)), _text(table.factors), rotation=25, ha="right")
        ax.set_yticks(range(len(table.spaces)), _text(table.spaces))
        ax.tick_params(length=0)
        for i, s in enumerate(table.spaces):
            for j, f in enumerate(table.factors):
                value = table[s, f]
                text = "n/a" if value != value else f"{value:.2f}".replace("-0.00", "0.00")
                ink = "white" if value <= 0.55 else "black"  # n/a lies on white
                ax.text(j, i, text, ha="center", va="bottom", color=ink, fontsize=11)
                if (s, f) in table.intervals:
                    low, high = table.intervals[s, f]
                    ax.text(
                        j,
                        i + 0.08,
                        f"{low:.2f} to {high:.2f}".replace("-0.00", "0.00"),
                        ha="center",
                        va="top",
                        color=ink,
                        fontsize=7,
                    )
        kind = f"{table.probe} probe, n = {table.n_test} {table.unit} held out"
        ax.set_title(f"{_text([title])[0]} ({kind})" if title else kind, fontsize=10, loc="left")
    fig.colorbar(image, ax=list(axes), label="R²; for classes, accuracy rescaled (0 is chance)", shrink=0.8)
    return fig


def curves(log: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Training curves from log entries with "step" and the names of `Terms.scalars`.

    Dotted lines mark the messages of `CollapseAlarm`.

    Args:
        log: dictionaries such as a JSON-lines log holds; a curve leaves out the entries without its name, and values
            that are no finite numbers.
        path: where to write.
    """
    entries = [e for e in log if finite(e.get("step")) and "loss" in e]
    if not entries:
        raise ValueError("curves: expected log entries with 'step' and 'loss': got none")
    panels = {
        "loss and entropy": ["loss", "entropy", "content_entropy"],
        "misalignment of positive pairs (0 is perfect)": sorted(
            {k for e in entries for k in e if k.startswith("constraint/")}
        ),
        "effective rank (1 is collapsed)": sorted({k for e in entries for k in e if k.startswith("effective_rank/")}),
    }
    fig = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(fig)
    marks = [e["step"] for e in entries if e.get("alarm")]
    for ax, (title, keys) in zip(fig.subplots(1, 3), panels.items(), strict=True):
        drawn = 0
        for step in marks:
            ax.axvline(step, color="0.4", linestyle=":", linewidth=1)
        for k, key in enumerate(keys):
            points = [(e["step"], e[key]) for e in entries if finite(e.get(key))]
            if points:
                x, y = zip(*points, strict=True)
                ax.plot(
                    x,
                    y,
                    color=PALETTE[k % len(PALETTE)],
                    label=_text([key.split("/")[-1]])[0],
                    marker="." if len(x) < 3 else "",
                )
                drawn += 1
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
        if drawn:
            ax.legend(frameon=False, fontsize=8)
    _write(fig, path)


def views_strip(
    batch: ViewBatch,
    path: str | Path,
    *,
    images: int = 4,
    bands: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """A picture of structured views: a row per image, a column per view, titled with what the view shares.

    Args:
        batch: views [V, B, C, H, W], in [0, 1] once `mean` and `std` are undone.
        path: where to write.
        images: rows to show.
        bands: one to three channels to show, counted from 0. None shows one to three channels as they are, and of more
            the first three principal directions of the pixels shown; the picture says which.
        mean, std: of a Normalize that the views ended with, to undo it.

    Raises:
        ValueError, TypeError: views of several sizes; bands that are not one to three channels of the views.
    """
    if not isinstance(batch.views, torch.Tensor) or batch.views.ndim != 5:
        raise ValueError(f"views_strip: expected views [V, B, C, H, W], of one size: got {batch}")
    v, b = batch.views.shape[:2]
    n = min(images, b)
    x = batch.views[:, :n].detach().float().cpu()
    if mean is not None and std is not None:
        x = x * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    show = display(x, bands)
    x = show(x.clamp(0, 1)).permute(0, 1, 3, 4, 2)
    spaces = batch.plan.spaces
    if batch.plan.kind == "interleaved":
        titles = ["query", "key"]
    elif batch.plan.kind == "pairs":
        titles = [f"view {k}\npairs of {served}" if (served := _served(batch, k)) else f"view {k}" for k in range(v)]
    else:
        titles = [
            "query",
            "content key\nshares the image\nalone",
            *(f"{s} key\nshares {s}\nwith the query" for s in _text(spaces[1:])),
        ]
    fig = Figure(figsize=(1.9 * v, 1.75 * n + 0.6), layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(n, v, squeeze=False)
    for i in range(n):
        for k in range(v):
            ax = axes[i, k]
            ax.imshow(x[k, i].numpy())
            ax.set_axis_off()
            if i == 0:
                ax.set_title(titles[k], fontsize=9)
            if k and batch.plan.kind == "interleaved":
                index = i % len(spaces) if batch.space_index is None else int(batch.space_index[i])
                ax.set_title(f"for {_text(spaces)[index]}", fontsize=8)
    if show.text:
        fig.supxlabel(f"shown: {show.text}", fontsize=8, wrap=True)
    _write(fig, path)


def _served(batch: ViewBatch, view: int) -> str:
    """The spaces that compare a view with another one."""
    pairs = batch.plan.view_pairs
    return ", ".join(_text(name for name, each in pairs.items() if any(view in pair for pair in each)))


def _text(names: Iterable[str]) -> list[str]:
    """Names as matplotlib shows them: a dollar sign starts no formula, a first underscore hides nothing."""
    return [name(n, 40).replace("$", r"\$").removeprefix("_") or " " for n in names]


def _write(fig: Figure, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
