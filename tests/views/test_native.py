"""Crops in the data loader, at each image's own size: their statistics, pixels, sharing and draws."""

import pickle

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssd_addon import NativeCrops, StructuredViews, presets
from ssd_addon.augment.crop import resized_crops
from ssd_addon.metrics import parameter_matrix
from ssd_addon.operations.draws import generator
from ssd_addon.runs import ResumableSampler

SIZES = [(40, 31), (24, 64), (33, 33), (90, 50), (21, 28), (50, 47)]


def crop(size=16, **more):
    return K.RandomResizedCrop((size, size), resample="bicubic", **more)


def made(plan="shared_query", **more):
    groups = {"spatial": [crop(), K.RandomHorizontalFlip()], "color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1)]}
    return StructuredViews(groups, plan=plan, seed=3, **more)


def pictures(sizes=SIZES):
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]


def samples(sizes=SIZES):
    return [(picture, k, f"{k}.png") for k, picture in enumerate(pictures(sizes))]


def boxes_of(batch, view):
    """[B, 4] left, top, right, bottom, as shares of the image."""
    p = batch.parameters[view]["spatial"]["0.RandomResizedCrop"]
    low, high = p["src"][:, 0], p["src"][:, 2] + 1
    return torch.cat([low, high], dim=1) / p["input_size"].flip(1).repeat(1, 2)


def test_area_aspect_and_place_are_those_of_torchvision():
    for height, width in ((300, 400), (120, 1000)):  # of the second one, a part falls back to the central box
        theirs = v2.RandomResizedCrop(16)
        torch.manual_seed(0)
        draw = getattr(theirs, "make_params", None) or theirs._get_params  # torchvision before 0.21
        there = [draw([torch.zeros(1, 1, 1).expand(3, height, width)]) for _ in range(4000)]
        expected = torch.tensor([[p["left"], p["top"], p["width"], p["height"]] for p in there]).double()
        box = resized_crops(torch.tensor([[height, width]]).expand(4000, 2), crop(), generator(1))
        extent = box[:, 2] - box[:, 0] + 1
        assert bool((box[:, 0] >= 0).all()) and bool((box[:, 2] < torch.tensor([width, height])).all())
        found = torch.cat([box[:, 0], extent], dim=1)

        def numbers(t):
            left, top, w, h = t.unbind(1)
            return w * h, w / h, left + w / 2, top + h / 2

        for mine, other in zip(numbers(found), numbers(expected), strict=True):
            assert ks_2samp(mine.numpy(), other.numpy()).pvalue > 0.01


def test_an_image_that_no_try_fits_is_cropped_in_its_center():
    box = resized_crops(torch.tensor([[10, 1000], [1000, 10]]), crop(scale=(0.9, 1.0)), generator(0))
    size = box[:, 2] - box[:, 0] + 1
    assert size.tolist() == [[13, 10], [10, 13]] and box[0, 0].tolist() == [493, 0]


def test_pixels_are_those_of_torchvision():
    views = StructuredViews({"spatial": [crop()]}, seed=0)
    cropped, _, _ = NativeCrops(views)(samples())
    assert cropped.pixels.dtype == torch.uint8
    for view in range(3):
        for k, picture in enumerate(pictures()):
            (left, top), (right, bottom) = cropped.boxes[view, k, [0, 2]].long().tolist()
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            box = (top, left, bottom - top + 1, right - left + 1)
            expected = F.resized_crop(image, *box, [16, 16], v2.InterpolationMode.BICUBIC, antialias=True)
            assert torch.equal(cropped.pixels[view, k], expected)


