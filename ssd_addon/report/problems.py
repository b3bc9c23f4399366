"""What keeps a model from being called disentangled: each problem with the clause that names it.

FAILS, then PARTLY, then OPEN: a headline says "Disentangled" only where there is none of any kind.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ssd_addon._collapse import FEW
from ssd_addon.metrics import ScoreTable
from ssd_addon.metrics.embed import BACKBONE
from ssd_addon.report.findings import Findings
from ssd_addon.report.readings import (
    ENCODES,
    TRACE,
    Reading,
    is_or_are,
    named,
    names,
    parameters_of,
    r2,
    said,
    sure,
    table_of,
    tested,
)

FAILS = ("collapsed", "leak", "factor", "shared", "missing", "empty")
PARTLY = ("decoded", "weak")
OPEN = ("nameless", "groupless", "unscored")
MORE = {
    "leak": ("1 more leak was found", "{} more leaks were found"),
    "factor": ("1 more leak of a known factor was found", "{} more leaks of known factors were found"),
    "shared": ("1 more known factor is in several spaces", "{} more known factors are in several spaces"),
    "missing": ("1 more parameter is not encoded", "{} more parameters are not encoded"),
    "weak": ("1 more parameter is weakly encoded", "{} more parameters are weakly encoded"),
    "decoded": ("1 more parameter can be decoded from a space of another group", "{} more parameters can be decoded "
                "from spaces of other groups"),
    "unscored": ("1 more score is missing", "{} more scores are missing"),
}  # fmt: skip
"""What stands for the problems of a kind that a headline does not name."""
WHOLE_SPACES = ("collapsed", "empty", "nameless", "groupless")
"""Kinds of which every problem is named: there are no more of them than spaces or groups."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        kind: one of FAILS, PARTLY and OPEN.
        space: that it is about, "" for none.
        text: a clause that names it.
        what: the parameter, factor or group that it is about, "" for none.
        size: how bad it is beside others of its kind.
        backbone: how well the backbone encodes what the space does not; NaN where that is not known or plays no role.
    """

    kind: str
    space: str
    text: str
    what: str = ""
    size: float = 0.0
    backbone: float = math.nan


def problems(f: Findings) -> list[Problem]:
    """Everything that keeps a model with spaces from being called disentangled, by kind and the worst first."""
    found = [*_factors(f), *_shared(f)]
    if f.label_free is not None:
        found += [*_collapsed(f), *_leaks(f, f.label_free), *_own(f, f.label_free), *_unnamed(f, f.label_free)]
    order = {kind: k for k, kind in enumerate((*FAILS, *PARTLY, *OPEN))}
    return sorted(found, key=lambda p: (order[p.kind], -p.size))


def clauses(found: list[Problem], kinds: tuple[str, ...]) -> list[str]:
    """Of each of these kinds the worst problem, and how many more there are."""
    out = []
    for kind in kinds:
        each = [p for p in found if p.kind == kind]
        shown = each if kind in WHOLE_SPACES else each[:1]
        out += [p.text for p in shown]
        if rest := len(each) - len(shown):
            one, many = MORE[kind]
            out[-1] += f", and {one if rest == 1 else many.format(rest)}"
    return out


def excused(f: Findings) -> list[str]:
    """Parameters of styles that neither their own space nor the backbone encodes."""
    t = f.label_free
    if t is None:
        return []
    return [named(t, p) for s in _styles(f) if s in t.factors for p in _own_below(t, s) if _absent(t, p)]


def collapsed(f: Findings, space: str) -> bool:
    """Whether a space uses one direction although it needs more; a style that encodes its group with one does not."""
    rank = f.geometry.get(space, {}).get("effective_rank", math.nan)
    t = f.label_free
    enough = space != "content" and t is not None and space in t.factors and not _own_below(t, space)
    return rank < (FEW if f.widths.get(space, 3) >= 3 and not enough else 0.5)


# ---- one generator for each kind


def _collapsed(f: Findings) -> Iterator[Problem]:
    ranks = {s: f.geometry.get(s, {}).get("effective_rank", math.nan) for s in f.spaces}
    for s, rank in ranks.items():
        if collapsed(f, s):
            yield Problem("collapsed", s, f"the {s} space has collapsed (effective rank {rank:.1f})")
    if unknown := [s for s, rank in ranks.items() if math.isnan(rank)]:
        noun = "space has" if len(unknown) == 1 else "spaces have"
        yield Problem("unscored", "", f"whether the {names(unknown)} {noun} collapsed was not measured")


def _leaks(f: Findings, t: ScoreTable) -> Iterator[Problem]:
    """Parameters of a group in a space that is not its own: by the test, and where there is none by the score."""
    for s in f.spaces:
        for group in t.factors:
            if group == s:
                continue
            leaks = False
            table, parameters = parameters_of(t, group)
            for p in parameters:
                name, test = named(t, p), tested(f.tests, s, p)
                if f.tests is not None and test is not None and f.tests.is_leak(s, p):
                    leaks = True
                    yield Problem("leak", s, _leak(name, s, f"partial {r2(test.effect)}"), name, test.effect)
                elif test is None and math.isnan(table[s, p]):
                    yield Problem("unscored", s, f"whether {name} can be decoded from the {s} space was not measured")
                elif (score := sure(table, s, p)) >= TRACE and test is None:
                    leaks = True
                    yield Problem("leak", s, _leak(name, s, r2(score)), name, score)
                elif score >= TRACE:
                    yield Problem("decoded", s, f"{name} can be decoded from the {s} space ({r2(score)})", name, score)
            whole = tested(f.tests, s, group)
            if not leaks and whole is not None and f.tests is not None and f.tests.is_leak(s, group):
                yield Problem("leak", s, _leak(group, s, f"partial {r2(whole.effect)}"), group, whole.effect)


def _leak(name: str, space: str, score: str) -> str:
    verb = "leak" if is_or_are(name) == "are" else "leaks"
    return f"{name} {verb} into the {space} space ({score})"


def _own(f: Findings, t: ScoreTable) -> Iterator[Problem]:
    """What a style space does not encode of its own group."""
    for s in _styles(f):
        if s not in t.factors:
            continue
        table, parameters = parameters_of(t, s)
        scored = [p for p in parameters if not math.isnan(table[s, p])]
        if not scored:
            yield Problem("unscored", s, f"the {s} space could not be scored on its own group")
        elif len(scored) < len(parameters):
            lost = names(named(t, p) for p in parameters if p not in scored)
            yield Problem("unscored", s, f"the {s} space could not be scored on {lost}")
        if scored and all(_absent(t, p) for p in scored):
            best = said(table, s, max(scored, key=lambda p: table[s, p]))
            yield Problem("empty", s, f"neither the {s} space nor the backbone encodes {s} ({best} at most)", s)
            continue
        for p in _own_below(t, s):
            if not _absent(t, p):
                yield _below(t, s, p)


def _below(t: ScoreTable, space: str, parameter: str) -> Problem:
    """A parameter that a style does not encode, or only weakly, beside the backbone."""
    table, back, name = table_of(t, parameter), _backbone(t, parameter), named(t, parameter)
    weak = sure(table, space, parameter) >= TRACE
    score = said(table, space, parameter)
    if not math.isnan(back):
        score += f"; the backbone {r2(back).removeprefix('R² = ')}"
    text = f"{name} {is_or_are(name)} {'only weakly' if weak else 'not'} encoded by the {space} space ({score})"
    if parameter == space:
        what = "encodes its own group only weakly" if weak else "does not encode its own group"
        text = f"the {space} space {what} ({score})"
    gap = (1.0 if math.isnan(back) else back) - table[space, parameter]
    return Problem("weak" if weak else "missing", space, text, name, gap, back)


def _own_below(t: ScoreTable, space: str) -> list[str]:
    """Parameters of a style's own group that it does not reach ENCODES in."""
    table, parameters = parameters_of(t, space)
    return [p for p in parameters if not math.isnan(table[space, p]) and sure(table, space, p) < ENCODES]


