"""What a pair of views shares, checked where the answer is known."""

import pytest
import torch
from sprites import draw_factors
from study import reach


def test_a_pair_shares_what_its_group_changes_and_nothing_of_what_is_drawn_over_the_whole_range():
    found = reach.shared()
    assert set(found) == {"content", "color", "spatial"}
    for space, own in {"color": ("hue", "brightness"), "spatial": ("x", "y", "scale")}.items():
        assert min(found[space][k] for k in own) > 0.95
    for space in ("content", "color"):
        assert abs(found[space]["x"]) < 0.05 and found[space]["scale"] == pytest.approx(0.2, abs=0.03)
    assert abs(found["content"]["hue"]) < 0.05 and abs(found["spatial"]["hue"]) < 0.05
    assert min(of["shape"] for of in found.values()) > 0.99  # no group changes it


def test_the_changes_are_those_of_the_operations():
    g = torch.Generator().manual_seed(0)
    factors = draw_factors(4, g) | {"x": torch.tensor([0.5, 0.0, 0.2, 0.0]), "y": torch.tensor([0.0, 0.4, 0.1, 0.0])}
    p = reach.draw(4, g)
    p["spatial"] = {
        "angle": torch.full((4,), torch.pi / 2), "scale": torch.full((4,), 0.5), "x": torch.full((4,), 0.25),
        "y": torch.zeros(4),
    }  # fmt: skip
    p["color"] = {"gain": torch.full((4,), 1.5), "hue": torch.full((4,), 0.5)}
    view = reach.seen(factors | {"brightness": torch.tensor([0.5, 0.6, 0.7, 1.0])}, p)
    assert view["x"].tolist() == pytest.approx([0.25, 0.45, 0.3, 0.25], abs=1e-6)
    assert view["y"].tolist() == pytest.approx([-0.25, 0.0, -0.1, 0.0], abs=1e-6)
    assert view["brightness"].tolist() == pytest.approx([0.75, 0.9, 1.0, 1.0])
    assert view["hue"].tolist() == pytest.approx(((factors["hue"] + 0.5) % 1).tolist())
