"""What a report advises, and where the documentation says more."""

import re

import pytest
from score_tables import by_hand, changed

from ssd_addon.report import advice as advising
from ssd_addon.report.advice import advice


def test_every_kind_of_problem_has_one_sentence_of_advice_that_names_what_it_is_about():
    f = changed(content=[0.31, 0.0, 0.0], color=[0.9, 0.04, 0.2], spatial=[0.0, 0.0, 0.3], backbone=[0.9, 0.52, 0.34])
    said = [text for text, _ in advice(f)]
    assert said == [
        "To get brightness out of the content space, make that space narrower, or raise its weight by dual ascent "
        "where all views of an image can agree.",
        "To get angle out of the color space, check that no two groups change the same attribute, and make that space "
        "narrower.",
        "To get hue from the backbone into the color space, make that space wider, and use same-image keys if its "
        "group changes the attribute relative to the image.",
        "The backbone hardly encodes angle either: train longer or add EquivarianceLoss, and check in the pictures of "
        "the views that you can see the change yourself.",
    ]
    many = changed(exclusive=by_hand({("content", n): (0.4, 0.01) for n in "abcde"}, tuple("abcde")))
    assert "To get a, b and 3 more out of the content space" in advice(many)[0][0]


def test_advice_without_an_address_names_page_and_section_in_words():
    assert advising.DOCS == ""
    assert advising.WIDTHS.link() == "See Choose your groups, “3. Widths, temperature, weights”."
    section = advising.advice_section(advice(changed(content=[0.31, 0.0, 0.0])))
    assert "<a " not in section and "See Choose your groups" in section and "What to try" in section
    assert advising.advice_section([]) == ""


def test_advice_links_into_the_documentation_where_it_has_an_address(monkeypatch):
    monkeypatch.setattr(advising, "DOCS", "https://docs.example/ssd_addon/")
    assert advising.WIDTHS.link() == (
        '<a href="https://docs.example/ssd_addon/choose-your-groups/#3-widths-temperature-weights">Choose your groups, '
        "“3. Widths, temperature, weights”</a>"
    )


@pytest.mark.parametrize("section", advising.SECTIONS, ids=lambda s: f"{s.file}: {s.heading}")
def test_the_sections_that_advice_names_are_in_the_documentation(section, request):
    text = (request.config.rootpath / "docs" / f"{section.file}.md").read_text()
    assert re.search(rf"^##+ {re.escape(section.heading)}$", text, re.MULTILINE)
