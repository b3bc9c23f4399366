"""The fast path: equal to the operations one by one, to loops from definitions, and to torchvision on PIL images."""

import colorsys
import math
import pickle

import kornia.augmentation as K
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssd_addon import StructuredViews
from ssd_addon.augment.fast import blur, geometry
from ssd_addon.kernels import colors as chain
from ssd_addon.kernels.colors import BLEND, HUE, NOTHING, SATURATE, SOLARIZE, Chain
from ssd_addon.recipes import presets

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
COLORS = {
    "jitter": lambda p: K.ColorJitter(0.4, 0.4, 0.4, 0.5, p=p),
    "strong jitter": lambda p: K.ColorJitter(1.0, 1.0, 1.0, 0.1, p=p),
    "jitter in one order": lambda p: K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=p, order=(3, 1)),
    "jitter of hue": lambda p: K.ColorJitter(0.0, 0.0, 0.0, 0.3, p=p),
    "jiggle": lambda p: K.ColorJiggle(0.4, 0.4, 0.4, 0.3, p=p),
    "brightness": lambda p: K.RandomBrightness((0.5, 1.5), p=p),
    "contrast": lambda p: K.RandomContrast((0.5, 1.5), p=p),
    "saturation": lambda p: K.RandomSaturation((0.2, 3.0), p=p),
    "hue": lambda p: K.RandomHue((-0.5, 0.5), p=p),
    "grayscale": lambda p: K.RandomGrayscale(p=p),
    "invert": lambda p: K.RandomInvert(p=p),
    "solarize": lambda p: K.RandomSolarize(0.2, 0.3, p=p),
    "brightness, unclipped": lambda p: K.RandomBrightness((0.5, 1.5), clip_output=False, p=p),
    "grayscale of its own weights": lambda p: K.RandomGrayscale(torch.tensor([0.5, 0.2, 0.3]), p=p),
}
OTHERS = {
    "blur": lambda p: K.RandomGaussianBlur((3, 5), (0.1, 2.0), p=p),
    "wide blur": lambda p: K.RandomGaussianBlur((5, 5), (1.0, 9.0), p=p, border_type="replicate"),
    "flip": lambda p: K.RandomHorizontalFlip(p=p),
    "upside down": lambda p: K.RandomVerticalFlip(p=p),
    "rotation": lambda p: K.RandomRotation(30.0, p=p),
    "gamma": lambda p: K.RandomGamma((0.5, 2.0), p=p),
    "noise": lambda p: K.RandomErasing(p=p),
}
ANY_CHANNELS = {"contrast", "brightness", "brightness, unclipped", "invert", "solarize", *OTHERS}
ALL = COLORS | OTHERS


def compared(groups, x, **options):
    """The largest difference of fast and slow views; replays are equal to the last bit."""
    fast, slow = (StructuredViews(groups, seed=3, fast=f, **options) for f in (True, False))
    a, b = fast(x), slow(x)
    assert a.views.dtype == torch.float32 and a.views.shape == b.views.shape
    sources = [x] * len(a) if a.image_ids is None else [x[ids] for ids in a.image_ids]
    for v, p in enumerate(a.parameters):
        assert torch.equal(fast.replay(sources[v], p), a[v])
    return (a.views - b.views).abs().max().item()


# ---- against the operations one by one


