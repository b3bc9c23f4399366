"""Every Kornia 2-D operation: shared exactly, redrawn, interleaved, in one pass, view by view; or refused by name."""

import inspect
import random

import kornia.augmentation as K
import numpy as np
import pytest
import torch

from ssd_addon import StructuredViews
from ssd_addon.operations import KorniaOperation, Operation

HALF = torch.full((3,), 0.5)
ARGUMENTS = {
    "CenterCrop": ((24, 24),),
    "ColorJiggle": (0.4, 0.4, 0.4, 0.1),
    "ColorJitter": (0.4, 0.4, 0.4, 0.1),
    "Denormalize": (HALF, HALF),
    "LongestMaxSize": (24,),
    "Normalize": (HALF, HALF),
    "PadTo": ((40, 40),),
    "RandomAffine": (30.0,),
    "RandomCrop": ((20, 20),),
    "RandomElasticTransform": ((9, 9), (4.0, 4.0)),
    "RandomFisheye": (torch.tensor([-0.3, 0.3]), torch.tensor([-0.3, 0.3]), torch.tensor([0.9, 1.0])),
    "RandomGaussianBlur": ((3, 3), (0.1, 2.0)),
    "RandomHue": ((-0.1, 0.1),),
    "RandomMedianBlur": ((3, 3),),
    "RandomMotionBlur": (3, 35.0, 0.5),
    "RandomPosterize": (3,),
    "RandomResizedCrop": ((20, 20),),
    "RandomRotation": (30.0,),
    "RandomRotation90": ((1, 3),),
    "RandomShear": (10.0,),
    "RandomTranslate": ((0.1, 0.3), (0.1, 0.3)),
    "Resize": ((20, 20),),
    "SmallestMaxSize": (20,),
}
OPTIONS = {
    "RandomBrightness": {"brightness": (0.5, 1.5)},
    "RandomContrast": {"contrast": (0.5, 1.5)},
    "RandomGamma": {"gamma": (0.5, 1.5)},
    "RandomRain": {"number_of_drops": (5, 9), "drop_height": (2, 4), "drop_width": (-2, 2)},
    "RandomSaturation": {"saturation": (0.5, 1.5)},
    "RandomSnow": {"snow_coefficient": (0.2, 0.8), "brightness": (1.0, 4.0)},
}
KINDS = {
    name: kind
    for name, kind in vars(K).items()
    if inspect.isclass(kind) and issubclass(kind, K.AugmentationBase2D) and not name.endswith("Base2D")
}
NOTHING_DRAWN = {"CenterCrop", "Denormalize", "LongestMaxSize", "Normalize", "PadTo", "Resize", "SmallestMaxSize"}
NOTHING_BUT_A_GATE = {
    "RandomAutoContrast", "RandomBoxBlur", "RandomClahe", "RandomEqualize", "RandomGrayscale", "RandomHorizontalFlip",
    "RandomInvert", "RandomMedianBlur", "RandomVerticalFlip",
}  # fmt: skip
CHANGES_SIZE = {"RandomCrop", "RandomResizedCrop"}
ONE_GATE = NOTHING_DRAWN - {"PadTo"}


def make(name, p):
    options = dict(OPTIONS.get(name, {}))
    if "p" in inspect.signature(KINDS[name]).parameters:
        options["p"] = p
    try:
        return KINDS[name](*ARGUMENTS.get(name, ()), **options)
    except ImportError as error:
        pytest.skip(f"{name} needs a package of its own: {error}")


def images(b=6, seed=0):
    return 0.25 + 0.5 * torch.rand(b, 3, 24, 28, generator=torch.Generator().manual_seed(seed))


def refusal(name, p):
    """What the error says, where the operation alone makes no style."""
    if name == "RandomRain":
        return r"0\.RandomRain draws parameters of another size every time"
    if p < 1 and name in CHANGES_SIZE:
        return rf"0\.{name} .*returns .* where it fires .* needs p=1"
    if p < 1 and name in ONE_GATE:
        return rf"{name}\(p=0\.5\) fires on all images of a batch or on none; expected p=1"
    if name in NOTHING_DRAWN or (p == 1 and name in NOTHING_BUT_A_GATE):
        return rf"group 'g': expected an operation that draws something .* got 0\.{name}"
    return None


