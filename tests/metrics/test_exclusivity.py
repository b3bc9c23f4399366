"""The test of exclusivity: its statistic against a slow loop, its level and power where the truth is known."""

import itertools
import json
import math

import dependence as reference
import kornia.augmentation as K
import pages
import pytest
import torch

from ssd_addon import StructuredViews
from ssd_addon.metrics import Circular, Exclusivity, dependence, exclusivity, label_free, parameter_exclusivity
from ssd_addon.metrics.dependence import FILTERS, Regression, Space, filtered, holm, kernel_features, parts_of

ROUNDING = 1e-9  # float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def world(n=300, seed=0):
    """A hue, a number that goes with it, one that does not, and a space that is a nonlinear function of the hue."""
    g = generator(seed)
    hue = 2 * math.pi * torch.rand(n, generator=g)
    light = hue.cos() + 0.5 * torch.randn(n, generator=g)
    size = torch.randn(n, generator=g)
    z = torch.stack([hue.cos(), hue.sin(), (3 * hue.sin()).tanh()], 1) + 0.1 * torch.randn(n, 3, generator=g)
    return z, {"hue": Circular(hue), "light": light, "size": size}, g


# ---- against the definition


def test_statistics_equal_the_loop_over_outer_products():
    z, given = randn(12, 3), randn(12, 1, seed=1)
    space = Space([z, given], Regression([given]), generator())
    r = Regression([given]).residuals(randn(12, 2, seed=2))
    got = space.statistics(r[:, None])[0]
    expected = []
    for psi, features in zip(space.residuals, dependence.space_features([z, given], generator()), strict=True):
        torch.testing.assert_close(psi, Regression([given]).residuals(features - features.mean(0)))
        variance = float((features - features.mean(0)).square().mean())
        for size in FILTERS:
            penalty = size * variance * torch.eye(psi.shape[1], dtype=psi.dtype)
            metric = size * variance * (psi.T @ psi / len(psi) + penalty).inverse()
            expected.append(reference.statistic(r, psi, metric))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=ROUNDING, atol=ROUNDING)


def test_a_large_filter_gives_the_plain_measure(monkeypatch):
    monkeypatch.setattr(dependence, "FILTERS", (1e12,))
    psi, r = randn(9, 2), randn(9, 2, seed=1)
    rotated, weights = filtered(psi, 1.0)
    got = float(((rotated.T @ r) ** 2).sum(1) @ weights[:, 0]) / 9
    assert got == pytest.approx(reference.statistic(r, psi, torch.eye(2)), rel=1e-6)


def test_residuals_are_those_of_left_out_rows_with_the_best_penalty():
    maps = [randn(23, 2), randn(23, 4, seed=1)]
    y = maps[1] @ randn(4, 2, seed=2) + 0.3 * randn(23, 2, seed=3)
    each = [reference.left_out_residuals(x, y, a, 5) for x, a in itertools.product(maps, dependence.PENALTIES)]
    expected = min(each, key=lambda r: float((r**2).sum()))
    torch.testing.assert_close(Regression(maps).residuals(y), expected, rtol=ROUNDING, atol=ROUNDING)


def test_many_columns_choose_by_some_combinations_of_them():
    x = randn(60, 3)
    y = x @ randn(3, 200, seed=1) + 3 * randn(60, 200, seed=2)
    least = min(float((reference.left_out_residuals(x, y, a, 5) ** 2).sum()) for a in (1e-2, 1e-1, 1.0, 10.0))
    assert float((Regression([x]).residuals(y) ** 2).sum()) <= 1.05 * least


def test_kernel_features_are_exact_for_few_distinct_rows():
    x = randn(4, 2)[torch.arange(40) % 4]
    f = kernel_features(x, 0.5, generator())
    apart = torch.cdist(x[:4], x[:4]) ** 2
    median = apart[apart > 0].median()
    torch.testing.assert_close(f[:4] @ f[:4].T, torch.exp(-apart / (2 * 0.25 * median)), rtol=1e-6, atol=1e-6)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_numbers_are_tested_by_their_distance_from_the_median_too():
    values, curved = parts_of(torch.tensor([[1.0], [2.0], [3.0], [100.0]]))
    middle = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    torch.testing.assert_close(curved[:, 0], 1.5 * middle**2 - 0.5)
    tied = parts_of(torch.tensor([[5.0], [5.0], [7.0], [7.0]]))[1]
    assert (tied == tied[0]).all() and len(values) == 4


