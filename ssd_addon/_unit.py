"""Rows of unit length and the cosines of their pairs, with as few copies of the batch as the gradient allows.

    joint[v, i] = [u_1, ..., u_S] / sqrt(S),   u_s = z_s[v, i] / |z_s[v, i]|
    cosines[p, i] = <u_s[a, i], u_s[b, i]>     for the pairs p = (a, b, s)

Chained from torch's own functions, a step of two views keeps seven copies of the joint embedding; here it is two beside
the gradient itself: the joint embedding, and the entropy's gradient. Legend: V views, B images, S spaces.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # of the length, as in torch.nn.functional.normalize
ROWS = 1024  # of a product that is made only to be summed

Pairs = tuple[tuple[int, int, int], ...]


def joint_and_cosines(z: Sequence[Tensor], pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Joint rows [V, B, sum of d_s] of unit length, and the cosines [P, B] of the pairs (view a, view b, space s).

    z: spaces [V, B, d_s].
    """
    if torch.compiler.is_compiling():  # the compiler makes its own plan for memory
        return _plain(z, pairs)
    joint, cosines = _JointAndCosines.apply(pairs, *z)
    return joint, cosines


def _plain(z: Sequence[Tensor], pairs: Pairs) -> tuple[Tensor, Tensor]:
    unit = [F.normalize(t, dim=-1, eps=EPS) for t in z]
    cosines = torch.stack([(unit[s][a] * unit[s][b]).sum(dim=-1) for a, b, s in pairs])
    return torch.cat(unit, dim=-1) / math.sqrt(len(z)), cosines


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """<a_i, b_i> [B] of a, b [B, d], a few rows at a time."""
    parts = zip(a.split(ROWS), b.split(ROWS), strict=True)
    return torch.cat([(x * y).sum(dim=-1) for x, y in parts]) if len(a) else a.new_zeros(0)


class _JointAndCosines(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Pairs, *z: Tensor) -> tuple[Tensor, Tensor]:
        s = len(z)
        joint = z[0].new_empty((*z[0].shape[:2], sum(t.shape[-1] for t in z)))
        columns, lengths, start = [], [], 0
        for t in z:
            columns.append(slice(start, start + t.shape[-1]))
            lengths.append(torch.linalg.vector_norm(t, dim=-1, keepdim=True))
            torch.div(t, lengths[-1].clamp(min=EPS) * math.sqrt(s), out=joint[..., columns[-1]])
            start += t.shape[-1]
        rows = [_row_products(joint[a, :, columns[k]], joint[b, :, columns[k]]) for a, b, k in pairs]
        ctx.save_for_backward(joint, *lengths, *z)
        ctx.static = (pairs, columns)
        return joint, torch.stack(rows) * s

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_cosines: Tensor) -> tuple[Tensor | None, ...]:
        joint, *rest = ctx.saved_tensors
        s = len(rest) // 2
        lengths, z = rest[:s], rest[s:]
        pairs, columns = ctx.static
        if torch.is_grad_enabled():  # create_graph=True: a second derivative is wanted
            with torch.enable_grad():
                out = _plain(z, pairs)
                return None, *torch.autograd.grad(out, z, (grad, grad_cosines), create_graph=True)
        found = []
        for k, (t, c, length) in enumerate(zip(z, columns, lengths, strict=True)):
            dz = grad[..., c].clone(memory_format=torch.contiguous_format)
            for g, (a, b, space) in zip(grad_cosines, pairs, strict=True):
                if space == k:
                    dz[a].addcmul_(joint[b, :, c], g[:, None], value=s)
                    dz[b].addcmul_(joint[a, :, c], g[:, None], value=s)
            for v in range(t.shape[0]):
                # A row shorter than EPS was divided by EPS, and its length has no gradient.
                along = torch.where(length[v] > EPS, _row_products(joint[v, :, c], dz[v])[:, None], 0)
                dz[v].addcmul_(joint[v, :, c], along, value=-s).div_(length[v].clamp(min=EPS) * math.sqrt(s))
            found.append(dz)
        return None, *found
