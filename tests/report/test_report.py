"""The report: what it says of matrices made by hand, what it says where it cannot, and that one page holds it all."""

import dataclasses
import io
import json
import math
import re
import sys

import pages
import pytest
import timm
import torch
from PIL import Image
from torchvision.models import resnet18

from ssd_addon import StyleHeads, report
from ssd_addon.__main__ import main
from ssd_addon.metrics import Dependence, Exclusivity, ScoreTable, label_free
from ssd_addon.report import curves, pictures
from ssd_addon.report import findings as measured
from ssd_addon.report import page as rendering
from ssd_addon.report.findings import Findings
from ssd_addon.report.table import number
from ssd_addon.report.verdict import p_value, short


def table(scores, factors, low=0.9, parts=None, probe="kernel"):
    """A table of rows {space: [scores]}; intervals reach from `low` times the score to the score."""
    cells = {(s, f): v for s, row in scores.items() for f, v in zip(factors, row, strict=True)}
    intervals = {c: (low * v, v) for c, v in cells.items() if not math.isnan(v)}
    return ScoreTable(tuple(scores), tuple(factors), cells, intervals, {}, probe, (), 50, 50, "pairs of views", parts)


def groups(content, color, spatial, **options):
    """The label-free findings with these rows, scores of the groups color and spatial."""
    return findings(table({"content": content, "color": color, "spatial": spatial}, GROUPS, **options))


def findings(label_free=None, labelled=None, spaces=("content", "color", "spatial")):
    tiles = {s: torch.eye(3) for s in spaces}
    rows = torch.arange(3)
    return Findings("t", [], spaces, labelled or {}, label_free, None, {}, None, None, rows, tiles, [], {})


GROUPS = ("color", "spatial")


def exclusivity_by_hand(cells, factors=GROUPS, own=None):
    """Tests with (effect, corrected p) in some cells, none in the others."""
    spaces = ("content", "color", "spatial")
    found = {(s, f): Dependence(*(math.nan,) * 4) for s in spaces for f in factors}
    found |= {cell: Dependence(3.0, effect, p, p) for cell, (effect, p) in cells.items()}
    return Exclusivity(spaces, tuple(factors), own or {s: (s,) for s in GROUPS}, found, {}, 100, "permutations")


def test_verdict_of_disentangled_spaces():
    head, each = report.verdict(groups([0.0, 0.05], [0.9, 0.0], [0.0, 0.6]))
    assert head == "Disentangled: each style space encodes its own augmentation group and no other."
    assert each == [
        "content encodes no augmentation group.",
        "color encodes color (R² = 0.90), and no parameter of another group.",
        "spatial encodes spatial (R² = 0.60), and no parameter of another group.",
    ]


def test_verdict_names_every_leak():
    head, each = report.verdict(groups([0.0, 0.21], [0.93, 0.3], [0.0, 0.7]))
    assert head == "Not disentangled: color also encodes spatial (R² = 0.30); content encodes spatial (R² = 0.21)."
    assert each[0] == "content encodes spatial (R² = 0.21)."
    assert each[1] == "color encodes color (R² = 0.93), but also spatial (R² = 0.30)."


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (0.02, "spatial does not encode its own group (R² = 0.02 on average)"),
        (0.23, "spatial encodes its own group only in part (R² = 0.23 on average)"),
    ],
)
def test_a_style_that_learnt_little_is_not_called_disentangled(score, reason):
    head, each = report.verdict(groups([0.0, 0.0], [0.9, 0.0], [0.0, score]))
    assert head == f"No augmentation group leaks, but {reason}."
    assert each[2] == (
        "spatial does not encode its own group, nor any other."
        if score < 0.1
        else "spatial weakly encodes spatial (R² = 0.23), and no parameter of another group."
    )


def test_what_is_not_above_chance_is_no_leak():
    scores = ([0.0, 0.2], [0.9, 0.0], [0.0, 0.6])
    assert report.verdict(groups(*scores, low=-1.0))[0].startswith("No augmentation group leaks")
    assert report.verdict(groups(*scores, low=0.1))[0].startswith("Not disentangled")


def test_a_group_leaks_through_any_of_its_parameters():
    names = ("color/0.ColorJitter/brightness_factor", "color/0.ColorJitter/hue_factor", "spatial/0.RandomAffine/angle")
    parts = table({"content": [0.0, 0.5, 0.0], "color": [0.9, 0.3, 0.0], "spatial": [0.0, 0.0, 0.8]}, names)
    whole = table({"content": [0.09, 0.0], "color": [0.6, 0.0], "spatial": [0.0, 0.8]}, GROUPS, parts=parts)
    head, each = report.verdict(findings(whole))
    assert head == "Not disentangled: content encodes color's hue (R² = 0.50)."
    assert each[1] == (
        "color encodes brightness (R² = 0.90), weakly hue (R² = 0.30), and no parameter of another group."
    )


