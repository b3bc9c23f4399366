"""Seed, call and rank of the views are state: nested, saved in any format, restored, moved and pickled."""

import copy
import io
import multiprocessing
import os
import pickle
import types
import warnings

import kornia.augmentation as K
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ssd_addon import JointEntropyLoss, StructuredViews
from ssd_addon.augment import views as views_module

COLOR = "0.ColorJitter"


def make(seed=1, **options):
    return StructuredViews({"color": [K.ColorJitter(hue=0.1)]}, seed=seed, **options)


def nested(seed):
    return nn.ModuleDict({"step": nn.ModuleDict({"views": make(seed)}), "net": nn.Linear(2, 2)})


def images(b=4):
    return torch.rand(b, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def ran(calls=3):
    module = nested(1)
    for _ in range(calls):
        module["step"]["views"](images())
    return module


def through(kind, state):
    """A state dict as a file holds it."""
    if kind == "memory":
        return state
    if kind == "safetensors":
        return safetensors.torch.load(safetensors.torch.save(state))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", ["memory", "weights_only", "safetensors"])
def test_a_surrounding_module_saves_and_restores_seed_and_call(kind):
    module = ran()
    other = nested(2)
    other.load_state_dict(through(kind, module.state_dict()))
    views = other["step"]["views"]
    assert (views.seed, views.call) == (1, 3)
    assert torch.equal(views(images()).views, module["step"]["views"](images()).views)


def test_views_alone_are_saved_and_restored():
    views = make()
    views(images())
    other = make(9)
    other.load_state_dict(through("weights_only", views.state_dict()))
    assert (other.seed, other.call) == (1, 1)


def test_files_of_before_are_read():
    views = make(9)
    views.load_state_dict({"seed": 5, "call": 7})  # how version 0.1.0 stored views alone
    assert (views.seed, views.call) == (5, 7)


def test_a_module_saved_without_the_state_loads_with_a_warning():
    old = {k: t for k, t in ran().state_dict().items() if "_extra_state" not in k}
    other = nested(2)
    with pytest.warns(
        RuntimeWarning, match=r"StructuredViews is not in this checkpoint: .* under 'step.views._extra_state'"
    ):
        assert not other.load_state_dict(old).missing_keys
    assert other["step"]["views"].seed == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nested(3).load_state_dict(ran().state_dict())


@pytest.mark.parametrize("state", [torch.zeros(3), {"seed": 1}, None, "1"])
def test_another_state_is_refused(state):
    with pytest.raises(ValueError, match="StructuredViews state: expected a tensor"):
        make().load_state_dict({"_extra_state": state})


def test_an_average_of_weights_may_hold_views():
    module = ran()
    average = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    average.update_parameters(module)
    assert average.module["step"]["views"].call == 3


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_seed_that_cannot_be_saved_is_refused(seed):
    with pytest.raises(ValueError, match="seed: expected a whole number of 64 bits"):
        make(seed)


def test_interleaved_batches_of_one_image_serve_every_space_in_turn():
    views = make(0, plan="interleaved")
    served = []
    for _ in range(6):
        batch = views(images(1))
        hue = [p["color"][COLOR]["hue_factor"] for p in batch.parameters]
        assert torch.equal(hue[0], hue[1]) == bool(batch.space_index == 1)
        served.append(int(batch.space_index))
        for family in ("simclr", "vicreg"):
            pairs = batch.plan.pairs(1, batch.space_index)
            assert len(pairs["color"][2]) == served[-1] and family in JointEntropyLoss(family).family
    assert served == [0, 1, 0, 1, 0, 1]


def test_the_space_of_a_row_rotates_with_the_calls():
    views = make(0, plan="interleaved")
    assert [views(images(5)).space_index.tolist() for _ in range(3)] == [
        [0, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
        [0, 1, 0, 1, 0],
    ]


def test_a_spawned_worker_knows_the_rank_of_the_process_that_made_it(monkeypatch):
    views = make()
    monkeypatch.setenv("RANK", "3")
    there = pickle.dumps(views)
    monkeypatch.delenv("RANK")
    assert pickle.loads(there).rank == 3 and views.rank == 0


def test_copies_of_data_parallel_which_would_draw_the_same_views_at_every_call_are_refused():
    """Replicated as nn.DataParallel does with every part of a module; it runs on several CUDA devices alone."""
    module = nn.Sequential(StructuredViews({}, seed=0))
    with pytest.raises(TypeError, match="got nn.DataParallel, whose copies would draw the same views"):
        for part in module.modules():
            part._replicate_for_data_parallel()


def test_a_copy_knows_its_own_rank_where_it_has_one(monkeypatch):
    """Views that were made before the processes are, as for torch.multiprocessing.spawn."""
    views = make()
    copies = [pickle.loads(pickle.dumps(views)), copy.deepcopy(views)]
    for made in copies:
        monkeypatch.setenv("RANK", "2")
        assert made.rank == 2
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
        assert made.rank == 5
        monkeypatch.undo()
        assert made.rank == 0
    chosen = pickle.loads(pickle.dumps(make(rank=7)))
    monkeypatch.setenv("RANK", "2")
    assert chosen.rank == 7


@pytest.mark.parametrize(
    "warned,parent,imported,environment,copied",
    [
        (True, "SpawnProcess-2", True, {}, False),
        (False, "MainProcess", True, {}, False),  # one process, or ranks that torchrun or a shell has started
        (False, "SpawnProcess-2", False, {}, False),  # forked, with the process group of its parent
        (False, "SpawnProcess-2", True, {"RANK": "0"}, False),
        (False, "SpawnProcess-2", True, {}, True),  # sent to the worker
    ],
)
def test_a_worker_that_imports_the_views_anew_warns_that_it_has_no_rank(
    warned, parent, imported, environment, copied, monkeypatch
):
    made = pickle.loads(pickle.dumps(make())) if copied else make()
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(views_module, "get_worker_info", lambda: types.SimpleNamespace(id=0, seed=0))
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: types.SimpleNamespace(name=parent))
    monkeypatch.setattr(views_module, "_IMPORTED_BY", os.getpid() + (not imported))
    views_module._warn_of_ranks.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert made.rank == made.rank == 0
    assert len(found) == warned
    if warned:
        assert "expected the rank of SpawnProcess-2" in str(found[0].message)
        assert "an attribute of the data set" in str(found[0].message)


MODULE = make()


class Referring(Dataset):
    """Refers to views of its module, or has them as an attribute."""

    def __init__(self, views=None):
        self.views = views

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return (self.views or MODULE).rank


def as_a_rank(_, own):
    data = Referring(make() if own else None)
    print("ranks", [int(r) for r in DataLoader(data, num_workers=1)], flush=True)


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
def test_workers_of_a_spawned_process_warn_if_they_import_the_views(own, capfd):
    torch.multiprocessing.spawn(as_a_rank, (own,), nprocs=1)
    printed = capfd.readouterr()
    assert "ranks [0]" in printed.out
    assert ("expected the rank of SpawnProcess-" in printed.err) != own
