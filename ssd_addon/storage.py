"""Writes and reads files of weights, and checks what they contain.

A file holds a mapping of tensors and plain data. `StyleHeads.save` writes {"config", "state_dict", "card"}; a training
run writes {"heads", "model", "card", ...} with the rest of its state. This module reads these two kinds only.
"""

import collections
import copy
import errno
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ssd_addon import _archive, _checks

WRAPPERS = ("module", "_orig_mod", "_forward_module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names that DDP, EMA, torch.compile, Fabric, activation checkpointing and FSDP add to the keys of wrapped modules."""
INSIDE = tuple(name for name in WRAPPERS if name.startswith("_"))
"""Those of `WRAPPERS` that no library uses as the name of a part of a model."""

PLAIN = (bool, int, float, str, Tensor)
LOADABLE = (complex, bytes, bytearray, torch.nn.Parameter, torch.dtype, torch.device, torch.layout)
"""Types other than `PLAIN` that torch.load reads with weights_only=True."""
CONTAINERS = (dict, collections.OrderedDict, list, tuple)
LOADABLE_CONTAINERS = (collections.Counter, set, torch.Size)


class HasState(Protocol):
    """Anything whose state is saved: modules, optimizers, gradient scalers."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class Stored:
    """The content of a file of weights.

    Attributes:
        config: the constructor's arguments of `StyleHeads`.
        state_dict: the weights, with the keys of the file.
        card: what is needed to open the model without the training script; {} if the file has no card.
        content: everything in the file.
    """

    config: Mapping[str, Any]
    state_dict: Mapping[str, Any]
    card: Mapping[str, Any] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)


def write(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a file completely or not at all: it is written under a temporary name, then renamed.

    A missing folder is created; a symbolic link is kept, and its target is replaced. Tensors that are sharded over
    ranks are gathered: every rank has to call this then, and rank 0 writes.

    Raises:
        ValueError: the content includes something that `read` would refuse.
        OSError: the file cannot be written; an existing file is left as it was.
    """
    path = Path(path)
    parts: list[Any] = []
    content = _whole(content, parts)
    check_loadable(content, str(path))
    if parts:
        try:
            if dist.get_rank() == 0:
                _write(path, content)
        finally:
            dist.barrier()
        return
    _write(path, content)


def not_plain(value: Any, also: Collection[Any] = (), containers: tuple[type, ...] = ()) -> tuple[Any, ...]:
    """The type of the first value that is not plain data, then the keys that lead to it, innermost first; () if none.

    Args:
        value: the value to search.
        also: further types that count as plain data, in addition to `PLAIN`.
        containers: further types to search inside, in addition to `CONTAINERS`.
    """
    kind = type(value)
    if value is None or kind in PLAIN or kind in also:
        return ()
    if kind not in CONTAINERS and kind not in containers:
        return (kind.__name__,)
    for key, part in value.items() if isinstance(value, dict) else ((None, part) for part in value):
        if odd := not_plain(key, also, containers) or not_plain(part, also, containers):
            return odd if key is None else (*odd, key)
    return ()


def check_loadable(content: Any, what: str) -> None:
    """Refuse what `read` would refuse.

    Raises:
        ValueError: something that torch.load does not read with weights_only=True; the message says where it is.
    """
    safe = {g[0] if isinstance(g, tuple) else g for g in torch.serialization.get_safe_globals()}
    if odd := not_plain(content, (*LOADABLE, *safe), LOADABLE_CONTAINERS):
        kind, *keys = odd
        raise ValueError(
            f"{what}: expected tensors and plain data (numbers, strings, lists, mappings), as a file with anything "
            f"else cannot be opened again: got {kind} in {' of '.join(map(repr, keys)) or 'it'}"
        )


@contextmanager
def unchanged_on_error(*parts: HasState) -> Iterator[None]:
    """Restore the state of these parts if the block raises."""
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    try:
        yield
    except BaseException:
        for part, state in zip(parts, before, strict=True):
            part.load_state_dict(state)
        raise


def _whole(value: Any, parts: list[Any]) -> Any:
    """The value with every sharded tensor gathered, on the CPU; sharded tensors are appended to `parts`."""
    if isinstance(value, Mapping):
        return {k: _whole(v, parts) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_whole(v, parts) for v in value)
    if isinstance(value, Tensor) and hasattr(value, "full_tensor"):
        parts.append(value)
        return value.full_tensor().detach().cpu()
    return value


def sharded_as(value: Any, like: Any) -> Any:
    """Shard a whole tensor over ranks like another one; returned unchanged if that one is not sharded."""
    if not hasattr(like, "full_tensor") or not isinstance(value, Tensor) or hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)


FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "a file of this size is not allowed",
}
"""Descriptions of the errors that writing raises when there is no space."""


def _write(path: Path, content: Mapping[str, Any]) -> None:
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
        sync_folder(target.parent)
    except OSError as error:
        if error.errno in FULL:
            words = f"{FULL[error.errno]}, so nothing was written; {_free(target)}"
            raise OSError(error.errno, f"{path}: {words}") from error
        raise
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # out of memory, no data on a meta device
            raise
        reason = str(error).partition("\n")[0]
        raise OSError(f"{path}: expected to write the complete file: got {reason!r}") from error
    finally:
        beside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a renamed file survives a loss of power."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(handle)
    except OSError:  # nor do some network file systems
        pass
    finally:
        os.close(handle)


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path.parent).free / 1e6:.0f} MB are free"
    except OSError:
        return "the free space is unknown"


