"""StructuredCollate: sizes, labels, names, views."""

import math
import pickle

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from PIL import Image

from ssd_addon import StructuredCollate, StructuredTransform, StructuredViews, ViewBatch


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


@pytest.mark.parametrize("size", [0, 2.5, (3, 4, 5), True, StructuredViews({}, seed=0), (8, 0)])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match=r"expected an edge or \(height, width\)"):
        StructuredCollate(size)


def test_labels_of_every_kind():
    collate, image = StructuredCollate(4), torch.rand(3, 4, 4)

    def labels(*values):
        return collate([(image, value) for value in values])[1]

    assert labels(1, np.int64(2), True).tolist() == [1, 2, 1] and labels(1, 2).dtype == torch.int64
    assert labels(1, 0.5, np.float32(2)).tolist() == [1.0, 0.5, 2.0]
    assert labels(torch.ones(2), torch.zeros(2)).tolist() == [[1, 1], [0, 0]]
    assert labels("cat", None) == ["cat", None] and labels({"a": 1}) == [{"a": 1}]
    with pytest.raises(ValueError, match=r"labels of one shape: got tensors of shape \[1\] and \[2\]"):
        labels(torch.ones(2), torch.ones(1))


def test_kinds_of_images_mix_and_numbers_of_channels_do_not():
    collate = StructuredCollate(4)
    uint8, array = torch.full((3, 4, 4), 255, dtype=torch.uint8), np.full((4, 4), 0.5)
    images, _, _ = collate([(uint8, 0), (array, 0), (picture("L"), 0)])
    assert images.dtype == torch.float32 and images[:, 0, 0, 0].tolist() == [1, 0.5, torch.tensor(200 / 255).item()]
    with pytest.raises(
        ValueError, match=r"expected the same number of channels in all images of a batch: got \[3, 12\]"
    ):
        collate([(uint8, 0), (np.zeros((4, 4, 12), np.uint8), 0)])


@pytest.mark.parametrize("value", [200.0, -0.5, math.nan])
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("make", [lambda image: image, lambda image: image.half(), lambda image: image.numpy().T])
def test_floats_outside_0_to_1_are_refused_in_tensors_as_in_arrays(value, size, make):
    image = torch.full((3, size, size), 0.5)
    image[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"expected .*float.* in \[0, 1\]: got .*"):
        StructuredCollate(4)([(make(image), 0), (torch.zeros(3, 4, 4, dtype=torch.uint8), 0)])
    StructuredCollate(4)([(torch.full((3, 8, 8), 1 + 5e-7), 0)])  # what rounding makes


