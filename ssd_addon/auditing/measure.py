"""`audit`: what a backbone that was trained elsewhere keeps of each augmentation, layer by layer, without labels."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssd_addon import _checks
from ssd_addon.auditing.layers import Layers, over_copies
from ssd_addon.auditing.stages import named_layers, stages
from ssd_addon.auditing.untrained import CALIBRATION, Fresh, untrained_copies
from ssd_addon.augment import StructuredViews
from ssd_addon.backbones import TimmFeatures, prepared
from ssd_addon.batch import ViewBatch, ViewParameters
from ssd_addon.heads import StyleHeads
from ssd_addon.metrics import Probe, ScoreTable, class_accuracy, embed, parameter_matrix
from ssd_addon.metrics.embed import Images, batches
from ssd_addon.metrics.evaluation import evaluation, generators_kept
from ssd_addon.metrics.images import for_model, scaled
from ssd_addon.metrics.probe import at_least
from ssd_addon.plan import ViewPlan
from ssd_addon.pooling import Pool
from ssd_addon.recipes import MEAN, STD, presets
from ssd_addon.runs.build import build_backbone

Say = Callable[[str], None]
Normalize = tuple[Sequence[float], Sequence[float]] | Literal["auto"] | None
PAIRS = 1000
"""Pairs of views that are about drawn where the caller does not say how many."""
PER_CLASS = 5
"""Images of a class, on average, without which class accuracy is left out."""
PROJECTORS = ("projection_head", "projector", "projection", "prediction_head", "predictor")
"""Names of the heads that self-supervised training puts behind a backbone."""
PROJECTED = "the network has a part {!r}, so the features may be a projection head's; give the backbone alone"
PROBE = Probe("kernel", train_fraction=0.7)
LEAST = 15
"""Images of which 5 are held out, which a probe needs."""


@dataclass(frozen=True, eq=False)
class Audited:
    """What was measured of one backbone.

    Attributes:
        name: of the backbone.
        table: rows x groups of augmentations, with the parameters in `table.parts`.
        accuracy: rows x ("linear probe", "k-NN"), of classes, or None.
        layers: names of the rows that are layers, in the order in which they run.
        notes: what the reader has to know.
        untrained: whether no weights were given, so that nothing of it says anything of a training.
    """

    name: str
    table: ScoreTable
    accuracy: ScoreTable | None
    layers: tuple[str, ...]
    notes: list[str] = field(default_factory=list)
    untrained: bool = False


def audit(
    backbone: nn.Module,
    images: Images,
    groups: str | Mapping[str, Sequence[Any]] | StructuredViews = "color_spatial",
    *,
    size: int = 224,
    layers: Sequence[str] | None = None,
    normalize: Normalize = "auto",
    pool: Pool = "auto",
    output: str | int | None = None,
    draws: int | None = None,
    batch_size: int = 64,
    bootstrap: int = 200,
    seed: int = 0,
    fresh: Fresh | None = None,
    say: Say | None = None,
) -> ScoreTable:
    """What a backbone that was trained elsewhere keeps of each augmentation, layer by layer; needs no labels.

    Of every image two views are drawn that differ in one group of augmentations alone, and share everything else. From
    the features z_a, z_b of both, a kernel probe that sees [z_b - z_a, z_a + z_b] predicts by how much each parameter
    of the group differs, on images that it was not fitted on. A score near 0 means that the probe finds nothing of the
    parameter in the features, although nothing else changed.

    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
    >>> table = audit(net, torch.rand(40, 3, 16, 16), size=16, layers=("1",))
    >>> table.spaces, table.factors
    (('pixels', '1', 'backbone', 'untrained'), ('spatial', 'color'))

    Args:
        backbone: any module images -> features, maps or tokens, with or without its classifier, which is left out as in
            `StyleHeads`; a `StyleHeads` stands for its backbone. Measuring changes nothing.
        images: [n, C, H, W], uint8 or in [0, 1], not normalized, or batches of them (a data loader); n >= 15.
        groups: a preset's name (`presets`), name -> operations, or `StructuredViews`.
        size: edge in pixels of a preset's views.
        layers: names of modules inside the backbone, as in the library that it came from; None takes the backbone's own
            stages, () none. Maps are averaged in a grid of 2 x 2.
        normalize: (mean, std) of the channels, applied before the backbone; "auto" takes timm's own, and ImageNet's for
            other backbones, unless the groups hold a Normalize; None: images in [0, 1] as they are.
        pool, output: of the backbone's features, as of `StyleHeads`.
        draws: pairs per image and group; None makes about 1,000 pairs a group.
        batch_size: images at a time.
        bootstrap: resamples of the held-out images for the 95 % intervals.
        seed: of the views, the split, the resamples and the untrained copies.
        fresh: builds the network anew, with weights as its author draws them, for the untrained copies. None takes
            `timm.create_model` for a timm model that it builds the same; for others, and where what is built has other
            weights in name or shape, the parts are set back by their own `reset_parameters`.
        say: called with a line on the progress.

    Returns:
        `ScoreTable` of R^2, rows x groups, with the single parameters in `.parts`. Rows: "pixels" (the views, averaged
        in a grid of 8 x 8), the layers by name, "backbone" (its features), "untrained" (those of three copies with
        weights drawn anew: the mean of their scores, and an interval that spans those of all three).

    Warns:
        UserWarning: the images are smaller than the views, so that they are enlarged.

    Raises:
        ValueError, TypeError: layers that do not exist or do not run; a backbone that does not take the images; and
            what `StyleHeads` and `metrics.parameter_matrix` refuse.

    Source: docs/audit.md; the prediction of parameter differences is that of Lee et al. 2021 (AugSelf),
    arXiv 2111.09613, used here as a probe.
    """
    views = views_of(groups, size)
    at_least("bootstrap", bootstrap, 0)
    model, each, _ = prepared_for(backbone, images, views, layers, normalize, pool, output, batch_size, seed, fresh)
    if small := enlarged(each[0], views):
        warnings.warn(small, stacklevel=2)
    return _table(model, views, each, draws, bootstrap, seed, say)


def audited(
    name: str,
    backbone: nn.Module,
    images: Tensor,
    views: StructuredViews,
    *,
    labels: Tensor | None = None,
    layers: Sequence[str] | None = None,
    normalize: Normalize = "auto",
    pool: Pool = "auto",
    output: str | int | None = None,
    draws: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    fresh: Fresh | None = None,
    untrained: bool = False,
    say: Say | None = None,
) -> Audited:
    """`audit`, with class accuracy beside it where there are labels: what the page shows of one backbone.

    Args:
        labels: [n] classes of the images.
        untrained: whether no weights were given.
    """
    model, each, notes = prepared_for(backbone, images, views, layers, normalize, pool, output, batch_size, seed, fresh)
    if untrained:
        notes.append("no weights were given: this network is untrained")
    table = _table(model, views, each, draws, 200, seed, say)
    accuracy = None
    if labels is not None:
        classes = len(torch.unique(labels))
        if len(labels) < PER_CLASS * classes:
            notes.append(f"class accuracy is left out: {len(labels)} images of {classes} classes are too few")
        else:
            if say is not None:
                say("class accuracy")
            accuracy = _accuracy(model, each, labels, seed, notes)
    return Audited(name, table, accuracy, tuple(model._layers), notes, untrained)


def _accuracy(model: Layers, each: list[Tensor], labels: Tensor, seed: int, notes: list[str]) -> ScoreTable | None:
    z = embed(model, [scaled(x) for x in each])
    try:
        return over_copies(class_accuracy(z, labels, seed=seed))
    except ValueError as error:
        notes.append(f"class accuracy is left out: {error}")
    return None


def views_of(groups: str | Mapping[str, Sequence[Any]] | StructuredViews, size: int) -> StructuredViews:
    """The views that two of are drawn of every image."""
    if isinstance(groups, StructuredViews):
        return groups
    if isinstance(groups, str):
        return StructuredViews(**presets(groups, size=size, normalize=False), seed=0)
    if not isinstance(groups, Mapping):
        raise TypeError(
            f"groups: expected a preset's name or a mapping name -> operations: got {type(groups).__name__}"
        )
    return StructuredViews(groups, seed=0)


def enlarged(images: Tensor, views: StructuredViews) -> str | None:
    """A sentence where the views are larger than the images [n, C, H, W]."""
    h, w = images.shape[-2:]
    try:
        tall, wide = views.independent(scaled(images[:1]), seed=(0, 0, 0)).views.shape[-2:]
    except (RuntimeError, ValueError, TypeError, AssertionError):  # as measuring says, where it cannot be drawn
        return None
    if tall <= h and wide <= w:
        return None
    return (
        f"The images ({h} x {w} pixels) are smaller than the views ({tall} x {wide}) and are enlarged. Give the size "
        f"on which the backbone was trained; that of a preset is size={min(h, w)} for the images' own."
    )


def prepared_for(
    backbone: nn.Module,
    images: Images,
    views: StructuredViews,
    layers: Sequence[str] | None,
    normalize: Normalize,
    pool: Pool,
    output: str | int | None,
    batch_size: int,
    seed: int,
    fresh: Fresh | None = None,
) -> tuple[Layers, list[Tensor], list[str]]:
    """The model whose rows are measured, the images as it takes them, and notes."""
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone: expected an nn.Module: got {type(backbone).__name__}")
    notes: list[str] = []
    if isinstance(backbone, StyleHeads):
        net, pooling = backbone.backbone, backbone._pooling
    else:
        made = prepared(backbone, None, _checks.choice(pool, ("auto", "mean", "cls", "flatten"), "pool"), 3, output)
        net, pooling = made.module, made.pooling(pool)
        notes += made.changes
        notes += [PROJECTED.format(name) for name, _ in net.named_children() if name in PROJECTORS]
    scale = _normalization(net, views) if normalize == "auto" else normalize
    with generators_kept():
        each = list(batches(images, batch_size))
    bare = Layers(net, pooling, {}, scale)
    device = next((t.device for t in (*net.parameters(), *net.buffers())), torch.device("cpu"))
    some, changed = for_model(each[0][:2], bare)
    is_gray = bool(changed) and some.shape[1] == 1
    if changed:
        notes.append(changed)
        bare.is_gray = is_gray  # after the views, which may need colors
        each = [for_model(x, bare)[0] for x in each]
    some = scaled(each[0]).to(device)
    try:
        with evaluation(net), torch.no_grad():
            bare(some[:2])
            chosen = named_layers(net, layers) if layers is not None else {}
            if layers is None:
                chosen = stages(net, bare.normalized(some[:2]), net)
            seen = torch.cat([scaled(x).to(device) for x in _first(each, CALIBRATION)])
            copies = untrained_copies(net, bare.normalized(seen), seed, fresh or _of_timm(net))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, IndexError) as error:
        raise ValueError(
            "images: expected images that the backbone takes, of the size and the number of channels that it was "
            f"trained on: got {_checks.shape(each[0])} ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from error
    return Layers(net, pooling, chosen, scale, copies, is_gray), each, notes


def _first(each: Sequence[Tensor], count: int) -> list[Tensor]:
    """As many batches as hold so many images."""
    out: list[Tensor] = []
    for x in each:
        if sum(len(t) for t in out) >= count:
            break
        out.append(x)
    return out


def _of_timm(net: nn.Module) -> Fresh | None:
    """What builds a model of timm anew, by its own name there."""
    model = net.model if isinstance(net, TimmFeatures) else None
    config: Any = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    return partial(build_backbone, f"timm:{name}") if name else None


def _normalization(net: nn.Module, views: StructuredViews) -> tuple[Sequence[float], Sequence[float]] | None:
    """What a backbone's images are normalized with: timm's own numbers, else ImageNet's."""
    if any(type(m).__name__ == "Normalize" for m in views.modules()):
        return None
    model = net.model if isinstance(net, TimmFeatures) else None
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    if isinstance(config, Mapping) and config.get("mean") and config.get("std"):
        return tuple(config["mean"]), tuple(config["std"])
    return MEAN, STD


