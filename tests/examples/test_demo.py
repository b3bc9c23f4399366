"""examples/demo.py: the bar, the choice of threads, and a run that is gone on with."""

import json
import time

import demo
import pytest
import torch
from synthetic import GROUPS

from ssd_addon import StyleHeads
from ssd_addon.metrics import ScoreTable, r2_matrix


def scores(**changed):
    """A table that reaches the bar, but for what is changed: space_factor=score."""
    names = ("shape", "x", "y", "hue", "brightness")
    good = {"content": (0.95, 0.0, 0.0, 0.0, 0.0), "color": (0.1, 0, 0, 0.99, 0.9), "spatial": (0, 0.95, 0.95, 0, 0)}
    values = {s: dict(zip(names, row, strict=True)) for s, row in good.items()}
    for key, value in changed.items():
        space, factor = key.split("_")
        values[space][factor] = value
    g = torch.Generator().manual_seed(0)
    real = r2_matrix(
        {s: torch.randn(60, 2, generator=g) for s in good},
        {f: torch.randn(60, generator=g) for f in names},
        bootstrap=0,
    )
    told = real.to_json()
    for c in told["cells"]:
        c["score"] = values[c["space"]][c["factor"]]
    return ScoreTable.from_json(told)


def test_the_bar_is_that_of_the_readme():
    assert not demo.missed(scores())
    cases = {"content_shape": 0.89, "content_hue": 0.11, "content_y": 0.11, "color_hue": 0.94, "spatial_x": 0.89}
    for key, value in cases.items():
        (told,) = demo.missed(scores(**{key: value}))
        assert told.startswith(key.split("_")[0]) and f"{value:.2f}, expected" in told
    assert len(cases) == len(demo.BAR)
    assert not demo.missed(scores(content_brightness=0.9, color_shape=0.9)), "what the bar does not name is free"


def test_a_margin_makes_it_harder():
    assert not demo.missed(scores(content_shape=0.91)) and demo.missed(scores(content_shape=0.91), 0.02)
    assert not demo.missed(scores(content_hue=0.09)) and demo.missed(scores(content_hue=0.09), 0.02)


def test_a_line_tells_the_worse_of_two_coordinates():
    line = demo.brief(scores(spatial_y=0.91, content_x=0.07))
    assert line == "content: shape 0.95, hue 0.00, position 0.07   color: hue 0.99   spatial: position 0.91"


@pytest.mark.parametrize("best", [1, 2, 4])
def test_the_threads_are_those_with_which_a_step_is_the_fastest(best, monkeypatch):
    now = [1]
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def step():
        clock[0] += 1.0 if now[0] == best else 2.5

    assert demo.fastest_threads(step, 4) == best == now[0]


def test_one_core_is_not_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert demo.fastest_threads(lambda: asked.append("step"), 1) == 1 and asked == [1]


def test_threads_that_are_far_slower_are_tried_once(monkeypatch):
    now, clock, steps = [1], [0.0], []
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def step():
        steps.append(now[0])
        clock[0] += 1.0 if now[0] == 1 else 60.0

    assert demo.fastest_threads(step, 2, rounds=3) == 1
    assert steps == [1, 2, 1, 1]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


ARGUMENTS = ["--batch-size", "8", "--samples", "200", "--threads", "1"]


@pytest.mark.slow
def test_a_run_writes_what_the_report_reads_and_says_how_to_go_on(out, capsys):
    result = demo.main(["--out", str(out), "--steps", "3", *ARGUMENTS])
    told = capsys.readouterr().out
    assert "Not reached: content encodes the shape" in told and f"examples/demo.py --out {out} --go-on" in told
    stored = json.loads((out / "metrics.json").read_text())
    assert stored["steps"] == result["steps"] == 3 and stored["reached"] is False
    cells = {(c["space"], c["factor"]): c["score"] for c in stored["tables"]["linear"]["cells"]}
    wanted = ("shape", "scale", "x", "y", "hue", "brightness")
    assert all((s, f) in cells for s in ("content", "color", "spatial") for f in wanted)
    for name in ("matrix.png", "curves.png", "views.png", "log.jsonl", "model.pt", "progress.pt"):
        assert (out / name).exists()
    opened = StyleHeads.load(out / "model.pt", demo.Net())
    assert list(opened.spaces) == ["content", "color", "spatial"]


@pytest.mark.slow
def test_going_on_is_as_if_it_had_never_stopped(out, tmp_path):
    demo.main(["--out", str(tmp_path / "whole"), "--steps", "5", *ARGUMENTS])
    if not (out / "progress.pt").exists():
        demo.main(["--out", str(out), "--steps", "3", *ARGUMENTS])
    demo.main(["--out", str(out), "--steps", "2", "--go-on", *ARGUMENTS])
    whole, parts = (torch.load(f / "progress.pt", weights_only=True) for f in (tmp_path / "whole", out))
    assert whole["step"] == parts["step"] == 5
    for name in ("trained", "average"):
        for k, v in whole[name].items():
            assert torch.equal(v, parts[name][k]), k


def test_nothing_to_go_on_from_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--out", str(tmp_path), "--go-on"])
    assert "expected the progress.pt of an earlier run" in capsys.readouterr().err


def test_the_views_are_those_of_the_sprites_example():
    assert demo.GROUPS is GROUPS
