"""The generalized Hilbertian covariance measure again, as slow float64 loops written from its definition.

T = |n^-1/2 sum_i r_i (x) psi_i|^2, the Hilbert-Schmidt norm of a sum of outer products (Lundborg, Shah and Peters,
arXiv 2101.07108). Nothing here imports the package that it is the reference for.
"""

import torch
from torch import Tensor


def statistic(r: Tensor, psi: Tensor, metric: Tensor) -> float:
    """T of residuals r [n, q] and psi [n, k], in the norm |psi|^2 = psi^T metric psi with metric [k, k].

    With a metric the outer product is that of r and L^T psi, metric = L L^T.
    """
    n = len(r)
    columns, features, weights = r.double().tolist(), psi.double().tolist(), metric.double().tolist()
    covariance = [[0.0] * len(features[0]) for _ in columns[0]]
    for i in range(n):
        for a in range(len(columns[0])):
            for b in range(len(features[0])):
                covariance[a][b] += columns[i][a] * features[i][b] / n**0.5
    total = 0.0
    for row in covariance:
        for b in range(len(row)):
            for c in range(len(row)):
                total += row[b] * weights[b][c] * row[c]
    return total


def left_out_residuals(x: Tensor, y: Tensor, penalty: float, folds: int) -> Tensor:
    """y [n, q] less the ridge prediction from features x [n, k], row i by the rows of other folds.

    The fold of row i is the remainder of the i-th number of the permutation that seed 0 draws.

    The penalty is times the rows that are fitted on; the intercept has none.
    """
    out = y.clone()
    place = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).tolist()
    for i in range(len(y)):
        kept = [j for j in range(len(y)) if place[j] % folds != place[i] % folds]
        mean_x, mean_y = x[kept].mean(0), y[kept].mean(0)
        a, b = x[kept] - mean_x, y[kept] - mean_y
        shifted = a.T @ a
        for k in range(shifted.shape[0]):
            shifted[k, k] += penalty * len(kept)
        out[i] = y[i] - mean_y - (x[i] - mean_x) @ (shifted.inverse() @ (a.T @ b))
    return out
