"""The state of a training run in one file: written whole or not at all, opened by `load` and continued from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ssd_addon import _checks, storage
from ssd_addon.card import check_card
from ssd_addon.heads import StyleHeads


class Part(Protocol):
    """Anything whose state is saved: modules, optimizers, gradient scalers."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


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
        path: of the file; what was there is replaced once the new one is complete.
        model: saved as "heads" (configuration) and "model" (weights), where `load` looks for them.
        parts: name -> optimizer, views, criterion, ...: their state_dict.
        card: what `load` needs to open the model without the training script.
        config: settings that a run must have to be continued; see `restore_run`.
        state: plain data and tensors beside: step, epoch, generator states.

    Raises:
        ValueError: a card that could not be read rightly, or a part whose name is taken.
        OSError: the file cannot be written.
    """
    check_card(card)
    own = {"config": dict(config), "heads": model.config(), "model": model.state_dict(), "card": dict(card)}
    content = {**own, **state}
    if taken := [name for name in parts if name in content]:
        raise ValueError(f"parts: expected names beside {_checks.names(content)}: got {_checks.names(taken)}")
    storage.write(path, content | {name: part.state_dict() for name, part in parts.items()})


def restore_run(
    path: str | Path, model: StyleHeads, *, parts: Mapping[str, Part], config: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Continue from a run's checkpoint: load model and parts; returns everything in the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint of a run, one of other settings, or without a part: says which.
    """
    stored = storage.read(path, expected="the checkpoint of a run").content
    there = stored.get("config")
    if not isinstance(there, Mapping):
        raise ValueError(f"{path}: expected the checkpoint of a run, with its settings: got none")
    keys = sorted(config.keys() | there.keys())
    differ = [f"{k}: {there.get(k)} there, {config.get(k)} here" for k in keys if there.get(k) != config.get(k)]
    if differ:
        raise ValueError(f"{path} belongs to another configuration: {'; '.join(differ)}")
    if missing := [name for name in parts if name not in stored]:
        raise ValueError(f"{path}: expected the state of {_checks.names(missing)}: got none in it")
    model.restore(stored["heads"], stored["model"])
    for name, part in parts.items():
        part.load_state_dict(stored[name])
    return stored
