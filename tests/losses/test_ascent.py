"""DualAscent: lambda by the oracle, held by the criterion, whole through types, averages, files and copies."""

import copy
import io
import pickle

import pytest
import reference
import safetensors.torch
import torch
from torch import nn

from ssd_addon import DualAscent, Embeddings, JointEntropyLoss, ViewPlan
from ssd_addon.losses import FixedWeights

WIDTHS = {"content": 4, "color": 3, "spatial": 2}
SPACES = tuple(WIDTHS)


def embeddings(plan=None, b=6, widths=WIDTHS, seed=0, dtype=torch.float64, **more):
    plan = plan or ViewPlan.shared_query(tuple(widths))
    g = torch.Generator().manual_seed(seed)
    z = {n: torch.randn(plan.num_views, b, d, generator=g, dtype=torch.float64).to(dtype) for n, d in widths.items()}
    return Embeddings(z, plan, **more)


def rising(family="simclr", spaces=SPACES, **options):
    options = {"tolerance": 0.0, "step_size": 0.001, **options}
    return JointEntropyLoss(family, weights=DualAscent(spaces, **options))


def lambdas(criterion, spaces=SPACES):
    return torch.stack([torch.as_tensor(w) for w in criterion.lambdas(ViewPlan.shared_query(spaces)).values()])


def test_lambda_equals_the_oracle():
    z, lam = embeddings(), {"content": 2.0, "color": 1.0, "spatial": 0.01}
    tolerance = {"content": 0.1, "color": 3.0, "spatial": 2.5}
    criterion = rising(start=lam, tolerance=tolerance, step_size=0.5)
    for _ in range(3):
        terms = criterion.terms(z)
        want = reference.joint_entropy_loss(z, family="simclr", weights=lam)
        assert terms.loss.item() == pytest.approx(want.loss.item(), rel=1e-9)
        got = criterion.weights.step(terms)
        for name, allowed in tolerance.items():
            moved = reference.dual_ascent(
                {name: lam[name]}, {name: want.constraint[name].detach()}, tolerance=allowed, step_size=0.5
            )
            lam[name] = float(moved[name])
            assert got[name].item() == pytest.approx(lam[name], rel=1e-9, abs=1e-12)
    assert lam["spatial"] == 0.0  # relu


@pytest.mark.parametrize("family,weight", [("simclr", 1.0), ("vicreg", 25.0), ("barlow", 1.0), ("sigreg", 4.75)])
def test_it_starts_at_the_familys_weight_unless_told(family, weight):
    assert lambdas(rising(family)).tolist() == [weight] * 3
    assert lambdas(rising(family, start=0.5)).tolist() == [0.5] * 3
    by_name = {"spatial": 3.0, "content": 1.0, "color": 2.0}
    assert lambdas(rising(family, start=by_name)).tolist() == [1.0, 2.0, 3.0]


def test_it_warms_up_and_leaves_a_space_without_a_row():
    z = embeddings(ViewPlan.interleaved(SPACES), 4, space_index=torch.tensor([0, 0, 1, 1]))
    criterion = rising("vicreg", step_size=1.0, warmup_steps=1)
    assert [w.item() for w in criterion.weights.step(criterion.terms(z)).values()] == [25.0] * 3
    after = criterion.weights.step(criterion.terms(z))
    assert after["content"] > 25 and after["color"] > 25 and after["spatial"] == 25


def test_the_criterion_holds_it_once():
    criterion = rising()
    terms = criterion.terms(embeddings())
    before = criterion.terms(embeddings()).loss
    criterion.weights.step(terms)
    assert criterion(embeddings()) != before
    state = criterion.state_dict()
    values = [k for k, t in state.items() if t.shape == (3,) and t.is_floating_point()]
    assert values == ["weights.values"] and not list(criterion.parameters())
    assert rising()(embeddings(dtype=torch.float32)).dtype == torch.float32