@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_operation_is_shared_exactly_or_refused_by_name(name, p):
    op = make(name, p)
    expected = refusal(name, p)
    if expected is not None:
        with pytest.raises(ValueError, match=expected):
            StructuredViews({"g": [op]}, seed=0)(images())
        return
    x, before = images(), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    for plan in ("shared_query", "interleaved"):
        views, slow = (StructuredViews({"g": [op]}, plan=plan, seed=5, fast=fast) for fast in (True, False))
        differs = False
        for _ in range(3):
            batch = views(x)
            rows = batch.plan.pairs(len(x), batch.space_index)
            a, b, mine = rows["g"]
            for key, values in batch.parameters[a]["g"].items():
                for k, t in values.items():
                    assert torch.equal(t[mine], batch.parameters[b]["g"][key][k][mine])
            # Other images beside them may change the last bit of a convolution's sums.
            torch.testing.assert_close(batch[a][mine], batch[b][mine], rtol=0, atol=1e-6)
            assert plan == "interleaved" or torch.equal(batch[a], batch[b])
            a, b, mine = rows["content"]
            differs |= not torch.equal(batch[a][mine], batch[b][mine])
            for v in range(len(batch)):
                assert torch.equal(views.replay(x, batch.parameters[v]), batch[v])
            one_by_one = torch.stack([slow.replay(x, p) for p in batch.parameters])
            together = torch.stack(slow._in_one_pass([x] * len(batch), batch.parameters))
            torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)
            if name != "RandomResizedCrop":  # which the fast path resamples with antialiasing
                torch.testing.assert_close(batch.views, one_by_one, rtol=0, atol=0.5 / 255)
        assert differs  # what is not shared is drawn anew
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1])
    assert torch.equal(before[0], after[0]) and before[1] == after[1] and (before[2] == after[2]).all()


@pytest.mark.parametrize("name", sorted(set(KINDS) - NOTHING_DRAWN - {"RandomRain", "RandomDissolving"}))
def test_an_image_is_made_of_itself_and_its_row_of_parameters(name):
    """The oracle: Kornia's own operation on one image at a time."""
    op, x = make(name, 1.0), images()
    wrapped = KorniaOperation(op, "g")
    views = StructuredViews({"g": [op], "h": [K.RandomHorizontalFlip()]}, seed=1) if not refusal(name, 1.0) else None
    wrapped.one_by_one = views is not None and views.stages["g"].query[0].operation.one_by_one
    drawn = wrapped.draw(tuple(x.shape), torch.Generator().manual_seed(0))
    y = wrapped.apply(x, drawn)
    for i in range(len(x)):
        row = {k: t[i : i + 1].clone() for k, t in drawn.items()}
        if "order" in row:
            row["order"] = row["order"][0]
        single = op(x[i : i + 1], params=row)
        torch.testing.assert_close(y[i : i + 1], single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_a_channel_is_dropped_of_each_image_that_fires_in_every_view(p):
    """Its parameters name places in the batch, so it is drawn and applied image by image."""
    x = images(8)
    for seed in range(10):
        views = StructuredViews({"g": [K.RandomChannelDropout(p=p)]}, seed=seed)
        batch = views(x)
        fires = torch.stack([q["g"]["0.RandomChannelDropout"]["batch_prob"] > 0.5 for q in batch.parameters])
        for all_views in (batch.views, torch.stack(views._in_one_pass([x] * 3, batch.parameters))):
            assert torch.equal((all_views.amax((3, 4)) == 0).sum(2), fires.long())


# ---- draws that no parameters hold


class FromNumpy(K.IntensityAugmentationBase2D):
    def apply_transform(self, x, *_, **__):
        return x * float(np.random.rand())


class FromPython(K.IntensityAugmentationBase2D):
    def apply_transform(self, x, *_, **__):
        return x * random.random()


class FromTorch(K.IntensityAugmentationBase2D):
    def apply_transform(self, x, *_, **__):
        return x * torch.rand(1)


class FromItsOwn(K.IntensityAugmentationBase2D):
    generator = np.random.default_rng(0)

    def apply_transform(self, x, *_, **__):
        return x * float(self.generator.random())


class Later(K.IntensityAugmentationBase2D):
    calls, after = 0, 1

    def apply_transform(self, x, *_, **__):
        type(self).calls += 1
        return x * torch.rand(1) if self.calls > self.after else x


@pytest.mark.parametrize(
    "kind,whose", [(FromNumpy, "numpy's"), (FromPython, "Python's"), (FromTorch, "torch's"), (FromItsOwn, "its own")]
)
def test_an_operation_that_draws_while_it_is_applied_is_refused(kind, whose):
    state = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"0\.{kind.__name__} draws random numbers .*from {whose} generator"):
        StructuredViews({"g": [kind(p=1.0)]}, seed=0)
    assert (state[0] == np.random.get_state()[1]).all() and state[1] == random.getstate()
    assert torch.equal(state[2], torch.get_rng_state())


