"""SIGReg, FroSSL and MMCR as joint entropies: alignment on each space's own pair, entropy of the joint embedding.

Each entropy uses the joint embeddings of one view at a time. Computed over all views at once (MMCR's centroids,
FroSSL's average view) it would pull all views of an image together, which would remove the style from style spaces.
Legend: V views, N samples of a view over all ranks, D joint width.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ssd_addon import _checks, _dist
from ssd_addon._dist import Shards
from ssd_addon._shapes import Embedded, Ids, Joint, Matrix, Scalar, Vector
from ssd_addon._unit import EPS, without_direction
from ssd_addon.losses.objective import Objective
from ssd_addon.losses.rows import Rows
from ssd_addon.losses.vicreg import mean_square

KNOTS, LARGEST_FREQUENCY = 17, 3.0


class SIGReg(Objective):
    """Sketched isotropic Gaussian regularization: draws every view's joint embeddings towards a standard normal.

        entropy = mean over views and random directions a of  N * integral |phi_n(t) - exp(-t^2/2)|^2 exp(-t^2/2) dt

    phi_n is the empirical characteristic function of <z, a>; the integral over [-3, 3] uses the trapezoidal rule. In
    `Terms`, invariance and constraint are the mean squared difference. With one space the entropy equals lightly's
    `SIGReg`, and with weight 4.75 the loss equals its LeJEPALoss(lambda_param=0.05) of two global views, divided by
    0.05.

    Args:
        directions: number of random directions, redrawn at every call from torch's global generator (rank 0's for all
            ranks).

    Source: Balestriero and LeCun, LeJEPA, arXiv 2511.08544.
    """

    def __init__(self, directions: int = 1024) -> None:
        super().__init__("sigreg", weight=4.75)
        self.directions = _checks.width(directions, "directions")

    def alignment(self, a: Matrix, b: Matrix) -> Vector:
        return mean_square(a, b)

    def entropy(self, joint: Joint, ids: Ids) -> Scalar:
        a = torch.randn(joint.shape[-1], self.directions, device=joint.device, dtype=joint.dtype)
        if (group := _dist.default_group()) is not None:
            dist.broadcast(a, src=0, group=group)
        return gaussian_mismatch(joint, a / a.norm(dim=0))

    def extra_repr(self) -> str:
        return f"directions={self.directions}"


def gaussian_mismatch(x: Tensor, directions: Tensor) -> Tensor:
    """The Epps-Pulley statistic of x [..., N, D], averaged over unit directions [D, A] and leading axes."""
    n = x.shape[-2]
    t = torch.linspace(0, LARGEST_FREQUENCY, KNOTS, dtype=x.dtype, device=x.device)
    phi = torch.exp(-t.square() / 2)
    weights = torch.full_like(t, 2 * LARGEST_FREQUENCY / (KNOTS - 1))  # both halves of an even integrand
    weights[0] = weights[-1] = LARGEST_FREQUENCY / (KNOTS - 1)
    angle = (x @ directions).unsqueeze(-1) * t  # [..., N, A, T]
    error = (angle.cos().mean(-3) - phi).square() + angle.sin().mean(-3).square()
    return ((error @ (weights * phi)) * n).mean()


class FroSSL(Objective):
    """The Frobenius norm of each view's covariance, which is small if its eigenvalues are equal.

        entropy   = 2 * mean over views of log |C_v|_F^2,   C_v = X_v^T X_v / tr
        alignment = |x_a - x_b|^2 of each sample

    The columns of x are scaled to unit length over the samples of all ranks, view by view. In `Terms`, invariance and
    constraint are the mean alignment. With one space and two views it equals lightly's FroSSLLoss().

    Source: Skean et al., FroSSL, arXiv 2310.02903.
    """

    def __init__(self) -> None:
        super().__init__("frossl")

    def prepared(self, rows: Rows) -> dict[str, Tensor]:
        return {n: unit_columns(t, rows.shards, rows.types.get(n)) for n, t in rows.z.items()}

    def alignment(self, a: Matrix, b: Matrix) -> Vector:
        return (a - b).square().sum(dim=-1)

    def entropy(self, joint: Joint, ids: Ids) -> Scalar:
        _, n, d = joint.shape
        gram = joint.mT @ joint if n > d else joint @ joint.mT  # the same eigenvalues
        trace, square = gram.diagonal(dim1=-2, dim2=-1).sum(-1), gram.square().sum((-2, -1))
        nothing = square == 0  # a view of zeros counts as one direction, the most concentrated covariance
        square, trace = (t.masked_fill(nothing, 1) for t in (square, trace))
        return 2 * (square.log() - 2 * trace.detach().log()).mean()


def unit_columns(t: Embedded, s: Shards, came_as: torch.dtype | None = None) -> Embedded:
    """Scale the columns of [V, B, d] to unit length over the samples of all ranks, view by view; NaN on overflow.

    As in `unit_rows`, a column of zeros gets the gradient 0 if the embeddings were given in 16 bits.
    """
    square = _dist.all_sum(t.square().sum(dim=1, keepdim=True), s.group)
    u = t / torch.where(square.isinf(), math.nan, square).clamp(min=EPS**2).sqrt()
    smallest = without_direction(came_as or t.dtype)
    return u if smallest < 0 else torch.where(square.sqrt() <= smallest, u.detach(), u)


class MMCR(Objective):
    """Maximum manifold capacity: maximizes the nuclear norm of each view's L2-normalized joint embeddings.

        entropy   = - mean over views of |Z_v|_*
        alignment = 1 - cosine of each sample

    The published loss uses the norm of the images' centroids, whose length measures how well the views agree. Here the
    alignment measures that, space by space, with weight 30: a pair at cosine c shortens its centroid by (1 - c) / 4,
    and the norm is of the order of sqrt(N D). In `Terms`, the constraint is 1 - mean cosine. For a view that is its own
    centroid the entropy equals lightly's MMCRLoss(lmda=0).

    Source: Yerxa et al., arXiv 2303.03307.
    """

    def __init__(self) -> None:
        super().__init__("mmcr", weight=30.0, on_sphere=True)

    def alignment(self, a: Matrix, b: Matrix) -> Vector:
        return 1 - (a * b).sum(dim=-1)

    def entropy(self, joint: Joint, ids: Ids) -> Scalar:
        finite = joint.isfinite().all()
        singular: Tensor = torch.linalg.svdvals(torch.where(finite, joint, 0))  # svdvals raises on NaN
        return -singular.sum(-1).mean() * torch.where(finite, 1.0, math.nan)
