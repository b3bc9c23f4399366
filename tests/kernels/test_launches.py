"""What a step launches, counted on a CPU with the interpreter's kernels, and what it keeps for the backward."""

import pytest
import torch
from counting import Counted, Launches
from reference import unit
from torch.autograd.graph import saved_tensors_hooks

from ssd_addon import Embeddings, JointEntropyLoss, ViewPlan
from ssd_addon.kernels import launch, launch_around, negative_lse, off_diagonal_energy, table
from ssd_addon.kernels import unit as unit_rows
from ssd_addon.kernels.operands import Columns

# The interpreter computes with numpy, which warns of what is masked afterwards (a row's similarity to its own image).
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ONE, TWO, THREE = {"content": 20}, {"content": 16, "color": 8}, {"content": 16, "color": 8, "spatial": 8}

COUNTS = {
    # family, spaces: operators and kernels around the tiles; products of the matrix library; tiles.
    ("simclr", 1): (25, 1, 2),
    ("simclr", 2): (31, 1, 2),
    ("simclr", 3): (36, 1, 2),
    ("vicreg", 1): (59, 2, 2),
    ("vicreg", 2): (77, 3, 3),
    ("vicreg", 3): (97, 4, 4),
    ("barlow", 1): (42, 2, 1),
    ("barlow", 2): (79, 4, 2),
    ("barlow", 3): (113, 6, 3),
}
"""float32, checks on, a shared-query plan of as many spaces: the table of kernels/README.md."""


@pytest.fixture
def whole(monkeypatch):
    """Tiles of which a few cover these rows; strips and blocks of the usual size, so that each is one."""
    monkeypatch.setattr(table, "configuration", lambda *_: table.Configuration(64, 64, 64, 4, 2, False, 2))
    monkeypatch.setattr(unit_rows, "IMAGES", 32)


def counted(f, inputs):
    """Launches, and reads from the device, of a forward and backward pass."""
    loss = f()
    cotangent = torch.ones_like(loss)
    torch.autograd.grad(loss, inputs, cotangent)  # what is built once is built
    with Launches() as launches:
        torch.autograd.grad(f(), inputs, cotangent)
    with Counted() as reads:
        torch.autograd.grad(f(), inputs, cotangent)
    return launches, reads.reads


