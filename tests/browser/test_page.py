"""The report in a real browser: it loads silently, answers clicks and keys, fits phone and desktop, prints.

Needs Debian's Chromium (or another, in the environment variable CHROMIUM); fails without one.
"""

from pathlib import Path

import pages
import pytest
import torch
from chromium import SIZES, opened

from ssd_addon import report
from ssd_addon.metrics import StyleIndex, embed

LOG = [
    {"step": s, "loss": 3.0 - s / 50, **{f"constraint/{n}": 1 / (s + 1) for n in ("content", "color", "spatial")}}
    for s in range(0, 60, 10)
]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.html"
    report.write(
        out, pages.model, pages.squares(200), views=pages.views(), log=LOG, title="squares", about=[("images", "200")]
    )
    return out


def neighbours(page, row):
    """(captions, cosines) that a row of the explorer shows."""
    buttons = page.locator(f"{row} button")
    titles = [buttons.nth(k).get_attribute("title") for k in range(buttons.count())]
    return [t.split(",")[0] for t in titles], [float(t.split("similarity ")[1].split(" ")[0]) for t in titles]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_loads_in_silence_and_fits(browser, page_file, size, scheme):
    page, complaints, requests = opened(browser, page_file, size, color_scheme=scheme)
    assert complaints == []
    assert all(url.startswith(("file:", "data:")) for url in requests)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    head = page.locator("#verdict").inner_text()  # content is a function of the place, which a kernel probe finds out
    assert head.startswith("Not disentangled: both spatial and content encode the known factor x (kernel probe")
    assert page.locator("#by-mix button").count() == 8
    matrix, legend = (page.locator(f".beside {part}").bounding_box() for part in ("table", ".how"))
    if size == "desktop":
        assert legend["x"] > matrix["x"] + matrix["width"] and legend["y"] < matrix["y"] + 60
    else:
        assert legend["y"] > matrix["y"] + matrix["height"]
    pictures = page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert pictures
    folder = Path("runs/browser")
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{size}-{scheme}.png", full_page=True)


def test_the_explorer_answers_a_click_with_the_neighbours_of_the_index(browser, page_file):
    page, complaints, _ = opened(browser, page_file)
    data = pages.squares(200)
    index = StyleIndex(embed(pages.model, data.images))
    page.locator("#picker button").nth(17).click()
    assert "square 17 (18 of 200)" in page.locator("#chosen-name").inner_text()
    for space in ("content", "color", "spatial"):
        names, cosines = neighbours(page, f'.row[data-space="{space}"]')
        scores, _ = index.search(17, space, k=8)
        torch.testing.assert_close(torch.tensor([cosines]), scores, atol=1e-3, rtol=0)
        found = [int(name.removeprefix("square ")) for name in names]  # where several are equally near, any of them
        unit = index.rows[:, sum(w for s, w in list(index.widths.items())[: index.spaces.index(space)]) :]
        unit = unit[:, : index.widths[space]]
        torch.testing.assert_close(unit[found] @ unit[17], scores[0], atol=1e-3, rtol=0)
    shown = neighbours(page, '.row[data-space="spatial"]')[0][2]
    page.locator('.row[data-space="spatial"] button').nth(2).click()  # a neighbour can be chosen in its turn
    assert f"{shown} (" in page.locator("#chosen-name").inner_text()
    assert complaints == []


def test_the_explorer_answers_keys(browser, page_file):
    page, complaints, _ = opened(browser, page_file)
    page.locator("#picker button").nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert "square 1 (2 of 200)" in page.locator("#chosen-name").inner_text()
    assert page.evaluate("document.activeElement.title") == "square 1"
    columns = page.evaluate("getComputedStyle(document.getElementById('picker')).gridTemplateColumns.split(' ').length")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.title") == f"square {1 + columns}"
    for key, title in (
        ("Home", "square 0"),
        ("ArrowLeft", "square 0"),
        ("End", "square 199"),
        ("ArrowRight", "square 199"),
    ):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.title") == title
    assert page.locator('#picker button[aria-selected="true"]').count() == 1
    assert page.locator('#picker button[tabindex="0"]').count() == 1
    assert complaints == []


