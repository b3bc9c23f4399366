"""Measuring on this machine: rehearsed in the interpreter, whose figures mean nothing; and what the command says."""

import math
from dataclasses import replace

import pytest
import torch
from invented import H100
from reference import unit
from tiles import DESCRIPTORS, SQUARE, WIDE

from ssd_addon.__main__ import main
from ssd_addon.kernels import cache, launch, negative_lse, table, tiles, tune
from ssd_addon.kernels.choice import NEVER

pytestmark = pytest.mark.filterwarnings("ignore:invalid value|overflow|divide:RuntimeWarning")

CPU = torch.device("cpu")
SHORT = replace(tune.REHEARSAL, rows=24, widths=(8,), sizes=(32,), repeats=(1, 1))


@pytest.mark.slow
def test_a_rehearsal_tries_every_kernel_and_writes_what_can_be_read(monkeypatch, tmp_path):
    monkeypatch.setenv("SSD_ADDON_CACHE", str(tmp_path))
    said = []
    report = tune.measure(CPU, SHORT, seconds=600, say=said.append)
    record = report.record
    assert set(record["configurations"]) == set(tune.MODES)
    assert set(record["auto"]) == {"float32", "tf32"} and record["auto"]["float32"].keys() == {"inf"}
    assert all("ms" in t for tried in report.candidates.values() for t in tried), report.candidates
    assert {tuple(t["configuration"]) for tried in report.candidates.values() for t in tried} == set(SHORT.small)
    assert said[0].startswith("[   0 s of 600] self-check") and len(said) == 1 + len(tune.MODES) + 2
    file = cache.save(SHORT.gpu, record)
    assert file.name.startswith("interpreter-") and cache.load(SHORT.gpu)["auto"] == record["auto"]


@pytest.mark.slow
@pytest.mark.parametrize("mode,name", [("sums", "sums"), ("weights_two", "gradient"), ("products", "products")])
def test_a_tile_that_computes_something_else_is_never_the_fastest(monkeypatch, mode, name):
    whole = getattr(launch, name)

    def f(*args):
        out = whole(*args)
        wrong = table.configuration("default", mode, 8) == WIDE
        spoiled = out[0] * 1.01 if isinstance(out, tuple) else out * 1.01
        return out if not wrong else (spoiled, *out[1:]) if isinstance(out, tuple) else spoiled

    monkeypatch.setattr(launch, name, f)
    with tune.shrunk(SHORT):
        step = tune.Step(CPU, SHORT, mode, 8)
        assert "ms" in step.timed(SQUARE)
        assert "differs by 0.0" in step.timed(WIDE)["failed"]


def test_a_tile_that_does_not_compile_is_told(monkeypatch):
    with tune.shrunk(SHORT):
        step = tune.Step(CPU, SHORT, "sums", 8)
        monkeypatch.setattr(launch, "sums", lambda *_: (_ for _ in ()).throw(RuntimeError("out of\nresources")))
        assert step.timed(SQUARE) == {"failed": "RuntimeError: out of resources"}
        assert table.configuration("default", "sums", 8) == SHORT.small[0]  # nothing is left behind


def test_recorded_launches_do_the_same_again():
    z, ids = unit(40, 8).half(), torch.arange(40) // 2
    kept, seen = (tiles.sums_kernel, tiles.weights_kernel, launch.add_product), []
    with tune.shrunk(SHORT):
        leaf = z.clone().requires_grad_()
        with tune.recorded(("sums_kernel",)) as forward:
            lse = negative_lse(leaf, ids, 0.1, backend="triton", validate=False)
        with tune.recorded(("weights_kernel",), products=True) as backward:
            torch.autograd.grad(lse.sum(), leaf)
        assert len(forward) == 1 and len(backward) == 2
        near = forward[0].__closure__
        outputs = [t for c in near for t in _tensors(c.cell_contents) if t.dtype == torch.float32 and t.ndim == 3]
        want = [t.clone() for t in outputs]
        for t in outputs:
            t.fill_(-1)
        tune.replayed(forward, CPU)()
        seen = [torch.equal(a, b) for a, b in zip(outputs, want, strict=True)]
    assert seen and all(seen)
    assert kept == (tiles.sums_kernel, tiles.weights_kernel, launch.add_product)


