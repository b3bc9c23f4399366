"""Operations of other libraries: torchvision's v2 transforms by their parameters, anything else by seed."""

import inspect
import pickle
import random

import albumentations as A
import kornia.augmentation as K
import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from torchvision.transforms import v2

from ssd_addon import EquivarianceLoss, StructuredViews, operations
from ssd_addon.metrics import parameter_matrix
from ssd_addon.operations import TorchvisionOperation

GROUPS = {
    "RandomResizedCrop": lambda: v2.RandomResizedCrop((16, 18), scale=(0.2, 1.0)),
    "RandomCrop": lambda: v2.RandomCrop((16, 18)),
    "RandomHorizontalFlip": lambda: v2.RandomHorizontalFlip(0.5),
    "RandomVerticalFlip": lambda: v2.RandomVerticalFlip(0.5),
    "ColorJitter": lambda: v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
    "ColorJitter of contrast": lambda: v2.ColorJitter(contrast=0.4),
    "RandomGrayscale": lambda: v2.RandomGrayscale(0.5),
    "RandomAffine": lambda: v2.RandomAffine(30.0, (0.1, 0.2), (0.8, 1.2), 10.0),
    "RandomRotation": lambda: v2.RandomRotation(30.0),
    "RandomPerspective": lambda: v2.RandomPerspective(0.4, p=0.7),
    "RandomErasing": lambda: v2.RandomErasing(0.7),
    "RandomSolarize": lambda: v2.RandomSolarize(0.5, p=0.5),
    "RandomInvert": lambda: v2.RandomInvert(0.5),
    "RandomAdjustSharpness": lambda: v2.RandomAdjustSharpness(2.0, 0.5),
    "RandomAutocontrast": lambda: v2.RandomAutocontrast(0.5),
    "RandomEqualize": lambda: v2.RandomEqualize(0.5),
    "GaussianBlur": lambda: v2.GaussianBlur(5, (0.1, 2.0)),
    "ElasticTransform": lambda: v2.ElasticTransform(20.0),
    "RandomPhotometricDistort": lambda: v2.RandomPhotometricDistort(p=0.7),
    "RandomChannelPermutation": lambda: v2.RandomChannelPermutation(),
    "RandomApply of blur": lambda: v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], p=0.5),
    "RandomApply of several": lambda: v2.RandomApply([v2.ColorJitter(0.4), v2.RandomGrayscale(0.5)], p=0.6),
}


def images(b=7, seed=0, c=3):
    return 0.2 + 0.6 * torch.rand(b, c, 24, 28, generator=torch.Generator().manual_seed(seed))


def check(make, x, plan):
    """Exact sharing, fresh draws elsewhere, replay; the global generators stay where they were."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    views = StructuredViews({"g": [make()], "flip": [K.RandomHorizontalFlip()]}, plan=plan, seed=5)
    differs = False
    for _ in range(3):
        batch = views(x)
        a, b, mine = batch.plan.pairs(len(x), batch.space_index)["g"]
        for key, values in batch.parameters[a]["g"].items():
            for k, t in values.items():
                assert torch.equal(t[mine].nan_to_num(9), batch.parameters[b]["g"][key][k][mine].nan_to_num(9))
                assert len(t) == len(x)
        alone = StructuredViews({"g": [make()]}, seed=0)
        for v, p in enumerate(batch.parameters):
            assert torch.equal(views.replay(x, p), batch[v])
        a, b, mine = batch.plan.pairs(len(x), batch.space_index)["content"]
        one, two = (alone.replay(x, {"g": batch.parameters[v]["g"], "then": {}}) for v in (a, b))
        differs |= not torch.equal(one[mine], two[mine])
    assert differs
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("plan", ["shared_query", "interleaved"])
@pytest.mark.parametrize("name", GROUPS)
def test_torchvisions_transforms_are_shared_exactly(name, plan):
    check(GROUPS[name], images(), plan)


@pytest.mark.parametrize("name", GROUPS)
def test_an_image_is_what_torchvision_makes_of_it(name):
    """The oracle: torchvision's own forward on one image, from the same state of the global generator."""
    op = GROUPS[name]()
    leaves = list(op.transforms) if isinstance(op, v2.RandomApply) else [op]
    x, made = images(1), TorchvisionOperation(op, "g")
    for seed in range(5):
        drawn = made.draw(tuple(x.shape), torch.Generator().manual_seed(seed))
        drawn = {k: torch.ones_like(t) if k.endswith("batch_prob") else t for k, t in drawn.items()}
        torch.manual_seed(seed)
        torch.rand(1 + len(leaves))  # the gates
        want = x[0]
        old = not hasattr(op, "make_params")  # torchvision before 0.21 has the same two functions, underscored
        params = [leaf._get_params([want]) if old else leaf.make_params([want]) for leaf in leaves]
        for leaf, p in zip(leaves, params, strict=True):
            want = leaf._transform(want, p) if old else leaf.transform(want, p)
        torch.testing.assert_close(made.apply(x, drawn)[0], want, rtol=0, atol=2e-4)


