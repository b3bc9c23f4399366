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
