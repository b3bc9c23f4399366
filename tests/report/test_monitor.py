"""Monitor: the right lines at the right steps, the numbers that the metrics give, the same from Lightning's hooks."""

import json
import math
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import kornia.augmentation as K
import numpy as np
import pages
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ssd_addon import CollapseAlarm, JointEntropyLoss, StructuredViews, StyleHeads
from ssd_addon.checkpoints import read_log
from ssd_addon.metrics import ScoreTable, embed, parameter_matrix, r2_matrix
from ssd_addon.metrics.images import for_model
from ssd_addon.monitor import Monitor

pytestmark = [  # Lightning's advice on hardware and loaders, and its use of a deprecated pytree name
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
]

SPACES = {"content": 4, "color": 2, "spatial": 3}
DATA = pages.squares(24)
FACTORS = {name: DATA.factors[name] for name in ("x", "light")}
GROUPS = [f"parameters/{s}/{g}" for s in (*SPACES, "backbone") for g in ("color", "spatial")]
KNOWN = [f"r2/{s}/{f}" for s in (*SPACES, "backbone") for f in FACTORS]


def heads(seed=0):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2))
    return StyleHeads(backbone, SPACES, in_features=6, hidden=(5,))


def terms(seed=0):
    torch.manual_seed(seed)
    z = {name: torch.randn(4, 6, width) for name, width in SPACES.items()}
    return JointEntropyLoss("simclr").terms(z)


def refuse(constant):
    raise ValueError(f"{constant} is no JSON")


def lines(path):
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


class Numbers:
    """A writer that can do nothing but add_scalar."""

    def __init__(self):
        self.seen = []

    def add_scalar(self, name, value, step):
        self.seen.append((name, value, step))


class Everything(Numbers):
    def __init__(self):
        super().__init__()
        self.figures = []

    def add_figure(self, name, figure, step):
        self.figures.append((name, step, [t.get_text() for t in figure.axes[0].get_yticklabels()]))

    def close(self):
        raise AssertionError("the writer is the caller's, and so is its end")


# ---- terms


def test_terms_are_written_when_it_is_their_turn(tmp_path):
    log = tmp_path / "deep" / "log.jsonl"
    monitor, given = Monitor(log, log_every=3), [terms(k) for k in range(8)]
    returned = [monitor.step(k, given[k], lr=0.1 * k) for k in range(8)]
    assert [bool(r) for r in returned] == [k % 3 == 0 for k in range(8)]
    expected = [{"step": k, **given[k].scalars(), "lr": 0.1 * k} for k in (0, 3, 6)]
    assert lines(log) == expected == [r for r in returned if r]
    names = {"step", "loss", "entropy", "lr"}
    by_space = ("invariance", "constraint", "effective_rank", "spread", "agreement")
    names |= {f"{kind}/{s}" for kind in by_space for s in SPACES}
    names |= {f"overlap/{pair}" for pair in ("content/color", "content/spatial", "color/spatial")}
    assert expected[0].keys() == names


def test_every_tenth_step_unless_told():
    monitor = Monitor(None)
    assert [k for k in range(21) if monitor.step(k, {"loss": 1.0})] == [0, 10, 20]


def test_terms_are_not_read_when_it_is_not_their_turn():
    assert Monitor(None, log_every=2).step(1, object()) == {}


def test_terms_may_be_a_mapping_of_numbers_or_tensors(tmp_path):
    record = Monitor(tmp_path / "l").step(0, {"loss": torch.tensor(2.0), "n": 3}, lr=0.5)
    assert lines(tmp_path / "l") == [{"step": 0, "loss": 2.0, "n": 3.0, "lr": 0.5}] == [record]


def test_what_is_not_finite_becomes_null(tmp_path):
    given = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(math.nan), "e": 1.0}
    record = Monitor(tmp_path / "log").step(0, given, lr=math.nan)
    assert lines(tmp_path / "log") == [dict.fromkeys("abcd") | {"step": 0, "e": 1.0, "lr": None}]
    assert math.isnan(record["a"])


def test_a_line_of_the_callers_own_is_written_at_once(tmp_path):
    writer = Numbers()
    monitor = Monitor(tmp_path / "log", tensorboard=writer)
    monitor.write({"step": 7, "epoch": 1, "accuracy": 0.5, "broken_files": 2, "bad": math.nan, "note": "text"})
    (line,) = lines(tmp_path / "log")
    assert line == {"step": 7, "epoch": 1, "accuracy": 0.5, "broken_files": 2, "bad": None, "note": "text"}
    assert writer.seen[:2] == [("accuracy", 0.5, 7), ("broken_files", 2, 7)]
    assert {name for name, _, _ in writer.seen} <= {"accuracy", "broken_files", "bad"}


