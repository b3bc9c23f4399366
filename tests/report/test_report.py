"""The report: that one page holds it all, what it says where something cannot be measured, and the command."""

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
from score_tables import GROUPS, by_hand, changed, table
from torchvision.models import resnet18

from ssd_addon import StyleHeads, report, runs
from ssd_addon.__main__ import main
from ssd_addon.metrics import Exclusivity, ScoreTable, label_free
from ssd_addon.report import curves, pictures
from ssd_addon.report import findings as measured
from ssd_addon.report import page as rendering
from ssd_addon.report.legend import legend
from ssd_addon.report.readings import p_value
from ssd_addon.report.table import number, score_table


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
    assert "a test rejects independence (p of 0.05 or less" in html and "partial R² is at least 0.02" in html
    kept = json.loads(re.search(r'id="findings">(.*?)</script>', html)[1])["exclusivity"]
    assert Exclusivity.from_json(kept["label_free"]).leaks == found.tests.leaks == () and kept["labelled"] is None


def test_a_cell_that_leaks_says_so_and_a_smaller_effect_is_not_rounded_up_to_the_limit():
    rows = {"content": [0.3, 0.0], "color": [0.9, 0.0]}
    effects = {("content", "color"): (0.3, 0.01), ("color", "spatial"): (0.0196, 0.01)}
    html = score_table(table(rows, GROUPS), across="group of augmentations", corner="Space", tests=by_hand(effects))
    assert "<small>p = 0.01, partial R² 0.30</small><small><b>leak</b></small>" in html
    assert "<small>p = 0.01, partial R² 0.01</small></td>" in html and html.count("<b>leak</b>") == 1


def test_a_style_and_its_own_group_stand_beside_the_backbone():
    rows = {"color": [0.9, 0.1], "backbone": [0.84, math.nan]}
    html = score_table(table(rows, GROUPS), across="group of augmentations", corner="Space", spaces=("color",))
    assert html.count("<small>backbone 0.84</small>") == 1 == html.count("heat own")
    factors = score_table(table(rows, GROUPS), across="factor", corner="Space", spaces=("color",))
    assert "<small>backbone" not in factors


def test_the_first_matrix_has_a_legend_beside_it(written, tmp_path):
    html, _, _ = written
    beside = re.search(r'<div class="beside">(.*?)</section>', html, re.DOTALL)[1]
    assert 'title="content, color"' in beside and html.count('class="how"') == 1
    for said in ("1 is perfect, 0 is no better than", "95 % interval", "A linear probe", "A leak"):
        assert said in beside
    assert "reference point" not in beside  # this model has no row for the backbone
    report.write(tmp_path / "r.html", pages.model, pages.squares(40))  # without views: beside the known factors
    assert (tmp_path / "r.html").read_text().count('class="how"') == 1
    assert "reference point and not a bound" in legend(spaces=True, backbone=True, tests=None)
    assert "leak" not in legend(spaces=True, backbone=True, tests=None)


def test_advice_is_on_the_page_where_there_is_a_problem(written):
    html, found, _ = written
    assert 'id="advice"' not in html and report.verdict(found)[0].startswith("Disentangled: ")
    page = rendering.render(changed(content=[0.31, 0.0, 0.0]), report.Data(torch.rand(3, 3, 4, 4)))
    assert "To get brightness out of the content space" in page and 'id="advice"' in page


def test_known_factors_are_tested_where_it_is_said_whose_they_are(tmp_path):
    own = {"content": (), "color": ("light",), "spatial": ("x",)}
    found = report.write(tmp_path / "r.html", pages.model, pages.squares(60), own=own)
    assert found.exclusive.own == own and not math.isnan(found.exclusive["color", "x"].p) and found.tests is None
    html = (tmp_path / "r.html").read_text()
    assert p_value(found.exclusive["color", "x"].corrected) in html and "<b>A leak</b> is" in html
    few = report.write(tmp_path / "r.html", pages.model, pages.squares(30), own=own)
    assert few.exclusive is None and "at least 50 samples: got 30" in few.reasons["exclusivity of known factors"]
    assert "the test for leaks: exclusivity: expected at least 50 samples" in (tmp_path / "r.html").read_text()


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
    assert "the test for leaks: independent: expected factors" in (tmp_path / "r.html").read_text()


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


def test_a_size_is_never_guessed(run, tmp_path, capsys):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    (tmp_path / "net.py").write_text("import torch\ndef net(): return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))\n")
    spaces = {"content": 4, "spatial": 4, "color": 4}
    StyleHeads(net[:1], spaces, in_features=4, hidden=()).save(tmp_path / "model.pt", card={"views": "color_spatial"})
    command = [
        "report",
        str(tmp_path / "model.pt"),
        "--backbone",
        f"{tmp_path}/net.py:net",
        "--data",
        str(run / "data"),
    ]
    command += ["--out", str(tmp_path / "r.html")]
    assert main(command) == 1
    assert "size: expected the edge in pixels of the images that the model was trained on" in capsys.readouterr().err
    assert main([*command, "--size", "12"]) == 0
    html = (tmp_path / "r.html").read_text()
    assert "size <b>12 x 12</b>" in html and "views of the training are not known" not in capsys.readouterr().out
    opened = runs.load(tmp_path / "model.pt", backbone=net[:1], size=12)
    assert opened.views(torch.rand(2, 3, 20, 20)).views.shape[-2:] == (12, 12)


def test_that_the_views_are_not_known_is_said_before_anything_is_measured(run, tmp_path, capsys):
    (tmp_path / "net.py").write_text("import torch\ndef net(): return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))\n")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    StyleHeads(net, {"content": 4, "color": 4}, in_features=4, hidden=()).save(tmp_path / "m.pt", card={"size": 12})
    command = ["report", str(tmp_path / "m.pt"), "--backbone", f"{tmp_path}/net.py:net", "--data", str(run / "data")]
    assert main([*command, "--out", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("the views of the training are not known") and "--views" in said.splitlines()[0]


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
    assert "place and size of the crop" in out.read_text()


def test_that_the_loss_is_not_known_is_said(run, tmp_path, capsys):
    (tmp_path / "net.py").write_text("import torch\ndef net(): return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))\n")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    model = StyleHeads(net, {"content": 4, "color": 4}, in_features=4, hidden=())
    out, card = tmp_path / "r.html", {"size": 12, "views": "color_spatial"}
    command = ["report", str(tmp_path / "m.pt"), "--backbone", f"{tmp_path}/net.py:net", "--data", str(run / "data")]
    for change, rows, shown, known in (
        ({}, (), "as they are (the file does not name the loss)", False),
        ({}, ("--rows", "raw"), "as they are", True),
        ({"family": "vicreg"}, (), "as they are", True),
        ({"on_sphere": True}, (), "L2-normalized", True),
        ({"family": "simclr"}, (), "L2-normalized", True),
    ):
        model.save(tmp_path / "m.pt", card=card | change)
        assert main([*command, *rows, "--samples", "12", "--out", str(out)]) == 0
        assert ("give --rows unit" in capsys.readouterr().out) is not known
        assert f"embeddings <b>{shown}</b>" in out.read_text()


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
