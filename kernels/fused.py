"""The "triton" backend: `tiles` launched over strips and block pairs, as torch.library operators.

    ssd_addon::negative_lse            local, differentiable in z and temperature
    ssd_addon::lse_rows, lse_rows_grad the same for n of N rows: what a rank of a group does between its collectives

`energy` does the same for the covariances, with the operands of this file.
Legend: n local rows, N rows over all ranks, E levels (1, or 2 with a prefix), D columns. Rows inside are fp16 and at
most UNIT long, so that their small columns keep their digits; "exact" rows stay float32 and are split into two fp16
parts stacked along K (three products, the fourth is below float32's resolution).
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ssd_addon import _dist
from ssd_addon.kernels import table, tiles
from ssd_addon.kernels.table import Configuration

LOG2E = math.log2(math.e)
EXPONENT = 80.0
UNIT = 256.0
"""Length of the longest row inside: a column of 1 / UNIT of its average is still a normal fp16 number at D = 65536."""

W_SCALE = 2.0**14
"""|W| <= 2 per level, and fp16 ends at 65504."""

STRIP_ELEMENTS = 2**23
"""Partial sums of a strip: slots x rows, so 32 MiB; twice that with the columns behind it."""

INTERPRETED = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run there, or None."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"it needs compute capability 8.0 or higher, and {device} has {major}.{minor}"
    if device.type == "cpu" and INTERPRETED:
        return None
    return f"it needs a CUDA device, or TRITON_INTERPRET=1 in the environment on a CPU: the rows are on {str(device)!r}"


# ------------------------------------------------------------------------------------------------ operands


def _stack(x: Tensor, levels: list[tuple[int, int]], block: int, second: bool) -> tuple[Tensor, list[int]]:
    """The operand [n, K] in fp16, each level padded to whole K blocks, and where each level ends.

    float32 rows are split: [high, high, low] along K, and [high, low, high] for the other side (`second`).
    """
    exact = x.dtype == torch.float32
    if not exact and len(levels) == 1 and x.shape[1] % block == 0 and x.is_contiguous():
        return x, [x.shape[1]]
    widths = [(3 if exact else 1) * (stop - start) for start, stop in levels]
    ends, k = [], 0
    for w in widths:
        k += _up(w, block)
        ends.append(k)
    out = x.new_zeros((x.shape[0], k), dtype=torch.float16)
    k = 0
    for (start, stop), end in zip(levels, ends, strict=True):
        part = x[:, start:stop]
        if exact:
            high = part.to(torch.float16)
            low = (part - high.float()).to(torch.float16)
            part = torch.cat([high, low, high] if second else [high, high, low], dim=1)
        out[:, k : k + part.shape[1]] = part
        k = end
    return out, ends


class _Operand:
    """Rows with their ids, as the kernels read them."""

    def __init__(self, x: Tensor, ids: Tensor, levels: list[tuple[int, int]], c: Configuration, second: bool) -> None:
        self.n = x.shape[0]
        self.x, self.ends = _stack(x, levels, c.block_k, second)
        self.ids = ids.contiguous()
        tiles_m = -(-self.n // c.block_m)
        # Smallest and largest id per tile of rows; a column tile may reach one tile further.
        place = torch.arange((tiles_m + c.block_n // c.block_m) * c.block_m, device=x.device).clamp_(max=self.n - 1)
        bounds = self.ids[place].view(-1, c.block_m)
        self.low, self.high = bounds.amin(dim=1), bounds.amax(dim=1)

    def pointer(self, c: Configuration, rows: int, start: int = 0, stop: int | None = None) -> Any:
        x = self.x[start:stop]
        if not c.descriptor:
            return x
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(x, [rows, c.block_k])


def _device(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else torch.autograd.profiler.record_function("ssd_addon::tiles")


def _configuration(x: Tensor, mode: str) -> Configuration:
    return table.configuration(table.architecture(x.device), mode, x.shape[1])


def _levels(prefix: int, d: int) -> list[tuple[int, int]]:
    return [(0, prefix), (prefix, d)] if prefix else [(0, d)]


# ------------------------------------------------------------------------------------------------ log-sums


def sums(x: Tensor, every: Tensor | None, ids: Tensor, every_ids: Tensor, scale: Tensor, shift: Tensor, prefix: int,
         maximum: bool) -> Tensor:  # fmt: skip
    """log2 of the sums over the other images' rows, [E, n], NaN where there is none.

    Args:
        x: [n, D] rows, fp16 or (exact) float32, at most UNIT long.
        every: [N, D] all rows; None means x, and only the upper triangle is computed.
        ids, every_ids: [n], [N] integers.
        scale: 0-dim float32, times <x_i, x_j> it is s_ij / log 2.
        shift: 0-dim float32, subtracted from s_ij / log 2 (read only without `maximum`).
        prefix: 0, or columns of the first level.
        maximum: take the maximum of each tile's rows instead of the shift.
    """
    symmetric = every is None
    n, d = x.shape
    levels = _levels(prefix, d)
    c = _configuration(x, ("sums_two" if prefix else "sums") + ("_maximum" if maximum else ""))
    a = _Operand(x, ids, levels, c, second=False)
    if symmetric:
        b = a if x.dtype == torch.float16 else _Operand(x, ids, levels, c, second=True)
    else:
        assert every is not None
        b = _Operand(every, every_ids, levels, c, second=True)
    e, unit = len(levels), c.block_n // c.block_m
    tiles_m, tiles_n = triton.cdiv(n, c.block_m), triton.cdiv(b.n, c.block_n)
    strip = max(STRIP_ELEMENTS // max(b.n * e, 1) // unit, 1) * unit
    top = x.new_full((e, n), -math.inf, dtype=torch.float32)
    total = x.new_zeros((e, n), dtype=torch.float32)

    def add(rows: slice, part: Tensor, part_top: Tensor | None) -> None:
        if part_top is None:
            total[:, rows] += part.sum(dim=1)
            return
        new = torch.maximum(top[:, rows], part_top.amax(dim=1))
        safe = new.masked_fill(new == -math.inf, 0.0)
        old = total[:, rows] * torch.exp2(top[:, rows] - safe)
        total[:, rows] = old + (part * torch.exp2(part_top - safe[:, None])).sum(dim=1)
        top[:, rows] = new

    with _device(x):
        for first in range(0, tiles_m, strip):
            count = min(strip, tiles_m - first)
            start, stop = first * c.block_m, min((first + count) * c.block_m, n)
            slots = triton.cdiv(b.n, c.block_m) - (first if symmetric else 0)
            behind = b.n - stop if symmetric else 0
            near = _empty(x, (e, slots, stop - start))
            far = _empty(x, (e, count, behind))
            near_top = _empty(x, near.shape) if maximum else None
            far_top = _empty(x, far.shape) if maximum else None
            columns = tiles_n - (first // unit if symmetric else 0)
            tiles.sums_kernel[(count * columns,)](
                a.pointer(c, c.block_m), b.pointer(c, c.block_n), a.ids, b.ids, a.low, a.high, b.low, b.high,
                scale, shift, near, near if near_top is None else near_top, far, far if far_top is None else far_top,
                n, b.n, first, count, columns, a.x.stride(0), b.x.stride(0), a.ends[0], a.ends[-1],
                LEVELS=e, SYMMETRIC=symmetric, MAXIMUM=maximum, DESCRIPTOR=c.descriptor, GROUP=c.group,
                b_M=c.block_m, b_N=c.block_n, b_K=c.block_k, **c.options(),
            )  # fmt: skip
            add(slice(start, stop), near, near_top)
            if behind:
                add(slice(stop, b.n), far, far_top)
    log = torch.log2(total) + (top if maximum else shift)
    # A sum of 0: no negative. NaN stays.
    return log.masked_fill(total == 0, math.nan)


def block_rows(d: int, unit: int) -> int:
    """Rows C of a block of W: C x C entries of fp16, 8 to 512 MiB."""
    return max(min(int(8.6e6 / max(d, 1)), 16384), 2048) // unit * unit


def _empty(x: Tensor, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Where a kernel writes; the tests fill it with NaN."""
    return x.new_empty(shape, dtype=dtype)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, summed in float32: fp16 operands on CUDA, through float32 elsewhere."""
    if a.is_cuda and a.dtype == torch.float16:
        # torch 2.8 and 2.9 have the first but refuse a float32 `out`, older ones have neither; all refuse float32 sums
        # where the user allows fp16 ones. They refuse before anything runs, so the next one may be tried.
        for name, product in (("addmm", _addmm_in_place), ("mm", _mm_and_add)):
            if name not in _REFUSED:
                try:
                    return product(out, a, b)
                except (RuntimeError, AttributeError):
                    _REFUSED.add(name)
    out.addmm_(a.float(), b.float())


_REFUSED: set[str] = set()


def _addmm_in_place(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)


def _mm_and_add(out: Tensor, a: Tensor, b: Tensor) -> None:
    out += torch.ops.aten.mm.dtype(a, b, torch.float32)


def gradient(
    x: Tensor, every: Tensor | None, ids: Tensor, every_ids: Tensor, scale: Tensor, shift: Tensor, lse: Tensor,
    every_lse: Tensor, g: Tensor, every_g: Tensor, prefix: int, maximum: bool,
) -> Tensor:  # fmt: skip
    """sum_j W_ij x_j of the local rows, [n, D] float32; times 1/tau it is the gradient.

    Args:
        x, every, ids, every_ids, scale, shift, prefix, maximum: as in `sums`.
        lse, every_lse: [E, n], [E, N] in units of log 2.
        g, every_g: [E, n], [E, N] upstream gradients, at most 1 in size.
    """
    if not maximum:  # one exponential for both rows: exp(shift - lse) stays inside float32 where the shift does
        g, every_g = g * torch.exp2(shift - lse), every_g * torch.exp2(shift - every_lse)
    symmetric = every is None
    n, d = x.shape
    levels = _levels(prefix, d)
    exact = x.dtype == torch.float32
    c = _configuration(x, ("weights_two" if prefix else "weights") + ("_maximum" if maximum else ""))
    a = _Operand(x, ids, levels, c, second=False)
    if symmetric:
        b, every, every_lse, every_g = a, x, lse, g
        if exact:
            b = _Operand(x, ids, levels, c, second=True)
    else:
        assert every is not None
        b = _Operand(every, every_ids, levels, c, second=True)
    e = len(levels)
    w_scale = 1.0 if exact else W_SCALE / e
    size = block_rows(d, c.block_n)
    rows, columns = min(size, n), min(size, b.n)
    # Whole tiles, so that nothing is masked where it is stored.
    room_size = _up(rows, c.block_n) * _up(columns, c.block_n)
    room = [_empty(x, room_size, torch.float32 if exact else torch.float16) for _ in levels]
    dx = x.new_zeros((n, d), dtype=torch.float32)
    with _device(x):
        for start in range(0, n, size):
            i = slice(start, min(start + size, n))
            for j_start in range(start if symmetric else 0, b.n, size):
                j = slice(j_start, min(j_start + size, b.n))
                h, w = i.stop - i.start, j.stop - j.start
                pitch = _up(w, c.block_n)
                blocks = [r[: h * pitch].view(h, pitch)[:, :w] for r in room]
                across = symmetric and i == j
                t_m, t_n = triton.cdiv(h, c.block_m), triton.cdiv(w, c.block_n)
                t_i, t_j = i.start // c.block_m, j.start // c.block_m
                tiles.weights_kernel[(t_m * t_n,)](
                    a.pointer(c, c.block_m, i.start, i.stop), b.pointer(c, c.block_n, j.start, j.stop),
                    a.ids[i], b.ids[j], a.low[t_i:], a.high[t_i:], b.low[t_j:], b.high[t_j:], scale, shift,
                    lse[:, i], every_lse[:, j], g[:, i], every_g[:, j], blocks[-1], blocks[0],
                    h, w, t_m, t_n, a.x.stride(0), b.x.stride(0), pitch, lse.stride(0), every_lse.stride(0),
                    a.ends[0], a.ends[-1], w_scale,
                    LEVELS=e, SYMMETRIC=across, MAXIMUM=maximum, DESCRIPTOR=c.descriptor, GROUP=c.group,
                    b_M=c.block_m, b_N=c.block_n, b_K=c.block_k, **c.options(),
                )  # fmt: skip
                for (k, stop), weights in zip(levels, blocks, strict=True):
                    _add_product(dx[i, k:stop], weights, every[j, k:stop])
                    if symmetric and not across:
                        _add_product(dx[j, k:stop], weights.T, x[i, k:stop])
    return dx.div_(w_scale)


# ------------------------------------------------------------------------------------------------ operators


def longest_row(z: Tensor) -> Tensor:
    """Length of the longest row, 0-dim float32; 0 where there is none."""
    if not z.shape[0]:
        return z.new_zeros((), dtype=torch.float32)
    return torch.linalg.vector_norm(z.detach().float(), dim=1).amax()


def _unit(longest: Tensor) -> Tensor:
    """What rows are divided by so that the longest is UNIT at most: a power of 2, so that fp16 rows keep their bits."""
    _, exponent = torch.frexp(longest)
    return (torch.ldexp(torch.ones_like(longest), exponent) / UNIT).masked_fill(~longest.isfinite(), math.nan)


def _inside(z: Tensor, longest: Tensor, exact: bool) -> Tensor:
    """The rows as `sums` and `gradient` take them."""
    return (z.float() / _unit(longest)).to(torch.float32 if exact else torch.float16).contiguous()


def _scale(tau: Tensor, longest: Tensor) -> Tensor:
    return LOG2E / tau.float() * _unit(longest).square()


def _shift(tau: Tensor, longest: Tensor, n: int) -> Tensor:
    """A constant that keeps every exp inside float32 while 2 R/tau + log n <= 160, R the squared length."""
    return (longest.square() / tau.float() + (math.log(n) - EXPONENT)).clamp(min=0) * LOG2E


def _normalised(g: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents of at most 1, and what they were divided by: a loss scaler's 65536 would leave fp16."""
    top = g.abs().amax()
    top = top.masked_fill(~(top > 0), 1.0)
    return (g / top).contiguous(), top


