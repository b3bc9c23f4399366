"""The grid of the study: experiment -> rows (a name and its differences from the defaults), with three seeds or one.

Claims of docs/results.md have three seeds, scans of a setting have one. All of it takes about six hours of two cores.
"""

from collections.abc import Sequence
from typing import Any

Config = dict[str, Any]

DEFAULTS: Config = {
    "method": "ours",
    "family": "simclr",
    "plan": "shared_query",
    "cross": False,  # cross-image keys: latents True or False, images a list of groups
    "temperature": 0.15,
    "content_weight": None,
    "content_keys": "first",
    "content_entropy": False,
    "dual": None,
    "dual_step": 0.05,
    "dual_warmup": 400,
    "heads": "separate",
    "constrained_crop": None,
    "equivariance": 1.0,
    "independence": 25.0,
    "style_width": None,
    "tasks": False,  # photographs: accuracy on tasks (tasks.py), on two halves of the held-out images
    "scored": 1000,  # images of the label-free matrix; 0: none (sprites, objects)
    "curve": 0,  # sprites and objects: the linear table every so many steps, for the weights and for their average
    "augself": 1.0,
    "leaks": False,  # images: tests whether a space depends on what is not its own (metrics.exclusivity)
    "split": 0,  # photographs: 1 holds out images that were not used to choose a setting
    "contrast": 0.0,  # photographs: weight of ordinary SSL on content alone, beside the joint loss
    "amp": False,
    "history": 0,  # log content's terms every so many steps
}
OF_WORLD: dict[str, Config] = {
    "latents": {
        "temperature": 0.05, "batch": 512, "steps": 1200, "lr": 1e-3, "content": 4, "styles": 2, "style": 2,
        "dependent": False, "content_dependent": False, "content_width": 16, "style_width": 8,
        "samples": 2400,
    },
    "sprites": {
        "size": 48, "batch": 128, "steps": 1600, "lr": 2e-3, "content_width": 8, "spatial_width": 128, "amp": True,
        "content_entropy": True, "content_weight": 2.0, "dual": 0.01, "samples": 4000,
    },
    "objects": {
        "size": 48, "batch": 128, "steps": 1600, "lr": 2e-3, "content_width": 16, "style_width": 16, "images": 8000,
        "amp": True, "samples": 4000,
    },
    "photographs": {
        "size": 32, "load_size": 32, "batch": 128, "steps": 1600, "lr": 2e-3, "content_width": 64, "style_width": 32,
        "amp": True, "groups": "color_spatial",
    },
}  # fmt: skip

Row = tuple[str, Config, int]  # name, configuration, number of seeds


def both(name: str, c: Config, seeds: int = 1, crossed: int | None = None) -> list[Row]:
    """With same-image keys, and with cross-image keys (`crossed` seeds of these, if fewer)."""
    return [(f"{name}, same-image", c, seeds), (f"{name}, cross-image", c | {"cross": True}, crossed or seeds)]


