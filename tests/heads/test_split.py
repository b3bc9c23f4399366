"""Every head has weights of its own: optimizers that go by parameter, and files of when they were stacked."""

import copy

import pytest
import torch
import torch.distributed as dist
from old_heads import stacked
from timm.optim import Lars
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ssd_addon import StyleHeads, runs

SPACES = {"content": 7, "color": 3, "a.b%2E": 5}
MIXED = {"content": (12, 10), "color": (8,), "a.b%2E": (12, 10)}
VERSIONS = [(norm, hidden) for norm in ("batch", "layer", None) for hidden in ((12, 10), (), MIXED)]


class Small(nn.Module):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.norm(self.conv(x))


def model(seed=0, **options):
    torch.manual_seed(seed)
    made = StyleHeads(Small(), SPACES, **({"hidden": (12, 10)} | options))
    if seed:
        made(torch.randn(4, 3, 8, 8))  # statistics and their count
    return made


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())


class Inside(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.model = inner


# ---- optimizers


@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_the_trust_ratio_of_a_head_is_that_of_the_head_trained_alone(norm):
    heads = StyleHeads.heads(6, {"content": 7, "color": 3}, hidden=(12, 10), norm=norm)
    x = torch.randn(16, 6)
    alone = {n: heads.head(n) for n in heads.spaces}
    scales = {"content": 1.0, "color": 1e-4}

    def stepped(module, loss):
        optimizer = Lars(module.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-6, always_adapt=True)
        loss.backward()
        optimizer.step()

    stepped(heads, sum(scales[n] * z.square().mean() for n, z in heads(x).items()))
    for n, head in alone.items():
        before = copy.deepcopy(head.state_dict())
        stepped(head, scales[n] * head(x).square().mean())
        for k, t in heads.head(n).state_dict().items():
            torch.testing.assert_close(t, head.state_dict()[k], rtol=1e-5, atol=1e-7)
        assert not torch.equal(before["0.weight"], head[0].weight)


def test_muon_trains_all_matrices_of_a_resnet_with_heads():
    torchvision = pytest.importorskip("torchvision")
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    m = StyleHeads(torchvision.models.resnet18(weights=None), {"content": 8, "color": 4}, hidden=(16, 12))
    matrices = [p for p in m.parameters() if p.ndim == 2]
    others = [p for p in m.parameters() if p.ndim != 2]
    optimizers = [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-3)]
    before = [p.detach().clone() for p in m.parameters()]
    sum(z.square().mean() for z in m(torch.randn(4, 3, 32, 32)).values()).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert len(matrices) == 2 * 3 and {p.ndim for p in others} == {1, 4}
    moved = [not torch.equal(a, b) for a, b in zip(before, m.parameters(), strict=True) if a.ndim == 2]
    assert all(moved)


@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_no_parameter_belongs_to_two_heads(norm):
    m = model(norm=norm, hidden=(12, 10, 9))
    for place, p in m.projections.named_parameters():
        assert p.ndim == (2 if "linears" in place and place.endswith("weight") else 1)
        others = [z for n, z in m.project(torch.randn(4, 6)).items() if m.projections.key(n) not in place]
        found = torch.autograd.grad(sum(z.sum() for z in others), p, allow_unused=True)
        assert found == (None,), place


def test_a_seed_gives_every_head_the_weights_that_it_gave_when_they_were_stacked():
    """Drawn layer by layer for all heads."""
    heads = model(hidden=(12, 10)).projections
    torch.manual_seed(0)
    Small()
    first = nn.Linear(6, 3 * 12, bias=False)
    second, last = [nn.Linear(12, 10, bias=False) for _ in SPACES], [nn.Linear(10, d) for d in SPACES.values()]
    for k, n in enumerate(SPACES):
        head = heads.head(n)
        assert torch.equal(head[0].weight, first.weight[12 * k : 12 * (k + 1)])
        assert torch.equal(head[3].weight, second[k].weight) and torch.equal(head[6].bias, last[k].bias)


# ---- files of when the weights were stacked


@pytest.mark.parametrize("norm,hidden", VERSIONS)
def test_stacked_weights_load_into_every_wrapper(norm, hidden, tmp_path):
    made = model(1, norm=norm, hidden=hidden)
    old = stacked(made)
    assert not any("projections" in k for k in old) and any(t.ndim == 3 for t in old.values()) == (hidden != ())

    plain = model(norm=norm, hidden=hidden)
    plain.load_state_dict(old, strict=True)
    inside = Inside(model(norm=norm, hidden=hidden))
    inside.load_state_dict(stacked(made, "model."), strict=True)
    average = AveragedModel(model(norm=norm, hidden=hidden))
    average.load_state_dict(stacked(made, "module.") | {"n_averaged": torch.ones((), dtype=torch.long)}, strict=True)
    restored = model(norm=norm, hidden=hidden)
    restored.restore(made.config(), stacked(made, "module._orig_mod."))
    torch.save({"config": made.config(), "state_dict": stacked(made)}, tmp_path / "old.pt")
    opened = StyleHeads.load(tmp_path / "old.pt", Small())
    for loaded in (plain, inside.model, average.module, restored, opened):
        assert same(loaded, made)
    opened.save(tmp_path / "new.pt")
    written = torch.load(tmp_path / "new.pt", weights_only=True)["state_dict"]
    assert written.keys() == made.state_dict().keys() and not any("stacks" in k for k in written)


