"""VICReg: squared distances of pairs; variance and covariance of each view's joint embedding.

    invariance_s = mean over rows and the d_s coordinates of (z_a - z_b)^2
    entropy      = mean over views of  variance * mean_k relu(1 - sqrt(var_k + 1e-4))
                                     + covariance * sum_{k != l} C_kl^2 / D

Variances and covariances divide by n - 1. Source: Bardes et al., arXiv 2105.04906; the joint form is Eastwood et al.,
arXiv 2311.08815. With one space it equals lightly's VICRegLoss(25, 25, nu_param=0.5).
"""

import math
from collections.abc import Mapping
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
from ssd_addon.losses.rows import Parts, Rows

VARIANCE_EPS = 1e-4


class VICReg(Objective):
    """The VICReg family, weight 25. In `Terms`, invariance and constraint are the mean squared difference.

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
        return torch.stack([self._of_view(centered(view, alone), "auto", alone) for view in joint]).mean()

    def spread(self, out: Parts, z: Mapping[str, Tensor], rows: Rows) -> None:
        """Statistics over the rows of all ranks, which are not gathered."""
        joint = torch.cat(list(z.values()), dim=-1)
        width = z["content"].shape[-1]
        whole, content = [], []
        for view in joint.unbind(0):
            x = centered(view, rows.shards)
            whole.append(self._of_view(x, rows.backend, rows.shards))
            if rows.content_entropy:
                content.append(self._of_view(x[:, :width], rows.backend, rows.shards))
        out.entropy = torch.stack(whole).mean()
        out.content_entropy = torch.stack(content).mean() if content else None
        s, d = rows.shards, joint.shape[-1]
        out.backend = energy_backend(rows.backend, s.size, d, dtype=joint.dtype, device=joint.device, group=s.group)

    def _of_view(self, x: Matrix, backend: Backend, s: Shards) -> Scalar:
        """variance * mean_k relu(1 - sqrt(var_k + 1e-4)) + covariance * sum_{k != l} C_kl^2 / D, x [B, D] centered."""
        n, d = s.total, x.shape[1]
        var = _dist.all_sum(x.square().sum(dim=0), s.group) / (n - 1)
        hinge = F.relu(1 - torch.sqrt(var + VARIANCE_EPS)).mean()
        energy = off_diagonal_energy(x / math.sqrt(n - 1), backend=backend, group=s.group)
        return self.variance * hinge + self.covariance * energy / d

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


def centered(x: Matrix, s: Shards) -> Matrix:
    """x - mean over the rows of all ranks, x [B, D]."""
    return x - _dist.all_sum(x.sum(dim=0), s.group) / s.total
