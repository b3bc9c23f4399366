"""Over ranks: gloo processes on the CPU against one process on the concatenated batch, in float64.

Starting processes is slow, so every world starts once and runs all of its cases; failures come back together.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import traceback
import warnings
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from counting import Counted
from tiles import SQUARE
from torch import nn

from ssd_addon import DualAscent, Embeddings, JointEntropyLoss, ViewPlan
from ssd_addon._dist import Shards, shards, world_size
from ssd_addon.kernels import dispatch, negative_lse, off_diagonal_energy, streaming, table
from ssd_addon.kernels.similarity import Known, log_sums

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

FAMILIES = ("simclr", "vicreg", "barlow")
BACKENDS = ("eager", "streaming", "triton")
PLANS = ("shared_query", "interleaved")
WIDTHS = {"content": 4, "color": 3, "spatial": 2}
SPACES = tuple(WIDTHS)
INPUTS = 5
RTOL, ATOL = 1e-8, 1e-11
SIZES = {2: ((4, 4), (6, 1)), 3: ((5, 0, 2), (1, 4, 3))}
OPTIONS = (
    {},
    {"trim": 0.3},
    {"content_keys": "all", "weights": {"spatial": 0.5, "content": 2.0, "color": 3.0}},
    {"content_entropy": True},
    {"trim": 0.4, "content_keys": "all", "content_entropy": True, "weights": (1.0, 0.0, 2.5)},
)


# ------------------------------------------------------------------------------------------------ the cases


@dataclass(frozen=True)
class Case:
    """One batch, spread over ranks by `sizes`, and the criterion that runs on it."""

    family: str
    plan: str
    sizes: tuple[int, ...]
    backend: str = "eager"
    ids: str = "none"  # none, local (row numbers of the shard), global (row numbers of the batch), far
    own_index: bool = False  # interleaved: a drawn space_index instead of r mod S
    options: dict = field(default_factory=dict)
    learn: bool = False  # simclr: temperature is a parameter
    seed: int = 0

    def criterion(self, **kwargs):
        options = self.options
        if self.learn:
            options = {**options, "temperature": nn.Parameter(torch.tensor(0.2, dtype=torch.float64))}
        return JointEntropyLoss(self.family, backend=self.backend, **options, **kwargs)

    def data(self):
        """Inputs [V, B, 5] of every space, the maps, ids and index: of the whole batch."""
        plan = getattr(ViewPlan, self.plan)(SPACES)
        g = torch.Generator().manual_seed(self.seed)
        v, b = plan.num_views, sum(self.sizes)
        x = {n: torch.randn(v, b, INPUTS, generator=g, dtype=torch.float64) for n in SPACES}
        maps = {n: torch.randn(INPUTS, d, generator=g, dtype=torch.float64) for n, d in WIDTHS.items()}
        starts = [sum(self.sizes[:r]) for r in range(len(self.sizes))]
        ids = index = None
        if self.ids == "local":  # a style key from a neighbour within the shard
            ids = torch.cat([crossed(v, n) + start for n, start in zip(self.sizes, starts, strict=True)], dim=1)
        elif self.ids != "none":  # a style key from a neighbour in the batch, on another rank at the borders
            ids = crossed(v, b)
            if self.ids == "far":
                ids = 10**12 - 7 * ids
        if plan.kind == "interleaved":
            index = torch.cat([torch.arange(n) % len(SPACES) for n in self.sizes])
            if self.own_index:
                index = torch.randint(len(SPACES), (b,), generator=g)
        return plan, x, maps, ids, index

    def embeddings(self, maps, rank=None):
        """Of one rank as that rank holds them, or of the whole batch."""
        plan, x, _, ids, index = self.data()
        if rank is not None:
            start = sum(self.sizes[:rank])
            rows = slice(start, start + self.sizes[rank])
            x = {n: t[:, rows] for n, t in x.items()}
            ids = None if ids is None else ids[:, rows] - (start if self.ids == "local" else 0)
            index = index[rows] if self.own_index and index is not None else None
        return Embeddings({n: t @ maps[n] for n, t in x.items()}, plan, image_ids=ids, space_index=index)

    def run(self, rank=None, **kwargs):
        """Loss, gradients of all parameters, and terms."""
        maps = {n: m.requires_grad_() for n, m in self.data()[2].items()}
        criterion = self.criterion(**kwargs)
        z = self.embeddings(maps, rank)
        terms = criterion.terms(z)
        parameters = [*maps.values(), *criterion.parameters()]
        grads = torch.autograd.grad(terms.loss, parameters, allow_unused=True, materialize_grads=True)
        return terms.loss.detach(), grads, flat(terms)


def crossed(v, b):
    ids = torch.arange(b).repeat(v, 1)
    ids[-1] = ids[-1].roll(1)
    return ids


def flat(terms):
    out = {"entropy": terms.entropy}
    if terms.content_entropy is not None:
        out["content_entropy"] = terms.content_entropy
    for key in ("invariance", "constraint", "effective_rank", "spread", "agreement", "rows"):
        out |= {f"{key}/{n}": value.double() for n, value in getattr(terms, key).items()}
    return out


def loss_cases(world):
    """All families, plans and options; shards, ids, index and what is learnt turn from case to case."""
    ids, out = ("none", "global", "local", "far"), []
    # SimCLR alone has a backend and negatives over ranks, and so gets two ids of the four, one by each backend.
    families = tuple(itertools.product(("simclr", "vicreg", "barlow"), ("eager", "streaming")))
    for r, (plan, options) in enumerate(itertools.product(PLANS, OPTIONS)):
        for f, (family, backend) in enumerate(families):
            sizes = SIZES[world][(r + (f + 1) // 2) % 2]
            turn = ids[(r // 2 + f + 2 * (backend == "streaming")) % 4]
            own, learn = plan == "interleaved" and r % 3 > 0, family == "simclr" and r % 4 > 0
            out.append(Case(family, plan, sizes, backend, turn, own, options, learn, seed=len(out)))
    return out


# ------------------------------------------------------------------------------------------------ the processes


def _worker(rank, folder, expected):
    """Every section in its world, one world after the other: {section: failures of this rank}."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    failures = {}
    for world, sections in WORLDS.items():
        if rank >= world:
            continue
        init = {"init_method": f"file://{folder}/{world}", "rank": rank, "world_size": world}
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30), **init)
        for name, job in sections.items():
            failures[name] = ["did not finish"]
            torch.save(failures, f"{folder}/{rank}.pt")
            found = []
            try:
                job(rank, expected.get(name), found)
            except Exception:  # the other ranks may be left waiting: no section can follow
                failures[name] = [*found, traceback.format_exc()]
                torch.save(failures, f"{folder}/{rank}.pt")
                return
            failures[name] = found
            torch.save(failures, f"{folder}/{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, args=(str(folder), {name: f() for name, f in EXPECTED.items()}), nprocs=max(WORLDS))
    return [torch.load(folder / f"{rank}.pt") for rank in range(max(WORLDS))]


def close(failures, what, got, want, rtol=RTOL, atol=ATOL):
    try:
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    except AssertionError as e:
        failures.append(f"{what}: {' '.join(str(e).split())[:300]}")


def averaged(t):
    t = t.detach().clone()
    dist.all_reduce(t)
    return t / dist.get_world_size()


def vector(*tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def equal_everywhere(failures, what, t):
    every = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(every, t)
    if not all(torch.equal(e, every[0]) for e in every):
        failures.append(f"{what}: differs between ranks: {every}")


def raises(failures, what, message, f):
    try:
        f()
    except ValueError as e:
        if message not in str(e):
            failures.append(f"{what}: expected {message!r} in: {e}")
    else:
        failures.append(f"{what}: did not raise")


# ------------------------------------------------------------------------------------------------ losses


def compare(failures, case, rank, want):
    loss, grads, terms = case.run(rank, gather_distributed=True)
    close(failures, f"{case}: loss and gradients", averaged(vector(loss, *grads)), vector(want[0], *want[1]))
    if list(terms) != list(want[2]):
        failures.append(f"{case}: terms {list(terms)}, expected {list(want[2])}")
    for n, w in want[2].items():
        close(failures, f"{case}: {n}", terms[n].double(), w.double())
    equal_everywhere(failures, f"{case}: terms", torch.stack(list(terms.values())))


def job_losses(rank, expected, failures):
    for case, want in zip(loss_cases(dist.get_world_size()), expected, strict=True):
        compare(failures, case, rank, want)


# ------------------------------------------------------------------------------------------------ all the rest


def lse_cases():
    """(name, rows, ids, tau, options): 3 uneven ranks of 5, 0 and 8 rows; the image 4 lies on two of them."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(13, 6, generator=g, dtype=torch.float64)
    unit = nn.functional.normalize(z, dim=1)
    ids = torch.tensor([4, 7, 4, 9, 1, 9, 4, 2, 2, 7, 1, 1, 11])
    for backend, prefix, (kind, rows, tau) in itertools.product(
        ("eager", "streaming"),
        (None, 2),
        (("unit", unit, 0.15), ("maximum", unit, 0.01), ("long", 4 * z, 0.3), ("shift", unit, 0.0133)),
    ):
        options = {"backend": backend, "prefix": prefix, "chunk": 3}
        yield f"negative_lse {kind} {backend} {prefix}", rows, ids, tau, options


LSE_SIZES = (5, 0, 8)


def run_lse(rows, ids, tau, options, sizes=None, rank=None):
    """The values, and the gradients under one drawn cotangent."""
    width = () if options["prefix"] is None else (2,)
    cotangent = torch.randn(len(rows), *width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = slice(None)
    if rank is not None:
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        options = {**options, "group": dist.group.WORLD}
    z = rows[mine].clone().requires_grad_()
    t = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    lse = negative_lse(z, ids[mine], t, **options)
    return lse.detach(), *torch.autograd.grad((lse * cotangent[mine]).sum(), (z, t))


ENERGY_SIZES = (3, 0, 4)


def energy_cases():
    g = torch.Generator().manual_seed(5)
    for d, cross, backend in itertools.product((3, 20), (False, True), ("eager", "streaming")):
        x, y = torch.randn(2, sum(ENERGY_SIZES), d, generator=g, dtype=torch.float64)
        yield f"energy {d} {cross} {backend}", x, y if cross else None, backend


def run_energy(x, y, backend, rank=None):
    mine = slice(None) if rank is None else slice(sum(ENERGY_SIZES[:rank]), sum(ENERGY_SIZES[: rank + 1]))
    leaves = [t[mine].clone().requires_grad_() for t in (x, y) if t is not None]
    group = None if rank is None else dist.group.WORLD
    energy = off_diagonal_energy(*leaves, backend=backend, group=group, chunk=7)
    return energy.detach(), *torch.autograd.grad(energy, leaves)


ASCENT = [Case(f, p, (3, 2, 4), own_index=True, seed=9) for f in FAMILIES for p in PLANS]


def run_ascent(case, rank=None, **kwargs):
    """lambda after two steps, on a batch of its own each."""
    ascent = DualAscent(SPACES, tolerance={"content": 0.1, "color": 0.5, "spatial": 9.0}, step_size=0.3)
    case = dataclasses.replace(case, options={**case.options, "weights": ascent})
    criterion = case.criterion(**kwargs)
    for seed in range(2):
        batch = dataclasses.replace(case, seed=seed)
        lam = ascent.step(criterion.terms(batch.embeddings(batch.data()[2], rank)))
    return torch.stack(list(lam.values()))


ALONE = [
    Case(f, p, (4, 2, 5), backend=b, ids="local", own_index=True, options={"content_entropy": True}, seed=4)
    for f in FAMILIES
    for p, b in (("shared_query", "eager"), ("interleaved", "streaming"))
]


def expect_alone(case):
    """gather_distributed=False: the loss of each shard; terms are means weighted by rows, or by images."""
    whole, shard = case.run()[2], []
    for rank in range(len(case.sizes)):
        shard.append(case.run(rank))
    images = torch.tensor(case.sizes, dtype=torch.float64)
    want = {}
    for n in whole:
        key, _, space = n.partition("/")
        values = torch.stack([s[2][n] for s in shard])
        weight = torch.stack([s[2][f"rows/{space}"] for s in shard]) if space else images
        if key == "rows":
            want[n] = values.sum()
        elif key in (
            "effective_rank",
            "spread",
            "agreement",
        ):
            # Barlow Twins standardizes by shard: then it is not that of the whole batch
            want[n] = whole[n] if case.family != "barlow" else torch.tensor(torch.nan)
        else:
            want[n] = (values * weight).sum() / weight.sum()
    return [s[0] for s in shard], [s[1] for s in shard], want


AUTO = [Case(f, "shared_query", (6, 0, 1), backend="auto", seed=2) for f in FAMILIES]


def job_lse(rank, expected, failures):
    for (what, *args), want in zip(lse_cases(), expected, strict=True):
        lse, dz, dtau = run_lse(*args, LSE_SIZES, rank)
        mine = slice(sum(LSE_SIZES[:rank]), sum(LSE_SIZES[: rank + 1]))
        close(failures, what, lse, want[0][mine])
        close(failures, f"{what}: dz", dz, want[1][mine])  # the sum over the losses of all ranks
        close(failures, f"{what}: dtau", averaged(dtau) * dist.get_world_size(), want[2])


@contextlib.contextmanager
def small_tiles():
    """Triton's interpreter on small tiles; numpy warns there of what is masked afterwards."""
    whole = table.configuration
    table.configuration = lambda *_: SQUARE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        table.configuration = whole


def triton_cases(world):
    """(name, run(rank or None)) in float32 and with small tiles: rows, covariances, and losses under uneven shards."""
    g = torch.Generator().manual_seed(3)
    sizes = {2: (20, 13), 3: (17, 0, 26)}[world]
    z = nn.functional.normalize(torch.randn(sum(sizes), 6, generator=g), dim=1)
    ids = torch.randint(12, (sum(sizes),), generator=g)
    cotangent = torch.randn(sum(sizes), 2, generator=g)

    def place(rank):
        return slice(None) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def lse(rank, tau, far, validate, rows):
        leaf = rows[place(rank)].clone().requires_grad_()
        t = torch.tensor(tau, requires_grad=True)
        group = None if rank is None else dist.group.WORLD
        out = negative_lse(
            leaf, (ids * far)[place(rank)], t, prefix=2, backend="triton", group=group, validate=validate
        )
        dz, dtau = torch.autograd.grad((out * cotangent[place(rank)]).sum(), (leaf, t))
        return {"rows": out.detach(), "row gradient": dz}, {"dtau": dtau}

    def energy(rank, cross):
        leaves = [t[place(rank)].clone().requires_grad_() for t in (z, z.roll(1, 1))[: 1 + cross]]
        group = None if rank is None else dist.group.WORLD
        out = off_diagonal_energy(*leaves, backend="triton", group=group)
        scale = 1 if rank is None else world
        grads = [g / scale for g in torch.autograd.grad(out, leaves)]
        return {f"row gradient {k}": g for k, g in enumerate(grads)}, {"energy": out.detach() / scale}

    for tau, far, validate, length in (
        (0.1, 1, True, 1),
        (0.01, 2**40, True, 1),
        (0.1, 2**40, False, 1),
        (0.1, 1, True, 7),
    ):
        name = f"negative_lse {tau} {far} {validate} {length}"
        yield name, sizes, functools.partial(lse, tau=tau, far=far, validate=validate, rows=length * z)
    for cross in (False, True):
        yield f"energy {cross}", sizes, functools.partial(energy, cross=cross)
    for family in FAMILIES:
        case = Case(
            family, "shared_query", SIZES[world][1], backend="triton", options={"content_entropy": True}, seed=7
        )
        yield family, sizes, functools.partial(triton_loss, case)


def triton_loss(case, rank):
    maps = {n: m.float().requires_grad_() for n, m in case.data()[2].items()}
    z = case.embeddings({n: m.double() for n, m in maps.items()}, rank)
    z = Embeddings({n: t.float() for n, t in z.items()}, z.plan)
    loss = case.criterion(gather_distributed=rank is not None)(z)
    scale = 1 if rank is None else len(case.sizes)
    grads = torch.autograd.grad(loss, list(maps.values()))
    return {}, {"loss": loss.detach() / scale, **{f"gradient {k}": g / scale for k, g in enumerate(grads)}}


def expect_triton(world):
    with small_tiles():
        return [run(None) for _, _, run in triton_cases(world)]


def job_triton(rank, expected, failures):
    """Rows are compared where they lie, what is summed over ranks after the sum."""
    with small_tiles():
        for (what, sizes, run), (rows, summed) in zip(triton_cases(dist.get_world_size()), expected, strict=True):
            own, parts = run(rank)
            mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            for n, t in own.items():
                close(failures, f"triton {what}: {n}", t, rows[n][mine], 1e-3, 2e-3 * rows[n].abs().max().item())
            for n, t in parts.items():
                total = averaged(t) * dist.get_world_size()
                close(failures, f"triton {what}: {n}", total, summed[n], 1e-3, 2e-3 * summed[n].abs().max().item())
    z = torch.eye(3)
    z[rank % 3] *= 1 + rank  # longer rows on the last ranks: with checks off NaN on all of them
    lse = negative_lse(z, torch.arange(3), 0.1, backend="triton", group=dist.group.WORLD, validate=False)
    if not lse.isnan().all():
        failures.append(f"longer rows on another rank: {lse}")


def job_energy(rank, expected, failures):
    for (what, *args), want in zip(energy_cases(), expected, strict=True):
        energy, *grads = run_energy(*args, rank)
        close(failures, what, energy, want[0])
        mine = slice(sum(ENERGY_SIZES[:rank]), sum(ENERGY_SIZES[: rank + 1]))
        for g, w in zip(grads, want[1:], strict=True):
            close(failures, f"{what}: gradient", g / dist.get_world_size(), w[mine])


@small_tiles()
@mock.patch.object(streaming, "reads_are_free", lambda device: False)  # as on a GPU
def job_reads(rank, _, failures):
    """One collective and one read for all that is checked, on every rank alike; nothing where it is known."""
    z = nn.functional.normalize(torch.randn(13, 6, generator=torch.Generator().manual_seed(rank)), dim=1)
    z = z[: LSE_SIZES[rank]].requires_grad_()
    ids = torch.arange(len(z)) + 5 * (rank == 2)
    alike = Shards(dist.group.WORLD, LSE_SIZES, rank)

    def expect(what, c, reads, collectives):
        if len(c.reads) != reads or len(c.collectives) != collectives:
            failures.append(f"{what}: {len(c.reads)} reads {c.reads}, {len(c.collectives)} collectives {c.collectives}")

    for backend, validate in itertools.product(BACKENDS, (True, False)):
        options = {"prefix": 2, "backend": backend, "chunk": 3}
        tau = torch.tensor(0.1, requires_grad=True)
        unknown = backend == "streaming", backend == "triton"  # reads the longest row, or exchanges it
        with Counted() as c:
            lse = negative_lse(z, ids, tau, group=dist.group.WORLD, validate=validate, **options)
        # Sizes are exchanged, and so read, in any case; rows and ids are gathered.
        extra = (0, 0) if validate else unknown
        expect(f"{backend}, validate={validate}", c, 1 + extra[0], 3 + extra[1])
        with Counted() as c:
            lse.sum().backward()
        expect(f"{backend}, backward", c, 0, {"eager": 1, "streaming": 2, "triton": 1}[backend])
        with Counted() as c:
            log_sums(z, ids, tau, shards=alike, known=Known(1.0, 0.1, 0, 12), **options)
        expect(f"{backend}, known", c, 0, 2)
        with Counted() as c:
            off_diagonal_energy(z, backend=backend, group=dist.group.WORLD).backward()
        expect(f"{backend}, energy", c, 0, 3 if backend == "streaming" else 2)

    def refused(what, message, *args, looks=1):
        with Counted() as c:
            raises(failures, what, message, functools.partial(negative_lse, *args, group=dist.group.WORLD))
        expect(what, c, looks, looks)

    for bad in (1, 2):  # on a rank without rows, and on one with
        tau = torch.tensor(0.0 if rank == bad else 0.1)
        refused(f"temperature of rank {bad}", "above 0 (it divides the cosine similarity): got 0.0", z, ids, tau)
        tau = torch.tensor(torch.nan if rank == bad else 0.1, dtype=torch.float64)
        refused(f"temperature of rank {bad}", "above 0 (it divides the cosine similarity): got nan", z, ids, tau)
    for tau in (0.1 + 0.01 * rank, torch.tensor(0.1 + 0.01 * rank)):
        refused("temperatures that differ", "expected the same on every rank: got 0.1 to 0.12;", z, ids, tau)
    # What is wrong with rows is found out where something is, by all ranks together.
    nan = torch.where(torch.tensor(rank == 2), torch.nan, z.detach())
    refused("NaN", "got NaN or infinity on rank 2", nan, ids, 0.1, looks=2)
    long = torch.where(torch.tensor(rank == 0), 1e19, z.detach())
    refused("long rows", "float32 can hold: got longer rows on rank 0", long, ids, 0.1, looks=2)
    for one in (2**63 - 1, -(2**63)):
        refused("one image", f"all 13 rows carry the image id {one}", z, torch.full_like(ids, one), 0.1)


def autocast_cases():
    g = torch.Generator().manual_seed(8)
    x, y = torch.randn(2, sum(LSE_SIZES), 6, generator=g)
    ids = torch.tensor([4, 7, 4, 9, 1, 9, 4, 2, 2, 7, 1, 1, 11])
    for backend, dtype in itertools.product(BACKENDS, (torch.float32, torch.bfloat16)):
        yield (
            f"negative_lse {backend} {dtype}",
            nn.functional.normalize(x, dim=1).to(dtype),
            functools.partial(
                lambda z, mine, group, backend: negative_lse(z, ids[mine], 0.1, prefix=2, backend=backend, group=group),
                backend=backend,
            ),
        )
        yield (
            f"energy {backend} {dtype}",
            torch.cat([x, y], dim=1).to(dtype),
            functools.partial(
                lambda xy, mine, group, backend: off_diagonal_energy(*xy.chunk(2, 1), backend=backend, group=group),
                backend=backend,
            ),
        )


@small_tiles()
def job_autocast(rank, _, failures):
    """Forward and backward inside autocast give the bits that they give outside."""
    mine = slice(sum(LSE_SIZES[:rank]), sum(LSE_SIZES[: rank + 1]))
    for what, rows, f in autocast_cases():
        results = []
        for forward, backward in itertools.product((False, True), repeat=2):
            leaf = rows[mine].clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward):
                out = f(leaf, mine, dist.group.WORLD)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward):
                (out * 0.3).sum().backward()
            results.append((out.detach(), leaf.grad))
        for other in results[1:]:
            if not all(map(torch.equal, other, results[0])):
                failures.append(f"autocast, {what}: {other} is not {results[0]}")


