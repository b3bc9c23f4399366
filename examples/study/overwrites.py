"""Does a group overwrite its attribute? `recipes.overwrites` on photographs and sprites, compared with training.

    python examples/study/overwrites.py --cifar DIR --imagenet DIR --out docs/results/overwrites.json
    python examples/study/overwrites.py --out docs/results/overwrites.json --page docs/choose-your-groups.md

CIFAR's DIR holds train/CLASS/*.jpg and val/CLASS/*.jpg, ImageNet's train/CLASS/*.JPEG. Each run is one line of OUT, and
runs that are there are not repeated. The number of images was chosen on CIFAR's training images and on sprites of seeds
0 to 2 ("chosen on"); reported numbers come from CIFAR's other images, from ImageNet and from other sprites. --page
rewrites the tables between `<!-- overwrites: NAME -->` and `<!-- end -->`. All of it takes twenty minutes of one core.
"""

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import torch
from torch import Tensor

from ssd_addon.collate import ImageFiles, StructuredCollate
from ssd_addon.recipes import overwrites

sys.path.insert(0, str(Path(__file__).parents[1]))
from sprites import draw_factors, render
from study.worlds import photograph_groups
from synthetic import GROUPS

Line = dict[str, Any]

CHOSEN = [("cifar train", n, seed) for n in (200, 500, 1000) for seed in range(3)]
CHOSEN += [("cifar train", 2000, 0), *(("sprites", n, seed) for n in (200, 500) for seed in range(3))]
REPORTED = [(name, 500, seed) for name in ("cifar val", "imagenet 64", "imagenet 128") for seed in range(10, 13)]
REPORTED += [("sprites", 500, seed) for seed in range(10, 13)]
TRAINED = {  # docs/results.md: R^2 of the change with keys of the same and of another image, one seed
    "rotation": (0.51, 0.00),
    "crop": (0.31, 0.44),
    "gain": (0.92, 0.89),
    "hue": (0.80, 0.00),
    "saturation": (0.84, 0.80),
    "blur": (0.67, 0.88),
}


def operations(groups: dict[str, Any]) -> dict[str, list[Any]]:
    """Kornia's operations from their names and arguments."""
    return {g: [getattr(K, name)(**arguments) for name, arguments in ops] for g, ops in groups.items()}


def photographs(root: Path, size: int) -> Tensor:
    """[n, 3, size, size] uint8."""
    files, collate = ImageFiles(root), StructuredCollate(size)
    return torch.cat([collate([files[i]])[0] for i in range(len(files))])


def images_of(name: str, seed: int, n: int, args: argparse.Namespace, kept: dict[str, Tensor]) -> Tensor | None:
    if name == "sprites":
        return render(draw_factors(n, torch.Generator().manual_seed(seed)))
    if name not in kept:
        kind, which = name.split()
        root = args.cifar if kind == "cifar" else args.imagenet
        if root is None:
            return None
        kept[name] = photographs(root / which, 32) if kind == "cifar" else photographs(root / "train", int(which))
    return kept[name]


def groups_of(name: str) -> dict[str, list[Any]]:
    size = 32 if name.startswith("cifar") else int(name.split()[-1]) if name != "sprites" else 0
    return operations(photograph_groups("each", size) if size else GROUPS)


def run(args: argparse.Namespace) -> list[Line]:
    lines: list[Line] = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {(line["images"], line["n"], line["seed"]) for line in lines}
    kept: dict[str, Tensor] = {}
    for name, n, seed in [*CHOSEN, *REPORTED]:
        if (name, n, seed) in done or (x := images_of(name, seed, n, args, kept)) is None:
            continue
        start = time.process_time()
        found = overwrites(groups_of(name), x, samples=n, seed=seed)
        used = "chosen on" if (name, n, seed) in CHOSEN else "reported"
        line = {"images": name, "n": n, "seed": seed, "used": used, "cpu_s": round(time.process_time() - start, 1)}
        lines.append(line | {"found": found.to_json()})
        args.out.write_text("[\n" + ",\n".join(json.dumps(rounded(line)) for line in lines) + "\n]\n")
        print(f"{name}, {n} images, seed {seed}, {line['cpu_s']} s\n{found}", flush=True)
    return lines


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return round(value, 3) if isinstance(value, float) else value


