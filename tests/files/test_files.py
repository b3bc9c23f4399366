"""ImageFiles: which files are listed, the classes, links and names, little memory, broken files."""

import errno
import os
import pickle
import random
import struct
import sys
import tracemalloc
import warnings
import zlib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.datasets import ImageFolder

from ssd_addon.collate import ImageFiles


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def tree(root, *paths):
    """Files and, where a path ends with a slash, folders."""
    for path in paths:
        if path.endswith("/"):
            (root / path).mkdir(parents=True)
        elif Path(path).suffix.lower() in (".png", ".jpg", ".gif"):
            save(root / path)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(b"no picture")
    return root


def listed(files):
    return [str(path.relative_to(files.root)) for path, _ in files.samples]


def agrees_with_image_folder(files):
    theirs = ImageFolder(files.root, allow_empty=True)
    assert [(str(path), label) for path, label in files.samples] == theirs.samples
    assert files.targets == theirs.targets and files.classes == theirs.classes


# Which files, which classes


def test_classes_labels_and_order_are_those_of_image_folder(tmp_path):
    tree(tmp_path, "dog/b.png", "dog/a.png", "Cat/1.png", "zebra/x/1.png", "zebra/x-y/1.png", "zebra/x/z/2.JPG")
    tree(
        tmp_path,
        "zebra/x/0.png",
        "zebra/w.png",
        "one.jpg/1.png",
        "zebra/inner.png/3.png",
        "dog/UPPER.PNG",
        "dog/note.txt",
    )
    files = ImageFiles(str(tmp_path))
    agrees_with_image_folder(files)
    assert files.classes == ["Cat", "dog", "one.jpg", "zebra"] and len(files) == 11
    assert files.left_out == {"files without an image extension": 1}
    assert [files[i][1:] for i in range(2)] == [(0, "Cat/1.png"), (1, "dog/UPPER.PNG")]


def test_samples_names_and_targets_are_sequences(tmp_path):
    files = ImageFiles(tree(tmp_path, "a/1.png", "b/2.png", "b/3.png"))
    assert files.samples[1] == files.samples[-2] == (tmp_path / "b/2.png", 1)
    assert files.samples[1:] == [(tmp_path / "b/2.png", 1), (tmp_path / "b/3.png", 1)] == list(files.samples)[1:]
    assert files.samples == list(files.samples) and files.samples != files.samples[:2] and len(files.samples) == 3
    assert files.names == ["a/1.png", "b/2.png", "b/3.png"] == [name for _, _, name in files]
    assert torch.tensor(files.targets).tolist() == [0, 1, 1]


def test_an_index_beyond_the_files_is_refused(tmp_path):
    files = ImageFiles(tree(tmp_path, "1.png", "2.png"))
    assert files[-1][2] == files[np.int64(1)][2] == files[torch.tensor(1)][2] == "2.png"
    assert [name for _, _, name in files] == ["1.png", "2.png"]
    for wrong in (2, -3):
        with pytest.raises(IndexError, match=rf"expected a number from -2 to 1: got {wrong}"):
            files[wrong]
    with pytest.raises(TypeError):
        files[0:1]


