"""Builds backbones and views from plain data, such as a card, and from the caller's own code."""

import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ssd_addon import _checks, _limits
from ssd_addon._optional import needs
from ssd_addon.augment import StructuredViews
from ssd_addon.recipes import presets

PRESET_KEYS = ("preset", "size", "normalize", "plan", "cross_image", "constrained_crop")


def build_backbone(spec: str, *, code: bool = False, pretrained: bool = False) -> nn.Module:
    """Build a backbone by name: "torchvision:resnet18", "timm:vit_tiny_patch16_224" or, with `code`, "FILE.py:NAME".

    Args:
        spec: name of the backbone.
        code: allow a Python file or module, whose code is run; NAME is an nn.Module or a function that returns one.
        pretrained: load the library's own weights, which it downloads if necessary.

    Raises:
        ValueError: the name has another form; the model is unknown; the code does not make a module; pretrained is
            given with code.
        OSError: the weights could not be downloaded.
        ImportError: torchvision or timm is missing.
    """
    return backbone_maker(spec, code=code, pretrained=pretrained)[0]()


def backbone_maker(spec: str, *, code: bool = False, pretrained: bool = False) -> tuple[Callable[[], nn.Module], bool]:
    """What builds a backbone, and whether it builds another one at each call; arguments as for `build_backbone`."""
    home, _, name = spec.partition(":")
    if not name:
        raise ValueError(f"backbone: expected torchvision:NAME, timm:NAME or FILE.py:NAME: got {spec!r}")
    if home == "torchvision":
        return partial(_of_torchvision, spec, name, pretrained), True
    if home == "timm":
        return partial(_of_timm, spec, name, pretrained), True
    if not code:
        raise ValueError(f"backbone: expected torchvision:NAME or timm:NAME: got {spec!r}")
    if pretrained:
        raise ValueError(
            f"pretrained: expected only with torchvision:NAME or timm:NAME: got {spec!r}; give its weights"
        )
    maker = find(spec, "backbone")
    return partial(_made, spec, maker), callable(maker) and not isinstance(maker, nn.Module)


def _of_torchvision(spec: str, name: str, pretrained: bool) -> nn.Module:
    with needs(f"backbone {spec!r}"):
        models = importlib.import_module("torchvision.models")
    if name not in models.list_models(module=models):  # classification models only; others download weights
        raise ValueError(
            f"backbone: expected a classification model of torchvision (see torchvision.models): got {name!r}"
        )
    with _downloading(spec, pretrained):
        model: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None)
    return model


def _of_timm(spec: str, name: str, pretrained: bool) -> nn.Module:
    with needs(f"backbone {spec!r}"):
        timm = importlib.import_module("timm")
    if ":" in name or "/" in name or not timm.is_model(name):  # names of hubs and folders are not architectures
        raise ValueError(f"backbone: expected a model of timm: got {name!r}")
    try:
        # With its classifier, which StyleHeads removes, as files of 0.1.0 contain its weights.
        with _downloading(spec, pretrained):
            made: nn.Module = timm.create_model(name, pretrained=pretrained)
        return made
    except RuntimeError as error:  # unknown pretrained tag
        raise ValueError(f"backbone: expected a model of timm: got {name!r} ({error})") from error


def _made(spec: str, maker: Any) -> nn.Module:
    """The module that the caller's code holds under a name, or makes."""
    if callable(maker) and not isinstance(maker, nn.Module):
        if missing := required(maker):
            expected = f"{spec} to be a module, or a function that needs no arguments and makes one"
            raise ValueError(f"backbone: expected {expected}: got a function that needs {_checks.names(missing)}")
        maker = maker()
    if not isinstance(maker, nn.Module):
        raise ValueError(f"backbone: expected {spec} to make an nn.Module: got {type(maker).__name__}")
    return maker


