"""Without labels: which augmentations each space encodes.

The parameters of the augmentations are ground truth for style. Two views of every image are drawn independently; from
their embeddings in one space a probe predicts, for each group, by how much its parameters differ. A style space should
encode its own group and no other, and the content space none.
Legend: n images, d the width of a space, R draws per image, P = R * n pairs.
"""

import math
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ssd_addon.batch import ViewBatch
from ssd_addon.differences import View, group_differences
from ssd_addon.metrics.embed import Images, Model, batches, is_on_sphere, joined, spaces_of
from ssd_addon.metrics.evaluation import evaluation, generators_kept
from ssd_addon.metrics.probe import Kind, Probe, Split, at_least, score_cells
from ssd_addon.metrics.probes import Target
from ssd_addon.metrics.spaces import MIN_ROWS, check_spaces, standardized
from ssd_addon.metrics.table import ScoreTable
from ssd_addon.plan import ViewPlan

PAIRS = 2000
"""Pairs of views that are about drawn where the caller does not say how many."""
Drawn = tuple[list[View], list[View]]
"""How view a and view b were drawn, batch after batch."""


class Views(Protocol):
    """What is asked of `views`: `StructuredViews` has it."""

    @property
    def plan(self) -> ViewPlan: ...
    def independent(self, images: Tensor, *, seed: tuple[int, ...]) -> ViewBatch: ...


def parameter_matrix(
    model: Model,
    views: Views,
    images: Images,
    *,
    probe: Kind | Probe = "kernel",
    draws: int | None = None,
    batch_size: int = 256,
    backbone: bool = False,
    on_sphere: bool | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> ScoreTable:
    """How well each space predicts the difference of each group's parameters between two views; needs no labels.

    For every image two views a, b are drawn independently with the query's operations. The probe is given
    [z_b - z_a, z_a + z_b] and predicts theta_b - theta_a on images that it was not fitted on. An angle or a hue whose
    draws span more than half of its circle is scored as (cos, sin) of the difference. An operation with p < 1 also has
    the parameter batch_prob (whether it was applied); where it was not applied, its other parameters count as their
    mean over the pairs where it was. A crop's corners (src) count as center and size, as fractions of the image.

    Args:
        model: `StyleHeads`, or any callable [b, C, H, W] -> space -> [b, d], or -> features [b, F], which are the row
            "backbone". Measuring changes nothing, see `embed`.
        views: the `StructuredViews` that the model was trained with; its own draws are left as they were.
        images: [n, C, H, W], uint8 or in [0, 1], or batches of them (a data loader); n >= 10.
        probe: as in `r2_matrix`; the split is one of images.
        draws: pairs per image; None makes about 2,000 pairs in all. Pairs of an image stay on one side of the split.
        batch_size: images at a time, where `images` is one tensor. Views are drawn per batch, so another size
            means other draws.
        backbone: add a row for the pooled features of a `StyleHeads`.
        on_sphere: True scales every embedding to unit length, None asks the model; as in `embed`.
        bootstrap: as in `r2_matrix`; resamples are of images, each with all its pairs.
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
    chosen = Probe.of(probe)
    at_least("bootstrap", bootstrap, 0)
    if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 1):
        raise ValueError(f"draws: expected a whole number of pairs per image, 1 or more: got {draws!r}")
    groups = tuple(views.plan.spaces[1:])
    if not groups:
        raise ValueError(
            "views: expected groups of augmentations, whose parameters are predicted: got views without groups; give "
            "a StructuredViews with groups, also for a model that was trained without style spaces"
        )
    with generators_kept():  # a loader that shuffles draws from the global one
        each = list(batches(images, batch_size))
    n = sum(len(x) for x in each)
    if n < 2 * MIN_ROWS:
        raise ValueError(
            f"images: expected at least {2 * MIN_ROWS}, as pairs of an image must lie on one side of the split: got {n}"
        )
    chosen.sizes(n, "images")
    draws = draws or math.ceil(PAIRS / n)
    sphere = is_on_sphere(model) if on_sphere is None else on_sphere
    za, zb, drawn = _pairs(model, views, each, draws, backbone, sphere, seed)
    _, device = check_spaces({**za, **{f"{s} of the second view": z for s, z in zb.items()}})

    split = Split.draw(n, chosen, bootstrap, seed, device, repeats=draws)
    parts: dict[str, Target | str] = {}
    members: dict[str, list[str]] = {}
    empty: dict[str, Target | str] = {}  # groups without a parameter to predict, and why
    skipped: dict[str, list[str]] = {}
    for group in groups:
        found = group_differences(group, *drawn, skipped.setdefault(group, []), exact=True)
        made = {name: _target(value.to(device), split.train, split.test) for name, value in found.items()}
        kept = {name: target for name, target in made.items() if target is not None}
        if kept:
            parts |= kept
            members[group] = list(kept)
        else:
            empty[group] = "no parameter of this group varies between views"
            if skipped[group]:
                empty[group] = f"left out: {', '.join(skipped[group])}; nothing else in this group varies"
    for s in za:  # so that no sum overflows
        large = torch.maximum(za[s].abs().amax(), zb[s].abs().amax()) > torch.finfo(za[s].dtype).max / 4
        za[s], zb[s] = (z / torch.where(large, 4, 1) for z in (za[s], zb[s]))
    inputs = {s: [zb[s] - za[s], za[s] + zb[s]] for s in za}
    scores, intervals, notes = score_cells(inputs, parts | empty, split, chosen, seed=seed, means=members)
    notes |= {(s, g): f"left out: {', '.join(skipped[g])}" for g in members if skipped[g] for s in za}
    finer = [p for g in members for p in members[g]]
    sizes = len(split.train), len(split.test)
    table = ScoreTable(
        tuple(za), (*groups, *finer), scores, intervals, notes, chosen.kind, (), *sizes, "pairs of views"
    )
    return replace(table.only(factors=groups), parts=table.only(factors=finer) if finer else None)


def _pairs(
    model: Model, views: Views, each: list[Tensor], draws: int, backbone: bool, on_sphere: bool, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Drawn]:
    """Embeddings of both views of P pairs, draw after draw: space -> [P, d]; and how each batch of them was drawn."""
    a: list[dict[str, Tensor]] = []
    b: list[dict[str, Tensor]] = []
    drawn: Drawn = ([], [])
    own = views.modules() if isinstance(views, torch.nn.Module) else ()
    with evaluation(model, leave=own), torch.no_grad():
        for draw in range(draws):
            for i, x in enumerate(each):
                pair = views.independent(x, seed=(seed, draw, i))
                z = spaces_of(model, pair.views.flatten(0, 1), backbone=backbone, on_sphere=on_sphere)
                a.append({s: t[: len(x)] for s, t in z.items()})
                b.append({s: t[len(x) :] for s, t in z.items()})
                for view in range(2):
                    drawn[view].append(pair.parameters[view])
    return joined(a), joined(b), drawn


def _target(value: Tensor, train: Tensor, test: Tensor) -> Target | None:
    """A difference to be predicted, standardized; None where nothing of it varies on both sides of the split."""
    spread = torch.stack([value[r].amax(0) - value[r].amin(0) for r in (train, test)]).amin(0)
    value = value[:, spread > 1e-6 * value.abs().amax(0)]
    if not value.shape[1]:
        return None
    return Target(standardized(value, train), torch.ones(len(value), dtype=torch.bool, device=value.device))
