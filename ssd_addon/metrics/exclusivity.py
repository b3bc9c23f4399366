"""Does a space depend on a factor that is not its own, given its own factors? A test, instead of a threshold on R^2.

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
"""Samples below which there is no test."""
DETERMINED = 1e-3
"""The share of a factor's variance that its space's own factors must leave for there to be something to test."""
DRAWN_TOGETHER = 0.05
"""The share of a factor that others may predict where it is said to be independent of them; more may be chance, which
is tested at the level of 0.1 %."""


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
    """Whether a space depends on a factor that is not its own, *given* its own factors, for all of both.

    The null hypothesis is that factor and space are independent given the own factors of the space. So a space of hue
    may predict a brightness that goes with hue in these images, but nothing more of it. A leak is where the test
    rejects, at a level that is corrected for the number of tests, and the effect is not below `smallest`: with enough
    samples any dependence is significant.

    The test is the generalized Hilbertian covariance measure. The factor (numbers, also by how far their ranks are from
    the middle; angles with two harmonics; classes one-hot) and features of the space beside the own factors (linear,
    and those of an RBF kernel) are regressed on the own factors by kernel ridge, each row by the fit to other folds.
    The covariance of the residuals, in three norms, is compared with that of B resamples; the p-value is that of the
    largest standardized statistic. What it can see is a dependence of these columns' mean on the space. It keeps its
    level where both regressions are good, or either is perfect: with own factors of a few numbers and hundreds of
    samples (docs/report.md has how often it rejected where nothing was to be found).

    Resamples have the residuals' signs drawn at random. With `independent=True` the rows of the factor are permuted
    instead, which is exact at any n: for factors that were *drawn* independently of each other, such as the parameters
    of augmentations and those of a generator.

    Rows count as independent: give one view of each image. Holm's correction bounds the chance of a single wrong leak
    in the whole table, whatever the dependence between tests: a table is read as a whole, so that is what to bound.

    Args:
        embeddings: space -> [n, d] floating point, n >= 50, on any device, where the test then runs.
        factors: name -> [n] or [n, k] floating point (numbers), [n] integers or bool (classes), or `Circular`.
        own: space -> the names of its own factors, () for none; the spaces that are tested. A factor may belong to
            several spaces, or to none, and is tested wherever it is not an own one.
        independent: the factors were drawn independently of each other, so that permutations are exact.
        level: the chance that a table without any dependence has a leak.
        smallest: the smallest effect (partial R^2) that counts as a leak. 0.02 is a small effect by Cohen's convention.
        resamples: B; None takes 999, or more where the number of tests asks for it.
        seed: of resamples and landmarks. The global generator is neither read nor moved.

    Returns:
        `Exclusivity`, NaN and a note where there is nothing to test: an own factor, one that is constant or NaN, one
        that the own factors determine, one that is defined for fewer than 50 samples.

    Raises:
        ValueError, TypeError: fewer than 50 samples; a name in `own` that is no space or no factor; an own factor with
            NaN; factors said to be independent that are not; too few resamples to reject anything; and what `r2_matrix`
            refuses.

    >>> g = torch.Generator().manual_seed(0)
    >>> hue, shape = torch.rand(300, generator=g), torch.randint(3, (300,), generator=g)
    >>> color = torch.stack([hue**2, hue], 1) + 0.1 * torch.randn(300, 2, generator=g)
    >>> z = {"color": color, "content": torch.stack([shape + 0.3 * hue, shape], 1)}
    >>> print(exclusivity(z, {"shape": shape, "hue": hue}, {"color": ("hue",), "content": ("shape",)}))
             shape    hue
    color     0.00    own
    content    own   0.99*
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
"""What is tested of a factor, in parts [n, q], and where it is defined [n]."""


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
    """The table of tests. A target that is a text is not tested, for that reason.

    Args:
        spaces: space -> blocks [n, d_i] side by side.
        targets: factor -> its columns.
        own: space -> names of the factors that are given, in `blocks`.
        blocks: factor -> what is given [n, p].
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
                if independent:  # as it is, not its residuals: else permutations would not be exact
                    share, (made, _) = 1 - min(left), _residuals(target, rows, Regression([]))
                    if share > DRAWN_TOGETHER and _depends(made, [blocks[g][rows] for g in own[space]], seed):
                        raise ValueError(
                            f"independent: expected factors that are drawn independently of each other: got {f!r}, of "
                            f"which {_checks.names(own[space])} predict R^2 = {share:.2f}"
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


# ---- what comes in


def _owned(
    own: Mapping[str, Sequence[str]], embeddings: Mapping[str, Tensor], factors: Mapping[str, Factor]
) -> dict[str, tuple[str, ...]]:
    """space -> its own factors; names that are there."""
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
    """The number of resamples; refuses what cannot be tested."""
    if n < FEWEST:
        raise ValueError(f"exclusivity: expected at least {FEWEST} {unit}: got {n}")
    for what, value in (("level", level), ("smallest", smallest)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"{what}: expected a number of at least 0 and below 1: got {value!r}")
    if not level:
        raise ValueError("level: expected a chance above 0: got 0")
    least = math.ceil(max(1, tests) / level)
    if resamples is None:
        return max(999, 2 * least - 1)
    at_least("resamples", resamples, 1)
    if resamples + 1 < least:
        need = f"so that the smallest p-value, corrected for {tests} tests, is {level:g} or less"
        raise ValueError(f"resamples: expected at least {least - 1}, {need}: got {resamples}")
    return resamples


def _columns(factor: Factor, device: torch.device) -> Columns | str:
    """The columns of a factor: numbers; classes one-hot; of an angle the first two harmonics."""
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
    return parts_of(values), valid


def _alike(targets: Mapping[str, Any], n: int) -> list[tuple[Tensor, list[str]]]:
    """The rows on which factors are defined, and which factors these are."""
    groups: dict[bytes, tuple[Tensor, list[str]]] = {}
    for name, (_, valid) in targets.items():
        key = valid.cpu().numpy().tobytes()
        groups.setdefault(key, (valid.nonzero().flatten(), []))[1].append(name)
    return list(groups.values())


def _regression(blocks: Sequence[Tensor], rows: Tensor, seed: int) -> Regression:
    """On the given factors: kernel ridge, with one of four bandwidths."""
    if not blocks:
        return Regression([])
    x = Inputs([b[rows] for b in blocks], at := torch.arange(len(rows), device=rows.device), balance=True)(at)
    generator = torch.Generator("cpu").manual_seed(seed)
    return Regression([kernel_features(x, width, generator) for width in BANDWIDTHS])


def _depends(made: Sequence[Tensor], blocks: Sequence[Tensor], seed: int) -> bool:
    """Whether a factor depends on others, which nobody would say of factors that were drawn independently."""
    others = Space(blocks, Regression([]), torch.Generator("cpu").manual_seed(seed))
    return others.test(made, permutations(torch.Generator("cpu").manual_seed(seed)), 999).p <= 0.001


def _residuals(target: Columns, rows: Tensor, given: Regression) -> tuple[list[Tensor], list[float]]:
    """Residuals of the parts of a factor, standardized before, and the share of its squares that is left of each."""
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
