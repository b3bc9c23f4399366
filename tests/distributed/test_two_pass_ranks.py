"""`two_pass` on two gloo ranks: value and gradients are those of one process on the whole batch, in float64.

The families, plans and torch's wrappers, ranks of unequal batches, and how often gradients are averaged. Processes
start once and run all cases; failures come back together.
"""

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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ssd_addon import JointEntropyLoss, StructuredViews, StyleHeads, ViewBatch, two_pass

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

WORLD, CHUNK = 2, 2
SPACES = {"content": 5, "color": 3}
SIZES = {"equal": (5, 5), "unequal": (5, 3)}
PLANS = ("shared_query", "interleaved")
FAMILIES = ("simclr", "vicreg", "barlow", "frossl")


class Backbone(nn.Module):
    """Without batch statistics; with a parameter that nothing uses, or with a buffer, where asked for."""

    num_features = 8

    def __init__(self, idle=False, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2)
        self.idle = nn.Parameter(torch.ones(3)) if idle else None
        self.norm = norm(8) if norm else nn.Identity()

    def forward(self, x):
        return self.norm(self.conv(x)).tanh()


class Inside(nn.Module):
    """A module of a user's around a wrapped one."""

    def __init__(self, model):
        super().__init__()
        self.model = DistributedDataParallel(model)

    def forward(self, batch):
        return self.model(batch)


def make(**options):
    torch.manual_seed(0)
    return StyleHeads(Backbone(**options), SPACES, hidden=()).double()