@pytest.mark.parametrize("p", [0.6, 1.0])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_an_operation(name, p, kind):
    x = torch.rand(21, 3, 17, 19, generator=torch.Generator().manual_seed(0))
    x = (255 * x).byte() if kind == "uint8" else x
    flip = K.RandomHorizontalFlip()  # a group needs something that is drawn
    assert compared({"g": [ALL[name](p), flip]}, x) < 0.1 / 255


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    names=st.lists(st.sampled_from(sorted(ALL)), min_size=1, max_size=5),
    p=st.sampled_from([0.3, 0.8, 1.0]),
    size=st.tuples(st.integers(7, 33), st.integers(7, 33)),
    channels=st.sampled_from([1, 3, 4, 12]),
    b=st.integers(2, 9),
    byte=st.booleans(),
    plan=st.sampled_from(["shared_query", "interleaved"]),
    crossed=st.booleans(),
    keyed=st.booleans(),
    normalized=st.booleans(),
)
def test_any_operations_in_any_order(names, p, size, channels, b, byte, plan, crossed, keyed, normalized):
    names = [n for n in names if channels == 3 or n in ANY_CHANNELS]
    x = torch.rand(b, channels, *size, generator=torch.Generator().manual_seed(b))
    x = (255 * x).byte() if byte else x
    flip = K.RandomHorizontalFlip()
    groups = {"a": [*(ALL[n](p) for n in names[::2]), flip], "b": [flip, *(ALL[n](p) for n in names[1::2])]}
    options = {"plan": plan}
    if keyed:
        options["key_groups"] = {"a": [K.RandomSolarize(0.1, 0.1, p=0.5), flip]}
        options["key_then"] = [K.RandomGaussianBlur((3, 3), (0.5, 1.0), p=0.5)]
    if crossed and (plan == "shared_query" or b >= 6):
        options["cross_image"] = ("b",)
    if normalized:
        mean = [0.5] * channels
        options["then"] = [K.RandomSolarize(0.1, 0.1, p=0.5), K.Normalize(mean, [0.25] * channels)]
    try:
        difference = compared(groups, x, **options)
    except ValueError as error:  # an order that is refused, such as solarizing behind unclipped brightness
        assert "clamps values outside" in str(error)
        return
    assert difference < (8 if normalized else 2) / 255


@pytest.mark.parametrize(
    "operation", [K.ColorJitter(0.4, 0.4, 0.4, 0.1), K.RandomHue((-0.1, 0.1)), K.ColorJiggle(hue=0.2)]
)
@pytest.mark.parametrize("channels", [1, 4, 12])
def test_operations_on_colors_name_themselves_for_other_than_three_channels(operation, channels):
    views = StructuredViews({"color": [operation]}, seed=0)
    with pytest.raises(ValueError, match=rf"color: 0\.{type(operation).__name__} .*{channels}"):
        for _ in range(3):
            views(torch.rand(4, channels, 9, 9))


@pytest.mark.parametrize("first", ["clamps", "does not"])
def test_pixels_outside_the_range_are_clamped_where_kornia_clamps_them(first):
    """Behind an operation that leaves [0, 1] a little, or by nature."""
    sharpened = K.RandomSharpness((1.0, 3.0), p=1.0) if first == "clamps" else K.RandomGaussianNoise(0.0, 0.02, p=1.0)
    x = torch.rand(9, 3, 12, 13).round()
    for name in ("grayscale", "invert"):
        assert compared({"g": [sharpened, COLORS[name](0.5)]}, x) < 1e-5
    if first == "clamps":
        assert compared({"g": [sharpened, COLORS["jitter"](0.5)]}, x) < 0.1 / 255


class OneColumn:
    """Takes few pixels out of [0, 1], so few that an order with a clamping operation behind it is accepted."""

    def draw(self, shape, generator):
        return {"gain": 0.5 + torch.rand(shape[0], generator=generator)}

    def apply(self, x, parameters):
        y = x.clone()
        y[..., 0] += parameters["gain"].view(-1, 1, 1)
        return y


@pytest.mark.parametrize("name", ["jitter", "jiggle", "hue", "saturation", "contrast", "solarize"])
def test_few_pixels_outside_the_range_are_clamped_before_an_operation(name):
    assert compared({"g": [OneColumn(), COLORS[name](0.6)]}, torch.rand(15, 3, 12, 13)) < 0.1 / 255