def second_cases():
    """(name, rows, loss of a rank): the losses of the ranks add up to that of one process."""
    g = torch.Generator().manual_seed(9)
    z = torch.randn(sum(LSE_SIZES), 5, generator=g, dtype=torch.float64)
    yield (
        "negative_lse",
        z,
        lambda z, mine, group: (
            negative_lse(z, torch.arange(13)[mine] // 2, 0.5, prefix=2, backend="eager", group=group).sin().sum()
        ),
    )
    yield (
        "energy",
        z,
        lambda z, mine, group: off_diagonal_energy(z, backend="eager", group=group).sin() / world_size(group),
    )


def second_derivative(z, loss, mine=slice(None), group=None):
    leaf = z[mine].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf, mine, group), leaf, create_graph=True)
    return torch.autograd.grad(first.pow(3).sum(), leaf)[0]


def job_second(rank, expected, failures):
    mine = slice(sum(LSE_SIZES[:rank]), sum(LSE_SIZES[: rank + 1]))
    for (what, z, f), want in zip(second_cases(), expected, strict=True):
        close(failures, f"second derivative, {what}", second_derivative(z, f, mine, dist.group.WORLD), want[mine])


def job_ascent(rank, expected, failures):
    for case, want in zip(ASCENT, expected, strict=True):
        lam = run_ascent(case, rank, gather_distributed=True)
        close(failures, f"lambda of {case}", lam, want)
        equal_everywhere(failures, f"lambda of {case}", lam)
        equal_everywhere(failures, f"lambda of {case}, not gathered", run_ascent(case, rank))


