"""Recipes: what they hold fits the parts that they are for."""

import kornia.augmentation as K
import pytest
import torch
from torch import nn

from ssd_addon import DualAscent, JointEntropyLoss, Recipe, StructuredViews, StyleHeads, presets, recipe


def own() -> dict[str, list[nn.Module]]:
    return {"spatial": [K.RandomRotation(180.0, p=1.0)], "color": [K.ColorJitter(hue=0.5, p=1.0)]}


def backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("family", ["simclr", "vicreg", "barlow"])
@pytest.mark.parametrize("groups", ["color_spatial", "appearance_spatial", "content_only", "own"])
def test_a_recipe_trains(groups, family):
    r = recipe(own() if groups == "own" else groups, family=family, size=16, content=4, style=3, warmup_steps=1)
    views = StructuredViews(**r.views, seed=0)
    model = StyleHeads(backbone(), r.spaces, in_features=6, hidden=(5,))
    criterion = JointEntropyLoss(**r.loss)
    assert criterion.family == family and tuple(r.spaces) == views.plan.spaces
    ascent = DualAscent(criterion, **r.ascent) if r.ascent else None
    for _ in range(3):
        terms = criterion.terms(model(views(torch.rand(8, 3, 16, 16))))
        terms.loss.backward()
        if ascent is not None:
            ascent.step(terms)
    assert torch.isfinite(terms.loss)
    if ascent is not None:
        assert ascent.weights[0] != 2.0, "the ascent moves content's weight after its warm-up"


def test_only_simclr_with_styles_has_weights_and_an_ascent():
    r = recipe("color_spatial")
    assert r.loss["weights"] == {"content": 2.0, "spatial": 1.0, "color": 1.0} and r.loss["content_entropy"]
    assert r.ascent is not None and r.ascent["warmup_steps"] == 400
    assert recipe("content_only").ascent is None and recipe("content_only").loss.keys() == {"family", "temperature"}
    for family in ("vicreg", "barlow"):
        r = recipe("color_spatial", family=family)
        assert r.loss == {"family": family} and r.ascent is None


def test_groups_that_set_their_style_get_keys_of_other_images():
    r = recipe(own(), sets=["spatial"], content=4, style=3)
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
    text = str(recipe(own(), sets=("color",)))
    assert (
        "StructuredViews\n  groups: {spatial: [RandomRotation], color: [ColorJitter]}\n  cross_image: [color]" in text
    )
    assert "StyleHeads\n  spaces: {content: " in text and "DualAscent\n  tolerance: " in text
    assert "DualAscent" not in str(recipe(own(), family="vicreg"))
    assert isinstance(recipe(own()), Recipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": "colours"}, "preset: expected one of 'color_spatial'.*got 'colours'"),
        ({"groups": [K.RandomHorizontalFlip()]}, "expected a preset's name or a mapping name -> operations: got list"),
        ({"family": "moco"}, "family: expected one of 'simclr'.*got 'moco'"),
        ({"sets": ("hue",)}, r"sets: expected names of groups \(spatial, color\): got \('hue',\)"),
        ({"sets": "color"}, r"sets: expected names of groups \(spatial, color\): got 'color'"),
        ({"content": 0}, "content: expected"),
        ({"style": 1.5}, "style: expected"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        recipe(**arguments)
