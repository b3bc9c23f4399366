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


COMPARED = {
    "content-only": "ordinary SSL",
    "the recipe": "the recipe",
    "LooC, tau 0.05, spaces 128 and 128": "LooC, tuned",
    "AugSelf, weight 1, tau 0.15": "AugSelf, tuned",
}


def without_cost(lines: list[Line], folder: Path) -> None:
    """Unseen photographs: accuracy, and changes decoded from the backbone and from the content space."""
    found = {name: its for name, its in rows_of(lines, "cifar/fresh").items() if name in COMPARED}
    if not {"the recipe", "content-only"} <= set(found):
        return
    kinds = {"linear": "linear probe", "neighbours": "20 neighbors"}
    parameters = told(found["the recipe"][0]["tables"]["label-free, each"]["backbone"])
    spaces = {"backbone": "from the backbone", "content": "from the content space"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=[2, 5, 5])
    wide = 0.8 / len(found)
    for i, (name, label) in enumerate((n, w) for n, w in COMPARED.items() if n in found):
        its = found[name]
        groups = [[[line["accuracy"]["backbone"][k] for line in its] for k in kinds]]
        groups += [[[score(line, "label-free, each", s, p) for line in its] for p in parameters] for s in spaces]
        for axis, values in zip(axes, groups, strict=True):
            where = [x + wide * (i - (len(found) - 1) / 2) for x in range(len(values))]
            middle = [statistics.mean(v) for v in values]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            legend = f"{label} ({len(its)} seeds)"
            axis.bar(where, middle, wide, yerr=spread, color=plots.PALETTE[i], label=legend, capsize=2)
    axes[0].set_xticks(range(len(kinds)), list(kinds.values()))
    axes[0].set_title("accuracy of the backbone", fontsize=11)
    words = [textwrap.fill(short(p), 11) for p in parameters]
    for axis, text in zip(axes[1:], spaces.values(), strict=True):
        axis.set_xticks(range(len(words)), words, fontsize=9)
        axis.set_title(f"R² of the change of each parameter, {text}", fontsize=11)
    for axis in axes:
        axis.set_ylim(0, 1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].legend(frameon=False, loc="upper left", fontsize=9)
    figure.savefig(folder / "recipe-cost.png", dpi=100)
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
