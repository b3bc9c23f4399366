"""Measures without labels which augmentations each space encodes.

The augmentation parameters are ground truth for style. Two views of every image are drawn independently; from their
embeddings in one space a probe predicts the difference of each group's parameters. A style space should encode its own
group and no other, and the content space none.
Legend: n images, d the width of a space, R draws per image, P = R * n pairs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ssd_addon.batch import ViewBatch
from ssd_addon.differences import View, group_differences
from ssd_addon.metrics.dependence import parts_of
from ssd_addon.metrics.embed import BACKBONE, Images, Model, batches, is_on_sphere, joined, spaces_of
from ssd_addon.metrics.evaluation import evaluation, generators_kept
from ssd_addon.metrics.exclusivity import table_of_tests
from ssd_addon.metrics.leaks import LEVEL, NOTHING, SMALLEST, Dependence, Exclusivity
from ssd_addon.metrics.probe import Kind, Probe, Split, at_least, score_cells
from ssd_addon.metrics.probes import Target
from ssd_addon.metrics.spaces import MIN_ROWS, check_spaces, standardized
from ssd_addon.metrics.table import ScoreTable
from ssd_addon.plan import ViewPlan

PAIRS = 2000
"""Approximate default number of pairs of views."""
Drawn = tuple[list[View], list[View]]
"""The parameters of view a and of view b, batch after batch."""


class Views(Protocol):
    """The interface of `StructuredViews` that this module uses."""

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

    For every image two views a, b are drawn independently with the query's operations. The probe gets
    [z_b - z_a, z_a + z_b] and predicts theta_b - theta_a on held-out images. Angles and hues whose draws span more than
    half of their circle are scored as (cos, sin) of the difference. An operation with p < 1 also has the parameter
    batch_prob (whether it was applied); where it was not applied, its other parameters are replaced by their mean over
    the pairs where it was. A crop's corners (src) are converted to center and size, as fractions of the image.

    Args:
        model: `StyleHeads`, or any callable [b, C, H, W] -> space -> [b, d], or -> features [b, F], which are listed as
            "backbone". The model is left unchanged, see `embed`.
        views: the `StructuredViews` with which the model was trained; their draws for training are not affected.
        images: [n, C, H, W], uint8 or in [0, 1], or batches of them (a data loader); n >= 10.
        probe: as in `r2_matrix`; the split is over images.
        draws: pairs per image; None makes about 2,000 pairs in all. Pairs of an image stay on one side of the split.
        batch_size: number of images at a time, if `images` is one tensor. Views are drawn per batch, so another size
            gives other draws.
        backbone: add a row for the pooled features of a `StyleHeads`.
        on_sphere: True L2-normalizes embeddings, None uses the model's attribute; as in `embed`.
        bootstrap: as in `r2_matrix`; images are resampled, each with all its pairs.
        seed: seed of the views, the split, the resamples and the MLP.

    Returns:
        `ScoreTable`, spaces x groups; `table.parts` has the parameters of each group: spaces x
        "color/0.ColorJitter/hue_factor". A group's score is the mean over its parameters. NaN and a note if no
        parameter of a group varies; fields of noise and parameters of varying size are left out and named in a note.

    Raises:
        ValueError, TypeError: there are fewer than 10 images; the views have no groups; the model returns something
            else; or as in `r2_matrix`.

    Source: docs/method.md; the prediction of parameter differences is that of Lee et al. 2021 (AugSelf),
    arXiv 2111.09613, used here as a probe.
    """
    chosen = Probe.of(probe)
    at_least("bootstrap", bootstrap, 0)
    drawn = drawn_pairs(
        model, views, images, draws=draws, batch_size=batch_size, backbone=backbone, on_sphere=on_sphere, seed=seed,
        probe=chosen,
    )  # fmt: skip
    return matrix_of(drawn, chosen, bootstrap=bootstrap, seed=seed)


