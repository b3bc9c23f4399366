"""The "triton" backend of the covariances: products of columns and their squares, as torch.library operators.

    ssd_addon::products                <a_i, b_j> of all rows, and the sum of its squares
    ssd_addon::off_diagonal_energy     sum over k != l of (X^T Y)_kl^2, differentiable; by columns or by rows

Legend: n local rows, D columns, [M, K] and [N, K] operands of a product. Rows inside are fp16 and at most
UNIT long (`fused`).
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ssd_addon import _dist
from ssd_addon.kernels import fused, tiles

W_UNIT = fused.UNIT**2 / fused.W_SCALE
"""What `products` divides its matrices by: they are UNIT^2 at most."""


@torch.library.custom_op("ssd_addon::products", mutates_args=())
def products(
    a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, skip_diagonal: bool, half: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of squares of <a_i, b_j> (0-dim float64), these products [M, N] over W_UNIT, and a second matrix.

    Args:
        a, b: [M, K], [N, K] fp16 rows at most UNIT long; b None means a, and the upper triangle is computed.
        c, d: a second pair of operands of these shapes (d None means c): the sum is then that of
            <a_i, b_j> <c_i, d_j>, and the second matrix holds <c_i, d_j>; without them it has no entries.
        skip_diagonal: entries i = j are 0.
        half: matrices in fp16, else float32.
    """
    symmetric, pair = b is None, c is not None
    f = fused._configuration(a, "products")
    operands = [fused._stack(t, [(0, t.shape[1])], f.block_k, False) for t in (a, b, c, d) if t is not None]
    stacked = iter(t for t, _ in operands)
    k1 = operands[0][1][0]
    a_ = next(stacked)
    b_ = a_ if b is None else next(stacked)
    c_ = next(stacked) if pair else a_
    d_ = next(stacked) if d is not None else (c_ if pair else b_)
    m, n = a_.shape[0], b_.shape[0]
    t_m, t_n = triton.cdiv(m, f.block_m), triton.cdiv(n, f.block_n)
    kind = torch.float16 if half else torch.float32
    size = (fused._up(m, f.block_n), fused._up(n, f.block_n))
    w = fused._empty(a, size, kind)
    second = fused._empty(a, size if pair else (0, 0), kind)
    total = fused._empty(a, t_m * t_n)

    def pointer(t: Tensor, rows: int) -> Any:
        if not f.descriptor:
            return t
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(t, [rows, f.block_k])

    with fused._device(a):
        tiles.products_kernel[(t_m * t_n,)](
            pointer(a_, f.block_m), pointer(b_, f.block_n), pointer(c_, f.block_m), pointer(d_, f.block_n),
            total, w, second if pair else w, m, n, t_m, t_n, a_.stride(0), b_.stride(0), w.stride(0), k1,
            1 / W_UNIT,
            PAIR=pair, SYMMETRIC=symmetric, SKIP_DIAGONAL=skip_diagonal, DESCRIPTOR=f.descriptor, GROUP=f.group,
            b_M=f.block_m, b_N=f.block_n, b_K=f.block_k, **f.options(),
        )  # fmt: skip
    return total.sum(dtype=torch.float64), w[:m, :n].contiguous(), second[:m, :n].contiguous() if pair else second


@products.register_fake
def _(a, b, c, d, skip_diagonal, half):  # type: ignore[no-untyped-def]
    m, n = a.shape[0], (a if b is None else b).shape[0]
    kind = torch.float16 if half else torch.float32
    w = a.new_empty((m, n), dtype=kind)
    return a.new_empty((), dtype=torch.float64), w, a.new_empty((m, n) if c is not None else (0, 0), dtype=kind)


