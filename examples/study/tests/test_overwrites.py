"""The script on what a user's groups overwrite: what was run is not run again, and its tables say what was found."""

import json

import pytest
from study import overwrites


def line(images, seed, used, verdict, alone, n=500):
    names = [("hue", "0.ColorJitter/hue_factor")] + [(g, f"0.X/{g}") for g in overwrites.TRAINED if g != "hue"]
    part = {"verdict": verdict, "alone": alone, "beside": 0.99, "alone_interval": [0, 1], "beside_interval": [0, 1]}
    parts = [part | {"group": g, "parameter": p} for g, p in names]
    return {"images": images, "n": n, "seed": seed, "used": used, "cpu_s": 9.6, "found": {"parts": parts}}


def test_tables_hold_what_the_lines_say():
    names = ("cifar val", "imagenet 64", "imagenet 128", "sprites")
    lines = [line(name, s, "reported", "changes", 0.1 + s / 100) for name in names for s in range(2)]
    lines[1]["found"]["parts"][0]["verdict"] = "cannot tell"
    lines.append(line("cifar train", 0, "chosen on", "changes", 0.77, n=200))
    shown = overwrites.photographs_table(lines)
    assert "| hue, hue_factor | 0.80, 0.00 | 0.10 to 0.11 |" in shown
    assert "changes (5 of 6), cannot tell (1 of 6)" in shown and "0.77" not in shown
    assert "| hue, hue_factor | 0.10 to 0.11 | 0.99 | changes |" in overwrites.sprites_table(lines)
    assert "| hue, hue_factor | 0.77 |" in overwrites.sizes_table(lines)
    assert "n = 200, 1 seed |" in overwrites.sizes_table(lines)


@pytest.mark.slow
def test_what_was_run_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(overwrites, "CHOSEN", [("cifar train", 40, 0)])  # whose folder is not given
    monkeypatch.setattr(overwrites, "REPORTED", [("sprites", 40, 10)])
    monkeypatch.setattr(overwrites, "GROUPS", {"color": overwrites.GROUPS["color"]})
    out, page = tmp_path / "found.json", tmp_path / "page.md"
    page.write_text("before\n<!-- overwrites: sprites -->\nold\n<!-- end -->\nafter\n")
    (found,) = overwrites.main(["--out", str(out)])
    assert [p["verdict"] for p in found["found"]["parts"] if "hue" in p["parameter"]] == ["changes"]
    monkeypatch.setattr(overwrites, "overwrites", None)  # would fail
    again = overwrites.main(["--out", str(out), "--page", str(page)])
    assert again == json.loads(out.read_text()) and len(again) == 1
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n") and "color, hue_factor" in text
