"""parameter_matrix on models whose knowledge is known, its targets against a slow loop; views that share nothing."""

import math

import kornia.augmentation as K
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ssd_addon import StructuredViews, StyleHeads, ViewBatch, ViewPlan, differences
from ssd_addon.metrics import Probe, ScoreTable, embed, label_free, parameter_matrix, probes

BRIGHT = "color/0.RandomBrightness/brightness_factor"
ACROSS, DOWN = (f"place/0.RandomTranslate/translate_{axis}" for axis in "xy")
QUICK = {"probe": "ridge", "bootstrap": 0}


def quick(**settings):
    return {"probe": Probe("ridge", **settings), "bootstrap": 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=20, size=6, seed=0):
    return torch.rand(n, 3, size, size, generator=generator(seed))


def greys(n=60):
    """Every image of one colour: nothing of a shift is to be seen."""
    return (0.3 + 0.4 * torch.rand(n, 3, 1, 1, generator=generator())).expand(n, 3, 16, 16).contiguous()


def squares(n=60):
    """A bright square somewhere near the middle of a dark image of one colour."""
    x = greys(n) / 3
    for i, (row, column) in enumerate(torch.randint(4, 8, (n, 2), generator=generator(1)).tolist()):
        x[i, :, row : row + 4, column : column + 4] = 0.85
    return x


def brightness(p=1.0, **kw):
    return K.RandomBrightness((0.9, 1.1), p=p, **kw)


def shift():
    return K.RandomTranslate((-0.2, 0.2), (-0.2, 0.2), padding_mode="border", p=1.0)


def two_groups(seed=0, **kw):
    return StructuredViews({"place": [shift()], "color": [brightness()]}, seed=seed, **kw)


def place_of(x):
    """Centre of what is brighter than the corner."""
    weight = (x - x[:, :, :1, :1]).mean(1)
    at = torch.arange(float(x.shape[-1]))
    total = weight.sum((1, 2)).clamp(min=1e-6)
    return torch.stack([(weight.sum(1) * at).sum(1) / total, (weight.sum(2) * at).sum(1) / total], 1)


class Knows:
    """What each space knows is in its name."""

    def __init__(self):
        self.g = generator(5)

    def __call__(self, x):
        noise = torch.randn(len(x), 3, generator=self.g)
        return {"noise": noise, "nothing": torch.full((len(x), 2), 0.1), "color": x[:, :, 0, 0], "place": place_of(x)}


def means(x):
    return {"content": x.mean((2, 3))}


class Watched:
    """Views that keep what they gave."""

    def __init__(self, views):
        self.views, self.plan, self.given, self.sizes = views, views.plan, [], []

    def independent(self, x, *, seed):
        self.sizes.append(len(x))
        self.given.append(self.views.independent(x, seed=seed))
        return self.given[-1]


class Given:
    """Views whose parameters are given, [2, n, ...] of the two views: {"op": {"name": tensor}}; images as they are."""

    def __init__(self, operations):
        self.plan, self.operations = ViewPlan.shared_query(("content", "g")), operations

    def independent(self, x, *, seed):
        drawn = [{"g": {op: {k: t[v] for k, t in p.items()} for op, p in self.operations.items()}} for v in range(2)]
        return ViewBatch(torch.stack([x, x]), ViewPlan.shared_query(("content",)), parameters=drawn)


@pytest.fixture
def asked(monkeypatch):
    """What the probes were asked: (inputs, targets, train, test, weights) of every call."""
    calls, real = [], label_free.score_cells

    def score_cells(inputs, targets, split, *args, **kw):
        calls.append((inputs, targets, split.train, split.test, split.weights))
        return real(inputs, targets, split, *args, **kw)

    monkeypatch.setattr(label_free, "score_cells", score_cells)
    return calls


def targets_of(asked, operations, **kw):
    """Name -> values [P, k] and train rows, for parameters that are given."""
    n = len(next(iter(next(iter(operations.values())).values()))[0])
    table = parameter_matrix(means, Given(operations), images(n), draws=1, **QUICK | kw)
    _, targets, train, _, _ = asked[-1]
    named = {k.removeprefix("g/"): t.values for k, t in targets.items() if k.startswith("g/")}
    assert table.factors == ("g",) and (table.parts.factors if table.parts else ()) == tuple("g/" + k for k in named)
    return named, train, table


def standard(value, train):
    value = torch.as_tensor(value, dtype=torch.float64)
    value = value.reshape(len(value), -1)
    return (value - value[train].mean(0)) / value[train].std(0)


def equal(got, expected, train):
    torch.testing.assert_close(got, standard(expected, train), rtol=1e-9, atol=1e-9)


# ---- what a model is known to know


@pytest.mark.parametrize("probe", ["ridge", "kernel"])
def test_each_space_knows_what_it_sees_and_nothing_else(probe):
    table = parameter_matrix(Knows(), two_groups(), squares(), probe=probe, draws=5, bootstrap=20)
    assert (table.spaces, table.factors) == (("noise", "nothing", "color", "place"), ("place", "color"))
    assert table.parts.spaces == table.spaces and table.parts.factors == (ACROSS, DOWN, BRIGHT)
    for space in table.spaces:
        for factor in (*table.factors, *table.parts.factors):
            low, high = (0.97, 1) if factor.startswith(space) else (-0.25, 0.1)
            assert low < table[space, factor] <= high, (space, factor, table[space, factor])
            least, most = (table if factor in table.factors else table.parts).intervals[space, factor]
            assert least <= table[space, factor] <= most or not factor.startswith(space)
    assert not table.notes


def test_pictures_of_one_colour_tell_brightness_and_no_shift():
    table = parameter_matrix(means, two_groups(), greys(), draws=5, bootstrap=0)
    assert table["content", "color"] > 0.97 and -0.2 < table["content", "place"] < 0.05
    assert table["content", BRIGHT] == pytest.approx(table["content", "color"], abs=1e-9)


