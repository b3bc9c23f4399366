"""The backbones of an audit by name, each with its weights and with what builds it anew."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ssd_addon.auditing.untrained import Fresh, copy_of
from ssd_addon.auditing.weights import load_weights
from ssd_addon.backbones import TimmFeatures, prepared
from ssd_addon.heads import StyleHeads
from ssd_addon.runs.build import backbone_maker


@dataclass(frozen=True, eq=False)
class Named:
    """A backbone that was built by name.

    Attributes:
        net: the backbone, with its weights.
        fresh: builds it anew without any weights; None where that is not possible.
        untrained: whether it is a library's network and no weights were given.
    """

    net: nn.Module
    fresh: Fresh | None
    untrained: bool


def named_backbones(
    specs: Sequence[str],
    *,
    weights: Sequence[str | Path] = (),
    prefix: str | None = None,
    pretrained: bool = False,
    output: str | int | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, nn.Module]:
    """One or two backbones with their weights, under names that tell them apart.

    Args:
        specs: "torchvision:NAME", "timm:NAME" or "FILE.py:NAME". Where both are one and the same module, the second is
            a copy.
        weights: a file for each of them, in their order, "-" for none; () for none at all.
        prefix: as for `load_weights`.
        pretrained: the library's own weights where no file is given.
        output: where a backbone returns several tensors, the one that is used, as for `audit`.
        say: called with a line on what was loaded.

    Raises:
        ValueError: another number of backbones or files, and what `build_backbone` and `load_weights` refuse.
    """
    found = named(specs, weights=weights, prefix=prefix, pretrained=pretrained, output=output, say=say)
    return {name: each.net for name, each in found.items()}


def named(
    specs: Sequence[str],
    *,
    weights: Sequence[str | Path] = (),
    prefix: str | None = None,
    pretrained: bool = False,
    output: str | int | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Named]:
    """`named_backbones`, with what else is to be said of each."""
    if not 1 <= len(specs) <= 2:
        raise ValueError(f"model: expected one or two: got {len(specs)}")
    if len(weights) not in (0, len(specs)):
        expected = f"a file for each of {len(specs)} models, in their order, - for none"
        raise ValueError(f"weights: expected {expected}: got {len(weights)}")
    files = [None if str(w) == "-" else Path(w) for w in weights] or [None] * len(specs)
    nets: list[nn.Module] = []
    fresh: list[Fresh | None] = []
    for spec, file in zip(specs, files, strict=True):
        make, anew = backbone_maker(spec, code=True, pretrained=pretrained and file is None)
        net = make()
        ids = {id(t) for other in nets for t in (*other.parameters(), other)}
        shared = any(id(t) in ids for t in (*net.parameters(), net))
        nets.append(copy_of(net) if shared else net)  # before any weights are loaded
        fresh.append((make if not pretrained else backbone_maker(spec, code=True)[0]) if anew else None)
    out: dict[str, Named] = {}
    for spec, file, short, net, again in zip(specs, files, _short(files), nets, fresh, strict=True):
        name = spec if file is None else f"{spec} ({short})"
        untrained = file is None and not pretrained and spec.split(":")[0] in ("torchvision", "timm")
        if file is not None:
            loaded = _into(net, file, prefix, output)
            if say is not None:
                say(f"{name}: {loaded}")
        elif untrained and say is not None:
            say(f"{name}: no weights were given, so this is an untrained network (weights, pretrained)")
        out[name if name not in out else f"{name}, again"] = Named(net, again, untrained)
    return out


def _short(files: Sequence[Path | None]) -> list[str]:
    """The names of files, with as many of the folders around them as tell them apart."""
    parts = [f.parts for f in files if f is not None]
    longest = max(map(len, parts), default=1)
    count = next((n for n in range(1, longest) if len({p[-n:] for p in parts}) == len(set(parts))), longest)
    return ["" if f is None else "/".join(f.parts[-count:]) for f in files]


def _into(net: nn.Module, file: Path, prefix: str | None, output: str | int | None) -> str:
    """Load weights into a backbone whose classifier they need not hold."""
    if isinstance(net, StyleHeads):
        inside = net.backbone.model if isinstance(net.backbone, TimmFeatures) else net.backbone
        return load_weights(inside, file, prefix=prefix)
    made = prepared(net, None, "auto", 3, output)
    inner = made.module.model if isinstance(made.module, TimmFeatures) else made.module
    dropped = [d.removeprefix("model.") if inner is not made.module else d for d in made.dropped]
    return load_weights(inner, file, prefix=prefix, dropped=dropped)
