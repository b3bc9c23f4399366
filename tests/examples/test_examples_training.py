"""examples/imagenet.py: a few steps, and what a long run depends on."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from imagenet_runs import ROOT, SMALL, draw, log_of, parameters_of, run, spoil
from PIL import Image

from examples import imagenet
from ssd_addon import Monitor, StructuredViews, StyleHeads, recipe

pytestmark = [
    pytest.mark.slow,
    # Lightning's advice on hardware and loaders, and its use of a deprecated pytree name.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
]


@pytest.mark.parametrize(
    ("options", "spaces"),
    [
        ("--family simclr --dual-ascent 0.1", ["content", "spatial", "color"]),
        ("--family simclr --equivariance 0.5 --cross-image color", ["content", "spatial", "color"]),
        ("--family vicreg --plan interleaved --optimizer adamw", ["content", "spatial", "color"]),
        ("--family barlow --method content-only --widths content=16", ["content"]),
    ],
)
def test_two_steps(data: Path, options: str, spaces: list[str]) -> None:
    last = run(data, "run", "--steps", "2", *options.split())
    steps, epoch = log_of(data, "run")[:2], log_of(data, "run")[-1]
    assert [s["step"] for s in steps] == [1, 2]
    for s in steps:
        assert all(np.isfinite(s[key]) for key in ("loss", "lr", "images_per_s", *(f"invariance/{n}" for n in spaces)))
        assert ("lambda/content" in s) == ("--dual-ascent" in options)
        assert ("equivariance" in s) == ("--equivariance" in options)
    for split in ("train", "val"):
        assert {f"accuracy_{split}/{n}" for n in ("backbone", *spaces)} <= epoch.keys()
    assert last["loss"] == steps[1]["loss"] and last["broken_files"] == 0


def test_the_recommended_recipe_is_what_trains(data: Path) -> None:
    plain = [word for word in SMALL.split() if word not in ("--widths", "content=16,spatial=8,color=8")]
    common = [*plain, "--data", str(data), "--recipe", "recommended", "--steps", "2", "--widths", "color=8"]
    imagenet.main([*common, "--out", str(data.parent / "run")])
    stored, r = torch.load(data.parent / "run" / "checkpoint.pt", weights_only=True), recipe()
    assert stored["heads"]["spaces"] == r.spaces | {"color": 8} and "equivariance" in stored
    assert all("equivariance" in line for line in log_of(data, "run")[:2])
    imagenet.main([*common, "--equivariance", "0", "--out", str(data.parent / "other")])
    assert "equivariance" not in log_of(data, "other")[0]
    imagenet.main([*common, "--equivariance", "0.5", "--out", str(data.parent / "same")])
    assert log_of(data, "same")[0]["equivariance"] == log_of(data, "run")[0]["equivariance"]
    imagenet.main([*common, "--family", "barlow", "--out", str(data.parent / "barlow")])
    assert "equivariance" not in log_of(data, "barlow")[0]
    imagenet.main([*common, "--dual-ascent", "0.1", "--out", str(data.parent / "ascent")])
    assert [log_of(data, "ascent")[0][f"lambda/{n}"] for n in ("content", "color")] == [2.0, 1.0]
    assert "equivariance" not in log_of(data, "ascent")[0]
    imagenet.main([*common, "--recipe", "paper", "--out", str(data.parent / "paper")])
    assert ["content_entropy" in log_of(data, name)[0] for name in ("run", "other", "paper")] == [True, True, False]


def test_options_reach_the_views_and_the_card(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def noted(**arguments):
        asked.update(arguments)
        return StructuredViews(**arguments)

    monkeypatch.setattr(imagenet, "StructuredViews", noted)
    run(
        data,
        "run",
        "--steps",
        "1",
        "--plan",
        "interleaved",
        "--cross-image",
        "color",
        "--seed",
        "5",
        "--batch-size",
        "6",
    )
    assert (asked["plan"], asked["cross_image"], asked["seed"]) == ("interleaved", ("color",), 5)
    assert asked["groups"]["spatial"][0].flags["size"] == (32, 32)
    card = torch.load(data.parent / "run" / "checkpoint.pt", weights_only=True)["card"]
    assert card["views"] == {"preset": "color_spatial", "size": 32, "plan": "interleaved", "cross_image": ("color",)}


def test_the_equivariance_has_the_weight_and_family_that_were_asked_for(data: Path) -> None:
    def term(weight: str, family: str = "simclr") -> float:
        run(data, weight + family, "--steps", "1", "--equivariance", weight, "--family", family)
        return log_of(data, weight + family)[0]["equivariance"]

    whole = term("0.5")
    assert term("0.25") == pytest.approx(whole / 2)
    assert term("0.5", "barlow") != pytest.approx(whole)


def test_the_networks_of_the_equivariance_are_trained(data: Path) -> None:
    def weights(steps: str) -> dict[str, torch.Tensor]:
        run(data, steps, "--steps", steps, "--equivariance", "0.5")
        stored = torch.load(data.parent / steps / "checkpoint.pt", weights_only=True)["equivariance"]
        return {k: v for k, v in stored.items() if k.startswith("networks")}

    first, second = weights("1"), weights("2")
    assert first and all(not torch.equal(first[k], second[k]) for k in first)


def test_parameters_move_and_one_dimensional_ones_do_not_decay(data: Path) -> None:
    args = imagenet.parse([*SMALL.split(), "--data", str(data)])
    spaces = dict.fromkeys(("content", "spatial", "color"), 2048)
    model = StyleHeads(imagenet.build_backbone(args), spaces, hidden=args.hidden)
    matrices, vectors = imagenet.build_optimizer(args, model).param_groups
    assert matrices["weight_decay"] == 1e-6 and vectors["weight_decay"] == 0
    assert all(p.ndim > 1 for p in matrices["params"]) and all(p.ndim == 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
    run(data, "one", "--steps", "1")
    run(data, "two", "--steps", "2")
    one, two = parameters_of(data, "one"), parameters_of(data, "two")
    assert any(not torch.equal(one[k], two[k]) for k in one)


def test_learning_rate() -> None:
    rates = [imagenet.lr_at(step, 2.0, 4, 20) for step in range(20)]
    assert rates[0] == 0.5 and rates[3] == rates[4] == 2.0
    assert rates[-1] == pytest.approx(0.002)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_a_resumed_run_equals_an_uninterrupted_one(data: Path) -> None:
    """Four steps against two and two: the interruption is within an epoch of three, the end in the next one."""
    options = ("--dual-ascent", "0.1", "--equivariance", "0.5")
    run(data, "straight", "--steps", "4", *options)
    run(data, "halves", "--steps", "2", *options)
    torch.manual_seed(123)
    run(data, "halves", "--steps", "4", "--resume", *options)
    paths = [data.parent / out / "checkpoint.pt" for out in ("straight", "halves")]
    straight, halves = (torch.load(path, weights_only=True) for path in paths)
    for part in ("model", "probes", "criterion", "views"):
        for name, value in straight[part].items():
            assert torch.equal(value, halves[part][name]), (part, name)
    assert straight["step"] == halves["step"] == 4
    assert torch.equal(straight["rng"][0][0], halves["rng"][0][0])
    both = [[s for s in log_of(data, out) if "loss" in s] for out in ("straight", "halves")]
    assert [s["loss"] for s in both[0]] == [s["loss"] for s in both[1]]
    assert [s["step"] for s in both[1]] == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:skipped")
def test_broken_photographs_of_val_are_counted_and_not_scored(data: Path) -> None:
    """The scores are those of a val folder without them."""
    options = ("--steps", "3", "--broken", "skip", "--measure", "0")
    for path in sorted((data / "train").glob("*/*.png"))[:4]:  # val gets more, of which some are broken in the end
        (data / "val" / path.parent.name / f"more{path.name}").write_bytes(b"")
    run(data, "broken", *options)
    for path in (data / "val").glob("*/more*"):
        path.unlink()
    run(data, "whole", *options)
    broken, whole = log_of(data, "broken")[-1], log_of(data, "whole")[-1]
    assert (broken["broken_files"], broken["broken_files_val"]) == (0, 4) and whole["broken_files_val"] == 0
    assert {k: v for k, v in broken.items() if "val/" in k} == {k: v for k, v in whole.items() if "val/" in k} != {}


@pytest.mark.filterwarnings("ignore:skipped")
def test_the_matrix_is_measured_on_no_image_twice(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    monkeypatch.setattr(imagenet, "Monitor", lambda *a, **k: given.update(k) or Monitor(*a, **k))
    draw(data / "val", 30)
    spoil(data / "val", 10)
    run(data, "run", "--steps", "1", "--broken", "skip", "--measure", "25")
    images = given["images"].flatten(1)
    assert 10 <= len(images) == len(images.unique(dim=0)) < 25


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_resumed_epoch_ends_as_an_uninterrupted_one(data: Path) -> None:
    spoil(data / "train", 3)
    options = ("--broken", "skip", "--measure", "0")
    run(data, "straight", "--steps", "6", *options)
    run(data, "halves", "--steps", "2", *options)  # of the three steps of an epoch
    run(data, "halves", "--steps", "6", "--resume", *options)
    ends = [[s for s in log_of(data, out) if "broken_files" in s and s["step"] != 2] for out in ("straight", "halves")]
    assert ends[0] == ends[1] and [s["step"] for s in ends[0]] == [3, 6]
    assert ends[0][0]["broken_files"] == 3 and any(0 < s["accuracy_train/backbone"] < 1 for s in ends[0])


def test_a_checkpoint_of_another_run_is_refused(data: Path) -> None:
    run(data, "run", "--steps", "1")
    with pytest.raises(ValueError, match="another configuration: family: simclr there, vicreg here; lr: 0.5 there"):
        run(data, "run", "--steps", "2", "--resume", "--family", "vicreg")
    with pytest.raises(FileExistsError, match="another run: give --resume, or another --out"):
        run(data, "run", "--steps", "2")


def test_a_broken_file_is_counted_or_refused(data: Path) -> None:
    broken = data / "train" / "a" / "0.jpg"
    Image.open(data / "train" / "a" / "0.png").resize((256, 256)).save(broken)
    broken.write_bytes(broken.read_bytes()[:4000])
    (data / "train" / "a" / "0.png").unlink()
    with pytest.raises(OSError, match=r"0\.jpg: expected an image: could not be decoded"):
        run(data, "raise", "--steps", "3")
    with pytest.warns(RuntimeWarning, match=r"skipped .*0\.jpg"):
        last = run(data, "skip", "--steps", "3", "--broken", "skip")
    assert last["broken_files"] == 1 and log_of(data, "skip")[-1]["broken_files"] == 1


def test_nothing_to_score_is_said(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in data.glob("train/*/*.png"):
        if int(path.stem) >= 3:
            path.rename(data / "train" / f"d{path.stem}.png")
    for path in list(data.glob("train/d*.png")):
        (data / "train" / path.stem).mkdir()
        path.rename(data / "train" / path.stem / path.name)
    last = run(data, "run", "--steps", "1")
    assert "no probes: 12 classes, 12 images" in capsys.readouterr().out
    assert not [key for key in last if key.startswith("accuracy")]


def test_without_train_and_val_the_folder_itself(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(data / "train", "run", "--steps", "1")
    assert "no val folder: probes report accuracy on training images" in capsys.readouterr().out
    (data / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected images"):
        run(data / "empty", "none")
    with pytest.raises(ValueError, match="expected at least one batch of 16 x 1 images: got 12 images"):
        run(data, "large", "--batch-size", "16")


@pytest.mark.distributed
def test_two_processes(data: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "examples/imagenet.py", *SMALL.split()]
    command += ["--data", str(data), "--out", str(data.parent / "run"), "--steps", "2", "--batch-size", "2"]
    command += ["--equivariance", "0.5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/3  step 2/2") == 1  # one process speaks
    lines = log_of(data, "run")
    assert [s["step"] for s in lines if "loss" in s] == [1, 2] and "accuracy_val/content" in lines[-1]
    stored = torch.load(data.parent / "run" / "checkpoint.pt", weights_only=True)
    assert stored["config"]["processes"] == 2 and len(stored["rng"]) == 2
    assert stored["equivariance"] and "equivariance" in next(s for s in lines if "loss" in s)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--cross-image colour",
            "--cross-image: expected names of groups (those of color_spatial: spatial, color): got colour",
        ),
        ("--cross-image color --method content-only", "--cross-image: expected names of groups (none, as content-only"),
        ("--widths color", "--widths: expected NAME=WIDTH,...: got color without a width"),
        (
            "--widths colour=3",
            "--widths: expected content and names of groups (those of color_spatial: spatial, color)",
        ),
        ("--widths color=0", "--widths: expected a whole number, 1 or more: got '0'"),
        ("--hidden 5x", "--hidden: expected a whole number, 1 or more: got '5x'"),
        (
            "--equivariance 0.5 --method content-only",
            "--equivariance: expected groups, whose changes it predicts: got none",
        ),
        ("--equivariance -1", "--equivariance: expected a number, 0 or more: got '-1'"),
        ("--dual-ascent nan", "--dual-ascent: expected a number, 0 or more: got 'nan'"),
        (
            "--backbone resnet5",
            "--backbone: expected a torchvision model, such as resnet50, or timm:NAME of timm: got resnet5",
        ),
        ("--backbone timm:resnet5", "got timm:resnet5"),
        ("--epochs 0", "--epochs: expected a whole number, 1 or more: got '0'"),
        ("--steps 0", "--steps: expected a whole number, 1 or more: got '0'"),
        ("--measure -5", "--measure: expected a whole number, 0 or more: got '-5'"),
        ("--workers -1", "--workers: expected a whole number, 0 or more: got '-1'"),
        (f"--seed {2**70}", f"--seed: expected a whole number below 2**62: got {2**70}"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message, capsys):
    with pytest.raises(SystemExit):
        imagenet.parse(["--data", "photographs", *options.split()])
    assert message in capsys.readouterr().err.replace("argument ", "")


def test_options_that_fit():
    given = "--data d --widths content=3,color=2 --hidden 4,5 --cross-image color --lr 0"
    args = imagenet.parse(given.split())
    assert args.widths == {"content": 3, "color": 2} and args.hidden == [4, 5] and args.cross_image == ["color"]
    assert args.lr == 0 and imagenet.parse(["--data", "d", "--optimizer", "adamw"]).lr == 1e-3
    assert imagenet.parse(["--data", "d", "--backbone", "timm:resnet50.a1_in1k"]).widths == {}
