"""The "triton" backend as torch.library operators with their derivatives, and its form over ranks.

    ssd_addon::negative_lse             log-sums of one process, differentiable in z and temperature
    ssd_addon::prepared, with_bounds,   the same for n of N rows: what a rank of a group does between its collectives
        lse_rows, lse_rows_grad
    ssd_addon::products                 <a_i, b_j> of all rows, and the sums of its squares
    ssd_addon::off_diagonal_energy      sum over k != l of (X^T Y)_kl^2, differentiable; by columns or by rows

Collectives stay outside the operators. Operands are made once, forward, and kept in fp16 for the backward; neither z
nor x and y are. Legend: n local rows, N rows over all ranks, E levels (1, or 2 with a prefix), D columns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ssd_addon import _dist
from ssd_addon._autocast import Context, backward_without_autocast
from ssd_addon.kernels import launch, launch_around
from ssd_addon.kernels.fast_product import add_product
from ssd_addon.kernels.launch import PRODUCT_SCALE, WEIGHT_SCALE
from ssd_addon.kernels.operands import Scaled, longest_row, relabeled
from ssd_addon.kernels.ranges import UNIT_ROW

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _no_second_derivative(name: str) -> Callable[..., None]:
    def refuse(ctx: Context, *grads: Tensor) -> None:
        raise RuntimeError(f"{name}: the triton backend has no second derivative; use backend='eager'")

    return refuse


# ------------------------------------------------------------------------------------------------ log-sums


def _prepared(
    z: Tensor, ids: Tensor, tau: Tensor | None, longest: Tensor | None, tau_value: float, longest_value: float,
    total: int, prefix: int, maximum: bool, exact: bool,
) -> Six:  # fmt: skip
    """The tensors of `Scaled` for rows z [n, D] of any floating type and ids [n] that fit int32.

    tau, longest: 0-dim float32; their values count where they are None. A length that is on the device has not been
    checked: where it is above that of unit rows everything is NaN.
    """
    columns, block_m, ratio = launch_around.layout(z.device, z.shape[1], prefix, maximum, exact)
    return launch_around.prepare(
        z, ids, columns, block_m, ratio, tau=tau_value if tau is None else tau,
        longest=longest_value if longest is None else longest, limit=float("inf") if longest is None else UNIT_ROW,
        total=total,
    ).tensors  # fmt: skip


prepared = torch.library.custom_op("ssd_addon::prepared", _prepared, mutates_args=())


@prepared.register_fake
def _(z, ids, tau, longest, tau_value, longest_value, total, prefix, maximum, exact):  # type: ignore[no-untyped-def]
    columns, *tile = launch_around.layout(z.device, z.shape[1], prefix, maximum, exact)
    return launch_around.new_scaled(z, z.shape[0], columns, *tile).tensors


@torch.library.custom_op("ssd_addon::with_bounds", mutates_args=())
def with_bounds(x: Tensor, ids: Tensor, d: int, prefix: int, maximum: bool) -> tuple[Tensor, Tensor]:
    """ids in int32 and their bounds in every tile, for operands x that were prepared elsewhere from d columns."""
    _, block_m, ratio = launch_around.layout(x.device, d, prefix, maximum, False)
    done = launch_around.with_bounds(x, ids, block_m, ratio)
    return done.ids, done.bounds


@with_bounds.register_fake
def _(x, ids, d, prefix, maximum):  # type: ignore[no-untyped-def]
    columns, *tile = launch_around.layout(x.device, d, prefix, maximum, False)
    like = launch_around.new_scaled(x, x.shape[0], columns, *tile)
    return like.ids, like.bounds


def _lse_rows(a: Sequence[Tensor], b: Sequence[Tensor], d: int, prefix: int, maximum: bool, exact: bool) -> Tensor:
    """[E, n] log-sums of the rows a over the rows b (empty: over a), both as `prepared` returns them."""
    one = Scaled(*a)
    columns, *_ = launch_around.layout(one.x.device, d, prefix, maximum, exact)
    return launch.sums(one, Scaled(*b) if b else None, columns, maximum)


lse_rows = torch.library.custom_op("ssd_addon::lse_rows", _lse_rows, mutates_args=())


@lse_rows.register_fake
def _(a, b, d, prefix, maximum, exact):  # type: ignore[no-untyped-def]
    return a[0].new_empty((2 if prefix else 1, a[0].shape[0]), dtype=torch.float32)


@torch.library.custom_op("ssd_addon::lse_rows_grad", mutates_args=())
def lse_rows_grad(
    grad: Tensor, lse: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], offset: int, d: int, prefix: int,
    maximum: bool, exact: bool, needs_tau: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dz [n, D] in a type, dtau 0-dim or without an entry) for the upstream gradient and log-sums [E, N] of b.

    offset: where the rows of a begin in b.
    """
    one = Scaled(*a)
    columns, block_m, _ = launch_around.layout(lse.device, d, prefix, maximum, exact)
    g, log, unit = launch_around.coefficients(grad, lse, None if maximum else one.shift)
    own = slice(offset, offset + one.n)
    dx = launch.gradient(
        one, Scaled(*b) if b else None, None if log is None else log[:, own], log, g[:, own], g, columns, block_m
    )
    dz, dtau = launch_around.finish(
        dx, columns, (one.n, d), dtype, 1 / launch.weight_scale(columns), one.factor, unit, rows=one.summed,
        sums=needs_tau,
    )  # fmt: skip
    return dz, lse.new_empty(0) if dtau is None else dtau


