"""What examples/imagenet.py puts together, on two gloo ranks: loss and gradients are those of one process.

Backbone and heads without batch norm, whose statistics would be of each rank; DDP and FSDP2, the three families, both
plans, cross-image keys, accumulated batches, the equivariance term with its networks. In float64, to 1e-10 of the
largest gradient: ranks only change the order of sums.
"""

import contextlib
import datetime
import itertools
import traceback
import warnings

import kornia.augmentation as K
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ssd_addon import EquivarianceLoss, JointEntropyLoss, StructuredViews, StyleHeads, ViewBatch

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

WORLD, IMAGES = 2, 6
SPACES = {"content": 6, "color": 3, "flip": 4}
FAMILIES = ("simclr", "vicreg", "barlow")
VIEWS = {
    "shared query": {},
    "interleaved": {"plan": "interleaved"},
    "cross-image": {"cross_image": ("color",)},
    "interleaved, cross-image": {"plan": "interleaved", "cross_image": ("color",)},
}
TOLERANCE = 1e-10


class Backbone(nn.Sequential):
    num_features = 8

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 2), nn.ReLU())


def drawer(kind, rank=None):
    groups = {"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0)], "flip": [K.RandomHorizontalFlip()]}
    return StructuredViews(groups, seed=3, rank=rank, **VIEWS[kind])


def batches(kind, accumulate, uneven):
    """Of each rank, `accumulate` batches; the same as those of one process."""
    g = torch.Generator().manual_seed(1)
    parts = []
    for r in range(WORLD):
        views = drawer(kind, r)
        parts.append([views(torch.rand(IMAGES, 3, 10, 10, generator=g)) for _ in range(accumulate)])
    if uneven:
        parts[1] = [batch.rows(slice(0, 4)) for batch in parts[1]]
    parts = [[batch.to(torch.float64) for batch in each] for each in parts]
    return parts, [ViewBatch.cat([each[k] for each in parts]) for k in range(accumulate)]


def made(kind, family, norm, gather):
    torch.manual_seed(0)
    model = StyleHeads(Backbone(), SPACES, hidden=(7, 5), norm=norm).double()
    criterion = JointEntropyLoss(family, gather_distributed=gather)
    equivariance = EquivarianceLoss(
        SPACES, drawer(kind), family=family, weight=0.5, hidden=(5,), gather_distributed=gather
    ).double()
    return model, criterion, equivariance


def trained(model, respond, criterion, each, quiet=None, last=lambda k: None):
    """Loss and terms of accumulated batches, as the loop of imagenet.py takes them."""
    total = torch.zeros((), dtype=torch.float64)
    for k, batch in enumerate(each):
        last(k)
        with quiet() if quiet and k < len(each) - 1 else contextlib.nullcontext():
            z, _ = model(batch, features=True)
            loss = (criterion.terms(z, batch).loss + respond(z, batch)) / len(each)
            loss.backward()
        total += loss.detach()
    return total


def state(model, equivariance):
    named = [*model.named_parameters(), *((f"term.{n}", p) for n, p in equivariance.named_parameters())]
    whole = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in named}
    return whole, dict(equivariance.named_buffers())


def compare(strategy, kind, family, norm, accumulate, uneven, rank):
    parts, whole = batches(kind, accumulate, uneven)
    model, criterion, equivariance = made(kind, family, norm, gather=False)
    loss = trained(model, equivariance, criterion, whole)
    gradients, buffers = state(model, equivariance)

    model, criterion, equivariance = made(kind, family, norm, gather=True)
    respond, mine = DistributedDataParallel(equivariance), parts[rank]
    if strategy == "fsdp":
        wrapped = fully_shard(model)
        last = lambda k: wrapped.set_requires_gradient_sync(k == accumulate - 1)  # noqa: E731
        found = trained(wrapped, respond, criterion, mine, last=last)
    else:
        wrapped = DistributedDataParallel(model)
        found = trained(wrapped, respond, criterion, mine, wrapped.no_sync)
    dist.all_reduce(found)
    got, theirs = state(model, equivariance)
    scale = max(float(g.abs().max()) for g in gradients.values())
    errors = {n: float((got[n] - g).abs().max()) / scale for n, g in gradients.items()}
    errors |= {n: float((theirs[n] - b).abs().max()) for n, b in buffers.items()}
    errors["loss"] = abs(float(found / WORLD - loss)) / abs(float(loss))
    return [f"{n} off by {e:.1e}" for n, e in errors.items() if not e < TOLERANCE]


CASES = [
    (strategy, kind, family, (None, "layer")[i % 2], 1 + (i // 2) % 2, i % 3 == 0)
    for i, (family, kind, strategy) in enumerate(itertools.product(FAMILIES, VIEWS, ("ddp", "fsdp")))
]


def _worker(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store, wait = f"file://{folder}/store", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=wait)
    found = {}
    for i, case in enumerate(CASES):
        try:
            found[i] = compare(*case, rank)
        except Exception:
            found[i] = [traceback.format_exc()]
            raise
        finally:
            torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, crash = tmp_path_factory.mktemp("ranks"), ""
    try:
        mp.spawn(_worker, args=(str(folder),), nprocs=WORLD)
    except Exception as error:  # what each rank saw is in its file
        crash = str(error)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD) if (folder / f"{rank}.pt").exists()], crash


@pytest.mark.parametrize("i", range(len(CASES)), ids=[" ".join(map(str, case)) for case in CASES])
def test_two_ranks_equal_one_process(found, i):
    results, crash = found
    assert len(results) == WORLD, crash
    assert [r.get(i, [f"did not run: {crash[-800:]}"]) for r in results] == [[], []]
