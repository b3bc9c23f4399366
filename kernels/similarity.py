"""Log-sum-exp over the rows of all other images.

N rows z_i in R^D, image ids a_i, temperature tau, s_ij = <z_i, z_j> / tau:

    lse_i     = log sum_{j : a_j != a_i} exp(s_ij)
    dL/dz_i   = (1/tau) sum_{j : a_j != a_i} exp(s_ij) (c_i + c_j) z_j,     c_i = (dL/dlse_i) exp(-lse_i)
    dL/dtau   = -(1/(2 tau)) sum_i <z_i, dL/dz_i>

Legend: n local rows, N rows over all ranks, C rows of a block, E the levels (1, or 2 with `prefix`).
Source: Eastwood et al., arXiv 2311.08815, the entropy term; the derivation is in kernels/README.md.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ssd_addon import _checks, _dist
from ssd_addon.kernels.dispatch import checks_are_on, choose_backend, compute_dtype
from ssd_addon.kernels.streaming import Streaming, streaming_lse


def negative_lse(
    z: Tensor,
    image_ids: Tensor,
    temperature: float | Tensor,
    *,
    prefix: int | None = None,
    backend: str = "auto",
    group: Any = None,
    validate: bool | str = "auto",
    chunk: int | None = None,
) -> Tensor:
    """log sum over the rows of other images of exp(<z_i, z_j> / temperature), for every row i.

    >>> z = torch.eye(3)[:, :2]
    >>> negative_lse(z, torch.arange(3), 1.0).exp()
    tensor([2., 2., 2.])

    Args:
        z: [N, D] rows, float16 to float64; meant to be at most unit length, longer ones are summed with a running
            maximum. Strided and expanded tensors are fine.
        image_ids: [N] integers in any order: rows of equal id are left out of each other's sum.
        temperature: above 0; a float or a scalar tensor, which gets a gradient.
        prefix: d0. Also returns the log-sum over the first d0 columns alone: [N, 2], (columns :d0, all columns).
        backend: "auto", "eager", "streaming", "triton" (CUDA, float16 to float32; values to fp16's resolution of
            1/temperature times 2^-11 at worst, gradients to 3e-4 of their norm; kernels/README.md).
        group: None computes on the local rows; a process group gathers the rows of all ranks (ids are global), and
            backward assumes that gradients are averaged over ranks.
        validate: raise on NaN, infinities and rows without a negative; off, these rows come out as NaN, and with
            "triton" rows longer than 1 make everything NaN, as nothing is read back from the device.
        chunk: rows of a block of the streaming backend; None chooses by cache. Any value gives the same result
            to rounding.

    Returns:
        [N] (or [N, 2]) in max(float32, type of z); for a group the n local rows.

    Raises:
        TypeError, ValueError: wrong type, shape or device, temperature not above 0, prefix outside 1..D-1, no row
            of another image, NaN or infinity.
    """
    _check_arguments(z, image_ids, temperature, prefix)
    n, d = z.shape
    dtype = compute_dtype(z.dtype)
    if not isinstance(temperature, Tensor):
        _check_range(temperature, dtype)
    values = _values_header(z, image_ids, temperature) if checks_are_on(validate) else None
    shards, headers = _dist.shards(n, values or [], z.device, group)
    if values is not None:
        _check_values(headers, shards.total)
    # By the largest shard: every rank must come to the same choice, as the collectives of the backends differ.
    elements = max(shards.sizes) * shards.total
    name = choose_backend(backend, matrix_elements=elements, dtype=dtype, device=z.device, rows=shards.total, width=d)
    if name == "triton":
        bounds = (min(h[1] for h in headers), max(h[2] for h in headers)) if values is not None else None
        lse = _triton(z, image_ids, temperature, prefix or 0, bounds, shards)
        return lse[0] if prefix is None else lse.T
    with torch.autocast(z.device.type, enabled=False):
        rows = z.to(dtype)
        tau = _scalar(temperature, dtype, z.device)
        levels = ((0, d),) if prefix is None else ((0, prefix), (prefix, d))
        if name == "eager":
            lse = _eager(rows, image_ids, tau, levels, shards)
        elif torch.compiler.is_compiling() and shards.group is None:
            lse = streaming_lse(rows, tau, image_ids, prefix or 0, chunk or 0)
        else:
            lse = Streaming.apply(rows, tau, image_ids, levels, shards, chunk)
    return lse[:, 0] if prefix is None else lse


def _eager(z: Tensor, ids: Tensor, tau: Tensor, levels: tuple[tuple[int, int], ...], s: _dist.Shards) -> Tensor:
    """The truth: the matrix, its mask, its log-sum-exp. [n, E]"""
    every, every_id = _dist.gather(z, s), _dist.gather(ids, s)
    same = ids[:, None] == every_id[None, :]
    no_value = same.all(dim=1) | ~z.isfinite().all(dim=1)
    out = []
    for _, stop in levels:
        s_ij = z[:, :stop] @ every[:, :stop].T / tau
        lse = s_ij.masked_fill(same, -math.inf).logsumexp(dim=1)
        out.append(torch.where(no_value, math.nan, lse))
    return torch.stack(out, dim=1)


# ------------------------------------------------------------------------------------------------- triton

RESOLVED = 128.0
"""Products of fp16 rows are off by at most 2^-11 of R/tau: beyond this R/tau they are made of two fp16 parts."""


def _triton(
    z: Tensor,
    ids: Tensor,
    temperature: float | Tensor,
    prefix: int,
    id_bounds: tuple[int, int] | None,
    s: _dist.Shards,
) -> Tensor:
    """[E, n]. Without checks (no bounds of the ids) nothing is read back from the device, and rows longer than 1 make
    the result NaN."""
    from ssd_addon.kernels import fused

    tau = _scalar(temperature, torch.float32, z.device)
    with torch.autocast(z.device.type, enabled=False):
        if s.total < 2:
            return z.sum() * 0 + z.new_full((2 if prefix else 1, z.shape[0]), math.nan, dtype=torch.float32)
        limit = torch.iinfo(torch.int32)
        if ids.dtype.itemsize < 4 or (id_bounds and limit.min <= id_bounds[0] and id_bounds[1] <= limit.max):
            ids = ids.to(torch.int32)
        elif ids.dtype != torch.int32:
            ids = ids.to(torch.int64)
            ids = fused.relabelled(ids) if s.group is None else ids
        longest = _dist.maximum(fused.longest_row(z), s.group)
        # R/tau, which bounds |s|: known on the host where values are checked, or where the temperature is a number.
        bound: float | None = None
        if id_bounds:
            bound = longest.item() ** 2 / tau.item()
        else:
            longest = longest.masked_fill(~(longest <= 1.01), math.nan)
            if not isinstance(temperature, Tensor):
                bound = 1.01**2 / temperature
        maximum = bound is None or 2 * bound + math.log(s.total) > 2 * fused.EXPONENT
        exact = bound is not None and bound > RESOLVED
        if s.group is None:
            return fused.negative_lse(z, ids, tau, longest, prefix, maximum, exact)
        out: Tensor = fused.LseOverRanks.apply(z, ids, tau, longest, prefix, maximum, exact, s)
        return out


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


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-dim on the device; a number is written there by a kernel, not copied, which a graph could not capture."""
    if isinstance(value, Tensor):
        return value.to(device, dtype).reshape(())
    return torch.full((), value, dtype=dtype, device=device)


