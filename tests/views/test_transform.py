"""Structured views per sample, in data-loader workers: fresh, exact, resumable; beside lightly's data sets."""

import pickle
import types

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from lightly.data import LightlyDataset
from PIL import Image
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)
from torchvision.transforms import v2

from ssd_addon import JointEntropyLoss, StructuredCollate, StructuredTransform, StructuredViews, StyleHeads, operations
from ssd_addon._lightning_batch import of_workers
from ssd_addon.augment import turns
from ssd_addon.metrics import parameter_matrix
from ssd_addon.runs import ResumableSampler

GROUPS = {
    "color": [K.ColorJitter(0.4, 0.4, 0.4, 0.1)],
    "spatial": [K.RandomResizedCrop((16, 16)), K.RandomHorizontalFlip()],
}


def pictures(n=12, seed=0):
    g = np.random.default_rng(seed)
    return [Image.fromarray(g.integers(0, 255, (20 + i % 3, 24 + i % 2, 3), dtype="uint8")) for i in range(n)]


class Pictures(Dataset):
    def __init__(self, transform, n=12, repeated=1):
        self.pictures, self.transform = pictures(n) * repeated, transform

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return self.transform(self.pictures[i]), i


def epochs(transform, count=1, seed=0, start=0, **options):
    """[epoch][view] of all samples, in the order of the epoch."""
    data = Pictures(transform, repeated=options.pop("repeated", 1))
    sampler = ResumableSampler(data, num_replicas=1, rank=0, shuffle=True)
    generator, out = torch.Generator(), []
    loader = DataLoader(data, 2, sampler=sampler, generator=generator, **options)
    for epoch in range(count):
        generator.manual_seed(seed + epoch)
        sampler.set_epoch(epoch)
        sampler.start = start
        parts = [(views, i) for views, i in loader]
        views = [torch.cat([v[k] for v, _ in parts]) for k in range(len(transform.plan.spaces) + 1)]
        out.append((views, torch.cat([i for _, i in parts])))
    return out


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def transform():
    return StructuredTransform(GROUPS, then=[K.RandomGrayscale(p=0.5)], seed=3)


def test_sharing_is_exact(transform):
    """The key of a style makes of a picture what the query does, but for what is redrawn: read from the parameters."""
    made = StructuredTransform(GROUPS, seed=3, parameters=True)
    for picture in pictures():
        views, parameters = made(picture)
        assert len(views) == 4 and made.plan.spaces == ("content", "color", "spatial")
        for key, group in ((2, "color"), (3, "spatial")):
            for op, drawn in parameters[0][group].items():
                for name, value in drawn.items():
                    assert torch.equal(value, parameters[key][group][op][name])
        hue = [p["color"]["0.ColorJitter"]["hue_factor"] for p in parameters]
        assert hue[0] != hue[1] != hue[3] and hue[0].shape == ()


@pytest.mark.parametrize("workers,context", [(0, None), (1, "fork"), (2, "fork"), (2, "spawn")])
def test_an_epoch_is_repeated_exactly_and_the_next_one_is_fresh(transform, workers, context):
    options = {"num_workers": workers, "multiprocessing_context": context}
    torch.manual_seed(0)
    (first, i), (second, j) = epochs(transform, 2, **options)
    torch.manual_seed(0)
    ((again, k),) = epochs(transform, **options)
    assert torch.equal(i, k) and same(first, again)
    back = [torch.argsort(x) for x in (i, j)]
    for a, b in zip(first, second, strict=True):
        assert not (a[back[0]] == b[back[1]]).flatten(1).all(1).any()  # every sample is drawn anew
    flat = torch.cat(first).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)


def test_the_number_of_workers_changes_nothing(transform):
    ((one, i),), ((two, j),) = (epochs(transform, num_workers=n) for n in (1, 2))
    assert torch.equal(i, j) and same(one, two)