@pytest.mark.parametrize("after", [1, 30])
def test_an_operation_that_begins_to_draw_later_is_refused_then(after):
    Later.calls, Later.after = 0, after
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"0\.Later draws random numbers while it is applied"):
        views = StructuredViews({"g": [Later(p=0.9)]}, seed=0)
        for _ in range(20):
            views(images())
    assert torch.equal(state, torch.get_rng_state())


class OfTheBatch(K.IntensityAugmentationBase2D):
    def apply_transform(self, x, *_, **__):
        return x / x.mean() * 0.5 if len(x) > 1 else x * 0.5


def test_an_operation_that_mixes_images_is_run_image_by_image():
    x = images()
    batch = StructuredViews({"g": [OfTheBatch(p=0.5)]}, seed=0)(x)
    fires = batch.parameters[0]["g"]["0.OfTheBatch"]["batch_prob"] > 0.5
    assert torch.equal(batch[0], torch.where(fires[:, None, None, None], x * 0.5, x))


# ---- operations of one's own


class Gain:
    """The protocol: two functions."""

    def draw(self, shape, generator):
        return {"gain": 0.5 + 0.5 * torch.rand(shape[0], generator=generator)}

    def apply(self, x, parameters):
        return x * parameters["gain"].view(-1, *[1] * (x.ndim - 1)).to(x.device)


class BatchGain(Gain):
    def draw(self, shape, generator):
        return {"gain": torch.rand(1, generator=generator)}


class GrowingGain(Gain):
    def draw(self, shape, generator):
        return super().draw(shape, generator) | {
            "noise": torch.rand(shape[0], int(torch.randint(1, 9, (), generator=generator)), generator=generator)
        }


class InPlaceGain(Gain):
    def apply(self, x, parameters):
        return x.mul_(parameters["gain"].view(-1, 1, 1, 1))


class NeighborGain(Gain):
    def apply(self, x, parameters):
        return x * parameters["gain"].mean()


class Nothing(Gain):
    def draw(self, shape, generator):
        return {"gain": torch.ones(shape[0])}


class Unused(Gain):
    def apply(self, x, parameters):
        return x.clone()


class NoDict(Gain):
    def draw(self, shape, generator):
        return None


class GlobalGain(Gain):
    source = staticmethod(torch.rand)

    def draw(self, shape, generator):
        return {"gain": torch.as_tensor(self.source(shape[0]), dtype=torch.float32)}


class NumpyGain(GlobalGain):
    source = staticmethod(np.random.rand)


class PythonGain(GlobalGain):
    source = staticmethod(lambda n: [random.random() for _ in range(n)])


class OwnGain(GlobalGain):
    source = staticmethod(np.random.default_rng(0).random)


class NoImages(Gain):
    def apply(self, x, parameters):
        return None


class WholeNumbers(Gain):
    def apply(self, x, parameters):
        return (super().apply(x, parameters) * 255).byte()


def test_an_operation_of_ones_own_is_shared_like_kornias():
    assert isinstance(Gain(), Operation)
    x = images()
    views = StructuredViews({"gain": [Gain()], "color": [K.ColorJitter(0.2, p=1.0)]}, seed=0)
    batch = views(x)
    gain = torch.stack([p["gain"]["0.Gain"]["gain"] for p in batch.parameters])
    assert torch.equal(gain[2], gain[0]) and len(gain[[0, 1, 3]].unique()) == 18
    assert torch.equal(views.replay(x, batch.parameters[2]), batch[2])
    assert views.parameter_sizes()["gain/0.Gain/gain"] == 1
    views.apply(lambda module: None)  # nn.Module's, which initializers use


