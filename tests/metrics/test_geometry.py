"""Uniformity, alignment and redundancy against loops, scikit-learn and hand-worked cases."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler
from splits import split_rows

from ssd_addon import Embeddings, ViewPlan
from ssd_addon.metrics import Probe, alignment, effective_rank, geometry, redundancy, space_geometry, uniformity
from ssd_addon.metrics import probes as _probes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def turned(z, seed=5):
    return z @ torch.linalg.qr(randn(z.shape[1], z.shape[1], seed=seed))[0]


def unit(row):
    length = math.sqrt(sum(v * v for v in row))
    return [v / length for v in row]


def squared(a, b):
    return sum((x - y) ** 2 for x, y in zip(unit(a), unit(b), strict=True))


def uniformity_by_loop(z, t):
    rows = z.tolist()
    terms = [math.exp(-t * squared(rows[i], rows[j])) for j in range(len(rows)) for i in range(j)]
    return math.log(sum(terms) / len(terms))


# ---- uniformity


@pytest.mark.parametrize("t", [0.5, 2, 7.0])
@pytest.mark.parametrize("shape", [(2, 3), (9, 4), (5, 1)])
def test_uniformity_equals_a_loop(shape, t):
    z = randn(*shape) + 0.3
    assert uniformity(z, t=t) == pytest.approx(uniformity_by_loop(z, t), abs=1e-9)


def test_uniformity_by_hand():
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])  # squared distances 2, 2, 4
    assert uniformity(z) == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))
    assert uniformity(z, t=1) == pytest.approx(math.log((2 * math.exp(-2) + math.exp(-4)) / 3))
    assert uniformity(z) == uniformity(z, t=2.0)


@pytest.mark.parametrize("d", [1, 2, 6])
def test_uniformity_of_a_simplex(d):
    corners = torch.eye(d + 1).double() - 1 / (d + 1)  # all pairs at 2 (d + 1) / d
    assert uniformity(corners, t=3.0) == pytest.approx(-3 * 2 * (d + 1) / d)


def test_uniformity_of_one_direction_is_0_and_of_noise_near_minus_2t():
    assert uniformity(torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.1, 0.2]])) == pytest.approx(0, abs=1e-12)
    assert uniformity(randn(300, 500), t=1.5) == pytest.approx(-3, abs=0.02)


def test_far_rows_do_not_underflow():
    assert uniformity(torch.eye(3), t=1000.0) == pytest.approx(-2000)


def test_uniformity_does_not_see_lengths_rotations_or_the_order():
    z = randn(20, 5) + 1
    plain = uniformity(z)
    assert uniformity(z * torch.logspace(-3, 3, 20)[:, None]) == pytest.approx(plain, abs=1e-6)
    assert uniformity(turned(z)) == pytest.approx(plain, abs=1e-12)
    assert uniformity(z[torch.randperm(20, generator=generator())]) == pytest.approx(plain, abs=1e-12)
    assert uniformity(z + 1) > plain + 0.5, "a shift is seen"


@pytest.mark.parametrize("chunk", [1, 23, 24, 100, 23 * 23])
def test_chunks_do_not_matter_to_uniformity(monkeypatch, chunk):
    z = randn(23, 4)
    whole = uniformity(z)
    sizes = []
    real = torch.arange
    monkeypatch.setattr(geometry, "CHUNK", chunk)
    monkeypatch.setattr(geometry.torch, "arange", lambda *a, **k: (sizes.append(a), real(*a, **k))[1])
    assert uniformity(z) == pytest.approx(whole, abs=1e-12)
    starts = [a for a in sizes if len(a) == 2]
    assert max(b - a for a, b in starts) == max(1, chunk // 23) and starts[-1][1] == 23


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_uniformity_and_alignment_are_in_float64(dtype):
    a, b = randn(9, 4).to(dtype), randn(9, 4, seed=1).to(dtype)
    assert uniformity(a) == pytest.approx(uniformity(a.double()), abs=1e-12)
    assert alignment(a, b) == pytest.approx(alignment(a.double(), b.double()), abs=1e-12)
    graph = a.clone().requires_grad_()
    assert uniformity(graph) == uniformity(a) and alignment(graph, b) == alignment(a, b) and graph.grad is None


Z = randn(8, 3)
HOLE = Z.clone()
HOLE[7, 2] = math.nan
ZERO = Z.clone()
ZERO[:2] = 0
ROWS = [
    (Z[0], r"\[n, d\], one per sample: got \[3\]"),
    (Z[None], r"got \[1, 8, 3\]; pass one view, z\[v\]"),
    (Z[:, :0], r"got \[8, 0\]"),
    (HOLE, "finite"),
    (HOLE.nan_to_num(math.inf), "finite"),
    (Z.long(), "floating-point embeddings: got torch.int64"),
    (Z + 0j, "floating-point"),
    (ZERO, "embeddings with a direction: got 2 of length 0"),
]


@pytest.mark.parametrize(("z", "message"), [*ROWS, (Z[:1], "at least 2 samples: got 1")])
def test_uniformity_of_bad_rows(z, message):
    with pytest.raises(ValueError, match=f"uniformity: .*{message}"):
        uniformity(z)


@pytest.mark.parametrize(("z", "message"), [*ROWS, (Z[:0], "at least 1 samples: got 0")])
@pytest.mark.parametrize("first", [True, False])
def test_alignment_of_bad_rows(z, message, first):
    with pytest.raises(ValueError, match=f"alignment: .*{message}"):
        alignment(z, Z) if first else alignment(Z, z)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, True, "2"])
def test_bad_exponents(value):
    with pytest.raises(ValueError, match=r"t: expected a finite number above 0 \(of the Gaussian kernel\): got"):
        uniformity(Z, t=value)
    with pytest.raises(ValueError, match=r"alpha: expected a finite number above 0 .*: got"):
        alignment(Z, Z, alpha=value)


def test_tensors_are_asked_for():
    with pytest.raises(TypeError, match="uniformity: expected a tensor .*: got list"):
        uniformity([[1.0, 0.0]])
    with pytest.raises(TypeError, match="alignment: expected a tensor .*: got list"):
        alignment(Z, Z.tolist())


# ---- alignment


@pytest.mark.parametrize("alpha", [0.5, 1, 2.0, 3.0])
def test_alignment_equals_a_loop(alpha):
    a, b = randn(7, 4), randn(7, 4, seed=1)
    expected = sum(squared(x, y) ** (alpha / 2) for x, y in zip(a.tolist(), b.tolist(), strict=True)) / 7
    assert alignment(a, b, alpha=alpha) == pytest.approx(expected, abs=1e-12)


def test_alignment_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    b = torch.tensor([[5.0, 0.0], [4.0, 0.0], [-1.0, 0.0]])  # distances 0, sqrt 2, 2
    assert alignment(a, b) == pytest.approx((0 + 2 + 4) / 3)
    assert alignment(a, b, alpha=1.0) == pytest.approx((math.sqrt(2) + 2) / 3)
    assert alignment(a, 7 * a) == pytest.approx(0, abs=1e-12)
    assert alignment(a, -a, alpha=3.0) == pytest.approx(8)


def test_alignment_is_2_less_twice_the_mean_cosine_and_sees_no_length_and_no_common_rotation():
    a, b = randn(12, 5), randn(12, 5, seed=1)
    plain = alignment(a, b)
    assert plain == pytest.approx(2 - 2 * float(torch.cosine_similarity(a, b).mean()), abs=1e-9)
    assert alignment(a * torch.logspace(-2, 2, 12)[:, None], 0.01 * b) == pytest.approx(plain, abs=1e-6)
    assert alignment(turned(a), turned(b)) == pytest.approx(plain, abs=1e-9)
    assert alignment(b, a) == pytest.approx(plain)
    assert alignment(a, b.roll(1, 0)) != pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("other", [Z[:7], Z[:1], Z[:, :2], Z[:, :1]])
def test_alignment_needs_pairs(other):
    with pytest.raises(ValueError, match=r"a and b of the same shape: got \[8, 3\], \["):
        alignment(Z, other)


# ---- the geometry of structured views


def test_space_geometry_compares_the_query_with_the_key_of_the_space():
    z = {"content": randn(3, 6, 4), "color": randn(3, 6, 2, seed=1)}
    for given in (z, Embeddings(z, ViewPlan.shared_query(("content", "color")))):
        result = space_geometry(given)
        assert list(result) == ["content", "color"]
        for name, key in (("content", 1), ("color", 2)):
            assert result[name] == {
                "effective_rank": effective_rank(z[name][0]),
                "uniformity": uniformity(z[name][0]),
                "alignment": alignment(z[name][0], z[name][key]),
            }


@pytest.mark.parametrize("index", [None, torch.tensor([1, 1, 0, 1, 0, 1])])
def test_space_geometry_of_an_interleaved_batch_uses_the_rows_of_the_space(index):
    z = {"content": randn(2, 6, 4), "color": randn(2, 6, 2, seed=1)}
    rows = torch.arange(6) % 2 if index is None else index
    result = space_geometry(Embeddings(z, ViewPlan.interleaved(("content", "color")), space_index=index))
    for s, name in enumerate(z):
        mine = z[name][:, rows == s]
        assert result[name]["alignment"] == pytest.approx(alignment(mine[0], mine[1]))
        assert result[name]["uniformity"] == uniformity(z[name][0])
        assert result[name]["effective_rank"] == effective_rank(z[name][0])


def test_a_space_without_a_pair_has_no_alignment():
    z = {"content": randn(2, 4, 4), "color": randn(2, 4, 2, seed=1)}
    index = torch.zeros(4, dtype=torch.long)
    result = space_geometry(Embeddings(z, ViewPlan.interleaved(("content", "color")), space_index=index))
    assert math.isnan(result["color"]["alignment"]) and math.isfinite(result["color"]["uniformity"])
    assert result["content"]["alignment"] > 0


@pytest.mark.parametrize(
    ("z", "message"),
    [
        ({"content": randn(2, 6, 3), "color": randn(2, 6, 3)}, "need 3 views: got 2"),
        ({"content": randn(3, 6, 3), "color": randn(3, 5, 3)}, "space 'color': expected the 6 images"),
        ({"content": randn(3, 6, 3), "color": randn(6, 3)}, "space 'color'"),
        ({"color": randn(2, 6, 3)}, "content"),
        ({"content": randn(2, 1, 3)}, "at least 2 samples: got 1"),
        ({"content": randn(2, 4, 3) * math.nan}, "finite"),
        ({"content": torch.zeros(2, 4, 3)}, "of length 0"),
    ],
)
def test_space_geometry_of_what_does_not_fit(z, message):
    with pytest.raises(ValueError, match=message):
        space_geometry(z)


# ---- redundancy


def split(n, fraction=0.5, seed=0):
    return [r.numpy() for r in split_rows(n, fraction, generator(seed))]


def pooled_r2(y, predicted):
    mean = [sum(column) / len(y) for column in zip(*y.tolist(), strict=True)]
    sse = sst = 0.0
    for row, guess in zip(y.tolist(), predicted.tolist(), strict=True):
        for j, value in enumerate(row):
            sse += (value - guess[j]) ** 2
            sst += (value - mean[j]) ** 2
    return 1 - sse / sst


def ridge_by_hand(x, y, train, test, folds=5):
    """Predictions of scikit-learn's ridge with the one penalty that is best over folds and coordinates together."""
    x = StandardScaler().fit(x[train]).transform(x)
    errors = []
    for alpha in _probes.RIDGE_ALPHAS:
        total = 0.0
        for f in range(folds):
            out = np.arange(len(train)) % folds == f
            model = Ridge(alpha * len(train)).fit(x[train][~out], y[train][~out])
            total += ((model.predict(x[train][out]).reshape(-1, y.shape[1]) - y[train][out]) ** 2).sum()
        errors.append(total)
    model = Ridge(_probes.RIDGE_ALPHAS[int(np.argmin(errors))] * len(train)).fit(x[train], y[train])
    return model.predict(x[test]).reshape(len(test), -1)


