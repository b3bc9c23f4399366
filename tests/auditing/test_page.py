"""The audit's page and command: a verdict that claims what the numbers show, for one model and for two."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pages
import pytest
import torch
from torch import nn

from ssd_addon import auditing
from ssd_addon.__main__ import main
from ssd_addon.auditing import Audited, compared, headline, sentences
from ssd_addon.auditing.page import render
from ssd_addon.auditing.verdict import advice, courses
from ssd_addon.metrics import ScoreTable, class_accuracy
from ssd_addon.report import advice as sections

LAYERS = ("layer1", "layer2")
ROWS = ("pixels", *LAYERS, "backbone", "untrained")


def made(scores, name="net", layers=LAYERS, margin=0.05, accuracy=None):
    """An audit of parameters name -> scores of the rows."""
    rows = ("pixels", *layers, "backbone", "untrained")
    cells = {(r, f"color/0.Op/{p}"): v for p, each in scores.items() for r, v in zip(rows, each, strict=True)}
    keys = tuple(f"color/0.Op/{p}" for p in scores)
    intervals = {cell: (v - margin, v + margin) for cell, v in cells.items()}
    parts = ScoreTable(rows, keys, cells, intervals, {}, "kernel", (), 70, 30, "pairs of views")
    groups = {(r, "color"): 0.5 for r in rows}
    table = ScoreTable(rows, ("color",), groups, {}, {}, "kernel", (), 70, 30, "pairs of views", parts)
    return Audited(name, table, accuracy, tuple(layers))


def test_the_headline_says_what_became_of_each_parameter():
    audit = made(
        {
            "hue_factor": (0.6, 0.7, 0.4, 0.02, 0.3),
            "saturation_factor": (0.3, 0.01, 0.0, 0.0, 0.0),
            "degrees": (0.0, 0.0, 0.01, 0.0, 0.0),
            "contrast_factor": (0.9, 0.9, 0.6, 0.3, 0.3),
            "brightness_factor": (0.9, 0.9, 0.8, 0.71, 0.2),
            "gamma": (0.9, 0.9, 0.8, 0.9, 0.9),
        }
    )
    assert headline(audit) == (
        "The features encode gamma (R² = 0.90) and brightness (0.71), and weakly contrast (R² = 0.30). Lost on the "
        "way: hue (after layer2). Lost on the way in untrained copies too: saturation (after the pixels)."
    )
    assert sentences(audit) == [
        "Cannot be decoded, not even from the pixels: degrees.",
        "Harder to decode than from untrained copies: hue (0.02 against 0.30).",
        "Easier to decode than from untrained copies: brightness (0.71 against 0.20).",
    ]
    assert advice(audit) == [
        (
            "From an earlier layer, hue can still be decoded: style heads that read several layers can use this "
            "without training the backbone again.",
            sections.LAYERS,
        ),
        (
            "To keep more of saturation and contrast, train with a style space for the augmentations that change them.",
            sections.RECIPE,
        ),
        (
            "Before you conclude anything about degrees, take more images or more pairs of views (--draws 4).",
            sections.MEASURED,
        ),
    ]


def test_the_headline_of_features_that_encode_little():
    assert headline(made({"gamma": (0.0, 0.3, 0.0, 0.2, 0.0)})) == "The features encode only weakly gamma (R² = 0.20)."
    assert headline(made({"src": (0.0, 0.3, 0.0, 0.0, 0.0)})) == (
        "The features encode none of these augmentations. Lost on the way in untrained copies too: place and size of "
        "the op (after layer1)."
    )
    everything = made({"translations": (0.9, 0.9, 0.9, 0.9, 0.9)})
    assert headline(everything) == "The features encode translations (R² = 0.90)." and advice(everything) == []
    assert "augmentations that change them." in advice(made({"translations": (0.9, 0.9, 0.9, 0.3, 0.3)}))[0][0]
    worse = made({"hue_factor": (0.9, 0.9, 0.9, 0.6, 0.9)})
    assert [section for _, section in advice(worse)] == [sections.RECIPE]


def test_a_score_whose_interval_holds_0_is_none():
    audit = made({"hue_factor": (0.3, 0.3, 0.3, 0.3, 0.3)}, margin=0.4)
    assert headline(audit) == "The features encode none of these augmentations."
    assert sentences(audit) == [
        "Cannot be decoded, not even from the pixels: hue (0.30, with an interval that includes 0).",
        "Compared with untrained copies, no parameter is easier or harder to decode: the intervals overlap.",
    ]


def test_nothing_is_called_lost_while_the_intervals_overlap():
    scores = {"hue_factor": (0.12, 0.03, 0.03, 0.03, 0.3), "contrast_factor": (0.5, 0.5, 0.4, 0.05, 0.3)}
    audit = made(scores, margin=0.02)
    assert headline(audit).endswith("Lost on the way: hue (after the pixels); contrast (after layer2).")
    audit = made(scores, margin=0.06)
    assert headline(audit).endswith(" none of these augmentations. Lost on the way: contrast (after layer2).")
    assert "but not shown to be lost, as intervals overlap: hue." in sentences(audit)[0]
    assert any("Before you conclude anything about hue" in text for text, _ in advice(audit))


def wider(audit, row, parameter, interval):
    """The audit with another interval in one cell."""
    parts = audit.table.parts
    cells = {**parts.intervals, (row, f"color/0.Op/{parameter}"): interval}
    return replace(audit, table=replace(audit.table, parts=replace(parts, intervals=cells)))


def test_a_parameter_is_lost_after_a_layer_that_lies_above_the_features():
    audit = made({"hue_factor": (0.8, 0.5, 0.12, 0.08, 0.3)})  # layer2's interval overlaps that of the features
    assert headline(audit).endswith("Lost on the way: hue (after layer1).")
    assert headline(made({"hue_factor": (0.8, 0.12, 0.12, 0.08, 0.3)})).endswith("hue (after the pixels).")


def test_sentences_have_the_scores_of_the_table_and_say_which_are_read_as_nothing():
    a = made({"hue_factor": (0.8, 0.8, 0.8, 0.75, 0.1)}, "A")
    b = wider(made({"hue_factor": (0.4, 0.4, 0.4, 0.22, 0.5)}, "B"), "backbone", "hue_factor", (-0.02, 0.45))
    beyond = "0.22, with an interval that includes 0"
    assert compared(a, b) == [f"A encodes hue (0.75 against {beyond}) better than B."]
    assert (
        sentences(b)[0]
        == f"Hardly decoded from the features, but not shown to be lost, as intervals overlap: hue ({beyond})."
    )
    assert "(0.05 against 0.30)" in sentences(made({"hue_factor": (0.8, 0.8, 0.8, 0.05, 0.3)}, margin=0.1))[-1]
    assert "(0.50 against -0.03)" in sentences(made({"hue_factor": (0.8, 0.8, 0.8, 0.5, -0.03)}))[-1]


def test_intervals_are_said_to_overlap_only_where_they_do():
    """Differences among scores that are next to nothing are not worth a sentence of their own."""
    a = made({"hue_factor": (0.8, 0.8, 0.3, 0.09, 0.01)}, "A", margin=0.01)
    b = made({"hue_factor": (0.8, 0.8, 0.3, 0.02, 0.05)}, "B", margin=0.01)
    assert compared(a, b) == ["No parameter with R² of 0.1 or more is encoded better by A or by B."]
    for each in (a, b):
        assert sentences(each)[-1] == (
            "Compared with untrained copies, no parameter with R² of 0.1 or more is easier or harder to decode."
        )


def test_what_untrained_copies_lose_too_is_not_laid_to_training():
    """Where training is shown to have removed something, where it is not, and where nobody can tell."""
    audit = made(
        {
            "hue_factor": (0.6, 0.7, 0.0, 0.0, 0.05),  # copies lose it too
            "contrast_factor": (0.6, 0.7, 0.0, 0.0, 0.3),  # all copies keep it
            "saturation_factor": (0.6, 0.7, 0.0, 0.0, 0.3),  # some of them do
        }
    )
    wide = {("untrained", "color/0.Op/saturation_factor"): (0.01, 0.7)}
    parts = replace(audit.table.parts, intervals={**audit.table.parts.intervals, **wide})
    audit = replace(audit, table=replace(audit.table, parts=parts))
    assert headline(audit) == (
        "The features encode none of these augmentations. Lost on the way: contrast and saturation (after layer1). "
        "Lost on the way in untrained copies too: hue (after layer1)."
    )
    assert "Harder to decode than from untrained copies: contrast (0.00 against 0.30)." in sentences(audit)


def test_without_layers_or_scores():
    assert headline(made({"hue_factor": (0.6, 0.0, 0.3)}, layers=())) == (
        "The features encode none of these augmentations. Lost on the way: hue (after the pixels)."
    )
    assert "there is nothing to decode" in headline(made({"hue_factor": (math.nan,) * 5}))
    a, b = made({"x": (0.0,) * 5}), made({"x": (0.0,) * 5}, name="other")
    assert compared(a, b) == ["No parameter is encoded better by net or by other: all 95 % intervals overlap."]


def test_parameters_of_one_name_are_told_apart():
    cells = {(r, f"{g}/0.Op/p"): 0.5 for r in ROWS for g in ("color", "noise")}
    parts = ScoreTable(ROWS, ("color/0.Op/p", "noise/0.Op/p"), cells, {}, {}, "kernel", (), 7, 3)
    groups = {(r, g): 0.5 for r in ROWS for g in ("color", "noise")}
    table = ScoreTable(ROWS, ("color", "noise"), groups, {}, {}, "kernel", (), 7, 3, parts=parts)
    assert [c.name for c in courses(Audited("net", table, None, LAYERS))] == ["color's p", "noise's p"]


def test_two_models_are_compared_beyond_their_intervals():
    a = made({"hue_factor": (0.6, 0.7, 0.4, 0.6, 0.3), "gamma": (0.9, 0.9, 0.8, 0.55, 0.9)}, "A")
    b = made({"hue_factor": (0.6, 0.7, 0.4, 0.1, 0.3), "gamma": (0.9, 0.9, 0.8, 0.6, 0.9)}, "B")
    assert compared(a, b) == ["A encodes hue (0.60 against 0.10) better than B."]


# ---- the page


class Light(nn.Module):
    def __init__(self, size=3):
        super().__init__()
        self.first, self.weight = nn.Identity(), nn.Parameter(torch.arange(1.0, size + 1))

    def forward(self, x):
        x = self.first(x * self.weight.view(-1, 1, 1))
        return torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("audit") / "audit.html"
    data = pages.squares(80)
    said = []
    images = type(data)(data.images, {"class": data.factors["kind"]}, total=200)
    nets = {"light <b>": Light(), "conv": nn.Conv2d(3, 4, 3)}
    found = auditing.write(out, nets, images, pages.views(), layers=(), draws=2, say=said.append)
    return out.read_text(), found, said


def test_the_page_shows_both_models_and_their_numbers(written):
    html, found, said = written
    assert "light &lt;b&gt;" in html and "light <b>" not in html
    kept = json.loads(re.search(r'id="findings">(.*?)</script>', html)[1])
    assert [m["name"] for m in kept["models"]] == ["light <b>", "conv"]
    table = ScoreTable.from_json(kept["models"][0]["table"])
    assert table["backbone", "color"] == found[0].table["backbone", "color"] > 0.5
    assert kept["models"][0]["verdict"] == [headline(found[0]), *sentences(found[0])]
    assert found[0].accuracy["backbone", "k-NN"] <= 1 and "Class accuracy" in html
    assert "How to read the numbers" in html and "<b>untrained</b> is the same network" in html
    assert "80 of 200" in html and 'id="compared"' in html and html.count("<svg") == len(courses(found[0]))
    assert said[0] == "auditing light <b>" and "class accuracy" in said and any("views" in line for line in said)


def test_few_images_of_many_classes_have_no_accuracy(tmp_path):
    data = pages.squares(30)
    (found,) = auditing.write(
        tmp_path / "a.html", {"net": Light()}, data.images, pages.views(), labels=torch.arange(30), draws=1
    )
    assert found.accuracy is None and "30 images of 30 classes are too few" in found.notes[-1]


def test_advice_that_two_models_share_is_given_once():
    a, b = made({"x": (0.0,) * 5, "y": (0.9, 0.9, 0.9, 0.2, 0.2)}, "A"), made({"x": (0.0,) * 5, "y": (0.9,) * 5}, "B")
    html = render([a, b], [], None)
    assert html.count("Before you conclude anything about x, take more images or more pairs of views (--draws 4).") == 1
    assert "<li>A: To keep more of y, train with a style space" in html


def labels_of(*models):
    panel = re.search(r'<svg viewBox="0 0 320 200".*?</svg>', render(models, [], None), re.S)[0]
    return re.findall(r'text-anchor="(?:start|middle|end)">([^<]*)</text>', panel)[3:], panel


def test_plots_name_the_layers_unless_two_models_have_others():
    a, b = made({"x": (0.9, 0.8, 0.7, 0.6, 0.5)}, "A"), made({"x": (0.9,) * 5}, "B", layers=("blocks.1", "blocks.2"))
    c = made({"x": (0.9,) * 6}, "C", layers=("blocks.1", "blocks.2", "blocks.3"))
    assert labels_of(a)[0] == labels_of(a, replace(a, name="B"))[0] == ["pixels", *LAYERS, "features"]
    found, panel = labels_of(a, b)
    assert found == ["pixels", "layer 1", "layer 2", "features"]
    assert "A, layer1: 0.80" in panel and "B, blocks.1: 0.90" in panel
    assert labels_of(a, c)[0] == ["pixels", "features"]


def test_errors_say_which_of_two_models_they_are_of(tmp_path):
    nets, data = {"first": Light(), "second": nn.Conv2d(3, 4, 3)}, pages.squares(20)
    options = {"draws": 1, "layers": ("first",)}
    with pytest.raises(ValueError, match=r"^layers: expected names .*: got first; the model is second$"):
        auditing.write(tmp_path / "a.html", nets, data.images, pages.views(), **options)
    with pytest.raises(ValueError, match=r": got first$"):
        auditing.write(tmp_path / "a.html", {"second": nets["second"]}, data.images, pages.views(), **options)


@pytest.mark.parametrize("count", [0, 3])
def test_one_or_two_models(count, tmp_path):
    with pytest.raises(ValueError, match=f"backbones: expected one or two, name -> module: got {count}"):
        auditing.write(tmp_path / "a.html", {str(k): Light() for k in range(count)}, pages.squares(20).images)


# ---- class accuracy


def test_class_accuracy_is_that_of_a_loop():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (120,), generator=g)
    z = torch.eye(3)[labels] + 0.7 * torch.randn(120, 3, generator=g)
    table = class_accuracy({"z": z, "noise": torch.randn(120, 4, generator=g)}, labels, k=5)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    train, test = order[:60], order[60:]
    right = 0
    for i in test.tolist():
        cosine = torch.nn.functional.cosine_similarity(z[train].double(), z[i].double()[None])
        votes = torch.zeros(3, dtype=torch.float64)
        for j in cosine.argsort(descending=True)[:5].tolist():
            votes[labels[train[j]]] += math.exp(cosine[j] / 0.07)
        right += int(votes.argmax() == labels[i])
    assert table["z", "k-NN"] == pytest.approx(right / 60)
    assert table["z", "linear probe"] > 0.5 > table["noise", "linear probe"]
    low, high = table.intervals["z", "k-NN"]
    assert low <= table["z", "k-NN"] <= high and "most frequent class" in table.notes["z", "linear probe"]


@pytest.mark.parametrize(
    "labels,message",
    [
        (torch.zeros(40, dtype=torch.long), "at least two classes on both sides of the split: got one class"),
        (torch.rand(40), "expected classes, integers"),
        (torch.zeros(30, dtype=torch.long), "a value for each of the 40 samples"),
    ],
)
def test_class_accuracy_refuses_what_are_no_classes(labels, message):
    with pytest.raises(ValueError, match=message):
        class_accuracy({"z": torch.rand(40, 3)}, labels)


# ---- the command


@pytest.fixture
def folder(tmp_path):
    from torchvision.utils import save_image

    data = pages.squares(40)
    for i, x in enumerate(data.images):
        (tmp_path / "data" / f"kind{i % 2}").mkdir(parents=True, exist_ok=True)
        save_image(x, tmp_path / "data" / f"kind{i % 2}" / f"{i}.png")
    (tmp_path / "net.py").write_text("from torch import nn\n\ndef make():\n    return nn.Conv2d(3, 4, 3)\n")
    return tmp_path


def test_the_command_writes_a_page_and_says_the_verdict(folder, capsys):
    torch.save(
        {"state_dict": {f"backbone.{k}": t for k, t in nn.Conv2d(3, 4, 3).state_dict().items()}}, folder / "w.pt"
    )
    arguments = [f"{folder}/net.py:make", "--data", str(folder / "data"), "--out", str(folder / "a.html")]
    arguments += [
        "--size",
        "16",
        "--draws",
        "1",
        "--weights",
        str(folder / "w.pt"),
        "--layers",
        "",
        "--normalize",
        "none",
    ]
    assert main(["audit", *arguments]) == 0
    said = capsys.readouterr().out
    assert "2 tensors under 'state_dict.backbone'" in said and "written: " in said and "class accuracy" in said
    assert (folder / "a.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--layers", "layer9"], "error: --layers: expected names of modules inside the backbone"),
        (["--weights", "none.pt"], "error: none.pt: expected a file of weights: got no such file"),
        (["--data", "nowhere"], "error: --data: expected a folder of images"),
        (["--groups", "hue"], "error: preset: expected one of"),
        (["--samples", "8"], "error: images: expected at least 15"),
    ],
)
def test_a_wrong_flag_is_one_line(folder, capsys, arguments, message):
    given = {"--data": str(folder / "data"), "--out": str(folder / "a.html"), "--size": "16"}
    given[arguments[0]] = arguments[1]
    assert main(["audit", f"{folder}/net.py:make", *[w for pair in given.items() for w in pair]]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("model", ["resnet18", "torchvision:resnet5", "timm:none", "nowhere.py:make"])
def test_a_wrong_model_is_one_line(folder, capsys, model):
    assert main(["audit", model, "--data", str(folder / "data"), "--out", str(folder / "a.html")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: MODEL: ") and err.count("\n") == 1


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(folder):
    arguments = [f"{folder}/net.py:make"] * 2 + ["--data", str(folder / "data"), "--size", "16", "--draws", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "ssd_addon", "audit", *arguments, "--out", "two.html"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "is encoded better by" in done.stdout or "better than" in done.stdout
