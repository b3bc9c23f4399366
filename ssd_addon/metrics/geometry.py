"""Geometry of the embeddings in a space, and the redundancy between spaces.

Legend: n samples, d the width of a space, V views, B images.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon._shapes import Matrix
from ssd_addon.embeddings import Embeddings, as_embeddings
from ssd_addon.metrics.probe import Kind, Probe, Split, at_least, score_cells
from ssd_addon.metrics.probes import Target
from ssd_addon.metrics.spaces import CHUNK, binary_scale, check_finite, check_space, check_spaces, unit_rows
from ssd_addon.metrics.table import ScoreTable


def effective_rank(z: Matrix) -> float:
    """How many directions the embeddings use: exp(-sum_i p_i log p_i), p_i = sigma_i / sum_j sigma_j.

    sigma are the singular values of the centered embeddings: the rank is d for white noise, 1 on a line and 0 where all
    rows are equal. Singular values below the resolution of the type (eps times the norm of z) count as 0.

    Args:
        z: [n, d] floating point, n >= 2.

    Returns:
        Between 0 and min(n - 1, d).

    Raises:
        ValueError: not [n, d] floating point with at least two finite rows.

    >>> line = torch.arange(5.0)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    >>> round(effective_rank(line), 6)
    1.0

    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.
    """
    check_space("effective_rank", z, 2)
    check_finite("effective_rank", z)
    with torch.no_grad():
        x = z.double()
        x = x / binary_scale(x.abs().amax())
        sigma = torch.linalg.svdvals(x - x.mean(0))
        sigma = sigma[sigma > torch.finfo(z.dtype).eps * x.norm()]
        return float(torch.special.entr(sigma / sigma.sum()).sum().exp()) if len(sigma) else 0.0


def uniformity(z: Matrix, *, t: float = 2.0) -> float:
    """How evenly unit-length embeddings cover the sphere: log mean_{i<j} exp(-t |z_i - z_j|^2).

    0 where all rows agree, lower is more even; for white noise in many dimensions it tends to -2t, and its least value
    is that of rows spread over the sphere. In chunks: no n x n matrix.

    Args:
        z: [n, d] floating point, n >= 2; rows are scaled to unit length.
        t: of the Gaussian kernel, above 0.

    Returns:
        Between -4t and 0.

    Raises:
        ValueError: not [n, d] floating point with at least two finite rows; a row of length 0; a bad t.

    >>> round(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])), 6)  # |z_i - z_j|^2 = 4
    -8.0

    Source: Wang and Isola, arXiv 2005.10242.
    """
    _checks.positive(t, "t", "of the Gaussian kernel")
    x = _unit("uniformity", z, 2)
    n = len(x)
    parts = []
    for start in range(0, n, step := max(1, CHUNK // n)):
        rows = torch.arange(start, min(start + step, n), device=x.device)
        e = 2 * t * (x[rows] @ x.T - 1)  # -t |z_i - z_j|^2
        parts.append(
            e.masked_fill_(torch.arange(n, device=x.device) <= rows[:, None], -math.inf).flatten().logsumexp(0)
        )
    return float(torch.stack(parts).logsumexp(0)) - math.log(n * (n - 1) / 2)


def alignment(a: Matrix, b: Matrix, *, alpha: float = 2.0) -> float:
    """How far apart positive pairs are on the unit sphere: mean_i |a_i - b_i|^alpha; 0 is perfect.

    With alpha = 2 it is 2 - 2 times the mean cosine.

    Args:
        a, b: [n, d] floating point, row i of both is a pair; rows are scaled to unit length.
        alpha: exponent, above 0.

    Returns:
        Between 0 and 2^alpha.

    Raises:
        ValueError: not two finite [n, d] of one shape; a row of length 0; a bad alpha.

    >>> round(alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])), 6)
    2.0

    Source: Wang and Isola, arXiv 2005.10242.
    """
    _checks.positive(alpha, "alpha", "the exponent of the distance")
    x, y = _unit("alignment", a, 1), _unit("alignment", b, 1)
    if x.shape != y.shape:
        raise ValueError(
            f"alignment: expected a and b of one shape, a row per pair: got {_checks.shape(a)}, {_checks.shape(b)}"
        )
    return float((x - y).norm(dim=1).pow(alpha).mean())


def space_geometry(z: Mapping[str, Tensor], *, spaces: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Effective rank and uniformity of the queries, alignment of the positive pairs, for each space.

    Args:
        z: `Embeddings` space -> [V, B, d] with their plan (a plain dict is a shared-query plan), B >= 2.
        spaces: those that are measured; None: all.

    Returns:
        space -> {"effective_rank", "uniformity", "alignment"}; NaN for a space without a pair in the batch.

    Raises:
        ValueError: embeddings that do not fit their plan; a space that cannot be measured, such as one of zeros, which
            is named.

    >>> z = Embeddings({"content": torch.eye(4).expand(2, 4, 4)})
    >>> {name: round(value, 3) for name, value in space_geometry(z)["content"].items()}
    {'effective_rank': 3.0, 'uniformity': -4.0, 'alignment': 0.0}
    """
    e: Embeddings = as_embeddings(z)
    plan, batch, _ = e.check()
    index = None if e.space_index is None else e.space_index.cpu()
    pairs = plan.pairs(batch, index)
    if unknown := [name for name in spaces or () if name not in pairs]:
        raise ValueError(f"spaces: expected some of {_checks.names(pairs)}: got {_checks.names(unknown)}")
    out = {}
    for name in pairs if spaces is None else spaces:
        a, b, rows = pairs[name]
        one, other = (e[name][v][rows.to(e[name].device)] for v in (a, b))
        try:
            out[name] = {
                "effective_rank": effective_rank(e[name][0]),
                "uniformity": uniformity(e[name][0]),
                "alignment": alignment(one, other) if len(rows) else math.nan,
            }
        except ValueError as error:
            raise ValueError(f"space {name!r}: {error}") from error
    return out


