"""retrieval against a loop over images, and on spaces of which one knows the order."""

import math

import pytest
import torch

from ssd_addon.metrics import Circular, RetrievalTable, retrieval

QUICK = {"bootstrap": 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def circle(angle):
    return torch.stack([angle.cos(), angle.sin()], 1)


def slow(z, distance, valid, k):
    """Mean distance of neighbors by cosine, of all others, of the nearest; and the score."""
    sums, rows = [0.0, 0.0, 0.0], [i for i in range(len(z)) if valid[i]]
    for i in rows:
        others = [j for j in rows if j != i]
        cosine = {j: float(z[i] @ z[j] / (z[i].norm() * z[j].norm())) for j in others}
        near = sorted(others, key=lambda j: -cosine[j])[:k]
        d = sorted(distance(i, j) for j in others)
        sums[0] += sum(distance(i, j) for j in near) / k
        sums[1] += sum(d) / len(d)
        sums[2] += sum(d[:k]) / k
    d, chance, ideal = (s / len(rows) for s in sums)
    return d, chance, ideal, (chance - d) / (chance - ideal)


def factors(n=30):
    value, angle = torch.rand(n, generator=generator(1)), 2 * math.pi * torch.rand(n, generator=generator(2))
    classes = torch.randint(3, (n,), generator=generator(3))
    fold = torch.where(torch.arange(n) % 4 == 0, 0, 2)
    return value, angle, classes, fold


@pytest.mark.parametrize("kind", ["value", "class", "bool", "angle", "two-fold angle"])
def test_scores_and_distances_are_those_of_a_loop_over_images(kind):
    value, angle, classes, fold = factors()
    z = torch.randn(30, 4, generator=generator())

    def between(k):
        def distance(i, j):
            turn = k * float(angle[i] - angle[j])
            return abs((turn + math.pi) % (2 * math.pi) - math.pi)

        return distance

    attribute, distance = {
        "value": (value, lambda i, j: abs(float(value[i] - value[j]))),
        "class": (classes, lambda i, j: float(classes[i] != classes[j])),
        "bool": (classes > 0, lambda i, j: float((classes[i] > 0) != (classes[j] > 0))),
        "angle": (Circular(angle), between(1)),
        "two-fold angle": (Circular(angle, fold), between(2)),
    }[kind]
    valid = fold > 0 if kind == "two-fold angle" else torch.ones(30, dtype=torch.bool)
    table = retrieval({"a": z}, {"x": attribute}, k=3, **QUICK)
    *distances, score = slow(z.double(), distance, valid, 3)
    assert table.distances["a", "x"] == pytest.approx(distances, abs=1e-5)
    assert table["a", "x"] == pytest.approx(score, abs=1e-5)
    assert table.notes == ({("a", "x"): "defined for 22 of 30 images"} if kind == "two-fold angle" else {})


def test_a_space_that_is_the_attribute_scores_1_and_one_of_noise_0():
    angle = 2 * math.pi * torch.rand(400, generator=generator())
    z = {"hue": circle(angle), "noise": torch.randn(400, 5, generator=generator(1)), "none": torch.ones(400, 3)}
    table = retrieval(z, {"hue": Circular(angle), "class": (angle > 1).long()})
    for attribute in ("hue", "class"):
        assert table["hue", attribute] > (0.98 if attribute == "hue" else 0.9)  # classes have borders
        for space in ("noise", "none"):
            assert abs(table[space, attribute]) < 0.06
            low, high = table.intervals[space, attribute]
            assert low <= table[space, attribute] <= high and high - low < 0.1


def test_equal_embeddings_do_not_go_by_the_order_of_the_images():
    """Sorted images: neighbors by place would be alike in the attribute."""
    table = retrieval({"none": torch.zeros(300, 2)}, {"x": torch.arange(300.0)}, k=5, **QUICK)
    assert abs(table["none", "x"]) < 0.15


def test_neighbors_that_are_less_alike_than_any_score_below_0():
    side = torch.arange(40) % 2
    z = torch.where(side[:, None] == torch.tensor([0, 1]), 1.0, 0.1) + 0.01 * torch.rand(40, 2, generator=generator())
    attribute = side.clone()
    attribute[:20] = torch.arange(20) // 2 % 2  # has nothing to do with the space
    assert retrieval({"a": z}, {"x": side}, k=3, **QUICK)["a", "x"] == 1.0
    pairs = torch.arange(40) // 2  # each image's only companion is on the other side
    assert retrieval({"a": z}, {"x": pairs}, k=3, **QUICK)["a", "x"] < 0


def test_queries_are_some_of_the_images_and_search_all():
    value = torch.rand(200, generator=generator())
    z = {"a": circle(value)}
    table = retrieval(z, {"x": value}, queries=20, **QUICK)
    assert (table.n_train, table.n_test) == (200, 20) and table["a", "x"] > 0.98
    assert "10 nearest of 200 images, 20 queries" in str(table)
    few = [
        retrieval({"a": torch.rand(200, 3, generator=generator(4))}, {"x": value}, queries=20, seed=s)
        for s in (0, 0, 1)
    ]
    assert few[0]["a", "x"] == few[1]["a", "x"] != few[2]["a", "x"]


def test_the_table_survives_json():
    value, *_ = factors()
    table = retrieval({"a": torch.randn(30, 2, generator=generator())}, {"x": value, "even": torch.ones(30)}, k=2)
    again = RetrievalTable.from_json(table.to_json())
    assert str(again) == str(table) and again.distances == table.distances and list(table.distances) == [("a", "x")]
    assert again.only(factors=["x"])["a", "x"] == table["a", "x"]


@pytest.mark.parametrize(
    ("attribute", "note"),
    [
        (torch.ones(30), "constant"),
        (torch.full((30,), math.nan), "defined for 0 images"),
        (torch.full((30,), math.inf), "30 of 30 values are infinite"),
        (Circular(torch.rand(30), torch.where(torch.arange(30) < 4, 1, 0)), "defined for 4 images"),
        (torch.arange(30), "the 3 nearest in it are no closer than any"),
    ],
)
def test_what_has_no_score_says_why(attribute, note):
    table = retrieval({"a": torch.rand(30, 2)}, {"x": attribute, "fine": torch.rand(30)}, k=3, **QUICK)
    assert math.isnan(table["a", "x"]) and note in table.notes["a", "x"] and note in str(table)
    assert not math.isnan(table["a", "fine"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embeddings": {}}, ValueError, "at least one space"),
        ({"attributes": {}}, ValueError, "at least one space and one attribute"),
        ({"attributes": {"x": torch.rand(29)}}, ValueError, "a value for each of the 30 images: got 29"),
        ({"attributes": {"x": torch.rand(30, 2)}}, TypeError, r"expected a tensor \[n\]"),
        ({"attributes": {"x": [1, 2]}}, TypeError, "got list"),
        ({"attributes": {"x": Circular(torch.rand(30), torch.arange(30) % 3)}}, ValueError, "same fold.*: got 1, 2"),
        ({"k": 29}, ValueError, "expected at most 28 neighbors"),
        ({"k": 0}, ValueError, "k: expected"),
        ({"queries": 0}, ValueError, "queries: expected"),
        ({"bootstrap": -1}, ValueError, "bootstrap: expected"),
        ({"embeddings": {"a": torch.full((30, 2), math.nan)}}, ValueError, "expected finite embeddings"),
    ],
)
def test_what_is_refused(change, error, message):
    given = {"embeddings": {"a": torch.rand(30, 2)}, "attributes": {"x": torch.rand(30)}} | change
    with pytest.raises(error, match=message):
        retrieval(given.pop("embeddings"), given.pop("attributes"), **given)


def test_images_without_a_value_are_left_out_of_that_attribute():
    g = torch.Generator().manual_seed(0)
    value, z = torch.rand(40, generator=g), torch.randn(40, 3, generator=g)
    z[:, 0] += 5 * value
    part = value.clone()
    part[[3, 17]] = math.nan
    table = retrieval({"a": z}, {"whole": value, "part": part}, k=5)
    rest = [i for i in range(40) if i not in (3, 17)]
    alone = retrieval({"a": z[rest]}, {"part": value[rest]}, k=5)
    assert table["a", "part"] == pytest.approx(alone["a", "part"], abs=1e-9)
    assert table.notes["a", "part"] == "defined for 38 of 40 images" and ("a", "whole") not in table.notes
    part[0] = math.inf
    assert retrieval({"a": z}, {"part": part}, k=5).notes["a", "part"] == "1 of 38 values are infinite"
