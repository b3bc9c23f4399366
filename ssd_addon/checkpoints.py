"""Open a trained model again without the script that trained it: from a run's folder, or from a file.

A checkpoint says what it needs on its *card*, plain data beside the weights:

    card = {"backbone": "torchvision:resnet18",                          or "timm:NAME", or "FILE.py:NAME" (code)
            "views": {"preset": "color_spatial", "size": 224},           or {"groups": {...}}, see `build_views`
            "family": "simclr", "size": 224}
    model.save("model.pt", card=card)                                    or {"card": card, "config": model.config(),
    opened = checkpoints.load("model.pt")                                    "state_dict": ...} in a file of your own
                                                                             ("heads" and "model" are read as well)

A card may name libraries and operations, never code to run: a backbone of your own is named by the caller. Keys of
your own may stand on it ("commit", "notes"): they come back as they are.
"""

import difflib
import importlib
import importlib.util
import inspect
import json
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssd_addon import _checks
from ssd_addon.heads import StyleHeads
from ssd_addon.losses import FAMILIES

FILES = ("model.pt", "checkpoint.pt")
KEYS = ("backbone", "views", "family", "size", "name")
PRESET_KEYS = ("preset", "size", "normalize", "plan", "cross_image", "constrained_crop")
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
        log_problem: why `log` is empty although there is one, "" otherwise.
    """

    model: StyleHeads
    views: Any
    card: Mapping[str, Any]
    log: list[dict[str, Any]] = field(default_factory=list)
    path: Path = Path()
    log_problem: str = ""


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
    except Exception as error:  # whatever a file's bytes make the reader say
        reason = (
            "it holds more than tensors and plain data, which loading would run"
            if isinstance(error, pickle.UnpicklingError)
            else type(error).__name__
        )
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
    if not isinstance(state, Mapping) or not all(isinstance(k, str) for k in state):
        raise ValueError(f"{what}: got no 'state_dict' in it (keys: {_checks.names(stored)})")
    card = stored.get("card") or {}
    check_card(card, str(file))
    given = dict(config)
    made = _backbone(file, backbone, card.get("backbone"))
    try:
        try:
            model = StyleHeads(made, given.pop("spaces"), **given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"its configuration does not make a StyleHeads ({error})") from error
        model.restore(config, _without_classifier(made, state))
    except (TypeError, ValueError) as error:
        reason = str(error)
        raise ValueError(f"{file}: {reason if len(reason) < 600 else reason[:600] + ' ...'}") from error
    chosen = views if views is not None else card.get("views")
    code = views is not None
    if isinstance(views, str) and views.endswith(".json"):
        chosen, code = _json(views), False
    if isinstance(chosen, str) and ":" not in chosen and not chosen.endswith(".json"):
        chosen = {"preset": chosen}
    if isinstance(chosen, Mapping) and "preset" in chosen:
        chosen = {"size": card.get("size") or 224} | dict(chosen)
    log: list[dict[str, Any]] = []
    problem = ""
    if (folder / LOG).is_file():
        try:
            log = read_log(folder / LOG)
        except (ValueError, OSError) as error:
            problem = str(error)
    made_views = None if chosen is None else build_views(chosen, code=code)
    return Opened(model.eval(), made_views, card, log, file, problem)


def check_card(card: Any, where: str = "card") -> None:
    """Refuse what a reader would take wrongly, or pass over in silence because it is misspelt.

    Raises:
        ValueError: no mapping, another family or size than there is, a key that is nearly one of `KEYS`, a value that
            is neither plain data nor a tensor (a file that holds one would not open again).
    """
    if not isinstance(card, Mapping):
        raise ValueError(f"{where}: expected the card as a mapping: got {type(card).__name__}")
    family, size = card.get("family"), 1 if card.get("size") is None else card["size"]
    if family is not None and family not in FAMILIES:
        raise ValueError(
            f"{where}: expected the card's family to be one of {_checks.names(FAMILIES)}, as it decides whether rows "
            f"are scored at unit length: got {family!r}"
        )
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{where}: expected the card's size in whole pixels, 1 or more: got {size!r}")
    for key, value in card.items():
        if odd := _not_plain(value):
            raise ValueError(
                f"{where}: expected plain data (numbers, strings, lists, mappings), as a file with more in it is not "
                f"opened again: got {odd} in {key!r}"
            )
        if key not in KEYS and (meant := difflib.get_close_matches(str(key).lower(), KEYS, 1, 0.85)):
            raise ValueError(f"{where}: expected the card's key {meant[0]!r}: got {key!r}, which nothing reads")


def _not_plain(value: Any) -> str:
    """The type of the first thing in it that is no plain data, "" where all is."""
    if value is None or type(value) in (bool, int, float, str, torch.Tensor):
        return ""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    elif type(value) not in (list, tuple):
        return type(value).__name__
    return next(filter(None, map(_not_plain, value)), "")


def _without_classifier(backbone: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights less those of a timm model's classifier, which heads do not run but a checkpoint may hold."""
    names = getattr(backbone, "default_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"backbone.model.{name}." for name in ((names,) if isinstance(names, str) else names))
    return {k: v for k, v in state.items() if not k.startswith(prefixes)} if prefixes else state


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
    if not stored.strip():
        raise ValueError(
            f"{file}: expected the card to name the backbone, such as torchvision:resnet18: got {stored!r}"
        )
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
    if home == "torchvision":
        models = importlib.import_module("torchvision.models")
        if name not in models.list_models(module=models):  # classification; the others load weights of their own
            raise ValueError(f"backbone: torchvision has no classification model {name!r} (see torchvision.models)")
        return models.get_model(name, weights=None)
    if home == "timm":
        timm = importlib.import_module("timm")
        if ":" in name or "/" in name or not timm.is_model(name):  # names of hubs and folders are no architectures
            raise ValueError(f"backbone: timm has no model {name!r}")
        try:
            return timm.create_model(name, pretrained=False, num_classes=0)
        except RuntimeError as error:  # a tag that it does not have
            raise ValueError(f"backbone: timm has no model {name!r} ({error})") from error
    if not code:
        raise ValueError(f"backbone: expected torchvision:NAME or timm:NAME: got {spec!r}")
    maker = find(spec, "backbone")
    made = maker() if callable(maker) else maker
    if not isinstance(made, nn.Module):
        raise ValueError(f"backbone: expected {spec} to make an nn.Module: got {type(made).__name__}")
    return made


def build_views(spec: Any, *, code: bool = False, seed: int | None = 0) -> Any:
    """`StructuredViews` from plain data.

    Args:
        spec: {"preset": name, "size": pixels}, with "plan", "cross_image" and "constrained_crop" beside it if need be;
            or {"groups": {"color": [["ColorJitter", {"hue": 0.1}], ...]}, "then": [...], ...} with the arguments of
            `StructuredViews`, each operation as Kornia's name and its arguments; or a `StructuredViews`. With `code`
            also a preset's name, a JSON file of such a mapping, or "FILE.py:NAME", where NAME() makes the views.
        seed: of the draws.

    Raises:
        ValueError: another form, an unknown operation, arguments that it does not take.
    """
    from ssd_addon.augment import StructuredViews
    from ssd_addon.recipes import presets

    if isinstance(spec, StructuredViews):
        return spec
    if isinstance(spec, Path):
        spec = str(spec)
    if isinstance(spec, str) and code:
        if spec.endswith(".json"):
            spec = _json(spec)
        elif ":" in spec:
            maker = find(spec, "views")
            made = maker() if callable(maker) and not isinstance(maker, StructuredViews) else maker
            if not isinstance(made, StructuredViews):
                raise ValueError(f"views: expected {spec} to make StructuredViews: got {type(made).__name__}")
            return made
        else:
            spec = {"preset": spec}
    if not isinstance(spec, Mapping) or ("preset" in spec) == ("groups" in spec):
        raise ValueError(f"views: expected a mapping with either 'preset' or 'groups': got {spec!r}")
    if "preset" in spec:
        if extra := [k for k in spec if k not in PRESET_KEYS]:
            raise ValueError(f"views: expected {_checks.names(PRESET_KEYS)}: got {_checks.names(extra)} too")
        options = {k: spec[k] for k in ("size", "normalize") if k in spec}
        size = spec.get("size", 1)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"views: expected the preset's size in whole pixels, 1 or more: got {size!r}")
        drawn = {k: spec[k] for k in ("plan", "cross_image", "constrained_crop") if k in spec}
        try:
            return StructuredViews(**presets(spec["preset"], **options), **drawn, seed=seed)
        except TypeError as error:
            raise ValueError(f"views: {error}") from error
    allowed = set(inspect.signature(StructuredViews).parameters) - {"seed", "rank"}
    if unknown := spec.keys() - allowed:
        raise ValueError(f"views: expected {_checks.names(sorted(allowed))}: got {_checks.names(sorted(unknown))}")
    arguments = dict(spec)
    for name in ("groups", "key_groups"):
        groups = arguments.get(name)
        if groups is not None:
            if not isinstance(groups, Mapping):
                raise ValueError(f"views: expected {name} as a mapping name -> operations: got {groups!r}")
            arguments[name] = {g: _operations(ops, f"{name}[{g!r}]") for g, ops in groups.items()}
    for name in ("then", "key_then"):
        if arguments.get(name) is not None:
            arguments[name] = _operations(arguments[name], name)
    return StructuredViews(**arguments, seed=seed)


