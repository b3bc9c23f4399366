"""Everything that a report shows, measured: matrices, geometry, views, neighbors. No words and no HTML here."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_addon import _checks
from ssd_addon.batch import ViewBatch
from ssd_addon.display import Display, display
from ssd_addon.embeddings import Embeddings
from ssd_addon.metrics import (
    Dci,
    Exclusivity,
    Factor,
    Probe,
    ScoreTable,
    dci,
    effective_rank,
    embed,
    exclusivity,
    mig,
    r2_matrix,
    redundancy,
    sap,
    space_geometry,
    uniformity,
)
from ssd_addon.metrics.embed import BACKBONE, Model, is_on_sphere
from ssd_addon.metrics.images import for_model, scaled
from ssd_addon.metrics.label_free import drawn_pairs, exclusivity_of, matrix_of
from ssd_addon.metrics.labelled import check_factors
from ssd_addon.metrics.spaces import MIN_ROWS, check_finite
from ssd_addon.report.data import Data, Say, facts
from ssd_addon.report.text import first_line

T = TypeVar("T")
EXPLORED = 300
"""Images in the retrieval explorer."""
BUDGET = 3_000_000
"""Bytes of similarities in the page; fewer images are explored where there are many spaces."""


@dataclass(frozen=True, eq=False)
class Findings:
    """What was found; a table is None where it could not be made, and `reasons` says why.

    Attributes:
        title, about: of the page: name, and facts in pairs.
        spaces: names, content first where there is one, without the backbone; () for a model that returns features
            alone, which are called "backbone" everywhere.
        labelled: probe -> table of known factors; {} without any.
        label_free: spaces x groups, or None.
        shared: redundancy between spaces, or None.
        geometry: space -> effective rank, uniformity, alignment.
        summary: dci and the gaps of SAP and MIG where factors are known.
        views: a batch of structured views [V, B, C, H, W] as pictures in [0, 1], or None.
        explored: rows of the images in the explorer; similarity: space -> [m, m] cosines.
        log: entries of the training log.
        reasons: part -> why it is not there.
        display: how images are shown as RGB.
        tests: spaces x groups, whether a space depends on the parameters of another group; or None.
        exclusive: the same for known factors that are not the space's own, where it is said which are; or None.
        widths: space -> dimensions.
    """

    title: str
    about: list[tuple[str, str]]
    spaces: tuple[str, ...]
    labelled: dict[str, ScoreTable]
    label_free: ScoreTable | None
    shared: ScoreTable | None
    geometry: dict[str, dict[str, float]]
    summary: "Summary | None"
    views: ViewBatch | None
    explored: Tensor
    similarity: dict[str, Tensor]
    log: Sequence[Mapping[str, Any]]
    reasons: dict[str, str] = field(default_factory=dict)
    display: Display | None = None
    tests: Exclusivity | None = None
    exclusive: Exclusivity | None = None
    widths: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Summary:
    """Numbers for the whole labeled matrix: None or NaN where one could not be made, with the reason in `reasons`."""

    dci: Dci | None
    sap: float
    mig: float


def measure(
    model: Model,
    data: Data,
    *,
    views: Any = None,
    log: Sequence[Mapping[str, Any]] = (),
    title: str = "",
    about: Sequence[tuple[str, str]] = (),
    on_sphere: bool | None = None,
    batch_size: int = 64,
    explored: int = EXPLORED,
    bands: Sequence[int] | None = None,
    own: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    say: Say | None = None,
) -> Findings:
    """All measures of a model on a data set; what cannot be measured gets its reason, the rest goes on.

    Args:
        model: images -> space -> [n, d].
        data: images and what is known of them.
        views: the `StructuredViews` used in training; None: no label-free matrix and no picture of views.
        log: entries of a JSON-lines log.
        title, about: for the head of the page.
        on_sphere: True scores L2-normalized embeddings, as the SimCLR family's loss sees them; None asks the model.
        batch_size: images at a time.
        explored: images in the explorer, at most.
        bands: the channels that pictures show; see `display`.
        own: space -> its own known factors, as in `metrics.exclusivity`; None: known factors are not tested.
        seed: of splits and views.
        say: called with a line on what is being done.

    Raises:
        ValueError: embeddings that are not finite: there is nothing to be said of such a model; a name in `own` that is
            no space or no factor.
    """
    tell = say or (lambda _: None)
    show = display(data.images, bands)
    images, changed = for_model(data.images, model)
    n, about = len(images), list(about)
    if changed:
        about.append(("note", changed))
    about += facts(data)
    sphere = is_on_sphere(model) if on_sphere is None else on_sphere
    ready = views.plain(images) if views is not None else scaled(images)
    tell(f"embedding {n} images")
    z = _embedded(model, ready, batch_size, sphere)
    spaces = tuple(s for s in z if s != BACKBONE)
    styles = {s: z[s] for s in spaces} or z
    check_own(own, spaces, tuple(data.factors))
    attempt = _Attempts(tell)
    thin = [s for s in spaces if sphere and z[s].shape[1] == 1]
    if thin:
        about.append(("note", f"{_checks.names(thin)}: 1 wide, so its L2-normalized embedding is a sign alone"))

    factors: dict[str, Factor] = {}
    for name, factor in data.factors.items():  # one that cannot be scored does not cost the others
        try:
            if n >= 2 * MIN_ROWS:
                check_factors(styles, {name: factor})
            factors[name] = factor
        except (ValueError, TypeError) as error:
            about.append((f"{name} is left out", str(error)))
    labelled: dict[str, ScoreTable] = {}
    summary = None
    if factors:
        for probe in ("ridge", "kernel"):
            called = "linear" if probe == "ridge" else "nonlinear"
            table = attempt(f"known factors, {called} probe", partial(r2_matrix, z, factors, probe=probe))
            labelled |= {} if table is None else {probe: table}
        if "ridge" in labelled and len(spaces) > 1:
            ridge = labelled["ridge"].only(spaces=spaces)
            summary = _summary(styles, factors, ridge, seed, attempt)
    elif data.factors:
        attempt.reasons["known factors"] = "none of them can be scored, see the head of the page"
    else:
        attempt.reasons["known factors"] = "the data set names none"

    exclusive = tests = None
    if own is not None:
        exclusive = attempt("exclusivity of known factors", lambda: exclusivity(styles, factors, own, seed=seed))
    label_free = shared = pictures = geometry = None
    if views is None:
        attempt.reasons["label-free matrix"] = "the views of the training are not known; name them with views"
    else:
        options: dict[str, Any] = {"backbone": True, "on_sphere": sphere, "batch_size": batch_size, "seed": seed}
        chosen = Probe("kernel")
        drawn = attempt("pairs of views", lambda: drawn_pairs(model, views, images, probe=chosen, **options))
        if drawn is None:
            attempt.reasons["label-free matrix"] = attempt.reasons.pop("pairs of views")
        else:
            label_free = attempt("label-free matrix", lambda: matrix_of(drawn, chosen, bootstrap=200, seed=seed))
            if spaces:
                tests = attempt("exclusivity of augmentations", lambda: exclusivity_of(drawn, seed=seed))
    if len(spaces) > 1:
        shared = attempt("redundancy", lambda: redundancy(styles, seed=seed))
    if not spaces:
        geometry = attempt("geometry", lambda: _of_whole_images(styles, attempt))
    elif views is not None:
        shown = attempt("views", lambda: _drawn(views, images[: min(n, 256)]))
        if shown is not None:
            geometry = attempt("geometry", partial(_geometry, model, shown, batch_size, sphere, attempt))
        pictures = None if shown is None else _pictures(shown, views)
    rows, similarity = _neighbors(z, min(explored, n))
    return Findings(
        title,
        about,
        spaces,
        labelled,
        label_free,
        shared,
        geometry or {},
        summary,
        pictures,
        rows,
        similarity,
        log,
        attempt.reasons,
        show,
        tests,
        exclusive,
        {s: z[s].shape[1] for s in spaces},
    )


def check_own(own: Mapping[str, Sequence[str]] | None, spaces: Sequence[str], factors: Sequence[str]) -> None:
    """Refuses names that are no space of the model and no factor of the data set."""
    for space, names in (own or {}).items():
        if space not in spaces:
            raise ValueError(f"own: expected spaces among {_checks.names(spaces)}: got {space!r}")
        if isinstance(names, str):
            raise TypeError(f"own: expected a sequence of factors for space {space!r}, such as ('hue',): got {names!r}")
        if unknown := [name for name in names if name not in factors]:
            got = f"{_checks.names(unknown)} for space {space!r}"
            raise ValueError(f"own: expected factors among {_checks.names(factors)}: got {got}")


class _Attempts:
    """Makes the parts of a report; what cannot be made leaves its reason, and the rest goes on."""

    def __init__(self, tell: Say) -> None:
        self.tell = tell
        self.reasons: dict[str, str] = {}

    def __call__(self, part: str, make: Callable[[], T]) -> T | None:
        self.tell(part)
        try:
            return make()
        except ValueError as error:  # too few images, no groups, NaN
            self.reasons[part] = str(error)
        except (RuntimeError, TypeError, AssertionError) as error:  # an operation of the views, or a device
            self.reasons[part] = f"{type(error).__name__}: {first_line(error)}"
        return None


def _embedded(model: Model, images: Tensor, batch_size: int, on_sphere: bool) -> dict[str, Tensor]:
    """Embeddings of whole images, finite; what the model itself raises becomes an error about the images."""
    try:
        z = embed(model, images, batch_size=batch_size, on_sphere=on_sphere)
    except (RuntimeError, AssertionError, IndexError) as error:
        got = f"{_checks.shape(images)} ({type(error).__name__}: {first_line(error)})"
        raise ValueError(
            "images: expected images that the model takes, of the size and the number of channels that it was trained "
            f"on: got {got}"
        ) from error
    for space, rows in z.items():
        check_finite(f"space {space!r}", rows)
    return z


def _summary(
    styles: Mapping[str, Tensor], factors: Mapping[str, Factor], ridge: ScoreTable, seed: int, attempt: "_Attempts"
) -> Summary | None:
    """Each number by itself; None where none of them can be made."""
    d = attempt("DCI", lambda: dci(styles, factors, seed=seed))
    ahead, gap = attempt("SAP gap", lambda: sap(ridge)), attempt("MIG", lambda: mig(styles, factors, seed=seed))
    if d is None and ahead is None and gap is None:
        return None
    return Summary(d, math.nan if ahead is None else ahead[0], math.nan if gap is None else gap[0])


def _row(attempt: "_Attempts", space: str, z: Tensor, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The geometry of a space with the queries z; one that has no direction costs neither its rank nor the others."""
    row = attempt(f"geometry of {space}", make)
    return row or {"effective_rank": effective_rank(z), "uniformity": math.nan, "alignment": math.nan}


