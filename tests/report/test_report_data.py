"""report.data.read: folders, data sets, pairs and code give images with their factors; the rest says why."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from ssd_addon.collate import ImageFiles
from ssd_addon.metrics import Circular
from ssd_addon.report import Data
from ssd_addon.report.data import facts, read


def picture(path, value=0, size=(10, 8), mode="RGB"):
    """One colour all over: `value` is read back from it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": (value,) * 3, "RGBA": (value, value, value, 255), "L": value}
    Image.new(mode, size, channels[mode]).save(path)


def values(data):
    """The number that each image is painted with."""
    return data.images[:, 0, 0, 0].tolist()


def get(spec, size=8, samples=100, **options):
    return read(spec, size=size, samples=samples, **options)


class Pictures(Dataset):
    """Image k is painted with k; the label is made of k."""

    def __init__(self, n=20, label=lambda k: k, image=None):
        self.n, self.label = n, label
        self.image = image or (lambda k: torch.full((3, 8, 8), k, dtype=torch.uint8))

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        return self.image(k), self.label(k)


def pil(k):
    return Image.new("RGB", (9, 12), (k, k, k))


# ---- folders


def test_class_folders_are_a_factor(tmp_path):
    for k, path in enumerate(("cat/b.png", "cat/a.png", "dog/deep/c.jpg", "cow/d.png")):
        picture(tmp_path / path, 10 * k)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    data = get(tmp_path)
    assert data.names == ["cat/a.png", "cat/b.png", "cow/d.png", "dog/deep/c.jpg"]
    assert values(data) == [10, 0, 30, 20] and data.images.shape == (4, 3, 8, 8) and data.images.dtype == torch.uint8
    assert data.factors["class"].tolist() == [0, 0, 1, 2] and list(data.factors) == ["class"]
    assert data.classes == {"class": ["cat", "cow", "dog"]} and data.total == 4


@pytest.mark.parametrize("folder", ["", "only"])
def test_without_classes_nothing_is_known(tmp_path, folder):
    for k in range(3):
        picture(tmp_path / folder / f"{k}.png", k)
    data = get(str(tmp_path))
    assert values(data) == [0, 1, 2] and data.factors == {} and data.classes == {}
    assert [name.split("/")[-1] for name in data.names] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    ("parts", "taken"),
    [
        (("train", "val"), "val"),
        (("train",), "train"),
        (("val",), "val"),
        (("train", "valid", "test"), "valid"),
        (("train", "validation", ".cache"), "validation"),
        (("test", "train"), "test"),
        (("Train", "Val"), "Val"),
    ],
)
def test_of_splits_the_one_to_validate_on_is_taken_then_test_then_train(tmp_path, parts, taken):
    for part in parts:
        for k, name in enumerate(("a", "b")):
            picture(tmp_path / part / name / "0.png", 10 * k + (part == taken))
    said = []
    data = get(tmp_path, say=said.append)
    assert values(data) == [1.0, 11.0]
    assert facts(data)[0] == ("split", taken) and facts(get(tmp_path, samples=1))[0] == ("split", taken)
    assert said[0].startswith(f"reading {taken}/, as the folders in ")
    assert data.classes == {"class": ["a", "b"]} and data.names == ["a/0.png", "b/0.png"]
    assert data.factors["class"].tolist() == [0, 1]


def test_class_folders_of_which_one_is_called_like_a_split_are_all_read(tmp_path):
    for k, name in enumerate(("bus", "car", "train")):
        picture(tmp_path / name / "0.png", k)
    data = get(tmp_path)
    assert values(data) == [0, 1, 2] and data.classes == {"class": ["bus", "car", "train"]} and facts(data) == []


def test_several_splits_beside_another_folder_are_splits(tmp_path):
    for k, name in enumerate(("train", "test", "unlabeled")):
        picture(tmp_path / name / "a" / "0.png", k)
        picture(tmp_path / name / "b" / "0.png", k)
    assert facts(get(tmp_path))[0] == ("split", "test")


def test_a_broken_file_is_left_out_and_named(tmp_path):
    for k in range(3):
        picture(tmp_path / f"{k}.png", k)
    (tmp_path / "1.png").write_bytes(b"\x89PNG no picture")
    with pytest.warns(RuntimeWarning, match=r"skipped .*1\.png: could not be decoded"):
        data = get(tmp_path)
    assert values(data) == [0, 2] and data.names == ["0.png", "2.png"] and (data.total, data.broken) == (3, 1)


