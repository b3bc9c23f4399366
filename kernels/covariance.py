"""Off-diagonal energy of a (cross-)covariance: sum over k != l of (X^T Y)_kl^2.

D side:  C = X^T Y, squared without its diagonal;             2 n D^2 operations, twice that backward
N side:  ||X^T Y||_F^2 = <X X^T, Y Y^T>, minus sum_k C_kk^2;   4 n^2 D, cheaper where n < D / 2

Legend: n local rows, D columns, c columns of a block. Source: the covariance term of VICReg (Bardes et al. 2022)
and the redundancy term of Barlow Twins (Zbontar et al. 2021).
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ssd_addon import _checks, _dist
from ssd_addon._autocast import Context, autocast_off, backward_without_autocast, is_plain, matmul
from ssd_addon._shapes import Matrix, Scalar
from ssd_addon.kernels.dispatch import Backend, Runnable, choose_backend, compute_dtype


def off_diagonal_energy(
    x: Matrix,
    y: Matrix | None = None,
    *,
    backend: Backend = "auto",
    group: ProcessGroup | None = None,
    chunk: int = 512,
) -> Scalar:
    """sum_{k != l} (sum_i x_ik y_il)^2, a scalar in max(float32, dtype of x), differentiable in x and y.

    >>> off_diagonal_energy(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))  # X^T X = [[1, 2], [2, 5]]
    tensor(8.)

    Args:
        x: [n, D], already centered (and standardized) as the loss requires.
        y: [n, D]; None means x.
        backend: "auto", "eager", "streaming" (stores no D x D matrix), "triton" (CUDA, fp16 products); the last two use
            the cheaper side.
        group: None uses the local rows. For a process group X^T Y is summed over ranks, on the D side (the ranks
            exchange this matrix, or its blocks); backward assumes that gradients are averaged over ranks.
        chunk: number of columns of a block in the streaming backend.

    Nothing is read from the device: NaN and infinity are not detected, but returned.

    Raises:
        TypeError, ValueError: x or y is not floating point or not [n, D], or their shapes differ.
    """
    for name, t in (("x", x), ("y", y)):
        if t is None:
            continue
        _checks.floating(t, f"off_diagonal_energy, {name}")
        if t.ndim != 2 or t.shape != x.shape:
            raise ValueError(
                f"off_diagonal_energy: expected x and y of the same shape [n, D]: got {name} {_checks.shape(t)}"
            )
    n, d = x.shape
    dtype = compute_dtype(x.dtype)
    name = energy_backend(backend, n, d, dtype=dtype, device=x.device, group=group)
    with autocast_off(x.device):
        if name == "triton":
            return _triton(x, y, group)
        x = x.to(dtype)
        y = None if y is None else y.to(dtype)
        if name == "eager":
            if torch.compiler.is_compiling() or is_plain((x,) if y is None else (x, y)):
                return _eager(x, y, group)
            whole: Tensor = _Whole.apply(x, y, group)
            return whole
        out: Tensor = _Streaming.apply(x, y, chunk, group)
        return out


def energy_backend(
    backend: Backend,
    n: int,
    d: int,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    group: ProcessGroup | None = None,
) -> Runnable:
    """The backend of `off_diagonal_energy` for n local rows of d columns; the same on every rank of a group."""
    # Streaming is faster as soon as it can skip work; eager stores D x D for the backward pass.
    elements = 64 * d * d if by_rows(n, d, group) else d * d
    return choose_backend(backend, matrix_elements=elements, dtype=dtype, device=device)


def by_rows(n: int, d: int, group: ProcessGroup | None) -> bool:
    """Whether the N side is cheaper; never for a group, as ranks exchange X^T Y."""
    return group is None and 2 * n < d


def _triton(x: Tensor, y: Tensor | None, group: ProcessGroup | None) -> Tensor:
    from ssd_addon.kernels import energies

    out: Tensor
    if group is not None:
        out = energies.EnergyOverRanks.apply(x, y, group)
        return out
    if not x.shape[0]:
        return (x.sum() + (0 if y is None else y.sum())).float() * 0
    return energies.energy(x, y, by_rows(x.shape[0], x.shape[1], group))


def _block(x: Tensor, y: Tensor, block: slice, start: int, group: ProcessGroup | None) -> Tensor:
    """Rows `block`, columns from `start`, of X^T Y over all ranks, with a diagonal of 0."""
    c = _dist.all_sum(x[:, block].T @ y[:, start:], group)
    c.diagonal(offset=block.start - start).zero_()
    return c


def _eager(x: Tensor, y: Tensor | None, group: ProcessGroup | None) -> Tensor:
    """The reference: the squared entries of the matrix, without its diagonal."""
    c = _dist.all_sum(matmul(x.T, x if y is None else y), group)
    return (c - torch.diag(c.diagonal())).square().sum()


class _WholeContext(Context):
    group: ProcessGroup | None


class _Whole(torch.autograd.Function):
    """`_eager` with its derivative in closed form: a third of the passes over the matrix, which is stored."""

    @staticmethod
    def forward(ctx: _WholeContext, x: Tensor, y: Tensor | None, group: ProcessGroup | None) -> Tensor:
        c = _block(x, x if y is None else y, slice(0, x.shape[1]), 0, group)
        ctx.group = group
        ctx.save_for_backward(c, x, *(() if y is None else (y,)))
        # Summed by rows: one pass, without loss of precision over a million entries.
        lengths: Tensor = torch.linalg.vector_norm(c, dim=1)
        return lengths.square().sum()

    @staticmethod
    @backward_without_autocast
    def backward(ctx: _WholeContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        c, x, *rest = ctx.saved_tensors
        y = rest[0] if rest else None
        if torch.is_grad_enabled():  # create_graph=True: second derivative
            inputs = [t for t, need in zip((x, y), ctx.needs_input_grad, strict=False) if need and t is not None]
            found = iter(torch.autograd.grad(_eager(x, y, ctx.group), inputs, grad, create_graph=True))
            return (*(next(found) if need else None for need in ctx.needs_input_grad[:2]), None)
        grad = _dist.all_sum(grad, ctx.group)  # a rank's rows reach the loss of every rank
        if y is None:
            return (x @ c).mul_(4 * grad), None, None
        dx = (y @ c.T).mul_(2 * grad) if ctx.needs_input_grad[0] else None
        return dx, (x @ c).mul_(2 * grad) if ctx.needs_input_grad[1] else None, None


class _StreamingContext(Context):
    symmetric: bool
    chunk: int
    group: ProcessGroup | None


class _Streaming(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _StreamingContext, x: Tensor, y: Tensor | None, chunk: int, group: ProcessGroup | None) -> Tensor:
        symmetric = y is None  # not y = x, as a function that takes one tensor twice cannot be compiled
        y = x if y is None else y
        ctx.symmetric, ctx.chunk, ctx.group = symmetric, chunk, group
        n, d = x.shape
        if by_rows(n, d, group):
            g = x @ x.T
            h = g if symmetric else y @ y.T
            diagonal = (x * y).sum(dim=0)
            ctx.save_for_backward(x, y, g, h, diagonal)  # n x n: less than half of x
            # Sums in float64: near decorrelation the two terms nearly cancel.
            energy = (g * h).sum(dtype=torch.float64) - diagonal.double().square().sum()
            return energy.to(x.dtype)
        ctx.save_for_backward(x, y)
        energy = x.new_zeros((), dtype=torch.float64)
        for k in range(0, d, chunk):
            a = k if symmetric else 0  # symmetric: only the upper triangle, counted twice
            c = _block(x, y, slice(k, min(k + chunk, d)), a, group)
            w = c.shape[0]
            if symmetric:
                energy += c[:, :w].square().sum() + 2 * c[:, w:].square().sum()
            else:
                energy += c.square().sum()
        return energy.to(x.dtype)

    @staticmethod
    @backward_without_autocast
    def backward(ctx: _StreamingContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "off_diagonal_energy: the streaming backend has no second derivative (create_graph=True); "
                "use backend='eager'"
            )
        x, y, *sides = ctx.saved_tensors
        symmetric, chunk, group = ctx.symmetric, ctx.chunk, ctx.group
        grad = _dist.all_sum(grad, group)  # a rank's rows reach the loss of every rank
        if sides:
            g, h, diagonal = sides
            if symmetric:
                return (g @ x).addcmul_(diagonal, x, value=-1).mul_(4 * grad), None, None, None
            dx = (h @ x).addcmul_(diagonal, y, value=-1).mul_(2 * grad)
            dy = (g @ y).addcmul_(diagonal, x, value=-1).mul_(2 * grad)
            return dx, dy, None, None
        d = x.shape[1]
        dx = torch.zeros_like(x)
        dy = dx if symmetric else torch.zeros_like(y)
        for k in range(0, d, chunk):
            a = k if symmetric else 0
            block = slice(k, min(k + chunk, d))
            c = _block(x, y, block, a, group)
            dx[:, block].addmm_(y[:, a:], c.T)
            rest = c[:, block.stop - a :] if symmetric else c
            dy[:, block.stop if symmetric else 0 :].addmm_(x[:, block], rest)
        if symmetric:
            return dx.mul_(4 * grad), None, None, None
        return dx.mul_(2 * grad), dy.mul_(2 * grad), None, None
