"""Open a trained model again without the script that trained it: from a run's folder, or from a file.

A checkpoint says what it needs on its *card*, plain data beside the weights:

    card = {"backbone": "torchvision:resnet18",                          or "timm:NAME", or "FILE.py:NAME" (code)
            "views": {"preset": "color_spatial", "size": 224},           or {"groups": {...}}, see `build_views`
            "family": "simclr", "size": 224}
    model.save("model.pt", card=card)                                    or {"card": card, "config": model.config(),
    opened = checkpoints.load("model.pt")                                    "state_dict": ...} in a file of your own
                                                                             ("heads" and "model" are read as well)

A card may name libraries and operations, never code to run: a backbone of your own is named by the caller.
"""

import importlib
import importlib.util
import inspect
import json
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssd_addon import _checks
from ssd_addon.heads import StyleHeads

FILES = ("model.pt", "checkpoint.pt")
LOG = "log.jsonl"


@dataclass(frozen=True, eq=False)
class Opened:
    """A model in evaluation mode with what its checkpoint says.

    Attributes:
        model: `StyleHeads` on the CPU.
        views: the `StructuredViews` that it was trained with, or None where neither card nor caller names them.
        card: as stored; {} where there is none.
        log: entries of the run's JSON-lines log, oldest first; [] where there is none.
        path: of the file that the weights came from.
    """

    model: StyleHeads
    views: Any
    card: Mapping[str, Any]
    log: list[dict[str, Any]] = field(default_factory=list)
    path: Path = Path()


def load(path: str | Path, *, backbone: str | nn.Module | None = None, views: Any = None) -> Opened:
    """Open a run's folder (model.pt or checkpoint.pt, log.jsonl) or a checkpoint file.

    Args:
        path: folder or file.
        backbone: instead of the card's: a module, "torchvision:NAME", "timm:NAME", or code of yours, "FILE.py:NAME" or
            "MODULE:NAME", where NAME() makes it.
        views: instead of the card's: a `StructuredViews`, a mapping as on the card, a preset's name, a JSON file that
            holds such a mapping, or code, "FILE.py:NAME".

    Raises:
        FileNotFoundError: no such folder or file, or a folder without a checkpoint.
        ValueError: a file that is no checkpoint of `StyleHeads`, or one that says too little: what is missing is named.
    """
    path = Path(path)
    folder, file = path, path
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: expected a run's folder with {' or '.join(FILES)}: got neither")
        file = found[0]
    elif path.is_file():
        folder = path.parent
    else:
        raise FileNotFoundError(f"{path}: expected a run's folder or a checkpoint: got no such file")
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{file}: expected a checkpoint of tensors and plain data: could not be read ({reason})"
        ) from error
    what = f"{file}: expected a checkpoint of StyleHeads, with its configuration and its weights"
    if not isinstance(stored, Mapping):
        raise ValueError(f"{what}: got {type(stored).__name__}")
    config = stored.get("heads", stored.get("config"))
    state = stored.get("state_dict", stored.get("model"))
    if not isinstance(config, Mapping) or not {"spaces", "hidden", "in_features"} <= config.keys():
        raise ValueError(
            f"{what}: got no heads' configuration in it (keys: {_checks.names(stored)}); weights alone do not say how "
            "they are put together. Write it with StyleHeads.save(path, card=...), or put 'config': model.config() and "
            "'state_dict': model.state_dict() into the file"
        )
    if not isinstance(state, Mapping):
        raise ValueError(f"{what}: got no 'state_dict' in it (keys: {_checks.names(stored)})")
    card = stored.get("card") or {}
    if not isinstance(card, Mapping):
        raise ValueError(f"{file}: expected the card as a mapping: got {type(card).__name__}")
    given = dict(config)
    made = _backbone(file, backbone, card.get("backbone"))
    try:
        model = StyleHeads(made, given.pop("spaces"), **given)
    except TypeError as error:
        raise ValueError(f"{file}: its configuration does not make a StyleHeads ({error})") from error
    model.restore(config, state)
    chosen = views if views is not None else card.get("views")
    return Opened(
        model.eval(),
        None if chosen is None else build_views(chosen, code=views is not None),
        card,
        read_log(folder / LOG) if (folder / LOG).is_file() else [],
        file,
    )


def _backbone(file: Path, given: str | nn.Module | None, stored: Any) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    if given is not None:
        return build_backbone(given, code=True)
    if stored is None:
        raise ValueError(
            f"{file}: expected the card to name the backbone: got none; name it yourself, --backbone torchvision:NAME, "
            "timm:NAME or FILE.py:NAME (in Python: load(path, backbone=...))"
        )
    if not isinstance(stored, str):
        raise ValueError(f"{file}: expected the card's backbone as a string: got {type(stored).__name__}")
    if stored.split(":")[0] not in ("torchvision", "timm"):
        raise ValueError(
            f"{file}: its backbone is {stored!r}, which is code, and a checkpoint may not choose code to run; if it is "
            f"yours, name it: --backbone {stored} (in Python: load(path, backbone=...))"
        )
    return build_backbone(stored)


