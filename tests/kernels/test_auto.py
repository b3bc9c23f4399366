"""The choice of "auto" on GPUs that are not here: rule, cache, precision, and the self-check with its warning."""

import json
import math
import threading
import warnings

import pytest
import torch
from invented import A100, FUTURE, H100, L4, MI300, RTX_4090, V100, pretend
from reference import unit
from tiles import shrink

from ssd_addon import JointEntropyLoss
from ssd_addon.kernels import cache, check, choice, dispatch, launch, negative_lse, operators, similarity, table
from ssd_addon.kernels.choice import NEVER, decide, estimated_rows, key, precise_enough, why_not

pytestmark = pytest.mark.filterwarnings("ignore:invalid value|overflow|divide:RuntimeWarning")

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """The interpreter passes for an H100 on which triton is the fastest from 64 rows on."""
    pretend(monkeypatch)
    shrink(monkeypatch)


def picked(n=64, dtype=torch.float16, **options):
    """What "auto" runs for n rows, by what `negative_lse` itself calls."""
    ran = []
    whole = similarity.choose_backend
    with pytest.MonkeyPatch.context() as m:
        m.setattr(similarity, "choose_backend", lambda *a, **k: ran.append(whole(*a, **k)) or ran[-1])
        z = unit(n, 8).to(dtype)
        lse = negative_lse(z, torch.arange(n) // 2, 0.15, **options)
    name = ran[-1]  # the check inside runs first
    want = negative_lse(z.double(), torch.arange(n) // 2, 0.15, backend="eager", prefix=options.get("prefix"))
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=5e-3)
    return name


# ------------------------------------------------------------------------------------------ the rule


def seconds(gpu, n, d, tf32):
    """Both sides of the rule, from its words."""
    u = 2 * n * n * d
    other = 2 * u / (0.75 * gpu.peak32(tf32)) + 120 * n * n / 2 / (0.8 * gpu.bandwidth)
    return other, 3 * 2 * u / (0.4 * gpu.peak16) + 2.8e-3


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("width", [64, 256, 2048])
@pytest.mark.parametrize("gpu", [H100, A100, L4, RTX_4090], ids=lambda g: g.name)
def test_the_estimate_is_where_both_sides_of_the_rule_meet(gpu, width, tf32):
    rows = decide(gpu, width, tf32=tf32)
    if rows == NEVER:
        other, tiles = seconds(gpu, 10**7, width, tf32)
        assert other < tiles
        return
    for n, faster in ((rows - 2, False), (rows + 1, True)):
        other, tiles = seconds(gpu, n, width, tf32)
        assert (other > tiles) == faster


def test_rates_are_those_of_the_data_sheets():
    """Dense fp16 with float32 sums, and float32, in TFLOP/s."""
    assert [round(g.peak16 / 1e12) for g in (A100, RTX_4090)] == [312, 165]
    assert 990 < H100.peak16 / 1e12 < 1080  # 989 at 1.83 GHz; torch reports 1.98
    assert round(A100.peak32(tf32=False) / 1e12, 1) == 19.5 and round(A100.peak32(tf32=True) / 1e12) == 156
    assert round(RTX_4090.peak32(tf32=False) / 1e12, 1) == 82.6


def test_an_h100_takes_the_tiles_by_itself_and_a_small_gpu_is_careful():
    assert [round(decide(H100, d, tf32=False), -2) for d in (256, 2048)] == [8900, 4700]
    assert decide(A100, 512, tf32=False) < decide(H100, 512, tf32=False)
    assert decide(L4, 2048, tf32=False) == decide(RTX_4090, 2048, tf32=False) == NEVER
    assert decide(H100, 2048, tf32=True) == NEVER  # TF32 is near enough there
    assert decide(FUTURE, 256, tf32=False) >= 10_000  # nothing is known: the smallest rates, an ordinary clock
    assert estimated_rows(H100, 2048, tf32=True) == math.inf


@pytest.mark.parametrize(
    "gpu,message",
    [
        (V100, "needs compute capability 8.0 or higher, and cuda:0 has 7.0"),
        (MI300, r"written for NVIDIA GPUs, and torch 2.11.0\+cu130 is built for AMD's \(ROCm 6.4.1\)"),
    ],
)
def test_what_cannot_run_is_refused_by_name_and_auto_goes_on(monkeypatch, gpu, message):
    monkeypatch.setattr(choice, "gpu_of", lambda device: gpu)
    options = {"matrix_elements": 2**30, "dtype": torch.float32, "device": CUDA}
    with pytest.raises(ValueError, match=f"'triton': it .*{message}.*'eager' and 'streaming' run"):
        dispatch.choose_backend("triton", **options)
    rows = dispatch.rows_for_triton("auto", CUDA, 256, came_as=torch.float16, prefix=0, rows=10**6)
    assert rows == NEVER and dispatch.choose_backend("auto", rows=10**6, triton_from=rows, **options) == "streaming"
    for fine in (H100, A100, L4, RTX_4090, FUTURE):
        assert why_not(fine, "cuda:0") is None


def test_measurements_come_before_the_estimate_and_one_s_own_before_others():
    packaged = {"auto": {"sm_90": {"float32": {"256": 9000, "inf": 5000}}}}
    own = {"auto": {"float32": {"inf": 700}}}
    assert decide(H100, 256, tf32=False, packaged=packaged) == 9000
    assert decide(H100, 300, tf32=False, packaged=packaged) == 5000
    assert decide(H100, 256, tf32=False, packaged=packaged, measured=own) == 700
    assert decide(H100, 256, tf32=True, packaged=packaged, measured=own) == decide(H100, 256, tf32=True)
    assert decide(A100, 256, tf32=False, packaged=packaged) == decide(A100, 256, tf32=False)


# ------------------------------------------------------------------------------------------ precision


def test_only_what_loses_nothing_by_fp16_takes_the_tiles():
    assert precise_enough(torch.float16, False) and precise_enough(torch.bfloat16, False)
    assert not precise_enough(torch.float32, False) and precise_enough(torch.float32, True)
    assert not precise_enough(torch.float64, True)


@pytest.mark.parametrize("how", ["old", "new", "high", "inherited"])
def test_the_users_tf32_is_seen_however_it_is_set(how):
    matmul = torch.backends.cuda.matmul
    assert not dispatch.tf32_allowed()
    try:
        if how == "old":
            matmul.allow_tf32 = True
        elif how == "high":
            torch.set_float32_matmul_precision("high")
        elif not hasattr(matmul, "fp32_precision"):
            pytest.skip("a newer torch has it")
        elif how == "new":
            matmul.fp32_precision = "tf32"
        else:
            matmul.fp32_precision, torch.backends.fp32_precision = "none", "tf32"
        assert dispatch.tf32_allowed()
    finally:
        if hasattr(matmul, "fp32_precision"):
            torch.backends.fp32_precision = "none"
            matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
    assert not dispatch.tf32_allowed()


def test_auto_goes_by_the_type_that_came(gpu, monkeypatch):
    assert picked(dtype=torch.float16) == picked(dtype=torch.bfloat16) == "triton"
    assert picked(dtype=torch.float32) == picked(dtype=torch.float64) == "eager"
    assert picked(63) == "eager"
    monkeypatch.setattr(dispatch, "tf32_allowed", lambda: True)
    assert picked(dtype=torch.float32) == "triton" and picked(dtype=torch.float64) == "eager"


def test_the_loss_hands_on_the_type_that_came(gpu):
    g = torch.Generator().manual_seed(0)
    z = {n: torch.randn(3, 24, d, generator=g).half() for n, d in (("content", 8), ("color", 4))}
    criterion = JointEntropyLoss("simclr")
    terms = criterion.terms(z)
    assert terms.backend == "triton"
    wide = {n: t.float() for n, t in z.items()}
    assert criterion.terms(wide).backend == "eager"
    assert criterion.terms({"content": z["content"], "color": wide["color"]}).backend == "eager"
    torch.testing.assert_close(terms.loss, criterion(wide), rtol=0, atol=5e-3)
    for options in ({"content_entropy": True}, {"validate": False}):
        assert JointEntropyLoss("simclr", **options).terms(z).backend == "triton"
    for family in ("vicreg", "barlow"):
        assert JointEntropyLoss(family).terms(z).backend == "eager"


def test_what_fp16_products_cannot_resolve_is_left_to_float32(gpu):
    z, ids = unit(64, 8).half(), torch.arange(64) // 2
    for temperature, known in ((0.005, None), (0.15, similarity.Known(20.0, 0.15, 0, 31))):
        bound = similarity.similarity_bound(temperature, known, None)
        options = {"dtype": torch.float32, "device": CPU, "triton_from": 64, "bound": bound}
        alone = similarity._dist.Shards(None, (64,), 0)
        assert similarity.log_sums_backend("auto", alone, **options) == "eager"
    want = negative_lse(z, ids, 0.005, backend="eager")
    torch.testing.assert_close(negative_lse(z, ids, 0.005), want, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------ the self-check


def test_the_check_runs_once_for_each_width_and_prefix(gpu, monkeypatch):
    ran = []
    whole = check.run
    monkeypatch.setattr(check, "run", lambda *a: ran.append(a[1:]) or whole(*a))
    for _ in range(2):
        assert picked() == picked(prefix=3) == "triton"
    assert ran == [(8, 0), (8, 3)]
    assert picked(63) == "eager"  # nothing is checked for what is not chosen


WRONG = [
    (launch, "sums", lambda out: out + 0.1, "log-sum differs by 0"),
    (launch, "gradient", lambda out: out * 1.01, "gradient differs by"),
    (launch, "gradient", lambda out: out.index_fill(0, torch.tensor([5]), 0.0), "gradient differs by"),
    (launch, "sums", lambda out: out.index_fill(1, torch.tensor([5]), math.nan), "log-sum differs by nan"),
]


@pytest.mark.parametrize("module,name,spoil,message", WRONG, ids=["value", "gradient", "a-row", "nan"])
@pytest.mark.parametrize("form", ["a constant shift", "maxima"])
def test_a_wrong_kernel_never_gives_a_wrong_number(gpu, monkeypatch, module, name, spoil, message, form):
    whole = getattr(module, name)
    by_maximum = {"sums": lambda args: args[3], "gradient": lambda args: args[2] is not None}[name]

    def wrong(*args):
        out = whole(*args)
        return spoil(out) if by_maximum(args) == (form == "maxima") else out

    monkeypatch.setattr(module, name, wrong)
    with pytest.warns(RuntimeWarning, match=f"failed their check on cpu .with {form} a?.*{message}.*'streaming'"):
        assert picked() == "eager"  # what is chosen here without triton; the numbers are compared in `picked`
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "invalid value|overflow|divide")
        assert picked() == picked(96, prefix=3) == "eager"  # said once
    assert dispatch.rows_for_triton("auto", CPU, 8, came_as=torch.float16, prefix=0, rows=10**6) == NEVER


def test_a_kernel_that_raises_is_left_alone(gpu, monkeypatch):
    def broken(*args):
        raise RuntimeError("PTX was compiled\nwith an unsupported toolchain")

    monkeypatch.setattr(launch, "sums", broken)
    with pytest.warns(
        RuntimeWarning, match="RuntimeError: PTX was compiled with an unsupported toolchain.*'streaming'"
    ):
        assert picked() == "eager"
    with pytest.raises(RuntimeError, match="PTX"):  # whoever asks for it by name gets it
        negative_lse(unit(64, 8).half(), torch.arange(64), 0.15, backend="triton")


def test_an_exhausted_memory_settles_nothing(gpu, monkeypatch):
    whole, full = launch.sums, [True]

    def sums(*args):
        if full[0]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return whole(*args)

    monkeypatch.setattr(launch, "sums", sums)
    assert picked() == "eager"  # without a warning: warnings are errors
    full[0] = False
    assert picked() == "triton"
    monkeypatch.setattr(check, "free_memory", lambda device: check.ROOM - 1)
    assert picked(prefix=3) == "eager" and picked() == "triton"


def test_nothing_is_checked_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(check, "capturing", lambda device: True)
    monkeypatch.setattr(check, "run", lambda *_: pytest.fail("checked"))
    assert picked() == "eager"
    monkeypatch.undo()


def test_fake_tensors_settle_nothing(gpu):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert dispatch.rows_for_triton("auto", CPU, 8, came_as=torch.float16, prefix=0, rows=64) == NEVER
    assert picked() == "triton"


def test_the_check_leaves_the_users_settings_alone(gpu):
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert dispatch.rows_for_triton("auto", CPU, 8, came_as=torch.float16, prefix=0, rows=64) == 64
        assert not torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
@pytest.mark.parametrize("checked", [False, True])
def test_a_compiled_call_goes_by_what_was_settled_before(gpu, monkeypatch, checked):
    z, ids = unit(64, 8).half(), torch.arange(64) // 2
    ran = []
    if checked:
        assert picked() == "triton"
    monkeypatch.setattr(check, "run", lambda *_: pytest.fail("checked"))
    monkeypatch.setattr(operators, "log_sums", lambda *a, f=operators.log_sums: ran.append(1) or f(*a))
    torch._dynamo.reset()
    whole = similarity._triton
    monkeypatch.setattr(similarity, "_triton", lambda *a: ran.append(1) or whole(*a))
    lse = torch.compile(lambda z: negative_lse(z, ids, 0.15), fullgraph=True, backend="aot_eager")(z)
    assert bool(ran) == checked
    torch.testing.assert_close(lse, negative_lse(z, ids, 0.15, backend="eager"), rtol=0, atol=5e-3)


# ------------------------------------------------------------------------------------------ the cache


RECORD = {
    "auto": {"float32": {"256": 4096, "inf": 2048}},
    "configurations": {"sums": {"inf": [64, 128, 64, 8, 3, False, 8]}},
    "measured": {"seconds": 60},
}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SSD_ADDON_CACHE", str(tmp_path / "own"))
    return tmp_path


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("SSD_ADDON_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "ssd-addon" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.directory() == tmp_path / "x" / "ssd-addon" / "kernels"
    monkeypatch.setenv("SSD_ADDON_CACHE", str(tmp_path / "y"))
    assert cache.directory() == tmp_path / "y" / "kernels"


def test_names_differ_by_all_that_a_measurement_depends_on():
    names = {key(g, h) for g in (H100, A100, L4, RTX_4090) for h in ("0123456789ab", "ba9876543210")}
    assert len(names) == 8
    from dataclasses import replace

    for change in ({"torch": "2.12.0"}, {"cuda": "12.8"}, {"triton": "3.7.0"}, {"multiprocessors": 114}):
        assert key(replace(H100, **change), "ab") != key(H100, "ab")
    assert "/" not in key(replace(H100, name="../../etc: a/b"), "ab")
    assert cache.path(H100).name.endswith(f"{cache.kernels_hash()}.json") and len(cache.kernels_hash()) == 12


def test_a_record_comes_back_and_no_file_is_no_record(folder):
    assert cache.load(H100) is None
    file = cache.save(H100, RECORD)
    assert file.parent == folder / "own" / "kernels" and [f.name for f in file.parent.iterdir()] == [file.name]
    found = cache.load(H100)
    assert {k: found[k] for k in RECORD} == RECORD
    assert cache.load(A100) is None
    own = table.configuration("sm_90", "sums", 512, found["configurations"])
    assert own == table.Configuration(64, 128, 64, 8, 3, False, 8)
    assert table.configuration("sm_90", "weights", 512, found["configurations"]).block_m == 128
    assert decide(H100, 300, tf32=False, measured=found) == 2048


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", "Expecting value"),
        (b"{", "Expecting"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "not of format 1"),
        ({"format": 2}, "not of format 1"),
        ({"key": "NVIDIA-A100"}, "measured for 'NVIDIA-A100'"),
        ({"auto": []}, "no 'auto'"),
        ({"auto": {"float32": {"256": 100}}}, "'auto' has 'float32'"),
        ({"auto": {"float32": {"inf": "many"}}}, "'auto' has"),
        ({"auto": {"float32": {"inf": -1}}}, "'auto' has"),
        ({"auto": {"bf16": {"inf": 1}}}, "'auto' has 'bf16'"),
        ({"configurations": {"sums": {"inf": [100, 100, 64, 8, 3, False, 8]}}}, "'configurations' has 'sums'"),
        ({"configurations": {"sums": {"inf": [64, 128, 64, 8, 3, 0, 8]}}}, "'configurations' has 'sums'"),
        ({"configurations": {"sums": {"inf": [64, 512, 64, 8, 3, False, 8]}}}, "'configurations' has 'sums'"),
    ],
)
def test_what_is_no_record_is_left_out_with_a_warning(folder, content, message):
    file = cache.save(H100, RECORD)
    if isinstance(content, dict):
        content = json.dumps({**json.loads(file.read_text()), **content}).encode()
    file.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=message):
        assert cache.load(H100) is None


