"""Families: one of a user's own, and SIGReg, FroSSL and MMCR beside lightly's."""

import itertools
import math

import pytest
import torch
from lightly.loss import MMCRLoss
from lightly.loss.frossl_loss import FroSSLLoss
from lightly.loss.lejepa_loss import SIGReg as LightlySIGReg
from lightly.loss.lejepa_loss import lejepa_invariance_loss
from torch import nn

from ssd_addon import DualAscent, Embeddings, JointEntropyLoss, ViewPlan
from ssd_addon.kernels import negative_lse
from ssd_addon.losses import FAMILIES, Family, resolve_family

WIDTHS = {"content": 4, "color": 3, "spatial": 2}
SPACES = tuple(WIDTHS)


def embeddings(plan="shared_query", b=8, widths=WIDTHS, seed=0, dtype=torch.float64, **more):
    plan = getattr(ViewPlan, plan)(tuple(widths))
    g = torch.Generator().manual_seed(seed)
    z = {n: torch.randn(plan.num_views, b, d, generator=g, dtype=torch.float64).to(dtype) for n, d in widths.items()}
    return Embeddings({n: t.requires_grad_() for n, t in z.items()}, plan, **more)


def grads(loss, z):
    return torch.autograd.grad(loss, list(z.values()), allow_unused=True, materialize_grads=True)


# ---- the three families again, as two plain functions each


def mean_square(a, b):
    return (a - b).square().mean(1)


def misaligned(a, b):
    return 1 - (a * b).sum(1)


def variance_and_covariance(joint, ids):
    terms = []
    for view in joint:
        c = torch.cov(view.T).reshape(view.shape[1], view.shape[1])
        hinge = torch.relu(1 - (c.diagonal() + 1e-4).sqrt()).mean()
        terms.append(25 * hinge + (c - torch.diag(c.diagonal())).square().sum() / view.shape[1])
    return torch.stack(terms).mean()


def log_sums(joint, ids):
    return negative_lse(joint.flatten(0, 1), ids.flatten(), 0.15, backend="eager").mean()


TWINS = {
    "vicreg": Family("my vicreg", alignment=mean_square, entropy=variance_and_covariance, weight=25.0),
    "simclr": Family("my simclr", alignment=misaligned, entropy=log_sums, weight=1 / 0.15, on_sphere=True),
}
OPTIONS = [
    {},
    {"trim": 0.4},
    {"content_keys": "all", "trim": 0.3},
    {"content_entropy": True},
    {"trim": 0.4, "content_keys": "all", "content_entropy": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("plan", ["shared_query", "interleaved"])
@pytest.mark.parametrize("family", TWINS)
@pytest.mark.parametrize("cross", [False, True])
def test_two_functions_make_the_same_loss_as_the_family_inside(family, plan, cross, options):
    ids = None
    if cross:
        ids = torch.arange(8).repeat(2 if plan == "interleaved" else 4, 1)
        ids[-1] = ids[-1].roll(1)
    z = embeddings(plan, image_ids=ids)
    mine, theirs = (JointEntropyLoss(f, **options).terms(z) for f in (TWINS[family], family))
    for n in SPACES:
        assert mine.rows[n] == theirs.rows[n]
        if mine.rows[n]:
            torch.testing.assert_close(mine.constraint[n], theirs.constraint[n], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mine.effective_rank[n], theirs.effective_rank[n], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mine.entropy, theirs.entropy, rtol=1e-9, atol=1e-12)
    if options.get("content_entropy"):
        torch.testing.assert_close(mine.content_entropy, theirs.content_entropy, rtol=1e-9, atol=1e-12)
    served = sum(bool(mine.rows[n]) for n in SPACES) / len(SPACES)
    apart = 0.0 if family == "vicreg" else served / 0.15  # SimCLR's invariance is -cosine / tau
    torch.testing.assert_close(mine.loss - apart, theirs.loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grads(mine.loss, z), grads(theirs.loss, z), rtol=1e-8, atol=1e-10)


def test_weights_and_dual_ascent_follow():
    z = embeddings()
    lam = {"content": 2.0, "color": 1.0, "spatial": 0.5}
    mine, theirs = (JointEntropyLoss(f, weights=lam)(z) for f in (TWINS["vicreg"], "vicreg"))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=0)
    criteria = [
        JointEntropyLoss(f, weights=DualAscent(SPACES, tolerance=0.1, step_size=0.5))
        for f in (TWINS["vicreg"], "vicreg")
    ]
    for _ in range(2):
        mine, theirs = ([*c.weights.step(c.terms(z)).values()] for c in criteria)
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), rtol=1e-9, atol=0)
    assert mine[0] > 25


