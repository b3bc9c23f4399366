"""The state of a run in one file, written completely or not at all; `load` opens it and `restore_run` resumes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssd_addon import _checks, storage
from ssd_addon.card import check_card
from ssd_addon.heads import StyleHeads
from ssd_addon.stacked import is_stacked

Part = storage.HasState

RESERVED = ("config", "heads", "model", "card", "state_dict")
"""Keys that `storage.read` needs in a file."""


def save_run(
    path: str | Path,
    model: StyleHeads,
    *,
    parts: Mapping[str, Part],
    card: Mapping[str, Any],
    config: Mapping[str, Any],
    **state: Any,
) -> None:
    """Write a run's checkpoint.

    Args:
        path: path of the file; an existing file is replaced once the new one is complete.
        model: saved as "heads" (configuration) and "model" (weights), where `load` finds them.
        parts: name -> optimizer, views, criterion, ...; their state_dict is saved.
        card: what `load` needs to open the model without the training script.
        config: settings that must be equal when the run is resumed, as plain data; see `restore_run`.
        state: further plain data and tensors, such as step, epoch and generator states.

    Raises:
        ValueError: the card is not valid; the name of a part or state is taken; something is neither plain data nor a
            tensor (a file that contains it could not be opened again).
        OSError: the file cannot be written.
    """
    check_card(card)
    taken = [f"the state {name!r}" for name in state if name in RESERVED]
    taken += [f"the part {name!r}" for name in parts if name in RESERVED or name in state]
    if taken:
        raise ValueError(
            f"parts and state: expected distinct names other than {_checks.names(RESERVED)}: got {_checks.names(taken)}"
        )
    own = {"config": dict(config), "heads": model.config(), "model": model.state_dict(), "card": dict(card)}
    storage.write(path, {**own, **state, **{name: part.state_dict() for name, part in parts.items()}})


def restore_run(
    path: str | Path, model: StyleHeads, *, parts: Mapping[str, Part], config: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Resume from a run's checkpoint: load model and parts; returns everything in the file.

    If one of them does not fit, all are left as they were.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a checkpoint of a run; its settings differ; a part is missing; the model or a part
            does not fit (the message says which); the optimizer's state is of an older version with stacked weights.
    """
    storage.check_loadable(dict(config), "config")
    stored = storage.read(path, expected="the checkpoint of a run").content
    there = stored.get("config")
    if not isinstance(there, Mapping) or "heads" not in stored or "model" not in stored:
        raise ValueError(f"{path}: expected the checkpoint of a run, with its settings: got none")
    keys = sorted(config.keys() | there.keys())
    differ = [
        f"{k}: {there.get(k)} there, {config.get(k)} here" for k in keys if not _same(there.get(k), config.get(k))
    ]
    if differ:
        raise ValueError(f"{path} belongs to another configuration: {'; '.join(differ)}")
    if missing := [name for name in parts if name not in stored]:
        raise ValueError(f"{path}: expected the state of {_checks.names(missing)}: got none in it")
    if is_stacked(stored["model"]) and (name := _trains(model.projections, parts)):
        raise ValueError(
            f"{path}: expected the state of {name!r} for the weights of each head: got one of an older version, with "
            "stacked weights, which cannot be converted; open the model by StyleHeads.load(path, backbone) or by "
            f"restore_run without {name!r}, and continue with a new optimizer"
        )
    with storage.unchanged_on_error(*parts.values()):
        for name, part in parts.items():
            try:
                part.load_state_dict(_laid_out_as(stored[name], part))
            except Exception as error:  # a part may raise anything for a state that does not fit
                raise ValueError(f"{path}: expected a state that fits {name!r} ({error})") from error
        try:
            model.restore(stored["heads"], stored["model"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return stored


def _laid_out_as(state: Any, part: Part) -> Any:
    """A stored state, sharded like the part if the part is a sharded module."""
    if not isinstance(part, nn.Module) or not isinstance(state, Mapping):
        return state
    own = part.state_dict()
    if not any(hasattr(t, "full_tensor") for t in own.values()):
        return state
    return {k: storage.sharded_as(v, own.get(k)) for k, v in state.items()}


def _trains(module: nn.Module, parts: Mapping[str, Part]) -> str | None:
    """The name of the first optimizer that trains a module's parameters."""
    own = {id(p) for p in module.parameters()}
    for name, part in parts.items():
        groups = getattr(getattr(part, "optimizer", part), "param_groups", ())
        if any(id(p) in own for group in groups for p in group["params"]):
            return name
    return None


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are equal; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and _same(a.tolist(), b.tolist())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return bool(a == b or (a != a and b != b))
