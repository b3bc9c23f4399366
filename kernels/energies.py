"""The "triton" backend of the covariances: torch.library operators with derivatives, and the form over ranks.

    ssd_addon::products                 <a_i, b_j> of all rows, and the sums of its squares
    ssd_addon::off_diagonal_energy      sum over k != l of (X^T Y)_kl^2, differentiable; by columns or by rows

Collectives are outside the operators. Operands are computed once, in the forward pass, and stored in fp16 for the
backward pass; x and y are not stored. Legend: n rows, D columns.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ssd_addon import _dist
from ssd_addon._autocast import Context, backward_without_autocast
from ssd_addon.kernels import launch, launch_around
from ssd_addon.kernels.direct import chosen, direct, traced
from ssd_addon.kernels.fast_product import add_product
from ssd_addon.kernels.launch import PRODUCT_SCALE, WEIGHT_SCALE
from ssd_addon.kernels.operands import Scaled, longest_row
from ssd_addon.kernels.operators import no_second_derivative

Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


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
    """Prepare the rows of x [m, K] for a product, scaled by the longest of them."""
    return launch_around.prepare(x, None, launch_around.product_layout(x.device, x.shape[1]), longest=longest_row(x))


def _off_diagonal_energy(x: Tensor, y: Tensor | None, by_rows: bool) -> Eight:
    """sum_{k != l} (X^T Y)_kl^2 (0-dim float32) for x, y [n, D], and the tensors for the backward; y None means x.

    by_rows uses ||X^T Y||_F^2 = <X X^T, Y Y^T> and sum_k C_kk^2; otherwise X^T Y is computed. Returns the energy; in
    fp16 the matrices divided by PRODUCT_SCALE (X X^T and Y Y^T, or X^T Y without its diagonal) and both operands (rows,
    or columns); then the diagonal (by_rows) and the operands' numbers. Unused outputs are empty.
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


off_diagonal_energy = torch.library.custom_op("ssd_addon::off_diagonal_energy", _off_diagonal_energy, mutates_args=())


@off_diagonal_energy.register_fake
def _(x, y, by_rows):  # type: ignore[no-untyped-def]
    m, k = x.shape if by_rows else x.T.shape
    size, _ = launch.product_shape(x.device, m, m, k)
    half, full = {"dtype": torch.float16}, {"dtype": torch.float32}
    a = launch_around.new_scaled(x, m, launch_around.product_layout(x.device, k))
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


def _off_diagonal_energy_backward(
    grad: Tensor, energy: Tensor, w: Tensor, second: Tensor, a: Tensor, b: Tensor, diagonal: Tensor, numbers: Tensor,
    numbers_b: Tensor, n: int, d: int, by_rows: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx, dy [n, D] in a dtype); without b, dx is the whole gradient and dy is empty.

    energy is not read; it makes the gradient depend on x, so that a second derivative raises instead of being dropped.
    """
    alone, m = not b.numel(), a.shape[0]
    w, second = w[:m, :m], second[:m, :m]
    ax = numbers[12]
    by, b_ = (ax, a) if alone else (numbers_b[12], b)
    columns = launch_around.product_layout(a.device, d).columns if by_rows else launch_around.plain(d)
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


off_diagonal_energy_backward = torch.library.custom_op(
    "ssd_addon::off_diagonal_energy_backward", _off_diagonal_energy_backward, mutates_args=()
)


@off_diagonal_energy_backward.register_fake
def _(grad, energy, w, second, a, b, diagonal, numbers, numbers_b, n, d, by_rows, dtype):  # type: ignore[no-untyped-def]
    return a.new_empty((n, d), dtype=dtype), grad.new_empty(0) if not b.numel() else a.new_empty((n, d), dtype=dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product a b in float32."""
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
    ctx.save_for_backward(*output)
    ctx.static, ctx.alone = (x.shape[0], x.shape[1], by_rows, x.dtype), y is None


@backward_without_autocast
def _differentiate_energy(ctx: _EnergyContext, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    gradient = chosen(off_diagonal_energy_backward, _off_diagonal_energy_backward)
    dx, dy = gradient(grad, *ctx.saved_tensors, *ctx.static)
    return dx, None if ctx.alone else dy, None


off_diagonal_energy.register_autograd(_differentiate_energy, setup_context=_save_energy)
off_diagonal_energy_backward.register_autograd(no_second_derivative("off_diagonal_energy"))
_direct = direct(_off_diagonal_energy, _save_energy, _differentiate_energy)


def energy(x: Tensor, y: Tensor | None, by_rows: bool) -> Tensor:
    """The energy of `off_diagonal_energy`; as an operator only if something traces."""
    out: Tensor = (off_diagonal_energy if traced() else _direct)(x, y, by_rows)[0]
    return out


class _EnergyOverRanksContext(Context):
    shape: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    alone: bool
    group: ProcessGroup


class EnergyOverRanks(torch.autograd.Function):
    """The energy over ranks, where X^T Y [D, D] is summed in float32; by columns only."""

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
