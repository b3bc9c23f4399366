"""Tests whether a group overwrites its attribute or changes it relative to the image, which decides its keys.

After a blur, the sharpness of a sharp photograph depends only on the drawn parameter: the group *overwrites* the
attribute. Two images with the same draw agree in it, so the key may be made from another image. A hue shift *changes*
the hue that the image has, and a key from another image would not agree with its query. The test measures whether the
drawn parameter can be predicted from the view alone.
Legend: n images, P views, K draws of an image, k numbers of a parameter, R resamples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.augment.views import StructuredViews
from ssd_addon.batch import ViewBatch
from ssd_addon.differences import group_values
from ssd_addon.metrics.embed import Images, batches
from ssd_addon.metrics.evaluation import generators_kept
from ssd_addon.metrics.probe import Probe, Split, at_least
from ssd_addon.metrics.probes import BANDWIDTHS, KERNEL_ALPHAS, Inputs, Problem, Target, dual
from ssd_addon.metrics.spaces import standardized
from ssd_addon.metrics.statistics import image_statistics

HALF = 0.5
"""A parameter is overwritten if R^2 from the view alone exceeds this, and changed if it is below this share of R^2
with other views of the image."""
VISIBLE = 0.2
"""R^2 with other views of the image below which a parameter counts as invisible."""
REPEATED = 32
"""Number of images that are augmented many times."""
LEAST = 40
"""Smallest number of images for the test."""
OVERWRITES, CHANGES, MIXED, UNKNOWN = "overwrites", "changes", "in part", "cannot tell"
BLOCK = 2**22
"""Pixel values that are augmented at a time."""


@dataclass(frozen=True)
class Part:
    """The test result for one parameter of a group.

    Attributes:
        group, parameter: such as "color" and "0.ColorJitter/hue_factor".
        verdict: "overwrites", "changes" or "cannot tell".
        alone: R^2 of the parameter, predicted from one view of a held-out image.
        beside: R^2 of the parameter, predicted by a probe that was fitted on other views of the same image.
        alone_interval, beside_interval: 95 % intervals over images.
    """

    group: str
    parameter: str
    verdict: str
    alone: float
    beside: float
    alone_interval: tuple[float, float]
    beside_interval: tuple[float, float]


@dataclass(frozen=True)
class Overwrites:
    """The result of `overwrites`; print it for a table.

    Attributes:
        groups: group -> "overwrites", "changes", "in part" (only some of its parameters overwrite) or "cannot tell".
        parts: results for every parameter.
        notes: group -> parameters that were left out, or why there is no result.
        images: n, the number of images.
    """

    groups: dict[str, str]
    parts: tuple[Part, ...]
    notes: dict[str, str]
    images: int

    @property
    def sets(self) -> tuple[str, ...]:
        """The groups that overwrite their attribute, for `recipe(sets=...)`."""
        return tuple(group for group, verdict in self.groups.items() if verdict == OVERWRITES)

    def to_json(self) -> dict[str, Any]:
        """The result as dictionaries, lists, strings and numbers."""
        return asdict(self) | {"parts": [asdict(part) for part in self.parts], "sets": list(self.sets)}

    def __str__(self) -> str:
        def score(value: float, interval: tuple[float, float]) -> str:
            return "{:.2f} ({:.2f} to {:.2f})".format(*(v + 0.0 for v in (value, *interval)))

        rows = [("group", "parameter", "view alone", "beside the original", "result")]
        for group, verdict in self.groups.items():
            own = [part for part in self.parts if part.group == group]
            if len(own) != 1:
                rows.append((group, "", "", "", verdict))
            for part in own:
                scores = score(part.alone, part.alone_interval), score(part.beside, part.beside_interval)
                rows.append(("" if len(own) > 1 else group, part.parameter, *scores, part.verdict))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(f"R^2 of what was drawn, with 95 % intervals, {self.images} images")
        return "\n".join([*lines, *(f"{group}: {note}" for group, note in self.notes.items())])


def overwrites(
    groups: Mapping[str, Sequence[Any]],
    images: Images,
    *,
    samples: int = 500,
    draws: int = 48,
    bootstrap: int = 200,
    seed: int = 0,
) -> Overwrites:
    """Test on your own images whether each group overwrites its attribute or changes it relative to the image.

    Every group is applied by itself. If it overwrites its attribute, the drawn parameter (sigma of a blur) can be
    predicted from the view of any image; if it changes it (hue, rotation), only by comparison with the
    original. Two scores are computed:
    *alone*: R^2 of the parameter from statistics of one view by kernel ridge regression, on held-out images;
    *beside*: R^2 of the parameter from the same statistics by a probe that is fitted on other views of the image.
    A parameter is overwritten if the interval of `alone` lies above 0.5, and changed if `alone` lies below half of
    `beside`, which must itself lie above 0.2; otherwise the test is inconclusive ("cannot tell"). A group "overwrites"
    if all its parameters are overwritten, and does so "in part" if some are overwritten and others changed.

    The statistics (colors, gradients, layout; `metrics.statistics`) need no training. The test is limited to what they
    capture: a large network may predict more from a view (such as the rotation of an upright photograph), and keys from
    other images may then work for such a group too.

    >>> import kornia.augmentation as K
    >>> gray = torch.rand(80, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(80, 3, 12, 12)
    >>> found = overwrites({"hue": [K.ColorJitter(hue=0.5, p=1.0)]}, gray, draws=16)
    >>> found.groups, found.sets
    ({'hue': 'changes'}, ())

    Args:
        groups: name -> operations, as for `StructuredViews`; for a preset, `presets("color_spatial")["groups"]`.
        images: [n, C, H, W], uint8 or in [0, 1], not normalized, of the size that the groups get in training; or
            batches of them (from a data loader that shuffles: the first `samples` images are used). n >= 40.
        samples: largest number of images; from a tensor they are chosen at random.
        draws: draws for each of 32 images, for `beside`. Groups that draw several numbers at once need more.
        bootstrap: number of resamples of the images, 2 or more.
        seed: seed of the choice of images, the draws, the split and the resamples.

    Raises:
        ValueError, TypeError: there are fewer than 40 images or no group; `StructuredViews` refuses groups or images,
            such as a group that draws nothing.

    Source: docs/choose-your-groups.md, section 2, with results for groups that were trained with both kinds of keys.
    """
    _checks.count(samples, "samples", LEAST)
    _checks.count(draws, "draws", 8)
    at_least("bootstrap", bootstrap, 2)
    if not isinstance(groups, Mapping):
        hint = '; for a preset, pass presets("color_spatial")["groups"]' if isinstance(groups, str) else ""
        raise TypeError(f"groups: expected a mapping name -> operations: got {type(groups).__name__}{hint}")
    if not groups:
        raise ValueError("groups: expected at least one group to test: got none")
    made = {name: StructuredViews({name: operations}, seed=seed) for name, operations in groups.items()}
    x = _taken(images, samples, seed)
    parts: list[Part] = []
    verdicts: dict[str, str] = {}
    notes: dict[str, str] = {}
    for name, views in made.items():
        skipped: list[str] = []
        own = _parts(name, views, x, draws, bootstrap, seed, skipped)
        left_out = f"left out: {', '.join(dict.fromkeys(skipped))}" if skipped else ""
        if not own:
            left_out = (left_out + "; " if left_out else "") + "no parameter of this group varies"
        elif any(p.verdict == UNKNOWN and p.beside_interval[0] <= VISIBLE and p.alone <= VISIBLE for p in own):
            left_out += ("; " if left_out else "") + "what was drawn can hardly be seen, even beside the original"
        if left_out:
            notes[name] = left_out
        parts += own
        verdicts[name] = _verdict([p.verdict for p in own], complete=not skipped)
    return Overwrites(verdicts, tuple(parts), notes, len(x))


def _verdict(parts: Sequence[str], complete: bool) -> str:
    """The verdict on a group from those on its parameters; it is never "overwrites" if some could not be tested."""
    if {OVERWRITES, CHANGES} <= set(parts):
        return MIXED
    if parts and len(set(parts)) == 1 and (complete or parts[0] != OVERWRITES):
        return parts[0]
    return UNKNOWN


def _taken(images: Images, samples: int, seed: int) -> Tensor:
    """At most `samples` images [n, C, H, W]: a random choice from a tensor, the first ones from batches."""
    if isinstance(images, Tensor):
        count = len(images) if images.ndim else 0
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
        x = images[order.to(images.device)] if count else images
    else:
        each: list[Tensor] = []
        with generators_kept():  # a loader that shuffles draws from the global generator
            for batch in batches(images, 1):
                each.append(batch)
                if sum(map(len, each)) >= samples:
                    break
        if len({t.shape[1:] for t in each}) > 1:
            got = _checks.names(sorted({_checks.shape(t[0]) for t in each}))
            raise ValueError(f"images: expected batches of images of one size: got {got}")
        x = torch.cat(each)[:samples] if each else torch.zeros(0)
    if x.ndim == 0 or len(x) < LEAST:
        raise ValueError(f"images: expected at least {LEAST}, for the intervals: got {_checks.shape(x)}")
    return x


def _parts(
    name: str, views: StructuredViews, x: Tensor, draws: int, bootstrap: int, seed: int, skipped: list[str]
) -> list[Part]:
    """Test every parameter of one group."""
    generator = torch.Generator().manual_seed(seed)
    # alone: two draws of every image, half of the images held out
    statistics, theta = _drawn(name, views, x, 2, (seed, 0), skipped)
    split = Split.draw(len(x), Probe("kernel"), bootstrap, seed, torch.device("cpu"), repeats=2)
    targets = {path: _target(value, split) for path, value in theta.items()}
    varying = {path: target for path, target in targets.items() if target is not None}
    if not varying:
        return []
    errors = _alone(statistics, list(varying.values()), split, seed)
    held_out = len(split.test) // 2  # number of images; samples of the second draw follow those of the first
    once = split.weights[:, :held_out].double()
    # beside: many draws for few images
    few = x[:REPEATED]
    again, repeated = _drawn(name, views, few, draws, (seed, 1), [], like=theta)
    z = standardized(torch.cat([s - s.mean(0) for s in again.values()], 1), torch.arange(len(few) * draws))
    z = z.nan_to_num().view(draws, len(few), -1).transpose(0, 1)
    resamples = torch.randint(len(few), (bootstrap, len(few)), generator=generator)
    weights = torch.zeros(bootstrap, len(few), dtype=torch.double).scatter_add_(
        1, resamples, torch.ones(bootstrap, len(few), dtype=torch.double)
    )
    out = []
    for (path, target), error in zip(varying.items(), errors, strict=True):
        y = target.values[split.test]
        rows = [t.view(2, held_out, -1).transpose(0, 1) for t in (error, y)]
        alone, alone_again = _scores(rows[0], rows[1], once)
        t = repeated[path][:, _varies(theta[path])]
        t = standardized(t, torch.arange(len(t))).nan_to_num().view(draws, len(few), -1).transpose(0, 1)
        beside, beside_again = _scores(_beside(z, t), t, weights)
        lower = alone_again - HALF * beside_again
        interval, other = _interval(alone_again), _interval(beside_again)
        verdict = UNKNOWN
        if interval[0] > HALF:
            verdict = OVERWRITES
        elif _interval(lower)[1] < 0 and other[0] > VISIBLE:
            verdict = CHANGES
        out.append(Part(name, path.removeprefix(f"{name}/"), verdict, alone, beside, interval, other))
    return out


def _drawn(
    name: str,
    views: StructuredViews,
    x: Tensor,
    draws: int,
    seed: tuple[int, ...],
    skipped: list[str],
    like: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics and parameters of views of images [n, ...]: [draws * n, d], draw after draw, on the CPU."""
    statistics: list[dict[str, Tensor]] = []
    drawn: list[Any] = []
    larger = max(x[0].numel(), views.independent(x[:1])[0].numel())  # a crop may enlarge
    step = max(1, BLOCK // larger)
    for i in range(math.ceil(draws / 2)):
        pairs: list[ViewBatch] = []
        for part in torch.split(x, step):
            pairs.append(views.independent(part, seed=(*seed, i, len(pairs))))
        for view in range(min(2, draws - 2 * i)):
            for pair in pairs:
                found = image_statistics(pair[view])
                statistics.append({kind: s.cpu().double() for kind, s in found.items()})
                drawn.append(pair.parameters[view])
    joined = {kind: torch.cat([s[kind] for s in statistics]) for kind in statistics[0]}
    if not all(bool(s.isfinite().all()) for s in joined.values()):
        raise ValueError(f"group {name!r}: expected views of finite values: got NaN or inf from its operations")
    return joined, group_values(name, drawn, skipped, like)


def _varies(values: Tensor) -> Tensor:
    """Mask [k] of the columns of [P, k] that are not constant."""
    return values.amax(0) - values.amin(0) > 1e-6 * values.abs().amax(0)


def _target(values: Tensor, split: Split) -> Target | None:
    """A standardized parameter as the target of a probe; None if it does not vary on both sides of the split."""
    keep = _varies(values)
    y = values[:, keep]
    if not keep.any() or not all(bool(_varies(y[rows]).all()) for rows in (split.train, split.test)):
        return None
    return Target(standardized(y, split.train), torch.ones(len(y), dtype=torch.bool))


def _alone(statistics: Mapping[str, Tensor], targets: Sequence[Target], split: Split, seed: int) -> list[Tensor]:
    """Squared errors [held-out views, k] of every target, by kernel ridge regression on one kind of statistics or all.

    Kind, bandwidth and penalty are chosen for each target by cross-validation over training images.
    """
    least = torch.full((len(targets),), math.inf, dtype=torch.double)
    out: list[Tensor] = [torch.zeros(0)] * len(targets)
    for blocks in ([*statistics.values()], *([s] for s in statistics.values())):
        inputs = Inputs(blocks, split.train, balance=True)
        problem = Problem(inputs, split.train, targets, 5, seed, split.units)
        train, test = inputs(split.train), inputs(split.test)
        distances, further = torch.cdist(train, train) ** 2, torch.cdist(test, train) ** 2
        near = distances[distances > 1e-12]
        median = float(near.median().sqrt()) if len(near) else 1.0
        for h in (median * m for m in BANDWIDTHS):
            a, b, _, error = dual(problem, torch.exp(distances / (-2 * h**2)), [v * len(train) for v in KERNEL_ALPHAS])
            predicted = torch.split(torch.exp(further / (-2 * h**2)) @ a + b, problem.widths, 1)
            for i in torch.nonzero(error < least).flatten().tolist():
                out[i] = targets[i].error(predicted[i], split.test)
            least = torch.minimum(least, error)
    return out


def _beside(z: Tensor, theta: Tensor) -> Tensor:
    """Squared errors [n, K, k] when every view's parameter is predicted from the other views of its image.

    Leave-one-out kernel ridge regression within each image: residuals y_i - yhat_i = (A y)_i / A_ii with A the inverse
    of kernel + penalty + intercept. Bandwidth and penalty are chosen on every second image and used for the others.

    Args:
        z: statistics [n, K, d].
        theta: [n, K, k].
    """
    draws = z.shape[1]
    distances = torch.cdist(z, z) ** 2
    other = distances[:, ~torch.eye(draws, dtype=torch.bool)].median(1).values.clamp(min=1e-9)[:, None, None]
    found = []
    for h in (0.3, 0.5, 1.0, 2.0):
        kernel = torch.exp(distances / (-2 * h**2 * other)) + 1.0
        for penalty in (1e-3, 1e-2, 1e-1, 1.0):
            inverse = torch.linalg.inv(kernel + penalty * torch.eye(draws, dtype=z.dtype))
            found.append(((inverse @ theta) / inverse.diagonal(dim1=1, dim2=2)[..., None]) ** 2)
    errors = torch.stack(found)
    out = torch.empty_like(theta)
    for side in range(2):
        out[side::2] = errors[errors[:, 1 - side :: 2].mean((1, 2, 3)).argmin(), side::2]
    return out


def _scores(errors: Tensor, y: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """R^2, averaged over columns, on all images and on every resample [R].

    Args:
        errors, y: [n, views of an image, k].
        weights: [R, n], how often each image occurs in each resample.
    """
    of: Callable[[Tensor], Tensor] = lambda t: torch.cat([t.sum(1).sum(0)[None], weights @ t.sum(1)])  # noqa: E731
    count = torch.cat([weights.new_tensor([len(y)]), weights.sum(1)])[:, None] * y.shape[1]
    total = (of(y**2) - of(y) ** 2 / count).clamp(min=1e-12)
    scores = (1 - of(errors) / total).mean(1)
    return float(scores[0]), scores[1:]


def _interval(values: Tensor) -> tuple[float, float]:
    low, high = values.quantile(values.new_tensor([0.025, 0.975])).tolist()
    return low, high
