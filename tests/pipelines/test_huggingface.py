"""Style spaces with transformers and datasets: models of random weights, rows of a real data set, the page's scripts.

Both are too large for the project's own environment (pyarrow alone has 170 MB): tests/environments/huggingface.sh makes
one and runs this file.
"""

import math
import re
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from scripts import script

transformers = pytest.importorskip("transformers", reason="sh tests/environments/huggingface.sh installs transformers")
datasets = pytest.importorskip("datasets", reason="sh tests/environments/huggingface.sh installs datasets")

from ssd_addon import JointEntropyLoss, StructuredCollate, StructuredTransform, StructuredViews, StyleHeads, presets  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")]

VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
PATCHES = {"image_size": 32, "patch_size": 8}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
DEEP = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}
MODELS = {
    "ViT": dict(VIT, **PATCHES),
    "Dinov2": dict(VIT, **PATCHES),
    "ConvNext": DEEP,
    "ResNet": dict(DEEP, embedding_size=8, layer_type="basic"),
    "Swinv2": SWIN,
}
OTHERS = {"CLIPVision": dict(VIT, **PATCHES), "SiglipVision": dict(VIT, **PATCHES), "Swin": SWIN}
IDLE = {
    "ViT": {"pooler.dense.weight", "pooler.dense.bias"},
    "Dinov2": {"embeddings.mask_token"},
    "ConvNext": {"layernorm.weight", "layernorm.bias"},
}
"""What last_hidden_state does not depend on: the page names it."""
TINY = ["--images", "24", "--batch-size", "8", "--steps", "6"]


def network(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(MODELS | OTHERS)[name])
    return getattr(transformers, f"{name}Model")(config)


def pooled(y):
    return y.flatten(2).mean(2) if y.ndim == 4 else y.mean(1) if y.ndim == 3 else y


@pytest.mark.parametrize("output", ["last_hidden_state", "pooler_output"])
@pytest.mark.parametrize("name", MODELS)
def test_output_names_the_tensor_of_a_model_output(name, output):
    net = network(name).eval()
    x = torch.rand(3, 3, 32, 32)
    model = StyleHeads(net, {"content": 6, "flip": 3}, hidden=(), output=output).eval()
    want = pooled(net(x)[output])
    assert model.in_features == want.shape[1]
    torch.testing.assert_close(model.features(x), want)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_trains_every_parameter_that_the_output_depends_on(name):
    net = network(name)
    views = StructuredViews(**presets("color_spatial", size=32), seed=0)
    model = StyleHeads(net, {"content": 6, "spatial": 3, "color": 3}, hidden=(), output="last_hidden_state")
    batch = views(torch.rand(4, 3, 40, 40))
    JointEntropyLoss()(model(batch), batch).backward()
    idle = {n for n, p in net.named_parameters() if p.grad is None}
    assert idle == IDLE.get(name, set())


@pytest.mark.parametrize("name", MODELS)
def test_without_output_the_error_names_what_there_is_to_choose(name):
    with pytest.raises(TypeError, match="keys last_hidden_state, pooler_output .*choose one with output="):
        StyleHeads(network(name), {"content": 6}, hidden=()).features(torch.rand(2, 3, 32, 32))


def test_the_class_token_is_chosen_with_pool():
    net, x = network("Dinov2").eval(), torch.rand(3, 3, 32, 32)
    model = StyleHeads(net, {"content": 6}, hidden=(), output="last_hidden_state", pool="cls").eval()
    torch.testing.assert_close(model.features(x), net(x).last_hidden_state[:, 0])


@pytest.mark.parametrize("name", ["Swin", "SiglipVision", "ConvNext"])
def test_the_first_patch_is_no_class_token(name):
    with pytest.raises(ValueError, match="expected a backbone with a class token for 'cls'"):
        StyleHeads(network(name), {"content": 6}, hidden=(), output="last_hidden_state", pool="cls")


def test_a_size_of_its_own_and_a_masked_autoencoder():
    net = transformers.ViTModel(transformers.ViTConfig(**VIT, image_size=48, patch_size=16))
    assert StyleHeads(net, {"content": 6}, hidden=(), output=0).in_features == 16
    net = transformers.ViTMAEModel(transformers.ViTMAEConfig(**VIT, **PATCHES))
    with pytest.raises(ValueError, match="leaves out 75% of the patches"):
        StyleHeads(net, {"content": 6}, hidden=(), output="last_hidden_state")
    net.config.mask_ratio = 0.0
    assert StyleHeads(net, {"content": 6}, hidden=(), output="last_hidden_state").in_features == 16


def test_export_gives_the_library_its_own_keys_back():
    net = network("ViT")
    model = StyleHeads(net, {"content": 6}, hidden=(), output="last_hidden_state")
    fresh = network("ViT")
    fresh.load_state_dict(model.export_backbone())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), net.parameters(), strict=True))


def rows(n=4):
    pixels = [np.full((6, 9, 3), 40 * k, dtype=np.uint8) for k in range(n)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": pixels, "label": [k % 2 for k in range(n)]}, features=features)


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_rows_of_a_data_set_are_collated_in_every_form(form):
    data = rows().with_format(form) if form else rows()
    loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=StructuredCollate(8))
    images, labels, names = next(iter(loader))
    assert images[:, 0, 0, 0].tolist() == [0, 40, 80, 120] and images.shape == (4, 3, 8, 8)
    assert labels.tolist() == [0, 1, 0, 1] and names == [""] * 4


