"""Recipes: what they hold fits the parts that they are for."""

import kornia.augmentation as K
import pytest
import torch
from torch import nn

from ssd_addon import (
    DualAscent,
    EquivarianceLoss,
    JointEntropyLoss,
    Recipe,
    StructuredViews,
    StyleHeads,
    presets,
    recipe,
)


def own() -> dict[str, list[nn.Module]]:
    return {"spatial": [K.RandomRotation(180.0, p=1.0)], "color": [K.ColorJitter(hue=0.5, p=1.0)]}


def backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


GROUPS = ["color_spatial", "appearance_spatial", "content_only", "own"]
TRAINED = [(g, f, False) for g in GROUPS for f in ("simclr", "vicreg", "barlow")]
TRAINED += [(g, "simclr", True) for g in GROUPS if g != "content_only"]  # the only recipes with an ascent


@pytest.mark.parametrize(("groups", "family", "ascending"), TRAINED)
def test_a_recipe_trains(groups, family, ascending):
    helped = family == "simclr" and groups != "content_only"
    more = {"tolerance": 0.01, "warmup_steps": 1} if ascending else {}
    more |= {} if groups == "own" else {"size": 16}
    r = recipe(own() if groups == "own" else groups, family=family, content=4, style=3, **more)
    views = StructuredViews(**r.views, seed=0)
    model = StyleHeads(backbone(), r.spaces, in_features=6, hidden=(5,))
    criterion = JointEntropyLoss(**r.loss)
    assert criterion.family == family and tuple(r.spaces) == views.plan.spaces
    assert (r.ascent is None, r.equivariance is None) == (not ascending, ascending or not helped)
    assert isinstance(criterion.weights, DualAscent) == ascending
    equivariance = EquivarianceLoss(r.spaces, views, **r.equivariance) if r.equivariance else None
    for _ in range(3):
        batch = views(torch.rand(8, 3, 16, 16))
        z = model(batch)
        terms = criterion.terms(z)
        loss = terms.loss if equivariance is None else terms.loss + equivariance(z, batch)
        loss.backward()
        weights = criterion.weights.step(terms)
    assert torch.isfinite(loss)
    if ascending:
        assert weights["content"] != 2.0, "the ascent moves content's weight after its warm-up"
    if equivariance is not None:
        assert (equivariance.objective.temperature, equivariance.weight) == (criterion.objective.temperature, 0.5)


def test_what_photographs_were_measured_with():
    r = recipe("color_spatial")
    assert (
        r.loss == {"family": "simclr", "temperature": 0.15, "content_entropy": True, "content_keys": "all"}
        and r.ascent is None
    )
    assert recipe("content_only").loss == {"family": "simclr", "temperature": 0.15}
    for family in ("vicreg", "barlow", "mmcr"):
        r = recipe("color_spatial", family=family)
        assert r.loss == {"family": family} and r.spaces == {"content": 8, "spatial": 32, "color": 32}
        assert recipe("content_only", family=family).spaces == {"content": 64}
        assert recipe("color_spatial", family=family, content=20).spaces["content"] == 20


def test_strengths_of_the_presets():
    """The ImageNet recipe that they part, whichever group an operation is in."""
    crop, flip, jitter, grey, blur = (
        "RandomResizedCrop",
        "RandomHorizontalFlip",
        "ColorJitter",
        "RandomGrayscale",
        "blur",
    )

    def listed(ops):
        names = {"RandomGaussianBlur": blur}
        return [(names.get(type(op).__name__, type(op).__name__), float(op.p)) for op in ops]

    def color(solarise):
        return [(jitter, 0.8), (grey, 0.2), ("RandomSolarize", solarise)]

    spatial, end = [(crop, 1.0), (flip, 0.5)], [("Normalize", 1.0)]
    made = {
        name: {
            part: {g: listed(ops) for g, ops in of.items()} if isinstance(of, dict) else listed(of)
            for part, of in presets(name).items()
        }
        for name in ("color_spatial", "appearance_spatial", "content_only")
    }
    assert made == {
        "color_spatial": {
            "groups": {"spatial": spatial, "color": color(0.0)},
            "key_groups": {"color": color(0.2)},
            "then": [(blur, 1.0), *end],
            "key_then": [(blur, 0.1), *end],
        },
        "appearance_spatial": {
            "groups": {"spatial": spatial, "appearance": [*color(0.0), (blur, 1.0)]},
            "key_groups": {"appearance": [*color(0.2), (blur, 0.1)]},
            "then": end,
        },
        "content_only": {
            "groups": {},
            "then": [*spatial, *color(0.0), (blur, 1.0), *end],
            "key_then": [*spatial, *color(0.2), (blur, 0.1), *end],
        },
    }
    first, _ = presets("color_spatial", size=224)["groups"]["spatial"]
    assert first.flags["size"] == (224, 224) and first.flags["resample"].name == "BICUBIC"
    assert first.flags["cropping_mode"] == "slice"
    for size, kernel in ((224, 23), (32, 3), (8, 3)):
        assert presets("color_spatial", size=size)["then"][0].flags["kernel_size"] == (kernel, kernel), size
    assert [type(op).__name__ for op in presets("color_spatial", normalize=False)["then"]] == ["RandomGaussianBlur"]


