"""Tests whether a space depends on a factor that is not its own, given its own factors; replaces a threshold on R^2.

n samples, d the width of a space, B resamples.

    exclusivity(z, factors, {"color": ("hue",), "spatial": ("x", "y")})          known factors              here
    parameter_exclusivity(model, views, images)                                  augmentations, no labels   label_free
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.metrics.dependence import (
    BANDWIDTHS,
    Regression,
    Space,
    holm,
    kernel_features,
    parts_of,
    permutations,
    signs,
)
from ssd_addon.metrics.labelled import Circular, Factor, block_of, check_factors
from ssd_addon.metrics.leaks import LEVEL, NOTHING, SMALLEST, Dependence, Exclusivity
from ssd_addon.metrics.probe import at_least
from ssd_addon.metrics.probes import Inputs
from ssd_addon.metrics.table import Cell

FEWEST = 50
"""Smallest number of samples for a test."""
DETERMINED = 1e-3
"""Smallest share of a factor's variance that the own factors must leave unexplained for a test."""
DRAWN_TOGETHER = 0.05
"""Share of a factor that others may predict if it is declared independent of them; more is tested at the 0.1 % level,
as it may be chance."""


def exclusivity(
    embeddings: Mapping[str, Tensor],
    factors: Mapping[str, Factor],
    own: Mapping[str, Sequence[str]],
    *,
    independent: bool = False,
    level: float = LEVEL,
    smallest: float = SMALLEST,
    resamples: int | None = None,
    seed: int = 0,
) -> Exclusivity:
    """Test every space for dependence on factors that are not its own, *given* its own factors.

    The null hypothesis is that factor and space are independent given the space's own factors. For example, a space for
    hue may predict brightness as far as brightness is correlated with hue in these images, but no further. A cell is a
    leak if the test rejects, at a level that is corrected for the number of tests, and the effect is at least
    `smallest`: with enough samples any dependence is significant.

    The test is the generalized Hilbertian covariance measure. The factor (numbers, also by the distance of their ranks
    from the middle; angles with two harmonics; classes one-hot) and features of the space together with its own factors
    (linear, and of an RBF kernel) are regressed on the own factors by cross-fitted kernel ridge. The covariance of the
    residuals, in three norms, is compared with that of B resamples; the p-value is that of the largest standardized
    statistic. The test detects dependence of the mean of these columns on the space. It keeps its level if both
    regressions are good or either is perfect, as with a few own factors and hundreds of samples (docs/report.md has the
    measured false-positive rates).

    Resamples draw random signs for the residuals. With `independent=True` the factor is permuted over samples instead,
    which is exact at any n, for factors that were *drawn* independently of each other, such as the parameters of
    augmentations or of a generator.

    Samples are assumed independent: use one view of each image. Holm's correction bounds the probability of any false
    leak in the whole table, whatever the dependence between tests.

    Args:
        embeddings: space -> [n, d] floating point, n >= 50, on any device; the test runs there.
        factors: name -> [n] or [n, k] floating point (numbers), [n] integers or bool (classes), or `Circular`.
        own: space -> names of its own factors, () for none; these spaces are tested. A factor may belong to several
            spaces or to none, and is tested in every space of which it is not an own factor.
        independent: the factors were drawn independently of each other, so that permutations are exact.
        level: probability that a table without any dependence has a leak.
        smallest: the smallest effect (partial R^2) that counts as a leak. 0.02 is a small effect by Cohen's convention.
        resamples: B; None uses 999, or more if the number of tests requires it.
        seed: seed of resamples and landmarks. The global generator is not used.

    Returns:
        `Exclusivity`; NaN and a note for cells without a test: an own factor, or one that is constant, contains NaN, is
        determined by the own factors, or is defined for fewer than 50 samples.

    Raises:
        ValueError, TypeError: there are fewer than 50 samples; `own` names an unknown space or factor; an own factor
            contains NaN; factors that are declared independent are not; there are too few resamples to reject; or as
            in `r2_matrix`.

    >>> g = torch.Generator().manual_seed(0)
    >>> hue, shape = torch.rand(300, generator=g), torch.randint(3, (300,), generator=g)
    >>> color = torch.stack([hue**2, hue], 1) + 0.1 * torch.randn(300, 2, generator=g)
    >>> z = {"color": color, "content": torch.stack([shape + 0.3 * hue, shape], 1)}
    >>> print(exclusivity(z, {"shape": shape, "hue": hue}, {"color": ("hue",), "content": ("shape",)}))
             shape    hue
    color     0.00    own
    content    own   1.00*
    partial R^2 given the own factors, n = 300 samples
    * leak: Holm-corrected p <= 0.05 and partial R^2 >= 0.02

    Source: Lundborg, Shah and Peters, Conditional independence testing in Hilbert spaces, arXiv 2101.07108; Shah and
    Peters, arXiv 1804.07203 (the measure for numbers, and the largest of several by random multipliers); Miyazaki and
    Uematsu, arXiv 2511.15453 (features of kernels, and the wild bootstrap); Cohen, Statistical power analysis for the
    behavioral sciences, 1988, chapter 9 (a small effect is f^2 = 0.02).
    """
    n, device = check_factors(embeddings, factors)
    owned = _owned(own, embeddings, factors)
    if not isinstance(independent, bool):
        raise TypeError(f"independent: expected True or False: got {independent!r}")
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        targets = {name: _columns(factor, device) for name, factor in factors.items()}
        blocks = {f: block_of(factors[f], f"own: factor {f!r}").to(device) for fs in owned.values() for f in fs}
        spaces = {s: [embeddings[s]] for s in owned}
        return table_of_tests(
            spaces,
            targets,
            owned,
            blocks,
            n,
            independent=independent,
            level=level,
            smallest=smallest,
            resamples=resamples,
            seed=seed,
        )


