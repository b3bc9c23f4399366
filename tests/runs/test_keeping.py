"""The last checkpoints of a run: a whole one is always there, a damaged one is passed over and said, one writer."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ssd_addon import runs, storage


def write(number):
    return lambda path: torch.save({"step": number, "w": torch.full((3,), float(number))}, path)


def read(path):
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        raise storage.Damaged(f"{path}: damaged") from error


def names(kept):
    return [path.name for path in kept.there()]


@pytest.mark.parametrize("keep,expected", [(1, []), (2, [30]), (3, [30, 20]), (9, [30, 20, 10])])
def test_the_last_ones_are_kept(tmp_path, keep, expected):
    kept = runs.Checkpoints(tmp_path, keep=keep)
    for step in (10, 20, 30, 40):
        kept.save(step, write(step))
    assert names(kept) == ["checkpoint.pt", *(f"checkpoint-{step}.pt" for step in expected)]
    assert [read(path)["step"] for path in kept.there()] == [40, *expected]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names(kept))  # nothing else is left


def test_a_step_that_is_saved_again_replaces_itself(tmp_path):
    kept = runs.Checkpoints(tmp_path)
    for step in (10, 20, 20, 30):
        kept.save(step, write(step))
    assert names(kept) == ["checkpoint.pt", "checkpoint-20.pt", "checkpoint-10.pt"]
    kept.save(20, write(20))  # a run that went back
    assert names(kept) == ["checkpoint.pt", "checkpoint-30.pt", "checkpoint-10.pt"]


def test_a_run_goes_on_from_the_newest_that_is_whole(tmp_path):
    kept, said = runs.Checkpoints(tmp_path), []
    assert kept.restore(read, said.append) is None and said == []
    for step in (10, 20, 30):
        kept.save(step, write(step))
    kept.newest.write_bytes(kept.newest.read_bytes()[:100])
    (tmp_path / "checkpoint-20.pt").write_bytes(b"")
    again = runs.Checkpoints(tmp_path)
    assert again.restore(read, said.append)["step"] == 10
    assert [line.split(":")[0] for line in said[:2]] == ["skipped"] * 2 and said[2].endswith("step 10")
    again.save(15, write(15))  # the damaged newest does not take the place of a whole one
    assert read(again.newest)["step"] == 15 and read(tmp_path / "checkpoint-10.pt")["step"] == 10
    for path in again.there():
        path.write_bytes(b"")
    with pytest.raises(storage.Damaged, match="expected a checkpoint that can be read"):
        again.restore(read)


def test_what_a_killed_process_left_is_removed(tmp_path):
    kept = runs.Checkpoints(tmp_path)
    kept.save(10, write(10)), kept.save(20, write(20))
    own = {p.name for p in tmp_path.iterdir()} | {".lock", "log.jsonl"}
    for name in (
        ".lock",
        "log.jsonl",
        ".checkpoint.pt.7.new",
        "..checkpoint.pt.7.new.7.tmp",
        ".checkpoint-10.pt.7.tmp",
    ):
        (tmp_path / name).write_bytes(b"half")
    runs.Checkpoints(tmp_path).restore(read)
    assert {p.name for p in tmp_path.iterdir()} == own


def test_another_configuration_is_no_damage(tmp_path):
    kept = runs.Checkpoints(tmp_path)
    kept.save(10, write(10)), kept.save(20, write(20))

    def refuses(path):
        raise ValueError("another configuration")

    with pytest.raises(ValueError, match="another configuration"):
        kept.restore(refuses)


def test_a_resumed_run_keeps_what_it_started_from(tmp_path):
    runs.Checkpoints(tmp_path).save(10, write(10))
    kept = runs.Checkpoints(tmp_path)
    kept.restore(read)
    kept.save(20, write(20))
    assert names(kept) == ["checkpoint.pt", "checkpoint-10.pt"]


def test_without_links_it_is_a_copy(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    kept = runs.Checkpoints(tmp_path)
    kept.save(10, write(10)), kept.save(20, write(20))
    assert [read(path)["step"] for path in kept.there()] == [20, 10]


def test_a_write_that_fails_leaves_everything(tmp_path):
    kept = runs.Checkpoints(tmp_path)
    kept.save(10, write(10))

    def full(path):
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        kept.save(20, full)
    assert read(kept.newest)["step"] == 10
    kept.save(30, write(30))
    assert [read(path)["step"] for path in kept.there()] == [30, 10]


@pytest.mark.parametrize("keep", [0, -1, 2.0, True])
def test_how_many_is_a_whole_number(tmp_path, keep):
    with pytest.raises(ValueError, match="keep: expected a whole number, 1 or more"):
        runs.Checkpoints(tmp_path, keep=keep)


# ---- writing


def test_a_full_disk_is_said_in_words(tmp_path, monkeypatch):
    def full(content, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    storage.write(tmp_path / "m.pt", {"a": 1})
    before = (tmp_path / "m.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"m\.pt: the disk is full, so nothing was written; \d+ MB are free") as raised:
        storage.write(tmp_path / "m.pt", {"a": 2})
    assert raised.value.errno == errno.ENOSPC
    assert (tmp_path / "m.pt").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.pt"]


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    kind = {True: "file", False: "folder"}
    monkeypatch.setattr(os, "fsync", lambda n: (order.append(kind[os.path.isfile(f"/proc/self/fd/{n}")]), fsync(n))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("renamed"), replace(a, b))[1])
    storage.write(tmp_path / "m.pt", {"a": 1})
    assert order == ["file", "renamed", "folder"]


# ---- one writer


def test_a_folder_has_one_writer(tmp_path):
    refused = pytest.raises(BlockingIOError, match=rf"in use by process {os.getpid()} on .*choose another folder")
    with runs.Lock(tmp_path / "run"), refused:
        runs.Lock(tmp_path / "run")
    runs.Lock(tmp_path / "run").close()


@pytest.mark.slow
def test_the_lock_is_gone_with_its_process(tmp_path):
    code = f"from ssd_addon import runs; import time; lock = runs.Lock({str(tmp_path)!r}); print('mine', flush=True); "
    with subprocess.Popen([sys.executable, "-c", code + "time.sleep(60)"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(BlockingIOError, match=f"in use by process {other.pid} on"):
            runs.Lock(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait()
    time.sleep(0.1)
    runs.Lock(tmp_path).close()