def test_crops_are_shared_as_the_plan_says_and_kept_in_the_parameters():
    views = made()
    cropped, labels, names = NativeCrops(views)(samples())
    batch = views(cropped)
    query, content, spatial, color = (boxes_of(batch, v) for v in range(4))
    assert torch.equal(query, spatial)
    assert bool((content != query).any(dim=1).all()) and bool((color != query).any(dim=1).all())
    assert [tuple(s) for s in cropped.sizes[0].tolist()] == SIZES
    assert labels.tolist() == list(range(6)) and names[1] == "1.png"
    flips = [p["spatial"]["1.RandomHorizontalFlip"]["batch_prob"] for p in batch.parameters]
    assert torch.equal(flips[0], flips[2])
    hue = [p["color"]["0.ColorJitter"]["hue_factor"] for p in batch.parameters]
    assert torch.equal(hue[0], hue[3]) and not torch.equal(hue[0], hue[1])


def test_other_operations_are_drawn_and_applied_as_ever():
    views, again = made(), made()
    cropped, _, _ = NativeCrops(views)(samples())
    batch, other = views(cropped), again(torch.rand(6, 3, 16, 16))
    for mine, theirs in zip(batch.parameters, other.parameters, strict=True):
        assert all(
            torch.equal(mine["color"]["0.ColorJitter"][k], t) for k, t in theirs["color"]["0.ColorJitter"].items()
        )
        flip = "1.RandomHorizontalFlip"
        assert torch.equal(mine["spatial"][flip]["batch_prob"], theirs["spatial"][flip]["batch_prob"])
    for view, p in enumerate(batch.parameters):
        for k, picture in enumerate(pictures()):
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
            alone = views.replay(image, p.map(lambda t, k=k: t[k : k + 1]))
            assert float((alone[0] - batch[view][k]).abs().max()) < 0.02  # crops are rounded to uint8 in between


@pytest.mark.parametrize("fast", [True, False])
def test_the_crop_is_not_resampled_again(fast):
    views = StructuredViews({"spatial": [crop()]}, seed=0, fast=fast)
    cropped, _, _ = NativeCrops(views)(samples())
    assert torch.allclose(views(cropped).views, cropped.pixels / 255, atol=1e-6)


def test_rows_of_an_interleaved_plan_share_by_their_space():
    views = made("interleaved")
    for _ in range(2):
        cropped, _, _ = NativeCrops(views)(samples())
        batch = views(cropped)
        same = (boxes_of(batch, 0) == boxes_of(batch, 1)).all(dim=1)
        assert torch.equal(same, batch.space_index == 1)
        assert batch.space_index.bincount().tolist() == [2, 2, 2]


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("color", [False, True])
def test_which_row_serves_which_space_rotates(numbered, color):
    groups = {"spatial": [crop()]} | ({"color": [K.ColorJitter(0.4)]} if color else {})
    collate = NativeCrops(StructuredViews(groups, plan="interleaved", seed=3))
    if numbered:
        collate.set_epoch(1)
    torch.manual_seed(0)
    every = samples(SIZES * 4)  # batches of one image, within one epoch
    first = {int(collate(every[k : k + 1])[0].space_index[0]) for k in range(24)}
    assert first == set(range(2 + color))