def test_a_group_of_which_one_parameter_is_encoded_is_encoded_in_part():
    names = ("color/0.ColorJitter/brightness_factor", "color/0.ColorJitter/hue_factor", "spatial/0.RandomAffine/angle")
    parts = table({"content": [0.0, 0.0, 0.0], "color": [0.6, 0.0, 0.0], "spatial": [0.0, 0.0, 0.8]}, names)
    whole = table({"content": [0.0, 0.0], "color": [0.3, 0.0], "spatial": [0.0, 0.8]}, GROUPS, parts=parts)
    head, _ = report.verdict(findings(whole))
    assert head == "No augmentation group leaks, but color encodes its own group only in part (R² = 0.30 on average)."


APART = {"content": [0.0, 0.0], "color": [0.9, 0.0], "spatial": [0.0, 0.6]}


def test_verdict_names_the_known_factors_too():
    labelled = {
        "ridge": table({"content": [0.95, 0.0], "color": [0.0, 0.8], "spatial": [0.04, math.nan]}, ("shape", "hue"))
    }
    head, each = report.verdict(findings(table(APART, GROUPS), labelled))
    assert head.startswith("Disentangled: ")
    assert each[0] == (
        "content encodes no augmentation group; of the known factors, shape (R² = 0.95) can be decoded from it."
    )
    assert each[2].endswith("no parameter of another group.")


def test_a_known_factor_in_two_spaces_is_no_disentanglement():
    labelled = {"ridge": table({"content": [0.95], "color": [0.46], "spatial": [0.0]}, ("shape",))}
    head, _ = report.verdict(findings(table(APART, GROUPS), labelled))
    assert head == (
        "No augmentation group leaks, but shape can be decoded from content (R² = 0.95) and from color (0.46)."
    )
    fine = [({"content": [0.95], "color": [0.46], "spatial": [0.0]}, -1.0)]  # not above chance
    fine.append(({"content": [0.3], "color": [0.9], "spatial": [0.0]}, 0.9))  # in content, of which nothing is claimed
    for scores, low in fine:
        labelled = {"ridge": table(scores, ("shape",), low=low)}
        assert report.verdict(findings(table(APART, GROUPS), labelled))[0].startswith("Disentangled: ")


@pytest.mark.parametrize(
    ("scores", "factors", "spaces", "reason"),
    [
        (APART, GROUPS, ("content", "color"), "no space is named after spatial, so whether it is kept is not known"),
        ({"content": [0.0, 0.0]}, GROUPS, ("content",), "named after color and spatial, so whether they are kept"),
        (APART, GROUPS, ("content", "color", "spatial", "extra"), "extra has no augmentation group"),
        ({s: [r[0], math.nan] for s, r in APART.items()}, GROUPS, tuple(APART), "spatial could not be scored"),
    ],
)
def test_a_headline_claims_no_more_than_was_measured(scores, factors, spaces, reason):
    head, _ = report.verdict(findings(table({s: scores.get(s, [0.0, 0.0]) for s in spaces}, factors), spaces=spaces))
    assert head.startswith("No augmentation group leaks, but ") and reason in head


def test_no_verdict_without_a_matrix():
    assert report.verdict(findings()) == ("What the spaces encode could not be measured.", [])


@pytest.mark.parametrize(
    ("effect", "p", "head"),
    [
        (0.03, 0.004, "Not disentangled: color also encodes spatial (partial R² = 0.03, p = 0.004)."),
        (0.03, 0.0002, "Not disentangled: color also encodes spatial (partial R² = 0.03, p ≤ 0.001)."),
        (0.01, 0.001, "Disentangled: each style space encodes its own augmentation group and no other."),
        (0.3, 0.06, "Disentangled: each style space encodes its own augmentation group and no other."),
    ],
)
def test_a_leak_is_what_the_test_rejects_with_an_effect_that_matters(effect, p, head):
    """The score of 0.3 alone, which would be a leak without the test, does not decide."""
    found = groups([0.0, 0.0], [0.9, 0.3], [0.0, 0.6])
    tested = dataclasses.replace(found, tests=exclusivity_by_hand({("color", "spatial"): (effect, p)}))
    said, each = report.verdict(tested)
    assert said == head
    assert ("but also spatial (partial" in each[1]) == head.startswith("Not")