@pytest.mark.parametrize("preset", ["color_spatial", "appearance_spatial", "content_only"])
@pytest.mark.parametrize("plan", ["shared_query", "interleaved"])
def test_sharing_is_exact_and_replays_are_equal(preset, plan):
    if preset == "content_only" and plan == "interleaved":
        return
    x = (255 * torch.rand(23, 3, 40, 37)).byte()
    views = StructuredViews(**presets(preset, size=24), plan=plan, constrained_crop=None, seed=2)
    for _ in range(2):
        batch = views(x)
        for v, p in enumerate(batch.parameters):
            assert torch.equal(views.replay(x, p), batch[v])
    # The same parameters make the same pixels, whatever is beside them.
    p = batch.parameters[1]
    some = type(p)({s: {k: {n: t[4:9] for n, t in d.items()} for k, d in ops.items()} for s, ops in p.items()},
                   from_key={s: t[4:9] for s, t in p.from_key.items()})  # fmt: skip
    assert torch.equal(views.replay(x[4:9], some), batch[1][4:9])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    before = torch.get_num_threads()
    x = (255 * torch.rand(64, 3, 80, 80)).byte()
    views = StructuredViews(**presets("color_spatial", size=80), seed=2)
    want = views(x)
    try:
        torch.set_num_threads(threads)
        again = pickle.loads(pickle.dumps(StructuredViews(**presets("color_spatial", size=80), seed=2)))
        assert torch.equal(again(x).views, want.views)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_box_outside_the_image_is_refused_by_name():
    """It would be cut off in silence, and resized from what is left."""
    views = StructuredViews({"g": [K.RandomResizedCrop((16, 16)), K.ColorJitter(0.4)]}, seed=0)
    batch = views(torch.rand(4, 3, 20, 20))
    with pytest.raises(ValueError, match=r"g: 0\.RandomResizedCrop .*boxes inside the images, 10 x 10 pixels"):
        views.replay(torch.rand(4, 3, 10, 10), batch.parameters[0])
    cropped = StructuredViews({"g": [K.RandomCrop((20, 20))]}, seed=0)
    for size in ((9, 9), (30, 9), (9, 30)):
        with pytest.raises(ValueError, match=r"g: 0\.RandomCrop "):
            cropped(torch.rand(4, 3, *size))


def test_what_is_done_at_once_can_be_read():
    views = StructuredViews(
        {
            "spatial": [K.RandomResizedCrop((8, 8)), K.RandomHorizontalFlip()],
            "color": [K.ColorJitter(0.4), K.RandomGamma()],
        },
        then=[K.RandomGaussianBlur((3, 3), (0.1, 2.0)), K.Normalize(MEAN, STD)],
        key_then=[K.Normalize(MEAN, STD)],
        seed=0,
    )
    assert views.plan_of_work().splitlines() == [
        "query: geometry: spatial/0.RandomResizedCrop, spatial/1.RandomHorizontalFlip; colors: color/0.ColorJitter; "
        "as it is: color/1.RandomGamma; blur: then/0.RandomGaussianBlur; colors: then/1.Normalize",
        "keys: geometry: spatial/0.RandomResizedCrop, spatial/1.RandomHorizontalFlip; colors: color/0.ColorJitter; "
        "as it is: color/1.RandomGamma; colors: then/0.Normalize",
    ]
    assert "as it is: color/0.ColorJitter" in views.plan_of_work(12)
    assert "fast=False" in StructuredViews({"g": [K.RandomGamma((0.5, 2.0))]}, fast=False).plan_of_work()


class Jitter(K.ColorJitter):
    def apply_transform(self, x, *args, **more):
        return 1 - super().apply_transform(x, *args, **more)


def test_a_subclass_runs_as_it_is():
    assert compared({"g": [Jitter(0.4, 0.4, 0.4, 0.1)]}, torch.rand(9, 3, 8, 8)) == 0


# ---- against torchvision on PIL images