def part(files):
    return Subset(Subset(files, range(38)), range(37, -1, -1))


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("wrap", [lambda files: files, part])
def test_no_image_stands_in_for_a_broken_one(tmp_path, wrap):
    for k in range(40):
        picture(tmp_path / "ab"[k % 2] / f"{k}.png", k)
        if k % 4 < 2:
            (tmp_path / "ab"[k % 2] / f"{k}.png").write_bytes(b"")
    spec, said = wrap(ImageFiles(tmp_path, broken="skip")), []
    data = get(spec, say=said.append)
    assert len(set(data.names)) == len(data.names) == len(spec) - data.broken and 18 <= data.broken <= 20
    assert data.total == len(spec) and said == [
        f"left out {data.broken} broken files, {len(data.names)} images are read"
    ]
    assert data.names == [f"{'ab'[int(k) % 2]}/{k:.0f}.png" for k in values(data)]
    fewer = get(spec, samples=12)  # others take the place of the broken ones
    assert len(set(fewer.names)) == 12 and fewer.broken > 0 and set(fewer.names) <= set(data.names)
    assert get(fewer, samples=5).broken == fewer.broken


def test_images_that_are_enlarged_are_counted(tmp_path):
    for k, size in enumerate(((30, 50), (50, 30), (32, 32), (200, 33))):
        Image.new("RGB", size, (60 * k, 0, 0)).save(tmp_path / f"{k}.png")
    said = []
    data = read(tmp_path, size=32, samples=9, say=said.append)
    assert data.enlarged.tolist() == [True, True, False, False]
    assert said[1:] == ["2 of 4 images are smaller than 32 pixels and are enlarged"]
    assert facts(data) == [("enlarged images", "2 of 4, which were smaller")]
    arrays = [np.zeros((20, 40, 3), np.uint8), np.zeros((40, 33), np.uint8)]
    kinds = [torch.rand(3, 40, 20), *arrays, torch.rand(3, 32, 32)]
    some = read([(image, 0) for image in kinds], size=32, samples=9)
    assert some.enlarged.tolist() == [True, True, False, False]
    one = read(data, size=32, samples=1)
    assert len(one.images) == 1 and one.enlarged.tolist() == [one.names[0] in ("0.png", "1.png")]
    assert read(tmp_path, size=30, samples=9).enlarged is None
    assert facts(Data(torch.rand(2, 3, 5, 5))) == []


def test_broken_files_alone(tmp_path):
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.warns(RuntimeWarning, match="skipped"), pytest.raises(OSError, match="none of the 1 images"):
        get(tmp_path)


def test_any_picture_comes_out_at_one_size(tmp_path):
    for k, (mode, size) in enumerate([("RGB", (40, 20)), ("L", (8, 8)), ("RGBA", (3, 5)), ("RGB", (1, 1))]):
        picture(tmp_path / f"{k}.png", 50 + k, size, mode)
    data = get(tmp_path, size=16)
    assert data.images.shape == (4, 3, 16, 16)
    assert all((image == 50 + k).all() for k, image in enumerate(data.images))


def test_three_images_of_ten(tmp_path):
    for k in range(10):
        picture(tmp_path / f"{k}.png", k)
    data = get(tmp_path, samples=3)
    assert len(data.images) == len(data.names) == 3 and data.total == 10
    assert data.names == [f"{k:.0f}.png" for k in values(data)] == sorted(data.names)


def test_a_folder_whose_name_has_a_colon(tmp_path):
    picture(tmp_path / "a:b" / "0.png", 7)
    assert values(get(str(tmp_path / "a:b"))) == [7]


# ---- data sets


def test_numbers_are_classes():
    data = get(Pictures(5, lambda k: k % 2))
    assert data.factors["class"].tolist() == [0, 1, 0, 1, 0] and data.factors["class"].dtype == torch.int64
    assert values(data) == [0, 1, 2, 3, 4] and data.names == [""] * 5 and data.classes == {} and data.total == 5
    assert get(Pictures(2, lambda k: torch.tensor(k))).factors["class"].tolist() == [0, 1]


def test_one_class_of_a_data_set_is_kept():
    assert get(Pictures(4, lambda k: 0)).factors["class"].tolist() == [0] * 4


