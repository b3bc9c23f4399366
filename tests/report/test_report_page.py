"""The page whatever is in it: names from anywhere, logs with anything in them, models without spaces, gray images."""

import json
import math
import os
import re
from html.parser import HTMLParser

import kornia.augmentation as K
import numpy as np
import pages
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_pil_image

from ssd_addon import StructuredViews, report
from ssd_addon.metrics import label_free
from ssd_addon.metrics.images import for_model
from ssd_addon.report import curves
from ssd_addon.report.text import clean

NAMES = {
    "markup": '</script><img src=x onerror="alert(1)"><!-- <b>',
    "quotes": """a "b" 'c' `d` &amp; &#34;""",
    "backslash": r"a\b\u0041\n" + "\\",
    "surrogates": "caf\udce9 \ud800 \udfff",
    "controls": "a\x00b\x08c\x1bd\x7f\x0b",
    "newlines": "first\nsecond\r\n\tthird\u2028fourth",
    "long": "x" * 5000,
    "direction": "\u202etxt exe\u202c \u2067\u05e9\u05dc\u2069 \u200f",
    "prototype": "__proto__",
    "constructor": "constructor",
    "emoji": "🎨 \ud83c\udfa8",
    "empty": " ",
    "formula": "$x_{1}$ _hidden %s {0}",
}
VOID = {"meta", "link", "img", "input", "br", "path", "circle", "polyline"}
WORDS = "html head title style body header h1 h2 h3 p ul li span b section div table thead tbody tr th td small i svg"
TAGS = {*VOID, *WORDS.split(), "text", "script", "noscript", "button", "output", "label"}


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    """A page is looked at here, not a score."""
    monkeypatch.setattr(label_free, "PAIRS", 60)