@pytest.mark.parametrize("start", [2, 6, 10])
def test_an_epoch_can_be_continued_in_the_middle(transform, start):
    ((whole, i),), ((rest, j),) = (epochs(transform, num_workers=2, start=s) for s in (0, start))
    assert torch.equal(i[start:], j) and same([v[start:] for v in whole], rest)


def test_persistent_workers_draw_anew_in_every_epoch(transform):
    found = epochs(transform, 4, num_workers=2, persistent_workers=True)
    every = torch.cat([torch.cat(views) for views, _ in found]).flatten(1)
    assert len(every.unique(dim=0)) == len(every)


def test_a_sample_that_is_drawn_twice_is_augmented_twice(transform):
    for workers in (0, 1):
        ((views, _),) = epochs(transform, num_workers=workers, repeated=2)
        flat = torch.cat(views).flatten(1)
        assert len(flat.unique(dim=0)) == len(flat)


WEIGHTED = list(WeightedRandomSampler([6.0] + [1.0] * 7, 32, generator=torch.Generator().manual_seed(1)))
REPEATED = [i for i in range(8) for _ in range(3)] + list(range(8))  # three times in a batch or two, and once more


def drawn(order, workers, start=0, batch=4, **options):
    """[number, view, ...] of the images in this order, from place `start` on."""
    data = Pictures(StructuredTransform(GROUPS, seed=3))
    options["generator"] = torch.Generator().manual_seed(5)
    parts = [views for views, _ in DataLoader(data, batch, sampler=order[start:], num_workers=workers, **options)]
    return torch.cat([torch.stack(views, 1) for views in parts])


def distinct(views):
    return len(views.flatten(0, 1).flatten(1).unique(dim=0))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("order", [WEIGHTED, REPEATED], ids=["weighted", "repeated"])
def test_a_sample_that_comes_often_has_other_views_each_time_whatever_the_workers(order):
    one = drawn(order, 1)
    assert distinct(one) == 4 * len(order)
    for workers in (2, 4):
        assert torch.equal(drawn(order, workers), one)
    for start in (4, 20):
        assert torch.equal(drawn(order, 3, start), one[start:])


@pytest.mark.slow
def test_oversampled_images_are_drawn_anew_in_spawned_and_persistent_workers():
    one = drawn(WEIGHTED, 1)
    assert torch.equal(drawn(WEIGHTED, 2, multiprocessing_context="spawn"), one)
    assert distinct(drawn(WEIGHTED, 2, persistent_workers=True)) == 4 * len(WEIGHTED)


def test_equal_batches_are_counted_by_each_worker():
    order = [0] * 4
    assert distinct(drawn(order, 1, batch=1)) == 16
    assert distinct(drawn(order, 2, batch=1)) == 8  # two for each worker, as the page says
    assert distinct(drawn(order, 2, batch=1, persistent_workers=True)) == 16


class Stream(IterableDataset):
    """Samples of this worker's share of the pictures, without indices."""

    def __init__(self, skipped=0):
        self.transform, self.skipped = StructuredTransform(GROUPS, seed=3), skipped

    def __iter__(self):
        info = get_worker_info()
        for i in range(self.skipped + info.id, 12, info.num_workers):
            yield self.transform(pictures()[i]), i


def test_draws_of_an_iterable_data_set_depend_on_the_samples_alone():
    def streamed(workers, batch=2, skipped=0):
        loader = DataLoader(Stream(skipped), batch, num_workers=workers, generator=torch.Generator().manual_seed(5))
        return {int(k): v for views, i in loader for k, *v in zip(i, *views, strict=True)}

    whole = streamed(1)
    for other in (streamed(2), streamed(2, batch=3), streamed(1, skipped=5)):
        assert all(same(views, whole[k]) for k, views in other.items())


@pytest.mark.parametrize("make", [torch.tensor, np.array, tuple])
def test_indices_of_any_kind_are_read(make):
    """Batches of 1200 indices, of which torch and numpy print six."""

    class Batches:
        def __iter__(self):
            yield from (make([0] * 600 + [k] + [0] * 599) for k in (1, 2))

    made = StructuredTransform({"color": GROUPS["color"]}, seed=3)
    found = list(DataLoader(Whole(made), batch_size=None, sampler=Batches(), num_workers=2))
    assert not torch.equal(found[0][0], found[1][0])


