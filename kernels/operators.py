"""The "triton" backend as torch.library operators with their derivatives, and its form over ranks.

    ssd_addon::negative_lse             log-sums of one process, differentiable in z and temperature
    ssd_addon::lse_rows, lse_rows_grad  the same for n of N rows: what a rank of a group does between its collectives
    ssd_addon::products                 <a_i, b_j> of all rows, and the sum of its squares
    ssd_addon::off_diagonal_energy      sum over k != l of (X^T Y)_kl^2, differentiable; by columns or by rows

Collectives stay outside the operators. Legend: n local rows, N rows over all ranks, E levels (1, or 2 with a prefix),
D columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ssd_addon import _dist
from ssd_addon._autocast import Context, backward_without_autocast
from ssd_addon.kernels import launch
from ssd_addon.kernels.fast_product import add_product
from ssd_addon.kernels.launch import PRODUCT_SCALE, WEIGHT_SCALE
from ssd_addon.kernels.operands import longest_row, normalized, relabeled, row_scale, scaled_rows, similarity_scale
from ssd_addon.kernels.ranges import LOG2E, shift_on_device


def _no_second_derivative(name: str) -> Callable[..., None]:
    def refuse(ctx: Context, *grads: Tensor) -> None:
        raise RuntimeError(f"{name}: the triton backend has no second derivative; use backend='eager'")

    return refuse


# ------------------------------------------------------------------------------------------------ log-sums


@torch.library.custom_op("ssd_addon::lse_rows", mutates_args=())
def lse_rows(
    x: Tensor, every: Tensor | None, ids: Tensor, every_ids: Tensor, tau: Tensor, longest: Tensor, prefix: int,
    maximum: bool,
) -> Tensor:  # fmt: skip
    """[E, n] log-sums of the rows x [n, D] (as `scaled_rows` makes them) over `every` [N, D]; None: over x."""
    n_all = x.shape[0] if every is None else every.shape[0]
    scale, shift = similarity_scale(tau, longest), shift_on_device(tau, longest, n_all)
    return launch.sums(x, every, ids, every_ids, scale, shift, prefix, maximum) / LOG2E


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
    scale, shift = similarity_scale(tau, longest), shift_on_device(tau, longest, every_lse.shape[1])
    dx = launch.gradient(x, every, ids, every_ids, scale, shift, log, every_log, g, every_g, prefix, maximum)
    return dx.mul_(row_scale(longest) / tau.float())


@lse_rows_grad.register_fake
def _(x, every, ids, every_ids, tau, longest, lse, every_lse, g, every_g, prefix, maximum):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.custom_op("ssd_addon::negative_lse", mutates_args=())
def negative_lse(
    z: Tensor, ids: Tensor, tau: Tensor, longest: Tensor, prefix: int, maximum: bool, exact: bool
) -> Tensor:
    """[E, N] log-sums in float32 of rows z [N, D] of any floating type, the longest of them `longest` long."""
    lse: Tensor = lse_rows(scaled_rows(z, longest, exact), None, ids, ids, tau, longest, prefix, maximum)
    return lse


@negative_lse.register_fake
def _(z, ids, tau, longest, prefix, maximum, exact):  # type: ignore[no-untyped-def]
    return z.new_empty((2 if prefix else 1, z.shape[0]), dtype=torch.float32)


@torch.library.custom_op("ssd_addon::negative_lse_backward", mutates_args=())
def negative_lse_backward(
    grad: Tensor, z: Tensor, ids: Tensor, tau: Tensor, longest: Tensor, lse: Tensor, prefix: int, maximum: bool,
    exact: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dz [N, D] in the type of z, dtau 0-dim) for the upstream gradient [E, N]."""
    g, top = normalized(grad)
    x = scaled_rows(z, longest, exact)
    dz = lse_rows_grad(x, None, ids, ids, tau, longest, lse, lse, g, g, prefix, maximum).mul_(top)
    return dz.to(z.dtype), _temperature_gradient(z, dz, tau)


@negative_lse_backward.register_fake
def _(grad, z, ids, tau, longest, lse, prefix, maximum, exact):  # type: ignore[no-untyped-def]
    return z.new_empty(z.shape), torch.empty_like(tau)


def _temperature_gradient(z: Tensor, dz: Tensor, tau: Tensor) -> Tensor:
    return (-(z.float() * dz).sum() / (2 * tau)).to(tau.dtype)


class _LseContext(Context):
    static: tuple[int, bool, bool]  # prefix, maximum, exact


def _save_lse(ctx: _LseContext, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int, bool, bool], output: Tensor) -> None:
    z, ids, tau, longest, prefix, maximum, exact = inputs
    ctx.save_for_backward(z, ids, tau, longest, output)
    ctx.static = (prefix, maximum, exact)


