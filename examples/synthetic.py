"""Does it disentangle? Train on synthetic data with known factors, and score what each space encodes.

    python examples/synthetic.py --dataset sprites --minutes 12 --out runs/sprites
    python examples/synthetic.py --dataset sprites --method content-only --minutes 12 --out runs/sprites-content
    python examples/synthetic.py --dataset latents --cross-image --out runs/latents

Writes metrics.json, matrix.png, curves.png, log.jsonl, and for sprites views.png. The ranges of the augmentations on
sprites: hue over the whole circle, brightness x 0.5-1.5, shifts of +-0.3 of the half edge, scale x 0.75-1.3, rotation
over the whole circle. The results of 13 minutes, with the options, are in docs/results.md.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from arguments import count, whole
from latents import CausalLatents, widths
from sprites import SHAPES, draw_factors, load_dsprites, render, scored
from torch import Tensor, nn

from ssd_addon import CollapseAlarm, DualAscent, JointEntropyLoss, StyleHeads, ViewBatch, plots
from ssd_addon.losses import FAMILIES
from ssd_addon.metrics import Circular, Exclusivity, embed, exclusivity, parameter_matrix, r2_matrix
from ssd_addon.report import Data
from ssd_addon.runs import build_views


class ConvNet(nn.Module):
    """A small backbone for 48 to 64 pixels: [N, C, H, W] -> [N, 256].

    Three strided blocks and one without stride, then two readouts of the last map: its average and maximum, which
    encode what is there, and a narrow copy of all of it, which encodes where.
    """

    def __init__(self, width: int = 128, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b, stride in ((channels, 32, 2), (32, 64, 2), (64, 96, 2), (96, width, 1)):
            layers += [nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.map = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # on CPUs about twice as fast
        self.where = nn.Sequential(nn.Conv2d(width, 16, 1), nn.AdaptiveAvgPool2d(6), nn.Flatten())
        self.out = nn.Sequential(nn.Linear(2 * width + 16 * 36, 256), nn.ReLU())
        self.num_features = 256

    def forward(self, x: Tensor) -> Tensor:
        y = self.map(x)
        return self.out(torch.cat([y.mean((2, 3)), y.amax((2, 3)), self.where(y)], dim=1))


def mlp(n_in: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((n_in, 256), (256, 256), (256, 256)):
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*layers)


GROUPS = {
    "color": [["ColorJitter", {"brightness": [0.5, 1.5], "hue": [-0.5, 0.5], "p": 1.0, "order": [0, 3]}]],
    "spatial": [
        [
            "RandomAffine",
            {"degrees": 180.0, "translate": [0.15, 0.15], "scale": [0.75, 1.3], "padding_mode": "border", "p": 1.0},
        ]
    ],
}
"""The operations that change sprites, by Kornia's names, as the card of the checkpoint describes the views."""


OWN = {"content": ("shape",), "color": ("hue", "brightness"), "spatial": ("x", "y", "scale")}
"""What each space should encode of sprites, without rotation, an angle whose meaning depends on the shape."""
TESTED = 2000
"""Number of sprites for the test whether a space depends on other factors than its own; no test below 50."""


def leaks(z: dict[str, Tensor], factors: dict[str, Any]) -> Exclusivity | None:
    """Test whether a space depends on a factor that is not its own; the factors of sprites are independent."""
    n = min(TESTED, len(factors["shape"]))
    if n < 50:
        return None
    known = {f: factors[f] for names in OWN.values() for f in names}
    some = {f: Circular(v.angle[:n], v.fold) if isinstance(v, Circular) else v[:n] for f, v in known.items()}
    own = {space: names for space, names in OWN.items() if space in z}
    return exclusivity({space: z[space][:n] for space in own}, some, own, independent=True)


