"""The one writer and the one opener of files of weights: what is in them, how they are written, what is refused.

A file holds a mapping of tensors and plain data. `StyleHeads.save` writes {"config", "state_dict", "card"}; a training
run writes {"heads", "model", "card", ...} with the rest of its state. Both are opened here, and nothing else is.
"""

import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssd_addon import _checks

WRAPPERS = ("module", "_orig_mod", "_forward_module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What DDP, EMA, torch.compile, Fabric, activation checkpointing and FSDP put into the keys of what they wrap."""


@dataclass(frozen=True, eq=False)
class Stored:
    """What a file of weights says.

    Attributes:
        config: of `StyleHeads`: the constructor's arguments.
        state_dict: the weights, with the keys of the file.
        card: what is needed to open the model without the training script, {} where there is none.
        content: everything in the file.
    """

    config: Mapping[str, Any]
    state_dict: Mapping[str, Any]
    card: Mapping[str, Any] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)


def write(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all: beside its place first, then renamed.

    Tensors that are sharded over ranks are gathered: every rank has to call it then, and rank 0 writes.

    Raises:
        OSError: it cannot be written; what was there before is left.
    """
    path = Path(path)
    parts: list[Any] = []
    content = _whole(content, parts)
    if parts:
        try:
            if dist.get_rank() == 0:
                _write(path, content)
        finally:
            dist.barrier()
        return
    _write(path, content)


def _whole(value: Any, parts: list[Any]) -> Any:
    """The same with every sharded tensor whole, on the CPU; these are noted in `parts`."""
    if isinstance(value, Mapping):
        return {k: _whole(v, parts) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_whole(v, parts) for v in value)
    if isinstance(value, Tensor) and hasattr(value, "full_tensor"):
        parts.append(value)
        return value.full_tensor().detach().cpu()
    return value


def sharded_as(value: Any, like: Any) -> Any:
    """A whole tensor laid over ranks as another one is; what is not sharded stays as it is."""
    if not hasattr(like, "full_tensor") or not isinstance(value, Tensor) or hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(dict(content), beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | Path, *, expected: str, with_parts: str | None = None, map_location: Any = "cpu") -> Stored:
    """Read what `write` wrote; nothing in the file is run.

    Args:
        path: of the file.
        expected: what the caller wants it to be, for messages.
        with_parts: the same, for a file that can be read and holds something else; None: `expected`.
        map_location: where tensors go.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or that holds no `StyleHeads`: says what is missing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected {expected}: got no such file")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # whatever a file's bytes make the reader say
        unsafe = isinstance(error, pickle.UnpicklingError)
        why = "it holds more than tensors and plain data, which loading would run" if unsafe else type(error).__name__
        raise ValueError(f"{path}: expected {expected}: could not be read ({why})") from error
    what = f"{path}: expected {with_parts or expected}, with its configuration and its weights"
    if not isinstance(content, Mapping):
        raise ValueError(f"{what}: got {type(content).__name__}")
    config = content.get("heads", content.get("config"))
    state = content.get("state_dict", content.get("model"))
    if not isinstance(config, Mapping) or not {"spaces", "hidden", "in_features"} <= config.keys():
        raise ValueError(
            f"{what}: got no heads' configuration in it (keys: {_checks.names(content)}); weights alone do not say how "
            "they are put together. Write it with StyleHeads.save(path, card=...), or put 'config': model.config() and "
            "'state_dict': model.state_dict() into the file"
        )
    if not isinstance(state, Mapping) or not all(isinstance(k, str) for k in state):
        raise ValueError(f"{what}: got no 'state_dict' in it (keys: {_checks.names(content)})")
    return Stored(config, state, content.get("card") or {}, content)


def matched(state: Mapping[str, Any], wanted: Iterable[str], dropped: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """A state dict under the keys that a module wants, whatever wrapped the module when it was saved.

    Recognized are the segments of `WRAPPERS`, wherever they stand, and a prefix that all weights of the module share
    ("model." in Lightning's files), where only one does; keys outside the prefix are other modules' and left out. A
    state that does not match is returned as it is, for `load_state_dict` to say what is missing.

    Args:
        dropped: prefixes of keys that older files may hold and the module no longer has; they are left out.

    Raises:
        ValueError: weights for the module under several prefixes, as in a file that holds an average beside them.
    """
    own = list(wanted)
    bare = {_bare(k): k for k in state}
    targets = {_bare(k): k for k in own}
    if set(own) <= state.keys():
        return {k: v for k, v in state.items() if k in targets.values() or not k.startswith(dropped)}
    if len(bare) < len(state) or len(targets) < len(own):  # two keys differ by a wrapper's name alone
        return state
    first = next(iter(targets), "")
    prefixes = [b.removesuffix(first) for b in bare if b == first or b.endswith("." + first)]
    fitting = [p for p in prefixes if all(p + t in bare for t in targets)]
    if len(fitting) > 1:
        raise ValueError(
            f"expected the weights of one model: got them under several prefixes, {_checks.names(fitting)}; keep the "
            "keys of the one that you want: {k.removeprefix(prefix): v for k, v in state.items() if "
            "k.startswith(prefix)}"
        )
    if not fitting:
        return state
    prefix = fitting[0]
    found = {targets[t]: state[bare[prefix + t]] for t in targets}
    beside = {b[len(prefix) :]: k for b, k in bare.items() if b.startswith(prefix)}
    rest = {k: state[k] for name, k in beside.items() if name not in targets and not name.startswith(dropped)}
    wrapped = any(k != b for b, k in bare.items())
    if wrapped:
        rest.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel counts its updates there
    return found | rest


def _bare(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)
