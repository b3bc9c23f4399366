"""Online probes: what they compute, that the model is left alone, and what they refuse."""

import copy
import math

import pytest
import torch
from torch import nn

from ssd_addon.metrics import OnlineProbes

WIDTHS = {"backbone": 6, "color.jitter": 3, "keys": 1}  # names that a ModuleDict refuses


def data(n=12, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    z = {name: torch.randn(n, d, generator=g).mul(3).add(1).to(dtype) for name, d in WIDTHS.items()}
    return z, torch.randint(4, (n,), generator=g)


def probes():
    torch.manual_seed(0)
    return OnlineProbes(WIDTHS, classes=4)


def test_logits_loss_and_hits_equal_a_slow_loop():
    model, (z, labels) = probes(), data()
    logits = model(z)
    assert list(logits) == list(WIDTHS) == list(model.names)
    loss, right = 0.0, []
    for (name, x), (norm, linear) in zip(z.items(), model.requires_grad_(False).layers, strict=True):
        standard = (x - x.mean(0)) / (x.var(0, correction=0) + norm.eps).sqrt()
        expected = standard @ linear.weight.T + linear.bias
        torch.testing.assert_close(logits[name].detach(), expected)
        for row, label in zip(expected, labels.tolist(), strict=True):
            loss += float(row.exp().sum().log() - row[label]) / len(labels)
        right.append(sum(int(row.argmax()) == label for row, label in zip(expected, labels.tolist(), strict=True)))
    assert float(model.loss(logits, labels).detach()) == pytest.approx(loss, rel=1e-5)
    hits = model.hits(logits, labels)
    assert hits.tolist() == right and hits.dtype == torch.int64 and not hits.requires_grad
    assert not any(p.requires_grad for norm, _ in model.layers for p in norm.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_are_detached_and_in_float32(dtype):
    model, (z, labels) = probes(), data(dtype=dtype)
    z = {name: t.requires_grad_() for name, t in z.items()}
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(z)
        loss = model.loss(logits, labels)
    assert all(t.dtype == torch.float32 for t in logits.values()) and loss.dtype == torch.float32
    loss.backward()
    assert all(t.grad is None for t in z.values()) and all(p.grad is not None for p in model.parameters())


def test_each_probe_learns_by_itself():
    """The gradient of a space is that of a probe of its own; what is decodable is learnt, noise is not."""
    model, (z, labels) = probes(), data()
    model.loss(model(z), labels).backward()
    alone = OnlineProbes({"backbone": 6}, classes=4)
    alone.layers[0].load_state_dict(model.layers[0].state_dict())
    alone.loss(alone({"backbone": z["backbone"]}), labels).backward()
    torch.testing.assert_close(alone.layers[0][1].weight.grad, model.layers[0][1].weight.grad)

    g = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (400,), generator=g)
    z = {"good": labels[:, None] + 0.1 * torch.randn(400, 2, generator=g), "noise": torch.randn(400, 2, generator=g)}
    learner = OnlineProbes({"good": 2, "noise": 2}, classes=2)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.1)
    total = torch.zeros(2, dtype=torch.int64)
    for step in range(30):
        logits = learner(z)
        optimizer.zero_grad()
        learner.loss(logits, labels).backward()
        optimizer.step()
        total += learner.hits(logits, labels) * (step >= 25)
    assert total[0] / 2000 > 0.99 and 0.4 < total[1] / 2000 < 0.65


def test_evaluation_uses_the_running_statistics_and_one_image_is_enough():
    model, (z, labels) = probes(), data()
    model(z)
    model.eval()
    whole = model(z)
    one = model({name: t[:1] for name, t in z.items()})
    for name in WIDTHS:
        torch.testing.assert_close(one[name], whole[name][:1])
    assert model.hits(one, labels[:1]).shape == (3,)


def test_the_state_survives_a_file(tmp_path):
    model, (z, _) = probes(), data()
    model(z)
    torch.save(model.state_dict(), tmp_path / "p.pt")
    other = OnlineProbes(WIDTHS, classes=4)
    other.load_state_dict(torch.load(tmp_path / "p.pt", weights_only=True))
    assert torch.equal(other.eval()(z)["keys"], model.eval()(z)["keys"])


