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
from ssd_addon.metrics.embed import Images, Model, batches, evaluation, spaces_of
from ssd_addon.metrics.matrix import MIN_ROWS, check_options, check_spaces, resamples, score_cells, split_rows
from ssd_addon.metrics.probes import Target
from ssd_addon.metrics.table import ScoreTable

PAIRS = 2000  # unless told otherwise
LARGEST = 16  # numbers per image; a larger parameter is a field of noise
PERIODS = {"hue_factor": 1.0, "angle": 360.0, "degrees": 360.0}
SIDE = ("order", "forward_input_shape", "input_size", "output_size", "padding_size", "dst")  # not drawn, or no number
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
    [z_b - z_a, z_a + z_b] and predicts theta_b - theta_a on images that it was not fitted on. An angle or a hue that is
    drawn from more than half of its circle is scored as (cos, sin) of the difference. An operation with p < 1
    also has the parameter batch_prob (it fired or not); where it did not fire, its other parameters count as their
    mean. A crop's corners (src) count as centre and size, in shares of the image.

    Args:
        model: `StyleHeads`, or any callable [b, C, H, W] -> space -> [b, d]; see `embed`.
        views: the `StructuredViews` that the model was trained with; its own draws are left as they were.
        images: [n, C, H, W], uint8 or in [0, 1], or batches of them (a data loader); n >= 10.
        probe: "ridge", "kernel" or "mlp", as in `r2_matrix`.
        draws: pairs per image; None makes about 2,000 pairs in all. Pairs of an image stay on one side of the split.
        batch_size: images at a time, where `images` is one tensor.
        backbone: add a row for the pooled features of a `StyleHeads`.
        unit: scale rows to unit length, as the SimCLR family's loss sees them; see `embed`.
        train_fraction, folds, bootstrap, kernel_rows: as in `r2_matrix`; resamples are of images.
        seed: of the views, the split, the resamples and the MLP.

    Returns:
        `ScoreTable`, spaces x groups; `table.parts` has the parameters of each group: spaces x
        "color/0.ColorJitter/hue_factor". A group's score is the mean of its parameters', each counted once. NaN and a
        note where a group draws nothing that varies.

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
    draws = draws or math.ceil(PAIRS / n)
    za, zb, drawn = _pairs(model, views, each, draws, backbone, unit, seed)
    _, device = check_spaces({f"{s}": z for s, z in za.items()}, train_fraction)

    generator = torch.Generator("cpu").manual_seed(seed)
    train_images, test_images = split_rows(n, train_fraction, generator, device)
    if draws > 1 and len(train_images) >= folds:  # row % folds is then the same for all pairs of an image
        extra = len(train_images) % folds
        test_images = torch.cat([test_images, train_images[len(train_images) - extra :]])
        train_images = train_images[: len(train_images) - extra]
    train, test = ((torch.arange(draws, device=device)[:, None] * n + i).flatten() for i in (train_images, test_images))
    if probe == "kernel":
        train = train[:kernel_rows]
    weights = resamples(len(test_images), bootstrap, generator, device).repeat(1, draws)

    targets: dict[str, Target | str] = {}
    members: dict[str, list[str]] = {g: [] for g in groups}
    for group in groups:
        columns: list[Tensor] = []
        skipped: list[str] = []
        for name, value in _differences(group, drawn, skipped).items():
            made = _target(value.to(device), train)
            if made is not None:
                members[group].append(name)
                targets[name] = made
                columns.append(made.values)
        if columns:
            shares = [torch.full((c.shape[1],), 1 / (len(columns) * c.shape[1]), device=device) for c in columns]
            note = f"left out: {', '.join(skipped)}, fields of noise" if skipped else ""
            valid = torch.ones(draws * n, dtype=torch.bool, device=device)
            joint = torch.cat(columns, 1), valid
            targets[group] = Target(*joint, note=note, shares=torch.cat(shares).double())
        else:
            targets[group] = "no parameter of this group varies between views"
    inputs = {s: [zb[s] - za[s], za[s] + zb[s]] for s in za}
    scores, intervals, notes = score_cells(
        inputs, targets, train, test, weights, probe=probe, folds=folds, seed=seed, without={}
    )
    spaces = tuple(za)
    whole = ScoreTable(
        spaces,
        (*groups, *(p for g in groups for p in members[g])),
        scores,
        intervals,
        notes,
        probe,
        (),
        len(train),
        len(test),
        "pairs of views",
    )
    parts = whole.only(factors=[p for g in groups for p in members[g]]) if any(members.values()) else None
    return replace(whole.only(factors=groups), parts=parts)


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
    return {s: torch.cat([z[s] for z in a]) for s in a[0]}, {s: torch.cat([z[s] for z in b]) for s in b[0]}, drawn


def _differences(group: str, drawn: Drawn, skipped: list[str]) -> dict[str, Tensor]:
    """Name -> theta_b - theta_a [P, k] of every parameter that the group draws."""
    out: dict[str, Tensor] = {}
    for op, parameters in drawn[0][0][group].items():
        stacked = partial(_stacked, drawn, group, op)
        gates = None
        if "batch_prob" in parameters:
            gates = [stacked("batch_prob", v) > 0.5 for v in range(2)]
            out[f"{group}/{op}/batch_prob"] = gates[1].double() - gates[0].double()
        for name, value in parameters.items():
            path = f"{group}/{op}/{name}"
            if name in SIDE or name == "batch_prob":
                continue
            if value[0].numel() > LARGEST:
                skipped.append(path)
                continue
            x = [stacked(name, v) for v in range(2)]
            if name == "src" and "input_size" in parameters:
                sizes = [stacked("input_size", v) for v in range(2)]
                x = [_box(corners, size) for corners, size in zip(x, sizes, strict=True)]
            if gates is not None:
                fired = torch.cat([t[g[:, 0]] for t, g in zip(x, gates, strict=True)])
                middle = fired.mean(0) if len(fired) else x[0].new_zeros(x[0].shape[1])
                x = [torch.where(g, t, middle) for t, g in zip(x, gates, strict=True)]
            difference = x[1] - x[0]
            period = PERIODS.get(name)
            both = torch.cat(x)
            if period is not None and float(both.max() - both.min()) > period / 2:
                phase = 2 * math.pi / period * difference
                difference = torch.cat([phase.cos(), phase.sin()], 1)
            out[path] = difference
    return out


def _stacked(drawn: Drawn, group: str, op: str, name: str, view: int) -> Tensor:
    """One parameter of all pairs: [P, k] float64."""
    values = [p[group][op][name].detach().cpu().double() for p in drawn[view]]
    return torch.cat([v.flatten(1) if v.ndim > 1 else v[:, None] for v in values])


def _box(corners: Tensor, size: Tensor) -> Tensor:
    """Corners [P, 8] in pixels (x, y) and the image's (height, width) [P, 2] to centre and size [P, 4], in shares."""
    xy = corners.view(-1, 4, 2)
    low, high = xy.amin(1), xy.amax(1)
    return torch.cat([(low + high) / 2, high - low], 1) / size.flip(1).repeat(1, 2)


def _target(value: Tensor, train: Tensor) -> Target | None:
    """A difference to be predicted, standardised; None where nothing of it varies."""
    spread = value[train].amax(0) - value[train].amin(0)
    value = value[:, spread > 1e-6 * value.abs().amax(0).clamp(min=1e-12)]
    if not value.shape[1]:
        return None
    standard = (value - value[train].mean(0)) / value[train].std(0)
    return Target(standard, torch.ones(len(value), dtype=torch.bool, device=value.device))
