"""The weights of a backbone out of whatever file its training left: a plain state dict, a checkpoint of Lightning or
lightly, of a training script, or safetensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ssd_addon import _checks, storage
from ssd_addon.auditing.holders import joined, state_dicts_of
from ssd_addon.backbones import CLASSIFIERS

OBSERVERS = ("activation_post_process", "weight_fake_quant")
"""Parts that training for quantization adds."""
TABLES = ("mask_token", "attn_mask", "relative_coords_table", "relative_position_index", "total_ops", "total_params")
"""What older versions of networks, counters of operations and masked training keep among the weights."""


@dataclass(frozen=True)
class Fit:
    """A state dict of a file that has all the keys of a network.

    Attributes:
        holder: what leads to it in the file, as in `state_dicts_of`.
        prefix: of its keys, as they stand, with the dot at its end.
        keys: key of the network -> key of the state dict.
        left: other keys under the prefix, that are not the network's.
        problem: why it can not be loaded; "" if it can.
    """

    holder: str
    prefix: str
    keys: Mapping[str, str]
    left: Sequence[str]
    problem: str

    @property
    def place(self) -> str:
        """Holder and prefix, as the caller can give them as a prefix."""
        return joined(self.holder, self.prefix.rstrip("."))

    def named(self, prefix: str) -> int:
        """How closely a prefix of the caller's names it, 0 for not at all."""
        given, own = prefix.rstrip("."), self.prefix.rstrip(".")
        exact = (self.place, own, self.holder if given else self.place)
        names = (*exact, storage.bare(own), joined(self.holder, storage.bare(own)))
        return len(names) - names.index(given) if given in names else 0


def load_weights(net: nn.Module, path: str | Path, *, prefix: str | None = None, dropped: Iterable[str] = ()) -> str:
    """Load the weights of a backbone; it is left as it was where they do not fit.

    The state dict may lie anywhere in the file, up to four mappings deep, and its keys may have any prefix
    ("backbone.", "model.", "student.backbone.", ...) and the names of wrappers. A module that was rebuilt as
    `nn.Sequential(*list(net.children())[:-1])`, lightly's idiom, has numbers in the place of the names of its children:
    these are recognized too.

    Args:
        net: the backbone, without what is in `dropped`.
        path: of the file; nothing in it is run.
        prefix: where several networks in the file fit: what leads to the one that is wanted ("state_dict_ema"), what
            its keys begin with ("module.encoder_q"), or both joined by a dot, as they stand in the file.
        dropped: parts that were taken off the backbone, whose weights the file may hold.

    Returns:
        What was loaded, in words.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of weights, a damaged one, one of another network (with the keys that are missing, or those
            of a deeper one that would be left over), or one that holds several which fit.
    """
    found = state_dicts_of(path)
    wanted = net.state_dict()
    fits = [fit for holder, state in found.items() for fit in _fits(holder, state, net, wanted, tuple(dropped))]
    if prefix is not None:
        closest = max((fit.named(prefix) for fit in fits), default=0)
        if not closest:
            got = (
                f"got them under {_checks.names(repr(f.place) for f in fits)}"
                if fits
                else f"got none that fit ({_there(found)})"
            )
            raise ValueError(f"{path}: expected the backbone's weights under the prefix {prefix!r}: {got}")
        fits = [fit for fit in fits if fit.named(prefix) == closest]
    if not fits:
        raise ValueError(f"{path}: expected the weights of {type(net).__name__}: {_nearest(found, wanted)}")
    good = [fit for fit in fits if not fit.problem] or fits[:1]
    if len(good) > 1:
        places = _checks.names(repr(f.place) for f in good)
        raise ValueError(
            f"{path}: expected the weights of one network: got several that fit, under {places}; choose one with "
            f"prefix={good[-1].place!r}"
        )
    fit = good[0]
    if fit.problem:
        raise ValueError(f"{path}: expected {fit.problem}")
    state = found[fit.holder]
    net.load_state_dict({own: state[key] for own, key in fit.keys.items()}, strict=False)
    under = f" under {fit.place!r}" if fit.place else ""
    beside = f", and {len(fit.left)} others there that are not the backbone's" if fit.left else ""
    return f"{len(fit.keys)} tensors{under}{beside}"


