"""overwrites on operations whose kind is known, and on the same operation with images of both kinds."""

import math

import kornia.augmentation as K
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ssd_addon import keys, operations, recipe
from ssd_addon.differences import group_values
from ssd_addon.metrics.probe import Probe, Split
from ssd_addon.recipes import overwrites

QUICK = {"draws": 12, "bootstrap": 50}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Drawn:
    """An operation that draws these parameters, each uniform in [low, high], and applies a function of them."""

    def __init__(self, apply, **ranges):
        self.ranges, self.function = ranges, apply

    def draw(self, shape, generator):
        def one(low, high):
            return low + (high - low) * torch.rand(shape[0], generator=generator)

        return {name: one(*limits) for name, limits in self.ranges.items()}

    def apply(self, x, parameters):
        return self.function(x, *(parameters[name].view(-1, 1, 1, 1) for name in self.ranges)).clamp(0, 1)


def gray(n=100, low=0.04, high=0.6):
    """A pattern that all images share, times a brightness of their own, log-uniform."""
    own = torch.exp(math.log(low) + math.log(high / low) * torch.rand(n, 1, 1, 1, generator=generator()))
    pattern = 0.6 + 0.4 * torch.rand(1, 3, 12, 12, generator=generator(1))
    return (own * pattern).clamp(0, 1)


def colored(n=100, hues=1.0):
    """A pattern that all images share, in a hue of their own, of this share of the circle."""
    angle = hues * 2 * math.pi * torch.rand(n, 1, 1, 1, generator=generator())
    shift = torch.tensor([0.0, 2.0, 4.0]).view(1, 3, 1, 1) * math.pi / 3
    pattern = 0.7 + 0.3 * torch.rand(1, 1, 12, 12, generator=generator(1))
    return pattern * (0.5 + 0.4 * torch.cos(angle - shift))


def level(low=0.2, high=0.8):
    return Drawn(lambda x, t: x - x.mean((1, 2, 3), keepdim=True) + t, level=(low, high))


def gain():
    return Drawn(lambda x, t: x * t, gain=(0.7, 1.4))


def hue():
    return K.ColorJitter(hue=(-0.5, 0.5), p=1.0)


def of(*ops, images=None, **kw):
    """The verdict of one group, and all that was found."""
    found = overwrites({"g": list(ops)}, gray() if images is None else images, **(QUICK | kw))
    return found.groups["g"], found


def test_an_operation_that_replaces_the_brightness_overwrites_and_one_that_multiplies_it_changes():
    found = overwrites({"level": [level()], "gain": [gain()]}, gray(), **QUICK)
    assert found.groups == {"level": "overwrites", "gain": "changes"} and found.sets == ("level",)
    replaced, scaled = found.parts
    assert replaced.alone > 0.9 and scaled.alone < 0.4 and min(replaced.beside, scaled.beside) > 0.9
    for part in found.parts:
        for score, (low, high) in ((part.alone, part.alone_interval), (part.beside, part.beside_interval)):
            assert low <= score <= high


def test_one_operation_is_of_either_kind_by_the_images_that_it_meets():
    assert of(hue(), images=colored(hues=1.0))[0] == "changes"
    assert of(hue(), images=colored(hues=0.02))[0] == "overwrites"
    assert of(gain(), images=gray(low=0.5, high=0.51))[0] == "overwrites"


def test_a_group_that_does_both_does_so_in_part():
    both = Drawn(
        lambda x, t, s: (x * t) * 0.5 + s * torch.tensor([0.0, 0.0, 0.5]).view(1, 3, 1, 1), a=(0.7, 1.4), b=(0, 1)
    )
    verdict, found = of(both, images=gray().mean(1, keepdim=True).expand(-1, 3, -1, -1), draws=24)
    assert verdict == "in part" and found.sets == ()
    assert {p.parameter: p.verdict for p in found.parts} == {"0.Drawn/a": "changes", "0.Drawn/b": "overwrites"}