class Damaged(ValueError):
    """A file that cannot be read: truncated, changed since it was written, or of another kind."""


def read(path: str | Path, *, expected: str, with_parts: str | None = None, map_location: Any = "cpu") -> Stored:
    """Read what `write` wrote; no code in the file is run.

    torch.save stores a checksum of every entry of its archive, which torch.load ignores. Here every entry is compared
    with its checksum as it is read, so that a damaged file cannot be mistaken for another model. Files without
    checksums are not verified: those in torch.save's format before 1.6, which is not an archive, and those written
    after `torch.serialization.set_crc32_options(False)`.

    Args:
        path: path of the file.
        expected: description of the expected file, for messages.
        with_parts: description used if the file can be read but holds something else; None uses `expected`.
        map_location: device for the tensors, as for `torch.load`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, cannot be read, or contains no `StyleHeads`; the message says what is missing.
    """
    if not Path(path).is_file():
        got = "a folder" if Path(path).is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: expected {expected}: got {got}")
    try:
        content = _archive.load(path, map_location)
    except Exception as error:  # bytes of an unknown file can make the reader raise anything
        raise Damaged(f"{path}: expected {expected}: could not be read ({_archive.reason(error)})") from error
    what = f"{path}: expected {with_parts or expected}, with its configuration and its weights"
    if not isinstance(content, Mapping):
        raise ValueError(f"{what}: got {type(content).__name__}")
    config = content.get("heads", content.get("config"))
    state = content.get("state_dict", content.get("model"))
    if not isinstance(config, Mapping) or not {"spaces", "hidden", "in_features"} <= config.keys():
        raise ValueError(
            f"{what}: got no configuration of the heads (keys: {_few(content)}); weights alone do not define "
            "the model. Write the file with model.save(path, card={'backbone': 'torchvision:resnet18', 'views': "
            "'color_spatial', 'size': 224}), or put 'config': model.config() and "
            "'state_dict': model.state_dict() into it"
        )
    if not isinstance(state, Mapping) or not all(isinstance(k, str) for k in state):
        raise ValueError(f"{what}: got no 'state_dict' in it (keys: {_few(content)})")
    return Stored(config, state, content.get("card") or {}, content)


def _few(content: Mapping[Any, Any], most: int = 5) -> str:
    """The first keys by name, and how many more there are."""
    names = list(map(str, content))
    return _checks.names(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def matched(state: Mapping[str, Any], wanted: Iterable[str], dropped: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """Rename the keys of a state dict to those that a module expects, if it was saved inside wrappers.

    Two kinds of additions are recognized: the names in `WRAPPERS`, anywhere in a key, and a prefix that all weights of
    the module share ("model." in Lightning's files), if there is exactly one such prefix; other keys belong to other
    modules and are left out. A state dict that does not match is returned unchanged, so that `load_state_dict` reports
    what is missing.

    Args:
        dropped: prefixes of keys that older files may contain and the module no longer has; they are left out.

    Raises:
        ValueError: weights for the module occur under several prefixes, as in a file that also holds averaged weights.
    """
    own = list(wanted)
    found_at = {bare(k): k for k in state}
    targets = {bare(k): k for k in own}
    if set(own) <= state.keys():
        return {k: v for k, v in state.items() if k in targets.values() or not k.startswith(dropped)}
    if len(found_at) < len(state) or len(targets) < len(own):  # two keys differ only by a wrapper's name
        return state
    first = next(iter(targets), "")
    prefixes = [b.removesuffix(first) for b in found_at if b == first or b.endswith("." + first)]
    fitting = [p for p in prefixes if all(p + t in found_at for t in targets)]
    if len(fitting) > 1:
        raise ValueError(
            f"state_dict: expected the weights of one model: got several, with prefixes {_checks.names(fitting)}; keep "
            "the keys of the one that you want: {k.removeprefix(prefix): v for k, v in state.items() if "
            "k.startswith(prefix)}"
        )
    if not fitting:
        return state
    prefix = fitting[0]
    found = {targets[t]: state[found_at[prefix + t]] for t in targets}
    beside = {b[len(prefix) :]: k for b, k in found_at.items() if b.startswith(prefix)}
    if any(k != b for b, k in found_at.items()):  # something wrapped it
        beside.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel counts its updates there
    rest = {k: state[k] for name, k in beside.items() if name not in targets and not name.startswith(dropped)}
    return found | rest


def bare(key: str, wrappers: tuple[str, ...] = WRAPPERS) -> str:
    """A key without the names of wrappers."""
    return ".".join(part for part in key.split(".") if part not in wrappers)


def versions(state: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that modules store with their weights: path -> {"version": ...}, as in `Module.state_dict`."""
    return dict(getattr(state, "_metadata", {}))


def with_versions(state: Mapping[str, Any], versions: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with this metadata, which some modules (torchvision's MNASNet) require for loading."""
    out = collections.OrderedDict(state)
    out._metadata = collections.OrderedDict(versions)  # type: ignore[attr-defined]
    return out
