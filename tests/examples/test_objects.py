"""The second generator of the study: an image is what its factors say, and nothing else."""

import math

import pytest
import torch
from objects import GROUNDS, RANGES, SHAPES, TEXTURES, draw_objects, render_objects, scored_objects

from ssd_addon.metrics import Circular


def drawn(n=8, seed=0, **fixed):
    """Factors of n images; a number holds for all, a list or tensor is one value for each."""
    f = draw_objects(n, torch.Generator().manual_seed(seed))
    return f | {k: torch.as_tensor(v, dtype=f[k].dtype).expand(n).clone() for k, v in fixed.items()}


def masks(**factors):
    """How much of each pixel [n, 48, 48] the object covers."""
    x = render_objects(factors | {"hue": torch.zeros_like(factors["hue"])}, textured=False)
    return x[:, 0] / factors["brightness"][:, None, None]


def test_factors_are_drawn_independently_and_reach_their_whole_range():
    f = draw_objects(20_000, torch.Generator().manual_seed(0))
    kinds = {"shape": SHAPES, "texture": len(TEXTURES), "ground": len(GROUNDS)}
    assert set(f) == set(kinds) | set(RANGES)
    for name, count in kinds.items():
        share = torch.bincount(f[name], minlength=count) / len(f[name])
        assert len(share) == count and (share - 1 / count).abs().max() < 0.01
    for name, (low, high) in RANGES.items():
        assert low <= f[name].min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < f[name].max() <= high
    columns = [f[name].double() for name in RANGES]
    columns += [(f[name] == k).double() for name, count in kinds.items() for k in range(count - 1)]
    owner = [*RANGES, *(name for name, count in kinds.items() for _ in range(count - 1))]
    other = torch.tensor([[a != b for a in owner] for b in owner])
    assert torch.corrcoef(torch.stack(columns))[other].abs().max() < 0.03


def test_the_same_generator_draws_the_same_images():
    a, b = (render_objects(drawn(4)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (4, 3, 48, 48) and a.min() >= 0 and a.max() <= 1


@pytest.mark.parametrize("ground", range(len(GROUNDS)))
def test_a_ground_is_gray_and_the_same_in_all_images(ground):
    f = drawn(12, ground=ground, brightness=1.0)
    x, outside = render_objects(f), masks(**f) == 0
    assert (x.amax(1) - x.amin(1))[outside].abs().max() < 1e-6
    seen = torch.where(outside, x[:, 0], torch.nan)
    count = outside.sum(0)
    assert seen[outside].max() < 0.2  # an object is at least 0.7 bright under full light
    spread = seen.nan_to_num(-1).amax(0) - seen.nan_to_num(2).amin(0)
    assert (count > 1).float().mean() > 0.9 and spread[count > 1].max() < 1e-6


def test_grounds_and_textures_differ():
    n = len(GROUNDS)
    x = render_objects(drawn(1) | drawn(n, ground=list(range(n)), shape=0, texture=0, x=0, y=0, scale=0.4, hue=0.2))
    far = torch.cdist(*[(x / x.amax((1, 2, 3), keepdim=True)).flatten(1)] * 2) / math.sqrt(x[0].numel())
    assert far[~torch.eye(n, dtype=torch.bool)].min() > 0.02
    n = len(TEXTURES)
    same = {"ground": 0, "shape": 0, "x": 0, "y": 0, "scale": 0.4, "hue": 0.2, "rotation": 0, "brightness": 1}
    f = drawn(n, texture=list(range(n)), **same)
    x, inside = render_objects(f), masks(**f)[0] == 1
    marked = x.amax(1)[:, inside]
    assert (torch.cdist(marked, marked) / math.sqrt(marked.shape[1]))[~torch.eye(n, dtype=torch.bool)].min() > 0.05


def test_the_light_scales_every_pixel():
    f = drawn(6)
    torch.testing.assert_close(
        render_objects(f), f["brightness"][:, None, None, None] * render_objects(f | {"brightness": torch.ones(6)})
    )


def test_without_textures_the_ground_is_black_and_the_object_plain():
    f = drawn(6)
    x, covered = render_objects(f, textured=False), masks(**f)
    assert x.amax(1)[covered == 0].max() == 0
    for image, inside in zip(x, covered == 1, strict=True):
        assert image[:, inside].std(1).max() < 1e-6


def test_shapes_are_told_apart_by_their_masks():
    n = 40
    shape = torch.arange(SHAPES).repeat_interleave(n)
    m = masks(**drawn(SHAPES * n, shape=shape, x=0, y=0, rotation=0)).view(SHAPES, n, -1)
    means, held_out = m[:, ::2].mean(1), m[:, 1::2]
    assert (torch.cdist(held_out, means[None]).argmin(-1) == torch.arange(SHAPES)[:, None]).all()


def test_shapes_differ_in_every_orientation_and_not_in_size():
    f = drawn(SHAPES, shape=list(range(SHAPES)), x=0, y=0, rotation=0, scale=0.4)
    still = masks(**f).flatten(1)
    area = still.sum(1)
    assert (area / area.mean() - 1).abs().max() < 0.02
    for angle in range(0, 360, 5):
        turned = masks(**(f | {"rotation": torch.full((SHAPES,), math.radians(angle))})).flatten(1)
        differ = torch.cdist(still, turned, p=1)[~torch.eye(SHAPES, dtype=torch.bool)]
        assert differ.min() > 0.2 * area.mean()


def test_position_scale_and_rotation_are_the_object_s():
    f = drawn(1, shape=4, x=0.25, y=-0.125, scale=0.4)
    m = masks(**f)[0]
    line = (torch.arange(48) + 0.5) / 24 - 1
    assert abs((m.sum(0) @ line / m.sum()).item() - 0.25) < 0.05
    assert abs((m.sum(1) @ line / m.sum()).item() + 0.125) < 0.05
    assert (masks(**(f | {"scale": f["scale"] / 2})).sum() / m.sum()).item() == pytest.approx(0.25, rel=0.03)
    centered = f | {"x": torch.zeros(1), "y": torch.zeros(1)}
    quarter = masks(**(centered | {"rotation": f["rotation"] + math.pi / 2}))
    torch.testing.assert_close(quarter, masks(**centered).rot90(-1, (1, 2)), atol=1e-3, rtol=0)


def test_the_object_lies_within_the_image():
    f = drawn(400)
    visible = masks(**f).sum((1, 2)) / (math.pi * (24 * f["scale"]) ** 2)
    assert visible.min() > 0.985 and visible.max() < 1.015


def test_probes_get_circles_for_hue_and_rotation():
    scored = scored_objects(drawn(5))
    assert isinstance(scored["hue"], Circular) and isinstance(scored["rotation"], Circular)
    assert set(scored) == set(drawn(1))