def test_views_may_be_embedded_in_batches_of_any_size_and_pairs_stay_pairs():
    table = parameter_matrix(Knows(), two_groups(), squares(50), draws=3, batch_size=16, **QUICK)
    assert table["color", "color"] > 0.97 and table["place", "place"] > 0.97 and table["place", "color"] < 0.1


def test_an_angle_is_known_all_round_the_circle():
    """A dot that goes round: from its place the turn follows as (cos, sin), not as a number of degrees."""
    x = torch.zeros(60, 3, 17, 17)
    x[:, :, 7:10, 13:16] = 0.9

    def place(x):
        at = torch.arange(-8.0, 9)
        weight = x.mean(1) / x.mean(1).sum((1, 2), keepdim=True)
        return {"place": torch.stack([(weight.sum(1) * at).sum(1), (weight.sum(2) * at).sum(1)], 1)}

    views = StructuredViews({"turn": [K.RandomRotation(180.0, p=1.0)]}, seed=0)
    assert parameter_matrix(place, views, x, draws=5, bootstrap=0)["place", "turn"] > 0.9


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (K.RandomHue((-0.5, 0.5)), "hue_factor"),
        (K.ColorJitter(hue=0.5, p=1.0), "hue_factor"),
        (K.ColorJiggle(hue=0.5, p=1.0), "hue_factor"),
        (K.RandomAffine(180.0, p=1.0), "angle"),
        (K.RandomRotation(180.0, p=1.0), "degrees"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_a_turn_by_the_period_changes_no_pixel_and_half_of_it_does(op, name):
    views, x = StructuredViews({"g": [op]}, seed=0), images(4, 9)
    batch = views.independent(x)
    drawn = batch.parameters[0]["g"][f"0.{type(op).__name__}"]
    theta = drawn[name] % differences.PERIODS[name] - differences.PERIODS[name] / 2
    drawn[name] = theta
    before = views.replay(x, batch.parameters[0])
    drawn[name] = theta + differences.PERIODS[name]
    torch.testing.assert_close(views.replay(x, batch.parameters[0]), before, rtol=0, atol=1e-3)
    drawn[name] = theta + differences.PERIODS[name] / 2
    assert (views.replay(x, batch.parameters[0]) - before).abs().max() > 0.1


# ---- what is predicted


def test_targets_equal_a_slow_loop(asked):
    color = [K.ColorJitter(0.2, 0.2, 0.2, 0.5, p=0.6), K.RandomPosterize((2.0, 6.0), p=0.7)]
    spatial = [K.RandomResizedCrop((8, 8), scale=(0.2, 1.0)), K.RandomAffine(170, (0.1, 0.2), (0.8, 1.2), p=1.0)]
    spatial.append(K.RandomAffine(60, p=0.5))
    views = Watched(StructuredViews({"spatial": spatial, "color": color}, then=[K.RandomGrayscale()], seed=1))
    x = torch.rand(23, 3, 12, 10, generator=generator())
    table = parameter_matrix(means, views, x, draws=4, batch_size=9, **QUICK)
    assert views.sizes == [9, 9, 5] * 4
    _, targets, train, _, _ = asked[0]

    def values(group, op, name, view):
        return [row.double().reshape(-1) for b in views.given for row in b.parameters[view][group][op][name]]

    def difference(group, op, name):
        a, b = values(group, op, name, 0), values(group, op, name, 1)
        if name == "batch_prob":
            return torch.stack([q - p for p, q in zip(a, b, strict=True)])
        gates = [[bool(g) for g in values(group, op, "batch_prob", view)] for view in range(2)]
        if name == "src":  # the images are 10 wide and 12 high
            for side in (a, b):
                for i, corners in enumerate(side):
                    across, down = corners[0::2], corners[1::2]
                    size = [(across.max() - across.min()) / 10, (down.max() - down.min()) / 12]
                    side[i] = torch.stack(
                        [*((across.max() + across.min()) / 20, (down.max() + down.min()) / 24), *size]
                    )
        fired = [v for side, gate in zip((a, b), gates, strict=True) for v, g in zip(side, gate, strict=True) if g]
        mean = sum(fired) / len(fired)
        out = []
        for p, q, fired_p, fired_q in zip(a, b, *gates, strict=True):
            out.append((q if fired_q else mean) - (p if fired_p else mean))
        turned = {("0.ColorJitter", "hue_factor"): 1, ("1.RandomAffine", "angle"): 360}.get((op, name))
        if turned:
            out = [torch.cat([(d * 2 * math.pi / turned).cos(), (d * 2 * math.pi / turned).sin()]) for d in out]
        return torch.stack(out)

    expected = {
        "spatial/0.RandomResizedCrop": ["src"],
        "spatial/1.RandomAffine": ["translations", "scale", "angle"],
        "spatial/2.RandomAffine": ["batch_prob", "angle"],
        "color/0.ColorJitter": [
            "batch_prob",
            *(f"{what}_factor" for what in ("brightness", "contrast", "hue", "saturation")),
        ],
        "color/1.RandomPosterize": ["batch_prob", "bits_factor"],
    }
    paths = [f"{op}/{name}" for op, names in expected.items() for name in names]
    assert sorted(table.parts.factors) == sorted(paths) and set(targets) == set(paths)
    for path in paths:
        # scale is [n, 2], the same on both axes: both are kept
        got, want = targets[path], difference(*path.split("/"))
        assert len(got.values) == 4 * 23
        torch.testing.assert_close(got.values, standard(want, train), rtol=1e-6, atol=1e-6, msg=path)


def drawn(low, high, *shape, n=40, seed=0):
    """[2, n, ...] from low to high, both of which occur."""
    x = torch.rand(2, n, *shape, generator=generator(seed), dtype=torch.float64) * (high - low) + low
    x[0, 0], x[1, 1] = low, high
    return x


@pytest.mark.parametrize(
    ("name", "low", "high", "circular"),
    [
        ("hue_factor", -0.25, 0.25, False),
        ("hue_factor", -0.26, 0.25, True),
        ("angle", -90, 90, False),
        ("angle", -90, 91, True),
        ("degrees", 100, 280, False),
        ("degrees", 100, 281, True),
        ("shear_x", -300, 300, False),
    ],
)
def test_more_than_half_of_the_circle_is_an_angle_and_less_a_number(asked, name, low, high, circular):
    theta = drawn(low, high)
    named, train, _ = targets_of(asked, {"0.Op": {name: theta}})
    difference = theta[1] - theta[0]
    if circular:
        phase = difference * 2 * math.pi / (1 if name == "hue_factor" else 360)
        difference = torch.stack([phase.cos(), phase.sin()], 1)
    equal(named[f"0.Op/{name}"], difference, train)


def test_the_half_circle_is_that_of_both_views_together(asked):
    theta = torch.stack([drawn(0, 100)[0], drawn(90, 190)[1]])
    named, _, _ = targets_of(asked, {"0.Op": {"angle": theta}})
    assert named["0.Op/angle"].shape == (40, 2)


@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_where_an_operation_did_not_fire_it_counts_as_the_mean_of_where_it_did(asked, shape):
    gate, theta = (drawn(0, 1, seed=1) > 0.4).float(), drawn(3, 5, *shape)
    fired = (gate > 0.5).view(2, 40, *[1] * len(shape))
    wild = torch.where(fired, theta, 1e6)  # whatever was drawn, it was not applied
    named, train, _ = targets_of(asked, {"0.Op": {"strength": wild, "batch_prob": gate}})
    assert list(named) == ["0.Op/batch_prob", "0.Op/strength"]
    equal(named["0.Op/batch_prob"], gate[1] - gate[0], train)
    effective = torch.where(fired, theta, theta[gate > 0.5].mean(0))
    equal(named["0.Op/strength"], effective[1] - effective[0], train)


def test_what_was_drawn_and_not_applied_makes_no_circle(asked):
    gate, theta = (drawn(0, 1, seed=1) > 0.4).float(), drawn(-80, 80)
    named, _, _ = targets_of(asked, {"0.Op": {"angle": torch.where(gate > 0.5, theta, 300.0), "batch_prob": gate}})
    assert named["0.Op/angle"].shape == (40, 1)


@pytest.mark.parametrize(("fires", "left"), [(1.0, ["0.Op/strength"]), (0.0, [])])
def test_a_gate_that_never_changes_is_no_parameter(asked, fires, left):
    gate = torch.full((2, 40), fires)
    named, _, table = targets_of(asked, {"0.Op": {"strength": drawn(0, 1), "batch_prob": gate}})
    assert list(named) == left
    assert math.isnan(table["content", "g"]) == (not left) and bool(table.notes) == (not left)


def test_several_numbers_are_flattened_and_constant_ones_left_out(asked):
    square, pair = drawn(0, 1, 3, 2), drawn(0, 1, 2, seed=1)
    pair[..., 1] = 7.0
    fixed, same = torch.full((2, 40), 5.0), drawn(0, 1)[:1].expand(2, 40)  # the same in both views
    parts = {"square": square, "pair": pair, "fixed": fixed, "same": same}
    named, train, table = targets_of(asked, {"0.Op": parts, "1.Op": {"order": drawn(0, 3, 4)}})
    assert list(named) == ["0.Op/square", "0.Op/pair"]
    equal(named["0.Op/square"], square[1] - square[0], train)
    equal(named["0.Op/pair"], (pair[1] - pair[0])[:, 0], train)
    assert sum(t.values.shape[1] for t in asked[0][1].values()) == 7 and not table.notes


def test_what_varies_by_rounding_or_in_no_pair_to_learn_from_is_constant(asked):
    rounding = torch.stack([torch.zeros(40).double(), 5 + 1e-8 * drawn(0, 1)[1]])
    _, train, table = targets_of(asked, {"0.Op": {"rounding": rounding}})
    once = torch.zeros(2, 40)
    once[1, next(i for i in range(40) if i not in train.tolist())] = 1.0
    _, _, other = targets_of(asked, {"0.Op": {"once": once}})
    for t in (table, other):
        assert math.isnan(t["content", "g"]) and "no parameter of this group varies" in t.notes["content", "g"]


def test_a_crop_is_its_centre_and_size_in_shares_of_its_own_image(asked):
    """Corners by hand in images of two sizes, (height, width): the order of the corners does not matter."""
    size = torch.tensor([[20, 10], [40, 30]]).repeat(20, 1).expand(2, 40, 2)
    low, extent = drawn(0, 4, 2).round(), 2 + drawn(0, 4, 2, seed=1).round()
    high = low + extent
    corners = torch.stack(
        [low, torch.stack([high[..., 0], low[..., 1]], -1), high, torch.stack([low[..., 0], high[..., 1]], -1)], 2
    )
    wh = size.flip(-1)
    box = torch.cat([(low + high) / 2 / wh, extent / wh], 2)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        named, train, _ = targets_of(asked, {"0.Crop": {"src": corners[:, :, order], "input_size": size}})
        assert list(named) == ["0.Crop/src"]
        equal(named["0.Crop/src"], box[1] - box[0], train)
    named, train, _ = targets_of(asked, {"0.Warp": {"src": corners}})  # no crop
    assert named["0.Warp/src"].shape == (40, 8)


def test_a_field_of_noise_is_left_out_with_a_note():
    noise = [K.RandomGaussianNoise(p=0.5)]
    views = StructuredViews({"color": [brightness()], "all": [brightness(), *noise], "noise": noise}, seed=0)
    table = parameter_matrix(means, views, images(), draws=3, **QUICK)
    assert table.parts.factors == (
        BRIGHT,
        BRIGHT.replace("color", "all"),
        "all/1.RandomGaussianNoise/batch_prob",
        "noise/0.RandomGaussianNoise/batch_prob",
    )
    assert table.notes == {
        ("content", "all"): "left out: all/1.RandomGaussianNoise/gaussian_noise, a field of noise",
        ("content", "noise"): "left out: noise/0.RandomGaussianNoise/gaussian_noise, a field of noise",
    }
    assert not table.parts.notes and not any(math.isnan(v) for v in table.scores.values())


def test_sixteen_numbers_are_no_field_of_noise(asked):
    named, _, table = targets_of(asked, {"0.Op": {"grid": drawn(0, 1, 4, 4), "field": drawn(0, 1, 17)}})
    assert list(named) == ["0.Op/grid"] and "g/0.Op/field" in table.notes["content", "g"]


def test_a_group_that_draws_nothing_has_no_score_and_says_so():
    views = StructuredViews({"still": [brightness(p=1e-9), K.CenterCrop(4)], "color": [brightness()]}, seed=0)
    table = parameter_matrix(lambda x: means(x) | {"style": x.flatten(1)}, views, images(), draws=2, probe="ridge")
    for space in ("content", "style"):
        assert math.isnan(table[space, "still"]) and (space, "still") not in table.intervals
        assert "no parameter of this group varies" in table.notes[space, "still"]
        assert table[space, "color"] > 0.9
    assert table.parts.factors == (BRIGHT,) and "n/a" in str(table)
    alone = parameter_matrix(means, StructuredViews({"still": [brightness(p=1e-9)]}, seed=0), images(), **QUICK)
    assert math.isnan(alone["content", "still"]) and alone.parts is None


def test_a_group_is_the_mean_of_its_parameters_each_counted_once(monkeypatch):
    """With one penalty for all, as a group is fitted as a whole; an angle is two columns and counts once."""
    monkeypatch.setattr(probes, "RIDGE_ALPHAS", (0.01,))
    turn = [K.RandomAffine(180.0, (0.2, 0.2), padding_mode="border", p=1.0), brightness()]
    views = StructuredViews({"one": [*turn, K.RandomGrayscale(p=0.5)], "other": [brightness()]}, seed=0)
    table = parameter_matrix(Knows(), views, squares(), draws=4, **QUICK)
    for space in ("color", "place"):
        scores = [table[space, p] for p in table.parts.factors if p.startswith("one/")]
        assert len(scores) == 4 and max(scores) - min(scores) > 0.5
        assert table[space, "one"] == pytest.approx(sum(scores) / 4, abs=1e-9)


def test_what_the_probe_sees_is_difference_and_sum_of_the_two_views(asked):
    views, x = Watched(two_groups()), squares(20)
    parameter_matrix(means, views, x, draws=3, batch_size=8, **QUICK)
    inputs, _, _, _, _ = asked[0]
    a, b = (torch.cat([means(batch[v])["content"] for batch in views.given]) for v in range(2))
    (difference, total) = inputs["content"]
    torch.testing.assert_close(difference, b - a)
    torch.testing.assert_close(total, a + b)


# ---- the split


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("folds", [3, 5])
def test_pairs_of_an_image_share_a_side_and_a_fold(asked, monkeypatch, draws, folds):
    probed = []
    monkeypatch.setitem(probes.SOLVERS, "ridge", lambda p: (probed.append(p), probes._ridge(p))[1])
    table = parameter_matrix(
        means, two_groups(), squares(29), draws=draws, probe=Probe("ridge", folds=folds), bootstrap=0
    )
    _, _, train, test, _ = asked[0]
    assert (table.n_train, table.n_test) == (len(train), len(test))
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(29 * draws))  # nothing lost, nothing twice
    sides = [set((rows % 29).tolist()) for rows in (train, test)]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 29
    assert len(sides[0]) == 14
    (problem,) = probed
    assert problem.folds == folds and torch.equal(problem.rows, train)
    seen = [set((problem.rows[problem.part(f, folds)] % 29).tolist()) for f in range(folds)]
    assert all(not a & b for i, a in enumerate(seen) for b in seen[:i])
    assert sorted(i for fold in seen for i in fold) == sorted(sides[0])
    assert train.tolist() != sorted(train.tolist())