LATENTS: dict[str, list[Row]] = {
    "latents/families": [
        *both("simclr", {}, 3),
        *both("vicreg", {"family": "vicreg"}, 3),
        *both("barlow", {"family": "barlow"}, 3),
    ],
    "latents/cures": [
        ("shallow style heads", {"heads": "shallow styles"}, 1),
        ("equivariance, 1", {"method": "equivariance"}, 3),
        ("equivariance, 0.5", {"method": "equivariance", "equivariance": 0.5}, 3),
        ("equivariance, 0.25", {"method": "equivariance", "equivariance": 0.25}, 1),
        ("equivariance, 2", {"method": "equivariance", "equivariance": 2.0}, 3),
        ("equivariance, 4", {"method": "equivariance", "equivariance": 4.0}, 1),
        ("vicreg, equivariance, 1", {"method": "equivariance", "family": "vicreg"}, 3),
        ("vicreg, equivariance, 0.1", {"method": "equivariance", "family": "vicreg", "equivariance": 0.1}, 1),
        ("barlow, equivariance, 1", {"method": "equivariance", "family": "barlow"}, 1),
        ("squared distance in a cube", {"method": "cube"}, 1),
        ("squared distance in a cube, tau 0.02", {"method": "cube", "temperature": 0.02}, 1),
    ],
    "latents/controls": [
        ("content-only", {"method": "content-only", "steps": 2400}, 3),
        ("unstructured pairs, same heads", {"method": "unstructured pairs"}, 3),
        ("separate entropies, same-image", {"method": "separate entropies"}, 3),
        ("separate entropies, cross-image", {"method": "separate entropies", "cross": True}, 3),
        ("interleaved, same-image", {"plan": "interleaved", "batch": 1024}, 3),
        ("interleaved, cross-image", {"plan": "interleaved", "batch": 1024, "cross": True}, 3),
        ("one projector, same-image", {"heads": "one projector"}, 3),
        ("one projector, cross-image", {"heads": "one projector", "cross": True}, 3),
        ("LooC", {"method": "looc"}, 3),
        ("AugSelf", {"method": "augself", "steps": 2400}, 3),
    ],
    "latents/styles": [
        *both("1 style", {"styles": 1}, 3),
        ("1 style, equivariance, 2", {"styles": 1, "method": "equivariance", "equivariance": 2.0}, 3),
        ("1 style, equivariance, 0.5", {"styles": 1, "method": "equivariance", "equivariance": 0.5}, 3),
        *both("4 styles", {"styles": 4}, 3),
        ("4 styles, equivariance, 2", {"styles": 4, "method": "equivariance", "equivariance": 2.0}, 1),
    ],
    "latents/dependence": [
        *both("dependent", {"dependent": True}, 3),
        ("dependent, equivariance, 2", {"dependent": True, "method": "equivariance", "equivariance": 2.0}, 1),
        *both("style depends on content", {"content_dependent": True}, 3),
        ("style depends on content, the truth", {"content_dependent": True, "method": "truth"}, 3),
        ("style depends on content, equivariance, 2",
         {"content_dependent": True, "method": "equivariance", "equivariance": 2.0}, 1),
    ],
    "latents/temperature": [
        row for t, n in ((0.02, 3), (0.1, 1), (0.15, 1), (0.5, 3)) for row in both(f"tau {t}", {"temperature": t}, n, 1)
    ],
    "latents/batch": [
        row for b, n in ((64, 3), (256, 1), (1024, 3)) for row in both(f"batch {b}", {"batch": b}, n, 1)
    ],
    "latents/length": [
        row for n in (300, 2400, 4800) for row in both(f"{n} steps", {"steps": n})
    ],
    "latents/dimensions": [
        *both("content 2", {"content": 2}),
        *both("content 8", {"content": 8}),
        *both("styles of 1", {"style": 1}),
        *both("styles of 4", {"style": 4}),
        *both("spaces of 5 and 3", {"content_width": 5, "style_width": 3}),
        *both("spaces of 64 and 64", {"content_width": 64, "style_width": 64}),
    ],
    "latents/others": [
        row
        for family in ("vicreg", "barlow")
        for name, c in (("dependent", {"dependent": True}), ("style depends on content", {"content_dependent": True}),
                        ("batch 64", {"batch": 64}))
        for row in both(f"{family}, {name}", {"family": family, **c})
    ],
    "latents/entropy": [
        ("vicreg, independent features, same-image", {"family": "vicreg", "method": "independent"}, 1),
        ("vicreg, independent features, cross-image", {"family": "vicreg", "method": "independent", "cross": True}, 1),
        ("vicreg, independent features and equivariance, 0.1",
         {"family": "vicreg", "method": "independent equivariant", "equivariance": 0.1}, 1),
        ("vicreg, independent features and equivariance, 0.3",
         {"family": "vicreg", "method": "independent equivariant", "equivariance": 0.3}, 1),
        ("vicreg, 4,800 steps, cross-image", {"family": "vicreg", "cross": True, "steps": 4800}, 1),
    ],
}  # fmt: skip

SPRITES: dict[str, list[Row]] = {
    "sprites/methods": [
        ("ours", {}, 3),
        ("content-only", {"method": "content-only", "steps": 3200}, 3),
        ("ours, equivariance, 0.5", {"method": "equivariance", "equivariance": 0.5}, 3),
        ("LooC", {"method": "looc"}, 1),
        ("AugSelf", {"method": "augself", "steps": 3200}, 1),
    ],
    "sprites/families": [
        (family, {"family": family, "dual": None, "content_weight": None, "content_entropy": False}, 1)
        for family in ("simclr", "vicreg", "barlow", "sigreg", "frossl", "mmcr")
    ],
    "sprites/ablations": [
        ("fixed weights", {"dual": None, "content_weight": None}, 1),
    ],
    "sprites/collapse": [
        ("weight 1", {"steps": 800, "history": 20, "dual": None, "content_weight": None}, 1),
        ("weight 3 from the start", {"steps": 800, "history": 20, "dual": None, "content_weight": 3.0}, 1),
        (
            "weight 1, raised by dual ascent",
            {"steps": 800, "history": 20, "content_weight": None, "dual_warmup": 200},
            1,
        ),
    ],
    "sprites/cross": [
        ("cross-image both", {"cross": ["color", "spatial"]}, 1),
        (
            "equivariance, 0.5, spatial 16 wide",
            {"method": "equivariance", "equivariance": 0.5, "spatial_width": 16},
            1,
        ),
    ],
}

