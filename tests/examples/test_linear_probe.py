"""examples/linear_probe.py: probes find what is there and nothing else, and a run is opened and scored."""

import json
import shutil

import linear_probe
import pytest
import torch
from imagenet_runs import run
from shard_files import same_classes


def blobs(n, noise=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    return torch.eye(4)[y] * torch.tensor([1.0, 10.0, 0.1, 1.0]) + noise * torch.randn(n, 4, generator=g) * 0.05, y


def test_probes_find_classes_at_any_scale_and_nothing_in_noise():
    (x, y), (x_new, y_new) = blobs(400), blobs(100, seed=1)
    accuracy, rate = linear_probe.linear_probe(x, y, x_new, y_new, 20, 0)
    assert accuracy > 0.95 and rate in linear_probe.RATES
    noise = torch.randn(400, 4, generator=torch.Generator().manual_seed(2))
    assert linear_probe.linear_probe(noise, y, noise[:100].roll(1, 0), y_new, 20, 0)[0] < 0.5
    assert linear_probe.linear_probe(x, y, x_new, y_new, 20, 0) == (accuracy, rate)


def test_neighbors_are_those_of_a_loop():
    (x, y), (x_new, y_new) = blobs(60, 3.0), blobs(30, 3.0, seed=1)
    right = 0
    for z, label in zip(x_new, y_new, strict=True):
        cosine = torch.nn.functional.cosine_similarity(x, z[None])
        votes = torch.zeros(4)
        for j in cosine.argsort(descending=True)[:5]:
            votes[y[j]] += torch.exp(cosine[j] / linear_probe.TEMPERATURE)
        right += int(votes.argmax() == label)
    assert linear_probe.neighbors(x, y, x_new, y_new, 5) == pytest.approx(right / 30)
    assert linear_probe.neighbors(x, y, x_new, y_new, 200) <= 1


def test_few_labels_are_the_same_share_of_every_class():
    y = torch.tensor([0] * 40 + [1] * 20 + [2] * 3)
    rows = linear_probe.few(y, 0.1, 0)
    assert y[rows].bincount().tolist() == [4, 2, 1] and len(rows.unique()) == 7
    assert not torch.equal(rows, linear_probe.few(y, 0.1, 1))


@pytest.mark.slow
def test_a_run_is_opened_and_scored(data):
    run(data, "run", "--steps", "1", "--measure", "0")
    out = data.parent / "probes.json"
    found = linear_probe.main([str(data.parent / "run"), "--data", str(data), "--out", str(out), "--epochs", "2"])
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    assert list(found["probes"]) == ["content", "spatial", "color", "backbone"]
    assert {"linear", "20-NN", "200-NN", "linear, 1% of labels"} <= found["probes"]["content"].keys()
    assert found["images"] == {"train": 12, "val": 6} and "parameters" not in found  # 6 images are too few


def test_classes_of_train_and_val_have_to_be_the_same(tmp_path):
    with pytest.raises(ValueError, match=r"same class folders.*got \['b'\] in train alone and \['d'\] in val alone"):
        same_classes(tmp_path, ["a", "b", "c"], ["a", "c", "d"])
    same_classes(tmp_path, ["a"], ["a"])


@pytest.mark.slow
def test_a_folder_of_another_class_is_refused(data):
    run(data, "run", "--steps", "1", "--measure", "0")
    other = data.parent / "other"
    shutil.copytree(data, other)
    shutil.rmtree(sorted((other / "val").iterdir())[0])
    with pytest.raises(ValueError, match="same class folders in train and val"):
        linear_probe.main([str(data.parent / "run"), "--data", str(other)])