@torch.library.custom_op("ssd_addon::lse_rows", mutates_args=())
def lse_rows(
    x: Tensor, every: Tensor | None, ids: Tensor, every_ids: Tensor, tau: Tensor, longest: Tensor, prefix: int,
    maximum: bool,
) -> Tensor:  # fmt: skip
    """[E, n] log-sums of the rows x [n, D] (as `_inside` makes them) over `every` [N, D]; None: over x."""
    n_all = x.shape[0] if every is None else every.shape[0]
    out = sums(x, every, ids, every_ids, _scale(tau, longest), _shift(tau, longest, n_all), prefix, maximum)
    return out / LOG2E


@lse_rows.register_fake
def _(x, every, ids, every_ids, tau, longest, prefix, maximum):  # type: ignore[no-untyped-def]
    return x.new_empty((2 if prefix else 1, x.shape[0]), dtype=torch.float32)


@torch.library.custom_op("ssd_addon::lse_rows_grad", mutates_args=())
def lse_rows_grad(
    x: Tensor, every: Tensor | None, ids: Tensor, every_ids: Tensor, tau: Tensor, longest: Tensor, lse: Tensor,
    every_lse: Tensor, g: Tensor, every_g: Tensor, prefix: int, maximum: bool,
) -> Tensor:  # fmt: skip
    """[n, D] float32 gradient of the rows; lse, g [E, n], every_lse, every_g [E, N], g at most 1 in size."""
    log, every_log = (lse * LOG2E).contiguous(), (every_lse * LOG2E).contiguous()
    scale, shift = _scale(tau, longest), _shift(tau, longest, every_lse.shape[1])
    dx = gradient(x, every, ids, every_ids, scale, shift, log, every_log, g, every_g, prefix, maximum)
    return dx.mul_(_unit(longest) / tau.float())