def sprites(samples: int) -> Data:
    """Sprites with their factors, for `python -m ssd_addon report RUN --data examples/synthetic.py:sprites`."""
    factors = draw_factors(samples, torch.Generator().manual_seed(10_001))
    where = zip(factors["shape"].tolist(), factors["x"].tolist(), factors["y"].tolist(), strict=True)
    return Data(render(factors), scored(factors), [f"{SHAPES[s]} at {x:.2f}, {y:.2f}" for s, x, y in where])


class Latents(CausalLatents):
    """The causal latent model with the widths and the network of this example."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(
            args.seed,
            dependent=args.dependent,
            content_dependent=args.content_dependent_style,
            cross_image=args.cross_image and args.method == "ours",
            plan=args.plan,
            spaces=args.method == "ours",
        )
        self.widths = widths({"content": 16, **dict.fromkeys(self.plan.spaces[1:], 8)}, args.widths)
        self.backbone, self.features = mlp(self.width), 256


class Sprites:
    """New images for every step, with the two groups that change them."""

    sample_ndim = 3

    def __init__(self, args: argparse.Namespace) -> None:
        self.size, self.dsprites = args.size, args.dsprites
        cross = list(GROUPS) if args.cross_image else []
        recipe = {"groups": GROUPS, "plan": args.plan, "cross_image": cross}
        if args.method == "content-only":
            recipe = {"groups": {}, "then": [*GROUPS["color"], *GROUPS["spatial"]]}
        self.views = build_views(recipe, seed=args.seed)
        self.plan = self.views.plan
        self.card = {"backbone": "examples/synthetic.py:ConvNet", "views": recipe, "family": args.family}
        self.card |= {"size": args.size}
        styles = {} if args.method == "content-only" else {"color": 32, "spatial": 128}
        self.widths = widths({"content": 8, **styles}, args.widths)
        self.backbone, self.features = ConvNet(), 256
        self.pool: tuple[Tensor, dict[str, Tensor]] | None = None

    def images(self, n: int, g: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        if self.dsprites is None:
            factors = draw_factors(n, g)
            return render(factors, self.size), factors
        if self.pool is None:
            self.pool = load_dsprites(self.dsprites, 20_000, g)
        rows = torch.randint(len(self.pool[0]), (n,), generator=g)
        return self.pool[0][rows], {k: v[rows] for k, v in self.pool[1].items()}

    def batch(self, n: int, g: torch.Generator) -> ViewBatch:
        return self.views(self.images(n, g)[0])

    def labelled(self, n: int, g: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        images, factors = self.images(n, g)
        return images, scored(factors)


def learning_rate(progress: float, base: float) -> float:
    """Linear warm-up over 5 % of the run, then cosine to 0.1 %."""
    warm = min(1.0, progress / 0.05)
    return base * warm * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def shares(embeddings: dict[str, Tensor], factors: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Space -> factor -> share of the (unit-length) embedding's variance that is a function of that factor.

    A probe says whether a factor can be decoded from a space, however small its share. This function gives the share of
    the space's variance. The functions are class means, four powers, or six harmonics, by least squares.
    """
    out: dict[str, dict[str, float]] = {}
    for space, z in embeddings.items():
        e = nn.functional.normalize(z.double(), dim=1)
        e = e - e.mean(0)
        out[space] = {}
        for name, factor in factors.items():
            if isinstance(factor, Circular):
                if isinstance(factor.fold, Tensor):  # an angle that is defined only for some samples
                    continue
                angle = factor.angle.double()
                columns = [f(k * angle) for k in range(1, 7) for f in (torch.cos, torch.sin)]
            elif factor.is_floating_point():
                t = (factor.double() - factor.double().mean()) / factor.double().std()
                columns = [t**k for k in range(1, 5)] if t.ndim == 1 else [c**k for c in t.T for k in range(1, 5)]
            else:
                columns = [(factor == k).double() for k in factor.unique()[1:]]
            basis = torch.stack([torch.ones_like(columns[0]), *columns], dim=1)
            rest = e - basis @ torch.linalg.lstsq(basis, e).solution
            out[space][name] = 1 - (rest.square().sum() / e.square().sum()).item()
    return out


