"""r2_matrix against scikit-learn and hand-worked cases; what cannot be scored says why."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.preprocessing import KernelCenterer, StandardScaler
from splits import split_rows

from ssd_addon.metrics import Circular, Probe, ScoreTable, effective_rank, labelled, r2_matrix
from ssd_addon.metrics import probes as _probes

PROBES = ("ridge", "kernel", "mlp")
ROUNDING = 1e-9  # float64, systems of condition 1e6 at most


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(n=60, d=7, train=40, folds=5, seed=0, noise=(0.1, 3.0), classes=3, shift=5.0, drift=0.0):
    """Two numeric factors that want different penalties, and classes; inputs off centre and of unequal scale."""
    g = generator(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.linspace(0.5, 4, d) + shift
    x += drift * (torch.arange(n) % folds)[:, None]  # the folds have other means
    w = torch.randn(d, 2, generator=g, dtype=torch.float64)
    y = (x - shift) @ w + torch.randn(n, 2, generator=g, dtype=torch.float64) * torch.tensor(noise)
    labels = (y[:, 0] / y[:, 0].std()).round().long().clamp(-(classes // 2), classes // 2)
    rows, test = torch.arange(train), torch.arange(train, n)
    targets = [labelled.target_of(t, rows, test) for t in (y[:, 0], y[:, 1], labels)]
    return _probes.Problem(_probes.Inputs([x], rows), rows, targets, folds), x.numpy(), test


def numpy_y(p):
    return p.y(p.rows).numpy()


def sk_kernel_predict(k, y, alpha, train, test):
    """Kernel ridge with intercept: scikit-learn's, on the centred kernel and centred targets."""
    centre = KernelCenterer().fit(k[np.ix_(train, train)])
    model = KernelRidge(alpha=alpha, kernel="precomputed")
    model.fit(centre.transform(k[np.ix_(train, train)]), y[train] - y[train].mean(0))
    return model.predict(centre.transform(k[np.ix_(test, train)])) + y[train].mean(0)


# ---- ridge


@pytest.mark.parametrize("d", [7, 39, 55], ids=["primal", "primal, nearly square", "dual"])
def test_ridge_equals_scikit_learn(d):
    p, x, test = problem(d=d)
    scaler = StandardScaler().fit(x[:40])
    model = Ridge(alpha=3.0).fit(scaler.transform(x[:40]), numpy_y(p))
    expected = model.predict(scaler.transform(x[40:]))
    np.testing.assert_allclose(_probes._ridge(p, [3.0])(test).numpy(), expected, atol=ROUNDING)


@pytest.mark.parametrize("d", [7, 30, 55])
@pytest.mark.parametrize(("folds", "drift"), [(3, 0.0), (5, 0.0), (3, 5.0), (5, 1.0)])
def test_ridge_penalty_is_the_one_that_cross_validation_finds(d, folds, drift):
    p, x, test = problem(d=d, folds=folds, noise=(0.1, 20.0), drift=drift)
    alphas = [10.0**e for e in np.arange(-2, 4, 0.1)]
    xs, y = StandardScaler().fit(x[:40]).transform(x), numpy_y(p)
    errors = np.zeros((len(alphas), y.shape[1]))
    for i, alpha in enumerate(alphas):
        for f in range(folds):
            out = np.arange(40) % folds == f
            model = Ridge(alpha=alpha).fit(xs[:40][~out], y[~out])
            errors[i] += ((model.predict(xs[:40][out]) - y[out]) ** 2).sum(0)
    chosen = [errors[:, 0].argmin(), errors[:, 1].argmin(), errors[:, 2:].sum(1).argmin()]
    assert chosen[0] != chosen[1], "the case is there to tell penalties apart"
    columns = [[0], [1], list(range(2, y.shape[1]))]
    expected = [
        Ridge(alpha=alphas[c]).fit(xs[:40], y[:, k]).predict(xs[40:]) for c, k in zip(chosen, columns, strict=True)
    ]
    got = _probes._ridge(p, alphas)(test).numpy()
    np.testing.assert_allclose(got, np.concatenate([e.reshape(20, -1) for e in expected], 1), atol=ROUNDING)


@pytest.mark.parametrize("d", [7, 30])
def test_primal_and_dual_agree(d):
    p, _, _ = problem(d=d)
    alphas = [a * 40 for a in _probes.RIDGE_ALPHAS]
    for a, b in zip(_probes._primal(p, alphas), _probes._dual_ridge(p, alphas), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-7)


def test_the_smaller_system_is_solved(monkeypatch):
    called = []
    for name in ("_primal", "_dual_ridge"):
        real = getattr(_probes, name)
        monkeypatch.setattr(_probes, name, lambda *a, _n=name, _f=real: (called.append(_n), _f(*a))[1])
    _probes._ridge(problem(d=7)[0])
    _probes._ridge(problem(d=55)[0])
    assert called == ["_primal", "_dual_ridge"]


def test_table_equals_scikit_learn_end_to_end():
    g = generator(3)
    z, y = torch.randn(80, 5, generator=g), torch.randn(80, 2, generator=g)
    y = y + z[:, :2] * torch.tensor([1.0, 0.2])
    table = r2_matrix({"z": z}, {"y": y}, probe=Probe(train_fraction=0.6), seed=4)
    train, test = (t.numpy() for t in split_rows(80, 0.6, generator(4)))
    assert sorted([*train, *test]) == list(range(80)) and (table.n_train, table.n_test) == (48, 32)
    scaler = StandardScaler().fit(z[train])
    x, t = scaler.transform(z), StandardScaler().fit(y[train].double()).transform(y.double())
    errors = []
    for alpha in _probes.RIDGE_ALPHAS:
        e = 0.0
        for f in range(5):
            out = np.arange(48) % 5 == f
            e += (
                (Ridge(48 * alpha).fit(x[train][~out], t[train][~out]).predict(x[train][out]) - t[train][out]) ** 2
            ).sum()
        errors.append(e)
    model = Ridge(48 * _probes.RIDGE_ALPHAS[int(np.argmin(errors))]).fit(x[train], t[train])
    assert table["z", "y"] == pytest.approx(r2_score(t[test], model.predict(x[test])), abs=1e-6)


