"""The headline of a report on known factors, and the words for parameters and p-values."""

import dataclasses
import math

import pytest
from score_tables import by_hand, changed, findings, headline, known

from ssd_addon import report
from ssd_addon.report import advice as advising
from ssd_addon.report.advice import advice
from ssd_addon.report.readings import p_value, short
from ssd_addon.report.verdict import DISENTANGLED

# ---- known factors


def test_known_factors_in_one_space_each_are_no_problem_and_are_named():
    f = changed(labelled=known([[0.95, 0.0], [0.0, 0.8], [0.04, math.nan]]))
    head, each = report.verdict(f)
    assert head == DISENTANGLED
    assert each[0].endswith("no augmentation group. Of the known factors, a linear probe decodes shape (R² = 0.95).")
    assert each[2].endswith("no parameter of another group.")


def test_a_known_factor_in_two_spaces_is_not_disentangled():
    f = changed(labelled=known([[0.95, 0.0], [0.46, 0.8], [0.0, 0.0]]))
    assert headline(f) == (
        "Not disentangled: both content and color encode the known factor shape (R² = 0.95 and 0.46)."
    )
    assert advice(f)[0] == (advising.IN_BOTH.replace("{what}", "shape"), advising.GROUP)
    f = changed(labelled=known([[0.3, 0.2], [0.9, 0.8], [0.0, 0.0]]))
    assert headline(f) == (
        "Not disentangled: both color and content encode the known factor shape (R² = 0.90 and 0.30), and 1 more known "
        "factor is in several spaces."
    )
    assert headline(changed(labelled=known([[0.95, 0.0], [0.46, 0.8], [0.0, 0.0]], low=-1.0))) == DISENTANGLED


def test_a_kernel_probe_finds_known_factors_in_two_spaces_too():
    f = changed(labelled=known([[0.95, 0.0], [0.0, 0.8], [0.0, 0.0]], [[1.0, 0.0], [0.38, 0.9], [0.0, 0.0]]))
    head, each = report.verdict(f)
    assert head == (
        "Not disentangled: both content and color encode the known factor shape (kernel probe, R² = 1.00 and 0.38)."
    )
    assert each[1].endswith(
        "a linear probe decodes hue (R² = 0.80), and a kernel probe also decodes shape (R² = 0.38)."
    )


OWN = {"content": ("shape",), "color": ("hue",), "spatial": ()}
LEAKS = {("content", "hue"): (0.4, 0.001), ("color", "shape"): (0.45, 0.03), ("spatial", "hue"): (0.0, 1.0)}


def test_known_factors_leak_where_their_test_says_so():
    labelled = known([[0.95, 0.4], [0.46, 0.9], [0.0, 0.0]])
    leaks = (
        "the known factor shape leaks into the color space (partial R² = 0.45), and 1 more leak of a known factor was "
        "found"
    )
    exclusive = by_hand(LEAKS, ("shape", "hue"), OWN)
    for f in (changed(labelled=labelled, exclusive=exclusive), findings(None, labelled, exclusive=exclusive)):
        assert headline(f) == f"Not disentangled: {leaks}."
    assert "It also encodes shape (partial R² = 0.45, p = 0.03)." in report.verdict(changed(exclusive=exclusive))[1][1]
    found = advice(changed(exclusive=exclusive))
    assert found[0] == (advising.FACTOR_IN_STYLE.replace("{what}", "shape").replace("{space}", "color"), advising.KEYS)
    assert found[1] == (advising.FACTOR_IN_CONTENT.replace("{what}", "hue"), advising.GROUP)


def test_the_worst_augmentation_and_the_worst_known_factor_are_both_named():
    f = changed(content=[0.31, 0.0, 0.0], exclusive=by_hand(LEAKS, ("shape", "hue"), OWN))
    assert headline(f).startswith(
        "Not disentangled: brightness leaks into the content space (R² = 0.31); the known factor shape leaks into the "
    )


def test_a_tested_factor_may_be_in_several_spaces():
    labelled, quiet = known([[0.95, 0.4], [0.46, 0.9], [0.0, 0.0]]), by_hand({}, ("shape", "hue"), OWN)
    assert headline(changed(labelled=labelled, exclusive=quiet)) == DISENTANGLED
    head = headline(findings(None, labelled, exclusive=quiet))
    assert head == "No known factor leaks. Which augmentations the spaces encode was not measured."
    some = dataclasses.replace(quiet, spaces=("content", "spatial"))  # color was not tested
    assert headline(changed(labelled=labelled, exclusive=some)).startswith("Not disentangled: both content and color")


def test_known_factors_alone_make_a_verdict():
    f = findings(None, known([[0.95, 0.0], [0.0, 0.8], [0.0, 0.0]]))
    head, each = report.verdict(f)
    assert head == "Which augmentations the spaces encode was not measured."
    assert each == [
        "From the content space, a linear probe decodes shape (R² = 0.95).",
        "From the color space, a linear probe decodes hue (R² = 0.80).",
        "The spatial space encodes none of the known factors.",
    ]


# ---- words


@pytest.mark.parametrize(
    ("p", "said"),
    [(1.0, "p = 1"), (0.4321, "p = 0.44"), (0.05, "p = 0.05"), (0.0321, "p = 0.033"), (0.001, "p ≤ 0.001")],
)
def test_a_p_value_is_rounded_up(p, said):
    assert p_value(p) == said


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("color/0.ColorJitter/hue_factor", "hue"),
        ("spatial/1.RandomHorizontalFlip/batch_prob", "horizontal flip on or off"),
        ("spatial/0.RandomResizedCrop/src", "place and size of the crop"),
        ("shape", "shape"),
    ],
)
def test_parameters_have_names_for_people(name, expected):
    assert short(name) == expected


def test_the_class_of_a_folder_may_be_in_several_spaces():
    labelled = known([[0.95, 0.4], [0.46, 0.2], [0.0, 0.0]], factors=("class", "hue"))
    head = headline(changed(labelled=labelled))
    assert "both content and color encode the known factor hue" in head and "class" not in head


def test_without_the_views_a_factor_in_two_spaces_decides_nothing():
    head = headline(findings(None, known([[0.95, 0.4], [0.46, 0.0], [0.0, 0.0]])))
    assert head.startswith(
        "Undecided: which augmentations the spaces encode was not measured, but both content and color"
    )
