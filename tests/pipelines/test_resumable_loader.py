"""`ResumableLoader`: which images and draws an epoch has, in Lightning's trainings and after resuming."""

import copy
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning_modules import ADVICE, Images, differences, module, resumable, trained, trainer
from torch.utils.data import IterableDataset

from ssd_addon.runs import ResumableLoader, sampler

pytestmark = ADVICE


def orders(body=()):
    """(epoch, labels) of every batch of a training."""
    seen = []

    def step(self, batch, index):
        labels = {k: b[1].tolist() for k, b in batch.items()} if isinstance(batch, dict) else batch[1].tolist()
        seen.append((self.trainer.current_epoch, labels))
        return self.structured_step(batch).loss

    return {"training_step": step, **dict(body)}, seen


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in `LightningModule`")
@pytest.mark.parametrize("module_of_data", [False, True])
def test_a_loader_that_is_made_anew_goes_on_with_the_epochs(module_of_data):
    body, seen = orders()
    if module_of_data:
        data = pl.LightningDataModule()
        data.train_dataloader = resumable
        made = trainer(max_epochs=1)
        mine = module(body=body)
        for epochs in (1, 2, 3):
            made.fit_loop.max_epochs = epochs
            made.fit(mine, data)
    else:
        made = trainer(max_epochs=3, reload_dataloaders_every_n_epochs=1)
        made.fit(module(body={**body, "train_dataloader": lambda self: resumable()}))
    again = resumable()
    assert [labels for _, labels in seen] == [labels.tolist() for _ in range(3) for _, labels in again]


@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_an_epoch_that_is_cut_short_is_over(step, tmp_path):
    body, seen = orders()
    options = {"body": body, "limit_train_batches": 3}
    whole = trained(tmp_path / "a", resumable(), **options)
    first = list(seen)
    seen.clear()
    again = trained(tmp_path / "b", resumable(), tmp_path / "a" / f"step={step}.ckpt", **options)
    assert seen == first[step:] and len(first) == 9 and not differences(whole, again)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_shorter_loader_beside_a_longer_one(step, tmp_path):
    """It begins again within the epoch, and where the next epoch begins."""

    def data():
        return {"plain": resumable(), "other": ResumableLoader(Images(6), batch_size=2, shuffle=True, seed=2)}

    body, seen = orders({"image_key": "plain"})
    whole = trained(tmp_path / "a", data(), body=body)
    first = list(seen)
    seen.clear()
    again = trained(tmp_path / "b", data(), tmp_path / "a" / f"step={step}.ckpt", body=body)
    assert seen == first[step:] and len(first) == 12 and not differences(whole, again)


def test_an_epoch_is_not_resumed_with_other_batches():
    options = {"batch_size": 3, "shuffle": True, "seed": 1}
    data = ResumableLoader(Images(), **options)
    next(iter(data))
    for change, got in (({"seed": 2}, "seed 1, here 2"), ({"batch_size": 4}, "batch_size 3, here 4; length 4, here 3")):
        other = ResumableLoader(Images(), **options | change)
        other.load_state_dict(data.state_dict())
        with pytest.raises(ValueError, match=f"after 1 batches, as other images .* got {got}"):
            next(iter(other))
        other.set_epoch(5)  # without a number before it, this is the resumed epoch
        list(data)
        other.load_state_dict(data.state_dict())
        assert next(iter(other))[1].tolist()  # at its end an epoch may be followed by another kind
        data.load_state_dict({"epoch": 0, "batches": 1})