def test_parameters_have_torchvisions_names_and_are_predicted():
    groups = {
        "color": [v2.ColorJitter(0.4, 0.4, 0.4, 0.1)],
        "spatial": [v2.RandomResizedCrop(16), v2.RandomHorizontalFlip()],
    }
    views = StructuredViews(groups, then=[v2.Normalize([0.5] * 3, [0.5] * 3)], seed=0)
    batch = views(images())
    assert batch.parameters[0]["color"]["0.ColorJitter"]["hue_factor"].shape == (7,)
    assert batch.parameters[0]["spatial"]["0.RandomResizedCrop"]["height"].dtype == torch.int64
    sizes = views.parameter_sizes()
    assert sizes["color/0.ColorJitter/brightness_factor"] == 1 and "spatial/1.RandomHorizontalFlip/batch_prob" in sizes
    assert not any("fn_idx" in path for path in sizes)
    EquivarianceLoss({"content": 4, "color": 3, "spatial": 2}, views)
    assert (views.plain(images()) - (images() - 0.5) / 0.5).abs().max() < 1e-6
    assert pickle.loads(pickle.dumps(views)).parameter_sizes() == sizes


def test_what_lies_in_one_random_apply_fires_together():
    op = v2.RandomApply([v2.ColorJitter(0.4), v2.GaussianBlur(3)], p=0.5)
    drawn = TorchvisionOperation(op, "g").draw((64, 3, 8, 8), torch.Generator().manual_seed(0))
    gates = [t for k, t in drawn.items() if k.endswith("batch_prob")]
    assert len(gates) == 2 and torch.equal(*gates) and 0 < gates[0].sum() < 64


@pytest.mark.parametrize(
    "op,message",
    [
        (v2.RandAugment(), "RandAugment, which draws while it is applied.*operations.seeded"),
        (v2.AugMix(), "AugMix, which draws while it is applied"),
        (v2.RandomChoice([v2.RandomInvert()]), "RandomChoice, which draws while it is applied"),
        (v2.Compose([v2.RandomInvert()]), "transforms of Compose listed one by one"),
        (v2.RandomApply([torch.nn.Identity()]), "expected it to contain torchvision v2 transforms: got Identity"),
        (v1.ColorJitter(0.4), r"got ColorJitter$"),
        (K.RandomMixUpV2(), "no mixing of images.*got RandomMixUpV2"),
        (v2.ColorJitter, r"got the class ColorJitter; make one: ColorJitter\(...\)"),
        (K.ColorJitter, "got the class ColorJitter"),
        (lambda x: x, "operations.seeded"),
        (7, "got int"),
        (
            v2.RandomErasing(0.7, value="random"),
            r"0\.RandomErasing draws v with another type or shape every time.*seeded",
        ),
    ],
)
def test_what_cannot_be_shared_by_its_parameters_is_refused_by_name(op, message):
    with pytest.raises((TypeError, ValueError), match=message):
        StructuredViews({"g": [op]}, seed=0)


def test_a_size_that_changes_only_where_it_fires_is_refused():
    with pytest.raises(ValueError, match=r"RandomResizedCrop .*where it fires and leaves the other images"):
        StructuredViews({"g": [v2.RandomApply([v2.RandomResizedCrop(9)], p=0.5)]}, seed=0)(images())


# ---- by seed