HELPERS = [
    *("__MACOSX", ".ipynb_checkpoints", ".thumbs", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"),
    *("System Volume Information", "Thumbs.db", "__pycache__"),
]


@pytest.mark.parametrize("name", HELPERS)
def test_helper_folders_are_left_out_wherever_they_lie(tmp_path, name):
    tree(
        tmp_path / "classes",
        "cat/1.png",
        "dog/2.png",
        f"{name}/cat/3.png",
        f"cat/{name}/4.png",
        f"dog/in/{name}/x/5.png",
    )
    files = ImageFiles(tmp_path / "classes")
    assert files.classes == ["cat", "dog"] and listed(files) == ["cat/1.png", "dog/2.png"]
    assert sum(files.left_out.values()) == 3 and f"3 {next(iter(files.left_out))}" in repr(files)
    flat = ImageFiles(tree(tmp_path / "flat", "1.png", f"{name}/2.png"))
    assert flat.classes == [] and listed(flat) == ["1.png"] and flat.targets == [0]


def test_hidden_and_system_files_are_left_out(tmp_path):
    files = ImageFiles(tree(tmp_path, "a/1.png", "a/._1.png", "a/.DS_Store", "a/Thumbs.db", "desktop.ini", "a/1.txt"))
    assert listed(files) == ["a/1.png"]
    assert files.left_out == {
        "hidden files and folders": 2,
        "system files and folders": 2,
        "files without an image extension": 1,
    }
    assert repr(files).endswith(
        "1 images, 1 class folders; left out: 1 files without an image extension, "
        "2 hidden files and folders, 2 system files and folders)"
    )


def test_a_root_below_a_hidden_folder_is_a_root(tmp_path):
    assert listed(ImageFiles(tree(tmp_path / ".cache" / "@eaDir", "a/1.png"))) == ["a/1.png"]


def test_a_flat_folder_has_no_classes_whatever_lies_beside_its_images(tmp_path):
    tree(tmp_path, "1.png", "2.png", "labels/1.txt", "logs/", "annotations/deep/er/")
    files = ImageFiles(tmp_path)
    assert files.classes == [] and listed(files) == ["1.png", "2.png"] and files.targets == [0, 0]
    assert files.left_out == {"folders without images": 3, "files without an image extension": 1}


def test_a_class_folder_without_an_image_is_left_out_with_a_warning(tmp_path):
    tree(tmp_path, "cat/1.png", "dog/", "labels/1.txt", "zebra/1.png", "hollow/.hidden/1.png")
    with pytest.warns(
        RuntimeWarning, match=r"left out 3 folders without images \(dog, hollow, labels\), which are not"
    ):
        files = ImageFiles(tmp_path)
    assert files.classes == ["cat", "zebra"] and files.targets == [0, 1]
    assert files.left_out["folders without images"] == 3


def test_images_beside_class_folders_are_left_out_as_by_image_folder_with_a_warning(tmp_path):
    tree(tmp_path, "1.png", "2.png", "sorted/3.png")
    with pytest.warns(RuntimeWarning, match="left out 2 images outside the class folders"):
        files = ImageFiles(tmp_path)
    agrees_with_image_folder(files)
    assert files.left_out == {"images outside the class folders": 2}


def test_a_folder_without_an_image_is_refused_and_says_what_was_left_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is not a folder"):
        ImageFiles(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="got none$"):
        ImageFiles(tmp_path)
    tree(tmp_path, ".hidden/1.png", "a/text.txt")
    with pytest.raises(
        FileNotFoundError, match="got none; left out: 1 files without an image extension, 1 folders without"
    ):
        ImageFiles(tmp_path)


def test_the_home_folder_may_be_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert len(ImageFiles(tree(tmp_path, "data/1.png") and "~/data")) == 1


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    tree(tmp_path, "cat/1.png", "dog/in/1.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("in"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="dog/in: expected a folder that can be listed: got Permission denied"):
        ImageFiles(tmp_path, broken="skip")


# Links


def test_links_are_followed_as_by_image_folder(tmp_path):
    disk, data = tmp_path / "disk", tmp_path / "data"
    tree(disk, "cat/more.png", "cat/deep/5.png", "shared/s.png", "horse/h.png", "file.png")
    tree(data, "cat/own.png", "dog/own.png")
    (data / "cat" / "external").symlink_to(disk / "cat")
    for name in ("cat", "dog"):  # both keep what they share
        (data / name / "shared").symlink_to(disk / "shared")
    (data / "dog" / "again").symlink_to(disk / "shared")
    (data / "horse").symlink_to(disk / "horse")
    (data / "dog" / "link.png").symlink_to(disk / "file.png")
    with pytest.warns(RuntimeWarning, match=r"2 folders are listed again .* \(dog/again, which is cat/shared"):
        files = ImageFiles(data)
    agrees_with_image_folder(files)
    assert len(files) == 9 and files[2][2] == "cat/external/deep/5.png" and files.left_out == {}
    assert files.repeated == {"dog/again": "cat/shared", "dog/shared": "cat/shared"}


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "/", "../cat", "../dog/on"])
def test_a_link_that_leads_back_is_not_entered(tmp_path, target):
    root = tree(tmp_path / "outer" / "data", "cat/1.png", "dog/2.png")
    save(tmp_path / "outer" / "other" / "3.png")
    (root / "cat" / "loop").symlink_to(target)
    (root / "all").symlink_to(".")  # nor is it a class without images, which would be warned of
    if target == "../dog/on":  # two links that lead to each other's folder
        (root / "dog" / "on").symlink_to("../cat")
    twice = pytest.warns(RuntimeWarning, match="dog/on, which is cat") if target == "../dog/on" else nullcontext()
    with twice:
        files = ImageFiles(root)
    expected = ["cat/1.png", "dog/2.png"] if target != "../dog/on" else ["cat/1.png", "dog/2.png", "dog/on/1.png"]
    assert sorted(listed(files)) == expected
    assert files.left_out == {"links back to a folder that contains them": 2 if target != "../dog/on" else 3}