# ---- kernel


def test_kernel_equals_scikit_learn():
    p, x, test = problem()
    xs = StandardScaler().fit(x[:40]).transform(x)
    k = rbf_kernel(xs, gamma=1 / (2 * 1.7**2))
    expected = sk_kernel_predict(k, p.y(torch.arange(60)).numpy(), 0.3, np.arange(40), np.arange(40, 60))
    np.testing.assert_allclose(_probes._kernel(p, [0.3], [1.7])(test).numpy(), expected, atol=ROUNDING)


def test_kernel_bandwidth_and_penalty_are_those_that_cross_validation_finds():
    p, x, test = problem(folds=4, noise=(0.1, 20.0))
    xs, y = StandardScaler().fit(x[:40]).transform(x), p.y(torch.arange(60)).numpy()
    grid = [(h, a) for h in (1.0, 3.0, 20.0) for a in (1e-2, 1.0, 30.0)]
    columns = [[0], [1], list(range(2, y.shape[1]))]
    errors = np.zeros((len(grid), 3))
    for i, (h, alpha) in enumerate(grid):
        k = rbf_kernel(xs[:40], gamma=1 / (2 * h**2))
        for f in range(4):
            out = np.arange(40) % 4 == f
            predicted = sk_kernel_predict(k, y[:40], alpha, np.flatnonzero(~out), np.flatnonzero(out))
            errors[i] += [((predicted - y[:40][out]) ** 2)[:, c].sum() for c in columns]
    chosen = errors.argmin(0)
    assert len({grid[c][0] for c in chosen}) > 1, "the case is there to tell bandwidths apart"
    got = _probes._kernel(p, [1e-2, 1.0, 30.0], [1.0, 3.0, 20.0])(test).numpy()
    for c, column in zip(chosen, columns, strict=True):
        h, alpha = grid[c]
        k = rbf_kernel(xs, gamma=1 / (2 * h**2))
        expected = sk_kernel_predict(k, y, alpha, np.arange(40), np.arange(40, 60))
        np.testing.assert_allclose(got[:, column], expected[:, column], atol=1e-8)


def test_kernel_bandwidth_follows_the_median_distance(monkeypatch):
    p, x, test = problem()
    monkeypatch.setattr(_probes, "BANDWIDTHS", (0.5,))
    xs = StandardScaler().fit(x[:40]).transform(x[:40])
    distances = np.sqrt(((xs[:, None] - xs) ** 2).sum(-1))
    median = float(torch.from_numpy(distances[distances > 0]).median())
    torch.testing.assert_close(_probes._kernel(p, [0.1])(test), _probes._kernel(p, [0.1], [0.5 * median])(test))


def test_kernel_sees_what_a_line_cannot_and_takes_a_bounded_number_of_rows():
    z = torch.randn(600, 2, generator=generator())
    factors = {"product": z[:, 0] * z[:, 1]}
    assert r2_matrix({"z": z}, factors)["z", "product"] < 0.1
    table = r2_matrix({"z": z}, factors, probe=Probe("kernel", kernel_rows=150), bootstrap=0)
    assert table["z", "product"] > 0.9
    assert (table.n_train, table.n_test) == (150, 300)


def test_blocks_weigh_the_same_in_a_distance():
    g = generator()
    wide, narrow = torch.randn(50, 30, generator=g), torch.randn(50, 2, generator=g) * 9
    wide[:, 7] = 3.0
    x = _probes.Inputs([wide, narrow], torch.arange(50), balance=True)(torch.arange(50))
    assert x[:, :30].pow(2).mean(0).sum() == pytest.approx(1)
    assert x[:, 30:].pow(2).mean(0).sum() == pytest.approx(1)


def test_conditional_kernel_is_not_drowned_by_a_wide_space():
    g = generator()
    wide, c = torch.randn(400, 60, generator=g), torch.randn(400, generator=g)
    table = r2_matrix({"wide": wide}, {"c": c, "y": (3 * c).sin()}, probe="kernel", given=("c",), bootstrap=0)
    assert table["wide", "y"] > 0.5  # 0.1 were all columns to weigh the same


def test_constant_columns_become_zero():
    x = torch.linspace(0.1, 7, 40, dtype=torch.float64).expand(49, 40)
    assert (x.mean(0) != x[0]).any(), "the case is there because means are rounded"
    assert (_probes.Inputs([x], torch.arange(49))(torch.arange(49)).abs() < ROUNDING).all()


def test_chunks_count_the_columns_to_predict(monkeypatch):
    monkeypatch.setattr(_probes, "CHUNK", 100)
    x = _probes.Inputs([torch.eye(10)], torch.arange(10))
    assert [len(r) for r in x.chunks(torch.arange(10))] == [10]
    assert [len(r) for r in x.chunks(torch.arange(10), 25)] == [4, 4, 2]
    assert [len(r) for r in x.chunks(torch.arange(3), 1000)] == [1, 1, 1]
    rows, seen = torch.arange(50), []
    targets = [labelled.target_of(torch.arange(100) % 25, rows, rows + 50)]
    p = _probes.Problem(_probes.Inputs([torch.ones(100, 1)], rows), rows, targets, 5)
    p.held_out(lambda r: (seen.append(len(r)), torch.zeros(len(r), 25))[1], rows + 50)
    assert seen == [4] * 12 + [2]


def test_the_probe_gets_folds_and_seed(monkeypatch):
    seen = []
    monkeypatch.setitem(_probes.SOLVERS, "mlp", lambda p: (seen.append((p.folds, p.seed)), _probes._ridge(p))[1])
    r2_matrix({"z": Z}, {"y": Z}, probe=Probe("mlp", folds=3), seed=8)
    assert seen == [(3, 8)]


# ---- mlp


def test_mlp_learns_numbers_and_classes_and_stops_early():
    g = generator()
    z = torch.randn(900, 2, generator=g)
    factors = {
        "product": z[:, 0] * z[:, 1],
        "quadrant": (z[:, 0] * z[:, 1] > 0),
        "noise": torch.randn(900, generator=g),
    }
    table = r2_matrix({"z": z}, factors, probe="mlp", bootstrap=0)
    assert table["z", "product"] > 0.9 and table["z", "quadrant"] > 0.8
    assert table["z", "noise"] > -0.1, "an MLP that is not stopped fits 450 noisy rows"