def test_what_leaves_no_trace_cannot_be_told():
    verdict, found = of(Drawn(lambda x, t, hidden: x * t, t=(0.7, 1.4), hidden=(0, 1)))
    assert verdict == "cannot tell"
    assert [p.verdict for p in found.parts] == ["changes", "cannot tell"]
    assert "can hardly be seen" in found.notes["g"] and "can hardly be seen" in str(found)


def test_what_hardly_shows_beside_the_original_is_not_called_a_change(monkeypatch):
    assert of(gain())[0] == "changes"
    monkeypatch.setattr(keys, "VISIBLE", 1.0)
    assert of(gain())[0] == "cannot tell"


def test_a_group_known_by_its_seed_alone_cannot_be_told():
    verdict, found = of(operations.seeded(lambda x: x * torch.rand(())))
    assert verdict == "cannot tell" and found.parts == () and "a seed" in found.notes["g"]
    verdict, found = of(level(), operations.seeded(lambda x: x * (0.9 + 0.1 * torch.rand(()))))
    assert verdict == "cannot tell" and found.parts[0].verdict == "overwrites" and "a seed" in found.notes["g"]


def test_a_group_that_draws_nothing_is_refused():
    with pytest.raises(ValueError, match="group 'g': expected an operation that draws something"):
        of(Drawn(lambda x: x * 0.5))


def test_near_the_threshold_the_test_cannot_tell():
    """The view's level is half drawn and half the image's own: R^2 = 1 / 2."""
    own = torch.rand(400, 1, 1, 1, generator=generator()).expand(-1, 3, 8, 8) * 0.5
    half = Drawn(lambda x, t: x + 0.5 * t, t=(0, 1))
    verdict, found = of(half, images=own)
    assert abs(found.parts[0].alone - 0.5) < 0.1 and verdict == "cannot tell"


def test_intervals_of_few_images_are_wider():
    def width(n):
        low, high = of(gain(), images=gray(n))[1].parts[0].alone_interval
        return high - low

    assert width(400) < 0.7 * width(40)


def test_a_gate_is_a_parameter_and_what_was_not_applied_does_not_count():
    found = of(K.RandomGrayscale(p=0.5), images=colored())[1]
    assert [(p.parameter, p.verdict) for p in found.parts] == [("0.RandomGrayscale/batch_prob", "overwrites")]
    mirrored = torch.rand(100, 3, 8, 8, generator=generator())
    assert of(K.RandomHorizontalFlip(p=0.5), images=mirrored)[0] == "changes"


def test_a_crop_has_a_place_and_a_size():
    drawn = {"g": {"0.RandomResizedCrop": K.RandomResizedCrop((8, 8)).forward_parameters(torch.Size([5, 3, 16, 16]))}}
    values = group_values("g", [drawn], [])
    corners = drawn["g"]["0.RandomResizedCrop"]["src"].double()
    middle, edge = (corners[:, 0] + corners[:, 2]) / 2 / 16, (corners[:, 2] - corners[:, 0]) / 16
    torch.testing.assert_close(values["g/0.RandomResizedCrop/src center"], middle)
    torch.testing.assert_close(values["g/0.RandomResizedCrop/src size"], edge)


def test_a_wide_angle_is_scored_as_a_direction_and_a_narrow_one_as_a_number():
    def drawn(*degrees):
        return [{"g": {"0.R": {"degrees": torch.tensor([d])}}} for d in degrees]

    (wide,) = group_values("g", drawn(-170.0, 100.0), []).values()
    assert wide.shape == (2, 2)
    torch.testing.assert_close(wide[:, 0], torch.deg2rad(torch.tensor([-170.0, 100.0]).double()).cos())
    (narrow,) = group_values("g", drawn(-30.0, 30.0), []).values()
    assert narrow[:, 0].tolist() == [-30.0, 30.0]


