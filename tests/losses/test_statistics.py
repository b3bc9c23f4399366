"""What the terms say of collapse, by loops over images: spread, agreement and overlap."""

import itertools
import math

import pytest
import torch

from ssd_addon import Embeddings, JointEntropyLoss, ViewPlan
from ssd_addon.losses import FAMILIES, Terms

WIDTHS = {"content": 3, "color": 5, "spatial": 2}
PLAN = ViewPlan.shared_query(tuple(WIDTHS))
ON_SPHERE = ("simclr", "mmcr")


def embeddings(b=9, seed=0, offset=0.0, scale=1.0):
    """Pairs that agree somewhat: a part of each image's own, and noise of each view."""
    g = torch.Generator().manual_seed(seed)
    own = {n: torch.randn(1, b, d, generator=g, dtype=torch.float64) for n, d in WIDTHS.items()}
    z = {n: t + 0.4 * torch.randn(4, b, WIDTHS[n], generator=g, dtype=torch.float64) for n, t in own.items()}
    return {n: scale * (t + offset) for n, t in z.items()}


def compared(z, family):
    """The embeddings as a family compares them."""
    if family in ON_SPHERE:
        return {n: t / t.norm(dim=-1, keepdim=True) for n, t in z.items()}
    if family == "barlow":
        return {n: (t - t.mean(1, True)) / (t.var(1, correction=0, keepdim=True) + 1e-5).sqrt() for n, t in z.items()}
    if family == "frossl":
        return {n: t / t.norm(dim=1, keepdim=True) for n, t in z.items()}
    return z


@pytest.mark.parametrize("family", FAMILIES)
def test_agreement_compares_a_pair_with_different_images(family):
    z = embeddings(offset=0.3)
    got = JointEntropyLoss(family).terms(z).agreement
    for m, (n, t) in enumerate(compared(z, family).items()):
        a, b = t[0], t[m + 1]
        pairs = [(a[i] - b[i]).square().sum() for i in range(9)]
        others = [(a[i] - b[j]).square().sum() for i, j in itertools.permutations(range(9), 2)]
        want = 1 - torch.stack(pairs).mean() / torch.stack(others).mean()
        assert got[n].item() == pytest.approx(want.item(), abs=1e-9)
        assert 0.3 < got[n] < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_spread_is_the_variance_between_images_beside_the_square(family):
    z = embeddings(offset=0.3)
    z["color"] = z["color"] / 20
    got = JointEntropyLoss(family).terms(z).spread
    seen = {n: t[0] for n, t in compared(z, family).items()}
    square = {n: x.square().mean().item() for n, x in seen.items()}
    for n, x in seen.items():
        base = square[n] if family in ON_SPHERE else max(square[n], sum(square.values()) / 3)
        assert got[n].item() == pytest.approx(x.var(0, correction=0).mean().item() / base, rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_spaces_in_which_nothing_differs_have_no_spread_and_no_agreement(family):
    z = {n: t.float() for n, t in embeddings(64).items()}
    z["content"] = torch.full((4, 64, 3), 0.7) + 1e-7 * torch.randn(4, 64, 3)
    terms = JointEntropyLoss(family).terms(z)
    assert terms.spread["content"] < 1e-6
    assert family == "barlow" or terms.agreement["content"] == 0  # which standardizes what is left
    assert terms.spread["color"] > 0.6 and terms.agreement["color"] > 0.4
    z["content"] = torch.zeros(4, 64, 3)
    terms = JointEntropyLoss(family).terms(z)
    assert terms.spread["content"] == 0 and terms.agreement["content"] == 0


def test_a_space_that_is_small_beside_the_others_has_little_spread():
    z = embeddings(64)
    z["content"] = z["content"] / 100
    assert JointEntropyLoss("vicreg").terms(z).spread["content"] < 1e-3
    assert JointEntropyLoss("simclr").terms(z).spread["content"] > 0.9


@pytest.mark.parametrize("scale", [1e-6, 1e12])
@pytest.mark.parametrize("family", ["simclr", "vicreg", "frossl"])
def test_the_statistics_do_not_depend_on_the_scale(family, scale):
    want, got = (
        JointEntropyLoss(family, validate=False).terms({n: t.float() for n, t in embeddings(32, scale=s).items()})
        for s in (1.0, scale)
    )
    for key in ("spread", "agreement", "overlap"):
        for n, value in getattr(want, key).items():
            torch.testing.assert_close(getattr(got, key)[n], value, rtol=1e-4, atol=1e-4)


def test_pairs_that_share_nothing_do_not_agree():
    z = {n: torch.randn(4, 200, d, generator=torch.Generator().manual_seed(d)) for n, d in WIDTHS.items()}
    for family in FAMILIES:
        for value in JointEntropyLoss(family).terms(z).agreement.values():
            assert abs(value) < 0.1


def test_agreement_is_of_the_rows_that_serve_a_space():
    plan = ViewPlan.interleaved(("content", "color"))
    index = torch.tensor([0, 1] * 20)
    z = {n: torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(k)) for k, n in enumerate(plan.spaces)}
    z["color"][1, index == 1] = z["color"][0, index == 1]
    agreement = JointEntropyLoss("vicreg").terms(Embeddings(z, plan, space_index=index)).agreement
    assert agreement["color"] == 1 and agreement["content"] < 0.3
    one = torch.tensor([1] + [0] * 39)  # a single row has no other image to be compared with
    assert JointEntropyLoss("vicreg").terms(Embeddings(z, plan, space_index=one)).agreement["color"] == 0


