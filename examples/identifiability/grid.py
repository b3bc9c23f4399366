"""The runs: experiment -> rows (a name and its differences from the defaults), three seeds each.

Budgets are encoder passes: a step of any method costs the same number of observations through an encoder of the same
size. They are a fraction of the papers' budgets (100,001 steps of 3 x 6,144 or 8 x 4,096 passes, and encoders 50 times
as wide as their input), so that a run takes a minute or less of one core.
"""

from typing import Any

Config = dict[str, Any]

DEFAULTS: dict[str, Config] = {
    "pair": {
        "method": "ours", "pairs": "content", "change": 0.75, "statistical": False, "causal": False,
        "passes": 768, "steps": 1500, "lr": 3e-3, "encoder": (10, 20, 20, 20, 10), "space": 16, "temperature": 0.08,
        "weight": 1.0, "samples": 4096, "fit": 1024, "rows": 1600,
    },
    "partial": {
        "method": "ours", "spaces": "subsets", "entropy": "joint", "dependent": 0, "dual": None,
        "passes": 1024, "steps": 1600, "lr": 3e-3, "encoder": (10, 20, 20, 20, 10), "space": 16, "temperature": 0.15,
        "weight": 1.0, "samples": 2048, "fit": 512, "rows": 1000,
    },
}  # fmt: skip

Row = tuple[str, Config]
BOTH = "content and style"

PAIR: list[Row] = [
    ("theirs, content pairs", {"method": "theirs"}),
    ("ours, content pairs", {}),
    ("theirs, content and style pairs", {"method": "theirs", "pairs": BOTH}),
    ("ours, content and style pairs", {"pairs": BOTH}),
]
PARTIAL: list[Row] = [
    ("theirs", {"method": "theirs"}),
    ("ours, a space for each subset", {}),
    ("ours, a space for each subset, separate entropies", {"entropy": "separate"}),
    ("ours, a space for each set of latents", {"spaces": "latents"}),
    ("ours, a space for each set of latents, dual ascent", {"spaces": "latents", "dual": 0.02}),
]
TRUTH: Row = ("the true latents", {"method": "truth"})
SETTINGS: dict[str, Config] = {
    "independent latents": {},
    "causal dependence": {"causal": True},
    "both dependences": {"statistical": True, "causal": True},
    "all styles change": {"change": 1.0},
    "statistical dependence": {"statistical": True},
}
EXPERIMENTS: dict[str, tuple[str, list[Row]]] = {
    **{
        f"pair/{name}": ("pair", [(n, setting | c) for n, c in PAIR + ([TRUTH] if "causal" in setting else [])])
        for name, setting in SETTINGS.items()
    },
    "partial/independent": ("partial", PARTIAL),
    "partial/dependent": ("partial", [(n, {"dependent": 6} | c) for n, c in [*PARTIAL, TRUTH]]),
    "longer/independent latents": ("pair", [(n, {"steps": 6000} | c) for n, c in PAIR]),
}
SEEDS = 3


def runs(prefixes: list[str] | None = None) -> list[dict[str, Any]]:
    """Every (configuration, seed) of the experiments that begin with one of the prefixes; first seeds come first."""
    wanted = [e for e in EXPERIMENTS if not prefixes or any(e.startswith(p) for p in prefixes)]
    for p in prefixes or ():
        if not any(e.startswith(p) for e in EXPERIMENTS):
            raise SystemExit(f"expected experiments of {', '.join(EXPERIMENTS)}: got {p}")
    return [
        {"experiment": e, "name": name, "config": {"world": EXPERIMENTS[e][0], **config}, "seed": seed}
        for seed in range(SEEDS)
        for e in wanted
        for name, config in EXPERIMENTS[e][1]
    ]
