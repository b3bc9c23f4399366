"""The weights of a backbone out of whatever file its training left: a plain state dict, a checkpoint of Lightning or
lightly, of a training script, or safetensors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssd_addon import _archive, _checks, storage
from ssd_addon.backbones import TimmFeatures, prepared
from ssd_addon.heads import StyleHeads
from ssd_addon.runs.build import build_backbone

HOLDERS = ("state_dict", "model", "model_state_dict", "teacher", "student", "ema", "backbone", "net")
"""Keys under which checkpoints keep a state dict, in the order in which they are tried."""


def load_weights(net: nn.Module, path: str | Path, *, prefix: str | None = None, dropped: Iterable[str] = ()) -> str:
    """Load the weights of a backbone; it is left as it was where they do not fit.

    Keys may have any prefix ("backbone.", "model.", "student.backbone.", ...) and the names of wrappers. A module
    that was rebuilt as `nn.Sequential(*list(net.children())[:-1])`, lightly's idiom, has numbers in the place of the
    names of its children: these are recognized too.

    Args:
        net: the backbone, without what is in `dropped`.
        path: of the file; nothing in it is run.
        prefix: of the keys, where several networks in the file fit.
        dropped: parts that were taken off the backbone, whose weights the file may hold.

    Returns:
        What was loaded, in words.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of weights, a damaged one, one of another network (with the keys that are missing), or one
            that holds several which fit.
    """
    state = state_dict_of(path)
    wanted = net.state_dict()
    aliases = _numbered(net, wanted)
    lists = [{k: k for k in wanted}, *([aliases] if aliases else [])]
    fits = {p: names for names in lists for p in _prefixes(state, names)}
    if prefix is not None:
        given = prefix.rstrip(".") + "." if prefix else ""
        if given not in fits:
            raise ValueError(f"{path}: expected the backbone's weights under the prefix {given!r}: {_got(fits, state)}")
        fits = {given: fits[given]}
    if not fits:
        raise ValueError(f"{path}: expected the weights of {type(net).__name__}: {_nearest(state, wanted)}")
    if len(fits) > 1:
        raise ValueError(
            f"{path}: expected the weights of one network: got several that fit, under the prefixes "
            f"{_checks.names(map(repr, fits))}; name the one that you want with prefix"
        )
    ((chosen, names),) = fits.items()
    found = {names[k]: state[chosen + k] for k in names if chosen + k in state}
    for k, t in found.items():
        if t.shape != wanted[k].shape:
            raise ValueError(
                f"{path}: expected {k} {_checks.shape(wanted[k])}, as {type(net).__name__} has it: got "
                f"{_checks.shape(t)}"
            )
    left = [k for k in state if k.startswith(chosen) and k.removeprefix(chosen) not in names]
    left = [k for k in left if not k.removeprefix(chosen).startswith(tuple(f"{d}." for d in dropped))]
    net.load_state_dict(found, strict=False)
    under = f" under {chosen!r}" if chosen else ""
    beside = f", and {len(left)} others there that are not the backbone's" if left else ""
    return f"{len(found)} tensors{under}{beside}"


def state_dict_of(path: str | Path) -> dict[str, Tensor]:
    """Key -> tensor of a file of weights, without the names of wrappers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or without tensors.
    """
    if not Path(path).is_file():
        got = "a folder" if Path(path).is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: expected a file of weights: got {got}")
    content: Any
    if Path(path).suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"{path}: reading it needs safetensors: pip install safetensors") from error
        content = load_file(str(path))
    else:
        try:
            content = _archive.load(path, "cpu", leave_out=True)
        except Exception as error:  # whatever a file's bytes make the reader say
            raise ValueError(
                f"{path}: expected a file of weights: could not be read ({_archive.reason(error)})"
            ) from error
    for _ in range(3):  # {"model": {"state_dict": ...}}
        if not isinstance(content, Mapping):
            raise ValueError(f"{path}: expected a mapping of weights: got {type(content).__name__}")
        flat = {storage.bare(k): v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
        inner = next((content[k] for k in HOLDERS if isinstance(content.get(k), Mapping)), None)
        if inner is None or len(flat) > 1:
            break
        content = inner
    if not flat:
        raise ValueError(f"{path}: expected a mapping of weights: got none in it (keys: {_checks.names(content)})")
    return flat


def _prefixes(state: Mapping[str, Tensor], names: Mapping[str, str]) -> list[str]:
    """Prefixes under which all of these names are in a state dict (counters of batch norms may be missing)."""
    needed = [n for n in names if not n.endswith("num_batches_tracked")]
    if not needed:
        return []
    first = needed[0]
    prefixes = [k.removesuffix(first) for k in state if k == first or k.endswith(f".{first}")]
    return [p for p in prefixes if all(p + n in state for n in needed)]


def _numbered(net: nn.Module, wanted: Iterable[str]) -> dict[str, str]:
    """Keys as nn.Sequential(*children) has them -> own keys; {} where they are the same."""
    places = {name: str(k) for k, (name, _) in enumerate(net.named_children())}
    heads = {k: k.split(".", 1) for k in wanted}
    if any(head not in places or not rest for head, *rest in heads.values()):
        return {}
    aliases = {f"{places[head]}.{rest[0]}": k for k, (head, *rest) in heads.items()}
    return {} if all(a == k for a, k in aliases.items()) else aliases


def _got(fits: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    if fits:
        return f"got them under {_checks.names(map(repr, fits))}"
    return f"got none that fit (keys: {_checks.names(list(state)[:5])}, ...)"


def _nearest(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What is missing under the prefix that fits best, in words."""
    candidates = {k[: -len(w)] for w in list(wanted)[:50] for k in state if k == w or k.endswith(f".{w}")}
    best = max(candidates, key=lambda p: sum(p + w in state for w in wanted), default="")
    missing = [w for w in wanted if best + w not in state]
    there = f"keys {_checks.names(list(state)[:4])}, ..."
    if len(missing) == len(wanted):
        return f"got none of its keys ({_checks.names(list(wanted)[:3])}, ...), but {there}"
    more = ", ..." if len(missing) > 4 else ""
    there = f"{len(wanted) - len(missing)} of its {len(wanted)} tensors"
    return f"got {there}; missing are {_checks.names(missing[:4])}{more}"


