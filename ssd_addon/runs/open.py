"""Opens a trained model from a run's folder or a file, without the script that trained it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ssd_addon import storage
from ssd_addon.augment import StructuredViews
from ssd_addon.card import check_card, compares_on_sphere
from ssd_addon.heads import StyleHeads
from ssd_addon.runs.build import build_backbone, build_views, read_json
from ssd_addon.runs.log import LOG, read_log

FILES = ("model.pt", "checkpoint.pt")


@dataclass(frozen=True, eq=False)
class Opened:
    """A model in evaluation mode, with the other contents of its checkpoint.

    Attributes:
        model: `StyleHeads` on the CPU; its `on_sphere` is that of the card's family.
        views: the `StructuredViews` with which it was trained, or None if neither card nor caller names them.
        card: the card; {} if there is none.
        log: entries of the run's JSON-lines log, oldest first; [] if there is none.
        path: path of the file with the weights.
        log_problem: the reason if the log could not be read, else "".
    """

    model: StyleHeads
    views: StructuredViews | None
    card: Mapping[str, Any]
    log: list[dict[str, Any]] = field(default_factory=list)
    path: Path = Path()
    log_problem: str = ""


def load(
    path: str | Path, *, backbone: str | nn.Module | None = None, views: Any = None, size: int | None = None
) -> Opened:
    """Open a run's folder (model.pt or checkpoint.pt, log.jsonl) or a file of weights.

    Args:
        path: folder or file.
        backbone: replaces the card's: a module, "torchvision:NAME", "timm:NAME", or your own code, "FILE.py:NAME" or
            "MODULE:NAME", where NAME() returns a module.
        views: replaces the card's: a `StructuredViews`, a mapping as on the card, a preset's name, a JSON file with
            such a mapping, or your own code, "FILE.py:NAME".
        size: edge in pixels of the views of a preset that names none; replaces the card's. None: the card's, else 224.

    Raises:
        FileNotFoundError: the folder or file does not exist, or the folder has no checkpoint.
        ValueError: the file is not a checkpoint of `StyleHeads`, is damaged (see `StyleHeads.load`), or is incomplete;
            the message names what is missing.
    """
    folder, file = _found(Path(path))
    stored = storage.read(
        file, expected="a checkpoint of tensors and plain data", with_parts="a checkpoint of StyleHeads"
    )
    card = stored.card
    check_card(card, str(file))
    made = _backbone(file, backbone, card.get("backbone"))
    try:
        model = StyleHeads.from_stored(stored, made)
    except (TypeError, ValueError) as error:
        reason = str(error)
        raise ValueError(f"{file}: {reason if len(reason) < 600 else reason[:600] + ' ...'}") from error
    if "family" in card or "on_sphere" in card:
        model.on_sphere = compares_on_sphere(card)
    log, problem = _log(folder / LOG)
    return Opened(model.eval(), _views(views, card, size), card, log, file, problem)


def _found(path: Path) -> tuple[Path, Path]:
    """(the run's folder, the file of weights)."""
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: expected a run's folder with {' or '.join(FILES)}: got neither")
        return path, found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a run's folder or a checkpoint: got no such file")
    return path.parent, path


def _log(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The entries, and the reason if there is a file that cannot be read."""
    if not path.is_file():
        return [], ""
    try:
        return read_log(path), ""
    except (ValueError, OSError) as error:
        return [], str(error)


def _views(given: Any, card: Mapping[str, Any], size: int | None = None) -> StructuredViews | None:
    chosen = given if given is not None else card.get("views")
    code = given is not None
    if isinstance(given, str) and given.endswith(".json"):
        chosen, code = read_json(given), False
    if isinstance(chosen, str) and ":" not in chosen and not chosen.endswith(".json"):
        chosen = {"preset": chosen}
    if isinstance(chosen, Mapping) and "preset" in chosen:
        chosen = {"size": size or card.get("size") or 224} | dict(chosen)
    return None if chosen is None else build_views(chosen, code=code)


def _backbone(file: Path, given: str | nn.Module | None, stored: Any) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    if given is not None:
        return build_backbone(given, code=True)
    if stored is None:
        raise ValueError(
            f"{file}: expected the card to name the backbone: got none; pass backbone='torchvision:NAME', 'timm:NAME' "
            "or 'FILE.py:NAME'"
        )
    if not isinstance(stored, str):
        raise ValueError(f"{file}: expected the card's backbone as a string: got {type(stored).__name__}")
    if not stored.strip():
        raise ValueError(
            f"{file}: expected the card to name the backbone, such as torchvision:resnet18: got {stored!r}"
        )
    if stored.split(":")[0] not in ("torchvision", "timm"):
        raise ValueError(
            f"{file}: expected the card's backbone as torchvision:NAME or timm:NAME, as a checkpoint may not choose "
            f"code to run: got {stored!r}; if the code is yours, pass backbone={stored!r}"
        )
    return build_backbone(stored)