def _backbone(t: ScoreTable, parameter: str) -> float:
    """The backbone's score; NaN where it has none."""
    return t[BACKBONE, parameter] if BACKBONE in t.spaces else math.nan


def _absent(t: ScoreTable, parameter: str) -> bool:
    """Whether neither the backbone nor the parameter's own space encodes it, not even weakly."""
    if math.isnan(_backbone(t, parameter)):
        return False
    table, own = table_of(t, parameter), parameter.rsplit("/", 2)[0]
    return sure(table, BACKBONE, parameter) < TRACE and sure(table, own, parameter) < TRACE


def _unnamed(f: Findings, t: ScoreTable) -> Iterator[Problem]:
    """Groups without a space, and spaces without a group."""
    if nameless := [g for g in t.factors if g not in f.spaces]:
        kept = "it is" if len(nameless) == 1 else "they are"
        text = f"no space is named after {names(nameless)}, so whether {kept} encoded is not known"
        yield Problem("nameless", "", text)
    if groupless := [s for s in _styles(f) if s not in t.factors]:
        verb = "space has" if len(groupless) == 1 else "spaces have"
        yield Problem("groupless", "", f"the {names(groupless)} {verb} no augmentation group")


def _factors(f: Findings) -> Iterator[Problem]:
    """Known factors that leak, by their test."""
    if f.exclusive is not None:
        for s, factor in f.exclusive.leaks:
            effect = f.exclusive[s, factor].effect
            yield Problem("factor", s, "the known factor " + _leak(factor, s, f"partial {r2(effect)}"), factor, effect)


def _shared(f: Findings) -> Iterator[Problem]:
    """Known factors that several spaces encode, where no test says which of them may.

    Not the class of a folder of images: colors and places go with classes (the sky with airplanes), so a style space
    may encode it without a leak.
    """
    for factor in dict.fromkeys(factor for t in f.labelled.values() for factor in t.factors):
        if factor == "class":
            continue
        found = []
        for probe, table in f.labelled.items():
            scores = [Reading(sure(table, s, factor), s) for s in f.spaces if (s, factor) in table.scores]
            held = sorted((r for r in scores if r.score >= TRACE), reverse=True)
            if len(held) > 1 and (f.exclusive is None or any(r.name not in f.exclusive.spaces for r in held)):
                found.append((held[1].score, probe, held))
        if found:
            size, probe, held = max(found)
            first, second = held[:2]
            by = "" if probe == "ridge" else f"{probe} probe, "
            both = f"{by}{r2(first.score)} and {r2(second.score).removeprefix('R² = ')}"
            text = f"both {first.name} and {second.name} encode the known factor {factor} ({both})"
            space = "content" if any(r.name == "content" for r in held) else held[1].name
            yield Problem("shared", space, text, factor, size)


def _styles(f: Findings) -> list[str]:
    return [s for s in f.spaces if s != "content"]
