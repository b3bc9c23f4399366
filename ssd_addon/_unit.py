"""L2-normalized embeddings and the cosines of pairs, with as few copies of the batch as the gradient allows.

    joint[v, i] = [u_1, ..., u_S] / sqrt(S),   u_s = z_s[v, i] / |z_s[v, i]|
    cosines[p, i] = <u_s[a, i], u_s[b, i]>     for the pairs p = (a, b, s)

Written with torch's own functions, a step with two views stores seven copies of the joint embedding. Here it stores
two besides the gradient itself: the joint embedding and the entropy's gradient. The spaces are not stored.
Legend: V views, B images, S spaces.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssd_addon._autocast import Context, backward_without_autocast
from ssd_addon._shapes import Joint, Matrices, Matrix, PairRows, Vector

EPS = 1e-12  # smallest divisor, as in torch.nn.functional.normalize
ROWS = 1024  # rows per chunk of a product that is summed

Pairs = tuple[tuple[int, int, int], ...]


def joint_and_cosines(
    z: Sequence[Tensor], pairs: Pairs, types: Sequence[torch.dtype] | None = None, fused: bool = False
) -> tuple[Joint, PairRows]:
    """L2-normalized joint embeddings [V, B, sum of d_s], and the cosines [P, B] of the pairs (view a, view b, space s).

    An embedding whose length overflows becomes NaN, as does its gradient. Otherwise values and gradients are those of
    torch.nn.functional.normalize, with one exception: in 16-bit input, an embedding whose length is at most the
    smallest normal number of the dtype, such as one of zeros, gets the gradient 0; its gradient g / 1e-12 would be
    infinite in float16.

    Args:
        z: spaces [V, B, d_s], all of one dtype.
        types: original dtype of each space, before promotion for the loss; None means its dtype in z.
        fused: use a Triton kernel, if triton is available. For float32, with the pairs of each space adjacent.
    """
    smallest = tuple(map(without_direction, (t.dtype for t in z) if types is None else types))
    if torch.compiler.is_compiling():  # the compiler plans memory itself
        return _plain(z, pairs, smallest)
    if fused:
        from ssd_addon.kernels.unit import FusedUnit

        joint, cosines, _ = FusedUnit.apply(pairs, smallest, *z)
        return joint, cosines
    joint, cosines, _ = _JointAndCosines.apply(pairs, smallest, *z)
    return joint, cosines


def without_direction(dtype: torch.dtype) -> float:
    """Rows up to this length count as zero; negative if no row does."""
    return torch.finfo(dtype).smallest_normal if dtype.itemsize == 2 else -1.0


def unit_rows(z: Matrices, came_as: torch.dtype | None = None) -> Matrices:
    """L2-normalize the rows of z [..., d]; zero rows and overflow are handled as in `joint_and_cosines`.

    Args:
        came_as: original dtype of z, before promotion for the loss; None means its own.
    """
    return _unit(z, without_direction(came_as or z.dtype))


def _unit(z: Tensor, smallest: float) -> Tensor:
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    u = z / torch.where(length.isinf(), math.nan, length.clamp(min=EPS))
    return u if smallest < 0 else torch.where(length <= smallest, u.detach(), u)


def _plain(z: Sequence[Tensor], pairs: Pairs, smallest: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """The definition in torch's own functions; `smallest` is `without_direction` of each space, None as for float32."""
    unit = [_unit(t, least) for t, least in zip(z, smallest or [-1.0] * len(z), strict=True)]
    cosines = torch.stack([(unit[s][a] * unit[s][b]).sum(dim=-1) for a, b, s in pairs])
    return torch.cat(unit, dim=-1) / math.sqrt(len(z)), cosines


def columns_of(widths: Sequence[int]) -> list[slice]:
    """The columns of each space in the joint embedding."""
    ends = list(itertools.accumulate(widths))
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def _divisors(lengths: Tensor) -> Tensor:
    """The divisors of rows, [S, V, B, 1], from their lengths [S, V, B]."""
    return lengths.clamp(min=EPS).mul_(math.sqrt(len(lengths)))[..., None]


def _row_products(a: Matrix, b: Matrix) -> Vector:
    """<a_i, b_i> [B] for a, b [B, d]; on a CPU in chunks that fit in the cache."""
    if len(a) <= ROWS or a.device.type != "cpu":
        return (a * b).sum(dim=-1)
    return torch.cat([(a[r : r + ROWS] * b[r : r + ROWS]).sum(dim=-1) for r in range(0, len(a), ROWS)])