Columns = tuple[list[Tensor], Tensor]
"""The parts of a factor that are tested, each [n, q], and where it is defined [n]."""


def table_of_tests(
    spaces: Mapping[str, Sequence[Tensor]],
    targets: Mapping[str, Columns | str],
    own: Mapping[str, tuple[str, ...]],
    blocks: Mapping[str, Tensor],
    n: int,
    *,
    independent: bool,
    level: float,
    smallest: float,
    resamples: int | None,
    seed: int,
    unit: str = "samples",
) -> Exclusivity:
    """The table of tests. A target that is a string is not tested; the string is the reason.

    Args:
        spaces: space -> blocks [n, d_i], to be concatenated.
        targets: factor -> its columns.
        own: space -> names of its own factors, in `blocks`.
        blocks: factor -> its columns [n, p] as a given factor.
        n, independent, level, smallest, resamples, seed, unit: see `exclusivity`.
    """
    wanted = [(s, f) for s in spaces for f in targets if f not in own[s] and not isinstance(targets[f], str)]
    count = _settings(n, level, smallest, resamples, len(wanted), unit)
    found: dict[Cell, Dependence] = dict.fromkeys(((s, f) for s in spaces for f in targets), NOTHING)
    notes = {(s, f): "own" for s in spaces for f in targets if f in own[s]}
    notes |= {(s, f): t for s in spaces for f, t in targets.items() if isinstance(t, str) and f not in own[s]}
    outcomes = {}
    for space in spaces:
        for rows, names in _alike({f: targets[f] for s, f in wanted if s == space}, n):
            if len(rows) < FEWEST:
                notes |= {(space, f): f"defined for {len(rows)} {unit}, fewer than {FEWEST}" for f in names}
                continue
            given = _regression([blocks[f] for f in own[space]], rows, seed)
            z: Space | None = None
            for f in names:
                if len(rows) < n:
                    notes[space, f] = f"tested on {len(rows)} of {n} {unit}: the others have no angle"
                target = targets[f]
                assert not isinstance(target, str)
                made, left = _residuals(target, rows, given)
                if not left:
                    notes[space, f] = "constant"
                    continue
                if independent:  # the factor itself, not its residuals, so that permutations are exact
                    share, (made, _) = 1 - min(left), _residuals(target, rows, Regression([]))
                    if share > DRAWN_TOGETHER and _depends(made, [blocks[g][rows] for g in own[space]], seed):
                        raise ValueError(
                            f"independent: expected factors that are drawn independently of each other: got {f!r}, "
                            f"which {_checks.names(own[space])} predict with R^2 = {share:.2f}"
                        )
                if max(left) < DETERMINED:
                    notes[space, f] = f"determined by {_checks.names(own[space])}: nothing of it is left to test"
                    continue
                if z is None:
                    inputs = [b[rows] for b in (*spaces[space], *(blocks[f] for f in own[space]))]
                    z = Space(inputs, given, torch.Generator("cpu").manual_seed(seed))
                generator = torch.Generator("cpu").manual_seed(seed + 1)
                draw = permutations(generator) if independent else signs(generator)
                outcomes[space, f] = z.test(made, draw, count)
    corrected = holm([o.p for o in outcomes.values()])
    for (cell, o), p in zip(outcomes.items(), corrected, strict=True):
        found[cell] = Dependence(o.statistic, o.effect, o.p, p)
    null = "permutations" if independent else "signs"
    return Exclusivity(tuple(spaces), tuple(targets), dict(own), found, notes, n, null, level, smallest, unit)


# ---- arguments