def unbiased(k, g):
    """HSIC by Song et al., equation 5, over n (n - 3): sums over different i, j, q, r."""
    n, total = len(k), 0.0
    for i, j in itertools.permutations(range(n), 2):
        total += k[i][j] * g[i][j] / (n * (n - 1))
    for i, j, q in itertools.permutations(range(n), 3):
        total -= 2 * k[i][j] * g[i][q] / (n * (n - 1) * (n - 2))
    for i, j, q, r in itertools.permutations(range(n), 4):
        total += k[i][j] * g[q][r] / (n * (n - 1) * (n - 2) * (n - 3))
    return total


def test_overlap_is_the_unbiased_estimate_of_linear_cka():
    z = embeddings(6, seed=3)
    z["color"] = torch.cat([z["content"], z["color"][..., :2]], dim=-1)
    got = JointEntropyLoss("vicreg").terms(z).overlap
    assert list(got) == ["content/color", "content/spatial", "color/spatial"]
    gram = {n: [[(t[0, i] @ t[0, j]).item() for j in range(6)] for i in range(6)] for n, t in z.items()}
    for name, value in got.items():
        s, t = (gram[n] for n in name.split("/"))
        want = unbiased(s, t) / math.sqrt(max(unbiased(s, s) * unbiased(t, t), 0) or 1)
        assert value.item() == pytest.approx(min(max(want, 0), 1), abs=1e-9), name


def test_overlap_of_a_repeated_space_is_1_and_of_independent_ones_0():
    z = {n: torch.randn(4, 300, 6, generator=torch.Generator().manual_seed(k)) for k, n in enumerate(WIDTHS)}
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(9)))[0]
    z["spatial"] = 3 * z["content"] @ turn + 1
    overlap = JointEntropyLoss("vicreg").terms(z).overlap
    assert overlap["content/spatial"] == pytest.approx(1, abs=1e-4)
    assert overlap["content/color"] < 0.05 and overlap["color/spatial"] < 0.05
    assert JointEntropyLoss().terms({"content": z["content"][:2]}).overlap == {}
    few = JointEntropyLoss().terms({n: t[:, :3] for n, t in z.items()}).overlap
    assert all(value.isnan() for value in few.values())


def test_the_statistics_are_logged_and_averaged():
    parts = [JointEntropyLoss().terms(embeddings(8, seed)) for seed in range(2)]
    flat, mean = parts[0].scalars(), Terms.mean(parts)
    assert flat["spread/color"] == parts[0].spread["color"] and flat["overlap/content/color"] <= 1
    for key in ("spread", "agreement", "overlap"):
        for n, value in getattr(mean, key).items():
            assert value == pytest.approx((getattr(parts[0], key)[n] + getattr(parts[1], key)[n]).item() / 2)