def _columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of x [n, D] as rows [D, n] in fp16, at most UNIT long, and the length of the longest."""
    longest = fused.longest_row(x.T)
    return fused._inside(x.T, longest, exact=False), longest


@torch.library.custom_op("ssd_addon::off_diagonal_energy", mutates_args=())
def off_diagonal_energy(x: Tensor, y: Tensor | None, by_rows: bool) -> tuple[Tensor, Tensor, Tensor]:
    """sum_{k != l} (X^T Y)_kl^2 (0-dim float32) of x, y [n, D]; y None means x. And what the backward needs.

    by_rows: through ||X^T Y||_F^2 = <X X^T, Y Y^T> and sum_k C_kk^2; else through X^T Y. The matrices that come back
    are fp16, of rows or columns over `_unit`, over W_UNIT: X X^T and Y Y^T, or X^T Y without its diagonal.
    """
    if by_rows:
        lx = fused.longest_row(x)
        ly = lx if y is None else fused.longest_row(y)
        a = fused._inside(x, lx, exact=False)
        c = a if y is None else fused._inside(y, ly, exact=False)
        total, w, second = products(a, None, None if y is None else c, None, False, True)
        diagonal = (x.float() * (x if y is None else y).float()).sum(dim=0)
        energy = total * (fused._unit(lx) * fused._unit(ly)).double().square() - diagonal.double().square().sum()
        return energy.float(), w, second
    a, lx = _columns(x)
    b, ly = (None, lx) if y is None else _columns(y)
    total, w, second = products(a, b, None, None, True, True)
    return (total * (fused._unit(lx) * fused._unit(ly)).double().square()).float(), w, second


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
    lx = fused.longest_row(x if by_rows else x.T)
    ly = lx if y is None else fused.longest_row(other if by_rows else other.T)

    def product(a: Tensor, b: Tensor) -> Tensor:
        out = a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.float32)
        fused._add_product(out, a, b)
        return out

    # d energy / dX = 2 Y C^T without the diagonal, by columns; = 2 (Y Y^T X - Y diag C) by rows.
    x_, y_ = fused._inside(x, lx, exact=False), fused._inside(other, ly, exact=False)
    if by_rows:
        diagonal = (x.float() * other.float()).sum(dim=0)
        dx = (
            product(w if y is None else second, x_) * (W_UNIT * fused._unit(ly).square() * fused._unit(lx))
            - other * diagonal
        )
        if y is None:
            return (dx * (4 * grad)).to(x.dtype), x.new_zeros((0, 0))
        dy = product(w, y_) * (W_UNIT * fused._unit(lx).square() * fused._unit(ly)) - x * diagonal
    else:
        # Entries of C are at most lx ly; the rows of x_, y_ are scaled by their own longest row, not column.
        rx, ry = fused.longest_row(x), fused.longest_row(other)
        x_, y_ = fused._inside(x, rx, exact=False), fused._inside(other, ry, exact=False)
        scale = W_UNIT * fused._unit(lx) * fused._unit(ly)
        dx = product(y_, w.T) * (scale * fused._unit(ry))
        if y is None:
            return (dx * (4 * grad)).to(x.dtype), x.new_zeros((0, 0))
        dy = product(x_, w) * (scale * fused._unit(rx))
    return (dx * (2 * grad)).to(x.dtype), (dy * (2 * grad)).to(other.dtype)


@off_diagonal_energy_backward.register_fake
def _(grad, x, y, w, second, by_rows):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_zeros((0, 0)) if y is None else y.new_empty(y.shape)


def _save_energy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, ctx.by_rows = inputs
    _, w, second = output
    ctx.alone = y is None
    ctx.save_for_backward(x, *(() if y is None else (y,)), w, second)
    ctx.mark_non_differentiable(w, second)


def _differentiate_energy(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, *y, w, second = ctx.saved_tensors
    dx, dy = off_diagonal_energy_backward(grad, x, y[0] if y else None, w, second, ctx.by_rows)
    return dx, None if ctx.alone else dy, None


off_diagonal_energy.register_autograd(_differentiate_energy, setup_context=_save_energy)
off_diagonal_energy_backward.register_autograd(fused._no_second_derivative("off_diagonal_energy"))


class EnergyOverRanks(torch.autograd.Function):
    """X^T Y is summed over ranks, D x D in float32; by columns only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, group: Any) -> Tensor:
        other = x if y is None else y
        c = x.new_zeros((x.shape[1], x.shape[1]), dtype=torch.float32)
        if x.shape[0]:
            a, lx = _columns(x)
            b, ly = (None, lx) if y is None else _columns(y)
            c = products(a, b, None, None, True, False)[1] * (W_UNIT * fused._unit(lx) * fused._unit(ly))
        c = _dist.all_sum(c, group)
        ctx.save_for_backward(x, other, c)
        ctx.alone, ctx.group = y is None, group
        return c.square().sum(dtype=torch.float64).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("off_diagonal_energy: the triton backend has no second derivative; use backend='eager'")
        x, y, c = ctx.saved_tensors
        grad = _dist.all_sum(grad, ctx.group)  # a rank's rows reach the loss of every rank
        top = c.abs().amax()
        top = top.masked_fill(~(top > 0), 1.0)
        half = (c * (fused.W_SCALE / top)).to(torch.float16)

        def product(rows: Tensor, w: Tensor) -> Tensor:
            out = torch.zeros_like(rows, dtype=torch.float32)
            longest = fused.longest_row(rows)
            fused._add_product(out, fused._inside(rows, longest, exact=False), w)
            return out * (fused._unit(longest) * top / fused.W_SCALE)

        dx = product(y, half.T)
        if ctx.alone:
            return (dx * (4 * grad)).to(x.dtype), None, None
        return (dx * (2 * grad)).to(x.dtype), (product(x, half) * (2 * grad)).to(y.dtype), None