def through(kind, state):
    if kind == "pickle":
        return pickle.loads(pickle.dumps(state))
    if kind == "safetensors":
        return safetensors.torch.load(safetensors.torch.save(dict(state)))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", ["pickle", "safetensors", "weights_only"])
def test_files_keep_it(kind):
    criterion = rising(warmup_steps=2, step_size=0.3)
    for _ in range(3):
        criterion.weights.step(criterion.terms(embeddings()))
    other = rising(warmup_steps=2, step_size=0.3, start=9.0)
    other.load_state_dict(through(kind, criterion.state_dict()))
    assert torch.equal(lambdas(other), lambdas(criterion)) and int(other.weights.steps) == 3


def test_it_is_never_read_under_other_names():
    state = rising().state_dict()
    for spaces in (("content", "spatial", "color"), ("content", "color", "blur")):
        with pytest.raises(
            ValueError, match="expected the state of an ascent over the spaces content, .* in this order"
        ):
            rising(spaces=spaces).load_state_dict(state)


@pytest.mark.parametrize("strict", [True, False])
def test_what_cannot_be_read_changes_nothing(strict):
    moved = rising(start=9.0).state_dict()
    nameless = {k: v for k, v in moved.items() if not k.endswith("_extra_state")}
    for state in (nameless, rising(spaces=("content", "spatial", "color"), start=9.0).state_dict()):
        criterion = rising(start=2.0)
        with pytest.raises(ValueError, match=r"got one (without names|over other spaces)"):
            criterion.load_state_dict(state, strict=strict)
        assert lambdas(criterion).tolist() == [2.0] * 3


def test_a_state_that_was_cast_is_read_in_full_precision():
    state = {k: t.bfloat16() if t.is_floating_point() else t for k, t in rising(start=9.0).state_dict().items()}
    criterion = rising()
    criterion.load_state_dict(state, assign=True)
    assert lambdas(criterion).dtype == torch.float64 and lambdas(criterion).tolist() == [9.0] * 3


@pytest.mark.parametrize(
    "cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float()]
)
def test_it_goes_on_rising_in_half_precision(cast):
    criterion = nn.ModuleDict({"c": rising("vicreg")})  # from 25 by about 0.001: below the resolution of bfloat16
    z = embeddings(dtype=torch.float32)
    criterion["c"].weights.step(criterion["c"].terms(z))
    before = lambdas(criterion["c"])
    criterion = cast(criterion)
    assert torch.equal(lambdas(criterion["c"]), before) and before.dtype == torch.float64
    for _ in range(100):
        criterion["c"].weights.step(criterion["c"].terms(z))
    risen = lambdas(criterion["c"]) - before
    c = torch.stack(list(criterion["c"].terms(z).constraint.values())).double()
    torch.testing.assert_close(risen, 0.1 * c, rtol=1e-6, atol=0)


@pytest.mark.parametrize("whole", [True, False])
def test_an_average_with_buffers_follows(whole):
    criterion = rising(step_size=0.1)
    module = criterion if whole else criterion.weights
    average = torch.optim.swa_utils.AveragedModel(module, use_buffers=True, avg_fn=lambda a, b, n: 0.5 * a + 0.5 * b)
    average.update_parameters(module)
    first = lambdas(criterion).clone()
    criterion.weights.step(criterion.terms(embeddings()))
    average.update_parameters(module)
    held = average.module.weights if whole else average.module
    torch.testing.assert_close(held.values, 0.5 * first + 0.5 * lambdas(criterion))


def test_a_copy_goes_its_own_way():
    criterion = rising(step_size=0.1)
    other = copy.deepcopy(criterion)
    criterion.weights.step(criterion.terms(embeddings()))
    assert lambdas(other).tolist() == [1.0] * 3 and lambdas(criterion)[0] > 1


