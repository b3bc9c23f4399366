"""Files of weights and of runs: what is written opens again, damage is found, and a failed restore changes nothing."""

import collections
import copy
import os
import pickle
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ssd_addon import StructuredViews, StyleHeads, runs, storage

CONFIG = {"lr": 0.1}


def heads(seed=0):
    torch.manual_seed(seed)
    return StyleHeads(nn.Conv2d(3, 8, 3), {"content": 4}, in_features=8, hidden=(8,))


def adam(module):
    return torch.optim.AdamW(module.parameters())


def copied(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def load(path, **options):
    return StyleHeads.load(path, nn.Conv2d(3, 8, 3), **options)


# ---- what cannot be opened again is not written


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"config": {"data": Path("/x")}}, "got PosixPath in 'data' of 'config'"),
        ({"config": {"lr": np.float32(0.1)}}, "got float32 in 'lr' of 'config'"),
        ({"numpy": np.random.default_rng(0).bit_generator.state["state"] | {"a": np.ones(2)}}, "ndarray in 'a' of 'nu"),
        ({"rng": [frozenset({1})]}, "got frozenset in 'rng'"),
        ({"heads": {"x": 1}}, "expected distinct names other than config, .*: got the state 'heads'"),
        ({"state_dict": {}}, "got the state 'state_dict'"),
        ({"parts": {"state_dict": nn.Linear(1, 1)}}, "got the part 'state_dict'"),
        ({"parts": {"step": nn.Linear(1, 1)}, "step": 3}, "got the part 'step'"),
    ],
)
def test_a_run_that_would_not_open_again_is_not_saved(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        runs.save_run(tmp_path / "r.pt", heads(), **({"parts": {}, "card": {}, "config": CONFIG} | more))
    assert not list(tmp_path.iterdir())


def test_what_a_module_keeps_beside_its_weights_is_looked_at(tmp_path):
    class Net(nn.Conv2d):
        def get_extra_state(self):
            return {"path": Path("a")}

        def set_extra_state(self, state):
            pass

    model = StyleHeads(Net(3, 8, 3), {"content": 4}, in_features=8, hidden=())
    with pytest.raises(ValueError, match="got PosixPath in 'path' of 'backbone._extra_state' of 'state_dict'"):
        model.save(tmp_path / "m.pt")


def test_what_torch_loads_is_written(tmp_path):
    values = [b"a", 1j, bytearray(b"b"), torch.float32, torch.device("cpu"), {1, (2, "a")}, torch.Size([1]), 2**70]
    values += [collections.Counter("ab"), collections.OrderedDict(a=1), nn.Parameter(torch.ones(1)), torch.strided]
    model = heads()
    runs.save_run(tmp_path / "r.pt", model, parts={}, card={}, config={"all": values}, epoch=1)
    assert runs.restore_run(tmp_path / "r.pt", model, parts={}, config={"all": values})["epoch"] == 1


class Mine:
    pass


def test_types_that_the_user_has_allowed(tmp_path):
    model = heads()
    with torch.serialization.safe_globals([Mine]):
        runs.save_run(tmp_path / "r.pt", model, parts={}, card={}, config={}, mine=Mine())
        assert isinstance(runs.restore_run(tmp_path / "r.pt", model, parts={}, config={})["mine"], Mine)


@pytest.mark.parametrize(
    ("there", "here", "equal"),
    [
        (float("nan"), float("nan"), True),
        ([1, (float("nan"), {"a": 2})], [1, (float("nan"), {"a": 2})], True),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), True),
        (torch.ones(2), torch.ones(2).double(), False),
        (torch.ones(2), 1.0, False),
        ([1, 2], [1, 3], False),
        ([1, 2], [1, 2, 3], False),
        ({"a": 1}, {"b": 1}, False),
    ],
)
def test_settings_are_compared_by_value(tmp_path, there, here, equal):
    model = heads()
    runs.save_run(tmp_path / "r.pt", model, parts={}, card={}, config={"x": there})
    if equal:
        runs.restore_run(tmp_path / "r.pt", model, parts={}, config={"x": here})
    else:
        with pytest.raises(ValueError, match=r"r\.pt belongs to another configuration: x: "):
            runs.restore_run(tmp_path / "r.pt", model, parts={}, config={"x": here})
    with pytest.raises(ValueError, match="config: expected tensors and plain data .*got float32 in 'x'"):
        runs.restore_run(tmp_path / "r.pt", model, parts={}, config={"x": np.float32(1)})


# ---- a restore is whole or nothing