EACH = ["crop", "rotation", "gain", "hue", "saturation", "blur"]
CIFAR, IMAGENET = {"data": "cifar"}, {"data": "imagenet", "size": 64, "load_size": 72}
PHOTOGRAPHS: dict[str, list[Row]] = {
    "cifar/methods": [
        ("ours", CIFAR, 3),
        ("content-only", CIFAR | {"method": "content-only", "steps": 3200}, 3),
        ("ours, dual ascent", CIFAR | {"dual": 0.05}, 1),
        ("LooC", CIFAR | {"method": "looc"}, 1),
        ("AugSelf", CIFAR | {"method": "augself", "steps": 3200}, 1),
        ("unstructured pairs, same heads", CIFAR | {"method": "unstructured pairs"}, 1),
    ],
    "cifar/cross": [
        ("kinds, same-image", CIFAR | {"groups": "kinds"}, 3),
        ("kinds, cross-image", CIFAR | {"groups": "kinds", "cross": ["spatial", "color"]}, 3),
        ("kinds, equivariance, 0.5", CIFAR | {"groups": "kinds", "method": "equivariance", "equivariance": 0.5}, 3),
        ("kinds, equivariance, 2", CIFAR | {"groups": "kinds", "method": "equivariance", "equivariance": 2.0}, 1),
        ("each operation, same-image", CIFAR | {"groups": "each"}, 1),
        ("each operation, cross-image", CIFAR | {"groups": "each", "cross": EACH}, 1),
    ],
    "cifar/crop": [
        ("constrained crop, 0.25", CIFAR | {"constrained_crop": 0.25}, 1),
    ],
    "cifar/weights": [
        ("content entropy", CIFAR | {"content_entropy": True}, 1),
        (
            "content entropy, equivariance 0.5, first key",
            CIFAR | {"content_entropy": True, "method": "equivariance", "equivariance": 0.5},
            3,
        ),
        (
            "content entropy, weight 2, dual ascent 0.05",
            CIFAR | {"content_entropy": True, "content_weight": 2.0, "dual": 0.05},
            1,
        ),
        (
            "content entropy, weight 2, dual ascent 0.2",
            CIFAR | {"content_entropy": True, "content_weight": 2.0, "dual": 0.2},
            1,
        ),
    ],
    "imagenet/cross": [
        ("same-image", IMAGENET | {"groups": "kinds"}, 1),
        ("cross-image", IMAGENET | {"groups": "kinds", "cross": ["spatial", "color"]}, 1),
    ],
}