def test_a_cell_without_a_test_is_decided_by_its_score():
    found = groups([0.0, 0.2], [0.9, 0.3], [0.0, 0.6])
    tested = dataclasses.replace(found, tests=exclusivity_by_hand({("color", "spatial"): (0.0, 1.0)}))
    assert report.verdict(tested)[0] == "Not disentangled: content encodes spatial (R² = 0.20)."


def test_a_group_leaks_through_the_parameter_that_the_test_names():
    names = ("color/0.ColorJitter/brightness_factor", "color/0.ColorJitter/hue_factor", "spatial/0.RandomAffine/angle")
    parts = table({"content": [0.0, 0.0, 0.0], "color": [0.9, 0.9, 0.0], "spatial": [0.0, 0.0, 0.8]}, names)
    whole = table({"content": [0.0, 0.0], "color": [0.9, 0.0], "spatial": [0.0, 0.8]}, GROUPS, parts=parts)
    finer = exclusivity_by_hand({("content", names[0]): (0.2, 0.5), ("content", names[1]): (0.05, 0.01)}, names)
    tests = dataclasses.replace(exclusivity_by_hand({("content", "color"): (0.05, 0.01)}), parts=finer)
    head, _ = report.verdict(dataclasses.replace(findings(whole), tests=tests))
    assert head == "Not disentangled: content encodes color's hue (partial R² = 0.05, p = 0.01)."


def test_known_factors_leak_where_their_test_says_so():
    labelled = {"ridge": table({"content": [0.95, 0.4], "color": [0.46, 0.9], "spatial": [0.0, 0.0]}, ("shape", "hue"))}
    cells = {("content", "hue"): (0.4, 0.001), ("color", "shape"): (0.45, 0.03), ("spatial", "hue"): (0.0, 1.0)}
    own = {"content": ("shape",), "color": ("hue",), "spatial": ()}
    exclusive = exclusivity_by_hand(cells, ("shape", "hue"), own)
    leaks = "color {}encodes shape (partial R² = 0.45, p = 0.03); content encodes hue (partial R² = 0.40, p ≤ 0.001)."
    both = dataclasses.replace(findings(table(APART, GROUPS), labelled), exclusive=exclusive)
    assert report.verdict(both)[0] == "Not disentangled: " + leaks.format("also ")
    alone = dataclasses.replace(findings(None, labelled), exclusive=exclusive)
    assert report.verdict(alone)[0] == "Not disentangled: " + leaks.format("")
    nothing = dataclasses.replace(alone, exclusive=exclusivity_by_hand({}, ("shape", "hue"), own))
    assert report.verdict(nothing)[0] == "No known factor leaks; which augmentations are encoded is not known."
    nothing = dataclasses.replace(both, exclusive=nothing.exclusive)  # shape in two spaces is no doubt: it was tested
    assert report.verdict(nothing)[0].startswith("Disentangled: ")


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
        ("spatial/1.RandomHorizontalFlip/batch_prob", "HorizontalFlip on or off"),
        ("spatial/0.RandomResizedCrop/src", "ResizedCrop place and size"),
        ("shape", "shape"),
    ],
)
def test_parameters_have_names_for_people(name, expected):
    assert short(name) == expected


def test_spaces_that_are_named_after_no_group_are_not_called_disentangled():
    only = findings(table({"content": [0.0, 0.0]}, GROUPS), spaces=("content",))
    assert report.verdict(only)[0] == (
        "No augmentation group leaks, but no space is named after color and spatial, so whether they are kept is not "
        "known."
    )
    other = findings(table({"content": [0.0], "tint": [0.9]}, ("color",)), spaces=("content", "tint"))
    assert report.verdict(other)[0] == "Not disentangled: tint encodes color (R² = 0.90)."


def test_known_factors_alone_make_a_verdict():
    labelled = {"ridge": table({"content": [0.95, 0.0], "color": [0.0, 0.8]}, ("shape", "hue"))}
    head, each = report.verdict(findings(None, labelled, ("content", "color")))
    assert "was not measured" in head and each == [
        "shape (R² = 0.95) can be decoded from content.",
        "hue (R² = 0.80) can be decoded from color.",
    ]


def test_images_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected uint8, or floating point in \[0, 1\]: got values from 0 to"):
        report.write(tmp_path / "r.html", pages.model, pages.squares(20).images * 255)


def test_a_factor_with_a_slash_keeps_its_name(tmp_path):
    data = pages.squares(30)
    report.write(tmp_path / "r.html", pages.model, report.Data(data.images, {"light/dark": data.factors["light"]}))
    assert '<th scope="col">light/dark</th>' in (tmp_path / "r.html").read_text()


