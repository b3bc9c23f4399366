"""StructuredViews: what is shared is bit-equal, what is redrawn differs, a view replays, bad input is refused."""

import pickle

import kornia.augmentation as K
import pytest
import torch

from ssd_addon import StructuredViews, ViewPlan, presets

COLOR = "0.ColorJitter"


def groups(**kw):
    return {
        "spatial": [K.RandomResizedCrop((16, 16), scale=(0.2, 1.0)), K.RandomHorizontalFlip()],
        "color": [K.ColorJitter(0.4, 0.4, 0.4, 0.4, p=0.5), K.RandomGrayscale(p=0.5)],
        **kw,
    }


def images(b=6, seed=0):
    return torch.rand(b, 3, 20, 24, generator=torch.Generator().manual_seed(seed))


CASES = [
    {},
    {"key_groups": {"color": [K.ColorJitter(0.1, 0.1, 0.1, 0.1, p=1.0, order=(2, 0, 1, 3)), K.RandomGrayscale(p=0.9)]}},
    {"then": [K.RandomGaussianBlur((3, 3), (0.1, 2.0), p=0.5)], "key_then": [K.RandomInvert(p=0.5)]},
    {"cross_image": ("color",)},
    {"constrained_crop": 0.2},
]


@pytest.mark.parametrize("plan", ["shared_query", "interleaved"])
@pytest.mark.parametrize("case", CASES, ids=["plain", "key_groups", "then", "cross", "crop"])
def test_sharing_is_exact_and_views_replay(plan, case):
    views = StructuredViews(groups(), plan=plan, seed=3, **case)
    x = images()
    before = torch.get_rng_state()
    batch = views(x)
    assert torch.equal(before, torch.get_rng_state())
    assert batch.views.shape == (views.plan.num_views, 6, 3, 16, 16)
    for v in range(len(batch)):
        ids = torch.arange(6) if batch.image_ids is None else batch.image_ids[v]
        assert torch.equal(views.replay(x[ids], batch.parameters[v]), batch[v])
    for name, (a, b, rows) in batch.plan.pairs(6, batch.space_index).items():
        for group in ("spatial", "color"):
            for op, query in batch.parameters[a][group].items():
                for key, t in query.items():
                    other = batch.parameters[b][group][op][key]
                    if group == name:
                        assert torch.equal(t[rows], other[rows]), (name, op, key)
                    elif t.is_floating_point() and key not in ("batch_prob", "src", "dst"):
                        assert (t[rows] != other[rows]).any(), (name, op, key)


def test_content_key_and_repeated_calls_redraw_and_a_seed_repeats():
    a, b = StructuredViews(groups(), seed=1), StructuredViews(groups(), seed=1)
    first, again, second = a(images()), b(images()), a(images())
    assert torch.equal(first.views, again.views)
    hue = first.parameters[0]["color"][COLOR]["hue_factor"]
    assert len(hue.unique()) == 6  # per image
    assert not (hue == first.parameters[1]["color"][COLOR]["hue_factor"]).any()
    assert not (hue == second.parameters[0]["color"][COLOR]["hue_factor"]).any()
    for other in (StructuredViews(groups(), seed=2), StructuredViews(groups(), seed=1, rank=1)):
        assert not (hue == other(images()).parameters[0]["color"][COLOR]["hue_factor"]).any()
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(images()).views, b(images()).views)
    restored = pickle.loads(pickle.dumps(a))
    assert torch.equal(restored(images()).views, a(images()).views)


def test_one_pass_makes_what_view_by_view_makes():
    views = StructuredViews(groups(), seed=5, cross_image=("color",), fast=False)
    batch = views(images())
    inputs = [images()[ids] for ids in batch.image_ids]
    together = torch.stack(views._in_one_pass(inputs, batch.parameters))
    torch.testing.assert_close(together, batch.views, rtol=1e-5, atol=1e-5)


