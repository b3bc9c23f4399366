"""Everything that a report shows, measured: matrices, geometry, views, neighbours. No HTML here."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_addon.batch import ViewBatch
from ssd_addon.metrics import (
    Dci,
    ScoreTable,
    dci,
    embed,
    mig,
    parameter_matrix,
    r2_matrix,
    redundancy,
    sap,
    space_geometry,
)
from ssd_addon.metrics.embed import BACKBONE, Model
from ssd_addon.metrics.labelled import check_factors
from ssd_addon.metrics.spaces import MIN_ROWS, check_finite
from ssd_addon.report.data import Data, Say

KNOWS, TRACE = 0.5, 0.1
"""A score from which a space knows a factor, and below which it does not; between them there is a trace of it."""
EXPLORED = 300
"""Images in the retrieval explorer."""
BUDGET = 3_000_000
"""Bytes of similarities in the page; fewer images are explored where there are many spaces."""


@dataclass(frozen=True, eq=False)
class Findings:
    """What was found; a table is None where it could not be made, and `reasons` says why.

    Attributes:
        title, about: of the page: name, and facts in pairs.
        spaces: names, content first, without the backbone.
        labelled: probe -> table of known factors; {} without any.
        label_free: spaces x groups, or None.
        shared: redundancy between spaces, or None.
        geometry: space -> effective rank, uniformity, alignment.
        summary: dci and the gaps of SAP and MIG where factors are known.
        views: a batch of structured views [V, B, C, H, W] as pictures in [0, 1], or None.
        explored: rows of the images in the explorer; similarity: space -> [m, m] cosines.
        log: of the training.
        reasons: part -> why it is not there.
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


@dataclass(frozen=True, eq=False)
class Summary:
    dci: Dci
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
    unit: bool = False,
    batch_size: int = 64,
    explored: int = EXPLORED,
    seed: int = 0,
    say: Say | None = None,
) -> Findings:
    """All measures of a model on a data set; what cannot be measured gets its reason, the rest goes on.

    Args:
        model: images -> space -> [n, d].
        data: images and what is known of them.
        views: the `StructuredViews` of the training; None: no label-free matrix and no picture of views.
        log: entries of a JSON-lines log.
        title, about: for the head of the page.
        unit: score rows of unit length, as the SimCLR family's loss sees them.
        batch_size: images at a time.
        explored: images in the explorer, at most.
        seed: of splits and views.
        say: told what is being done.

    Raises:
        ValueError: embeddings that are not finite: there is nothing to be said of such a model.
    """
    reasons: dict[str, str] = {}
    images = data.images
    n = len(images)
    if images.dtype != torch.uint8 and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        got = f"values from {float(images.min()):.4g} to {float(images.max()):.4g}"
        raise ValueError(f"images: expected uint8, or floating point in [0, 1]: got {got}")
    plain = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    ready = views.plain(images) if views is not None else plain
    tell = say or (lambda _: None)
    tell(f"embedding {n} images")
    z = embed(model, ready, batch_size=batch_size, unit=unit)
    for space, rows in z.items():
        check_finite(f"space {space!r}", rows)
    spaces = tuple(s for s in z if s != BACKBONE)
    styles = {s: z[s] for s in spaces}

    def attempt(part: str, make: Callable[[], Any]) -> Any:
        tell(part)
        try:
            return make()
        except ValueError as error:  # too few images, no groups, NaN: said on the page
            reasons[part] = str(error)
            return None

    about = list(about)
    thin = [s for s in spaces if unit and z[s].shape[1] == 1]
    if thin:
        about.append(("note", f"{_listed(thin)}: 1 wide, so of unit length there is a sign alone"))
    labelled: dict[str, ScoreTable] = {}
    summary = None
    factors = {}
    for name, factor in data.factors.items():  # one that cannot be scored does not cost the others
        try:
            if n >= 2 * MIN_ROWS:
                check_factors(styles, {name: factor})
            factors[name] = factor
        except (ValueError, TypeError) as error:
            about.append((f"{name} is left out", str(error)))
    if factors:
        for probe, called in (("ridge", "linear"), ("kernel", "nonlinear")):
            table = attempt(f"known factors, {called} probe", partial(r2_matrix, z, factors, probe=probe))
            if table is not None:
                labelled[probe] = table
        if labelled and len(spaces) > 1:

            def numbers() -> Summary:
                gap = sap(labelled["ridge"].only(spaces=spaces))[0]
                return Summary(dci(styles, factors, seed=seed), gap, mig(styles, factors, seed=seed)[0])

            summary = attempt("summary numbers", numbers)
    elif not data.factors:
        reasons["known factors"] = "the data set names none"
    else:
        reasons["known factors"] = "none of them can be scored, see the head of the page"
    label_free = None
    if views is None:
        reasons["label-free matrix"] = "the checkpoint does not say how its views are drawn; name them with --views"
    else:
        label_free = attempt(
            "label-free matrix",
            lambda: parameter_matrix(model, views, images, backbone=True, unit=unit, batch_size=batch_size, seed=seed),
        )
    shared = None
    if len(spaces) > 1:
        shared = attempt("redundancy", lambda: redundancy(styles, seed=seed))
    batch = None
    geometry: dict[str, dict[str, float]] = {}
    if views is not None:
        few = images[: min(n, 256)]
        made = attempt("views", lambda: views(few))
        if made is not None:
            geometry = attempt("geometry", lambda: _geometry(model, made, batch_size, unit)) or {}
            batch = _pictures(made, views)
    count = min(explored, n, int(math.sqrt(BUDGET / (2 * len(z)))))
    rows = torch.linspace(0, n - 1, count).round().long()
    index = {s: F.normalize(t[rows.to(t.device)].double(), dim=1).cpu() for s, t in z.items()}
    similarity = {s: (t @ t.T).float() for s, t in index.items()}
    return Findings(
        title,
        about,
        spaces,
        labelled,
        label_free,
        shared,
        geometry,
        summary,
        batch,
        rows,
        similarity,
        log,
        reasons,
    )