@pytest.mark.parametrize(
    "image", [torch.rand(4, 4), torch.zeros(3, 4, 4, dtype=torch.int64), "a.jpg", None, [picture()]]
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(TypeError, match=r"collate: expected (an image \[C, H, W\]|a PIL image, an array or a tensor)"):
        StructuredCollate(4)([(image, 0)])


def test_a_collate_function_travels_to_spawned_workers():
    collate = pickle.loads(pickle.dumps(StructuredCollate((4, 6), fit="pad", views=StructuredViews({}, seed=0))))
    batch, _, names = collate([(picture(), 0, "a")])
    assert batch.views.shape == (2, 1, 3, 4, 6) and names == ["a"]


def test_rows_without_labels_are_read_where_that_is_said():
    row = {"image": torch.rand(3, 4, 4), "label": 3}
    images, labels, _ = StructuredCollate(4, label_key=False)([row, {"image": torch.rand(3, 4, 4)}])
    assert len(images) == 2 and labels == [None, None]
    with pytest.raises(ValueError, match=r"got the keys image; label_key names it; label_key=False reads no labels"):
        StructuredCollate(4)([{"image": torch.rand(3, 4, 4)}])
    with pytest.raises(TypeError, match="expected mappings as samples"):
        StructuredCollate(4, label_key=False)([(torch.rand(3, 4, 4), 0)])


CROP = {"crop": [K.RandomResizedCrop((4, 4))]}


def rows(image="image", label="label", **more):
    return [{image: picture(value=9), label: 1, **more}, {image: torch.full((3, 4, 4), 9, dtype=torch.uint8), label: 0}]


@pytest.mark.parametrize("image,label", [("image", "label"), ("img", "labels"), ("pixel_values", "label")])
def test_rows_of_a_dataset_are_read_by_their_usual_keys(image, label):
    images, labels, names = StructuredCollate(4)(rows(image, label, name="a.jpg"))
    assert images.shape == (2, 3, 4, 4) and images[:, 0, 0, 0].tolist() == [9, 9]
    assert labels.tolist() == [1, 0] and names == ["a.jpg", ""]


def test_rows_are_read_by_the_keys_that_are_named():
    row = {"image": picture(value=9), "mask": picture(value=7), "label": 1, "labels": 2, "coarse": 3}
    images, labels, names = StructuredCollate(4, image_key="mask", label_key="coarse")([row])
    assert images[0, 0, 0, 0] == 7 and labels.tolist() == [3] and names == [""]


@pytest.mark.parametrize(
    "make", [lambda: None, lambda: StructuredViews(CROP, seed=0), lambda: StructuredTransform(CROP)]
)
def test_rows_and_tuples_give_the_same_batch_whatever_makes_the_views(make):
    tuples = [(torch.rand(3, 4, 4), label) for label in (1, 0)]
    made = []
    for samples in (tuples, [{"img": image, "label": label} for image, label in tuples]):
        torch.manual_seed(0)
        batch, labels, names = StructuredCollate(4, views=make())(samples)
        made.append(batch.views if isinstance(batch, ViewBatch) else batch)
        assert labels.tolist() == [1, 0] and names == ["", ""]
    assert torch.equal(*made)


def test_rows_whose_views_were_made_by_the_dataset_become_a_batch_of_views():
    transform = StructuredTransform({}, seed=0)
    batch, labels, _ = StructuredCollate(4, views=transform)(
        [{"image": transform(torch.rand(3, 4, 4)), "label": k} for k in range(3)]
    )
    assert isinstance(batch, ViewBatch) and batch.plan == transform.plan and batch.views.shape == (2, 3, 3, 4, 4)
    assert labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "row,options,message",
    [
        (
            {"picture": 0, "label": 0},
            {},
            "one key of image, img, pixel_values in every row: got the keys picture, label",
        ),
        (
            {"image": 0, "img": 0, "label": 0},
            {},
            "one key of image, img, pixel_values .*: got the keys image, img, label",
        ),
        (
            {"image": 0, "fine_label": 0},
            {},
            "one key of label, labels .*: got the keys image, fine_label; label_key names",
        ),
        ({"image": 0, "label": 0, "labels": 0}, {}, "one key of label, labels .*: got the keys image, label, labels"),
        ({"image": 0, "label": 0}, {"image_key": "img"}, "a key 'img' in every row: got the keys image, label"),
        ({"image": 0, "label": 0}, {"label_key": "y"}, "a key 'y' in every row: got the keys image, label; label_key"),
        (
            {"image": {"bytes": b"", "path": None}, "label": 0},
            {},
            r"a PIL image.*: got dict; .*decode=True\)\) gives one$",
        ),
        (
            {"image": [[[0, 0, 0]]], "label": 0},
            {},
            r"a PIL image.*: got list; if its levels are 0 to 255, .*\(\"numpy\", dtype=np.uint8\) gives one$",
        ),
        (
            {"image": np.full((2, 2, 3), 255), "label": 0},
            {},
            r"got int64 \[2, 2, 3\]; if .* 0 to 255, give array.astype\(np.uint8\), or .*dtype=np.uint8\); if not",
        ),
        ({"image": np.full((2, 2, 3), 256), "label": 0}, {}, r"got int64 \[2, 2, 3\]; divide it by the largest value"),
        ({"image": np.full((2, 2, 3), -1), "label": 0}, {}, r"got int64 \[2, 2, 3\]; divide it by the largest value"),
        (
            {"image": torch.zeros(2, 2, 3, dtype=torch.int64), "label": 0},
            {},
            r"got torch.int64 \[2, 2, 3\]; if its levels .*dtype=np.uint8\) gives arrays \[H, W, C\]$",
        ),
        ({"image": torch.zeros(2, 2, dtype=torch.int32), "label": 0}, {}, r"got torch.int32 \[2, 2\]$"),
        ((picture(), 0), {"image_key": "img"}, "expected mappings as samples, because image_key or label_key is given"),
    ],
)
def test_rows_without_the_keys_are_refused_with_the_keys_that_came(row, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        StructuredCollate(4, **options)([row])


def test_pictures_are_resized_as_pillow_does_bicubically():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    want = np.array(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(StructuredCollate(8)([(image, 0)])[0][0].permute(1, 2, 0).numpy(), want)


def test_tensors_are_resized_with_antialiasing_and_rounded():
    stripes = torch.zeros(3, 16, 16, dtype=torch.uint8)
    stripes[..., ::4] = 200  # a quarter of the columns, which no sample without antialiasing meets
    assert StructuredCollate(4)([(stripes, 0)])[0].float().mean() == pytest.approx(50, abs=10)
    image = torch.tensor([[1, 1], [1, 0]], dtype=torch.uint8).expand(3, 2, 2)  # with a mean of 0.75
    assert StructuredCollate(1)([(image, 0)])[0].unique().tolist() == [1]


def test_the_name_none_is_no_name():
    image = torch.rand(3, 4, 4)
    assert StructuredCollate(4)([(image, 0, None), (image, 0, "None")])[2] == ["", "None"]
    assert StructuredCollate(4)([{"image": image, "label": 0, "name": None}])[2] == [""]


def test_several_labels_per_image_are_a_tensor_where_they_come_as_tensors():
    image = torch.rand(3, 4, 4)
    several = [[1, 0], [0, 1]]
    assert StructuredCollate(4)([(image, x) for x in several])[1] == several
    assert StructuredCollate(4)([(image, torch.tensor(x)) for x in several])[1].tolist() == several