@torch.no_grad()
def test_mlp_waits_for_its_validation_part_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(_probes.F, "gelu", lambda x, _f=torch.nn.functional.gelu: (calls.append(len(x)), _f(x))[1])
    g = generator()
    p = _probes.Problem(
        x=_probes.Inputs([torch.randn(100, 3, generator=g)], torch.arange(50)),
        rows=torch.arange(50),
        targets=[labelled.target_of(torch.randn(100, generator=g), torch.arange(50), torch.arange(50, 100))],
        folds=5,
    )
    _probes._mlp(p)
    assert calls[:4] == [10, 40, 10, 40] and calls[-1] == 10
    assert 21 <= calls.count(10) < 60  # noise: waits 20 rounds, not 200


@torch.no_grad()
def test_mlp_draws_from_its_seed():
    p, _, test = problem()
    predictions = [_probes._mlp(dataclasses.replace(p, seed=s))(test) for s in (1, 1, 2)]
    assert torch.equal(predictions[0], predictions[1]) and not torch.equal(predictions[0], predictions[2])


def test_mlp_predicts_the_mean():
    skewed = torch.randn(2000, generator=generator()).exp()  # the median would score -0.09
    assert abs(r2_matrix({"z": torch.zeros(2000, 1)}, {"y": skewed}, probe="mlp", bootstrap=0)["z", "y"]) < 0.03


# ---- nearly dead units


def nearly_dead(n=600, small=1e-3, size=3.0, seed=0):
    """A code of y, a unit of noise and a nearly dead one, whose only large values are on the held-out side."""
    g = generator(seed)
    y = torch.randn(n, generator=g)
    z = torch.stack([y + 0.3 * torch.randn(n, generator=g), torch.randn(n, generator=g)], 1)
    unit = small * torch.rand(n, generator=g)
    unit[split_rows(n, 0.5, generator())[1][:4]] = size
    return z, unit[:, None], y


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(("small", "size"), [(0.0, 3.0), (1e-3, 3.0), (1e-3, -3.0), (1e-6, 1e6), (1e-20, 1.0)])
def test_nearly_dead_units_cost_next_to_nothing(probe, small, size):
    z, unit, y = nearly_dead(small=small, size=size)
    plain = r2_matrix({"z": z}, {"y": y}, probe=probe, bootstrap=0)["z", "y"]
    for offset in (0.0, 7.0):
        beside = torch.cat([z, unit + offset], 1)
        assert r2_matrix({"z": beside}, {"y": y}, probe=probe, bootstrap=0)["z", "y"] == pytest.approx(plain, abs=0.05)
    assert plain > 0.88


@pytest.mark.parametrize("wide", [0, 400], ids=["primal", "dual"])
def test_a_nearly_dead_direction_that_lies_across_the_units_costs_little_too(monkeypatch, wide):
    """No unit is out of range; the direction is, by 3,000 times, and ridge has fitted noise to it."""
    monkeypatch.setattr(_probes, "RIDGE_ALPHAS", (1e-6,))
    z, unit, y = nearly_dead()
    z = torch.cat([z, torch.randn(600, 3, generator=generator(1)), unit], 1).double()
    z = z @ torch.linalg.qr(torch.randn(6, 6, generator=generator(2), dtype=torch.float64))[0]
    z = torch.cat([z, z[:, :1].expand(-1, wide) * 1e-4], 1)
    assert r2_matrix({"z": z}, {"y": y}, bootstrap=0)["z", "y"] > 0.85
    monkeypatch.setattr(_probes, "FAR", math.inf)
    assert r2_matrix({"z": z}, {"y": y}, bootstrap=0)["z", "y"] < 0


def test_leverage_is_that_of_the_definition():
    """x^T (G + alpha)^-1 G (G + alpha)^-1 x, and no more than 1 for a row that was trained on."""
    for d in (7, 55):
        p, _, test = problem(d=d)
        train = p.x(p.rows)
        inverse = torch.linalg.inv(train.T @ train + 0.5 * torch.eye(d))
        for rows in (p.rows, test):
            x = p.x(rows)
            expected = [float(row @ inverse @ train.T @ train @ inverse @ row) for row in x]
            got = _probes._leverage(p, x, 0.5)
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-7)
            assert got.max() <= 1 or rows is test


def test_values_within_three_ranges_of_the_training_rows_are_taken_as_they_are():
    x = torch.tensor([[0.0], [1.0], [2.0], [4.0], [-2.0], [4.1], [-99.0]])
    inputs = _probes.Inputs([x], torch.arange(3))
    got = inputs(torch.arange(7))[:, 0] * x[:3].double().std(correction=0) + 1
    assert got.tolist() == pytest.approx([0, 1, 2, 4, -2, 4, -2])


# ---- scores


def test_r2_is_scikit_learns_with_equal_weight_on_columns():
    g = generator()
    y, guess = torch.randn(30, 3, generator=g).double() * torch.tensor([1, 5, 0.1]) + 2, torch.randn(30, 3, generator=g)
    rows, test = torch.arange(10), torch.arange(10, 30)
    y[10:], guess = y[10:] + 1e7, guess + 1e7  # the held-out rows may lie anywhere
    target = labelled.target_of(y, rows, test)
    guess = target.values + guess.double() % 1
    p = _probes.Problem(_probes.Inputs([guess], rows), rows, [target], 5)
    (stats,) = p.held_out(lambda r: guess[r], test)
    got = float(target.score(stats.sum(0), torch.tensor(20)))
    assert got == pytest.approx(r2_score(target.values[test], guess[test]), abs=ROUNDING)