def test_values_of_any_kind_make_a_line(tmp_path):
    nested = {"a": [math.nan, (1, {"b": math.inf})], 3: torch.tensor(2.0)}
    record = {
        "step": np.int64(7),
        "x": np.float32(0.5),
        "t": torch.tensor(math.nan),
        "n": nested,
        "s": "</b>",
        "no": None,
    }
    Monitor(tmp_path / "log", tensorboard=Numbers()).write(record | {"yes": True, "big": 10**400})
    (line,) = lines(tmp_path / "log")
    expected = {"step": 7, "x": 0.5, "t": None, "s": "</b>", "no": None, "yes": True, "big": 10**400}
    assert line == expected | {"n": {"a": [None, [1, {"b": None}]], "3": 2.0}}


def test_arrays_and_sets_are_lists_and_other_kinds_are_named(tmp_path):
    monitor = Monitor(tmp_path / "log", tensorboard=(writer := Numbers()))
    record = {"step": 1, "a": np.ones(3), "t": torch.tensor([[1.0, math.nan]]), "one": np.ones(1), "s": {"x"}}
    monitor.write(record | {"loss": torch.ones((), requires_grad=True)})
    assert lines(tmp_path / "log") == [
        {"step": 1, "a": [1.0] * 3, "t": [[1.0, None]], "one": 1.0, "s": ["x"], "loss": 1.0}
    ]
    assert writer.seen == [("one", 1.0, 1), ("loss", 1.0, 1)]
    for bad, got in ((1j, "complex"), (Path("x"), "PosixPath"), (b"x", "bytes"), (object(), "object")):
        with pytest.raises(
            TypeError, match=f"write: expected a number, a string, or lists of them as 'n/m': got {got}"
        ):
            monitor.write({"step": 2, "n": {"m": [bad]}})
    assert len(lines(tmp_path / "log")) == 1


def test_a_term_that_is_no_number_is_null_or_named(tmp_path):
    monitor = Monitor(tmp_path / "log", tensorboard=Numbers())
    monitor.step(0, {"loss": None, "a": np.ones(1)}, lr=None)
    assert lines(tmp_path / "log") == [{"step": 0, "loss": None, "a": 1.0, "lr": None}]
    for bad, got in ((torch.ones(3), "3 numbers"), ("high", "'high'"), ([1, 2], "2 numbers"), ({}, "{}")):
        with pytest.raises(TypeError, match=f"terms: expected a number as 'loss': got {got}"):
            monitor.step(0, {"loss": bad})


def test_a_log_is_there_at_once_and_is_added_to(tmp_path):
    log = tmp_path / "log.jsonl"
    Monitor(log)
    assert log.read_text() == ""
    log.write_text('{"step": 0}\n')
    Monitor(log).step(10, {"loss": 1.0})
    assert [line["step"] for line in lines(log)] == [0, 10]


# ---- matrices


@pytest.mark.parametrize(("unit", "probe", "draws"), [(False, "ridge", {}), (True, "kernel", {"draws": 3})])
def test_matrices_are_those_of_the_metrics(tmp_path, unit, probe, draws):
    model, views = heads(), pages.views()
    options = {"views": views, "images": DATA.images, "factors": FACTORS, "on_sphere": unit, "probe": probe} | draws
    record = Monitor(tmp_path / "log", **options, batch_size=7).epoch(model, 0, 30)
    common = {"on_sphere": unit, "batch_size": 7}
    free = parameter_matrix(model, views, DATA.images, backbone=True, **common, **({"draws": 1} | draws))
    known = r2_matrix(embed(model, DATA.images, on_sphere=unit, batch_size=7), FACTORS, probe=probe)
    (line,) = lines(tmp_path / "log")
    assert line == record and list(line) == ["step", "epoch", *GROUPS, *KNOWN, "tables"]
    assert (line["step"], line["epoch"]) == (30, 0)
    assert line["tables"]["parameters"] == free.to_json() and free.intervals
    back = ScoreTable.from_json(line["tables"]["r2"])
    for s in (*SPACES, "backbone"):
        assert all(line[f"parameters/{s}/{g}"] == free[s, g] for g in ("color", "spatial"))
        assert all(line[f"r2/{s}/{f}"] == known[s, f] for f in FACTORS)
        assert all(back[s, f] == line[f"r2/{s}/{f}"] for f in FACTORS)
    assert back.probe == probe and back.intervals


