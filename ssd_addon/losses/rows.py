"""The samples that a pair uses and that trimming keeps, and the containers that the loss passes to a family.

A row is one sample of the batch, in all views. Legend: V views, B images (N = B over all ranks), S spaces, d_s width of
space s. Over W ranks every mean is a local sum * W / N, whose mean over ranks is the one-process mean.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssd_addon import _dist
from ssd_addon._dist import Shards
from ssd_addon._shapes import Scalar, Vector
from ssd_addon.embeddings import Embeddings
from ssd_addon.kernels.choice import NEVER
from ssd_addon.kernels.dispatch import Backend
from ssd_addon.plan import ViewPlan


@dataclass(frozen=True)
class Pair:
    """One positive pair of views (a, b) and a mask [B] of the local rows that use it; None means all."""

    a: int
    b: int
    mask: Tensor | None = None


@dataclass(frozen=True)
class Known:
    """Results of the checks, from all ranks.

    Attributes:
        id_low, id_high: smallest and largest image id.
        numbers: the family's own number, such as a learned temperature, on each rank.
    """

    id_low: int
    id_high: int
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class Rows:
    """Embeddings with everything else that a family needs to compute its terms.

    Attributes:
        z: space -> [V, B, d] in the dtype in which the loss is computed, in the order of the plan.
        pairs: space -> its positive pairs.
        ids: [V, B] image of each row, unique over ranks.
        shards: distribution of the rows over ranks.
        backend: the requested backend.
        trim: fraction of the worst-aligned rows of a pair that its invariance leaves out.
        content_entropy: whether the entropy of content alone is wanted too.
        types: space -> original dtype.
        known: results of the checks over all ranks, if values were checked.
        triton_from: number of rows from which backend "auto" uses triton on every rank.
    """

    z: Mapping[str, Tensor]
    pairs: Mapping[str, Sequence[Pair]]
    ids: Tensor
    shards: Shards
    backend: Backend = "auto"
    trim: float = 0.0
    content_entropy: bool = False
    types: Mapping[str, torch.dtype] = field(default_factory=dict)
    known: Known | None = None
    triton_from: int = NEVER


@dataclass
class Parts:
    """The terms that a family computes; scalars of this rank.

    Attributes:
        invariance: space -> raw term.
        constraint: space -> misalignment on a scale that starts at 0.
        rows: space -> number of rows in its term, over all ranks.
        entropy: entropy of the joint embedding, with its coefficients.
        content_entropy: the same for content alone, or None.
        seen: space -> the query's embeddings [B, d] in the form that the family compares.
        backend: the backend that computed the entropy.
        pairs: space -> its first pair (a [B, d], b [B, d], mask of the rows that use it or None), in the same form.
    """

    invariance: dict[str, Tensor]
    constraint: dict[str, Tensor]
    rows: dict[str, int | Tensor]
    entropy: Tensor
    content_entropy: Tensor | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)
    backend: str = "eager"
    pairs: dict[str, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)


def pairs_of(z: Embeddings, plan: ViewPlan, batch: int, device: torch.device, content_keys: str) -> dict[str, list[Pair]]:  # fmt: skip  # noqa: E501
    """Space -> its positive pairs. Content has several with content_keys="all", every other space has one."""
    ids = z.image_ids
    same = [None if ids is None else ids[v] == ids[0] for v in range(plan.num_views)]
    if plan.kind == "interleaved":
        index = plan.default_space_index(batch, device) if z.space_index is None else z.space_index
        out = {name: [Pair(0, 1, index == s)] for s, name in enumerate(plan.spaces)}
        if content_keys == "all":
            out["content"] = [Pair(0, 1, same[1])]
        return out
    out = {name: [Pair(a, b) for a, b in each] for name, each in plan.view_pairs.items()}
    if content_keys == "all" and plan.kind == "pairs":
        raise ValueError(f"content_keys: expected 'first', as {plan} defines the pairs of content: got 'all'")
    if content_keys == "all":
        out["content"] = [Pair(0, v, same[v]) for v in range(1, plan.num_views)]
    return out


def kept_rows(
    badness: Callable[[], Tensor], mask: Vector | None, trim: float, s: Shards
) -> tuple[Vector | None, int | Scalar]:
    """The local rows of a pair that remain when its floor(trim * n + 1e-9) worst rows over all ranks are left out.

    Args:
        badness: returns [B], larger is worse; not differentiated, and not called if nothing is trimmed.
        mask: [B] bool, the rows that the pair uses, or None for all.

    Returns:
        The kept rows ([B] bool, None for all) and their number over all ranks.
    """
    if mask is None and not trim:
        return None, s.total
    if not trim and mask is not None:
        return mask, _dist.all_sum(mask.sum(), s.group)
    with torch.no_grad():
        worst = badness()
    used = torch.ones_like(worst, dtype=torch.bool) if mask is None else mask
    n: Tensor = _dist.all_sum(used.sum(), s.group)
    drop = torch.floor(trim * n.double() + 1e-9)
    ranked = _dist.gather(worst.masked_fill(~used, -math.inf), s)
    place = torch.empty_like(ranked, dtype=torch.int64)
    order = ranked.argsort(descending=True, stable=True)
    place[order] = torch.arange(len(ranked), device=ranked.device)
    kept = used & (place[s.offset : s.offset + s.size] >= drop)
    return kept, (n - drop).to(n.dtype)


def masked(t: Tensor, mask: Tensor | None) -> Tensor:
    """Set rows outside the mask to 0 (by selection, not multiplication, so that NaN is removed too)."""
    return t if mask is None else torch.where(mask.view(-1, *[1] * (t.ndim - 1)), t, 0)


def mean_of_rows(
    values: Vector, badness: Callable[[], Tensor], pair: Pair, trim: float, s: Shards
) -> tuple[Scalar, int | Scalar]:
    """Mean of values [B] over the rows that the pair keeps, over all ranks, and the number of these rows."""
    keep, n = kept_rows(badness, pair.mask, trim, s)
    return s.mean(masked(values, keep).sum(), n), n


def mean_over_keys(found: Sequence[tuple[Tensor, int | Tensor]], s: Shards) -> tuple[Scalar, int | Scalar]:
    """The mean over those pairs of a space that have a row, and the total number of rows."""
    if len(found) == 1:
        return found[0]
    values = torch.stack([value for value, _ in found])
    n = torch.stack([c if isinstance(c, Tensor) else torch.full((), c, device=values.device) for _, c in found])
    present = n > 0
    mean = torch.where(present, values, 0).sum() / present.sum().clamp(min=1)
    return mean, n.sum()


def columns_of(z: Mapping[str, Tensor]) -> dict[str, slice]:
    """Space -> its columns in the joint embedding."""
    out, start = {}, 0
    for name, t in z.items():
        out[name] = slice(start, start + t.shape[-1])
        start += t.shape[-1]
    return out
