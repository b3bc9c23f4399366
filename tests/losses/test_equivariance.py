"""EquivarianceLoss: its equation by loops, what it can and cannot tell, and what it refuses."""

import math

import kornia.augmentation as K
import pytest
import torch
from torch import nn

from ssd_addon import Embeddings, EquivarianceLoss, StructuredViews, ViewBatch, ViewPlan
from ssd_addon.losses import Family
from ssd_addon.metrics import parameter_differences

PLAN = ViewPlan.shared_query(("content", "color", "spatial"))
WIDTHS = {"content": 4, "color": 3, "spatial": 2}


def views(**options):
    groups = {"color": [K.ColorJitter(0.4, hue=0.5, p=1.0)], "spatial": [K.RandomRotation(90.0, p=1.0)]}
    return StructuredViews(groups, seed=0, **options)


def embeddings(plan=PLAN, b=6, **more):
    g = torch.Generator().manual_seed(1)
    z = {n: torch.randn(plan.num_views, b, d, generator=g) for n, d in WIDTHS.items()}
    return Embeddings(z, plan, **more)


def alignment(family, guess, b, temperature):
    """The definitions, a row and a coordinate at a time."""
    n, d = guess.shape
    if family == "simclr":
        cosines = [float(guess[i] @ b[i] / (guess[i].norm() * b[i].norm())) for i in range(n)]
        return (1 - sum(cosines) / n) / temperature
    if family == "vicreg":
        return 25 * sum(float(guess[i, k] - b[i, k]) ** 2 for i in range(n) for k in range(d)) / (n * d)
    total = 0.0
    for k in range(d):
        columns = []
        for x in (guess[:, k].tolist(), b[:, k].tolist()):
            mean = sum(x) / n
            root = math.sqrt(sum((v - mean) ** 2 for v in x) / n + 1e-5)
            columns.append([(v - mean) / root for v in x])
        total += (sum(p * q for p, q in zip(*columns, strict=True)) / n - 1) ** 2
    return total


@pytest.mark.parametrize("family", ["simclr", "vicreg", "barlow"])
def test_it_is_its_equation(family):
    torch.manual_seed(0)
    batch, z = views()(torch.rand(6, 3, 8, 8)), embeddings()
    options = {"temperature": 0.3} if family == "simclr" else {}
    loss = EquivarianceLoss(WIDTHS, views(), family=family, weight=0.7, hidden=(5,), **options)
    changes = parameter_differences(batch.parameters[0], batch.parameters[1])
    expected = 0.0
    for name in ("color", "spatial"):
        change = torch.cat([t for key, t in changes.items() if key.startswith(f"{name}/")], 1)
        change = (change - change.mean(0)) / (change.var(0, unbiased=False) + 1e-10).sqrt()
        a, b = z[name][0], z[name][1]
        if family == "simclr":
            a = a / a.norm(dim=1, keepdim=True)
        guess = loss.networks[f"_{name}"](torch.cat([a, change], 1))
        expected += alignment(family, guess.detach(), b, 0.3)
    assert loss(z, batch).item() == pytest.approx(0.7 * expected / 2, rel=1e-4)


def test_both_codes_and_the_networks_are_trained_and_content_is_not():
    batch, z = views()(torch.rand(6, 3, 8, 8)), embeddings()
    for t in z.values():
        t.requires_grad_()
    loss = EquivarianceLoss(WIDTHS, views())
    loss(z, batch).backward()
    for name in ("color", "spatial"):
        assert z[name].grad[0].any() and z[name].grad[1].any() and not z[name].grad[2:].any()
    assert z["content"].grad is None
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())


def drawn(s: torch.Tensor, n: int = 256) -> ViewBatch:
    parameters = [{"style": {"0.Shift": {"value": v}}} for v in (*s, s[0])]
    return ViewBatch(torch.zeros(3, n, 1), ViewPlan.shared_query(("content", "style")), parameters=parameters)


