"""The card in a file of weights: plain data from which it can be opened without the script that trained it.

    {"backbone": "torchvision:resnet18",                          or "timm:NAME", or "FILE.py:NAME" (code)
     "views": {"preset": "color_spatial", "size": 224},           or {"groups": {...}}, see `ssd_addon.runs.build_views`
     "family": "simclr", "size": 224, "name": "mine"}             for a custom family: its name, and "on_sphere": bool

A card may name libraries and operations, but never contains code. You can add your own keys ("commit", "notes").
"""

import difflib
from collections.abc import Mapping
from typing import Any

from ssd_addon import _checks, _limits, storage
from ssd_addon.losses.families import FAMILIES, resolve_family

KEYS = ("backbone", "views", "family", "on_sphere", "size", "name")


def check_card(card: Any, where: str = "card") -> None:
    """Refuse a card that would be misread, or whose misspelled keys would be ignored.

    Raises:
        ValueError: the card is not a mapping; its family or size is unknown; a key is a misspelled one of `KEYS`; a
            value is neither plain data nor a tensor (a file that contains it could not be opened again).
    """
    if not isinstance(card, Mapping):
        raise ValueError(f"{where}: expected the card as a mapping: got {type(card).__name__}")
    family, size = card.get("family"), 1 if card.get("size") is None else card["size"]
    sphere = card.get("on_sphere")
    if sphere is not None and not isinstance(sphere, bool):
        raise ValueError(f"{where}: expected the card's on_sphere as True or False: got {sphere!r}")
    if family is not None and family not in FAMILIES and (sphere is None or not isinstance(family, str)):
        raise ValueError(
            f"{where}: expected the card's family to be one of {_checks.names(FAMILIES)}, or the card to have "
            f"'on_sphere', which decides whether embeddings are L2-normalized for scores: got {family!r}"
        )
    _limits.edge(size, f"{where}: expected the card's size")
    for key, value in card.items():
        if odd := storage.not_plain(value):
            raise ValueError(
                f"{where}: expected plain data (numbers, strings, lists, mappings), as a file with anything else "
                f"cannot be opened again: got {odd[0]} in {key!r}"
            )
        if key not in KEYS and (meant := difflib.get_close_matches(str(key).lower(), KEYS, 1, 0.85)):
            raise ValueError(f"{where}: expected the card's key {meant[0]!r}: got {key!r}, which is not used")


def compares_on_sphere(card: Mapping[str, Any]) -> bool:
    """Whether the card's loss compares L2-normalized embeddings; True if the card names no loss."""
    if card.get("on_sphere") is not None:
        return bool(card["on_sphere"])
    return card.get("family") is None or resolve_family(card["family"]).on_sphere
