"""Findings to one self-contained HTML page: no server, no network, light and dark, phone and desktop, print."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ssd_addon.metrics import Exclusivity, ScoreTable
from ssd_addon.metrics.embed import BACKBONE
from ssd_addon.report.advice import advice, advice_section
from ssd_addon.report.curves import finite, panel
from ssd_addon.report.data import Data
from ssd_addon.report.document import document
from ssd_addon.report.findings import Findings
from ssd_addon.report.legend import legend
from ssd_addon.report.pictures import explorer_section, views_section
from ssd_addon.report.table import number, score_table, short_name
from ssd_addon.report.text import html
from ssd_addon.report.verdict import verdict

LIMIT = 10_000_000
"""Bytes that a page may have."""


def render(f: Findings, data: Data) -> str:
    """The page, in text that can be encoded whatever the names in it hold."""
    head, each = verdict(f)
    sections = [
        _verdict(f, head, each),
        _label_free(f),
        _labelled(f),
        _curves(f),
        views_section(f) if f.spaces else "",  # a model without spaces was not trained by these pairs
        explorer_section(f, data),
        _numbers(f),
    ]
    title = f"{f.title or 'ssd_addon'}: {_subject(f)}"
    return document(title, [s for s in sections if s], _kept(f))


def _subject(f: Findings) -> str:
    return "what each space encodes" if f.spaces else "what the features encode"


def _verdict(f: Findings, head: str, each: Sequence[str]) -> str:
    facts = "".join(f"<span>{html(k)} <b>{html(v)}</b></span>" for k, v in f.about)
    listed = "".join(f"<li>{html(s)}</li>" for s in each)
    return (
        f"<header>\n<h1>{html(f.title or _subject(f).capitalize())}</h1>\n"
        f'<p class="verdict" id="verdict">{html(head)}</p>\n'
        + (f'<ul class="each">{listed}</ul>\n' if listed else "")
        + f'{advice_section(advice(f))}\n<p class="about">{facts}</p>\n</header>'
    )


# ---- matrices


def _label_free(f: Findings) -> str:
    verb = "does each space" if f.spaces else "do the features"
    out = ["<section>", f"<h2>Which augmentations {verb} encode? (no labels needed)</h2>"]
    if f.label_free is None:
        return "\n".join([*out, _na(f.reasons.get("label-free matrix", "")), "</section>"])
    text = (
        "Two views of each image are drawn independently. From their "
        f"{'embeddings in one space' if f.spaces else 'features'}, a probe predicts by how much the parameters of each "
        "group of augmentations differ."
    )
    if any(s in f.label_free.factors for s in f.spaces):
        text += " A style space should encode its own group (outlined) and no other"
        text += "; the content space should encode none." if "content" in f.spaces else "."
    out += [f"<p>{text}</p>", _beside(f, f.label_free, f.tests, across="group of augmentations")]
    if "exclusivity of augmentations" in f.reasons:
        out.append(_na(f"the test for leaks: {f.reasons['exclusivity of augmentations']}"))
    if f.label_free.parts is not None:
        out += ["<h3>By parameter</h3>", _scores(f.label_free.parts, f, across="parameter", tests=f.tests)]
    return "\n".join([*out, "</section>"])


def _labelled(f: Findings) -> str:
    whose = "each space" if f.spaces else "the features"
    out = ["<section>", f"<h2>Which known factors can be decoded from {whose}?</h2>"]
    if not f.labelled:
        why = [f.reasons[k] for k in f.reasons if k.startswith("known factors")]
        out.append(_na("; ".join(dict.fromkeys(why))))
    called = {"ridge": "By a linear probe", "kernel": "By a kernel probe, which finds nonlinear codes too"}
    for probe, table in f.labelled.items():
        shown = _scores(table, f, across="factor", tests=f.exclusive)
        if f.label_free is None and probe == next(iter(f.labelled)):
            shown = _beside(f, table, f.exclusive, across="factor")
        out += [f"<h3>{called[probe]}</h3>", shown]
    if "exclusivity of known factors" in f.reasons:
        out.append(_na(f"the test for leaks: {f.reasons['exclusivity of known factors']}"))
    if f.labelled:
        text = (
            "For classes, the score is not R² but the accuracy on held-out images, rescaled: 0 is always answering the "
            "most frequent class of the training images, 1 is always being right."
        )
        if f.spaces and f.exclusive is None and "exclusivity of known factors" not in f.reasons:
            text += (
                " Which factors belong into which space is not known here (in Python: report.write(..., own=...)), so "
                "a factor that several spaces encode is named, and none is tested for a leak."
            )
        out.append(f'<p class="note">{text}</p>')
    return "\n".join([*out, "</section>"])


def _beside(f: Findings, t: ScoreTable, tests: Exclusivity | None, *, across: str) -> str:
    """The first matrix of the page, and beside it how it is read."""
    how = legend(spaces=bool(f.spaces), backbone=BACKBONE in t.spaces, tests=f.tests or f.exclusive)
    return f'<div class="beside"><div>{_scores(t, f, across=across, tests=tests)}</div>{how}</div>'


def _scores(t: ScoreTable, f: Findings, *, across: str, what: str = "Space", tests: Exclusivity | None = None) -> str:
    return score_table(t, across=across, corner=what if f.spaces else "Features", spaces=f.spaces, tests=tests)


def _numbers(f: Findings) -> str:
    out = ["<section>", "<h2>More numbers</h2>"]
    if f.geometry:
        out.append("<h3>Geometry of the embeddings</h3>" + _geometry_table(f))
    elif "geometry" in f.reasons:
        out.append("<h3>Geometry of the embeddings</h3>" + _na(f.reasons["geometry"]))
    if f.shared is not None:
        out.append("<h3>Redundancy</h3><p>How well one space (row) predicts another (column). 0 is best.</p>")
        out.append(_scores(f.shared, f, what="From space", across="predicted space"))
    elif "redundancy" in f.reasons:
        out.append("<h3>Redundancy</h3>" + _na(f.reasons["redundancy"]))
    why = [f"{part}: {f.reasons[part]}" for part in ("DCI", "SAP gap", "MIG") if part in f.reasons]
    if f.summary is not None:
        d = f.summary.dci
        cells = {
            "disentanglement": math.nan if d is None else d.disentanglement,
            "completeness": math.nan if d is None else d.completeness,
            "informativeness": math.nan if d is None else d.informativeness,
            "SAP gap": f.summary.sap,
            "MIG": f.summary.mig,
        }
        items = " &nbsp; ".join(f"{html(k)} <b>{number(v)}</b>" for k, v in cells.items())
        notes = "; ".join([*why, *(f"{k}: {v}" for k, v in (d.notes if d is not None else {}).items())])
        out.append(f"<h3>Summary of the labeled matrix</h3><p>{items}</p>")
        out.append(
            f'<p class="note">Each space is one code; linear probes predict one factor at a time. {html(notes)}</p>'
        )
    elif why:
        out.append("<h3>Summary of the labeled matrix</h3>" + _na("; ".join(why)))
    return "\n".join([*out, "</section>"]) if len(out) > 2 else ""


def _geometry_table(f: Findings) -> str:
    names = {
        "effective_rank": "effective rank<small>directions in use</small>",
        "uniformity": "uniformity<small>lower is more even</small>",
        "alignment": "alignment<small>of positive pairs, 0 is perfect</small>",
    }
    if not f.spaces:
        del names["alignment"]  # it has no pairs of its own
    head = "".join(f'<th scope="col">{n}</th>' for n in names.values())
    rows = "".join(
        f'<tr><th scope="row">{short_name(s)}</th>' + "".join(f"<td>{number(row[k])}</td>" for k in names) + "</tr>"
        for s, row in f.geometry.items()
    )
    corner = "Space" if f.spaces else "Features"
    notes = (f"{s}: {f.reasons[part]}" for s in f.geometry if (part := f"geometry of {s}") in f.reasons)
    return (
        f'<div class="wide"><table><thead><tr><th scope="col">{corner}</th>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    ) + "".join(f'<p class="note">n/a for {html(note)}</p>' for note in notes)


# ---- curves


def _curves(f: Findings) -> str:
    steps = [e for e in f.log if isinstance(e, Mapping) and finite(e.get("step"))]
    out = ["<section>", "<h2>Training curves</h2>"]
    panels = [
        ("constraint/", "misalignment of positive pairs", "0 is perfect"),
        ("effective_rank/", "effective rank", "directions in use; 1 is collapsed"),
        ("parameters/", "own augmentation group", "R², without labels"),
        ("lambda/", "weight of the invariance", "λ"),
    ]
    alarms = _alarms(steps)
    marks = [step for step, _ in alarms]
    drawn = []
    if loss := _points(steps, "loss"):
        drawn.append(panel("loss", "", {6: loss}, marks))
    shown: set[int] = set()
    for prefix, title, unit in panels:
        keys = [f"{prefix}{s}/{s}" if prefix == "parameters/" else f"{prefix}{s}" for s in f.spaces]
        series = {k: points for k, key in enumerate(keys) if (points := _points(steps, key))}
        if series:
            drawn.append(panel(title, unit, series, marks))
            shown |= series.keys()
    if not drawn:
        out.append(_na("there is no log.jsonl beside the checkpoint" if not f.log else "the log has no values to draw"))
    else:
        legend = "".join(
            f'<li><i style="background:var(--s{k % 6})"></i>{html(f.spaces[k])}</li>' for k in sorted(shown)
        )
        out += [f'<ul class="legend">{legend}</ul>' if legend else "", f'<div class="plots">{"".join(drawn)}</div>']
    if alarms:
        said = "".join(f"<li>step {step:g}: {html(text)}</li>" for step, text in alarms)
        out.append(
            f'<p class="note">Dashed lines mark the messages of the collapse alarm.</p><ul class="alarms">{said}</ul>'
        )
    return "\n".join([*out, "</section>"])


def _alarms(entries: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """(step, sentence) of what `CollapseAlarm` said while the run went on."""
    events = [event for e in entries if isinstance(said := e.get("alarm"), list) for event in said]
    found = [(e.get("step"), e.get("text")) for e in events if isinstance(e, Mapping)]
    return [(float(step), text) for step, text in found if finite(step) and isinstance(text, str)]


def _points(entries: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the entries in which the value is a number that can be drawn."""
    return [(float(e["step"]), float(e[key])) for e in entries if finite(e.get(key))]


# ---- text


def _kept(f: Findings) -> dict[str, Any]:
    """The numbers of the page, for programs."""
    head, each = verdict(f)
    return {
        "title": str(f.title),
        "about": {str(k): str(v) for k, v in f.about},
        "verdict": [head, *each],
        "labelled": {k: t.to_json() for k, t in f.labelled.items()},
        "label_free": None if f.label_free is None else f.label_free.to_json(),
        "exclusivity": {
            "label_free": None if f.tests is None else f.tests.to_json(),
            "labelled": None if f.exclusive is None else f.exclusive.to_json(),
        },
        "redundancy": None if f.shared is None else f.shared.to_json(),
        "geometry": {s: {k: v if finite(v) else None for k, v in row.items()} for s, row in f.geometry.items()},
        "reasons": f.reasons,
        "pictures": "" if f.display is None else f.display.text,
    }


def _na(why: str) -> str:
    return f'<p class="na">n/a: {html(why)}</p>'