def test_sliders_mix_the_spaces(browser, page_file):
    page, _, _ = opened(browser, page_file)
    index = StyleIndex(embed(pages.model, pages.squares(200).images))
    page.get_by_role("button", name="same spatial, other content").click()
    assert page.locator("#out-slider2").inner_text() == "1.0" and page.locator("#out-slider0").inner_text() == "-1.0"
    names, cosines = neighbours(page, "#by-mix")
    scores, rows = index.search(0, {"spatial": 1, "content": -1}, k=8)
    torch.testing.assert_close(torch.tensor([cosines]), scores, atol=1e-3, rtol=0)
    assert names == [f"square {i}" for i in rows[0].tolist()]
    page.locator("#slider0").focus()
    page.keyboard.press("End")  # content 1
    assert neighbours(page, "#by-mix")[0] != names
    page.locator("#slider2").fill("0")
    page.locator("#slider0").fill("0")
    assert "Move a slider away from 0" in page.locator("#by-mix").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_cell_can_be_read(browser, page_file, scheme):
    page, _, _ = opened(browser, page_file, color_scheme=scheme)
    contrasts = page.evaluate(
        """() => {
          const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const light = (colour) => {
            canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            const c = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
              .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2];
          };
          const cells = [];
          for (let v = 0; v <= 100; v++) {  // every score that there can be, by the page's own style
            const td = document.querySelector("td.heat").cloneNode(true);
            td.style.setProperty("--v", v / 100);
            document.querySelector('table tbody tr').append(td);
            const style = getComputedStyle(td);
            const [a, b] = [light(style.color), light(style.backgroundColor)].sort((p, q) => q - p);
            cells.push((a + 0.05) / (b + 0.05));
            td.remove();
          }
          return cells;
        }"""
    )
    assert len(contrasts) == 101 and min(contrasts) >= 4.5, min(contrasts)


def test_prints_without_its_controls(browser, page_file):
    page, _, _ = opened(browser, page_file)
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("#picker").is_visible() and not page.locator(".sliders").is_visible()
    assert page.locator("#verdict").is_visible() and page.locator('.row[data-space="color"] img').first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_says_what_it_knows_without_scripts(browser, page_file):
    page, _, _ = opened(browser, page_file, java_script_enabled=False)
    assert page.locator("#verdict").is_visible() and page.locator("td.heat").count() > 10
    assert "needs JavaScript" in page.locator("noscript").text_content()


def test_three_images_make_a_page_that_says_what_it_cannot(browser, tmp_path):
    out = tmp_path / "three.html"
    report.write(out, pages.model, pages.squares(3), views=pages.views())
    page, complaints, _ = opened(browser, out, "phone")
    assert complaints == []
    assert page.locator(".na").count() >= 2
    page.locator("#picker button").nth(2).click()
    assert page.locator("#by-mix button").count() == 2


def test_one_image_has_no_neighbours(browser, tmp_path):
    out = tmp_path / "one.html"
    report.write(out, pages.model, pages.squares(1))
    page, complaints, _ = opened(browser, out)
    assert complaints == []
    assert "There is no other image" in page.locator("#by-mix").inner_text()


EVIL = """</script><img src=x onerror="alert(1)">\n'"&lt; \\ \udce9 \u202etxt __proto__"""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [EVIL, "x" * 3000, "constructor"], ids=["markup", "long", "constructor"])
def test_any_name_leaves_the_page_as_it_is(browser, tmp_path, name, size):
    data, spaces = pages.squares(40), ("content", name, "spatial")
    shown = report.Data(data.images, {name: data.factors["x"]}, [name] * 40)
    out = tmp_path / "r.html"
    report.write(out, lambda x: dict(zip(spaces, pages.model(x).values(), strict=True)), shown, title=name, log=LOG)
    page, complaints, requests = opened(browser, out, size)
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    page.locator("#picker button").nth(3).click()
    page.locator(".presets button").nth(1).click()
    assert complaints == [] and all(url.startswith(("file:", "data:")) for url in requests)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("script").count() == 3 and page.locator("img[onerror]").count() == 0
    assert "(4 of 40)" in page.locator("#chosen-name").inner_text()
    index = StyleIndex(embed(pages.model, data.images))
    cosines = neighbours(page, '.row[data-index="1"]')[1] if "," not in name else None
    scores, _ = index.search(3, "color", k=8)
    torch.testing.assert_close(torch.tensor([cosines]), scores, atol=1e-3, rtol=0)
    assert page.locator("#out-slider2").inner_text() == "-1.0" and page.locator("#by-mix button").count() == 8


def test_a_backbone_has_no_mix_and_its_neighbors(browser, tmp_path):
    def features(x):
        return torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)

    out = tmp_path / "r.html"
    report.write(out, features, pages.squares(60), views=pages.views(), log=[{"step": s, "loss": s} for s in range(9)])
    page, complaints, _ = opened(browser, out)
    page.locator("#picker button").nth(5).click()
    assert complaints == [] and page.locator("#by-mix").count() == 0 and page.locator(".row button").count() == 8
    words = page.locator("body").inner_text().lower()
    assert "content" not in words and "style" not in words and "the features encode light" in words