@pytest.mark.parametrize("probe", ["ridge", "kernel", "mlp"])
def test_nearly_dead_units_cost_next_to_nothing(asked, probe):
    """A unit that answers to three held-out images alone, in one of their views."""
    x, calls = squares(100), []

    def model(x):
        z = Knows()(x)
        unit = 1e-4 * x[:, :1, 5, 5]
        if calls:
            unit[calls[0]] = 1.0
        return {"color": torch.cat([z["color"], unit], 1)}

    plain = parameter_matrix(model, two_groups(), x, draws=1, probe=probe, bootstrap=0)
    calls.append(asked[0][3][:3])  # held-out rows, of the first view
    nearly = parameter_matrix(model, two_groups(), x, draws=1, probe=probe, bootstrap=0)
    assert plain["color", "color"] > 0.9 and nearly["color", "color"] == pytest.approx(
        plain["color", "color"], abs=0.08
    )


def test_train_fraction_is_of_images(asked):
    table = parameter_matrix(
        means, two_groups(), images(), draws=2, probe=Probe("ridge", train_fraction=0.75), bootstrap=0
    )
    assert (table.n_train, table.n_test) == (30, 10)


def test_kernel_rows_bound_the_kernel_alone_and_keep_the_folds(asked, monkeypatch):
    probed = []
    for name, solve in list(probes.SOLVERS.items()):
        monkeypatch.setitem(probes.SOLVERS, name, lambda p, solve=solve: (probed.append(p), solve(p))[1])
    for probe, rows in (("kernel", 33), ("ridge", 45)):
        kw = {"probe": Probe(probe, kernel_rows=33), "bootstrap": 0}
        table = parameter_matrix(means, two_groups(), squares(30), draws=3, **kw)
        assert (table.n_train, table.n_test) == (rows, 45)
        folds = [set((asked[-1][2][probed[-1].part(f, 5)] % 30).tolist()) for f in range(5)]
        assert all(not a & b for i, a in enumerate(folds) for b in folds[:i])


