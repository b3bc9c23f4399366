"""The exact gradient of a large batch in the memory of a small one.

    z       = model(batch), computed in chunks, without a graph
    g       = dL/dz of the whole batch
    dL/dw   = sum over chunks of (dz_chunk/dw)^T g_chunk, where each chunk is run a second time, with a graph

The gradient is exact only if both passes compute the same embeddings. The second pass therefore starts from the buffers
and the random generators of the first. As it runs the same chunks in the same order, what a chunk leaves in the buffers
(running statistics, the steps of a spectral norm) is there again for the next, so that one copy of them is enough.

Source: Gao et al. 2021, arXiv 2101.06983 (GradCache).
"""

import contextlib
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ssd_addon import _checks
from ssd_addon.batch import ViewBatch
from ssd_addon.embeddings import Embeddings, of_batch

ROUNDING = {2: 0.05, 4: 1e-2, 8: 1e-6}
"""Bytes of a number -> the difference between the passes, as a fraction of the embeddings, that rounding may cause."""


def two_pass(model: nn.Module, batch: ViewBatch, criterion: Callable[[Embeddings], Tensor], *, chunk: int) -> Tensor:
    """The loss of the whole batch; its gradients are added to `.grad` of all parameters, as by `loss.backward()`.

    Activations take the memory of `chunk` images; the model runs twice. What changes while it runs is the same in both
    runs: buffers, dropout, and draws from the generators of torch, Python and numpy. The parameters of the criterion (a
    learned temperature) get their gradients too. Call no `backward()` on the result: the gradients are there.

    Over ranks, give the criterion `gather_distributed=True`. A DistributedDataParallel model averages gradients once,
    after the last chunk, and ranks may hold different numbers of images. FSDP2 averages after every chunk, as it does
    not keep whole gradients, and needs the same number of chunks on every rank. Parameters of the criterion get the
    gradient of their rank: average it as you would after a backward pass of your own.

    >>> from ssd_addon import JointEntropyLoss, StyleHeads, ViewPlan
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> model = StyleHeads(net, {"content": 4, "color": 2}, in_features=8, hidden=())
    >>> batch = ViewBatch(torch.rand(3, 64, 3, 8, 8), ViewPlan.shared_query(("content", "color")))
    >>> loss = two_pass(model, batch, JointEntropyLoss(), chunk=16)
    >>> loss.shape, net[0].weight.grad.abs().sum() > 0
    (torch.Size([]), tensor(True))

    Args:
        model: `StyleHeads`, also inside DistributedDataParallel or FSDP2, or any module that maps a `ViewBatch` to
            `Embeddings`.
        batch: the whole batch, with any plan.
        criterion: function of the embeddings; it may add terms, `lambda z: criterion(z) + equivariance(z, batch)`.
        chunk: number of images, with all their views, that go through the model at once.

    Batch norm that uses the statistics of a batch uses those of each chunk, as with gradient accumulation: a warning
    says so, and running statistics are updated once. No warning comes where a module calls
    `torch.nn.functional.batch_norm` itself, as this cannot be seen from outside. A spectral norm takes a step for each
    chunk.

    With float16, scale the loss inside the criterion; the result is scaled too:

        with torch.autocast("cuda", torch.float16):
            two_pass(model, batch, lambda z: scaler.scale(criterion(z)), chunk=64)
        scaler.step(optimizer)

    Returns:
        The loss, detached.

    Raises:
        TypeError: batch is not a `ViewBatch`; the model is not a module, or does not return `Embeddings`; the criterion
            does not return a tensor.
        ValueError: chunk is below 1; the batch has no images; the loss is not a scalar or depends on no embedding; no
            parameter of the model is trained; the second pass gave other embeddings than the first, so that the
            gradients are wrong; DistributedDataParallel has static_graph=True; the ranks have different numbers of
            chunks and the model communicates in its forward pass (FSDP, SyncBatchNorm).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected an nn.Module: got {type(model).__name__}; put the call into the forward of a module"
        )
    if not isinstance(batch, ViewBatch):
        raise TypeError(f"batch: expected a ViewBatch: got {type(batch).__name__}")
    size = _checks.width(chunk, "chunk")
    if not batch.images:
        raise ValueError("batch: expected at least one image on every rank: got none")
    parts = [slice(i, min(i + size, batch.images)) for i in range(0, batch.images, size)]
    if len(parts) > 1 and any(_of_a_batch(m) for m in model.modules()):
        warnings.warn(
            f"two_pass: batch norm uses the statistics of {size} images at a time, not of all {batch.images}; use "
            "layer norm, or batch norm with running statistics in evaluation mode, to avoid this",
            RuntimeWarning,
            stacklevel=2,
        )
    _check_ranks(model, len(parts), batch.device)
    states: list[Any] = []
    devices = _devices(model, batch)
    found: list[Embeddings] = []
    with torch.no_grad(), _undone(model):
        for part in parts:
            states.append(_generators(devices))
            z = model(batch.rows(part))
            if not isinstance(z, Embeddings):
                raise TypeError(f"model: expected Embeddings of views: got {type(z).__name__}")
            found.append(z)
    torch.clear_autocast_cache()  # its casts of the weights were made without a graph
    whole = {n: torch.cat([z[n] for z in found], dim=1).requires_grad_() for n in found[0]}
    with torch.enable_grad():
        loss = _scalar(criterion(of_batch(whole, batch)))
        loss.backward()  # type: ignore[no-untyped-call]
    grads = {n: t.grad for n, t in whole.items() if t.grad is not None}
    if not grads:
        raise ValueError("criterion: expected a loss that depends on the embeddings: got one that depends on none")
    after, apart = _generators(devices), []
    for i, (part, state) in enumerate(zip(parts, states, strict=True)):
        _set_generators(state)
        last = i == len(parts) - 1
        with contextlib.nullcontext() if last else _not_averaged(model), torch.enable_grad():
            z = model(batch.rows(part))
            apart.append(torch.stack([_apart(z[n], t[:, part]) for n, t in whole.items()]))
            total = torch.stack([(z[n] * g[:, part]).sum() for n, g in grads.items()]).sum()
            if not total.requires_grad:
                raise ValueError(
                    "model: expected parameters to train: got embeddings that depend on none, as if frozen"
                )
            total.backward()  # type: ignore[no-untyped-call]
    _set_generators(after)
    _check_same(_over_ranks(torch.stack(apart).amax(0), model), tuple(whole), _rounding(model, whole))
    return loss.detach()


def _scalar(loss: Any) -> Tensor:
    """The loss, checked."""
    if not isinstance(loss, Tensor):
        hint = "; return its .loss" if isinstance(getattr(loss, "loss", None), Tensor) else ""
        raise TypeError(f"criterion: expected a scalar tensor: got {type(loss).__name__}{hint}")
    if loss.numel() != 1:
        raise ValueError(f"criterion: expected a scalar: got {_checks.shape(loss)}")
    if not loss.requires_grad:
        raise ValueError("criterion: expected a loss that depends on the embeddings: got one without a graph")
    return loss


def _apart(again: Tensor, first: Tensor) -> Tensor:
    """How far two embeddings of the same images are apart, as a fraction of their size: a scalar."""
    a, b = again.detach(), first.detach()
    wide = torch.promote_types(b.dtype, torch.float32)
    part: Tensor = torch.linalg.vector_norm(a - b, dtype=wide) / torch.linalg.vector_norm(b, dtype=wide)
    return part


def _rounding(model: nn.Module, z: dict[str, Tensor]) -> float:
    """How far embeddings may be apart because of rounding, as a fraction of their size."""
    if any(_communicates(m) or _is_wrapped(m) for m in model.modules()):  # may compute in less than they return
        return ROUNDING[2]
    tensors = [t for t in (*z.values(), *model.parameters()) if t.is_floating_point()]
    kind = tensors[0].device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    size = 2 if cast else min(t.dtype.itemsize for t in tensors)
    return ROUNDING.get(size, ROUNDING[2])


def _over_ranks(apart: Tensor, model: nn.Module) -> Tensor:
    """The largest over ranks that train one model, so that all of them refuse it."""
    together = any(isinstance(m, DistributedDataParallel) or _communicates(m) for m in model.modules())
    if together and dist.is_available() and dist.is_initialized():
        dist.all_reduce(apart, op=dist.ReduceOp.MAX)
    return apart


def _check_same(apart: Tensor, names: Sequence[str], most: float) -> None:
    """Refuse a second pass that gave other embeddings than the first; NaN in both is left to the loss."""
    for name, by in zip(names, apart.tolist(), strict=True):
        if by > most:
            raise ValueError(
                f"model: expected the same embeddings in both passes: got some of {name!r} that differ by {by:.2g} of "
                "their size, so that the gradients that were added are wrong (set them to zero); a module draws from a "
                "generator of its own, or changes in forward something other than its buffers"
            )


def _is_wrapped(part: nn.Module) -> bool:
    """Is this module compiled, or called under the autocast of Fabric or accelerate?"""
    return type(part).__name__ in ("OptimizedModule", "_FabricModule") or hasattr(part, "_original_forward")


def _of_a_batch(part: nn.Module) -> bool:
    """Does this module normalize by the statistics of the batch? Those of scripts and of timm go by their names."""
    kind = getattr(part, "original_name", type(part).__name__)
    if isinstance(part, _BatchNorm) or kind.startswith(("BatchNorm", "SyncBatchNorm")):
        return part.training or getattr(part, "running_mean", part) is None
    return part.training and kind.startswith("EvoNorm2dB")


def _check_ranks(model: nn.Module, parts: int, device: torch.device) -> None:
    """Refuse what torch's wrappers cannot do in chunks, before a rank waits for another."""
    if parts > 1 and any(m.static_graph for m in model.modules() if isinstance(m, DistributedDataParallel)):
        raise ValueError(
            "model: expected DistributedDataParallel without static_graph=True, which has to average the gradients of "
            f"its first backward pass: got one with it, and {parts} chunks"
        )
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks < 2 or not any(_communicates(m) for m in model.modules()):
        return
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(counts, torch.tensor([parts], device=device))
    numbers = [int(n) for n in counts]
    if len(set(numbers)) > 1:
        raise ValueError(
            "chunk: expected the same number of chunks on every rank for a model that communicates in its forward pass "
            f"(FSDP, SyncBatchNorm): got {_checks.names(numbers)}; give every rank as many images (drop_last=True)"
        )


