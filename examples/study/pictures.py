"""The pictures of docs/results.md, from the lines of the study. A panel that has not been run says so."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from study import grid
from study.report import SHORT, SPRITE_FACTORS, Line, latent_numbers, mean, rows_of, score, told

from ssd_addon import plots
from ssd_addon.report.verdict import short

matplotlib.use("agg")


def heat(axis: Any, title: str, matrix: list[list[float]] | None, spaces: list[str], factors: list[str]) -> None:
    """Scores 0 to 1 as shades with their numbers; spaces down, factors across."""
    axis.set_title(title, fontsize=11)
    axis.tick_params(length=0)
    if matrix is None:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.text(0.5, 0.5, "not run yet", ha="center", va="center", transform=axis.transAxes)
        return
    axis.imshow(matrix, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axis.set_xticks(range(len(factors)), [textwrap.fill(f, 14) for f in factors])
    axis.set_yticks(range(len(spaces)), spaces)
    for y, values in enumerate(matrix):
        for x, value in enumerate(values):
            text = f"{value:.2f}".replace("-0.00", "0.00")
            axis.text(x, y, text, ha="center", va="center", color="black" if value > 0.5 else "white")


def means(found: list[Line] | None, kind: str, spaces: list[str], factors: list[tuple[str, ...]]) -> Any:
    """Mean over seeds of each cell; a cell of several factors is their mean."""
    if not found:
        return None
    return [[mean(mean(score(x, kind, s, f) for f in fs) for x in found) for fs in factors] for s in spaces]


def cures(lines: list[Line], folder: Path) -> None:
    """What same-image pairs leave open, and both cures: a row for each family, a column for each kind of key."""
    families, tried = rows_of(lines, "latents/families"), rows_of(lines, "latents/cures")
    rows = {"SimCLR": ("simclr", "equivariance, 2"), "VICReg": ("vicreg", "vicreg, equivariance, 1")}
    names = ["content", "style_1", "style_2"]
    figure, axes = plt.subplots(2, 3, figsize=(9.6, 5.4), layout="constrained")
    for row, (family, (key, cure)) in zip(axes, rows.items(), strict=True):
        panels = {
            "same-image keys": families.get(f"{key}, same-image"),
            "cross-image keys": families.get(f"{key}, cross-image"),
            f"{cure.removeprefix('vicreg, ')}": tried.get(cure),
        }
        for axis, (title, found) in zip(row, panels.items(), strict=True):
            words = [n.replace("_", " ") for n in names]
            matrix = means(found, "kernel", names, [(n,) for n in names])
            heat(axis, f"{family}, {title}", matrix, words if axis is row[0] else [""] * 3, words)
        row[0].set_ylabel("space")
    figure.supxlabel("what it encodes: R² of a kernel probe, mean over seeds", fontsize=11)
    figure.savefig(folder / "latents-cures.png", dpi=110)
    plt.close(figure)


SCANS = {"temperature": "latents/temperature", "batch": "latents/batch", "steps": "latents/length"}
TITLES = {"temperature": "temperature", "batch": "images in a batch", "steps": "steps"}


def scans(lines: list[Line], folder: Path) -> None:
    """SimCLR's styles, and the content in their spaces, by one setting; the others are the defaults."""
    if not all(rows_of(lines, experiment) for experiment in SCANS.values()):
        return
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", sharey=True)
    middle = rows_of(lines, "latents/families")
    for axis, (key, experiment) in zip(axes, SCANS.items(), strict=True):
        found = [line for its in rows_of(lines, experiment).values() for line in its if line["seed"] == 0]
        found += [its[0] for name, its in middle.items() if name.startswith("simclr")]
        default = grid.OF_WORLD["latents"][key]
        for cross, color, keys in ((False, plots.PALETTE[1], "same-image"), (True, plots.PALETTE[0], "cross-image")):
            points = sorted(
                (line["config"].get(key, default), latent_numbers(line))
                for line in found
                if line["config"].get("cross", False) == cross
            )
            x = [p[0] for p in points]
            axis.plot(x, [p[1]["styles"] for p in points], "o-", color=color, label=f"{keys} keys: styles")
            leak = [p[1]["content in styles"] for p in points]
            axis.plot(x, leak, "o--", mfc="white", color=color, label=f"{keys} keys: content in style spaces")
        axis.set_xscale("log")
        ticks = sorted({line["config"].get(key, default) for line in found})
        axis.set_xticks(ticks, [f"{t:,}" if t >= 1 else str(t) for t in ticks])
        axis.minorticks_off()
        axis.set_xlabel(TITLES[key])
        axis.set_ylim(-0.03, 1.03)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("R² of a kernel probe, one seed")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(folder / "latents-scans.png", dpi=110)
    plt.close(figure)