def test_ten_images_are_enough_with_any_folds():
    for folds in (2, 5, 9):
        table = parameter_matrix(
            means, two_groups(), squares(10), draws=4, probe=Probe("ridge", folds=folds), bootstrap=0
        )
        assert math.isfinite(table["content", "color"]) and table.n_train + table.n_test == 40 and table.n_train >= 16


@pytest.mark.parametrize("draws", [1, 3])
def test_bootstrap_draws_images_with_all_their_pairs(asked, draws):
    table = parameter_matrix(means, two_groups(), squares(29), probe="ridge", draws=draws, bootstrap=7)
    _, _, _, test, weights = asked[0]
    held_out = len(set((test % 29).tolist()))
    assert weights.shape == (7, draws * held_out) and (weights.sum(1) == draws * held_out).all()
    for resample in weights.tolist():
        by_image = {}
        for row, weight in zip(test.tolist(), resample, strict=True):
            by_image.setdefault(row % 29, set()).add(weight)
        assert all(len(w) == 1 for w in by_image.values()) and len({min(w) for w in by_image.values()}) > 1
    assert len({tuple(r) for r in weights.tolist()}) == 7
    low, high = table.intervals["content", "color"]
    assert low < high and set(table.parts.intervals) == {("content", f) for f in table.parts.factors}