def test_r2_by_hand():
    target = _probes.Target(torch.tensor([[1.0], [2.0], [3.0], [6.0]]).double(), torch.ones(4, dtype=torch.bool))
    rows = torch.arange(4)
    p = _probes.Problem(_probes.Inputs([torch.eye(4)], rows), rows, [target], 2)
    (stats,) = p.held_out(lambda r: torch.tensor([[1.0], [2.0], [4.0], [4.0]]).double()[r], rows)
    # mean 3, SST = 4 + 1 + 0 + 9 = 14, SSE = 0 + 0 + 1 + 4 = 5
    assert float(target.score(stats.sum(0), torch.tensor(4))) == pytest.approx(1 - 5 / 14)


def chance_by_hand(labels, train, rows):
    """How often the most frequent class of the training rows is right on other rows, in a loop."""
    counts = {}
    for label in labels[train].tolist():
        counts[label] = counts.get(label, 0) + 1
    majority = max(sorted(counts), key=counts.__getitem__)
    return sum(label == majority for label in labels[rows].tolist()) / len(rows)


def test_chance_for_classes_is_the_training_majority_on_the_held_out_rows():
    labels = torch.tensor([7, 7, 7, -2, 40, 40, 40, 40, -2, 7, 99, 50])  # of the first five three are 7
    train, test = torch.arange(5), torch.arange(5, 12)
    target = labelled.target_of(labels, train, test)
    assert target.classes == 3 and target.majority == 1
    assert target.values.tolist() == [1, 1, 1, 0, 2, 2, 2, 2, 0, 1, -2, -1]  # 50 and 99 are new, and two
    assert target.columns(torch.tensor([0, 4])).tolist() == [[0, 1, 0], [0, 0, 1]]
    p = _probes.Problem(_probes.Inputs([torch.eye(12)], train), train, [target], 5)
    (stats,) = p.held_out(lambda r: torch.tensor([[0.1, 0.2, 0.3]]).expand(len(r), 3), test)  # says 40: 3 of 7 right
    assert chance_by_hand(labels, train, test) == 1 / 7
    assert float(target.score(stats.sum(0), torch.tensor(7))) == pytest.approx((3 / 7 - 1 / 7) / (1 - 1 / 7))
    for rows, two in (([0, 1, 2], False), ([5, 5], False), ([3], False), ([5, 6], True), ([0, 4], True)):
        score = float(target.score(stats[rows].sum(0), torch.tensor(len(rows))))
        assert math.isnan(score) != two, (rows, score)


@pytest.mark.parametrize("probe", PROBES)
def test_a_class_that_only_the_held_out_rows_have_is_counted_wrong(probe):
    train, test = split_rows(60, 0.5, generator())
    labels = torch.arange(60) % 2
    z = labels[:, None] + 0.01 * torch.randn(60, 2, generator=generator())
    labels[test[:6]] = 5
    table = r2_matrix({"z": z}, {"label": labels}, probe=probe)
    chance = chance_by_hand(labels, train, test)
    assert table["z", "label"] == pytest.approx((24 / 30 - chance) / (1 - chance))


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.1, 0.5])
def test_noise_cannot_be_decoded_however_rare_the_class(rate):
    """Over 40 spaces of noise: a mean score of 0 within its error, and no more sure scores than 2.5 % allow."""
    scores, sure = [], 0
    for seed in range(40):
        g = generator(seed)
        z, labels = torch.randn(400, 6, generator=g), (torch.rand(400, generator=g) < rate).long()
        table = r2_matrix({"z": z}, {"label": labels}, bootstrap=50, seed=seed)
        if not math.isnan(table["z", "label"]):
            scores.append(table["z", "label"])
            sure += table.intervals["z", "label"][0] > 0
    scores = torch.tensor(scores)
    assert len(scores) > 20 and scores.mean().abs() <= 3 * scores.std() / math.sqrt(len(scores)) + 1e-12
    assert sure <= 4 and scores.max() < 0.3, "a binomial of 40 and 0.025 exceeds 4 once in 300"


def test_a_rare_class_that_is_there_is_found():
    labels = (torch.arange(1000) % 50 == 0).long()
    z = labels[:, None] + 0.05 * torch.randn(1000, 3, generator=generator())
    table = r2_matrix({"z": z}, {"defect": labels})
    assert table["z", "defect"] == 1 and table.intervals["z", "defect"][0] > 0.9


@pytest.mark.parametrize("probe", PROBES)
def test_held_out_rows_of_one_class_have_no_score(probe):
    _, test = split_rows(40, 0.5, generator())
    labels = torch.arange(40) % 2
    labels[test] = 1
    for rare in (labels, labels * 7, labels.bool()):
        table = r2_matrix({"z": Z}, {"label": rare, "z": Z}, probe=probe)
        assert math.isnan(table["z", "label"]) and ("z", "label") not in table.intervals
        assert table.notes["z", "label"] == "one class among the held-out samples"
        assert not math.isnan(table["z", "z"])


def test_intervals_of_classes_have_the_chance_of_every_resample():
    """A resample of one class counts as 0: so few held-out samples of a class cannot make a sure score."""
    for held_out, least in ((1, 0.0), (2, 0.0), (6, 1.0)):
        train, test = split_rows(60, 0.5, generator())
        labels = torch.zeros(60, dtype=torch.long)
        labels[train[:8]] = labels[test[:held_out]] = 1
        z = labels[:, None] * 9 + torch.randn(60, 2, generator=generator())
        g = generator()
        torch.randperm(60, generator=g)
        scores = []
        for _ in range(200):
            drawn = test[torch.randint(30, (30,), generator=g)]
            chance = chance_by_hand(labels, train, drawn)
            scores.append(0.0 if len(set(labels[drawn].tolist())) < 2 else (1 - chance) / (1 - chance))
        table = r2_matrix({"z": z}, {"label": labels})
        assert table["z", "label"] == 1
        assert table.intervals["z", "label"] == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=1e-9)
        assert table.intervals["z", "label"][0] == least


@pytest.mark.parametrize("probe", PROBES)
def test_known_matrix(probe):
    g = generator()
    a, b = torch.randn(400, 2, generator=g), torch.randn(400, generator=g)
    labels = torch.arange(400) % 4
    corners = torch.nn.functional.one_hot(labels).float() + 0.05 * torch.randn(400, 4, generator=g)
    spaces = {"a": a @ torch.randn(2, 6, generator=g), "b": torch.stack([b, b], 1), "class": corners}
    table = r2_matrix(spaces, {"a": a, "b": b, "class": labels}, probe=probe, bootstrap=50)
    for space in table.spaces:
        for factor in table.factors:
            low, high = (0.97, 1) if space == factor else (-0.15, 0.12)
            assert low <= table[space, factor] <= high, (space, factor, table[space, factor])


