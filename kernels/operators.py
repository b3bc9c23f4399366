"""The "triton" backend of the log-sums: torch.library operators with derivatives, and the form over ranks.

    ssd_addon::negative_lse             log-sums of one process, differentiable in z and temperature
    ssd_addon::prepared, with_bounds,   the same for n of N rows, for a rank of a group between its collectives
        lse_rows, lse_rows_grad

Collectives are outside the operators. Operands are computed once, in the forward pass, and stored in fp16 for the
backward pass; z is not stored.
Legend: n local rows, N rows over all ranks, E levels (1, or 2 with a prefix), D columns.
"""

from collections.abc import Callable
from typing import Any, Sequence  # noqa: UP035 (torch 2.5 reads an operator's schema from typing's alone)

import torch
from torch import Tensor

from ssd_addon import _dist
from ssd_addon._autocast import Context, backward_without_autocast
from ssd_addon.kernels import launch, launch_around
from ssd_addon.kernels.direct import chosen, direct, traced
from ssd_addon.kernels.operands import Scaled, relabeled
from ssd_addon.kernels.ranges import UNIT_ROW

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def no_second_derivative(name: str) -> Callable[..., None]:
    def refuse(ctx: Context, *grads: Tensor) -> None:
        raise RuntimeError(f"{name}: the triton backend has no second derivative; use backend='eager'")

    return refuse


# ------------------------------------------------------------------------------------------------ log-sums


def _prepared(
    z: Tensor, ids: Tensor, tau: Tensor | None, longest: Tensor | None, tau_value: float, longest_value: float,
    total: int, prefix: int, maximum: bool, exact: bool,
) -> Six:  # fmt: skip
    """The tensors of `Scaled` for rows z [n, D] of any floating dtype and ids [n] that fit in int32.

    tau, longest: 0-dim float32; if None, the values are used. A length on the device has not been checked: if it is
    above that of L2-normalized rows, everything becomes NaN.
    """
    how = launch_around.layout(z.device, z.shape[1], prefix, maximum, exact)
    return launch_around.prepare(
        z, ids, how, tau=tau_value if tau is None else tau,
        longest=longest_value if longest is None else longest, limit=float("inf") if longest is None else UNIT_ROW,
        total=total,
    ).tensors  # fmt: skip


prepared = torch.library.custom_op("ssd_addon::prepared", _prepared, mutates_args=())


@prepared.register_fake
def _(z, ids, tau, longest, tau_value, longest_value, total, prefix, maximum, exact):  # type: ignore[no-untyped-def]
    how = launch_around.layout(z.device, z.shape[1], prefix, maximum, exact)
    return launch_around.new_scaled(z, z.shape[0], how).tensors


@torch.library.custom_op("ssd_addon::with_bounds", mutates_args=())
def with_bounds(x: Tensor, ids: Tensor, d: int, prefix: int, maximum: bool) -> tuple[Tensor, Tensor]:
    """ids in int32 and their bounds for every tile, for operands x that were prepared elsewhere from d columns."""
    how = launch_around.layout(x.device, d, prefix, maximum, False)
    done = launch_around.with_bounds(x, ids, how.block_m, how.tiles(x.shape[0]))
    return done.ids, done.bounds


@with_bounds.register_fake
def _(x, ids, d, prefix, maximum):  # type: ignore[no-untyped-def]
    like = launch_around.new_scaled(x, x.shape[0], launch_around.layout(x.device, d, prefix, maximum, False))
    return like.ids, like.bounds


def _lse_rows(a: Sequence[Tensor], b: Sequence[Tensor], d: int, prefix: int, maximum: bool, exact: bool) -> Tensor:
    """[E, n] log-sums of the rows a over the rows b (over a if b is empty), both as returned by `prepared`."""
    one = Scaled(*a)
    how = launch_around.layout(one.x.device, d, prefix, maximum, exact)
    return launch.sums(one, Scaled(*b) if b else None, how, maximum)


lse_rows = torch.library.custom_op("ssd_addon::lse_rows", _lse_rows, mutates_args=())


@lse_rows.register_fake
def _(a, b, d, prefix, maximum, exact):  # type: ignore[no-untyped-def]
    return a[0].new_empty((2 if prefix else 1, a[0].shape[0]), dtype=torch.float32)


