"""Independence: penalizes statistical dependence, linear or not, between spaces.

    L = weight * mean over pairs of spaces s < t of  |F_s' F_t|^2 / (|F_s' F_s| |F_t' F_t|)

F_s [V N, K] are random Fourier features cos(w' u_s + phase) of the embeddings u_s of space s, centered over all views
of all images; |.| is the Frobenius norm. This is centered kernel alignment with a Gaussian kernel in a finite basis: 0
for independent spaces, 1 for identical ones, and slightly above 0 by chance if there are few samples. The joint entropy
alone does not prevent a style space with spare dimensions from encoding some of the content. This term does, at the
cost of some of the information in the spaces. Use a low weight; measurements are in docs/results.md.

Legend: V views, B images (N over all ranks), S spaces, d_s width of space s, K features of each space.
"""

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ssd_addon import _checks, _dist
from ssd_addon._shapes import Matrix, Scalar
from ssd_addon._types import KeepsType
from ssd_addon.losses.families import FamilyName, resolve_family
from ssd_addon.losses.objective import Objective

BANDWIDTHS = (0.5, 1.0)
"""Widths of the Gaussian kernels, each with half of the features; unrelated samples are about sqrt(2) apart."""
TINY = 1e-12


class IndependenceLoss(KeepsType):
    """Independence term to add to the loss: `loss = criterion(z) + independence(z)`.

    >>> independence = IndependenceLoss({"content": 4, "color": 2}, weight=1.0)
    >>> content = torch.randn(2, 200, 4, generator=torch.Generator().manual_seed(0))
    >>> independence({"content": content, "color": content[..., :2]}) > 0.3
    tensor(True)
    >>> other = torch.randn(2, 200, 2, generator=torch.Generator().manual_seed(1))
    >>> independence({"content": content, "color": other}) < 0.1
    tensor(True)

    Args:
        spaces: name -> width, as in `StyleHeads.spaces`; two or more.
        family: the criterion's family, a name or a `losses.Family`. If it compares spaces on a sphere (simclr),
            embeddings are L2-normalized; otherwise every column is standardized over all samples and divided by
            sqrt(d_s).
        weight: weight of the term, which is a mean over pairs of spaces and lies in [0, 1].
        features: K, the number of random features of every space.
        seed: seed of the features, which are fixed.
        gather_distributed: use the samples of all ranks of the default process group, as in `JointEntropyLoss`; every
            rank then has the one-process value. Otherwise every rank uses its own samples.

    The module has no parameters; its buffers define the random features.

    Raises:
        ValueError: there are fewer than two spaces; a count is below 1; the weight is negative; when called: a space is
            missing or has another width, or there are fewer than two samples.
        TypeError: spaces is not a mapping.

    Source: the Hilbert-Schmidt independence criterion (Gretton et al. 2005), normalized as in Cortes et al. 2012,
    arXiv 1203.0550, with random Fourier features (Rahimi and Recht 2007).
    """

    def __init__(
        self,
        spaces: Mapping[str, int],
        *,
        family: FamilyName | Objective = "simclr",
        weight: float = 1.0,
        features: int = 256,
        seed: int = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.directions_0: Tensor
        if not isinstance(spaces, Mapping):
            raise TypeError(
                f"spaces: expected a mapping name -> width, as StyleHeads.spaces: got {type(spaces).__name__}"
            )
        self.widths = {n: _checks.width(d, f"width of space {n!r}") for n, d in spaces.items()}
        if len(self.widths) < 2:
            raise ValueError(f"spaces: expected two or more: got {_checks.names(spaces)}")
        self.weight = _checks.not_negative(weight, "weight", "of this term")
        self.on_sphere = resolve_family(family).on_sphere
        self.gather_distributed = bool(gather_distributed)
        k = _checks.count(features, "features", least=1)
        g = torch.Generator().manual_seed(_checks.count(seed, "seed"))
        bandwidth = torch.tensor(BANDWIDTHS).repeat_interleave(math.ceil(k / 2))[:k]
        for i, d in enumerate(self.widths.values()):
            self.register_buffer(f"directions_{i}", torch.randn(d, k, generator=g) / bandwidth)
            self.register_buffer(f"phases_{i}", 2 * math.pi * torch.rand(k, generator=g))

    if TYPE_CHECKING:

        def __call__(self, z: Mapping[str, Tensor]) -> Tensor: ...

    def forward(self, z: Mapping[str, Tensor]) -> Scalar:
        """The term, a scalar; z maps names to embeddings [V, B, d]."""
        return self.weight * torch.stack(list(self.terms(z).values())).mean()

    def terms(self, z: Mapping[str, Tensor]) -> dict[tuple[str, str], Scalar]:
        """Pair of spaces -> their dependence, in [0, 1], before the weight."""
        with torch.autocast(self.directions_0.device.type, enabled=False):
            features = {n: self._features(i, n, z) for i, n in enumerate(self.widths)}
            own = {n: _overlap(f, f).sqrt() for n, f in features.items()}
            pairs = itertools.combinations(features, 2)
            return {(s, t): _overlap(features[s], features[t]) / (own[s] * own[t]).clamp(min=TINY) for s, t in pairs}

    def _features(self, i: int, name: str, z: Mapping[str, Tensor]) -> Matrix:
        t = z.get(name)
        if t is None:
            raise ValueError(f"embeddings: expected the space {name!r}: got {_checks.names(z)}")
        if t.ndim != 3 or t.shape[2] != self.widths[name]:
            raise ValueError(
                f"embeddings, {name!r}: expected [V, B, {self.widths[name]}], the views of a batch: got "
                f"{_checks.shape(t)}"
            )
        directions: Tensor = getattr(self, f"directions_{i}")
        phases: Tensor = getattr(self, f"phases_{i}")
        views = len(t)
        rows = t.to(directions.dtype).transpose(0, 1).flatten(1)  # [B, V d]: keeps an image's views together
        group = _dist.default_group() if self.gather_distributed else None
        if group is not None:
            shards, _ = _dist.shards(len(rows), [], t.device, group)
            rows = _dist.gather(rows, shards)
        rows = rows.unflatten(1, (views, -1)).flatten(0, 1)
        if len(rows) < 2:
            raise ValueError(f"embeddings, {name!r}: expected two or more samples over all views: got {len(rows)}")
        if self.on_sphere:
            rows = nn.functional.normalize(rows, dim=1)
        else:
            rows = rows - rows.mean(0)
            rows = rows / (rows.square().mean(0) * rows.shape[1]).clamp(min=TINY).sqrt()
        f = torch.cos(rows @ directions + phases)
        return f - f.mean(0)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, spaces={_checks.names(self.widths)}"


def _overlap(a: Matrix, b: Matrix) -> Scalar:
    """|a' b|^2, computed with the smaller of two intermediate matrices."""
    if len(a) < a.shape[1]:
        return ((a @ a.T) * (b @ b.T)).sum()
    return (a.T @ b).square().sum()