def test_intervals_have_the_width_of_a_binomial():
    g = generator()
    labels = torch.randint(2, (2000,), generator=g)
    z = (labels * 2 - 1 + torch.randn(2000, generator=g))[:, None]
    table = r2_matrix({"z": z}, {"label": labels}, bootstrap=400)
    chance = chance_by_hand(labels, *split_rows(2000, 0.5, generator()))
    accuracy = table["z", "label"] * (1 - chance) + chance
    low, high = table.intervals["z", "label"]
    assert low < table["z", "label"] < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(accuracy * (1 - accuracy) / 1000) / (1 - chance), rel=0.15)


def test_intervals_are_the_quantiles_of_resampled_r2(monkeypatch):
    monkeypatch.setattr(_probes, "RIDGE_ALPHAS", (0.1,))
    g = generator()
    theta, fold = torch.rand(60, generator=g, dtype=torch.float64) * 3, (torch.arange(60) % 4 > 0).long()
    z = torch.randn(60, 2, generator=g).double() + Circular(theta).target()[0]
    got = r2_matrix({"z": z}, {"angle": Circular(theta, fold)}, bootstrap=70).intervals["z", "angle"]

    g = generator()
    train, test = split_rows(60, 0.5, g)
    y, ok = (t.numpy() for t in Circular(theta, fold).target())
    rows = train[ok[train]]
    scaler = StandardScaler().fit(z[rows])
    predicted = Ridge(0.1 * len(rows)).fit(scaler.transform(z[rows]), y[rows]).predict(scaler.transform(z))
    scores = []
    for _ in range(70):
        drawn = test[torch.randint(30, (30,), generator=g)].numpy()
        drawn = drawn[ok[drawn]]
        scores.append(r2_score(y[drawn], predicted[drawn]))
    assert got == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=1e-9)
    assert r2_matrix({"z": z}, {"angle": Circular(theta, fold)}, bootstrap=0).intervals == {}


def test_resamples_without_variance_are_left_out():
    y = torch.zeros(10)
    for rows in split_rows(10, 0.5, generator()):
        y[rows[0]] = 1.0  # one row differs from the other four, and a third of the resamples miss it
    table = r2_matrix({"z": y[:, None] + Z[:10]}, {"y": y})
    low, high = table.intervals["z", "y"]
    assert -100 < low <= high <= 1


@pytest.mark.parametrize("probe", PROBES)
def test_units_of_a_factor_do_not_matter(probe):
    g = generator()
    z = torch.randn(150, 12, generator=g)
    y = torch.stack([z[:, 0], z[:, 1] + 3 * torch.randn(150, generator=g)], 1).double()
    table = r2_matrix({"z": z}, {"y": y, "units": y * torch.tensor([1.0, 1000.0]) + 50}, probe=probe, bootstrap=0)
    assert table["z", "units"] == pytest.approx(table["z", "y"], abs=1e-3 if probe == "mlp" else 1e-6)


# ---- angles


def test_circular_by_hand():
    k = torch.tensor([4, 2, 1, 0])
    target, valid = Circular(torch.tensor([math.pi / 4, math.pi / 4, math.pi / 4, 1.0]), k).target()
    root = math.sqrt(0.5)
    expected = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [root, root], [0.0, 0.0]]).double()
    torch.testing.assert_close(target, expected, atol=1e-6, rtol=0)
    assert valid.tolist() == [True, True, True, False]


def test_circular_scores_an_angle_up_to_its_symmetry():
    theta = torch.rand(400, generator=generator()) * 2 * math.pi
    z = torch.stack([(4 * theta).cos(), (4 * theta).sin()], 1)  # what a square shows of its angle
    table = r2_matrix({"z": z}, {"square": Circular(theta, 4), "heart": Circular(theta), "raw": theta})
    assert table["z", "square"] > 0.999
    assert table["z", "heart"] < 0.05 and table["z", "raw"] < 0.05


def test_samples_without_an_angle_are_left_out():
    g = generator()
    theta, noise = torch.rand(300, generator=g) * 6, torch.randn(300, 2, generator=g)
    fold = torch.arange(300) % 3  # a third are discs
    z = torch.stack([(fold * theta).cos(), (fold * theta).sin()], 1)
    z[fold == 0] = noise[fold == 0] * 50
    theta[fold == 0] = math.nan
    table = r2_matrix({"z": z}, {"angle": Circular(theta, fold), "size": noise})
    assert table["z", "angle"] > 0.999
    assert "200 of 300" in table.notes["z", "angle"] and ("z", "size") not in table.notes
    low, high = table.intervals["z", "angle"]
    assert 0.999 < low <= high
    assert table["z", "size"] == pytest.approx(r2_matrix({"z": z}, {"size": noise})["z", "size"])


def test_a_column_that_is_rounding_alone_is_left_out():
    flip = (torch.arange(200) % 2) * math.pi  # sin is 0 up to rounding
    table = r2_matrix({"z": flip.cos()[:, None]}, {"flip": Circular(flip)})
    assert table["z", "flip"] > 0.999
    assert "[1]" in table.notes["z", "flip"]


# ---- conditional


def twisted(n=700, seed=0):
    """z = Rot(c) s in 12 coordinates: alone it says nothing of s, with c everything."""
    g = generator(seed)
    c, s = torch.rand(n, generator=g) * 2 * math.pi, torch.randn(n, 2, generator=g)
    turned = torch.stack([c.cos() * s[:, 0] - c.sin() * s[:, 1], c.sin() * s[:, 0] + c.cos() * s[:, 1]], 1)
    style = turned @ torch.randn(2, 12, generator=g)
    content = torch.stack([c.cos(), c.sin()], 1)
    return {"content": content @ torch.randn(2, 5, generator=g), "style": style}, {"content": Circular(c), "s": s}


