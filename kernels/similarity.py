"""Log-sum-exp of similarities to the embeddings of all other images.

N rows z_i in R^D, image ids a_i, temperature tau, s_ij = <z_i, z_j> / tau:

    lse_i     = log sum_{j : a_j != a_i} exp(s_ij)
    dL/dz_i   = (1/tau) sum_{j : a_j != a_i} exp(s_ij) (c_i + c_j) z_j,     c_i = (dL/dlse_i) exp(-lse_i)
    dL/dtau   = -(1/(2 tau)) sum_i <z_i, dL/dz_i>

`negative_lse` checks its input, over all ranks; `log_sums` is the same for callers that have already done so.
Legend: n local rows, N rows over all ranks, D columns, E the levels (1, or 2 with `prefix`).
Source: Eastwood et al., arXiv 2311.08815, the entropy term; the derivation is in kernels/README.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ssd_addon import _checks, _dist
from ssd_addon._autocast import autocast_off, matmul
from ssd_addon._shapes import Matrix, Vector
from ssd_addon.kernels.choice import NEVER
from ssd_addon.kernels.dispatch import (
    Backend,
    Runnable,
    checks_are_on,
    choose_backend,
    compute_dtype,
    rows_for_triton,
)
from ssd_addon.kernels.operands import longest_row, relabeled
from ssd_addon.kernels.ranges import UNIT_ROW, constant_shift, largest_exponent, needs_two_parts
from ssd_addon.kernels.streaming import Levels, Streaming, streaming_lse


@dataclass(frozen=True)
class Known:
    """Facts about the rows of all ranks that the caller has checked, so that nothing is read from the device again.

    It must be the same on every rank, as the ranks choose their arithmetic by it. All rows must be finite.

    Attributes:
        longest: length of the longest row, or an upper bound; use 1.0 for L2-normalized rows, an error of 1 % is safe.
        temperature: value of the temperature, above 0.
        id_low, id_high: smallest and largest image id.
    """

    longest: float
    temperature: float
    id_low: int
    id_high: int

    @property
    def id_range(self) -> tuple[int, int]:
        return self.id_low, self.id_high


def negative_lse(
    z: Matrix,
    image_ids: Vector,
    temperature: float | Tensor,
    *,
    prefix: int | None = None,
    backend: Backend = "auto",
    group: ProcessGroup | None = None,
    validate: bool | Literal["auto"] = "auto",
    temperature_floor: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """log sum_j exp(<z_i, z_j> / temperature) over the rows j of other images, for every row i.

    >>> z = torch.eye(3)[:, :2]
    >>> negative_lse(z, torch.arange(3), 1.0).exp()
    tensor([2., 2., 2.])

    Args:
        z: [N, D] embeddings, float16 to float64; should have at most unit length, longer ones are summed with a running
            maximum. Strided and expanded tensors are allowed.
        image_ids: [N] integers in any order: rows with equal ids are left out of each other's sum.
        temperature: above 0; a float or a scalar tensor, which gets a gradient.
        prefix: d0. Also returns the log-sum over the first d0 columns: [N, 2], (columns :d0, all columns).
        backend: "auto", "eager", "streaming", "triton" (CUDA, float16 to float32; errors are at most fp16's resolution,
            2^-11 / temperature, in values, and 3e-4 of the norm in gradients; kernels/README.md).
        group: None uses the local rows; with a process group the rows of all ranks are gathered (ids are global), and
            backward assumes that gradients are averaged over ranks.
        validate: raise for NaN, infinity and rows without a negative, on all ranks alike; takes one read from the
            device. If off, such rows become NaN, and with "triton" a row longer than 1 makes everything NaN.
        temperature_floor: lower bound of a temperature that is a tensor. If its value is not read (validate=False,
            torch.compile, CUDA graphs), the triton backend can then use the faster form of its sums, as for a float;
            this needs 0.0134 or more at N = 32,768. A temperature below the floor raises or, if it is not read, makes
            everything NaN, with every backend.
        chunk: rows per block in the streaming backend; None chooses by cache size. The result is the same up to
            rounding.

    Returns:
        [N] (or [N, 2]) in max(float32, dtype of z); with a group, for the n local rows.

    Raises:
        TypeError, ValueError: dtype, shape or device is wrong; the temperature is not above 0 or differs between ranks;
            prefix is outside 1..D-1; there is no row of another image; z has NaN or infinity.
    """
    _check_arguments(z, image_ids, temperature, prefix)
    check_floor(temperature, temperature_floor)
    if not isinstance(temperature, Tensor):
        _check_range(temperature, compute_dtype(z.dtype))
    known = None
    rows, device = z.shape[0] * _dist.world_size(group), z.device
    here = rows_for_triton(backend, device, z.shape[1], came_as=z.dtype, prefix=prefix or 0, rows=rows)
    if checks_are_on(validate):
        shards, known, triton_from = _checked(z, image_ids, temperature, group, here)
        check_floor(known.temperature, temperature_floor)
    else:
        shards, headers = _dist.shards(z.shape[0], [here], device, group)
        triton_from = max(h[0] for h in headers)
    out = log_sums(
        z,
        image_ids,
        temperature,
        prefix=prefix,
        backend=backend,
        shards=shards,
        known=known,
        chunk=chunk,
        triton_from=triton_from,
        temperature_floor=temperature_floor,
    )
    return out.reshape(-1) if prefix is None else out


def log_sums(
    z: Matrix,
    image_ids: Vector,
    temperature: float | Tensor,
    *,
    prefix: int | None = None,
    backend: Backend = "auto",
    shards: _dist.Shards,
    known: Known | None,
    chunk: int | None = None,
    triton_from: int = NEVER,
    temperature_floor: float | None = None,
) -> Tensor:
    """`negative_lse` without its checks, [n, E], for callers that have checked the input and exchanged sizes.

    Args:
        z, image_ids, temperature, prefix, backend, chunk, temperature_floor: as in `negative_lse`; valid, and finite if
            `known` is given.
        shards: distribution of the rows over ranks.
        known: checked facts, with which nothing is read from the device. None if values were not checked or cannot be
            read: the streaming backend then reads the longest row and a temperature that is a tensor; triton reads
            nothing, and a row longer than 1 makes everything NaN.
        triton_from: `dispatch.rows_for_triton`, the largest over all ranks.
    """
    dtype = compute_dtype(z.dtype)
    bound = similarity_bound(temperature, known, temperature_floor)
    name = log_sums_backend(backend, shards, dtype=dtype, device=z.device, triton_from=triton_from, bound=bound)
    with autocast_off(z.device):
        if known is None and temperature_floor is not None and isinstance(temperature, Tensor):
            temperature = temperature.masked_fill(~(temperature >= temperature_floor), math.nan)
        if name == "triton":
            return _triton(z, image_ids, temperature, prefix or 0, shards, known, bound).T
        rows, tau = z.to(dtype), _scalar(temperature, dtype, z.device)
        levels = ((0, z.shape[1]),) if prefix is None else ((0, prefix), (prefix, z.shape[1]))
        if name == "eager":
            return _eager(rows, image_ids, tau, levels, shards, known)
        if torch.compiler.is_compiling() and shards.group is None:
            compiled: Tensor = streaming_lse(rows, tau, image_ids, prefix or 0, chunk or 0)
            return compiled
        number = None if isinstance(temperature, Tensor) else float(temperature)
        given = (number, None, None) if known is None else (known.temperature, known.longest, known.id_range)
        out: Tensor = Streaming.apply(rows, tau, image_ids, levels, shards, chunk, *given)
        return out


def log_sums_backend(
    backend: Backend,
    shards: _dist.Shards,
    *,
    dtype: torch.dtype,
    device: torch.device,
    triton_from: int = NEVER,
    bound: float | None = None,
) -> Runnable:
    """The backend of `log_sums`; the same on every rank of a group.

    Args:
        bound: bound of |s_ij|, if known; "auto" uses float32 if fp16 products are not precise enough for it.
    """
    # By the largest shard: all ranks must make the same choice, as the collectives of the backends differ.
    elements = max(shards.sizes) * shards.total
    return choose_backend(
        backend,
        matrix_elements=elements,
        dtype=dtype,
        device=device,
        rows=shards.total,
        triton_from=NEVER if needs_two_parts(bound) else triton_from,
    )


def similarity_bound(temperature: float | Tensor, known: Known | None, floor: float | None) -> float | None:
    """R/tau, the bound of |s_ij|, if the host has it; lengths that were not read are checked on the device."""
    if known is not None:
        return largest_exponent(known.longest * known.longest, known.temperature)
    least = floor if isinstance(temperature, Tensor) else temperature
    bound = None if least is None else largest_exponent(UNIT_ROW * UNIT_ROW, least)
    # A floor bounds the range but is not the temperature: it alone does not require two fp16 parts.
    return None if isinstance(temperature, Tensor) and needs_two_parts(bound) else bound


def _eager(z: Tensor, ids: Tensor, tau: Tensor, levels: Levels, s: _dist.Shards, known: Known | None) -> Tensor:
    """The reference: matrix, mask, log-sum-exp; [n, E]."""
    every, every_id = _dist.gather(z, s), _dist.gather(ids.to(torch.int64), s)
    same = ids[:, None] == every_id[None, :]
    out = []
    for _, stop in levels:
        s_ij = matmul(z[:, :stop], every[:, :stop].T) / tau
        out.append(s_ij.masked_fill(same, -math.inf).logsumexp(dim=1))
    lse = torch.stack(out, dim=1)
    if known is not None and known.id_low < known.id_high:  # rows are finite, and each has a negative
        return lse
    no_value = same.all(dim=1) | ~z.isfinite().all(dim=1)
    return torch.where(no_value[:, None], math.nan, lse)


def _triton(
    z: Tensor, ids: Tensor, temperature: float | Tensor, prefix: int, s: _dist.Shards, known: Known | None,
    bound: float | None,
) -> Tensor:  # fmt: skip
    """[E, n]"""
    from ssd_addon.kernels import operators

    if s.total < 2:
        return z.sum() * 0 + z.new_full((2 if prefix else 1, z.shape[0]), math.nan, dtype=torch.float32)
    tau = _scalar(temperature, torch.float32, z.device) if isinstance(temperature, Tensor) else None
    value = 0.0 if isinstance(temperature, Tensor) else temperature
    longest = None if known is not None else _dist.maximum(longest_row(z), s.group)
    ids = _narrow_ids(ids, s, known)
    maximum, exact = constant_shift(bound, s.total) is None, needs_two_parts(bound)
    given = (z, ids, tau, longest, value, known.longest if known is not None else 0.0, prefix, maximum, exact)
    if s.group is None:
        return operators.log_sums(*given)
    out: Tensor = operators.LseOverRanks.apply(*given, s)
    return out


def _narrow_ids(ids: Tensor, s: _dist.Shards, known: Known | None) -> Tensor:
    """Ids that fit in int32, renumbered if necessary; over ranks they are gathered in int64 and renumbered later."""
    limit = torch.iinfo(torch.int32)
    fit = ids.dtype.itemsize < 4 or ids.dtype == torch.int32
    fit = fit or (known is not None and limit.min <= known.id_low and known.id_high <= limit.max)
    if s.group is not None:
        return ids.to(torch.int32 if fit else torch.int64)
    return ids if fit else relabeled(ids)


# ------------------------------------------------------------------------------------------------- checks


def _check_arguments(z: Tensor, ids: Tensor, temperature: float | Tensor, prefix: int | None) -> None:
    _checks.floating(z, "negative_lse, z")
    if z.ndim != 2:
        raise ValueError(f"negative_lse, z: expected rows [N, D]: got {_checks.shape(z)}")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"negative_lse, image_ids: expected integers, one image id per row: got {kind}")
    if ids.shape != z.shape[:1]:
        raise ValueError(f"negative_lse, image_ids: expected one id per row, [{z.shape[0]}]: got {_checks.shape(ids)}")
    if ids.device != z.device:
        raise ValueError(f"negative_lse, image_ids: expected the device of z, {z.device}: got {ids.device}")
    if prefix is not None and not 0 < prefix < z.shape[1]:
        raise ValueError(
            f"negative_lse, prefix: expected 1 to {z.shape[1] - 1}, a part of the {z.shape[1]} columns: got {prefix}"
        )
    check_temperature(temperature)


def check_temperature(temperature: float | Tensor) -> None:
    if not isinstance(temperature, Tensor):
        _checks.positive(temperature, "temperature", "it divides the cosine similarity")
    elif temperature.numel() != 1 or not temperature.is_floating_point():
        raise ValueError(
            f"temperature: expected a number or a floating-point tensor of one element: got {temperature.dtype} "
            f"{_checks.shape(temperature)}"
        )


def check_floor(temperature: float | Tensor, floor: float | None) -> None:
    """Check that the floor is a number above 0, and that a temperature given as a number is not below it."""
    if floor is None:
        return
    _checks.positive(floor, "temperature_floor", "a lower bound of the temperature")
    if not isinstance(temperature, Tensor) and not temperature >= floor:
        raise ValueError(f"temperature: expected at least the temperature_floor, {floor:.6g}: got {temperature:.6g}")


def check_temperatures(taus: Sequence[float], dtype: torch.dtype) -> None:
    """Check the temperatures of all ranks, for arithmetic in a dtype: above 0, not too small, and equal."""
    for tau in taus:
        _checks.positive(tau, "temperature", "it divides the cosine similarity")
        _check_range(tau, dtype)
    if max(taus) > 1.0001 * min(taus):
        raise ValueError(
            f"temperature: expected the same on every rank: got {min(taus):.6g} to {max(taus):.6g}; average the "
            "gradient of a learned temperature over ranks, as DistributedDataParallel does"
        )


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-dim tensor on the device; a number is written by a kernel, as a CUDA graph cannot capture a copy."""
    if isinstance(value, Tensor):
        return value.to(device, dtype).reshape(())
    return torch.full((), value, dtype=dtype, device=device)