def pictures(n, h, w):
    """Smooth pictures with edges, uint8 [n, 3, h, w]."""
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(n, 3, 7, 7, generator=g), (h, w), mode="bicubic").clamp(0, 1)
    x[:, :, h // 3 : h // 2] = 1 - x[:, :, h // 3 : h // 2]
    return (255 * x).byte()


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 64), (17, 23), (96, 40)])
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_a_crop_is_torchvisions_on_pil(how, size, kind):
    x = pictures(12, 50, 61)
    crop = K.RandomResizedCrop(size, scale=(0.08, 1.0), resample=how)
    views = StructuredViews({"g": [crop, K.RandomHorizontalFlip(), K.RandomVerticalFlip(p=0.3)]}, seed=0)
    batch = views(x if kind == "uint8" else x / 255)
    for view, p in zip(batch, batch.parameters, strict=True):
        mine = 255 * view
        drawn = p["g"]
        for i in range(len(x)):
            (left, top), _, (right, bottom), _ = drawn["0.RandomResizedCrop"]["src"][i].int().tolist()
            picture = Image.fromarray(x[i].permute(1, 2, 0).numpy())
            mode = TF.InterpolationMode.BICUBIC if how == "bicubic" else TF.InterpolationMode.BILINEAR
            picture = TF.resized_crop(picture, top, left, bottom - top + 1, right - left + 1, list(size), mode)
            if drawn["1.RandomHorizontalFlip"]["batch_prob"][i]:
                picture = TF.hflip(picture)
            if drawn["2.RandomVerticalFlip"]["batch_prob"][i]:
                picture = TF.vflip(picture)
            want = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
            most = 1 if how == "bilinear" else 4  # PIL rounds and cuts off between the axes
            assert (mine[i] - want).abs().max() < most + (0.01 if kind == "uint8" else 0.6)
            assert (mine[i] - want).abs().mean() < 0.4


def test_colors_are_torchvisions_on_pil():
    """PIL rounds after every operation, and in HSV to 256 hues: 3 of 255 levels on the mean of an image at most."""
    x = pictures(16, 40, 40)
    views = StructuredViews({"g": [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.3)]}, seed=0)
    batch = views(x)
    for view, p in zip(batch, batch.parameters, strict=True):
        jitter, gray = p["g"]["0.ColorJitter"], p["g"]["1.RandomGrayscale"]
        for i in range(len(x)):
            picture = Image.fromarray(x[i].permute(1, 2, 0).numpy())
            steps = [
                (TF.adjust_brightness, "brightness"), (TF.adjust_contrast, "contrast"),
                (TF.adjust_saturation, "saturation"), (TF.adjust_hue, "hue"),
            ]  # fmt: skip
            for sub in jitter["order"][i].tolist() if jitter["batch_prob"][i] else []:
                adjust, name = steps[sub]
                picture = adjust(picture, float(jitter[f"{name}_factor"][i]))
            if gray["batch_prob"][i]:
                picture = TF.rgb_to_grayscale(picture, 3)
            want = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
            assert (255 * view[i] - want).abs().mean() < 3


# ---- against loops from the definitions


def one_pixel(code, rgb, a, b, c, d, mean):
    grey = sum(w * v for w, v in zip(chain.GREY, rgb, strict=True))
    if code == BLEND:
        return [min(1.0, max(0.0, a * v + b * grey + c * mean + d)) for v in rgb]
    if code == HUE:
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        return list(colorsys.hsv_to_rgb((h + a / 6) % 1, s, v))
    if code == SATURATE:
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        return list(colorsys.hsv_to_rgb(h, min(1.0, s * a), v))
    if code == SOLARIZE:
        shifted = [min(1.0, max(0.0, v + b)) for v in rgb]
        return [v if v < a else 1 - v for v in shifted]
    return rgb