@pytest.mark.parametrize(
    "kind,message",
    [
        (BatchGain, r"0\.BatchGain draws parameters that are not one per image: .*got gain \[1\] for 3 images"),
        (GrowingGain, r"0\.GrowingGain draws parameters of another size every time"),
        (InPlaceGain, r"0\.InPlaceGain changes its input in place"),
        (NeighborGain, r"0\.NeighborGain gives an image a result that depends on the other images of the batch"),
        (Nothing, r"group 'g': expected an operation that draws something for every image: got 0\.Nothing"),
        (Unused, r"group 'g': expected an operation that draws something for every image: got 0\.Unused"),
        (NoDict, r"0\.NoDict draws no parameters: expected a dict name -> tensor \[B, ...\]: got NoneType"),
        (GlobalGain, r"0\.GlobalGain draws its parameters from torch's generator instead of the one passed to `draw`"),
        (NumpyGain, r"0\.NumpyGain draws its parameters from numpy's generator"),
        (PythonGain, r"0\.PythonGain draws its parameters from Python's generator"),
        (OwnGain, r"0\.OwnGain draws its parameters from its own generator"),
        (NoImages, r"0\.NoImages returns no images: expected a tensor of 3 images: got NoneType"),
        (WholeNumbers, r"0\.WholeNumbers returns integer images: expected floating point.* got torch.uint8"),
    ],
)
def test_an_operation_of_ones_own_that_cannot_be_shared_is_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        StructuredViews({"g": [kind()]}, seed=0)


class HalfGain(Gain):
    def apply(self, x, parameters):
        return super().apply(x, parameters).half()


def test_what_an_operation_makes_is_float32_again():
    assert StructuredViews({"g": [HalfGain()]}, seed=0)(images()).views.dtype == torch.float32


