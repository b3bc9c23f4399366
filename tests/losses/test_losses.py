"""JointEntropyLoss against the oracle (tests/support/reference.py), against lightly, and against bad input."""

import copy
import itertools
import math
import pickle

import pytest
import reference
import torch
from lightly.loss import BarlowTwinsLoss, DCLLoss, VICRegLoss
from torch import nn

from ssd_addon import Embeddings, JointEntropyLoss, ViewPlan

FAMILIES = ("simclr", "vicreg", "barlow")
WIDTHS = {"content": 4, "color": 3, "spatial": 2}
EXACT = 1e-9  # float64 against float64 loops: rounding of sums alone


def embeddings(plan, b=6, *, widths=WIDTHS, seed=0, ids=None, index=None, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    tensors = {
        n: (scale * torch.randn(plan.num_views, b, d, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
        for n, d in widths.items()
    }
    return Embeddings(tensors, plan, image_ids=ids, space_index=index)


def grads(loss, z):
    return torch.autograd.grad(loss, list(z.values()), allow_unused=True, materialize_grads=True)


def cross_ids(v, b, views=(2,)):
    ids = torch.arange(b).repeat(v, 1)
    for k in views:
        ids[k] = ids[k].roll(k)
    return ids


def assert_equals_oracle(criterion, z, **options):
    want = reference.joint_entropy_loss(
        z, family=criterion.family, plan=z.plan.kind, image_ids=z.image_ids, space_index=z.space_index, **options
    )
    got = criterion.terms(z)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=EXACT, abs=EXACT)
    assert criterion(z).item() == got.loss.item()
    for name in z:
        assert got.invariance[name].item() == pytest.approx(want.invariance[name].item(), rel=EXACT, abs=EXACT), name
        if want.constraint[name] is None:
            assert got.rows[name] == 0
        else:
            assert got.constraint[name].item() == pytest.approx(want.constraint[name].item(), rel=EXACT, abs=EXACT)
    assert got.entropy.item() == pytest.approx(want.entropy.item(), rel=EXACT, abs=EXACT)
    assert (got.content_entropy is None) == (want.content_entropy is None)
    if want.content_entropy is not None:
        assert got.content_entropy.item() == pytest.approx(want.content_entropy.item(), rel=EXACT, abs=EXACT)
    for name, a, b in zip(z, grads(got.loss, z), grads(want.loss, z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=EXACT, msg=lambda m, n=name: f"gradient of {n}: {m}")


BACKENDS = ("eager", "streaming")
OPTIONS = list(itertools.product(("first", "all"), (False, True), (0.0, 0.4)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys,content_entropy,trim", OPTIONS)
@pytest.mark.parametrize("cross", [False, True], ids=["plain", "cross"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_query_equals_oracle(family, cross, keys, content_entropy, trim, backend):
    plan = ViewPlan.shared_query(tuple(WIDTHS))
    z = embeddings(plan, ids=cross_ids(4, 6) if cross else None)
    options = {"content_keys": keys, "content_entropy": content_entropy, "trim": trim}
    criterion = JointEntropyLoss(family, backend=backend, **options)
    assert_equals_oracle(criterion, z, **options)


@pytest.mark.parametrize("keys,content_entropy,trim", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cross", [False, True], ids=["plain", "cross"])
def test_interleaved_equals_oracle(family, cross, keys, content_entropy, trim):
    plan = ViewPlan.interleaved(tuple(WIDTHS))
    ids = torch.stack([torch.arange(8), torch.tensor([0, 1, 5, 3, 4, 2, 6, 7])]) if cross else None
    z = embeddings(plan, 8, ids=ids)
    options = {"content_keys": keys, "content_entropy": content_entropy, "trim": trim}
    assert_equals_oracle(JointEntropyLoss(family, **options), z, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_interleaved_with_its_own_index_and_an_empty_space(family):
    plan = ViewPlan.interleaved(tuple(WIDTHS))
    z = embeddings(plan, 5, index=torch.tensor([2, 0, 0, 2, 2]))
    assert_equals_oracle(JointEntropyLoss(family), z)
    assert_equals_oracle(JointEntropyLoss(family, trim=0.5), z, trim=0.5)


@pytest.mark.parametrize(
    "weights", [3.0, {"spatial": 0.5, "content": 2.0, "color": 1.0}, (2.0, 0.0, 1.5)], ids=["number", "names", "order"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_equal_oracle(family, weights):
    z = embeddings(ViewPlan.shared_query(tuple(WIDTHS)))
    assert_equals_oracle(JointEntropyLoss(family, weights=weights), z, weights=weights)


@pytest.mark.parametrize(
    "family,option",
    [
        ("simclr", {"temperature": 0.02}),
        ("simclr", {"temperature": 1.0}),
        ("vicreg", {"variance": 3.0}),
        ("vicreg", {"covariance": 7.0}),
        ("barlow", {"redundancy": 0.2}),
    ],
)
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_coefficients_equal_oracle(family, option, scale):
    z = embeddings(ViewPlan.shared_query(tuple(WIDTHS)), scale=scale)
    assert_equals_oracle(JointEntropyLoss(family, **option), z, **option)


def test_spaces_match_by_name_never_by_position():
    plan = ViewPlan.shared_query(("content", "color", "spatial"))
    z = embeddings(plan)
    other = Embeddings({n: z[n] for n in ("content", "spatial", "color")}, plan)
    for family in FAMILIES:
        assert JointEntropyLoss(family)(other).item() == pytest.approx(JointEntropyLoss(family)(z).item(), rel=1e-12)
    with pytest.raises(ValueError, match="weights: expected a mapping by name"):
        JointEntropyLoss(weights=(1, 2, 3))(other)


def test_plain_dict_is_a_shared_query_in_its_own_order():
    z = embeddings(ViewPlan.shared_query(tuple(WIDTHS)))
    assert JointEntropyLoss()(dict(z)).item() == JointEntropyLoss()(z).item()


# -------------------------------------------------------------------------------------------- lightly


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "ours,theirs",
    [
        (JointEntropyLoss("simclr", temperature=0.1), DCLLoss(temperature=0.1)),
        (
            JointEntropyLoss("vicreg", weights=25, variance=25, covariance=1),
            VICRegLoss(lambda_param=25, mu_param=25, nu_param=0.5),
        ),
        (JointEntropyLoss("barlow"), BarlowTwinsLoss(lambda_param=0.0051)),
    ],
    ids=FAMILIES,
)
def test_one_space_equals_lightly(ours, theirs, seed, backend):
    ours = copy.deepcopy(ours)
    ours.backend = backend
    z = embeddings(ViewPlan.shared_query(("content",)), 7, widths={"content": 5}, seed=seed)
    a, b = ours(z), theirs(z["content"][0], z["content"][1])
    assert a.item() == pytest.approx(b.item(), rel=1e-9)
    torch.testing.assert_close(grads(a, z), grads(b, z), rtol=1e-8, atol=1e-10)


# -------------------------------------------------------------------------------------------- options


def test_trim_drops_whole_rows_and_nothing_when_the_fraction_is_too_small():
    plan = ViewPlan.shared_query(("content",))
    z = embeddings(plan, 5, widths={"content": 3})
    assert JointEntropyLoss(trim=0.19)(z).item() == JointEntropyLoss()(z).item()
    assert JointEntropyLoss(trim=0.2).terms(z).rows["content"] == 4
    # 3/10 of 10 rows is 3 although 0.3 * 10 is 2.9999999999999996 or so in floating point elsewhere
    z = embeddings(plan, 10, widths={"content": 3})
    assert JointEntropyLoss(trim=0.3).terms(z).rows["content"] == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_learnable_temperature_and_its_gradient(family):
    if family != "simclr":
        with pytest.raises(ValueError, match="family has"):
            JointEntropyLoss(family, temperature=0.1)
        return
    for backend in BACKENDS:
        z = embeddings(ViewPlan.shared_query(tuple(WIDTHS)))
        tau = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        criterion = JointEntropyLoss("simclr", temperature=tau, backend=backend)
        assert list(criterion.parameters()) == [tau]
        (got,) = torch.autograd.grad(criterion(z), tau)
        t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        (want,) = torch.autograd.grad(reference.joint_entropy_loss(z, family="simclr", temperature=t).loss, t)
        assert got.item() == pytest.approx(want.item(), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_types(family, backend, dtype):
    """The loss is float32, the gradient has the input's type, and the value is that of the rounded input."""
    z = embeddings(ViewPlan.shared_query(tuple(WIDTHS)), 16, dtype=dtype)
    criterion = JointEntropyLoss(family, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(z)
    assert loss.dtype == torch.float32
    exact = JointEntropyLoss(family)(Embeddings({n: t.detach().double() for n, t in z.items()}, z.plan))
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6)
    for g in grads(loss, z):
        assert g.dtype == dtype and torch.isfinite(g).all()


def test_strided_and_no_grad_input():
    plan = ViewPlan.shared_query(("content", "color"))
    base = torch.randn(10, 3, 6, dtype=torch.float64)
    strided = {"content": base.transpose(0, 1)[..., ::2], "color": base.transpose(0, 1)[..., 1::2]}
    dense = {n: t.contiguous() for n, t in strided.items()}
    for family, backend in itertools.product(FAMILIES, BACKENDS):
        criterion = JointEntropyLoss(family, backend=backend)
        assert criterion(Embeddings(strided, plan)).item() == pytest.approx(criterion(Embeddings(dense, plan)).item())
        assert not criterion(strided).requires_grad


def test_terms_are_detached_clones_and_scalars_are_numbers():
    z = embeddings(ViewPlan.shared_query(tuple(WIDTHS)), 12)
    terms = JointEntropyLoss(content_entropy=True).terms(z)
    before = terms.loss.item()
    assert terms.loss.requires_grad and not terms.entropy.requires_grad
    terms.entropy.mul_(0)
    terms.invariance["content"].mul_(0)
    assert terms.loss.item() == before
    flat = terms.scalars()
    assert flat["loss"] == before and "invariance/color" in flat and "effective_rank/spatial" in flat
    assert terms.backend == "eager"
    assert JointEntropyLoss(backend="streaming").terms(z).backend == "streaming"


def test_effective_rank_tells_a_collapsed_space():
    b = 400
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(3, b, 4, generator=g)
    flat = torch.randn(3, b, 1, generator=g) * torch.tensor([1.0, 2.0, -1.0])
    ranks = JointEntropyLoss("vicreg").terms({"content": wide, "color": flat}).effective_rank
    assert ranks["content"].item() == pytest.approx(4, abs=0.1)
    assert ranks["color"].item() == pytest.approx(1, abs=1e-3)


# -------------------------------------------------------------------------------------------- bad input


def t(v, b, d, **kw):
    return torch.randn(v, b, d, **kw)


@pytest.mark.parametrize(
    "z,error,message",
    [
        ({"content": t(4, 5, 3), "color": t(4, 5, 3), "spatial": t(3, 5, 3)}, ValueError, "need 4 views: got 3 in spa"),
        ({"content": t(2, 5, 3), "color": t(2, 5, 3)}, ValueError, r"need 3 views: got 2; .*ViewPlan.interleaved"),
        ({"color": t(2, 5, 3)}, ValueError, "expected the space 'content'.*got color"),
        (
            {"color": t(3, 5, 3), "content": t(3, 5, 3)},
            ValueError,
            "expected 'content' as the first space.*got color, content",
        ),
        ({"content": t(2, 1, 3)}, ValueError, "at least 2 images in the batch.*got 1"),
        ({"content": t(2, 0, 3)}, ValueError, "at least 2 images in the batch.*got 0"),
        ({"content": t(2, 5, 0)}, ValueError, "width of at least 1"),
        ({"content": torch.zeros(2, 5, 3, dtype=torch.long)}, TypeError, "got torch.int64"),
        ({"content": torch.zeros(2, 5, 3, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
        ({"content": torch.zeros(5, 3)}, ValueError, r"expected views \[V, B, d\]: got \[5, 3\], a plain batch"),
        ({"content": t(3, 5, 3), "color": t(3, 4, 3)}, ValueError, "the 5 images of space 'content': got 4"),
        ({}, ValueError, "at least the space 'content'"),
        ([t(2, 5, 3)], TypeError, "a mapping space"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_bad_embeddings(family, z, error, message):
    with pytest.raises(error, match=message):
        JointEntropyLoss(family)(z)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_names_the_space_or_comes_out_as_nan(family, value, backend):
    z = {"content": t(3, 5, 3), "color": t(3, 5, 3)}
    z["color"][1, 2, 0] = value
    with pytest.raises(ValueError, match="got NaN or infinity in the space color;"):
        JointEntropyLoss(family, backend=backend)(z)
    assert JointEntropyLoss(family, backend=backend, validate=False)(z).isnan()


@pytest.mark.parametrize("temperature", [1e39, 1e300, torch.tensor(1e300, dtype=torch.float64)])
def test_a_temperature_that_the_type_cannot_hold(temperature):
    criterion = JointEntropyLoss("simclr", temperature=temperature)
    with pytest.raises(ValueError, match=r"expected at most 3.4e\+38, the largest number of torch"):
        criterion({"content": t(2, 5, 3).float()})


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half()])
@pytest.mark.parametrize("kind", [torch.tensor, lambda v: nn.Parameter(torch.tensor(v))])
def test_a_temperature_keeps_its_digits_in_a_module_that_is_cast(cast, kind):
    criterion = JointEntropyLoss("simclr", temperature=kind(0.07))
    cast(nn.ModuleDict({"criterion": criterion}))
    assert criterion.objective.temperature.item() == torch.tensor(0.07).item()


def test_plan_and_spaces_must_agree():
    plan = ViewPlan.shared_query(("content", "color"))
    with pytest.raises(ValueError, match="missing: color; not named by the plan: colour"):
        JointEntropyLoss()(Embeddings({"content": t(3, 5, 3), "colour": t(3, 5, 3)}, plan))
    with pytest.raises(ValueError, match="missing: color"):
        JointEntropyLoss()(Embeddings({"content": t(3, 5, 3)}, plan))
    with pytest.raises(ValueError, match="expected 'content' as the first space"):
        JointEntropyLoss()(Embeddings({"color": t(3, 5, 3), "content": t(3, 5, 3)}, plan))


def test_ids_and_index_are_checked():
    plan = ViewPlan.interleaved(("content", "color"))
    z = {"content": t(2, 5, 3), "color": t(2, 5, 3)}
    loss = JointEntropyLoss()
    with pytest.raises(ValueError, match=r"image_ids: expected \[V, B\] = \[2, 5\]: got \[5\]"):
        loss(Embeddings(z, plan, image_ids=torch.arange(5)))
    with pytest.raises(TypeError, match="image_ids: expected integers"):
        loss(Embeddings(z, plan, image_ids=torch.zeros(2, 5)))
    with pytest.raises(ValueError, match=r"space_index: expected \[B\]"):
        loss(Embeddings(z, plan, space_index=torch.zeros(4, dtype=torch.long)))
    with pytest.raises(ValueError, match="space_index: expected 0 to 1"):
        loss(Embeddings(z, plan, space_index=torch.tensor([0, 1, 2, 0, 1])))
    with pytest.raises(ValueError, match="all 10 rows carry the image id 3"):
        loss(Embeddings(z, plan, image_ids=torch.full((2, 5), 3)))


@pytest.mark.parametrize(
    "args,kwargs,message",
    [
        (("simclr",), {"temperature": 0}, "temperature: expected a finite number above 0.*got 0"),
        (("simclr",), {"temperature": -0.1}, "got -0.1"),
        (("simclr",), {"temperature": torch.ones(2)}, "of one element"),
        (("simclr",), {"covariance": 1.0}, "'simclr' family has temperature, temperature_floor, not covariance"),
        (("vicreg",), {"temperature": 0.1}, "not temperature"),
        (("barlow",), {"variance": 1.0}, "not variance"),
        (("byol",), {}, "family: expected one of 'simclr', 'vicreg', 'barlow', .*: got 'byol'"),
        ((), {"trim": 1.0}, "trim: expected a fraction below 1"),
        ((), {"trim": -0.1}, "trim"),
        ((), {"weights": -1}, "weights"),
        ((), {"weights": {"content": math.nan}}, r"weights\['content'\]"),
        ((), {"content_keys": "some"}, "content_keys"),
        ((), {"backend": "cuda"}, "backend: expected one of"),
        ((), {"validate": "yes"}, "validate"),
    ],
)
def test_bad_arguments(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        JointEntropyLoss(*args, **kwargs)


def test_weights_must_name_the_spaces():
    z = {"content": t(3, 5, 3), "color": t(3, 5, 3)}
    with pytest.raises(ValueError, match="weights: expected the spaces content, color.*missing: color"):
        JointEntropyLoss(weights={"content": 1})(z)
    with pytest.raises(ValueError, match="not named by the plan: shape"):
        JointEntropyLoss(weights={"content": 1, "color": 1, "shape": 1})(z)
    with pytest.raises(ValueError, match="expected one per space"):
        JointEntropyLoss(weights=[1, 2, 3])(z)


def test_content_entropy_needs_a_second_space():
    with pytest.raises(ValueError, match="content_entropy"):
        JointEntropyLoss(content_entropy=True)({"content": t(2, 5, 3)})


def test_embeddings_pickle_whole():
    plan = ViewPlan.interleaved(("content", "color"))
    ids, index = torch.arange(10).view(2, 5), torch.tensor([0, 1, 1, 0, 1])
    z = Embeddings({"content": t(2, 5, 3), "color": t(2, 5, 3)}, plan, image_ids=ids, space_index=index)
    again = pickle.loads(pickle.dumps(z))
    assert again.plan == plan and torch.equal(again.image_ids, ids) and torch.equal(again.space_index, index)
    assert torch.equal(again["color"], z["color"])


def test_a_tensor_that_is_learned_stays_the_callers():
    """A copy in the criterion would no longer follow the optimizer's steps."""
    tau = torch.tensor(0.5, requires_grad=True)
    criterion = JointEntropyLoss(temperature=tau).double()
    z = {n: torch.randn(3, 8, 4, dtype=torch.float64) for n in ("content", "color")}
    optimizer = torch.optim.SGD([tau], lr=0.01)
    before = criterion(z)
    before.backward()
    optimizer.step()
    assert criterion.objective.temperature is tau and tau.item() != 0.5
    assert criterion(z).item() != before.item()
    assert "objective.temperature" in JointEntropyLoss(temperature=nn.Parameter(torch.tensor(0.5))).state_dict()