def _communicates(part: nn.Module) -> bool:
    """Does this module wait for other ranks in its forward pass?"""
    kinds = {c.__name__ for c in type(part).__mro__}
    synchronized = isinstance(part, nn.SyncBatchNorm) and part.training
    return synchronized or bool(kinds & {"FSDPModule", "FullyShardedDataParallel"})


@contextlib.contextmanager
def _not_averaged(model: nn.Module) -> Iterator[None]:
    """Turn off the averaging of gradients in every DistributedDataParallel inside the model."""
    with contextlib.ExitStack() as stack:
        for m in model.modules():
            if isinstance(m, DistributedDataParallel):
                stack.enter_context(m.no_sync())
        yield


@contextlib.contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Give all buffers back the values that they had before the block.

    DistributedDataParallel, which sends those of rank 0 to the other ranks before a forward pass, does so again before
    the next one if it did so in the block.
    """
    modules = list(model.modules())
    before = [(m, n, t, _copied(t)) for m in modules for n, t in m._buffers.items()]
    sends = [(m, m.require_forward_param_sync) for m in modules if isinstance(m, DistributedDataParallel)]
    try:
        yield
    finally:
        with torch.no_grad():
            for m, name, t, values in before:
                if m._buffers[name] is not t:
                    m._buffers[name] = t
                if t is not None and values is not None:
                    t.copy_(values)
        for m, sent in sends:
            m.require_forward_param_sync = sent


def _copied(t: Tensor | None) -> Tensor | None:
    """A copy; None of an expanded or sparse tensor, which cannot be written in place."""
    if t is None or t.layout != torch.strided:
        return None
    expanded = any(step == 0 and size > 1 for step, size in zip(t.stride(), t.shape, strict=True))
    return None if expanded else t.clone()


def _generators(devices: set[torch.device]) -> tuple[Any, ...]:
    """The states of the generators of torch (CPU and these devices), of Python and of numpy, if it is in use."""
    there = {d: _module(d).get_rng_state(*_named(d)) for d in devices}
    numpy = sys.modules.get("numpy.random")
    return torch.get_rng_state(), there, random.getstate(), None if numpy is None else numpy.get_state()


def _set_generators(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    for d, of_device in state[1].items():
        _module(d).set_rng_state(of_device, *_named(d))
    random.setstate(state[2])
    if state[3] is not None:
        sys.modules["numpy.random"].set_state(state[3])


def _devices(model: nn.Module, batch: ViewBatch) -> set[torch.device]:
    """The devices other than the CPU on which a model draws."""
    every = {batch.device, *(p.device for p in model.parameters())}
    return {d for d in every if d.type != "cpu" and callable(getattr(_module(d), "get_rng_state", None))}


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type, None)


def _named(device: torch.device) -> tuple[torch.device, ...]:
    """The argument that names a device; torch.mps, which has one device, takes none."""
    return () if device.type == "mps" else (device,)
