"""StyleIndex against a brute-force double loop; FAISS against the exact search."""

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from ssd_addon.metrics import StyleIndex
from ssd_addon.metrics import index as index_module

ROUNDING = 1e-6  # float32
WEIGHTS = [
    None,
    "color",
    {"content": 1, "color": -1},
    {"content": 0.2, "color": 0.0, "crop": -3},
    {"crop": -0.5},
    {"content": -1.0, "color": -2, "crop": 0.5},
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def spaces(n=25, seed=0):
    g = generator(seed)
    return {name: torch.randn(n, d, generator=g) + 0.2 for name, d in (("content", 5), ("color", 3), ("crop", 1))}


def cosine(a, b):
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


def similarities(z, weights, query):
    """sum_s w_s cos(q_s, x_s) / sum_s |w_s| of every query and every image, in a double loop."""
    if weights is None:
        weights = dict.fromkeys(z, 1.0)
    if isinstance(weights, str):
        weights = {weights: 1.0}
    total = sum(abs(w) for w in weights.values())
    z, query = ({s: t.double().tolist() for s, t in each.items()} for each in (z, query))
    n, q = (len(next(iter(each.values()))) for each in (z, query))
    return [
        [sum(w * cosine(query[s][i], z[s][j]) for s, w in weights.items() if w) / total for j in range(n)]
        for i in range(q)
    ]


def check(scores, rows, expected, k, exclude=None):
    """The k best of every row of `expected`, ties in any order."""
    assert scores.shape == rows.shape == (len(expected), k)
    assert scores.dtype == torch.float32 and rows.dtype == torch.int64
    for i, all_of_them in enumerate(expected):
        allowed = [j for j in range(len(all_of_them)) if exclude is None or j != exclude[i]]
        found = rows[i].tolist()
        assert len(set(found)) == k and set(found) <= set(allowed)
        best = sorted((all_of_them[j] for j in allowed), reverse=True)[:k]
        assert scores[i].tolist() == pytest.approx(best, abs=ROUNDING)
        assert [all_of_them[j] for j in found] == pytest.approx(best, abs=ROUNDING)


BACKENDS = ["exact", "faiss"]


def index(z, backend="exact", **more):
    if backend == "faiss":
        import faiss  # noqa: F401
    return StyleIndex(z, backend=backend, **more)


# ---- against a loop


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_are_compared_with_all_but_themselves(backend, weights):
    z = spaces()
    rows = torch.tensor([7, 0, 24, 7])
    expected = similarities(z, weights, {s: t[rows] for s, t in z.items()})
    for k in (1, 6, 24):
        check(*index(z, backend).search(rows, weights, k=k), expected, k, exclude=rows.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_embeddings_of_other_images_are_compared_with_all(backend, weights):
    z, query = spaces(), spaces(4, seed=1)
    for k in (3, 25):
        check(*index(z, backend).search(query, weights, k=k), similarities(z, weights, query), k)


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_weightings(backend):
    z, g = spaces(), generator(3)
    built = index(z, backend)
    for _ in range(12):
        w = torch.randn(3, generator=g) * (torch.rand(3, generator=g) > 0.3)
        w[int(torch.randint(3, (1,), generator=g))] = -0.7
        weights = dict(zip(z, w.tolist(), strict=True))
        rows = torch.randint(25, (3,), generator=g)
        expected = similarities(z, weights, {s: t[rows] for s, t in z.items()})
        check(*built.search(rows, weights, k=5), expected, 5, exclude=rows.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_similarity_by_hand(backend):
    z = {
        "content": torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 5.0], [3.0, 0.0]]),
        "color": torch.tensor([[1.0], [4.0], [2.0], [-1.0]]),
    }
    built = index(z, backend)
    scores, rows = built.search(0, {"content": 1, "color": -1}, k=3)  # same content, other colour
    assert rows.tolist() == [[3, 1, 2]] and scores[0].tolist() == pytest.approx([1, 0, -0.5])
    scores, rows = built.search(0, {"content": 3, "color": 1}, k=3)
    assert rows.tolist() == [[1, 3, 2]] and scores[0].tolist() == pytest.approx([1, 0.5, 0.25])
    scores, rows = built.search({"content": torch.tensor([[0.0, 0.1]])}, "content", k=1)
    assert rows.tolist() == [[2]] and scores[0].tolist() == pytest.approx([1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_of_an_image_are_found_but_not_the_image(backend):
    z = {"content": torch.randn(4, 3, generator=generator()).repeat(6, 1)}  # six copies of four images
    rows = torch.arange(24)
    scores, found = index(z, backend).search(rows, k=5)
    assert torch.equal(found.sort(1).values % 4, (rows % 4)[:, None].expand(24, 5))
    assert (found != rows[:, None]).all() and scores.min() > 1 - ROUNDING
    assert all(len(set(r)) == 5 for r in found.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_is_asked_in_many_ways(backend):
    built = index(spaces(), backend)
    expected = built.search(torch.tensor([3]), k=4)
    for query in (3, [3], torch.tensor(3), torch.tensor([3], dtype=torch.uint8), torch.tensor([3], dtype=torch.int32)):
        for got, want in zip(built.search(query, k=4), expected, strict=True):
            assert torch.equal(got, want)
    scores, rows = built.search(torch.zeros(0, dtype=torch.long), k=4)
    assert scores.shape == rows.shape == (0, 4) and rows.dtype == torch.int64 and scores.dtype == torch.float32


def test_weights_are_relative_and_a_space_that_is_not_named_counts_0():
    z = spaces()
    built, query = index(z), torch.arange(5)
    scores, rows = built.search(query, {"content": 2, "color": -4}, k=24)
    for other in (
        {"content": 1.0, "color": -2.0},
        {"content": 1, "color": -2, "crop": 0},
        {"color": -20, "content": 10},
    ):
        got = built.search(query, other, k=24)
        assert torch.allclose(got[0], scores, atol=ROUNDING) and torch.equal(got[1], rows)
    assert torch.equal(built.search(query, {"color": 1})[1], built.search(query, "color")[1])
    worst = built.search(query, {"content": -1, "color": 2}, k=24)
    assert torch.allclose(worst[0], -scores.flip(1), atol=ROUNDING) and torch.equal(worst[1], rows.flip(1))
    assert built.search(query)[0].shape == (5, 10)


def test_a_query_of_its_own_embeddings_finds_itself():
    z = spaces()
    scores, rows = index(z).search(z, {"content": 1, "color": 1}, k=1)
    assert rows[:, 0].tolist() == list(range(25)) and scores[:, 0].tolist() == pytest.approx([1.0] * 25, abs=ROUNDING)


def test_only_weighted_spaces_are_asked_for_in_a_query():
    z, query = spaces(), spaces(3, seed=1)
    built = index(z)
    some = {"content": query["content"], "nothing the index knows": torch.zeros(7)}
    for weights in ("content", {"content": 2, "color": 0}):
        assert torch.equal(built.search(some, weights)[1], built.search(query, "content")[1])


def test_lengths_of_rows_and_the_rotation_of_a_space_do_not_matter():
    z = spaces()
    scores, rows = index(z).search(torch.arange(25), {"content": 1, "color": -0.4}, k=8)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator(1)))[0]
    lengths = torch.logspace(-3, 3, 25)[:, None]
    moved = z | {"content": lengths * z["content"] @ turn, "color": 1e-30 * z["color"]}
    got = index(moved).search(torch.arange(25), {"content": 1, "color": -0.4}, k=8)
    assert torch.allclose(got[0], scores, atol=1e-5) and torch.equal(got[1], rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_float_type_is_indexed_and_no_graph_is_kept(dtype):
    z = {s: t.to(dtype) for s, t in spaces().items()}
    expected = similarities(z, None, {s: t[:3] for s, t in z.items()})
    graph = {s: t.clone().requires_grad_() for s, t in z.items()}
    scores, rows = index(graph).search([0, 1, 2], k=6)
    assert not scores.requires_grad
    check(scores, rows, expected, 6, exclude=[0, 1, 2])
    scores, rows = index(z).search({s: t[:3] for s, t in graph.items()}, k=6)
    assert not scores.requires_grad
    check(scores, rows, expected, 6)


@pytest.mark.parametrize("size", [1e-300, 1e-40, 1e300])
def test_very_long_and_very_short_rows_have_a_direction(size):
    z = {s: t.double() for s, t in spaces().items()}
    scores, rows = index({s: t * size for s, t in z.items()}).search(0, k=9)
    expected, places = index(z).search(0, k=9)
    assert torch.allclose(scores, expected, atol=ROUNDING) and torch.equal(rows, places)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_zeros_is_like_none(backend):
    z = spaces()
    z["color"][[2, 9]] = 0
    built = index(z, backend)
    scores, rows = built.search(2, "color", k=24)
    assert (scores == 0).all() and sorted(rows[0].tolist()) == [r for r in range(25) if r != 2]
    scores, rows = built.search(4, {"content": 1, "color": 1}, k=24)
    expected = similarities(z, {"content": 1, "color": 1}, {s: t[4:5] for s, t in z.items()})
    check(scores, rows, expected, 24, exclude=[4])
    query = {"color": torch.zeros(1, 3)}
    assert (built.search(query, "color")[0] == 0).all()


@pytest.mark.parametrize("chunk", [1, 25, 60, 24 * 25])
@pytest.mark.parametrize("kind", ["rows", "embeddings"])
def test_chunks_do_not_matter(monkeypatch, chunk, kind):
    z = spaces()
    built = index(z)
    query = torch.arange(25).flip(0) if kind == "rows" else spaces(25, seed=1)
    scores, rows = built.search(query, {"content": 1, "color": -1}, k=7)
    sizes = []
    real = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda t, *a, **k: (sizes.append(len(t)), real(t, *a, **k))[1])
    monkeypatch.setattr(index_module, "CHUNK", chunk)
    got = built.search(query, {"content": 1, "color": -1}, k=7)
    assert torch.allclose(got[0], scores, atol=ROUNDING) and torch.equal(got[1], rows)
    assert max(sizes) == max(1, chunk // 25) and sum(sizes) == 25


def test_the_index_says_what_it_holds():
    built = index(spaces())
    assert len(built) == 25 and built.spaces == ("content", "color", "crop")
    assert repr(built) == "StyleIndex(25 images, spaces content, color, crop, exact)"


# ---- faiss


@pytest.mark.parametrize("weights", WEIGHTS)
def test_faiss_flat_equals_exact(weights):
    z = spaces(300)
    exact, flat = index(z), index(z, "faiss")
    for query in (torch.arange(0, 300, 7), spaces(20, seed=1)):
        one, other = exact.search(query, weights, k=12), flat.search(query, weights, k=12)
        assert torch.allclose(one[0], other[0], atol=ROUNDING) and other[1].dtype == torch.int64
        expected = similarities(
            z, weights, {s: t[query] for s, t in z.items()} if isinstance(query, torch.Tensor) else query
        )
        check(*other, expected, 12, exclude=query.tolist() if isinstance(query, torch.Tensor) else None)
        if weights != {"crop": -0.5}:  # a width of 1: all ties
            assert (one[1] == other[1]).float().mean() > 0.99


def clustered(n=3000):
    """Embeddings of few latent directions, as trained networks give them."""
    g = generator()
    return {
        s: torch.randn(n, 4, generator=g) @ torch.randn(4, d, generator=g) + 0.3 * torch.randn(n, d, generator=g)
        for s, d in (("content", 16), ("color", 6))
    }


@pytest.fixture(scope="module")
def approximate():
    z = clustered()
    return index(z), index(z, "faiss", factory="HNSW32,Flat")


@pytest.mark.parametrize("weights", [None, "content", {"content": 1, "color": 0.5}, {"content": 1, "color": -0.1}])
def test_an_approximate_index_finds_most_of_the_neighbours(approximate, weights):
    exact, hnsw = approximate
    query = torch.arange(0, 3000, 10)
    _, truth = exact.search(query, weights)
    scores, rows = hnsw.search(query, weights)
    assert (truth[:, :, None] == rows[:, None]).any(2).double().mean() >= 0.9
    assert (rows != query[:, None]).all() and (scores.diff(dim=1) <= ROUNDING).all()
    assert rows.shape == (300, 10) and all(len(set(r)) == 10 for r in rows.tolist())


def test_an_approximate_index_fills_what_it_does_not_find():
    z = {"content": torch.randn(400, 6, generator=generator())}
    scores, rows = index(z, "faiss", factory="IVF8,Flat").search(torch.arange(20), k=390)  # looks into one list of 8
    missing = rows < 0
    assert missing.any() and (rows[missing] == -1).all() and (scores[missing] == -math.inf).all()
    assert scores[~missing].isfinite().all() and (rows != torch.arange(20)[:, None]).all()
    assert (~missing[:, :20]).all() and (missing.long().diff(dim=1) >= 0).all(), "the missing come last"
    exact, places = index(z).search(torch.arange(20), k=399)
    for i in range(20):
        true = dict(zip(places[i].tolist(), exact[i].tolist(), strict=True))
        for row, score in zip(rows[i].tolist(), scores[i].tolist(), strict=True):
            assert row < 0 or score == pytest.approx(true[row], abs=ROUNDING)


def test_a_row_that_faiss_does_not_give_back_is_left_out_all_the_same():
    z = spaces()
    rows = torch.arange(25)
    scores, found = index(z, "faiss").search(rows, {"content": -1}, k=5)  # it is itself the last of all
    check(scores, found, similarities(z, {"content": -1}, z), 5, exclude=rows.tolist())


def test_faiss_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"backend='faiss' needs FAISS \(pip install faiss-cpu\)"):
        StyleIndex(spaces(), backend="faiss")
    assert len(StyleIndex(spaces())) == 25


# ---- bad input


Z = torch.randn(25, 3, generator=generator())
NAN = Z.clone()
NAN[24, 2] = math.nan


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ({}, "at least one space: got none"),
        ({"a": Z, "b": Z[:20]}, "space 'b': expected the 25 images of space 'a': got 20"),
        ({"a": Z, "b": NAN}, "space 'b': expected finite embeddings"),
        ({"a": Z, "b": NAN.nan_to_num(math.inf)}, "space 'b': expected finite embeddings"),
        ({"a": Z[0]}, r"space 'a': .*\[n, d\].*got \[3\]"),
        ({"a": Z[None]}, r"space 'a': .*pass one view, z\[v\]"),
        ({"a": Z[:, :0]}, r"space 'a': .*got \[25, 0\]"),
        ({"a": Z[:0]}, "space 'a': expected at least 1 samples: got 0"),
        ({"a": Z.long()}, "space 'a': expected floating-point embeddings: got torch.int64"),
        ({"a": Z + 0j}, "space 'a': expected floating-point embeddings"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_embeddings(backend, embeddings, message):
    with pytest.raises(ValueError, match=message):
        index(embeddings, backend)


def test_bad_backends():
    with pytest.raises(ValueError, match="backend: expected one of 'exact', 'faiss': got 'annoy'"):
        StyleIndex(spaces(), backend="annoy")
    with pytest.raises(ValueError, match="factory: expected it only with backend='faiss': got 'HNSW32,Flat'"):
        StyleIndex(spaces(), factory="HNSW32,Flat")
    with pytest.raises(TypeError, match="space 'a': expected a tensor .*: got list"):
        StyleIndex({"a": Z.tolist()})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("style", "weights: expected names of spaces .content, color, crop.: got 'style'"),
        ({"content": 1, "style": 0}, "got 'style'"),
        ({"content": 0, "color": 0.0}, "at least one nonzero weight: got .'content': 0, 'color': 0.0"),
        ({}, "at least one nonzero weight"),
        ({"content": math.nan}, "finite number for space 'content': got nan"),
        ({"content": math.inf}, "finite number for space 'content': got inf"),
        ({"content": True}, "finite number for space 'content': got True"),
        ({"content": "1"}, "finite number for space 'content': got '1'"),
        ({"content": 10**400}, r"finite number for space 'content': got 1000.* \(401 characters\)"),
        ({"content": torch.tensor(1.0)}, "finite number for space 'content': got tensor"),
    ],
)
def test_bad_weights(backend, weights, message):
    for query in (0, spaces(2)):
        with pytest.raises(ValueError, match=message):
            index(spaces(), backend).search(query, weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [0, -1, 25, 2.0, True, "3"])