def test_color_jitter_orders_are_per_image_and_applied_per_image():
    views = StructuredViews({"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.4, p=1.0)]}, seed=0)
    x = images(8)
    batch = views(x)
    p = batch.parameters[0]["color"][COLOR]
    assert len(p["order"].unique(dim=0)) > 1
    for i in range(8):
        single = K.ColorJitter(0.4, 0.4, 0.4, 0.4, p=1.0, order=tuple(p["order"][i].tolist()))
        row = {k: t[i : i + 1] for k, t in p.items() if k != "order"} | {"order": p["order"][i]}
        torch.testing.assert_close(single(x[i : i + 1], params=row)[0], batch[0][i], rtol=0, atol=1e-6)
    fixed = StructuredViews({"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.4, order=(3, 2))]}, seed=0)(x)
    assert torch.equal(fixed.parameters[0]["color"][COLOR]["order"], torch.tensor([3, 2]).expand(8, 2))


def test_operations_that_need_rgb_say_so_for_other_images():
    with pytest.raises(ValueError, match=r"color: 0.ColorJitter .* need 3 channels, RGB: the images have 1"):
        StructuredViews({"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.4, p=1.0)]}, seed=0)(torch.rand(4, 1, 8, 8))


def test_two_operations_of_one_class_keep_their_own_parameters():
    flips = [K.RandomHorizontalFlip(p=0.0), K.RandomHorizontalFlip(p=1.0), K.RandomVerticalFlip(p=0.5)]
    batch = StructuredViews({"flip": flips}, seed=0)(images())
    assert batch.parameters[0]["flip"]["0.RandomHorizontalFlip"]["batch_prob"].sum() == 0
    assert batch.parameters[0]["flip"]["1.RandomHorizontalFlip"]["batch_prob"].sum() == 6
    down = batch.parameters[0]["flip"]["2.RandomVerticalFlip"]["batch_prob"].bool()
    x = images().flip(-1)
    assert torch.equal(batch[0], torch.where(down[:, None, None, None], x.flip(-2), x))


def test_cross_image_sources():
    views = StructuredViews(groups(), cross_image=("spatial", "color"), seed=0)
    assert views(images(6)).image_ids.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [5, 0, 1, 2, 3, 4],
        [4, 5, 0, 1, 2, 3],
    ]
    assert views(images(2)).image_ids[3].tolist() == [1, 0]  # two rows: a roll by 2 is a fixed point, so by 3
    inter = StructuredViews(groups(), plan="interleaved", cross_image=("color",), seed=0)(images(9))
    assert inter.image_ids.tolist() == [list(range(9)), [0, 1, 5, 3, 4, 8, 6, 7, 2]] or inter.image_ids[
        1, 2::3
    ].tolist() in (
        [5, 8, 2],
        [8, 2, 5],
    )
    with pytest.raises(ValueError, match="expected two or more images for the key of"):
        StructuredViews(groups(), plan="interleaved", cross_image=("color",))(images(3))


def test_constrained_crop_stays_near_the_query_and_spares_the_content_key():
    views = StructuredViews(groups(), constrained_crop=0.1, seed=0)
    batch = views(torch.rand(64, 3, 40, 40))
    box = [p["spatial"]["0.RandomResizedCrop"]["src"] for p in batch.parameters]

    def area(b):
        return (b[:, 2] - b[:, 0] + 1).prod(dim=1)

    def centre(b):
        return (b[:, 0] + b[:, 2]) / 2

    near, free, same = box[3], box[1], box[2]
    assert torch.equal(same, box[0])
    ratio = area(near) / area(box[0])
    assert ratio.min() > 0.75 and ratio.max() < 1.3  # 0.9 to 1.1 and whole pixels
    inside = (centre(near) >= box[0][:, 0] - 1) & (centre(near) <= box[0][:, 2] + 1)
    assert inside.all() and (near >= 0).all() and (near < 40).all()
    assert not ((area(free) / area(box[0]) - 1).abs() < 0.3).all()
    with pytest.raises(ValueError, match="constrained_crop"):
        StructuredViews({"color": [K.RandomGrayscale()]}, constrained_crop=0.1)


@pytest.mark.parametrize("name", ["color_spatial", "appearance_spatial", "content_only"])
def test_presets(name):
    views = StructuredViews(**presets(name, size=32), seed=0)
    assert views(images()).views.shape[-2:] == (32, 32)
    assert views.plan.spaces[:2] in (("content", "spatial"), ("content",))


def test_no_groups_is_two_view_ssl():
    views = StructuredViews({}, then=[K.RandomGrayscale(p=0.5)], seed=0)
    assert views.plan == ViewPlan.shared_query(("content",)) and len(views(images())) == 2


def test_uint8_is_scaled_and_inputs_are_checked():
    views = StructuredViews({}, seed=0)
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(views(x)[0], x.float() / 255)
    for bad, error, message in [
        (torch.rand(3, 8, 8), ValueError, r"expected \[B, C, H, W\]: got 3 dimensions"),
        (torch.rand(2, 3, 8, 8) * 2, ValueError, "expected values in"),
        (torch.full((2, 3, 8, 8), float("nan")), ValueError, "NaN among them"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.zeros(0, 3, 8, 8), ValueError, "at least one image"),
        ([1], TypeError, "got list"),
    ]:
        with pytest.raises(error, match=message):
            views(bad)


@pytest.mark.parametrize(
    "kwargs,error,message",
    [
        ({"groups": {"a": []}}, ValueError, "at least one operation"),
        ({"groups": {"a": K.RandomGrayscale()}}, TypeError, "expected a sequence"),
        ({"groups": {"content": [K.RandomGrayscale()]}}, ValueError, "names other than 'content'"),
        ({"groups": {"a": [torch.nn.Identity()]}}, TypeError, "got Identity"),
        ({"groups": {"a": [K.RandomMixUpV2()]}}, TypeError, "got RandomMixUpV2"),
        ({"groups": {"a": [K.RandomGrayscale(same_on_batch=True)]}}, ValueError, "same_on_batch=True"),
        ({"groups": groups(), "cross_image": ("hue",)}, ValueError, "cross_image: expected names of groups.*'hue'"),
        ({"groups": groups(), "key_groups": {"hue": []}}, ValueError, "key_groups: expected names of groups"),
        ({"groups": groups(), "plan": "both"}, ValueError, "plan"),
        ({"groups": groups(), "constrained_crop": 1.5}, ValueError, "constrained_crop"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        StructuredViews(**kwargs)


def test_an_operation_that_changes_the_size_needs_to_fire_always():
    with pytest.raises(ValueError, match="needs p=1"):
        StructuredViews({"crop": [K.RandomResizedCrop((8, 8), p=0.5)]}, seed=0)(images(16))


def test_operations_that_draw_nothing_may_be_the_same_on_the_batch():
    views = StructuredViews({"flip": [K.RandomHorizontalFlip()]}, then=[K.Resize((9, 9)), K.CenterCrop(7)], seed=0)
    assert views(images()).views.shape[-2:] == (7, 7)


def test_the_callers_operations_are_not_altered():
    flip = K.RandomHorizontalFlip()
    before = dict(flip.__dict__)
    StructuredViews({"flip": [flip, flip]}, seed=0)(images())
    assert flip.__dict__ == before


@pytest.mark.parametrize("given", [None, 3, "color"])
def test_cross_image_is_a_sequence_of_names(given):
    with pytest.raises(TypeError, match="cross_image: expected a sequence of group names"):
        StructuredViews({"color": [K.ColorJitter(0.5, p=1.0)]}, cross_image=given)


def test_cross_image_may_be_an_iterator():
    views = StructuredViews({"color": [K.ColorJitter(0.5, p=1.0)]}, cross_image=(n for n in ["color"]), seed=0)
    assert views.cross_image == ("color",)
