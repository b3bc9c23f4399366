"""`Terms`: the parts of the loss, for logging and for dual ascent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ssd_addon import _dist
from ssd_addon._dist import Shards
from ssd_addon._shapes import Matrix, Scalar
from ssd_addon.kernels.covariance import off_diagonal_energy
from ssd_addon.losses.rows import Parts
from ssd_addon.losses.statistics import overlaps, spread_and_agreement


@dataclass
class Terms:
    """The parts of the loss. `.loss` carries the graph; all others are detached, and equal on every rank.

    Attributes:
        loss: scalar of this rank (see `JointEntropyLoss` about ranks).
        invariance: space -> raw term, before its weight and 1/S.
        entropy: entropy of the joint embedding, with its coefficients.
        content_entropy: the same for content alone, or None.
        constraint: space -> c_s, misalignment on a scale that starts at 0: 1 - mean cosine (simclr, mmcr), the mean
            squared difference (vicreg), the mean over coordinates of (c_kk - 1)^2 (barlow), the mean alignment of any
            other family.
        rows: space -> number of samples in its term, over all ranks; 0 if no sample served the space.
        effective_rank: space -> (tr C)^2 / tr(C^2) of the query's covariance, from 1 to d_s; 1 means collapse.
        spread: space -> how much its embeddings differ between images: the variance of the coordinates divided by the
            mean square, of this space or averaged over all spaces, whichever is larger. 0 means that all images have
            the same embedding.
        agreement: space -> 1 - E|a_i - b_i|^2 / E|a_i - b_j|^2 over its first pair of views, for different images i and
            j. 1 means that the pairs agree, 0 that they differ as much as different images.
        overlap: "content/color" -> linear CKA of two spaces' queries (first 256 samples of a rank, mean over ranks). 1
            means that one repeats the other.
        backend: the backend that computed the entropy.
        weights: space -> lambda_s of this loss, where weights adapt (`DualAscent`); {} for fixed weights.
    """

    loss: Tensor
    invariance: dict[str, Tensor]
    entropy: Tensor
    content_entropy: Tensor | None
    constraint: dict[str, Tensor]
    rows: dict[str, Tensor]
    effective_rank: dict[str, Tensor]
    spread: dict[str, Tensor]
    agreement: dict[str, Tensor]
    overlap: dict[str, Tensor]
    backend: str
    weights: dict[str, Tensor] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """Flat name -> float, for a logger: "loss", "entropy", "invariance/content", "effective_rank/content" ..."""
        out = self.tensors()
        numbers = torch.stack([t.double() for t in out.values()]).tolist()  # one read from the device
        return dict(zip(out, numbers, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """The values of `scalars` as detached tensors, without reading them from the device."""
        out = {"loss": self.loss.detach(), "entropy": self.entropy}
        if self.content_entropy is not None:
            out["content_entropy"] = self.content_entropy
        by_space = {
            "invariance": self.invariance,
            "constraint": self.constraint,
            "effective_rank": self.effective_rank,
            "spread": self.spread,
            "agreement": self.agreement,
            "overlap": self.overlap,
            "lambda": self.weights,
        }
        for key, values in by_space.items():
            out |= {f"{key}/{name}": value for name, value in values.items()}
        return out

    @classmethod
    def mean(cls, parts: Sequence["Terms"]) -> "Terms":
        """Combine the terms of several batches, such as those of an accumulated step.

        Invariances are averaged over samples, entropies over images. The loss is detached.
        """
        if len(parts) == 1:
            return parts[0]
        rows = {n: torch.stack([p.rows[n] for p in parts]) for n in parts[0].rows}
        total = torch.stack(list(rows.values())).sum(0)

        def over(values: Sequence[Tensor], weight: Tensor) -> Tensor:
            v, w = torch.stack([t.detach() for t in values]).double(), weight.double()
            return (torch.where(w > 0, v, 0) * w).sum() / w.sum().clamp(min=1)

        def by_space(field: str) -> dict[str, Tensor]:
            return {n: over([getattr(p, field)[n] for p in parts], rows[n]) for n in rows}

        content = [p.content_entropy for p in parts if p.content_entropy is not None]
        return cls(
            loss=over([p.loss for p in parts], total),
            invariance=by_space("invariance"),
            entropy=over([p.entropy for p in parts], total),
            content_entropy=over(content, total) if content else None,
            constraint=by_space("constraint"),
            rows={n: r.sum() for n, r in rows.items()},
            effective_rank=by_space("effective_rank"),
            spread=by_space("spread"),
            agreement=by_space("agreement"),
            overlap={k: over([p.overlap[k] for p in parts], total) for k in parts[0].overlap},
            backend=parts[-1].backend,
            weights=parts[-1].weights,
        )


def terms_of(loss: Tensor, parts: Parts, s: Shards, on_sphere: bool) -> Terms:
    """The terms averaged over ranks, equal on every rank. Collective."""
    group = s.group or _dist.default_group()
    names, device = list(parts.invariance), loss.device
    rows = torch.stack([torch.as_tensor(parts.rows[n], device=device) for n in names]).double()
    if s.group is None and group is not None:
        # Every rank has its own loss here: means over ranks are weighted by the numbers of samples.
        size = torch.full((), float(s.total), device=device, dtype=rows.dtype)
        weight, rows = rows, _dist.all_sum(rows.clone(), group)
    else:
        size, weight = torch.ones((), device=device, dtype=rows.dtype), torch.ones_like(rows)
    content = [] if parts.content_entropy is None else [parts.content_entropy]
    entropies = [parts.entropy, *content]
    invariance = _means([parts.invariance[n] for n in names], weight, group)
    constraint = _means([parts.constraint[n] for n in names], weight, group)
    entropy, *alone = _means(entropies, size.expand(len(entropies)), group)
    exponents = _exponents(parts.seen, group)
    spread, agreement = spread_and_agreement(parts, exponents, on_sphere, group)
    return Terms(
        loss=loss,
        invariance=dict(zip(names, invariance, strict=True)),
        entropy=entropy,
        content_entropy=alone[0] if alone else None,
        constraint=dict(zip(names, constraint, strict=True)),
        rows=dict(zip(names, rows.long(), strict=True)),
        effective_rank=_effective_ranks(parts.seen, exponents, group),
        spread=spread,
        agreement=agreement,
        overlap=overlaps(parts.seen, group),
        backend=parts.backend,
    )


def _means(values: list[Tensor], weight: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    """Weighted means over ranks of detached scalars, equal on every rank. Without a group, detached clones."""
    v = torch.stack([x.detach() for x in values])
    if group is not None:
        both = torch.stack([v.double() * weight, weight.double()])
        dist.all_reduce(both, group=group)
        v = torch.where(both[1] > 0, both[0] / both[1].clamp(min=1e-300), 0).to(v.dtype)
    return [x.clone() for x in v.unbind(0)]


def _exponents(seen: Mapping[str, Tensor], group: ProcessGroup | None) -> dict[str, Tensor]:
    """Space -> e such that entries are at most 2^e over all ranks."""
    tops = [x.detach().abs().amax() if x.numel() else x.new_zeros(()) for x in seen.values()]
    exponents = torch.frexp(_dist.maximum(torch.stack([t.double() for t in tops]), group))[1]
    return dict(zip(seen, exponents, strict=True))


def _effective_ranks(
    seen: Mapping[str, Tensor], exponents: Mapping[str, Tensor], group: ProcessGroup | None
) -> dict[str, Tensor]:
    """(tr C)^2 / tr(C^2) of every space over all ranks; entries are scaled to about 1, so fourth powers are finite."""
    return {n: _effective_rank(torch.ldexp(x.detach(), -exponents[n]).to(x.dtype), group) for n, x in seen.items()}


def _effective_rank(x: Matrix, group: ProcessGroup | None) -> Scalar:
    """(tr C)^2 / tr(C^2), the participation ratio of the covariance of x [B, d] over all ranks."""
    with torch.no_grad():
        total = torch.full((), float(x.shape[0]), device=x.device, dtype=x.dtype)
        x = x - _dist.all_sum(x.sum(dim=0), group) / _dist.all_sum(total, group)
        diagonal = _dist.all_sum(x.square().sum(dim=0), group)
        square = off_diagonal_energy(x, group=group) + diagonal.square().sum()
        return torch.where(square > 0, diagonal.sum().square() / square.clamp(min=torch.finfo(x.dtype).tiny), 0)