class Page(HTMLParser):
    """Reads a page as a browser does: tags, attributes, scripts, and text outside of them."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.scripts, self.text = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == [], "a tag is not closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.text).append(data)


def check(path):
    """The page can be read, runs no code but its own, and asks for nothing. Returns it."""
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert set(page.tags) <= TAGS and page.tags.count("script") == 3
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(v.startswith("data:") for k, v in page.attributes if k in ("src", "href"))
    for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, flags=re.DOTALL):
        json.loads(text, parse_constant=pytest.fail)
    assert not set(html) & set("\x00\x08\x1b\x7f\x0b\u202e\u2067") and not re.search("[\ud800-\udfff]", html)
    return page


# ---- names


@pytest.mark.parametrize("kind", NAMES)
def test_any_name_is_shown_as_it_is(tmp_path, kind):
    evil = NAMES[kind]
    data = pages.squares(12)
    factors = {evil: data.factors["x"], "kind": data.factors["kind"]}
    images = report.Data(data.images, factors, [evil] + [""] * 11, {"kind": [evil, f"other {evil}"]})
    spaces = ("content", evil, "spatial")
    views = StructuredViews({s: [K.ColorJitter(brightness=0.5, p=1.0)] for s in spaces[1:]}, seed=0)
    log = [{"step": s, "loss": 1.0 + s, f"constraint/{evil}": s} for s in range(3)]

    def model(x):
        return dict(zip(spaces, pages.model(x).values(), strict=True))

    out = tmp_path / "r.html"
    report.write(out, model, images, views=views, log=log, title=evil, about=[(evil, evil)])
    page = check(out)
    shown = clean(evil)
    everything = page.text + [v for _, v in page.attributes if v]
    assert sum(shown[:190] in text.replace("\r", "\n") for text in map(lambda t: t, everything)) >= 8 or "\r" in shown
    explorer = json.loads(page.scripts[-3])
    assert explorer["names"][0].startswith(shown[:150]) and explorer["spaces"][1].startswith(shown[:150])
    assert all(len(n) <= 200 for n in (*explorer["names"], *explorer["spaces"]))


def test_text_is_cleaned_of_what_cannot_be_encoded():
    assert (
        clean("caf\udce9") == "caf\ufffd"
        and clean("\ud83c\udfa8") == "🎨" == clean("🎨")
        and clean("é\u05e9") == "é\u05e9"
    )
    assert clean("a\u202eb\x00") == "a\ufffdb\ufffd" and clean(3) == "3" and clean("a\tb\nc") == "a\tb\nc"
    for name in NAMES.values():
        clean(name).encode("utf-8")


@pytest.mark.parametrize("kind", ["file", "class"])
def test_names_of_files_that_are_not_utf8(tmp_path, kind):
    root = os.fsencode(tmp_path / "data")
    for k in range(12):
        folder = os.path.join(root, (b"a", b"b\xe9" if kind == "class" else b"b")[k % 2])
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, b"caf\xe9%d.png" % k if kind == "file" else b"%d.png" % k), "wb") as file:
            Image.new("RGB", (16, 16), (10 * k, 0, 0)).save(file, "PNG")
    data = report.read(os.fsdecode(root), size=16, samples=100)
    out = tmp_path / "r.html"
    report.write(out, lambda x: {"content": x.mean((2, 3)), "color": x.flatten(1)[:, :4]}, data)
    titles = [v for k, v in check(out).attributes if k == "title"]
    assert "a/caf\\xe90.png" in titles if kind == "file" else "b\\xe9/1.png" in titles


def test_names_and_facts_of_any_type_are_text(tmp_path):
    data = report.Data(torch.rand(12, 3, 8, 8), {}, [None, 3, *"abcdefghij"])
    out = tmp_path / "r.html"
    report.write(out, lambda x: {"content": x.mean((2, 3))}, data, title=5, about=[("n", 12), (1, None)])
    assert "<b>12</b>" in out.read_text() and [v for k, v in check(out).attributes if k == "title"][1] == "3"


# ---- logs


ODD = [math.nan, math.inf, -math.inf, 1e308, -1e308, 10**400, -(10**400), "3.0", "", True, False, None, [], {}, [1.0]]
ODD += [{"a": {"b": [1]}}, "</script>", 1 + 2j, torch.tensor(1.0), b"x"]


@pytest.mark.parametrize("where", ["loss", "step", "constraint/content", "effective_rank/content", "lambda/content"])
def test_a_log_with_anything_in_it_makes_the_curves_of_its_numbers(tmp_path, where):
    good = [{"step": s, "loss": 3.0 - s, "constraint/content": 0.5} for s in (0, 1, 2)]
    odd = [{"step": 1, "loss": 2.0, "constraint/content": 0.5} | {where: v} for v in ODD]
    log = [*good[:2], *odd, "no mapping", None, [1], {}, {"loss": 1.0}, *good[2:]]
    out = tmp_path / "r.html"
    report.write(out, lambda x: {"content": x.mean((2, 3))}, torch.rand(12, 3, 8, 8), log=log)
    html = out.read_text()
    check(out)
    drawn = re.findall(r'<polyline class="curve"[^>]* points="([^"]*)"', html)
    assert len(drawn) == 2 and 'aria-label="loss: from step 0 to 2"' in html
    for points in drawn:
        xy = [tuple(map(float, p.split(","))) for p in points.split()]
        assert all(0 <= x <= 320 and 0 <= y <= 212 for x, y in xy)
    first, last = drawn[0].split()[0], drawn[0].split()[-1]
    assert float(first.split(",")[1]) < float(last.split(",")[1]), "the loss falls, whatever stands between"


def test_a_curve_goes_through_its_points():
    svg = curves.panel("t", "", {0: [(0, 0.0), (10, 5.0), (20, 10.0)]})
    assert re.search(r'points="([^"]*)"', svg)[1] == "44.0,178.0 177.0,108.0 310.0,38.0"


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-300, 1e200, 5])
def test_a_constant_is_a_level_line(value):
    svg = curves.panel("t", "", {0: [(0, value), (1, value), (2, value)]})
    ys = {p.split(",")[1] for p in re.search(r'points="([^"]*)"', svg)[1].split()}
    assert len(ys) == 1 and "nan" not in svg


# ---- models without spaces


def features(x):
    return torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "r.html"
    log = [{"step": s, "loss": 2.0 - s} for s in range(3)]
    return out, report.write(out, features, pages.squares(60), views=pages.views(), log=log)


def test_a_backbone_has_a_page_that_speaks_of_its_features_alone(plain):
    out, found = plain
    page = check(out)
    assert found.spaces == () and found.reasons == {} and found.label_free.spaces == ("backbone",)
    head, each = report.verdict(found)
    assert head.startswith("The features encode ") and "light (R² = 1.00)" in head and "color's brightness" in head
    assert each[0].startswith("Of the augmentations, color's brightness (R² = ") and each[0].endswith("can be decoded.")
    assert each[1].startswith("Of the known factors, light (R² = ")
    words = " ".join(page.text).lower()
    for absent in (
        "content",
        "style",
        "disentangle",
        "each space",
        "leak",
        "own group",
        "by your mix",
        "what the views",
    ):
        assert absent not in words, absent
    for present in ("which augmentations do the features encode?", "effective rank", "by backbone", "training curves"):
        assert present in words, present
    explorer = json.loads(page.scripts[-3])
    assert explorer["spaces"] == ["backbone"] and len(explorer["names"]) == 60


def test_a_backbone_of_which_nothing_is_known(tmp_path):
    out = tmp_path / "r.html"
    found = report.write(out, features, torch.rand(12, 3, 8, 8))
    check(out)
    assert report.verdict(found) == ("What the features encode could not be measured.", [])
    noise = report.write(out, lambda x: torch.zeros(len(x), 3), pages.squares(30), views=pages.views())
    assert report.verdict(noise)[0] == "The features encode none of what was measured, or only weakly."


def test_words_do_not_speak_of_a_content_that_is_not_there(tmp_path):
    out = tmp_path / "r.html"

    def model(x):
        return {"tone": x.amax((2, 3)), "color": x.mean((2, 3))}

    report.write(out, model, pages.squares(30), views=StructuredViews({"color": [K.RandomInvert(p=0.5)]}, seed=0))
    page = check(out)
    explanation = next(t for t in page.text if t.startswith("Two views of each image"))
    assert "content" not in explanation and explanation.endswith("and no other.")


# ---- images


def test_gray_images_are_repeated_where_a_model_wants_three_channels(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    gray, out = torch.rand(24, 1, 8, 8), tmp_path / "r.html"
    found = report.write(out, net, report.Data(gray, {"x": torch.rand(24)}), views=pages.views())
    assert ("note", "gray images, repeated to the 3 channels that the model takes") in found.about
    same = report.write(out, net, report.Data(gray.expand(-1, 3, -1, -1), {"x": torch.rand(24)}), views=pages.views())
    assert found.label_free.to_json() == same.label_free.to_json()
    one = report.write(out, nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), gray)
    assert "note" not in dict(one.about)


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_color_images_become_gray_where_a_model_wants_one_channel(tmp_path, kind):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    color = torch.rand(24, 3, 8, 8)
    color = color if kind == torch.float32 else (color * 255).to(kind)
    found = report.write(tmp_path / "r.html", net, report.Data(color, {"x": torch.rand(24)}))
    assert ("note", "color images, made gray, as the model takes one channel") in found.about
    gray, _ = for_model(color, net)
    pillow = np.stack([np.asarray(to_pil_image(image).convert("L")) for image in color])
    assert gray.dtype == kind and gray.shape == (24, 1, 8, 8)
    levels = gray[:, 0] if kind == torch.uint8 else gray[:, 0] * 255
    assert np.abs(levels.numpy() - pillow.astype(float)).max() <= 1.5


def test_images_of_a_wrong_size_are_not_blamed_on_their_channels(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"got \[12, 1, 8, 8\] .* mat1 and mat2 shapes"):
        report.write(tmp_path / "r.html", net, torch.rand(12, 3, 8, 8))


@pytest.mark.parametrize(
    ("net", "images", "message"),
    [
        (nn.Conv2d(2, 4, 3), torch.rand(12, 3, 8, 8), r"got \[12, 3, 8, 8\] \(RuntimeError: .* to have 2 channels"),
        (nn.Conv2d(3, 4, 3), torch.rand(12, 3, 2, 2), r"got \[12, 3, 2, 2\] \(RuntimeError: "),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(5, 2)),
            torch.rand(12, 1, 4, 4),
            r"got \[12, 1, 4, 4\] \(RuntimeError: ",
        ),
    ],
)
def test_images_that_the_model_does_not_take_are_an_error_about_the_images(tmp_path, net, images, message):
    with pytest.raises(ValueError, match=f"^images: expected images that the model takes.*{message}"):
        report.write(tmp_path / "r.html", net, images)
    assert not (tmp_path / "r.html").exists()


def test_operations_that_fail_cost_their_part_alone(tmp_path):
    class Broken(nn.Module):
        plan = pages.views().plan
        call = 0

        def plain(self, x):
            return x

        def independent(self, x, *, seed):
            raise RuntimeError("kornia: input must have 3 channels\nand a second line")

        def forward(self, x):
            raise TypeError("no")

    out = tmp_path / "r.html"
    found = report.write(out, pages.model, pages.squares(24), views=Broken())
    check(out)
    assert found.reasons["label-free matrix"] == "RuntimeError: kornia: input must have 3 channels"
    assert found.reasons["views"] == "TypeError: no" and found.labelled


def test_a_rare_label_is_not_decoded_from_noise(tmp_path):
    g = torch.Generator().manual_seed(3)
    data = report.Data(torch.rand(200, 3, 4, 4, generator=g), {"defect": (torch.arange(200) % 50 == 0).long()})
    found = report.write(tmp_path / "r.html", lambda x: {"content": x.mean((2, 3)), "color": x[:, :, 0, 0]}, data)
    _, each = report.verdict(found)
    assert each == [f"The {space} space encodes none of the known factors." for space in ("content", "color")]
    assert found.summary.sap == 0 and found.summary.mig < 0.05