def _lse_rows_grad(
    grad: Tensor, lse: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], offset: int, d: int, prefix: int,
    maximum: bool, exact: bool, block_m: int, needs_tau: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dz [n, D] in a dtype, dtau 0-dim or empty) for the upstream gradient and log-sums [E, N] of b.

    offset: position in b of the first row of a. block_m: rows per tile in the forward pass.
    """
    one = Scaled(*a)
    how = launch_around.layout(lse.device, d, prefix, maximum, exact)
    launch_around.check_layout(one, how, block_m)
    g, log, unit = launch_around.coefficients(grad, lse, None if maximum else one.shift)
    own = slice(offset, offset + one.n)
    dx = launch.gradient(one, Scaled(*b) if b else None, None if log is None else log[:, own], log, g[:, own], g, how)
    dz, dtau = launch_around.finish(
        dx, how.columns, (one.n, d), dtype, 1 / launch.weight_scale(how.columns), one.factor, unit, rows=one.summed,
        sums=needs_tau,
    )  # fmt: skip
    return dz, lse.new_empty(0) if dtau is None else dtau


lse_rows_grad = torch.library.custom_op("ssd_addon::lse_rows_grad", _lse_rows_grad, mutates_args=())


@lse_rows_grad.register_fake
def _(grad, lse, a, b, offset, d, prefix, maximum, exact, block_m, needs_tau, dtype):  # type: ignore[no-untyped-def]
    return lse.new_empty((a[0].shape[0], d), dtype=dtype), lse.new_empty(() if needs_tau else (0,))


def _negative_lse(
    z: Tensor, ids: Tensor, tau: Tensor | None, longest: Tensor | None, tau_value: float, longest_value: float,
    prefix: int, maximum: bool, exact: bool,
) -> Seven:  # fmt: skip
    """[E, N] log-sums in float32, and the result of `prepared` for the backward pass. Arguments as there."""
    a = _prepared(z, ids, tau, longest, tau_value, longest_value, z.shape[0], prefix, maximum, exact)
    return _lse_rows(a, [], z.shape[1], prefix, maximum, exact), *a


negative_lse = torch.library.custom_op("ssd_addon::negative_lse", _negative_lse, mutates_args=())


@negative_lse.register_fake
def _(z, ids, tau, longest, tau_value, longest_value, prefix, maximum, exact):  # type: ignore[no-untyped-def]
    how = launch_around.layout(z.device, z.shape[1], prefix, maximum, exact)
    lse = z.new_empty((2 if prefix else 1, z.shape[0]), dtype=torch.float32)
    return lse, *launch_around.new_scaled(z, z.shape[0], how).tensors


class _LseContext(Context):
    static: tuple[int, int, bool, bool, int]  # D, prefix, maximum, exact, rows of a tile
    dtype: torch.dtype


def _save_lse(ctx: _LseContext, inputs: tuple[Any, ...], output: Seven) -> None:
    z, *_, prefix, maximum, exact = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output)
    how = launch_around.layout(z.device, z.shape[1], prefix, maximum, exact)
    ctx.static, ctx.dtype = (z.shape[1], prefix, maximum, exact, how.block_m), z.dtype


@backward_without_autocast
def _differentiate_lse(ctx: _LseContext, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    lse, *a = ctx.saved_tensors
    needs_tau = ctx.needs_input_grad[2]
    gradient = chosen(lse_rows_grad, _lse_rows_grad)
    dz, dtau = gradient(grad, lse, a, [], 0, *ctx.static, needs_tau, ctx.dtype)
    return dz, None, dtau if needs_tau else None, *(None,) * 6


negative_lse.register_autograd(_differentiate_lse, setup_context=_save_lse)
lse_rows_grad.register_autograd(no_second_derivative("negative_lse"))
_direct = direct(_negative_lse, _save_lse, _differentiate_lse)


def log_sums(*given: Any) -> Tensor:
    """The log-sums [E, N] of `negative_lse`; as an operator only if something traces."""
    out: Tensor = (negative_lse if traced() else _direct)(*given)[0]
    return out


class _LseOverRanksContext(Context):
    static: tuple[int, int, bool, bool, int]
    shards: _dist.Shards
    dtype: torch.dtype


class LseOverRanks(torch.autograd.Function):
    """Log-sums of local rows over those of all ranks. Forward gathers rows in fp16; backward, two numbers per row."""

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
        if exact:  # gather rows in float32 and split them in two parts here
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
        block_m = launch_around.layout(z.device, d, prefix, maximum, exact).block_m
        ctx.static, ctx.shards, ctx.dtype = (d, prefix, maximum, exact, block_m), s, z.dtype
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