def test_matrices_are_measured_when_it_is_their_turn(tmp_path):
    seen = []
    monitor = Monitor(tmp_path / "log", images=DATA.images, factors=FACTORS, every=2)
    for epoch in range(5):
        monitor.epoch(lambda x, e=epoch: (seen.append(e), {"content": x.mean((2, 3))})[1], epoch, 10 * epoch)
    assert [(line["epoch"], line["step"]) for line in lines(tmp_path / "log")] == [(0, 0), (2, 20), (4, 40)]
    assert set(seen) == {0, 2, 4}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_factors_are_read_from_images_as_the_model_knows_them(scaled, normalised):
    bytes_ = (DATA.images * 255).round().to(torch.uint8)
    images = bytes_ / 255 if scaled else bytes_
    seen = []

    def model(x):
        seen.append(x)
        return {"content": x.mean((2, 3))}

    views = StructuredViews({}, then=[K.Normalize(torch.tensor([0.5] * 3), torch.tensor([0.25] * 3))], seed=0)
    monitor = Monitor(None, images=images, factors=FACTORS, views=views if normalised else None, batch_size=10)
    record = monitor.epoch(model, 0, 0)
    expected = (bytes_ / 255 - 0.5) / 0.25 if normalised else bytes_ / 255
    torch.testing.assert_close(torch.cat(seen), expected)
    assert [len(x) for x in seen] == [10, 10, 4]
    assert list(record["tables"]) == ["r2"]  # views without groups: nothing to predict


@pytest.mark.parametrize("channels", [1, 3])
def test_images_get_the_channels_that_the_model_takes(tmp_path, channels):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    given = DATA.images if channels == 1 else DATA.images[:, :1]
    record = Monitor(tmp_path / "log", images=given, factors=FACTORS).epoch(net, 0, 0)
    fitting = for_model(given, net)[0]
    expected = Monitor(None, images=fitting, factors=FACTORS).epoch(net, 0, 0)
    assert fitting.shape[1] == channels and expected | {"note": record["note"]} == record == lines(tmp_path / "log")[0]
    with pytest.raises(RuntimeError, match="to have 2 channels"):
        Monitor(None, images=given, factors=FACTORS).epoch(nn.Conv2d(2, 4, 3), 0, 0)


def test_views_alone_make_the_label_free_matrix_alone(tmp_path):
    record = Monitor(None, views=pages.views(), images=DATA.images).epoch(heads(), 0, 0)
    assert list(record) == ["step", "epoch", *GROUPS, "tables"] and list(record["tables"]) == ["parameters"]


@pytest.mark.parametrize(
    "options", [{}, {"images": DATA.images}, {"images": DATA.images, "views": StructuredViews({}, seed=0)}]
)
def test_nothing_is_written_where_there_is_nothing_to_measure(tmp_path, options):
    assert Monitor(tmp_path / "log", **options).epoch(heads(), 0, 0) == {}
    assert lines(tmp_path / "log") == []


def test_a_cell_without_a_score_becomes_null(tmp_path):
    factors = {"same": torch.ones(24), "x": FACTORS["x"]}
    monitor = Monitor(tmp_path / "log", images=DATA.images, factors=factors)
    assert math.isnan(monitor.epoch(pages.model, 0, 0)["r2/color/same"])
    (line,) = lines(tmp_path / "log")
    assert line["r2/color/same"] is None and line["r2/spatial/x"] > 0.5
    assert math.isnan(ScoreTable.from_json(line["tables"]["r2"])["color", "same"])


def test_the_training_goes_on_as_if_nothing_had_been_measured():
    model, views = heads().train(), pages.views()
    model.backbone[1].eval()
    views(DATA.images[:4])
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    drawn, call = torch.get_rng_state(), views.call
    Monitor(None, views=views, images=DATA.images, factors=FACTORS).epoch(model, 0, 0)
    assert [m.training for m in model.modules()] == modes and True in modes and False in modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn) and views.call == call


