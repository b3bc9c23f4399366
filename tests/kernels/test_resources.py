"""What the kernels take of the hardware: a few variants compiled here, all of them as the script stored them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sass
from ssd_addon.kernels import table

ROOT = Path(__file__).parents[2]
STORED = json.loads((ROOT / "docs" / "benchmarks" / "resources.json").read_text())
NEWEST = STORED[-1]["triton"]
FEW_SPILLS = {("3.4.0", "sm_120", "weights_two_maximum"), ("3.6.0", "sm_100", "products")}
"""Variants of older versions that put up to 16 bytes on the stack; neither is what a loss spends its time in."""
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def compiled(*options):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/resources.py", "--arch", "80", "90", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def counts(r, part):
    return dict(zip(sass.KINDS, r["parts"][part], strict=True))


def products_of_a_turn(r):
    """Tensor-core instructions of a warp in one turn of the loop, from the shape of the tile alone."""
    m, n, k, warps, *_ = r["configuration"]
    switches = r["switches"]
    # One loop for each level, each matrix of a pair; the resident kernel has its two products in one.
    times = switches.get("LEVELS", 1) * (2 if switches.get("PAIR") or r["kernel"] == "resident_kernel" else 1)
    if r["arch"] == "sm_90":  # wgmma: 64 rows and 16 of k, by four warps; groups of warps beyond the rows split columns
        first = m // 64 // min(warps // 4, m // 64)
        steps = (k // 16) if r["kernel"] != "resident_kernel" else (k // 16 + n // 16) / 2
        return times * first * steps
    return times * m * n * k / (16 * 8 * 16) / warps


def check(r):
    """The bounds that hold for every variant of the table."""
    if (r["triton"], r["arch"], r["mode"]) in FEW_SPILLS:
        assert r["stack"] <= 16 and r["local"] == 0, r
    else:
        assert r["stack"] == r["local"] == r["spills"] == 0, r
    assert r["shared"] <= r["limit"], r
    assert r["tensor_core"] and r["asynchronous"], r
    if r["arch"] != "sm_100":  # tcgen05 instructions are of a whole program, and their number is the compiler's choice
        assert counts(r, "loop")["mma"] == products_of_a_turn(r), r
    epilogue = counts(r, "epilogue")
    if r["mode"] == "sums" and r["switches"]["SYMMETRIC"]:
        m, n, _, warps, *_ = r["configuration"]
        entries = m * n // (32 * warps)
        assert epilogue["mufu"] == entries, r  # one exponential of each entry
        # By tl.sum a warp shuffled 62 to 449 times for the column sums alone. What is left is that of row sums.
        assert epilogue["shfl"] <= (13 if r["arch"] in ("sm_90", "sm_100") else 33), r
        assert epilogue["bar"] <= 17, r
        assert epilogue["exchanged"] <= 90 * n // 128, r


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sums", "weights"])
def test_what_is_compiled_here_keeps_the_bounds(mode):
    found = compiled("--json", "--modes", mode, "--no-candidates")
    tiles = len(table.table()["configurations"]["sm_90"][mode])
    assert [r["arch"] for r in found] == ["sm_80"] * 2 + ["sm_90"] * 2 * tiles
    for r in found:
        check(r)


@pytest.mark.slow
def test_the_kernel_for_colors_compiles_without_spilling():
    found = compiled("--colors")
    assert [r["arch"] for r in found] == ["sm_80", "sm_90"]
    for r in found:
        assert r["stack"] == r["local"] == r["spills"] == 0 and r["programs"] >= 4, r


@pytest.mark.slow
def test_the_kernels_around_the_tiles_compile_without_spilling():
    found = compiled("--around")
    assert {r["arch"] for r in found} == {"sm_80", "sm_90"} and len(found) == 2 * 28
    for r in found:
        assert r["stack"] == r["local"] == r["spills"] == 0 and r["programs"] >= 3, r


def test_stored_are_three_versions_of_triton_and_all_architectures():
    assert {r["triton"].rpartition(".")[0] for r in STORED} >= {"3.4", "3.6", "3.8"}
    for version in {r["triton"] for r in STORED}:
        assert {r["arch"] for r in STORED if r["triton"] == version} == set(ARCHITECTURES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_stored_is_what_the_table_names(arch):
    """The script has to run again when the table changes; candidates are of the newest version alone."""
    wanted = set()
    for kind in ("configurations", "candidates"):
        every = table.table()[kind]
        for mode, buckets in {**every["default"], **every.get(arch, {})}.items():
            for values in buckets.values():
                for value in [values] if kind == "configurations" else values:
                    wanted.add((kind == "candidates", mode, table.Configuration(*value)))
    for version in {r["triton"] for r in STORED}:
        there = [r for r in STORED if r["arch"] == arch and r["triton"] == version]
        found = {(r["candidate"], r["mode"], table.Configuration(*r["configuration"])) for r in there}
        assert found == (wanted if version == NEWEST else {w for w in wanted if not w[0]})


def test_every_stored_variant_of_the_table_keeps_the_bounds():
    for r in STORED:
        if not r["candidate"]:
            check(r)


def test_as_many_programs_share_a_multiprocessor_as_intended():
    """Two where the loss spends its time; a second matrix, or tiles of 128 x 256 (for wide rows), may leave one."""
    for r in STORED:
        if not r["candidate"]:
            large = r["configuration"][0] * r["configuration"][1] > 128 * 128
            intended = 2 if r["mode"] in ("sums", "weights", "sums_two", "weights_two") and not large else 1
            assert r["programs"] >= intended, r


def test_candidates_keep_the_bounds_but_those_of_the_epilogue():
    found = [r for r in STORED if r["candidate"]]
    assert {r["configuration"][3] for r in found} == {4, 8} and any(r["kernel"] == "resident_kernel" for r in found)
    for r in found:
        assert r["stack"] == r["local"] == r["spills"] == 0 and r["shared"] <= r["limit"] and r["programs"] >= 1, r
        assert r["tensor_core"] and r["asynchronous"], r
        if r["arch"] != "sm_100":
            assert counts(r, "loop")["mma"] == products_of_a_turn(r), r


def test_only_weights_of_narrow_rows_are_resident():
    for kind in ("configurations", "candidates"):
        for modes in table.table()[kind].values():
            for mode, buckets in modes.items():
                for size, values in buckets.items():
                    for c in [table.Configuration(*v) for v in ([values] if kind == "configurations" else values)]:
                        assert not c.resident or (mode in ("weights", "weights_maximum") and float(size) <= c.block_k)
                        assert c.resident or c.block_n in (c.block_m, 2 * c.block_m)


DISASSEMBLY = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
        /*0020*/              @!P1 BRA `(.L_x_3) ;
.L_x_1:
        /*0030*/                   LDS.128 R4, [R2] ;
        /*0040*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0050*/               @P2 BRA P3, `(.L_x_2) ;
        /*0060*/                   ISETP.NE.AND P0, PT, R0, RZ, PT ;
        /*0070*/                   STL [R1], R4 ;
.L_x_2:
        /*0080*/              @!P1 CALL.REL.NOINC `(.L_x_3) ;
        /*0090*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*00a0*/                   MUFU.EX2 R3, R8 ;
        /*00b0*/                   SHFL.BFLY PT, R5, R3, 0x1, 0x1f ;
        /*00c0*/                   STS.64 [R2], R4 ;
        /*00d0*/               @P0 BRA `(.L_x_4) ;
        /*00e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00f0*/                   LDSM.16.M88.4 R4, [R2] ;
.L_x_4:
        /*0100*/                   EXIT ;
.L_x_5:
        /*0110*/                   BRA `(.L_x_5);
"""