class Whole(Dataset):
    """One sample for a whole list of indices, as with batch_size=None."""

    def __init__(self, transform):
        self.transform = transform

    def __getitem__(self, index):
        return self.transform(pictures()[0])


def test_a_loop_that_names_its_indices_otherwise_gives_draws_by_the_samples_alone(monkeypatch):
    monkeypatch.setattr(turns, "_loop", lambda: types.SimpleNamespace(f_locals={"persistent_workers": False}))
    turns._persistent.cache_clear()
    assert distinct(drawn([0, 0, 1, 2], 1)) == 16
    assert torch.equal(drawn([0, 1, 2, 3], 2, batch=2), drawn([0, 1, 2, 3], 1, batch=4))


def test_ranks_draw_differently(monkeypatch):
    found = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        ((views, _),) = epochs(StructuredTransform(GROUPS, seed=3), num_workers=1)
        found.append(views)
    assert not torch.equal(found[0][0], found[1][0])


def test_lightlys_data_sets_train(tmp_path):
    for i, picture in enumerate(pictures()):
        folder = tmp_path / f"class{i % 2}"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"{i}.png")
    transform = StructuredTransform(GROUPS, then=[K.Normalize([0.5] * 3, [0.5] * 3)])
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model = StyleHeads(net, {"content": 5, "spatial": 3, "color": 2}, in_features=6, hidden=())  # another order
    criterion = JointEntropyLoss()
    for views, labels, names in DataLoader(LightlyDataset(str(tmp_path), transform=transform), 6, num_workers=1):
        assert isinstance(views, list) and views[0].shape == (6, 3, 16, 16) and len(labels) == len(names) == 6
        loss = criterion(model(views), transform.plan)
        loss.backward()
        assert loss.isfinite() and loss != criterion(model(views))  # whose order is another


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("parameters", [True, False])
def test_a_collate_function_makes_a_batch_with_plan_and_parameters(seen, parameters):
    made = StructuredTransform(GROUPS, seed=3, parameters=parameters)
    samples = [(made(p) if seen else p, i, f"{i}.png") for i, p in enumerate(pictures(5))]
    batch, labels, names = StructuredCollate(8, views=made)(samples)
    assert batch.plan == made.plan and batch.views.shape == (4, 5, 3, 16, 16) and names[4] == "4.png"
    assert labels.tolist() == list(range(5)) and len(batch.parameters) == (4 if parameters else 0)
    if seen:
        views = samples[3][0][0] if parameters else samples[3][0]
        assert all(torch.equal(batch[v][3], views[v]) for v in range(4))
    if parameters:
        drawn = [p["color"]["0.ColorJitter"]["hue_factor"] for p in batch.parameters]
        assert drawn[0].shape == (5,) and torch.equal(drawn[2], drawn[0]) and not torch.equal(drawn[1], drawn[0])


def test_views_of_another_order_of_groups_are_refused_and_never_swapped():
    turned = {name: GROUPS[name] for name in reversed(GROUPS)}
    one, other = (StructuredTransform(groups, seed=3, parameters=p) for groups, p in ((GROUPS, False), (turned, True)))
    for made, views in ((one, other), (other, one)):
        with pytest.raises(ValueError, match=r"views of content, .*, in this order: got those of content, .*; give"):
            StructuredCollate(8, views=views)([(made(p), 0) for p in pictures(2)])
    samples = [one(p) for p in pictures(2)]
    assert type(default_collate(samples)) is type(pickle.loads(pickle.dumps(samples[0]))) is list


@pytest.mark.parametrize("seen", [True, False])
def test_images_of_several_sizes_need_an_operation_that_gives_one(seen):
    made = StructuredTransform({"color": GROUPS["color"]}, seed=3)
    samples = [(made(p) if seen else p, 0) for p in pictures(2)]
    with pytest.raises(ValueError, match=r"views of one size.*: got \[3, 20, 24\] and \[3, 21, 25\]; add an operation"):
        StructuredCollate(8, views=made)(samples)


