"""The card of a file of weights: what is needed to open it without the script that trained it, as plain data.

    {"backbone": "torchvision:resnet18",                          or "timm:NAME", or "FILE.py:NAME" (code)
     "views": {"preset": "color_spatial", "size": 224},           or {"groups": {...}}, see `ssd_addon.runs.build_views`
     "family": "simclr", "size": 224, "name": "mine"}             a family of your own: its name, and "on_sphere": bool

A card may name libraries and operations, never code to run. Keys of your own may stand on it ("commit", "notes").
"""

import difflib
from collections.abc import Mapping
from typing import Any

from ssd_addon import _checks, _limits, storage
from ssd_addon.losses.families import FAMILIES, resolve_family

KEYS = ("backbone", "views", "family", "on_sphere", "size", "name")


def check_card(card: Any, where: str = "card") -> None:
    """Refuse what a reader would take wrongly, or pass over in silence because it is misspelt.

    Raises:
        ValueError: no mapping, another family or size than there is, a key that is nearly one of `KEYS`, a value that
            is neither plain data nor a tensor (a file that holds one would not open again).
    """
    if not isinstance(card, Mapping):
        raise ValueError(f"{where}: expected the card as a mapping: got {type(card).__name__}")
    family, size = card.get("family"), 1 if card.get("size") is None else card["size"]
    sphere = card.get("on_sphere")
    if sphere is not None and not isinstance(sphere, bool):
        raise ValueError(f"{where}: expected the card's on_sphere as True or False: got {sphere!r}")
    if family is not None and family not in FAMILIES and (sphere is None or not isinstance(family, str)):
        raise ValueError(
            f"{where}: expected the card's family to be one of {_checks.names(FAMILIES)}, or 'on_sphere' beside it, as "
            f"that decides whether embeddings are scored L2-normalized: got {family!r}"
        )
    _limits.edge(size, f"{where}: expected the card's size")
    for key, value in card.items():
        if odd := storage.not_plain(value):
            raise ValueError(
                f"{where}: expected plain data (numbers, strings, lists, mappings), as a file with more in it is not "
                f"opened again: got {odd[0]} in {key!r}"
            )
        if key not in KEYS and (meant := difflib.get_close_matches(str(key).lower(), KEYS, 1, 0.85)):
            raise ValueError(f"{where}: expected the card's key {meant[0]!r}: got {key!r}, which nothing reads")


def compares_on_sphere(card: Mapping[str, Any]) -> bool:
    """Whether the loss that the card names compares L2-normalized embeddings; True where it names none."""
    if card.get("on_sphere") is not None:
        return bool(card["on_sphere"])
    return card.get("family") is None or resolve_family(card["family"]).on_sphere