def test_mappings_are_factors():
    data = get(Pictures(4, lambda k: {"x": k / 2, "kind": k % 2, "where": torch.tensor([k, -k]) / 4}, pil))
    assert data.factors["x"].tolist() == [0, 0.5, 1, 1.5] and data.factors["x"].is_floating_point()
    assert data.factors["kind"].tolist() == [0, 1, 0, 1] and not data.factors["kind"].is_floating_point()
    assert data.factors["where"].tolist() == [[k / 4, -k / 4] for k in range(4)]
    assert values(data) == [0, 1, 2, 3] and data.images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize("label", [lambda k: None, lambda k: {"x": 1} if k else 3])
def test_other_labels_are_left_out(label):
    assert get(Pictures(3, label)).factors == {}


def test_names_are_kept():
    data = get([(pil(3), 1, "three"), (pil(4), 0), (pil(5), 0, "five")])
    assert data.names == ["three", "", "five"] and data.factors["class"].tolist() == [1, 0, 0]


def test_arrays_and_tensors_of_other_sizes():
    samples = [(np.full((5, 7, 3), 9, np.uint8), 0), (torch.full((3, 20, 9), 9, dtype=torch.uint8), 0)]
    data = get(samples)
    assert data.images.shape == (2, 3, 8, 8) and data.images.dtype == torch.uint8 and (data.images == 9).all()


def test_bytes_and_shares_are_brought_to_one_scale():
    images = [torch.full((3, 8, 8), 51, dtype=torch.uint8), torch.full((3, 8, 8), 0.4, dtype=torch.float64)]
    data = get([(images[0], 0), (images[1], 1)])
    assert data.images.dtype == torch.float32 and values(data) == pytest.approx([0.2, 0.4])


def test_what_is_read_is_told():
    said = []
    get(Pictures(600, image=lambda k: torch.zeros(3, 8, 8)), samples=510, say=said.append)
    assert said == ["read 250/510 images", "read 500/510 images", "read 510/510 images"]
    get(Pictures(3), say=said.append)
    assert said[-1] == "read 3/3 images"


# ---- pairs


def pair(n=20):
    images = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 3, 5, 5) / n
    k = torch.arange(n)
    factors = {
        "number": k.float(),
        "kind": k % 3,
        "listed": [float(i) for i in range(n)],
        "turn": Circular(k.float()),
        "folded": Circular(k.float(), 1 + k % 4),
        "half": Circular(k.float(), torch.tensor(2)),
    }
    return images, factors


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_pair_of_images_and_factors(kind):
    images, factors = pair()
    data = get(kind((images, factors)))
    assert torch.equal(data.images, images) and data.total == 20 and data.names == [""] * 20
    assert list(data.factors) == list(factors)
    assert all(torch.equal(data.factors[f], torch.as_tensor(factors[f])) for f in ("number", "kind", "listed"))
    assert torch.equal(data.factors["folded"].fold, factors["folded"].fold) and data.factors["turn"].fold == 1


def test_a_pair_may_know_nothing():
    assert get((torch.rand(4, 1, 5, 5), {})).factors == {}


def test_factors_stay_with_their_images():
    images, factors = pair()
    data = get((images, factors), samples=7)
    k = (data.images[:, 0, 0, 0] * 20).round().long()
    assert len(k) == 7 and data.total == 20 and k.tolist() == sorted(set(k.tolist())) != list(range(7))
    assert torch.equal(data.factors["number"], k.float()) and torch.equal(data.factors["kind"], k % 3)
    assert torch.equal(data.factors["listed"], k.float())
    for name in ("turn", "folded", "half"):
        assert torch.equal(data.factors[name].angle, k.float())
    assert torch.equal(data.factors["folded"].fold, 1 + k % 4)
    assert data.factors["turn"].fold == 1 and data.factors["half"].fold == 2


def test_data_is_taken_as_it_is():
    data = Data(torch.rand(3, 3, 5, 5), {"x": torch.rand(3)}, ["a", "b", "c"], total=9)
    kept = get(data)
    assert torch.equal(kept.images, data.images) and kept.names == data.names and kept.total == data.total
    assert Data(torch.rand(2, 3, 5, 5)).names == ["", ""] and Data(torch.rand(2, 3, 5, 5)).total == 2


# ---- the choice