@pytest.mark.parametrize("degrees", [91.0, 92.0, 95.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_angle_of_about_half_a_circle_is_of_one_form_in_all_draws(degrees, seed):
    """Whether few draws span half of the circle is chance."""
    found = overwrites({"g": [K.RandomRotation(degrees, p=1.0)]}, colored(40), draws=8, bootstrap=20, seed=seed)
    assert found.groups["g"] in (keys.OVERWRITES, keys.CHANGES, keys.UNKNOWN)


def test_a_group_may_have_any_name():
    (part,) = overwrites({"a/b": [gain()]}, gray(), **QUICK).parts
    assert (part.group, part.parameter) == ("a/b", "0.Drawn/gain")


@pytest.mark.parametrize("form", ["uint8", "loader", "list"])
def test_images_of_any_form(form):
    x = gray(60)
    given = {
        "uint8": (x * 255).round().to(torch.uint8),
        "loader": DataLoader(TensorDataset(x, torch.zeros(60)), 16, shuffle=True),
        "list": [x[:30], x[30:]],
    }[form]
    before = torch.get_rng_state()
    verdict, found = of(level(), images=given)
    assert verdict == "overwrites" and found.images == 60
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_are_read_as_far_as_they_are_needed():
    read = []

    def loader():
        for i in range(100):
            read.append(i)
            yield gray(25)

    assert of(level(), images=loader(), samples=50)[1].images == 50
    assert read == [0, 1]


def test_views_that_are_larger_than_their_images_are_made_in_small_parts(monkeypatch):
    sizes, real = [], keys.image_statistics

    def counted(x):
        sizes.append(x.numel())
        return real(x)

    monkeypatch.setattr(keys, "image_statistics", counted)
    monkeypatch.setattr(keys, "BLOCK", 20_000)
    crop = K.RandomResizedCrop((40, 40), scale=(0.3, 1.0))
    assert of(crop, images=gray(40))[1].images == 40
    assert max(sizes) <= 20_000


def test_the_same_seed_finds_the_same():
    first, again, other = (str(of(gain(), seed=seed)[1]) for seed in (3, 3, 4))
    assert first == again != other


def test_gray_images_and_those_of_many_channels():
    assert of(level(), images=gray()[:, :1])[0] == "overwrites"
    assert of(level(), images=gray().repeat(1, 2, 1, 1))[0] == "overwrites"


@pytest.mark.parametrize("last", ["noise", "signal"])
def test_the_statistics_that_show_a_parameter_are_chosen_for_it(last):
    split = Split.draw(60, Probe("kernel"), 2, 0, torch.device("cpu"), repeats=2)
    theta, other = (torch.rand(120, 1, generator=generator(seed)).double() for seed in range(2))
    statistics = {
        "signal": torch.cat([theta, other], 1),
        "noise": torch.randn(120, 30, generator=generator(2)).double(),
    }
    statistics[last] = statistics.pop(last)
    targets = [keys._target(t, split) for t in (theta, other)]
    for error in keys._alone(statistics, targets, split, 0):
        assert error.shape == (60, 1) and float(error.mean()) < 0.05


def test_beside_the_original_each_half_of_the_images_chooses_for_the_other():
    """Leave one out within each image, against the slow way."""
    z, theta = (
        torch.randn(4, 9, 2, generator=generator()).double(),
        torch.randn(4, 9, 1, generator=generator(1)).double(),
    )
    got = keys._beside(z, theta)
    for side in range(2):
        best = None
        for h in (0.3, 0.5, 1.0, 2.0):
            for penalty in (1e-3, 1e-2, 1e-1, 1.0):
                errors = torch.zeros(4, 9, 1).double()
                for i in range(4):
                    d = ((z[i][:, None] - z[i][None]) ** 2).sum(2)
                    k = torch.exp(-d / (2 * h**2 * d[~torch.eye(9, dtype=torch.bool)].median())) + 1
                    for j in range(9):
                        rest = [r for r in range(9) if r != j]
                        a = torch.linalg.solve(k[rest][:, rest] + penalty * torch.eye(8), theta[i][rest])
                        errors[i, j] = (theta[i, j] - k[j, rest] @ a) ** 2
                score = errors[1 - side :: 2].mean()
                if best is None or score < best[0]:
                    best = score, errors[side::2]
        torch.testing.assert_close(got[side::2], best[1])


def test_scores_are_means_over_columns_about_the_mean():
    errors, y = (
        torch.rand(6, 2, 2, generator=generator()).double(),
        torch.rand(6, 2, 2, generator=generator(1)).double(),
    )
    weights = torch.ones(1, 6).double()
    score, again = keys._scores(errors, y, weights)
    flat = y.flatten(0, 1)
    wanted = (1 - errors.flatten(0, 1).sum(0) / ((flat - flat.mean(0)) ** 2).sum(0)).mean()
    assert score == pytest.approx(float(wanted)) and again.tolist() == pytest.approx([score])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": gray(39)}, r"expected at least 40, .*: got \[39, 3, 12, 12\]"),
        ({"images": []}, "expected at least 40"),
        ({"images": torch.tensor(1.0)}, "expected at least 40"),
        ({"images": torch.rand(50, 12, 12)}, r"expected \[B, C, H, W\]"),
        ({"images": gray() * 3}, r"expected values in \[0, 1\]"),
        ({"images": [gray(30), gray(30)[..., :6]]}, "expected batches of images of one size"),
        ({"groups": {}}, "expected at least one group"),
        ({"samples": 39}, "samples: expected a whole number, 40 or more"),
        ({"draws": 7}, "draws: expected a whole number, 8 or more"),
        ({"bootstrap": 1}, "bootstrap"),
    ],
)
def test_what_is_refused(change, message):
    given = {"groups": {"g": [level()]}, "images": gray()} | QUICK | change
    with pytest.raises(ValueError, match=message):
        overwrites(given.pop("groups"), given.pop("images"), **given)