@backward_without_autocast
def _differentiate_lse(ctx: _LseContext, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, ids, tau, longest, lse = ctx.saved_tensors
    dz, dtau = negative_lse_backward(grad, z, ids, tau, longest, lse, *ctx.static)
    return dz, None, dtau, None, None, None, None


negative_lse.register_autograd(_differentiate_lse, setup_context=_save_lse)
negative_lse_backward.register_autograd(_no_second_derivative("negative_lse"))


class _LseOverRanksContext(Context):
    prefix: int
    maximum: bool
    shards: _dist.Shards


class LseOverRanks(torch.autograd.Function):
    """Local rows against those of all ranks. Forward gathers the rows, fp16; backward two numbers a row."""

    @staticmethod
    def forward(
        ctx: _LseOverRanksContext, z: Tensor, ids: Tensor, tau: Tensor, longest: Tensor, prefix: int, maximum: bool,
        exact: bool, s: _dist.Shards,
    ) -> Tensor:  # fmt: skip
        x = scaled_rows(z, longest, exact)
        every, every_ids = _dist.gather(x, s), _dist.gather(ids, s)
        if every_ids.dtype != torch.int32:
            every_ids = relabeled(every_ids)
            ids = every_ids[s.offset : s.offset + s.size]
        lse = x.new_zeros((2 if prefix else 1, 0), dtype=torch.float32)
        if s.size:
            lse = lse_rows(x, every, ids, every_ids, tau, longest, prefix, maximum)
        ctx.save_for_backward(z, ids, tau, longest, x, every, every_ids, lse)
        ctx.prefix, ctx.maximum, ctx.shards = prefix, maximum, s
        return lse

    @staticmethod
    @backward_without_autocast
    def backward(ctx: _LseOverRanksContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("negative_lse: the triton backend has no second derivative; use backend='eager'")
        z, ids, tau, longest, x, every, every_ids, lse = ctx.saved_tensors
        s = ctx.shards
        both = _dist.gather(torch.cat([lse, grad]).T.contiguous(), s).T
        every_lse, every_g = both.chunk(2)
        every_g, top = normalized(every_g)
        if not s.size:
            return torch.zeros_like(z), None, torch.zeros_like(tau), None, None, None, None, None
        g = every_g[:, s.offset : s.offset + s.size].contiguous()
        dz = lse_rows_grad(
            x, every, ids, every_ids, tau, longest, lse, every_lse, g, every_g, ctx.prefix, ctx.maximum
        ).mul_(top)
        return dz.to(z.dtype), None, _temperature_gradient(z, dz, tau), None, None, None, None, None


# ------------------------------------------------------------------------------------------------ covariances


@torch.library.custom_op("ssd_addon::products", mutates_args=())
def products(
    a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, skip_diagonal: bool, half: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`launch.products`."""
    return launch.products(a, b, c, d, skip_diagonal, half)


@products.register_fake
def _(a, b, c, d, skip_diagonal, half):  # type: ignore[no-untyped-def]
    m, n = a.shape[0], (a if b is None else b).shape[0]
    kind = torch.float16 if half else torch.float32
    w = a.new_empty((m, n), dtype=kind)
    return a.new_empty((), dtype=torch.float64), w, a.new_empty((m, n) if c is not None else (0, 0), dtype=kind)


def _columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of x [n, D] as scaled rows [D, n] in fp16, and the length of the longest."""
    longest = longest_row(x.T)
    return scaled_rows(x.T, longest, exact=False), longest


@torch.library.custom_op("ssd_addon::off_diagonal_energy", mutates_args=())
def off_diagonal_energy(x: Tensor, y: Tensor | None, by_rows: bool) -> tuple[Tensor, Tensor, Tensor]:
    """sum_{k != l} (X^T Y)_kl^2 (0-dim float32) of x, y [n, D]; y None means x. And what the backward needs.

    by_rows: through ||X^T Y||_F^2 = <X X^T, Y Y^T> and sum_k C_kk^2; else through X^T Y. The matrices that come back
    are fp16, of scaled rows or columns, over PRODUCT_SCALE: X X^T and Y Y^T, or X^T Y without its diagonal.
    """
    if by_rows:
        lx = longest_row(x)
        ly = lx if y is None else longest_row(y)
        a = scaled_rows(x, lx, exact=False)
        c = None if y is None else scaled_rows(y, ly, exact=False)
        total, w, second = products(a, None, None if y is None else c, None, False, True)
        diagonal = (x.float() * (x if y is None else y).float()).sum(dim=0)
        energy = total * (row_scale(lx) * row_scale(ly)).double().square() - diagonal.double().square().sum()
        return energy.float(), w, second
    a, lx = _columns(x)
    b, ly = (None, lx) if y is None else _columns(y)
    total, w, second = products(a, b, None, None, True, True)
    return (total * (row_scale(lx) * row_scale(ly)).double().square()).float(), w, second


@off_diagonal_energy.register_fake
def _(x, y, by_rows):  # type: ignore[no-untyped-def]
    n, d = x.shape
    size = n if by_rows else d
    second = (n, n) if by_rows and y is not None else (0, 0)
    half = {"dtype": torch.float16}
    return x.new_empty((), dtype=torch.float32), x.new_empty((size, size), **half), x.new_empty(second, **half)


@torch.library.custom_op("ssd_addon::off_diagonal_energy_backward", mutates_args=())
def off_diagonal_energy_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, w: Tensor, second: Tensor, by_rows: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dy [n, D] in the type of x, y); where y is None dx is all of the gradient and dy has no entries."""
    other = x if y is None else y
    lx = longest_row(x if by_rows else x.T)
    ly = lx if y is None else longest_row(other if by_rows else other.T)

    # d energy / dX = 2 Y C^T without the diagonal, by columns; = 2 (Y Y^T X - Y diag C) by rows.
    if by_rows:
        x_, y_ = scaled_rows(x, lx, exact=False), scaled_rows(other, ly, exact=False)
        diagonal = (x.float() * other.float()).sum(dim=0)
        dx = (
            _product(w if y is None else second, x_) * (PRODUCT_SCALE * row_scale(ly).square() * row_scale(lx))
            - other * diagonal
        )
        if y is None:
            return (dx * (4 * grad)).to(x.dtype), x.new_zeros((0, 0))
        dy = _product(w, y_) * (PRODUCT_SCALE * row_scale(lx).square() * row_scale(ly)) - x * diagonal
    else:
        # Entries of C are at most lx ly; the rows of x_, y_ are scaled by their own longest row, not column.
        rx, ry = longest_row(x), longest_row(other)
        x_, y_ = scaled_rows(x, rx, exact=False), scaled_rows(other, ry, exact=False)
        scale = PRODUCT_SCALE * row_scale(lx) * row_scale(ly)
        dx = _product(y_, w.T) * (scale * row_scale(ry))
        if y is None:
            return (dx * (4 * grad)).to(x.dtype), x.new_zeros((0, 0))
        dy = _product(x_, w) * (scale * row_scale(rx))
    return (dx * (2 * grad)).to(x.dtype), (dy * (2 * grad)).to(other.dtype)


@off_diagonal_energy_backward.register_fake
def _(grad, x, y, w, second, by_rows):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_zeros((0, 0)) if y is None else y.new_empty(y.shape)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32."""
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.float32)
    add_product(out, a, b)
    return out


class _EnergyContext(Context):
    by_rows: bool
    alone: bool


def _save_energy(
    ctx: _EnergyContext, inputs: tuple[Tensor, Tensor | None, bool], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, y, ctx.by_rows = inputs
    _, w, second = output
    ctx.alone = y is None
    ctx.save_for_backward(x, *(() if y is None else (y,)), w, second)
    ctx.mark_non_differentiable(w, second)


@backward_without_autocast
def _differentiate_energy(ctx: _EnergyContext, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, *y, w, second = ctx.saved_tensors
    dx, dy = off_diagonal_energy_backward(grad, x, y[0] if y else None, w, second, ctx.by_rows)
    return dx, None if ctx.alone else dy, None


off_diagonal_energy.register_autograd(_differentiate_energy, setup_context=_save_energy)
off_diagonal_energy_backward.register_autograd(_no_second_derivative("off_diagonal_energy"))


class _EnergyOverRanksContext(Context):
    alone: bool
    group: ProcessGroup


class EnergyOverRanks(torch.autograd.Function):
    """X^T Y is summed over ranks, D x D in float32; by columns only."""

    @staticmethod
    def forward(ctx: _EnergyOverRanksContext, x: Tensor, y: Tensor | None, group: ProcessGroup) -> Tensor:
        other = x if y is None else y
        c = x.new_zeros((x.shape[1], x.shape[1]), dtype=torch.float32)
        if x.shape[0]:
            a, lx = _columns(x)
            b, ly = (None, lx) if y is None else _columns(y)
            c = products(a, b, None, None, True, False)[1] * (PRODUCT_SCALE * row_scale(lx) * row_scale(ly))
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
        top = c.abs().amax()
        top = top.masked_fill(~(top > 0), 1.0)
        half = (c * (WEIGHT_SCALE / top)).to(torch.float16)

        def product(rows: Tensor, w: Tensor) -> Tensor:
            longest = longest_row(rows)
            return _product(scaled_rows(rows, longest, exact=False), w) * (row_scale(longest) * top / WEIGHT_SCALE)

        dx = product(y, half.T)
        if ctx.alone:
            return (dx * (4 * grad)).to(x.dtype), None, None
        return (dx * (2 * grad)).to(x.dtype), (product(x, half) * (2 * grad)).to(y.dtype), None