@pytest.mark.parametrize("change", [lambda v: v.numpy(), lambda v: Image.new("RGB", (16, 16))])
def test_views_that_are_no_tensors_are_refused(transform, change):
    samples = [([change(v) for v in transform(p)], 0) for p in pictures(2)]
    with pytest.raises(TypeError, match="expected views as tensors, as StructuredTransform makes them: got (nd|Image)"):
        StructuredCollate(8, views=transform)(samples)


@pytest.mark.parametrize(
    "sample",
    [
        pictures()[0],
        Image.fromarray(np.zeros((9, 9), "uint8") + 7),
        np.random.default_rng(0).integers(0, 255, (18, 20, 3), dtype="uint8"),
        np.random.default_rng(0).random((18, 20)).astype("float32"),
        torch.rand(3, 18, 20),
        (255 * torch.rand(3, 18, 20)).byte(),
    ],
)
def test_what_a_sample_may_be(transform, sample):
    views = transform(sample)
    assert all(v.shape == (3, 16, 16) and v.dtype == torch.float32 and 0 <= v.min() <= v.max() <= 1 for v in views)


@pytest.mark.parametrize(
    "sample,error,message",
    [
        ("picture.jpg", TypeError, "a PIL image, an array or a tensor: got str"),
        (torch.rand(1, 3, 8, 8), ValueError, r"3 dimensions \(sample_ndim\), without the batch: got \[1, 3, 8, 8\]"),
        (torch.rand(3, 8, 8) * 255, ValueError, r"expected values in \[0, 1\]"),
        (np.zeros((8, 8), "int64"), TypeError, "int64"),
    ],
)
def test_bad_samples(transform, sample, error, message):
    with pytest.raises(error, match=message):
        transform(sample)


def test_any_operation_and_any_shape():
    ops = [operations.seeded(lambda x: x * torch.rand(1)), v2.ColorJitter(0.4)]
    assert StructuredTransform({"gain": ops})(pictures()[0])[0].shape == (3, 20, 24)
    series = StructuredTransform({"gain": ops[:1]}, sample_ndim=2, value_range=None)
    assert [v.shape for v in series(np.random.default_rng(0).normal(size=(4, 50)))] == [(4, 50)] * 3
    with pytest.raises(ValueError, match="an interleaved plan needs whole batches: got 'interleaved'"):
        StructuredTransform({"gain": ops}, plan="interleaved")


def test_it_is_picklable_and_says_what_it_does(transform):
    assert "color" in repr(pickle.loads(pickle.dumps(transform))) and "0.ColorJitter" in repr(transform)