METHODS = ["content-only", "ours", "LooC", "AugSelf"]


def sprites(lines: list[Line], folder: Path) -> None:
    """What each space of each method encodes of the sprites."""
    _methods(
        rows_of(lines, "sprites/methods"),
        METHODS,
        "linear",
        SPRITE_FACTORS,
        "R² (shape: accuracy above chance) of a linear probe, mean over seeds",
        folder / "sprites-methods.png",
    )


def photographs(lines: list[Line], folder: Path) -> None:
    """Label-free: what each space of each method encodes of the augmentations of photographs."""
    _label_free(rows_of(lines, "cifar/methods"), METHODS, folder / "cifar-methods.png")


def keys(lines: list[Line], folder: Path) -> None:
    """The same for keys of the same image, of another one, and with the equivariance term."""
    names = ["kinds, same-image", "kinds, cross-image", "kinds, equivariance, 0.5"]
    found = rows_of(lines, "cifar/cross")
    _label_free(found, names, folder / "cifar-keys.png")
    each = [f"each operation, {how}" for how in ("same-image", "cross-image")]
    there = {n: found[n] for n in each if n in found}
    _label_free(there, list(there), folder / "cifar-each.png")


def _label_free(found: dict[str, list[Line]], names: list[str], path: Path) -> None:
    if not found:
        return
    kind = next(iter(found.values()))[0]["tables"]["label-free, each"]["backbone"]
    shown = {short(p): (p,) for p in told(kind)}
    what = "by how much two views differ: R² of a kernel probe, without labels"
    _methods(found, names, "label-free, each", shown, what, path)


def _methods(
    found: dict[str, list[Line]],
    names: list[str],
    kind: str,
    factors: dict[str, tuple[str, ...]],
    what: str,
    path: Path,
) -> None:
    """A panel for each method, one above the other; the height depends on the number of spaces."""
    spaces = {n: list(found[n][0]["tables"][kind]) if n in found else ["content", "backbone"] for n in names}
    heights = [len(s) + 0.9 for s in spaces.values()]
    figure, axes = plt.subplots(
        len(names), 1, figsize=(8.4, 0.42 * sum(heights)), layout="constrained", gridspec_kw={"height_ratios": heights}
    )
    last = [n for n in names if n in found][-1:]
    for axis, name in zip(axes, names, strict=True):
        seeds = len(found.get(name, []))
        title = SHORT.get(name, name).removeprefix("kinds, ") + (
            f" ({seeds} seed{'s' if seeds > 1 else ''})" if seeds else ""
        )
        matrix = means(found.get(name), kind, spaces[name], list(factors.values()))
        heat(axis, title, matrix, spaces[name], list(factors) if [name] == last else [""] * len(factors))
    figure.supxlabel(what, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def collapse(lines: list[Line], folder: Path) -> None:
    """Misalignment and effective rank of content during training, for three ways to set its weight."""
    found = rows_of(lines, "sprites/collapse")
    if not found:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    panels = {
        "constraint/content": "misalignment of content's pairs",
        "effective_rank/content": "effective rank of content",
    }
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for (name, its), color in zip(found.items(), plots.PALETTE, strict=False):
            history = its[0]["history"]
            axis.plot([h["step"] for h in history], [h[key] for h in history], label=name, color=color)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(folder / "sprites-collapse.png", dpi=110)
    plt.close(figure)


def draw(lines: list[Line], folder: Path) -> None:
    """Every picture of the sections; those of the first page are in findings.py."""
    for picture in (cures, scans, sprites, photographs, keys, collapse):
        picture(lines, folder)