@pytest.mark.parametrize("where", ["collate", "with_transform"])
def test_views_are_made_in_the_collate_function_or_in_the_data_set(where):
    transform, data = StructuredTransform(**presets("color_spatial", size=32)), rows()
    if where == "with_transform":
        data = data.with_transform(lambda some: {**some, "image": [transform(image) for image in some["image"]]})
    loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=StructuredCollate(8, views=transform))
    batch, labels, _ = next(iter(loader))
    assert batch.plan == transform.plan and batch.views.shape == (4, 4, 3, 32, 32) and labels.tolist() == [0, 1, 0, 1]


def advised(data):
    """The data set after what the error about its first row advises."""
    with pytest.raises(TypeError, match="of datasets") as error:
        StructuredCollate(8)([data[0]])
    call = re.search(r"of datasets, (.*\)) gives", str(error.value)) or re.search(
        r"or of datasets, (.*\));", str(error.value)
    )
    return eval("data." + call[1], {"data": data, "np": np, "Image": datasets.Image})


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_the_error_about_nested_lists_gives_advice_that_works(form, dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(dtype)
    for images in (pixels, pixels[..., 0]):
        data = datasets.Dataset.from_dict({"image": list(images), "label": [300, 1]})
        rows = advised(data.with_format(form))
        made, labels, _ = StructuredCollate(8)([rows[0], rows[1]])
        want = torch.from_numpy(images.reshape(2, 8, 8, -1)).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        assert torch.equal(made.long(), want.long()) and labels.tolist() == [300, 1]


def test_the_error_about_encoded_images_gives_advice_that_works():
    assert (
        StructuredCollate(8)([advised(rows().cast_column("image", datasets.Image(decode=False)))[1]])[0].unique() == 40
    )


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_what_the_page_says_about_palettes_and_formats(form):
    """Formats give the numbers of the colors; Image(mode="RGB") gives the colors."""
    red = PIL.Image.new("P", (8, 8))
    red.putpalette([255, 0, 0] + [0] * 765)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": [red], "label": [0]}, features=features)
    right = data.cast_column("image", datasets.Image(mode="RGB"))
    for each, want in (
        (data, [255, 0, 0]),
        (right.with_format(form), [255, 0, 0]),
        (data.with_format(form), [0, 0, 0]),
    ):
        image = StructuredCollate(8)([each[0]])[0][0]
        assert image[:, 0, 0].tolist() == want[: len(image)]
    assert len(StructuredCollate(8)([data.with_format("torch")[0]])[0][0]) == 1  # gray stays gray


@pytest.mark.parametrize("name", ["before/huggingface_simclr", "huggingface_simclr"])
def test_the_scripts_train_and_save(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    trainer = script(name).main([*TINY, "--out", str(tmp_path)])
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"]) and trainer.state.global_step == 6
    assert (tmp_path / "checkpoint-6" / "model.safetensors").exists()


READ = {
    "ViT": ("last_hidden_state", "cls"),
    "Dinov2": ("last_hidden_state", "cls"),
    "CLIPVision": ("last_hidden_state", "cls"),
    "SiglipVision": ("last_hidden_state", "mean"),
    "Swin": ("last_hidden_state", "mean"),
    "Swinv2": ("last_hidden_state", "mean"),
    "ConvNext": ("pooler_output", "auto"),
    "ResNet": ("pooler_output", "auto"),
}
"""What the script reads of a model by itself: output and pool."""


@pytest.mark.parametrize("name", READ)
def test_the_script_takes_a_saved_model_of_any_kind(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    network(name).save_pretrained(tmp_path / "model")
    one = ["--images", "8", "--batch-size", "8", "--steps", "1", "--model", str(tmp_path / "model")]
    trainer = script("huggingface_simclr").main([*one, "--out", str(tmp_path / "out")])
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    model = trainer.model
    assert (model.heads._pooling.output, model.heads._pooling.pool) == READ[name]
    model.zero_grad()
    model(torch.rand(4, 3, 40, 40))["loss"].backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]  # DDP would refuse them
    assert sum(p.requires_grad for p in model.heads.backbone.parameters()) > 3
    fresh = network(name)
    fresh.load_state_dict(model.heads.export_backbone())


def test_the_script_pools_as_it_is_asked_to(tmp_path):
    module, net, x = script("huggingface_simclr"), network("ViT"), torch.rand(2, 3, 32, 32)
    for pool, of in (("auto", lambda y: y[:, 0]), ("cls", lambda y: y[:, 0]), ("mean", lambda y: y.mean(1))):
        model = module.Model(net, 32, pool).eval()
        torch.testing.assert_close(model.heads.features(x), of(net(x).last_hidden_state))


def test_a_continued_training_is_the_training_that_was_not_interrupted(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    main = script("huggingface_simclr").main
    whole = main([*TINY, "--out", str(tmp_path)]).model.state_dict()
    shutil.rmtree(tmp_path / "checkpoint-6")
    again = main([*TINY, "--out", str(tmp_path), "--resume"]).model
    for key, value in again.state_dict().items():
        assert torch.equal(value, whole[key]), key
    assert again.views.call == 6