@pytest.mark.parametrize(("fraction", "folds", "seed"), [(0.5, 5, 0), (0.6, 3, 4)])
def test_redundancy_equals_scikit_learn(fraction, folds, seed):
    a, noise = randn(80, 4) * torch.tensor([1.0, 5.0, 0.2, 2.0]) + 3, randn(80, 3, seed=1)
    b = torch.stack([a[:, 0] * 3, a[:, 1] + a[:, 2], noise[:, 2]], 1) + noise * torch.tensor([2.0, 1.0, 5.0])
    spaces = {"a": a, "b": b, "wide": torch.cat([a[:, :1] + 0.5 * noise[:, :1], randn(80, 60, seed=2)], 1)}
    table = redundancy(spaces, probe=Probe(train_fraction=fraction, folds=folds), seed=seed, bootstrap=0)
    train, test = split(80, fraction, seed)
    for one in spaces:
        for other in spaces:
            if one != other:
                x, y = spaces[one].numpy(), spaces[other].numpy()
                expected = pooled_r2(y[test], ridge_by_hand(x, y, train, test, folds))
                assert table[one, other] == pytest.approx(expected, abs=1e-6), (one, other)
    assert table["a", "b"] != pytest.approx(table["b", "a"], abs=0.05), "it has a direction"
    assert (table.n_train, table.n_test) == (len(train), len(test)) and table.intervals == {}