@pytest.mark.parametrize("spec", [Pictures(40), (torch.arange(40.0).view(40, 1, 1, 1), {"class": torch.arange(40)})])
def test_the_choice_is_random_sorted_and_reproducible(spec):
    def chosen(**options):
        data = get(spec, samples=10, **options)
        assert data.factors["class"].tolist() == values(data) and data.total == 40
        return values(data)

    first = chosen()
    assert first == sorted(set(first)) and len(first) == 10 and first != list(range(10))
    torch.manual_seed(1)
    assert chosen() == first == chosen(seed=0)
    assert chosen(seed=1) != first
    assert len({k for seed in range(30) for k in chosen(seed=seed)}) == 40  # every image has its chance


def test_no_more_than_there_are():
    assert values(get(Pictures(4), samples=9)) == [0, 1, 2, 3]
    assert len(values(get(Pictures(4), samples=1))) == 1


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    get(Pictures(4), samples=2)
    assert torch.equal(torch.get_rng_state(), before)


# ---- code

CODE = """
import math
import torch
from ssd_addon.metrics import Circular
from ssd_addon.report import Data

class Pictures:
    def __len__(self):
        return 6
    def __getitem__(self, k):
        return torch.full((3, 8, 8), k, dtype=torch.uint8), {"k": k}

ready = Pictures()
listed = [(torch.zeros(3, 8, 8), 0), (torch.ones(3, 8, 8), 1)]
pair = (torch.zeros(6, 3, 4, 4), {"k": torch.arange(6)})

def nothing():
    return ready

def number(samples):
    return torch.zeros(samples, 3, 8, 8), {"k": torch.arange(samples)}

def whole():
    return Data(torch.zeros(2, 3, 4, 4), {"turn": Circular(torch.rand(2))}, ["a", "b"])

def broken():
    return 3
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "made.py").write_text(CODE)
    return f"{tmp_path / 'made.py'}:"


@pytest.mark.parametrize(
    ("name", "n", "factor"),
    [("ready", 4, "k"), ("nothing", 4, "k"), ("listed", 2, "class"), ("pair", 4, "k"), ("whole", 2, "turn")],
)
def test_code_may_be_or_make_the_data(code, name, n, factor):
    data = get(code + name, samples=4)
    assert len(data.images) == n and list(data.factors) == [factor]


def test_code_is_told_how_many(code):
    data = get(code + "number", samples=4)
    assert data.total == len(data.images) == 4 and data.factors["k"].tolist() == [0, 1, 2, 3]


def test_code_may_be_in_a_module(code, tmp_path, monkeypatch):
    (tmp_path / "made.py").rename(tmp_path / "made_for_the_report.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert len(get("made_for_the_report:ready").images) == 6


# ---- what is no data says why


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("HERE/nothing", FileNotFoundError, "data: expected a folder of images, or FILE.py:NAME: got .*nothing"),
        ("HERE/made.py", FileNotFoundError, "expected a folder of images, or FILE.py:NAME: got .*made.py"),
        ("HERE/empty", FileNotFoundError, r"expected images \(.jpg, .*got none"),
        ("HERE/made.py:other", ValueError, "data: .*made.py has no 'other'"),
        ("HERE/none.py:ready", ValueError, "data: expected a Python file: got .*none.py, which is not a file"),
        ("no_such_module:ready", ValueError, "data: expected a module that can be imported: 'no_such_module'"),
        ("HERE/made.py:broken", TypeError, r"a data set with len\(\) and items .*got int"),
        ("HERE/made.py:math", TypeError, "module"),
    ],
)
def test_bad_names(code, tmp_path, spec, error, message):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(error, match=message):
        get(spec.replace("HERE", str(tmp_path)))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


IMAGES = torch.rand(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (3, TypeError, r"data: expected a folder, a data set .* or a pair \(images, factors\): got int"),
        (None, TypeError, "got NoneType"),
        (Stream(), TypeError, "got Stream"),
        (iter([]), TypeError, "got list_iterator"),
        ([], ValueError, "data: expected at least one image: got an empty data set"),
        (Pictures(0), ValueError, "got an empty data set"),
        (IMAGES, TypeError, r"expected items \(image, label\) or \(image, label, name\): got Tensor"),
        ([torch.zeros(3, 8, 8)] * 3, TypeError, r"expected items \(image, label\).*got Tensor"),
        ([("a.png", 1)], TypeError, "expected a PIL image, an array or a tensor: got str"),
        ([(torch.rand(8, 8), 1)], TypeError, r"expected an image \[C, H, W\].*\[8, 8\]"),
        (Pictures(3, image=lambda k: torch.rand(1 + 2 * (k % 2), 8, 8)), ValueError, r"of channels: got \[1, 3\]"),
        (Pictures(3, lambda k: {"x": 1} if k else {"y": 1}), ValueError, "the same factors for every image"),
        (Pictures(3, lambda k: {"x": 1, "y": 1} if k else {"x": 1}), ValueError, "the same factors for every image"),
        (Pictures(3, lambda k: {"x": 1} if k else {"x": 1, "y": 1}), ValueError, "the same factors for every image"),
        ((IMAGES[0], {}), ValueError, r"images \[n, C, H, W\], one or more: got \[3, 8, 8\]"),
        ((IMAGES[:0], {}), ValueError, r"one or more: got \[0, 3, 8, 8\]"),
        ((IMAGES, torch.rand(4)), TypeError, "expected factors as a mapping name -> values: got Tensor"),
        ((IMAGES, {"x": torch.rand(3)}), ValueError, "factor 'x': expected 4 values, one per image: got 3"),
        ((IMAGES, {"x": [0.1] * 5}), ValueError, "factor 'x': expected 4 values, one per image: got 5"),
    ],
)
def test_nonsense(spec, error, message):
    with pytest.raises(error, match=message):
        get(spec)


# ---- what a review found


def test_numpy_labels_are_classes():
    assert "class" in read([(x, np.int64(1)) for x in IMAGES], size=8, samples=4).factors


@pytest.mark.parametrize("n", [2, 9])
def test_angles_are_one_per_image(n):
    with pytest.raises(ValueError, match="one per image"):
        read((IMAGES, {"a": Circular(torch.rand(n))}), size=8, samples=4)


CLASS = """
import torch
class Made:
    def __len__(self):
        return 6
    def __getitem__(self, k):
        return torch.rand(3, 8, 8), k
