"""The headline of a report: which tables of scores are called disentangled, and what is said of every other one."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from score_tables import (
    GOOD,
    GROUPS,
    HUE,
    PARAMETERS,
    SPACES,
    by_hand,
    changed,
    findings,
    groups,
    headline,
    parameter_tests,
    parameters,
    table,
)

from ssd_addon import report
from ssd_addon.report import advice as advising
from ssd_addon.report.advice import advice
from ssd_addon.report.problems import FAILS, OPEN, PARTLY, problems
from ssd_addon.report.verdict import AS_THE_BACKBONE, DISENTANGLED

# ---- disentangled


def test_spaces_that_encode_all_of_their_own_group_and_no_other_are_disentangled():
    head, each = report.verdict(changed())
    assert head == DISENTANGLED
    assert each == [
        "The content space encodes no augmentation group.",
        "The color space encodes brightness (R² = 0.90) and hue (0.80), and no parameter of another group.",
        "The spatial space encodes angle (R² = 0.60), and no parameter of another group.",
    ]
    assert problems(changed()) == [] == advice(changed())


def test_the_backbone_is_a_reference_and_no_bound():
    assert headline(changed(backbone=[0.2, 0.2, 0.2])) == DISENTANGLED
    assert headline(parameters(*(GOOD[s] for s in SPACES))) == DISENTANGLED  # without the row


def test_what_the_backbone_does_not_encode_is_not_asked_of_a_style_but_said():
    f = changed(color=[0.9, 0.04, 0.0], backbone=[0.9, 0.05, 0.7])
    head, each = report.verdict(f)
    assert head == f"{AS_THE_BACKBONE} Neither encodes hue."
    assert each[1] == "The color space encodes brightness (R² = 0.90), but not hue, and no parameter of another group."


def test_scores_of_whole_groups_make_a_headline_too():
    head, each = report.verdict(groups([0.0, 0.05], [0.9, 0.0], [0.0, 0.6]))
    assert head == DISENTANGLED
    assert each[1] == "The color space encodes color (R² = 0.90), and no parameter of another group."


# ---- not disentangled


def test_the_sentence_of_the_documentation():
    f = changed(content=[0.31, 0.0, 0.0], color=[0.9, 0.04, 0.0], backbone=[0.9, 0.52, 0.7])
    assert headline(f) == (
        "Not disentangled: brightness leaks into the content space (R² = 0.31); hue is not encoded by the color space "
        "(R² = 0.04; the backbone 0.52)."
    )


def test_of_several_leaks_the_worst_is_named_and_the_others_are_counted():
    f = changed(content=[0.31, 0.4, 0.0])
    assert headline(f) == ("Not disentangled: hue leaks into the content space (R² = 0.40), and 1 more leak was found.")
    f = changed(content=[0.31, 0.4, 0.0], color=[0.9, 0.8, 0.2])
    head, each = report.verdict(f)
    assert head.endswith("(R² = 0.40), and 2 more leaks were found.")
    assert each[0] == "The content space encodes hue (R² = 0.40)."
    assert (
        each[1] == "The color space encodes brightness (R² = 0.90) and hue (0.80). It also encodes angle (R² = 0.20)."
    )


def test_one_parameter_that_the_backbone_encodes_and_the_style_does_not_is_enough():
    f = changed(color=[0.9, 0.04, 0.0])
    assert headline(f) == (
        "Not disentangled: hue is not encoded by the color space (R² = 0.04; the backbone 0.90). No leak was found."
    )
    f = changed(color=[0.04, 0.04, 0.0], spatial=[0.0, 0.0, 0.01])
    assert "hue is not encoded by the color space (R² = 0.04; the backbone 0.90)" in headline(
        f
    ) or "brightness" in headline(f)
    assert "and 2 more parameters are not encoded" in headline(f)


def test_without_a_backbone_to_compare_with_every_parameter_has_to_be_encoded():
    rows = {s: GOOD[s] for s in SPACES} | {"color": [0.9, 0.04, 0.0]}
    assert headline(parameters(**rows)) == (
        "Not disentangled: hue is not encoded by the color space (R² = 0.04). No leak was found."
    )


def test_a_style_of_whose_group_the_backbone_encodes_nothing_is_empty():
    f = changed(spatial=[0.0, 0.0, 0.02], backbone=[0.9, 0.9, 0.03])
    head, each = report.verdict(f)
    assert head == (
        "Not disentangled: neither the spatial space nor the backbone encodes spatial (R² = 0.02 at most). No leak was "
        "found."
    )
    assert each[2] == "The spatial space does not encode its own group (R² = 0.02 at most)."
    assert advice(f)[0][0].startswith("The backbone hardly encodes spatial either: train longer")


def test_verbs_follow_the_names_of_parameters():
    names = ("color/0.ColorJitter/hue_factor", "spatial/0.Affine/translations")
    rows = {"content": [0.0, 0.2], "color": [0.9, 0.0], "spatial": [0.0, 0.03], "backbone": [0.9, 0.5]}
    whole = table(rows, GROUPS, parts=table(rows, names))
    assert headline(findings(whole)) == (
        "Not disentangled: translations leak into the content space (R² = 0.20); translations are not encoded by the "
        "spatial space (R² = 0.03; the backbone 0.50)."
    )


def test_parameters_of_one_name_are_told_apart_by_their_group():
    names = ("color/0.A/gain", "spatial/0.B/gain")
    rows = {"content": [0.0, 0.2], "color": [0.9, 0.0], "spatial": [0.0, 0.7]}
    assert "spatial's gain leaks into the content space" in headline(
        findings(table(rows, GROUPS, parts=table(rows, names)))
    )


# ---- what a test says


@pytest.mark.parametrize(
    ("effect", "p", "head"),
    [
        (0.03, 0.004, "Not disentangled: hue leaks into the content space (partial R² = 0.03)."),
        (0.02, 0.05, "Not disentangled: hue leaks into the content space (partial R² = 0.02)."),
        (0.01, 0.001, DISENTANGLED),
        (0.3, 0.06, DISENTANGLED),
    ],
)
def test_a_leak_is_what_the_test_rejects_with_an_effect_that_matters(effect, p, head):
    f = dataclasses.replace(changed(), tests=parameter_tests({("content", HUE): (effect, p)}))
    said, each = report.verdict(f)
    assert said == head
    assert ("(partial R²" in each[0]) == head.startswith("Not")


def test_a_score_that_can_be_seen_is_not_called_disentangled_although_the_test_finds_no_leak():
    f = dataclasses.replace(changed(content=[0.0, 0.3, 0.0]), tests=parameter_tests({("content", HUE): (0.3, 0.06)}))
    assert headline(f) == (
        "Partly disentangled: no leak was found, but hue can be decoded from the content space (R² = 0.30)."
    )


def test_a_cell_without_a_test_is_decided_by_its_score():
    found = groups([0.0, 0.2], [0.9, 0.3], [0.0, 0.6])
    tested = dataclasses.replace(found, tests=by_hand({("color", "spatial"): (0.0, 1.0)}))
    assert headline(tested) == "Not disentangled: spatial leaks into the content space (R² = 0.20)."


def test_a_leak_of_a_group_counts_where_none_of_its_parameters_was_tested():
    f = dataclasses.replace(changed(), tests=by_hand({("content", "color"): (0.2, 0.01)}))
    assert headline(f) == "Not disentangled: color leaks into the content space (partial R² = 0.20)."
    assert report.verdict(f)[1][0] == "The content space encodes color (partial R² = 0.20, p = 0.01)."


def test_what_is_not_above_chance_is_no_leak_and_not_encoded():
    assert headline(changed(content=[0.0, 0.2, 0.0], low=-1.0)).count("leaks") == 0
    assert headline(groups([0.0, 0.0], [0.9, 0.0], [0.0, 0.6], low=-1.0)) == (
        "Not disentangled: the spatial space does not encode its own group (R² = 0.60, with an interval that includes "
        "0), and 1 more parameter is not encoded. No leak was found."
    )


# ---- partly disentangled, undecided


def test_a_parameter_that_is_weakly_encoded_makes_a_model_partly_disentangled():
    f = changed(spatial=[0.0, 0.0, 0.23], backbone=[0.9, 0.9, 0.34])
    head, each = report.verdict(f)
    assert head == (
        "Partly disentangled: no leak was found, but angle is only weakly encoded by the spatial space (R² = 0.23; the "
        "backbone 0.34)."
    )
    assert each[2] == "The spatial space encodes weakly angle (R² = 0.23), and no parameter of another group."
    f = changed(color=[0.3, 0.3, 0.0], spatial=[0.0, 0.0, 0.23])
    assert headline(f).endswith(", and 2 more parameters are weakly encoded.")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ({"color": [0.9, math.nan, 0.0]}, "the color space could not be scored on hue"),
        ({"spatial": [0.0, 0.0, math.nan]}, "the spatial space could not be scored on its own group"),
        ({"content": [0.0, math.nan, 0.0]}, "whether hue can be decoded from the content space was not measured"),
    ],
)
def test_what_was_not_measured_is_not_claimed(rows, reason):
    f = changed(**rows)
    assert headline(f) == f"Undecided: no leak was found, but {reason}."
    assert advice(f) == [(advising.UNSCORED, advising.READ)]


def test_a_score_of_the_backbone_that_is_missing_excuses_nothing():
    f = changed(color=[0.9, 0.04, 0.0], backbone=[0.9, math.nan, 0.7])
    assert headline(f).startswith("Not disentangled: hue is not encoded by the color space (R² = 0.04).")
    assert advice(f)[0][0] == "To get hue into the color space, train longer or make that space wider."


@pytest.mark.parametrize(
    ("spaces", "reason"),
    [
        (("content", "color"), "no space is named after spatial, so whether it is encoded is not known"),
        (("content", "color", "spatial", "extra"), "the extra space has no augmentation group"),
    ],
)
def test_a_group_without_a_space_and_a_space_without_a_group_leave_it_undecided(spaces, reason):
    rows = {s: GOOD.get(s, [0.0] * 3) for s in (*spaces, "backbone")}
    whole = {s: [r[0], r[2]] for s, r in rows.items()}
    f = findings(table(whole, GROUPS, parts=table(rows, PARAMETERS)), spaces=spaces)
    assert headline(f) == f"Undecided: no leak was found, but {reason}."
    assert (advising.NAMES, advising.RECIPE) in advice(f)


def test_without_a_matrix_there_is_no_verdict():
    nothing = {s: [math.nan] * 3 for s in (*SPACES, "backbone")}
    for f in (findings(), parameters(**nothing)):
        assert report.verdict(f) == ("What the spaces encode could not be measured.", [])


# ---- models without style spaces


def test_a_content_space_alone_has_nothing_to_disentangle():
    rows = {"content": [0.0, 0.3, 0.0], "backbone": [0.9, 0.9, 0.7]}
    f = findings(table({"content": [0.1, 0.0]}, GROUPS, parts=table(rows, PARAMETERS)), spaces=("content",))
    head, each = report.verdict(f)
    assert head == "There are no style spaces to disentangle: the content space encodes hue (R² = 0.30)."
    assert each == ["The content space encodes hue (R² = 0.30)."]
    assert advice(f) == [(advising.NO_STYLES, advising.RECIPE)]
    none = findings(table({"content": [0.0, 0.0]}, GROUPS), spaces=("content",))
    assert headline(none).endswith("the content space encodes none of the augmentations.")


def test_a_space_that_is_named_after_no_group_is_not_called_disentangled():
    f = findings(table({"content": [0.0], "tint": [0.9]}, ("color",)), spaces=("content", "tint"))
    assert headline(f) == "Not disentangled: color leaks into the tint space (R² = 0.90)."


# ---- collapse


def test_a_collapsed_space_is_named_first():
    f = changed(ranks={"content": 1.1}.items())
    assert headline(f) == "Not disentangled: the content space has collapsed (effective rank 1.1). No leak was found."
    assert advice(f) == [(advising.CONTENT_COLLAPSED, advising.SEE)]
    f = changed(spatial=[0.0, 0.0, 0.3], ranks={"spatial": 1.2}.items())
    assert headline(f).startswith("Not disentangled: the spatial space has collapsed (effective rank 1.2).")
    assert advice(f)[0] == (advising.STYLE_COLLAPSED.replace("{space}", "spatial"), advising.COLLAPSE)


def test_a_style_that_encodes_its_group_in_one_direction_has_not_collapsed():
    assert headline(changed(ranks={"spatial": 1.0}.items())) == DISENTANGLED
    assert "collapsed (effective rank 0.0)" in headline(changed(ranks={"spatial": 0.0}.items()))


def test_a_space_of_one_or_two_dimensions_is_not_held_to_a_rank():
    assert headline(changed(ranks={"content": 1.0}.items(), widths={"content": 2})) == DISENTANGLED
    assert "collapsed" in headline(changed(ranks={"content": 1.0}.items(), widths={"content": 8}))


def test_a_rank_that_was_not_measured_leaves_it_undecided():
    f = changed(ranks={"content": math.nan}.items())
    assert headline(f) == "Undecided: no leak was found, but whether the content space has collapsed was not measured."
    assert "whether the content, color and spatial spaces have collapsed" in headline(
        dataclasses.replace(f, geometry={})
    )


# ---- whatever the scores are


def worst_first(f):
    return [p.kind for p in problems(f)]


@pytest.mark.parametrize("own", [-0.2, 0.05, 0.3, 0.7, math.nan])
@pytest.mark.parametrize("back", [0.05, 0.3, 0.9, math.nan])
def test_no_table_with_a_failing_cell_is_called_disentangled(own, back):
    """A style's own parameter at every score, beside every score of the backbone."""
    head = headline(changed(color=[0.9, own, 0.0], backbone=[0.9, back, 0.7]))
    may = own >= 0.5 or (own < 0.1 and back < 0.1)
    assert head.startswith("Disentangled") == may


