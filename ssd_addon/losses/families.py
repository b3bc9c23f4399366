"""Looks up families by name, for `JointEntropyLoss`, recipes, cards and reports."""

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

from ssd_addon import _checks
from ssd_addon.losses.barlow import BarlowTwins
from ssd_addon.losses.objective import Objective
from ssd_addon.losses.simclr import SimCLR
from ssd_addon.losses.spread import MMCR, FroSSL, SIGReg
from ssd_addon.losses.vicreg import VICReg

FamilyName = Literal["simclr", "vicreg", "barlow", "sigreg", "frossl", "mmcr"]
FAMILIES: tuple[FamilyName, ...] = ("simclr", "vicreg", "barlow", "sigreg", "frossl", "mmcr")
_KINDS: Mapping[str, Callable[..., Objective]] = {
    "simclr": SimCLR,
    "vicreg": VICReg,
    "barlow": BarlowTwins,
    "sigreg": SIGReg,
    "frossl": FroSSL,
    "mmcr": MMCR,
}


def resolve_family(given: FamilyName | Objective, **coefficients: float | Tensor | None) -> Objective:
    """The family with this name and these coefficients (None: the default); a family object is returned unchanged.

    Raises:
        ValueError: the name is unknown, or the family does not have a given coefficient.
        TypeError: given is neither a name nor a family.
    """
    named = {k: v for k, v in coefficients.items() if v is not None}
    if isinstance(given, Objective):
        if named:
            name = next(iter(named))
            raise ValueError(
                f"{name}: expected it only with the name of a family, as a family object has its own coefficients: got "
                f"{name}={named[name]!r} and the family {given.name!r}"
            )
        return given
    if not isinstance(given, str):
        raise TypeError(
            f"family: expected a name ({', '.join(map(repr, FAMILIES))}) or a losses.Family: got {type(given).__name__}"
        )
    kind = _KINDS[_checks.choice(given, FAMILIES, "family")]
    own = kind().defaults
    for name, value in named.items():
        if name not in own:
            has = _checks.names(own) if own else "no coefficients"
            raise ValueError(f"{name}: the {given!r} family has {has}, not {name}: got {name}={value!r}")
    return kind(**named)
