"""A test of conditional independence: does a factor depend on a space, given other factors?

The statistic is the generalized Hilbertian covariance measure, from residuals r of the factor and psi of features of
the space, both after regression on the given factors:

    T = |n^-1/2 sum_i r_i (x) psi_i|^2 = n^-1 sum_ij <r_i, r_j> <psi_i, psi_j>

(Lundborg, Shah and Peters 2022, arXiv 2101.07108; for one feature and one column it is the square of the generalized
covariance measure before it is studentized, Shah and Peters 2020, arXiv 1804.07203). Its error under the null is of the
order of the *product* of the errors of both regressions. Random signs of r give its null distribution (a wild
bootstrap; Miyazaki and Uematsu 2025, arXiv 2511.15453, for kernel features as here).

Legend: n samples (the rows of all matrices), p columns of the given factors, q columns of the factor, k features of the
space, B resamples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_addon.metrics.probes import Inputs

FOLDS = 5
LANDMARKS = 300
"""Largest number of landmark rows for the kernel features of the given factors and of a space."""
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0)  # times the median distance, of the kernel on the given factors
PENALTIES = tuple(10.0**e for e in range(-7, 2))  # times the training rows
SKETCH = 64
"""Number of random combinations of a target's columns by which features and penalty are chosen, if it has more."""
FILTERS = (1e-3, 1e-1, 1e1)
"""Penalties in the norm of psi, as multiples of its mean variance before the regression: with a small one all
directions of a space have the same weight, with a large one they are weighted by their variance."""
BATCH = 2**22
"""Number of elements in a block of resampled residuals: 32 MiB."""

Resample = Callable[[Tensor, int], Tensor]
"""(residuals [n, q], b) -> b resamples of them [n, b, q] under the null hypothesis."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of one test: the statistic in standard deviations of its null distribution, p, and the effect."""

    statistic: float
    p: float
    effect: float


