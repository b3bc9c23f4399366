"""Plans with explicit pairs: multi-crop, views of several sizes, and pairs that data collection gives."""

import copy
import pickle

import kornia.augmentation as K
import pytest
import torch
from torch import nn
from torch.utils import _pytree

from ssd_addon import Embeddings, JointEntropyLoss, StructuredViews, StyleHeads, ViewBatch, ViewPlan
from ssd_addon.losses import FAMILIES

PAIRS = {"content": [(0, 1), (0, 4)], "color": [(0, 2)], "scanner": [(2, 3), (1, 4)]}
SPACES = {"content": 5, "color": 3, "scanner": 2}


def net():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def model(spaces=SPACES, hidden=()):
    torch.manual_seed(0)
    return StyleHeads(net(), spaces, in_features=6, hidden=hidden)


def embeddings(plan, b=7, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    z = {n: torch.randn(plan.num_views, b, d, generator=g, dtype=torch.float64) for n, d in SPACES.items()}
    return Embeddings({n: t.to(dtype).requires_grad_() for n, t in z.items()}, plan)


# ---- the plan


def test_what_a_plan_says():
    plan = ViewPlan(pairs=PAIRS)
    assert plan.kind == "pairs" and plan.spaces == tuple(SPACES) and plan.num_views == 5
    assert plan.view_pairs == {n: tuple(each) for n, each in PAIRS.items()}
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), eval(repr(plan))):
        assert other == plan and hash(other) == hash(plan)
    assert plan != ViewPlan(pairs=PAIRS | {"color": [(0, 3)]}) and "in a plan of pairs" in str(plan)
    shared = ViewPlan(pairs={"content": [(0, 1)], "color": [(0, 2)]})
    assert shared.pairs(3)["color"][:2] == (0, 2) == ViewPlan.shared_query(("content", "color")).pairs(3)["color"][:2]
    assert ViewPlan.interleaved(("content", "color")).view_pairs == {"content": ((0, 1),), "color": ((0, 1),)}
    with pytest.raises(
        ValueError, match=r"pairs: expected one pair .* got several for content, scanner; use view_pairs"
    ):
        plan.pairs(3)


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        ({"pairs": {"color": [(0, 1)]}}, ValueError, "content"),
        ({"pairs": {"content": []}}, ValueError, "got none for 'content'"),
        ({"pairs": {"content": [(0, 0)]}}, ValueError, r"two views from 0 on: got \(0, 0\)"),
        ({"pairs": {"content": [(0, -1)]}}, ValueError, r"got \(0, -1\)"),
        ({"pairs": {"content": [(0, 1.0)]}}, ValueError, r"got \(0, 1.0\)"),
        ({"pairs": {"content": [(0, 1, 2)]}}, ValueError, r"got \(0, 1, 2\)"),
        ({"pairs": {"content": [0, 1]}}, ValueError, "got 0 for 'content'"),
        ({"pairs": {"content": [(0, 1), (1, 0)]}}, ValueError, r"distinct pairs: got \(1, 0\)"),
        ({"pairs": [("content", 0, 1)]}, TypeError, "expected pairs as a mapping"),
        ({"kind": "shared_query", "spaces": ("content",), "pairs": PAIRS}, ValueError, "got both"),
        ({}, ValueError, "ViewPlan"),
        ({"kind": "pairs", "spaces": ("content",)}, ValueError, "ViewPlan"),
    ],
)
def test_bad_plans(arguments, error, message):
    with pytest.raises(error, match=message):
        ViewPlan(**arguments)


# ---- the loss


def misaligned(family, a, b, joint):
    """Mean over rows, from the definition of each family, in loops over rows."""
    if family == "vicreg":
        return sum(((x - y) ** 2).mean() for x, y in zip(a, b, strict=True)) / len(a)
    if family == "sigreg":
        return None
    unit = [x / x.norm() for x in a], [y / y.norm() for y in b]
    cosine = sum((x * y).sum() for x, y in zip(*unit, strict=True)) / len(a)
    return -cosine / 0.15 if family == "simclr" else 1 - cosine