@pytest.mark.parametrize("kind", ["optimizer", "module", "not a state", "weights"])
def test_a_failed_restore_changes_nothing(tmp_path, kind):
    saved, model = heads(1), heads(2)
    parts = {"first": nn.Linear(2, 2), "optimizer": adam(saved), "last": nn.Linear(2, 2)}
    own = {"first": nn.Linear(2, 2), "optimizer": adam(model), "last": nn.Linear(2, 2)}
    if kind == "optimizer":
        parts["optimizer"] = adam(nn.Linear(2, 2))
    elif kind == "module":
        parts["last"] = nn.Linear(2, 3)
    elif kind == "not a state":
        parts |= {"last": type("Odd", (), {"state_dict": lambda self: 3})()}
    runs.save_run(tmp_path / "r.pt", saved, parts=parts, card={}, config=CONFIG)
    if kind == "weights":
        content = torch.load(tmp_path / "r.pt")
        del content["model"]["backbone.bias"]
        torch.save(content, tmp_path / "r.pt")
    before = copied(model), copied(own["first"]), copied(own["last"]), copy.deepcopy(own["optimizer"].state_dict())
    named = {"optimizer": "'optimizer'", "weights": "another backbone"}.get(kind, "'last'")
    with pytest.raises(ValueError, match=rf"r\.pt: .*{named}"):
        runs.restore_run(tmp_path / "r.pt", model, parts=own, config=CONFIG)
    assert same(copied(model), before[0])
    assert same(copied(own["first"]), before[1]) and same(copied(own["last"]), before[2])
    assert own["optimizer"].state_dict() == before[3]


def test_a_restore_of_weights_that_do_not_fit_changes_nothing():
    saved, model = heads(1), heads(2)
    before = copied(model)
    for change in ({"backbone.bias": None}, {"backbone.bias": torch.ones(3)}, {"more": torch.ones(1)}):
        state = {k: v for k, v in {**saved.state_dict(), **change}.items() if v is not None}
        with pytest.raises(ValueError, match="another backbone than Conv2d"):
            model.restore(saved.config(), state)
        assert same(copied(model), before)


def test_a_file_of_weights_is_no_checkpoint_of_a_run(tmp_path):
    model = heads()
    model.save(tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m\.pt: expected the checkpoint of a run, with its settings: got none"):
        runs.restore_run(tmp_path / "m.pt", model, parts={}, config=model.config())


def test_views_of_a_failed_restore_draw_what_they_would_have(tmp_path):
    model, views = heads(), StructuredViews({}, seed=3)
    runs.save_run(tmp_path / "r.pt", model, parts={"views": views, "net": nn.Linear(2, 2)}, card={}, config={})
    views(torch.rand(2, 3, 8, 8))
    before = copied(views)
    with pytest.raises(ValueError, match="'net'"):
        runs.restore_run(tmp_path / "r.pt", model, parts={"views": views, "net": nn.Linear(3, 2)}, config={})
    assert same(copied(views), before)


# ---- damage, and files of another kind


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is the pointer .*Git LFS"),
        (b"\n<!DOCTYPE html><html>", "it is an HTML page"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00" + b'{"a":{"dtype":"F32"}}', "it is a safetensors file"),
        (b"step,loss\n1,2\n", "it is not a file of torch.save: it starts with b'step,loss"),
        (b"", "it is not a file of torch.save: it is empty"),
        (pickle.dumps({"a": 1}), "it is not a file of torch.save"),
    ],
)
def test_files_of_another_kind_are_not_called_dangerous(tmp_path, content, message):
    (tmp_path / "m.pt").write_bytes(content)
    for read in (load, lambda path: runs.load(path, backbone=nn.Conv2d(3, 8, 3))):
        with pytest.raises(ValueError, match=rf"m\.pt: expected a .*: could not be read \(.*{message}"):
            read(tmp_path / "m.pt")


def test_a_folder_is_not_called_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a file of StyleHeads.save: got a folder"):
        load(tmp_path)


def test_the_machine_is_not_called_damage(tmp_path):
    heads().save(tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"could not be read \(RuntimeError: .*nowhere"):
        load(tmp_path / "m.pt", map_location="nowhere")


def flipped(path, at, bits=0x7F):
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["weights", "structure", "not read"])
def test_a_flipped_byte_is_found(tmp_path, part):
    model, path = heads(), tmp_path / "m.pt"
    model.save(path)
    content = path.read_bytes()
    place = {
        "weights": content.find(model.backbone.weight.detach().numpy().tobytes()) + 3,
        "structure": content.find(b"backbone.weight") + 2,
        "not read": content.find(b"little"),  # the order of bytes, whose name alone is compared
    }[part]
    flipped(path, place, 0x01)
    with pytest.raises(ValueError, match=r"m\.pt: .*it is damaged: the checksum of its entry '.*' does not match"):
        load(path)