class Regression:
    """Ridge regressions whose residuals are cross-fitted: each row is predicted by a fit to other folds.

    The features (one of several maps) and the penalty minimize the error of left-out rows, with one choice for all
    columns of a target; if there are very many columns, for 64 random combinations. Each map is decomposed once.

    Args:
        maps: feature maps [n, k]; if there are none, the intercept is the only regressor.
    """

    def __init__(self, maps: Sequence[Tensor]) -> None:
        self.fits: list[list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]] = []
        for x in maps:
            # Drawn, as rows may repeat with a period: a fold that holds all rows of a class could not be predicted.
            order = torch.randperm(len(x), generator=torch.Generator("cpu").manual_seed(0))
            fold = order.to(x.device) % FOLDS
            each = []
            for f in range(FOLDS):
                out, kept = (fold == f).nonzero().flatten(), (fold != f).nonzero().flatten()
                centered = x[kept] - (mean := x[kept].mean(0))
                lam, v = torch.linalg.eigh(centered.T @ centered)
                each.append((kept, out, centered @ v, (x[out] - mean) @ v, lam.clamp(min=0)))
            self.fits.append(each)

    def residuals(self, y: Tensor) -> Tensor:
        """Cross-fitted residuals of y, [n, q]; deviations from the mean if there are no features."""
        if not self.fits:
            return y - y.mean(0)
        errors = y.new_zeros(len(self.fits), len(PENALTIES))
        some = y
        if y.shape[1] > SKETCH:
            drawn = torch.randint(0, 2, (y.shape[1], SKETCH), generator=torch.Generator("cpu").manual_seed(0))
            some = y @ (2 * drawn - 1).to(y)
        for m in range(len(self.fits)):
            for i in range(len(PENALTIES)):
                errors[m, i] = (self._left_out(m, i, some) ** 2).sum()
        best = int(errors.argmin())
        return self._left_out(best // len(PENALTIES), best % len(PENALTIES), y)

    def _left_out(self, m: int, i: int, y: Tensor) -> Tensor:
        left = torch.empty_like(y)
        for kept, out, train, test, lam in self.fits[m]:
            mean = y[kept].mean(0)
            w = (train.T @ (y[kept] - mean)) / (lam + PENALTIES[i] * len(kept))[:, None]
            left[out] = y[out] - mean - test @ w
        return left


def kernel_features(x: Tensor, bandwidth: float, generator: torch.Generator) -> Tensor:
    """Features [n, k] whose inner products approximate the RBF kernel on x [n, p]; exact if x has few distinct rows.

    Uses at most 300 landmark rows (Nystroem). The bandwidth is in units of the median distance between landmarks.
    """
    rows = torch.unique(x, dim=0)
    chosen = torch.randperm(len(rows), generator=generator)[:LANDMARKS].to(x.device)
    marks = rows[chosen]
    between = torch.cdist(marks, marks) ** 2
    apart = between[between > 1e-12]
    scale = 2 * bandwidth**2 * (apart.median() if len(apart) else 1.0)
    lam, v = torch.linalg.eigh(torch.exp(-between / scale))
    used = lam > 1e-8 * lam.amax()
    features: Tensor = torch.exp(-(torch.cdist(x, marks) ** 2) / scale) @ (v[:, used] / lam[used].sqrt())
    return features


def space_features(blocks: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Feature maps of a space concatenated with the given factors: linear, and those of an RBF kernel."""
    rows = torch.arange(len(blocks[0]), device=blocks[0].device)
    linear = Inputs(blocks, rows)(rows)
    if linear.shape[1] > len(linear):  # the same inner products
        u, s, _ = torch.linalg.svd(linear, full_matrices=False)
        linear = u * s
    balanced = Inputs(blocks, rows, balance=True)(rows)
    return [linear / math.sqrt(sum(b.shape[1] for b in blocks)), kernel_features(balanced, 1.0, generator)]


def signs(generator: torch.Generator) -> Resample:
    """Resampling by random signs of the residuals (wild bootstrap), valid if their distribution is symmetric."""

    def resample(r: Tensor, b: int) -> Tensor:
        drawn = torch.randint(0, 2, (len(r), b, 1), generator=generator)
        return r[:, None] * (2 * drawn - 1).to(r)

    return resample


def permutations(generator: torch.Generator) -> Resample:
    """Resampling by permutation of rows, exact if the factor was drawn independently of everything else."""

    def resample(r: Tensor, b: int) -> Tensor:
        order = torch.rand(len(r), b, generator=generator, dtype=torch.float64).argsort(0)
        return r[order.to(r.device)]

    return resample


class Space:
    """The residuals of a space's features, which can be tested against any number of factors.

    Args:
        blocks: the space [n, d] and the given factors.
        given: the regression on the given factors.
        generator: generator for the choice of landmarks.
    """

    def __init__(self, blocks: Sequence[Tensor], given: Regression, generator: torch.Generator) -> None:
        self.residuals: list[Tensor] = []
        self.rotated: list[tuple[Tensor, Tensor]] = []
        for features in space_features(blocks, generator):
            centered = features - features.mean(0)
            psi = given.residuals(centered)
            self.residuals.append(psi)
            self.rotated.append(filtered(psi, float((centered**2).mean())))
        self.probe = Regression(self.residuals)

    def statistics(self, r: Tensor) -> Tensor:
        """The statistics T [b, maps * filters] of residuals [n, b, q]."""
        n, b, q = r.shape
        out = []
        for psi, weights in self.rotated:
            energy = (psi.T @ r.reshape(n, b * q)).view(-1, b, q).square().sum(2)
            out.append(energy.T @ weights / n)
        return torch.cat(out, 1)

    def test(self, parts: Sequence[Tensor], resample: Resample, resamples: int) -> Outcome:
        """Test the residuals of a factor, given in parts [n, q] that each have their own statistic.

        Every statistic is standardized by its null distribution; the p-value is that of the largest one.
        """
        r = torch.cat(list(parts), 1)
        columns = [p.shape[1] for p in parts]

        def statistics(r: Tensor) -> Tensor:
            return torch.cat([self.statistics(part) for part in torch.split(r, columns, 2)], 1)

        made, done = [statistics(r[:, None])], 0
        while done < resamples:
            b = min(resamples - done, max(1, BATCH // r.numel()))
            made.append(statistics(resample(r, b)))
            done += b
        t = torch.cat(made)
        largest = _standardized(t, t).amax(1)  # also the observed one, so that p is exact for permutations
        p = float((largest >= largest[0]).double().mean())
        return Outcome(float(_standardized(t[:1], t[1:]).max()), p, max(self._effect(part) for part in parts))

    def _effect(self, r: Tensor) -> float:
        """Partial R^2: the share of r's sum of squares that the space's residuals predict on left-out rows; >= 0."""
        total = float((r**2).sum())
        return max(0.0, 1 - float((self.probe.residuals(r) ** 2).sum()) / total) if total > 0 else 0.0


def _standardized(t: Tensor, by: Tensor) -> Tensor:
    """t [r, m] standardized by mean and standard deviation of `by` [b, m]; 0 where `by` does not vary."""
    spread = by.std(0)
    return torch.where(spread > 0, (t - by.mean(0)) / spread, 0.0)


def filtered(psi: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """psi in its principal axes [n, k], and the weight of each axis in the norm of every filter [k, filters].

    |psi|^2 = psi^T (C + filter * variance)^-1 psi, C = psi^T psi / n, multiplied by filter * variance, so that a large
    filter gives the plain norm.
    """
    lam, v = torch.linalg.eigh(psi.T @ psi / len(psi))
    penalty = torch.tensor(FILTERS, dtype=psi.dtype, device=psi.device) * (variance or 1.0)
    return psi @ v, penalty / (lam.clamp(min=0)[:, None] + penalty)


def parts_of(values: Tensor) -> list[Tensor]:
    """The parts of a numeric factor [n, q] that are tested: its columns, and the second Legendre polynomial of ranks.

    The second part detects a space that encodes a number's distance from its median but not the side.
    """
    n = len(values)
    curved = []
    for column in values.T:
        _, place, counts = torch.unique(column, return_inverse=True, return_counts=True)
        middle = (counts.cumsum(0) - counts / 2)[place] * 2 / n - 1
        curved.append(1.5 * middle**2 - 0.5)
    return [values, torch.stack(curved, 1).to(values)]


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number, which controls the probability of any false rejection (family-wise error).

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    corrected, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = worst
    return corrected