# ---- the page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    said = []
    log = [{"step": s, "loss": 2.0, "constraint/color": 0.1 * s, "effective_rank/color": math.nan} for s in range(3)]
    found = report.write(
        out, pages.model, pages.squares(60), views=pages.views(), log=log, title="squares", say=said.append
    )
    return out.read_text(), found, said


def test_one_page_holds_everything(written):
    html, found, said = written
    assert "label-free matrix" in said and found.reasons == {}
    assert not re.search(r'(?:src|href)="(?!data:)', html) and "http" not in html.replace("http-equiv", "")
    assert html.count("<table") == 7  # two label-free, two labelled, views, geometry, redundancy
    for text in ("n = 1020 pairs of views", "shares color with the query", "misalignment of positive pairs"):
        assert text in html
    kept = json.loads(re.search(r'id="findings">(.*?)</script>', html)[1])
    assert kept["verdict"][0] == report.verdict(found)[0]
    assert ScoreTable.from_json(kept["label_free"])["color", "color"] == found.label_free["color", "color"]


def test_the_numbers_on_the_page_are_those_of_the_tables(written):
    html, found, _ = written
    for t in (found.label_free, found.label_free.parts, *found.labelled.values()):
        for space in t.spaces:
            for factor in t.factors:
                assert f'title="{space}, {factor}">{number(t[space, factor])}<small>' in html


def test_a_cell_that_was_tested_says_p_and_effect(written):
    html, found, _ = written
    for t in (found.tests, found.tests.parts):
        for (space, factor), test in t.tests.items():
            cell = re.search(rf'title="{re.escape(f"{space}, {factor}")}">(.*?)</td>', html)[1]
            said = f"<small>{p_value(test.corrected)}, partial R² {number(test.effect)}</small>" if test.p > 0 else ""
            assert said in cell and ("partial" in cell) == bool(said)
    assert "test of conditional independence, given its own" in html and "at least 0.02" in html
    kept = json.loads(re.search(r'id="findings">(.*?)</script>', html)[1])["exclusivity"]
    assert Exclusivity.from_json(kept["label_free"]).leaks == found.tests.leaks == () and kept["labelled"] is None


def test_known_factors_are_tested_where_it_is_said_whose_they_are(tmp_path):
    own = {"content": (), "color": ("light",), "spatial": ("x",)}
    found = report.write(tmp_path / "r.html", pages.model, pages.squares(60), own=own)
    assert found.exclusive.own == own and not math.isnan(found.exclusive["color", "x"].p) and found.tests is None
    html = (tmp_path / "r.html").read_text()
    assert p_value(found.exclusive["color", "x"].corrected) in html and "test of conditional independence" in html
    few = report.write(tmp_path / "r.html", pages.model, pages.squares(30), own=own)
    assert few.exclusive is None and "at least 50 samples: got 30" in few.reasons["exclusivity of known factors"]
    assert "test of what leaks: exclusivity: expected at least 50 samples" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        ({"colour": ("light",)}, ValueError, "own: expected spaces among content, color, spatial: got 'colour'"),
        ({"color": ("hue",)}, ValueError, "own: expected factors among x, light, kind: got hue for space 'color'"),
        ({"color": "light"}, TypeError, "own: expected a sequence of factors for space 'color'"),
    ],
)
def test_own_factors_that_are_not_there_are_refused(tmp_path, own, error, message):
    with pytest.raises(error, match=message):
        report.write(tmp_path / "r.html", pages.model, pages.squares(12), own=own)


