"""What every rank must know before anyone computes: one exchange over ranks, one read from the device."""

from collections.abc import Mapping
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
    """How the rows lie over ranks, and what was found of them.

    Attributes:
        shards: rows of every rank.
        ids: [V, B] image of each row, unique over ranks.
        known: what the checks found over all ranks, where values were checked.
        valid: scalar bool on the device where values were not checked: ids and index are usable.
        triton_from: from so many rows on every rank takes the triton backend where "auto" chooses.
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
    """Exchange sizes and ids, and refuse values that no family can work with: raised on all ranks alike.

    Args:
        z: embeddings whose shapes were checked.
        largest: space -> its largest allowed entry; None leaves out the checks on values.
        scalar: a number of the family's that is read along (a learned temperature).
        group: ranks that share the loss, or None.
        triton_from: this rank's `Header.triton_from`; ranks that chose apart would wait for each other's collectives.

    Raises:
        ValueError: NaN, infinity or too large an entry (names the space and the rank), an index outside the spaces,
            ids or an index that are not the batch's, fewer than two images.
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
    values = [] if largest is None else [_state(t, largest[n]) for n, t in z.items()]
    ids, index = _range(z.image_ids), _range(z.space_index)
    read = scalar.detach().double().reshape(()).view(torch.int64) if isinstance(scalar, Tensor) else None
    ints = torch.tensor([b, int(numbered) + 2 * triton_from], dtype=torch.int64, device=device)
    mine = torch.cat([ints, torch.stack([*ids, *index, *([] if read is None else [read]), *values]).to(device)])
    every = _dist.exchange(mine, group)
    shards = Shards(group, tuple(row[0] for row in every), _dist.rank(group))
    if largest is not None:
        states = [row[len(row) - len(values) :] for row in every]
        _check_states(tuple(z), states, largest, shards.world)
        lowest, highest = min(row[4] for row in every), max(row[5] for row in every)
        _check_unchanged({"image_ids": min(row[2] for row in every), "space_index": lowest})
        if z.space_index is not None and not (lowest >= 0 and highest < len(plan.spaces)):
            raise ValueError(
                f"space_index: expected 0 to {len(plan.spaces) - 1}, one of the {plan}: got a number outside"
            )
    _check_total(shards)
    ranges = [_ids_of(row) for row in every]
    local = all(row[1] % 2 or not row[0] or (row[2] >= 0 and row[3] < row[0]) for row in every)
    starts = [0] * len(every)
    if local and shards.world > 1:  # row numbers of the local batch on every rank: make them global
        for r in range(1, len(every)):
            starts[r] = starts[r - 1] + max(every[r - 1][0], ranges[r - 1][1] + 1)
    own = _row_numbers(v, b, device) if z.image_ids is None else z.image_ids
    if starts[shards.rank]:
        own = own + starts[shards.rank]
    known = None
    if largest is not None:
        present = [(low + s, high + s) for (low, high), s, row in zip(ranges, starts, every, strict=True) if row[0]]
        numbers = [_float_of(row[6]) for row in every] if isinstance(scalar, Tensor) else [scalar]
        known = Known(min(low for low, _ in present), max(high for _, high in present), tuple(numbers))
    valid = _valid(z, plan, device) if largest is None else None
    return Header(shards, own, known, valid, max(row[1] // 2 for row in every))


def _valid(z: Embeddings, plan: ViewPlan, device: torch.device) -> Tensor | None:
    """Whether ids and index can be used, on the device; None where there are none."""
    found = [] if z.image_ids is None else [(z.image_ids != CHANGED).all()]
    if z.space_index is not None:
        found.append(((z.space_index >= 0) & (z.space_index < len(plan.spaces))).all())
    return torch.stack([f.to(device) for f in found]).all() if found else None


def _check_unchanged(lowest: Mapping[str, int]) -> None:
    for what, value in lowest.items():
        if value == CHANGED:
            raise ValueError(
                f"{what}: expected those of the batch that the embeddings are of: got others. Either the batch given "
                "is not theirs, or a function of every tensor (tree_map) changed them; map over the embeddings alone, "
                "{name: f(t) for name, t in z.items()}, and give the loss the batch: criterion(z, batch)"
            )


def _row_numbers(v: int, b: int, device: torch.device) -> Tensor:
    return torch.arange(b, device=device).expand(v, b)


def _range(t: Tensor | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest of some integers, int64; (NO_ID, -1) where there is none."""
    if t is None or not t.numel():
        return torch.tensor(NO_ID), torch.tensor(-1)
    low, high = t.aminmax()
    return low.long(), high.long()


def _ids_of(row: list[int]) -> tuple[int, int]:
    """(smallest, largest) image id of a rank, before they are made global."""
    b, _, low, high = row[:4]
    return (0, b - 1) if low == NO_ID else (low, high)


def _state(t: Tensor, largest: float) -> Tensor:
    """FINE, NOT_FINITE or TOO_LARGE, 0-dim int64 on the device."""
    if not t.numel():
        return torch.tensor(FINE, device=t.device)
    low, high = t.detach().aminmax()
    top = torch.maximum(high, -low).double()  # NaN stays NaN
    state = torch.where(top <= largest, FINE, TOO_LARGE)
    return torch.where(top.isfinite(), state, NOT_FINITE)


def _float_of(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))


def _check_total(s: Shards) -> None:
    if s.total < 2:
        raise ValueError(
            f"expected at least 2 images in the batch, the entropy compares each with others: got {s.total}"
            + (" over all ranks" if s.world > 1 else "")
        )


def _check_states(names: tuple[str, ...], states: list[list[int]], largest: Mapping[str, float], world: int) -> None:
    for rank, found in enumerate(states):
        where = f" on rank {rank}" if world > 1 else ""
        broken = [n for n, state in zip(names, found, strict=True) if state == NOT_FINITE]
        if broken:
            raise _checks.Diverged(
                f"embeddings: expected finite numbers: got NaN or infinity in the space {_checks.names(broken)}{where}"
                "; a diverged step or an overflow in half precision are the usual causes",
                broken,
            )
        huge = [n for n, state in zip(names, found, strict=True) if state == TOO_LARGE]
        if huge:
            limit = min(largest[n] for n in huge)
            raise _checks.Diverged(
                f"embeddings: expected numbers up to {limit:.1e}, whose squares the loss can sum: got larger ones in "
                f"the space {_checks.names(huge)}{where}; the run has diverged",
                huge,
            )