class Random(Images):
    """Images with noise from every global generator."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, label, float(torch.rand(())) + random.random() + float(np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 1])
def test_draws_of_the_data_set_depend_on_the_epoch_and_the_batch(workers):
    def noise(loader):
        return [n.tolist() for *_, n in loader]

    def loader():
        return ResumableLoader(Random(), batch_size=3, seed=1, num_workers=workers)

    torch.manual_seed(0)
    data = loader()
    first, second = noise(data), noise(data)
    assert first != second and len({str(n) for n in (*first, *second)}) == 8
    if workers:  # a worker's own draws go on from batch to batch
        assert noise(loader()) == first
        return
    torch.manual_seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    again = loader()
    again.load_state_dict({"epoch": 1, "batches": 2})
    assert noise(again) == second[2:]
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_ranks_without_workers_draw_differently(monkeypatch):
    def noise():
        return [n.tolist() for *_, n in ResumableLoader(Random(), batch_size=3, seed=1)]

    first = noise()
    monkeypatch.setattr(sampler, "_rank", lambda: 1)
    assert not {str(n) for n in first} & {str(n) for n in noise()}


def test_the_epoch_is_told_through_any_sampler():
    class Own(torch.utils.data.SequentialSampler):
        epochs = ()

        def set_epoch(self, epoch):
            self.epochs = (*self.epochs, epoch)

    own = Own(range(6))
    data = ResumableLoader(range(6), batch_size=2, sampler=own)
    own.set_epoch(4)
    assert own.epochs == (4,) and len(list(data)) == 3 and data.epoch == 4
    own.set_epoch(2)  # a training of its own: epochs go on
    assert len(list(data)) == 3 and data.epoch == 5
    grouped = ResumableLoader(range(6), batch_sampler=torch.utils.data.BatchSampler(own, 2, drop_last=False))
    own.set_epoch(7)
    assert own.epochs[-1] == 7 and len(list(grouped)) == 3 and grouped.epoch == 7
    copied = copy.deepcopy(grouped)
    copied.batch_sampler.sampler.set_epoch(9)
    assert len(list(copied)) == 3 and copied.epoch == 9 and grouped.epoch == 7
    for _ in range(3):  # one sampler of several loaders in turn
        last = ResumableLoader(range(6), batch_size=2, sampler=own)
    assert own.set_epoch.args == (last, Own.set_epoch.__get__(own))
    own.set_epoch(8)
    assert last.epoch == 7 and grouped.epoch == 7 and own.epochs[-1] == 8


def test_a_resumable_loader_refuses_what_no_state_holds():
    for options in ({"generator": torch.Generator()}, {"persistent_workers": True, "num_workers": 1}):
        with pytest.raises(ValueError, match="ResumableLoader: expected"):
            ResumableLoader(Images(), **options)
    with pytest.raises(ValueError, match="got an iterable data set"):
        ResumableLoader(type("Stream", (IterableDataset,), {"__iter__": lambda self: iter([])})())


def test_a_resumable_loader_begins_anew_where_an_epoch_was_left():
    data = resumable()
    iter(data)  # never begun: not an epoch
    first = next(iter(data))[1].tolist()
    second = [labels.tolist() for _, labels in data]
    assert len(second) == len(data) == 4
    assert data.state_dict() == {
        "epoch": 1, "batches": 4, "trainer_epoch": None, "seed": 1, "batch_size": 3, "length": 4
    }  # fmt: skip
    before, again = [labels.tolist() for _, labels in resumable()], resumable()
    assert [labels.tolist() for _, labels in again] == [first, *before[1:]]
    assert [labels.tolist() for _, labels in again] == second != before
    assert [labels.tolist() for _, labels in ResumableLoader(Images(), batch_size=3, shuffle=True, seed=2)] != before
    third = resumable()
    third.load_state_dict({"epoch": 1, "batches": 2})
    rest = iter(third)
    assert next(rest)[1].tolist() == second[2] and len(third) == 4


def test_samplers_that_take_no_epoch_or_have_no_length():
    class Slots(torch.utils.data.Sampler):
        __slots__ = ()

        def __iter__(self):
            return iter([3, 1, 2, 0])

    for sampler_of, expected in (([3, 1, 2], [[3, 1], [2]]), (Slots(), [[3, 1], [2, 0]])):
        data = ResumableLoader(range(6), batch_size=2, sampler=sampler_of)
        first = iter(data)
        assert [next(first).tolist()] == expected[:1]
        again = ResumableLoader(range(6), batch_size=2, sampler=sampler_of)
        again.load_state_dict(data.state_dict())
        assert [b.tolist() for b in again] == expected[1:]


def test_an_earlier_epoch_does_not_undo_a_resumed_one():
    """Fabric counts epochs from 0 in each process."""
    data = ResumableLoader(range(8), batch_size=2, shuffle=True, seed=1)
    data.set_epoch(3)
    whole = [b.tolist() for b in data]
    again = ResumableLoader(range(8), batch_size=2, shuffle=True, seed=1)
    again.load_state_dict(data.state_dict() | {"batches": 1})
    again.set_epoch(0)
    assert [b.tolist() for b in again] == whole[1:] and again.epoch == 3
