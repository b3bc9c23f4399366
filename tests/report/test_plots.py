"""Plots: what they write can be read."""

import math

from ssd_addon import plots
from ssd_addon.metrics import ScoreTable


def test_every_cell_of_a_matrix_can_be_read(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: figures.append(figure))
    scores = {("content", "bright"): 0.9, ("content", "dark"): 0.1, ("content", "missing"): math.nan}
    plots.matrix(
        ScoreTable(("content",), ("bright", "dark", "missing"), scores, {}, {}, "ridge", (), 10, 10), tmp_path / "m.png"
    )
    ink = {t.get_text(): t.get_color() for t in figures[0].axes[0].texts}
    assert ink == {"0.90": "black", "0.10": "white", "n/a": "black"}  # n/a lies on white paper


NAMES = ["$x_{1}$", "$", "_hidden", "caf\udce9", "a\x00b", "x" * 500, "<b>", "%s", "\\frac"]


def test_any_name_and_any_log_make_a_figure(tmp_path):
    scores = {(s, f): 0.5 for s in NAMES for f in NAMES}
    table = ScoreTable(tuple(NAMES), tuple(NAMES), scores, {}, {}, "ridge", (), 10, 10)
    plots.matrix({name: table.only(spaces=NAMES[:1], factors=NAMES[:1]) for name in NAMES}, tmp_path / "m.png")
    figure = plots.matrix_figure(table)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()][:3] == [r"\$x_{1}\$", r"\$", "hidden"]
    odd = [math.nan, math.inf, 1e308, 10**400, "3", None, True, [1], {}]
    log = [{"step": s, "loss": 1.0, f"constraint/{NAMES[0]}": s} for s in range(3)]
    log += [{"step": 1, "loss": v, "entropy": v} for v in odd] + [{"step": v, "loss": 1.0} for v in odd]
    plots.curves(log, tmp_path / "c.png")
    assert (tmp_path / "m.png").stat().st_size > 0 < (tmp_path / "c.png").stat().st_size


def test_curves_leave_out_what_is_no_number(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: figures.append(figure))
    plots.curves(
        [{"step": 0, "loss": 2.0}, {"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0}], tmp_path / "c.png"
    )
    (line,) = figures[0].axes[0].lines
    assert line.get_xdata().tolist() == [0, 2] and line.get_ydata().tolist() == [2.0, 1.0]
