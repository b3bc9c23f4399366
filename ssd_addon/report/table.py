"""A `ScoreTable` as HTML."""

import math
from collections.abc import Sequence

from ssd_addon.metrics import Exclusivity, ScoreTable
from ssd_addon.metrics.embed import BACKBONE
from ssd_addon.report.readings import p_value, short, tested
from ssd_addon.report.text import html, name

_PROBES = {"ridge": "linear probe", "kernel": "kernel probe"}


def score_table(
    t: ScoreTable, *, across: str, corner: str, spaces: Sequence[str] = (), tests: Exclusivity | None = None
) -> str:
    """A table of scores as HTML, shaded by score, with intervals and a caption.

    Args:
        t: what is shown.
        across: what its columns are, "parameter" for those of groups of augmentations.
        corner: what its rows are.
        spaces: the rows that are spaces of the model; others are set in italics. The cell of a space and its own group
            is outlined, and has the backbone's score below its own.
        tests: p and the effect, for the cells that were tested.
    """
    heads = []
    for factor in t.factors:
        group = factor.rsplit("/", 2)[0]
        heads.append(
            f'<th scope="col">{short_name(short(factor))}<small>{short_name(group)}</small></th>'
            if group != factor and across == "parameter"
            else f'<th scope="col">{short_name(factor)}</th>'
        )
    rows = []
    for space in t.spaces:
        cells = []
        for factor in t.factors:
            value = t[space, factor]
            own = (
                space in spaces
                and space in (factor, factor.rsplit("/", 2)[0])
                and across in ("group of augmentations", "parameter")
            )
            cell = f"{space}, {factor}"
            if math.isnan(value):
                why = t.notes.get((space, factor), "no score")
                cells.append(f'<td class="none" title="{html(f"{cell}: {why}")}">n/a</td>')
                continue
            v = min(1.0, max(0.0, value))
            interval = t.intervals.get((space, factor))
            small = f"<small>{number(interval[0])} to {number(interval[1])}</small>" if interval else ""
            if own and BACKBONE in t.spaces and not math.isnan(back := t[BACKBONE, factor]):
                small += f"<small>backbone {number(back)}</small>"
            if (test := tested(tests, space, factor)) is not None:
                leak = tests is not None and tests.is_leak(space, factor)
                effect = test.effect if leak else math.floor(test.effect * 100 + 1e-9) / 100  # below the limit as shown
                small += f"<small>{p_value(test.corrected)}, partial R² {number(effect)}</small>"
                small += "<small><b>leak</b></small>" if leak else ""
            classes = f"heat{' own' if own else ''}"
            cells.append(f'<td class="{classes}" style="--v:{v:.3f}" title="{html(cell)}">{number(value)}{small}</td>')
        other = "" if space in spaces or not spaces else ' class="other"'
        rows.append(f'<tr{other}><th scope="row">{short_name(space)}</th>{"".join(cells)}</tr>')
    below = ["the 95 % interval"] if t.intervals else []
    below += ["the test for a leak: p, and partial R²"] if tests is not None else []
    caption = f"{_PROBES.get(t.probe, t.probe)}, fitted on n = {t.n_train} {t.unit}, scored on n = {t.n_test} others"
    caption += f"; below each score {' and '.join(below)}" if below else ""
    notes = dict.fromkeys(f"{factor}: {note}" for (_, factor), note in t.notes.items() if note != "itself")
    head = f'<tr><th scope="col">{html(corner)}<small>by {across}</small></th>{"".join(heads)}</tr>'
    return (
        f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>\n'
        f'<p class="key"><span>0 <i></i> 1</span> <span>{html(caption)}</span></p>'
        + (f'<p class="note">{html("; ".join(notes))}</p>' if notes else "")
    )


def short_name(value: str) -> str:
    """A name in the head of a row or a column; the cells' titles have it whole."""
    return html(name(value, 60))


def number(value: float) -> str:
    """Two decimals, or n/a."""
    return "n/a" if not math.isfinite(value) else f"{value:.2f}".replace("-0.00", "0.00")
