"""How a probe is fitted and scored: its settings, the split into training and held-out samples, scores and intervals.

Shared by `r2_matrix`, `parameter_matrix` and `redundancy`, which differ in their inputs and targets.
Legend: n samples (the rows of all matrices), d the width of a space, R bootstrap resamples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.metrics.probes import SOLVERS, Inputs, Problem, Target
from ssd_addon.metrics.spaces import MIN_ROWS
from ssd_addon.metrics.table import Cell

Kind = Literal["ridge", "kernel", "mlp"]


@dataclass(frozen=True)
class Probe:
    """The kind and the settings of a probe. `probe="kernel"` is short for `probe=Probe("kernel")`.

    Args:
        kind: *ridge*: linear with intercept. *kernel*: ridge with an RBF kernel and an intercept. *mlp*: one hidden
            layer of 256, stopped early on a fifth of the training samples.
        train_fraction: fraction of the samples on which probes are fitted; the others are held out.
        folds: number of folds of the cross-validation that chooses penalty and bandwidth.
        kernel_rows: largest number of training samples for the kernel probe.

    Raises:
        ValueError: the kind is unknown; the fraction is not between 0 and 1; there are fewer than 2 folds or 5 samples.

    >>> Probe("kernel", train_fraction=0.8).folds
    5
    """

    kind: Kind = "ridge"
    train_fraction: float = 0.5
    folds: int = 5
    kernel_rows: int = 5000

    def __post_init__(self) -> None:
        _checks.choice(self.kind, tuple(SOLVERS), "probe")
        at_least("folds", self.folds, 2)
        at_least("kernel_rows", self.kernel_rows, MIN_ROWS)
        fraction = self.train_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
            raise ValueError(f"train_fraction: expected a fraction of the samples between 0 and 1: got {fraction!r}")

    @classmethod
    def of(cls, probe: "Kind | Probe") -> "Probe":
        """The settings for an argument `probe=`: a `Probe` itself, or the defaults of the named kind."""
        return probe if isinstance(probe, Probe) else cls(probe)

    def sizes(self, n: int, what: str = "samples") -> tuple[int, int]:
        """The numbers of training samples and of held-out samples among n.

        Raises:
            ValueError: there are fewer than 5 on either side.
        """
        train = round(self.train_fraction * n)
        if min(train, n - train) < MIN_ROWS:
            need = f"a fraction of the {n} {what} that leaves at least {MIN_ROWS} on either side"
            raise ValueError(f"train_fraction: expected {need}: got {self.train_fraction!r}")
        return train, n - train


@dataclass(frozen=True, eq=False)
class Split:
    """Training rows and held-out rows, in random order, and how often each held-out row occurs in each resample.

    Attributes:
        train, test: row indices.
        weights: [R, len(test)] int16.
        units: [len(train)] group index of training rows that belong together (pairs of views of one image), from 0;
            None if every row is independent.
    """

    train: Tensor
    test: Tensor
    weights: Tensor
    units: Tensor | None = None

    @classmethod
    def draw(
        cls, n: int, probe: Probe, bootstrap: int, seed: int, device: torch.device, *, repeats: int = 1
    ) -> "Split":
        """A random split of n samples.

        Args:
            n: number of samples; row i + k n is the k-th row of sample i.
            probe: gives `train_fraction` and, for a kernel probe, `kernel_rows`.
            bootstrap: R, the number of resamples of the held-out samples.
            seed: seed of the split and the resamples.
            device: device of the row indices.
            repeats: rows per sample; they are on the same side of the split and are resampled together.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(n, generator=generator, device="cpu").to(device)
        samples, held_out = torch.split(order, list(probe.sizes(n)))
        weights = torch.zeros(bootstrap, len(held_out), dtype=torch.int16, device="cpu")
        for drawn in weights:
            rows = torch.randint(len(held_out), (len(held_out),), generator=generator, device="cpu")
            drawn += rows.bincount(minlength=len(held_out))
        offsets = torch.arange(repeats, device=device)[:, None] * n
        train, test = (offsets + samples).flatten(), (offsets + held_out).flatten()
        units = torch.arange(len(samples), device=device).repeat(repeats) if repeats > 1 else None
        if probe.kind == "kernel":
            train, units = train[: probe.kernel_rows], None if units is None else units[: probe.kernel_rows]
        return cls(train, test, weights.to(device).repeat(1, repeats), units)


