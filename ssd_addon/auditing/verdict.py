"""What an audit shows, in words: what is gone, after which layer, what was never there and what survives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ssd_addon.auditing.measure import Audited
from ssd_addon.metrics import ScoreTable
from ssd_addon.report.readings import ENCODES, TRACE, parameters_of, plural, short, sure

NOWHERE, AT_ONCE = "nowhere", "at once"


@dataclass(frozen=True)
class Course:
    """How well one parameter can be decoded on its way through a backbone; a score not above 0 beyond chance is 0.

    Attributes:
        name: of the parameter, for people.
        key: (table's factor).
        features: score of the backbone's features.
        untrained: of an untrained copy's.
        by_layer: "pixels" and layer -> score.
        lost: whether the interval of the features lies below that of the untrained copy; gained: above.
    """

    name: str
    key: str
    features: float
    untrained: float
    by_layer: dict[str, float]
    lost: bool
    gained: bool

    @property
    def state(self) -> str:
        """ "survives", "weak", "after LAYER" (the last that encodes it), AT_ONCE (the pixels alone do) or NOWHERE."""
        if self.features >= ENCODES:
            return "survives"
        if self.features >= TRACE:
            return "weak"
        held = [layer for layer, score in self.by_layer.items() if score >= TRACE]
        if not held:
            return NOWHERE
        return AT_ONCE if held == ["pixels"] else f"after {held[-1]}"


def courses(a: Audited) -> list[Course]:
    """Every parameter that could be scored, in the order of the table."""
    out = []
    for group in a.table.factors:
        table, parameters = parameters_of(a.table, group)
        names = [short(p) for p in parameters]
        for p, name in zip(parameters, names, strict=True):
            if math.isnan(table["backbone", p]):
                continue
            low, high = table.intervals.get(("backbone", p), (math.nan, math.nan))
            other_low, other_high = table.intervals.get(("untrained", p), (math.nan, math.nan))
            by_layer = {row: sure(table, row, p) for row in ("pixels", *a.layers)}
            features, fresh = sure(table, "backbone", p), sure(table, "untrained", p)
            out.append(Course(name, p, features, fresh, by_layer, high < other_low, low > other_high))
    twice = {c.name for c in out if sum(d.name == c.name for d in out) > 1}
    return [Course(f"{c.key.split('/')[0]}'s {c.name}", *_rest(c)) if c.name in twice else c for c in out]


def _rest(c: Course) -> tuple[str, float, float, dict[str, float], bool, bool]:
    return c.key, c.features, c.untrained, c.by_layer, c.lost, c.gained


def headline(a: Audited) -> str:
    """One sentence: what is gone, what was never there, what is weak and what survives."""
    each = courses(a)
    if not each:
        return "No parameter of these augmentations varies, so nothing can be said of what the features keep."
    parts = []
    for state in dict.fromkeys(c.state for c in each if c.state.startswith("after ")):
        gone = [c.name for c in each if c.state == state]
        parts.append(f"{listed(gone)} {'are' if _plural(gone) else 'is'} gone {state}")
    where = "in any layer" if a.layers else "in the features"
    if at_once := [c.name for c in each if c.state == AT_ONCE]:
        parts.append(f"{listed(at_once)} can be decoded from the pixels, but not {where}")
    if weak := sorted((c for c in each if c.state == "weak"), key=lambda c: -c.features):
        parts.append(f"{_scored(weak)} {'are' if _plural([c.name for c in weak]) else 'is'} only weakly encoded")
    if kept := sorted((c for c in each if c.state == "survives"), key=lambda c: -c.features):
        parts.append(f"{_scored(kept)} survive{'' if _plural([c.name for c in kept]) else 's'}")
    if nowhere := [c.name for c in each if c.state == NOWHERE]:
        parts.append(f"{listed(nowhere)} cannot be decoded {where}, nor from the pixels")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def sentences(a: Audited) -> list[str]:
    """What training did, beside an untrained copy, and class accuracy."""
    each, out = courses(a), []
    lost = [c for c in each if c.lost and c.untrained >= TRACE]
    gained = [c for c in each if c.gained and c.features >= TRACE]

    def beside(c: Course) -> str:
        return f"{c.name} ({number(c.features)} against {number(c.untrained)})"

    if lost:
        out.append(f"Decoded worse than from an untrained copy: {listed([beside(c) for c in lost])}.")
    if gained:
        out.append(f"Decoded better than from an untrained copy: {listed([beside(c) for c in gained])}.")
    if each and not lost and not gained:
        out.append("No parameter differs from an untrained copy by more than the 95 % intervals allow.")
    if a.accuracy is not None:
        t = a.accuracy
        rows = ", ".join(f"{r} {number(t[r, f])}" for f in t.factors[:1] for r in ("backbone", "untrained", "pixels"))
        out.append(
            f"Class accuracy of a linear probe: {rows}; of k-NN on the features: {number(t['backbone', 'k-NN'])}."
        )
    return out


def compared(a: Audited, b: Audited) -> list[str]:
    """What two backbones keep differently: parameters whose intervals do not overlap."""
    ours, theirs = {c.key: c for c in courses(a)}, {c.key: c for c in courses(b)}
    out = []
    for more, less, first, other in ((a, b, ours, theirs), (b, a, theirs, ours)):
        found = []
        for key, c in first.items():
            if key not in other or c.features < TRACE:
                continue
            low = _interval(more.table, key)[0]
            if low > _interval(less.table, key)[1]:
                found.append(f"{c.name} ({number(c.features)} against {number(other[key].features)})")
        if found:
            out.append(f"{more.name} keeps more than {less.name} of {listed(found)}.")
    return out or [f"{a.name} and {b.name} keep equally much, as far as the 95 % intervals tell."]


def _interval(table: ScoreTable, key: str) -> tuple[float, float]:
    own = table.parts if table.parts is not None and ("backbone", key) in table.parts.scores else table
    return own.intervals.get(("backbone", key), (math.nan, math.nan))


def _plural(names: Sequence[str]) -> bool:
    """Whether a verb after these names of parameters is plural: several of them, or such as "translations"."""
    one = names[0]
    return len(names) > 1 or (one.endswith("s") and not one.endswith("ss")) or " and " in one


def _scored(each: Sequence[Course]) -> str:
    first, *rest = each
    return listed(
        [f"{first.name} (R² = {number(first.features)})", *(f"{c.name} ({number(c.features)})" for c in rest)]
    )


def listed(items: Sequence[str]) -> str:
    """ "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def number(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")