@pytest.mark.parametrize("family", ["simclr", "vicreg", "mmcr"])
def test_an_invariance_is_the_mean_over_its_pairs_by_a_loop(family):
    plan = ViewPlan(pairs=PAIRS)
    z = embeddings(plan)
    terms = JointEntropyLoss(family).terms(z)
    for name, pairs in PAIRS.items():
        want = sum(misaligned(family, z[name][a], z[name][b], z) for a, b in pairs) / len(pairs)
        torch.testing.assert_close(terms.invariance[name], want.detach(), rtol=1e-9, atol=1e-12)
        assert int(terms.rows[name]) == 7 * len(pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_of_the_usual_views_make_the_usual_loss(family):
    usual = ViewPlan.shared_query(tuple(SPACES))
    z = embeddings(usual)
    said = Embeddings(dict(z), ViewPlan(pairs={n: [(0, 1 + s)] for s, n in enumerate(SPACES)}))
    losses = []
    for each in (z, said):
        torch.manual_seed(0)
        loss = JointEntropyLoss(family, trim=0.2)(each)
        losses.append((loss, *torch.autograd.grad(loss, list(z.values()))))
    for a, b in zip(*losses, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_view_counts_for_the_entropy(family):
    plan = ViewPlan(pairs={"content": [(0, 1)], "color": [(0, 2)], "scanner": [(0, 4)]})  # view 3 is in no pair
    z = embeddings(plan)
    torch.manual_seed(0)
    grad = torch.autograd.grad(JointEntropyLoss(family)(z), list(z.values()))
    for t in grad:
        assert t[1].abs().sum() > 0
        assert (t[3].abs().sum() > 0) == (family != "barlow")  # whose entropy is of the pairs' cross-correlations


def test_content_keys_are_those_of_the_plan():
    with pytest.raises(ValueError, match="content_keys: .* defines the pairs of content"):
        JointEntropyLoss(content_keys="all")(embeddings(ViewPlan(pairs=PAIRS)))


# ---- views of several sizes


def crops(b=6):
    """Two whole views, a color key and two small crops of each image."""
    x = torch.rand(b, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    color = {"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1)]}
    big = StructuredViews({**color}, then=[K.RandomResizedCrop((16, 16))], seed=0)(x)
    small = StructuredViews({}, then=[K.RandomResizedCrop((8, 8), scale=(0.1, 0.4))], seed=1)(x)
    plan = ViewPlan(pairs={"content": [(0, 1), (0, 3), (0, 4)], "color": [(0, 2)]})
    return ViewBatch([*big, *small], plan)


def test_multi_crop_trains():
    batch, heads = crops(), model({"content": 5, "color": 3}, hidden=(8,))
    assert isinstance(batch.views, list) and len(batch) == 5 and batch.images == 6
    assert [tuple(v.shape[-2:]) for v in batch] == [(16, 16)] * 3 + [(8, 8)] * 2
    z = heads(batch)
    assert z.plan == batch.plan and z["content"].shape == (5, 6, 5)
    JointEntropyLoss()(z).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads.backbone.parameters())
    heads.eval()
    for v, view in enumerate(batch):
        torch.testing.assert_close(heads(batch)["content"][v], heads(view)["content"])
        torch.testing.assert_close(heads(batch, view_by_view=True)["color"][v], heads(view)["color"])
    assert heads.features(batch).shape == (5, 6, 6) and "[6, 3, 8, 8]" in repr(batch)


def test_a_batch_of_views_of_several_sizes_can_be_moved_and_cut():
    batch = crops()
    for moved in (batch.to("cpu"), batch.map(lambda t: t.clone()), pickle.loads(pickle.dumps(batch)), copy.copy(batch)):
        assert [torch.equal(a, b) for a, b in zip(moved, batch, strict=True)] == [True] * 5
    assert batch.to(torch.float64)[4].dtype == torch.float64
    some = batch.rows([4, 1])
    assert some.images == 2 and torch.equal(some[3], batch[3][[4, 1]])
    again = ViewBatch.cat([batch.rows(slice(0, 2)), batch.rows(slice(2, 6))])
    assert all(torch.equal(a, b) for a, b in zip(again, batch, strict=True))
    twice = _pytree.tree_map(lambda t: t * 2, batch)
    assert twice.plan == batch.plan and torch.equal(twice[4], batch[4] * 2)


@pytest.mark.parametrize(
    "views,error,message",
    [
        (
            [torch.zeros(3, 3, 8, 8), torch.zeros(2, 3, 8, 8)],
            ValueError,
            "the same number of images in every view: got 3, 2",
        ),
        ([torch.zeros(3, 3, 8, 8), torch.zeros(3, 3, 8)], ValueError, "the same number of dimensions"),
        ([], TypeError, "a list of V tensors"),
        ([1, 2], TypeError, "a list of V tensors"),
        (torch.zeros(3), ValueError, r"views \[V, B, ...\]"),
        ([torch.zeros(3, 3, 8, 8)] * 3, ValueError, "need 2 views: got 3"),
    ],
)
def test_bad_views(views, error, message):
    with pytest.raises(error, match=message):
        ViewBatch(views, ViewPlan.shared_query(("content",)))


# ---- lists, as lightly's transforms give them


def test_a_list_of_views_is_read_as_shared_query_in_the_order_of_the_spaces():
    x, heads = torch.rand(4, 5, 3, 8, 8), model()
    z = heads(list(x))
    assert torch.equal(z["color"], heads(x)["color"]) and z.plan == ViewPlan.shared_query(tuple(SPACES))
    assert JointEntropyLoss()(z) == JointEntropyLoss()(heads(x))
    other = ViewPlan.shared_query(("content", "scanner", "color"))  # the transform's groups in another order
    want = JointEntropyLoss()(Embeddings({n: z[n] for n in other.spaces}, other))
    torch.testing.assert_close(JointEntropyLoss()(z, other), want)
    assert not torch.equal(JointEntropyLoss()(z, other), JointEntropyLoss()(z))
    with pytest.raises(ValueError, match="color"):
        JointEntropyLoss()(z, ViewPlan.shared_query(("content", "blur", "scanner")))


def test_a_list_of_other_views_needs_a_plan():
    heads, plan = model(), ViewPlan(pairs=PAIRS)
    z = heads([torch.rand(4, 3, 8, 8)] * 3 + [torch.rand(4, 3, 6, 6)] * 2)
    assert JointEntropyLoss()(z, plan).isfinite()
    with pytest.raises(ValueError, match="need 4 views: got 5"):
        JointEntropyLoss()(z)
    with pytest.raises(TypeError, match="a list of views"):
        heads("views")
    with pytest.raises(TypeError, match="floating-point"):
        heads([torch.zeros(4, 3, 8, 8, dtype=torch.uint8)] * 4)
    with pytest.raises(ValueError, match="sample_ndim"):
        heads([torch.zeros(4, 8, 8)] * 4)


# ---- pairs that data collection gives


def test_pairs_of_two_scanners_without_augmentation():
    """The same slide from two scanners: content is what both show, the scanner's style what slides of one have."""
    g = torch.Generator().manual_seed(0)
    slides, tint = torch.rand(64, 3, 8, 8, generator=g), torch.tensor([1.0, 0.4, 0.1]).view(3, 1, 1)
    first, second, neighbor = slides, slides * tint, slides.roll(1, 0)
    plan = ViewPlan(pairs={"content": [(0, 1)], "scanner": [(0, 2)]})
    ids = torch.stack([torch.arange(64), torch.arange(64), torch.arange(64).roll(1)])
    batch = ViewBatch([first, second, neighbor], plan, image_ids=ids)
    assert isinstance(batch.views, torch.Tensor)
    heads = model({"content": 4, "scanner": 2}, hidden=(16,))
    optimizer, criterion = torch.optim.Adam(heads.parameters(), 0.01), JointEntropyLoss()
    before = criterion.terms(heads(batch))
    for _ in range(30):
        optimizer.zero_grad()
        criterion(heads(batch)).backward()
        optimizer.step()
    after = criterion.terms(heads(batch))
    assert after.loss < before.loss and after.constraint["content"] < before.constraint["content"]