def table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def by_part(lines: list[Line]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(group, parameter) -> the findings, one for each seed."""
    out: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        for part in line["found"]["parts"]:
            out[part["group"], part["parameter"].split("/")[1]].append(part)
    return out


def span(values: list[float]) -> str:
    low, high = (f"{v:.2f}".replace("-0.00", "0.00") for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def said(parts: list[dict[str, Any]]) -> str:
    """The verdicts of all seeds: one word where they agree."""
    words = [p["verdict"] for p in parts]
    each = [(w, words.count(w)) for w in dict.fromkeys(words)]
    return each[0][0] if len(each) == 1 else ", ".join(f"{w} ({count} of {len(words)})" for w, count in each)


def photographs_table(lines: list[Line]) -> str:
    names = ["cifar val", "imagenet 64", "imagenet 128"]
    found = {name: by_part([x for x in lines if x["used"] == "reported" and x["images"] == name]) for name in names}
    heads = ["CIFAR-10, 32 px", "ImageNet, 64 px", "ImageNet, 128 px"]
    rows = [
        ["operation", "in training: same-image, cross-image keys", *(f"{h}: alone" for h in heads), "the test says"]
    ]
    rows.append(["---", "---", *["--:"] * 3, "---"])
    for group, (same, cross) in TRAINED.items():
        for g, parameter in found["cifar val"]:
            if g == group:
                own = [found[name][g, parameter] for name in names]
                alone = [span([p["alone"] for p in parts]) for parts in own]
                trained = f"{same:.2f}, {cross:.2f}"
                rows.append([f"{group}, {parameter}", trained, *alone, said([p for parts in own for p in parts])])
    return table(rows)


def sprites_table(lines: list[Line]) -> str:
    rows = [["sprites", "alone", "beside the original", "the test says"], ["---", "--:", "--:", "---"]]
    for (group, parameter), parts in by_part(
        [x for x in lines if x["used"] == "reported" and x["images"] == "sprites"]
    ).items():
        scores = [span([p[k] for p in parts]) for k in ("alone", "beside")]
        rows.append([f"{group}, {parameter}", *scores, said(parts)])
    return table(rows)


def sizes_table(lines: list[Line]) -> str:
    own = [x for x in lines if x["used"] == "chosen on" and x["images"] == "cifar train"]
    sizes = sorted({x["n"] for x in own})
    found = {n: by_part([x for x in own if x["n"] == n]) for n in sizes}
    seeds = {n: len({x["seed"] for x in own if x["n"] == n}) for n in sizes}
    rows = [["alone, CIFAR-10's training images", *(f"n = {n}, {seeds[n]} seed{'s'[: seeds[n] > 1]}" for n in sizes)]]
    rows.append(["---", *["--:"] * len(sizes)])
    for g, parameter in found[sizes[0]]:
        cells = []
        for n in sizes:
            parts = found[n][g, parameter]
            unsure = "" if len({p["verdict"] for p in parts}) == 1 else f" ({said(parts)})"
            cells.append(span([p["alone"] for p in parts]) + unsure)
        rows.append([f"{g}, {parameter}", *cells])
    seconds = [f"{sum(x['cpu_s'] for x in own if x['n'] == n) / seeds[n]:.0f}" for n in sizes]
    rows.append(["seconds of one core, six groups", *seconds])
    return table(rows)


TABLES = {"photographs": photographs_table, "sprites": sprites_table, "sizes": sizes_table}


def main(argv: list[str] | None = None) -> list[Line]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cifar", type=Path, metavar="DIR")
    p.add_argument("--imagenet", type=Path, metavar="DIR")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--page", type=Path)
    args = p.parse_args(argv)
    lines = run(args)
    if args.page:
        block = re.compile(r"(<!-- overwrites: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
        text = args.page.read_text()
        args.page.write_text(block.sub(lambda m: f"{m[1]}{TABLES[m[2]](lines)}\n{m[3]}", text))
    return lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