def job_alone(rank, expected, failures):
    for case, (losses, grads, want) in zip(ALONE, expected, strict=True):
        loss, grad, terms = case.run(rank)
        close(failures, f"not gathered, {case}: loss", loss, losses[rank])
        close(failures, f"not gathered, {case}: gradient", list(grad), list(grads[rank]))
        for n, w in want.items():
            if not w.isnan():
                close(failures, f"not gathered, {case}: {n}", terms[n], w)
        equal_everywhere(failures, f"not gathered, {case}", torch.stack(list(terms.values())))


def job_auto(rank, expected, failures):
    """The limit of "auto" lies between the sizes of the shards: all ranks must take one backend."""
    limit, dispatch.EAGER_BYTES = dispatch.EAGER_BYTES, 4 * 4 * 28 * 4
    try:
        for case, want in zip(AUTO, expected, strict=True):
            maps = {n: m.float().requires_grad_() for n, m in case.data()[2].items()}
            z64 = case.embeddings({n: m.double() for n, m in maps.items()}, rank)
            z = Embeddings({n: t.float() for n, t in z64.items()}, z64.plan)
            criterion = case.criterion(gather_distributed=True)
            terms = criterion.terms(z)
            grad = torch.autograd.grad(terms.loss, list(maps.values()))
            close(failures, f"auto, {case}: loss", averaged(terms.loss).double(), want[0], 1e-5, 1e-6)
            for g, w in zip(grad, want[1], strict=True):
                close(failures, f"auto, {case}: gradient", averaged(g).double(), w, 1e-4, 1e-4)
            equal_everywhere(failures, f"auto, {case}", torch.tensor([terms.backend == "streaming"]).long())
    finally:
        dispatch.EAGER_BYTES = limit