def test_a_presets_name_is_no_mapping_of_groups():
    with pytest.raises(TypeError, match=r'pass presets\("color_spatial"\)\["groups"\]'):
        overwrites("color_spatial", gray())


def test_views_that_are_not_finite_are_refused():
    class Unbounded(Drawn):
        def apply(self, x, parameters):
            return torch.where(parameters["t"].view(-1, 1, 1, 1) > 0.5, math.inf, x)

    with pytest.raises(ValueError, match="group 'g': expected views of finite values"):
        of(Unbounded(None, t=(0, 1)))


def test_a_recipe_asks_the_images_which_groups_overwrite():
    images, groups = colored(), {"hue": [hue()], "level": [level()]}
    r = recipe(groups, sets="auto", images=images)
    assert r.views["cross_image"] == ("level",) == r.tested.sets
    assert "overwrites" in str(r) and r.tested.images == 100
    assert recipe(groups, sets=("level",)).tested is None
    assert "cross_image" not in recipe({"hue": [hue()]}, sets="auto", images=images).views


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sets": "auto"}, 'sets="auto": expected images='),
        ({"sets": ("level",), "images": gray()}, 'images: expected only with sets="auto"'),
        ({"images": gray()}, 'images: expected only with sets="auto"'),
        ({"groups": "content_only", "sets": "auto", "images": gray()}, "expected groups to test"),
    ],
)
def test_a_recipe_refuses_auto_without_images_and_images_without_auto(arguments, message):
    given = {"groups": {"level": [level()]}} | arguments
    with pytest.raises(ValueError, match=message):
        recipe(given.pop("groups"), **given)


def test_json_holds_what_is_printed():
    found = of(level())[1]
    out = found.to_json()
    assert out["groups"] == {"g": "overwrites"} and out["sets"] == ["g"]
    assert out["parts"][0]["parameter"] == "0.Drawn/level" and out["parts"][0]["alone"] == found.parts[0].alone
    assert f"{found.parts[0].alone:.2f}" in str(found)