@pytest.mark.parametrize("probe", ["kernel", "mlp"])
def test_conditional_score_tells_twisting(probe):
    spaces, factors = twisted()
    pure = r2_matrix(spaces, factors, probe=probe, bootstrap=0)
    both = r2_matrix(spaces, factors, probe=probe, given=("content",), bootstrap=0)
    assert pure["style", "s"] < 0.05 and pure.given == ()
    assert both["style", "s"] > 0.9 and both.given == ("content",)
    # content's own row is scored alone, and its column would be 1 for any space
    for factor in ("content", "s"):
        assert both["content", factor] == pytest.approx(pure["content", factor])
    assert math.isnan(both["style", "content"]) and "given" in both.notes["style", "content"]


def test_given_is_a_factor_first_and_a_space_otherwise():
    g = generator()
    noise, hue, shape = torch.randn(300, 2, generator=g), torch.randn(300, generator=g), torch.arange(300) % 3
    y = hue + (shape == 1)
    spaces = {"style": noise[:, :1], "hue": noise[:, 1:], "hue_space": hue[:, None]}
    factors = {"hue": hue, "shape": shape, "y": y}
    assert r2_matrix(spaces, factors)["style", "y"] < 0.1
    assert 0.6 < r2_matrix(spaces, factors, given=("hue",))["style", "y"] < 0.95
    by_space = r2_matrix(spaces, factors, given=("hue_space",))
    assert 0.6 < by_space["style", "y"] < 0.95 and by_space["style", "hue"] > 0.99 and not by_space.notes
    assert r2_matrix(spaces, factors, given=("hue", "shape"))["style", "y"] > 0.99
    table = r2_matrix(spaces, {"hue": hue[:, None].repeat(1, 2), "y": y}, given=("hue",))
    assert 0.6 < table["style", "y"] < 0.95


def test_given_must_be_known_and_finite():
    spaces, factors = twisted(50)
    with pytest.raises(ValueError, match=r"factor \(content, s\) or a space \(content, style\): got 'colour'"):
        r2_matrix(spaces, factors, given=("colour",))
    with pytest.raises(TypeError, match=r"such as \('content',\): got 'content'"):
        r2_matrix(spaces, factors, given="content")
    with pytest.raises(ValueError, match="finite value for every sample"):
        r2_matrix(spaces, factors | {"bad": torch.full((50,), math.nan)}, given=("bad",))


# ---- what must not matter


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("wide", [False, True])
def test_chunks_do_not_matter(monkeypatch, probe, wide):
    spaces, factors = twisted(120)
    if wide:
        spaces["style"] = torch.randn(120, 80, generator=generator())
    factors["label"] = torch.arange(120) % 3
    whole = r2_matrix(spaces, factors, probe=probe, given=("content",))
    sizes = set()
    real = _probes.Inputs.__call__
    monkeypatch.setattr(_probes.Inputs, "__call__", lambda x, r: (sizes.add(len(r)), real(x, r))[1])
    monkeypatch.setattr(_probes, "CHUNK", 100)
    parts = r2_matrix(spaces, factors, probe=probe, given=("content",))
    assert min(sizes) < 10
    tolerance = {"ridge": 1e-9, "kernel": 1e-6, "mlp": 1e-3}[probe]  # rounding times condition 1e6, 1e8; float32
    for cell, value in whole.scores.items():
        assert parts.scores[cell] == pytest.approx(value, abs=tolerance, nan_ok=True)


@pytest.mark.parametrize("probe", PROBES)
def test_global_generator_is_neither_read_nor_moved(probe):
    spaces, factors = twisted(60)
    spaces["nothing"] = torch.zeros(60, 2)
    tables = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        tables.append(r2_matrix(spaces, factors, probe=probe).to_json())
        assert torch.equal(torch.get_rng_state(), before)
    assert tables[0] == tables[1]
    assert r2_matrix(spaces, factors, probe=probe, seed=1).to_json() != tables[0]


@pytest.mark.parametrize("probe", PROBES)
def test_a_cell_does_not_depend_on_the_others(probe):
    spaces, factors = twisted(100)
    table = r2_matrix(spaces, factors, probe=probe)
    alone = r2_matrix({"style": spaces["style"]}, {"s": factors["s"]}, probe=probe)
    assert alone["style", "s"] == pytest.approx(table["style", "s"], abs=1e-9)
    assert alone.intervals["style", "s"] == pytest.approx(table.intervals["style", "s"], abs=1e-9)


