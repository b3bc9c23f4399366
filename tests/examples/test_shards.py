"""Photographs in shards: written and read back, trained on as from folders, damaged, and written by others."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import shard_files
import torch
from imagenet_runs import ROOT, SMALL, draw, log_of, run
from PIL import Image
from shard_files import ShardFiles, image_files
from shards import main, write

from examples import imagenet, photographs
from ssd_addon import StructuredViews, presets
from ssd_addon.collate import ImageFiles

pytestmark = pytest.mark.slow
SMALL_SHARD = 10_000  # bytes: of 12 pictures, 4 shards
ALONE = ("--measure", "0")


def has(kind: str) -> None:
    if kind == "litdata":
        pytest.importorskip("litdata")


@pytest.fixture(params=["webdataset", "litdata"])
def kind(request) -> str:
    has(request.param)
    return request.param


def shards_of(data: Path, kind: str, seed: int = 0) -> Path:
    out = data.parent / f"{kind}-{seed}"
    for split in ("train", "val"):
        write(ImageFiles(data / split), out / split, kind, shard_bytes=SMALL_SHARD, workers=2, seed=seed)
    return out


def spoil(folder: Path, *ks: int) -> None:
    """Overwrites the middle of samples of .tar files."""
    files = ShardFiles(folder)
    for k in ks:
        where = files._listing.columns
        with open(folder / files._listing.files[where["shards"][k]], "r+b") as file:
            file.seek(where["starts"][k] + where["sizes"][k] // 2)
            file.write(bytes(100))


def state(data: Path, out: str) -> dict:
    return torch.load(data.parent / out / "checkpoint.pt", weights_only=True)


def check_same(data: Path, *outs: str) -> None:
    first, *others = (state(data, out) for out in outs)
    for other in others:
        assert first["step"] == other["step"]
        for part in ("model", "probes", "criterion", "views"):
            assert all(torch.equal(t, other[part][k]) for k, t in first[part].items()), part
    losses = [[s["loss"] for s in log_of(data, out) if "loss" in s] for out in outs]
    assert all(each == losses[0] and each for each in losses)


# ---- written and read back


def test_every_byte_is_read_back_in_the_order_of_the_folder(tmp_path, kind):
    source = tmp_path / "photographs"
    draw(source, 11)
    (source / "é class").mkdir()
    Image.new("L", (9, 5), 77).save(source / "é class" / "a.b.JPEG", quality=20)
    Image.new("RGB", (80, 60), "red").save(source / "é class" / "a.c.webp")
    (source / "é class" / "large.png").write_bytes(os.urandom(3 * SMALL_SHARD))
    files = ImageFiles(source)
    said: list[str] = []
    write(files, tmp_path / "out" / "train", kind, shard_bytes=SMALL_SHARD, workers=3, say=said.append)
    found = image_files(tmp_path / "out" / "train", short_side=4)
    assert isinstance(found, ShardFiles) and len(set(found.shards.tolist())) > 2
    assert list(found.names) == list(files.names) and found.targets == files.targets
    assert found.classes == files.classes == ["a", "b", "c", "é class"]
    for k in [*range(len(files)), *reversed(range(len(files)))]:
        assert found.stored(k) == files.samples[k][0].read_bytes()
    image, label, name = found[files.names.index("é class/a.b.JPEG")]
    assert image.mode == "RGB" and image.size == (9, 5) and label == 3 and name == "é class/a.b.JPEG"
    assert said[-1].startswith("14 of 14 images") and not (tmp_path / "out" / "train.part").exists()


def test_torchcodec_decodes_from_shards(tmp_path):
    pytest.importorskip("torchcodec")
    (tmp_path / "photographs" / "a").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photographs" / "a" / "0.jpg")
    files = ImageFiles(tmp_path / "photographs", decode="torchcodec")
    write(files, tmp_path / "out", "webdataset")
    assert torch.equal(ShardFiles(tmp_path / "out", decode="torchcodec")[0][0], files[0][0])


def test_processes_read_for_themselves_and_keep_few_shards_open(data, kind, monkeypatch):
    monkeypatch.setattr(shard_files, "OPEN", 2)
    files = ShardFiles(shards_of(data, kind) / "train")
    contents = [files.stored(k) for k in range(len(files))]
    assert len(getattr(files._reader[1], "open", ())) <= 2

    class Stored(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, k):
            return files.stored(k), files._reader[0]

    read = list(torch.utils.data.DataLoader(Stored(), None, num_workers=2))
    assert [content for content, _ in read] == contents
    assert len({process for _, process in read} | {files._reader[0]}) == 3
    assert pickle.loads(pickle.dumps(files)).stored(3) == contents[3]


def test_shards_are_samples_of_all_classes(tmp_path):
    draw(tmp_path / "photographs", 60)
    write(ImageFiles(tmp_path / "photographs"), tmp_path / "out", "webdataset", shard_bytes=70_000)
    files = ShardFiles(tmp_path / "out")
    first = [label for label, shard in zip(files.targets, files.shards, strict=True) if shard == 0]
    assert 10 < len(first) < 30 and set(first) == {0, 1, 2}


def test_the_libraries_read_what_was_written(data):
    wds = pytest.importorskip("webdataset")
    litdata = pytest.importorskip("litdata")
    files = ImageFiles(data / "train")
    expected = sorted((name, label, path.read_bytes()) for name, (path, label) in zip(files.names, files.samples))  # noqa: B905
    tars = sorted(str(p) for p in (shards_of(data, "webdataset") / "train").glob("*.tar"))
    with pytest.warns(ResourceWarning):
        samples = list(wds.WebDataset(tars, shardshuffle=False))
    assert sorted((s["name"].decode(), int(s["cls"]), s["png"]) for s in samples) == expected
    chunks = litdata.StreamingDataset(str(shards_of(data, "litdata") / "train"))
    samples = [chunks[k] for k in range(len(chunks))]
    assert sorted((s["name"], s["label"], bytes(s["image"])) for s in samples) == expected


def test_the_command_writes_train_and_val(data, capsys):
    main([str(data), str(data.parent / "out"), "--format", "webdataset", "--shard-mb", "0.01", "--workers", "0"])
    said = capsys.readouterr().out
    assert "12 of 12 images" in said and "6 images, 3 classes, 3 shards (webdataset)" in said
    assert ShardFiles(data.parent / "out" / "val").classes == ["a", "b", "c"]


def test_nothing_is_overwritten_and_a_part_is_not_taken_for_the_whole(data):
    files = ImageFiles(data / "train")
    with pytest.raises(FileExistsError, match="or an empty one"):
        write(files, data / "val", "webdataset")
    files.samples[7][0].unlink()
    with pytest.raises(FileNotFoundError, match=r"7|\.png"):
        write(files, data.parent / "out", "webdataset")
    assert not (data.parent / "out").exists()
    with pytest.raises(FileExistsError, match=r"no out\.part beside it"):
        write(files, data.parent / "out", "webdataset")


# ---- trained on


@pytest.mark.parametrize("mixed", [None, 2])
def test_ranks_share_an_epoch_and_epochs_differ(data, mixed):
    out = shards_of(data, "webdataset")
    more = ["--mix-shards", str(mixed)] if mixed else []
    args = imagenet.parse([*SMALL.split(), "--data", str(out), "--batch-size", "2", *more])
    views = StructuredViews(**presets("color_spatial", size=32))
    ranks = [photographs.Loaders(args, views, 2, rank, False) for rank in (0, 1)]

    def epoch(number: int, begin: int = 0) -> list[list[str]]:
        return [[name for _, _, names in each.epoch(number, begin) for name in names] for each in ranks]

    first, second = epoch(0), epoch(1)
    for found in (first, second):
        assert sorted(found[0] + found[1]) == sorted(ranks[0].data.files.names)
    assert first != second and set(first[0]) != set(second[0]) and first == epoch(0)
    assert [names[2:] for names in first] == epoch(0, begin=1)


def test_a_run_on_shards_equals_one_on_folders(data, kind):
    out = shards_of(data, kind)
    one, two = ("--workers", "1", *ALONE), ("--workers", "2", *ALONE, "--data", str(out))
    run(data, "folders", "--steps", "4", *one)
    run(data, "shards", "--steps", "4", *two)
    run(data, "both", "--steps", "2", *one)
    run(data, "both", "--steps", "4", "--resume", *two)
    check_same(data, "folders", "shards", "both")


@pytest.mark.parametrize(
    "kind,workers,mixed",
    [
        ("webdataset", "0", ()),
        ("webdataset", "2", ("--mix-shards", "2")),
        ("litdata", "2", ()),
        ("litdata", "0", ("--mix-shards", "2", "--load-size", "32")),
    ],
)
def test_a_resumed_run_is_exact(data, kind, workers, mixed):
    has(kind)
    given = (*ALONE, "--data", str(shards_of(data, kind)), "--workers", workers, *mixed)
    run(data, "straight", "--steps", "5", *given)
    run(data, "halves", "--steps", "1", *given)
    run(data, "halves", "--steps", "5", "--resume", *given)
    check_same(data, "straight", "halves")


@pytest.mark.distributed
def test_a_resumed_run_of_two_ranks_is_exact(data):
    has("litdata")  # which looks at the ranks itself
    shown = str(shards_of(data, "litdata"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    for out, stops in (("straight", ("4",)), ("halves", ("1", "4"))):
        for steps in stops:
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
            # A worker that is forked beside gloo's threads may, rarely, never start: the loader's time-out ends the run
            # then, and the launcher starts it again from its checkpoint.
            launch += ["--rdzv-endpoint", "localhost:0", "--max-restarts", "3", "examples/imagenet.py", *SMALL.split()]
            launch += [
                *ALONE,
                "--resume",
                "--batch-size",
                "2",
                "--mix-shards",
                "2",
                "--workers",
                "2",
                "--timeout",
                "40",
            ]
            launch += ["--steps", steps, "--data", shown, "--out", str(data.parent / out)]
            done = subprocess.run(
                launch, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=400
            )
            assert done.returncode == 0, done.stderr[-3000:]
    check_same(data, "straight", "halves")


def test_stages_read_shards(data, monkeypatch):
    monkeypatch.setattr("stages.SECONDS", 0.01)
    found = run(data, "run", "--stages", *ALONE, "--data", str(shards_of(data, "webdataset")))
    assert all(rate > 0 for rate in found.values())


# ---- what goes wrong


def test_a_broken_sample_is_raised_or_counted(data):
    out = shards_of(data, "webdataset")
    spoil(out / "train", 3)
    given = ("--steps", "3", "--data", str(out), *ALONE)
    with pytest.raises(OSError, match=r"shard-\d+\.tar/.*png: expected an image: .*as they were written"):
        run(data, "raise", *given)
    with pytest.warns(RuntimeWarning, match=r"skipped .*shard-\d+\.tar/.*as they were written"):
        run(data, "skip", *given, "--broken", "skip")
    assert log_of(data, "skip")[-1]["broken_files"] == 1
    spoil(out / "train", 4, 5)
    with pytest.warns(RuntimeWarning), pytest.raises(SystemExit, match="at most 10.00% broken files .*got 3 of 12"):
        run(data, "many", *given, "--broken", "skip", "--max-broken", "0.1")


def test_a_damaged_chunk_of_litdata_is_a_broken_sample(data):
    has("litdata")
    folder = shards_of(data, "litdata") / "train"
    files = ShardFiles(folder)
    chunk = folder / files._listing.files[0]
    inside = [k for k in range(len(files)) if files.shards[k] == 0]
    content = chunk.read_bytes()
    first = min(inside, key=lambda k: files._listing.columns["starts"][k])
    where = content.index(files.stored(first))
    chunk.write_bytes(content[: where + 50] + bytes(100) + content[where + 150 :])
    with pytest.raises(OSError, match="as they were written"):
        ShardFiles(folder).stored(first)
    assert len(inside) > 1 and all(ShardFiles(folder).stored(k) for k in inside if k != first)
    chunk.write_bytes(bytes(len(content)))
    with pytest.raises(OSError):
        ShardFiles(folder).stored(first)


@pytest.mark.parametrize("damage", ["cut", "gone", "more"])
def test_shards_that_are_not_those_that_were_written_are_refused(data, kind, damage):
    folder = shards_of(data, kind) / "train"
    shard = folder / ShardFiles(folder)._listing.files[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] if damage == "cut" else content + b"0")
    if damage == "gone":
        shard.unlink()
    got = {"cut": len(content) - 1, "gone": "none", "more": len(content) + 1}[damage]
    with pytest.raises(
        ValueError, match=rf"{shard.name}: expected {len(content)} bytes, as samples\.npz says: got {got}"
    ):
        ShardFiles(folder)


def test_another_data_set_or_other_shards_are_refused(data):
    given = ("--mix-shards", "2", *ALONE)
    run(data, "run", "--steps", "1", "--data", str(shards_of(data, "webdataset")), *given)
    with pytest.raises(ValueError, match="another configuration: files: "):  # the order would be another
        run(data, "run", "--steps", "2", "--resume", "--data", str(shards_of(data, "webdataset", seed=1)), *given)
    path = next((data / "train").glob("a/*.png"))
    path.rename(path.with_name("other.png"))
    other = shards_of(data, "webdataset", seed=2)
    run(data, "plain", "--steps", "1", "--data", str(data.parent / "webdataset-0"), *ALONE)
    with pytest.raises(ValueError, match="another configuration: files: "):
        run(data, "plain", "--steps", "2", "--resume", "--data", str(other), *ALONE)


def test_a_worker_that_hangs_names_its_sample(data, monkeypatch):
    def hangs(self, k):
        time.sleep(60 if self.names[k].endswith("5.png") else 0)
        return original(self, k)

    original = ShardFiles.stored
    monkeypatch.setattr(ShardFiles, "stored", hangs)
    with pytest.raises(RuntimeError, match=r"timed out after 3 seconds; at that moment, worker \d: c/5\.png"):
        given = ("--workers", "1", "--timeout", "3", "--data", str(shards_of(data, "webdataset")), *ALONE)
        run(data, "run", "--steps", "3", *given)


def test_few_shards_need_shards(data):
    with pytest.raises(ValueError, match=r"--mix-shards: expected shards.*got ImageFiles"):
        run(data, "run", "--mix-shards", "2", *ALONE)


def test_litdata_is_asked_for_by_name(data, monkeypatch):
    has("litdata")
    out = shards_of(data, "litdata")
    monkeypatch.setitem(sys.modules, "litdata", None)
    message = "shards in litdata's format needs litdata, which is not installed: pip install litdata"
    with pytest.raises(ImportError, match=message):
        ShardFiles(out / "train")
    with pytest.raises(ImportError, match=message):
        write(ImageFiles(data / "train"), data.parent / "more", "litdata")


def test_mixed_folders_are_refused(data):
    has("litdata")
    tars, chunks = shards_of(data, "webdataset") / "train", shards_of(data, "litdata") / "train"
    (data / "train" / "stray.tar").touch()
    for folder, got in ((data / "train", r"stray\.tar and a/"), (tars, r"shard-0.*\.tar and index\.json")):
        if folder is tars:
            (tars / "index.json").write_bytes((chunks / "index.json").read_bytes())
        with pytest.raises(ValueError, match=rf"expected shards of one kind, or images in folders: got {got}"):
            image_files(folder)
    (chunks / "samples.npz").unlink()
    with pytest.raises(ValueError, match=r"expected samples\.npz, which examples/shards\.py writes: got none"):
        image_files(chunks)
    (data / "val" / "index.json").write_text("[]")  # of something else
    assert type(image_files(data / "val")) is ImageFiles