def parameter_exclusivity(
    model: Model,
    views: Views,
    images: Images,
    *,
    draws: int | None = None,
    batch_size: int = 256,
    on_sphere: bool | None = None,
    level: float = LEVEL,
    smallest: float = SMALLEST,
    resamples: int | None = None,
    seed: int = 0,
) -> Exclusivity:
    """Test whether a space depends on the parameters of groups that are not its own; needs no labels.

    Uses the pairs of views of `parameter_matrix` and the test of `exclusivity` for each parameter of another group:
    whether [z_b - z_a, z_a + z_b] and theta_b - theta_a are independent given the parameters of the space's own group.
    The library drew the parameters independently of each other and of the images. So the null distribution comes from
    permutations of the pairs' parameters and is exact for any number of pairs.

    A leak may be real without being a fault of the model: a random crop changes which colors are visible, and a color
    space encodes that. `smallest` excludes such small effects.

    Args:
        model, views, images, draws, batch_size, on_sphere: as in `parameter_matrix`; at least 50 pairs.
        level, smallest, resamples, seed: as in `exclusivity`; the seed is also used for the views.

    Returns:
        `Exclusivity`, spaces x groups. Each cell shows one parameter of the group: among its leaks the one with the
        largest effect; if none leaks, the one with the smallest p-value. `table.parts` has every parameter. The
        p-values are corrected for the number of parameters that were tested over all spaces.

    Raises:
        ValueError, TypeError: as in `parameter_matrix` and `exclusivity`; also if the parameters of groups are not
            drawn independently of each other, and for a model without spaces.
    """
    drawn = drawn_pairs(model, views, images, draws=draws, batch_size=batch_size, on_sphere=on_sphere, seed=seed)
    if set(drawn.inputs) <= {BACKBONE}:
        raise ValueError(
            "model: expected spaces to test, images -> name -> [n, d] as StyleHeads returns them: got features alone, "
            "of which no augmentation is expected to be absent; parameter_matrix scores them"
        )
    return exclusivity_of(drawn, level=level, smallest=smallest, resamples=resamples, seed=seed)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of views of the same images, drawn independently.

    Attributes:
        inputs: space -> [z_b - z_a, z_a + z_b], each [P, d], draw after draw.
        differences: group -> parameter -> theta_b - theta_a [P, k].
        skipped: group -> its parameters that are left out, with the reason.
        images, draws: n and R; P = R n.
        device: device of the embeddings.
    """

    inputs: Mapping[str, Sequence[Tensor]]
    differences: Mapping[str, Mapping[str, Tensor]]
    skipped: Mapping[str, list[str]]
    images: int
    draws: int
    device: torch.device


def drawn_pairs(
    model: Model,
    views: Views,
    images: Images,
    *,
    draws: int | None = None,
    batch_size: int = 256,
    backbone: bool = False,
    on_sphere: bool | None = None,
    seed: int = 0,
    probe: Probe | None = None,
) -> Pairs:
    """Draw and embed two views of every image; see `parameter_matrix`. With a probe, check the number of images."""
    if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 1):
        raise ValueError(f"draws: expected a whole number of pairs per image, 1 or more: got {draws!r}")
    groups = tuple(views.plan.spaces[1:])
    if not groups:
        raise ValueError(
            "views: expected groups of augmentations, whose parameters are predicted: got views without groups; pass "
            "StructuredViews with groups, also for a model that was trained without style spaces"
        )
    with generators_kept():  # a loader that shuffles draws from the global generator
        each = list(batches(images, batch_size))
    n = sum(len(x) for x in each)
    if n < 2 * MIN_ROWS:
        raise ValueError(
            f"images: expected at least {2 * MIN_ROWS}, as pairs of an image must lie on one side of the split: got {n}"
        )
    if probe is not None:
        probe.sizes(n, "images")
    draws = draws or math.ceil(PAIRS / n)
    sphere = is_on_sphere(model) if on_sphere is None else on_sphere
    za, zb, drawn = _pairs(model, views, each, draws, backbone, sphere, seed)
    _, device = check_spaces({**za, **{f"{s} of the second view": z for s, z in zb.items()}})
    skipped: dict[str, list[str]] = {g: [] for g in groups}
    differences = {g: group_differences(g, *drawn, skipped[g], exact=True) for g in groups}
    for s in za:  # rescale, so that no sum overflows
        large = torch.maximum(za[s].abs().amax(), zb[s].abs().amax()) > torch.finfo(za[s].dtype).max / 4
        za[s], zb[s] = (z / torch.where(large, 4, 1) for z in (za[s], zb[s]))
    inputs = {s: [zb[s] - za[s], za[s] + zb[s]] for s in za}
    return Pairs(inputs, differences, skipped, n, draws, device)


def matrix_of(drawn: Pairs, probe: Probe, *, bootstrap: int, seed: int) -> ScoreTable:
    """The table of `parameter_matrix`."""
    groups = tuple(drawn.differences)
    split = Split.draw(drawn.images, probe, bootstrap, seed, drawn.device, repeats=drawn.draws)
    parts: dict[str, Target | str] = {}
    members: dict[str, list[str]] = {}
    empty: dict[str, Target | str] = {}  # groups without a parameter to predict, with the reason
    skipped = drawn.skipped
    for group, found in drawn.differences.items():
        made = {name: _target(value.to(drawn.device), split.train, split.test) for name, value in found.items()}
        kept = {name: target for name, target in made.items() if target is not None}
        if kept:
            parts |= kept
            members[group] = list(kept)
        else:
            empty[group] = "no parameter of this group varies between views"
            if skipped[group]:
                empty[group] = f"left out: {', '.join(skipped[group])}; nothing else in this group varies"
    scores, intervals, notes = score_cells(drawn.inputs, parts | empty, split, probe, seed=seed, means=members)
    notes |= {(s, g): f"left out: {', '.join(skipped[g])}" for g in members if skipped[g] for s in drawn.inputs}
    finer = [p for g in members for p in members[g]]
    sizes = len(split.train), len(split.test)
    table = ScoreTable(
        tuple(drawn.inputs), (*groups, *finer), scores, intervals, notes, probe.kind, (), *sizes, "pairs of views"
    )
    return replace(table.only(factors=groups), parts=table.only(factors=finer) if finer else None)


def exclusivity_of(
    drawn: Pairs,
    *,
    level: float = LEVEL,
    smallest: float = SMALLEST,
    resamples: int | None = None,
    seed: int = 0,
) -> Exclusivity:
    """The table of `parameter_exclusivity`, for the spaces of the model."""
    rows = drawn.images * drawn.draws
    everywhere = torch.ones(rows, dtype=torch.bool, device=drawn.device)
    columns = {g: {p: _varying(v).to(drawn.device) for p, v in each.items()} for g, each in drawn.differences.items()}
    members = {g: tuple(p for p, v in each.items() if v.shape[1]) for g, each in columns.items()}
    blocks = {p: columns[g][p] for g in members for p in members[g]}
    spaces = {s: z for s, z in drawn.inputs.items() if s != BACKBONE}
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(drawn.device.type, enabled=False):
        table = table_of_tests(
            spaces,
            {p: (parts_of(v), everywhere) for p, v in blocks.items()},
            {s: members.get(s, ()) for s in spaces},
            blocks,
            rows,
            independent=True,
            level=level,
            smallest=smallest,
            resamples=resamples,
            seed=seed,
            unit="pairs of views",
        )
    cells: dict[tuple[str, str], Dependence] = {}
    notes = {(s, s): "own" for s in spaces if s in members}
    for s in spaces:
        for g, names in members.items():
            tests = [(table.is_leak(s, p), table[s, p]) for p in names if not math.isnan(table[s, p].p)]
            found = [t for leak, t in tests if leak]
            most = (
                max(found, key=lambda t: t.effect) if found else min((t for _, t in tests), key=_order, default=NOTHING)
            )
            cells[s, g] = most if s != g else NOTHING
            if not names and s != g:
                notes[s, g] = "no parameter of this group varies between views"
            elif drawn.skipped[g] and s != g:
                notes[s, g] = f"left out: {', '.join(drawn.skipped[g])}"
    own = {s: (s,) if s in members else () for s in spaces}
    return replace(table, factors=tuple(members), own=own, tests=cells, notes=notes, parts=table if blocks else None)


def _order(test: Dependence) -> tuple[float, float]:
    return test.p, -test.effect


def _pairs(
    model: Model, views: Views, each: list[Tensor], draws: int, backbone: bool, on_sphere: bool, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Drawn]:
    """Embeddings of both views of P pairs, draw after draw: space -> [P, d]; and the parameters of each batch."""
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


def _varying(value: Tensor) -> Tensor:
    """The columns of a difference that vary."""
    return value[:, value.amax(0) - value.amin(0) > 1e-6 * value.abs().amax(0)]


def _target(value: Tensor, train: Tensor, test: Tensor) -> Target | None:
    """A standardized difference as the target of a probe; None if no column varies on both sides of the split."""
    spread = torch.stack([value[r].amax(0) - value[r].amin(0) for r in (train, test)]).amin(0)
    value = value[:, spread > 1e-6 * value.abs().amax(0)]
    if not value.shape[1]:
        return None
    return Target(standardized(value, train), torch.ones(len(value), dtype=torch.bool, device=value.device))
