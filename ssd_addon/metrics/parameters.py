"""Without labels: which space knows how two views of an image were drawn.

The parameters of the augmentations are ground truth for style. Two views of every image are drawn that share nothing;
from their embeddings in one space a probe predicts, for each group, by how much its parameters differ. A style space
should know its own group and no other, the content space none.
Legend: n images, d the width of a space, R draws per image, P = R * n pairs.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ssd_addon.batch import ViewBatch
from ssd_addon.metrics.embed import Images, Model, batches, evaluation, joined, spaces_of
from ssd_addon.metrics.matrix import (
    MIN_ROWS,
    check_fraction,
    check_options,
    check_spaces,
    resamples,
    score_cells,
    split_rows,
)
from ssd_addon.metrics.probes import Target
from ssd_addon.metrics.table import ScoreTable

PAIRS = 2000  # unless told otherwise
LARGEST = 16  # numbers per image; a larger parameter is a field of noise
PERIODS = {"hue_factor": 1.0, "angle": 360.0, "degrees": 360.0, "times": 4.0}
THEN = "then"  # drawn anew for every view, for no group
SIDE = ("order", "forward_input_shape", "input_size", "output_size", "padding_size")  # not drawn, or no number
Drawn = tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]  # of view a and view b, batch after batch


class Views(Protocol):
    """What is asked of `views`: `StructuredViews` has it."""

    @property
    def plan(self) -> Any: ...
    def independent(self, images: Tensor, *, seed: tuple[int, ...]) -> ViewBatch: ...


def parameter_matrix(
    model: Model,
    views: Views,
    images: Images,
    *,
    probe: str = "kernel",
    draws: int | None = None,
    batch_size: int = 256,
    backbone: bool = False,
    unit: bool = False,
    train_fraction: float = 0.5,
    folds: int = 5,
    bootstrap: int = 200,
    kernel_rows: int = 5000,
    seed: int = 0,
) -> ScoreTable:
    """How well each space predicts the difference of each group's parameters between two views; needs no labels.

    For every image two views a, b are drawn with the query's operations, sharing nothing. The probe sees
    [z_b - z_a, z_a + z_b] and predicts theta_b - theta_a on images that it was not fitted on. An angle or a hue whose
    draws span more than half of its circle is scored as (cos, sin) of the difference. An operation with p < 1 also has
    the parameter batch_prob (it fired or not); where it did not fire, its other parameters count as their mean over
    the pairs where it did. A crop's corners (src) count as centre and size, in shares of the image.

    Args:
        model: `StyleHeads`, or any callable [b, C, H, W] -> space -> [b, d]; see `embed`.
        views: the `StructuredViews` that the model was trained with; its own draws are left as they were.
        images: [n, C, H, W], uint8 or in [0, 1], or batches of them (a data loader); n >= 10.
        probe: "ridge", "kernel" or "mlp", as in `r2_matrix`.
        draws: pairs per image; None makes about 2,000 pairs in all. Pairs of an image stay on one side of the split.
        batch_size: images at a time, where `images` is one tensor. Views are drawn per batch, so another size
            means other draws.
        backbone: add a row for the pooled features of a `StyleHeads`.
        unit: scale rows to unit length, as the SimCLR family's loss sees them; see `embed`.
        train_fraction, folds, bootstrap, kernel_rows: as in `r2_matrix`; resamples are of images.
        seed: of the views, the split, the resamples and the MLP.

    Returns:
        `ScoreTable`, spaces x groups; `table.parts` has the parameters of each group: spaces x
        "color/0.ColorJitter/hue_factor". A group's score is the mean of its parameters'. NaN and a note where a group
        draws nothing that varies; fields of noise and parameters of varying size are left out, and named in a note.

    Raises:
        ValueError, TypeError: fewer than 10 images; views without groups; a model that returns something else; and
            what `r2_matrix` refuses.

    Source: docs/method.md; the prediction of parameter differences is that of Lee et al. 2021 (AugSelf),
    arXiv 2111.09613, used here as a probe.
    """
    check_options(probe, folds, bootstrap, kernel_rows)
    if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 1):
        raise ValueError(f"draws: expected a whole number of pairs per image, 1 or more: got {draws!r}")
    groups = tuple(views.plan.spaces[1:])
    if not groups:
        raise ValueError(
            "views: expected groups of augmentations, whose parameters are predicted: got views without groups; give "
            "a StructuredViews with groups, also for a model that was trained without style spaces"
        )
    each = list(batches(images, batch_size))
    n = sum(len(x) for x in each)
    if n < 2 * MIN_ROWS:
        raise ValueError(
            f"images: expected at least {2 * MIN_ROWS}, as pairs of an image must lie on one side of the split: got {n}"
        )
    check_fraction(n, train_fraction, "images")
    draws = draws or math.ceil(PAIRS / n)
    za, zb, drawn = _pairs(model, views, each, draws, backbone, unit, seed)
    _, device = check_spaces({**za, **{f"{s} of the second view": z for s, z in zb.items()}})

    generator = torch.Generator("cpu").manual_seed(seed)
    train_images, test_images = split_rows(n, train_fraction, generator, device)
    every = torch.arange(draws, device=device)[:, None] * n
    train, test = (every + train_images).flatten(), (every + test_images).flatten()
    units = torch.arange(len(train_images), device=device).repeat(draws)
    if probe == "kernel":
        train, units = train[:kernel_rows], units[:kernel_rows]
    weights = resamples(len(test_images), bootstrap, generator, device).repeat(1, draws)

    parts: dict[str, Target | str] = {}
    members: dict[str, list[str]] = {}
    empty: dict[str, Target | str] = {}  # groups without a parameter to predict, and why
    skipped: dict[str, list[str]] = {}
    for group in groups:
        found = _differences(group, drawn, skipped.setdefault(group, []))
        made = {name: _target(value.to(device), train, test) for name, value in found.items()}
        kept = {name: target for name, target in made.items() if target is not None}
        if kept:
            parts |= kept
            members[group] = list(kept)
        else:
            empty[group] = "no parameter of this group varies between views"
            if skipped[group]:
                empty[group] = f"left out: {', '.join(skipped[group])}; nothing else in this group varies"
    inputs = {s: [zb[s] - za[s], za[s] + zb[s]] for s in za}
    scores, intervals, notes = score_cells(
        inputs,
        parts | empty,
        train,
        test,
        weights,
        probe=probe,
        folds=folds,
        seed=seed,
        without={},
        units=units,
        means=members,
    )
    notes |= {(s, g): f"left out: {', '.join(skipped[g])}" for g in members if skipped[g] for s in za}
    finer = [p for g in members for p in members[g]]
    table = ScoreTable(
        tuple(za), (*groups, *finer), scores, intervals, notes, probe, (), len(train), len(test), "pairs of views"
    )
    return replace(table.only(factors=groups), parts=table.only(factors=finer) if finer else None)


def parameter_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Tensor]:
    """By how much two views of the same images differ: what `parameter_matrix` has its probes predict.

    For losses and probes of your own, such as one that has the backbone predict the differences (AugSelf).

    >>> a = {"color": {"0.ColorJitter": {"brightness_factor": torch.tensor([0.5, 1.0])}}}
    >>> b = {"color": {"0.ColorJitter": {"brightness_factor": torch.tensor([1.5, 1.25])}}}
    >>> parameter_differences(a, b)
    {'color/0.ColorJitter/brightness_factor': tensor([[1.0000],
            [0.2500]])}

    Args:
        a, b: how two views were drawn, such as `batch.parameters[0]` and `batch.parameters[1]`.

    Returns:
        "group/operation/parameter" -> theta_b - theta_a [B, k] float32 on its device, in the units of the parameter. An
        angle or a hue is (cos, sin) of the difference, whatever its range, so that k is the same for every batch;
        "batch_prob" is +-1 where the operation fired in one view alone, and where it did not fire in a view its other
        parameters count as their mean over both views where it did. A crop's corners are centre and size, in shares of
        the image. Fields of noise are left out, and so is what was drawn for no group ("then").

    Raises:
        ValueError: views with different groups or operations.
    """
    for what, x, y in [("groups", a, b), *((f"operations of {g!r}", a[g], b[g]) for g in a if g in b)]:
        if x.keys() != y.keys():
            raise ValueError(f"expected two views with the same {what}: got {list(x)} and {list(y)}")
    out: dict[str, Tensor] = {}
    for group in a:
        if group != THEN:
            out |= _differences(group, ([a], [b]), [], in_training=True)
    return out


def _pairs(
    model: Model, views: Views, each: list[Tensor], draws: int, backbone: bool, unit: bool, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Drawn]:
    """Embeddings of both views of P pairs, draw after draw: space -> [P, d]; and how each batch of them was drawn."""
    a: list[dict[str, Tensor]] = []
    b: list[dict[str, Tensor]] = []
    drawn: Drawn = ([], [])
    with evaluation(model), torch.no_grad():
        for draw in range(draws):
            for i, x in enumerate(each):
                pair = views.independent(x, seed=(seed, draw, i))
                z = spaces_of(model, pair.views.flatten(0, 1), backbone=backbone, unit=unit)
                a.append({s: t[: len(x)] for s, t in z.items()})
                b.append({s: t[len(x) :] for s, t in z.items()})
                for view in range(2):
                    drawn[view].append(pair.parameters[view])
    return joined(a), joined(b), drawn


def _differences(group: str, drawn: Drawn, skipped: list[str], *, in_training: bool = False) -> dict[str, Tensor]:
    """Name -> theta_b - theta_a [P, k] of every parameter that the group draws.

    In training: nothing leaves the device or waits for it, float32, and any angle is (cos, sin).
    """
    out: dict[str, Tensor] = {}
    for op, parameters in drawn[0][0][group].items():
        stacked = partial(_stacked, drawn, group, op, in_training)
        gates = None
        if "batch_prob" in parameters:
            gates = [stacked("batch_prob", v) > 0.5 for v in range(2)]
            out[f"{group}/{op}/batch_prob"] = stacked("batch_prob", 1).round() - stacked("batch_prob", 0).round()
        for name in parameters:
            path = f"{group}/{op}/{name}"
            if name in SIDE or name == "batch_prob" or (name == "dst" and "output_size" in parameters):
                continue
            sizes = {p[group][op][name].shape[1:] for view in drawn for p in view}
            if len(sizes) > 1 or next(iter(sizes)).numel() > LARGEST:
                skipped.append(f"{path}, {'of varying size' if len(sizes) > 1 else 'a field of noise'}")
                continue
            x = [stacked(name, v) for v in range(2)]
            if name == "src" and "input_size" in parameters:
                x = [_box(corners, stacked("input_size", v)) for v, corners in enumerate(x)]
            if gates is not None:
                fired, count = torch.cat(gates), sum(g.sum() for g in gates)
                middle = torch.where(fired, torch.cat(x), 0).sum(0) / torch.as_tensor(count).clamp(min=1)
                x = [torch.where(g, t, middle) for t, g in zip(x, gates, strict=True)]
            difference = x[1] - x[0]
            period = PERIODS.get(name)
            both = torch.cat(x)
            if period is not None and (in_training or float(both.max() - both.min()) > period / 2):
                phase = 2 * math.pi / period * difference
                difference = torch.cat([phase.cos(), phase.sin()], 1)
            out[path] = difference
    return out


def _stacked(drawn: Drawn, group: str, op: str, in_training: bool, name: str, view: int) -> Tensor:
    """One parameter of all pairs: [P, k]; float64 on the CPU, or in training float32 where it is."""
    values = [p[group][op][name].detach() for p in drawn[view]]
    values = [v.float() for v in values] if in_training else [v.cpu().double() for v in values]
    return torch.cat([v.flatten(1) if v.ndim > 1 else v[:, None] for v in values])


def _box(corners: Tensor, size: Tensor) -> Tensor:
    """Corners [P, 8] in pixels (x, y) and the image's (height, width) [P, 2] to centre and size [P, 4], in shares."""
    xy = corners.view(-1, 4, 2)
    low, high = xy.amin(1), xy.amax(1)
    return torch.cat([(low + high) / 2, high - low], 1) / size.flip(1).repeat(1, 2)


def _target(value: Tensor, train: Tensor, test: Tensor) -> Target | None:
    """A difference to be predicted, standardised; None where nothing of it varies on both sides of the split."""
    spread = torch.stack([value[r].amax(0) - value[r].amin(0) for r in (train, test)]).amin(0)
    value = value[:, spread > 1e-6 * value.abs().amax(0)]
    if not value.shape[1]:
        return None
    standard = (value - value[train].mean(0)) / value[train].std(0)
    return Target(standard, torch.ones(len(value), dtype=torch.bool, device=value.device))