@pytest.mark.parametrize("probe", PROBES)
def test_gradient_modes_and_autocast_do_not_matter(probe):
    spaces, factors = twisted(80)
    plain = r2_matrix(spaces, factors, probe=probe).to_json()
    with torch.autocast("cpu", torch.bfloat16):
        assert r2_matrix(spaces, factors, probe=probe).to_json() == plain
    with torch.inference_mode():
        copies = {k: z.clone() for k, z in spaces.items()}
        assert r2_matrix(copies, factors, probe=probe).to_json() == plain
    graph = {k: z.clone().requires_grad_() for k, z in spaces.items()}
    assert r2_matrix(graph, factors, probe=probe).to_json() == plain
    assert all(z.grad is None for z in graph.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_is_probed(dtype):
    spaces, factors = twisted(200)
    table = r2_matrix({"content": spaces["content"].to(dtype)}, factors)
    assert table["content", "content"] > 0.99


@pytest.mark.parametrize("probe", PROBES)
def test_a_collapsed_space_knows_nothing(probe):
    g = generator()
    y = torch.randn(100, generator=g)
    spaces = {"collapsed": torch.full((100, 3), 0.1), "dead column": torch.stack([y, torch.full_like(y, 0.1)], 1)}
    table = r2_matrix(spaces, {"y": y, "label": y > 0.5}, probe=probe)
    train, test = split_rows(100, 0.5, generator())
    assert table["collapsed", "y"] == pytest.approx(r2_score(y[test], y[train].mean().expand(50)), abs=1e-6)
    assert table["collapsed", "label"] == 0, "it says the majority of the training rows, as chance does"
    assert table["dead column", "y"] > 0.9


# ---- what cannot be scored


@pytest.mark.parametrize(
    ("factor", "reason"),
    [
        (torch.full((40,), 0.1), "constant"),
        (torch.full((40, 2), 0.1) * (1 + torch.arange(40)[:, None] % 2 * 1.2e-7), "constant"),  # up to rounding
        (torch.ones(40, dtype=torch.long), "one class"),
        (torch.arange(40.0).where(torch.arange(40) != 3, math.nan), "1 of 40 values are NaN or inf"),
        (torch.arange(40.0).where(torch.arange(40) != 3, math.inf), "1 of 40 values are NaN or inf"),
        (Circular(torch.arange(40.0), 0), "defined for 0 training and 0 held-out samples"),
        (Circular(torch.arange(40.0), (torch.arange(40) < 6).long()), "fewer than 5"),
        (Circular(torch.full((40,), 0.3), 2), "constant"),
        (Circular(torch.full((40,), math.nan), 2), "80 of 80 values are NaN"),
    ],
)
def test_no_score_comes_with_its_reason(factor, reason):
    z = torch.randn(40, 2, generator=generator())
    table = r2_matrix({"z": z}, {"factor": factor, "z": z})
    assert math.isnan(table["z", "factor"]) and reason in table.notes["z", "factor"]
    assert ("z", "factor") not in table.intervals
    assert table["z", "z"] > 0.99
    assert "n/a" in str(table) and f"factor: {table.notes['z', 'factor']}" in str(table)


def test_constant_on_one_side_of_the_split_is_constant():
    train, test = split_rows(40, 0.5, generator())
    z = torch.randn(40, 2, generator=generator())
    for side in (train, test):
        y = torch.arange(40.0)
        y[side] = 1.0
        assert r2_matrix({"z": z}, {"y": y}).notes["z", "y"] == "constant"
    y = torch.stack([z[:, 0], y], 1)
    table = r2_matrix({"z": z}, {"y": y})
    assert table["z", "y"] > 0.99 and table.notes["z", "y"] == "columns [1] are constant"


Z = torch.randn(40, 3, generator=generator())
NAN = Z.clone()
NAN[39, 2] = math.nan


@pytest.mark.parametrize(
    ("spaces", "factors", "message"),
    [
        ({}, {"y": Z}, "got 0 spaces and 1 factors"),
        ({"z": Z}, {}, "got 1 spaces and 0 factors"),
        ({"z": NAN}, {"y": Z}, "space 'z': expected finite embeddings: got NaN or inf"),
        ({"z": NAN.nan_to_num(math.inf)}, {"y": Z}, "space 'z': expected finite embeddings"),
        ({"z": Z, "w": Z[:30]}, {"y": Z}, "space 'w': expected the 40 samples of space 'z': got 30"),
        ({"z": Z, "w": Z.to("meta")}, {"y": Z}, "space 'w': expected the device cpu of space 'z': got meta"),
        ({"z": Z[:, 0]}, {"y": Z}, r"\[n, d\], one per sample: got \[40\]"),
        ({"z": Z[None]}, {"y": Z}, r"got \[1, 40, 3\]; pass one view, z\[v\]"),
        ({"z": Z[:, :0]}, {"y": Z}, r"got \[40, 0\]"),
        ({"z": Z[:9]}, {"y": Z[:9]}, "at least 10 samples: got 9"),
        ({"z": Z.long()}, {"y": Z}, "floating-point embeddings: got torch.int64"),
        ({"z": Z + 0j}, {"y": Z}, "floating-point embeddings: got torch.complex64"),
        ({"z": Z}, {"y": Z[:, 0] + 0j}, "factor 'y': expected .*: got .* torch.complex64"),
        ({"z": Z}, {"y": Z.long()}, r"expected classes, integers \[n\]: got \[40, 3\] torch.int64"),
        ({"z": Z}, {"y": Z[None]}, r"expected numbers \[n\] or \[n, k\]: got \[1, 40, 3\]"),
        ({"z": Z}, {"y": Z[:, :0]}, r"got \[40, 0\]"),
        ({"z": Z}, {"y": Z[:30]}, "factor 'y': expected a value for each of the 40 samples: got 30"),
        ({"z": Z}, {"y": Circular(Z[:30, 0])}, "each of the 40 samples: got 30"),
    ],
)
def test_bad_inputs(spaces, factors, message):
    with pytest.raises(ValueError, match=message):
        r2_matrix(spaces, factors)


def test_every_chunk_is_checked_for_nan(monkeypatch):
    monkeypatch.setattr(_probes, "CHUNK", 12)
    with pytest.raises(ValueError, match="finite"):
        r2_matrix({"z": NAN}, {"y": Z})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probe": "forest"}, "probe: expected one of 'ridge', 'kernel', 'mlp': got 'forest'"),
        (
            {"probe": Probe(train_fraction=0.1)},
            "a fraction of the 40 samples that leaves at least 5 on either side: got 0.1",
        ),
        ({"probe": Probe(train_fraction=0.95)}, "train_fraction: .*got 0.95"),
        ({"bootstrap": -1}, "bootstrap: expected an integer of 0 or more: got -1"),
        ({"bootstrap": 2.0}, "bootstrap: .*got 2.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        r2_matrix({"z": Z}, {"y": Z}, **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "forest"}, "probe: expected one of 'ridge', 'kernel', 'mlp': got 'forest'"),
        ({"train_fraction": 0.0}, "train_fraction: expected a fraction of the samples between 0 and 1: got 0.0"),
        ({"train_fraction": 1.0}, "train_fraction: .*got 1.0"),
        ({"train_fraction": math.nan}, "got nan"),
        ({"train_fraction": "0.5"}, "got '0.5'"),
        ({"folds": 1}, "folds: expected an integer of 2 or more: got 1"),
        ({"folds": 2.0}, "folds: expected an integer of 2 or more: got 2.0"),
        ({"folds": True}, "folds: .*got True"),
        ({"kernel_rows": 4}, "kernel_rows: expected an integer of 5 or more: got 4"),
    ],
)
def test_settings_of_a_probe_are_checked_once(settings, message):
    with pytest.raises(ValueError, match=message):
        Probe(**settings)