@pytest.mark.parametrize("seed", range(150))
def test_a_random_table_is_called_disentangled_only_if_no_cell_fails(seed):
    g = torch.Generator().manual_seed(seed)

    def draw(*values):
        return values[int(torch.randint(len(values), (), generator=g))]

    rows = {s: list(row) for s, row in GOOD.items()}
    for _ in range(draw(0, 1, 2, 3)):
        rows[draw(*rows)][draw(0, 1, 2)] = draw(-0.1, 0.05, 0.2, 0.6, math.nan)
    ranks = {draw(*SPACES): draw(5.0, 5.0, 1.0, math.nan)}
    cells = {("content", HUE): (draw(0.0, 0.0, 0.01, 0.03), draw(0.001, 0.2))}
    tests = draw(None, parameter_tests(cells))
    f = parameters(**rows, ranks=ranks.items(), tests=tests)

    own = {"color": (0, 1), "spatial": (2,)}
    ok = []
    for s, (k, p) in itertools.product(SPACES, enumerate(PARAMETERS)):
        score, back = rows[s][k], rows["backbone"][k]
        if k in own.get(s, ()):
            ok.append(score >= 0.5 or (score < 0.1 and back < 0.1))
        else:
            leak = tests is not None and tests.is_leak(s, p)
            ok.append(not leak and (score < 0.1 or (math.isnan(score) and tests is not None)))
    ok += [any(rows[s][k] >= 0.5 for k in each) for s, each in own.items()]
    ((space, rank),) = ranks.items()
    one_is_enough = space != "content" and all(rows[space][k] >= 0.5 for k in own[space])
    ok.append(rank >= 1.5 or (rank >= 0.5 and one_is_enough))
    head = headline(f)
    assert head.startswith("Disentangled") == all(ok), (rows, ranks, head)
    assert re.fullmatch(r"(Disentangled|Not disentangled|Partly disentangled|Undecided): .+[.]", head)
    assert "nan" not in head and ".." not in head
    assert (head.startswith("Not")) == bool({*FAILS} & {*worst_first(f)})
    assert worst_first(f) == sorted(worst_first(f), key=[*FAILS, *PARTLY, *OPEN].index)
    assert bool(advice(f)) == (not head.startswith("Disentangled"))
