"""The "streaming" backend of the log-sums: works on blocks of rows, without N x N matrices, on any device.

Equations and legend as in `similarity`; C rows per block, E levels (1, or 2 with a prefix).
"""

import ctypes
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ssd_addon import _dist
from ssd_addon._autocast import Context, backward_without_autocast
from ssd_addon.kernels.dispatch import capturing
from ssd_addon.kernels.operands import longest_row, relabeled
from ssd_addon.kernels.ranges import LOG2E, constant_shift, largest_exponent

Levels = tuple[tuple[int, int], ...]


class _StreamingContext(Context):
    levels: Levels
    shards: _dist.Shards
    chunk: int | None
    scale: float | Tensor
    shift: float | None


class Streaming(torch.autograd.Function):
    """Log-sums over pairs of row blocks (I, J), without N x N matrices; in one process only the triangle I <= J.

    temperature, longest: tau and the length of the longest row over all ranks, as host numbers. If None, they are read
    from the device, both at once.
    """

    @staticmethod
    def forward(
        ctx: _StreamingContext, z: Tensor, tau: Tensor, ids: Tensor, levels: Levels, s: _dist.Shards,
        chunk: int | None, temperature: float | None, longest: float | None, id_range: tuple[int, int] | None,
    ) -> Tensor:  # fmt: skip
        every = _dist.gather(z, s)
        every_id = _numbered(_dist.gather(ids.to(torch.int64), s), id_range, z.dtype)
        ids = every_id[s.offset : s.offset + s.size]
        scale, shift = _scale_and_shift(every, tau, temperature, longest)
        lse = _Blocks(z, ids, every, every_id, scale, levels, s, chunk).lse(shift)
        ctx.save_for_backward(z, tau, ids, every, every_id, lse)
        ctx.levels, ctx.shards, ctx.chunk, ctx.scale, ctx.shift = levels, s, chunk, scale, shift
        return lse

    @staticmethod
    @backward_without_autocast
    def backward(ctx: _StreamingContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "negative_lse: the streaming backend has no second derivative (create_graph=True); use backend='eager'"
            )
        z, tau, ids, every, every_id, lse = ctx.saved_tensors
        blocks = _Blocks(z, ids, every, every_id, ctx.scale, ctx.levels, ctx.shards, ctx.chunk)
        dz = blocks.gradient(lse, grad, ctx.shift)
        dtau = -(z * dz).sum() / (2 * tau) if ctx.needs_input_grad[1] else None
        return dz, dtau, *(None,) * 7


@torch.library.custom_op("ssd_addon::streaming_lse", mutates_args=())
def streaming_lse(z: Tensor, tau: Tensor, ids: Tensor, prefix: int, chunk: int) -> Tensor:
    """Log-sums [N, E] in one process, as an operator: loops that depend on values are opaque to the compiler."""
    number = _numbered(ids, None, z.dtype)
    scale, shift = _scale_and_shift(z, tau, None, None)
    return _alone(z, number, scale, prefix, chunk).lse(shift)


@streaming_lse.register_fake
def _(z, tau, ids, prefix, chunk):  # type: ignore[no-untyped-def]
    return z.new_empty((z.shape[0], 2 if prefix else 1))


