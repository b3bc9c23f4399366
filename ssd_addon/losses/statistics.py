"""Collapse statistics of a batch: does a space differ between images, do its pairs agree, does it repeat another one.

They are detached numbers that accompany the loss; `ssd_addon.alarm` reads them from the log.
Legend: B local samples, N samples over all ranks, d width of a space.
"""

import itertools
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ssd_addon import _dist
from ssd_addon._shapes import Matrix, Scalar
from ssd_addon.losses.rows import Parts

ROUNDING = 1e-5
"""Differences between embeddings below this share of their squared length are rounding errors of float32 sums."""
ROWS = 256
"""Local samples used to compare two spaces: the Gram matrix is 256 x 256 for any batch size and widths."""


@torch.no_grad()
def spread_and_agreement(
    parts: Parts, exponents: Mapping[str, Tensor], on_sphere: bool, group: ProcessGroup | None
) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
    """Spread and agreement of each space over the samples of all ranks, dimensionless; uses one collective.

    spread = variance of the coordinates between images / mean square. The mean square is that of this space or the
    average over all spaces, whichever is larger (for spaces on the unit sphere: of this space). 0 means that the
    embeddings of all images are equal, or negligible compared with those of the other spaces.

    agreement = 1 - E |a_i - b_i|^2 / E |a_i - b_j|^2, i != j, over the space's first pair of views (a, b). 1 means that
    the two embeddings of a pair are equal; 0 that they differ as much as those of different images.

    Args:
        exponents: space -> exponent of the largest entry; entries are divided by 2^exponent, so that sums of squares do
            not overflow.
    """
    sums, widths = [], []
    for name, x in parts.seen.items():
        a, b, mask = parts.pairs[name]
        x, a, b = (torch.ldexp(t.detach(), -exponents[name]).to(t.dtype) for t in (x, a, b))
        rows = torch.full((1,), float(len(x)), device=x.device, dtype=x.dtype)
        used = rows if mask is None else mask.sum().to(x.dtype).reshape(1)
        if mask is not None:
            a, b = (torch.where(mask.unsqueeze(1), t, 0) for t in (a, b))
        squares = torch.stack([x.square().sum(), (a - b).square().sum(), a.square().sum() + b.square().sum()])
        sums.append(torch.cat([rows, used, squares, x.sum(0), a.sum(0), b.sum(0)]).double())
        widths.append(x.shape[1])
    each = _dist.all_sum(torch.cat(sums), group).split([5 + 3 * d for d in widths])
    variance, square, agreement = [], [], {}
    for name, total, d in zip(parts.seen, each, widths, strict=True):
        rows, used, of_x, apart, of_pair = total[:5].unbind()
        mean, mean_a, mean_b = total[5:].view(3, d).unbind()
        rows, n = rows.clamp(min=1), used.clamp(min=1)
        size = of_x / rows / d
        # mean squares on a common scale, as the exponents of the spaces differ
        scale = torch.ldexp(torch.ones_like(size), 2 * exponents[name])
        square.append(size * scale)
        variance.append((size - (mean / rows).square().sum() / d).clamp(min=0) * scale)
        all_pairs = (of_pair / n - 2 * (mean_a * mean_b).sum() / n.square()).clamp(min=0)
        others = (n * all_pairs - apart / n) / (n - 1).clamp(min=1)
        differ = (n > 1) & (torch.minimum(all_pairs, others) > ROUNDING * of_pair / n)
        agreement[name] = torch.where(differ, 1 - apart / n / others.clamp(min=1e-300), 0).clamp(min=-1)
    base = torch.stack(square)
    if not on_sphere:
        base = torch.maximum(base, base.mean())
    shares = torch.stack(variance) / base.clamp(min=1e-300)
    return dict(zip(parts.seen, shares.unbind(), strict=True)), agreement


@torch.no_grad()
def overlaps(seen: Mapping[str, Matrix], group: ProcessGroup | None) -> dict[str, Scalar]:
    """ "content/color" -> similarity of two spaces, 0 to 1: linear CKA with the unbiased estimator.

    1 means equal up to rotation and scale, 0 uncorrelated. Uses the first 256 samples of each rank, averaged over
    ranks; NaN if no rank has four samples.

    Source: Kornblith et al., arXiv 1905.00414; Song et al., JMLR 13, 2012, equation 5.
    """
    names, any_space = list(itertools.combinations(seen, 2)), next(iter(seen.values()))
    if not names:
        return {}
    if len(any_space) >= 4:
        grams = {name: _gram(x) for name, x in seen.items()}
        own = {name: _hsic(k, k) for name, k in grams.items()}
        found = torch.stack(
            [
                _hsic(grams[s], grams[t]) / (own[s].clamp(min=0) * own[t].clamp(min=0)).sqrt().clamp(min=1e-12)
                for s, t in names
            ]
        ).clamp(0, 1)
        both = torch.stack([found, torch.ones_like(found)])
    else:
        both = torch.zeros(2, len(names), dtype=torch.float64, device=any_space.device)
    if group is not None:
        dist.all_reduce(both, group=group)
    return {f"{s}/{t}": value for (s, t), value in zip(names, (both[0] / both[1]).unbind(), strict=True)}


def _gram(x: Matrix) -> Tensor:
    """Inner products [n, n] of centered embeddings, with zero diagonal, scaled so that their squares sum to about 1."""
    x = x.detach()[:ROWS]
    x = x - x.mean(0)
    x = x / x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
    k = (x @ x.T).double().fill_diagonal_(0)
    return k / k.square().sum().sqrt().clamp(min=1e-300)


def _hsic(k: Tensor, g: Tensor) -> Tensor:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion, times n (n - 3); diagonals are 0."""
    n = len(k)
    rows, others = k.sum(0), g.sum(0)
    return (k * g).sum() + rows.sum() * others.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ others)
