"""A run that survives: steps that are not finite, damaged and missing files, signals, kills, another process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imagenet_options
import pytest
import torch
from imagenet_runs import ROOT, SMALL, draw, log_of, run, spoil

from examples import imagenet
from ssd_addon import JointEntropyLoss, StructuredViews, presets, runs
from ssd_addon.collate import ImageFiles
from ssd_addon.crops import Cropped

pytestmark = pytest.mark.slow
ALONE = ("--measure", "0")


def same(a: dict, b: dict, parts: tuple[str, ...] = ("model", "probes", "criterion", "views")) -> bool:
    return all(torch.equal(t, b[part][k]) for part in parts for k, t in a[part].items())


def stored(data: Path, out: str, name: str = "checkpoint.pt") -> dict:
    return torch.load(data.parent / out / name, weights_only=True)


class Poisoned(JointEntropyLoss):
    """Gives NaN at some calls."""

    at: tuple[int, ...] = ()
    calls = 0

    def terms(self, z, batch=None):
        type(self).calls += 1
        if type(self).calls in self.at:
            z["color"] = z["color"] * float("nan")
        return super().terms(z, batch)


@pytest.fixture
def poison(monkeypatch):
    def at(*calls: int) -> None:
        kind = type("Poisoned", (Poisoned,), {"at": calls, "calls": 0})
        monkeypatch.setattr(imagenet, "JointEntropyLoss", kind)

    return at


def test_a_step_that_is_not_finite_is_skipped_and_said(data, poison, capsys):
    poison(2)
    run(data, "run", "--steps", "4", *ALONE)
    entries = log_of(data, "run")
    assert [s["step"] for s in entries if "skipped" in s] == [2]
    assert [s["step"] for s in entries if "loss" in s] == [1, 3, 4]
    assert "step 2/4  skipped: loss or gradients are not finite (1 in a row)" in capsys.readouterr().out
    assert not runs.not_finite(stored(data, "run"))


def test_too_many_end_the_run_with_a_batch_that_shows_why(data, poison, capsys):
    poison(3, 4, 5)
    with pytest.raises(SystemExit) as end:
        run(data, "run", "--steps", "9", "--max-skipped", "2", "--save-every", "1", *ALONE)
    assert end.value.code == 4 and "step 4: " in (said := capsys.readouterr().err) and "in the space color" in said
    assert not runs.not_finite(stored(data, "run"))
    batch = torch.load(data.parent / "run" / "not-finite-4-rank0.pt", weights_only=True)
    assert batch["images"]["pixels"].dtype == torch.uint8 and len(batch["names"]) == 4
    assert not runs.not_finite(batch["model"])
    views = StructuredViews(**presets("color_spatial", size=32))
    views.set_extra_state(batch["views"])
    assert views(Cropped(**batch["images"], plan=views.plan)).views.shape == (4, 4, 3, 32, 32)


def test_a_state_that_is_not_finite_is_never_saved(data, monkeypatch, capsys):
    run(data, "run", "--steps", "3", *ALONE)
    before = (data.parent / "run" / "checkpoint.pt").read_bytes()

    def ruin(self, *arguments):
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("nan"))

    monkeypatch.setattr(imagenet_options.Lars, "step", ruin)
    with pytest.raises(SystemExit) as end:
        run(data, "run", "--steps", "4", "--resume", *ALONE)
    assert end.value.code == 4 and "expected a finite state to save: got NaN in" in capsys.readouterr().err
    assert (data.parent / "run" / "checkpoint.pt").read_bytes() == before


def test_resume_starts_where_there_is_nothing_and_keeps_the_last_ones(data, capsys):
    run(data, "run", "--steps", "4", "--resume", "--save-every", "1", "--keep", "2", *ALONE)
    assert "starting: there is no checkpoint yet" in capsys.readouterr().out
    assert sorted(p.name for p in (data.parent / "run").glob("checkpoint*")) == ["checkpoint-3.pt", "checkpoint.pt"]
    run(data, "straight", "--steps", "6", *ALONE)
    newest = data.parent / "run" / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    run(data, "run", "--steps", "6", "--resume", "--save-every", "1", "--keep", "2", *ALONE)
    said = capsys.readouterr().out
    assert "skipped" in said and "continuing from" in said and "step 3" in said
    assert same(stored(data, "straight"), stored(data, "run"))
    steps = [s["step"] for s in log_of(data, "run") if "loss" in s]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("ruin", ["", '{"step": 1, "lo', "\n\n", "\0\0\0\0", "not json\n", None])
def test_any_log_lets_a_run_go_on(data, ruin):
    run(data, "run", "--steps", "2", *ALONE)
    log = data.parent / "run" / "log.jsonl"
    if ruin is None:
        log.unlink()
    else:
        log.write_text(ruin if not ruin else log.read_text() + ruin)
    run(data, "run", "--steps", "4", "--resume", *ALONE)
    steps = [s["step"] for s in log_of(data, "run") if "loss" in s]
    assert steps == ([3, 4] if not ruin else [1, 2, 3, 4])


def test_an_epoch_has_one_line_however_often_it_was_stopped(data):
    for steps in ("2", "3", "4", "6"):
        run(data, "run", "--steps", steps, "--resume", *ALONE)
    epochs = [(s["step"], s["epoch"]) for s in log_of(data, "run") if "epoch" in s]
    assert epochs == [(3, 1), (6, 2)]
    # killed after it was saved and before it was scored
    log = data.parent / "run" / "log.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines() if '"step": 6, "epoch"' not in line))
    run(data, "run", "--steps", "6", "--resume", *ALONE)
    assert [(s["step"], s["epoch"]) for s in log_of(data, "run") if "epoch" in s] == epochs
    assert (data.parent / "run" / "curves.png").is_file()


@pytest.mark.filterwarnings("ignore:skipped")
def test_broken_files_end_a_run_beyond_their_share(data, capsys):
    spoil(data / "train", 3)
    options = ("--steps", "3", "--broken", "skip", *ALONE)
    run(data, "few", *options, "--max-broken", "0.25")
    with pytest.raises(SystemExit, match=r"at most 20\.00% broken files .*got 3 of 12: a/0\.png"):
        run(data, "many", *options, "--max-broken", "0.2")


def test_a_broken_file_of_val_costs_no_epoch(data):
    spoil(data / "val", 1)
    with pytest.raises(OSError, match="expected an image"):
        run(data, "run", "--steps", "3", *ALONE)
    assert stored(data, "run")["step"] == 3  # saved first, scored after
    with pytest.warns(RuntimeWarning, match="skipped"):
        run(data, "run", "--steps", "6", "--resume", "--broken", "skip", "--max-broken", "0.5", *ALONE)
    assert [(s["step"], s["broken_files_val"]) for s in log_of(data, "run") if "epoch" in s] == [(3, 1), (6, 1)]


def test_a_file_is_said_to_be_broken_once(data):
    spoil(data / "train", 1)
    with pytest.warns(RuntimeWarning) as met:
        run(data, "run", "--steps", "9", "--broken", "skip", "--max-broken", "0.5", *ALONE)
    assert len([w for w in met if "skipped" in str(w.message)]) == 1


def test_another_data_set_of_the_same_size_is_refused(data):
    run(data, "run", "--steps", "1", *ALONE)
    path = next((data / "train").glob("a/*.png"))
    path.rename(path.with_name("other.png"))
    with pytest.raises(ValueError, match="another configuration: files: "):
        run(data, "run", "--steps", "2", "--resume", *ALONE)


def test_an_absurd_size_is_refused(capsys):
    with pytest.raises(SystemExit):
        imagenet.parse(["--data", "d", "--size", "60000"])
    assert "expected an edge of at most 16384 pixels: got 60000" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        "--accumulate 2 --batch-size 2",
        "--ema 0.9",
        "--activation-checkpointing --backbone resnet18",
        "--precision bf16",
        "--workers 2 --timeout 60",
        "--accumulate 3 --batch-size 2 --ema 0.5 --dual-ascent 0.1 --equivariance 0.5 --precision bf16 --workers 2",
    ],
)
def test_a_resumed_run_is_exact_with_every_option(data, options):
    given = (*options.split(), *ALONE)
    run(data, "straight", "--steps", "4", *given)
    run(data, "halves", "--steps", "1", *given)
    run(data, "halves", "--steps", "4", "--resume", *given)
    a, b = stored(data, "straight"), stored(data, "halves")
    assert same(a, b, ("model", "criterion", "views", *(["ema"] if "--ema" in options else [])))
    both = [[s["loss"] for s in log_of(data, out) if "loss" in s] for out in ("straight", "halves")]
    assert both[0] == both[1] and len(both[0]) == 4


def test_a_run_is_resumed_exactly_with_other_workers(data):
    run(data, "straight", "--steps", "4", *ALONE)
    run(data, "halves", "--steps", "1", "--workers", "2", "--timeout", "60", *ALONE)
    run(data, "halves", "--steps", "4", "--resume", *ALONE)
    assert same(stored(data, "straight"), stored(data, "halves"), ("model", "criterion", "views"))


def test_stages_are_timed_and_nothing_is_written(data, monkeypatch, capsys):
    monkeypatch.setattr("stages.SECONDS", 0.01)
    found = run(data, "run", "--stages", *ALONE)
    assert list(found) == ["read", "decode", "loader", "views", "forward", "forward and backward"]
    assert all(rate > 0 for rate in found.values()) and "bounded by" in capsys.readouterr().out
    assert [p.name for p in (data.parent / "run").iterdir()] == [".lock"]


def test_checkpointed_activations_change_nothing(data):
    for out, more in (("plain", ()), ("again", ("--activation-checkpointing",))):
        run(data, out, "--steps", "2", "--backbone", "resnet18", *more, *ALONE)
    a, b = stored(data, "plain")["model"], stored(data, "again")["model"]
    assert a.keys() == b.keys()
    for k, t in a.items():
        torch.testing.assert_close(b[k], t, rtol=1e-4, atol=1e-5)


# ---- processes


def command(data: Path, *more: str, processes: int = 1) -> list[str]:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
        launch += ["--rdzv-endpoint", "localhost:0", "--max-restarts", "3"]
    small = [*SMALL.split(), *ALONE, "--data", str(data), "--out", str(data.parent / "run"), "--resume"]
    return [*launch, "examples/imagenet.py", *small, *more]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def started(arguments: list[str], **more) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def until(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.distributed
@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(data, number, code):
    process = started(command(data, "--epochs", "3000", "--save-every", "100000"))
    until(process, "step 4/")
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "a checkpoint was written" in out and stored(data, "run")["step"] >= 4


@pytest.mark.distributed
def test_a_second_process_is_refused(data):
    first = started(command(data, "--epochs", "3000"))
    until(first, "step 1/")
    second = subprocess.run(
        command(data, "--epochs", "3000"), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    first.kill()
    first.communicate()
    assert second.returncode == 1 and f"in use by process {first.pid} on" in second.stderr


@pytest.mark.distributed
def test_a_killed_rank_is_started_again_and_nothing_is_lost(data):
    draw(data / "train", 24)
    options = ("--steps", "12", "--epochs", "4", "--batch-size", "4", "--save-every", "1")
    straight = command(data, *options, processes=2)
    straight[straight.index(str(data.parent / "run"))] = str(data.parent / "straight")
    done = subprocess.run(straight, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    process = started(command(data, *options, processes=2))
    for step in (3, 7):
        until(process, f"step {step}/12")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert same(stored(data, "straight"), stored(data, "run"))
    lines = [json.loads(line) for line in (data.parent / "run" / "log.jsonl").read_text().splitlines()]
    assert [s["step"] for s in lines if "loss" in s] == list(range(1, 13))


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_skip_together_what_one_of_them_meets(data, strategy):
    options = ("--steps", "6", "--epochs", "9", "--batch-size", "2", "--strategy", strategy)
    arguments = command(data, *options, processes=2)
    arguments[arguments.index("examples/imagenet.py")] = "tests/support/poisoned.py"
    more = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    done = subprocess.run(
        arguments, cwd=ROOT, env=ENVIRONMENT | more, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    entries = log_of(data, "run")
    assert [s["step"] for s in entries if "skipped" in s] == [2, 4]
    assert [s["step"] for s in entries if "loss" in s] == [1, 3, 5, 6] and not runs.not_finite(stored(data, "run"))


@pytest.mark.distributed
def test_sharded_weights_are_those_of_one_process(data):
    """FSDP2 on two gloo ranks: a run that is stopped and continued equals one that is not."""
    options = ("--strategy", "fsdp", "--batch-size", "2", "--backbone", "timm:test_vit", "--size", "160")
    for out, stops in (("straight", ("3",)), ("halves", ("1", "3"))):
        for steps in stops:
            arguments = command(data, *options, "--steps", steps, processes=2)
            arguments[arguments.index(str(data.parent / "run"))] = str(data.parent / out)
            done = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
    assert same(stored(data, "straight"), stored(data, "halves"), ("model", "criterion", "views"))


def test_a_worker_that_hangs_names_its_file(data, monkeypatch):
    def hangs(self, index):
        if self.names[index].endswith("5.png"):
            time.sleep(60)
        return original(self, index)

    original = ImageFiles.__getitem__
    monkeypatch.setattr(ImageFiles, "__getitem__", hangs)
    with pytest.raises(RuntimeError, match=r"timed out after 3 seconds; at that moment, worker \d: c/5\.png"):
        run(data, "run", "--steps", "3", "--workers", "1", "--timeout", "3", *ALONE)


def test_a_worker_that_is_killed_names_its_file(data, monkeypatch):
    def dies(self, index):
        if self.names[index].endswith("5.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    original = ImageFiles.__getitem__
    monkeypatch.setattr(ImageFiles, "__getitem__", dies)
    with pytest.raises(RuntimeError, match=r"DataLoader worker.*worker \d: c/5\.png"):
        run(data, "run", "--steps", "3", "--workers", "1", *ALONE)