@lse_rows_grad.register_fake
def _(grad, lse, a, b, offset, d, prefix, maximum, exact, needs_tau, dtype):  # type: ignore[no-untyped-def]
    return lse.new_empty((a[0].shape[0], d), dtype=dtype), lse.new_empty(() if needs_tau else (0,))


@torch.library.custom_op("ssd_addon::negative_lse", mutates_args=())
def negative_lse(
    z: Tensor, ids: Tensor, tau: Tensor | None, longest: Tensor | None, tau_value: float, longest_value: float,
    prefix: int, maximum: bool, exact: bool,
) -> Seven:  # fmt: skip
    """[E, N] log-sums in float32, and what `prepared` returns, for the backward. Arguments as there."""
    a = _prepared(z, ids, tau, longest, tau_value, longest_value, z.shape[0], prefix, maximum, exact)
    return _lse_rows(a, [], z.shape[1], prefix, maximum, exact), *a


@negative_lse.register_fake
def _(z, ids, tau, longest, tau_value, longest_value, prefix, maximum, exact):  # type: ignore[no-untyped-def]
    columns, *tile = launch_around.layout(z.device, z.shape[1], prefix, maximum, exact)
    lse = z.new_empty((2 if prefix else 1, z.shape[0]), dtype=torch.float32)
    return lse, *launch_around.new_scaled(z, z.shape[0], columns, *tile).tensors


class _LseContext(Context):
    static: tuple[int, int, bool, bool]  # D, prefix, maximum, exact
    dtype: torch.dtype


def _save_lse(ctx: _LseContext, inputs: tuple[Any, ...], output: Seven) -> None:
    z, *_, prefix, maximum, exact = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output)
    ctx.static, ctx.dtype = (z.shape[1], prefix, maximum, exact), z.dtype