Z, LABELS = data()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS.clone().index_fill(0, torch.tensor([3]), 4), "labels: expected classes 0 to 3: got . to 4"),
        (LABELS.clone().index_fill(0, torch.tensor([3]), -1), "labels: expected classes 0 to 3: got -1 to 3"),
        (LABELS.clone().index_fill(0, torch.tensor([3]), -100), "got -100 to 3"),
        (LABELS[:5], r"labels: expected \[12\] integers, a class for each image: got \[5\]"),
        (LABELS.float(), "integers.*got .* torch.float32"),
        (LABELS > 1, "integers.*got .* torch.bool"),
        (nn.functional.one_hot(LABELS), r"got \[12, 4\]"),
    ],
)
def test_labels_that_are_no_classes(labels, message):
    model = probes()
    logits = model(Z)
    for use in (model.loss, model.hits):
        with pytest.raises(ValueError, match=message):
            use(logits, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backbone": None},
            "features: expected the spaces backbone, color.jitter, keys of the probes: missing: backbone",
        ),
        ({"extra": torch.rand(12, 2)}, "not named by the probes: extra"),
        ({"backbone": torch.rand(12, 5)}, r"features 'backbone': expected \[12, 6\].*got \[12, 5\]"),
        ({"keys": torch.rand(11, 1)}, r"features 'keys': expected \[12, 1\].*got \[11, 1\]"),
        ({"backbone": torch.rand(2, 12, 6)}, r"features 'backbone': expected \[2, 6\].*got \[2, 12, 6\]"),
    ],
)
def test_features_that_do_not_fit(change, message):
    given = {name: t for name, t in (Z | change).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        probes()(given)


def test_logits_of_other_spaces_and_bad_sizes():
    model = probes()
    with pytest.raises(ValueError, match="logits: expected the spaces .* missing: keys"):
        model.loss({name: t for name, t in model(Z).items() if name != "keys"}, LABELS)
    with pytest.raises(ValueError, match="expected at least 2 images in training mode, for BatchNorm: got 1"):
        model({name: t[:1] for name, t in Z.items()})
    for widths, classes, message in (({}, 3, "at least one"), ({"a": 0}, 3, "'a'"), ({"a": 2}, 0, "classes")):
        with pytest.raises(ValueError, match=message):
            OnlineProbes(widths, classes)
    with pytest.raises(TypeError, match="widths: expected a mapping name -> width: got list"):
        OnlineProbes([3], 2)


# ---- a network that has diverged


@pytest.mark.parametrize(
    ("value", "got"), [(math.nan, "NaN or infinity"), (math.inf, "NaN or infinity"), (1e20, "too large ones")]
)
def test_features_that_would_spoil_the_statistics_are_refused(value, got):
    model = probes()
    model(Z)
    before = copy.deepcopy(model.state_dict())
    z = {name: t.clone() for name, t in Z.items()}
    z["color.jitter"][0, 1] = value
    with pytest.raises(ValueError, match=f"features 'color.jitter': expected finite numbers .*: got {got}"):
        model(z)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    logits = model.eval()(z)  # which reads the statistics only
    assert logits["backbone"].isfinite().all() and logits["color.jitter"][1:].isfinite().all()


def test_logits_that_are_not_finite_are_no_hits():
    model, labels = probes(), torch.zeros(12, dtype=torch.long)
    logits = {name: torch.eye(4)[labels] for name in WIDTHS}
    logits["backbone"] = torch.full((12, 4), math.nan)
    logits["keys"] = torch.where(torch.arange(12)[:, None] < 5, logits["keys"], torch.inf)
    assert model.hits(logits, labels).tolist() == [0, 12, 5]


def test_where_nothing_can_be_read_from_the_device_logits_are_nan():
    compiled = torch.compile(probes(), backend="eager", fullgraph=True)
    assert compiled(Z)["keys"].isfinite().all()
    logits = compiled(Z | {"keys": torch.full_like(Z["keys"], 1e20)})
    assert logits["keys"].isnan().all() and logits["backbone"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_every_integer_type(dtype):
    model = probes().eval()
    logits = model(Z)
    assert torch.equal(model.hits(logits, LABELS.to(dtype)), model.hits(logits, LABELS))
    with pytest.raises(ValueError, match="labels: expected classes 0 to 3: got 0 to 9"):
        model.hits(logits, torch.tensor([0] * 11 + [9]).to(dtype))


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_probes_keep_their_precision_in_a_module_that_is_cast(cast):
    z, labels = data()
    expected = probes()(z)
    module = nn.ModuleDict({"probes": probes()})
    logits = getattr(module, cast)()["probes"]({n: t.bfloat16() for n, t in z.items()})
    for name, t in logits.items():
        assert t.dtype == (torch.float64 if cast == "double" else torch.float32)
        torch.testing.assert_close(t.float(), expected[name], rtol=0.05, atol=0.05)
    module["probes"].loss(logits, labels).backward()


def test_probes_are_of_32_bits_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        made = probes()
    finally:
        torch.set_default_dtype(torch.float32)
    z, _ = data()
    assert all(t.dtype == torch.float32 for t in made(z).values())
