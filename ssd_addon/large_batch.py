"""The exact gradient of a large batch in the memory of a small one.

    z       = model(batch), computed in chunks, without a graph
    g       = dL/dz of the whole batch
    dL/dw   = sum over chunks of (dz_chunk/dw)^T g_chunk, where each chunk is run a second time, with a graph

Source: Gao et al. 2021, arXiv 2101.06983 (GradCache).
"""

import contextlib
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


def two_pass(model: nn.Module, batch: ViewBatch, criterion: Callable[[Embeddings], Tensor], *, chunk: int) -> Tensor:
    """The loss of the whole batch; its gradients are added to `.grad` of all parameters, as by `loss.backward()`.

    Activations take the memory of `chunk` images; the model runs twice. Dropout uses the same masks in both runs. The
    parameters of the criterion (a learned temperature) get their gradients too.

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

    Batch norm in training mode uses the statistics of each chunk, as with gradient accumulation: a warning says so, and
    running statistics are updated once.

    Returns:
        The loss, detached.

    Raises:
        TypeError: batch is not a `ViewBatch`, or the model does not return `Embeddings`.
        ValueError: chunk is below 1; the batch has no images; DistributedDataParallel has static_graph=True; the ranks
            have different numbers of chunks and the model communicates in its forward pass (FSDP, SyncBatchNorm).
    """
    if not isinstance(batch, ViewBatch):
        raise TypeError(f"batch: expected a ViewBatch: got {type(batch).__name__}")
    size = _checks.width(chunk, "chunk")
    if not batch.images:
        raise ValueError("batch: expected at least one image on every rank: got none")
    parts = [slice(i, min(i + size, batch.images)) for i in range(0, batch.images, size)]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    if norms and len(parts) > 1:
        warnings.warn(
            f"two_pass: batch norm in training mode uses the statistics of {size} images at a time, not of all "
            f"{batch.images}; use layer norm, or batch norm in evaluation mode, to avoid this",
            RuntimeWarning,
            stacklevel=2,
        )
    _check_ranks(model, len(parts), batch.device)
    states: list[Any] = []
    found: list[Embeddings] = []
    with torch.no_grad(), _untracked(norms):
        for part in parts:
            states.append(_generators(batch))
            z = model(batch.rows(part))
            if not isinstance(z, Embeddings):
                raise TypeError(f"model: expected Embeddings of views: got {type(z).__name__}")
            found.append(z)
    torch.clear_autocast_cache()  # its casts of the weights were made without a graph
    whole = {n: torch.cat([z[n] for z in found], dim=1).requires_grad_() for n in found[0]}
    with torch.enable_grad():
        loss = criterion(of_batch(whole, batch))
        loss.backward()  # type: ignore[no-untyped-call]
    grads: dict[str, Tensor | None] = {n: t.grad for n, t in whole.items()}
    after = _generators(batch)
    for i, (part, state) in enumerate(zip(parts, states, strict=True)):
        _set_generators(batch, state)
        last = i == len(parts) - 1
        with contextlib.nullcontext() if last else _not_averaged(model), torch.enable_grad():
            z = model(batch.rows(part))
            terms = [(z[n] * g[:, part].to(z[n].dtype)).sum() for n, g in grads.items() if g is not None]
            torch.stack([t.to(loss.dtype) for t in terms]).sum().backward()  # type: ignore[no-untyped-call]
    _set_generators(batch, after)
    return loss.detach()


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
def _untracked(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Keep running statistics unchanged, except for values that DistributedDataParallel broadcasts from rank 0."""
    before = [m.track_running_stats for m in norms]
    try:
        for m in norms:
            m.track_running_stats = False
        yield
    finally:
        for m, tracked in zip(norms, before, strict=True):
            m.track_running_stats = tracked


def _generators(batch: ViewBatch) -> tuple[Tensor, Tensor | None]:
    cuda = torch.cuda.get_rng_state(batch.device) if batch.device.type == "cuda" else None
    return torch.get_rng_state(), cuda


def _set_generators(batch: ViewBatch, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], batch.device)