def _geometry(model: Model, batch: ViewBatch, batch_size: int, unit: bool) -> dict[str, dict[str, float]]:
    from ssd_addon.batch import Embeddings

    v, b = batch.views.shape[:2]
    z = embed(model, batch.views.flatten(0, 1), batch_size=batch_size, backbone=False, unit=unit)
    folded = {s: t.view(v, b, -1) for s, t in z.items()}
    if set(folded) != set(batch.plan.spaces):
        raise ValueError(
            f"the model's spaces ({', '.join(folded)}) are not those of the views ({', '.join(batch.plan.spaces)})"
        )
    ordered = {s: folded[s] for s in batch.plan.spaces}
    return space_geometry(Embeddings(ordered, batch.plan, image_ids=batch.image_ids, space_index=batch.space_index))


def _pictures(batch: ViewBatch, views: Any, images: int = 8) -> ViewBatch:
    """The first images of the batch with the Normalize of the views undone, in [0, 1]."""
    import kornia.augmentation as K

    x = batch.views[:, :images].detach().float().cpu()
    for op in views.modules():
        if isinstance(op, K.Normalize):
            mean, std = (torch.as_tensor(op.flags[k]).flatten().cpu().view(-1, 1, 1) for k in ("mean", "std"))
            x = x * std + mean
            break
    index = None if batch.space_index is None else batch.space_index[:images].cpu()
    return ViewBatch(x.clamp(0, 1), batch.plan, space_index=index)


# ---- the verdict