def batches(plan, sizes):
    """The batch of each rank, and all of them as one."""
    groups = {"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0)]}
    g = torch.Generator().manual_seed(1)
    parts = [
        StructuredViews(groups, seed=3, rank=r, plan=plan)(torch.rand(b, 3, 12, 12, generator=g)).to(torch.float64)
        for r, b in enumerate(sizes)
    ]
    return parts, ViewBatch.cat(parts)


def gradients(model):
    found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def ddp(**options):
    return lambda model: DistributedDataParallel(model, **options)


def sharded(model):
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model.backbone, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {
    "DDP, unused parameters": ddp(find_unused_parameters=True),
    "DDP, buckets": ddp(gradient_as_bucket_view=True, bucket_cap_mb=0.0005),
    "a compiled DDP": lambda m: torch.compile(DistributedDataParallel(m), backend="eager"),
    "DDP inside a module": Inside,
    "FSDP2": sharded,
}


def compare(what, failures, rank, family="simclr", plan="shared_query", sizes="equal", wrap=None, **options):
    """Two steps, whose gradients are added, of a wrapped model and of one process."""
    parts, whole = batches(plan, SIZES[sizes])
    reference, model = make(), (wrap or ddp())(make(**options))
    criterion, gathering = JointEntropyLoss(family), JointEntropyLoss(family, gather_distributed=True)
    for step in range(2):
        loss = criterion(reference(whole))
        loss.backward()
        mine = two_pass(model, parts[rank], gathering, chunk=CHUNK)
        dist.all_reduce(mine)
        want, got = gradients(reference), {n.removeprefix("model.module."): g for n, g in gradients(model).items()}
        got = {n.removeprefix("_orig_mod.module."): g for n, g in got.items()}
        if not torch.allclose(mine / WORLD, loss, rtol=1e-10, atol=0):
            failures.append(f"{what}, step {step}: {float(mine) / WORLD} wanted {float(loss)}")
        size = max(float(w.abs().max()) for w in want.values())
        for n, w in want.items():
            error = float((got[n] - w).abs().max()) / size
            if not error < 1e-10:
                failures.append(f"{what}, step {step}: {n} off by {error:.1e}")


def job_families(rank, failures):
    for family, plan, sizes in itertools.product(FAMILIES, PLANS, SIZES):
        compare(f"{family}, {plan}, {sizes}", failures, rank, family, plan, sizes)


def job_wrappers(rank, failures):
    for (name, wrap), plan in itertools.product(WRAPPERS.items(), PLANS):
        compare(f"{name}, {plan}", failures, rank, plan=plan, wrap=wrap, idle="unused" in name)
        if name != "FSDP2":
            compare(
                f"{name}, {plan}, unequal", failures, rank, plan=plan, sizes="unequal", wrap=wrap, idle="unused" in name
            )


def job_once(rank, failures):
    """Gradients are averaged once in a step, after the last part: as many buckets as a plain backward pass has."""
    for wrap, plan in itertools.product((ddp(bucket_cap_mb=0.0005), Inside), PLANS):
        parts, _ = batches(plan, SIZES["unequal"])
        criterion = JointEntropyLoss(gather_distributed=True)
        counts, model = [], wrap(make())
        inner = model if isinstance(model, DistributedDataParallel) else model.model

        inner.register_comm_hook(counts, counted)
        seen = []
        for step in (plain, plain, by_parts, by_parts):  # torch lays out its buckets anew after the first step
            counts.clear()
            step(model, parts[rank], criterion)
            seen.append(sorted(counts))
        if not seen[1] == seen[2] == seen[3] or not seen[1]:
            failures.append(f"{plan}: buckets {seen}")


def counted(counts, bucket):
    """Average a bucket as DDP does, and note how many parameters are in it."""
    counts.append(len(list(bucket.parameters())))
    return dist.all_reduce(bucket.buffer() / WORLD, async_op=True).get_future().then(lambda f: f.value()[0])


def plain(model, batch, criterion):
    criterion(model(batch)).backward()


def by_parts(model, batch, criterion):
    two_pass(model, batch, criterion, chunk=1)


def job_statistics(rank, failures):
    """Running statistics move once and are rank 0's at the start of a step, as DDP has them without parts."""
    parts, _ = batches("shared_query", SIZES["unequal"])
    criterion = JointEntropyLoss(gather_distributed=True)
    states = []
    for chunk in (None, 5):
        model = DistributedDataParallel(make(norm=nn.BatchNorm2d))
        for _ in range(2):
            if chunk:
                two_pass(model, parts[rank], criterion, chunk=chunk)
            else:
                plain(model, parts[rank], criterion)
        states.append([b.clone() for b in model.buffers()])
    if not all(torch.allclose(a, b) for a, b in zip(*states, strict=True)):
        failures.append(f"buffers {states[1]} wanted {states[0]}")
    two_pass(model, parts[rank], criterion, chunk=CHUNK)  # three parts and two do not wait for each other


def job_refusals(rank, failures):
    """A model that communicates in its forward pass needs as many parts on every rank; both ranks raise the error."""
    parts, _ = batches("shared_query", SIZES["unequal"])
    criterion = JointEntropyLoss(gather_distributed=True)
    for name, model in {"FSDP2": sharded(make()), "SyncBatchNorm": make(norm=nn.SyncBatchNorm)}.items():
        try:
            two_pass(model, parts[rank], criterion, chunk=CHUNK)
            failures.append(f"{name}: no error")
        except ValueError as error:
            if "expected the same number of chunks on every rank" not in str(error) or "got 3, 2" not in str(error):
                failures.append(f"{name}: {error}")
    two_pass(sharded(make()), parts[rank], criterion, chunk=5)  # one part on both
    static = ddp(static_graph=True)(make())
    try:
        two_pass(static, parts[rank], criterion, chunk=CHUNK)
        failures.append("static graph: no error")
    except ValueError as error:
        if "without static_graph=True" not in str(error):
            failures.append(f"static graph: {error}")
    two_pass(static, parts[rank], criterion, chunk=5)


JOBS = {
    "families": job_families,
    "wrappers": job_wrappers,
    "once": job_once,
    "statistics": job_statistics,
    "refusals": job_refusals,
}


def _worker(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {}
    for name, job in JOBS.items():
        found[name] = []
        try:
            job(rank, found[name])
        except Exception:
            found[name].append(traceback.format_exc())
            torch.save(found, f"{folder}/{rank}.pt")
            raise
        torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_pass")
    try:
        mp.spawn(_worker, args=(str(folder),), nprocs=WORLD)
    except Exception as error:  # what each rank saw is in its file
        crash = str(error)
    else:
        crash = ""
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD) if (folder / f"{rank}.pt").exists()], crash


@pytest.mark.parametrize("job", JOBS)
def test_two_ranks_equal_one_process(found, job):
    results, crash = found
    assert len(results) == WORLD, crash
    failures = [f for result in results for f in result.get(job, [f"did not run: {crash[-800:]}"])]
    assert not failures, "\n".join(failures)