def test_a_direction_counts_by_its_variance():
    x, noise = randn(200, 1), randn(200, 1, seed=1)
    table = redundancy({"x": x, "mostly": torch.cat([10 * x, noise], 1), "hardly": torch.cat([x, 10 * noise], 1)})
    test = split(200)[1]
    for name, (wide, narrow) in {"mostly": (10, 1), "hardly": (1, 10)}.items():
        known, all_of_it = wide**2 * x[test].var(), wide**2 * x[test].var() + narrow**2 * noise[test].var()
        assert table["x", name] == pytest.approx(float(known / all_of_it), abs=0.03)
    assert table["mostly", "x"] > 0.99 and table["hardly", "x"] > 0.99


def test_duplicated_and_independent_spaces():
    a, b = randn(200, 3), randn(200, 2, seed=1)
    table = redundancy({"a": a, "copy": 4 * a @ randn(3, 3, seed=2) + 1, "b": b, "part": a[:, :1]})
    assert table["a", "copy"] > 0.999 and table["copy", "a"] > 0.999 and table["a", "part"] > 0.999
    assert table["part", "a"] == pytest.approx(1 / 3, abs=0.1)  # one of three directions
    assert all(table[one, other] < 0.1 for one, other in (("a", "b"), ("b", "a"), ("b", "copy")))
    for name in table.spaces:
        assert math.isnan(table[name, name]) and table.notes[name, name] == "itself"
    assert table.spaces == table.factors == ("a", "copy", "b", "part") and table.given == ()