def job_refusals(rank, _, failures):
    """What is wrong on one rank raises on all of them, and the group goes on working."""
    for family, value in itertools.product(FAMILIES, (torch.nan, torch.inf)):
        case = Case(family, "interleaved", (3, 2, 2), own_index=True)
        z = case.embeddings(case.data()[2], rank)
        if rank == 1:
            z["color"][1, 0, 2] = value
        message = "got NaN or infinity in the space color on rank 1;"
        raises(failures, f"NaN, {family}", message, functools.partial(case.criterion(gather_distributed=True), z))

        z = case.embeddings(case.data()[2], rank)
        if rank == 2:
            z.space_index[0] = 3
        criterion = case.criterion(gather_distributed=True)
        raises(failures, f"index, {family}", "space_index: expected 0 to 2", functools.partial(criterion, z))

        one = Case(family, "shared_query", (0, 1, 0))
        z = one.embeddings(one.data()[2], rank)
        criterion = one.criterion(gather_distributed=True)
        raises(failures, f"one image, {family}", "got 1 over all ranks", functools.partial(criterion, z))

    for backend in ("eager", "streaming"):
        f = functools.partial(negative_lse, backend=backend, group=dist.group.WORLD)
        z = torch.eye(3)
        z[rank, rank] = 1.0 if rank == 1 else torch.nan
        message = "got NaN or infinity on rank 0, 2"
        raises(failures, "NaN, negative_lse", message, functools.partial(f, z, torch.arange(3), 0.1))
        ids = torch.full((rank,), 8)
        raises(
            failures,
            "no negative",
            "all 3 rows carry the image id 8",
            functools.partial(f, z[:0].new_ones(rank, 3), ids, 0.1),
        )
        lse = f(torch.eye(3)[:rank], torch.full((rank,), rank), 1.0)
        want = torch.tensor([[], [torch.e + 1], [torch.e, 1.0]][rank]).log()
        close(failures, "after the refusals", lse, want, 1e-5, 1e-6)

    s, headers = shards(rank, [rank, -rank], torch.device("cpu"), dist.group.WORLD)
    if (s.sizes, s.offset, s.size, s.total) != ((0, 1, 2), (0, 0, 1)[rank], rank, 3) or headers != [
        [r, -r] for r in range(3)
    ]:
        failures.append(f"shards: {s}, {headers}")


