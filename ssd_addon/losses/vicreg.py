"""VICReg: squared distances of pairs; variance and covariance of each view's joint embedding.

    invariance_s = mean over samples and the d_s coordinates of (z_a - z_b)^2
    entropy      = mean over views of  variance * mean_k relu(1 - sqrt(var_k + 1e-4))
                                     + covariance * sum_{k != l} C_kl^2 / D

Variances and covariances divide by n - 1. Source: Bardes et al., arXiv 2105.04906; the joint form is Eastwood et al.,
arXiv 2311.08815. With one space it equals lightly's VICRegLoss(25, 25, nu_param=0.5).
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_addon import _checks, _dist
from ssd_addon._dist import Shards
from ssd_addon._shapes import Ids, Joint, Matrix, Scalar, Vector
from ssd_addon.kernels.covariance import energy_backend, off_diagonal_energy
from ssd_addon.kernels.dispatch import Backend
from ssd_addon.losses.objective import Objective
from ssd_addon.losses.rows import Pair, Parts, Rows

VARIANCE_EPS = 1e-4


class VICReg(Objective):
    """The VICReg family, with default weight 25. In `Terms`, invariance and constraint are the mean squared difference.

    Args:
        variance, covariance: coefficients of the entropy.
    """

    defaults: ClassVar[dict[str, float | None]] = {"variance": 25.0, "covariance": 1.0}

    def __init__(self, variance: float = 25.0, covariance: float = 1.0) -> None:
        super().__init__("vicreg", weight=25.0)
        self.variance = _checks.not_negative(variance, "variance", "a coefficient of the entropy")
        self.covariance = _checks.not_negative(covariance, "covariance", "a coefficient of the entropy")

    def alignment(self, a: Matrix, b: Matrix) -> Vector:
        return mean_square(a, b)

    def entropy(self, joint: Joint, ids: Ids) -> Scalar:
        alone = Shards(None, (joint.shape[1],), 0)
        return self._of_views(deviations(joint, alone), "auto", alone)

    def _pair(self, z: Tensor | Sequence[Tensor], pair: Pair, rows: Rows) -> tuple[Tensor, int | Tensor]:
        if rows.trim or pair.mask is not None:
            return super()._pair(z, pair, rows)
        a, b, n = z[pair.a], z[pair.b], rows.shards.total  # all samples: per-sample values are not needed
        return rows.shards.mean(F.mse_loss(a, b, reduction="sum"), n * a.shape[1]), n

    def spread(self, out: Parts, z: Mapping[str, Tensor], rows: Rows) -> None:
        """Compute the entropy from statistics over all ranks, without gathering embeddings."""
        joint = torch.cat(list(z.values()), dim=-1)
        width = z["content"].shape[-1]
        x = deviations(joint, rows.shards)
        out.entropy = self._of_views(x, rows.backend, rows.shards)
        if rows.content_entropy:
            out.content_entropy = self._of_views(x[..., :width], rows.backend, rows.shards)
        s, d = rows.shards, joint.shape[-1]
        out.backend = energy_backend(rows.backend, s.size, d, dtype=joint.dtype, device=joint.device, group=s.group)

    def _of_views(self, x: Joint, backend: Backend, s: Shards) -> Scalar:
        """The mean over views of variance * mean_k relu(1 - sqrt(var_k + 1e-4)) + covariance * sum_{k != l} C_kl^2 / D.

        x [V, B, D] are deviations from the mean, divided by sqrt(n - 1), so that C = x^T x.
        """
        var = _dist.all_sum(x.square().sum(dim=1), s.group)
        hinge = F.relu(1 - torch.sqrt(var + VARIANCE_EPS)).mean()
        energy = torch.stack([off_diagonal_energy(view, backend=backend, group=s.group) for view in x.unbind(0)])
        return torch.add(self.variance * hinge, energy.mean(), alpha=self.covariance / x.shape[-1])

    def largest(self, dtype: torch.dtype, width: int, joint: int, rows: int) -> float:
        """Covariances are squared and summed over D x D entries."""
        return float((torch.finfo(dtype).max / 4) ** 0.25 / math.sqrt(max(joint, 1)))

    def refuse_backend(self, backend: str) -> None:
        pass

    def extra_repr(self) -> str:
        return f"variance={self.variance}, covariance={self.covariance}"


def mean_square(a: Matrix, b: Matrix) -> Vector:
    """Mean over the coordinates of (a_i - b_i)^2, [n]."""
    return (a - b).square().mean(dim=-1)


def deviations(joint: Joint, s: Shards) -> Joint:
    """(x - mean) / sqrt(n - 1) over the samples of all ranks, view by view."""
    total = _dist.all_sum(joint.sum(dim=1, keepdim=True), s.group)
    return torch.sub(joint, total, alpha=1 / s.total) * (1 / math.sqrt(s.total - 1))


def centered(x: Matrix, s: Shards) -> Matrix:
    """x - mean over the samples of all ranks, x [B, D]."""
    return x - _dist.all_sum(x.sum(dim=0), s.group) / s.total
