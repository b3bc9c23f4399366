"""Photographs in .tar files that were written by others: listed once, with or without classes, damaged."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import shard_files
from PIL import Image
from shard_files import ShardFiles, image_files


def pack(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(file, "png")
    return file.getvalue()


def test_tar_files_of_others_are_listed_once(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "theirs"
    for shard in (0, 1):
        members = {}
        for k in range(3):
            members |= {
                f"./x/{k:03}.seg.json": b"{}",
                f"./x/{k:03}.png": png(10 * shard + k),
                f"./x/{k:03}.cls": b"%d\n" % k,
            }
        pack(folder / f"s-{shard}.tar", members)
    files = image_files(folder)
    assert [files[k][0].getpixel((0, 0))[0] for k in range(6)] == [0, 1, 2, 10, 11, 12]
    assert files.targets == [0, 1, 2, 0, 1, 2] and files.classes == ["0", "1", "2"]
    assert files.names[4] == "s-1/./x/001.png" and "listing .tar files, once" in capsys.readouterr().err
    monkeypatch.setattr(shard_files, "_listed", None)
    assert ShardFiles(folder)[4][1:] == files[4][1:]
    pack(folder / "s-2.tar", {"a.png": png(1)})
    with pytest.raises(ValueError, match=r"s-2\.tar: expected none, as samples\.npz says"):
        ShardFiles(folder)


def test_tar_files_without_classes_have_one_label(tmp_path):
    pack(tmp_path / "t" / "a.tar", {"0.png": png(1), "1.png": png(2), "1.txt": b"a caption"})
    files = ShardFiles(tmp_path / "t")
    assert files.targets == [0, 0] and files.classes == [] and files[1][0].getpixel((0, 0)) == (2, 2, 2)


def test_a_list_that_cannot_be_kept_is_made_again(tmp_path, monkeypatch, capsys):
    pack(tmp_path / "t" / "a.tar", {"0.png": png(1)})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_files, "save", full)
    assert len(ShardFiles(tmp_path / "t")) == 1 and len(ShardFiles(tmp_path / "t")) == 1
    assert "the list could not be kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    "members,message",
    [
        ({}, "expected images .* in its .tar files: got none"),
        ({"a.txt": b"0"}, "expected images .* in its .tar files: got none"),
        ({"a.png": b"", "a.jpg": b""}, "expected one image of each key: got two of a"),
        ({"a.png": b"", "a.cls": b"0", "b.png": b""}, r"expected a class number \(.cls\) for every image: .*a/b.png"),
        ({"a.png": b"", "a.cls": b"x"}, r"expected a class number \(.cls\)"),
    ],
)
def test_tar_files_that_are_no_photographs_say_so(tmp_path, members, message):
    pack(tmp_path / "t" / "a.tar", members)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ShardFiles(tmp_path / "t")
    assert not (tmp_path / "t" / "samples.npz").exists()


def test_a_tar_file_that_was_cut_is_refused(tmp_path):
    pack(tmp_path / "t" / "a.tar", {f"{k}.png": png(k) for k in range(9)})
    whole = (tmp_path / "t" / "a.tar").read_bytes()
    for length in (700, 3000):
        (tmp_path / "t" / "a.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.tar: expected a whole .tar file"):
            ShardFiles(tmp_path / "t")


def test_class_names_have_to_be_enough(tmp_path):
    pack(tmp_path / "t" / "a.tar", {"a.png": b"", "a.cls": b"2"})
    (tmp_path / "t" / "classes.json").write_text('["x", "y"]')
    with pytest.raises(ValueError, match="expected names of at least 3 classes: got 2"):
        ShardFiles(tmp_path / "t")