def test_a_folder_in_the_place_of_the_file_is_no_record(folder):
    cache.path(H100).mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert cache.load(H100) is None


def test_what_could_not_be_read_again_is_not_written(folder):
    with pytest.raises(ValueError, match="record: expected one that can be loaded again: got 'auto' has"):
        cache.save(H100, {**RECORD, "auto": {"float32": {"256": 1}}})
    assert not cache.path(H100).exists()


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    file = cache.save(H100, RECORD)
    with monkeypatch.context() as m:
        m.setattr(cache.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            cache.save(H100, {**RECORD, "measured": {}})
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    assert cache.load(H100)["measured"] == RECORD["measured"]


def test_two_writers_leave_a_whole_file_at_every_moment(folder):
    stop, wrong = threading.Event(), []

    def write(rows):
        while not stop.is_set():
            cache.save(H100, {**RECORD, "auto": {"float32": {"inf": rows}}, "measured": {"filler": [rows] * 2000}})

    cache.save(H100, RECORD)
    writers = [threading.Thread(target=write, args=(rows,)) for rows in (1, 2)]
    for w in writers:
        w.start()
    seen = set()
    try:
        for _ in range(200):
            record = cache.load(H100)  # a warning is an error
            rows = record["auto"]["float32"]["inf"]
            seen.add(rows)
            if "filler" in record["measured"] and set(record["measured"]["filler"]) != {rows}:
                wrong.append(record)
    finally:
        stop.set()
        for w in writers:
            w.join()
    assert not wrong and seen & {1, 2}
    assert [f.name for f in cache.path(H100).parent.iterdir()] == [cache.path(H100).name]


def test_auto_goes_by_the_users_file(monkeypatch, tmp_path):
    shrink(monkeypatch)
    pretend(monkeypatch, triton_from=10**6, folder=tmp_path)
    assert picked() == "eager"
    cache.save(H100, {**RECORD, "auto": {"float32": {"inf": 64}}})
    assert picked() == "triton"