def embeddings(widths, dtype, b=32, plan=None):
    plan = plan or ViewPlan.shared_query(tuple(widths))
    g = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(plan.num_views, b, d, generator=g).to(dtype).requires_grad_() for n, d in widths.items()}
    return Embeddings(tensors, plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("prefix", [None, 5])
@pytest.mark.parametrize("tau", [0.15, 0.01], ids=["a constant shift", "maxima"])
def test_log_sums_launch_ten_kernels_beside_the_tiles(whole, dtype, prefix, tau):
    """With checks: 4 for these, 2 around the sums, 4 around the gradient."""
    z, ids = unit(64, 20).to(dtype).requires_grad_(), torch.arange(64) // 2
    launches, reads = counted(lambda: negative_lse(z, ids, tau, prefix=prefix, backend="triton"), [z])
    assert launches.calls.total() == 10 and launches.tiles.total() == 2 and len(reads) == 1, launches.calls
    assert launches.products == (1 if prefix is None else 2)


def test_a_temperature_has_a_gradient_only_where_it_is_asked_for(whole):
    z, ids, tau = unit(64, 20).float().requires_grad_(), torch.arange(64) // 2, torch.tensor(0.15)
    without, _ = counted(lambda: negative_lse(z, ids, tau, backend="triton"), [z])
    tau.requires_grad_()
    with_, _ = counted(lambda: negative_lse(z, ids, tau, backend="triton"), [z, tau])
    assert without.calls.total() == 10 and with_.calls.total() == 11 and with_.calls["sum"] == 1


def test_tiles_of_another_height_backward_take_one_launch_more(whole, monkeypatch):
    """The bounds of the ids in them: once, as the triangle's columns are its rows."""
    low = table.Configuration(32, 64, 64, 4, 2, False, 2)
    high = table.configuration("", "sums", 20)
    monkeypatch.setattr(table, "configuration", lambda arch, mode, *_: low if mode.startswith("weights") else high)
    found, whole = [], launch.with_bounds
    monkeypatch.setattr(launch, "with_bounds", lambda *args: found.append(args[-1]) or whole(*args))
    z, ids = unit(200, 20).half().requires_grad_(), torch.arange(200) // 2
    launches, _ = counted(lambda: negative_lse(z, ids, 0.15, backend="triton"), [z])
    assert launches.calls.total() == 11 and launches.tiles.total() == 2, launches.calls
    assert set(found) == {12}  # 7 tiles of 32 rows, 2 for the last column's, in whole 16 bytes
    (grad,) = torch.autograd.grad(negative_lse(z, ids, 0.15, backend="triton").sum(), z)
    (want,) = torch.autograd.grad(negative_lse(z.double(), ids, 0.15, backend="eager").sum(), z)
    assert (grad.double() - want.double()).norm() < 1e-3 * want.double().norm()


def test_a_triton_without_descriptors_runs_the_same_tiles_by_pointers(monkeypatch):
    tile = table.Configuration(64, 64, 64, 4, 2, True, 2)
    monkeypatch.setattr(table, "configuration", lambda *_: tile)
    assert launch_around.configuration(torch.device("cpu"), "sums", 20) == tile
    monkeypatch.setattr(launch_around, "HAS_DESCRIPTORS", False)
    assert launch_around.configuration(torch.device("cpu"), "sums", 20) == tile._replace(descriptor=False)


def test_a_layout_is_found_once_and_follows_the_tiles(monkeypatch):
    cpu, tile = torch.device("cpu"), table.Configuration(64, 64, 64, 4, 2, False, 2)
    monkeypatch.setattr(table, "configuration", lambda *_: tile)
    first = launch_around.layout(cpu, 100, 20, False, False)
    assert launch_around.layout(cpu, 100, 20, False, False) is first and first.columns.ends == (64, 192)
    assert launch_around.layout(cpu, 100, 0, False, False).columns.ends == (128,)
    tile = tile._replace(block_k=32)
    assert launch_around.layout(cpu, 100, 20, False, False).columns.ends == (32, 128)


def test_own_tiles_come_before_the_tables_and_those_of_an_architecture_before_the_default():
    own = {"sums": {"inf": [32, 32, 32, 4, 2, False, 2]}}
    every = table.table()["configurations"]
    assert table.configuration("sm_90", "sums", 300, own) == table.Configuration(*own["sums"]["inf"])
    assert table.configuration("sm_90", "weights", 300, own) == table.Configuration(*every["sm_90"]["weights"]["512"])
    assert table.configuration("sm_80", "weights", 300) == table.Configuration(*every["default"]["weights"]["inf"])


@pytest.mark.parametrize("family", ["simclr", "vicreg", "barlow"])
@pytest.mark.parametrize("widths", [ONE, TWO, THREE], ids=["one", "two", "three"])
def test_a_loss_launches_as_few_as_the_table_says_and_reads_once(whole, family, widths):
    z = embeddings(widths, torch.float32)
    launches, reads = counted(lambda: JointEntropyLoss(family, backend="triton")(z), list(z.values()))
    found = (launches.calls.total(), launches.products, launches.tiles.total())
    assert found == COUNTS[family, len(widths)] and len(reads) == 1, launches.calls


def test_the_aims_are_kept():
    """60 for a SimCLR loss, 120 for the others; each 16-bit space is cast there and back."""
    for (family, spaces), (calls, *_) in COUNTS.items():
        assert calls + 2 * spaces <= (60 if family == "simclr" else 120)


@pytest.mark.parametrize("family", ["simclr", "vicreg", "barlow"])
@pytest.mark.parametrize("backend", ["eager", "streaming", "triton"])
def test_one_read_a_step_whatever_comes_with_the_embeddings(whole, monkeypatch, family, backend):
    from ssd_addon.kernels import streaming

    monkeypatch.setattr(streaming, "reads_are_free", lambda device: False)
    z = embeddings(TWO, torch.float32, plan=ViewPlan.interleaved(tuple(TWO)))
    z.image_ids, z.space_index = torch.arange(32).expand(2, 32) + 7, torch.arange(32) % 2
    options = {"temperature": torch.tensor(0.1, requires_grad=True)} if family == "simclr" else {}
    criterion = JointEntropyLoss(family, backend=backend, trim=0.1, content_entropy=True, **options)
    _, reads = counted(lambda: criterion(z), list(z.values()))
    assert len(reads) == 1


# ------------------------------------------------------------------------------------------ alignment


@pytest.mark.parametrize("d", [700, 768, 896, 1024, 1536, 3072])
@pytest.mark.parametrize("unit_", [64, 128, 256])
def test_blocks_of_weights_begin_at_aligned_addresses(d, unit_):
    """The ids' bounds of their first tile too, 4 bytes each: other alignments are other compiled variants."""
    for rows in (launch.block_rows(d, unit_), launch.aligned(launch.block_rows(d, unit_) // 2, unit_)):
        assert rows % unit_ == 0 and rows // 64 * 4 % 16 == 0 and rows // 128 * 4 % 16 == 0
    assert launch.aligned(500, unit_) == 500 // unit_ * unit_ and launch.aligned(10, unit_) == unit_


@pytest.mark.parametrize("d,prefix,exact", [(13, 0, False), (13, 5, False), (13, 5, True), (64, 0, False)])
def test_the_matrix_library_finds_aligned_rows(d, prefix, exact):
    columns = Columns(d, prefix, 64, exact)
    assert all(k % 64 == 0 for level in columns.levels for k in level)
    assert sum(b - a for a, b in columns.levels) >= d and columns.operand_ends[-1] >= (3 if exact else 1) * d


# ------------------------------------------------------------------------------------------ what is kept


def kept(f):
    """Bytes of all storages that autograd keeps for the backward, each counted once, beside those of the inputs."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss = f()
    assert loss.requires_grad
    return storages


@pytest.mark.parametrize("options", [{}, {"content_entropy": True, "content_keys": "all", "trim": 0.1}])
@pytest.mark.parametrize("family", ["simclr", "vicreg", "barlow"])
@pytest.mark.parametrize("backend", ["streaming", "triton"])
def test_a_loss_keeps_memory_in_proportion_to_its_rows(whole, backend, family, options):
    """Of O(N D) entries where eager keeps N x N, or D x D: twice the rows are twice the bytes, not four times.

    N = V B rows of D columns. 10 N D floats leave room for a dozen copies in half precision, not for a matrix.
    """
    found = []
    for b in (32, 64):
        z = embeddings(TWO, torch.float32, b=b)
        criterion = JointEntropyLoss(family, backend=backend, **options)
        storages = kept(lambda z=z, c=criterion: c(z))
        spaces = [t.untyped_storage().data_ptr() for t in z.values()]
        assert family != "simclr" or not storages.keys() & spaces  # nor what half precision was promoted to
        for space in spaces:
            storages.pop(space, None)
        found.append(sum(storages.values()))
        assert found[-1] <= 4 * 10 * 3 * b * 24
    assert found[1] <= 2.2 * found[0]


@pytest.mark.parametrize("backend", ["streaming", "triton"])
def test_an_energy_keeps_no_matrix_of_many_columns(whole, backend):
    """D = 4 n: through rows, whose n x n matrix is a quarter of x."""
    for cross in (False, True):
        x, y = torch.randn(2, 20, 80, generator=torch.Generator().manual_seed(0)).requires_grad_()
        storages = kept(lambda x=x, y=y, cross=cross: off_diagonal_energy(x, y if cross else None, backend=backend))
        assert sum(storages.values()) <= 4 * 80 * 20 * 5 < 4 * 80 * 80 * 2


@pytest.mark.parametrize("backend,grows", [("eager", True), ("streaming", False), ("triton", False)])
def test_log_sums_keep_no_matrix_but_with_eager(whole, backend, grows):
    found = []
    for n in (100, 400):
        z = unit(n, 8).float().requires_grad_()
        storages = kept(lambda z=z, n=n: negative_lse(z, torch.arange(n), 0.1, backend=backend))
        found.append(sum(storages.values()))
    assert (found[1] > 10 * found[0]) == grows and (grows or found[1] <= 400 * (4 * 16 * 2 + 64))
