"""Inside torch's wrappers on two gloo ranks: the gradients are those of one process on the whole batch.

DistributedDataParallel in its modes, FSDP2 with its precision policies and torch.compile, for every plan and for
embeddings that a framework rebuilds. Processes start once and run all cases; failures come back together.
"""

import datetime
import itertools
import traceback
import warnings
from pathlib import Path

import kornia.augmentation as K
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from ssd_addon import DualAscent, Embeddings, JointEntropyLoss, StructuredViews, StyleHeads, ViewBatch
from ssd_addon.losses import Family

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

WORLD, IMAGES = 2, 5
SPACES = {"content": 6, "color": 3, "flip": 4}
VIEWS = {
    "shared query": {},
    "interleaved": {"plan": "interleaved"},
    "cross-image": {"cross_image": ("color", "flip")},
    "interleaved, cross-image": {"plan": "interleaved", "cross_image": ("color",)},
}


class Backbone(nn.Module):
    """Without batch statistics, which would be of the rank; with a parameter that nothing uses, where asked for."""

    num_features = 8

    def __init__(self, idle=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2)
        self.idle = nn.Parameter(torch.ones(3)) if idle else None

    def forward(self, x):
        return self.conv(x).relu()


class AsDict(nn.Module):
    """A wrapper of a user's that returns a plain dict."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return dict(self.model(batch))


def make(idle=False):
    torch.manual_seed(0)
    return StyleHeads(Backbone(idle), SPACES, hidden=())


def own_family():
    return Family(
        "mine",
        alignment=lambda a, b: (a - b).abs().mean(1),
        entropy=lambda joint, ids: (
            -torch.stack([(torch.cov(v.T) + 0.1 * torch.eye(v.shape[1])).logdet() for v in joint]).mean()
        ),
    )


def batches(kind):
    """The batch of each rank, and all of them as one."""
    groups = {"color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0)], "flip": [K.RandomHorizontalFlip()]}
    images = torch.rand(WORLD, IMAGES, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    parts = [StructuredViews(groups, seed=3, rank=r, **VIEWS[kind])(images[r]) for r in range(WORLD)]
    return parts, ViewBatch.cat(parts)


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def reference(family, whole):
    model = make()
    JointEntropyLoss(family)(model(whole)).backward()
    return gradients(model)


def ddp(**options):
    def wrap(model):
        return DistributedDataParallel(model, **options)

    return wrap


def sharded(model):
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model.backbone, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_and_cast(model):
    """A policy with an output type rebuilds the output."""
    policy = MixedPrecisionPolicy(output_dtype=torch.float32)
    return fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=policy)


WRAPPERS = {
    "DDP": ddp(),
    "DDP, static graph": ddp(static_graph=True),
    "DDP, unused parameters": ddp(find_unused_parameters=True),
    "DDP, buckets": ddp(gradient_as_bucket_view=True, bucket_cap_mb=1),
    "DDP around a compiled model": lambda m: DistributedDataParallel(torch.compile(m, backend="aot_eager")),
    "a compiled DDP": lambda m: torch.compile(DistributedDataParallel(m), backend="aot_eager"),
    "FSDP2": sharded,
    "FSDP2, output type": sharded_and_cast,
}


def compare(what, wrap, kind, family, failures, rank, *, plain=False, idle=False):
    parts, whole = batches(kind)
    want = reference(family() if callable(family) else family, whole)
    model = make(idle)
    wrapped = wrap(AsDict(model) if plain else model)
    criterion = JointEntropyLoss(family() if callable(family) else family, gather_distributed=True)
    for _ in range(2):  # a static graph is settled by the first step
        model.zero_grad()
        z = wrapped(parts[rank])
        if not plain and (not isinstance(z, Embeddings) or z.plan != parts[rank].plan):
            failures.append(f"{what}: the plan is lost: {z}")
        loss = criterion(z, parts[rank] if plain else None)
        loss.backward()
    got = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients(model).items()}
    size = torch.stack([w.norm() for w in want.values()]).max()
    for n, w in want.items():
        error = float((got[n] - w).norm() / size)
        if not error < 2e-5:
            failures.append(f"{what}: {n} off by {error:.1e}")


def job_wrappers(rank, failures):
    for (name, wrap), kind in itertools.product(WRAPPERS.items(), VIEWS):
        compare(f"{name}, {kind}", wrap, kind, "simclr", failures, rank, idle="unused" in name)
        torch._dynamo.reset()
    for family in ("vicreg", "barlow", "frossl", "mmcr", own_family):
        for kind in VIEWS:
            compare(f"{family}, {kind}", ddp(static_graph=True), kind, family, failures, rank)


def job_plain_dict(rank, failures):
    """With the batch beside it, a dict without a plan is read rightly."""
    for kind in VIEWS:
        compare(f"plain dict, {kind}", ddp(static_graph=True), kind, "simclr", failures, rank, plain=True)


def job_half(rank, failures):
    """bfloat16 weights: views are cast, the output is rebuilt in float32 with its plan."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for kind in VIEWS:
        parts, whole = batches(kind)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
        model = fully_shard(make(), mesh=mesh, mp_policy=policy)
        z = model(parts[rank])
        loss = JointEntropyLoss(gather_distributed=True)(z)
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        want = JointEntropyLoss()(make()(whole)).detach()
        if z["content"].dtype != torch.float32 or not abs(float(total / WORLD - want)) < 0.02 * abs(float(want)):
            failures.append(f"half, {kind}: {z['content'].dtype}, loss {float(total) / WORLD}, wanted {float(want)}")