def default(path="abc"):
    assert path == "abc", path
    return Made()
def keyword(*, samples=3):
    return Made()
"""


@pytest.mark.parametrize("name", ["Made", "default", "keyword"])
def test_code(tmp_path, name):
    (tmp_path / "made.py").write_text(CLASS)
    read(f"{tmp_path / 'made.py'}:{name}", size=8, samples=4)


def test_samples_without_labels_say_so():
    with pytest.raises(TypeError, match="image, label"):
        read(TensorDataset(IMAGES), size=8, samples=4)


def test_words_are_classes():
    words = ["dog", "cat", "dog", "owl"]
    data = read([(x, {"a": w, "b": k}) for k, (x, w) in enumerate(zip(IMAGES, words, strict=True))], size=8, samples=4)
    assert data.factors["a"].tolist() == [1, 0, 1, 2] and data.classes == {"a": ["cat", "dog", "owl"]}
    assert read(list(zip(IMAGES, words, strict=True)), size=8, samples=4).classes == {"class": ["cat", "dog", "owl"]}
    with pytest.raises(ValueError, match="factor 'a': expected numbers, or words, of one kind"):
        read([(x, {"a": w}) for x, w in zip(IMAGES, ["dog", 1, None, 2], strict=True)], size=8, samples=4)


def test_a_subset_keeps_everything_together():
    n = 9
    data = Data(
        torch.arange(n).view(n, 1, 1, 1) / n, {"k": torch.arange(n)}, [f"n{k}" for k in range(n)], {"k": ["z"] * n}
    )
    few = read(data, size=8, samples=4, seed=2)
    k = few.factors["k"]
    assert len(k) == 4 and few.names == [f"n{i}" for i in k.tolist()] and few.classes == data.classes and few.total == n
    assert torch.equal(few.images[:, 0, 0, 0], k / n)


@pytest.mark.parametrize("factor", [torch.tensor(1.0), ["a"] * 6])
def test_factors_of_a_pair_that_are_none(factor):
    with pytest.raises((ValueError, TypeError), match="^data: "):
        read((IMAGES, {"a": factor}), size=8, samples=4)


def test_data_is_bounded_too():
    assert len(read(Data(IMAGES), size=8, samples=4).images) == 4


def test_no_samples():
    with pytest.raises(ValueError, match="samples"):
        read([(x, 1) for x in IMAGES], size=8, samples=0)