def _check_range(temperature: float, dtype: torch.dtype) -> None:
    smallest = 4 / torch.finfo(dtype).max
    if temperature < smallest:
        raise ValueError(
            f"temperature: expected at least {smallest:.1e}, below it the inverse overflows {dtype}: got {temperature}"
        )


_ID_LIMIT = 2**62
_NOT_FINITE, _FINE, _OVERFLOWS = range(3)


def _values_header(z: Tensor, ids: Tensor, temperature: float | Tensor) -> list[int]:
    """What every rank must know before anyone computes: are values finite, which ids are there."""
    tau = temperature
    if isinstance(temperature, Tensor):
        tau = temperature.item()
        _checks.positive(tau, "temperature", "it divides the cosine similarity")
        _check_range(tau, compute_dtype(z.dtype))
    if not z.shape[0]:
        return [_FINE, _ID_LIMIT, -_ID_LIMIT]
    state = _FINE
    if z.numel():
        extremes = torch.stack(z.aminmax()).double()  # NaN is both extremes then
        largest = extremes.abs().max().item()
        if not math.isfinite(largest):
            state = _NOT_FINITE
        elif largest**2 * z.shape[1] / tau > torch.finfo(compute_dtype(z.dtype)).max:
            state = _OVERFLOWS
    return [state, int(ids.min()), int(ids.max())]


def _check_values(headers: list[list[int]], total: int) -> None:
    if total < 2:
        raise ValueError(f"negative_lse: expected the rows of at least 2 images, a row needs a negative: got {total}")
    for state, message in (
        (_NOT_FINITE, "expected finite values: got NaN or infinity"),
        (_OVERFLOWS, "expected rows whose squared length over the temperature float32 can hold: got longer rows"),
    ):
        bad = [r for r, found in enumerate(h[0] for h in headers) if found == state]
        if bad:
            where = f" on rank {', '.join(map(str, bad))}" if len(headers) > 1 else ""
            raise ValueError(f"negative_lse, z: {message}{where}")
    highest = max(h[2] for h in headers)
    if min(h[1] for h in headers) == highest:
        raise ValueError(
            f"negative_lse: expected the rows of at least 2 images, so that each has a negative: all {total} rows "
            f"carry the image id {highest}"
        )