def test_a_plain_backbone_is_measured_as_its_features(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    state = {k: v.clone() for k, v in net.state_dict().items()}
    monitor = Monitor(tmp_path / "log", views=pages.views(), images=DATA.images, factors=FACTORS)
    for model in (net, lambda x: net(x)):
        record = monitor.epoch(model, 0, 7)
        rows = [f"parameters/backbone/{g}" for g in ("color", "spatial")] + [f"r2/backbone/{f}" for f in FACTORS]
        assert list(record) == ["step", "epoch", *rows, "tables"]
    one, other = lines(tmp_path / "log")
    assert one == other and one["r2/backbone/light"] is not None
    assert net.training and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_embeddings_lie_on_the_sphere_where_the_model_says_so():
    asked, model = Monitor(None, images=DATA.images, factors=FACTORS), heads()
    raw, unit = (
        Monitor(None, images=DATA.images, factors=FACTORS, on_sphere=s).epoch(model, 0, 0) for s in (False, True)
    )
    assert asked.epoch(model, 0, 0) == raw != unit
    model.on_sphere = True
    assert asked.epoch(model, 0, 0) == unit


class Wrapper(nn.Module):
    """Shaped like DistributedDataParallel, whose forward must not run on one rank alone."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        raise AssertionError("the other ranks would be waited for")


Wrapper.__name__ = "DistributedDataParallel"  # wrappers are known by the names of their classes


def test_a_wrapped_model_gives_the_same():
    model = heads()
    monitor = Monitor(None, views=pages.views(), images=DATA.images, factors=FACTORS)
    assert monitor.epoch(Wrapper(model), 0, 0) == monitor.epoch(model, 0, 0)


# ---- TensorBoard


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags["scalars"]}
    return scalars, {t: [e.step for e in events.Images(t)] for t in tags["images"]}


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_tensorboard_folder_holds_the_same_numbers_and_the_matrices(tmp_path, kind):
    folder = tmp_path / "tb"
    options = {"views": pages.views(), "images": DATA.images, "factors": FACTORS, "log_every": 1}
    with Monitor(tmp_path / "log", tensorboard=kind(folder), **options) as monitor:
        for k in range(3):
            monitor.step(k, terms(k), lr=0.1)
        monitor.epoch(heads(), 0, 2)
    scalars, images = read(folder)
    written = lines(tmp_path / "log")
    expected = {n for line in written for n in line} - {"step", "epoch", "tables"}
    assert scalars.keys() == expected and {*GROUPS, *KNOWN, "loss", "lr"} <= expected
    for name, values in scalars.items():
        want = [(line["step"], line[name]) for line in written if name in line]
        assert [s for s, _ in values] == [s for s, _ in want]
        assert [v for _, v in values] == pytest.approx([v for _, v in want], rel=1e-6)
    assert images == {"matrix/parameters": [2], "matrix/r2": [2]}


@pytest.mark.parametrize("lightning", [False, True])
def test_a_writer_of_its_own_is_closed_in_the_end(tmp_path, monkeypatch, lightning):
    import torch.utils.tensorboard as tensorboard

    closed = []
    real = tensorboard.SummaryWriter.close
    monkeypatch.setattr(tensorboard.SummaryWriter, "close", lambda self: (closed.append(self), real(self)))
    monitor = Monitor(None, tensorboard=tmp_path)
    if lightning:
        monitor.lightning().teardown(None, None, "fit")
    else:
        with pytest.raises(ZeroDivisionError), monitor as entered:
            assert entered is monitor and closed == []
            1 / 0  # noqa: B018
    assert closed == [monitor.writer]


def test_a_writer_needs_add_scalar_alone():
    writer = Numbers()
    with Monitor(None, tensorboard=writer, images=DATA.images, factors=FACTORS, log_every=2) as monitor:
        for k in range(3):
            monitor.step(k, {"loss": 1.0 + k}, lr=0.5)
        monitor.epoch(pages.model, 0, 7)
    assert writer.seen[:4] == [("loss", 1.0, 0), ("lr", 0.5, 0), ("loss", 3.0, 2), ("lr", 0.5, 2)]
    assert {n for n, _, _ in writer.seen[4:]} == {f"r2/{s}/{f}" for s in SPACES for f in FACTORS}
    assert {s for _, _, s in writer.seen[4:]} == {7}


def test_a_writer_of_the_callers_gets_pictures_and_stays_open():
    writer = Everything()
    with Monitor(None, tensorboard=writer, images=DATA.images, factors=FACTORS) as monitor:
        monitor.epoch(pages.model, 0, 7)
    assert writer.figures == [("matrix/r2", 7, list(SPACES))]


def test_without_matplotlib_the_numbers_are_written(monkeypatch):
    monkeypatch.setitem(sys.modules, "ssd_addon.plots", None)
    writer = Everything()
    Monitor(None, tensorboard=writer, images=DATA.images, factors=FACTORS).epoch(pages.model, 0, 0)
    assert writer.figures == [] and len(writer.seen) == 6


def test_a_folder_needs_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="tensorboard: expected the package, to write to a folder: got none"):
        Monitor(None, tensorboard=tmp_path)


# ---- ranks


def test_ranks_other_than_0_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    options = {"views": pages.views(), "images": DATA.images, "factors": FACTORS}
    for rank in (1, 0):
        monkeypatch.setattr(dist, "get_rank", lambda r=rank: r)
        log, folder = tmp_path / f"{rank}" / "log.jsonl", tmp_path / f"tb{rank}"
        with Monitor(log, tensorboard=folder, **options) as monitor:
            assert bool(monitor.step(0, {"loss": 1.0})) == (rank == 0)
            assert bool(monitor.epoch(heads() if rank == 0 else None, 0, 0)) == (rank == 0)
            monitor.write({"step": 1})
        assert log.exists() == log.parent.exists() == folder.exists() == (rank == 0)
    assert len(lines(log)) == 3


# ---- bad arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"views": pages.views()}, ValueError, "expected images, on which views and factors are measured: got none"),
        ({"factors": FACTORS}, ValueError, "expected images, on which views and factors are measured: got none"),
        ({"every": 0}, ValueError, "every: expected a whole number, 1 or more: got 0"),
        ({"every": 1.5}, ValueError, "every: expected a whole number, 1 or more: got 1.5"),
        ({"log_every": -1}, ValueError, "log_every: expected a whole number, 1 or more: got -1"),
        ({"log_every": True}, ValueError, "log_every: expected a whole number, 1 or more: got True"),
        ({"tensorboard": 3}, TypeError, "tensorboard: expected a folder or a writer: got int"),
        ({"tensorboard": SimpleNamespace(add_scalar=1)}, TypeError, "got SimpleNamespace"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Monitor(None, **arguments)


def test_a_log_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Monitor(tmp_path / "file" / "log.jsonl")


# ---- Lightning


def loader():
    return DataLoader(TensorDataset(DATA.images), batch_size=8)


def module(inside):
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.inside, self.views, self.criterion = inside, pages.views(), JointEntropyLoss("simclr")

        def training_step(self, batch, index):
            if not isinstance(self.inside, StyleHeads):
                return self.inside(batch[0]).square().mean()
            found = self.criterion.terms(self.inside(self.views(batch[0])))
            self.log_dict(found.scalars())
            return found.loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def fit(inside, monitor, epochs=2, logger=False, **options):
    import pytorch_lightning as pl

    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor.lightning()],
        **options,
    )
    trainer.fit(module(inside), loader())
    return trainer


def test_lightning_writes_the_lines_of_a_plain_loop(tmp_path):
    options = {"views": pages.views(), "images": DATA.images, "factors": FACTORS, "log_every": 2}
    fit(heads(), Monitor(tmp_path / "lightning", **options))

    model, views, criterion = heads(), pages.views(), JointEntropyLoss("simclr")
    optimizer, step = torch.optim.SGD(model.parameters(), lr=0.1), 0
    monitor = Monitor(tmp_path / "plain", **options)
    for epoch in range(2):
        for (images,) in loader():
            found = criterion.terms(model(views(images)))
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()
            monitor.step(step, found)
            step += 1
        monitor.epoch(model, epoch, step)

    got, expected = lines(tmp_path / "lightning"), lines(tmp_path / "plain")
    assert [(line["step"], line.get("epoch")) for line in got] == [(0, None), (2, None), (3, 0), (4, None), (6, 1)]
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"tables"}:
            assert a[name] == pytest.approx(b[name], abs=1e-4), name


def test_lightning_writes_to_the_trainers_tensorboard(tmp_path):
    import pytorch_lightning as pl

    logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version="run")
    monitor = Monitor(None, images=DATA.images, factors=FACTORS, log_every=1)
    fit(heads(), monitor, 1, logger, log_every_n_steps=1)
    logger.experiment.close()
    scalars, images = read(tmp_path / "run")
    assert {*KNOWN, "loss", "constraint/content"} <= scalars.keys()
    assert {step for step, _ in scalars["loss"]} == {0, 1, 2} and scalars[KNOWN[0]][0][0] == 3
    assert images == {"matrix/r2": [3]}


def test_lightning_gives_the_loss_where_the_module_logs_nothing(tmp_path):
    callback, outputs = Monitor(tmp_path / "log", log_every=2).lightning(), {"loss": torch.tensor(0.25)}  # of 2
    for step in range(1, 4):
        for batch in range(2):  # two batches make a step: it is written once
            trainer = SimpleNamespace(
                global_step=step, callback_metrics={"lr": torch.tensor(0.1)}, accumulate_grad_batches=2
            )
            callback.on_train_batch_end(trainer, None, outputs, None, batch)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / "log")] == [(0, 0.5), (2, 0.5)]


def test_a_lightning_module_without_style_heads_says_so():
    monitor = Monitor(None, images=DATA.images, factors=FACTORS)
    with pytest.raises(ValueError, match="expected a StyleHeads inside the LightningModule Module: got none"):
        fit(nn.Conv2d(3, 2, 3), monitor, 1)


def test_lightning_measures_the_model_that_is_named():
    wrapped = nn.ModuleDict({"first": heads(), "second": heads(1)})
    mine, seen = module(wrapped), []
    trainer = SimpleNamespace(current_epoch=0, global_step=3)
    for model in ("inside.second", wrapped["second"], lambda m: m.inside["second"], None):
        monitor = Monitor(None, images=DATA.images, factors=FACTORS)
        monitor.epoch = lambda found, epoch, step: seen.append(found)
        callback = monitor.lightning(model=model)
        callback.on_fit_start(trainer, mine)
        callback.on_train_epoch_end(trainer, mine)
    assert seen == [wrapped["second"]] * 3 + [wrapped["first"]]
    with pytest.raises(ValueError, match="expected the name of a module in the LightningModule Module: got 'inside.x'"):
        monitor.lightning(model="inside.x").on_fit_start(trainer, mine)


def test_lightning_writes_the_loss_of_accumulated_batches_whole(tmp_path):
    class Square(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :1] + self.zero

        def __init__(self):
            super().__init__()
            self.zero = nn.Parameter(torch.zeros(()))

    fit(Square(), Monitor(tmp_path / "log", log_every=1), 1, accumulate_grad_batches=3)
    (line,) = lines(tmp_path / "log")
    assert line["loss"] == pytest.approx(float(DATA.images[16:].flatten(1)[:, :1].square().mean()), rel=1e-5)


def test_a_monitor_of_its_own_tensorboard_leaves_the_trainers_alone():
    own, other = Numbers(), Numbers()
    trainer = SimpleNamespace(loggers=[SimpleNamespace(experiment=None), SimpleNamespace(experiment=other)])
    for writer, expected in ((own, own), (None, other)):
        monitor = Monitor(None, tensorboard=writer)
        monitor.lightning().setup(trainer, None, "fit")
        monitor.step(0, {"loss": 1.0})  # the trainer's logger has it from the module already
        assert monitor.writer is expected and expected.seen == ([("loss", 1.0, 0)] if writer else [])
    other.close = lambda: pytest.fail("the trainer's writer is the trainer's")
    monitor.lightning().teardown(trainer, None, "fit")


def test_a_second_training_has_its_own_writer_and_its_own_length():
    monitor = Monitor(None, log_every=1)
    for k, steps in ((0, 3), (1, 6)):
        writer = Numbers()
        callback, inside = monitor.lightning(), heads(k)
        trainer = SimpleNamespace(
            loggers=[SimpleNamespace(experiment=writer)],
            estimated_stepping_batches=steps,
            global_step=0,
        )
        callback.setup(trainer, None, "fit")
        callback.on_train_start(trainer, inside)
        assert monitor.writer is writer and monitor._logged_elsewhere
        assert monitor.alarm.total_steps == steps and monitor.alarm.widths == SPACES
        callback.teardown(trainer, None, "fit")
        assert monitor.writer is None and not monitor._logged_elsewhere
    own = Monitor(None, tensorboard=writer, alarm=CollapseAlarm(total_steps=9))
    callback = own.lightning()
    callback.setup(trainer, None, "fit")
    callback.on_train_start(trainer, inside)
    callback.teardown(trainer, None, "fit")
    assert own.writer is writer and own.alarm.total_steps == 9  # the caller's stay


def test_under_manual_optimization_steps_are_batches(tmp_path):
    """Two optimizers step in every batch, so that Lightning's number of steps is always even; or it stays 0."""
    callback = Monitor(tmp_path / "log", log_every=3).lightning()
    manual = SimpleNamespace(automatic_optimization=False, modules=lambda: ())
    for batch in range(8):
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=batch))
        trainer = SimpleNamespace(global_step=0, callback_metrics={"loss": torch.tensor(1.0)}, fit_loop=loop)
        callback.on_train_batch_end(trainer, manual, None, None, batch)
    assert [line["step"] for line in lines(tmp_path / "log")] == [0, 3, 6]


