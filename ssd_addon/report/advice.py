"""What to try against each problem that a page names: one sentence, and where the documentation says more."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ssd_addon.report.findings import Findings
from ssd_addon.report.problems import Problem, problems
from ssd_addon.report.readings import ENCODES, TRACE, names
from ssd_addon.report.text import html

DOCS = ""
"""Address of the published documentation, such as "https://example.org/ssd_addon/"; pages link into it.

It is empty as long as there is none: pages then name the page and the section in words.
"""


@dataclass(frozen=True)
class Section:
    """A section of the documentation.

    Attributes:
        file: below docs/, without its suffix.
        page: its name.
        heading: of the section.
    """

    file: str
    page: str
    heading: str

    def link(self) -> str:
        """HTML: a link where the documentation has an address, else page and section in words."""
        words = f"{self.page}, “{self.heading}”"
        if not DOCS:
            return f"See {html(words)}."
        anchor = re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", self.heading.lower()).strip())
        address = f"{DOCS.rstrip('/')}/{self.file}/#{anchor}"
        return f'<a href="{html(address)}">{html(words)}</a>'


_GROUPS = ("choose-your-groups", "Choose your groups")
RECIPE = Section(*_GROUPS, "The recipe")
GROUP = Section(*_GROUPS, "1. What belongs in a group")
KEYS = Section(*_GROUPS, "2. Does the group overwrite its attribute, or change it?")
WIDTHS = Section(*_GROUPS, "3. Widths, temperature, weights")
SEE = Section(*_GROUPS, "4. See that it works")
COLLAPSE = Section("training", "Training", "The collapse alarm")
READ = Section("report", "The report", "How to read the matrices")
LEAK = Section("report", "The report", "What a leak is")
LAYERS = Section("pipelines/checkpoint", "Style spaces for a checkpoint you have", "When it helps, and when not")
MEASURED = Section("audit", "Audit", "How it is measured")
SECTIONS = (RECIPE, GROUP, KEYS, WIDTHS, SEE, COLLAPSE, READ, LEAK, LAYERS, MEASURED)


CONTENT_COLLAPSED = (
    "Against the collapse of the content space, give it a smaller, fixed weight or raise the tolerance of its dual "
    "ascent, and do not combine dual ascent with the equivariance term."
)
STYLE_COLLAPSED = (
    "Against the collapse of the {space} space, lower its weight or, under dual ascent, raise warmup_steps or the "
    "tolerance."
)
INTO_CONTENT = (
    "To get {what} out of the content space, make that space narrower, or raise its weight by dual ascent where all "
    "views of an image can agree."
)
INTO_STYLE = (
    "To get {what} out of the {space} space, check that no two groups change the same attribute, and make that space "
    "narrower."
)
IN_BOTH = (
    "Content and a style space both encode {what}: where the style's group changes a factor, let it do so over the "
    "whole range that the images have; elsewhere use cross-image keys, provided that the group overwrites its "
    "attribute."
)
IN_STYLES = "Several style spaces encode {what}: check that no two groups change the same attribute."
FACTOR_IN_CONTENT = (
    "To get {what} out of the content space, let the group that changes it do so over the whole range that the images "
    "have."
)
FACTOR_IN_STYLE = (
    "Both views of a style pair show the same image, so nothing keeps {what} out of the {space} space: use cross-image "
    "keys, provided that the group overwrites its attribute."
)
BACKBONE_HAS_IT = (
    "To get {what} from the backbone into the {space} space, make that space wider, and use same-image keys if its "
    "group changes the attribute relative to the image."
)
BACKBONE_LACKS_IT = (
    "The backbone hardly encodes {what} either: train longer or add EquivarianceLoss, and check in the pictures of the "
    "views that you can see the change yourself."
)
NOT_ENCODED = "To get {what} into the {space} space, train longer or make that space wider."
NAMES = "A group of augmentations and its style space need the same name."
NO_STYLES = "To keep what the augmentations change, add a style space for each group of them, with the group's name."
UNSCORED = "Some scores are missing: take more images (--samples); the reasons are given below, after “n/a”."
NAMED = 3
"""Parameters or factors that a sentence names."""


def advice(f: Findings) -> list[tuple[str, Section]]:
    """One sentence for each kind of problem of a model with spaces, in the order of `problems`, with its section."""
    if not f.spaces or (f.label_free is None and not f.labelled):
        return []
    if f.spaces == ("content",):
        return [(NO_STYLES, RECIPE)]
    found: dict[tuple[str, Section, str], list[str]] = {}
    for p in problems(f):
        text, section = _for(p)
        found.setdefault((text, section, p.space if "{space}" in text else ""), []).append(p.what)
    return [
        (text.replace("{what}", _several(what)).replace("{space}", space), section)
        for (text, section, space), what in found.items()
    ]


def _several(what: Sequence[str]) -> str:
    each = list(dict.fromkeys(what))
    return names(each if len(each) <= NAMED else [*each[: NAMED - 1], f"{len(each) - NAMED + 1} more"])


def _for(p: Problem) -> tuple[str, Section]:
    content = p.space == "content"
    if p.kind == "collapsed":
        return (CONTENT_COLLAPSED, SEE) if content else (STYLE_COLLAPSED, COLLAPSE)
    if p.kind in ("leak", "decoded"):
        return (INTO_CONTENT, WIDTHS) if content else (INTO_STYLE, GROUP)
    if p.kind == "shared":
        return (IN_BOTH if content else IN_STYLES), GROUP
    if p.kind == "factor":
        return (FACTOR_IN_CONTENT, GROUP) if content else (FACTOR_IN_STYLE, KEYS)
    if p.kind == "empty" or p.backbone < (TRACE if p.kind == "missing" else ENCODES):
        return BACKBONE_LACKS_IT, SEE
    if p.kind in ("missing", "weak"):
        return (NOT_ENCODED if math.isnan(p.backbone) else BACKBONE_HAS_IT), SEE
    return (NAMES, RECIPE) if p.kind in ("nameless", "groupless") else (UNSCORED, READ)


def advice_section(found: Sequence[tuple[str, Section]]) -> str:
    """A list for the page; "" where there is nothing to advise."""
    items = "".join(f"<li>{html(text)} <small>{section.link()}</small></li>" for text, section in found)
    return f'<div class="advice" id="advice"><h2>What to try</h2><ul>{items}</ul></div>' if items else ""