def _check_range(temperature: float, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    smallest = 4 / largest
    if temperature > largest:
        raise ValueError(
            f"temperature: expected at most {largest:.1e}, the largest number of {dtype}: got {temperature}"
        )
    if temperature < smallest:
        raise ValueError(
            f"temperature: expected at least {smallest:.1e}, so that its inverse fits in {dtype}: got {temperature}"
        )


def _checked(
    z: Tensor, ids: Tensor, temperature: float | Tensor, group: ProcessGroup | None, triton_from: int
) -> tuple[_dist.Shards, Known, int]:
    """Check the values of all ranks, with one read and one collective; every rank gets the same and decides alike.

    Ranks also exchange the number of rows from which they use triton; the largest is returned.
    """
    dtype, rows = compute_dtype(z.dtype), z.detach()
    kind = torch.promote_types(dtype, temperature.dtype) if isinstance(temperature, Tensor) else dtype
    found = [longest_row(rows).to(kind).reshape(1)]  # not finite if an entry is not, or if its square overflows
    if group is not None or isinstance(temperature, Tensor):
        found.append(_scalar(temperature, kind, z.device).detach().reshape(1))
    floats = map(_dist.to_bits, found)
    ends = ids.to(torch.int64).aminmax(dim=0, keepdim=True) if len(ids) else _no_ids(z.device)
    beside = [] if group is None else [torch.full((1,), triton_from, dtype=torch.int64, device=z.device)]
    shards, headers = _dist.shards(z.shape[0], torch.cat([*ends, *floats, *beside]), z.device, group)
    values = [_dist.from_bits(h[2 : 2 + len(found)], kind) for h in headers]
    triton_from = triton_from if group is None else max(h[-1] for h in headers)
    taus = [temperature] if not isinstance(temperature, Tensor) and group is None else [v[1] for v in values]
    check_temperatures(taus, dtype)
    if shards.total < 2:
        raise ValueError(
            f"negative_lse: expected at least 2 images, as every row needs a negative: got {shards.total} rows"
        )
    _check_lengths([v[0] for v in values], taus, rows, group)
    low, high = min(h[0] for h in headers), max(h[1] for h in headers)
    if low == high:
        raise ValueError(
            f"negative_lse: expected at least 2 images, so that each has a negative: got one, as all {shards.total} "
            f"rows carry the image id {high}"
        )
    return shards, Known(max(v[0] for v in values), min(taus), low, high), triton_from


def _no_ids(device: torch.device) -> tuple[Tensor, Tensor]:
    """The smallest and largest id of an empty shard: above all ids, and below all ids."""
    limit = torch.iinfo(torch.int64)
    return torch.full((1,), limit.max, device=device), torch.full((1,), limit.min, device=device)


def _check_lengths(longest: list[float], taus: list[float], rows: Tensor, group: ProcessGroup | None) -> None:
    """Check the longest row of every rank; `rows` of this rank are examined only to explain an error."""
    dtype = compute_dtype(rows.dtype)
    most = torch.finfo(dtype).max
    long = [r for r, (x, tau) in enumerate(zip(longest, taus, strict=True)) if not x * x / min(tau, 1.0) <= most]
    if not long:
        return
    states = _dist.exchange((~rows.isfinite()).any().long().reshape(1), group)
    infinite = [r for r, (broken,) in enumerate(states) if broken]
    if infinite:
        raise ValueError(f"negative_lse, z: expected finite values: got NaN or infinity{_on_ranks(infinite, longest)}")
    raise ValueError(
        "negative_lse, z: expected rows whose squared length over the temperature "
        f"{str(dtype).removeprefix('torch.')} can hold: got longer rows{_on_ranks(long, longest)}"
    )


def _on_ranks(bad: list[int], every: list[float]) -> str:
    return f" on rank {', '.join(map(str, bad))}" if len(every) > 1 else ""