def test_parameters_that_are_not_drawn_independently_are_not_tested(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("independent: expected factors that are drawn independently")

    monkeypatch.setattr(measured, "exclusivity_of", refuse)
    found = report.write(tmp_path / "r.html", pages.model, pages.squares(20), views=pages.views())
    assert found.tests is None and found.label_free is not None
    assert "test of what leaks: independent: expected factors" in (tmp_path / "r.html").read_text()


def test_names_cannot_break_the_page(tmp_path):
    evil = '</script><script>alert("x")</script>'
    data = pages.squares(30)
    data = report.Data(data.images, {evil: data.factors["x"]}, [evil] * 30)
    out = tmp_path / "r.html"
    report.write(out, pages.model, data, views=pages.views(), title=evil, about=[(evil, evil)])
    html = out.read_text()
    assert "<script>alert" not in html
    assert html.count("<script") == 3 and html.count("</script>") == 3


@pytest.mark.parametrize(
    ("images", "views", "reasons"),
    [
        (
            3,
            True,
            {
                "label-free matrix": "at least 10",
                "known factors, linear probe": "at least 10",
                "redundancy": "at least 10",
            },
        ),
        (40, False, {"label-free matrix": "the views of the training are not known"}),
    ],
)
def test_what_cannot_be_measured_has_its_reason(tmp_path, images, views, reasons):
    out = tmp_path / "r.html"
    found = report.write(out, pages.model, pages.squares(images), views=pages.views() if views else None)
    for part, reason in reasons.items():
        assert reason in found.reasons[part]
        assert found.reasons[part].split(":")[0].replace("'", "&#x27;") in out.read_text()
    assert "n/a" in out.read_text()


def test_the_page_says_how_many_files_are_broken(tmp_path):
    x = torch.rand(20, 3, 8, 8)
    for broken, said in ((0, None), (3, "3, which are left out")):
        data = report.Data(x, total=30, broken=broken)
        found = report.write(tmp_path / "r.html", lambda x: {"content": x.mean((2, 3))}, data)
        assert dict(found.about).get("broken files") == said


def test_constant_factors_are_not_scored(tmp_path):
    data = pages.squares(30)
    factors = {"same": torch.ones(30), "one": torch.zeros(30, dtype=torch.long), "bad": torch.full((30,), math.nan)}
    found = report.write(tmp_path / "r.html", pages.model, report.Data(data.images, factors))
    ridge = found.labelled["ridge"]
    assert all(math.isnan(ridge["color", f]) for f in factors)
    html = (tmp_path / "r.html").read_text()
    assert (
        "same: constant" in html and "one: one class in the training split" in html and "bad: 30 of 30 values" in html
    )
    kept = re.search(r'id="findings">(.*?)</script>', html)[1]
    assert "NaN" not in kept.replace("NaN or inf", "") and ">nan<" not in html


def test_few_images_have_every_number_that_can_be_had(tmp_path):
    data, out = pages.squares(12), tmp_path / "r.html"

    def model(x):
        return {"content": x.mean((2, 3)), "color": x.amax((2, 3))}

    label = torch.arange(12) % 2
    found = report.write(out, model, report.Data(data.images, {"kind": label}))
    assert all(not math.isnan(v) for v in (found.summary.sap, found.summary.mig)) and found.summary.dci is not None
    found = report.write(out, model, report.Data(data.images, {"x": data.factors["x"]}))
    assert math.isnan(found.summary.mig) and not math.isnan(found.summary.sap) and found.summary.dci is not None
    assert "MIG <b>n/a</b>" in out.read_text() and "MIG: bins: expected no more than the 6 samples" in out.read_text()
    spoilt = report.write(out, model, report.Data(data.images[:8], {"x": data.factors["x"][:8]}))
    assert spoilt.summary is None and "known factors, linear probe" in spoilt.reasons


@pytest.mark.parametrize("views", [True, False])
def test_a_space_of_zeros_does_not_cost_the_geometry_of_the_others(tmp_path, views):
    def model(x):
        z = {"content": x.mean((2, 3)), "color": 0 * x.mean((2, 3)), "spatial": x.amax((2, 3))}
        return z if views else z["color"]

    found = report.write(tmp_path / "r.html", model, pages.squares(24), views=pages.views() if views else None)
    space = "color" if views else "backbone"
    assert found.geometry[space]["effective_rank"] == 0 and math.isnan(found.geometry[space]["uniformity"])
    assert "of length 0" in found.reasons[f"geometry of {space}"]
    assert f"n/a for {space}: " in (tmp_path / "r.html").read_text()
    if views:
        assert all(not math.isnan(v) for s in ("content", "spatial") for v in found.geometry[s].values())


def test_models_without_styles_or_of_other_spaces(tmp_path):
    only = report.write(
        tmp_path / "a.html", lambda x: {"content": x.mean((2, 3))}, pages.squares(30), views=pages.views()
    )
    assert "are not those of the views" in only.reasons["geometry"]
    assert only.shared is None and only.summary is None
    assert (tmp_path / "a.html").exists()


def test_a_model_that_has_diverged_makes_no_page(tmp_path):
    with pytest.raises(ValueError, match="space 'content': expected finite embeddings.*diverged"):
        report.write(tmp_path / "r.html", lambda x: {"content": x.mean((2, 3)) * math.nan}, pages.squares(20))
    assert not (tmp_path / "r.html").exists()


def test_the_page_is_bounded(tmp_path, monkeypatch):
    g = torch.Generator().manual_seed(0)
    noise = report.Data(torch.randint(256, (120, 3, 200, 200), generator=g, dtype=torch.uint8))
    monkeypatch.setattr(report, "LIMIT", 500_000)
    found = report.write(tmp_path / "r.html", lambda x: {"content": x.mean((2, 3))}, noise)
    assert len(found.explored) == 60
    assert (tmp_path / "r.html").stat().st_size < 500_000


def test_pictures_are_bounded_and_keep_their_colors():
    import base64

    x = torch.zeros(3, 300, 150)
    x[0] = 1.0
    address = pictures.picture(x)
    picture = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))
    assert picture.size == (48, 96) and picture.getpixel((20, 50))[0] > 250 > 10 > picture.getpixel((20, 50))[2]