def test_stacked_weights_load_into_a_distributed_model():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        made, wrapped = model(1), DistributedDataParallel(model())
        wrapped.load_state_dict(stacked(made, "module."), strict=True)
        assert same(wrapped.module, made)
    finally:
        dist.destroy_process_group()


def test_stacked_weights_of_heads_alone_load_into_them():
    torch.manual_seed(1)
    made = StyleHeads.heads(6, SPACES, hidden=MIXED)
    made(torch.randn(5, 6))
    plain, inside = StyleHeads.heads(6, SPACES, hidden=MIXED), Inside(StyleHeads.heads(6, SPACES, hidden=MIXED))
    plain.load_state_dict(stacked(made))
    inside.load_state_dict(stacked(made, "model."))
    assert same(plain, made) and same(inside.model, made)


def test_parts_of_loaded_weights_share_no_memory():
    made, fresh = model(1), model()
    fresh.load_state_dict(stacked(made), assign=True)
    places = {p.untyped_storage().data_ptr() for p in fresh.projections.parameters()}
    assert len(places) == len(list(fresh.projections.parameters()))


def test_stacked_weights_of_another_form_are_refused_and_nothing_is_changed():
    made, other = model(1), model()
    before = copy.deepcopy(other)
    for state, message in (
        ({k: t for k, t in stacked(made).items() if "products" not in k}, "Missing key.*linears.1.weight"),
        (
            stacked(made) | {"stacks.0.products.0": torch.zeros(2, 10, 12)},
            "Missing key.*Unexpected key.*products.0",
        ),
        (stacked(made) | {"stacks.0.first.weight": torch.zeros(39, 6)}, "size mismatch.*linears.0.weight"),
        (stacked(made) | {"stacks.1.last.0.weight": torch.zeros(2, 3)}, "Unexpected key.*stacks.1.last"),
    ):
        with pytest.raises(ValueError, match=f"(?s)another backbone.*{message}"):
            other.restore(made.config(), state)
        assert same(other, before)


def test_a_backbone_with_stacks_of_its_own_is_left_alone(tmp_path):
    class Stacks(nn.Module):
        num_features = 6

        def __init__(self):
            super().__init__()
            self.stacks = nn.ModuleList([nn.ModuleDict({"last": nn.ModuleList([nn.Conv2d(3, 6, 3)])})])

        def forward(self, x):
            return self.stacks[0]["last"][0](x)

    made, other = (StyleHeads(Stacks(), {"content": 4}, hidden=(5,)) for _ in range(2))
    other.restore(made.config(), made.state_dict())
    assert same(other, made)
    other = StyleHeads(Stacks(), {"content": 4}, hidden=(5,))
    other.restore(made.config(), stacked(made, "module."))
    assert same(other, made)
    parts = {"optimizer": torch.optim.SGD(made.parameters(), lr=0.1)}
    runs.save_run(tmp_path / "checkpoint.pt", made, parts=parts, card={}, config={})
    runs.restore_run(tmp_path / "checkpoint.pt", made, parts=parts, config={})


@pytest.mark.parametrize("spaces", [{"content": 7}, {"content": 7, "color": 3}])
def test_an_optimizer_of_stacked_weights_is_refused(spaces, tmp_path):
    """With one space there are as many parameters as before, and an optimizer would take the state in silence."""
    made = StyleHeads(Small(), spaces, hidden=(12, 10))
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9)
    probe = nn.Linear(6, 2)
    parts = {"probe_optimizer": torch.optim.SGD(probe.parameters(), lr=0.1), "optimizer": optimizer}
    path = tmp_path / "checkpoint.pt"
    runs.save_run(path, made, parts=parts, card={}, config={})
    content = torch.load(path, weights_only=True) | {"model": stacked(made)}
    torch.save(content, path)
    fresh = StyleHeads(Small(), spaces, hidden=(12, 10))
    before = copy.deepcopy(fresh)
    own = {"probe_optimizer": parts["probe_optimizer"]}
    for part in (torch.optim.SGD(fresh.parameters(), lr=0.1), runs.whole_optimizer(fresh, optimizer_of(fresh))):
        with pytest.raises(ValueError, match="'optimizer' for the weights of each head: got one of an older version"):
            runs.restore_run(path, fresh, parts=own | {"optimizer": part}, config={})
        assert same(fresh, before)
    runs.restore_run(path, fresh, parts=own, config={})
    assert same(fresh, made)


def optimizer_of(m):
    return torch.optim.SGD(m.parameters(), lr=0.1)