class LearnedGain(Gain, torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def apply(self, x, parameters):
        return super().apply(x, parameters) * self.factor


def test_an_operation_that_is_a_module_moves_and_is_saved_with_the_views():
    views = StructuredViews({"g": [LearnedGain()]}, seed=0)
    assert [k for k in views.state_dict() if "factor" in k] and len(list(views.parameters())) == 1


def test_another_thread_that_draws_does_not_stop_the_views():
    """Watching finds that a generator has moved; the same pixels again say that the operation did not do it."""

    class Prefetched(Gain):
        def draw(self, shape, generator):
            if self.busy:
                np.random.rand(), random.random(), torch.rand(1)
            return super().draw(shape, generator)

        def apply(self, x, parameters):
            if self.busy:
                np.random.rand(), random.random(), torch.rand(1)
            return super().apply(x, parameters)

        busy = False

    operation, x = Prefetched(), images()
    views, quiet = (StructuredViews({"g": [operation]}, seed=0) for _ in range(2))
    want = [quiet(x).views for _ in range(6)]
    operation.busy = True
    before = torch.get_rng_state()
    for expected in want:
        assert torch.equal(views(x).views, expected)
    assert not torch.equal(before, torch.get_rng_state())  # the other thread's draws are not taken back


@pytest.mark.parametrize("when", ["draw", "apply"])
def test_an_operation_that_begins_to_draw_after_others_drew_is_refused(when):
    class Turns(Gain):
        turned = False

        def draw(self, shape, generator):
            drawn = super().draw(shape, generator)
            return {"gain": torch.rand(shape[0])} if self.turned and when == "draw" else drawn

        def apply(self, x, parameters):
            return super().apply(x, parameters) * (torch.rand(1) if self.turned and when == "apply" else 1)

    operation = Turns()
    views = StructuredViews({"g": [operation]}, seed=0)
    views(images())
    operation.turned, state = True, torch.get_rng_state()
    with pytest.raises(ValueError, match=r"g: 0\.Turns draws (random numbers while|its parameters from torch's)"):
        views(images())
    assert torch.equal(state, torch.get_rng_state())


class KorniaDraw(K.IntensityAugmentationBase2D):
    def generate_parameters(self, shape):
        draw = {"numpy": np.random.rand, "python": random.random}[self.source]
        return {"factor": torch.tensor([draw() for _ in range(shape[0])], dtype=torch.float32)}

    def apply_transform(self, x, params, *_, **__):
        return x * params["factor"].view(-1, 1, 1, 1)


@pytest.mark.parametrize("source,whose", [("numpy", "numpy's"), ("python", "Python's")])
def test_a_kornia_operation_that_draws_from_elsewhere_is_refused(source, whose):
    op = KorniaDraw(p=1.0)
    op.source = source
    with pytest.raises(ValueError, match=rf"0\.KorniaDraw draws its parameters from {whose} generator"):
        StructuredViews({"g": [op]}, seed=0)


@pytest.mark.parametrize(
    "operation",
    [
        K.ColorJitter(0.0, 0.0, 0.0, 0.0, p=0.8),
        K.ColorJitter(0.0, 0.0, 0.0, 0.0, p=1.0),
        K.RandomAffine(0.0, p=1.0),
        K.RandomRotation((0.0, 0.0), p=0.5),
        K.RandomBrightness((1.0, 1.0), p=0.5),
        K.RandomBrightness((0.5, 0.5), p=1.0),
        K.RandomHorizontalFlip(p=0.0),
    ],
)
def test_a_group_that_changes_no_pixel_is_refused(operation):
    name = type(operation).__name__
    with pytest.raises(ValueError, match=rf"group 'g': expected an operation that draws .* got 0\.{name}, which do"):
        StructuredViews({"g": [operation]}, seed=0)
    StructuredViews({"g": [operation, K.RandomGamma((0.5, 2.0), p=1.0)]}, then=[operation], seed=0)(images())


@pytest.mark.parametrize(
    "operation",
    [
        K.RandomBrightness((0.5, 0.5), p=0.001),
        K.RandomHorizontalFlip(p=0.999),
        K.RandomErasing(p=0.01),
        K.RandomAutoContrast(p=0.5),
        K.RandomCrop((20, 20)),
        K.RandomCrop((24, 28), padding=4, p=0.5),
        K.RandomResizedCrop((24, 28), p=0.5),
    ],
)
def test_a_group_that_changes_some_pixels_of_some_images_is_taken(operation):
    assert StructuredViews({"g": [operation]}, seed=0)(images()).views.isfinite().all()


def test_a_late_trial_refuses_a_group_that_changes_no_pixel():
    class OfFive(Unused):
        def apply(self, x, parameters):
            if x.shape[1] != 5:
                raise ValueError("5 bands")
            return x.clone()

    views = StructuredViews({"g": [OfFive()]}, seed=0)
    with pytest.raises(ValueError, match="group 'g': expected an operation that draws something"):
        views(torch.rand(4, 5, 8, 8))


@pytest.mark.parametrize("operations", [torch.nn.Sequential(K.RandomGamma((0.5, 2.0))), K.RandomGamma((0.5, 2.0))])
def test_what_is_no_sequence_says_what_to_write(operations):
    with pytest.raises(
        TypeError, match=r"expected a sequence of operations: got (Sequential; use list|RandomGamma; use \[)"
    ):
        StructuredViews({"g": operations}, seed=0)


# ---- one type


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_draws_and_pixels_do_not_depend_on_the_default_type(dtype):
    groups = {"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1), K.RandomGaussianBlur((3, 3), (0.1, 2.0))],
              "spatial": [K.RandomResizedCrop((16, 16)), K.RandomRotation(20.0)]}  # fmt: skip
    x = images()
    want = StructuredViews(groups, constrained_crop=None, then=[normalize()], seed=3)(x)
    torch.set_default_dtype(dtype)
    try:
        got = StructuredViews(groups, then=[normalize()], seed=3)(x)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.views, want.views)


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double()])
def test_views_in_a_module_that_is_cast_are_the_same(cast):
    def make():
        groups = {"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1)], "spatial": [K.RandomResizedCrop((16, 16))]}
        return StructuredViews(groups, then=[K.Normalize([0.5] * 3, [0.2] * 3)], seed=3)

    x, parent = images(), torch.nn.ModuleDict({"views": make(), "net": torch.nn.Linear(1, 1)})
    cast(parent)
    assert torch.equal(parent["views"](x).views, make()(x).views) and parent["net"].weight.dtype != torch.float32


@pytest.mark.parametrize("seed", [1.5, "7", 2**63, None])
def test_a_seed_is_a_whole_number(seed):
    groups = {"g": [K.RandomHorizontalFlip()]}
    if seed is None:
        assert isinstance(StructuredViews(groups, seed=np.int64(3)).seed, int)
        return
    with pytest.raises(ValueError, match="seed: expected a whole number of 64 bits"):
        StructuredViews(groups, seed=seed)


def test_a_pixel_a_little_above_one_is_shown_with_its_digits():
    with pytest.raises(ValueError, match=r"values from 0 to 1\.000002"):
        StructuredViews({"g": [K.RandomHorizontalFlip()]}, seed=0)(torch.tensor([0.0, 1.000002]).expand(1, 3, 4, 2))


# ---- the range of pixels


class Sharpened(Gain):
    """Constant images stay in the range."""

    def apply(self, x, parameters):
        blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return x + parameters["gain"].view(-1, 1, 1, 1) * (x - blurred)


def normalize():
    return K.Normalize(HALF, HALF)


@pytest.mark.parametrize(
    "arguments",
    [
        {"groups": {"color": [normalize(), K.ColorJitter(0.4, p=1.0)]}},
        {"groups": {"a": [normalize(), K.RandomHorizontalFlip()], "b": [K.ColorJitter(0.4, p=1.0)]}},
        {"groups": {"a": [normalize(), K.RandomEqualize(p=0.5)]}},
        {"groups": {"a": [K.RandomHorizontalFlip()]}, "then": [normalize(), K.RandomSolarize()]},
        {"groups": {"a": [K.RandomGaussianNoise(std=0.3), K.RandomGamma((0.5, 2.0))]}},
        {
            "groups": {"a": [K.RandomHorizontalFlip()], "b": [K.RandomPosterize(3)]},
            "key_groups": {"a": [normalize(), K.RandomHorizontalFlip()]},
        },
        {"groups": {"a": [K.RandomHorizontalFlip()]}, "key_then": [normalize(), K.ColorJitter(0.4)]},
        {"groups": {"a": [normalize(), K.Denormalize(HALF, HALF / 2), K.ColorJitter(0.4)]}},
        {"groups": {"a": [Sharpened(), K.ColorJitter(0.4)]}},
    ],
)
def test_clamping_behind_an_operation_that_leaves_the_range_is_refused(arguments):
    with pytest.raises(ValueError, match=r"expects pixels in \[0, 1\] and clamps values outside: got it after"):
        StructuredViews(**arguments, seed=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"groups": {"color": [K.ColorJitter(0.4, p=1.0), normalize()], "flip": [K.RandomHorizontalFlip()]}},
        {"groups": {"a": [normalize(), K.RandomAffine(10.0), K.RandomErasing()]}},
        {"groups": {"a": [normalize(), K.Denormalize(HALF, HALF), K.ColorJitter(0.4)]}},
        {"groups": {"a": [K.RandomResizedCrop((16, 16), resample="bicubic"), K.ColorJitter(0.4)]}},
        {"groups": {"a": [K.ColorJitter(0.4)]}, "then": [K.RandomGaussianBlur((3, 3), (0.1, 2.0)), normalize()]},
    ],
)
def test_other_orders_are_taken(arguments):
    assert StructuredViews(**arguments, seed=0)(images()).views.isfinite().all()


def test_an_operation_that_no_trial_image_suits_is_tried_on_the_first_images():
    class OfTwelveBands(Gain):
        def apply(self, x, parameters):
            if x.shape[1] != 12:
                raise ValueError("12 bands are needed")
            return super().apply(x, parameters)

    class LateOfTwelveBands(OfTwelveBands):
        def apply(self, x, parameters):
            return super().apply(x, parameters) * torch.rand(())

    x = torch.rand(5, 12, 8, 8)
    assert StructuredViews({"g": [OfTwelveBands()]}, seed=0)(x).views.shape == (3, 5, 12, 8, 8)
    with pytest.raises(ValueError, match=r"0\.LateOfTwelveBands draws random numbers while it is applied"):
        StructuredViews({"g": [LateOfTwelveBands()]}, seed=0)(x)
    with pytest.raises(ValueError, match=r"g: 0\.OfTwelveBands could not be applied to images .*12 bands"):
        StructuredViews({"g": [OfTwelveBands()]}, seed=0)(images())
