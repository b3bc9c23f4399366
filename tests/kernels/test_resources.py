"""Every configuration of the table, compiled ahead of time for sm_80 and sm_90."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/resources.py", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_nothing_spills_and_everything_fits(found):
    assert {r["arch"] for r in found} == {"sm_80", "sm_90"} and len(found) >= 32
    for r in found:
        assert r["stack"] == r["local"] == r["spills"] == 0, r
        assert r["shared"] <= r["limit"], r
        assert r["tensor_core"] and r["asynchronous"], r


def test_as_many_programs_share_a_multiprocessor_as_intended(found):
    """Two where the loss spends its time; one level more of sums, or a second matrix, may leave one."""
    for r in found:
        intended = 2 if r["mode"] in ("sums", "weights", "sums_two", "weights_two") else 1
        assert r["programs"] >= intended, r


def test_the_kernel_for_colors_compiles_without_spilling():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/resources.py", "--colors"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [r["arch"] for r in found] == ["sm_80", "sm_90"]
    for r in found:
        assert r["stack"] == r["local"] == r["spills"] == 0 and r["programs"] >= 4, r