def test_the_length_of_a_manual_training_with_a_limit_is_unknown():
    """max_steps counts the steps of all optimizers, and lines count batches."""
    for manual, limit, expected in ((True, 8, None), (True, -1, 6), (False, 8, 6)):
        monitor = Monitor(None)
        mine = SimpleNamespace(automatic_optimization=not manual, modules=lambda: ())
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=-1))
        trainer = SimpleNamespace(estimated_stepping_batches=6, max_steps=limit, global_step=0, fit_loop=loop)
        monitor.lightning().on_train_start(trainer, mine)
        assert monitor.alarm.total_steps == expected


def test_a_line_is_written_where_a_batch_makes_several_steps(tmp_path):
    callback = Monitor(tmp_path / "log", log_every=4).lightning()
    for steps in (3, 6, 9, 12):
        trainer = SimpleNamespace(global_step=steps, callback_metrics={"loss": torch.tensor(1.0)})
        callback.on_train_batch_end(trainer, None, None, None, 0)
    assert [line["step"] for line in lines(tmp_path / "log")] == [2, 5, 8]  # 0, 4 and 8 were passed
    resumed = Monitor(tmp_path / "other", log_every=4, alarm=False).lightning()
    resumed.on_train_start(SimpleNamespace(global_step=6), None)
    for steps in range(7, 11):
        trainer = SimpleNamespace(global_step=steps, callback_metrics={"loss": torch.tensor(1.0)})
        resumed.on_train_batch_end(trainer, None, None, None, 0)
    assert [line["step"] for line in lines(tmp_path / "other")] == [8]  # no line of its own for resuming