@backward_without_autocast
def _differentiate_lse(ctx: _LseContext, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    lse, *a = ctx.saved_tensors
    needs_tau = ctx.needs_input_grad[2]
    dz, dtau = lse_rows_grad(grad, lse, a, [], 0, *ctx.static, needs_tau, ctx.dtype)
    return dz, None, dtau if needs_tau else None, *(None,) * 6


negative_lse.register_autograd(_differentiate_lse, setup_context=_save_lse)
lse_rows_grad.register_autograd(_no_second_derivative("negative_lse"))


class _LseOverRanksContext(Context):
    static: tuple[int, int, bool, bool]
    shards: _dist.Shards
    dtype: torch.dtype


class LseOverRanks(torch.autograd.Function):
    """Local rows against those of all ranks. Forward gathers the rows, fp16; backward two numbers a row."""

    @staticmethod
    def forward(
        ctx: _LseOverRanksContext, z: Tensor, ids: Tensor, tau: Tensor | None, longest: Tensor | None,
        tau_value: float, longest_value: float, prefix: int, maximum: bool, exact: bool, s: _dist.Shards,
    ) -> Tensor:  # fmt: skip
        d, own = z.shape[1], slice(s.offset, s.offset + s.size)
        how = (tau, longest, tau_value, longest_value, s.total, prefix, maximum, exact)
        every_ids = _dist.gather(ids, s)
        if every_ids.dtype != torch.int32:
            every_ids = relabeled(every_ids)
        if exact:  # rows of all ranks in float32, split in two parts here
            b = prepared(_dist.gather(z.float(), s), every_ids, *how)
            a = [t[own] for t in b[:3]]
        else:
            mine = prepared(z, every_ids[own], *how)
            x = _dist.gather(mine[0], s)
            b = (x, *mine[1:3], *with_bounds(x, every_ids, d, prefix, maximum), mine[5])
            a = list(mine[:3])
        a += [*with_bounds(a[0], every_ids[own], d, prefix, maximum), b[5]]
        lse = z.new_zeros((2 if prefix else 1, 0), dtype=torch.float32)
        if s.size:
            lse = lse_rows(a, b, d, prefix, maximum, exact)
        ctx.save_for_backward(lse, *a, *b)
        ctx.static, ctx.shards, ctx.dtype = (d, prefix, maximum, exact), s, z.dtype
        return lse

    @staticmethod
    @backward_without_autocast
    def backward(ctx: _LseOverRanksContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("negative_lse: the triton backend has no second derivative; use backend='eager'")
        lse, *both = ctx.saved_tensors
        a, b, s, needs_tau = both[:6], both[6:], ctx.shards, ctx.needs_input_grad[2]
        every = _dist.gather(torch.cat([lse, grad]).T.contiguous(), s).T.contiguous()
        every_lse, every_grad = every.chunk(2)
        if s.size:
            dz, dtau = lse_rows_grad(every_grad, every_lse, a, b, s.offset, *ctx.static, needs_tau, ctx.dtype)
        else:
            dz, dtau = lse.new_zeros((0, ctx.static[0]), dtype=ctx.dtype), lse.new_zeros(())
        return dz, None, dtau if needs_tau else None, *(None,) * 7


# ------------------------------------------------------------------------------------------------ covariances


@torch.library.custom_op("ssd_addon::products", mutates_args=())
def products(
    a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, skip_diagonal: bool, half: bool, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`launch.products`."""
    return launch.products(a, b, c, d, skip_diagonal, half, k)


@products.register_fake
def _(a, b, c, d, skip_diagonal, half, k):  # type: ignore[no-untyped-def]
    size, programs = launch.product_shape(a.device, a.shape[0], (a if b is None else b).shape[0], k)
    kind = torch.float16 if half else torch.float32
    total, w = a.new_empty((programs,), dtype=torch.float32), a.new_empty(size, dtype=kind)
    return total, w, a.new_empty(size if c is not None else (0, 0), dtype=kind)


def _operand(x: Tensor) -> Scaled:
    """Rows of x [m, K] for a product; they are scaled by the longest of them."""
    columns, block_m, ratio = launch_around.product_layout(x.device, x.shape[1])
    return launch_around.prepare(x, None, columns, block_m, ratio, longest=longest_row(x))


@torch.library.custom_op("ssd_addon::off_diagonal_energy", mutates_args=())
def off_diagonal_energy(x: Tensor, y: Tensor | None, by_rows: bool) -> Eight:
    """sum_{k != l} (X^T Y)_kl^2 (0-dim float32) of x, y [n, D]; y None means x. And what the backward needs.

    by_rows: through ||X^T Y||_F^2 = <X X^T, Y Y^T> and sum_k C_kk^2; else through X^T Y. Behind the energy come, in
    fp16, the matrices over PRODUCT_SCALE (X X^T and Y Y^T, or X^T Y without its diagonal) and both operands (rows, or
    columns), then the diagonal (by_rows) and the operands' numbers. What is not there has no entries.
    """
    k = x.shape[1] if by_rows else x.shape[0]
    a = _operand(x if by_rows else x.T)
    b = a if y is None else _operand(y if by_rows else y.T)
    none = x.new_empty(0, dtype=torch.float16)
    diagonal = None
    if by_rows:
        total, w, second = launch.products(a.x, None, None if y is None else b.x, None, False, True, k)
        diagonal = (x * (x if y is None else y)).sum(dim=0, dtype=torch.float32)
    else:
        total, w, second = launch.products(a.x, None if y is None else b.x, None, None, True, True, k)
    energy = launch_around.energy(total, diagonal, a.a, b.a)
    other, numbers = (none, x.new_empty(0, dtype=torch.float32)) if y is None else (b.x, b.numbers)
    diagonal = x.new_empty(0, dtype=torch.float32) if diagonal is None else diagonal
    return energy, w, second, a.x, other, diagonal, a.numbers, numbers


@off_diagonal_energy.register_fake
def _(x, y, by_rows):  # type: ignore[no-untyped-def]
    m, k = x.shape if by_rows else x.T.shape
    columns, *tile = launch_around.product_layout(x.device, k)
    size, _ = launch.product_shape(x.device, m, m, k)
    half, full = {"dtype": torch.float16}, {"dtype": torch.float32}
    a = launch_around.new_scaled(x, m, columns, *tile)
    return (
        x.new_empty((), **full),
        x.new_empty(size, **half),
        x.new_empty(size if by_rows and y is not None else (0, 0), **half),
        a.x,
        x.new_empty((0,) if y is None else a.x.shape, **half),
        x.new_empty(x.shape[1] if by_rows else 0, **full),
        a.numbers,
        x.new_empty(0 if y is None else 16, **full),
    )


@torch.library.custom_op("ssd_addon::off_diagonal_energy_backward", mutates_args=())
def off_diagonal_energy_backward(
    grad: Tensor, w: Tensor, second: Tensor, a: Tensor, b: Tensor, diagonal: Tensor, numbers: Tensor,
    numbers_b: Tensor, n: int, d: int, by_rows: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx, dy [n, D] in a type); without b dx is all of the gradient and dy has no entries."""
    alone, m = not b.numel(), a.shape[0]
    w, second = w[:m, :m], second[:m, :m]
    ax = numbers[12]
    by, b_ = (ax, a) if alone else (numbers_b[12], b)
    columns = launch_around.product_layout(a.device, d)[0] if by_rows else launch_around.plain(d)
    constant = 4.0 if alone else 2.0

    def gradient(weights: Tensor, rows: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """d energy / dX = 2 Y C^T without the diagonal, by columns; = 2 (Y Y^T X - Y diag C) by rows."""
        return launch_around.finish(
            _product(weights, rows), columns, (n, d), dtype, constant * PRODUCT_SCALE, grad, own, other, other,
            across=not by_rows, rows=(b_ if own is ax else a) if by_rows else None,
            term=(diagonal, constant) if by_rows else None,
        )[0]  # fmt: skip

    if by_rows:
        dx = gradient(w if alone else second, a, ax, by)
        return dx, grad.new_empty(0) if alone else gradient(w, b_, by, ax)
    dx = gradient(w, b_, ax, by)
    return dx, grad.new_empty(0) if alone else gradient(w.T, a, by, ax)


@off_diagonal_energy_backward.register_fake
def _(grad, w, second, a, b, diagonal, numbers, numbers_b, n, d, by_rows, dtype):  # type: ignore[no-untyped-def]
    return a.new_empty((n, d), dtype=dtype), grad.new_empty(0) if not b.numel() else a.new_empty((n, d), dtype=dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32."""
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.float32)
    add_product(out, a, b)
    return out


class _EnergyContext(Context):
    static: tuple[int, int, bool, torch.dtype]  # n, D, by_rows, type
    alone: bool


def _save_energy(ctx: _EnergyContext, inputs: tuple[Tensor, Tensor | None, bool], output: Eight) -> None:
    x, y, by_rows = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.static, ctx.alone = (x.shape[0], x.shape[1], by_rows, x.dtype), y is None


@backward_without_autocast
def _differentiate_energy(ctx: _EnergyContext, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    dx, dy = off_diagonal_energy_backward(grad, *ctx.saved_tensors, *ctx.static)
    return dx, None if ctx.alone else dy, None


off_diagonal_energy.register_autograd(_differentiate_energy, setup_context=_save_energy)
off_diagonal_energy_backward.register_autograd(_no_second_derivative("off_diagonal_energy"))


class _EnergyOverRanksContext(Context):
    shape: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    alone: bool
    group: ProcessGroup


class EnergyOverRanks(torch.autograd.Function):
    """X^T Y is summed over ranks, D x D in float32; by columns only."""

    @staticmethod
    def forward(ctx: _EnergyOverRanksContext, x: Tensor, y: Tensor | None, group: ProcessGroup) -> Tensor:
        other, (n, d) = x if y is None else y, x.shape
        c = x.new_zeros((d, d), dtype=torch.float32)
        if n:
            a = _operand(x.T)
            b = a if y is None else _operand(y.T)
            c = products(a.x, None if y is None else b.x, None, None, True, False, n)[1][:d, :d]
            c = c * (a.a * b.a * PRODUCT_SCALE)
        c = _dist.all_sum(c, group)
        ctx.save_for_backward(x, other, c)
        ctx.alone, ctx.group = y is None, group
        return c.square().sum(dtype=torch.float64).float()

    @staticmethod
    @backward_without_autocast
    def backward(ctx: _EnergyOverRanksContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("off_diagonal_energy: the triton backend has no second derivative; use backend='eager'")
        x, y, c = ctx.saved_tensors
        grad = _dist.all_sum(grad, ctx.group)  # a rank's rows reach the loss of every rank
        if not len(x):
            return torch.zeros_like(x), None if ctx.alone else torch.zeros_like(y), None
        top = c.abs().amax()
        top = top.masked_fill(~(top > 0), 1.0)
        half = (c * (WEIGHT_SCALE / top)).to(torch.float16)
        columns, constant = launch_around.plain(x.shape[1]), (4.0 if ctx.alone else 2.0) / WEIGHT_SCALE

        def gradient(weights: Tensor, rows: Tensor) -> Tensor:
            b = _operand(rows.T)
            return launch_around.finish(
                _product(weights, b.x), columns, (len(x), x.shape[1]), x.dtype, constant, grad, top, b.a, across=True
            )[0]

        dx = gradient(half, y)
        return dx, None if ctx.alone else gradient(half.T, x), None