PLAIN: Config = {
    "method": "combined", "equivariance": 0.0, "independence": 0.0, "dual": None, "content_weight": None,
    "content_entropy": False, "content_width": 16, "style_width": 16,
}  # fmt: skip
HALF, APART = {"equivariance": 0.5}, {"independence": 3.0}
WIDE, EVERY, ENTROPY = {"content_width": 64, "style_width": 32}, {"content_keys": "all"}, {"content_entropy": True}
CANDIDATES: dict[str, Config] = {
    "recipe of release 0.1, first key": WIDE | HALF | ENTROPY,
    "plain": {},
    "equivariance 0.5": HALF,
    "independence 3": APART,
    "independence 3, equivariance 0.5": APART | HALF,
    "all keys": EVERY,
    "all keys, independence 3, equivariance 0.5": EVERY | APART | HALF,
    "content entropy, equivariance 0.5": ENTROPY | HALF,
    "plain, 64 and 32": WIDE,
    "independence 3, equivariance 0.5, 64 and 32": WIDE | APART | HALF,
    "all keys, equivariance 0.5": EVERY | HALF,
    "all keys, independence 3": EVERY | APART,
    "content entropy": ENTROPY,
    "independence 10": {"independence": 10.0},
    "independence 1": {"independence": 1.0},
    "equivariance 0.1": {"equivariance": 0.1},
}
"""Candidates for the recipe: settings that are scanned on every data set with one seed."""
ORDINARY = {"method": "content-only", "content_width": 64}
SHORT = {"steps": 1200, "curve": 200, "samples": 2000, "scored": 0}
SCANS: dict[str, list[Row]] = {
    "sprites/scan": [(n, PLAIN | {"spatial_width": None} | SHORT | c, 1) for n, c in CANDIDATES.items()],
    "cifar/scan": [
        ("content-only", CIFAR | PLAIN | ORDINARY | {"steps": 3200, "scored": 500}, 1),
        *((n, CIFAR | PLAIN | {"scored": 500} | c, 1) for n, c in list(CANDIDATES.items())[:15]),
    ],
}
FULL = {"content_weight": 3.0}
FINALISTS: dict[str, Config] = {
    "all keys, content entropy, equivariance 0.5, 64 and 32": WIDE | EVERY | ENTROPY | HALF,
    "content weight 3": WIDE | EVERY | ENTROPY | HALF | FULL,
    "32 and 16": EVERY | ENTROPY | HALF | {"content_width": 32},
    "independence 3": WIDE | EVERY | ENTROPY | HALF | APART,
    "independence 1": WIDE | EVERY | ENTROPY | HALF | {"independence": 1.0},
    "content weight 3, equivariance 0.1": WIDE | EVERY | ENTROPY | FULL | {"equivariance": 0.1},
    "independence 3 without content entropy, 16 and 16": EVERY | HALF | APART,
}
"""The best settings of the scan and their neighbors."""
TRIED = {"steps": 1200, "samples": 2000, "scored": 500}
NARROW = {"content_width": 8, "style_width": 32}
FINALS: dict[str, list[Row]] = {
    "sprites/finals": [
        (n, PLAIN | {"spatial_width": None} | TRIED | c, 3)
        for n, c in (FINALISTS | {"content 8 wide": EVERY | ENTROPY | HALF | NARROW}).items()
    ],
    "objects/finals": [
        ("the recipe", PLAIN | TRIED | {"steps": 1600, "scored": 0, "leaks": True} | WIDE | EVERY | ENTROPY | HALF, 3),
        ("content-only", PLAIN | TRIED | ORDINARY | {"steps": 3200, "scored": 0, "leaks": True}, 3),
    ],
    "cifar/finals": [
        *((n, CIFAR | PLAIN | {"steps": 1200, "scored": 500} | c, 3) for n, c in FINALISTS.items()),
        ("content-only", CIFAR | PLAIN | ORDINARY | {"steps": 2400, "scored": 500}, 3),
    ],
}

RECIPE = WIDE | EVERY | ENTROPY | HALF
JOINT_ALONE = WIDE | EVERY | {"equivariance": 0.1}
IMAGENETS: dict[str, list[Row]] = {
    "imagenet/recipe": [
        ("the recipe", IMAGENET | PLAIN | RECIPE | {"steps": 600}, 3),
        ("content-only", IMAGENET | PLAIN | ORDINARY | {"steps": 1200}, 3),
    ],
}
OTHERS = ("vicreg", "barlow", "sigreg", "frossl", "mmcr")
FAMILIES: dict[str, list[Row]] = {
    "sprites/each": [
        *((f, PLAIN | TRIED | NARROW | {"spatial_width": None, "family": f}, 3) for f in OTHERS),
        *((f"{f}, 64 wide", PLAIN | WIDE | TRIED | {"spatial_width": None, "family": f}, 1) for f in OTHERS),
        *(
            (f"{family}, {name}", PLAIN | {"spatial_width": None} | TRIED | {"steps": 800, "family": family} | c, 1)
            for name, c in (
                ("the recipe", RECIPE),
                ("equivariance 0.1 without content entropy", JOINT_ALONE),
            )
            for family in OTHERS
        ),
    ],
    "cifar/each": [
        *((f, CIFAR | PLAIN | NARROW | {"steps": 1200, "scored": 500, "family": f}, 3) for f in OTHERS),
        *(
            (f"{f}, 64 wide", CIFAR | PLAIN | WIDE | {"steps": 1200, "scored": 500, "family": f}, 1)
            for f in ("vicreg", "mmcr")
        ),
    ],
}
"""The other families with a narrow content space, with the widths of SimCLR's recipe, and by SimCLR's recipe."""

