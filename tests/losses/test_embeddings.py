"""Embeddings keep their plan through copies, pytrees and frameworks; what has lost it is refused, never guessed."""

import copy
import math
import pickle
from collections import OrderedDict

import kornia.augmentation as K
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning_fabric import Fabric
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torch.distributed.utils import _apply_to_tensors  # what FSDP casts outputs with
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ssd_addon import Embeddings, JointEntropyLoss, StructuredViews, StyleHeads, ViewPlan

SPACES = {"content": 6, "color": 3}
VIEWS = {
    "shared query": {},
    "interleaved": {"plan": "interleaved"},
    "cross-image": {"cross_image": ("color",)},
    "interleaved, cross-image": {"plan": "interleaved", "cross_image": ("color",)},
}


class Backbone(nn.Module):
    num_features = 8

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2)

    def forward(self, x):
        return self.conv(x).relu()


def model():
    torch.manual_seed(0)
    return StyleHeads(Backbone(), SPACES, hidden=())


def batch(kind, calls=2):
    """A batch of a later call, so that an interleaved index is not the default one."""
    views = StructuredViews({"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0)]}, seed=0, **VIEWS[kind])
    x = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return [views(x) for _ in range(calls)][-1]


# ---- rebuilt


def rebuilt(z):
    """type(z) of its own values, as accelerate and others do."""
    return type(z)({k: v.float() for k, v in z.items()})


KEEP = {
    "copy": lambda z: z.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "| {}": lambda z: z | {},
    "{} |": lambda z: {} | z,
    "|= a value": lambda z: z | {"color": z["color"] * 1.0},
    "pickle": lambda z: pickle.loads(pickle.dumps(_pytree.tree_map(lambda t: t.detach(), z))),
    "type(z)(z)": lambda z: type(z)(z),
    "tree_map": lambda z: _pytree.tree_map(lambda t: t.clone(), z),
    "tree_map, cast": lambda z: _pytree.tree_map(lambda t: t.double().float(), z),
    "tree_map_only": lambda z: _pytree.tree_map_only(torch.Tensor, lambda t: t.float(), z),
    "FSDP": lambda z: _apply_to_tensors(lambda t: t.float() if t.is_floating_point() else t, z),
    "Lightning": lambda z: apply_to_collection(z, torch.Tensor, lambda t: t.float()),
    "Lightning, in a tuple": lambda z: apply_to_collection((z, 1), torch.Tensor, lambda t: t.float())[0],
    "reversed in place": lambda z: z.__ior__({}),
}  # fmt: skip
LOSE = {
    "type(z)({...})": rebuilt,
    "an OrderedDict of its values": lambda z: type(z)(OrderedDict((k, v.float()) for k, v in z.items())),
    "pairs": lambda z: type(z)((k, v) for k, v in z.items()),
    "names anew": lambda z: type(z)({"content": z["content"], "color": z["color"]}),
    "item by item": lambda z: [out := type(z)(), out.update(z)][0],
}


@pytest.mark.parametrize("keys", ["first", "all"])
@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("way", [*KEEP, *LOSE])
def test_a_rebuilt_output_has_the_same_loss_or_is_refused(way, kind, keys):
    given, criterion = batch(kind), JointEntropyLoss(content_keys=keys)
    z = model()(given)
    want, other = criterion(z).item(), (KEEP | LOSE)[way](z)
    if way in KEEP:
        assert other.plan == z.plan and criterion(other).item() == pytest.approx(want, rel=1e-6)
    else:
        with pytest.raises(ValueError, match=r"Embeddings with a plan: got the .* without.*criterion\(z, batch\)"):
            criterion(other)
        assert criterion(other, given).item() == pytest.approx(want, rel=1e-6)
        assert criterion.terms(other, given).loss.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kind", VIEWS)
def test_a_plain_dict_needs_the_batch_where_it_is_no_shared_query(kind):
    given, criterion = batch(kind), JointEntropyLoss()
    z = model()(given)
    want = criterion(z).item()
    assert criterion(dict(z), given).item() == want
    flat = {n: t.flatten(0, 1) for n, t in z.items()}  # [V*B, d], a module of one's own
    assert criterion(flat, given).item() == want
    turned = {n: flat[n] for n in reversed(list(flat))}  # matched by name
    assert criterion(turned, given).item() == want
    if "interleaved" in kind:
        with pytest.raises(ValueError, match=r"need 3 views: got 2; .*criterion\(z, batch\)"):
            criterion(dict(z))


def test_ids_that_every_tensor_was_cast_with_are_the_same_integers():
    z = model()(batch("cross-image"))
    for large in (1, 10_000):  # 16-bit types hold no such numbers exactly
        z.image_ids = z.image_ids * large
        half = apply_to_collection(z, torch.Tensor, lambda t: t.bfloat16())
        assert half.image_ids.dtype == torch.int64 and torch.equal(half.image_ids, z.image_ids)


@pytest.mark.parametrize("kind", ["cross-image", "interleaved"])
@pytest.mark.parametrize("f", [lambda t: t / 2, lambda t: t * 2, lambda t: t + 1, lambda t: t.float().normal_()])
def test_ids_that_arithmetic_on_every_tensor_has_changed_are_refused(kind, f):
    given = batch(kind)
    z = model()(given)
    changed, criterion = _pytree.tree_map(f, z), JointEntropyLoss()
    with pytest.raises(
        ValueError, match=r"(image_ids|space_index): expected those of the batch .* criterion\(z, batch"
    ):
        criterion(changed)
    assert math.isnan(JointEntropyLoss(validate=False)(changed).item())
    alone = {n: f(t) for n, t in z.items()}
    assert math.isfinite(criterion(alone, given).item())


def test_ids_and_rows_may_be_moved_and_selected_together():
    z = model()(batch("interleaved"))
    order = torch.tensor([3, 1, 0, 4, 2])
    turned = _pytree.tree_map(lambda t: t[..., order, :] if t.ndim == 3 else t[..., order], z)
    assert torch.equal(turned.space_index, z.space_index[order])
    assert JointEntropyLoss()(turned).item() == pytest.approx(JointEntropyLoss()(z).item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["cross-image", "interleaved"])
def test_the_batch_of_another_step_is_refused(kind):
    first, second = batch(kind), batch(kind)
    z = model()(first)
    for name in ("image_ids", "space_index"):
        if getattr(second, name) is not None:
            setattr(second, name, getattr(second, name).roll(1, -1))
    with pytest.raises(ValueError, match=r"expected those of the batch of the embeddings"):
        JointEntropyLoss()(z, second)
    assert math.isnan(JointEntropyLoss(validate=False)(z, second).item())


def test_parameters_are_no_leaves_of_a_batch():
    given = batch("cross-image")
    scaled = _pytree.tree_map(lambda t: t.float() * 2 - 1 if t.is_floating_point() else t, given)
    assert torch.equal(scaled.views, given.views * 2 - 1) and torch.equal(scaled.image_ids, given.image_ids)
    for a, b in zip(scaled.parameters, given.parameters, strict=True):
        for name, t in a["color"]["0.ColorJitter"].items():
            assert torch.equal(t, b["color"]["0.ColorJitter"][name])


def test_what_is_no_tensor_may_pass_through_a_pytree():
    z = model()(batch("cross-image"))
    shapes = _pytree.tree_map(lambda t: tuple(t.shape), z)
    assert dict(shapes) == {"content": (3, 5, 6), "color": (3, 5, 3)} and "content: (3, 5, 6)" in repr(shapes)
    leaves, spec = _pytree.tree_flatten(z)
    assert len(leaves) == 3 and _pytree.tree_unflatten(leaves, spec).plan == z.plan


# ---- frameworks


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", VIEWS)
def test_fabric(kind, precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    wrapped, given = fabric.setup(model()), batch(kind)
    z, want = wrapped(given), JointEntropyLoss()(model()(given)).item()
    assert JointEntropyLoss()(z).item() == pytest.approx(want, rel=1e-6 if precision == "32-true" else 0.02)
    assert JointEntropyLoss()(z, given).item() == JointEntropyLoss()(z).item()
    fabric.backward(JointEntropyLoss()(z))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", VIEWS)
def test_accelerate(kind, precision, tmp_path):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    wrapped, given = accelerator.prepare(model()), batch(kind)
    z, want = wrapped(given), JointEntropyLoss()(model()(given)).item()
    assert JointEntropyLoss()(z, given).item() == pytest.approx(want, rel=1e-6 if precision == "no" else 0.02)
    if precision == "bf16":
        with pytest.raises(ValueError, match="Embeddings with a plan"):
            JointEntropyLoss()(z)
    views = StructuredViews({"color": [K.ColorJitter(0.4)]}, seed=4)
    views(torch.rand(2, 3, 8, 8))
    accelerator.register_for_checkpointing(views)
    accelerator.save_state(str(tmp_path))
    views.call = 0
    accelerator.load_state(str(tmp_path))
    assert (views.seed, views.call) == (4, 1)
    AcceleratorState._reset_state(True)


# ---- the batch beside the embeddings


def test_a_batch_of_another_plan_or_size_is_refused():
    given = batch("shared query")
    z, criterion = model()(given), JointEntropyLoss()
    with pytest.raises(ValueError, match="batch: expected the embeddings' own plan, 2 spaces .*: got 2 spaces"):
        criterion(z, batch("interleaved"))
    with pytest.raises(ValueError, match=r"space 'content': expected the 5 images of the batch: got \[3, 4, 6\]"):
        criterion({n: t[:, :4] for n, t in z.items()}, given)
    with pytest.raises(
        ValueError, match=r"space 'content': expected \[V, B, d\] or \[V\*B, d\] with V = 3: got \[14, 6\]"
    ):
        criterion({n: t.flatten(0, 1)[:14] for n, t in z.items()}, given)
    with pytest.raises(ValueError, match="expected the spaces content, color of the plan of the batch.*missing: color"):
        criterion({"content": z["content"]}, given)
    with pytest.raises(TypeError, match="batch: expected a ViewBatch or its ViewPlan: got Tensor"):
        criterion(z, given.views)


def test_a_plan_alone_settles_the_order_by_name():
    heads = model()
    x = batch("shared query").views
    z = heads(x)  # bare views: the order of the heads is assumed
    assert z.assumed and JointEntropyLoss()(z, ViewPlan.shared_query(("content", "color"))) == JointEntropyLoss()(z)
    inter = batch("interleaved")
    with pytest.raises(
        ValueError, match="expected the ViewBatch itself: got .* without the space that each image serves"
    ):
        JointEntropyLoss()(dict(heads(inter)), inter.plan)


def test_with_one_space_the_plan_is_never_in_doubt():
    z = Embeddings({"content": torch.randn(2, 5, 3)})
    assert JointEntropyLoss()(z) == JointEntropyLoss()(dict(z)) and JointEntropyLoss()(
        rebuilt(z)
    ) == JointEntropyLoss()(z)


def test_a_plan_stays_as_it_was_made():
    plan = ViewPlan.interleaved(("content", "color"))
    with pytest.raises(AttributeError, match="expected no assignment, as plans are immutable"):
        plan.kind = "shared_query"
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan and hash(again) == hash(plan) and plan != ViewPlan.shared_query(("content", "color"))
    assert repr(plan) == "ViewPlan('interleaved', ('content', 'color'))"


# ---- checks cost one read from the device


class Reads(TorchDispatchMode):
    """Counts what waits for the device: a scalar, or a copy of a tensor to Python."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "local_scalar_dense" in str(func):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("options", [{}, {"content_keys": "all", "content_entropy": True, "trim": 0.3}])
@pytest.mark.parametrize("family", ["simclr", "vicreg", "barlow", "frossl", "mmcr"])
def test_a_loss_makes_one_read(family, options, kind, monkeypatch):
    given = batch(kind)
    z = _pytree.tree_map(lambda t: t.detach(), model()(given))
    lists = []
    whole = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: [lists.append(1), whole(t)][1])
    with Reads() as reads:
        JointEntropyLoss(family, backend="eager", **options)(z)
    assert len(lists) == 1 and not reads.found


def test_a_learned_temperature_is_read_with_the_checks_and_checked():
    z = dict(model()(batch("shared query")))
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0.*got -0.1"):
        JointEntropyLoss(temperature=torch.tensor(-0.1))(z)
    for value in (math.nan, 0.0, math.inf):
        with pytest.raises(ValueError, match="temperature: expected"):
            JointEntropyLoss(temperature=nn.Parameter(torch.tensor(value)))(z)


def test_a_row_of_zeros_in_half_precision_has_a_finite_gradient():
    for dtype in (torch.float16, torch.bfloat16):
        for family in ("simclr", "vicreg", "barlow", "mmcr", "frossl"):
            g = torch.Generator().manual_seed(0)
            z = {n: torch.randn(3, 8, d, generator=g).to(dtype) for n, d in SPACES.items()}
            z["color"][:, 0] = 0
            z["content"][1, 2] = torch.finfo(dtype).smallest_normal / 8  # subnormal: no direction either
            z = {n: t.requires_grad_() for n, t in z.items()}
            JointEntropyLoss(family)(z).backward()
            assert all(t.grad.isfinite().all() and t.grad.abs().max() < 100 for t in z.values()), (family, dtype)
