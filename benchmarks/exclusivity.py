"""How often `metrics.exclusivity` rejects when the truth is known.

    python benchmarks/exclusivity.py --out docs/benchmarks

A factor is a function of the space's own factors and of a remainder. The space is a nonlinear function of its own
factors, mixed into d columns with a little noise. It may have one more direction:

    null cases   a direction of noise: 5 % of the tests should reject at the level of 5 %
    leaks        a direction that explains a given share (partial R^2) of the remainder: more tests should reject

Every repetition draws new samples from its own seed. Each line of the table goes to exclusivity.json when it is done,
and lines already there are kept, so that a run can be stopped and continued. `--quick` is a smoke run.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ssd_addon
from ssd_addon.metrics import Circular, Factor, exclusivity

RESAMPLES = 199
LEVEL = 0.05


@dataclass(frozen=True)
class World:
    """The own factors, what the space makes of them, and the factor as a function of its remainder."""

    own: dict[str, Factor]
    base: Tensor
    factor: Callable[[Tensor], Factor]
    sign: Tensor


def angle(n: int, g: torch.Generator) -> World:
    hue = 2 * math.pi * torch.rand(n, generator=g)
    harmonics = torch.stack([f(k * hue) for k in (1, 2) for f in (torch.cos, torch.sin)], 1)
    base = torch.cat([harmonics, (3 * hue.sin()).tanh()[:, None]], 1)
    return World({"hue": Circular(hue)}, base, lambda e: e, hue.sin().sign())


def number(n: int, g: torch.Generator) -> World:
    t = 2 * torch.rand(n, generator=g) - 1
    base = torch.stack([t, t**2, (4 * t).sin(), (3 * t).tanh()], 1)
    return World({"t": t}, base, lambda e: (3 * t).sin() + 0.5 * e, t.sign())


def two_angles(n: int, g: torch.Generator) -> World:
    hue = 2 * math.pi * torch.rand(n, generator=g)
    base = torch.stack([hue.cos(), hue.sin(), (2 * hue).cos(), (2 * hue).sin()], 1)
    return World({"hue": Circular(hue)}, base, lambda e: Circular(hue + 0.7 * e), hue.sin().sign())


def classes(n: int, g: torch.Generator) -> World:
    c = torch.randint(6, (n,), generator=g)
    places = torch.randn(6, 6, generator=torch.Generator().manual_seed(5))
    return World({"shape": c}, places[c], lambda e: c / 3 + e, 1.0 - 2 * (c % 2))


def place(n: int, g: torch.Generator) -> World:
    x, y = torch.rand(2, n, generator=g)
    base = torch.stack([(6 * x).sin(), (6 * y).cos(), x * y, y**2], 1)
    return World({"x": x, "y": y}, base, lambda e: 8 * (x - 0.5) * (y - 0.5) + 0.7 * e, (x - 0.5).sign())


def class_of_number(n: int, g: torch.Generator) -> World:
    t = torch.randn(n, generator=g)
    base = torch.stack([t, t**2, t.tanh()], 1)
    return World({"t": t}, base, lambda e: torch.bucketize(t + 0.7 * e, torch.tensor([-0.7, 0.7])), t.sign())


def mixed(n: int, g: torch.Generator) -> World:
    hue, x = 2 * math.pi * torch.rand(n, generator=g), torch.rand(n, generator=g)
    c = torch.randint(4, (n,), generator=g)
    base = torch.cat(
        [torch.stack([hue.cos() * (1 + x), hue.sin(), (6 * x).sin()], 1), F.one_hot(c, 4) * (1 + x[:, None])], 1
    )
    own: dict[str, Factor] = {"hue": Circular(hue), "x": x, "shape": c}
    return World(own, base, lambda e: hue.cos() + x + c / 3 + e, hue.sin().sign())


def nothing(n: int, g: torch.Generator) -> World:
    base = torch.randn(n, 4, generator=g)
    return World({}, base, lambda e: e, base[:, 0].sign())


def heavy(n: int, g: torch.Generator) -> World:
    world = number(n, g)
    return World(world.own, world.base, lambda e: e**5, world.sign)


WORLDS = {
    "number, own angle, independent": angle,
    "number of an own number": number,
    "angle of an own angle": two_angles,
    "number of an own class": classes,
    "number of own x * y": place,
    "classes of an own number": class_of_number,
    "number of an own angle, number and class": mixed,
    "number, nothing own": nothing,
    "heavy tails, own number, independent": heavy,
}


def draw(world: str, n: int, d: int, share: float, kind: str, seed: int) -> tuple[Tensor, dict[str, Factor], list[str]]:
    """A space [n, d], all factors, and the names of the own ones."""
    g = torch.Generator().manual_seed(seed)
    w = WORLDS[world](n, g)
    a, b = torch.randn(2, n, generator=g)
    signal = {"linear": a, "square": (a**2 - 1) / math.sqrt(2), "entangled": a * w.sign}[kind]
    remainder = math.sqrt(share) * signal + math.sqrt(1 - share) * b
    fixed = torch.Generator().manual_seed(9)
    mix = torch.randn(w.base.shape[1], d, generator=fixed)
    z = w.base @ mix
    z = z / z.std() + a[:, None] * F.normalize(torch.randn(1, d, generator=fixed)) * math.sqrt(d) / 4
    z = z + 0.05 * torch.randn(n, d, generator=g)
    return z, w.own | {"other": w.factor(remainder)}, list(w.own)


def line(world: str, n: int, d: int, share: float, kind: str, repetitions: int, exact: bool) -> dict[str, Any]:
    p, effects, start = [], [], time.process_time()
    for seed in range(repetitions):
        z, factors, own = draw(world, n, d, share, kind, 1000 + seed)
        test = exclusivity({"z": z}, factors, {"z": own}, independent=exact, resamples=RESAMPLES, seed=seed)[
            "z", "other"
        ]
        p.append(test.p)
        effects.append(test.effect)
    effect = torch.tensor(effects)
    return {
        "rejected": sum(x <= LEVEL for x in p),
        "repetitions": repetitions,
        "leaks": sum(x <= LEVEL and e >= 0.02 for x, e in zip(p, effects, strict=True)),
        "effect": round(float(effect.mean()), 4),
        "effect_std": round(float(effect.std()), 4),
        "cpu_seconds": round((time.process_time() - start) / repetitions, 3),
    }


def plan(quick: bool) -> list[tuple[str, int, int, float, str, int, bool]]:
    """(world, n, d, share, kind, repetitions, permutations)"""
    if quick:
        return [(w, 200, 8, 0.0, "linear", 2, False) for w in WORLDS]
    out: list[tuple[str, int, int, float, str, int, bool]] = []
    out += [(w, 500, 16, 0.0, "linear", 300, False) for w in WORLDS if not w.startswith("heavy")]
    out += [("heavy tails, own number, independent", 500, 16, 0.0, "linear", 300, exact) for exact in (False, True)]
    out += [
        ("number, own angle, independent", 500, 16, share, "linear", 100, False) for share in (0.01, 0.02, 0.05, 0.1)
    ]
    out += [("number, own angle, independent", 500, 16, share, "square", 100, False) for share in (0.02, 0.05, 0.1)]
    out += [("number, own angle, independent", 500, 16, share, "entangled", 100, False) for share in (0.02, 0.05, 0.1)]
    out += [("number of an own number", 500, 16, share, "linear", 100, False) for share in (0.02, 0.05, 0.1)]
    out += [("number of an own number", 1000, 128, 0.0, "linear", 200, False)]
    out += [("number of an own angle, number and class", 1000, 128, 0.0, "linear", 200, False)]
    out += [
        ("number of an own number", 1000, 128, share, kind, 50, False)
        for share, kind in ((0.02, "linear"), (0.05, "linear"), (0.05, "square"))
    ]
    out += [("number of an own number", 1000, 512, 0.0, "linear", 100, False)]
    out += [("number of an own number", 1000, 512, 0.05, "linear", 30, False)]
    return out


def page(made: dict[str, Any]) -> str:
    """The lines as two tables in Markdown."""
    seed = made["first_seed"]
    null, middle, large = ([x for x in made["lines"] if x["share"] == share] for share in (0.0, 0.02, 0.05))
    out = [
        "# How often the exclusivity test is right",
        "",
        f"Without a leak, `metrics.exclusivity` rejects in {_range(null, 'rejected')} of the tests at a level of 5 %,",
        f"and reports a leak in {_range(null, 'leaks')}. A leak that explains 5 % of what remains of a factor is found",
        f"in {_range(large, 'rejected')} of the tests, and one of 2 % in {_range(middle, 'rejected')}, depending on",
        "the samples (n) and on the width of the space (d).",
        "",
        f"Each repetition is one test at level {made['level']} with B = {made['resamples']} resamples.",
        f"Seeds are {seed}, {seed + 1}, ... Brackets are 95 % intervals (Wilson) of the share. A *leak* is a rejection",
        "with an effect of at least 0.02. `python benchmarks/exclusivity.py --out docs/benchmarks` made this page from",
        "[exclusivity.json](exclusivity.json).",
        "",
        "## Without a leak: a rejection is an error",
        "",
        *_table(["factor, given", "null", "n", "d", "repetitions", "rejected", "leaks", "processor s"], made, False),
        "",
        "## With a leak of known size: a rejection is right",
        "",
        *_table(
            [
                "factor, given",
                "encoded",
                "partial R²",
                "n",
                "d",
                "repetitions",
                "rejected",
                "leaks",
                "effect",
                "processor s",
            ],
            made,
            True,
        ),
    ]
    return "\n".join(out) + "\n"


def _table(columns: list[str], made: dict[str, Any], leaks: bool) -> list[str]:
    out = [f"| {' | '.join(columns)} |", f"|:--|:--|{'--:|' * (len(columns) - 2)}"]
    for x in made["lines"]:
        if bool(x["share"]) != leaks:
            continue
        cells = [x["case"], *([x["leak"], x["share"]] if leaks else [x["null"]]), x["n"], x["d"], x["repetitions"]]
        cells += [_share(x["rejected"], x), f"{100 * x['leaks'] / x['repetitions']:.1f} %"]
        cells += [f"{x['effect']:.3f} ± {x['effect_std']:.3f}"] * leaks + [f"{x['cpu_seconds']:.2f}"]
        out.append(f"| {' | '.join(map(str, cells))} |")
    return out


def _range(lines: list[dict[str, Any]], what: str) -> str:
    """Smallest and largest share of the repetitions over some lines."""
    shares = sorted(100 * x[what] / x["repetitions"] for x in lines)
    return f"{shares[0]:.0f} %" if shares[0] == shares[-1] else f"{shares[0]:.0f} to {shares[-1]:.0f} %"


def _share(count: int, x: dict[str, Any]) -> str:
    n, z = x["repetitions"], 1.96
    middle, half = count + z * z / 2, z * math.sqrt(count * (n - count) / n + z * z / 4)
    low, high = (100 * (middle + sign * half) / (n + z * z) for sign in (-1, 1))
    return f"{100 * count / n:.1f} % ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for exclusivity.json")
    parser.add_argument("--quick", action="store_true", help="two repetitions of small cases")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.out / "exclusivity.json"
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    made = json.loads(path.read_text()) if path.exists() else machine | {"version": ssd_addon.__version__, "lines": []}
    made |= {"level": LEVEL, "resamples": RESAMPLES, "first_seed": 1000}
    for world, n, d, share, kind, repetitions, exact in plan(args.quick):
        key = {"case": world, "n": n, "d": d, "share": share, "leak": kind if share else None}
        key["null"] = "permutations" if exact else "signs"
        if any(all(old[k] == v for k, v in key.items()) for old in made["lines"]):
            continue
        result = line(world, n, d, share, kind, repetitions, exact)
        made["lines"].append(key | result)
        path.write_text(json.dumps(made, indent=1) + "\n")
        print(key, result, flush=True)
    path.with_suffix(".md").write_text(page(made))


if __name__ == "__main__":
    main()
