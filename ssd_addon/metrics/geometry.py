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
    """Effective number of directions of the embeddings: exp(-sum_i p_i log p_i), p_i = sigma_i / sum_j sigma_j.

    sigma are the singular values of the centered embeddings: the rank is d for white noise, 1 on a line and 0 if all
    embeddings are equal. Singular values below the resolution of the dtype (eps times the norm of z) count as 0.

    Args:
        z: [n, d] floating point, n >= 2.

    Returns:
        Between 0 and min(n - 1, d).

    Raises:
        ValueError: z is not [n, d] floating point with at least two finite embeddings.

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
    """How uniformly L2-normalized embeddings cover the sphere: log mean_{i<j} exp(-t |z_i - z_j|^2).

    0 if all embeddings are equal; lower is more uniform. For white noise in many dimensions it tends to -2t; the
    minimum is reached by embeddings that are spread over the sphere. Computed in chunks, without an n x n matrix.

    Args:
        z: [n, d] floating point, n >= 2; embeddings are L2-normalized.
        t: scale of the Gaussian kernel, above 0.

    Returns:
        Between -4t and 0.

    Raises:
        ValueError: z is not [n, d] floating point with at least two finite embeddings; an embedding is zero; t is not
            positive.

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
    """Mean distance of positive pairs on the unit sphere: mean_i |a_i - b_i|^alpha; 0 is perfect.

    With alpha = 2 it equals 2 - 2 times the mean cosine.

    Args:
        a, b: [n, d] floating point, where a_i and b_i are a pair; embeddings are L2-normalized.
        alpha: exponent, above 0.

    Returns:
        Between 0 and 2^alpha.

    Raises:
        ValueError: a and b are not finite [n, d] of the same shape; an embedding is zero; alpha is not positive.

    >>> round(alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])), 6)
    2.0

    Source: Wang and Isola, arXiv 2005.10242.
    """
    _checks.positive(alpha, "alpha", "the exponent of the distance")
    x, y = _unit("alignment", a, 1), _unit("alignment", b, 1)
    if x.shape != y.shape:
        raise ValueError(f"alignment: expected a and b of the same shape: got {_checks.shape(a)}, {_checks.shape(b)}")
    return float((x - y).norm(dim=1).pow(alpha).mean())


def space_geometry(z: Mapping[str, Tensor], *, spaces: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Effective rank and uniformity of the queries, alignment of the positive pairs, for each space.

    Args:
        z: `Embeddings` space -> [V, B, d] with their plan (a plain dict is read as a shared-query plan), B >= 2.
        spaces: the spaces to measure; None measures all.

    Returns:
        space -> {"effective_rank", "uniformity", "alignment"}; NaN for a space without a pair in the batch.

    Raises:
        ValueError: embeddings do not fit their plan; a space cannot be measured, such as one of zeros (the message
            names it).

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
    """How well one space predicts another: `table["color", "content"]` is R^2 of content, predicted from color.

    R^2 = 1 - sum |z - zhat|^2 / sum |z - mean z|^2 over held-out samples and all coordinates, so directions count by
    their variance. Joint entropy should bring it towards 0, as no space needs to repeat another.

    Args:
        embeddings: space -> [n, d] floating point; at least two spaces.
        probe, bootstrap, seed: as in `r2_matrix`.

    Returns:
        `ScoreTable`, predicting spaces as rows, predicted spaces as columns; NaN on the diagonal.

    Raises:
        ValueError: there are fewer than two spaces; or as in `r2_matrix`.

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
    """A whole space as the target of a probe: centered, with all coordinates on one scale."""
    x = z.detach().double()
    x = whole = x / binary_scale(x.abs().amax())
    x = x - x[train].mean(0)
    scale = (x[train] ** 2).sum(1).mean().sqrt()
    spread = min(float((x[rows] - x[rows].mean(0)).square().sum(1).mean().sqrt()) for rows in (train, test))
    if not spread > torch.finfo(z.dtype).eps * float(whole.norm(dim=1).amax()):
        return "constant"
    return Target(x / scale, torch.ones(len(z), dtype=torch.bool, device=z.device), pooled=True)


def _unit(what: str, z: Tensor, least: int) -> Tensor:
    """L2-normalized embeddings, float64."""
    check_space(what, z, least)
    check_finite(what, z)
    x = unit_rows(z.detach().double())
    if zero := int((x == 0).all(1).sum()):
        raise ValueError(f"{what}: expected embeddings with a direction: got {zero} of length 0")
    return x
