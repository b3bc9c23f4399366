"""What the matrices show, in words: a headline that claims no more than they do, and a few sentences for each space."""

import math

from ssd_addon.metrics.embed import BACKBONE
from ssd_addon.report.findings import Findings
from ssd_addon.report.problems import FAILS, OPEN, PARTLY, clauses, excused, problems
from ssd_addon.report.readings import ENCODES as ENCODES
from ssd_addon.report.readings import TRACE as TRACE
from ssd_addon.report.readings import Reading, listed, named, names, r2, sure, table_of, tested
from ssd_addon.report.readings import parameters_of as parameters_of
from ssd_addon.report.readings import short as short

DISENTANGLED = (
    "Disentangled: each style space encodes every parameter of its own augmentation group, and no space encodes "
    "another group."
)
AS_THE_BACKBONE = (
    "Disentangled: each style space encodes every parameter of its own augmentation group that the backbone encodes, "
    "and no space encodes another group."
)
MOST = 6
"""Factors that a sentence names."""


def verdict(f: Findings) -> tuple[str, list[str]]:
    """A headline, and one or a few sentences for each space."""
    if not f.spaces:
        return _of_features(f)
    t = f.label_free
    measured = t is not None and any(
        not math.isnan(table[s, p])
        for s in f.spaces
        if s in t.spaces
        for g in t.factors
        for table, each in [parameters_of(t, g)]
        for p in each
    )
    if measured:
        return _headline(f), [_sentences(s, f) for s in f.spaces]
    if not f.labelled and f.exclusive is None:
        return "What the spaces encode could not be measured.", []
    found = problems(f)
    if leaks := clauses(found, ("factor",)):
        head = f"Not disentangled: {'; '.join(leaks)}."
    elif shared := clauses(found, ("shared",)):
        head = f"Undecided: which augmentations the spaces encode was not measured, but {'; '.join(shared)}."
    elif f.exclusive is not None:
        head = "No known factor leaks. Which augmentations the spaces encode was not measured."
    else:
        head = "Which augmentations the spaces encode was not measured."
    return head, [
        _of_factors(s, f, f"From the {s} space") or f"The {s} space encodes none of the known factors."
        for s in f.spaces
    ]


def _headline(f: Findings) -> str:
    if not [s for s in f.spaces if s != "content"]:
        return _without_styles(f)
    found = problems(f)
    kinds = {p.kind for p in found}
    clean = not kinds & {"leak", "factor", "shared", "decoded"}
    if kinds & {*FAILS}:
        leakless = " No leak was found." if clean and "unscored" not in kinds else ""
        return f"Not disentangled: {'; '.join(clauses(found, FAILS))}.{leakless}"
    if kinds & {*PARTLY}:
        return f"Partly disentangled: no leak was found, but {'; '.join(clauses(found, (*PARTLY, *OPEN)))}."
    if kinds:
        return f"Undecided: no leak was found, but {'; '.join(clauses(found, OPEN))}."
    if absent := excused(f):
        return f"{AS_THE_BACKBONE} Neither encodes {names(absent)}."
    return DISENTANGLED


def _without_styles(f: Findings) -> str:
    t = f.label_free
    assert t is not None
    space = f.spaces[0]
    encoded = []
    for group in t.factors:
        table, parameters = parameters_of(t, group)
        encoded += [Reading(score, named(t, p)) for p in parameters if (score := sure(table, space, p)) >= TRACE]
    what = (
        listed(sorted(encoded, reverse=True)[:MOST]) + _more(len(encoded)) if encoded else "none of the augmentations"
    )
    return f"There are no style spaces to disentangle: the {space} space encodes {what}."


def _sentences(space: str, f: Findings) -> str:
    """What one space encodes of its own group, of the others and of the known factors."""
    own, other, factors = _own_group(space, f), _other_groups(space, f), _of_factors(space, f)
    if other and own:
        text = f"{own} It {'also encodes' if ' space encodes ' in own else 'encodes'} {listed(other)}."
    elif other:
        text = f"The {space} space encodes {listed(other)}."
    elif own:
        text = f"{own.removesuffix('.')}, and no parameter of another group." if " space encodes " in own else own
    else:
        text = f"The {space} space encodes no augmentation group."
    return f"{text} {factors}" if factors else text