def test_a_probe_may_be_named_or_given_with_its_settings():
    for kind in PROBES:
        named, given = (r2_matrix({"z": Z}, {"y": Z[:, 0]}, probe=p) for p in (kind, Probe(kind)))
        assert named.to_json() == given.to_json() and named.probe == kind


def test_tensors_are_asked_for():
    with pytest.raises(TypeError, match=r"space 'z': expected a tensor \[n, d\]: got list"):
        r2_matrix({"z": [[1.0]]}, {"y": Z})
    with pytest.raises(TypeError, match="factor 'y': expected a tensor or Circular: got list"):
        r2_matrix({"z": Z}, {"y": [1.0]})


@pytest.mark.parametrize(
    ("angle", "fold", "message"),
    [
        (Z, 1, r"radians \[n\], floating point: got \[40, 3\]"),
        (Z[:, 0].long(), 1, "floating point: got .* torch.int64"),
        (Z[:, 0], -1, "got -1"),
        (Z[:, 0], 2.5, "got 2.5"),
        (Z[:, 0], True, "got True"),
        (Z[:, 0], torch.tensor([1, 2]), r"a fold per angle \[40\]: got \[2\]"),
    ],
)
def test_bad_angles(angle, fold, message):
    with pytest.raises(ValueError, match=message):
        Circular(angle, fold)


def test_as_few_rows_as_promised_and_more_folds_than_rows():
    for probe in PROBES:
        table = r2_matrix({"z": Z[:10]}, {"y": Z[:10, 0]}, probe=Probe(probe, folds=9))
        assert math.isfinite(table["z", "y"]) and (table.n_train, table.n_test) == (5, 5)


# ---- the table


def table():
    cells = {
        ("content", "hue"): -0.001,
        ("content", "shape"): 0.987,
        ("color", "hue"): 1.0,
        ("color", "shape"): math.nan,
    }
    intervals = {("content", "hue"): (-0.1, 0.1), ("content", "shape"): (0.9, math.nan)}
    notes = {("color", "shape"): "one class in the training split"}
    return ScoreTable(("content", "color"), ("hue", "shape"), cells, intervals, notes, "ridge", ("size",), 30, 20)


def test_table_prints_aligned():
    assert str(table()).split("\n") == [
        "          hue  shape",
        "content  0.00   0.99",
        "color    1.00    n/a",
        "ridge probe given size, 30 samples to train, 20 held out",
        "shape: one class in the training split",
    ]


def test_table_survives_json():
    text = json.dumps(table().to_json(), allow_nan=False)
    back = ScoreTable.from_json(json.loads(text))
    assert json.dumps(back.to_json()) == text and str(back) == str(table())
    assert math.isnan(back["color", "shape"]) and math.isnan(back.intervals["content", "shape"][1])
    assert back.spaces == table().spaces and back.given == ("size",) and back.notes == table().notes
    assert back.intervals["content", "hue"] == (-0.1, 0.1) and set(back.intervals) == set(table().intervals)


def test_table_lists_what_it_knows():
    assert table()["content", "shape"] == 0.987
    for wrong in (("shape", "content"), ("content", "size"), "content", 0):
        with pytest.raises(KeyError, match="spaces content, color; factors hue, shape"):
            table()[wrong]


# ---- effective rank


def test_effective_rank_by_hand():
    eye = torch.eye(4).double()
    z = torch.cat([eye, -eye])  # four equal singular values
    assert effective_rank(z) == pytest.approx(4)
    two = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # singular values in the ratio 2 to 1
    by_hand = math.exp(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))
    assert effective_rank(two) == pytest.approx(by_hand)
    assert effective_rank(two + 100) == pytest.approx(by_hand)
    assert effective_rank(two.half().requires_grad_()) == pytest.approx(by_hand)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_collapse_has_no_rank(dtype):
    z = torch.full((50, 8), 0.1, dtype=dtype)
    assert effective_rank(z) == 0
    noise = (torch.rand(50, 8, generator=generator()) - 0.5).to(dtype) * torch.finfo(dtype).eps
    assert effective_rank(z * (1 + noise)) == 0
    line = torch.arange(50).to(dtype)[:, None] * torch.ones(8, dtype=dtype) + 3
    assert effective_rank(line) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("z", "message"),
    [(Z[0], r"\[n, d\]"), (Z[:1], "at least 2"), (NAN, "finite"), (Z.long(), "floating"), (Z + 0j, "floating")],
)
def test_effective_rank_of_bad_input(z, message):
    with pytest.raises(ValueError, match=f"effective_rank: .*{message}"):
        effective_rank(z)


# ---- scale


@pytest.mark.parametrize("scale", [2.0**530, 2.0**-560, 2.0**1020])
@pytest.mark.parametrize("probe", PROBES)
def test_no_score_depends_on_the_unit(probe, scale):
    """Squares of float64 values beyond 1e154 overflow, and those below 1e-154 vanish."""
    g = generator()
    hue = torch.rand(60, generator=g, dtype=torch.float64)
    z = torch.stack([hue.cos(), hue.sin(), torch.randn(60, generator=g, dtype=torch.float64)], 1)
    expected = r2_matrix({"a": z}, {"hue": hue, "both": z}, probe=probe, bootstrap=0)
    got = r2_matrix({"a": z * scale}, {"hue": hue * scale, "both": z * scale}, probe=probe, bootstrap=0)
    assert expected["a", "hue"] > 0.9
    for cell, score in expected.scores.items():
        assert got.scores[cell] == pytest.approx(score, abs=1e-6)


def test_a_held_out_value_of_another_scale_is_clipped():
    z = torch.cat([1e-170 * torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None], torch.zeros(60, 1).double()], 1)
    train, rows = torch.arange(40), torch.arange(60)
    x = _probes.Inputs([z.clone()], train)(train)
    z[50] = 1e308
    y = _probes.Inputs([z], train)(rows)
    assert y.isfinite().all() and torch.equal(y[:40], x) and x.abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_integers_are_integers(dtype):
    angle, fold = torch.rand(4), torch.tensor([0, 1, 2, 4])
    got, expected = (Circular(angle, fold=k).target() for k in (fold.to(dtype), fold))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
