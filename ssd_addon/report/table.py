"""A `ScoreTable` as HTML."""

import math
from collections.abc import Sequence

from ssd_addon.metrics import Exclusivity, ScoreTable
from ssd_addon.report.text import html, name
from ssd_addon.report.verdict import p_value, short, tested


def score_table(
    t: ScoreTable, *, across: str, corner: str, spaces: Sequence[str] = (), tests: Exclusivity | None = None
) -> str:
    """A table of scores as HTML, shaded by score, with intervals and a caption.

    Args:
        t: what is shown.
        across: what its columns are, "parameter" for those of groups of augmentations.
        corner: what its rows are.
        spaces: the rows that are spaces of the model; others are set in italics, and the cell of a space and its own
            group is outlined.
        tests: what is said below the interval of a cell that was tested: p, and the effect.
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
            if (test := tested(tests, space, factor)) is not None:
                small += f"<small>{p_value(test.corrected)}, partial R² {number(test.effect)}</small>"
            classes = "heat own" if own else "heat"
            cells.append(f'<td class="{classes}" style="--v:{v:.3f}" title="{html(cell)}">{number(value)}{small}</td>')
        other = "" if space in spaces or not spaces else ' class="other"'
        rows.append(f'<tr{other}><th scope="row">{short_name(space)}</th>{"".join(cells)}</tr>')
    below = ", below it the 95 % interval" if t.intervals else ""
    caption = f"{t.probe} probe, fitted on n = {t.n_train} {t.unit}, scored on n = {t.n_test} held out{below}"
    if tests is not None:
        below += ", and the test of whether the space depends on it given its own: p, corrected, and partial R²"
    notes = dict.fromkeys(f"{factor}: {note}" for (_, factor), note in t.notes.items() if note != "itself")
    head = f'<tr><th scope="col">{html(corner)}<small>by {across}</small></th>{"".join(heads)}</tr>'
    return (
        f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>\n'
        f'<p class="key"><span>0 <i></i> 1</span> <span>{html(caption)}</span></p>'
        + "".join(f'<p class="note">{html(note)}</p>' for note in notes)
    )


def short_name(value: str) -> str:
    """A name in the head of a row or a column; the cells' titles have it whole."""
    return html(name(value, 60))


def number(value: float) -> str:
    """Two decimals, or n/a."""
    return "n/a" if not math.isfinite(value) else f"{value:.2f}".replace("-0.00", "0.00")
