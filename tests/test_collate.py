"""StructuredCollate and ImageFiles: sizes, modes, labels, broken files."""

import numpy as np
import pytest
import torch
from PIL import Image

from ssd_addon import StructuredCollate, StructuredViews, ViewBatch
from ssd_addon.collate import ImageFiles


def picture(mode="RGB", size=(20, 12), value=200):
    color = {"RGB": (value, 0, 0), "L": value, "RGBA": (value, 0, 0, 0), "P": 3, "1": 1}[mode]
    return Image.new(mode, size, color)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
@pytest.mark.parametrize("fit", ["cover", "pad"])
def test_modes_become_rgb(mode, fit):
    images, labels, names = StructuredCollate(8, fit=fit)([(picture(mode), 1), (picture(size=(9, 30)), 0, "b")])
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.uint8
    assert labels.tolist() == [1, 0] and names == ["", "b"]


def test_transparency_is_black_and_cover_and_pad_differ():
    images, _, _ = StructuredCollate(8)([(picture("RGBA"), 0)])
    assert images.max() == 0
    cover, _, _ = StructuredCollate(8)([(picture(), 0)])
    pad, _, _ = StructuredCollate(8, fit="pad")([(picture(), 0)])
    assert (cover[0, 0] == 200).all()
    assert pad[0, 0, 0].max() == 0 and (pad[0, 0, 4] == 200).all()


def test_tensors_arrays_and_views():
    views = StructuredViews({}, seed=0)
    array = np.zeros((5, 9, 3), dtype=np.uint8)
    batch, labels, _ = StructuredCollate((6, 7), views=views)([(torch.rand(3, 30, 20), 0.5), (array, 1)])
    assert isinstance(batch, ViewBatch) and batch.views.shape == (2, 2, 3, 6, 7)
    assert labels.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    "samples,message",
    [([], "empty batch"), ([torch.rand(3, 4, 4)], "got Tensor"), ([("a.jpg", 0)], "got str"), ([(1,)], "got 1 items")],
)
def test_bad_samples(samples, message):
    with pytest.raises((ValueError, TypeError), match=message):
        StructuredCollate(8)(samples)


def test_image_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        ImageFiles(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="got none"):
        ImageFiles(tmp_path)
    for c in ("a", "b"):
        (tmp_path / c).mkdir()
        for i in range(2):
            noise = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / c / f"{i}.jpg")
    files = ImageFiles(tmp_path)
    assert len(files) == 4 and files.classes == ["a", "b"] and files[3][1:] == (1, "b/1.jpg")
    broken = tmp_path / "a" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    with pytest.raises(OSError, match=r"1\.jpg: expected an image"):
        files[1]
    skipping = ImageFiles(tmp_path, broken="skip")
    with pytest.warns(RuntimeWarning, match=r"skipped .*1\.jpg"):
        assert skipping[1][2] == "b/0.jpg"
    assert skipping.skipped == 1


@pytest.mark.parametrize("size", [0, 2.5, (3, 4, 5), True, StructuredViews({}, seed=0), (8, 0)])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match=r"expected an edge or \(height, width\)"):
        StructuredCollate(size)
