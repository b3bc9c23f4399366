"""An audit: how well the parameters of augmentations can be decoded from a pretrained backbone, layer by layer.

    python -m ssd_addon audit timm:resnet18 --pretrained --data DIR --out audit.html
    audit(backbone, images)                              the table alone, in Python
    write("audit.html", {"mine": backbone}, images)      the page, in Python

`named` builds backbones by name, with weights that `holders` and `weights` read from checkpoints of other libraries;
`layers` reads rows of features off a backbone, `stages` says which, `untrained` makes the copies to compare with,
`measure` scores, `verdict` puts it in words, `page` makes HTML of it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssd_addon.auditing.measure import Audited, Normalize, OneGroup, Say, audit, audited, enlarged, views_of
from ssd_addon.auditing.named import named_backbones
from ssd_addon.auditing.page import Strip, about_of, render
from ssd_addon.auditing.untrained import Fresh
from ssd_addon.auditing.verdict import compared, headline, sentences
from ssd_addon.auditing.weights import load_weights
from ssd_addon.augment import StructuredViews
from ssd_addon.metrics.images import scaled
from ssd_addon.pooling import Pool
from ssd_addon.report import writable
from ssd_addon.report.data import Data, facts
from ssd_addon.report.findings import unnormalized
from ssd_addon.runs.build import build_views, read_json

__all__ = [
    "Audited",
    "audit",
    "audited",
    "compared",
    "headline",
    "load_weights",
    "named_backbones",
    "sentences",
    "views_for",
    "write",
]

SHOWN = 6
"""Images in the strip of views."""


def write(
    out: str | Path,
    backbones: Mapping[str, nn.Module],
    images: Tensor | Data,
    groups: str | Mapping[str, Sequence[Any]] | StructuredViews = "color_spatial",
    *,
    size: int = 224,
    labels: Tensor | None = None,
    layers: Sequence[str] | None = None,
    normalize: Normalize = "auto",
    pool: Pool = "auto",
    output: str | int | None = None,
    draws: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    fresh: Mapping[str, Fresh | None] | None = None,
    untrained: Collection[str] = (),
    say: Say | None = None,
) -> list[Audited]:
    """Audit one backbone, or two side by side, and write the page.

    Args:
        out: the HTML file; its folder is made where it is missing.
        backbones: name -> backbone, one or two.
        images: [n, C, H, W], uint8 or in [0, 1], or `report.Data`, whose factor "class" is taken as labels.
        groups, size, layers, normalize, pool, output, draws, batch_size, seed, say: as of
            `audit`.
        labels: [n] classes, for the accuracy of a linear probe and of k-NN.
        fresh: name -> what builds that backbone anew, as for `audit`.
        untrained: names of the backbones for which no weights were given, of which the page says so.

    Returns:
        What the page shows of each backbone.

    Raises:
        OSError: `out` cannot be written; raised before anything is computed.
        ValueError, TypeError: another number of backbones, and what `audit` refuses.
    """
    path = writable(out)
    if not isinstance(backbones, Mapping) or not 1 <= len(backbones) <= 2:
        got = len(backbones) if isinstance(backbones, Mapping) else type(backbones).__name__
        raise ValueError(f"backbones: expected one or two, name -> module: got {got}")
    data = images if isinstance(images, Data) else Data(images)
    data.check()
    if labels is None and isinstance(data.factors.get("class"), Tensor):
        classes = data.factors["class"]
        assert isinstance(classes, Tensor)
        labels = None if classes.is_floating_point() else classes
    views = views_of(groups, size)
    found = []
    for name, backbone in backbones.items():
        if say is not None:
            say(f"auditing {name}")
        with _of_model(name, len(backbones)):
            each = audited(
                name,
                backbone,
                data.images,
                views,
                labels=labels,
                layers=layers,
                normalize=normalize,
                pool=pool,
                output=output,
                draws=draws,
                batch_size=batch_size,
                seed=seed,
                fresh=(fresh or {}).get(name),
                untrained=name in untrained,
                say=say,
            )
        found.append(each)
    if small := enlarged(data.images, views):
        for each in found:
            each.notes.append(small)
    about = about_of(data.images, data.total, views.plan.spaces[1:], facts(data))
    path.write_text(render(found, about, _strip(views, scaled(data.images[:SHOWN]), seed)), encoding="utf-8")
    return found


def views_for(spec: Any, size: int) -> StructuredViews:
    """The views of an audit: a preset's name, a JSON file or code, "FILE.py:NAME", as `runs.build_views` takes them.

    A preset, by name or in a JSON file, has this size and is not normalized, as the backbone's normalization comes
    after it; unless the file says otherwise.
    """
    if isinstance(spec, str) and ":" not in spec and not spec.endswith(".json"):
        return views_of(spec, size)
    if isinstance(spec, str | Path) and str(spec).endswith(".json"):
        spec = read_json(str(spec))
    if isinstance(spec, Mapping) and "preset" in spec:
        spec = {"size": size, "normalize": False, **spec}
    return build_views(spec, code=True)


@contextmanager
def _of_model(name: str, count: int) -> Iterator[None]:
    """Errors say of which of several models they are."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if count > 1:
            error.args = (f"{error}; the model is {name}",)
        raise


def _strip(views: StructuredViews, images: Tensor, seed: int) -> Strip:
    pairs = {g: OneGroup(views, g).independent(images, seed=(seed, 0, 0)).views for g in views.plan.spaces[1:]}
    shown = {g: unnormalized(pair, views).clamp(0, 1) for g, pair in pairs.items()}
    return Strip(next(iter(shown.values()))[0], {g: pair[1] for g, pair in shown.items()})
