"""`StructuredTraining` on two gloo ranks of Lightning's strategies: all is as in one process on the whole batch.

Processes start once and run all cases; failures come back together.
"""

import importlib
import json
import os
import socket
import traceback
import warnings
from pathlib import Path

import lightning_modules as modules
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning_modules import PACKAGES, Images
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from ssd_addon import EquivarianceLoss, Monitor, ViewBatch
from ssd_addon.runs import ResumableLoader

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
WORLD, BATCH, EPOCHS = 2, 3, 2
FOLDER = [Path()]
IMAGES = Images().images


def one_process(accumulate=1):
    """Each step on the images of both ranks, in the order of the sampler that Lightning gives a training."""
    mine = modules.module(temperature=0.2)
    drawn = [modules.views(rank=r) for r in range(WORLD)]
    optimizer = mine.configure_optimizers()
    samplers = [DistributedSampler(IMAGES, WORLD, r) for r in range(WORLD)]
    for epoch in range(EPOCHS):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        orders = [list(sampler) for sampler in samplers]
        steps = [[IMAGES[order[k : k + BATCH]] for order in orders] for k in range(0, 6, BATCH)]
        found = []
        for k, images in enumerate(steps):
            batch = ViewBatch.cat([draw(x) for draw, x in zip(drawn, images, strict=True)])
            found.append(mine.criterion.terms(mine.model(batch)))
            (found[-1].loss / accumulate).backward()
            if (k + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                for n in found[0].constraint:
                    found[-1].constraint[n] = torch.stack([t.constraint[n] for t in found[-accumulate:]]).mean()
                mine.criterion.weights.step(found[-1])
    return mine, float(found[-1].loss.detach()), float(found[-1].entropy)


def whole(state):
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def compare(what, mine, trainer, accumulate, failures):
    expected, loss, entropy = one_process(accumulate)
    found = whole(mine.state_dict())
    for k, v in expected.state_dict().items():
        error = float((found[k].double() - v.double()).norm() / v.double().norm())
        if not error < 1e-5 and "extra" not in k:
            failures.append(f"{what}: {k} off by {error:.1e}")
    logged = trainer.callback_metrics
    for name, value in (("loss", loss), ("entropy", entropy)):
        if abs(float(logged[name]) - value) > 1e-4 * abs(value):
            failures.append(f"{what}: logged {name} {float(logged[name])}, expected {value}")
    if trainer.global_step != int(mine.criterion.weights.steps):
        failures.append(f"{what}: {int(mine.criterion.weights.steps)} steps of lambda, {trainer.global_step} steps")


def sharded(*names):
    def configure_model(self):
        for name in names:
            fully_shard(getattr(self, name), mesh=self.device_mesh["data_parallel"])
        register_fsdp_forward_method(self.model, "features")  # for Monitor

    return {"configure_model": configure_model}


def strategy(kind, package):
    strategies = importlib.import_module(f"{package}.strategies")
    if kind == "ddp":
        return strategies.DDPStrategy(process_group_backend="gloo")
    return strategies.ModelParallelStrategy(
        data_parallel_size=WORLD, tensor_parallel_size=1, process_group_backend="gloo"
    )


def fit(mine, data=None, *, kind="ddp", package=PACKAGES[0], **options):
    data = DataLoader(Images(), BATCH) if data is None else data
    return modules.fit(
        mine,
        data,
        package=package,
        strategy=strategy(kind, package),
        devices=WORLD,
        **{"max_epochs": EPOCHS, **options},
    )


def job_equal(rank, failures):
    for package in PACKAGES:
        for accumulate in (1, 2):
            mine = modules.module(package, temperature=0.2, gather_distributed=True)
            made = fit(mine, package=package, accumulate_grad_batches=accumulate)
            compare(f"DDP, {package}, {accumulate}", mine, made, accumulate, failures)
        mine = modules.module(package, temperature=0.2, gather_distributed=True, body=sharded("model"))
        made = fit(mine, kind="fsdp", package=package)
        compare(f"FSDP2, {package}", mine, made, 1, failures)


def job_same_on_all(rank, failures):
    """Learned temperature and equivariance networks, whose statistics are of the rank: trained alike on all ranks."""
    for kind, body, temperature in (("ddp", (), {}), ("fsdp", sharded("model", "equivariance"), {"temperature": 0.2})):
        mine = modules.module(equivariance=True, gather_distributed=True, body=body, **temperature)
        made = fit(mine, kind=kind)
        numbers = [whole(mine.state_dict()), {k: float(v) for k, v in made.callback_metrics.items()}]
        every = [None] * WORLD
        dist.all_gather_object(every, numbers)
        (states, logged), (others, theirs) = every[0], every[1]
        apart = [k for k, v in states.items() if not torch.equal(v, others[k]) and "scales" not in k]
        if apart or str(logged) != str(theirs):  # the overlap of spaces is NaN where a rank has fewer than four rows
            failures.append(f"{kind}: ranks differ in {apart}, {logged}, {theirs}")


def job_refused(rank, failures):
    """Networks outside what FSDP2 averages would be trained by each rank alone."""
    mine = modules.module(equivariance=True, temperature=0.2, gather_distributed=True, body=sharded("model"))
    try:
        fit(mine, kind="fsdp")
        failures.append("equivariance that is not sharded: no error")
    except ValueError as error:
        if "got fully_shard without equivariance.networks" not in str(error):
            failures.append(f"equivariance that is not sharded: {error}")


def job_networks(rank, failures):
    """Equivariance networks whose gradients nothing averages, as where the model alone is wrapped."""
    mine = modules.module(gather_distributed=True)
    torch.manual_seed(1)
    equivariance = EquivarianceLoss(modules.SPACES, mine.views, hidden=(5,), gather_distributed=True)
    batch = mine.views(modules.Images().images[4 * rank : 4 * rank + 4])
    optimizer = torch.optim.SGD(equivariance.parameters(), lr=0.1)

    def step(module):
        z = {n: t.detach() for n, t in mine.model(batch).items()}
        module(z, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    wrapped = DistributedDataParallel(equivariance)
    step(wrapped), step(wrapped), step(equivariance)
    try:
        step(equivariance)
        failures.append("networks that differ: no error")
    except ValueError as error:
        if "expected the same networks on every rank" not in str(error) or "on rank 1 than on rank 0" not in str(error):
            failures.append(f"networks that differ: {error}")
    equivariance.eval()
    with torch.no_grad():  # an evaluation that another rank may do without
        equivariance({n: t.detach() for n, t in mine.model(batch).items()}, batch)


def job_monitor(rank, failures):
    """One line a step and epoch, by one rank, of the same numbers; a sharded model is measured too."""
    found = {}
    for kind, body in (("ddp", ()), ("fsdp", sharded("model"))):
        mine = modules.module(temperature=0.2, gather_distributed=True, body=body)
        path = FOLDER[0] / f"{kind}.jsonl"
        monitor = Monitor(path, views=mine.views, images=IMAGES, log_every=1)
        fit(mine, kind=kind, callbacks=[monitor.lightning(model="model")])
        dist.barrier()
        found[kind] = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [(line["step"], line.get("epoch")) for line in found[kind]]
        if steps != [(0, None), (1, None), (2, 0), (2, None), (3, None), (4, 1)]:
            failures.append(f"monitor, {kind}: lines {steps}")
    for a, b in zip(found["ddp"], found["fsdp"], strict=True):
        for name in a.keys() - {"tables"}:
            if None in (a[name], b[name]):  # not finite: the overlap of spaces, of fewer than four rows
                if a[name] is not b[name] or not name.startswith("overlap/"):
                    failures.append(f"monitor: {name} {a[name]} and {b[name]}")
            elif abs(a[name] - b[name]) > 1e-3 * max(1, abs(a[name])):
                failures.append(f"monitor: {name} {a[name]} and {b[name]}")


def job_resumed(rank, failures):
    """Lightning makes the loader anew around its own sampler; draws go on on every rank."""

    def run(name, ckpt_path=None):
        mine = modules.module(gather_distributed=True)
        checkpoint = importlib.import_module(f"{PACKAGES[0]}.callbacks").ModelCheckpoint(
            FOLDER[0] / name, every_n_train_steps=1, save_top_k=-1, filename="{step}"
        )
        data = ResumableLoader(Images(), batch_size=2, shuffle=True, seed=1)
        fit(mine, data, ckpt_path=ckpt_path, callbacks=[checkpoint], enable_checkpointing=True)
        return modules.state(mine)

    expected = run("a")
    for step in (2, 3, 4):
        if found := modules.differences(expected, run(f"b{step}", FOLDER[0] / "a" / f"step={step}.ckpt")):
            failures.append(f"resumed from step {step}: {found} differ")


JOBS = {
    "equal": job_equal,
    "same on all": job_same_on_all,
    "refused": job_refused,
    "networks": job_networks,
    "monitor": job_monitor,
    "resumed": job_resumed,
}


def _worker(rank, folder, port):
    torch.set_num_threads(1)
    FOLDER[0] = Path(folder)
    warnings.simplefilter("ignore")
    os.environ.pop("PL_GLOBAL_SEED", None)  # which another test may have set: Lightning's samplers take it
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # the processes are Lightning's to use
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


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightning")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        mp.spawn(_worker, args=(str(folder), port), nprocs=WORLD)
    except Exception as error:  # what each rank saw is in its file
        crash = str(error)
    else:
        crash = ""
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD) if (folder / f"{rank}.pt").exists()], crash


@pytest.mark.parametrize("job", JOBS)
def test_two_ranks_under_lightning(found, job):
    results, crash = found
    assert len(results) == WORLD, crash
    failures = [f for result in results for f in result.get(job, [f"did not run: {crash[-800:]}"])]
    assert not failures, "\n".join(failures)