def test_bad_k_of_rows(backend, k):
    with pytest.raises(ValueError, match="k: expected 1 to 24 neighbors, as the index holds 25 images: got"):
        index(spaces(), backend).search(0, k=k)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_k_of_embeddings(backend):
    with pytest.raises(ValueError, match="k: expected 1 to 25 neighbors, as the index holds 25 images: got 26"):
        index(spaces(), backend).search(spaces(2), k=26)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (25, "query: expected positions 0 to 24: got 25 to 25"),
        (-1, "query: expected positions 0 to 24: got -1 to -1"),
        ([3, 25, 4], "query: expected positions 0 to 24: got 3 to 25"),
        (torch.tensor([-2, 7]), "got -2 to 7"),
    ],
)
def test_rows_that_the_index_does_not_have(rows, message):
    with pytest.raises(ValueError, match=message):
        index(spaces()).search(rows, k=1)


@pytest.mark.parametrize("rows", [1.0, [0.5, 1.0], torch.tensor([1.0]), torch.tensor([True]), True, torch.tensor([1j])])
def test_rows_are_integers(rows):
    with pytest.raises(
        TypeError, match="query: expected integer positions in the index, or a mapping of embeddings: got"
    ):
        index(spaces()).search(rows, k=1)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "expected embeddings of every weighted space: got none of content, color$"),
        ({"content": torch.ones(2, 5)}, "every weighted space: got none of color$"),
        ({"content": torch.ones(2, 5), "color": torch.ones(2, 4)}, r"'color' as \[2, 3\].*: got \[2, 4\]"),
        ({"content": torch.ones(2, 4), "color": torch.ones(2, 3)}, r"'content' as \[2, 5\].*: got \[2, 4\]"),
        ({"content": torch.ones(2, 5), "color": torch.ones(3, 3)}, r"'color' as \[2, 3\].*: got \[3, 3\]"),
        ({"content": torch.ones(2, 5), "color": torch.ones(3)}, r"query 'color': .*\[n, d\]"),
        ({"content": torch.ones(5), "color": torch.ones(3)}, r"query 'content': .*\[n, d\].*got \[5\]"),
        ({"content": torch.ones(2, 5) * math.nan, "color": torch.ones(2, 3)}, "query 'content': expected finite"),
        ({"content": torch.ones(2, 5), "color": torch.ones(2, 3) * math.inf}, "query 'color': expected finite"),
        ({"content": torch.ones(2, 5), "color": torch.ones(2, 3).long()}, "query 'color': expected floating-point"),
    ],
)
def test_bad_embeddings_to_ask_with(query, message):
    with pytest.raises(ValueError, match=message):
        index(spaces()).search(query, {"content": 1, "color": -1}, k=2)