def build_backbone(spec: str, *, code: bool = False) -> nn.Module:
    """ "torchvision:resnet18", "timm:vit_tiny_patch16_224" (without weights); with `code`, "FILE.py:NAME" too.

    Raises:
        ValueError: another form, an unknown model, or something that makes no module.
        ImportError: torchvision or timm is missing.
    """
    home, _, name = spec.partition(":")
    if not name:
        raise ValueError(f"backbone: expected torchvision:NAME, timm:NAME or FILE.py:NAME: got {spec!r}")
    if home in ("torchvision", "timm"):
        library = importlib.import_module("torchvision.models" if home == "torchvision" else "timm")
        try:
            if home == "timm":
                return library.create_model(name, pretrained=False, num_classes=0)
            return library.get_model(name, weights=None)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ValueError(f"backbone: {home} has no model {name!r} ({error})") from error
    if not code:
        raise ValueError(f"backbone: expected torchvision:NAME or timm:NAME: got {spec!r}")
    made = find(spec, "backbone")()
    if not isinstance(made, nn.Module):
        raise ValueError(f"backbone: expected {spec} to make an nn.Module: got {type(made).__name__}")
    return made


def build_views(spec: Any, *, code: bool = False, seed: int | None = 0) -> Any:
    """`StructuredViews` from plain data.

    Args:
        spec: {"preset": name, "size": pixels}, or {"groups": {"color": [["ColorJitter", {"hue": 0.1}], ...]},
            "then": [...], ...} with the arguments of `StructuredViews`, each operation as Kornia's name and its
            arguments; or a `StructuredViews`. With `code` also a preset's name, a JSON file of such a mapping, or
            "FILE.py:NAME", where NAME() makes the views.

        seed: of the draws.

    Raises:
        ValueError: another form, an unknown operation, arguments that it does not take.
    """
    from ssd_addon.augment import StructuredViews, presets

    if isinstance(spec, StructuredViews):
        return spec
    if isinstance(spec, str) and code:
        if spec.endswith(".json"):
            try:
                spec = json.loads(Path(spec).read_text())
            except (OSError, ValueError) as error:
                raise ValueError(f"views: expected a JSON file: {spec} could not be read ({error})") from error
        elif ":" in spec:
            made = find(spec, "views")()
            if not isinstance(made, StructuredViews):
                raise ValueError(f"views: expected {spec} to make StructuredViews: got {type(made).__name__}")
            return made
        else:
            spec = {"preset": spec}
    if not isinstance(spec, Mapping) or ("preset" in spec) == ("groups" in spec):
        raise ValueError(f"views: expected a mapping with either 'preset' or 'groups': got {spec!r}")
    if "preset" in spec:
        extra = {k: v for k, v in spec.items() if k not in ("preset", "size", "normalize", "plan")}
        if extra:
            raise ValueError(f"views: expected preset, size, normalize and plan: got {_checks.names(extra)} too")
        options = {k: spec[k] for k in ("size", "normalize") if k in spec}
        return StructuredViews(**presets(spec["preset"], **options), plan=spec.get("plan", "shared_query"), seed=seed)
    allowed = set(inspect.signature(StructuredViews).parameters) - {"seed", "rank"}
    if unknown := spec.keys() - allowed:
        raise ValueError(f"views: expected {_checks.names(sorted(allowed))}: got {_checks.names(sorted(unknown))}")
    arguments = dict(spec)
    for name in ("groups", "key_groups"):
        if arguments.get(name) is not None:
            arguments[name] = {g: [_operation(op) for op in ops] for g, ops in arguments[name].items()}
    for name in ("then", "key_then"):
        if arguments.get(name) is not None:
            arguments[name] = [_operation(op) for op in arguments[name]]
    return StructuredViews(**arguments, seed=seed)


def _operation(spec: Any) -> nn.Module:
    import kornia.augmentation as K

    if not isinstance(spec, Sequence) or isinstance(spec, str) or len(spec) not in (1, 2):
        raise ValueError(f"views: expected an operation as [name, arguments]: got {spec!r}")
    name, arguments = spec[0], dict(spec[1]) if len(spec) == 2 else {}
    kind = getattr(K, str(name), None)
    if not inspect.isclass(kind) or not issubclass(kind, nn.Module):
        raise ValueError(f"views: expected the name of an operation of kornia.augmentation: got {name!r}")
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"views: {name} does not take {arguments!r} ({error})") from error


def find(spec: str, what: str) -> Any:
    """The thing called NAME in "FILE.py:NAME" or "MODULE:NAME"; runs that file or module."""
    home, _, name = spec.rpartition(":")
    if not home or not name:
        raise ValueError(f"{what}: expected FILE.py:NAME or MODULE:NAME: got {spec!r}")
    if home.endswith(".py"):
        file = Path(home).resolve()
        if not file.is_file():
            raise ValueError(f"{what}: expected a Python file: got {home}, which is no file")
        loader = importlib.util.spec_from_file_location(f"_ssd_addon_{file.stem}", file)
        assert loader is not None and loader.loader is not None
        module = importlib.util.module_from_spec(loader)
        sys.modules[loader.name] = module  # dataclasses and pickle look there
        sys.path.insert(0, str(file.parent))  # what lies beside a script, as when it is run
        try:
            loader.loader.exec_module(module)
        finally:
            sys.path.remove(str(file.parent))
    else:
        try:
            module = importlib.import_module(home)
        except ImportError as error:
            raise ValueError(f"{what}: expected a module that can be imported: {home!r} can not ({error})") from error
    if not hasattr(module, name):
        raise ValueError(f"{what}: {home} has no {name!r}")
    return getattr(module, name)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Entries of a JSON-lines log. A last line that was cut off (the run was stopped) is left out.

    Raises:
        ValueError: a line that is no JSON object, with its number.
    """
    lines = Path(path).read_text().splitlines()
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: expected a JSON object: got {line[:60]!r}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object: got {line[:60]!r}")
        entries.append(entry)
    return entries