# ---- known truth


def test_a_factor_that_goes_with_the_own_one_is_no_leak_given_it():
    z, factors, _ = world()
    given = exclusivity({"color": z}, factors, {"color": ("hue",)})
    alone = exclusivity({"color": z}, factors, {"color": ()})
    assert alone.is_leak("color", "light") and alone["color", "light"].effect > 0.5
    assert not given.is_leak("color", "light") and given["color", "light"].effect < 0.05
    assert given.leaks == () and set(alone.leaks) == {("color", "hue"), ("color", "light")}


@pytest.mark.parametrize("kind", ["linear", "square", "entangled", "distance"])
def test_a_leak_is_found_however_it_is_encoded(kind):
    z, factors, g = world()
    size = factors["size"]
    leak = {
        "linear": size,
        "square": size.sign() * size.abs().sqrt(),
        "entangled": size * z[:, 0].sign(),
        "distance": size.abs(),
    }[kind]
    z = torch.cat([z, (leak + 0.5 * torch.randn(300, generator=g))[:, None]], 1)
    table = exclusivity({"color": z}, factors, {"color": ("hue",)})
    assert table.leaks == (("color", "size"),) and table["color", "size"].effect > 0.2


def test_a_code_that_can_be_read_with_the_own_factor_alone_is_a_leak():
    _, factors, g = world()
    coin = torch.randint(2, (300,), generator=g)
    z = (2.0 * coin - 1)[:, None] * factors["hue"].angle.sin().sign()[:, None]
    table = exclusivity({"color": z}, {"hue": factors["hue"], "coin": coin}, {"color": ("hue",)})
    assert table.leaks == (("color", "coin"),) and table["color", "coin"].effect > 0.5


def test_an_angle_is_tested_with_two_harmonics_and_classes_one_hot():
    g = generator()
    angle, kind = 6.3 * torch.rand(300, generator=g), torch.randint(3, (300,), generator=g)
    z = torch.stack([(2 * angle).cos(), (kind == 1).float()], 1) + 0.3 * torch.randn(300, 2, generator=g)
    noise = torch.randint(3, (300,), generator=g)
    table = exclusivity({"z": z}, {"angle": Circular(angle), "kind": kind, "noise": noise}, {"z": ()})
    assert set(table.leaks) == {("z", "angle"), ("z", "kind")}


def test_a_dependence_below_the_smallest_effect_is_no_leak():
    z, factors, g = world(n=600)
    z = torch.cat([z, (0.25 * factors["size"] + torch.randn(600, generator=g))[:, None]], 1)
    options = {"own": {"color": ("hue",)}, "resamples": 199}
    table = exclusivity({"color": z}, factors, smallest=0.1, **options)
    test = table["color", "size"]
    assert test.corrected <= 0.05 and 0.02 < test.effect < 0.1 and table.leaks == ()
    assert exclusivity({"color": z}, factors, **options).leaks == (("color", "size"),)


@pytest.mark.slow
@pytest.mark.parametrize(("independent", "tails"), [(False, 1), (True, 5)])
def test_the_level_is_kept_where_nothing_is_to_be_found(independent, tails):
    """Permutations are exact; signs are within what 60 tests can tell."""
    small = []
    for seed in range(60):
        g = generator(seed)
        t = torch.rand(80, generator=g)
        z = torch.stack([t, (6 * t).sin()], 1) + 0.1 * torch.randn(80, 2, generator=g)
        size = torch.randn(80, generator=g) ** tails + (0 if independent else (4 * t).cos())
        table = exclusivity(
            {"z": z}, {"t": t, "size": size}, {"z": ("t",)}, independent=independent, resamples=99, seed=seed
        )
        small.append(table["z", "size"].p <= 0.1)
    assert 1 <= sum(small) <= 14  # binomial(60, 0.1): outside it in 0.3 % of all runs


def test_the_level_of_a_leak_is_that_of_the_whole_table():
    g = generator(3)
    factors = {f"f{k}": torch.randn(100, generator=g) for k in range(12)}
    z = torch.randn(100, 2, generator=g)
    table = exclusivity({"z": z}, factors, {"z": ()})
    assert holm([table["z", f].p for f in factors]) == [table["z", f].corrected for f in factors]
    assert min(table["z", f].p for f in factors) < 0.1 and table.leaks == ()