def redundancy(
    embeddings: Mapping[str, Tensor],
    *,
    probe: Kind | Probe = "ridge",
    bootstrap: int = 200,
    seed: int = 0,
) -> ScoreTable:
    """How well one space predicts another: `table["color", "content"]` is how much of content color predicts.

    R^2 = 1 - sum |z - zhat|^2 / sum |z - mean z|^2 over held-out rows and all coordinates, so a direction counts by its
    variance. Joint entropy should bring it to 0: what one space encodes, another need not.

    Args:
        embeddings: space -> [n, d] floating point; at least two spaces.
        probe, bootstrap, seed: as in `r2_matrix`.

    Returns:
        `ScoreTable`, the predicting spaces down, the predicted across; NaN on the diagonal.

    Raises:
        ValueError: fewer than two spaces, and what `r2_matrix` refuses.

    >>> g = torch.Generator().manual_seed(0)
    >>> a, b = torch.randn(200, 3, generator=g), torch.randn(200, 2, generator=g)
    >>> table = redundancy({"content": a, "copy": a @ torch.randn(3, 3, generator=g), "other": b})
    >>> round(table["copy", "content"], 2), table["other", "content"] < 0.1
    (1.0, True)
    """
    if len(embeddings) < 2:
        raise ValueError(f"redundancy: expected two spaces or more: got {_checks.names(embeddings)}")
    chosen = Probe.of(probe)
    at_least("bootstrap", bootstrap, 0)
    n, device = check_spaces(embeddings)
    split = Split.draw(n, chosen, bootstrap, seed, device)
    targets = {name: _whole_space(z, split.train, split.test) for name, z in embeddings.items()}
    itself = {(name, name): "itself" for name in embeddings}
    cells = score_cells({s: [z] for s, z in embeddings.items()}, targets, split, chosen, seed=seed, without=itself)
    names = tuple(embeddings)
    return ScoreTable(names, names, *cells, chosen.kind, (), len(split.train), len(split.test))


def _whole_space(z: Tensor, train: Tensor, test: Tensor) -> Target | str:
    """A space to be predicted: centered, all coordinates on one scale."""
    x = z.detach().double()
    x = whole = x / binary_scale(x.abs().amax())
    x = x - x[train].mean(0)
    scale = (x[train] ** 2).sum(1).mean().sqrt()
    spread = min(float((x[rows] - x[rows].mean(0)).square().sum(1).mean().sqrt()) for rows in (train, test))
    if not spread > torch.finfo(z.dtype).eps * float(whole.norm(dim=1).amax()):
        return "constant"
    return Target(x / scale, torch.ones(len(z), dtype=torch.bool, device=z.device), pooled=True)


def _unit(what: str, z: Tensor, least: int) -> Tensor:
    """Rows of unit length, float64."""
    check_space(what, z, least)
    check_finite(what, z)
    x = unit_rows(z.detach().double())
    if zero := int((x == 0).all(1).sum()):
        raise ValueError(f"{what}: expected rows with a direction: got {zero} rows of length 0")
    return x
