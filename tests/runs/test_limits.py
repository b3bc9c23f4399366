"""Absurd sizes in cards, files, arguments and options are refused before memory is taken."""

import resource

import pytest
import torch
from imagenet_runs import draw
from torch import nn

from examples import imagenet
from ssd_addon import StructuredCollate, StyleHeads, ViewPlan, _limits, presets, report, runs
from ssd_addon.__main__ import main

KIB = 2**10  # ru_maxrss is in KiB on Linux


class Small(nn.Module):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, x):
        return self.conv(x)


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """A machine with 8 GB; and less than 300 MB more are taken than before, whatever the test asks for."""
    monkeypatch.setattr(_limits, "memory", lambda: 8 * 10**9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * KIB


@pytest.mark.parametrize(
    "options",
    [
        {"hidden": (10**9,)},
        {"hidden": (10**5, 10**5)},
        {"hidden": {"content": (4,), "color": (10**9, 10**9)}},
        {"spaces": {"content": 10**9, "color": 10**6}, "hidden": (4096,)},
        {"in_features": 10**12},
    ],
)
def test_heads_that_fit_into_no_memory_are_refused(options):
    given = {"spaces": {"content": 4, "color": 2}} | options
    message = r"heads: expected weights that fit into this machine's 8 GB of memory: got [\d,]+ GB"
    with pytest.raises(ValueError, match=message):
        StyleHeads(Small(), given.pop("spaces"), **given)
    assert StyleHeads(Small(), {"content": 4}, hidden=(2048, 2048)).hidden == {"content": (2048, 2048)}


def test_heads_of_any_size_can_be_made_without_memory():
    with torch.device("meta"):
        assert StyleHeads.heads(8, {"content": 4}, hidden=(10**6, 10**6)).hidden["content"] == (10**6, 10**6)


def test_a_million_spaces_are_refused():
    names = ("content", *map(str, range(10**6)))
    for make in (ViewPlan.shared_query, lambda n: StyleHeads(Small(), dict.fromkeys(n, 1), hidden=())):
        with pytest.raises(ValueError, match="expected at most 1000: got 1000001"):
            make(names)


@pytest.mark.parametrize(
    "config,message",
    [
        (
            {"hidden": {"content": [10**5], "color": [10**5]}},
            r"at most \d+ numbers, as many as are in the file: got 1,8",
        ),
        ({"spaces": {"content": 10**9, "color": 2}}, "as many as are in the file: got "),
        ({"in_features": 10**9}, "as many as are in the file: got "),
        ({"spaces": {"content": 4} | {str(k): 1 for k in range(10**4)}}, "expected at most 1000: got 10001"),
    ],
)
def test_a_file_of_few_weights_cannot_ask_for_many(tmp_path, monkeypatch, config, message):
    """Less than the machine has, but more than the file holds."""
    monkeypatch.setattr(_limits, "memory", lambda: 10**15)
    made = StyleHeads(Small(), {"content": 4, "color": 2}, hidden=(8,))
    torch.save({"config": made.config() | config, "state_dict": made.state_dict()}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=message):
        StyleHeads.load(tmp_path / "m.pt", Small())
    with pytest.raises(ValueError, match=message):
        runs.load(tmp_path / "m.pt", backbone=Small())


@pytest.mark.parametrize(
    "card,message",
    [
        ({"size": 60_000}, "expected the card's size of at most 16384 pixels: got 60000"),
        (
            {"views": {"preset": "color_spatial", "size": 60_000}},
            "preset's size of at most 16384 pixels: got 60000",
        ),
        (
            {
                "views": {
                    "groups": {"color": [["RandomGaussianBlur", {"kernel_size": [10**9 + 1, 3], "sigma": [0.1, 2.0]}]]}
                }
            },
            "arguments of RandomGaussianBlur: expected whole numbers up to 16384: got 1000000001",
        ),
        (
            {"views": {"groups": {"spatial": [["RandomResizedCrop", {"size": [60_000, 60_000]}]]}}},
            "arguments of RandomResizedCrop: expected whole numbers up to 16384: got 60000",
        ),
        (
            {"views": {"groups": {str(k): [["RandomHorizontalFlip"]] for k in range(10**4)}}},
            "groups: expected at most 1000: got 10000",
        ),
        ({"views": {"preset": "color_spatial", "size": 9000}}, "expected views of 9000 x 9000 pixels that fit into"),
        (
            {"views": {"groups": {"spatial": [["RandomResizedCrop", {"size": [9000, 9000]}]]}}},
            "RandomResizedCrop: expected views of 9000 x 9000 pixels that fit into",
        ),
        ({"views": {"groups": {"a": [["RandomHorizontalFlip"]] * 10**4}}}, "expected at most 1000: got 10000"),
    ],
)
def test_a_card_cannot_ask_for_absurd_views(tmp_path, card, message):
    made = StyleHeads(Small(), {"content": 4, "color": 2}, hidden=(8,))
    torch.save({"config": made.config(), "state_dict": made.state_dict(), "card": card}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=message):
        runs.load(tmp_path / "m.pt", backbone=Small())


def test_edges_are_bounded():
    for make in (StructuredCollate, lambda size: presets("color_spatial", size=size)):
        with pytest.raises(ValueError, match="size: expected an edge of at most 16384 pixels: got 60000"):
            make(60_000)
    with pytest.raises(ValueError, match="got 60000"):
        StructuredCollate((32, 60_000))


def test_images_of_a_report_fit_into_memory(tmp_path, capsys):
    draw(tmp_path / "data", 12)
    message = "size: expected 12 images of 16384 x 16384 pixels that fit into this machine's 8 GB of memory: got 9 GB"
    with pytest.raises(ValueError, match=message):
        report.read(tmp_path / "data", size=16384, samples=10**9)
    arguments = ["audit", "torchvision:resnet18", "--data", str(tmp_path / "data"), "--size", "16384"]
    assert main([*arguments, "--out", str(tmp_path / "a.html")]) == 1
    assert "--size: expected views of 16384 x 16384 pixels that fit into this machine's 8 GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options,message",
    [
        ("--size 60000", "--size: expected an edge of at most 16384 pixels: got 60000"),
        ("--load-size 60000", "--load-size: expected an edge of at most 16384 pixels: got 60000"),
        ("--size 16384", "--size: expected views of a batch that fit into"),
        ("--batch-size 1000000000", "--size: expected views of a batch that fit into"),
        ("--size 8 --batch-size 1000000 --load-size 16384", "--load-size: expected images of a batch that fit"),
        ("--measure 1000000000", "--measure: expected images that fit into"),
    ],
)
def test_options_of_a_run_fit_into_memory(options, message, capsys):
    with pytest.raises(SystemExit):
        imagenet.parse(["--data", "d", *options.split()])
    assert message in capsys.readouterr().err.replace("argument ", "")


@pytest.mark.parametrize("options", ["--hidden 1000000000", "--widths content=1000000000"])
def test_widths_of_a_run_fit_into_memory(tmp_path, options):
    draw(tmp_path / "data", 12)
    small = "--backbone timm:test_resnet --size 32 --batch-size 4 --workers 0 --measure 0 --hidden 16"
    given = [*small.split(), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *options.split()]
    with pytest.raises(ValueError, match="heads: expected weights that fit"):
        imagenet.main(given)