# ---- what it is not sensitive to


def test_the_same_whatever_the_scale_the_type_and_the_other_factors():
    z, factors, _ = world(n=120)
    first = exclusivity({"color": z}, factors, {"color": ("hue",)})
    for factor in (1e-30, 1e30):
        scaled = exclusivity({"color": z * factor}, factors, {"color": ("hue",)})
        assert scaled["color", "size"].statistic == pytest.approx(first["color", "size"].statistic, abs=1e-3)
    fewer = exclusivity({"color": z}, {f: factors[f] for f in ("hue", "size")}, {"color": ("hue",)})
    assert fewer["color", "size"].p == first["color", "size"].p
    state = torch.get_rng_state()
    assert exclusivity({"color": z}, factors, {"color": ("hue",)}).tests == first.tests
    assert torch.equal(state, torch.get_rng_state())


def test_a_space_wider_than_the_samples_can_be_tested():
    z, factors, g = world(n=80)
    wide = torch.cat([z, torch.randn(80, 150, generator=g)], 1)
    wide[:, 50] += 20 * factors["size"]
    assert dependence.space_features([wide], generator())[0].shape == (80, 80)
    table = exclusivity({"color": wide}, factors, {"color": ("hue",)})
    assert table["color", "size"].p < 0.05 and not table.is_leak("color", "light")


# ---- what cannot be tested, and words