def test_loops_through_other_folders_end(tmp_path):
    tree(tmp_path, "data/cat/1.png", "data/dog/2.png", "disk/a/3.png", "disk/b/4.png")
    (tmp_path / "data/cat/to_dog").symlink_to(tmp_path / "data/dog")
    (tmp_path / "data/dog/to_cat").symlink_to(tmp_path / "data/cat")
    (tmp_path / "data/dog/a").symlink_to(tmp_path / "disk/a")
    (tmp_path / "disk/a/b").symlink_to(tmp_path / "disk/b")
    (tmp_path / "disk/b/up").symlink_to(tmp_path / "disk")
    with pytest.warns(RuntimeWarning, match="4 folders are listed again through links"):
        files = ImageFiles(tmp_path / "data")
    dog = ["2.png", "a/3.png", "a/b/4.png"]
    expected = ["cat/1.png", *(f"cat/to_dog/{f}" for f in dog), *(f"dog/{f}" for f in dog), "dog/to_cat/1.png"]
    assert listed(files) == expected and files.left_out == {"links back to a folder that contains them": 4}


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("linked_root", [False, True])
def test_a_folder_that_a_link_lists_again_is_said(tmp_path, absolute, linked_root):
    """Its images have two labels, as for torchvision's ImageFolder."""
    root = tree(tmp_path / "data", "cat/1.png", "cat/deep/3.png", "dog/2.png", "bird/4.png")
    (root / "dog" / "more").symlink_to(root / "cat" if absolute else "../cat")
    if linked_root:
        (tmp_path / "link").symlink_to("data")
        root = tmp_path / "link"
    with pytest.warns(RuntimeWarning, match=r"2 folders .* \(dog/more, which is cat, .* with the label of each place"):
        files = ImageFiles(root)
    agrees_with_image_folder(files)
    assert files.repeated == {"dog/more": "cat", "dog/more/deep": "cat/deep"} and files.left_out == {}
    assert repr(files).endswith(": 6 images, 3 class folders; listed again through links: 2 folders)")
    assert pickle.loads(pickle.dumps(files)).repeated == files.repeated


def test_a_link_to_a_folder_elsewhere_is_no_surprise(tmp_path):
    root = tree(tmp_path, "data/dog/2.png", "disk/cat/1.png", "disk/cat/deep/3.png") / "data"
    (root / "cat").symlink_to("../disk/cat")
    files = ImageFiles(root)
    assert files.repeated == {} and len(files) == 3 and "again" not in repr(files)


def test_a_link_that_leads_nowhere_is_missed_when_it_is_read_or_said(tmp_path):
    tree(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / "cat" / "0.png").symlink_to("gone.png")
    (tmp_path / "cat" / "3.png").symlink_to("3.png")  # to itself
    files = ImageFiles(tmp_path)
    agrees_with_image_folder(files)
    with pytest.raises(FileNotFoundError, match=r"cat/0\.png: expected an image: could not be read"):
        files[0]
    with pytest.raises(OSError, match=r"cat/3\.png: expected an image: could not be read"):
        files[2]
    (tmp_path / "horse").symlink_to("unmounted")
    with pytest.warns(RuntimeWarning, match="left out 1 broken links"):
        assert ImageFiles(tmp_path).classes == ["cat", "dog"]