class OneGroup(nn.Module):
    """Views of which the second differs from the first in one group of augmentations alone."""

    def __init__(self, views: StructuredViews, group: str) -> None:
        super().__init__()
        self.views, self.group = views, group
        self.plan = ViewPlan.shared_query(("content", group))

    def independent(self, images: Tensor, *, seed: tuple[int, ...]) -> ViewBatch:
        """Two views of each image."""
        drawn = self.views.independent(images, seed=seed)
        first, other = drawn.parameters
        second = ViewParameters({**first, self.group: other[self.group]})
        pair = [drawn.views[0], self.views.replay(images, second)]
        return ViewBatch(torch.stack(pair), drawn.plan, parameters=[first, second])


class _Counting(nn.Module):
    """The model, which says how many views it has seen."""

    def __init__(self, model: Layers, total: int, say: Say) -> None:
        super().__init__()
        self.model, self.total, self.say = model, total, say
        self.seen = self.said = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out: dict[str, Tensor] = self.model(x)
        self.seen += len(x)
        if self.seen - self.said >= self.total / 10 or self.seen == self.total:
            self.said = self.seen
            self.say(f"{self.seen}/{self.total} views")
        return out


def _table(
    model: Layers,
    views: StructuredViews,
    each: list[Tensor],
    draws: int | None,
    bootstrap: int,
    seed: int,
    say: Say | None,
) -> ScoreTable:
    """One table of all groups, each measured on pairs of its own."""
    n, groups = sum(len(x) for x in each), views.plan.spaces[1:]
    if n < LEAST:
        raise ValueError(
            f"images: expected at least {LEAST}, as a probe is fitted on 70 % of them and scored on the others, 5 or "
            f"more: got {n}"
        )
    if not groups:
        raise ValueError("groups: expected groups of augmentations, whose parameters are predicted: got none")
    if draws is not None:
        at_least("draws", draws, 1)
    draws = draws or max(1, round(PAIRS / max(n, 1)))
    counting = model if say is None else _Counting(model, 2 * n * draws * len(groups), say)
    options: dict[str, Any] = {"probe": PROBE, "draws": draws, "on_sphere": False, "bootstrap": bootstrap, "seed": seed}
    tables = [parameter_matrix(counting, OneGroup(views, g), each, **options) for g in groups]
    parts = [t.parts for t in tables if t.parts is not None]
    whole = _beside(tables)
    return over_copies(replace(whole, parts=_beside(parts) if parts else None))


def _beside(tables: Sequence[ScoreTable]) -> ScoreTable:
    """Tables of the same rows as one."""
    return replace(
        tables[0],
        factors=tuple(f for t in tables for f in t.factors),
        scores={cell: v for t in tables for cell, v in t.scores.items()},
        intervals={cell: v for t in tables for cell, v in t.intervals.items()},
        notes={cell: v for t in tables for cell, v in t.notes.items()},
        parts=None,
    )