def test_instructions_are_counted_along_the_shortest_way():
    none = dict.fromkeys(sass.KINDS, 0)
    parts = sass.parts(DISASSEMBLY)
    assert parts["prologue"] == none | {"total": 3}
    # Without the branch that may be jumped over, whose store to the stack a turn may skip.
    assert parts["loop"] == none | {"total": 5, "mma": 1, "exchanged": 4}
    assert parts["epilogue"] == none | {"total": 5, "shfl": 1, "mufu": 1, "exchanged": 3}
    assert parts["whole"] == none | {"total": 7, "shfl": 1, "mufu": 1, "bar": 1, "exchanged": 7}


def test_without_a_loop_all_is_prologue():
    text = DISASSEMBLY.replace("HMMA", "FFMA")
    parts = sass.parts(text)
    assert parts["prologue"]["total"] == 3 + 5 and parts["loop"]["total"] == parts["whole"]["total"] == 0


def test_a_jump_by_a_register_leads_to_all_its_targets():
    jump = """BRX R4 -0xd0 (*"BRANCH_TARGETS .L_x_6,.L_x_4"*)"""
    text = DISASSEMBLY.replace("@P0 BRA `(.L_x_4)", jump).replace(
        "BAR.SYNC.DEFER_BLOCKING", "BRA `(.L_x_4) ;\n.L_x_6:\n /*00e8*/ BAR"
    )
    assert sass.parts(text)["epilogue"]["total"] == 5


def test_a_call_that_returns_is_passed_by():
    """A division's slow path is a function of its own; its instructions are not of the shortest way."""
    called = DISASSEMBLY.replace("@P0 BRA `(.L_x_4)", "CALL.REL.NOINC `(.L_x_5)")
    called = called.replace("BRA `(.L_x_5)", "RET.REL.NODEC R2 `(kernel)")
    parts = sass.parts(called)
    assert parts["epilogue"]["total"] == 7 and parts["whole"]["total"] == 8
