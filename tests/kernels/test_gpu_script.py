"""benchmarks/gpu.py without a GPU: what a run on one would stumble over first is the script itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "kernels" / "table.json").read_text())


def script(tmp_path, *args, **environment):
    command = [sys.executable, "-W", "ignore", "benchmarks/gpu.py", "--out", str(tmp_path), *args]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=400
    )
    gpu = tmp_path / "gpu.json"
    return done, json.loads(gpu.read_text()) if gpu.exists() else None


def test_a_rehearsal_goes_through_every_stage(tmp_path):
    done, report = script(tmp_path, "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(report["stages"]) == 13, list(report["stages"])
    assert all("result" in entry for entry in report["stages"].values()), report
    assert "wrong" not in report["stages"]["correctness"]
    order = list(report["stages"])  # what was chosen is checked, and then timed
    assert order.index("tune") < order.index("correctness") < order.index("determinism") < order.index("speed")
    tuned = report["stages"]["tune"]["result"]
    assert set(tuned["record"]["auto"]) == {"float32", "tf32"} and len(tuned["record"]["configurations"]) == 9
    assert all("ms" in entry for entry in report["stages"]["variants"]["result"].values())
    assert json.loads((tmp_path / "table.json").read_text()) == TABLE  # nothing was measured
    assert [f.name for f in (tmp_path / "cache" / "kernels").iterdir()] == [tuned["file"]]


@pytest.mark.parametrize(
    "how,message", [("raise", "broken on purpose"), ("exit", "status 7"), ("hang", "stopped after")]
)
def test_a_stage_that_breaks_leaves_the_others(tmp_path, how, message):
    order = ("machine", "covariance", "colors")
    limit = ("--limit", "4") if how == "hang" else ()
    broken = ("--break", f"covariance={how}")
    done, report = script(tmp_path, "--rehearse", "--stages", ",".join(order), *broken, *limit)
    assert done.returncode == 1 and "FAILED: covariance" in done.stdout, done.stdout + done.stderr
    assert message in report["stages"]["covariance"]["failed"]
    assert all("result" in report["stages"][n] for n in order if n != "covariance"), report


def test_what_is_not_reached_in_time_says_so(tmp_path):
    done, report = script(tmp_path, "--rehearse", "--seconds", "4", "--stages", "machine")
    assert done.returncode == 0 and report["stages"] == {"machine": {"skipped": "the time was used up"}}


def test_the_script_says_what_it_needs(tmp_path):
    done, report = script(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "expected a CUDA device: torch sees none" in done.stderr and report is None
    done, _ = script(tmp_path, "--rehearse", "--stages", "speeed")
    assert done.returncode == 2 and "expected some of machine, self_check" in done.stderr


def test_losses_of_other_packages_are_unpacked_from_wheels_beside_the_script(tmp_path, monkeypatch):
    import zipfile

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    beside = tmp_path / "scripts"
    beside.mkdir()
    with zipfile.ZipFile(beside / "memeff-9.9-py3-none-any.whl", "w") as z:
        z.writestr("memeff_/__init__.py", "")
    monkeypatch.setattr(gpu, "__file__", str(beside / "gpu.py"))
    (folder,) = gpu.unpacked(tmp_path / "out")
    assert (Path(folder) / "memeff_" / "__init__.py").exists() and gpu.unpacked(tmp_path / "out") == [folder]


@pytest.mark.parametrize("reason", ["a rehearsal", "wrong numbers", "no correctness", "none"])
def test_the_table_takes_up_only_what_was_right(tmp_path, monkeypatch, reason):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    record = {"auto": {"float32": {"inf": 777}}, "configurations": {"sums": {"inf": [64, 64, 64, 4, 3, False, 8]}}}
    stages = {
        "machine": {"result": {"architecture": "sm_90", "gpu": "H100"}},
        "tune": {"result": {"record": record}},
        "correctness": {"result": []},
    }
    if reason == "wrong numbers":
        stages["correctness"]["wrong"] = [{"N": 4096}]
    if reason == "no correctness":
        stages["correctness"] = {"failed": "OutOfMemoryError"}
    gpu.write_table(tmp_path, {"rehearsal": reason == "a rehearsal", "stages": stages})
    table = json.loads((tmp_path / "table.json").read_text())
    if reason != "none":
        assert table == TABLE
        return
    assert table["measured"] == stages["machine"]["result"] and table["auto"]["sm_90"] == record["auto"]
    assert table["configurations"]["sm_90"]["sums"] == record["configurations"]["sums"]
    assert table["configurations"]["sm_90"]["weights"] == TABLE["configurations"]["sm_90"]["weights"]


def test_widths_with_the_same_tile_are_one_entry_and_what_was_in_use_stays_a_candidate(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    a, b, c = ([64, 64, 64, 4, stages, False, 8] for stages in (2, 3, 4))
    found = gpu.merged({"128": a, "256": a, "512": b, "inf": a})
    assert found == {"256": a, "512": b, "inf": a} and gpu.merged({"inf": a}) == {"inf": a}
    tables = {
        "configurations": {"default": {"sums": {"inf": b}, "weights": {"inf": c}}, "sm_90": {"weights": {"inf": c}}},
        "candidates": {"default": {"sums": {"inf": [c]}}, "sm_90": {"weights": {"128": [a], "inf": [c]}}},
    }
    gpu.replace_tiles(tables, "sm_90", "sums", found)
    gpu.replace_tiles(tables, "sm_90", "weights", {"inf": b})
    assert tables["configurations"]["sm_90"] == {"sums": found, "weights": {"inf": b}}
    assert tables["candidates"]["sm_90"] == {"sums": {"inf": [c, b]}, "weights": {"128": [a], "inf": [c]}}
    assert tables["candidates"]["default"] == {"sums": {"inf": [c]}}
    assert json.loads(gpu.compact(tables)) == tables and max(map(len, gpu.compact(tables).splitlines())) <= 120