def _of_whole_images(z: Mapping[str, Tensor], attempt: "_Attempts") -> dict[str, dict[str, float]]:
    def made(t: Tensor) -> dict[str, float]:
        return {"effective_rank": effective_rank(t), "uniformity": uniformity(t), "alignment": math.nan}

    return {s: _row(attempt, s, t, partial(made, t)) for s, t in z.items()}


def _neighbors(z: Mapping[str, Tensor], most: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of images spread over the data set, and the cosines of their pairs in each space."""
    count = min(most, int(math.sqrt(BUDGET / (2 * len(z)))))
    rows = torch.linspace(0, len(next(iter(z.values()))) - 1, count).round().long()
    unit = {s: F.normalize(t[rows.to(t.device)].double(), dim=1).cpu() for s, t in z.items()}
    return rows, {s: (t @ t.T).float() for s, t in unit.items()}


def _drawn(views: Any, images: Tensor) -> ViewBatch:
    """A batch as the training draws it; the draws of the training stay where they are."""
    call = views.call
    try:
        made: ViewBatch = views(images)
    finally:
        views.call = call
    return made


def _geometry(
    model: Model, batch: ViewBatch, batch_size: int, on_sphere: bool, attempt: "_Attempts"
) -> dict[str, dict[str, float]]:
    v, b = batch.views.shape[:2]
    z = embed(model, batch.views.flatten(0, 1), batch_size=batch_size, backbone=False, on_sphere=on_sphere)
    folded = {s: t.view(v, b, -1) for s, t in z.items()}
    if set(folded) != set(batch.plan.spaces):
        raise ValueError(
            f"the model's spaces ({', '.join(folded)}) are not those of the views ({', '.join(batch.plan.spaces)})"
        )
    ordered = {s: folded[s] for s in batch.plan.spaces}
    e = Embeddings(ordered, batch.plan, image_ids=batch.image_ids, space_index=batch.space_index)

    def made(space: str) -> dict[str, float]:
        return space_geometry(e, spaces=[space])[space]

    return {s: _row(attempt, s, t[0], partial(made, s)) for s, t in ordered.items()}


def _pictures(batch: ViewBatch, views: Any, images: int = 8) -> ViewBatch:
    """The first images of the batch with the Normalize of the views undone, in [0, 1]."""
    x = unnormalized(batch.views[:, :images].detach().float().cpu(), views)
    index = None if batch.space_index is None else batch.space_index[:images].cpu()
    return ViewBatch(x.clamp(0, 1), batch.plan, space_index=index)


def unnormalized(x: Tensor, views: Any) -> Tensor:
    """Views [..., C, H, W] with the Normalize of what drew them undone."""
    import kornia.augmentation as K

    for op in views.modules():
        if isinstance(op, K.Normalize):
            mean, std = (torch.as_tensor(op.flags[k]).flatten().to(x.device).view(-1, 1, 1) for k in ("mean", "std"))
            return x * std + mean
    return x
