"""The "streaming" backend of the log-sums: blocks of rows, nothing of size N x N, on any device.

Equations and legend: `similarity`. C rows of a block; E levels (1, or 2 with a prefix).
"""

import math
from typing import Any

import torch
from torch import Tensor

from ssd_addon import _dist

EXPONENT = 80.0
"""exp(80) and N * exp(80) stay inside float32, and so do their inverses."""

LOG2E = math.log2(math.e)
"""The blocks hold s_ij / log 2, so that exp(s_ij) is exp2 of them: a third of the time of exp on a CPU."""


class Streaming(torch.autograd.Function):
    """Blocks of rows I times blocks of rows J; nothing of size N x N. One process: I <= J, the triangle only."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        tau: Tensor,
        ids: Tensor,
        levels: tuple[tuple[int, int], ...],
        s: _dist.Shards,
        chunk: int | None,
    ) -> Tensor:
        every, every_id = _dist.gather(z, s), _dist.gather(ids, s)
        # Numbered from 0 and in the type of z (whole up to 2^24 images in float32): comparing floats vectorises.
        every_id = torch.unique(every_id, return_inverse=True)[1].to(z.dtype)
        ids = every_id[s.offset : s.offset + s.size]
        blocks = _Blocks(z, ids, every, every_id, 1.0 / tau.item(), levels, s, chunk)
        shift = blocks.analytic_shift()
        lse = blocks.lse_by_maximum() if shift is None else blocks.lse_by_shift(shift)
        ctx.save_for_backward(z, tau, ids, every, every_id, lse)
        ctx.static = (levels, s, chunk, shift)
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "negative_lse: the streaming backend has no second derivative (create_graph=True); use backend='eager'"
            )
        z, tau, ids, every, every_id, lse = ctx.saved_tensors
        levels, s, chunk, shift = ctx.static
        blocks = _Blocks(z, ids, every, every_id, 1.0 / tau.item(), levels, s, chunk)
        dz = blocks.gradient(lse, grad, shift)
        dtau = -(z * dz).sum() / (2 * tau) if ctx.needs_input_grad[1] else None
        return dz, dtau, None, None, None, None


class _Context:
    """Stands in for autograd's, for the operators that torch.compile sees."""

    needs_input_grad = (True, True)
    saved_tensors: tuple[Tensor, ...]
    static: tuple[Any, ...]

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


@torch.library.custom_op("ssd_addon::streaming_lse", mutates_args=())
def streaming_lse(z: Tensor, tau: Tensor, ids: Tensor, prefix: int, chunk: int) -> Tensor:
    """[N, E]; one process. Loops that depend on values are opaque to the compiler."""
    levels = ((0, prefix), (prefix, z.shape[1])) if prefix else ((0, z.shape[1]),)
    alone = _dist.Shards(None, (z.shape[0],), 0)
    return Streaming.forward(_Context(), z, tau, ids, levels, alone, chunk or None)


@streaming_lse.register_fake
def _(z, tau, ids, prefix, chunk):  # type: ignore[no-untyped-def]
    return z.new_empty((z.shape[0], 2 if prefix else 1))


@torch.library.custom_op("ssd_addon::streaming_lse_backward", mutates_args=())
def _streaming_backward(
    grad: Tensor, lse: Tensor, z: Tensor, tau: Tensor, ids: Tensor, prefix: int, chunk: int
) -> tuple[Tensor, Tensor]:
    ctx = _Context()
    levels = ((0, prefix), (prefix, z.shape[1])) if prefix else ((0, z.shape[1]),)
    alone = _dist.Shards(None, (z.shape[0],), 0)
    number = torch.unique(ids, return_inverse=True)[1].to(z.dtype)
    shift = _Blocks(z, number, z, number, 1.0 / tau.item(), levels, alone, chunk or None).analytic_shift()
    ctx.saved_tensors = (z, tau, number, z, number, lse)
    ctx.static = (levels, alone, chunk or None, shift)
    dz, dtau, *_ = Streaming.backward(ctx, grad.contiguous())
    assert dz is not None and dtau is not None
    return dz, dtau