SCALES = [5e-324, 1e-320, 1e-310, 1e308, 1.7e308, 5, 10**300, np.float32(3), np.int64(7), Fraction(1, 3)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", SCALES)
def test_only_the_ratio_of_weights_matters(backend, scale):
    built = index(spaces(), backend)
    got = built.search(3, {"content": scale, "color": -scale, "crop": scale}, k=4)
    expected = built.search(3, {"content": 1.0, "color": -1.0, "crop": 1.0}, k=4)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("small", "large"), [(1e-320, 1.0), (1.0, 1e308), (1e-320, 1e308)])
def test_a_weight_beside_a_huge_one_is_nothing(backend, small, large):
    built = index(spaces(), backend)
    torch.testing.assert_close(built.search(3, {"content": small, "color": large}), built.search(3, "color"))


def test_a_query_that_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="query 'color': expected a tensor .*got int"):
        StyleIndex(spaces()).search({"color": 5}, "color")


# ---- what FAISS does not build


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Fla", "expected a string that FAISS can parse.*got 'Fla' .could not parse index string Fla."),
        ("", "expected a string that FAISS can parse"),
        (None, "expected a FAISS factory string.*got None"),
        ("IVF256,Flat", r"from 120 images of 12 dimensions: got 'IVF256,Flat' \(.*120.* number of clusters \(256\)"),
        ("IVF121,Flat", "number of clusters .121."),
        ("PQ4", "got 'PQ4' .*number of clusters .256."),
        ("IVF4,PQ4", "number of clusters .256."),
        ("OPQ4,PQ4", "number of clusters .256."),
        ("PQ5", "12 dimensions and inner products.*got 'PQ5' .*should be a multiple of the number of subquantizers"),
        ("OPQ5,Flat", "got 'OPQ5,Flat' .*should be a multiple"),
        ("PCA50,Flat", "cannot output 50 dimensions from 12"),
        ("IDMap,Flat", "got 'IDMap,Flat' .add does not make sense with IndexIDMap"),
        ("LSH", "inner products.*got 'LSH'"),
        ("HNSW8_PQ4x4", "compares by inner products: got 'HNSW8_PQ4x4'"),
        ("HNSW0", "numbers are 1 or more.*got 'HNSW0'"),
        ("HNSW1", "2 or more for the links of a graph.*got 'HNSW1'"),
        ("IVF4_HNSW0,Flat", "numbers are 1 or more"),
        ("PQ4x0", "numbers are 1 or more"),
        ("IVF0,Flat", "numbers are 1 or more"),
    ],
)
def test_a_factory_that_faiss_cannot_build_is_named_with_its_reason(capfd, factory, message):
    z = {"content": torch.randn(120, 8, generator=generator()), "color": torch.randn(120, 4, generator=generator(1))}
    with pytest.raises(ValueError, match=f"^factory: .*{message}") as caught:
        StyleIndex(z, backend="faiss", factory=factory)
    assert "\n" not in str(caught.value) and ".cpp" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_graph_needs_more_images():
    with pytest.raises(ValueError, match="^factory: .*25 images.*got 'NSG8' .*graph smaller than 100"):
        StyleIndex(spaces(), backend="faiss", factory="NSG8")