@pytest.mark.parametrize("mode,launches", [("sums", 1), ("weights", 2)])
def test_the_time_of_a_tile_is_that_of_its_kernel_and_of_the_products_that_read_what_it_wrote(
    monkeypatch, mode, launches
):
    seen = []
    monkeypatch.setattr(tune, "replayed", lambda found, device: seen.append(len(found)) or (lambda: None))
    with tune.shrunk(SHORT):
        assert "ms" in tune.Step(CPU, SHORT, mode, 8).timed(SQUARE)
    assert seen == [launches]


def _tensors(value):
    return [t for t in value if isinstance(t, torch.Tensor)] if isinstance(value, tuple) else []


@pytest.mark.parametrize(
    "faster,expected",
    [
        ([False] * 5, NEVER),
        ([False, False, True, True, None], 400),  # twice in a row: no more is timed
        ([True, False, True, True, None], 400),
        ([False, False, False, False, True], 1600),
        ([True, False, False, False, False], NEVER),
        ([False, "memory", None, None, None], NEVER),
        ([False, True, "memory", None, None], 200),
    ],
)
def test_the_threshold_is_where_triton_starts_to_win_for_good(monkeypatch, faster, expected):
    plan = replace(SHORT, sizes=(100, 200, 400, 800, 1600))
    at = dict(zip(plan.sizes, faster, strict=True))

    def compared(device, plan, n, width, tf32):
        assert at[n] is not None
        if at[n] == "memory":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return (1.0, 2.0) if at[n] else (2.0, 1.0)

    monkeypatch.setattr(tune, "compared", compared)
    assert tune._threshold(CPU, plan, 8, False, math.inf, {}) == expected
    assert tune._threshold(CPU, plan, 8, False, -math.inf, {}) is None


def test_what_was_not_timed_is_left_to_the_table(monkeypatch):
    """No threshold at all rather than one for some widths, which would hold for the others too."""
    report = tune.Report({"auto": {}, "configurations": {}, "measured": {}})
    plan = replace(SHORT, widths=(8, 16))
    said = []
    assert tune.best_tiles(CPU, plan, -math.inf, said.append, report) == {}
    tune.thresholds(CPU, plan, -math.inf, said.append, report)
    assert report.record["auto"] == {} and len(said) == 2
    assert cache._problem({"format": 1, "key": "k", **report.record}, "k") is None


def test_candidates_begin_with_the_tables_own():
    plan = tune.Plan(H100)
    found = tune.candidates(plan, "sums", 512)
    assert found[0] == table.configuration("sm_90", "sums", 512) and len(set(found)) == len(found) > 3
    assert all(table.is_configuration(list(c)) for m in tune.MODES for c in tune.candidates(plan, m, 128))
    assert table.is_configuration(list(DESCRIPTORS)) and not table.is_configuration([*DESCRIPTORS[:5], 1, 3])


def test_the_command_says_that_there_is_no_gpu(capsys):
    assert main(["tune"]) == 1
    said = capsys.readouterr()
    assert (
        "error: tune: expected a CUDA device: got none, as torch finds no GPU; on a CPU backend='auto' uses" in said.err
    )
    assert main(["tune", "--seconds", "0"]) == 1
    assert "--seconds: expected a time above 0: got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_can_be_rehearsed(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SSD_ADDON_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "REHEARSAL", SHORT)
    monkeypatch.setattr(tune, "MODES", ("sums", "weights"))
    assert main(["tune", "--rehearse", "--seconds", "600"]) == 0
    said = capsys.readouterr().out
    assert "a rehearsal, which is not used" in said and "sums, D = 8: " in said
    assert [f.suffix for f in (tmp_path / "kernels").iterdir()] == [".json"]


def test_a_kernel_that_keeps_the_gradient_in_registers_is_timed_beside_the_others():
    """Its figure stands for the products of the others too, which are therefore in theirs."""
    high = table.Configuration(32, 16, 16, 4, 2, False, 1, 0, True)
    with tune.shrunk(SHORT):
        step = tune.Step(CPU, SHORT, "weights", 8)
        assert "ms" in step.timed(high)
        with tune.using({"weights": {"inf": list(high)}}), tune.recorded(tune.KERNELS["weights"], True) as launches:
            step.run()
    assert len(launches) == 1 and table.is_configuration(list(high))