def test_a_predicted_space_may_be_turned_moved_and_scaled():
    a, b = randn(60, 3) * torch.tensor([1.0, 4.0, 0.3]), randn(60, 2, seed=1)
    b = b + a[:, :2]
    plain = redundancy({"a": a, "b": b}, bootstrap=20)
    other = redundancy({"a": 1000 * turned(a) - 5, "b": b}, bootstrap=20)
    assert other["b", "a"] == pytest.approx(plain["b", "a"], abs=1e-9)
    assert other.intervals["b", "a"] == pytest.approx(plain.intervals["b", "a"], abs=1e-9)


@pytest.mark.parametrize("probe", ["kernel", "mlp"])
def test_the_unit_of_a_predicted_space_does_not_matter_to_any_probe(probe):
    a, b = randn(60, 2), randn(60, 2, seed=1)
    b = b + a
    plain, scaled = (redundancy({"a": z, "b": b}, probe=probe, bootstrap=0) for z in (a, 1000 * a))
    assert 0.1 < plain["b", "a"] < 0.9 and scaled["b", "a"] == pytest.approx(plain["b", "a"], abs=1e-3)


def test_a_rotation_of_a_white_space_leaves_redundancy_as_it_was():
    train = torch.from_numpy(split(60)[0])
    a, b = randn(60, 3), randn(60, 2, seed=1)
    b = b + a[:, :2]
    a = a - a[train].mean(0)
    a = a @ torch.linalg.inv(torch.linalg.cholesky(a[train].T @ a[train] / 30)).T  # standardised however it is turned
    plain, rotated = redundancy({"a": a, "b": b}), redundancy({"a": turned(a), "b": b})
    assert 0.1 < plain["a", "b"] < 0.9
    assert rotated["a", "b"] == pytest.approx(plain["a", "b"], abs=1e-9)
    assert rotated["b", "a"] == pytest.approx(plain["b", "a"], abs=1e-9)


def test_intervals_are_the_quantiles_of_resampled_pooled_r2(monkeypatch):
    monkeypatch.setattr(_probes, "RIDGE_ALPHAS", (0.1,))
    a, b = randn(60, 2), randn(60, 2, seed=1) * torch.tensor([1.0, 3.0])
    b = b + a
    got = redundancy({"a": a, "b": b}, bootstrap=40, seed=2).intervals
    g = generator(2)
    train, test = split_rows(60, 0.5, g)
    x, y = StandardScaler().fit(a[train]).transform(a), b.numpy()
    predicted = Ridge(0.1 * 30).fit(x[train], y[train]).predict(x)
    drawn = [test[torch.randint(30, (30,), generator=g)].numpy() for _ in range(40)]
    scores = [pooled_r2(y[d], predicted[d]) for d in drawn]
    assert got["a", "b"] == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=1e-9)
    assert set(got) == {("a", "b"), ("b", "a")}


