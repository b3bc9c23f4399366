"""Ranks that would choose apart take one backend: two gloo processes in the interpreter, one of them without triton."""

import datetime
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from counting import Counted
from invented import V100, pretend
from reference import unit
from tiles import shrink

from ssd_addon import JointEntropyLoss
from ssd_addon.kernels import choice, launch, negative_lse, similarity

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SIZES = (40, 24)  # shards of 64 rows
REFUSALS = ("neither", "by architecture", "by size", "by check", "by type")


def refuse(monkeypatch, how, rank):
    """This rank as the case has it; only rank 1 refuses."""
    shrink(monkeypatch)
    apart = rank == 1
    pretend(monkeypatch, triton_from=65 if how == "by size" and apart else 48)
    if how == "by architecture" and apart:
        monkeypatch.setattr(launch, "why_not", lambda device: choice.why_not(V100, str(device)))
    if how == "by check" and apart:
        whole = launch.sums
        monkeypatch.setattr(launch, "sums", lambda *a: whole(*a) + 0.1)


def lse(rank, how, validate):
    """(backend, values, gradient, collectives) of this rank's rows."""
    z, ids = unit(64, 8).half(), torch.arange(64) // 2
    start = sum(SIZES[:rank])
    mine = slice(start, start + SIZES[rank])
    leaf = z[mine].clone()
    leaf = (leaf.float() if how == "by type" and rank == 1 else leaf).requires_grad_()
    names, whole = [], similarity.choose_backend
    with pytest.MonkeyPatch.context() as m, Counted() as c:
        m.setattr(similarity, "choose_backend", lambda *a, **k: names.append(whole(*a, **k)) or names[-1])
        out = negative_lse(leaf, ids[mine], 0.15, group=dist.group.WORLD, validate=validate)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
    exact = z.double().requires_grad_()
    want = negative_lse(exact, ids, 0.15, backend="eager")
    (dwant,) = torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(out.double(), want[mine].detach(), rtol=0, atol=5e-3)
    torch.testing.assert_close(grad.double(), dwant[mine], rtol=0, atol=5e-3 * dwant.norm().item())
    return names[-1], c.collectives


def loss(rank, how, validate):
    g = torch.Generator().manual_seed(rank)
    z = {n: torch.randn(2, SIZES[rank] // 2, 4, generator=g) for n in ("content",)}
    z = {n: t if how == "by type" and rank == 1 else t.half() for n, t in z.items()}
    with Counted() as c:
        terms = JointEntropyLoss("simclr", gather_distributed=True, validate=validate).terms(z)
    assert terms.loss.isfinite()
    return terms.backend, c.collectives


def work(rank, folder):
    torch.set_num_threads(1)
    found = {}
    init = {"init_method": f"file://{folder}/init", "rank": rank, "world_size": 2}
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60), **init)
    for how in REFUSALS:
        for f in (lse, loss):
            for validate in (True, False):
                with pytest.MonkeyPatch.context() as m, warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    refuse(m, how, rank)
                    try:
                        result = f(rank, how, validate)
                    except Exception:
                        result = traceback.format_exc(), []
                said = [str(w.message) for w in seen if "failed their check" in str(w.message)]
                found[how, f.__name__, validate] = (*result, said)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("function", ["lse", "loss"])
@pytest.mark.parametrize("how", REFUSALS)
def test_one_rank_that_refuses_decides_for_all(found, how, function, validate):
    (name, collectives, _), (other, others, said) = (f[how, function, validate] for f in found)
    assert name == other == ("triton" if how == "neither" else "eager"), (name, other)
    assert collectives == others
    assert len(said) == (how == "by check")