# ------------------------------------------------------------------------------------------------ DDP


class Net(nn.Module):
    """Two layers and one head a space, on rows [V, B, 5]; `spare` gets no gradient."""

    def __init__(self, plan, spare=False):
        super().__init__()
        self.plan = plan
        self.body = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh())
        self.heads = nn.ModuleDict({n: nn.Linear(8, d) for n, d in WIDTHS.items()})
        if spare:
            self.spare = nn.Linear(2, 2)

    def forward(self, x):
        h = self.body(x)
        return Embeddings({n: head(h) for n, head in self.heads.items()}, self.plan)


def ddp_cases():
    return [
        ("simclr", "streaming", False),
        ("simclr", "eager", True),
        ("vicreg", "eager", False),
        ("barlow", "eager", True),
    ]


def train(family, backend, spare, rank=None):
    """Parameters after two steps of SGD, alone or under DDP with shards of 5 and 3 images."""
    torch.manual_seed(11)
    net: nn.Module = Net(ViewPlan.shared_query(SPACES), spare).double()
    x = torch.randn(2, 4, 8, INPUTS, dtype=torch.float64)
    criterion = JointEntropyLoss(
        family, backend=backend, trim=0.25, content_entropy=True, gather_distributed=rank is not None
    )
    model = net
    if rank is not None:
        x = x[:, :, :5] if rank == 0 else x[:, :, 5:]
        model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=spare)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for batch in x:
        optimizer.zero_grad()
        criterion(model(batch)).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def job_ddp(rank, expected, failures):
    for case, want in zip(ddp_cases(), expected, strict=True):
        got = train(*case, rank)
        close(failures, f"DDP {case}", got, want)
        equal_everywhere(failures, f"DDP {case}", got)