@pytest.mark.parametrize(("n", "draws"), [(300, 7), (700, 3), (2001, 1)])
def test_about_two_thousand_pairs_unless_told_otherwise(n, draws):
    views = StructuredViews({"color": [brightness()]}, seed=0)
    table = parameter_matrix(means, views, images(n, 2), **QUICK)
    assert table.n_train + table.n_test == n * draws


# ---- seeds


def test_a_seed_repeats_everything_and_nothing_else_is_read_or_moved():
    x, tables, views = squares(20), [], two_groups()
    views(x)
    state = views.seed, views.call
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        tables.append(parameter_matrix(means, views, x, probe="ridge", draws=2, bootstrap=5).to_json())
        assert torch.equal(torch.get_rng_state(), before)
    assert tables[0] == tables[1] and (views.seed, views.call) == state
    fresh = two_groups()
    fresh(x)
    assert torch.equal(fresh(x).views, views(x).views), "the draws of training have moved"
    assert parameter_matrix(means, views, x, probe="ridge", draws=2, bootstrap=5).to_json() == tables[0]
    assert parameter_matrix(means, two_groups(9), x, probe="ridge", draws=2, bootstrap=5).to_json() != tables[0]


def test_a_seed_is_of_views_split_resamples_and_mlp(asked, monkeypatch):
    seen, given = [], []
    monkeypatch.setitem(probes.SOLVERS, "mlp", lambda p: (seen.append(p.seed), probes._ridge(p))[1])
    for seed in (3, 4):
        views = Watched(two_groups())
        parameter_matrix(means, views, squares(20), probe="mlp", draws=1, bootstrap=5, seed=seed)
        given.append(views.given[0].views)
    (_, _, train, _, weights), (_, _, other, _, others) = asked
    assert seen == [3, 4]
    assert not torch.equal(*given) and not torch.equal(train, other) and not torch.equal(weights, others)


def test_every_draw_and_every_batch_draws_anew():
    views = Watched(two_groups())
    parameter_matrix(means, views, squares(20), draws=3, batch_size=8, **QUICK)
    factors = [
        p["color"]["0.RandomBrightness"]["brightness_factor"][:4] for batch in views.given for p in batch.parameters
    ]
    assert len(factors) == 18 and len({tuple(f.tolist()) for f in factors}) == 18


# ---- what comes in


def tables_equal(a, b):
    assert a.to_json() == b.to_json()


def test_batches_draw_as_one_tensor_in_batches_of_that_size():
    """Another batch size draws other views: nearly the same scores, not the same numbers."""
    x = squares(50)
    loader = DataLoader(TensorDataset(x, torch.arange(50)), batch_size=16)
    whole = parameter_matrix(means, two_groups(), x, draws=3, batch_size=16, **QUICK)
    tables_equal(parameter_matrix(means, two_groups(), loader, draws=3, **QUICK), whole)
    tables_equal(parameter_matrix(means, two_groups(), iter(x.split(16)), draws=3, batch_size=1, **QUICK), whole)
    other = parameter_matrix(means, two_groups(), x, draws=3, batch_size=50, **QUICK)
    assert other["content", "color"] != whole["content", "color"]
    assert other["content", "color"] == pytest.approx(whole["content", "color"], abs=0.05)


def test_bytes_are_images():
    x = (squares(20) * 255).round().to(torch.uint8)
    bytes_, floats = (parameter_matrix(means, two_groups(), t, draws=2, **QUICK) for t in (x, x.float() / 255))
    tables_equal(bytes_, floats)


