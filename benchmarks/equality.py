"""How much the fast path of the views differs from torchvision on PIL images: photographs, the same boxes and factors.

    python benchmarks/equality.py --data DIR --out docs/benchmarks      writes equality.json, equality.md, equality.png

Measures |difference| of a pixel in levels of 255, for each operation alone and then for all of them in order, on the
images of a folder. PIL rounds to 256 levels after every operation and between the axes of a resize, and has 256 hues;
the fast path rounds once, after the crop. Kornia's operations one by one (`fast=False`) are measured in the same way.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor

from ssd_addon import StructuredViews
from ssd_addon.collate import ImageFiles, StructuredCollate

SIZE = 128
Parameters = dict[str, Tensor]


def crop(picture: Image.Image, p: Parameters, i: int, how: Any) -> Image.Image:
    (left, top), _, (right, bottom), _ = p["src"][i].int().tolist()
    return TF.resized_crop(picture, top, left, bottom - top + 1, right - left + 1, [SIZE, SIZE], how)


def jitter(picture: Image.Image, p: Parameters, i: int) -> Image.Image:
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    names = ("brightness", "contrast", "saturation", "hue")
    for sub in p["order"][i].tolist():
        picture = adjust[sub](picture, float(p[f"{names[sub]}_factor"][i]))
    return picture


def one(name: str) -> Callable[[Image.Image, Parameters, int], Image.Image]:
    return lambda picture, p, i: getattr(TF, f"adjust_{name}")(picture, float(p[f"{name}_factor"][i]))


def blurred(picture: Image.Image, p: Parameters, i: int) -> Image.Image:
    return TF.gaussian_blur(picture, [13, 13], [float(p["sigma"][i])] * 2)


def solarized(picture: Image.Image, p: Parameters, i: int) -> Image.Image:
    return TF.solarize(picture, 256 * float(p["thresholds"][i]))


BICUBIC, BILINEAR = TF.InterpolationMode.BICUBIC, TF.InterpolationMode.BILINEAR
OPERATIONS: dict[str, tuple[Any, Callable[[Image.Image, Parameters, int], Image.Image]]] = {
    "crop, bilinear": (K.RandomResizedCrop((SIZE, SIZE)), lambda x, p, i: crop(x, p, i, BILINEAR)),
    "crop, bicubic": (K.RandomResizedCrop((SIZE, SIZE), resample="bicubic"), lambda x, p, i: crop(x, p, i, BICUBIC)),
    "flip": (K.RandomHorizontalFlip(p=1.0), lambda x, p, i: TF.hflip(x)),
    "brightness": (K.ColorJitter(brightness=0.4), one("brightness")),
    "contrast": (K.ColorJitter(contrast=0.4), one("contrast")),
    "saturation": (K.ColorJitter(saturation=0.4), one("saturation")),
    "hue": (K.ColorJitter(hue=0.1), one("hue")),
    "jitter": (K.ColorJitter(0.4, 0.4, 0.4, 0.1), jitter),
    "grayscale": (K.RandomGrayscale(p=1.0), lambda x, p, i: TF.rgb_to_grayscale(x, 3)),
    "solarize": (K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=1.0), solarized),
    "blur": (K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=1.0), blurred),
}
ALL = ("crop, bicubic", "flip", "jitter", "blur")
PATHS = ("fast", "one by one")


def differences(x: Tensor, names: tuple[str, ...], fast: bool) -> Tensor:
    """|ours - PIL's| of every pixel, in levels."""
    # What is always the same makes no group of its own; the query of `then` is the same operations.
    views = StructuredViews({}, then=[OPERATIONS[n][0] for n in names], seed=0, fast=fast)
    batch = views(x)
    drawn = list(batch.parameters[0]["then"].values())
    out = []
    for i, image in enumerate(x):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        for name, p in zip(names, drawn, strict=True):
            picture = OPERATIONS[name][1](picture, p, i)
        want = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
        out.append((255 * batch[0][i] - want).abs().flatten())
    return torch.cat(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs, in class folders or not")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    args = parser.parse_args()
    files, collate = ImageFiles(args.data), StructuredCollate(192)
    rows = torch.linspace(0, len(files) - 1, min(args.images, len(files))).long().tolist()
    x: Any = collate([files[i] for i in rows])[0]
    report: dict[str, Any] = {"images": len(x), "operations": {}}
    histograms = {}
    for label, names in [*((n, (n,)) for n in OPERATIONS), ("all: " + ", ".join(ALL), ALL)]:
        entry = {}
        for path, fast in zip(PATHS, (True, False), strict=True):
            d = differences(x, names, fast)
            q = np.quantile(d.numpy(), [0.5, 0.99, 0.999])
            entry[path] = {
                "mean": round(float(d.mean()), 3),
                "median": round(float(q[0]), 3),
                "p99": round(float(q[1]), 2),
                "p999": round(float(q[2]), 2),
                "max": round(float(d.max()), 1),
            }
            if fast:
                histograms[label] = d.numpy()
        report["operations"][label] = entry
        print(label, entry, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "equality.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "equality.md").write_text(page(report))
    picture(histograms, args.out / "equality.png")


def page(report: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    every = report["operations"]
    crops = [max(every[f"crop, {how}"][path]["p999"] for how in ("bilinear", "bicubic")) for path in PATHS]
    lines = [
        "<!-- written by benchmarks/equality.py -->",
        "",
        "# How close views are to torchvision on PIL images",
        "",
        "The fast path of `StructuredViews` crops as torchvision does: 99.9 % of the pixels differ by at most",
        f"{crops[0]:.0f} of 255 levels. Kornia's operations one by one (`fast=False`) reach {crops[1]:.0f} levels,",
        "because they resize without antialiasing. Colors and blur are the same on both paths.",
        "",
        f"The columns are statistics of the difference per pixel to torchvision on PIL images, in levels of 255, over"
        f" {report['images']} photographs.",
        "",
        "| operation | mean | 99 % | 99.9 % | largest | mean, one by one | 99.9 %, one by one |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for label, entry in report["operations"].items():
        f, s = entry["fast"], entry["one by one"]
        lines.append(
            f"| {label} | {f['mean']:.2f} | {f['p99']:.1f} | {f['p999']:.1f} | {f['max']:.0f} | {s['mean']:.2f} | "
            f"{s['p999']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def picture(found: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(3, 4, sharex=True, sharey=True).flatten()
    for ax, (label, d) in zip(axes, found.items(), strict=True):
        ax.hist(
            np.minimum(d, 9.99), bins=np.arange(0, 10.25, 0.25), weights=np.full(len(d), 100 / len(d)), color="#2b6cb0"
        )
        ax.set_title(label if len(label) < 30 else "all in order", fontsize=9)
        ax.set_yscale("log")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[-4:]:
        ax.set_xlabel("|difference|, levels of 255 (last bin: 10 and more)", fontsize=7)
    for ax in axes[::4]:
        ax.set_ylabel("% of pixels", fontsize=8)
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
