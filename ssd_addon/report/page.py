"""Findings to one self-contained HTML page: no server, no network, light and dark, phone and desktop, print."""

import base64
import io
import json
import math
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssd_addon.metrics import ScoreTable
from ssd_addon.report.curves import finite, panel
from ssd_addon.report.data import Data
from ssd_addon.report.findings import Findings, short, verdict

TILE = 96
"""Longest edge of an embedded picture in pixels."""
LIMIT = 10_000_000
"""Bytes that a page may have."""


def render(f: Findings, data: Data) -> str:
    """The page."""
    head, each = verdict(f)
    sections = [
        _verdict(f, head, each),
        _label_free(f),
        _labelled(f),
        _curves(f),
        _views(f),
        _explorer(f, data),
        _numbers(f),
    ]
    title = f"{f.title or 'ssd_addon'}: what each space knows"
    asset = resources.files(__package__)
    style, script = (asset.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            *sections,
            f'<script type="application/json" id="findings">{_json(_kept(f))}</script>',
            f"<script>\n{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _verdict(f: Findings, head: str, each: Sequence[str]) -> str:
    facts = "".join(f"<span>{escape(k)} <b>{escape(v)}</b></span>" for k, v in f.about)
    told = "".join(f"<li>{escape(s)}</li>" for s in each)
    how = (
        "A number is R²: how much of a parameter's change between two views a probe reads from the space; 1 is all of "
        "it, 0 nothing. From 0.5 on the space knows it; below 0.1 it does not. Of a known factor, R² is how much "
        "of it a linear probe reads."
    )
    return (
        f"<header>\n<h1>{escape(f.title or 'What each space knows')}</h1>\n"
        f'<p class="verdict" id="verdict">{escape(head)}</p>\n'
        + (f'<ul class="each">{told}</ul>\n<p class="note">{how}</p>\n' if told else "")
        + f'<p class="about">{facts}</p>\n</header>'
    )


# ---- matrices


def _label_free(f: Findings) -> str:
    out = ["<section>", "<h2>Without labels: which augmentation does each space know?</h2>"]
    if f.label_free is None:
        out.append(_na(f.reasons.get("label-free matrix", "")))
    else:
        out.append(
            "<p>Two views of each image are drawn that share nothing; from their embeddings in one space, a probe "
            "predicts by how much each group's parameters differ. A style space should know its own group (outlined) "
            "and no other, content none. The backbone tells how much there is to be known.</p>"
        )
        out.append(_table(f.label_free, f.spaces, what="Space", across="group of augmentations"))
        if f.label_free.parts is not None:
            out.append("<h3>Parameter by parameter</h3>")
            out.append(_table(f.label_free.parts, f.spaces, what="Space", across="parameter"))
    return "\n".join([*out, "</section>"])


def _labelled(f: Findings) -> str:
    out = ["<section>", "<h2>With labels: which factor does each space know?</h2>"]
    if not f.labelled:
        why = [f.reasons[k] for k in f.reasons if k.startswith("known factors")]
        out.append(_na("; ".join(dict.fromkeys(why))))
    called = {"ridge": "What a linear probe reads", "kernel": "What a kernel probe reads, nonlinear codes too"}
    for probe, table in f.labelled.items():
        out.append(f"<h3>{called[probe]}</h3>")
        out.append(_table(table, f.spaces, what="Space", across="factor"))
    if f.labelled:
        out.append(
            '<p class="note">R² on held-out images; for classes the accuracy, rescaled so that guessing the most '
            "frequent class of the training split is 0 and never being wrong is 1.</p>"
        )
    return "\n".join([*out, "</section>"])


def _table(t: ScoreTable, spaces: Sequence[str], *, what: str, across: str) -> str:
    heads = []
    for factor in t.factors:
        group, _, rest = factor.partition("/")
        heads.append(
            f'<th scope="col">{escape(short(factor))}<small>{escape(group)}</small></th>'
            if rest and across == "parameter"
            else f'<th scope="col">{escape(factor)}</th>'
        )
    rows = []
    for space in t.spaces:
        cells = []
        for factor in t.factors:
            value = t[space, factor]
            own = across != "factor" and factor.partition("/")[0] == space
            name = f"{space}, {factor}"
            if math.isnan(value):
                why = t.notes.get((space, factor), "no score")
                cells.append(f'<td class="none" title="{escape(f"{name}: {why}")}">n/a</td>')
                continue
            v = min(1.0, max(0.0, value))
            interval = t.intervals.get((space, factor))
            small = f"<small>{_number(interval[0])} to {_number(interval[1])}</small>" if interval else ""
            classes = "heat own" if own else "heat"
            cells.append(
                f'<td class="{classes}" style="--v:{v:.3f}" title="{escape(name)}">{_number(value)}{small}</td>'
            )
        other = "" if space in spaces else ' class="other"'
        rows.append(f'<tr{other}><th scope="row">{escape(space)}</th>{"".join(cells)}</tr>')
    below = ", below it the 95 % interval" if t.intervals else ""
    caption = f"{t.probe} probe, fitted on n = {t.n_train} {t.unit}, scored on n = {t.n_test} held out{below}"
    notes = dict.fromkeys(f"{factor}: {note}" for (_, factor), note in t.notes.items() if note != "itself")
    head = f'<tr><th scope="col">{what}<small>by {across}</small></th>{"".join(heads)}</tr>'
    return (
        f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>\n'
        f'<p class="key"><span>0 <i></i> 1</span> <span>{escape(caption)}</span></p>'
        + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    )


def _numbers(f: Findings) -> str:
    out = ["<section>", "<h2>More numbers</h2>"]
    if f.geometry:
        names = {
            "effective_rank": "effective rank<small>directions in use</small>",
            "uniformity": "uniformity<small>lower is more even</small>",
            "alignment": "alignment<small>of its pairs, 0 is perfect</small>",
        }
        head = "".join(f'<th scope="col">{n}</th>' for n in names.values())
        rows = "".join(
            f'<tr><th scope="row">{escape(s)}</th>' + "".join(f"<td>{_number(row[k])}</td>" for k in names) + "</tr>"
            for s, row in f.geometry.items()
        )
        out.append(
            f'<h3>How each space lies</h3><div class="wide"><table><thead><tr><th scope="col">Space</th>{head}</tr>'
            f"</thead><tbody>{rows}</tbody></table></div>"
        )
    elif "geometry" in f.reasons:
        out.append("<h3>How each space lies</h3>" + _na(f.reasons["geometry"]))
    if f.shared is not None:
        out.append("<h3>What is held twice</h3><p>How well one space (row) predicts another (column); 0 is best.</p>")
        out.append(_table(f.shared, f.spaces, what="From space", across="predicted space"))
    elif "redundancy" in f.reasons:
        out.append("<h3>What is held twice</h3>" + _na(f.reasons["redundancy"]))
    if f.summary is not None:
        d = f.summary.dci
        cells = {
            "disentanglement": d.disentanglement,
            "completeness": d.completeness,
            "informativeness": d.informativeness,
            "SAP gap": f.summary.sap,
            "MIG": f.summary.mig,
        }
        items = " &nbsp; ".join(f"{escape(k)} <b>{_number(v)}</b>" for k, v in cells.items())
        why = "; ".join(f"{k}: {v}" for k, v in d.notes.items())
        out.append(f"<h3>One number for the labelled matrix</h3><p>{items}</p>")
        out.append(f'<p class="note">Over spaces, by linear probes; each factor by itself. {escape(why)}</p>')
    elif "summary numbers" in f.reasons:
        out.append("<h3>One number for the labelled matrix</h3>" + _na(f.reasons["summary numbers"]))
    return "\n".join([*out, "</section>"]) if len(out) > 2 else ""


# ---- curves


def _curves(f: Findings) -> str:
    steps = [e for e in f.log if finite(e.get("step"))]
    out = ["<section>", "<h2>Training, space by space</h2>"]
    panels = [
        ("constraint/", "misalignment of pairs", "0 is perfect"),
        ("effective_rank/", "effective rank", "directions; 1 is collapsed"),
        ("parameters/", "knows its own group", "R², without labels"),
        ("lambda/", "weight of the invariance", "λ"),
    ]
    drawn = []
    for prefix, title, unit in panels:
        series = {}
        for k, space in enumerate(f.spaces):
            key = f"{prefix}{space}/{space}" if prefix == "parameters/" else f"{prefix}{space}"
            points = [(e["step"], e[key]) for e in steps if finite(e.get(key))]
            if points:
                series[k] = points
        if series:
            drawn.append(panel(title, unit, series))
    points = [(e["step"], e["loss"]) for e in steps if finite(e.get("loss"))]
    if points:
        drawn.insert(0, panel("loss", "", {6: points}))
    if not drawn:
        out.append(_na("there is no log.jsonl beside the checkpoint" if not f.log else "the log holds no curve"))
    else:
        legend = "".join(
            f'<li><i style="background:var(--s{k % 6})"></i>{escape(s)}</li>' for k, s in enumerate(f.spaces)
        )
        out += [f'<ul class="legend">{legend}</ul>', f'<div class="plots">{"".join(drawn)}</div>']
    return "\n".join([*out, "</section>"])


# ---- pictures


def _views(f: Findings) -> str:
    out = ["<section>", "<h2>What the views share</h2>"]
    if f.views is None:
        out.append(_na(f.reasons.get("views", "the checkpoint does not say how its views are drawn")))
        return "\n".join([*out, "</section>"])
    x, plan = f.views.views, f.views.plan
    count = min(6, x.shape[1])
    if plan.kind == "shared_query":
        heads = ["query", "content key <small>shares the image alone</small>"]
        heads += [f"{escape(s)} key <small>shares {escape(s)} with the query</small>" for s in plan.spaces[1:]]
        side = [""] * count
        text = "A row is one image. Each key shares with the query what its heading says, and differs in all else."
    else:
        heads = ["query", "key"]
        index = f.views.space_index
        serves = [i % len(plan.spaces) if index is None else int(index[i]) for i in range(count)]
        side = [f'<th scope="row">serves {escape(plan.spaces[s])}</th>' for s in serves]
        text = "A row is one image and the pair of views that serves the named space: they share that group alone."
    rows = []
    for i in range(count):
        cells = "".join(
            f'<td><img src="{_picture(x[v, i])}" alt="image {i + 1}, {escape(_plain(heads[v]))}"></td>'
            for v in range(x.shape[0])
        )
        rows.append(f"<tr>{side[i]}{cells}</tr>")
    head = ("<th></th>" if side[0] else "") + "".join(f'<th scope="col">{h}</th>' for h in heads)
    out.append(f"<p>{text}</p>")
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    out.append(f'<div class="wide"><table class="strip">{table}</table></div>')
    return "\n".join([*out, "</section>"])


def _plain(heading: str) -> str:
    return heading.replace("<small>", "").replace("</small>", "")


def _explorer(f: Findings, data: Data) -> str:
    out = ["<section>", "<h2>Which images are near, and by what?</h2>"]
    spaces = list(f.similarity)
    names = [_caption(data, int(i)) for i in f.explored]
    tiles = []
    for k, i in enumerate(f.explored.tolist()):
        label = escape(names[k] or f"image {k + 1}")
        state = 'aria-selected="true" tabindex="0"' if k == 0 else 'aria-selected="false" tabindex="-1"'
        picture = f'<img src="{_picture(data.images[i])}" alt="">'
        tiles.append(f'<button type="button" role="option" {state} title="{label}">{picture}</button>')
    rows = "".join(
        f'<div class="by">By {escape(s)}</div><div class="row" data-space="{escape(s)}"></div>' for s in spaces
    )
    content, styles = f.spaces[0], f.spaces[1:]
    start = {content: 1, **({styles[0]: -1} if styles else {})}
    sliders = "".join(
        f'<label for="slider{k}">{escape(s)}</label>'
        f'<input type="range" id="slider{k}" data-space="{escape(s)}" min="-1" max="1" step="0.1" '
        f'value="{start.get(s, 0)}"><output id="out-slider{k}" for="slider{k}"></output>'
        for k, s in enumerate(spaces)
    )
    mixes = [(f"same {content}, other {s}", {content: 1, s: -1}) for s in styles]
    mixes += [(f"same {s}, other {content}", {s: 1, content: -1}) for s in styles]
    presets = "".join(
        f'<button type="button" data-mix="{escape(json.dumps(mix))}">{escape(name)}</button>' for name, mix in mixes
    )
    content_json = _json({"spaces": spaces, "names": names, "similarity": {s: _int16(f.similarity[s]) for s in spaces}})
    out.append(
        "<p>Choose an image, with the mouse or with the arrow keys. Each row shows its nearest of the "
        f"n = {len(names)} images here by one space; a negative weight in the mix asks for images that differ in it. "
        "Numbers are cosines.</p>"
        "<noscript><p>The explorer needs JavaScript.</p></noscript>"
    )
    out.append(
        f'<div class="explorer" id="explorer">'
        f'<div class="picker" id="picker" role="listbox" aria-label="Images">{"".join(tiles)}</div>'
        f'<div><div class="chosen"><img id="chosen-image" src="{_picture(data.images[int(f.explored[0])])}" alt="">'
        f'<div id="chosen-name" aria-live="polite"></div></div>{rows}'
        f'<div class="by">By your mix</div><div class="row" id="by-mix"></div>'
        f'<div class="sliders">{sliders}</div><div class="presets">{presets}</div></div></div>'
        f'<script type="application/json" id="explorer-data">{content_json}</script>'
    )
    return "\n".join([*out, "</section>"])


def _caption(data: Data, i: int) -> str:
    """The image's own name, or its known classes and numbers."""
    if data.names[i]:
        return data.names[i]
    parts = []
    for name, factor in data.factors.items():
        if isinstance(factor, Tensor) and factor.ndim == 1:
            value = factor[i]
            known = data.classes.get(name)
            parts.append(f"{name} {known[int(value)] if known else f'{value.item():.3g}'}")
    return ", ".join(parts[:6])


def _picture(x: Tensor) -> str:
    """An image [C, H, W], uint8 or in [0, 1], as a data address of at most TILE pixels a side."""
    t = x.detach().cpu()
    if t.dtype != torch.uint8:
        t = (t.float().clamp(0, 1) * 255).round().to(torch.uint8)
    if t.shape[0] == 1:
        t = t.expand(3, -1, -1)
    image = Image.fromarray(np.ascontiguousarray(t[:3].permute(1, 2, 0).numpy()))
    image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=86)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _int16(similarity: Tensor) -> str:
    values = (similarity.clamp(-1, 1) * 32767).round().to(torch.int16).contiguous().numpy()
    return base64.b64encode(values.astype("<i2").tobytes()).decode()


# ---- text


def _kept(f: Findings) -> dict[str, Any]:
    """The numbers of the page, for programs."""
    head, each = verdict(f)
    return {
        "title": f.title,
        "about": dict(f.about),
        "verdict": [head, *each],
        "labelled": {k: t.to_json() for k, t in f.labelled.items()},
        "label_free": None if f.label_free is None else f.label_free.to_json(),
        "redundancy": None if f.shared is None else f.shared.to_json(),
        "geometry": {s: {k: v if finite(v) else None for k, v in row.items()} for s, row in f.geometry.items()},
        "reasons": f.reasons,
    }


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _number(value: float) -> str:
    return "n/a" if not math.isfinite(value) else f"{value:.2f}".replace("-0.00", "0.00")


def _na(why: str) -> str:
    return f'<p class="na">n/a: {escape(why)}</p>'