def learnt(code, steps=300):
    """What is left of the loss when the networks alone are trained on a fixed code of (content, style)."""
    torch.manual_seed(0)
    loss = None
    for step in range(steps):
        c, s = torch.randn(256), torch.randn(2, 256)
        batch = drawn(s)
        z = {"content": c.expand(3, -1)[..., None], "style": torch.stack([code(c, s[0]), code(c, s[1]), code(c, s[0])])}
        if loss is None:
            loss = EquivarianceLoss({"content": 1, "style": 2}, {"style/0.Shift/value": 1}, temperature=1.0)
            optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2 if step == 0 else 1e-3)
        value = loss(Embeddings(z, batch.plan), batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return value.item()


def on_circle(angle):
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_a_code_that_content_turns_about_costs_more():
    plain = learnt(lambda c, s: on_circle(s))
    mirrored = learnt(lambda c, s: on_circle(s * c.sign()))  # the same change goes the other way round
    assert plain < 0.02 < 0.1 < mirrored


def test_a_content_that_commutes_with_the_changes_or_lies_beside_is_not_told():
    """The limits in docs/method.md."""
    assert learnt(lambda c, s: on_circle(s + c)) < 0.02
    assert learnt(lambda c, s: on_circle(c)) < 0.02  # content alone: every change does nothing to it


@pytest.mark.parametrize("family", ["simclr", "vicreg", "barlow"])
@pytest.mark.parametrize("cross", [(), ("color", "spatial")])
def test_interleaved_rows_that_share_the_group_or_show_another_image_are_left_out(family, cross):
    torch.manual_seed(0)
    batch = views(plan="interleaved", cross_image=cross)(torch.rand(12, 3, 8, 8))
    z = embeddings(batch.plan, 12, image_ids=batch.image_ids, space_index=batch.space_index)
    loss = EquivarianceLoss(WIDTHS, views(), family=family).eval()
    before = loss(z, batch).item()
    serves = torch.arange(12) % 3
    out = {"color": serves == 1, "spatial": serves == 2}
    if cross:  # the keys of both styles are made from other images
        out = dict.fromkeys(out, serves > 0)
    for name, rows in out.items():
        z[name][:, rows] = torch.randn(2, int(rows.sum()), WIDTHS[name])
    assert loss(z, batch).item() == pytest.approx(before, rel=1e-5)
    z["color"][1, ~out["color"]] = torch.randn(int((~out["color"]).sum()), 3)
    assert loss(z, batch).item() != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("family", ["simclr", "vicreg", "barlow"])
def test_without_a_row_it_is_0(family):
    batch = views(plan="interleaved", cross_image=("color", "spatial"))(torch.rand(12, 3, 8, 8))
    few = ViewBatch(
        batch.views[:, 1:3], batch.plan, image_ids=torch.tensor([[0, 1], [1, 0]]), space_index=torch.tensor([1, 2]),
        parameters=views()(torch.rand(2, 3, 8, 8)).parameters,
    )  # fmt: skip
    z = embeddings(batch.plan, 2)
    assert EquivarianceLoss(WIDTHS, views(), family=family)(z, few).item() == 0


@pytest.mark.parametrize("family", ["simclr", "vicreg", "barlow"])
def test_one_image_and_other_types(family):
    make = views()
    loss = EquivarianceLoss(WIDTHS, make, family=family)
    loss(embeddings(), make(torch.rand(6, 3, 8, 8)))
    one = make(torch.rand(1, 3, 8, 8))
    assert torch.isfinite(loss(embeddings(b=1), one))
    batch = make(torch.rand(6, 3, 8, 8))
    double = Embeddings({n: t.double() for n, t in embeddings().items()}, PLAN)
    assert loss(double, batch).item() == pytest.approx(loss(embeddings(), batch).item(), rel=1e-5)
    assert loss.double()(double, batch).dtype == torch.float64


def test_a_group_whose_name_begins_with_anothers():
    groups = {"a": [K.ColorJitter(0.4, p=1.0)], "ab": [K.RandomRotation(90.0, p=1.0)]}
    loss = EquivarianceLoss({"content": 1, "a": 2, "ab": 2}, StructuredViews(groups, seed=0))
    assert {k.split("/")[0] for k in loss.groups["a"]} == {"a"} and len(loss.groups["ab"]) == 2


def test_the_weight_and_the_temperature_have_the_defaults_of_the_loss():
    batch = views()(torch.rand(6, 3, 8, 8))
    torch.manual_seed(0)
    loss = EquivarianceLoss(WIDTHS, views())
    torch.manual_seed(0)
    said = EquivarianceLoss(WIDTHS, views(), temperature=0.15, weight=1.0)
    assert loss(embeddings(), batch).item() == said(embeddings(), batch).item()


def test_half_precision_and_autocast_compute_in_float32():
    batch, z = views()(torch.rand(6, 3, 8, 8)), embeddings()
    loss = EquivarianceLoss(WIDTHS, views()).eval()
    half = Embeddings({n: t.bfloat16() for n, t in z.items()}, z.plan)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(half, batch)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(
        loss(Embeddings({n: t.float() for n, t in half.items()}, z.plan), batch).item()
    )


def test_a_batch_that_never_fired_has_the_same_parameters():
    groups = {"color": [K.ColorJitter(0.4, p=0.1)]}
    make = StructuredViews(groups, seed=0)
    loss = EquivarianceLoss({"content": 1, "color": 2}, make)
    for _ in range(4):
        batch = make(torch.rand(4, 3, 4, 4))
        z = Embeddings({"content": torch.randn(3, 4, 1), "color": torch.randn(3, 4, 2)}, batch.plan)
        assert torch.isfinite(loss(z, batch))


def test_the_views_say_what_is_drawn_without_a_batch():
    sizes = views().parameter_sizes()
    changes = parameter_differences(*views()(torch.rand(6, 3, 8, 8)).parameters[:2])
    assert sizes == {path: t.shape[1] for path, t in changes.items()}
    assert list(EquivarianceLoss(WIDTHS, sizes).groups["color"]) == [p for p in sizes if p.startswith("color/")]


def test_a_family_of_ones_own_has_its_own_misalignment():
    def alignment(a, b):
        return (a - b).abs().sum(1)

    family = Family("mine", alignment=alignment, entropy=lambda joint, ids: joint.mean(), weight=3.0)
    batch, z = views()(torch.rand(6, 3, 8, 8)), embeddings()
    loss = EquivarianceLoss(WIDTHS, views(), family=family, hidden=(5,)).eval()
    changes = parameter_differences(batch.parameters[0], batch.parameters[1])
    expected = 0.0
    for name in ("color", "spatial"):
        change = torch.cat([t for key, t in changes.items() if key.startswith(f"{name}/")], 1)
        guess = loss.networks[f"_{name}"](torch.cat([z[name][0], change], 1)).detach()
        expected += 3.0 * float((guess - z[name][1]).abs().sum(1).mean()) / 2
    assert loss(z, batch).item() == pytest.approx(expected, rel=1e-5)


def test_it_is_saved_and_moves_with_a_module():
    batch = views()(torch.rand(6, 3, 8, 8))
    torch.manual_seed(0)
    loss = EquivarianceLoss(WIDTHS, views()).eval()
    torch.manual_seed(1)
    other = EquivarianceLoss(WIDTHS, views()).eval()
    other.load_state_dict(loss.state_dict())
    assert other(embeddings(), batch).item() == loss(embeddings(), batch).item()
    assert isinstance(loss, nn.Module) and "SimCLR" in repr(loss) and "color, spatial" in repr(loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "moco"}, "family: expected one of"),
        ({"family": "vicreg", "temperature": 0.1}, "temperature: the 'vicreg' family has none: got 0.1"),
        ({"temperature": 0.0}, "temperature"),
        ({"weight": -1.0}, "weight"),
        ({"spaces": {"content": 3}}, "spaces: expected content and at least one style: got content"),
        ({"spaces": {"content": 3, "blur": 2}}, "style space 'blur': .*got those of color, spatial"),
        ({"spaces": ["content", "color"]}, "spaces: expected a mapping name -> width.*got list"),
        ({"spaces": {"content": 3, "color": 0}}, "width of space 'color': expected a whole number, 1 or more: got 0"),
        ({"hidden": 5}, "hidden: expected a sequence of widths for every style"),
        ({"hidden": (0,)}, "hidden width of every style: expected a whole number, 1 or more: got 0"),
        (
            {"views": torch.rand(4, 2, 3, 8, 8)},
            r"views: expected StructuredViews, or its parameter_sizes\(\): got Tensor",
        ),
        ({"views": ViewBatch(torch.zeros(4, 2, 1), PLAN)}, "got ViewBatch; pass the object that draws the batches"),
        ({"views": {"color/0.A/b": 0, "spatial/0.A/b": 1}}, "numbers of 'color/0.A/b': expected a whole number, 1 or"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    options = {"spaces": WIDTHS, "views": views()} | change
    with pytest.raises((ValueError, TypeError), match=message):
        EquivarianceLoss(options.pop("spaces"), options.pop("views"), **options)


def test_embeddings_and_batches_that_do_not_fit_are_refused():
    make = views()
    batch = make(torch.rand(6, 3, 8, 8))
    loss = EquivarianceLoss(WIDTHS, views())
    with pytest.raises(ValueError, match=r"'color': expected \[V, 6, 3\], two views or more.*: got \[4, 5, 3\]"):
        loss(embeddings(b=5), batch)
    for wrong in (torch.randn(4, 6, 2), torch.randn(6, 3), torch.randn(1, 6, 3)):
        with pytest.raises(ValueError, match=r"'color': expected \[V, 6, 3\]"):
            loss(embeddings() | {"color": wrong}, batch)
    with pytest.raises(TypeError, match="batch: expected a ViewBatch"):
        loss(embeddings(), batch.views)
    with pytest.raises(ValueError, match="batch: expected the parameters of at least two views.*got 0"):
        loss(embeddings(), ViewBatch(batch.views, batch.plan))
    with pytest.raises(ValueError, match="batch: expected 3 numbers for the change of color/0.ColorJitter/hue_factor"):
        EquivarianceLoss(WIDTHS, {**views().parameter_sizes(), "color/0.ColorJitter/hue_factor": 3})(
            embeddings(), batch
        )
    other = StructuredViews({"color": [K.ColorJitter(0.4, p=1.0)], "spatial": [K.RandomHorizontalFlip()]}, seed=0)(
        torch.rand(6, 3, 8, 8)
    )
    with pytest.raises(ValueError, match="batch: expected the parameters spatial/0.RandomRotation"):
        loss(embeddings(), other)
    z = embeddings()
    del z["spatial"]
    with pytest.raises(ValueError, match="embeddings: expected the style space 'spatial': got content, color"):
        loss(z, batch)


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_its_numbers_keep_their_type_in_a_module_that_is_cast(cast):
    """Statistics of hue changes in 16 bits would be wrong by percents."""
    parent = nn.ModuleDict({"model": nn.Linear(2, 2), "term": EquivarianceLoss(WIDTHS, views())})
    before = {k: t.clone() for k, t in parent["term"].state_dict().items()}
    cast(parent)
    assert parent["model"].weight.dtype.itemsize == 2
    for k, t in parent["term"].state_dict().items():
        assert t.dtype == before[k].dtype and torch.equal(t, before[k])
    parent.double()
    assert next(parent["term"].networks.parameters()).dtype == torch.float64


@pytest.mark.parametrize("name", ["v1.color", "a%2Eb", "type", "100%"])
def test_a_style_may_have_any_name(name):
    made = StructuredViews({name: [K.ColorJitter(0.4, p=1.0)]}, seed=0)
    term = EquivarianceLoss({"content": 3, name: 2}, made)
    batch = made(torch.rand(6, 3, 8, 8))
    z = {"content": torch.randn(3, 6, 3), name: torch.randn(3, 6, 2)}
    assert term(Embeddings(z, batch.plan), batch).isfinite() and len({k.split(".")[1] for k in term.state_dict()}) == 1