@pytest.mark.parametrize(
    "points",
    [
        [(0, 1.0)],
        [(5, 2.0), (6, 2.0)],
        [(0, -1e-12), (1, 1e-12)],
        [(0, 1e6), (9, 3e6)],
        [(0, 1e20), (1, 1e20)],
        [(0, -1e20), (1, -1e20)],
        [(0, 1e20), (1, 1.00001e20)],
        [(0, -9e299), (1, 9e299)],
    ],
)
def test_curves_of_any_range(points):
    svg = curves.panel("title", "unit", {0: points})
    assert "nan" not in svg and "inf" not in svg
    assert all(
        0 <= float(x) <= 320 and 0 <= float(y) <= 212
        for x, y in re.findall(r"([\d.-]+),([\d.-]+)", svg.split("points=")[1])
    )


# ---- where it is written, and the command


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    """A page is looked at here, not a score."""
    monkeypatch.setattr(label_free, "PAIRS", 100)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    calls = []
    for out, message in ((tmp_path / "file" / "r.html", "can be written"), (tmp_path, "got a folder")):
        with pytest.raises(OSError, match=message):
            report.write(out, lambda x: calls.append(1), pages.squares(20))
    assert calls == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a card, a log and a data set of class folders."""
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    heads = StyleHeads(resnet18(num_classes=4), {"content": 8, "color": 4, "spatial": 4}, hidden=(16,))
    card = {"backbone": "torchvision:resnet18", "views": pages.CARD, "family": "simclr", "size": 32}
    heads.save(root / "model.pt", card=card)
    (root / "bad.py").write_text(
        "import torch\n"
        "def raises(): 1 / 0\n"
        "def grey(): return torch.rand(20, 1, 32, 32), {}\n"
        "def two(): return torch.rand(20, 2, 32, 32), {}\n"
        "def last(): return torch.rand(20, 32, 32, 4), {}\n"
        "def key(): raise KeyError('data: x')\n"
        "def value(): raise ValueError('data: x')\n"
        "class Fails(torch.nn.Conv2d):\n"
        "    def forward(self, x): raise ValueError('size: x')\n"
        "def fails(): return torch.nn.Sequential(Fails(1, 4, 3))\n"
        "def conv(channels): return torch.nn.Sequential(torch.nn.Conv2d(channels, 4, 3), torch.nn.ReLU())\n"
        "def one(): return conv(1)\n"
        "def four(): return conv(4)\n"
    )
    for channels in (1, 4):
        small = StyleHeads(
            torch.nn.Sequential(torch.nn.Conv2d(channels, 4, 3)), {"content": 2}, in_features=4, hidden=()
        )
        small.save(root / f"channels{channels}.pt", card={"size": 8})
    torch.save([1, 2], root / "list.pt")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    (root / "vit").mkdir()
    vit_card = card | {"backbone": "timm:vit_tiny_patch16_224"}
    torch.manual_seed(0)
    StyleHeads(vit, {"content": 8, "color": 4, "spatial": 4}, hidden=()).save(root / "vit" / "model.pt", card=vit_card)
    (root / "log.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 10, "loss": 0.5}\n{"step": 2')
    for k, image in enumerate((pages.squares(24, 40).images * 255).to(torch.uint8)):
        folder = root / "data" / ("a", "b")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k}.png")
    return root


def test_the_command_writes_a_page(run, tmp_path, capsys):
    out = tmp_path / "page" / "report.html"
    assert main(["report", str(run), "--data", str(run / "data"), "--out", str(out)]) == 0
    html = out.read_text()
    said = capsys.readouterr().out
    assert "read 24/24 images" in said and "written: " in said
    assert "spaces <b>content 8, color 4, spatial 4</b>" in html and "embeddings <b>L2-normalized</b>" in html
    assert 'title="a/0.png"' in html and "loss: from step 0 to 10" in html
    assert "spatial, class" in html  # the class folders are a factor


def test_the_command_takes_a_file_and_fewer_images(run, tmp_path, capsys):
    out = tmp_path / "r.html"
    arguments = ["report", str(run / "model.pt"), "--data", str(run / "data"), "--samples", "12", "--rows", "raw"]
    assert main([*arguments, "--views", "color_spatial", "--out", str(out)]) == 0
    assert "12 of 24" in out.read_text() and "embeddings <b>as they are</b>" in out.read_text()
    assert "ResizedCrop place and size" in out.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "nothing"}, "expected a run's folder or a checkpoint"),
        ({"data": "nothing"}, "expected a folder of images"),
        ({"out": "model.pt/x/r.html"}, "can be written"),
        (
            {"more": ["--backbone", "torchvision:nonsense"]},
            "expected a classification model of torchvision (see torchvision.models): got 'nonsense'",
        ),
        ({"more": ["--views", "nonsense"]}, "preset: expected one of"),
        ({"more": ["--device", "foo"]}, "--device: expected one that this machine has, such as cpu: got foo"),
        ({"more": ["--device", "cuda:99"]}, "--device: expected one that this machine has, such as cpu: got cuda:99"),
        ({"more": ["--device", "meta"]}, "--device: expected one that this machine has, such as cpu: got meta"),
        ({"more": ["--device", ""]}, "--device: expected one that this machine has"),
        ({"out": "data"}, "--out: expected a file to write"),
        ({"data": "nothing"}, "--data: expected a folder of images, or FILE.py:NAME: got"),
        ({"data": "bad.py:nothing"}, "--data: "),
        ({"more": ["--backbone", "nonsense"]}, "--backbone: expected torchvision:NAME, timm:NAME or FILE.py:NAME"),
        ({"run": "list.pt"}, "list.pt: expected a checkpoint of StyleHeads"),
        (
            {"run": "vit"},
            "doesn't match model (224).); if that is because of their size, --size brings them to another",
        ),
        ({"data": "bad.py:two"}, "to have 3 channels, but got 2 channels instead)\n"),
        ({"data": "bad.py:raises"}, "bad.py:raises raised ZeroDivisionError: division by zero"),
        ({"data": "bad.py:last"}, "expected [n, C, H, W]: got [20, 32, 32, 4], which looks like [n, H, W, C]"),
        ({"run": "channels1.pt"}, "pass --backbone 'torchvision:NAME', 'timm:NAME' or 'FILE.py:NAME'"),
        (
            {"run": "channels4.pt", "more": ["--backbone", "bad.py:four"]},
            "to have 4 channels, but got 3 channels instead)\n",
        ),
        ({"more": ["--backbone", "bad.py:key"]}, "error: KeyError: 'data: x'\n"),
        ({"more": ["--backbone", "bad.py:value"]}, "error: ValueError: data: x\n"),
        ({"run": "channels1.pt", "more": ["--backbone", "bad.py:fails"]}, "error: ValueError: size: x\n"),
    ],
)
def test_the_command_says_what_is_wrong(run, capsys, change, message):
    out = run / change.get("out", "r.html")
    arguments = ["report", str(run / change.get("run", "")), "--data", str(run / change.get("data", "data"))]
    more = [m.replace("bad.py", str(run / "bad.py")) for m in change.get("more", [])]
    assert main([*arguments, "--out", str(out), *more]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ") and "Traceback" not in captured.err


def test_gray_images_are_measured_by_a_model_of_three_channels(run, tmp_path):
    out = tmp_path / "r.html"
    assert main(["report", str(run), "--data", str(run / "bad.py:grey"), "--out", str(out)]) == 0
    assert "gray images, repeated to the 3 channels that the model takes" in out.read_text()


ERRORS = [IndexError("list\nindex"), ZeroDivisionError("by zero"), AttributeError("no x"), KeyError("k")]


@pytest.mark.parametrize("error", ERRORS)
def test_any_error_is_one_line(run, tmp_path, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(report, "write", fail)
    assert main(["report", str(run), "--data", str(run / "data"), "--out", str(tmp_path / "r.html")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert said[7:].split("\n")[0] == f"{type(error).__name__}: {str(error).splitlines()[0]}"


def test_names_that_a_terminal_cannot_show_are_said_all_the_same(run, tmp_path, monkeypatch):
    """The last line names the page: the report used to die there."""
    out = tmp_path / "caf\udce9 \u202e \u00e9.html"
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    assert main(["report", str(run), "--data", str(run / "data"), "--out", str(out)]) == 0
    stream.flush()
    said = stream.buffer.getvalue().decode("ascii")
    assert r"caf\ufffd \ufffd \xe9.html (0." in said and r"R\xb2" in said and out.exists()


def test_a_broken_log_costs_the_curves_alone(run, tmp_path, capsys):
    import shutil

    there = shutil.copytree(run, tmp_path / "run")
    (there / "log.jsonl").write_text('{"step": 0}\nhello\n{"step": 2}\n')
    out = tmp_path / "r.html"
    assert main(["report", str(there), "--data", str(there / "data"), "--out", str(out)]) == 0
    assert "the log is left out: " in capsys.readouterr().out
    assert "line 2: expected a JSON object" in out.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["a"]}, "names: expected 20, one per image: got 1"),
        ({"factors": {"light": torch.rand(19)}}, "factor 'light': expected a tensor of 20 values, one per image"),
        ({"factors": {"light": [1.0] * 20}}, "factor 'light': expected a tensor .*got list"),
        ({"factors": {3: torch.rand(20)}}, "factors: expected their names as strings: got 3"),
        ({"factors": {"kind": torch.arange(20) % 3}, "classes": {"kind": ["a", "b"]}}, "a word for each class up to 2"),
        ({"factors": {"kind": -torch.ones(20).long()}, "classes": {"kind": ["a"]}}, "from 0 on.*least class -1"),
        (
            {"images": torch.rand(20, 8, 8, 3)},
            r"images: expected .*got \[20, 8, 8, 3\], which looks like \[n, H, W, C\]",
        ),
        ({"explored": 0}, "explored: expected a whole number of images, 1 or more: got 0"),
    ],
)
def test_what_does_not_fit_the_images_is_refused_before_anything_is_computed(tmp_path, change, message):
    explored = change.pop("explored", 5)
    data = report.Data(**({"images": torch.rand(20, 3, 8, 8)} | change))
    with pytest.raises((ValueError, TypeError), match=message):
        report.write(tmp_path / "r.html", pytest.fail, data, explored=explored)


def test_steps_and_values_that_are_no_numbers_are_no_points(tmp_path):
    log = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": math.nan}, {"step": math.inf, "loss": 2.0}]
    log += [{"step": 2, "loss": 1e308}, {"step": 3, "loss": 10**400}, {"step": 4, "loss": 2.0}]
    out = tmp_path / "r.html"
    report.write(out, lambda x: {"content": x.mean((2, 3))}, torch.rand(20, 3, 8, 8), log=log)
    html = out.read_text()
    assert "loss: from step 0 to 4" in html and "nan" not in html.split("points=")[1].split(">")[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--samples 0", "--samples: expected 1 or more: got 0"),
        (f"--seed {2**64}", f"--seed: expected a whole number of 64 bits, as torch's generators take: got {2**64}"),
        (f"--seed {-(2**63) - 1}", "--seed: expected a whole number of 64 bits"),
        (f"--size {10**9}", f"--size: expected 16384 or less: got {10**9}"),
    ],
)
def test_numbers_out_of_range_are_refused(run, capsys, more, message):
    with pytest.raises(SystemExit):
        main(["report", str(run), "--data", "x", *more.split()])
    assert message in capsys.readouterr().err


def test_color_images_are_measured_by_a_model_of_one_channel_and_counts_may_be_huge(run, tmp_path):
    out, code = tmp_path / "r.html", run / "bad.py"
    arguments = ["report", str(run / "channels1.pt"), "--data", str(run / "data"), "--backbone", f"{code}:one"]
    huge = [word for name in ("samples", "explore", "batch-size") for word in (f"--{name}", str(10**30))]
    assert main([*arguments, *huge, "--out", str(out)]) == 0
    assert "color images, made gray, as the model takes one channel" in out.read_text()


def test_nothing_is_drawn_with_matplotlib(run):
    assert "matplotlib" not in (rendering.__file__ and vars(sys.modules["ssd_addon.report.page"]))


def test_a_factor_that_cannot_be_scored_does_not_cost_the_others(tmp_path):
    data = pages.squares(24)
    images = report.Data(data.images, {"x": data.factors["x"], "odd": torch.rand(24, 2, 2)})
    found = report.write(tmp_path / "r.html", lambda x: {"content": x.mean((2, 3)), "color": x.amax((2, 3))}, images)
    assert found.labelled["ridge"].factors == ("x",)
    assert (
        "odd is left out",
        "factor 'odd': expected numbers [n] or [n, k]: got [24, 2, 2] torch.float32",
    ) in found.about


def test_a_space_of_one_column_is_a_sign_when_rows_have_unit_length(tmp_path):
    def model(x):
        return {"content": x.mean((2, 3)), "tone": x.mean((1, 2, 3))[:, None] - 0.5}

    for unit in (True, False):
        found = report.write(tmp_path / "r.html", model, torch.rand(24, 3, 8, 8), on_sphere=unit)
        assert ("note" in dict(found.about)) == unit
    assert "tone: 1 wide, so of unit length there is a sign alone" not in (tmp_path / "r.html").read_text()