def test_cross_image_keys_show_the_same_place_of_another_image():
    views = made(cross_image=["spatial", "color"])
    cropped, _, _ = NativeCrops(views)(samples())
    batch = views(cropped)
    assert batch.image_ids is not None and not torch.equal(batch.image_ids[2], batch.image_ids[0])
    sizes = torch.tensor(SIZES)
    assert torch.equal(cropped.sizes[2], sizes[batch.image_ids[2]])
    pixel = 1 / sizes[batch.image_ids[2]].min(dim=1).values[:, None]
    assert bool(((boxes_of(batch, 2) - boxes_of(batch, 0)).abs() <= 1.01 * pixel).all())
    for k, source in enumerate(batch.image_ids[2].tolist()):  # and it is cut from that image
        (left, top), (right, bottom) = cropped.boxes[2, k, [0, 2]].long().tolist()
        box = torch.from_numpy(np.array(pictures()[source]))[top : bottom + 1, left : right + 1].permute(2, 0, 1)
        expected = F.resize(box, [16, 16], v2.InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(cropped.pixels[2, k], expected)


def test_constrained_crops_stay_near_the_query():
    views = made(constrained_crop=0.2)
    cropped, _, _ = NativeCrops(views)(samples([(200, 301), (400, 150)] * 20))
    batch = views(cropped)

    def area(box):
        return (box[:, 2:] - box[:, :2]).prod(dim=1)

    query, color = boxes_of(batch, 0), boxes_of(batch, 3)
    ratio = area(color) / area(query)
    assert ratio.min() > 0.78 and ratio.max() < 1.22
    middle = (color[:, :2] + color[:, 2:]) / 2
    assert bool((middle > query[:, :2] - 0.01).all() and (middle < query[:, 2:] + 0.01).all())
    assert torch.equal(boxes_of(batch, 2), query)
    content = area(boxes_of(batch, 1)) / area(query)  # which is free, as is every key of content
    assert content.min() < 0.5 and content.max() > 2
    assert NativeCrops(views).short_side == 74  # 16 / sqrt(0.08 x 0.8 x 3 / 4), and 66 for crops that are free
    assert NativeCrops(made()).short_side == 66


def test_keys_crop_by_their_own_operation():
    groups = {"spatial": [crop(scale=(0.9, 1.0), ratio=(1, 1))], "color": [K.ColorJitter(0.4)]}
    views = StructuredViews(groups, key_groups={"spatial": [crop(scale=(0.1, 0.2), ratio=(1, 1))]}, seed=0)
    cropped, _, _ = NativeCrops(views)(samples([(50, 50)] * 8))
    extent = cropped.boxes[:, :, 2, 0] - cropped.boxes[:, :, 0, 0] + 1
    assert bool((extent[[0, 2]] > 45).all()) and bool((extent[[1, 3]] < 24).all())
    assert NativeCrops(views).short_side == 51  # 16 / sqrt(0.1)


def test_presets_and_their_keys_of_their_own():
    for name in ("color_spatial", "appearance_spatial", "content_only"):
        views = StructuredViews(**presets(name, size=16), seed=0)
        cropped, _, _ = NativeCrops(views)(samples())
        batch = views(cropped)
        assert batch.views.shape[1:] == (6, 3, 16, 16) and bool(batch.views.isfinite().all())


def test_the_smallest_crop_has_the_pixels_of_a_view():
    collate = NativeCrops(StructuredViews(**presets("color_spatial", size=224), seed=0))
    assert collate.short_side == 915  # 224 / sqrt(0.08 x 3 / 4)
    sizes = torch.tensor([[915, 915], [915, 2000], [2000, 915]]).repeat_interleave(3000, 0)
    box = resized_crops(sizes, crop(224), generator(0))
    assert float((box[:, 2] - box[:, 0] + 1).min()) >= 223


def test_gray_and_float_images():
    views = made()
    cropped, _, _ = NativeCrops(views)([(Image.new("L", (30, 40)), 0), (torch.rand(3, 20, 24), 1)])
    assert cropped.pixels.dtype == torch.float32 and 0 <= cropped.pixels.min() <= cropped.pixels.max() <= 1
    views(cropped)


def test_draws_leave_the_views_alone_and_the_matrix_reads_the_parameters():
    views = made()
    before = views.get_extra_state()
    NativeCrops(views)(samples())
    assert torch.equal(views.get_extra_state(), before)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4))
    cropped, _, _ = NativeCrops(views)(samples([(20, 30)] * 24))
    parameter_matrix(model, views, torch.rand(24, 3, 20, 30))
    assert views(cropped).parameters[0].keys() == {"spatial", "color", "then"}


# ---- in the workers of a loader


class Pictures(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, k):
        return samples(SIZES * 2)[k]


def epoch(workers, start=0, seed=0, number=None, **more):
    sampler = ResumableSampler(Pictures(), num_replicas=1, rank=0, shuffle=True)
    sampler.start = start
    collate = NativeCrops(made("interleaved"))
    if number is not None:
        collate.set_epoch(number)
    loader = DataLoader(
        Pictures(), 3, sampler=sampler, collate_fn=collate, num_workers=workers,
        generator=torch.Generator().manual_seed(seed), **more,
    )  # fmt: skip
    return [(cropped.pixels, cropped.space_index) for cropped, _, _ in loader]