def _json(file: str) -> Any:
    try:
        return json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"views: expected a JSON file: {file} could not be read ({error})") from error


def _operations(specs: Any, where: str) -> list[nn.Module]:
    import kornia.augmentation as K

    if not isinstance(specs, list | tuple):
        raise ValueError(f"views: expected {where} as a list of operations [name, arguments]: got {specs!r}")
    made: list[nn.Module] = []
    for spec in specs:
        if not isinstance(spec, list | tuple) or len(spec) not in (1, 2) or not isinstance(spec[-1], str | Mapping):
            raise ValueError(f"views: expected an operation of {where} as [name, arguments]: got {spec!r}")
        name, arguments = spec[0], spec[1] if len(spec) == 2 else {}
        kind: Any = getattr(K, str(name), None)
        made_for_images = inspect.isclass(kind) and issubclass(kind, K.AugmentationBase2D)
        if not made_for_images:
            raise ValueError(f"views: expected the name of a 2-D operation of kornia.augmentation: got {name!r}")
        if not isinstance(arguments, Mapping):
            raise ValueError(f"views: expected the arguments of {name} as a mapping: got {arguments!r}")
        try:
            made.append(kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}))
        except Exception as error:  # Kornia checks by assertions and type errors alike
            raise ValueError(f"views: {name} does not take {dict(arguments)!r} ({error})") from error
    return made


def find(spec: str, what: str) -> Any:
    """The thing called NAME in "FILE.py:NAME" or "MODULE:NAME"; runs that file or module."""
    home, _, name = spec.rpartition(":")
    if not home or not name or home.startswith("."):
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
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
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
