"""IndependenceLoss: its equation by loops, what it tells apart, over ranks, and what it refuses."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from ssd_addon import Embeddings, IndependenceLoss, ViewPlan
from ssd_addon.losses import Family
from ssd_addon.losses.independence import BANDWIDTHS

WIDTHS = {"content": 3, "color": 2, "spatial": 2}


def embeddings(views=2, b=7, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(views, b, d, generator=g, dtype=dtype) for n, d in WIDTHS.items()}


def by_loops(loss, z, family):
    """The equation, a number at a time."""
    names, features = list(z), {}
    for i, name in enumerate(names):
        rows = [z[name][v, b].tolist() for v in range(z[name].shape[0]) for b in range(z[name].shape[1])]
        d = len(rows[0])
        if family == "simclr":
            rows = [[x / math.sqrt(sum(y * y for y in r)) for x in r] for r in rows]
        else:
            means = [sum(r[k] for r in rows) / len(rows) for k in range(d)]
            stds = [math.sqrt(sum((r[k] - means[k]) ** 2 for r in rows) / len(rows)) for k in range(d)]
            rows = [[(r[k] - means[k]) / (stds[k] * math.sqrt(d)) for k in range(d)] for r in rows]
        w, p = getattr(loss, f"directions_{i}").tolist(), getattr(loss, f"phases_{i}").tolist()
        f = [[math.cos(sum(r[k] * w[k][j] for k in range(d)) + p[j]) for j in range(len(p))] for r in rows]
        mean = [sum(r[j] for r in f) / len(f) for j in range(len(p))]
        features[name] = [[r[j] - mean[j] for j in range(len(p))] for r in f]

    def overlap(a, b):
        return sum(
            sum(a[n][i] * b[n][j] for n in range(len(a))) ** 2 for i in range(len(a[0])) for j in range(len(b[0]))
        )

    found = []
    for i, s in enumerate(names):
        for t in names[i + 1 :]:
            a, b = features[s], features[t]
            found.append(overlap(a, b) / math.sqrt(overlap(a, a) * overlap(b, b)))
    return loss.weight * sum(found) / len(found)


@pytest.mark.parametrize("features", [5, 24])  # fewer and more than rows
@pytest.mark.parametrize("family", ["simclr", "vicreg", "barlow"])
def test_it_is_its_equation(family, features):
    loss = IndependenceLoss(WIDTHS, family=family, weight=0.7, features=features, seed=3).double()
    z = embeddings()
    assert loss(z).item() == pytest.approx(by_loops(loss, z, family), rel=1e-9)


def test_its_gradient_is_that_of_its_value():
    loss = IndependenceLoss(WIDTHS, features=6).double()
    leaves = [t.requires_grad_() for t in embeddings(b=4).values()]
    assert torch.autograd.gradcheck(lambda *z: loss(dict(zip(WIDTHS, z, strict=True))), leaves)


def test_half_of_the_features_have_either_bandwidth():
    loss = IndependenceLoss({"a": 400, "b": 400}, features=100)
    spreads = loss.directions_0.std(0)
    assert spreads[:50].mean().item() == pytest.approx(1 / BANDWIDTHS[0], rel=0.05)
    assert spreads[50:].mean().item() == pytest.approx(1 / BANDWIDTHS[1], rel=0.05)
    assert loss.phases_0.max() > 6 and loss.phases_0.min() < 0.3
    assert not torch.equal(loss.phases_0, loss.phases_1)  # or equal spaces alone would be found


def test_it_sees_what_a_covariance_does_not():
    """A space that is a function of another without any correlation, beside one that is independent."""
    g = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(1, 600, 1, generator=g)
    z = {"content": torch.cat([angle.cos(), angle.sin()], 2)}
    doubled = torch.cat([(2 * angle).cos(), (2 * angle).sin()], 2)
    other = torch.randn(1, 600, 2, generator=g)
    loss = IndependenceLoss({"content": 2, "style": 2})
    assert (z["content"][0].T @ doubled[0] / 600).abs().max() < 0.1
    assert loss(z | {"style": doubled}) > 0.1
    assert loss(z | {"style": other}) < 0.02
    assert loss(z | {"style": z["content"]}) > 0.8


def test_training_with_it_takes_a_space_out_of_another():
    g = torch.Generator().manual_seed(0)
    content, style = torch.randn(2, 1, 300, 2, generator=g)
    loss = IndependenceLoss({"content": 2, "style": 2})
    mix = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # how much the style space has of content
    optimizer = torch.optim.Adam([mix], lr=0.05)
    before = loss({"content": content, "style": style + content @ mix}).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss({"content": content, "style": style + content @ mix}).backward()
        optimizer.step()
    assert loss({"content": content, "style": style + content @ mix}).item() < 0.3 * before
    assert mix.detach().abs().max() < 0.35


def test_terms_name_the_pair_that_depends():
    z = embeddings(b=200)
    z["spatial"] = z["color"].clone()
    terms = IndependenceLoss(WIDTHS).double().terms(z)
    assert list(terms) == [("content", "color"), ("content", "spatial"), ("color", "spatial")]
    assert max(terms, key=terms.get) == ("color", "spatial")


def test_it_takes_embeddings_and_a_family_of_ones_own():
    z = Embeddings(embeddings(views=4, dtype=torch.float32), ViewPlan.shared_query(tuple(WIDTHS)))
    own = Family("mine", alignment=lambda a, b: (a - b).square().sum(1), entropy=lambda joint, ids: -joint.var())
    assert 0 <= IndependenceLoss(WIDTHS, family=own)(z) <= 1
    assert not torch.allclose(IndependenceLoss(WIDTHS, family=own)(z), IndependenceLoss(WIDTHS)(z))


def test_half_precision_and_autocast_change_the_value_little():
    loss, z = IndependenceLoss(WIDTHS), embeddings(b=64, dtype=torch.float32)
    want = loss(z)
    half = {n: t.bfloat16() for n, t in z.items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = nn.Sequential(loss).to(torch.bfloat16)[0](half)
    assert got.dtype == loss.directions_0.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=0.02)


def test_equal_rows_give_no_nan():
    z = {n: torch.ones(2, 5, d, requires_grad=True) for n, d in WIDTHS.items()}
    value = IndependenceLoss(WIDTHS)(z)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert all(t.grad.isfinite().all() for t in z.values())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="two or more"):
        IndependenceLoss({"content": 3})
    with pytest.raises(TypeError, match="mapping"):
        IndependenceLoss([3, 2])
    with pytest.raises(ValueError, match="features: expected a whole number, 1 or more: got 0"):
        IndependenceLoss(WIDTHS, features=0)
    with pytest.raises(ValueError, match="weight"):
        IndependenceLoss(WIDTHS, weight=-1.0)
    loss, z = IndependenceLoss(WIDTHS).double(), embeddings()
    with pytest.raises(ValueError, match="expected the space 'color': got content"):
        loss({"content": z["content"]})
    with pytest.raises(ValueError, match=r"'content': expected \[V, B, 3\]"):
        loss(z | {"content": z["content"][..., :2]})
    with pytest.raises(ValueError, match="two or more samples"):
        loss({n: t[:1, :1] for n, t in z.items()})


def on_a_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    loss = IndependenceLoss(WIDTHS, features=9, gather_distributed=True).double()
    rows = slice(0, 3) if rank == 0 else slice(3, 7)
    z = {n: t[:, rows].clone().requires_grad_() for n, t in embeddings(b=7).items()}
    value = loss(z)
    value.backward()
    torch.save((value.item(), {n: t.grad / 2 for n, t in z.items()}), f"{folder}/{rank}.pt")  # as DDP averages
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_with_uneven_rows_have_the_value_and_the_gradient_of_one_process(tmp_path):
    loss = IndependenceLoss(WIDTHS, features=9).double()
    z = {n: t.requires_grad_() for n, t in embeddings(b=7).items()}
    want = loss(z)
    want.backward()
    mp.spawn(on_a_rank, args=(str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for value, _ in found:
        assert value == pytest.approx(want.item(), rel=1e-12)
    for n, t in z.items():
        torch.testing.assert_close(torch.cat([g[n] for _, g in found], 1), t.grad, rtol=1e-10, atol=1e-14)