def main(argv: list[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", choices=("sprites", "latents"), default="sprites")
    p.add_argument("--method", choices=("ours", "content-only"), default="ours")
    p.add_argument("--family", choices=FAMILIES, default="simclr")
    p.add_argument("--plan", choices=("shared_query", "interleaved"), default="shared_query")
    p.add_argument("--cross-image", action="store_true", help="make the keys of styles from other images")
    p.add_argument("--temperature", type=float, default=None)
    p.add_argument("--content-weight", type=float, default=None, help="weight of content's invariance (styles keep 1)")
    p.add_argument(
        "--widths", default="", metavar="NAME=D,...", help="default content=8,color=32,spatial=128; latents: 16 and 8"
    )
    p.add_argument("--content-keys", choices=("first", "all"), default="first")
    p.add_argument("--content-entropy", action="store_true", help="add an entropy term on content alone")
    p.add_argument("--dual-ascent", type=float, default=None, metavar="TOLERANCE")
    p.add_argument("--dual-step", type=float, default=0.005, help="step size of the dual ascent")
    p.add_argument("--dual-warmup", type=count, default=500, help="steps before the dual ascent begins")
    p.add_argument("--dependent", action="store_true", help="latents: statistically dependent blocks")
    p.add_argument("--content-dependent-style", action="store_true", help="latents: style depends on content")
    p.add_argument("--dsprites", type=Path, default=None, help="the original dSprites npz instead of drawn sprites")
    p.add_argument("--size", type=whole, default=48)
    p.add_argument("--batch-size", type=whole, default=128)
    p.add_argument("--minutes", type=float, default=12.0)
    p.add_argument("--steps", type=whole, default=None, help="stop after so many steps instead")
    p.add_argument(
        "--rows",
        choices=("auto", "unit", "raw"),
        default="auto",
        help="score L2-normalized embeddings, as SimCLR's loss sees them, or raw ones",
    )
    p.add_argument("--samples", type=whole, default=4000, help="number of labeled samples for the probes")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--amp", action="store_true", help="bfloat16 autocast: faster if the processor supports it")
    p.add_argument("--seed", type=count, default=0)
    p.add_argument("--evaluate", action="store_true", help="score OUT/model.pt again, instead of training")
    p.add_argument("--out", type=Path, default=Path("runs/synthetic"))
    args = p.parse_args(argv)
    if args.evaluate:  # with the configuration of the run: other arguments would draw other data
        stored = args.out / "metrics.json"
        if not stored.exists() or not (args.out / "model.pt").exists():
            p.error(f"--evaluate: expected metrics.json and model.pt of a finished run in {args.out}: got none")
        kept = {"out": args.out, "evaluate": True, "rows": args.rows}
        args = argparse.Namespace(**vars(args) | json.loads(stored.read_text())["config"] | kept)

    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    data = Sprites(args) if args.dataset == "sprites" else Latents(args)
    model = StyleHeads(
        data.backbone, data.widths, in_features=data.features, hidden=(256,), sample_ndim=data.sample_ndim
    )
    weights: Any = None
    if args.content_weight is not None:
        weights = dict.fromkeys(data.widths, 1.0) | {"content": args.content_weight}
    if args.dual_ascent is not None:
        rise = {"tolerance": args.dual_ascent, "step_size": args.dual_step, "warmup_steps": args.dual_warmup}
        weights = DualAscent(data.widths, start=weights, **rise)
    criterion = JointEntropyLoss(
        args.family,
        temperature=args.temperature,
        weights=weights,
        content_keys=args.content_keys,
        content_entropy=args.content_entropy,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)

    log: list[dict[str, Any]] = []
    alarm = CollapseAlarm(args.steps, data.widths)
    start, step, progress, shown = time.monotonic(), 0, 0.0, 0.0
    if args.evaluate:
        model, progress = StyleHeads.load(args.out / "model.pt", data.backbone), 1.0
    with open(args.out / "log.jsonl", "a" if args.evaluate else "w") as file:
        while progress < 1:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, args.lr)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
                z = model(data.batch(args.batch_size, g))
            logging = step % 20 == 0
            terms = criterion.terms(z) if logging or args.dual_ascent is not None else None
            loss = criterion(z) if terms is None else terms.loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if terms is not None:
                criterion.weights.step(terms)
            step += 1
            elapsed = time.monotonic() - start
            progress = step / args.steps if args.steps else elapsed / (60 * args.minutes)
            if logging and terms is not None:
                log.append({"step": step, "seconds": round(elapsed, 2), **terms.scalars()})
                log[-1] = alarm.watch(log[-1])
                file.write(json.dumps(log[-1]) + "\n")
                file.flush()
            if elapsed - shown > 10 or progress >= 1:
                shown = elapsed
                left = elapsed / progress - elapsed if progress else 0
                rate = step * args.batch_size / elapsed
                print(
                    f"step {step}  loss {loss.item():.3f}  {rate:.0f} images/s  {max(left, 0):.0f} s left", flush=True
                )

    x, factors = data.labelled(args.samples, torch.Generator().manual_seed(args.seed + 10_000))
    unit = args.rows == "unit" or (args.rows == "auto" and criterion.on_sphere)
    z = embed(model, x, batch_size=500, on_sphere=unit)
    tables = {name: r2_matrix(z, factors, probe=kind) for name, kind in (("linear", "ridge"), ("nonlinear", "kernel"))}
    if args.dataset == "latents" and "content" in factors:
        tables["conditional"] = r2_matrix(z, factors, probe="kernel", given=("content",))
    if args.dataset == "sprites":
        scored_views = build_views({"groups": GROUPS})  # also for a model without style spaces
        made = parameter_matrix(model, scored_views, x[:2000], on_sphere=unit, backbone=True)
        tables |= {"label-free": made, **({"label-free, each parameter": made.parts} if made.parts else {})}
    for title, table in tables.items():
        print(f"\n{title}\n{table}")
    tests = leaks(z, factors) if args.dataset == "sprites" else None
    if tests is not None:
        print(f"\nexclusivity\n{tests}")
    exclusive = None if tests is None else tests.to_json()
    share = shares(z, factors)
    print("\nshare of the variance (percent)")
    for space, row in share.items():
        print(f"{space:10s}" + "  ".join(f"{name} {100 * value:.1f}" for name, value in row.items()))
    if args.evaluate:
        result = json.loads((args.out / "metrics.json").read_text())
        scores = {"tables": {k: t.to_json() for k, t in tables.items()}, "variance_share": share}
        result |= scores | {"exclusivity": exclusive}
        (args.out / "metrics.json").write_text(json.dumps(result, indent=1))
        plots.matrix(tables, args.out / "matrix.png")
        return result
    result = {
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "steps": step,
        "seconds": round(time.monotonic() - start, 1),
        "lambda": None if args.dual_ascent is None else [float(w) for w in criterion.lambdas(data.plan).values()],
        "tables": {k: t.to_json() for k, t in tables.items()},
        "variance_share": share,
        "exclusivity": exclusive,
    }
    (args.out / "metrics.json").write_text(json.dumps(result, indent=1))
    plots.matrix(tables, args.out / "matrix.png")
    plots.curves(log, args.out / "curves.png")
    if args.dataset == "sprites":
        plots.views_strip(data.batch(8, g), args.out / "views.png")
    model.save(args.out / "model.pt", card=getattr(data, "card", {}) | {"name": args.out.name})
    print(f"\nWritten to {args.out}: metrics.json, matrix.png, curves.png, log.jsonl, model.pt")
    return result


if __name__ == "__main__":
    main()