@pytest.mark.slow
def test_an_epoch_is_repeated_and_continued_exactly_with_any_workers():
    whole = epoch(2)
    assert len({x.float().mean().item() for x, _ in whole}) == 4
    for other, skipped in ((epoch(1), 0), (epoch(2, start=3), 1), (epoch(2, multiprocessing_context="spawn"), 0)):
        for (x, i), (y, j) in zip(whole[skipped:], other, strict=True):
            assert torch.equal(x, y) and torch.equal(i, j)
    assert not torch.equal(epoch(2, seed=1)[0][0], whole[0][0])


@pytest.mark.slow
def test_the_number_of_an_epoch_makes_its_draws_with_workers_or_without():
    whole = epoch(0, number=3)
    for other, skipped in ((epoch(2, seed=9, number=3), 0), (epoch(0, start=3, number=3), 1)):
        for (x, i), (y, j) in zip(whole[skipped:], other, strict=True):
            assert torch.equal(x, y) and torch.equal(i, j)
    assert not torch.equal(epoch(0, number=4)[0][0], whole[0][0])
    with pytest.raises((TypeError, ValueError), match="epoch: expected a whole number"):
        NativeCrops(made()).set_epoch(0.5)


def test_the_same_number_again_makes_the_same_draws():
    collate = NativeCrops(made("interleaved"))
    found = []
    for number in (0, 0, 1, 0):
        collate.set_epoch(number)
        found.append(collate(samples(SIZES))[0].pixels)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[2]) and not torch.equal(collate(samples(SIZES))[0].pixels, found[0])


def test_a_batch_is_moved_pickled_and_described():
    cropped, _, _ = NativeCrops(made())(samples())
    again = pickle.loads(pickle.dumps(cropped.to("cpu", non_blocking=True)))
    assert torch.equal(again.pixels, cropped.pixels) and len(again) == 6
    assert repr(cropped).startswith("Cropped([4, 6, 3, 16, 16] torch.uint8")


# ---- errors


@pytest.mark.parametrize(
    ("groups", "then"),
    [
        ({"color": [K.ColorJitter(0.4)], "spatial": [crop()]}, []),
        ({"spatial": [K.RandomHorizontalFlip(), crop()]}, []),
        ({"spatial": [K.RandomCrop((8, 8))]}, []),
        ({"spatial": [v2.RandomResizedCrop((8, 8))]}, []),
        ({"color": [K.ColorJitter(0.4)]}, [crop()]),
    ],
)
def test_views_that_begin_with_anything_else_are_refused(groups, then):
    with pytest.raises(ValueError, match="start with Kornia's RandomResizedCrop"):
        NativeCrops(StructuredViews(groups, then=then, seed=0))


def test_keys_of_another_size_are_refused():
    views = StructuredViews({"s": [crop(16)]}, key_groups={"s": [crop(12)]}, seed=0)
    with pytest.raises(ValueError, match="the same crop size"):
        NativeCrops(views)


def test_crops_of_other_views_are_refused():
    cropped, _, _ = NativeCrops(made())(samples())
    with pytest.raises(ValueError, match="expected crops of 16 x 16"):
        made("interleaved")(cropped)
    with pytest.raises(ValueError, match="expected crops of 8 x 8"):
        StructuredViews({"spatial": [crop(8)], "color": [K.ColorJitter(0.4)]}, seed=0)(cropped)


def test_other_arguments_and_samples_are_refused():
    with pytest.raises(TypeError, match="expected StructuredViews: got str"):
        NativeCrops("color_spatial")
    collate = NativeCrops(made())
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])
    with pytest.raises(ValueError, match="the same number of channels"):
        collate([(torch.rand(1, 20, 20), 0), (torch.rand(3, 20, 20), 0)])
    with pytest.raises(ValueError, match="expected two or more images"):
        NativeCrops(made(cross_image=["color"]))(samples()[:1])
