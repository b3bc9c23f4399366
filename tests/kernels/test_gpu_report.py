"""What the pages say about the GPU run is what the run measured, and what "auto" goes by there."""

import pytest
from invented import H100

from benchmarks import gpu_report
from ssd_addon.kernels import table
from ssd_addon.kernels.choice import decide

STAGES = gpu_report.stages()


@pytest.mark.parametrize("page", gpu_report.PAGES, ids=lambda p: p.name)
def test_the_tables_of_the_pages_are_those_of_the_run(page):
    text = page.read_text()
    assert "<!-- gpu: " in text
    assert gpu_report.written(text, STAGES) == text, "run python benchmarks/gpu_report.py"


def test_a_table_that_nobody_makes_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        gpu_report.written("<!-- gpu: nothing -->\n<!-- end -->", STAGES)


def test_cells_say_what_did_not_fit_and_what_was_not_tried():
    assert gpu_report.time({"failed": "OutOfMemoryError: CUDA"}) == "out of memory"
    assert gpu_report.time({"failed": "ValueError: shape"}) == "failed" and gpu_report.time(None) == "-"
    assert gpu_report.time({"ms": 14.33, "low": 14.15, "high": 14.75}) == "14.3 (14.2 to 14.8)"


@pytest.mark.parametrize("mode", STAGES["tune"]["record"]["configurations"])
def test_the_tiles_of_sm_90_are_those_that_were_fastest_or_near_it(mode):
    for width in (128, 256, 512, 1024, 2048):
        tried = {
            table.Configuration(*t["configuration"]): t["ms"] for t in STAGES["tune"]["candidates"][f"{mode}, {width}"]
        }
        taken = tried[table.configuration("sm_90", mode, width)]
        assert taken <= (1.03 if mode == "sums_two" else 1.0) * min(tried.values())


@pytest.mark.parametrize("tf32", [False, True], ids=["float32", "tf32"])
def test_an_h100_takes_triton_from_where_it_won_on_the_h200(tf32):
    found = STAGES["tune"]["record"]["auto"]["tf32" if tf32 else "float32"]
    for width in (64, 128, 200, 512, 768, 1024, 2048, 4096):
        assert decide(H100, width, tf32=tf32, packaged=table.table()) == table.bucket(found, width)