def test_widths_and_the_size_of_views_unless_told():
    r = recipe()
    assert r.spaces == {"content": 64, "spatial": 32, "color": 32}
    assert r.views["groups"]["spatial"][0].flags["size"] == (224, 224) and len(r.views["then"]) == 2
    given = own()
    made = recipe(given).views["groups"]
    given.clear()
    assert list(made) == ["spatial", "color"], "the recipe holds a copy"


def test_a_tolerance_brings_an_ascent_and_more_weight_for_content():
    r = recipe(own(), tolerance=0.01)
    weights = r.loss["weights"]
    assert {n: float(w) for n, w in weights.lambdas(r.spaces).items()} == {"content": 2.0, "spatial": 1.0, "color": 1.0}
    assert (weights.tolerance, weights.step_size, weights.warmup_steps) == ([0.01] * 3, 0.05, 400)
    assert r.loss["weights"] is not weights, "two criteria of one recipe do not share their weights"
    assert r.equivariance is None, "both together were measured to collapse content"
    assert recipe(own(), tolerance=0.0).ascent["tolerance"] == 0.0
    with pytest.raises(ValueError, match="tolerance: expected None"):
        recipe(own(), family="barlow", tolerance=0.0)


def test_groups_that_set_their_style_get_keys_of_other_images():
    r = recipe(own(), sets=(n for n in ["spatial"]), content=4, style=3)  # an iterator is read once
    assert r.views["cross_image"] == ("spatial",) and r.spaces == {"content": 4, "spatial": 3, "color": 3}
    batch = StructuredViews(**r.views, seed=0)(torch.rand(4, 3, 8, 8))
    own_image = batch.image_ids == torch.arange(4)
    assert own_image.all(1).tolist() == [True, True, False, True] and not own_image[2].any()
    assert "cross_image" not in recipe(own()).views


def test_a_preset_is_passed_on():
    plain = StructuredViews(**recipe("appearance_spatial", size=12, normalize=False).views, seed=3)
    same = StructuredViews(**presets("appearance_spatial", size=12, normalize=False), seed=3)
    images = torch.rand(2, 3, 20, 20)
    assert torch.equal(plain(images).views, same(images).views)


def test_a_recipe_is_readable():
    text = str(recipe(own(), sets=("color",), tolerance=0.1))
    assert (
        "StructuredViews\n  groups: {spatial: [RandomRotation], color: [ColorJitter]}\n  cross_image: [color]" in text
    )
    assert "StyleHeads\n  spaces: {content: " in text
    assert "  weights: DualAscent\nDualAscent\n  tolerance: " in text
    assert "EquivarianceLoss" not in text
    assert str(recipe(own())).endswith("EquivarianceLoss\n  family: simclr\n  temperature: 0.15\n  weight: 0.5")
    assert not any(part in str(recipe(own(), family="vicreg")) for part in ("DualAscent", "EquivarianceLoss"))
    assert isinstance(recipe(own()), Recipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": "colours"}, "preset: expected one of 'color_spatial'.*got 'colours'"),
        ({"groups": [K.RandomHorizontalFlip()]}, "expected a preset's name or a mapping name -> operations: got list"),
        ({"family": "moco"}, "family: expected one of 'simclr'.*got 'moco'"),
        ({"sets": ("color", "hue")}, r"sets: expected names of groups \(spatial, color\): got hue"),
        ({"sets": "color"}, r"sets: expected a sequence of names of groups, or .auto.: got 'color'"),
        ({"sets": None}, r"sets: expected a sequence of names of groups, or .auto.: got None"),
        ({"groups": {}}, "groups: expected at least one group, .*'content_only'"),
        ({"groups": {"content": []}}, "groups: expected names other than 'content'"),
        ({"groups": {"a": []}, "size": 32}, "size: expected only with a preset, .*got groups a"),
        ({"groups": {"a": []}, "normalize": False}, "normalize: expected only with a preset"),
        ({"size": 0}, "size: expected"),
        ({"size": "32"}, "size: expected"),
        ({"tolerance": -0.1}, "tolerance: expected"),
        ({"warmup_steps": -3}, "warmup_steps: expected a whole number, 0 or more: got -3"),
        ({"family": "vicreg", "tolerance": 0.1}, "tolerance: expected None, .*got one for the 'vicreg' family"),
        ({"groups": "content_only", "tolerance": 0.1}, "tolerance: expected None, .*got one for content alone"),
        ({"content": 0}, "content: expected"),
        ({"style": 1.5}, "style: expected"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        recipe(**arguments)
