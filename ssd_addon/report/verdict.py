"""What the matrices show, in words: a headline that claims no more than they do, and a sentence for each space."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ssd_addon.metrics import Dependence, Exclusivity, ScoreTable
from ssd_addon.metrics.embed import BACKBONE
from ssd_addon.report.findings import Findings

ENCODES, TRACE = 0.5, 0.1
"""A score from which a space is said to encode something, and below which it is not; between them it does so weakly.

What leaks is decided by the tests of `Findings.tests`, and by TRACE where there are none.
"""
DISENTANGLED = "Disentangled: each style space encodes its own augmentation group and no other."
MOST = 6
"""Factors that a sentence names."""


@dataclass(frozen=True, order=True)
class Reading:
    """How well something can be decoded from a space; a score that is not above 0 beyond chance is 0.

    Of what a test decided, the score is its effect, and p its corrected p-value. `leak`: it is not the space's own.
    """

    score: float
    name: str
    own: bool = False
    p: float | None = field(default=None, compare=False)
    leak: bool = field(default=False, compare=False)


def verdict(f: Findings) -> tuple[str, list[str]]:
    """A headline, and one sentence for each space."""
    if not f.spaces:
        return _of_features(f)
    readings = {space: _readings(f.label_free, space, f.tests) for space in f.spaces}
    factors = {space: _factors(f, space) for space in f.spaces}
    if any(readings.values()):
        return _headline(f, readings), [_sentence(s, f, readings[s], factors[s]) for s in f.spaces]
    if not f.labelled and f.exclusive is None:
        return "What the spaces encode could not be measured.", []
    each = [
        f"{_listed(r)} can be decoded from {s}." if r else f"None can be decoded from {s}." for s, r in factors.items()
    ]
    if f.exclusive is not None:
        return _named_leaks(f, readings) or "No known factor leaks; which augmentations are encoded is not known.", each
    return "Which augmentations the spaces encode was not measured; of the known factors:", each


def short(parameter: str) -> str:
    """ "color/0.ColorJitter/hue_factor" -> "hue"."""
    parts = parameter.rsplit("/", 2)
    if len(parts) < 3:
        return parameter
    op, name = parts[1].split(".")[-1].removeprefix("Random"), parts[2]
    if name == "batch_prob":
        return f"{op} on or off"
    if name == "src":
        return f"{op} place and size"
    return name.removesuffix("_factor").replace("_", " ")


# ---- models with spaces


def _headline(f: Findings, readings: dict[str, list[Reading]]) -> str:
    if named := _named_leaks(f, readings):
        return named
    doubts = _doubts(f, readings)
    return f"No augmentation group leaks, but {'; '.join(doubts)}." if doubts else DISENTANGLED


def _named_leaks(f: Findings, readings: dict[str, list[Reading]]) -> str:
    """What the spaces encode that is not their own; "" where nothing leaks."""
    leaks = {s: [r for r in each if r.leak] for s, each in readings.items()}
    for space, factor in f.exclusive.leaks if f.exclusive is not None else ():
        assert f.exclusive is not None
        test = f.exclusive[space, factor]
        leaks[space].append(Reading(test.effect, factor, p=test.corrected, leak=True))
    leaks = {s: sorted(each, reverse=True) for s, each in leaks.items()}
    worst = sorted((s for s in leaks if leaks[s]), key=lambda s: -leaks[s][0].score)
    verbs = {s: "also encodes" if any(r.own for r in readings[s]) else "encodes" for s in worst}
    return f"Not disentangled: {'; '.join(f'{s} {verbs[s]} {_listed(leaks[s])}' for s in worst)}." if worst else ""


def _doubts(f: Findings, readings: dict[str, list[Reading]]) -> list[str]:
    """What keeps a model whose groups do not leak from being called disentangled."""
    t = f.label_free
    assert t is not None
    styles = [s for s in f.spaces if s != "content"]
    out = []
    if nameless := [g for g in t.factors if g not in f.spaces]:
        kept = "it is" if len(nameless) == 1 else "they are"
        out.append(f"no space is named after {_names(nameless)}, so whether {kept} kept is not known")
    if unscored := [g for g in t.factors if all(math.isnan(t[s, g]) for s in f.spaces)]:
        out.append(f"{_names(unscored)} could not be scored")
    if groupless := [s for s in styles if s not in t.factors]:
        out.append(f"{_names(groupless)} {'has' if len(groupless) == 1 else 'have'} no augmentation group")
    for s in styles:
        score = sure(t, s, s) if s in t.factors and not math.isnan(t[s, s]) else math.nan
        if score < ENCODES:
            partly = any(r.own and r.score >= TRACE for r in readings[s])
            what = "encodes its own group only in part" if partly else "does not encode its own group"
            out.append(f"{s} {what} ({_r2(score)} on average)")
    shared = _shared(f)
    out += [f"{factor} can be decoded from {_listed(held, 'from ')}" for factor, held in list(shared.items())[:MOST]]
    return [*out, f"{len(shared) - MOST} more factors from several spaces"] if len(shared) > MOST else out


def _shared(f: Findings) -> dict[str, list[Reading]]:
    """Known factors that a style space encodes although another space encodes them better, and the spaces that do."""
    table = f.labelled.get("ridge")
    if table is None or f.exclusive is not None:  # which decides it by tests
        return {}
    out = {}
    for factor in table.factors:
        held = sorted((Reading(sure(table, s, factor), s) for s in f.spaces if s in table.spaces), reverse=True)
        best, *others = [r for r in held if r.score >= TRACE] or held[:1]
        if any(r.name != "content" for r in others):
            out[factor] = [best, *others]
    return out


def _sentence(space: str, f: Findings, readings: Sequence[Reading], factors: Sequence[Reading]) -> str:
    """What one space encodes."""
    own = sorted((r for r in readings if r.own), reverse=True)
    other = sorted((r for r in readings if r.leak), reverse=True)
    held, weak = [r for r in own if r.score >= ENCODES], [r for r in own if TRACE <= r.score < ENCODES]
    style = f.label_free is not None and space in f.label_free.factors
    if held or weak:
        parts = [f"{space} encodes {_listed(held)}" if held else f"{space} weakly encodes {_listed(weak)}"]
        if held and weak:
            parts.append(f"weakly {_listed(weak)}")
        text = ", ".join([*parts, f"but also {_listed(other)}" if other else "and no parameter of another group"])
    elif style and own:
        text = f"{space} does not encode its own group{f', but {_listed(other)}' if other else ', nor any other'}"
    else:
        text = f"{space} encodes {_listed(other) if other else 'no augmentation group'}"
        if style:
            text += "; its own group could not be scored"
    if factors:
        text += f"; of the known factors, {_listed(factors)} can be decoded from it"
    return f"{text}."


def _readings(t: ScoreTable | None, space: str, tests: Exclusivity | None) -> list[Reading]:
    """Of the space's own group every parameter that can be scored, of another the one that leaks most.

    A group leaks through any of its parameters: by the test, or where there is none by a score of 0.1.
    """
    if t is None or space not in t.spaces:
        return []
    out = []
    for group in t.factors:
        table, parameters = parameters_of(t, group)
        scored = [p for p in parameters if not math.isnan(table[space, p])]
        if group == space:
            out += [Reading(sure(table, space, p), short(p), True) for p in scored]
            continue
        found = []
        for p in scored:
            name, test = short(p) if p == group else f"{group}'s {short(p)}", tested(tests, space, p)
            if test is None:
                score = sure(table, space, p)
                found.append(Reading(score, name, leak=score >= TRACE))
            else:
                assert tests is not None
                found.append(Reading(test.effect, name, p=test.corrected, leak=tests.is_leak(space, p)))
        out += [max(found, key=lambda r: (r.leak, r.score))] if found else []
    return out


def tested(tests: Exclusivity | None, space: str, factor: str) -> Dependence | None:
    """What the test says of a cell; None where there is no test of it."""
    for table in (tests, tests.parts if tests is not None else None):
        if table is not None and (space, factor) in table.tests and not math.isnan(table.tests[space, factor].p):
            return table.tests[space, factor]
    return None


def parameters_of(t: ScoreTable, group: str) -> tuple[ScoreTable, list[str]]:
    """The parameters of a group and the table that holds them; the group itself where there are none."""
    if t.parts is not None and (parts := [p for p in t.parts.factors if p.rsplit("/", 2)[0] == group]):
        return t.parts, parts
    return t, [group]


def _factors(f: Findings, space: str) -> list[Reading]:
    """The known factors that a linear probe decodes from a space, best first."""
    table = f.labelled.get("ridge")
    if table is None or space not in table.spaces:
        return []
    found = sorted((Reading(sure(table, space, name), name) for name in table.factors), reverse=True)
    return [r for r in found if r.score >= TRACE][:MOST]


# ---- models without


def _of_features(f: Findings) -> tuple[str, list[str]]:
    """Of a backbone that returns its features alone."""
    t, each = f.label_free, []
    augmentations: list[Reading] = []
    for group in t.factors if t is not None else ():
        assert t is not None
        table, parameters = parameters_of(t, group)
        found = (Reading(sure(table, BACKBONE, p), p if p == group else f"{group}'s {short(p)}") for p in parameters)
        augmentations += [r for r in found if r.score >= TRACE]
    augmentations.sort(reverse=True)
    factors = _factors(f, BACKBONE)
    if t is not None:
        each.append(f"Of the augmentations, {_listed(augmentations) if augmentations else 'none'} can be decoded.")
    if f.labelled:
        each.append(f"Of the known factors, {_listed(factors) if factors else 'none'} can be decoded.")
    if not each:
        return "What the features encode could not be measured.", []
    strong = [r for r in sorted([*augmentations, *factors], reverse=True) if r.score >= ENCODES]
    head = f"The features encode {_listed(strong[:MOST])}{_more(strong)}." if strong else ""
    return head or "The features encode none of what was measured, or only weakly.", each


# ---- text


def sure(table: ScoreTable, space: str, factor: str) -> float:
    """The score, or 0 where its interval does not lie above 0; NaN counts as 0."""
    score = table[space, factor]
    low, _ = table.intervals.get((space, factor), (score, score))
    return 0.0 if math.isnan(score) else score if low > 0 else min(score, 0.0)


def _r2(score: float) -> str:
    return f"R² = {score:.2f}".replace("-0.00", "0.00")


def _listed(readings: Sequence[Reading], before: str = "") -> str:
    """ "hue (R² = 0.90), brightness (0.70) and contrast (0.60)"."""
    first, *rest = readings
    head = (
        f"{first.name} ({_r2(first.score) if first.p is None else f'partial {_r2(first.score)}, {p_value(first.p)}'})"
    )
    return _names([head, *(f"{before}{r.name} ({_further(r)})" for r in rest)])


def _further(r: Reading) -> str:
    return f"{r.score:.2f}" if r.p is None else f"{r.score:.2f}, {p_value(r.p)}"


def p_value(p: float) -> str:
    """ "p = 0.03", "p ≤ 0.001"; rounded up, so that none is said to be smaller than it is."""
    if p <= 0.001:
        return "p ≤ 0.001"
    return f"p = {min(1.0, math.ceil(p * 1000 - 1e-9) / 1000 if p < 0.1 else math.ceil(p * 100 - 1e-9) / 100):.3g}"


def _names(items: Iterable[str]) -> str:
    each = list(items)
    return each[0] if len(each) == 1 else f"{', '.join(each[:-1])} and {each[-1]}"


def _more(items: Sequence[object]) -> str:
    return f", and {len(items) - MOST} more" if len(items) > MOST else ""