@pytest.mark.parametrize(
    "kw",
    [
        {"plan": "interleaved"},
        {"key_groups": {"color": [K.RandomBrightness((0.5, 1.5)), K.RandomInvert()]}, "key_then": [K.RandomInvert()]},
        {"plan": "interleaved", "key_groups": {"color": [K.RandomBrightness((0.5, 1.5))]}},
        {"cross_image": ("color",)},
    ],
    ids=["interleaved", "keys", "both", "cross"],
)
def test_plan_and_keys_do_not_matter(kw):
    plain = parameter_matrix(means, two_groups(), squares(20), draws=2, **QUICK)
    tables_equal(parameter_matrix(means, two_groups(**kw), squares(20), draws=2, **QUICK), plain)


def heads():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5))
    return StyleHeads(backbone, {"content": 4, "color": 3}, in_features=5, hidden=(6,))


def test_the_backbone_is_a_row_where_asked_for():
    with_it = parameter_matrix(heads(), two_groups(), squares(20), draws=2, backbone=True, **QUICK)
    without = parameter_matrix(heads(), two_groups(), squares(20), draws=2, **QUICK)
    assert with_it.spaces == ("content", "color", "backbone") and without.spaces == ("content", "color")
    tables_equal(with_it.only(spaces=without.spaces), without.only())
    assert with_it.parts.spaces == with_it.spaces
    assert "backbone" not in parameter_matrix(means, two_groups(), squares(20), draws=1, backbone=True, **QUICK).spaces


@pytest.mark.parametrize("unit", [False, True])
def test_unit_rows_are_scaled_before_they_are_compared(asked, unit):
    views, model = Watched(two_groups()), heads().eval()
    parameter_matrix(model, views, squares(20), draws=1, backbone=True, on_sphere=unit, **QUICK)
    a, b = (embed(model, views.given[0][v], on_sphere=unit) for v in range(2))
    for space, (difference, total) in asked[0][0].items():
        torch.testing.assert_close(difference, b[space] - a[space])
        torch.testing.assert_close(total, a[space] + b[space])
        assert (((total - difference) / 2).norm(dim=1) - 1).abs().max() < 1e-5 or not unit


def test_the_model_runs_in_evaluation_without_gradient_and_is_put_back():
    model, seen = heads().train(), []
    model.backbone[1].eval()
    before = {name: m.training for name, m in model.named_modules()}
    model.backbone.register_forward_hook(lambda m, *_: seen.append((m.training, torch.is_grad_enabled())))
    statistics = [b.clone() for b in model.buffers()]
    parameter_matrix(model, two_groups(), squares(20), draws=2, **QUICK)
    assert set(seen) == {(False, False)} and torch.is_grad_enabled()
    assert {name: m.training for name, m in model.named_modules()} == before
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))


# ---- the table


def test_the_table_finds_parts_prints_and_survives_json():
    table = parameter_matrix(Knows(), two_groups(), squares(20), probe="ridge", draws=3, bootstrap=5)
    assert table["color", BRIGHT] == table.parts["color", BRIGHT] == table.parts.scores["color", BRIGHT]
    assert (table.unit, table.probe, table.given, table.parts.unit) == ("pairs of views", "ridge", (), "pairs of views")
    assert str(table).endswith("ridge probe, 30 pairs of views to train, 30 held out")
    back = ScoreTable.from_json(table.to_json())
    tables_equal(back, table)
    assert back["place", DOWN] == table["place", DOWN]
    with pytest.raises(KeyError, match=r"factors place, color: got \('color', 'hue'\)"):
        table["color", "hue"]


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": images(3)}, ValueError, "images: expected at least 10, as pairs .* of the split: got 3"),
        ({"images": images(9), "draws": 2}, ValueError, "images: expected at least 10, as pairs .*: got 9"),
        ({"images": []}, ValueError, "images: expected at least 10.*: got 0"),
        ({"images": images()[:0]}, ValueError, r"images: expected \[n, C, H, W\].*got \[0, 3, 6, 6\]"),
        ({"images": images() * 2}, ValueError, r"images: expected values in \[0, 1\]"),
        ({"images": [{"image": images()}]}, TypeError, "images: expected batches .*: got dict"),
        ({"views": StructuredViews({}, seed=0)}, ValueError, "views: expected groups .*: got views without groups"),
        ({"model": lambda x: {"color": x.flatten(1) * math.nan}}, ValueError, "space 'color': expected finite .* NaN"),
        ({"model": lambda x: x}, ValueError, r"or features \[b, F\]: got \[40, 3, 6, 6\] for 40 images; pool it"),
        ({"model": lambda x: None}, TypeError, "model: expected .*: got NoneType"),
        ({"model": lambda x: {"color": x}}, ValueError, r"space 'color' as \[40, d\].*got \[40, 3, 6, 6\]"),
        ({"model": lambda x: {"color": x[:, 0, 0, :0]}}, ValueError, r"space 'color': .*got \[20, 0\]"),
        ({"draws": 0}, ValueError, "draws: expected a whole number of pairs per image, 1 or more: got 0"),
        ({"draws": 1.5}, ValueError, "draws: .*got 1.5"),
        ({"draws": True}, ValueError, "draws: .*got True"),
        ({"probe": "forest"}, ValueError, "probe: expected one of 'ridge', 'kernel', 'mlp': got 'forest'"),
        ({"bootstrap": -1}, ValueError, "bootstrap: .*got -1"),
        (
            {"probe": Probe("ridge", train_fraction=0.9)},
            ValueError,
            "train_fraction: .* at least 5 on either side: got 0.9",
        ),
    ],
)
def test_bad_input(change, error, message):
    given = {"model": means, "views": two_groups(), "images": images(), "draws": 1, "probe": "ridge"} | change
    with pytest.raises(error, match=message):
        parameter_matrix(given.pop("model"), given.pop("views"), given.pop("images"), **given)