def differentiable(
    ctx: "JointContext", joint: Tensor, lengths: Tensor, grad: Tensor | None, grad_cosines: Tensor | None,
    grad_lengths: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradient of (joint, cosines, lengths) by space, as a differentiable function of its arguments.

    joint and lengths are results of z, and the second derivative goes through them, so z itself is not stored.
    """
    found: list[Tensor | None] = []
    s = len(lengths)
    for k, (c, need) in enumerate(zip(ctx.columns, ctx.needs_input_grad[2:], strict=True)):
        if not need:
            found.append(None)
            continue
        u, length = joint[..., c], lengths[k, ..., None]
        views = list((torch.zeros_like(u) if grad is None else grad[..., c]).unbind(0))
        for q, (a, b, space) in enumerate(ctx.pairs):
            if space == k and grad_cosines is not None:
                g = s * grad_cosines[q, :, None]
                views[a], views[b] = views[a] + g * u[b], views[b] + g * u[a]
        g, divisor = torch.stack(views), length.clamp(min=EPS) * math.sqrt(s)
        along = s * (g * u).sum(dim=-1, keepdim=True)
        dz = (g - torch.where(length > EPS, along, 0) * u) / divisor
        if grad_lengths is not None:
            dz = dz + _along_length(grad_lengths[k], u, length, divisor)
        found.append(torch.where(length <= ctx.smallest[k], 0, dz) if ctx.smallest[k] >= 0 else dz)
    return tuple(found)


def _along_length(grad: Tensor, u: Tensor, length: Tensor, divisor: Tensor) -> Tensor:
    """grad * z / |z|, 0 for a row of zeros."""
    return grad[..., None] * u * (divisor / length.clamp(min=torch.finfo(u.dtype).tiny))


class JointContext(Context):
    """Attributes that both forms store in addition to the joint embedding and the lengths of its rows."""

    pairs: Pairs
    smallest: tuple[float, ...]
    columns: list[slice]  # columns of each space in the joint embedding


class _JointAndCosines(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: JointContext, pairs: Pairs, smallest: tuple[float, ...], *z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        s = len(z)
        joint = z[0].new_empty((*z[0].shape[:2], sum(t.shape[-1] for t in z)))
        lengths = joint.new_empty((s, *joint.shape[:2]))
        columns = columns_of([t.shape[-1] for t in z])
        for t, length in zip(z, lengths, strict=True):
            torch.linalg.vector_norm(t, dim=-1, out=length)
        lengths.masked_fill_(lengths.isinf(), math.nan)  # x / inf would be 0, a wrong number
        for t, divisor, c in zip(z, _divisors(lengths), columns, strict=True):
            torch.div(t, divisor, out=joint[..., c])
        rows = [_row_products(joint[a, :, columns[k]], joint[b, :, columns[k]]) for a, b, k in pairs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(joint, lengths)
        ctx.pairs, ctx.smallest, ctx.columns = pairs, smallest, columns
        return joint, torch.stack(rows).mul_(s), lengths

    @staticmethod
    @backward_without_autocast
    def backward(
        ctx: JointContext, grad: Tensor | None, grad_cosines: Tensor | None, grad_lengths: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        joint, lengths = ctx.saved_tensors
        s, needed = len(lengths), ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or grad_lengths is not None:  # create_graph=True, or the pass that follows it
            return None, None, *differentiable(ctx, joint, lengths, grad, grad_cosines, grad_lengths)
        found: list[Tensor | None] = []
        divisors = _divisors(lengths)
        # A row shorter than EPS was divided by EPS, and its length has no gradient.
        factors = torch.where(lengths > EPS, -float(s), 0.0)
        for k, c in enumerate(ctx.columns):
            if not needed[k]:
                found.append(None)
                continue
            own = joint[..., c]
            dz = torch.zeros_like(own) if grad is None else grad[..., c].clone(memory_format=torch.contiguous_format)
            for g, (a, b, space) in zip(() if grad_cosines is None else grad_cosines, ctx.pairs, strict=False):
                if space == k:
                    dz[a].addcmul_(joint[b, :, c], g[:, None], value=s)
                    dz[b].addcmul_(joint[a, :, c], g[:, None], value=s)
            along = torch.stack([_row_products(joint[v, :, c], d) for v, d in enumerate(dz)]).mul_(factors[k])
            dz.addcmul_(joint[..., c], along[..., None]).div_(divisors[k])
            if ctx.smallest[k] >= 0:
                dz.masked_fill_(lengths[k, ..., None] <= ctx.smallest[k], 0)
            found.append(dz)
        return None, None, *found
