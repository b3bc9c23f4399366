"""Style spaces for time series: the waveform, separated from the gain and the shift of the recording.

    python examples/series.py --out runs/series

The script makes series of 4 channels. Each has a waveform (sine, square, sawtooth, pulses, chirp or two tones) and a
frequency, and was recorded with its own gain and shift: x = gain * (wave + noise) + shift. Two operations, written
here, change them: `Gain` scales each channel about its mean, and `Shift` adds a number to the whole series. `Window`
cuts out 128 of 160 steps, drawn again for every view. It takes about a minute on two cores and writes metrics.json,
matrix.png, curves.png, log.jsonl, model.pt and series.png. The measured matrix is in docs/domains.md.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from arguments import count, whole
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from training import score, train, write

from ssd_addon import StructuredViews, recipe

WAVES = ("sine", "square", "sawtooth", "pulses", "chirp", "two tones")
CHANNELS, LONG, STEPS = 4, 160, 128
OWN_GAIN, OWN_SHIFT, NOISE = 1.5, 0.5, 0.1
"""Series are recorded with a gain of 2/3 to 3/2 and a shift of -0.5 to 0.5."""
GAIN, SHIFT = 3.0, 2.0
"""The operations have a wider range than the recordings: 1/3 to 3, -2 to 2."""


def log_uniform(n: int, most: float, generator: torch.Generator) -> Tensor:
    """Factors [n] from 1 / most to most."""
    return torch.exp(math.log(most) * (2 * torch.rand(n, generator=generator) - 1))


class Gain:
    """Scales a series [C, T] about the mean of each channel, so that its shift does not change."""

    def __init__(self, most: float = GAIN) -> None:
        self.most = most

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        return {"log_gain": log_uniform(shape[0], self.most, generator).log()}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        return mean + parameters["log_gain"].exp().view(-1, 1, 1) * (x - mean)


class Shift:
    """Adds one number to all channels and steps of a series."""

    def __init__(self, most: float = SHIFT) -> None:
        self.most = most

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        return {"offset": self.most * (2 * torch.rand(shape[0], generator=generator) - 1)}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return x + parameters["offset"].view(-1, 1, 1)


class Window:
    """Cuts STEPS steps out of a longer series, starting at a random step."""

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        return {"start": torch.randint(shape[-1] - STEPS + 1, (shape[0],), generator=generator)}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        steps = parameters["start"][:, None] + torch.arange(STEPS)
        return x.gather(-1, steps[:, None].expand(-1, x.shape[1], -1))


GROUPS = {"gain": [Gain()], "shift": [Shift()]}


def structured_views(seed: int = 0) -> StructuredViews:
    return StructuredViews(GROUPS, then=[Window()], sample_ndim=2, value_range=None, seed=seed)


def waves(kind: Tensor, cycles: Tensor, phase: Tensor) -> Tensor:
    """Waveforms [n, C, T] of mean 0 and standard deviation 1; kind [n] of WAVES, cycles and phase [n].

    A channel lags behind the one before it by an eighth of a cycle, as sensors at several places do.
    """
    t = torch.arange(LONG) / LONG
    turns = cycles.view(-1, 1, 1) * t + phase.view(-1, 1, 1) + torch.arange(CHANNELS).view(-1, 1) / 8  # [n, C, T]
    angle = 2 * math.pi * turns
    shapes = [
        angle.sin(),
        torch.tanh(5 * angle.sin()),
        2 * turns.remainder(1) - 1,
        torch.exp(-60 * (turns.remainder(1) - 0.5) ** 2),
        torch.sin(angle * (0.5 + t)),
        angle.sin() + torch.sin(2.6 * angle),
    ]
    x = torch.stack(shapes).gather(0, kind.view(1, -1, 1, 1).expand(1, -1, CHANNELS, LONG))[0]
    x = x - x.mean(dim=-1, keepdim=True)
    return x / x.std(dim=-1, keepdim=True)


def record(n: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """n series [n, C, T] and their factors; the gain scales the noise too, or the noise would reveal it."""
    kind = torch.randint(len(WAVES), (n,), generator=generator)
    cycles = 4 + 4 * torch.rand(n, generator=generator)
    wave = waves(kind, cycles, torch.rand(n, generator=generator))
    noise = NOISE * torch.randn(wave.shape, generator=generator)
    gain = log_uniform(n, OWN_GAIN, generator)
    shift = OWN_SHIFT * (2 * torch.rand(n, generator=generator) - 1)
    x = gain.view(-1, 1, 1) * (wave + noise) + shift.view(-1, 1, 1)
    return x, {"waveform": kind, "frequency": cycles, "gain": gain.log(), "shift": shift}


class SeriesNet(nn.Module):
    """A small backbone for series: [N, C, T] -> [N, 128], the average and the maximum over time of the last layer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((CHANNELS, 32), (32, width), (width, width)):
            layers += [nn.Conv1d(a, b, 7, stride=2, padding=3, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.num_features = 2 * width

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return torch.cat([y.mean(dim=-1), y.amax(dim=-1)], dim=1)


def picture(views: Tensor, spaces: tuple[str, ...], path: Path, rows: int = 3) -> None:
    """The first channels of some series: a row per series, a column per view [V, B, C, T]."""
    titles = [
        "query",
        "content key: shares the series alone",
        *(f"{s} key: shares the query's {s}" for s in spaces[1:]),
    ]
    fig = Figure(figsize=(3.2 * len(views), 1.6 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(rows, len(views), sharex=True, sharey="row", squeeze=False)
    for i in range(rows):
        for v, title in enumerate(titles):
            axes[i, v].plot(views[v, i, 0].numpy(), color="#0072B2", linewidth=1)
            axes[i, v].axhline(0, color="0.75", linewidth=0.8)
            axes[i, v].spines[["top", "right"]].set_visible(False)
            if i == 0:
                axes[i, v].set_title(title, fontsize=9)
    fig.supxlabel("step (one of 4 channels)", fontsize=9)
    fig.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=whole, default=600)
    p.add_argument("--batch-size", type=whole, default=128)
    p.add_argument("--content", type=whole, default=8, help="width of the content space")
    p.add_argument("--style", type=whole, default=4, help="width of each style space")
    p.add_argument("--samples", type=whole, default=3000, help="number of series for the probes")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seed", type=count, default=0)
    p.add_argument("--out", type=Path, default=Path("runs/series"))
    args = p.parse_args(argv)

    torch.manual_seed(args.seed)
    r = recipe(GROUPS, content=args.content, style=args.style)
    views = structured_views(args.seed)
    settings = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    model, log = train(SeriesNet(), views, r, record, **settings)
    held_out, factors = record(args.samples, torch.Generator().manual_seed(args.seed + 10_000))
    tables = score(model, views, held_out, factors, held_out[:1000])
    result = write(args.out, model, tables, log, vars(args), {})
    picture(views(held_out[:8]).views, views.plan.spaces, args.out / "series.png")
    print(f"\nWritten to {args.out}: metrics.json, matrix.png, curves.png, log.jsonl, model.pt, series.png")
    return result


if __name__ == "__main__":
    main()