def verdict(f: Findings) -> tuple[str, list[str]]:
    """One sentence that says whether the spaces are apart, and one for each space."""
    each: list[str] = []
    leaks: list[str] = []
    weak: list[str] = []
    for space in f.spaces:
        known = _known(f, space)
        if known is None:
            continue
        held, faint, alien = (
            _scored(known, own, low, high)
            for own, low, high in ((True, KNOWS, math.inf), (True, TRACE, KNOWS), (False, TRACE, math.inf))
        )
        has_own = any(own for *_, own in known)
        if alien:
            leaks.append(f"{space} tells {_listed(alien)}")
        if has_own and not held:
            weak.append(space)
        parts = []
        if held:
            parts.append(f"knows {_listed(held)}")
        if faint:
            parts.append(f"has a trace of {_listed(faint)}")
        if alien:
            parts.append(f"{'also tells' if has_own else 'leaks'} {_listed(alien)}")
        if has_own and not held and not faint:
            parts.insert(0, "does not know its own group")
            parts += [] if alien else ["tells nothing of any other"]
        elif not alien:
            parts.append("nothing of any other group" if has_own else "tells no group")
        told = _told(f, space)
        each.append(f"{space} {_listed(parts)}{f'; of the known factors it tells {_listed(told)}' if told else ''}.")
    if not each and f.labelled:
        known_by = {space: _told(f, space) for space in f.spaces}
        each = [f"{s} tells {_listed(t) if t else 'none of them'}." for s, t in known_by.items()]
        return "Which augmentation the spaces know was not measured; of the known factors:", each
    if not each:
        return "What the spaces know could not be measured.", []
    nameless = [g for g in f.label_free.factors if g not in f.spaces] if f.label_free else []
    if leaks:
        head = f"Not apart yet: {_listed(leaks)}."
    elif nameless:
        head = f"Nothing leaks, but no space is named after {_listed(nameless)}: nobody can say that it is kept."
    elif weak:
        head = (
            f"Nothing leaks, but {_listed(weak)} {'has' if len(weak) == 1 else 'have'} not learnt enough of its group."
        )
        head = head if len(weak) == 1 else head.replace("its group", "their groups")
    else:
        head = "Apart: every style space knows its own group and no other, and content tells none."
    return head, each


def _known(f: Findings, space: str) -> list[tuple[str, float, bool]] | None:
    """(parameter, score, is it of the space's own group) that can be scored: all of the own, the best-told of another.

    A group leaks through any of its parameters. What this many images do not tell from nothing counts as 0.
    """
    t = f.label_free
    if t is None or space not in t.spaces:
        return None
    out = []
    for group in t.factors:
        parts = [p for p in (t.parts.factors if t.parts else ()) if p.startswith(f"{group}/")]
        table = t.parts if parts and t.parts else t
        scored = [(t[space, p], p) for p in parts or [group] if not math.isnan(t[space, p])]
        for score, p in scored if group == space else scored and [max(scored)]:
            low = table.intervals.get((space, p), (score, score))[0]
            name = short(p) if group == space or p == group else f"{group}'s {short(p)}"
            out.append((name, score if low > 0 else min(score, 0.0), group == space))
    return out


def _scored(known: Sequence[tuple[str, float, bool]], own: bool, low: float, high: float) -> list[str]:
    found = sorted(((score, name) for name, score, mine in known if mine is own and low <= score < high), reverse=True)
    return [f"{name} ({score:.2f})" for score, name in found]


def _told(f: Findings, space: str) -> list[str]:
    """The labelled factors that a linear probe reads from the space, best first."""
    table = f.labelled.get("ridge")
    if table is None or space not in table.spaces:
        return []
    return _scored([(name, table[space, name], True) for name in table.factors], True, TRACE, math.inf)[:6]


def short(parameter: str) -> str:
    """ "color/0.ColorJitter/hue_factor" -> "hue"."""
    _, _, rest = parameter.partition("/")
    if not rest:
        return parameter
    op, _, name = rest.partition("/")
    op = op.split(".")[-1].removeprefix("Random")
    if name == "batch_prob":
        return f"{op} on or off"
    if name == "src":
        return f"{op} place and size"
    return name.removesuffix("_factor").replace("_", " ")


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