def by_torch(x):
    return x * (0.5 + 0.5 * torch.rand(1))


def by_numpy(x):
    return x * float(np.random.uniform(0.5, 1))


def by_python(x):
    return (x * random.uniform(0.5, 1)).flip(-1)


def to(dtype):
    return v2.ToDtype(dtype, scale=True)


SEEDED = {
    "torch": lambda: by_torch,
    "numpy": lambda: by_numpy,
    "Python": lambda: by_python,
    "v1": lambda: v1.ColorJitter(0.4, 0.4, 0.4, 0.1),
    "v2 RandAugment": lambda: v2.Compose(
        [v2.ToDtype(torch.uint8, scale=True), v2.RandAugment(), v2.ToDtype(torch.float32, scale=True)]
    ),
    "v1 Compose": lambda: v1.Compose([v1.RandomResizedCrop(12), v1.RandomHorizontalFlip()]),
    "albumentations": lambda: A.Compose([A.RandomResizedCrop((12, 14)), A.HueSaturationValue(p=0.5)]),
    "albumentations alone": lambda: A.RandomBrightnessContrast(p=1.0),
}


@pytest.mark.parametrize("plan", ["shared_query", "interleaved"])
@pytest.mark.parametrize("name", SEEDED)
def test_anything_else_is_shared_by_seed(name, plan):
    check(lambda: operations.seeded(SEEDED[name]()), images(), plan)


def test_a_seed_is_no_parameter_to_predict():
    views = StructuredViews({"gain": [operations.seeded(by_torch)], "flip": [K.RandomHorizontalFlip()]}, seed=0)
    assert views.parameter_sizes() == {"flip/0.RandomHorizontalFlip/batch_prob": 1}
    assert set(views(images()).parameters[0]["gain"]["0.by_torch"]) == {"seed"}
    with pytest.raises(ValueError, match="'gain': expected a group of that name that draws parameters.*shared by seed"):
        EquivarianceLoss({"content": 4, "gain": 3, "flip": 2}, views)
    table = parameter_matrix(lambda x: {"content": x.flatten(1)[:, :5]}, views, images(60))
    assert not any("gain" in f and "seed" in f for f in table.factors)


def test_names_and_generators_of_ones_own():
    own = np.random.default_rng(0)

    def fn(x):
        return x * float(own.uniform(0.5, 1))

    def reseed(seed):
        nonlocal own
        own = np.random.default_rng(seed)

    with pytest.raises(ValueError, match=r"0\.fn draws random numbers while it is applied.*from its own generator"):
        StructuredViews({"g": [operations.seeded(fn)]}, seed=0)
    views = StructuredViews({"g": [operations.seeded(fn, name="gain", reseed=reseed)]}, seed=0)
    batch = views(images())
    assert "0.gain" in batch.parameters[0]["g"] and torch.equal(batch[0], batch[2])


@pytest.mark.parametrize(
    "fn,error,message",
    [
        (lambda x: None, ValueError, "expected the function to return a tensor.*got NoneType"),
        (
            lambda x: x[:, : int(torch.randint(3, 9, ()))],
            ValueError,
            "expected the function to return samples of one shape",
        ),
        (lambda x: x.mul_(torch.rand(1)), None, None),  # works in place on a copy of its own
    ],
)
def test_what_a_function_must_return(fn, error, message):
    views = {"g": [operations.seeded(fn)]}
    if error is None:
        x = images()
        StructuredViews(views, seed=0)(x)
        assert torch.equal(x, images())
        return
    with pytest.raises(error, match=message):
        StructuredViews(views, seed=0)(images())
    with pytest.raises(TypeError, match="expected a function of one sample: got int"):
        operations.seeded(3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # ToTensor is deprecated
def test_every_v2_transform_is_taken_or_refused_by_name():
    """Those that can be made without arguments; nothing fails with an error that does not name it."""
    for name, kind in vars(v2).items():
        if not inspect.isclass(kind) or not issubclass(kind, v2.Transform) or kind is v2.Transform:
            continue
        try:
            op = kind()
        except TypeError:
            continue
        try:
            StructuredViews({"g": [op, K.RandomHorizontalFlip()]}, seed=0)(images())
        except (TypeError, ValueError) as error:
            assert name in str(error)