def test_ids_reach_the_entropy_and_parts_with_parameters_are_trained():
    seen = {}

    class Whitened(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, joint, ids):
            seen["ids"], seen["joint"] = ids, joint.shape
            return (self.scale * joint).square().mean().log().neg()

    family = Family("learned", alignment=mean_square, entropy=Whitened())
    criterion = JointEntropyLoss(family)
    z = embeddings(image_ids=torch.arange(8).repeat(4, 1))
    criterion(z).backward()
    assert torch.equal(seen["ids"], z.image_ids) and seen["joint"] == (4, 8, 9)
    (scale,) = criterion.parameters()
    assert scale.grad.item() == pytest.approx(-2.0) and z["color"].grad.any()


@pytest.mark.parametrize("family", [*FAMILIES, "mine"])
def test_a_space_that_no_row_serves_and_a_few_steps_of_descent(family):
    made = TWINS["vicreg"] if family == "mine" else family
    z = embeddings("interleaved", 5, space_index=torch.tensor([0, 0, 1, 1, 1]))
    terms = JointEntropyLoss(made).terms(z)
    assert terms.rows["spatial"] == 0 and terms.constraint["spatial"] in (0, 1) and terms.loss.isfinite()
    leaves = embeddings(b=32)
    optimizer, criterion = torch.optim.SGD(leaves.values(), lr=0.05), JointEntropyLoss(made)
    values = []
    for _ in range(15):
        torch.manual_seed(0)
        loss = criterion(leaves)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0]


# ---- beside lightly's


def one_space(b=16, d=5, seed=0):
    return embeddings(widths={"content": d}, b=b, seed=seed)


