"""What a user of lightly is likely to write first: it works, or the error says what to write instead."""

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from lightly.transforms import SimCLRTransform
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, default_collate

from ssd_addon import (
    JointEntropyLoss,
    StructuredCollate,
    StructuredTransform,
    StructuredViews,
    StyleHeads,
    presets,
)

SPACES = {"content": 4, "spatial": 3, "color": 2}
TRANSFORM = StructuredTransform(**presets("color_spatial", size=16))
WITH_PARAMETERS = StructuredTransform(**presets("color_spatial", size=16), parameters=True)
VIEWS = StructuredViews(**presets("color_spatial", size=16), seed=0)
TWO = SimCLRTransform(input_size=16)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))
SAMPLES = [(TRANSFORM(PHOTO), label, f"{label}.png") for label in range(4)]
FEATURES = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
heads = StyleHeads.heads(8, SPACES, hidden=())
backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
model = StyleHeads(backbone, SPACES, hidden=())
criterion = JointEntropyLoss()
views = MultiViewCollate()(SAMPLES)[0]
TOGETHER = r"criterion\(z0, z1\) is the call of two-view losses: .* criterion\(z, transform.plan\)"


def four():
    return [heads(part) for part in FEATURES.chunk(4)]


MISTAKES = {
    "criterion(z0, z1) of a head of lightly's": (
        lambda: criterion(torch.randn(4, 8), torch.randn(4, 8)),
        TypeError,
        r"expected embeddings as a mapping .*: got Tensor; " + TOGETHER,
    ),
    "criterion(z0, z1) of our heads": (lambda: criterion(*four()[:2]), TypeError, "got dict; " + TOGETHER),
    "criterion(z0, z1) of our model": (
        lambda: criterion(model(views[0]), model(views[1])),
        TypeError,
        "got dict; " + TOGETHER,
    ),
    "criterion(z, z1)": (lambda: criterion(heads(FEATURES), FEATURES), TypeError, "got Tensor; " + TOGETHER),
    "criterion([z0, z1, z2, z3], plan)": (
        lambda: criterion(four(), TRANSFORM.plan),
        TypeError,
        "got list; " + TOGETHER,
    ),
    "no plan": (
        lambda: criterion(heads(FEATURES)),
        ValueError,
        r"embeddings of all views \[V\*B, d\], pass the plan too, criterion\(z, transform.plan\)",
    ),
    "the transform in the plan's place": (
        lambda: criterion(heads(FEATURES), TRANSFORM),
        TypeError,
        "got StructuredTransform; pass its plan, such as transform.plan",
    ),
    "the labels in the plan's place": (
        lambda: criterion(heads(FEATURES), torch.arange(4)),
        TypeError,
        "expected a ViewBatch or its ViewPlan: got Tensor$",
    ),
    "x0, x1 as a tuple": (
        lambda: criterion(model((views[0], views[1])), TRANSFORM.plan),
        ValueError,
        "3 spaces .* need 4 views: got 2",
    ),
    "a transform of two views": (
        lambda: criterion(model(default_collate([TWO(PHOTO)] * 4)), TRANSFORM.plan),
        ValueError,
        "3 spaces .* need 4 views: got 2",
    ),
    "other groups than the heads have": (
        lambda: criterion(heads(FEATURES), StructuredTransform(**presets("appearance_spatial", size=16)).plan),
        ValueError,
        "missing: appearance; not named by the plan of the batch: color",
    ),
    "rows of three of four views": (
        lambda: criterion(heads(FEATURES[:13]), TRANSFORM.plan),
        ValueError,
        r"expected \[V, B, d\] or \[V\*B, d\] with V = 4: got \[13, 4\]",
    ),
    "a whole batch of MultiViewCollate": (
        lambda: model(MultiViewCollate()(SAMPLES)),
        TypeError,
        r"got tuple; from a loader's batch \(views, labels, names\) pass the views, batch\[0\]",
    ),
    "a whole batch of the default collate": (
        lambda: model(default_collate(SAMPLES)),
        TypeError,
        r"got list; from a loader's batch .* batch\[0\]",
    ),
    "a whole batch of images": (
        lambda: model([torch.rand(4, 3, 8, 8), torch.arange(4)]),
        TypeError,
        r"got list; from a loader's batch .* batch\[0\]",
    ),
    "features as a list": (
        lambda: heads(list(FEATURES.chunk(4))),
        TypeError,
        r"got list; pass the features of all views as one tensor, backbone\(torch.cat\(views\)\)",
    ),
    "features not flattened": (lambda: heads(FEATURES[..., None, None]), ValueError, r"flatten\(1\) first"),
    "a transform of views before StructuredCollate": (
        lambda: StructuredCollate(16)([(TWO(PHOTO), 1, "a.png")]),
        TypeError,
        "got a list of 2 views, as the data set's transform makes them; leave that transform out",
    ),
    "StructuredTransform and StructuredCollate with views": (
        lambda: StructuredCollate(16, views=VIEWS)(SAMPLES),
        TypeError,
        "got a list of 4 views, .* or, where it is a StructuredTransform, this collate function",
    ),
    "two views before StructuredCollate with a StructuredTransform": (
        lambda: StructuredCollate(16, views=TRANSFORM)([(TWO(PHOTO), 1, "a.png")]),
        ValueError,
        "need 4 views: got 2",
    ),
    "views with parameters before MultiViewCollate": (
        lambda: MultiViewCollate()([(WITH_PARAMETERS(PHOTO), 1, "a.png")]),
        TypeError,
        r"views of a sample alone: got them with their parameters, .*use StructuredCollate\(size, views=transform\)",
    ),
    "MultiViewTransform of StructuredTransforms": (
        lambda: MultiViewCollate()([(MultiViewTransform([TRANSFORM, TRANSFORM])(PHOTO), 1, "a.png")]),
        TypeError,
        r"or inside another list of views; .* as the only transform that makes views",
    ),
    "labels first": (lambda: StructuredCollate(16)([(1, PHOTO, "a.png")]), TypeError, "a tensor: got int"),
    "images without labels": (
        lambda: StructuredCollate(16)([PHOTO]),
        TypeError,
        r"expected samples \(image, label\).*: got Image",
    ),
    "StructuredViews as a transform": (
        lambda: VIEWS(PHOTO),
        TypeError,
        "got Image; StructuredViews takes whole batches, StructuredTransform one sample, as a data set's transform",
    ),
    "StructuredTransform of a batch": (
        lambda: TRANSFORM(torch.rand(2, 3, 16, 16)),
        ValueError,
        r"got \[2, 3, 16, 16\]; StructuredViews takes whole batches",
    ),
    "images that are normalized already": (
        lambda: VIEWS(torch.randn(2, 3, 16, 16)),
        ValueError,
        r"expected values in \[0, 1\].*put Normalize into `then`",
    ),
    "a preset's name for groups": (
        lambda: StructuredTransform("color_spatial"),
        TypeError,
        r'got str; unpack a preset: \*\*presets\("color_spatial"\)',
    ),
    "a preset that is not unpacked": (
        lambda: StructuredTransform(presets("color_spatial")),
        ValueError,
        r'got a mapping of arguments; unpack it, .*\*\*presets\("color_spatial"\)',
    ),
    "input_size": (lambda: presets("color_spatial", input_size=16), TypeError, "input_size"),
    "a memory bank": (lambda: JointEntropyLoss("simclr", memory_bank_size=4096), TypeError, "memory_bank_size"),
    "lambda_param": (lambda: JointEntropyLoss("vicreg", lambda_param=25.0), TypeError, "lambda_param"),
    "z_a=, z_b=": (lambda: criterion(z_a=four()[0], z_b=four()[1]), TypeError, "z_a"),
    "a loss by lightly's name": (
        lambda: JointEntropyLoss("barlowtwins"),
        ValueError,
        "expected one of 'simclr', 'vicreg', 'barlow'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_says_what_to_write(mistake):
    run, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        run()


def test_views_of_multiviewcollate_and_of_the_default_collate_are_the_same():
    z = criterion(model(views), TRANSFORM.plan)
    assert torch.equal(criterion(model(default_collate(SAMPLES)[0]), TRANSFORM.plan), z)
    rows = heads(backbone(torch.cat(views)))
    own = StyleHeads(backbone, SPACES, hidden=())
    own.projections = heads.projections
    torch.testing.assert_close(criterion(rows, TRANSFORM.plan), criterion(own(views), TRANSFORM.plan))


def test_heads_in_another_order_than_the_groups_are_matched_by_name():
    """Views in the order color, spatial; heads in the order spatial, color: the plan settles it."""
    given = presets("color_spatial", size=16)
    turned = StructuredTransform({"color": given["groups"]["color"], "spatial": given["groups"]["spatial"]})
    z = heads(FEATURES)
    renamed = {"content": z["content"], "color": z["spatial"], "spatial": z["color"]}
    loss = JointEntropyLoss("vicreg")
    assert torch.equal(loss(z, turned.plan), loss({n: z[n] for n in ("content", "color", "spatial")}, turned.plan))
    assert not torch.isclose(loss(z, turned.plan), loss(z, TRANSFORM.plan))
    torch.testing.assert_close(loss(z, turned.plan), loss(renamed, TRANSFORM.plan))


@pytest.fixture
def folder(tmp_path):
    for k in range(4):
        (tmp_path / f"class{k % 2}").mkdir(exist_ok=True)
        PHOTO.resize((20 + k, 24)).save(tmp_path / f"class{k % 2}" / f"{k}.png")
    return tmp_path


@pytest.mark.parametrize("where", ["transform", "collate, batches", "collate, samples"])
def test_lightlydataset_gives_views_labels_and_names(where, folder):
    data = LightlyDataset(str(folder), transform=TRANSFORM if where == "transform" else None)
    collate = None
    if where != "transform":
        collate = StructuredCollate(24, views=VIEWS if where == "collate, batches" else TRANSFORM)
    made, labels, names = next(iter(DataLoader(data, batch_size=4, collate_fn=collate)))
    assert labels.tolist() == [0, 0, 1, 1] and list(names) == [f"class{k % 2}/{k}.png" for k in (0, 2, 1, 3)]
    assert torch.isfinite(criterion(model(made), TRANSFORM.plan))


@pytest.mark.parametrize("normalize", [{"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}, True, IMAGENET_NORMALIZE])
def test_presets_normalize_as_lightlys_transforms_do(normalize):
    last = presets("color_spatial", size=16, normalize=normalize)["then"][-1]
    given = IMAGENET_NORMALIZE if normalize is True else normalize
    x = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(given[k]).view(3, 1, 1) for k in ("mean", "std"))
    assert isinstance(last, K.Normalize)
    torch.testing.assert_close(last(x), (x - mean) / std)


@pytest.mark.parametrize("none", [None, False])
def test_presets_without_normalize(none):
    arguments = presets("color_spatial", size=16, normalize=none)
    assert not any(isinstance(op, K.Normalize) for op in (*arguments["then"], *arguments["key_then"]))


@pytest.mark.parametrize(
    "normalize,message",
    [
        ({"mean": [0.5] * 3}, "got the keys mean"),
        ({"mean": [0.5] * 3, "std": [0.0] * 3}, "standard deviation above 0"),
        ({"mean": [0.5] * 3, "std": [0.5]}, "for each channel"),
        ("imagenet", "got 'imagenet'"),
    ],
)
def test_another_normalize_is_refused(normalize, message):
    with pytest.raises(ValueError, match=message):
        presets("color_spatial", normalize=normalize)
