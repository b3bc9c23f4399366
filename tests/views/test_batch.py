"""ViewBatch: moved, pickled, cut and joined whole; a node of pytrees."""

import pickle

import kornia.augmentation as K
import pytest
import torch
from torch.utils import _pytree

from ssd_addon import StructuredViews, ViewBatch, ViewPlan

COLOR = "0.ColorJitter"


def groups():
    return {
        "spatial": [K.RandomResizedCrop((16, 16), scale=(0.2, 1.0)), K.RandomHorizontalFlip()],
        "color": [K.ColorJitter(0.4, 0.4, 0.4, 0.4, p=0.5), K.RandomGrayscale(p=0.5)],
    }


def images(b=6, seed=0):
    return torch.rand(b, 3, 20, 24, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    """Every tensor of two batches, and what is beside them."""
    assert a.plan == b.plan and torch.equal(a.views, b.views)
    for x, y in ((a.image_ids, b.image_ids), (a.space_index, b.space_index)):
        assert (x is None) == (y is None) and (x is None or torch.equal(x, y))
    for p, q in zip(a.parameters, b.parameters, strict=True):
        assert p.from_key.keys() == q.from_key.keys()
        assert all(torch.equal(t, q.from_key[k]) for k, t in p.from_key.items())
        for g in p:
            for op in p[g]:
                assert all(torch.equal(t, q[g][op][k]) for k, t in p[g][op].items())


KINDS = [
    {},
    {"cross_image": ("color",)},
    {"plan": "interleaved", "cross_image": ("color",)},
    {"plan": "interleaved", "key_groups": {"color": [K.ColorJitter(0.1, p=1.0), K.RandomGrayscale(p=0.9)]}},
]


def test_a_batch_moves_and_pickles_whole():
    views = StructuredViews(groups(), cross_image=("color",), seed=0)
    batch = views(images())
    half = batch.to(torch.float16)
    assert half.views.dtype == torch.float16 and half.image_ids.dtype == torch.int64
    hue = half.parameters[2]["color"][COLOR]["hue_factor"]
    assert hue.dtype == torch.float32 and torch.equal(hue, batch.parameters[2]["color"][COLOR]["hue_factor"])
    again = pickle.loads(pickle.dumps(batch))
    assert again.plan == batch.plan and torch.equal(again.image_ids, batch.image_ids)
    assert torch.equal(views.replay(images(), again.parameters[0]), batch[0])
    assert [v.shape for v in again] == [batch[0].shape] * 4


@pytest.mark.parametrize("options", KINDS)
def test_a_batch_is_cut_and_joined_again(options):
    views = StructuredViews(groups(), seed=0, **options)
    batch = views(images(9))
    parts = [batch.rows(slice(0, 4)), batch.rows([4, 5, 6]), batch.rows(torch.tensor([7, 8]))]
    same(ViewBatch.cat(parts), batch)
    ids = torch.arange(9).expand(len(batch), 9) if batch.image_ids is None else batch.image_ids
    some = batch.rows(torch.tensor([True, False] * 4 + [True]))
    assert torch.equal(some.views, batch.views[:, ::2])
    for v in range(len(batch)):
        assert torch.equal(views.replay(images(9)[ids[v, ::2]], some.parameters[v]), some[v])


def test_batches_of_two_calls_show_different_images():
    views = StructuredViews(groups(), seed=0, cross_image=("color",))
    a, b = views(images(3)), views(images(4))
    assert torch.equal(ViewBatch.cat([a, b]).image_ids, torch.cat([a.image_ids, b.image_ids + 3], 1))
    plain = StructuredViews(groups(), seed=0)
    assert ViewBatch.cat([plain(images(3)), plain(images(4))]).image_ids is None


def test_an_image_that_is_named_twice_keeps_one_id():
    batch = StructuredViews(groups(), seed=0)(images(4))
    assert batch.rows([2, 0, 2]).image_ids[0].tolist() == [2, 0, 2]
    assert batch.rows([2, 0]).image_ids is None


def test_what_cannot_be_cut_or_joined_is_refused():
    batch = StructuredViews(groups(), seed=0)(images(4))
    with pytest.raises(IndexError):
        batch.rows([4])
    with pytest.raises(ValueError, match=r"rows: expected positions \[n\] or a mask \[4\]: got \[3\]"):
        batch.rows(torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match="at least one batch"):
        ViewBatch.cat([])
    with pytest.raises(ValueError, match="expected batches of one plan"):
        ViewBatch.cat([batch, StructuredViews(groups(), plan="interleaved", seed=0)(images(4))])
    with pytest.raises(ValueError, match="an index and parameters, or none"):
        ViewBatch.cat([batch, ViewBatch(batch.views, batch.plan)])


@pytest.mark.parametrize("options", KINDS)
def test_a_batch_is_a_node_of_pytrees(options):
    batch = StructuredViews(groups(), seed=0, **options)(images(9))
    leaves, spec = _pytree.tree_flatten(batch)
    assert all(isinstance(t, torch.Tensor) for t in leaves)
    same(_pytree.tree_unflatten(leaves, spec), batch)
    assert _pytree.tree_flatten(StructuredViews(groups(), seed=1, **options)(images(9)))[1] == spec
    cast = _pytree.tree_map(lambda t: t.float(), batch)
    for mine, theirs in ((cast.image_ids, batch.image_ids), (cast.space_index, batch.space_index)):
        assert mine is theirs is None or torch.equal(mine, theirs)


def test_ids_keep_every_digit_through_a_cast_of_all_tensors():
    ids = torch.tensor([[0, 1], [0, 2**24 + 1], [0, 1]])
    batch = ViewBatch(torch.zeros(3, 2, 4), ViewPlan.shared_query(("content", "color")), image_ids=ids)
    for cast in (lambda t: t.float(), lambda t: t.bfloat16(), lambda t: t.double(), lambda t: t.to("cpu")):
        assert torch.equal(_pytree.tree_map(cast, batch).image_ids, ids)
    assert not torch.isin(_pytree.tree_map(lambda t: t.float() + 2, batch).image_ids, ids).any()