@lse_rows_grad.register_fake
def _(x, every, ids, every_ids, tau, longest, lse, every_lse, g, every_g, prefix, maximum):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.custom_op("ssd_addon::negative_lse", mutates_args=())
def negative_lse(
    z: Tensor, ids: Tensor, tau: Tensor, longest: Tensor, prefix: int, maximum: bool, exact: bool
) -> Tensor:
    """[E, N] log-sums in float32 of rows z [N, D] of any floating type, the longest of them `longest` long."""
    return lse_rows(_inside(z, longest, exact), None, ids, ids, tau, longest, prefix, maximum)


@negative_lse.register_fake
def _(z, ids, tau, longest, prefix, maximum, exact):  # type: ignore[no-untyped-def]
    return z.new_empty((2 if prefix else 1, z.shape[0]), dtype=torch.float32)


@torch.library.custom_op("ssd_addon::negative_lse_backward", mutates_args=())
def negative_lse_backward(
    grad: Tensor,
    z: Tensor,
    ids: Tensor,
    tau: Tensor,
    longest: Tensor,
    lse: Tensor,
    prefix: int,
    maximum: bool,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """(dz [N, D] in the type of z, dtau 0-dim) for the upstream gradient [E, N]."""
    g, top = _normalised(grad)
    x = _inside(z, longest, exact)
    dz = lse_rows_grad(x, None, ids, ids, tau, longest, lse, lse, g, g, prefix, maximum).mul_(top)
    dtau = -(z.float() * dz).sum() / (2 * tau)
    return dz.to(z.dtype), dtau.to(tau.dtype)


@negative_lse_backward.register_fake
def _(grad, z, ids, tau, longest, lse, prefix, maximum, exact):  # type: ignore[no-untyped-def]
    return z.new_empty(z.shape), torch.empty_like(tau)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, ids, tau, longest, *static = inputs
    ctx.save_for_backward(z, ids, tau, longest, output)
    ctx.static = static


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, ids, tau, longest, lse = ctx.saved_tensors
    dz, dtau = negative_lse_backward(grad, z, ids, tau, longest, lse, *ctx.static)
    return dz, None, dtau, None, None, None, None


negative_lse.register_autograd(_differentiate, setup_context=_save)


def _no_second_derivative(name: str) -> Any:
    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{name}: the triton backend has no second derivative; use backend='eager'")

    return refuse


negative_lse_backward.register_autograd(_no_second_derivative("negative_lse"))


def relabelled(ids: Tensor) -> Tensor:
    """Ids of any integer type numbered from 0 in int32, without reading anything back from the device."""
    order = ids.argsort()
    found = ids[order]
    number = torch.zeros_like(found, dtype=torch.int32)
    number[1:] = (found[1:] != found[:-1]).cumsum(0, dtype=torch.int32)
    return torch.zeros_like(number).scatter_(0, order, number)


class LseOverRanks(torch.autograd.Function):
    """Local rows against those of all ranks. Forward gathers the rows, fp16; backward two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, ids: Tensor, tau: Tensor, longest: Tensor, prefix: int, maximum: bool, exact: bool,
        s: _dist.Shards,
    ) -> Tensor:  # fmt: skip
        x = _inside(z, longest, exact)
        every, every_ids = _dist.gather(x, s), _dist.gather(ids, s)
        if every_ids.dtype != torch.int32:
            every_ids = relabelled(every_ids)
            ids = every_ids[s.offset : s.offset + s.size]
        if s.size:
            lse = lse_rows(x, every, ids, every_ids, tau, longest, prefix, maximum)
        else:
            lse = x.new_zeros((2 if prefix else 1, 0), dtype=torch.float32)
        ctx.save_for_backward(z, ids, tau, longest, x, every, every_ids, lse)
        ctx.static = (prefix, maximum, s)
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("negative_lse: the triton backend has no second derivative; use backend='eager'")
        z, ids, tau, longest, x, every, every_ids, lse = ctx.saved_tensors
        prefix, maximum, s = ctx.static
        both = _dist.gather(torch.cat([lse, grad]).T.contiguous(), s).T
        every_lse, every_g = both.chunk(2)
        every_g, top = _normalised(every_g)
        if not s.size:
            return torch.zeros_like(z), None, torch.zeros_like(tau), None, None, None, None, None
        mine = slice(s.offset, s.offset + s.size)
        g = every_g[:, mine].contiguous()
        dz = lse_rows_grad(x, every, ids, every_ids, tau, longest, lse, every_lse, g, every_g, prefix, maximum).mul_(
            top
        )
        dtau = -(z.float() * dz).sum() / (2 * tau)
        return dz.to(z.dtype), None, dtau.to(tau.dtype), None, None, None, None, None