def _owned(
    own: Mapping[str, Sequence[str]], embeddings: Mapping[str, Tensor], factors: Mapping[str, Factor]
) -> dict[str, tuple[str, ...]]:
    """Check `own` and return space -> names of its own factors."""
    if not isinstance(own, Mapping) or not own:
        raise TypeError(f'own: expected a mapping space -> its factors, such as {{"color": ("hue",)}}: got {own!r}')
    out = {}
    for space, names in own.items():
        if space not in embeddings:
            raise ValueError(f"own: expected spaces among {_checks.names(embeddings)}: got {space!r}")
        if isinstance(names, str):
            raise TypeError(f"own: expected a sequence of factors for space {space!r}, such as ('hue',): got {names!r}")
        out[space] = tuple(names)
        if unknown := [f for f in out[space] if f not in factors]:
            got = f"{_checks.names(unknown)} for space {space!r}"
            raise ValueError(f"own: expected factors among {_checks.names(factors)}: got {got}")
    return out


def _settings(n: int, level: float, smallest: float, resamples: int | None, tests: int, unit: str) -> int:
    """The number of resamples; refuses settings with which nothing can be tested."""
    if n < FEWEST:
        raise ValueError(f"exclusivity: expected at least {FEWEST} {unit}: got {n}")
    for what, value in (("level", level), ("smallest", smallest)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"{what}: expected a number of at least 0 and below 1: got {value!r}")
    if not level:
        raise ValueError("level: expected a probability above 0: got 0")
    least = math.ceil(max(1, tests) / level)
    if resamples is None:
        return max(999, 2 * least - 1)
    at_least("resamples", resamples, 1)
    if resamples + 1 < least:
        need = f"so that the smallest p-value, corrected for {tests} tests, is {level:g} or less"
        raise ValueError(f"resamples: expected at least {least - 1}, {need}: got {resamples}")
    return resamples


def _columns(factor: Factor, device: torch.device) -> Columns | str:
    """The columns of a factor: numbers as they are, classes one-hot, angles as two harmonics."""
    if isinstance(factor, Circular):
        values, valid = (t.to(device) for t in factor.target())
        if not values.isfinite().all():
            return "some values are NaN or inf"
        cos, sin = values.unbind(1)
        return [values, torch.stack((cos**2 - sin**2, 2 * sin * cos), 1)], valid
    values = factor.to(device)
    valid = torch.ones(len(values), dtype=torch.bool, device=device)
    if not factor.is_floating_point():
        return [block_of(values, "factor").double()], valid
    values = values.reshape(len(values), -1).double()
    if bad := int((~values.isfinite()).sum()):
        return f"{bad} of {values.numel()} values are NaN or inf"
    low, high = values.amin(0), values.amax(0)  # columns that vary by rounding alone are constant
    rounding = torch.finfo(factor.dtype).eps * torch.maximum(low.abs(), high.abs())
    return parts_of(torch.where(high - low > 4 * rounding, values, low)), valid


def _alike(targets: Mapping[str, Any], n: int) -> list[tuple[Tensor, list[str]]]:
    """Groups of factors that are defined on the same rows, with these rows."""
    groups: dict[bytes, tuple[Tensor, list[str]]] = {}
    for name, (_, valid) in targets.items():
        key = valid.cpu().numpy().tobytes()
        groups.setdefault(key, (valid.nonzero().flatten(), []))[1].append(name)
    return list(groups.values())


def _regression(blocks: Sequence[Tensor], rows: Tensor, seed: int) -> Regression:
    """Kernel ridge regression on the given factors, with one of four bandwidths."""
    if not blocks:
        return Regression([])
    x = Inputs([b[rows] for b in blocks], at := torch.arange(len(rows), device=rows.device), balance=True)(at)
    generator = torch.Generator("cpu").manual_seed(seed)
    return Regression([kernel_features(x, width, generator) for width in BANDWIDTHS])


def _depends(made: Sequence[Tensor], blocks: Sequence[Tensor], seed: int) -> bool:
    """Whether a factor depends on the given ones, which contradicts that they were drawn independently."""
    others = Space(blocks, Regression([]), torch.Generator("cpu").manual_seed(seed))
    return others.test(made, permutations(torch.Generator("cpu").manual_seed(seed)), 999).p <= 0.001


def _residuals(target: Columns, rows: Tensor, given: Regression) -> tuple[list[Tensor], list[float]]:
    """Residuals of the standardized parts of a factor, and the share of the sum of squares that remains of each."""
    made, left = [], []
    for part in target[0]:
        y = part[rows].double()
        varies = y.amax(0) - y.amin(0) > 1e-9 * y.abs().amax(0)
        if not varies.any():
            continue
        y = y[:, varies] - y[:, varies].mean(0)
        y = y / y.std(0)
        made.append(residual := given.residuals(y))
        left.append(float((residual**2).sum() / (y**2).sum()))
    return made, left
