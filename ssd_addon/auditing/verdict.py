"""What an audit shows, in words: what the features encode, what is lost after which layer, and what to try."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ssd_addon.auditing.measure import Audited
from ssd_addon.metrics import ScoreTable
from ssd_addon.report.advice import LAYERS, MEASURED, RECIPE, Section
from ssd_addon.report.readings import ENCODES, TRACE, parameters_of, plural, short, sure

NOWHERE, AT_ONCE, UNCLEAR = "nowhere", "after the pixels", "unclear"


@dataclass(frozen=True)
class Course:
    """How well one parameter can be decoded on its way through a backbone; a score not above 0 beyond chance is 0.

    Attributes:
        name: of the parameter, for people.
        key: (table's factor).
        features: score of the backbone's features.
        untrained: mean of the untrained copies' scores.
        by_layer: "pixels" and layer -> score.
        lost: whether the interval of the features lies below those of all untrained copies; gained: above.
        above: "pixels" and layers whose interval lies above that of the features.
        shown: "pixels", layer, "backbone" and "untrained" -> the score as the table has it.
    """

    name: str
    key: str
    features: float
    untrained: float
    by_layer: dict[str, float]
    lost: bool
    gained: bool
    above: tuple[str, ...]
    shown: dict[str, float]

    @property
    def state(self) -> str:
        """ "encoded", "weak", "after LAYER", AT_ONCE (after the pixels), NOWHERE or UNCLEAR.

        LAYER is the last that encodes it and whose interval lies above that of the features. NOWHERE: no row encodes
        it. UNCLEAR: a row before the features does, but the intervals overlap.
        """
        if self.features >= ENCODES:
            return "encoded"
        if self.features >= TRACE:
            return "weak"
        held = [layer for layer, score in self.by_layer.items() if score >= TRACE]
        if not held:
            return NOWHERE
        held = [layer for layer in held if layer in self.above]
        if not held:
            return UNCLEAR
        return AT_ONCE if held == ["pixels"] else f"after {held[-1]}"

    def said(self) -> str:
        """The features' score as the table has it; with a remark where it is read as nothing although it looks like
        something."""
        score = self.shown["backbone"]
        return number(score) + (", with an interval that includes 0" if score >= TRACE > self.features else "")


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
            before = {row: table.intervals.get((row, p), (math.nan, math.nan))[0] for row in by_layer}
            above = tuple(row for row, x in before.items() if not x <= high)  # without intervals the scores decide
            features, fresh = sure(table, "backbone", p), max(0.0, table["untrained", p])
            shown = {row: table[row, p] for row in (*by_layer, "backbone", "untrained")}
            lost, gained = high < other_low, low > other_high
            out.append(Course(name, p, features, fresh, by_layer, lost, gained, above, shown))
    twice = {c.name for c in out if sum(d.name == c.name for d in out) > 1}
    return [replace(c, name=f"{c.key.split('/')[0]}'s {c.name}") if c.name in twice else c for c in out]


def headline(a: Audited) -> str:
    """What the features encode, and what is lost on the way to them."""
    each = courses(a)
    if not each:
        return "No parameter of these augmentations varies, so there is nothing to decode."
    kept = sorted((c for c in each if c.state == "encoded"), key=lambda c: -c.features)
    weak = sorted((c for c in each if c.state == "weak"), key=lambda c: -c.features)
    if kept:
        head = f"The features encode {_scored(kept)}{f', and weakly {_scored(weak)}' if weak else ''}."
    elif weak:
        head = f"The features encode only weakly {_scored(weak)}."
    else:
        head = "The features encode none of these augmentations."
    gone = [c for c in each if c.state.startswith("after ")]
    anyway = [c for c in gone if not c.lost and c.untrained < TRACE]
    way, both = "Lost on the way", "Lost on the way in untrained copies too"
    for said, those in ((way, [c for c in gone if c not in anyway]), (both, anyway)):
        states = dict.fromkeys(c.state for c in those)
        lost = [f"{listed([c.name for c in those if c.state == state])} ({state})" for state in states]
        head += f" {said}: {'; '.join(lost)}." if lost else ""
    return head


def advice(a: Audited) -> list[tuple[str, Section]]:
    """One sentence for each kind of problem, and where the documentation says more."""
    each, out = courses(a), []
    if earlier := [c.name for c in each if c.state.startswith("after ") and c.state != AT_ONCE]:
        text = (
            f"From an earlier layer, {listed(earlier)} can still be decoded: style heads that read several layers can "
            "use this without training the backbone again."
        )
        out.append((text, LAYERS))
    if wanted := [c.name for c in each if c.state in ("weak", AT_ONCE) or (c.state == "encoded" and c.lost)]:
        them = "them" if plural(wanted) else "it"
        text = f"To keep more of {listed(wanted)}, train with a style space for the augmentations that change {them}."
        out.append((text, RECIPE))
    if nowhere := [c.name for c in each if c.state in (NOWHERE, UNCLEAR)]:
        about = f"Before you conclude anything about {listed(nowhere)}"
        out.append((f"{about}, take more images or more pairs of views (--draws 4).", MEASURED))
    return out


def sentences(a: Audited) -> list[str]:
    """That no weights were given; what not even the pixels show, how the features compare with those of untrained
    copies, and class accuracy."""
    each, out = courses(a), ["No weights were given: this network is untrained."] if a.untrained else []
    lost = [c for c in each if c.lost and c.untrained >= TRACE]
    gained = [c for c in each if c.gained and c.features >= TRACE]

    def beside(c: Course) -> str:
        return f"{c.name} ({c.said()} against {number(c.shown['untrained'])})"

    def doubted(c: Course) -> str:
        return f"{c.name} ({c.said()})" if c.shown["backbone"] >= TRACE else c.name

    if nowhere := [doubted(c) for c in each if c.state == NOWHERE]:
        out.append(f"Cannot be decoded, not even from the pixels: {listed(nowhere)}.")
    if unclear := [doubted(c) for c in each if c.state == UNCLEAR]:
        out.append(
            f"Hardly decoded from the features, but not shown to be lost, as intervals overlap: {listed(unclear)}."
        )
    if lost:
        out.append(f"Harder to decode than from untrained copies: {listed([beside(c) for c in lost])}.")
    if gained:
        out.append(f"Easier to decode than from untrained copies: {listed([beside(c) for c in gained])}.")
    if each and not lost and not gained:
        some = any(c.lost or c.gained for c in each)
        which = f"parameter with R² of {TRACE} or more" if some else "parameter"
        why = "" if some else ": the intervals overlap"
        out.append(f"Compared with untrained copies, no {which} is easier or harder to decode{why}.")
    if a.accuracy is not None:
        t = a.accuracy
        rows = ", ".join(f"{r} {number(t[r, f])}" for f in t.factors[:1] for r in ("backbone", "untrained", "pixels"))
        out.append(
            f"Class accuracy of a linear probe: {rows}. Of k nearest neighbors: backbone "
            f"{number(t['backbone', 'k-NN'])}."
        )
    return out


def compared(a: Audited, b: Audited) -> list[str]:
    """What two backbones keep differently: parameters whose intervals do not overlap."""
    ours, theirs = {c.key: c for c in courses(a)}, {c.key: c for c in courses(b)}
    out, apart = [], False
    for more, less, first, other in ((a, b, ours, theirs), (b, a, theirs, ours)):
        found = []
        for key, c in first.items():
            if key not in other or not _interval(more.table, key)[0] > _interval(less.table, key)[1]:
                continue
            apart = True
            if c.features >= TRACE:
                found.append(f"{c.name} ({c.said()} against {other[key].said()})")
        if found:
            out.append(f"{more.name} encodes {listed(found)} better than {less.name}.")
    which = f"parameter with R² of {TRACE} or more" if apart else "parameter"
    why = "" if apart else ": all 95 % intervals overlap"
    return out or [f"No {which} is encoded better by {a.name} or by {b.name}{why}."]


def _interval(table: ScoreTable, key: str) -> tuple[float, float]:
    own = table.parts if table.parts is not None and ("backbone", key) in table.parts.scores else table
    return own.intervals.get(("backbone", key), (math.nan, math.nan))


def _scored(each: Sequence[Course]) -> str:
    first, *rest = each
    return listed([f"{first.name} (R² = {first.said()})", *(f"{c.name} ({c.said()})" for c in rest)])


def listed(items: Sequence[str]) -> str:
    """ "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def number(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")