def test_stepping_reads_nothing_back_from_the_device():
    """`.item()` and its kin would wait for the device: none is called on the way of a step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += "local_scalar_dense" in str(func)
            return func(*args, **(kwargs or {}))

    criterion = rising(warmup_steps=1)
    terms = criterion.terms(embeddings())
    with Reads() as reads:
        criterion.weights.step(terms)
    assert reads.count == 0


def test_another_plan_is_refused():
    criterion = rising()
    with pytest.raises(ValueError, match="weights: expected the spaces content, color, spatial of the dual ascent"):
        criterion(embeddings(widths={"content": 3, "color": 2}))
    with pytest.raises(ValueError, match="terms: expected the spaces content, color, spatial of the dual ascent"):
        criterion.weights.step(JointEntropyLoss().terms(embeddings(widths={"content": 3, "color": 2})))
    order = embeddings(ViewPlan.shared_query(("content", "spatial", "color")))
    assert criterion.terms(order).loss == JointEntropyLoss().terms(order).loss  # matched by name


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"tolerance": -1}, ValueError, "tolerance: expected .* got -1"),
        ({"tolerance": {"content": 1.0}}, ValueError, "tolerance: expected the spaces.*missing: color, spatial"),
        ({"step_size": 0}, ValueError, "step_size: expected .* got 0"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps: expected a whole number, 0 or more: got -1"),
        ({"warmup_steps": True}, ValueError, "warmup_steps"),
        ({"start": -0.5}, ValueError, "start: expected .* got -0.5"),
        ({"start": {"content": 1.0, "colour": 1.0, "spatial": 1.0}}, ValueError, "start: .*missing: color"),
        ({"spaces": ("color", "content")}, ValueError, "expected 'content' as the first space"),
        ({"spaces": "content"}, TypeError, "DualAscent: expected a sequence of space names"),
        ({"spaces": JointEntropyLoss()}, TypeError, r"JointEntropyLoss\(weights=DualAscent\(spaces, ...\)\)"),
    ],
)
def test_bad_arguments(options, error, message):
    given = {"spaces": SPACES, "tolerance": 0.1, "step_size": 0.1} | options
    with pytest.raises(error, match=message):
        DualAscent(given.pop("spaces"), **given)


def test_fixed_weights_are_stepped_without_effect():
    criterion = JointEntropyLoss(weights={"content": 2.0, "color": 1.0, "spatial": 0.5})
    terms = criterion.terms(embeddings())
    assert criterion.weights.step(terms) == {"content": 2.0, "color": 1.0, "spatial": 0.5}
    assert criterion(embeddings()) == terms.loss and isinstance(criterion.weights, FixedWeights)


def test_terms_hold_the_weights_that_adapt():
    z = {n: torch.randn(3, 16, 4) for n in ("content", "color")}
    criterion = JointEntropyLoss(weights=DualAscent(("content", "color"), tolerance=0.0, step_size=1.0, start=2.0))
    first = criterion.terms(z)
    criterion.weights.step(first)
    second = criterion.terms(z)
    assert first.scalars()["lambda/content"] == 2.0 < second.scalars()["lambda/content"]
    assert type(first).mean([first, second]).scalars()["lambda/color"] == second.scalars()["lambda/color"]
    assert not any(name.startswith("lambda/") for name in JointEntropyLoss().terms(z).scalars())


def test_a_step_that_is_not_finite_moves_no_weight():
    ascent = DualAscent(("content", "color"), tolerance=0.0, step_size=1.0, start=2.0)
    z = {n: torch.randn(3, 16, 4) for n in ("content", "color")}
    criterion = JointEntropyLoss(weights=ascent, validate=False)
    broken = criterion.terms({**z, "color": torch.full((3, 16, 4), torch.nan)})
    ascent.step(broken)
    values = ascent.lambdas(("content", "color"))
    assert all(w.isfinite() for w in values.values())
    ascent.step(criterion.terms(z))
    assert all(w > 2.0 for w in ascent.lambdas(("content", "color")).values())
