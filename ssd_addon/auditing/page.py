"""An audit as one self-contained HTML page: the verdict, each parameter's course through the layers, the tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ssd_addon.auditing.measure import Audited
from ssd_addon.auditing.verdict import Course, advice, compared, courses, headline, sentences
from ssd_addon.display import display
from ssd_addon.metrics import ScoreTable
from ssd_addon.report.advice import advice_section
from ssd_addon.report.document import document
from ssd_addon.report.legend import INTERVAL, SCALE
from ssd_addon.report.pictures import picture
from ssd_addon.report.readings import ENCODES, TRACE
from ssd_addon.report.table import score_table, short_name
from ssd_addon.report.text import html, name

ROW = "Features"
BESIDE = 4
"""Columns, at most, of tables that stand beside each other."""


@dataclass(frozen=True, eq=False)
class Strip:
    """Pictures of what is compared: the first view of an image, and the views that differ in one group alone.

    Attributes:
        first: [k, C, H, W] in [0, 1].
        others: group -> [k, C, H, W].
    """

    first: Tensor
    others: Mapping[str, Tensor]


def render(models: Sequence[Audited], about: Sequence[tuple[str, str]], strip: Strip | None) -> str:
    """The page of one audited backbone, or of two side by side."""
    title = " and ".join(m.name for m in models)
    sections = [_header(models, about), _courses(models), _how(), *_tables(models), _strip(strip)]
    findings = {
        "models": [
            {
                "name": m.name,
                "verdict": [headline(m), *sentences(m)],
                "table": m.table.to_json(),
                "accuracy": None if m.accuracy is None else m.accuracy.to_json(),
                "layers": list(m.layers),
                "notes": m.notes,
            }
            for m in models
        ],
        "about": dict(about),
    }
    thing = "what it encodes" if len(models) == 1 else "what they encode"
    return document(f"{title}: {thing} of each augmentation", [s for s in sections if s], findings)


def _header(models: Sequence[Audited], about: Sequence[tuple[str, str]]) -> str:
    facts = "".join(f"<span>{html(k)} <b>{html(v)}</b></span>" for k, v in about)
    out = [
        "<header>",
        f"<h1>{html('What did the augmentations throw away? ' + ' and '.join(m.name for m in models))}</h1>",
    ]
    for k, m in enumerate(models):
        mark = ' id="verdict"' if k == 0 else ""
        whose = f"<small>{short_name(m.name)}: </small>" if len(models) > 1 else ""
        out.append(f'<p class="verdict"{mark}>{whose}{html(headline(m))}</p>')
        out.append(f'<ul class="each">{"".join(f"<li>{html(s)}</li>" for s in sentences(m))}</ul>')
    if len(models) == 2:
        out.append(f'<ul class="each" id="compared">{"".join(f"<li>{html(s)}</li>" for s in compared(*models))}</ul>')
    each = [advice(m) for m in models]
    shared = [item for item in each[0] if all(item in other for other in each)]
    own = [
        (f"{m.name}: {t}", s) for m, found in zip(models, each, strict=True) for t, s in found if (t, s) not in shared
    ]
    return "\n".join([*out, advice_section([*own, *shared]), f'<p class="about">{facts}</p>', "</header>"])


def _courses(models: Sequence[Audited]) -> str:
    """A panel for each parameter: R^2 from the pixels through the layers to the features."""
    by_model = [{c.key: c for c in courses(m)} for m in models]
    keys = list(dict.fromkeys(key for each in by_model for key in each))
    if not keys:
        return ""
    panels = []
    for key in keys:
        found = [(k, m, each[key]) for k, (m, each) in enumerate(zip(models, by_model, strict=True)) if key in each]
        panels.append(_panel(key, found))
    legend = "".join(f'<li><i style="background:var(--s{k})"></i>{html(m.name)}</li>' for k, m in enumerate(models))
    return "\n".join(
        [
            "<section>",
            "<h2>On the way through the layers</h2>",
            "<p>How well each parameter can be decoded (R²) from the pixels, from each layer and from the features at "
            "the end. The dashed line is the score of the features of untrained copies, the mean of three.</p>",
            f'<ul class="legend">{legend}</ul>' if len(models) > 1 else "",
            f'<div class="plots">{"".join(panels)}</div>',
            "</section>",
        ]
    )


def _panel(key: str, found: Sequence[tuple[int, Audited, Course]]) -> str:
    w, h, left, right, top, bottom = 320, 200, 30, 12, 26, 40
    inner, tall = w - left - right, h - top - bottom

    def up(score: float) -> float:
        return top + tall * (1 - min(1.0, max(0.0, score)))

    parts = [f'<text class="title" x="{left}" y="15">{html(found[0][2].name)}</text>']
    for tick in (0.0, 0.5, 1.0):
        parts.append(f'<path class="axis" d="M{left} {up(tick):.1f}H{w - right}"/>')
        parts.append(f'<text x="{left - 5}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    said = []
    labels = _labels([m for _, m, _ in found])
    for k, m, _ in found:
        rows = ["pixels", *m.layers, "backbone"]
        scores = [m.table[row, key] for row in rows]
        xs = [left + inner * i / (len(rows) - 1) for i in range(len(rows))]
        color = f"var(--s{k % 6})"
        points = " ".join(f"{x:.1f},{up(s):.1f}" for x, s in zip(xs, scores, strict=True))
        parts.append(f'<polyline class="curve" style="stroke:{color}" points="{points}"/>')
        for x, row, s in zip(xs, rows, scores, strict=True):
            tip = html(f"{m.name}, {row}: {s:.2f}")
            parts.append(
                f'<circle cx="{x:.1f}" cy="{up(s):.1f}" r="3" style="fill:{color}"><title>{tip}</title></circle>'
            )
        y = up(m.table["untrained", key])
        dash = f'style="stroke:{color};stroke-dasharray:4 4"'
        parts.append(f'<path class="curve" {dash} d="M{left} {y:.1f}H{w - right}"/>')
        if k == found[0][0]:
            for i, (x, row) in enumerate(zip(xs, labels, strict=True)):
                if not row:
                    continue
                if len(rows) > 4 and 0 < i < len(rows) - 1 and i % 2 == 0 and len(rows) > 6:
                    continue
                anchor = "start" if i == 0 else "end" if i == len(rows) - 1 else "middle"
                low = h - bottom + (14 if i % 2 == 0 else 28)
                label = "features" if row == "backbone" else name(row, 14)
                parts.append(f'<text x="{x:.1f}" y="{low}" text-anchor="{anchor}">{html(label)}</text>')
        said.append(f"{m.name}: {scores[0]:.2f} in the pixels, {scores[-1]:.2f} in the features")
    label = html(f"{found[0][2].name}. {'; '.join(said)}")
    return f'<svg viewBox="0 0 {w} {h}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _labels(models: Sequence[Audited]) -> list[str]:
    """Names below the positions of the first model's rows: of its layers, unless another's have others.

    Layers of other names are numbered; where a model has more layers or fewer, they stand elsewhere and have no names.
    """
    first = models[0].layers
    layers = list(first)
    if any(len(m.layers) != len(first) for m in models):
        layers = [""] * len(first)
    elif any(m.layers != first for m in models):
        layers = [f"layer {i + 1}" for i in range(len(first))]
    return ["pixels", *layers, "backbone"]


def _tables(models: Sequence[Audited]) -> list[str]:
    """The tables, those of two models beside each other."""
    out = ["<section>", "<h2>The numbers</h2>"]
    out += ["<h3>By group of augmentations</h3>", _pair(models, [m.table for m in models], "group of augmentations")]
    if any(m.table.parts is not None for m in models):
        out += ["<h3>By parameter</h3>", _pair(models, [m.table.parts for m in models], "parameter")]
    if any(m.accuracy is not None for m in models):
        out += ["<h3>Class accuracy</h3>", _pair(models, [m.accuracy for m in models], "classifier")]
    for m in models:
        whose = f"{m.name}: " if len(models) > 1 else ""
        out += [f'<p class="note">{html(whose + note)}</p>' for note in m.notes]
    return [*out, "</section>"]


def _pair(models: Sequence[Audited], tables: Sequence[ScoreTable | None], across: str) -> str:
    cells = []
    for m, t in zip(models, tables, strict=True):
        head = f"<h4>{short_name(m.name)}</h4>" if len(models) > 1 else ""
        body = '<p class="na">n/a</p>' if t is None else score_table(t, across=across, corner=ROW)
        cells.append(f"<div>{head}{body}</div>")
    narrow = all(t is None or len(t.factors) <= BESIDE for t in tables)
    return f'<div class="pair">{"".join(cells)}</div>' if len(models) > 1 and narrow else "".join(cells)


def _strip(strip: Strip | None) -> str:
    if strip is None:
        return ""
    show = display(strip.first)
    groups = list(strip.others)
    heads = "".join(f'<th scope="col">other {short_name(g)} <small>all else is shared</small></th>' for g in groups)
    rows = []
    for i in range(len(strip.first)):
        cells = f'<td><img src="{picture(strip.first[i], show)}" alt="{html(f"image {i + 1}, first view")}"></td>'
        for g in groups:
            image = picture(strip.others[g][i], show)
            cells += f'<td><img src="{image}" alt="{html(f"image {i + 1}, other {g}")}"></td>'
        rows.append(f"<tr>{cells}</tr>")
    return "\n".join(
        [
            "<section>",
            "<h2>What is compared</h2>",
            "<p>Each row is one image. Each of the other views differs from the first one in a single group of "
            "augmentations, and a probe predicts from the features of both by how much.</p>",
            '<div class="wide"><table class="strip"><thead><tr><th scope="col">first view</th>'
            f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>",
            "</section>",
        ]
    )


def _how() -> str:
    rows = (
        "<b>pixels</b> are the views themselves, averaged over a grid of 8 x 8: what a probe decodes without any "
        "network. Layers are averaged over a grid of 2 x 2. <b>backbone</b> is what a downstream task gets, and "
        "<b>untrained</b> is the same network with random weights: the mean of three copies, with an interval that "
        "spans those of all three. Where it lies above that of the backbone, training removed something, if the "
        "network was trained: other training settings, or other random weights, may give something else."
    )
    low = (
        "<b>A low score</b> says that this probe finds little from this many pairs, not that nothing is there. Compare "
        "the rows of a column, and take more images or pairs (--draws) where the pixels score low too."
    )
    encode = (
        f"Features are said to <b>encode</b> a parameter from R² = {ENCODES} on, to encode it weakly from {TRACE} on, "
        "and not to encode it below that."
    )
    items = "".join(f"<li>{text}</li>" for text in (SCALE, encode, INTERVAL, rows, low))
    return f'<section>\n<h2>How to read the numbers</h2>\n<ul class="how">{items}</ul>\n</section>'


def about_of(
    images: Tensor, total: int, groups: Sequence[str], extra: Sequence[tuple[str, Any]]
) -> list[tuple[str, str]]:
    """Facts for the head of the page."""
    n = len(images)
    return [
        ("images", f"{n} of {total}" if total > n else str(n)),
        ("size", f"{images.shape[-2]} x {images.shape[-1]}"),
        ("groups", ", ".join(groups)),
        *((k, str(v)) for k, v in extra),
    ]