def test_a_pipe_with_an_image_s_name_is_never_opened(tmp_path):
    os.mkfifo(tree(tmp_path, "a/1.png") / "a" / "2.png")
    files = ImageFiles(tmp_path)
    assert listed(files) == ["a/1.png"] and files.left_out == {"pipes, sockets and devices": 1}


# Names and memory


def test_names_that_are_not_utf8_are_given_printable_and_opened_as_they_are(tmp_path):
    root = os.fsencode(tmp_path)
    for folder in (b"caf\xe9", rb"caf\xe9", "é".encode()):
        os.mkdir(os.path.join(root, folder))
        for name in (b"\xe8.png", b"\xe9.png", rb"\xe9.png"):
            Image.new("RGB", (4, 4)).save(os.path.join(root, folder, name).decode("utf-8", "surrogateescape"))
    files = ImageFiles(tmp_path)
    agree = ImageFolder(tmp_path)
    assert [str(p) for p, _ in files.samples] == [p for p, _ in agree.samples] and files.targets == agree.targets
    assert sorted(files.classes) == [r"caf\xe9", r"caf\xe9~", "é"]
    names = [name for _, _, name in files]
    assert len(set(names)) == 9 and r"é/\xe8.png" in names and r"é/\xe9.png~" in names
    for text in (*names, *files.classes, repr(files)):
        text.encode()
    odd = names.index(r"é/\xe8.png")
    files.samples[odd][0].write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"\\xe8\.png") as raised:
        files[odd]
    str(raised.value).encode()


def test_the_list_takes_little_memory_and_travels_to_workers(tmp_path):
    for name in ("n01440764", "n01443537"):
        (tmp_path / name).mkdir()
        for i in range(600):
            (tmp_path / name / f"{name}_{i:06d}.JPEG").touch()

    def held(make):
        tracemalloc.start()
        made = make(tmp_path)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return made, size / len(made)

    (files, ours), (_, theirs) = held(ImageFiles), held(ImageFolder)
    assert ours < 60 and ours < theirs / 2
    packed = pickle.dumps(files)
    assert len(packed) < 50 * len(files)
    again = pickle.loads(packed)
    assert again.samples[900] == files.samples[900] and again.names[7] == files.names[7]
    assert repr(again) == repr(files) and again.targets == files.targets


# Broken files


def broken_tree(root, n, bad):
    for i in range(n):
        save(root / f"{i:02d}.png", i)
    for i in bad:
        (root / f"{i:02d}.png").write_bytes(b"no picture")
    return root


def replaced(files, bad):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return [files[i][2] for i in bad]