# ---- two views that share nothing


def everything(seed=0, **kw):
    groups = {
        "spatial": [K.RandomResizedCrop((8, 8), scale=(0.2, 0.9)), K.RandomAffine(30, (0.1, 0.1), p=0.5)],
        "color": [K.ColorJitter(0.4, 0.4, 0.4, 0.4, p=0.8), brightness(), brightness(), K.RandomGrayscale(p=0.3)],
        "more": [brightness()],
    }
    return StructuredViews(groups, then=[K.RandomGaussianBlur((3, 3), (0.1, 2.0), p=0.7)], seed=seed, **kw)


def draws_of(parameters):
    """(group, operation, name) -> what differs between any two draws, for numbers that are drawn from a range."""
    fixed = ("batch_prob", "dst", "input_size", "output_size", "center", "scale", "shear_x", "shear_y", "order")
    return {
        (g, o, n): t for g, ops in parameters.items() for o, p in ops.items() for n, t in p.items() if n not in fixed
    }


def test_independent_views_share_no_parameter_and_every_image_has_its_own():
    batch = everything().independent(images(8, 40))
    assert batch.views.shape == (2, 8, 3, 8, 8) and len(batch.parameters) == 2
    assert batch.plan == ViewPlan.shared_query(("content",)) and batch.image_ids is None
    seen = set()
    a, b = (draws_of(p) for p in batch.parameters)
    assert {g for g, _, _ in a} == {"spatial", "color", "more", "then"} and a.keys() == b.keys()
    for (_, op, name), t in [*a.items(), *b.items()]:
        rows = [(op.split(".")[1], name, *row.flatten().tolist()) for row in t]
        assert len(set(rows)) == 8 and not seen & set(rows), (op, name)
        seen |= set(rows)
    gates = [p["spatial"]["1.RandomAffine"]["batch_prob"] for p in batch.parameters]
    assert not torch.equal(*gates)
    assert a["spatial", "1.RandomAffine", "translations"].abs().max() <= 0.8, "a tenth of the crop, not of the image"


@pytest.mark.parametrize(
    "kw",
    [{}, {"plan": "interleaved"}, {"key_groups": {"more": [K.RandomInvert(p=1.0)]}, "key_then": [K.RandomInvert()]}],
    ids=["plain", "interleaved", "keys"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_independent_views_replay(kw, dtype):
    x = images(6, 12) if dtype == torch.float32 else (images(6, 12) * 255).to(dtype)
    views = everything(**kw)
    batch = views.independent(x, seed=(1, 2))
    for v in range(2):
        assert torch.equal(views.replay(x, batch.parameters[v]), batch[v])
    assert torch.equal(batch.views, everything().independent(x, seed=(1, 2)).views), "the query's operations alone"


def test_independent_views_come_from_the_seed_alone(monkeypatch):
    x, views = images(6, 12), everything()
    first = views.independent(x, seed=(0, 1)).views
    for _ in range(2):
        views(x)
    monkeypatch.setenv("RANK", "3")
    assert torch.equal(views.independent(x, seed=(0, 1)).views, first)
    assert torch.equal(views.independent(x).views, views.independent(x, seed=0).views)
    others = [views.independent(x, seed=s).views for s in (0, 1, (1, 0), (0, 1, 0))]
    others.append(everything(seed=1).independent(x, seed=(0, 1)).views)
    assert len({v.sum().item() for v in [first, *others]}) == 6


def test_independent_views_do_not_move_the_draws_of_training():
    x, views, untouched = images(6, 12), everything(), everything()
    untouched(x)
    views(x)
    state, before = (views.seed, views.call), torch.get_rng_state()
    views.independent(x)
    assert (views.seed, views.call) == state and torch.equal(torch.get_rng_state(), before)
    assert torch.equal(views(x).views, untouched(x).views)


def test_independent_crops_are_free():
    x = images(6, 12)
    free, tied = (everything(**kw).independent(x) for kw in ({}, {"constrained_crop": 0.0}))
    assert torch.equal(free.views, tied.views)


def test_independent_views_are_made_in_float32_without_gradient():
    x = images(6, 12)
    plain = everything().independent(x).views
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(everything().independent(x).views, plain)
    assert not everything().independent(x.clone().requires_grad_()).views.requires_grad


def test_independent_views_without_groups_redraw_what_is_left():
    batch = StructuredViews({}, then=[brightness()], seed=0).independent(images(4))
    assert list(batch.parameters[0]) == ["then"] and not torch.equal(batch[0], batch[1])


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.rand(3, 8, 8), ValueError, r"images: expected \[B, C, H, W\]: got 3 dimensions"),
        (torch.rand(2, 3, 8, 8) * 2, ValueError, "images: expected values in"),
        (torch.zeros(0, 3, 8, 8), ValueError, "at least one image"),
        ([1], TypeError, "images: .*got list"),
    ],
)
def test_independent_views_of_bad_images(bad, error, message):
    with pytest.raises(error, match=message):
        everything().independent(bad)


# ---- what a review found


@pytest.mark.parametrize("seed", [3, 10, 15])
def test_a_gate_that_fires_on_one_side_of_the_split_alone_is_left_out(seed):
    views = StructuredViews({"color": [brightness(), K.RandomGrayscale(p=0.03)]}, seed=0)
    table = parameter_matrix(means, views, images(), draws=1, seed=seed, **QUICK)
    assert table["content", "color"] > 0.9
    assert not any(math.isnan(v) for v in table.parts.scores.values())


