"""Tables of scores and of tests that are made by hand, as the findings of a report."""

import dataclasses
import math

import torch

from ssd_addon import report
from ssd_addon.metrics import Dependence, Exclusivity, ScoreTable
from ssd_addon.report.findings import Findings

GROUPS = ("color", "spatial")
SPACES = ("content", "color", "spatial")
BRIGHT, HUE, ANGLE = "color/0.ColorJitter/brightness_factor", "color/0.ColorJitter/hue_factor", "spatial/0.Affine/angle"
PARAMETERS = (BRIGHT, HUE, ANGLE)


def table(scores, factors, low=0.9, parts=None, probe="kernel"):
    """A table of rows {space: [scores]}; intervals reach from `low` times the score to the score."""
    cells = {(s, f): v for s, row in scores.items() for f, v in zip(factors, row, strict=True)}
    intervals = {c: (low * v, v) for c, v in cells.items() if not math.isnan(v)}
    return ScoreTable(tuple(scores), tuple(factors), cells, intervals, {}, probe, (), 50, 50, "pairs of views", parts)


def findings(label_free=None, labelled=None, spaces=SPACES, ranks=(), **options):
    """Findings with these tables; spaces use five directions each, unless `ranks` says otherwise."""
    geometry = {s: {"effective_rank": 5.0, "uniformity": -2.0, "alignment": 0.1} for s in spaces}
    geometry |= {s: {**geometry[s], "effective_rank": rank} for s, rank in dict(ranks).items()}
    made = Findings(
        "t", [], spaces, labelled or {}, label_free, None, geometry, None, None, torch.arange(3), {}, [], {}
    )
    return dataclasses.replace(made, **options)


def groups(content, color, spatial, backbone=None, low=0.9, **options):
    """Findings with scores of the groups color and spatial, without finer parameters."""
    rows = {"content": content, "color": color, "spatial": spatial} | ({"backbone": backbone} if backbone else {})
    return findings(table(rows, GROUPS, low), **options)


def parameters(content, color, spatial, backbone=None, low=0.9, **options):
    """Findings with scores of brightness and hue (color) and angle (spatial)."""
    rows = {"content": content, "color": color, "spatial": spatial} | ({"backbone": backbone} if backbone else {})
    parts = table(rows, PARAMETERS, low)
    whole = {s: [(b + h) / 2, a] for s, (b, h, a) in rows.items()}
    return findings(table(whole, GROUPS, low, parts), **options)


def by_hand(cells, factors=GROUPS, own=None):
    """Tests with (effect, corrected p) in some cells, none in the others."""
    found = {(s, f): Dependence(*(math.nan,) * 4) for s in SPACES for f in factors}
    found |= {cell: Dependence(3.0, effect, p, p) for cell, (effect, p) in cells.items()}
    return Exclusivity(SPACES, tuple(factors), own or {s: (s,) for s in GROUPS}, found, {}, 100, "permutations")


def parameter_tests(cells):
    """The same of the parameters, and of their groups."""
    quiet = {(s, p): (0.0, 1.0) for s in SPACES for p in PARAMETERS if p.split("/")[0] != s}
    coarse = {(s, p.split("/")[0]): v for (s, p), v in (quiet | cells).items()}
    return dataclasses.replace(by_hand(coarse), parts=by_hand(quiet | cells, PARAMETERS))


def headline(f):
    return report.verdict(f)[0]


GOOD = {"content": [0.0, 0.0, 0.0], "color": [0.9, 0.8, 0.0], "spatial": [0.0, 0.0, 0.6], "backbone": [0.9, 0.9, 0.7]}


def changed(**rows):
    return parameters(**(GOOD | rows))


def known(linear, kernel=None, factors=("shape", "hue"), low=0.9):
    found = {"ridge": table(dict(zip(SPACES, linear, strict=True)), factors, low, probe="ridge")}
    return found | ({"kernel": table(dict(zip(SPACES, kernel, strict=True)), factors, low)} if kernel else {})