def test_samples_of_any_shape_and_range():
    class Gain:
        def draw(self, shape, generator):
            return {"gain": 0.5 + torch.rand(shape[0], generator=generator)}

        def apply(self, x, parameters):
            return x * parameters["gain"].view(-1, *[1] * (x.ndim - 1))

    class Shift(Gain):
        def apply(self, x, parameters):
            return x + parameters["gain"].view(-1, *[1] * (x.ndim - 1))

    for shape in ((7,), (4, 30), (5, 3, 8, 8)):
        views = StructuredViews(
            {"gain": [Gain()], "shift": [Shift()]}, sample_ndim=len(shape), value_range=None, seed=0
        )
        x = 10 * torch.randn(6, *shape)
        batch = views(x)
        assert batch.views.shape == (4, 6, *shape) and torch.equal(views.replay(x, batch.parameters[2]), batch[2])
        assert views.parameter_sizes() == {"gain/0.Gain/gain": 1, "shift/0.Shift/gain": 1}
        table = parameter_matrix(lambda y: {"content": y.flatten(1)[:, :4]}, views, x.repeat(20, *[1] * len(shape)))
        assert "gain" in table.factors
        with pytest.raises(ValueError, match=r"samples: expected \[B, \.\.\.\] of"):
            views(x[0])
    ranged = StructuredViews({"gain": [Gain()]}, sample_ndim=2, value_range=(-1, 1), seed=0)
    assert ranged(torch.zeros(3, 4, 30)).views.shape == (3, 3, 4, 30)
    with pytest.raises(ValueError, match=r"samples: expected values in \[-1, 1\].*value_range=\(lowest, highest\)"):
        ranged(torch.full((3, 4, 30), 1.1))
    with pytest.raises(TypeError, match=r"samples: expected floating point: got torch.uint8"):
        ranged(torch.zeros(3, 4, 30, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expects values in \[-1, 1\] and clamps values outside"):

        class Clipped(Gain):
            def apply(self, x, parameters):
                return super().apply(x, parameters).clamp(-1, 1)

        StructuredViews({"g": [Shift(), Clipped()]}, sample_ndim=2, value_range=(-1, 1), seed=0)(torch.zeros(3, 4, 30))
    for bad in ((1, 0), (0, float("inf")), 3, (0, 1, 2), "ab"):
        with pytest.raises(ValueError, match="value_range: expected"):
            StructuredViews({"gain": [Gain()]}, value_range=bad)
    with pytest.raises(ValueError, match=r"0\.ColorJitter could not be"):
        StructuredViews({"color": [K.ColorJitter(0.4)]}, sample_ndim=2, seed=0)(torch.rand(3, 4, 30))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_width_become_views_of_32_bits(transform, dtype):
    x = torch.rand(3, 16, 16).to(dtype)
    torch.manual_seed(0)
    views = transform(x)
    torch.manual_seed(0)
    for a, b in zip(views, transform(x.float()), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_parameters_say_which_operations_made_a_view():
    """The query and the keys have operations of their own for the same stage."""
    ops = [K.RandomGaussianBlur((3, 3), (0.1, 0.2), p=1.0)], [K.RandomGaussianBlur((9, 9), (2.0, 3.0), p=1.0)]
    groups = {"color": [K.ColorJitter(hue=0.2, p=1.0)]}
    made = StructuredTransform(groups, then=ops[0], key_then=ops[1], seed=0, parameters=True)
    images = [torch.rand(3, 16, 16) for _ in range(4)]
    torch.manual_seed(0)
    each = [made(x) for x in images]
    views = made.views
    for batch in (made.collated(each), of_workers(default_collate(each), made)):
        for v in range(3):
            again = views.replay(torch.stack(images), batch.parameters[v])
            torch.testing.assert_close(again, batch.views[v], rtol=0, atol=1e-6)
    parameters = each[1][1][1]
    one = {s: {o: {k: t[None] for k, t in p.items()} for o, p in each.items()} for s, each in parameters.items()}
    torch.testing.assert_close(views.replay(images[1][None], one)[0], each[1][0][1], rtol=0, atol=1e-6)


def test_arrays_of_any_values_where_any_are_allowed():
    gain = operations.seeded(lambda x: x * torch.rand(1))
    made = StructuredTransform({"gain": [gain]}, seed=0, value_range=None)
    array = np.random.default_rng(0).normal(size=(6, 5, 2)) * 100
    torch.manual_seed(0)
    views = made(array)
    torch.manual_seed(0)
    for a, b in zip(views, made(torch.from_numpy(array).permute(2, 0, 1)), strict=True):
        assert a.shape == (2, 6, 5) and torch.equal(a, b)


def test_functions_over_all_tensors_find_the_views():
    """What frameworks map over samples and batches (a transfer, a cast), also where they build containers anew."""
    views = StructuredTransform({"color": [K.ColorJitter(hue=0.2, p=1.0)]}, seed=0)(torch.rand(3, 8, 8))
    doubled = torch.utils._pytree.tree_map(lambda t: 2 * t, {"views": views})["views"]
    assert type(doubled) is list and all(torch.equal(2 * a, b) for a, b in zip(views, doubled, strict=True))
    assert type(views)(t for t in views) == views