def test_every_byte_of_the_entries_counts(tmp_path):
    """A flipped byte gives an error, or weights that are the same: the padding between entries holds nothing."""
    model, path = heads(), tmp_path / "m.pt"
    model.save(path)
    content = path.read_bytes()
    for at in range(0, len(content), 37):
        flipped(path, at)
        try:
            loaded = load(path)
        except ValueError as error:
            assert "could not be read" in str(error)
        else:
            assert same(loaded.state_dict(), model.state_dict()), at
        path.write_bytes(content)


def test_large_weights_are_read_once(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(10**6)}, tmp_path / "m.pt")
    counts = []
    crc32 = storage._archive.zlib.crc32
    monkeypatch.setattr(storage._archive.zlib, "crc32", lambda b, c: (counts.append(len(b)), crc32(b, c))[1])
    real, read = open, []

    def counted(*args):
        file = real(*args)

        class File:
            def __getattr__(self, name):
                return getattr(file, name)

            def readinto(self, buffer):
                read.append(len(memoryview(buffer)))
                return file.readinto(buffer)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

        return File()

    monkeypatch.setattr(storage._archive, "open", counted, raising=False)
    with pytest.raises(ValueError, match="no configuration of the heads"):
        load(tmp_path / "m.pt")
    assert 4 * 10**6 in read and sum(read) < 4 * 10**6 + 20_000 and max(counts) == 4 * 10**6


@pytest.mark.parametrize("kind", ["before 1.6", "without checksums"])
def test_files_without_checksums_open(tmp_path, kind):
    model = heads()
    content = {"config": model.config(), "state_dict": model.state_dict()}
    if kind == "before 1.6":
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    else:
        set_options = getattr(torch.serialization, "set_crc32_options", None)
        if set_options is None:
            pytest.skip("this torch always writes them")
        set_options(False)
        try:
            torch.save(content, tmp_path / "m.pt")
        finally:
            set_options(True)
    assert same(load(tmp_path / "m.pt").state_dict(), model.state_dict())


def test_the_users_choice_of_mapped_files_does_not_matter(tmp_path):
    model = heads()
    model.save(tmp_path / "m.pt")
    config = pytest.importorskip("torch.utils.serialization").config
    with config.patch("load.mmap", True):
        assert same(load(tmp_path / "m.pt").state_dict(), model.state_dict())


# ---- writing


def test_a_folder_is_made(tmp_path):
    model = heads()
    model.save(tmp_path / "new" / "run" / "m.pt")
    runs.cut_log(tmp_path / "new" / "log" / "log.jsonl", 0)
    assert same(load(tmp_path / "new" / "run" / "m.pt").state_dict(), model.state_dict())


def test_a_link_stays_a_link(tmp_path):
    model = heads()
    (tmp_path / "disk").mkdir()
    heads(1).save(tmp_path / "disk" / "m.pt")
    (tmp_path / "m.pt").symlink_to("disk/m.pt")
    (tmp_path / "disk" / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "log.jsonl").symlink_to("disk/log.jsonl")
    model.save(tmp_path / "m.pt")
    runs.cut_log(tmp_path / "log.jsonl", 1)
    assert (tmp_path / "m.pt").is_symlink() and (tmp_path / "log.jsonl").is_symlink()
    assert same(load(tmp_path / "disk" / "m.pt").state_dict(), model.state_dict())
    assert (tmp_path / "disk" / "log.jsonl").read_text() == '{"step": 1}\n'
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["log.jsonl", "m.pt"]


@contextmanager
def small_files():
    """Files end at 3,000 bytes, those that pytest itself writes too: only around what is tested."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_cannot_be_written_is_an_os_error(tmp_path):
    model = heads(1)
    model.save(tmp_path / "m.pt")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "m.pt", tmp_path):
        with pytest.raises(OSError):
            model.save(place)
    with small_files(), pytest.raises(OSError, match=r"m\.pt: a file of this size is not allowed, so nothing was wr"):
        heads(2).save(tmp_path / "m.pt")
    assert same(load(tmp_path / "m.pt").state_dict(), model.state_dict())
    assert sorted(os.listdir(tmp_path)) == ["file", "m.pt"]


# ---- averages


@pytest.mark.parametrize("prefix", ["", "ema.", "module.ema."])
def test_an_average_of_weights_below_a_prefix(tmp_path, prefix):
    model = heads(1)
    state = {prefix + k: v for k, v in AveragedModel(model).state_dict().items()}
    torch.save({"config": model.config(), "state_dict": state}, tmp_path / "m.pt")
    assert same(load(tmp_path / "m.pt").state_dict(), model.state_dict())