def score_cells(
    inputs: Mapping[str, Sequence[Tensor]],
    targets: Mapping[str, Target | str],
    split: Split,
    probe: Probe,
    *,
    seed: int,
    without: Mapping[Cell, str] | None = None,
    means: Mapping[str, Sequence[str]] | None = None,
) -> tuple[dict[Cell, float], dict[Cell, tuple[float, float]], dict[Cell, str]]:
    """Scores, intervals and notes of every (space, factor).

    Args:
        inputs: space -> blocks [n, d_i], concatenated as the input of a probe.
        targets: factor -> target, or a string with the reason why there is none.
        split: split of the rows.
        probe: the probe to fit.
        seed: seed of an MLP.
        without: (space, factor) -> the reason why it gets no score.
        means: additional factor -> the factors over whose scores it is the mean.
    """
    scores: dict[Cell, float] = {}
    intervals: dict[Cell, tuple[float, float]] = {}
    notes: dict[Cell, str] = {}
    again: dict[Cell, Tensor] = {}  # the score of every resample
    device = split.train.device
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for space, blocks in inputs.items():
            wanted = {name: (without or {}).get((space, name), target) for name, target in targets.items()}
            for name, target in wanted.items():
                scores[space, name] = math.nan
                if note := target if isinstance(target, str) else target.note:
                    notes[space, name] = note
            for group in _alike(wanted):
                for name, (score, resampled) in _scored(blocks, group, split, probe, seed).items():
                    scores[space, name] = score
                    if len(resampled):
                        again[space, name] = resampled
            for name, members in (means or {}).items():
                scores[space, name] = sum(scores[space, m] for m in members) / len(members)
                if len(split.weights):
                    again[space, name] = torch.stack([again[space, m] for m in members]).mean(0)
        for cell, each in again.items():
            low, high = each.nanquantile(each.new_tensor([0.025, 0.975])).tolist()
            intervals[cell] = (low, high)
    return scores, intervals, notes


def _alike(targets: Mapping[str, Target | str]) -> list[dict[str, Target]]:
    """Groups of targets that are defined on the same rows."""
    groups: dict[bytes, dict[str, Target]] = {}
    for name, target in targets.items():
        if not isinstance(target, str):
            groups.setdefault(target.valid.cpu().numpy().tobytes(), {})[name] = target
    return list(groups.values())


def _scored(
    blocks: Sequence[Tensor], targets: Mapping[str, Target], split: Split, probe: Probe, seed: int
) -> dict[str, tuple[float, Tensor]]:
    """Factor -> its score and those of all resamples [R], from one fit for all factors."""
    valid = next(iter(targets.values())).valid
    rows, held_out = split.train[valid[split.train]], split.test[valid[split.test]]
    weights = split.weights[:, valid[split.test]]
    together = None if split.units is None else split.units[valid[split.train]]
    x = Inputs(blocks, rows, balance=probe.kind == "kernel")
    problem = Problem(x, rows, list(targets.values()), probe.folds, seed, together)
    stats = problem.held_out(SOLVERS[probe.kind](problem), held_out)
    out = {}
    for (name, target), each in zip(targets.items(), stats, strict=True):
        sums = [w.double() @ each for w in torch.split(weights, 64)]
        resampled = target.score(torch.cat(sums), weights.sum(1)) if len(weights) else each.new_zeros(0)
        if target.classes:  # a resample of one class counts as chance, as it cannot distinguish the probe from it
            resampled = resampled.nan_to_num(0.0)
        out[name] = float(target.score(each.sum(0), each.new_tensor(len(each)))), resampled
    return out


def at_least(what: str, value: int, least: int) -> None:
    """Refuse anything but an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what}: expected an integer of {least} or more: got {value!r}")