def test_one_coordinate_is_plain_r2_and_the_kernel_sees_a_curve():
    x = randn(300, 1)
    spaces = {"x": x, "curve": x**2}
    ridge, kernel = (redundancy(spaces, probe=probe, bootstrap=0) for probe in ("ridge", "kernel"))
    assert ridge["x", "curve"] < 0.3 and kernel["x", "curve"] > 0.9 and kernel.probe == "kernel"
    train, test = split(300)
    expected = r2_score(x[test] ** 2, ridge_by_hand(x.numpy(), (x**2).numpy(), train, test))
    assert ridge["x", "curve"] == pytest.approx(expected, abs=1e-6)
    few = redundancy(spaces, probe=Probe("kernel", kernel_rows=20), bootstrap=0)
    assert (few.n_train, few.n_test) == (20, 150) and few["x", "curve"] != kernel["x", "curve"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_space_that_is_constant_cannot_be_predicted_and_predicts_nothing(dtype):
    a, dead = randn(60, 3).to(dtype), torch.full((60, 4), 0.1, dtype=dtype)
    table = redundancy({"a": a, "dead": dead}, bootstrap=10)
    assert math.isnan(table["a", "dead"]) and table.notes["a", "dead"] == "constant"
    assert ("a", "dead") not in table.intervals
    train, test = split(60)
    mean = a.double()[train].mean(0).expand(30, 3)
    assert table["dead", "a"] == pytest.approx(pooled_r2(a.double()[test], mean), abs=1e-6) and table["dead", "a"] <= 0
    rounding = torch.where(randn(60, 1) > 0, dead, torch.nextafter(dead, dead + 1))
    assert redundancy({"a": a, "dead": rounding}).notes["a", "dead"] == "constant"
    assert "n/a" in str(table) and "dead: constant" in str(table)


def test_a_space_that_is_constant_on_the_training_rows_cannot_be_predicted():
    a, stuck = randn(60, 3), randn(60, 2, seed=1)
    stuck[split(60)[0]] = 0.1
    table = redundancy({"a": a, "stuck": stuck}, bootstrap=10)
    assert math.isnan(table["a", "stuck"]) and table.notes["a", "stuck"] == "constant" and table["stuck", "a"] <= 0


def test_a_dead_coordinate_does_not_count():
    a, b = randn(60, 2), randn(60, 2, seed=1)
    b = b + a
    plain = redundancy({"a": a, "b": b}, bootstrap=0)
    dead = redundancy({"a": torch.cat([a, torch.full((60, 1), 0.1)], 1), "b": b}, bootstrap=0)
    assert dead.scores == pytest.approx(plain.scores, abs=1e-9, nan_ok=True)


def test_a_nearly_dead_coordinate_costs_next_to_nothing():
    a, unit = randn(400, 2), 1e-3 * torch.rand(400, 1, generator=generator(2))
    b = a + 0.3 * randn(400, 2, seed=1)
    plain = redundancy({"a": a, "b": b}, bootstrap=0)
    unit[split(400)[1][:4]] = 3.0
    nearly = redundancy({"a": torch.cat([a, unit], 1), "b": b}, bootstrap=0)
    assert nearly["a", "b"] == pytest.approx(plain["a", "b"], abs=0.02)
    spread = 36 / (36 + 2 * 200)  # of the four values, which nothing predicts
    assert nearly["b", "a"] == pytest.approx(plain["b", "a"] * (1 - spread), abs=0.02)


def test_fewer_samples_than_dimensions():
    a = randn(24, 40)
    table = redundancy({"a": a, "b": a[:, :2] * 5, "c": randn(24, 50, seed=1)})
    assert table["b", "a"] < 0.3 and table["a", "c"] < 0.1 and table["c", "b"] < 0.3
    assert table["a", "b"] < 0.9, "12 rows cannot say which 2 of 40 directions it takes"
    assert all(math.isfinite(v) for (one, other), v in table.scores.items() if one != other)


def test_chunks_do_not_matter_to_redundancy(monkeypatch):
    spaces = {"a": randn(60, 3), "b": randn(60, 2, seed=1)}
    spaces["b"] += spaces["a"][:, :2]
    whole = redundancy(spaces)
    monkeypatch.setattr(_probes, "CHUNK", 12)
    parts = redundancy(spaces)
    assert parts.scores == pytest.approx(whole.scores, abs=1e-9, nan_ok=True)


def test_modes_and_the_global_generator_do_not_matter():
    spaces = {"a": randn(40, 3), "b": randn(40, 2, seed=1)}
    before = torch.get_rng_state()
    plain = redundancy(spaces).to_json()
    assert torch.equal(torch.get_rng_state(), before) and redundancy(spaces, seed=1).to_json() != plain
    with torch.autocast("cpu", torch.bfloat16):
        assert redundancy(spaces).to_json() == plain
    with torch.inference_mode():
        assert redundancy({s: z.clone() for s, z in spaces.items()}).to_json() == plain
    graph = {s: z.clone().requires_grad_() for s, z in spaces.items()}
    assert redundancy(graph).to_json() == plain and all(z.grad is None for z in graph.values())


A, B = randn(40, 3), randn(40, 2, seed=1)
GAP = A.clone()
GAP[39, 2] = math.nan


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ({}, "redundancy: expected two spaces or more: got nothing"),
        ({"a": A}, "redundancy: expected two spaces or more: got a"),
        ({"a": A, "b": GAP}, "space 'b': expected finite embeddings"),
        ({"a": A, "b": B[:30]}, "space 'b': expected the 40 samples of space 'a': got 30"),
        ({"a": A, "b": B[:, 0]}, r"space 'b': .*\[n, d\]"),
        ({"a": A, "b": B.long()}, "space 'b': expected floating-point"),
        ({"a": A[:9], "b": B[:9]}, "at least 10 samples: got 9"),
        ({"a": A, "b": B.to("meta")}, "space 'b': expected the device cpu"),
    ],
)
def test_redundancy_of_bad_spaces(spaces, message):
    with pytest.raises(ValueError, match=message):
        redundancy(spaces)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probe": "forest"}, "probe: expected one of"),
        ({"probe": Probe(train_fraction=0.01)}, "train_fraction: expected a fraction of the 40 samples"),
        ({"bootstrap": -1}, "bootstrap: expected an integer of 0 or more: got -1"),
    ],
)
def test_bad_arguments_of_redundancy(arguments, message):
    with pytest.raises(ValueError, match=message):
        redundancy({"a": A, "b": B}, **arguments)