def test_sigreg_equals_lightlys():
    z = one_space()
    torch.manual_seed(3)
    ours = JointEntropyLoss("sigreg").terms(z)
    torch.manual_seed(3)
    both = torch.stack([z["content"][0], z["content"][1]])
    theirs = LightlySIGReg().double()(both)
    torch.testing.assert_close(ours.entropy, theirs.detach(), rtol=1e-6, atol=0)  # lightly's knots are float32
    whole = theirs + 0.95 / 0.05 * lejepa_invariance_loss(all_proj=both, global_proj=both)
    torch.testing.assert_close(ours.loss, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(grads(ours.loss, z), grads(whole, z), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("b,d", [(16, 5), (6, 11)])
def test_frossl_equals_lightlys(b, d):
    z = one_space(b, d)
    ours, theirs = JointEntropyLoss("frossl")(z), FroSSLLoss()([z["content"][0], z["content"][1]])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(grads(ours, z), grads(theirs, z), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("b,d", [(16, 5), (6, 11)])
def test_mmcrs_entropy_equals_lightlys_for_a_view_that_is_its_own_centroid(b, d):
    z = one_space(b, d)
    ours = JointEntropyLoss("mmcr", weights=0.0)(z)
    unit = nn.functional.normalize(z["content"], dim=-1)
    theirs = torch.stack([MMCRLoss(lmda=0.0)(view[:, None], view[:, None]) for view in unit]).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(grads(ours, z), grads(theirs, z), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", ["sigreg", "frossl", "mmcr"])
def test_their_entropies_look_at_one_view_at_a_time(family):
    """Views that are permuted among images, each on its own, are spread out as before: nothing pulls views together."""
    z = embeddings(b=32)
    moved = Embeddings({n: t.detach().clone() for n, t in z.items()}, z.plan)
    for v in range(4):
        order = torch.randperm(32, generator=torch.Generator().manual_seed(v))
        for t in moved.values():
            t[v] = t[v][order]
    values = []
    for x in (z, moved):
        torch.manual_seed(0)
        values.append(JointEntropyLoss(family).terms(x).entropy)
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)


def test_their_entropies_by_loops():
    """The definitions, a row, a coordinate and a knot at a time, on the joint embedding of three spaces."""
    z = embeddings(b=5)
    joint = torch.cat(list(z.values()), -1).detach()

    torch.manual_seed(1)
    got = JointEntropyLoss("sigreg").terms(z).entropy.item()
    torch.manual_seed(1)
    a = torch.randn(9, 1024, dtype=torch.float64)
    a = a / a.norm(dim=0)
    total = 0.0
    for view in joint:
        x = view @ a
        for knot in range(17):
            t = 3.0 * knot / 16
            weight = 3.0 / 16 * (1 if knot in (0, 16) else 2)
            real, imaginary = (t * x).cos().mean(0), (t * x).sin().mean(0)
            error = (real - math.exp(-t * t / 2)).square() + imaginary.square()
            total += 5 * weight * math.exp(-t * t / 2) * float(error.mean()) / 4
    assert got == pytest.approx(total, rel=1e-9)

    total = 0.0
    for view in joint:
        unit = torch.stack([column / math.sqrt(sum(float(v) ** 2 for v in column)) for column in view.T], 1)
        c = sum(torch.outer(row, row) for row in unit) / 9
        total += 2 * math.log(sum(float(v) ** 2 for v in c.flatten())) / 4
    assert JointEntropyLoss("frossl").terms(z).entropy.item() == pytest.approx(total, rel=1e-9)

    rows = [
        torch.cat([t[v, i] / t[v, i].norm() for t in z.values()]).detach() / math.sqrt(3)
        for v in range(4)
        for i in range(5)
    ]
    views = torch.stack(rows).view(4, 5, 9)
    total = -sum(float(torch.linalg.eigvalsh(m @ m.T).clamp(min=0).sqrt().sum()) for m in views) / 4
    assert JointEntropyLoss("mmcr").terms(z).entropy.item() == pytest.approx(total, rel=1e-9)


# ---- what does not fit


def test_names_and_coefficients_are_checked():
    with pytest.raises(ValueError, match="variance: .* as a family object has its own coefficients.*.my vicreg."):
        JointEntropyLoss(TWINS["vicreg"], variance=1.0)
    with pytest.raises(ValueError, match="temperature: the .mmcr. family has no coefficients"):
        JointEntropyLoss("mmcr", temperature=0.1)
    with pytest.raises(TypeError, match=r"family: expected a name \('simclr', .* or a losses.Family: got function"):
        JointEntropyLoss(mean_square)
    assert resolve_family("simclr", temperature=0.2).temperature == 0.2


@pytest.mark.parametrize("backend", ["streaming", "triton"])
def test_a_backend_that_a_family_does_not_have_is_refused(backend):
    for family in (TWINS["vicreg"], "sigreg"):
        with pytest.raises(ValueError, match=f"computes its entropy itself: got '{backend}'"):
            JointEntropyLoss(family, backend=backend)
    assert JointEntropyLoss(TWINS["vicreg"], backend="eager").terms(embeddings()).backend == "eager"


def test_an_alignment_or_entropy_of_another_shape_is_refused():
    for alignment, got in ((lambda a, b: (a - b).square(), r"\[8, 4\]"), (lambda a, b: 1.0, "float")):
        family = Family("odd", alignment=alignment, entropy=variance_and_covariance)
        with pytest.raises(ValueError, match=rf"family 'odd', alignment: expected .* \[8\]: got {got}"):
            JointEntropyLoss(family)(embeddings())
    for entropy, got in ((lambda joint, ids: joint.mean(0), r"\[8, 9\]"), (lambda joint, ids: 0.5, "float")):
        with pytest.raises(ValueError, match=f"family 'odd', entropy: expected a scalar: got {got}"):
            JointEntropyLoss(Family("odd", alignment=mean_square, entropy=entropy))(embeddings())
    with pytest.raises(TypeError, match="Family 'odd', entropy: expected a function of two tensors: got NoneType"):
        Family("odd", alignment=mean_square, entropy=None)
    with pytest.raises(TypeError, match="Family: expected a name"):
        Family("", alignment=mean_square, entropy=log_sums)


@pytest.mark.parametrize("family", [*FAMILIES, "mine"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_values_that_no_family_can_work_with_name_their_space(family, value):
    made = TWINS["vicreg"] if family == "mine" else family
    z = embeddings(dtype=torch.float32)
    with torch.no_grad():
        z["color"][1, 2, 0] = value
    message = "got larger ones in the space color; the run has diverged" if value == 1e30 else "in the space color;"
    with pytest.raises(ValueError, match=message):
        JointEntropyLoss(made)(z)


@pytest.mark.parametrize("family,scale", list(itertools.product(FAMILIES, (1e3, 1e6, 1e9, 1e12, 1e15, 1e18, 1e20))))
def test_embeddings_that_diverge_are_refused_before_the_loss_is_wrong(family, scale):
    """Either refused, or what float64 gives."""
    z = embeddings(dtype=torch.float32, b=16)
    z = Embeddings({n: (t.detach() * scale).requires_grad_() for n, t in z.items()}, z.plan)
    wide = Embeddings({n: t.detach().double().requires_grad_() for n, t in z.items()}, z.plan)
    torch.manual_seed(0)
    try:
        loss = JointEntropyLoss(family)(z)
    except ValueError as error:
        assert "the run has diverged" in str(error)
        assert scale >= 1e6
        return
    torch.manual_seed(0)
    want = JointEntropyLoss(family)(wide)
    if family != "sigreg":  # the cosine of 1e9 has no digits in float32
        torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=0)
        for got, exact in zip(grads(loss, z), grads(want, wide), strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())


@pytest.mark.parametrize("family,scale", list(itertools.product(FAMILIES, (1e20, 1e30, 3e38))))
@pytest.mark.parametrize("compiled", [False, True])
def test_what_overflows_unchecked_is_no_finite_number(family, scale, compiled):
    z = embeddings(dtype=torch.float32)
    z = Embeddings({n: t.detach() * scale for n, t in z.items()}, z.plan)
    criterion = JointEntropyLoss(family, validate=False)
    assert not (torch.compile(criterion, backend="eager") if compiled else criterion)(z).isfinite()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrong", [-1, 3, 7])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_index_outside_the_spaces_unchecked_is_nan(family, wrong, compiled):
    z = embeddings("interleaved", dtype=torch.float32)
    z.space_index = ViewPlan.interleaved(tuple(z)).default_space_index(8)
    criterion = JointEntropyLoss(family, validate=False)
    criterion = torch.compile(criterion, backend="eager") if compiled else criterion
    assert criterion(z).isfinite()
    z.space_index[2] = wrong
    assert criterion(z).isnan()
    with pytest.raises(ValueError, match="space_index: expected 0 to 2"):
        JointEntropyLoss(family)(z)


@pytest.mark.parametrize("family", ["vicreg", "sigreg"])  # the others scale rows or columns themselves
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_effective_rank_does_not_depend_on_the_scale(family, scale):
    z = embeddings(dtype=torch.float32)
    torch.manual_seed(0)
    want = JointEntropyLoss(family).terms(z).effective_rank
    torch.manual_seed(0)
    got = JointEntropyLoss(family, validate=False).terms({n: t * scale for n, t in z.items()}).effective_rank
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def test_a_view_of_zeros_has_a_finite_frossl_loss_and_gradient():
    z = {n: torch.zeros(4, 8, d, requires_grad=True) for n, d in WIDTHS.items()}
    loss = JointEntropyLoss("frossl")(z)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads(loss, z))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_columns_without_a_direction_have_no_gradient_in_16_bits(dtype):
    z = {n: torch.randn(4, 8, d).to(dtype) for n, d in WIDTHS.items()}
    z["color"][:, :, 0] = 0
    z = {n: t.requires_grad_() for n, t in z.items()}
    z_grad = torch.autograd.grad(JointEntropyLoss("frossl")(z), z["color"])[0]
    assert z_grad.isfinite().all() and not z_grad[:, :, 0].any() and z_grad[:, :, 1].any()