def test_a_group_is_the_mean_of_its_parts_and_so_are_its_resamples():
    views = StructuredViews({"color": [brightness(), K.RandomGrayscale(p=0.4)], "place": [shift()]}, seed=0)
    table = parameter_matrix(Knows(), views, squares(40), draws=3, probe="ridge")
    for space in table.spaces:
        for group in table.factors:
            parts = [p for p in table.parts.factors if p.startswith(f"{group}/")]
            assert table[space, group] == pytest.approx(sum(table[space, p] for p in parts) / len(parts), abs=1e-12)
            low, high = table.intervals[space, group]
            assert low < table[space, group] < high
            widths = [b - a for a, b in (table.parts.intervals[space, p] for p in parts)]
            assert high - low < max(widths) + 1e-9


def test_nan_in_either_view_is_refused():
    for half in (slice(None, 10), slice(10, None)):

        def broken(x, half=half):
            z = x.mean((2, 3))
            z[half] = math.nan
            return {"content": z}

        with pytest.raises(ValueError, match=r"space 'content.*finite"):
            parameter_matrix(broken, two_groups(), images(10), draws=1, **QUICK)


def test_corners_that_are_drawn_as_targets_count():
    views = StructuredViews({"warp": [K.RandomThinPlateSpline(p=1.0)]}, seed=0)
    table = parameter_matrix(means, views, images(), draws=2, **QUICK)
    assert "warp/0.RandomThinPlateSpline/dst" in table.parts.factors


@pytest.mark.parametrize(("n", "fraction"), [(10, 0.04), (10, 0.1), (20, 0.2), (20, 0.99)])
def test_both_sides_of_the_split_need_images_however_many_pairs(n, fraction):
    with pytest.raises(ValueError, match=f"a fraction of the {n} images that leaves at least 5 on either side"):
        parameter_matrix(means, two_groups(), images(n), draws=50, **quick(train_fraction=fraction))


def test_a_group_of_noise_alone_says_what_was_left_out():
    views = StructuredViews({"noise": [K.RandomGaussianNoise(p=1.0)]}, seed=0)
    table = parameter_matrix(means, views, images(), draws=1, **QUICK)
    assert math.isnan(table["content", "noise"])
    assert "left out: noise/0.RandomGaussianNoise/gaussian_noise" in table.notes["content", "noise"]


@pytest.mark.parametrize("folds", [4, 9])
@pytest.mark.parametrize("probe", ["ridge", "mlp"])
def test_no_part_of_the_training_rows_shares_an_image_with_another(monkeypatch, folds, probe):
    probed = []
    monkeypatch.setitem(probes.SOLVERS, probe, lambda p: (probed.append(p), probes._ridge(p))[1])
    parameter_matrix(means, two_groups(), images(12), draws=3, probe=Probe(probe, folds=folds), bootstrap=0)
    for of in (folds, 5):  # the MLP stops by a fifth
        parts = [set((probed[0].rows[probed[0].part(f, of)] % 12).tolist()) for f in range(of)]
        assert sum(map(len, parts)) == 6 == len(set.union(*parts))


class WithRain:
    """Views of one's own, which draw as many drops as they like."""

    def __init__(self):
        self.views = StructuredViews({"color": [brightness()]}, seed=0)
        self.plan = ViewPlan.shared_query(("content", "rain", "color"))

    def independent(self, x, *, seed):
        batch = self.views.independent(x, seed=seed)
        for k, p in enumerate(batch.parameters):
            p["rain"] = {"0.Rain": {"drops": torch.rand(len(x), 2 + (k + seed[1]) % 3)}}
        return batch


def test_parameters_of_varying_size_are_left_out_with_a_note():
    table = parameter_matrix(means, WithRain(), images(12, size=12), batch_size=2, draws=4, **QUICK)
    assert "of varying size" in table.notes["content", "rain"]


def test_independent_views_repeat_no_draw_of_the_training():
    views, x = two_groups(), images(4)
    assert not torch.equal(views.independent(x, seed=(0, 0, 0)).views[0], views(x)[0])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"images": 3}, TypeError, "expected a tensor .n, C, H, W. or batches of them: got int"),
        ({"batch_size": 0}, ValueError, "batch_size: expected a whole number of images, 1 or more: got 0"),
        ({"batch_size": 2.5}, ValueError, "got 2.5"),
        ({"model": lambda x: {}}, ValueError, "got no space"),
        ({"model": lambda x: {f"s{len(x)}": x.mean((2, 3))}, "batch_size": 8}, ValueError, "spaces s16 of its first"),
    ],
)
def test_wrong_models_and_batches_say_so(given, error, message):
    arguments = {"model": means, "images": images(20), "batch_size": 8} | given
    with pytest.raises(error, match=message):
        parameter_matrix(
            arguments["model"], two_groups(), arguments["images"], batch_size=arguments["batch_size"], draws=1
        )
    with pytest.raises(error, match=message.replace("16", "8")):
        embed(arguments["model"], arguments["images"], batch_size=arguments["batch_size"])


def test_a_space_may_not_hide_the_backbone():
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = StyleHeads(backbone, {"content": 4, "backbone": 3}, in_features=5, hidden=())
    with pytest.raises(ValueError, match="expected no space named 'backbone'"):
        embed(model, images())
    assert list(embed(model, images(), backbone=False)) == ["content", "backbone"]


@pytest.mark.parametrize("on_sphere", [False, True])
def test_large_embeddings_are_no_unknown_ones(on_sphere):
    """Sums of two views overflow float32 from 2e38 on, lengths from 2e19 on."""
    views, x = two_groups(), squares(30)
    expected, got = (
        parameter_matrix(
            lambda x, s=s: {"a": (0.7 + 0.3 * x.mean((2, 3))) * s}, views, x, draws=2, on_sphere=on_sphere, **QUICK
        )
        for s in (1, 3e38)
    )
    for cell, score in expected.scores.items():
        assert got.scores[cell] == pytest.approx(score, abs=1e-3)