def test_an_absent_space_is_named():
    with pytest.raises(KeyError, match=r"spaces a, b; factors a, b: got \('a', 'color'\)"):
        redundancy({"a": A, "b": B}, bootstrap=0)["a", "color"]


def test_a_space_that_is_constant_on_either_side_of_the_split_is_not_predicted():
    z, w = torch.randn(100, 3, generator=generator()), torch.randn(100, 2, generator=generator(1))
    for rows in split_rows(100, 0.5, generator()):
        flat = z.clone()
        flat[rows] = 0.1
        table = redundancy({"a": flat, "b": w})
        assert math.isnan(table["b", "a"]) and table.notes["b", "a"] == "constant"


# ---- scale


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e307, 1e-307])
def test_no_measure_depends_on_the_unit(scale):
    z, other = randn(30, 3).tanh(), randn(30, 2, seed=1).tanh()
    assert effective_rank(z * scale) == pytest.approx(effective_rank(z))
    assert uniformity(z * scale) == pytest.approx(uniformity(z))
    assert alignment(z * scale, z.roll(1, 0)) == pytest.approx(alignment(z, z.roll(1, 0)))
    a, b = ({"a": z * s, "b": torch.cat([other, z[:, :1]], 1) * s} for s in (1, scale))
    expected, got = redundancy(a, bootstrap=0), redundancy(b, bootstrap=0)
    assert got["b", "a"] == pytest.approx(expected["b", "a"], abs=1e-6) and got["b", "a"] > 0.1


def test_a_space_of_zeros_is_named_and_the_others_can_be_measured():
    eye = torch.eye(4).expand(4, 4, 4)
    z = {"content": eye, "color": torch.zeros(4, 4, 2), "place": 2 * eye}
    with pytest.raises(ValueError, match="space 'color': uniformity: expected embeddings with a direction: got 4 of"):
        space_geometry(z)
    whole = space_geometry(z | {"color": eye})
    assert space_geometry(z, spaces=["place", "content"]) == {s: whole[s] for s in ("place", "content")}
    with pytest.raises(ValueError, match="spaces: expected some of content, color, place: got hue"):
        space_geometry(z, spaces=["hue"])
