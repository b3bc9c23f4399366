"""Every state dict in a file of weights, under the name that it has there; nothing in the file is run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ssd_addon import _archive, _checks

DEPTH = 4
"""Mappings inside each other, at most, that lead to a state dict: VISSL's classy_state_dict.base_model.model.trunk."""


def state_dicts_of(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Every mapping of tensors in a file, by the keys that lead to it, joined by dots: "" for the file itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or without tensors.
    """
    if not Path(path).is_file():
        got = "a folder" if Path(path).is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: expected a file of weights: got {got}")
    content = _read(path)
    if isinstance(content, _archive.Inert):
        raise ValueError(f"{path}: expected a mapping of weights: got {_pickled('an object')}")
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a mapping of weights: got {type(content).__name__}")
    found = dict(_inside(content, "", DEPTH))
    if not found:
        objects = [str(k) for k, v in content.items() if isinstance(v, _archive.Inert)]
        why = f"; {_pickled(_checks.names(objects))}" if objects else ""
        raise ValueError(f"{path}: expected a mapping of weights: got none in it (keys: {_checks.names(content)}){why}")
    return found


def _pickled(what: str) -> str:
    return (
        f"{what}, pickled with its class (a whole module?), which is not opened, as that would run code: where its "
        "code is installed, open it and save module.state_dict()"
    )


def _read(path: str | Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(10)
    is_safe = Path(path).suffix.lower() in (".safetensors", ".sft") or start[8:] == b'{"'
    if is_safe:
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"{path}: reading it needs safetensors: pip install safetensors") from error
    try:
        return load_file(str(path)) if is_safe else _archive.load(path, "cpu", leave_out=True)
    except Exception as error:  # whatever a file's bytes make the reader say
        raise ValueError(f"{path}: expected a file of weights: could not be read ({_archive.reason(error)})") from error


def _inside(content: Mapping[Any, Any], name: str, depth: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if flat := {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}:
        yield name, flat
    for key, value in content.items() if depth else ():
        if isinstance(key, str) and isinstance(value, Mapping):
            yield from _inside(value, joined(name, key), depth - 1)


def joined(*parts: str) -> str:
    """Names with a dot between those that are not empty."""
    return ".".join(p for p in parts if p)