def required(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a function cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


@contextmanager
def _downloading(spec: str, pretrained: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each library raises its own errors if the network cannot be reached
        if not pretrained or (isinstance(error, RuntimeError) and "Invalid pretrained tag" in str(error)):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OSError(
            f"pretrained: expected weights of {spec!r} that can be loaded: could not get them ({reason}); give a file "
            "with the weights instead"
        ) from error


def build_views(spec: Any, *, code: bool = False, seed: int | None = 0) -> StructuredViews:
    """Build `StructuredViews` from plain data.

    Args:
        spec: {"preset": name, "size": pixels}, optionally with "plan", "cross_image" and "constrained_crop"; or
            {"groups": {"color": [["ColorJitter", {"hue": 0.1}], ...]}, "then": [...], ...} with the arguments of
            `StructuredViews`, where each operation is Kornia's name and its arguments; or a `StructuredViews`. With
            `code` also a preset's name, a JSON file of such a mapping, or "FILE.py:NAME", where NAME() returns views.
        code: allow these three forms; the code in a Python file is run.
        seed: seed of the draws.

    Raises:
        ValueError: spec has another form; an operation is unknown or does not accept its arguments.
    """
    if isinstance(spec, StructuredViews):
        return spec
    if isinstance(spec, Path):
        spec = str(spec)
    if isinstance(spec, str) and code:
        if spec.endswith(".json"):
            spec = read_json(spec)
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
            raise ValueError(f"views: expected only {_checks.names(PRESET_KEYS)}: got {_checks.names(extra)} too")
        options = {k: spec[k] for k in ("size", "normalize") if k in spec}
        _limits.edge(spec.get("size", 1), "views: expected the preset's size")
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
            _limits.few(groups, f"views: {name}")
            arguments[name] = {g: _operations(ops, f"{name}[{g!r}]") for g, ops in groups.items()}
    for name in ("then", "key_then"):
        if arguments.get(name) is not None:
            arguments[name] = _operations(arguments[name], name)
    return StructuredViews(**arguments, seed=seed)


def read_json(file: str) -> Any:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"views: expected a JSON file: {file} could not be read ({error})") from error


def _operations(specs: Any, where: str) -> list[nn.Module]:
    import kornia.augmentation as K

    if not isinstance(specs, list | tuple):
        raise ValueError(f"views: expected {where} as a list of operations [name, arguments]: got {specs!r}")
    _limits.few(specs, f"views: operations of {where}")
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
        _limits.numbers(dict(arguments), f"views: arguments of {name}")
        _limits.crop(arguments.get("size"), f"views: {name}")
        try:
            made.append(kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}))
        except Exception as error:  # Kornia raises assertion errors, type errors and others
            raise ValueError(f"views: {name} does not take {dict(arguments)!r} ({error})") from error
    return made


HELPERS: dict[str, Path] = {}
"""Modules that scripts imported from their own folder: name -> folder."""


def find(spec: str, what: str) -> Any:
    """Import "FILE.py:NAME" or "MODULE:NAME" and return the object NAME; runs that file or module."""
    home, _, name = spec.rpartition(":")
    relative = home.startswith(".") and not home.endswith(".py")  # of a module: relative to nothing
    if not home or not name or relative:
        raise ValueError(f"{what}: expected FILE.py:NAME or MODULE:NAME: got {spec!r}")
    if home.endswith(".py"):
        file = Path(home).resolve()
        if not file.is_file():
            raise ValueError(f"{what}: expected a Python file: got {home}, which is not a file")
        loader = importlib.util.spec_from_file_location(f"_ssd_addon_{file.stem}", file)
        assert loader is not None and loader.loader is not None
        module = importlib.util.module_from_spec(loader)
        sys.modules[loader.name] = module  # needed by dataclasses and pickle
        sys.path.insert(0, str(file.parent))  # for imports from the script's folder, as when it is run
        for helper in [n for n, folder in HELPERS.items() if folder != file.parent]:
            if (file.parent / f"{helper}.py").is_file() or (file.parent / helper).is_dir():
                for part in [m for m in sys.modules if m == helper or m.startswith(f"{helper}.")]:
                    del sys.modules[part]  # another script's module of the same name
                del HELPERS[helper]
        before = set(sys.modules)
        try:
            loader.loader.exec_module(module)
        finally:
            sys.path.remove(str(file.parent))
        for new in set(sys.modules) - before:
            place = getattr(sys.modules[new], "__file__", None)
            if "." not in new and place and file.parent in (Path(place).parent, Path(place).parent.parent):
                HELPERS[new] = file.parent
    else:
        try:
            module = importlib.import_module(home)
        except ImportError as error:
            raise ValueError(f"{what}: expected a module that can be imported: {home!r} can not ({error})") from error
    if not hasattr(module, name):
        raise ValueError(f"{what}: {home} has no {name!r}")
    return getattr(module, name)