# ------------------------------------------------------------------------------------------------ the sections


WORLDS = {
    3: {
        "losses, 3 ranks": job_losses,
        "negative_lse": job_lse,
        "off_diagonal_energy": job_energy,
        "DualAscent": job_ascent,
        "gather_distributed=False": job_alone,
        "auto": job_auto,
        "triton, 3 ranks": job_triton,
        "reads and collectives": job_reads,
        "autocast": job_autocast,
        "second derivatives": job_second,
        "refusals": job_refusals,
    },
    2: {"losses, 2 ranks": job_losses, "triton, 2 ranks": job_triton, "DistributedDataParallel": job_ddp},
}
EXPECTED = {
    "triton, 3 ranks": lambda: expect_triton(3),
    "triton, 2 ranks": lambda: expect_triton(2),
    "losses, 3 ranks": lambda: [case.run() for case in loss_cases(3)],
    "losses, 2 ranks": lambda: [case.run() for case in loss_cases(2)],
    "negative_lse": lambda: [run_lse(*case[1:]) for case in lse_cases()],
    "off_diagonal_energy": lambda: [run_energy(*case[1:]) for case in energy_cases()],
    "second derivatives": lambda: [second_derivative(z, f) for _, z, f in second_cases()],
    "DualAscent": lambda: [run_ascent(case) for case in ASCENT],
    "gather_distributed=False": lambda: [expect_alone(case) for case in ALONE],
    "auto": lambda: [case.run() for case in AUTO],
    "DistributedDataParallel": lambda: [train(*case) for case in ddp_cases()],
}


@pytest.mark.parametrize("section", [name for sections in WORLDS.values() for name in sections])
def test_ranks_equal_one_process(found, section):
    """No rank found a difference. A section that one rank could not finish ends those after it."""
    world = next(w for w, sections in WORLDS.items() if section in sections)
    lines = [f"rank {r}: {line}" for r in range(world) for line in found[r].get(section, ["did not start"])]
    assert not lines, f"{len(lines)} failures\n" + "\n".join(lines[:40])
