"""Barlow Twins: the diagonal of the cross-correlation of two views aligns pairs, the other entries form the entropy.

    invariance_s = sum over the d_s coordinates of (c_kk - 1)^2
    entropy      = redundancy * mean over the pairs (a, b) of views of sum_{k != l} c_kl^2, over all joint columns

c is the cross-correlation of views that are standardized over the samples of all ranks (biased variance plus 1e-5
inside the root). Source: Zbontar et al., arXiv 2103.03230; the joint form is this project's (docs/method.md). With one
space and two views it equals lightly's BarlowTwinsLoss(lambda_param=0.0051).
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from ssd_addon import _checks, _dist
from ssd_addon._dist import Shards
from ssd_addon._shapes import Ids, Joint, Matrix, Scalar, Vector
from ssd_addon.kernels.covariance import energy_backend, off_diagonal_energy
from ssd_addon.losses.objective import Objective
from ssd_addon.losses.rows import Pair, Parts, Rows, columns_of, kept_rows, masked, mean_over_keys
from ssd_addon.losses.vicreg import centered, mean_square

STANDARDIZE_EPS = 1e-5


class BarlowTwins(Objective):
    """The Barlow Twins family. In `Terms`, the constraint is the mean over coordinates of (c_kk - 1)^2.

    Args:
        redundancy: coefficient of the squared off-diagonal entries in the entropy.
    """

    defaults: ClassVar[dict[str, float | None]] = {"redundancy": 0.0051}

    def __init__(self, redundancy: float = 0.0051) -> None:
        super().__init__("barlow")
        self.redundancy = _checks.not_negative(redundancy, "redundancy", "a coefficient of the entropy")

    def alignment(self, a: Matrix, b: Matrix) -> Vector:
        """Mean squared difference per sample, by which trimming ranks; the loss term is `diagonal_alignment`."""
        return mean_square(a, b)

    def entropy(self, joint: Joint, ids: Ids) -> Scalar:
        """redundancy times the mean over the pairs (0, v) of the sum of squared off-diagonal entries."""
        alone = Shards(None, (joint.shape[1],), 0)
        x = [standardized(view, alone) for view in joint]
        found = [off_diagonal_energy(x[0], key) / joint.shape[1] ** 2 for key in x[1:]]
        return self.redundancy * torch.stack(found).mean()

    def parts(self, rows: Rows) -> Parts:
        z, s = rows.z, rows.shards
        joint = torch.cat(list(z.values()), dim=-1)
        x = [standardized(view, s, checked=rows.known is not None) for view in joint.unbind(0)]  # V times [B, D]
        columns = columns_of(z)
        invariance, constraint, count = {}, {}, {}
        for name, pairs in rows.pairs.items():
            own = [view[:, columns[name]] for view in x]
            found = [diagonal_alignment(own[p.a], own[p.b], p, rows.trim, s) for p in pairs]
            invariance[name], count[name] = mean_over_keys(found, s)
            constraint[name] = invariance[name] / own[0].shape[-1]
        views = dict.fromkeys((p.a, p.b) for pairs in rows.pairs.values() for p in pairs)

        def energy(part: slice) -> Tensor:
            found = [
                off_diagonal_energy(x[a][:, part], x[b][:, part], backend=rows.backend, group=s.group) for a, b in views
            ]
            return torch.stack(found).mean() * (self.redundancy / s.total**2)

        return Parts(
            invariance,
            constraint,
            count,
            energy(slice(None)),
            energy(columns["content"]) if rows.content_entropy else None,
            {name: x[0][:, c] for name, c in columns.items()},
            energy_backend(
                rows.backend, s.size, joint.shape[-1], dtype=joint.dtype, device=joint.device, group=s.group
            ),
            {n: (x[p.a][:, columns[n]], x[p.b][:, columns[n]], p.mask) for n, (p, *_) in rows.pairs.items()},
        )

    def misalignment(self, guess: Matrix, target: Matrix, mask: Vector | None, shards: Shards | None = None) -> Scalar:
        s = Shards(None, (len(guess),), 0) if shards is None else shards
        if mask is not None:  # statistics are computed over the masked samples only
            guess, target = guess[mask], target[mask]
            s, _ = _dist.shards(len(guess), [], guess.device, s.group)
        if s.total < 2:
            return guess.sum() * 0
        return diagonal_alignment(standardized(guess, s), standardized(target, s), Pair(0, 1), 0.0, s)[0]

    def refuse_backend(self, backend: str) -> None:
        pass

    def extra_repr(self) -> str:
        return f"redundancy={self.redundancy}"


def standardized(x: Matrix, s: Shards, checked: bool = False) -> Matrix:
    """(x - mean) / sqrt(biased variance + 1e-5) over the samples of all ranks, x [B, D]; NaN if that overflows.

    Args:
        checked: whether the checks on values have ruled out an overflow.
    """
    if s.group is None:
        y, _, inverse = torch.native_batch_norm(x, None, None, None, None, True, 0.0, STANDARDIZE_EPS)
        return y if checked else y * torch.where(inverse.detach() == 0, math.nan, 1.0)
    x = centered(x, s)
    var = _dist.all_sum(x.square().sum(dim=0), s.group) / s.total
    return x / torch.sqrt(torch.where(var.isinf(), math.nan, var) + STANDARDIZE_EPS)


def diagonal_alignment(a: Matrix, b: Matrix, pair: Pair, trim: float, s: Shards) -> tuple[Tensor, int | Tensor]:
    """sum_k (c_kk - 1)^2 with c_kk = mean over the pair's samples of a_k b_k; a, b [B, d] standardized."""
    keep, n = kept_rows(lambda: mean_square(a, b), pair.mask, trim, s)
    total = _dist.all_sum(masked(a * b, keep).sum(dim=0), s.group)
    if isinstance(n, Tensor):
        value = (total / n.clamp(min=1) - 1).square().sum()
        return torch.where(n > 0, value, 0), n
    return (total / n - 1).square().sum(), n
