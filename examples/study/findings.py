"""The pictures at the top of docs/results.md, from the lines of the study."""

import statistics
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
from study.pictures import heat, means
from study.report import SPRITE_FACTORS, Line, rows_of, score, told

from ssd_addon import plots
from ssd_addon.report.verdict import short

RECIPE = "all keys, content entropy, equivariance 0.5, 64 and 32"
"""The finalist that `recipe` returns."""


def without_cost(lines: list[Line], folder: Path) -> None:
    """Photographs: classes and changes of color, decoded from two backbones."""
    found = rows_of(lines, "cifar/finals")
    if not {RECIPE, "content-only"} <= set(found):
        return
    kinds = {"linear": "linear probe", "neighbours": "20 neighbors"}
    parameters = told(found[RECIPE][0]["tables"]["label-free, each"]["backbone"])
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=[2, 5])
    for i, (name, label) in enumerate({"content-only": "ordinary SSL", RECIPE: "the recipe"}.items()):
        its = found[name]
        classes = [[line["accuracy"]["backbone"][k] for line in its] for k in kinds]
        changes = [[score(line, "label-free, each", "backbone", p) for line in its] for p in parameters]
        for axis, values in zip(axes, (classes, changes), strict=True):
            where = [x + 0.4 * (i - 0.5) for x in range(len(values))]
            middle, spread = [statistics.mean(v) for v in values], [statistics.stdev(v) for v in values]
            color = plots.PALETTE[i]
            axis.bar(where, middle, 0.38, yerr=spread, color=color, label=f"{label} ({len(its)} seeds)", capsize=2)
    axes[0].set_xticks(range(len(kinds)), list(kinds.values()))
    axes[0].set_title("accuracy of the backbone on ten classes", fontsize=11)
    axes[1].set_xticks(
        range(len(parameters)), [textwrap.fill(short(p).replace("ResizedCrop ", "crop, "), 11) for p in parameters]
    )
    axes[1].set_title("R² of the change of each parameter, from the backbone", fontsize=11)
    for axis in axes:
        axis.set_ylim(0, 1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(0.42, 1.0))
    figure.savefig(folder / "recipe-cost.png", dpi=110)
    plt.close(figure)


def of_sprites(lines: list[Line], folder: Path) -> None:
    """What each space of the recipe encodes of sprites, by two probes."""
    found = rows_of(lines, "sprites/finals").get(RECIPE)
    if not found:
        return
    spaces = ["content", "color", "spatial", "backbone"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.0), layout="constrained")
    for axis, (kind, title) in zip(axes, {"linear": "linear probe", "kernel": "kernel probe"}.items(), strict=True):
        matrix = means(found, kind, spaces, list(SPRITE_FACTORS.values()))
        heat(axis, f"{title}, mean of {len(found)} seeds", matrix, spaces, list(SPRITE_FACTORS))
    figure.supxlabel("R² on sprites not trained on (shape: accuracy above chance)", fontsize=11)
    figure.savefig(folder / "recipe-sprites.png", dpi=110)
    plt.close(figure)


def of_keys(lines: list[Line], folder: Path) -> None:
    """Content during training, with its first key and with all keys, both with the equivariance term."""
    found = rows_of(lines, "sprites/scan")
    shown = {"equivariance 0.5": "first key", "all keys, equivariance 0.5": "all keys"}
    if not set(shown) <= set(found):
        return
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.1), layout="constrained", sharey=True)
    for axis, (factor, parts) in zip(
        axes, {"shape": ("shape",), "hue": ("hue",), "position": ("x", "y")}.items(), strict=True
    ):
        for (name, label), color in zip(shown.items(), plots.PALETTE, strict=False):
            curve = found[name][0]["curve"]
            y = [statistics.mean(c["average"]["content"][p] for p in parts) for c in curve]
            axis.plot([c["step"] for c in curve], y, "o-", color=color, label=label)
        axis.set_title(f"{factor} in content", fontsize=11)
        axis.set_xlabel("step")
        axis.set_ylim(-0.03, 1.03)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("linear probe, one seed")
    axes[0].legend(frameon=False)
    figure.savefig(folder / "recipe-keys.png", dpi=110)
    plt.close(figure)