def test_a_callback_goes_to_a_spawned_process(tmp_path):
    callback = Monitor(tmp_path / "log", factors=FACTORS, images=DATA.images).lightning(model="inside")
    copied = pickle.loads(pickle.dumps(callback))
    assert copied.state_key == callback.state_key and type(copied).__mro__[1] is type(callback).__mro__[1]
    copied.on_train_batch_end(SimpleNamespace(global_step=1, callback_metrics={"loss": 1.0}), None, None, None, 0)
    assert [line["step"] for line in lines(tmp_path / "log")] == [0]


def test_monitors_in_one_trainer_have_states_of_their_own(tmp_path):
    import pytorch_lightning as pl

    known = {"images": DATA.images, "factors": FACTORS}
    each = [Monitor(None).lightning(), Monitor(None, **known).lightning(), Monitor(None).lightning(model="inside")]
    each += [Monitor(tmp_path / "log").lightning(), Monitor(tmp_path / "other").lightning()]
    assert len({c.state_key for c in each}) == 5
    assert each[3].state_key == f"ssd_addon.Monitor({tmp_path / 'log'})"  # as older checkpoints have it
    pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=each)


def test_names_that_end_like_those_of_lightning_are_kept():
    mine, monitor = module(heads()), Monitor(None, log_every=1)
    numbers = {"light": 1.0, "light_step": 2.0, "loss": 1.0, "loss_step": 2.0, "loss_epoch": 3.0}
    trainer = SimpleNamespace(global_step=1, callback_metrics={k: torch.tensor(v) for k, v in numbers.items()})
    monitor.writer = Numbers()
    monitor.lightning().on_train_batch_end(trainer, mine, None, None, 0)
    assert sorted(name for name, *_ in monitor.writer.seen) == ["light", "light_step", "loss"]