CHOSEN = CIFAR | PLAIN | {"scored": 500, "tasks": True, "content_width": 64, "style_width": 32}
FRESH = CHOSEN | {"split": 1, "leaks": True, "scored": 1000, "steps": 1200}
BASELINES: dict[str, list[Row]] = {
    "cifar/content": [
        (n, CHOSEN | RECIPE | {"steps": 1200} | c, 1)
        for n, c in {
            "first key": {"content_keys": "first"},
            "first key, content weight 3": {"content_keys": "first", "content_weight": 3.0},
            "content 256 wide": {"content_width": 256},
            "SSL on content, 1": {"contrast": 1.0},
            "SSL on content, 3": {"contrast": 3.0},
            "first key, SSL on content, 1": {"content_keys": "first", "contrast": 1.0},
            "first key, SSL on content, 3": {"content_keys": "first", "contrast": 3.0},
            "first key, content weight 3, no equivariance": {
                "content_keys": "first", "content_weight": 3.0, "equivariance": 0.0,
            },
        }.items()
    ],
    "cifar/tuned": [
        ("content 256 wide, SSL on content, 1",
         CHOSEN | RECIPE | {"steps": 1200, "content_width": 256, "contrast": 1.0}, 3),
        ("content-only, 256 wide",
         CHOSEN | {"method": "content-only", "steps": 2400, "content_width": 256, "style_width": 16}, 3),
    ],
    "cifar/fresh": [
        (n, FRESH | c, 3)
        for n, c in {
            "the recipe": RECIPE,
            "content 256 wide, SSL on content, 1": RECIPE | {"content_width": 256, "contrast": 1.0},
            "content 8 wide": RECIPE | NARROW,
            "content-only": {"method": "content-only", "steps": 2400},
            "content-only, 256 wide": {"method": "content-only", "steps": 2400, "content_width": 256},
            "LooC, tau 0.05, spaces 128 and 128": {
                "method": "looc", "temperature": 0.05, "content_width": 128, "style_width": 128,
            },
            "AugSelf, weight 1, tau 0.15": {"method": "augself", "augself": 1.0, "steps": 2400},
        }.items()
    ],
    "cifar/looc": [
        (f"LooC, tau {t}, spaces {a} and {b}",
         CHOSEN | {"method": "looc", "temperature": t, "steps": 600, "content_width": a, "style_width": b}, 1)
        for a, b in ((64, 32), (128, 128), (32, 16))
        for t in (0.05, 0.1, 0.15, 0.2, 0.4)
    ],
    "cifar/augself": [
        (f"AugSelf, weight {w}, tau {t}",
         CHOSEN | {"method": "augself", "augself": w, "temperature": t, "steps": 1200}, 1)
        for t in (0.15, 0.1, 0.3)
        for w in (0.1, 0.3, 1.0, 3.0, 10.0)
    ],
}  # fmt: skip
"""Settings that may raise the content space's accuracy, and settings of the baselines: as many trials as ours had, half
as long, one seed. "cifar/fresh": the settings so chosen, scored on images that were not used to choose them."""

EXPERIMENTS: dict[str, list[Row]] = {
    **LATENTS, **SPRITES, **PHOTOGRAPHS, **SCANS, **FINALS, **IMAGENETS, **FAMILIES, **BASELINES,
}  # fmt: skip


def world(experiment: str) -> str:
    first = experiment.split("/")[0]
    return first if first in OF_WORLD else "photographs"


def runs(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every (configuration, seed) of the experiments whose names begin so; first seeds and first rows come first."""
    if unknown := [n for n in names if not any(e.startswith(n) for e in EXPERIMENTS)]:
        raise SystemExit(f"expected experiments of {', '.join(EXPERIMENTS)}: got {', '.join(unknown)}")
    chosen = [e for e in EXPERIMENTS if not names or any(e.startswith(n) for n in names)]
    out = []
    for seed in range(3):
        for place in range(max(len(EXPERIMENTS[e]) for e in chosen)):
            for e in chosen:
                if place < len(EXPERIMENTS[e]) and seed < EXPERIMENTS[e][place][2]:
                    name, config, _ = EXPERIMENTS[e][place]
                    out.append({"experiment": e, "name": name, "config": {"world": world(e), **config}, "seed": seed})
    return out
