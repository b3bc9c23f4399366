"""Summaries of a matrix in one number: disentanglement, completeness, informativeness, SAP and MIG.

All are computed over *spaces* (blocks of coordinates), since single axes of a space have no meaning. Probes standardize
every coordinate, so rotating a space whose coordinates differ in scale may change a score slightly.
Legend: S spaces, K factors (or blocks of factors), n samples, d the width of a space, C classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon._shapes import Columns, Matrix, Vector
from ssd_addon.metrics.labelled import Circular, Factor, check_factors, r2_matrix
from ssd_addon.metrics.probe import Kind, Probe, Split
from ssd_addon.metrics.probes import Inputs, softmax_log_likelihood
from ssd_addon.metrics.spaces import MIN_ROWS
from ssd_addon.metrics.table import Cell, ScoreTable

ALL = "all spaces"
FAMILY = 0.005
"""Probability that a whole table of noise has a score that counts as above 0."""


@dataclass(frozen=True, eq=False)
class Dci:
    """Disentanglement, completeness and informativeness; NaN where undefined, with the reason in `notes`.

    Attributes:
        disentanglement: mean over spaces, each weighted by its share of the importance.
        completeness: mean over factors, weighted likewise.
        informativeness: mean over factors of the score from all spaces together.
        by_space: space -> its disentanglement; NaN for a space without importance.
        by_factor: factor (or block) -> (completeness, informativeness).
        importance: the table [space, factor] from which both are computed, with the row "all spaces".
        notes: name -> why it is NaN.
    """

    disentanglement: float
    completeness: float
    informativeness: float
    by_space: Mapping[str, float]
    by_factor: Mapping[str, tuple[float, float]]
    importance: ScoreTable
    notes: Mapping[str, str]

    def __str__(self) -> str:
        def shown(value: float) -> str:
            return "n/a" if math.isnan(value) else f"{value:.2f}"

        lines = [
            f"disentanglement {shown(self.disentanglement)}  completeness {shown(self.completeness)}  "
            f"informativeness {shown(self.informativeness)}"
        ]
        lines += [f"  {s}: disentanglement {shown(d)}" for s, d in self.by_space.items()]
        lines += [f"  {f}: completeness {shown(c)}, informativeness {shown(i)}" for f, (c, i) in self.by_factor.items()]
        return "\n".join([*lines, *(f"{name}: {note}" for name, note in self.notes.items())])


def disentanglement(importance: Matrix) -> tuple[float, Vector]:
    """Whether each space encodes a single factor: D_s = 1 - H(P_s), P_sk = R_sk / sum_k R_sk, entropy to the base K.

    Args:
        importance: R [S, K], nonnegative: the importance of space s for factor k; K >= 2.

    Returns:
        (sum_s rho_s D_s with rho_s the share of space s in sum R, D [S] with NaN for rows of zeros). All NaN if
        everything is 0.

    Raises:
        ValueError: importance is not [S, K] with finite, nonnegative numbers, or has only one factor.

    >>> disentanglement(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    (0.5, tensor([1., 0.], dtype=torch.float64))

    Source: Eastwood and Williams, A framework for the quantitative evaluation of disentangled representations, ICLR
    2018; for blocks, rows and columns are spaces and factors.
    """
    r = _importance(importance, "factors", 1)
    share = r / r.sum(1, keepdim=True)
    each = 1 - torch.special.entr(share).sum(1) / math.log(r.shape[1])
    return float((each.nan_to_num() * r.sum(1)).sum() / r.sum()), each


def completeness(importance: Matrix) -> tuple[float, Columns]:
    """Whether each factor is encoded by a single space: C_k = 1 - H(R_sk / sum_s R_sk), entropy to the base S.

    Args:
        importance: R [S, K], nonnegative; S >= 2.

    Returns:
        (sum_k rho_k C_k with rho_k the share of factor k in sum R, C [K] with NaN for columns of zeros).

    Raises:
        ValueError: as in `disentanglement`, or if there is only one space.

    >>> completeness(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    (0.333..., tensor([1., 0.], dtype=torch.float64))

    Source: as `disentanglement`.
    """
    r = _importance(importance, "spaces", 0)
    mean, each = disentanglement(r.T)
    return mean, each


def dci(
    embeddings: Mapping[str, Tensor],
    factors: Mapping[str, Factor],
    *,
    blocks: Mapping[str, Sequence[str]] | None = None,
    probe: Kind | Probe = "ridge",
    bootstrap: int = 200,
    seed: int = 0,
) -> Dci:
    """Disentanglement, completeness and informativeness over spaces.

    The importance of a space for a factor is its held-out score for this factor (`r2_matrix`), computed from the space
    alone, so that it does not depend on whether another space encodes the factor too. Scores that are not significantly
    above 0 (`scores_above_zero`, corrected for the number of cells) count as 0: otherwise spaces of noise, one of which
    scores 0.01 by chance, would appear perfectly disentangled.

    Args:
        embeddings, factors, probe, bootstrap, seed: as in `r2_matrix`. Leave the backbone out, as it encodes all
            factors. With bootstrap=0 there are no intervals, and every score above 0 counts.
        blocks: name -> factors that belong together, such as {"color": ["hue", "brightness"]}: their importances are
            averaged, so that a space that encodes a whole block counts as disentangled. None treats each factor
            separately. A factor without a score (n/a) counts in no block.

    Raises:
        ValueError: a block has an unknown factor; or as in `r2_matrix`.

    >>> g = torch.Generator().manual_seed(0)
    >>> a, b = torch.randn(400, generator=g), torch.randn(400, generator=g)
    >>> result = dci({"content": a[:, None], "color": b[:, None]}, {"shape": a, "hue": b})
    >>> round(result.disentanglement, 1), round(result.completeness, 1), round(result.informativeness, 1)
    (1.0, 1.0, 1.0)

    Source: as `disentanglement`.
    """
    if ALL in embeddings:
        raise ValueError(f"dci: expected no space named {ALL!r}, as this is the row for all spaces: got one")
    wanted = {f: [f] for f in factors} if blocks is None else blocks
    for name, members in wanted.items():
        if isinstance(members, str) or not members or set(members) - set(factors):
            raise ValueError(
                f"blocks: expected block {name!r} to list some of the factors {_checks.names(factors)}: got {members!r}"
            )
    table = r2_matrix(embeddings, factors, probe=probe, bootstrap=bootstrap, seed=seed)
    together = r2_matrix({ALL: torch.cat(list(embeddings.values()), 1)}, factors, probe=probe, bootstrap=0, seed=seed)
    spaces = tuple(embeddings)
    scored = {b: [f for f in fs if not math.isnan(together[ALL, f])] for b, fs in wanted.items()}
    used = [b for b in scored if scored[b]]
    notes = {
        b: "; ".join(f"{f}: {together.notes.get((ALL, f), 'no score')}" for f in wanted[b])
        for b in wanted
        if b not in used
    }
    held = scores_above_zero(table)
    r = torch.tensor(
        [[sum(held[s, f] for f in scored[b]) / len(scored[b]) for b in used] for s in spaces], dtype=torch.float64
    ).view(len(spaces), len(used))
    d, by_space = disentanglement(r) if len(used) > 1 else (math.nan, r.new_full((len(spaces),), math.nan))
    c, by_factor = completeness(r) if len(spaces) > 1 and used else (math.nan, r.new_full((len(used),), math.nan))
    if len(used) < 2:
        notes["disentanglement"] = f"needs two factors or blocks that can be scored: got {len(used)}"
    if len(spaces) < 2:
        notes["completeness"] = "needs two spaces: got 1"
    for name, value in (("disentanglement", d), ("completeness", c)):
        if math.isnan(value):
            notes.setdefault(name, "no factor can be decoded from any space")
    known = {b: sum(together[ALL, f] for f in scored[b]) / len(scored[b]) for b in used}
    if not known:
        notes["informativeness"] = "needs a factor or block that can be scored: got none"
    cells = {(s, b): float(r[i, j]) for i, s in enumerate(spaces) for j, b in enumerate(used)}
    cells |= {(s, b): math.nan for s in spaces for b in wanted if b not in used}
    cells |= {(ALL, b): known.get(b, math.nan) for b in wanted}
    why = {(s, b): notes[b] for s in (*spaces, ALL) for b in wanted if b not in used}
    importance = ScoreTable((*spaces, ALL), tuple(wanted), cells, {}, why, table.probe, (), table.n_train, table.n_test)
    completed = dict(zip(used, by_factor.tolist(), strict=True))
    return Dci(
        d,
        c,
        sum(known.values()) / len(known) if known else math.nan,
        dict(zip(spaces, by_space.tolist(), strict=True)),
        {b: (completed.get(b, math.nan), known.get(b, math.nan)) for b in wanted},
        importance,
        notes,
    )


def scores_above_zero(table: ScoreTable) -> dict[Cell, float]:
    """Every cell's score if it is significantly above 0, else 0; NaN counts as 0.

    A score counts if its 95 % interval, widened by the factor of a normal distribution for the number of cells
    (Bonferroni), lies above 0. Then all cells of a table of noise are 0 in 199 of 200 tables, whereas one in 40
    unwidened intervals lies above 0 by chance. Without intervals every score above 0 counts.
    """
    cells = [cell for cell, score in table.scores.items() if not math.isnan(score)]
    stretch = NormalDist().inv_cdf(1 - FAMILY / max(1, len(cells))) / NormalDist().inv_cdf(0.975)
    out = dict.fromkeys(table.scores, 0.0)
    for cell in cells:
        score = table.scores[cell]
        low, _ = table.intervals.get(cell, (score, score))
        if low > 0 and score - stretch * (score - low) > 0:
            out[cell] = score
    return out


def sap(table: ScoreTable) -> tuple[float, dict[str, float]]:
    """The gap between the best and the second-best space: mean over factors of score_(1) - score_(2).

    Args:
        table: table from `r2_matrix`, without the backbone (`table.only(spaces=...)`); at least two spaces. Scores that
            are not significantly above 0 count as 0 (`scores_above_zero`), so that noise has no gap.

    Returns:
        (the mean over factors that have scores in at least two spaces, factor -> its gap, NaN if it has not).

    Raises:
        ValueError: there are fewer than two spaces.

    >>> cells = {("content", "hue"): 0.1, ("color", "hue"): 0.9}
    >>> sap(ScoreTable(("content", "color"), ("hue",), cells, {}, {}, "ridge", (), 50, 50))
    (0.8, {'hue': 0.8})

    Source: Kumar et al., arXiv 1711.00848 (separated attribute predictability), over spaces.
    """
    if len(table.spaces) < 2:
        raise ValueError(f"sap: expected at least two spaces: got {_checks.names(table.spaces)}")
    gaps, held = {}, scores_above_zero(table)
    for f in table.factors:
        known = sorted((held[s, f] for s in table.spaces if not math.isnan(table[s, f])), reverse=True)
        gaps[f] = known[0] - known[1] if len(known) > 1 else math.nan
    scored = [g for g in gaps.values() if not math.isnan(g)]
    return (sum(scored) / len(scored) if scored else math.nan), gaps


def mig(
    embeddings: Mapping[str, Tensor],
    factors: Mapping[str, Factor],
    *,
    bins: int = 10,
    train_fraction: float = 0.5,
    seed: int = 0,
) -> tuple[float, dict[str, float], ScoreTable]:
    """The mutual information gap: mean over factors of (I_(1) - I_(2)) / H(v) between the best and second-best space.

    I(z_s; v) is estimated by the lower bound H(v) - CE, with CE the held-out cross-entropy of v under softmax
    regression on z_s (any q(v | z) gives I >= H(v) + E log q(v | z), Barber and Agakov 2003). It is 0 if the bound is
    not above 0 at the one-sided level of 5 %, so that a chance hit on a rare class is not counted. The bound is for the
    space as a whole, not for its axes, but it captures linearly encoded information only.

    Args:
        embeddings: space -> [n, d]; at least two, without the backbone.
        factors: as in `r2_matrix`. Numbers and angles are binned into `bins` classes with equally many samples; for a
            factor of several columns the mean over columns is taken.
        bins: at least 2; with few samples in each the bound is loose. If there are fewer training samples than bins,
            numbers and angles have no score, and an error is raised if no factor is a class.
        train_fraction, seed: fraction and seed of the split.

    Returns:
        (mean gap, factor -> gap, table of I(z_s; v) / H(v) [space, factor]); NaN and a note for a constant factor.

    Raises:
        ValueError: there are fewer than two spaces; or as in `r2_matrix`.

    Source: Chen et al., arXiv 1802.04942 (the gap; there over single coordinates).
    """
    if len(embeddings) < 2:
        raise ValueError(f"mig: expected at least two spaces: got {_checks.names(embeddings)}")
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 2:
        raise ValueError(f"bins: expected a whole number, 2 or more: got {bins!r}")
    n, device = check_factors(embeddings, factors)
    split = Split.draw(n, Probe(train_fraction=train_fraction), 0, seed, device)
    train, test = split.train, split.test
    cut = [name for name, f in factors.items() if isinstance(f, Circular) or f.is_floating_point()]
    too_many = f"expected no more than the {len(train)} samples that the probe is fitted on: got {bins}"
    if bins > len(train) and len(cut) == len(factors):
        raise ValueError(f"bins: {too_many}")
    cells: dict[Cell, float] = {}
    notes: dict[Cell, str] = {}
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for name, factor in factors.items():
            columns, valid, why = _labels(factor, bins, device)
            if name in cut and bins > len(train):
                why = why or f"numbers are cut into bins, {too_many}"
            rows, held_out = train[valid[train]], test[valid[test]]
            if not why and min(len(rows), len(held_out)) < MIN_ROWS:
                why = f"defined for {len(rows)} training and {len(held_out)} held-out samples, fewer than {MIN_ROWS}"
            kept = [y for y in columns if min(len(torch.unique(y[r])) for r in (rows, held_out)) > 1] if not why else []
            if not kept:
                notes |= dict.fromkeys(
                    ((space, name) for space in embeddings), why or _one_class(factor, columns, rows)
                )
            elif not valid.all():
                notes |= {(space, name): f"defined for {int(valid.sum())} of {n} samples" for space in embeddings}
            for space, z in embeddings.items():
                x = Inputs([z], rows) if kept else None
                shares = [_information(x, y, rows, held_out) for y in kept] if x is not None else []
                cells[space, name] = sum(shares) / len(shares) if shares else math.nan
    cells = {(space, name): cells[space, name] for space in embeddings for name in factors}
    table = ScoreTable(tuple(embeddings), tuple(factors), cells, {}, notes, "softmax", (), len(train), len(test))
    mean, gaps = sap(table)
    return mean, gaps, table


def _information(x: Inputs, y: Tensor, rows: Tensor, held_out: Tensor) -> float:
    """I(z; v) / H(v) of one column of classes: the mean over held-out rows of log q(v | z) - log p(v), over H(v).

    0 if it is not above 0 at the one-sided level of 5 %.
    """
    _, place, counts = torch.unique(y[held_out], return_inverse=True, return_counts=True)
    surprise = -(counts.double() / len(held_out)).log()[place]
    gained = softmax_log_likelihood(x, y, rows, held_out) + surprise
    error = gained.std() / math.sqrt(len(gained))
    if gained.mean() <= NormalDist().inv_cdf(0.95) * error:
        return 0.0
    return float(gained.mean() / surprise.mean())


def _one_class(factor: Factor, columns: Sequence[Tensor], rows: Tensor) -> str:
    """The reason why no column of a factor has two classes on both sides of the split."""
    if isinstance(factor, Circular) or factor.is_floating_point():
        return "constant"
    one = len(torch.unique(columns[0][rows])) < 2
    return "one class in the training split" if one else "one class among the held-out samples"


def _labels(factor: Factor, bins: int, device: torch.device) -> tuple[list[Tensor], Tensor, str]:
    """Columns of classes [n] 0..C-1, a mask of the valid samples [n], and the reason if there is no target."""
    if isinstance(factor, Circular):
        (values, valid) = (t.to(device) for t in factor.target())
        values = torch.atan2(values[:, 1], values[:, 0])[:, None]
    else:
        values = factor.to(device)
        valid = torch.ones(len(values), dtype=torch.bool, device=device)
        if not factor.is_floating_point():
            return [torch.unique(values, return_inverse=True)[1]], valid, ""
        values = values.reshape(len(values), -1).double()
    if not values[valid].isfinite().all():
        return [], valid, f"{int((~values[valid].isfinite()).sum())} of {values[valid].numel()} values are NaN or inf"
    if not valid.any():
        return [], valid, "defined for no sample"
    out = []
    for v in values.T:
        edges = torch.quantile(v[valid].cpu(), torch.linspace(0, 1, bins + 1, dtype=v.dtype)[1:-1]).to(device)
        low = v[valid].min()
        above = v[valid][v[valid] > low]
        if len(above):  # if many samples share the smallest value, it becomes a class of its own
            edges = torch.where(edges == low, above.min(), edges)
        out.append(torch.bucketize(v.contiguous(), torch.unique(edges).contiguous(), right=True))
    return out, valid, ""


def _importance(r: Tensor, what: str, axis: int) -> Tensor:
    if not isinstance(r, Tensor) or r.ndim != 2 or not r.is_floating_point():
        got = f"{_checks.shape(r)} {r.dtype}" if isinstance(r, Tensor) else type(r).__name__
        raise ValueError(f"importance: expected [spaces, factors], floating point: got {got}")
    if not r.isfinite().all() or (r < 0).any():
        raise ValueError("importance: expected finite, nonnegative numbers: got NaN, inf or negative ones")
    if r.shape[axis] < 2:
        raise ValueError(f"importance: expected at least two {what}: got {r.shape[axis]}")
    return r.detach().double()
