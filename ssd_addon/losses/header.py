"""Exchanges sizes, ids and checks between ranks before the loss is computed: one collective, one device read."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ssd_addon import _checks, _dist
from ssd_addon._dist import Shards
from ssd_addon._pytree import CHANGED
from ssd_addon.embeddings import Embeddings
from ssd_addon.kernels.choice import NEVER
from ssd_addon.losses.rows import Known
from ssd_addon.plan import ViewPlan

FINE, NOT_FINITE, TOO_LARGE = range(3)
NO_ID = 2**62


@dataclass(frozen=True)
class Header:
    """The distribution of the samples over ranks, and the results of the checks.

    Attributes:
        shards: number of samples on every rank.
        ids: [V, B] image of each sample, unique over ranks.
        known: results of the checks over all ranks, if values were checked.
        valid: scalar bool on the device, if values were not checked: whether ids and index can be used.
        triton_from: number of samples from which backend "auto" uses triton on every rank.
    """

    shards: Shards
    ids: Tensor
    known: Known | None
    valid: Tensor | None = None
    triton_from: int = NEVER


def checked(
    z: Embeddings,
    plan: ViewPlan,
    largest: Mapping[str, float] | None,
    scalar: float | Tensor,
    group: ProcessGroup | None,
    triton_from: int = NEVER,
) -> Header:
    """Exchange sizes and ids, and refuse values that no family can use; errors are raised on all ranks alike.

    Args:
        z: embeddings whose shapes were checked.
        largest: space -> its largest allowed entry; None skips the checks on values.
        scalar: a number of the family that is read from the device at the same time (a learned temperature).
        group: ranks that share the loss, or None.
        triton_from: this rank's `Header.triton_from`; the ranks agree on one, as different choices would deadlock.

    Raises:
        ValueError: an entry is NaN, infinite or too large (the message names the space and the rank); an index is
            outside the spaces; ids or index differ from the batch's; there are fewer than two images.
    """
    first = next(iter(z.values()))
    (v, b), device = first.shape[:2], first.device
    if largest is None and group is None:
        shards = Shards(None, (b,), 0)
        _check_total(shards)
        valid = _valid(z, plan, device)
        own = _row_numbers(v, b, device) if z.image_ids is None else z.image_ids
        return Header(shards, own, None, valid, triton_from)
    numbered = z.image_ids is None or z.local_ids
    read = [scalar.detach().double().reshape(1).view(torch.int64)] if isinstance(scalar, Tensor) else []
    values = [] if largest is None else _ends(list(z.values()))
    host = [b, int(numbered) + 2 * triton_from]
    every = _exchanged([*host, *_range(z.image_ids), *_range(z.space_index), *read, *values], device, group)
    shards = Shards(group, tuple(row[0] for row in every), _dist.rank(group))
    if largest is not None:
        ends = [_dist.from_bits(row[len(row) - 2 * len(z) :], torch.float64) for row in every]
        _check_states(tuple(z), [_states(e, list(z), largest) for e in ends], largest, shards.world)
        lowest, highest = min(row[4] for row in every), max(row[5] for row in every)
        _check_unchanged({"image_ids": min(row[2] for row in every), "space_index": lowest})
        if z.space_index is not None and not (lowest >= 0 and highest < len(plan.spaces)):
            raise ValueError(f"space_index: expected 0 to {len(plan.spaces) - 1}, for {plan}: got a number outside")
    _check_total(shards)
    ranges = [_ids_of(row) for row in every]
    local = all(row[1] % 2 or not row[0] or (row[2] >= 0 and row[3] < row[0]) for row in every)
    starts = [0] * len(every)
    if local and shards.world > 1:  # positions in the local batch: make them global
        for r in range(1, len(every)):
            starts[r] = starts[r - 1] + max(every[r - 1][0], ranges[r - 1][1] + 1)
    own = _row_numbers(v, b, device) if z.image_ids is None else z.image_ids
    if starts[shards.rank]:
        own = own + starts[shards.rank]
    known = None
    if largest is not None:
        present = [(low + s, high + s) for (low, high), s, row in zip(ranges, starts, every, strict=True) if row[0]]
        found = [_dist.from_bits(row[6:7], torch.float64)[0] for row in every]
        numbers = found if isinstance(scalar, Tensor) else [scalar]
        known = Known(min(low for low, _ in present), max(high for _, high in present), tuple(numbers))
    valid = _valid(z, plan, device) if largest is None else None
    return Header(shards, own, known, valid, max(row[1] // 2 for row in every))


def _valid(z: Embeddings, plan: ViewPlan, device: torch.device) -> Tensor | None:
    """Whether ids and index can be used, as a tensor on the device; None if there are none."""
    found = [] if z.image_ids is None else [(z.image_ids != CHANGED).all()]
    if z.space_index is not None:
        found.append(((z.space_index >= 0) & (z.space_index < len(plan.spaces))).all())
    return torch.stack([f.to(device) for f in found]).all() if found else None


def _check_unchanged(lowest: Mapping[str, int]) -> None:
    for what, value in lowest.items():
        if value == CHANGED:
            raise ValueError(
                f"{what}: expected those of the batch of the embeddings: got others. Either the batch belongs to other "
                "embeddings, or a function that was mapped over every tensor (tree_map) changed them; map over the "
                "embeddings alone, {name: f(t) for name, t in z.items()}, and pass the batch: criterion(z, batch)"
            )


def _row_numbers(v: int, b: int, device: torch.device) -> Tensor:
    return torch.arange(b, device=device).expand(v, b)


def _exchanged(items: Sequence[int | Tensor], device: torch.device, group: ProcessGroup | None) -> list[list[int]]:
    """Collect host numbers and int64 device tensors [k] in one list per rank, with one read and one collective."""
    if group is not None:
        tensors = [i.to(device) if isinstance(i, Tensor) else torch.tensor([i], device=device) for i in items]
        return _dist.exchange(torch.cat(tensors), group)
    tensors = [i.to(device) for i in items if isinstance(i, Tensor)]
    read = iter(_dist.exchange(torch.cat(tensors) if len(tensors) > 1 else tensors[0], None)[0] if tensors else ())
    return [[n for i in items for n in (itertools.islice(read, len(i)) if isinstance(i, Tensor) else (i,))]]


def _range(t: Tensor | None) -> Sequence[int | Tensor]:
    """Smallest and largest of some integers; (NO_ID, -1) if there are none."""
    if t is None or not t.numel():
        return NO_ID, -1
    return [end.to(torch.int64) for end in t.flatten().aminmax(dim=0, keepdim=True)]


def _ends(spaces: Sequence[Tensor]) -> list[int | Tensor]:
    """Smallest and largest entry of every space, as the bits of float64; both are NaN if any entry is."""
    if not spaces[0].numel():
        return [0] * (2 * len(spaces))
    ends = [end for t in spaces for end in t.detach().aminmax()]
    return [torch.stack(ends).double().view(torch.int64)]


def _states(ends: Sequence[float], names: Sequence[str], largest: Mapping[str, float]) -> list[int]:
    """FINE, NOT_FINITE or TOO_LARGE for each space."""
    out = []
    for name, low, high in zip(names, ends[::2], ends[1::2], strict=True):
        finite = math.isfinite(low) and math.isfinite(high)
        out.append(NOT_FINITE if not finite else FINE if max(high, -low) <= largest[name] else TOO_LARGE)
    return out


def _ids_of(row: list[int]) -> tuple[int, int]:
    """(smallest, largest) image id of a rank, before ids are made global."""
    b, _, low, high = row[:4]
    return (0, b - 1) if low == NO_ID else (low, high)


def _check_total(s: Shards) -> None:
    if s.total < 2:
        raise ValueError(
            f"embeddings: expected at least 2 images in the batch, as the entropy compares images: got {s.total}"
            + (" over all ranks" if s.world > 1 else "")
        )


def _check_states(names: tuple[str, ...], states: list[list[int]], largest: Mapping[str, float], world: int) -> None:
    for rank, found in enumerate(states):
        where = f" on rank {rank}" if world > 1 else ""
        broken = [n for n, state in zip(names, found, strict=True) if state == NOT_FINITE]
        if broken:
            raise _checks.Diverged(
                f"embeddings: expected finite numbers: got NaN or infinity in the space {_checks.names(broken)}{where}"
                "; usual causes are a diverged training step or an overflow in half precision",
                broken,
            )
        huge = [n for n, state in zip(names, found, strict=True) if state == TOO_LARGE]
        if huge:
            limit = min(largest[n] for n in huge)
            raise _checks.Diverged(
                f"embeddings: expected numbers up to {limit:.1e}, so that the loss can sum their squares: got larger "
                f"ones in the space {_checks.names(huge)}{where}; the run has diverged",
                huge,
            )