def _own_group(space: str, f: Findings) -> str:
    """A sentence on a style's own group, "" for a space without one."""
    t = f.label_free
    if t is None or space not in t.factors:
        return ""
    table, parameters = parameters_of(t, space)
    found = sorted(
        (Reading(sure(table, space, p), named(t, p)) for p in parameters if not math.isnan(table[space, p])),
        reverse=True,
    )
    if not found:
        return f"The {space} space could not be scored on its own group."
    held, weak = [r for r in found if r.score >= ENCODES], [r for r in found if TRACE <= r.score < ENCODES]
    absent = [r for r in found if r.score < TRACE]
    if not held and not weak:
        return f"The {space} space does not encode its own group ({r2(found[0].score)} at most)."
    parts = [listed(held)] if held else []
    parts += [f"weakly {listed(weak)}"] if weak else []
    return (
        f"The {space} space encodes {', '.join(parts)}{f', but not {names(r.name for r in absent)}' if absent else ''}."
    )


def _other_groups(space: str, f: Findings) -> list[Reading]:
    """Of every other group that leaks into a space its parameter that leaks most, and known factors that leak."""
    t, out = f.label_free, []
    for group in t.factors if t is not None else ():
        if t is None or group == space:
            continue
        found = []
        for p in (group, *parameters_of(t, group)[1]):
            name, test = named(t, p), tested(f.tests, space, p)
            if test is not None and f.tests is not None:
                found += [Reading(test.effect, name, test.corrected)] if f.tests.is_leak(space, p) else []
            elif (p != group or t.parts is None) and (score := sure(table_of(t, p), space, p)) >= TRACE:
                found.append(Reading(score, name))
        finer = [r for r in found if r.name != group]
        out += [max(finer or found)] if found else []
    if f.exclusive is not None:
        for s, factor in f.exclusive.leaks:
            test = f.exclusive[s, factor]
            out += [Reading(test.effect, factor, test.corrected)] if s == space else []
    return sorted(out, reverse=True)


def _of_factors(space: str, f: Findings, begin: str = "Of the known factors") -> str:
    """A sentence on the known factors that probes decode from a space; "" where there are none."""
    linear = _factors(f, space)
    known = {r.name for r in linear}
    more = [r for r in _factors(f, space, "kernel") if r.name not in known]
    said = [f"a linear probe decodes {listed(linear[:MOST])}{_more(len(linear))}"] if linear else []
    said += (
        [f"a kernel probe {'also ' if linear else ''}decodes {listed(more[:MOST])}{_more(len(more))}"] if more else []
    )
    return f"{begin}, {', and '.join(said)}." if said else ""


def _factors(f: Findings, space: str, probe: str = "ridge") -> list[Reading]:
    """The known factors that a probe decodes from a space, best first."""
    table = f.labelled.get(probe)
    if table is None or space not in table.spaces:
        return []
    found = sorted((Reading(sure(table, space, name), name) for name in table.factors), reverse=True)
    return [r for r in found if r.score >= TRACE]


# ---- models without spaces


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
        each.append(f"Of the augmentations, {listed(augmentations) if augmentations else 'none'} can be decoded.")
    if f.labelled:
        each.append(f"Of the known factors, {listed(factors[:MOST]) if factors else 'none'} can be decoded.")
    if not each:
        return "What the features encode could not be measured.", []
    strong = [r for r in sorted([*augmentations, *factors], reverse=True) if r.score >= ENCODES]
    head = f"The features encode {listed(strong[:MOST])}{_more(len(strong))}." if strong else ""
    return head or "The features encode none of what was measured, or only weakly.", each


def _more(count: int) -> str:
    return f", and {count - MOST} more" if count > MOST else ""