def job_own_family(rank, failures):
    """Trim, content keys, dual ascent and an uneven last batch: terms and lambda are those of one process."""
    options = {"trim": 0.3, "content_keys": "all", "content_entropy": True}
    for kind in VIEWS:
        parts, _ = batches(kind)
        uneven = [parts[0], parts[1].rows(slice(0, 3))]
        whole = ViewBatch.cat([p.rows(slice(None)) for p in uneven])
        made = []
        for batch, gather in ((uneven[rank], True), (whole, False)):
            ascent = DualAscent(tuple(SPACES), tolerance=0.1, step_size=0.5)
            criterion = JointEntropyLoss(own_family(), weights=ascent, gather_distributed=gather, **options)
            terms = criterion.terms(make()(batch))
            made.append((terms, torch.stack(list(ascent.step(terms).values()))))
        (mine, lam), (theirs, want) = made
        theirs.rows = {n: rows // WORLD for n, rows in theirs.rows.items()}  # every rank has the whole batch there
        for name in ("invariance", "constraint", "rows", "effective_rank", "spread"):
            for n in SPACES:
                a, b = getattr(mine, name)[n].double(), getattr(theirs, name)[n].double()
                if not torch.allclose(a, b, rtol=1e-4, atol=1e-5):
                    failures.append(f"own family, {kind}: {name}[{n}] {a} wanted {b}")
        if not torch.allclose(lam, want, rtol=1e-4) or not torch.allclose(mine.entropy, theirs.entropy, rtol=1e-4):
            failures.append(f"own family, {kind}: {lam}, {mine.entropy} wanted {want}, {theirs.entropy}")


def job_sharded_files(rank, failures):
    """A sharded model writes a whole file, takes one back, gives its heads and, where registered, its features."""
    mesh = init_device_mesh("cpu", (WORLD,))

    def build(seed):
        torch.manual_seed(seed)
        return StyleHeads(Backbone(), SPACES, hidden=(8, 6))

    plain, other = build(0), build(1)
    for n, t in plain.named_buffers():
        t.fill_(3) if "tracked" in n else t.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(n)))
    want = {k: t.clone() for k, t in plain.state_dict().items() if isinstance(t, torch.Tensor)}
    folder = Path(FOLDER[0])
    model = fully_shard(plain, mesh=mesh)
    model.save(folder / "sharded.pt")
    opened = StyleHeads.load(folder / "sharded.pt", Backbone())
    for k, t in opened.state_dict().items():
        if isinstance(t, torch.Tensor) and not torch.equal(t, want[k]):
            failures.append(f"saved: {k} differs")
    other = fully_shard(other, mesh=mesh)
    other.restore(opened.config(), opened.state_dict())
    for k, t in other.state_dict().items():
        if isinstance(t, torch.Tensor) and not torch.equal(
            t.full_tensor() if hasattr(t, "full_tensor") else t, want[k]
        ):
            failures.append(f"restored: {k} differs")
    x = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(rank))
    other.eval(), opened.eval()
    head = other.head("color").eval()
    if not torch.allclose(head(opened.features(x)), opened(x)["color"], atol=1e-6):
        failures.append("the head is not the model's")
    try:
        fully_shard(build(2), mesh=mesh).features(x)
        failures.append("features of a sharded model: no error")
    except ValueError as error:
        if "register_fsdp_forward_method" not in str(error):
            failures.append(f"features of a sharded model: {error}")
    register_fsdp_forward_method(other, "features")
    if not torch.allclose(other.features(x), opened.features(x), atol=1e-6):
        failures.append("features differ")


FOLDER = [""]
JOBS = {
    "wrappers": job_wrappers,
    "plain dicts": job_plain_dict,
    "half precision": job_half,
    "own family": job_own_family,
    "sharded files": job_sharded_files,
}


def _worker(rank, folder):
    torch.set_num_threads(1)
    FOLDER[0] = folder
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
    folder = tmp_path_factory.mktemp("frameworks")
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