@pytest.mark.parametrize(
    "n,first,run", [(10, 0, 7), (10, 3, 7), (10, 6, 7), (10, 2, 3), (12, 5, 4), (30, 0, 20), (5, 1, 3)]
)
def test_broken_neighbors_are_replaced_by_different_images(tmp_path, n, first, run):
    bad = [(first + i) % n for i in range(run)]
    files = ImageFiles(broken_tree(tmp_path, n, bad), broken="skip")
    names = replaced(files, bad)
    count = Counter(names)
    assert not {f"{i:02d}.png" for i in bad} & set(count)
    assert max(count.values()) <= -(-run // (n - run)) + 1 and len(count) >= min(run, n - run) - 1
    # Another worker, which meets them in another order, gives the same; so does the next epoch.
    assert replaced(ImageFiles(tmp_path, broken="skip"), bad[::-1])[::-1] == names == replaced(files, bad)
    assert files.skipped == run


def test_a_replacement_comes_with_its_own_label_and_name(tmp_path):
    tree(tmp_path, "a/0.png", "b/0.png")
    save(tmp_path / "b" / "0.png", 77)
    (tmp_path / "a" / "0.png").write_bytes(b"")
    files = ImageFiles(tmp_path, broken="skip")
    with pytest.warns(RuntimeWarning, match=r"skipped .*a/0\.png: could not be decoded") as met:
        image, label, name = files[0]
    assert len(met) == 1 and (label, name) == (1, "b/0.png") and image.getpixel((0, 0)) == (77, 77, 77)
    assert files.skipped == 1
    assert files[0][2] == "b/0.png" and files.skipped == 1  # without another warning, which would be an error here


def test_far_replacements_are_found_and_no_good_image_is_an_error(tmp_path):
    for i in range(600):
        (tmp_path / f"{i:03d}.png").touch()
    save(tmp_path / "123.png")
    files = ImageFiles(tmp_path, broken="skip")
    assert set(replaced(files, [0, 300, 599])) == {"123.png"} and files.skipped > 256
    (tmp_path / "123.png").write_bytes(b"")
    with pytest.raises(OSError, match="none of the 600 images could be decoded"):
        replaced(files, [5])


KINDS = [
    *(struct.error, zlib.error, IndexError, KeyError, OverflowError, EOFError, SyntaxError, TypeError, ValueError),
    *(AttributeError, ZeroDivisionError, MemoryError, RuntimeError, OSError, Image.DecompressionBombError),
]


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_decoder_raises_names_the_file_or_is_skipped(tmp_path, monkeypatch, kind):
    tree(tmp_path, "0.png", "1.png")
    load = ImageFile.ImageFile.load

    def fail(self):
        if str(self.filename).endswith("0.png"):
            raise kind("wrong bytes")
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(
        OSError, match=rf"0\.png: expected an image: could not be decoded \({kind.__name__}: .*wrong bytes"
    ):
        ImageFiles(tmp_path)[0]
    assert replaced(ImageFiles(tmp_path, broken="skip"), [0]) == ["1.png"]


@pytest.mark.parametrize("limit", [20, 40])  # Pillow raises above twice the limit, and warns below that
def test_pillow_s_pixel_limit_names_the_file_or_skips_it(tmp_path, monkeypatch, limit):
    save(tmp_path / "0.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(OSError, match=r"0\.png: expected an image: .*exceeds limit"):
        ImageFiles(tmp_path)[0]
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        assert ImageFiles(tmp_path, broken="skip")[0][2] == "1.png"
    assert len(met) == 1 and "0.png" in str(met[0].message) and "exceeds limit" in str(met[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = ImageFiles(tmp_path, broken="skip")
        assert files[0][2] == ("1.png" if limit == 20 else "0.png")  # Pillow's warning alone stops nothing


def pictures():
    g = np.random.default_rng(0)
    rgb = Image.fromarray(g.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    deep = Image.fromarray(g.integers(0, 65535, (24, 32), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    yield from ((rgb, "JPEG", {"exif": exif}), (rgb, "JPEG", {"progressive": True}), (rgb.convert("CMYK"), "JPEG", {}))
    yield from ((rgb, "PNG", {"exif": exif}), (rgb.convert("P"), "PNG", {}), (deep, "PNG", {}), (rgb, "WEBP", {}))
    yield from ((rgb, "TIFF", {"exif": exif}), (deep, "TIFF", {}), (rgb, "TIFF", {"compression": "tiff_adobe_deflate"}))
    yield from ((rgb.convert("P"), "GIF", {}), (rgb, "BMP", {}), (rgb, "PPM", {}))


@pytest.mark.parametrize("image,kind,options", list(pictures()))
def test_a_truncated_file_is_broken_and_a_damaged_one_raises_nothing_else(tmp_path, image, kind, options):
    path = tmp_path / "x.png"  # decoders go by the content
    image.save(path, kind, **options)
    whole, files = path.read_bytes(), ImageFiles(tmp_path)
    files[0]
    for share in (0.05, 0.4, 0.7, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(OSError, match=r"x\.png: expected an image: could not be decoded"):
            files[0]
    draw = random.Random(0)
    for _ in range(30):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[draw.randrange(min(len(whole), 400))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            files[0]
        except OSError as error:
            assert "x.png: expected an image" in str(error)


def test_files_that_are_gone_or_may_not_be_read_are_skipped_or_named(tmp_path, monkeypatch):
    tree(tmp_path, "0.png", "1.png")
    files, skipping = ImageFiles(tmp_path), ImageFiles(tmp_path, broken="skip")
    (tmp_path / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.png: expected an image: could not be read"):
        files[0]
    with pytest.warns(RuntimeWarning, match=r"skipped .*0\.png: could not be read"):
        assert skipping[0][2] == "1.png"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE])
def test_a_fault_that_is_not_the_file_s_is_never_skipped(tmp_path, monkeypatch, number):
    files = ImageFiles(tree(tmp_path, "0.png", "1.png"), broken="skip")

    def fail(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match=r"0\.png: expected an image: could not be read") as raised:
        files[0]
    assert raised.value.errno == number and files.skipped == 0


def test_a_root_that_is_gone_is_not_skipped_file_by_file(tmp_path):
    files = ImageFiles(tree(tmp_path, "data/0.png", "data/1.png") / "data", broken="skip")
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"0\.png: expected an image"):
        files[0]
    assert files.skipped == 0


def test_broken_takes_two_words(tmp_path):
    with pytest.raises(ValueError, match="broken: expected one of 'raise', 'skip': got 'ignore'"):
        ImageFiles(tmp_path, broken="ignore")


# ---- decoding at a reduced size


@pytest.mark.parametrize(
    "edge,decoded",
    [((400, 300), (400, 300)), ((640, 320), (320, 160)), ((800, 700), (200, 175)), ((1300, 1400), (163, 175))],
)
def test_jpegs_are_decoded_no_larger_than_needed(tmp_path, edge, decoded):
    across = np.linspace(0, 255, edge[0], dtype=np.uint8)
    picture = Image.fromarray(np.broadcast_to(across[None, :, None], (edge[1], edge[0], 3)).copy())
    picture.save(tmp_path / "a.jpg", quality=95)
    image, _, _ = ImageFiles(tmp_path, short_side=160)[0]
    assert image.size == decoded and min(image.size) >= 160
    whole, _, _ = ImageFiles(tmp_path)[0]
    assert whole.size == edge
    same = np.asarray(whole.resize(decoded, Image.Resampling.BOX), dtype=float) - np.asarray(image, dtype=float)
    assert abs(same).mean() < 2


def test_a_reduced_image_stands_upright_in_every_format(tmp_path):
    picture = Image.fromarray(np.zeros((600, 800, 3), np.uint8))
    exif = picture.getexif()
    exif[274] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    picture.save(tmp_path / "b.png")
    files = ImageFiles(tmp_path, short_side=100)
    assert files[0][0].size == (150, 200) and files[1][0].size == (134, 100)
    with pytest.raises(ValueError, match="short_side: expected a whole number, 1 or more"):
        ImageFiles(tmp_path, short_side=0)


def test_torchcodec_gives_pillows_pixels_and_leaves_it_what_it_does_not_do(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    exif = picture.getexif()
    exif[274] = 6
    picture.save(tmp_path / "a.jpg")
    picture.save(tmp_path / "b-turned.jpg", exif=exif)
    picture.convert("CMYK").save(tmp_path / "c-cmyk.jpg")
    picture.convert("L").save(tmp_path / "d-gray.jpg")
    picture.save(tmp_path / "e.png")
    fast, slow = ImageFiles(tmp_path, decode="torchcodec"), ImageFiles(tmp_path)
    for (x, *_), (image, *_) in zip(fast, slow, strict=True):
        assert x.dtype == torch.uint8 and torch.equal(x.permute(1, 2, 0), torch.from_numpy(np.array(image)))
    reduced = ImageFiles(tmp_path, decode="torchcodec", short_side=10)
    assert all(min(x.shape[1:]) == 10 for x, *_ in reduced)
    monkeypatch.setattr("torchcodec.decoders.decode_jpeg", lambda data, mode: torch.zeros(3, 4, 4).byte())
    assert [tuple(x.shape[1:]) for x, *_ in fast] == [(4, 4), (60, 40), (40, 60), (4, 4), (40, 60)]


def test_a_broken_jpeg_and_a_missing_torchcodec(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for name in "ab":
        Image.fromarray(noise).save(tmp_path / f"{name}.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"a\.jpg: expected an image: could not be decoded"):
        ImageFiles(tmp_path, decode="torchcodec")[0]
    with pytest.warns(RuntimeWarning, match=r"skipped .*a\.jpg"):
        assert ImageFiles(tmp_path, decode="torchcodec", broken="skip")[0][2] == "b.jpg"
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ImportError, match="decode='torchcodec' needs torchcodec, which is not installed: pip install"):
        ImageFiles(tmp_path, decode="torchcodec")
    with pytest.raises(ValueError, match="decode: expected"):
        ImageFiles(tmp_path, decode="turbo")