@torch.library.custom_op("ssd_addon::streaming_lse_backward", mutates_args=())
def streaming_lse_backward(
    grad: Tensor, lse: Tensor, z: Tensor, tau: Tensor, ids: Tensor, prefix: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """(dz [N, D], dtau 0-dim) for the upstream gradient [N, E]."""
    number = _numbered(ids, None, z.dtype)
    scale, shift = _scale_and_shift(z, tau, None, None)
    dz = _alone(z, number, scale, prefix, chunk).gradient(lse, grad.contiguous(), shift)
    return dz, -(z * dz).sum() / (2 * tau)


@streaming_lse_backward.register_fake
def _(grad, lse, z, tau, ids, prefix, chunk):  # type: ignore[no-untyped-def]
    return z.new_empty(z.shape), torch.empty_like(tau)


class _OperatorContext(Context):
    prefix: int
    chunk: int


def _save_streaming(ctx: _OperatorContext, inputs: tuple[Tensor, Tensor, Tensor, int, int], output: Tensor) -> None:
    z, tau, ids, ctx.prefix, ctx.chunk = inputs
    ctx.save_for_backward(output, z, tau, ids)


@backward_without_autocast
def _differentiate_streaming(ctx: _OperatorContext, grad: Tensor) -> tuple[Tensor | None, ...]:
    lse, z, tau, ids = ctx.saved_tensors
    dz, dtau = streaming_lse_backward(grad, lse, z, tau, ids, ctx.prefix, ctx.chunk)
    return dz, dtau, None, None, None


streaming_lse.register_autograd(_differentiate_streaming, setup_context=_save_streaming)


def _numbered(ids: Tensor, id_range: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """Ids as numbers in the dtype of the rows, with the same equalities, because float comparisons are vectorized.

    float32 holds integers up to 2^24 exactly: ids are offset if their range is smaller, and renumbered otherwise.
    """
    if id_range is None and reads_are_free(ids.device) and len(ids):
        low, high = ids.aminmax()
        id_range = int(low), int(high)
    if id_range is not None and id_range[1] - id_range[0] < 2**24:
        return (ids.to(torch.int64) - id_range[0]).to(dtype)
    return relabeled(ids).to(dtype)


def _scale_and_shift(
    every: Tensor, tau: Tensor, temperature: float | None, longest: float | None
) -> tuple[float | Tensor, float | None]:
    """1/tau, and the constant shift of `ranges` (None: maxima). Reads the device at most once, and not while a CUDA
    graph is captured: 1/tau is then a tensor if the temperature is one."""
    captured = capturing(every.device)
    if captured and temperature is None:  # values cannot be read during capture: the scale stays on the device
        return 1.0 / tau.to(every.dtype), None
    measured = longest is None and not captured
    unknown = [tau] * (temperature is None) + [longest_row(every)] * measured
    read = torch.stack(unknown).tolist() if unknown else []
    if measured:
        longest = read[-1]
    tau_ = _rounded(read[0] if temperature is None else temperature, every.dtype)
    if not 0 < tau_ < math.inf:  # a tensor makes everything NaN; some matrix products drop a NaN scalar factor
        return every.new_full((), math.nan), None
    if longest is None or not every.shape[0]:
        return 1.0 / tau_, None
    bound = largest_exponent(_rounded(longest * longest, every.dtype), tau_)
    return 1.0 / tau_, constant_shift(bound, every.shape[0])


def _rounded(value: float, dtype: torch.dtype) -> float:
    """A host number rounded as on the device, in float32 or float64, so that results do not depend on its origin."""
    return value if dtype == torch.float64 else ctypes.c_float(value).value


def _alone(z: Tensor, number: Tensor, scale: float | Tensor, prefix: int, chunk: int) -> "_Blocks":
    levels = ((0, prefix), (prefix, z.shape[1])) if prefix else ((0, z.shape[1]),)
    return _Blocks(z, number, z, number, scale, levels, _dist.Shards(None, (z.shape[0],), 0), chunk or None)


class _Blocks:
    """The loop over pairs of blocks, shared by forward and backward; scale is 1/tau."""

    def __init__(
        self, z: Tensor, ids: Tensor, every: Tensor, every_id: Tensor, scale: float | Tensor, levels: Levels,
        s: _dist.Shards, chunk: int | None,
    ) -> None:  # fmt: skip
        self.z, self.ids, self.every, self.every_id = z, ids, every, every_id
        self.levels, self.shards = levels, s
        # A scale on the device multiplies the rows of one side, and finally the gradient.
        self.after = scale if isinstance(scale, Tensor) else None
        self.left, self.alpha = (z * scale, 1.0) if isinstance(scale, Tensor) else (z, scale)
        self.triangle = s.group is None
        self.c = chunk or block_rows(z.shape[1], z.device)
        self.rows = _split(ids, self.c)
        self.columns = self.rows if self.triangle else _split(every_id, self.c)
        elements = min(self.c, max(z.shape[0], 1)) * min(self.c, max(every.shape[0], 1))
        self.buffers = [z.new_empty(elements) for _ in levels] + [z.new_empty(elements)]

    def _buffer(self, k: int, i: slice, j: slice) -> Tensor:
        h, w = i.stop - i.start, j.stop - j.start
        return self.buffers[k][: h * w].view(h, w)

    def pairs(self) -> Iterator[tuple[slice, slice, list[Tensor]]]:
        """Yield (I, J, s_IJ / log 2 per level); s of a level sums all columns up to it; same images are -inf.

        The levels share an accumulator: use (and overwrite) each result before requesting the next.
        """
        scale = self.alpha * LOG2E
        for p, (a, b, low, high) in enumerate(self.rows):
            i = slice(a, b)
            for e, f, lo, hi in self.columns[p:] if self.triangle else self.columns:
                j = slice(e, f)
                logits: list[Tensor] = []
                for k, (first, last) in enumerate(self.levels):
                    acc = self._buffer(k, i, j)
                    zi, zj = self.left[i, first:last], self.every[j, first:last].T
                    if k:
                        torch.addmm(logits[-1], zi, zj, beta=1, alpha=scale, out=acc)
                    else:
                        torch.addmm(acc, zi, zj, beta=0, alpha=scale, out=acc)
                        if low <= hi and lo <= high:
                            # +inf if the images differ, else -inf: takes a tenth of the time of masked_fill.
                            limit = self.buffers[-1][: acc.numel()].view_as(acc)
                            torch.ne(self.ids[i, None], self.every_id[None, j], out=limit).sub_(0.5).mul_(math.inf)
                            torch.minimum(acc, limit, out=acc)
                    logits.append(acc)
                yield i, j, logits

    def lse(self, shift: float | None) -> Tensor:
        """Log-sums [n, E]; NaN for rows without a negative."""
        return self._lse_by_maximum() if shift is None else self._lse_by_shift(shift)

    def _lse_by_shift(self, shift: float) -> Tensor:
        total = self.z.new_zeros(len(self.levels), self.z.shape[0])
        for i, j, logits in self.pairs():
            # The last level first: only it may overwrite the accumulator, which the others still need.
            for k in reversed(range(len(logits))):
                e = logits[k].sub_(shift * LOG2E).exp2_() if shift else logits[k].exp2_()
                total[k, i] += e.sum(dim=1)
                if self.triangle and i.start != j.start:
                    total[k, j] += e.sum(dim=0)
        return torch.where(total > 0, total.log() + shift, math.nan).T.contiguous()

    def _lse_by_maximum(self) -> Tensor:
        """Log-sums with a running maximum per row, for any row length and temperature."""
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
        """dL/dz of the local rows. Over ranks the coefficients of rows are gathered, not the gradients of N rows."""
        by_shift = shift is not None
        if self.triangle:
            grad_all, lse_all = grad, lse
        else:
            grad_all, lse_all = _dist.gather(grad, self.shards), _dist.gather(lse, self.shards)
        # exp(shift - lse) uses the whole range of float32, so upstream gradients are scaled to at most 1.
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
                # A column of level k contributes to the similarities of level k and of all later levels.
                weights = w if weights is None else weights.add_(w)
                first, last = self.levels[k]
                dz[i, first:last].addmm_(weights, self.every[j, first:last], alpha=self.alpha)
                if self.triangle and i.start != j.start:
                    dz[j, first:last].addmm_(weights.T, self.z[i, first:last], alpha=self.alpha)
        return dz.mul_(unit if self.after is None else unit * self.after)


def _split(ids: Tensor, c: int) -> list[tuple[int, int, float, float]]:
    """(start, stop, smallest id, largest id) of each block; blocks with disjoint ranges need no comparison of ids.

    Used only if reading ids costs nothing; on other devices every pair of blocks is compared.
    """
    blocks = [(a, min(a + c, ids.shape[0])) for a in range(0, ids.shape[0], c)]
    if not blocks:
        return []
    if not reads_are_free(ids.device):
        return [(a, b, -math.inf, math.inf) for a, b in blocks]
    ranges = torch.stack([torch.stack(ids[a:b].aminmax()) for a, b in blocks]).tolist()
    return [(a, b, low, high) for (a, b), (low, high) in zip(blocks, ranges, strict=True)]


def reads_are_free(device: torch.device) -> bool:
    """Whether values can be read without waiting for the device."""
    return device.type == "cpu"


def block_rows(width: int, device: torch.device) -> int:
    """The number of rows C per block: its two or three C x C buffers should fit in the cache (CPU) or fill the device
    (CUDA). Larger blocks waste work on the diagonal, where both triangles are computed; smaller blocks give threads
    more and shorter tasks.
    """
    # On a CPU, 512 to 768 took the same time within 3 % at widths 128 and 512, and 320 up to a quarter more.
    return 4096 if device.type == "cuda" else 512
