"""Pictures for these pages.

    make demo && python docs/pictures.py runs/demo/report.html docs/results    # of the demo's report; needs Chromium
    python docs/pictures.py objects docs/results                               # of the second generator of images
    python docs/pictures.py audit docs/results                                 # of the audit in docs/results/audit.json

The first writes report-desktop.png (headline and first matrix), report-explorer.png (an image, its neighbors and a mix)
and report-phone.png (the same page on a phone, in the dark); the others write objects.png and audit.png.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from objects import GROUNDS, SHAPES, TEXTURES, draw_objects, render_objects

from ssd_addon import plots

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]


def objects(path: Path, size: int = 64) -> None:
    """Every shape alone and centered; the same with each ground and texture; images as they are drawn."""
    f = draw_objects(4 * SHAPES, torch.Generator().manual_seed(3))
    f["shape"] = torch.arange(SHAPES).repeat(4)
    shown = {k: v[: 2 * SHAPES].clone() for k, v in f.items()}
    still = {"x": 0.0, "y": 0.0, "rotation": 0.0, "scale": 0.45, "brightness": 1.0}
    shown |= {k: torch.full((2 * SHAPES,), v) for k, v in still.items()}
    shown["ground"] = torch.arange(2 * SHAPES) % len(GROUNDS)
    shown["texture"] = torch.arange(2 * SHAPES) % len(TEXTURES)
    alone = render_objects({k: v[:SHAPES] for k, v in shown.items()}, size, textured=False)
    dressed = render_objects({k: v[SHAPES:] for k, v in shown.items()}, size)
    rows = torch.cat([alone, dressed, render_objects(f, size)[: 2 * SHAPES]]).view(4, SHAPES, 3, size, size)
    strip = rows.permute(0, 3, 1, 4, 2).reshape(4 * size, SHAPES * size, 3)
    matplotlib.image.imsave(path, strip.numpy())


PARAMETERS = {
    "RandomGrayscale/batch_prob": "grayscale on or off",
    "brightness_factor": "brightness",
    "contrast_factor": "contrast",
    "hue_factor": "hue",
    "saturation_factor": "saturation",
    "RandomResizedCrop/src": "crop, place and size",
}
"""Of audit.json, with their titles; flips and whether a jitter fired cannot be decoded from the pixels either."""
MODELS = {"content-only": "ordinary SimCLR", "with style spaces": "with style spaces"}


def audit(source: Path, path: Path) -> None:
    """R² of each parameter through the layers of both models, and from an untrained copy."""
    models = json.loads(source.read_text())["models"]
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 5.6), layout="constrained", sharex=True, sharey=True)
    for axis, (part, title) in zip(axes.flat, PARAMETERS.items(), strict=True):
        for model, color in zip(models, plots.PALETTE, strict=False):
            cells = {c["space"]: c["score"] for c in model["table"]["parts"]["cells"] if part in c["factor"]}
            untrained = cells.pop("untrained")
            axis.axhline(untrained, color="0.55", linestyle="--", linewidth=1.5, label="untrained copy", zorder=1)
            names = [{"pixels": "pixels", "backbone": "features"}.get(n, f"layer {i}") for i, n in enumerate(cells)]
            axis.plot(names, list(cells.values()), color=color, marker="o", linewidth=2.4, label=MODELS[model["name"]])
        axis.set_title(title, loc="left", fontsize=14, fontweight="bold")
        axis.set_ylim(-0.03, 1.03)
        axis.set_yticks([0, 0.5, 1])
        axis.tick_params(labelsize=11)
        axis.tick_params(axis="x", rotation=35)
        axis.grid(axis="y", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3, frameon=False, fontsize=13)
    figure.supylabel("R², share of the change that is decoded", fontsize=12)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("report", type=Path, help="a report, or the word objects or audit")
    p.add_argument("out", type=Path)
    args = p.parse_args()
    if str(args.report) == "objects":
        return objects(args.out / "objects.png")
    if str(args.report) == "audit":
        return audit(args.out / "audit.json", args.out / "audit.png")
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1100, "height": 1420})
        page.goto(args.report.resolve().as_uri())
        page.screenshot(path=args.out / "report-desktop.png")
        page.locator("#picker button").nth(3).click()
        page.locator("#explorer").screenshot(path=args.out / "report-explorer.png")
        phone = browser.new_page(viewport={"width": 390, "height": 1420}, color_scheme="dark")
        phone.goto(args.report.resolve().as_uri())
        phone.screenshot(path=args.out / "report-phone.png")
        browser.close()


if __name__ == "__main__":
    main()