def _fits(
    holder: str, state: Mapping[str, Tensor], net: nn.Module, wanted: Mapping[str, Tensor], dropped: tuple[str, ...]
) -> list[Fit]:
    """Every place in a state dict at which a network's keys are, as they stand or without the names of wrappers."""
    out: dict[str, Fit] = {}
    numbers = _numbered(net, wanted)
    for plain in (lambda k: k, storage.bare):
        there, own = {plain(k): k for k in state}, {plain(k): k for k in wanted}
        if len(there) < len(state) or len(own) < len(wanted):  # two keys differ only by a wrapper's name
            continue
        for names in (own, {plain(alias): k for alias, k in numbers.items()}):
            for p in _prefixes(there, names):
                keys = {k: there[p + n] for n, k in names.items() if p + n in there}
                n, first = next((n, there[p + n]) for n in names if p + n in there)
                if first not in out:
                    stands = first.removesuffix(n) if first == n or first.endswith(f".{n}") else p
                    used = set(keys.values())
                    left = [k.removeprefix(p) for k, at in there.items() if k.startswith(p) and at not in used]
                    left = [k for k in left if not k.startswith(tuple(f"{d}." for d in dropped))]
                    names_of = {a.split(".")[0]: k.split(".")[0] for a, k in names.items()}
                    problem = _problem(net, wanted, {k: state[at] for k, at in keys.items()})
                    problem = problem or _foreign(net, {k: state[there[p + k]] for k in left}, names_of)
                    out[first] = Fit(holder, stands, keys, left, problem)
    return list(out.values())


def _prefixes(state: Iterable[str], names: Iterable[str]) -> list[str]:
    """Prefixes under which all of these names are in a state dict (counters of batch norms may be missing)."""
    needed = [n for n in names if not n.endswith("num_batches_tracked")]
    if not needed:
        return []
    first = needed[0]
    prefixes = [k.removesuffix(first) for k in state if k == first or k.endswith(f".{first}")]
    keys = set(state)
    return [p for p in prefixes if all(p + n in keys for n in needed)]


def _problem(net: nn.Module, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    for k, t in state.items():
        if t.shape != wanted[k].shape:
            own = f"{k} {_checks.shape(wanted[k])}, as {type(net).__name__} has it"
            return f"{own}: got {_checks.shape(t)}"
    return ""


def _foreign(net: nn.Module, left: Mapping[str, Tensor], names: Mapping[str, str]) -> str:
    """What is wrong with weights that are left over inside the parts that a network has; "" if nothing is.

    Weights beside these parts are another network's; those of a classifier, and those in the place of a child of the
    network without weights, which may have replaced one, are not missed.

    Args:
        names: the first part of a key -> the name of the network's child.
    """
    found = []
    for key, t in left.items():
        head, *rest = key.split(".")
        inside: nn.Module = net
        path = [names.get(head, head), *rest]
        missing = path[-1]
        for name in path[:-1]:
            part = inside._modules.get(name)
            if part is None:
                missing = name
                break
            inside = part
        replaced = inside in net.children() and next(iter(inside.state_dict()), None) is None
        known = not t.is_floating_point() or not {*TABLES, *OBSERVERS}.isdisjoint(path) or missing in CLASSIFIERS
        if inside is not net and not replaced and not known:
            found.append(key)
    if not found:
        return ""
    more = ", ..." if len(found) > 3 else ""
    return (
        f"the weights of {type(net).__name__}, all of them: got {len(found)} more inside its parts "
        f"({_checks.names(found[:3])}{more}), so the file seems to hold a deeper or wider network"
    )


def _numbered(net: nn.Module, wanted: Iterable[str]) -> dict[str, str]:
    """Keys as nn.Sequential(*children) has them -> own keys; {} where they are the same."""
    places = {name: str(k) for k, (name, _) in enumerate(net.named_children())}
    heads = {k: k.split(".", 1) for k in wanted}
    if any(head not in places or not rest for head, *rest in heads.values()):
        return {}
    aliases = {f"{places[head]}.{rest[0]}": k for k, (head, *rest) in heads.items()}
    return {} if all(a == k for a, k in aliases.items()) else aliases


def _there(found: Mapping[str, Mapping[str, Tensor]]) -> str:
    holder, state = max(found.items(), key=lambda each: len(each[1]))
    return f"keys {_checks.names(joined(holder, k) for k in list(state)[:4])}, ..."


def _nearest(found: Mapping[str, Mapping[str, Tensor]], wanted: Mapping[str, Tensor]) -> str:
    """What is missing at the place that fits best, in words."""
    best: list[str] = list(wanted)
    for state in found.values():
        for p in {k[: -len(w)] for w in list(wanted)[:50] for k in state if k == w or k.endswith(f".{w}")}:
            best = min(best, [w for w in wanted if p + w not in state], key=len)
    if len(best) == len(wanted):
        return f"got none of its keys ({_checks.names(list(wanted)[:3])}, ...), but {_there(found)}"
    more = ", ..." if len(best) > 4 else ""
    there = f"{len(wanted) - len(best)} of its {len(wanted)} tensors"
    return f"got {there}; missing are {_checks.names(best[:4])}{more}"