@_streaming_backward.register_fake
def _(grad, lse, z, tau, ids, prefix, chunk):  # type: ignore[no-untyped-def]
    return z.new_empty(z.shape), torch.empty_like(tau)


def _save_streaming(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, tau, ids, *ctx.static = inputs
    ctx.save_for_backward(output, z, tau, ids)


def _differentiate_streaming(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dz, dtau = _streaming_backward(grad, *ctx.saved_tensors, *ctx.static)
    return dz, dtau, None, None, None


streaming_lse.register_autograd(_differentiate_streaming, setup_context=_save_streaming)


class _Blocks:
    """The loop over pairs of blocks, shared by forward and backward."""

    def __init__(
        self,
        z: Tensor,
        ids: Tensor,
        every: Tensor,
        every_id: Tensor,
        scale: float,
        levels: tuple[tuple[int, int], ...],
        s: _dist.Shards,
        chunk: int | None,
    ) -> None:
        self.z, self.ids, self.every, self.every_id = z, ids, every, every_id
        self.scale, self.levels, self.shards = scale, levels, s
        self.triangle = s.group is None
        self.c = chunk or block_rows(z.shape[1], z.device)
        self.rows = self._split(ids)
        self.columns = self.rows if self.triangle else self._split(every_id)
        elements = min(self.c, max(z.shape[0], 1)) * min(self.c, max(every.shape[0], 1))
        self.buffers = [z.new_empty(elements) for _ in levels] + [z.new_empty(elements)]

    def _split(self, ids: Tensor) -> list[tuple[int, int, int, int]]:
        """(start, stop, smallest id, largest id) of each block: blocks of disjoint id ranges need no comparison."""
        starts = range(0, ids.shape[0], self.c)
        if not len(starts):
            return []
        parts = ids.split(self.c)
        low = torch.stack([p.min() for p in parts]).tolist()
        high = torch.stack([p.max() for p in parts]).tolist()
        return [(a, min(a + self.c, ids.shape[0]), lo, hi) for a, lo, hi in zip(starts, low, high, strict=True)]

    def _buffer(self, k: int, i: slice, j: slice) -> Tensor:
        h, w = i.stop - i.start, j.stop - j.start
        return self.buffers[k][: h * w].view(h, w)

    def pairs(self) -> Any:
        """(I, J, s_IJ / log 2 per level): s of each level sums the columns up to it; same images are -inf.

        The levels share their accumulator: use (and overwrite) what is yielded before asking for the next.
        """
        scale = self.scale * LOG2E
        for p, (a, b, low, high) in enumerate(self.rows):
            i = slice(a, b)
            for e, f, lo, hi in self.columns[p:] if self.triangle else self.columns:
                j = slice(e, f)
                logits: list[Tensor] = []
                for k, (first, last) in enumerate(self.levels):
                    acc = self._buffer(k, i, j)
                    zi, zj = self.z[i, first:last], self.every[j, first:last].T
                    if k:
                        torch.addmm(logits[-1], zi, zj, beta=1, alpha=scale, out=acc)
                    else:
                        torch.addmm(acc, zi, zj, beta=0, alpha=scale, out=acc)
                        if low <= hi and lo <= high:
                            # +inf where the images differ, -inf where not: a tenth of the time of masked_fill.
                            limit = self.buffers[-1][: acc.numel()].view_as(acc)
                            torch.ne(self.ids[i, None], self.every_id[None, j], out=limit).sub_(0.5).mul_(math.inf)
                            torch.minimum(acc, limit, out=acc)
                    logits.append(acc)
                yield i, j, logits

    def analytic_shift(self) -> float | None:
        """A constant that keeps every exp inside the range of float32, or None where there is none.

        |s_ij| <= R/tau with R the largest squared length. Over- and underflow are both excluded when
        2 R/tau + log N <= 160; otherwise the row maximum is taken.
        """
        if self.z.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        n = self.every.shape[0]
        if not n:
            return None
        bound = torch.linalg.vector_norm(self.every, dim=1).max().square().item() * self.scale
        if not 2 * bound + math.log(n) <= 2 * EXPONENT:
            return None
        return max(0.0, bound + math.log(n) - EXPONENT)

    def lse_by_shift(self, shift: float) -> Tensor:
        total = self.z.new_zeros(len(self.levels), self.z.shape[0])
        for i, j, logits in self.pairs():
            # The last level first: it may overwrite its accumulator, the others are still being read.
            for k in reversed(range(len(logits))):
                e = logits[k].sub_(shift * LOG2E).exp2_() if shift else logits[k].exp2_()
                total[k, i] += e.sum(dim=1)
                if self.triangle and i.start != j.start:
                    total[k, j] += e.sum(dim=0)
        return torch.where(total > 0, total.log() + shift, math.nan).T.contiguous()

    def lse_by_maximum(self) -> Tensor:
        """Row by row with a running maximum: any length of the rows, any temperature."""
        triangle, self.triangle = self.triangle, False
        e = len(self.levels)
        top = self.z.new_full((e, self.z.shape[0]), -math.inf)
        total = self.z.new_zeros(e, self.z.shape[0])
        for i, _, logits in self.pairs():
            for k, s in enumerate(logits):
                new = torch.maximum(top[k, i], s.amax(dim=1))
                safe = torch.where(new == -math.inf, 0.0, new)
                total[k, i] *= (top[k, i] - safe).exp2()
                work = torch.sub(s, safe[:, None], out=self.buffers[-1][: s.numel()].view_as(s))
                total[k, i] += work.exp2_().sum(dim=1)
                top[k, i] = new
        self.triangle = triangle
        return torch.where(total > 0, (total.log2() + top) / LOG2E, total + math.nan).T.contiguous()

    def gradient(self, lse: Tensor, grad: Tensor, shift: float | None) -> Tensor:
        """dL/dz of the local rows. Across ranks the n coefficients are gathered, not the gradients of N rows."""
        by_shift = shift is not None
        if self.triangle:
            grad_all, lse_all = grad, lse
        else:
            grad_all, lse_all = _dist.gather(grad, self.shards), _dist.gather(lse, self.shards)
        # exp(shift - lse) alone spans float32: cotangents of 1/N or 65536 leave it unless they are 1 at most.
        unit = grad_all.abs().max() if by_shift and grad_all.numel() else grad.new_ones(())
        unit = torch.where(unit > 0, unit, 1.0)
        c_all = grad_all / unit * torch.exp((shift or 0.0) - lse_all) if by_shift else grad_all
        c = c_all[self.shards.offset : self.shards.offset + self.shards.size]
        lse, lse_all = lse * LOG2E, lse_all * LOG2E
        dz = torch.zeros_like(self.z)
        for i, j, logits in self.pairs():
            weights: Tensor | None = None
            for k in reversed(range(len(logits))):
                work = self.buffers[-1][: logits[k].numel()].view_as(logits[k])
                if by_shift:
                    w = logits[k].sub_(shift * LOG2E).exp2_() if shift else logits[k].exp2_()
                    w.mul_(torch.add(c[i, k, None], c_all[None, j, k], out=work))
                else:
                    torch.sub(logits[k], lse[i, k, None], out=work).exp2_().mul_(c[i, k, None])
                    w = logits[k].sub_(lse_all[None, j, k]).exp2_().mul_(c_all[None, j, k]).add_(work)
                # A column of level k is in the similarities of level k and of all levels above it.
                weights = w if weights is None else weights.add_(w)
                first, last = self.levels[k]
                dz[i, first:last].addmm_(weights, self.every[j, first:last], alpha=self.scale)
                if self.triangle and i.start != j.start:
                    dz[j, first:last].addmm_(weights.T, self.z[i, first:last], alpha=self.scale)
        return dz.mul_(unit)


def block_rows(width: int, device: torch.device) -> int:
    """Rows C of a block: its two or three C x C buffers should stay in the cache (CPU), or fill the device (CUDA).

    On a CPU 512 to 768 took the same time within 3 % at widths 128 and 512, and 320 up to a quarter more. Larger blocks
    waste more of the diagonal, where both triangles are computed; smaller ones hand more and shorter pieces to the
    threads, which a busy machine punishes.
    """
    return 4096 if device.type == "cuda" else 512