def test_the_table_against_a_loop_over_pixels():
    """Every instruction, mixed over the images so that each is run both where it lies and gathered."""
    g = torch.Generator().manual_seed(0)
    n, k, h, w = 40, 3, 5, 7
    x = torch.rand(n, 3, h, w, generator=g, dtype=torch.float64)
    x[0] = 0.5  # grey
    x[1, :, 0] = torch.eye(3, dtype=torch.float64).repeat(1, 3)[:, :7]  # pure colors
    codes = torch.randint(0, 5, (n, k), generator=g)
    numbers = torch.rand(n, k, 4, generator=g)
    numbers[codes == HUE] = numbers[codes == HUE] * 6 - 3
    numbers[codes == BLEND] *= torch.tensor([1.5, 1.0, 0.7, -0.5])
    numbers[::2, :, 1:] *= (codes[::2] != BLEND)[..., None]  # blends without grey
    want = x.clone()
    for i in range(n):
        for j in range(k):
            grey = sum(wt * want[i, ch] for ch, wt in enumerate(chain.GREY)).mean().item()
            for y in range(h):
                for z in range(w):
                    args = (int(codes[i, j]), want[i, :, y, z].tolist(), *numbers[i, j].tolist(), grey)
                    want[i, :, y, z] = torch.tensor(one_pixel(*args), dtype=torch.float64)
    got = chain.run(Chain(codes, numbers), x.float())
    close = ((got.double() - want).abs() < 2e-5).double().mean()
    assert close > 0.995  # but at the threshold of a solarization
    assert torch.equal(got[(codes == NOTHING).all(1)], x.float()[(codes == NOTHING).all(1)])


def test_images_with_alike_instructions_lie_together():
    codes = torch.tensor([[HUE, BLEND], [NOTHING, NOTHING], [BLEND, HUE], [HUE, BLEND], [BLEND, BLEND]])
    numbers = torch.zeros(5, 2, 4)
    numbers[4, 0, 1] = 1
    order = Chain(codes, numbers).alike().tolist()
    assert sorted(order) == list(range(5)) and abs(order.index(0) - order.index(3)) == 1


def test_a_blur_against_a_loop():
    x = torch.rand(3, 2, 9, 8, dtype=torch.float64)
    sigma = torch.tensor([0.4, 1.1, 3.0])
    out = x.float()
    blur.blur(out, torch.tensor([0, 2]), sigma[[0, 2]], (5, 7), "reflect")
    for i, s in enumerate(sigma.tolist()):
        if i == 1:
            assert torch.equal(out[1], x[1].float())
            continue
        for y in range(9):
            for z in range(8):
                total, norm = torch.zeros(2, dtype=torch.float64), 0.0
                for dy in range(-2, 3):
                    for dz in range(-3, 4):
                        r, q = abs(y + dy), abs(z + dz)
                        r, q = 16 - r if r > 8 else r, 14 - q if q > 7 else q
                        weight = math.exp(-(dy * dy + dz * dz) / (2 * s * s))
                        total, norm = total + weight * x[i, :, r, q], norm + weight
                assert (out[i, :, y, z].double() - total / norm).abs().max() < blur.TAIL


def test_resampling_matrices_are_torchvisions_antialiased_resize():
    """What other devices than the CPU use."""
    x = torch.rand(6, 3, 40, 51, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[0, 0, 40, 51], [3, 5, 30, 9], [10, 0, 7, 51], [39, 50, 1, 1], [1, 2, 24, 24], [2, 2, 33, 20]])
    mirrored = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [0, 0], [1, 1]]).bool()
    for how in ("bilinear", "bicubic"):
        place = geometry.Placement(box, mirrored, (24, 24), how)
        a, b = (f(place, x, torch.arange(6)) for f in (geometry.pixels, geometry._by_matrices))
        assert (a - b).abs().max() < 2e-6
    place = geometry.Placement(box[4:5].repeat(6, 1), mirrored, (24, 24), None)
    assert (
        geometry.pixels(place, x, torch.arange(6)) - geometry._by_matrices(place, x, torch.arange(6))
    ).abs().max() < 1e-6