def test_what_cannot_be_tested_says_why():
    z, factors, g = world(n=120)
    nan = factors["size"].clone()
    nan[3] = math.nan
    factors |= {
        "same": torch.ones(120),
        "nan": nan,
        "copy": Circular(factors["hue"].angle + 1.0),
        "few": Circular(torch.rand(120, generator=g), (torch.arange(120) < 40).long()),
        "most": Circular(torch.rand(120, generator=g), (torch.arange(120) < 80).long()),
    }
    table = exclusivity({"color": z}, factors, {"color": ("hue",)})
    reasons = {
        "hue": "own",
        "same": "constant",
        "nan": "1 of 120 values are NaN or inf",
        "copy": "determined by hue: nothing of it is left to test",
        "few": "defined for 40 samples, fewer than 50",
    }
    for factor, reason in reasons.items():
        assert table.notes["color", factor] == reason and math.isnan(table["color", factor].p)
    assert table.notes["color", "most"] == "tested on 80 of 120 samples: the others have no angle"
    assert not math.isnan(table["color", "most"].p)
    words = str(table)
    assert "few: defined for 40" in words and "hue: own" not in words and " own" in words and "n/a" in words


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"own": {}}, TypeError, "own: expected a mapping space -> its factors"),
        ({"own": {"shape": ()}}, ValueError, "own: expected spaces among color: got 'shape'"),
        ({"own": {"color": "hue"}}, TypeError, "own: expected a sequence of factors for space 'color'"),
        ({"own": {"color": ("hues",)}}, ValueError, "among hue, light, size: got hues for space 'color'"),
        ({"independent": True}, ValueError, "drawn independently of each other: got 'light', which hue predict"),
        ({"independent": 1}, TypeError, "independent: expected True or False: got 1"),
        ({"level": 0.0}, ValueError, "level: expected a probability above 0: got 0"),
        ({"level": 1}, ValueError, "level: expected a number of at least 0 and below 1: got 1"),
        ({"smallest": -0.1}, ValueError, "smallest: expected a number of at least 0 and below 1: got -0.1"),
        (
            {"resamples": 38},
            ValueError,
            "resamples: expected at least 39, so that the smallest p-value, corrected for 2",
        ),
        ({"resamples": 99.5}, ValueError, "resamples: expected an integer of 1 or more"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    z, factors, _ = world(n=60)
    with pytest.raises(error, match=message):
        exclusivity({"color": z}, factors, **{"own": {"color": ("hue",)}} | change)


def test_bad_input_is_refused():
    z, factors, _ = world(n=60)
    with pytest.raises(ValueError, match="expected at least 50 samples: got 40"):
        exclusivity({"color": z[:40]}, {"size": factors["size"][:40]}, {"color": ()})
    factors["light"][0] = math.inf
    with pytest.raises(ValueError, match="own: factor 'light': expected a finite value for every sample"):
        exclusivity({"color": z}, factors, {"color": ("light",)})
    z[0] = math.nan
    with pytest.raises(ValueError, match="expected finite embeddings"):
        exclusivity({"color": z}, factors, {"color": ()})


def test_a_table_survives_json():
    z, factors, _ = world(n=60)
    table = exclusivity({"color": z}, factors, {"color": ("hue",)})
    kept = json.loads(json.dumps(table.to_json(), allow_nan=False))
    again = Exclusivity.from_json(kept)
    assert again.to_json() == table.to_json() and str(again) == str(table)
    assert [c["leak"] for c in kept["cells"]] == [False] * 3
    with pytest.raises(KeyError, match="spaces color; factors hue, light, size"):
        table["color", "shape"]


@pytest.mark.parametrize("period", [5, 10, 25])
def test_rows_that_repeat_with_a_period_are_like_any_others(period):
    """With folds of every fifth row, all rows of a class would be in one fold, which nothing else predicts."""
    g = generator()
    c = torch.arange(500) % period
    z = torch.randn(period, 6, generator=g)[c] + 0.1 * torch.randn(500, 6, generator=g)
    other = torch.randn(period, generator=g)[c] + torch.randn(500, generator=g)
    test = exclusivity({"z": z}, {"class": c, "other": other}, {"z": ("class",)}, resamples=199)["z", "other"]
    assert test.p > 0.05 and test.effect < 0.02


def test_a_factor_that_varies_by_rounding_is_constant():
    z, _, g = world()
    rounded = 0.1 + 1e-8 * torch.rand(300, generator=g)
    table = exclusivity({"z": z}, {"rounded": rounded, "hue": world()[1]["hue"]}, {"z": ("hue",)}, resamples=199)
    assert table.notes["z", "rounded"] == "constant" and math.isnan(table["z", "rounded"].p)


# ---- augmentations


def leaking(x):
    z = pages.model(x)
    return {**z, "spatial": torch.cat([z["spatial"], z["color"][:, :1] + 0.02 * z["content"][:, :1]], 1)}


def test_a_group_that_leaks_is_found_without_labels():
    images = pages.squares(120).images
    table = parameter_exclusivity(leaking, pages.views(), images, draws=2, resamples=199)
    assert table.leaks == (("spatial", "color"),) and table.n == 240 and table.null == "permutations"
    light = "color/0.ColorJitter/brightness_factor"
    assert table["spatial", light] == table["spatial", "color"] and table.parts.own["color"] == (light,)
    assert table.notes["color", "color"] == "own" and math.isnan(table["color", "color"].p)
    assert Exclusivity.from_json(table.to_json())["spatial", light].p == table["spatial", light].p


def test_of_a_group_the_parameter_counts_that_leaks_most():
    g = generator()
    change = {"strong": torch.randn(200, 1, generator=g), "none": torch.randn(200, 1, generator=g)}
    z = change["strong"] + torch.randn(200, 1, generator=g)
    drawn = label_free.Pairs(
        {"content": [z, z.flip(0)], "backbone": [z]},
        {"color": change, "same": {"fixed": torch.zeros(200, 1)}},
        {"color": ["color/1.Noise/field, a field of noise"], "same": []},
        100,
        2,
        z.device,
    )
    table = label_free.exclusivity_of(drawn)
    assert table.spaces == ("content",) and table["content", "color"] == table["content", "strong"]
    assert table.leaks == (("content", "color"),) and not table.parts.is_leak("content", "none")
    assert table.notes["content", "color"].startswith("left out: color/1.Noise/field")
    assert table.notes["content", "same"] == "no parameter of this group varies between views"


def test_a_model_without_spaces_has_nothing_to_test():
    for model in (lambda x: x.mean((2, 3)), lambda x: {"backbone": x.mean((2, 3))}):
        with pytest.raises(ValueError, match="model: expected spaces to test.*got features alone"):
            parameter_exclusivity(model, pages.views(), pages.squares(60).images)


def test_views_without_groups_cannot_be_tested():
    views = StructuredViews({}, then=[K.RandomHorizontalFlip()], seed=0)
    with pytest.raises(ValueError, match="got views without groups"):
        parameter_exclusivity(pages.model, views, pages.squares(20).images)