COARSE = ["IVF4,Flat", "PQ4x4", "IVF4,PQ4x4", "OPQ4,PQ4x4", "PCA4,Flat", "SQ4", "HNSW8,SQ8", "L2norm,Flat", "RR6,Flat"]


@pytest.mark.parametrize("factory", COARSE)
def test_scores_are_right_however_coarse_the_index_is_and_nothing_is_printed(capfd, factory):
    z = {"content": torch.randn(300, 8, generator=generator()), "color": torch.randn(300, 4, generator=generator(1))}
    weights, rows = {"content": 1, "color": -0.5}, torch.arange(20)
    expected = similarities(z, weights, {s: t[rows] for s, t in z.items()})
    scores, found = index(z, "faiss", factory=factory).search(rows, weights, k=9)
    assert (found != rows[:, None]).all() and (scores.diff(dim=1) <= 0).all()
    for i in range(20):
        assert scores[i].tolist() == pytest.approx([expected[i][j] for j in found[i].tolist()], abs=ROUNDING)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32])
def test_rows_of_every_integer_type(dtype):
    z = spaces()
    built, query = StyleIndex(z), torch.tensor([3, 7])
    assert torch.equal(built.search(query.to(dtype), k=3)[1], built.search(query, k=3)[1])
    with pytest.raises(ValueError, match="expected positions 0 to 24: got 3 to 99"):
        built.search(torch.tensor([3, 99], dtype=dtype), k=3)