def named_backbones(
    specs: Sequence[str],
    *,
    weights: Sequence[str | Path] = (),
    prefix: str | None = None,
    pretrained: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, nn.Module]:
    """One or two backbones with their weights, under names that tell them apart.

    Args:
        specs: "torchvision:NAME", "timm:NAME" or "FILE.py:NAME".
        weights: a file for each of them, in their order, "-" for none; () for none at all.
        prefix: of `load_weights`.
        pretrained: the library's own weights where no file is given.
        say: called with a line on what was loaded.

    Raises:
        ValueError: another number of backbones or files, and what `build_backbone` and `load_weights` refuse.
    """
    if not 1 <= len(specs) <= 2:
        raise ValueError(f"model: expected one or two: got {len(specs)}")
    if len(weights) not in (0, len(specs)):
        expected = f"a file for each of {len(specs)} models, in their order, - for none"
        raise ValueError(f"weights: expected {expected}: got {len(weights)}")
    files = [None if str(w) == "-" else Path(w) for w in weights] or [None] * len(specs)
    out: dict[str, nn.Module] = {}
    for spec, file in zip(specs, files, strict=True):
        net = build_backbone(spec, code=True, pretrained=pretrained and file is None)
        name = spec if file is None else f"{spec} ({file.name})"
        if file is not None:
            loaded = _into(net, file, prefix)
            if say is not None:
                say(f"{name}: {loaded}")
        elif not pretrained and spec.split(":")[0] in ("torchvision", "timm") and say is not None:
            say(f"{name}: no weights were given, so this is an untrained network (weights, pretrained)")
        out[name if name not in out else f"{name}, again"] = net
    return out


def _into(net: nn.Module, file: Path, prefix: str | None) -> str:
    """Load weights into a backbone whose classifier they need not hold."""
    if isinstance(net, StyleHeads):
        return load_weights(net.backbone, file, prefix=prefix)
    made = prepared(net, None, "auto", 3)
    inner = made.module.model if isinstance(made.module, TimmFeatures) else made.module
    dropped = [d.removeprefix("model.") if inner is not made.module else d for d in made.dropped]
    return load_weights(inner, file, prefix=prefix, dropped=dropped)