def test_which_lightning(monkeypatch):
    import pytorch_lightning as pl

    class Other:
        pass

    assert isinstance(Monitor(None).lightning(Other), Other)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    assert isinstance(Monitor(None).lightning(), pl.Callback)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", SimpleNamespace(Callback=Other))
    assert isinstance(Monitor(None).lightning(), Other)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(
        ImportError, match="needs lightning or pytorch_lightning, and neither is installed: pip install lightning"
    ):
        Monitor(None).lightning()


# ---- what a review found


def test_a_log_that_is_taken_up_after_a_cut(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0}\n{"st')
    Monitor(log).step(10, {"loss": 1.0})
    Monitor(log).step(20, {"loss": 1.0})
    assert [e["step"] for e in read_log(log)] == [0, 10, 20]


def test_a_log_that_is_a_folder(tmp_path):
    with pytest.raises(OSError):
        Monitor(tmp_path)


@pytest.mark.parametrize("lr", [torch.tensor(0.1), np.float32(0.1)])
def test_further_numbers(tmp_path, lr):
    Monitor(tmp_path / "log").step(0, {"loss": 1.0}, lr=lr)


@pytest.mark.filterwarnings("error")
def test_a_loss_with_a_gradient():
    Monitor(None).step(0, {"loss": torch.ones((), requires_grad=True)})  # the warning comes once in a process


def test_accumulated_gradients_have_no_step_before_the_first(tmp_path):
    from types import SimpleNamespace

    callback = Monitor(tmp_path / "log", log_every=1).lightning()
    trainer = SimpleNamespace(global_step=0, callback_metrics={"loss": torch.tensor(1.0)})
    callback.on_train_batch_end(trainer, None, None, None, 0)
    assert "-1" not in (tmp_path / "log").read_text()


def test_lightning_without_style_heads_and_without_matrices():
    from types import SimpleNamespace

    trainer = SimpleNamespace(current_epoch=0, global_step=3)
    Monitor(None).lightning().on_train_epoch_end(trainer, nn.Linear(2, 2))  # terms alone were asked for


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(0, 3, 8, 8)}, r"images \[n, C, H, W\], one or more: got \[0, 3, 8, 8\]"),
        ({"images": [1, 2]}, "images .*got list"),
        ({"images": DATA.images * 255}, r"images: expected uint8, or floating point in \[0, 1\]: got values from"),
        ({"images": DATA.images * math.nan}, "images: expected uint8, or floating point .*got values from nan"),
        ({"images": (DATA.images * 255).int()}, "images: expected uint8, or floating point .*got torch.int32"),
        ({"views": "color_spatial"}, "expected views as StructuredViews: got str"),
        ({"factors": {"x": torch.rand(3)}}, "factor 'x': expected a value for each of the 24 images: got"),
        ({"factors": {"x": [0.0] * 24}}, "factor 'x': expected a tensor or Circular: got list"),
        ({"probe": "linear"}, "probe: expected one of"),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_training(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Monitor(None, **({"images": DATA.images} | change))


def test_step_and_terms_of_another_type():
    monitor = Monitor(None)
    with pytest.raises(TypeError, match="step: expected a whole number: got '0'"):
        monitor.step("0", {"loss": 1.0})
    with pytest.raises(TypeError, match=r"terms: expected criterion.terms\(z\), or a mapping name -> number: got 3.0"):
        monitor.step(0, 3.0)


@pytest.mark.parametrize(
    ("there", "kept"),
    [
        (b'{"step": 1}\r\n{"step": 2}\r\n{"step": 3}\r\n{"st', [1, 2, 3]),
        (b'{"step": 1}\r\n{"step": 2}\r', [1, 2]),
        (b'\xef\xbb\xbf{"step": 1}', [1]),
        ('{"step": 1}\n{"step": 2, "note": "\u00e4\u00f6\u00fc"}\n{"st'.encode(), [1, 2]),
        (b'{"step": 1, "note": "\xe4"}\n{"step": 2, "note": "\xff"}', [1, 2]),
        (b'{"step": 1}\n\x00\x00\x00', [1]),
    ],
    ids=["CRLF", "CR at the end", "byte-order mark", "UTF-8", "Latin-1", "zeros"],
)
def test_whole_lines_of_a_log_stay_whatever_wrote_them(tmp_path, there, kept):
    (tmp_path / "l.jsonl").write_bytes(there)
    Monitor(tmp_path / "l.jsonl").write({"step": 4})
    assert [entry["step"] for entry in read_log(tmp_path / "l.jsonl")] == [*kept, 4]
