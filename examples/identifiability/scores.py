"""The scores of both protocols: kernel ridge regression as in the two papers' code, and `metrics.r2_matrix`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssd_addon.metrics import r2_matrix

ALPHAS = (1.0, 0.1, 0.01, 0.001)
GAMMAS = tuple(10 ** (-2 + 4 * k / 3) for k in range(4))
FOLDS = 3


def kernel_ridge_r2(x: Tensor, y: Tensor, train: int) -> Tensor:
    """R^2 of every column of y on the rows after the first `train`, by kernel ridge regression on those.

    exp(-gamma |a - b|^2), no intercept; alpha of 1, 0.1, 0.01 or 0.001 and gamma of 0.01 to 100 are chosen for each
    column by threefold cross-validation, in blocks of rows. Both sides are standardized by the training rows.

    Args:
        x: inputs [n, d].
        y: targets [n, k].
        train: rows to fit on.

    Returns:
        [k] float64.

    Source: the evaluation of arXiv 2106.04619 (which chooses for the mean over columns) and 2311.04056.
    """
    x, y = (_standardized(t.double(), train) for t in (x, y))
    a, b = x[:train], y[:train]
    square = torch.cdist(x, a).square()
    best, answer = torch.full((y.shape[1],), -math.inf, dtype=torch.float64), torch.zeros_like(y[train:])
    parts = torch.arange(train).tensor_split(FOLDS)
    for gamma in GAMMAS:
        k = torch.exp(-gamma * square)
        for alpha in ALPHAS:
            found = []
            for held_out in parts:
                kept = torch.ones(train, dtype=torch.bool)
                kept[held_out] = False
                w = _solve(k[:train][kept][:, kept], b[kept], alpha)
                found.append(_r2(b[held_out], k[held_out][:, kept] @ w))
            score = torch.stack(found).mean(0)
            if bool((better := score > best).any()):
                best = torch.where(better, score, best)
                answer[:, better] = k[train:] @ _solve(k[:train], b[:, better], alpha)
    return _r2(y[train:], answer)


def linear_r2(x: Tensor, y: Tensor, train: int) -> Tensor:
    """R^2 [k] of least squares with an intercept, fitted on the first `train` rows."""
    x, y = (_standardized(t.double(), train) for t in (x, y))
    w = torch.linalg.lstsq(x[:train], y[:train], driver="gelsd").solution
    return _r2(y[train:], x[train:] @ w)


def _standardized(t: Tensor, train: int) -> Tensor:
    mean, std = t[:train].mean(0), t[:train].std(0, correction=0)
    return (t - mean) / torch.where(std > 0, std, 1.0)


def _solve(k: Tensor, y: Tensor, alpha: float) -> Tensor:
    damped = k + alpha * torch.eye(len(k), dtype=k.dtype)
    return torch.cholesky_solve(y, torch.linalg.cholesky(damped))


def _r2(y: Tensor, guess: Tensor) -> Tensor:
    return 1 - (y - guess).square().sum(0) / (y - y.mean(0)).square().sum(0)


def of_pair(z: Mapping[str, Tensor], factors: Mapping[str, Tensor], train: int, rows: int) -> dict[str, Any]:
    """Table -> space -> factor -> score, a mean over the factor's columns.

    "theirs" and "theirs, linear" are fitted on the first `train` rows and scored on the rest; "linear", "kernel" and
    "conditional" (with the true content beside the space) are this library's, on the first `rows`, half of them to fit.
    """
    out: dict[str, Any] = {"theirs": {}, "theirs, linear": {}}
    columns, widths = torch.cat(list(factors.values()), 1), [t.shape[1] for t in factors.values()]
    for space, t in z.items():
        for kind, measure in (("theirs", kernel_ridge_r2), ("theirs, linear", linear_r2)):
            each = measure(t, columns, train).split(widths)
            out[kind][space] = {n: round(float(v.mean()), 4) for n, v in zip(factors, each, strict=True)}
    return out | matrices(z, factors, rows)


def of_views(
    codes: Mapping[tuple[int, ...], Mapping[int, Tensor]], z: Tensor, common: Sequence[int], train: int, rows: int
) -> dict[str, Any]:
    """Table -> subset of views -> latent -> score.

    "theirs" and "theirs, linear" are means over the subset's views. The three tables of this library score the code of
    its first view; "conditional" is given the latents `common` to all views.

    Args:
        codes: subset -> view -> code [n, d].
        z: latents [n, width].
        common: the latents that all views observe.
        train: number of rows on which their protocol is fitted.
        rows: number of rows for this library's tables.
    """
    out: dict[str, Any] = {"theirs": {}, "theirs, linear": {}}
    for subset, by_view in codes.items():
        for kind, measure in (("theirs", kernel_ridge_r2), ("theirs, linear", linear_r2)):
            mean = torch.stack([measure(code, z, train) for code in by_view.values()]).mean(0)
            out[kind][_label(subset)] = {str(j): round(float(v), 4) for j, v in enumerate(mean)}
    first = {_label(s): by_view[s[0]] for s, by_view in codes.items()}
    rest = [j for j in range(z.shape[1]) if j not in common]
    factors = {"content": z[:, list(common)], **{str(j): z[:, j] for j in rest}}
    return out | matrices(first, factors, rows)


def _label(subset: Sequence[int]) -> str:
    return "".join(str(k) for k in subset)


def matrices(z: Mapping[str, Tensor], factors: Mapping[str, Tensor], rows: int) -> dict[str, Any]:
    """This library's three tables of the first rows, as dictionaries space -> factor -> score."""
    z, factors = ({name: t[:rows] for name, t in its.items()} for its in (z, factors))
    tables = {
        "linear": r2_matrix(z, factors, probe="ridge", bootstrap=0),
        "kernel": r2_matrix(z, factors, probe="kernel", bootstrap=0),
        "conditional": r2_matrix(z, factors, probe="kernel", given=("content",), bootstrap=0),
    }
    return {
        kind: {s: {f: round(t[s, f], 4) for f in t.factors if not math.isnan(t[s, f])} for s in t.spaces}
        for kind, t in tables.items()
    }
