"""The state of a run other than weights: random generators, optimizers of sharded models, the TensorBoard log."""

import importlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

State = list[Tensor | None]


def random_states(device: torch.device) -> list[State]:
    """The state of torch's global generators on every rank: [CPU, the device or None]. Collective."""
    own: State = [torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None]
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every


def set_random_states(states: Sequence[State], device: torch.device) -> None:
    """Restore this rank's generators from the result of `random_states`.

    Raises:
        ValueError: the states are of another number of ranks.
    """
    initialized = dist.is_available() and dist.is_initialized()
    world, rank = (dist.get_world_size(), dist.get_rank()) if initialized else (1, 0)
    if len(states) != world:
        raise ValueError(f"states: expected the generators of {world} ranks: got those of {len(states)}")
    cpu, own = states[rank]
    assert cpu is not None
    torch.set_rng_state(cpu)
    if own is not None and device.type == "cuda":
        torch.cuda.set_rng_state(own, device)


def init_ranks(backend: str) -> tuple[int, int]:
    """Join the processes that torchrun has started; returns (number of processes, rank), or (1, 0) without torchrun.

    If torchrun restarts its processes (`--max-restarts`), they share a store that may still contain the addresses of
    the old processes, so every attempt uses its own keys. Do not destroy the process group after an error, as the other
    processes would wait for it.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 1, 0
    api: Any = dist
    store, rank, size = next(api.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(backend, store=api.PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=size)
    return size, rank


class WholeOptimizer:
    """The state of the optimizer of a model that FSDP2 has sharded, gathered on saving and sharded on loading."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Name of the parameter -> its gathered state, on the CPU of rank 0. Collective."""
        api = importlib.import_module("torch.distributed.checkpoint.state_dict")
        options = api.StateDictOptions(full_state_dict=True, cpu_offload=True)
        found: dict[str, Any] = api.get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict` on rank 0; every rank has to pass it."""
        api = importlib.import_module("torch.distributed.checkpoint.state_dict")
        options = api.StateDictOptions(full_state_dict=True)
        api.set_optimizer_state_dict(self.model, self.optimizer, state_dict, options=options)


def whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> WholeOptimizer:
    """Wrap an optimizer as a part for `save_run` and `restore_run` if FSDP2 has sharded the model."""
    return WholeOptimizer(model, optimizer)


def checkpoint_activations(module: nn.Module) -> list[str]:
    """Apply activation checkpointing to the blocks of a network: they are recomputed in the backward pass.

    Blocks are the members of a Sequential or ModuleList that contain several layers with parameters. Batch norms update
    their statistics only once, not during recomputation. Keys of the state_dict stay the same.

    Returns:
        The names of the blocks.

    Raises:
        ValueError: the network has no such blocks.
    """
    wrapping = importlib.import_module("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    found = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Sequential | nn.ModuleList):
            for key, block in part.named_children():
                layers = [m for m in block.modules() if next(m.parameters(recurse=False), None) is not None]
                if len(layers) > 1 and not isinstance(block, nn.Sequential | nn.ModuleList):
                    found[f"{name}.{key}" if name else key] = block
    inner = {n for n in found if any(n != o and n.startswith(f"{o}.") for o in found)}
    chosen = {n: b for n, b in found.items() if n not in inner}
    if not chosen:
        raise ValueError(
            f"module: expected a network with blocks, such as a ResNet or transformer: got none in "
            f"{type(module).__name__}"
        )
    for name, block in chosen.items():
        outer, _, key = name.rpartition(".")
        parent: Any = module.get_submodule(outer)
        wrapped = wrapping.checkpoint_wrapper(block, checkpoint_fn=_recomputed)
        parent._modules[key] = wrapped
    return list(chosen)


def _recomputed(block: nn.Module, *arguments: Any, **options: Any) -> Any:
    if torch.compiler.is_compiling():  # recomputation has no side effects there, and contexts are not supported
        return checkpoint(block, *arguments, use_reentrant=False, **options)
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=partial(_contexts, block), **options)


class _Contexts:
    """A context in which the batch norms of a block do not update their statistics."""

    def __init__(self, block: nn.Module) -> None:
        self.norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.before: list[tuple[nn.Module, str, Tensor]] = []

    def __enter__(self) -> None:
        self.before = [(m, n, b.clone()) for m in self.norms for n, b in m.named_buffers(recurse=False)]

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for module, name, value in self.before:
                getattr(module, name).copy_(value)


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    return _Nothing(), _Contexts(block)


def tensorboard(folder: str | Path, *, after: int) -> Any:
    """A TensorBoard writer that continues after a step: what a killed run wrote after it is not shown twice.

    Raises:
        ImportError: tensorboard is missing.
    """
    try:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard: expected the package, to write event files: got none; pip install tensorboard"
        ) from error
    return writer(str(folder), purge_step=after + 1)
