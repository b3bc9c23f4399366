"""The notebook: committed without outputs, run from end to end with tiny budgets, and the same as its page."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("docs_notebook", ROOT / "docs" / "notebook.py")
docs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(docs)
CELLS = docs.cells()
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TINY = {"STEPS": 2, "BATCH": 6, "SIZE": 32, "WEIGHTS": None}


def test_no_outputs_are_committed():
    stored = json.loads(docs.NOTEBOOK.read_text())
    for cell in stored["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]
        assert "attachments" not in cell
    assert set(stored["metadata"]) == {"kernelspec", "language_info"} and stored["nbformat"] == 4


def test_cells_have_names_of_their_own_and_pictures_have_a_description():
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", i) for i in ids)
    assert [c["id"] for c in CELLS if "parameters" in c["metadata"].get("tags", ())] == ["settings"]
    drawn = [(cell, name, text) for cell in CODE for name, text in docs.pictures_of(cell).items()]
    assert len(drawn) >= 3
    assert all(text and f'"{name}"' in cell["source"] and docs.copy_of(name).exists() for cell, name, text in drawn)


def test_the_page_is_that_of_the_notebook():
    assert docs.PAGE.read_text() == docs.page(CELLS), "run python docs/notebook.py"


def test_links_of_the_notebook_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", "".join(c["source"] for c in CELLS if c["cell_type"] == "markdown"))
    assert len(links) >= 5
    for link in links:
        assert link.startswith("https://") or (docs.NOTEBOOK.parent / link).exists(), link


def test_links_of_a_page_start_at_the_page():
    found = [
        {"cell_type": "markdown", "metadata": {}, "source": "[a](../../docs/x.md) [b](../../README.md) [c](https://d)"}
    ]
    assert "[a](x.md) [b](../README.md) [c](https://d)" in docs.page(found)


@pytest.fixture
def quick(monkeypatch):
    """Few pairs of views: the tests of what leaks need 50 and are left out."""
    monkeypatch.setattr("ssd_addon.auditing.measure.PAIRS", 30)
    monkeypatch.setattr("ssd_addon.metrics.label_free.PAIRS", 30)
    torch.manual_seed(0)


@pytest.mark.slow
def test_it_runs_without_a_folder_and_without_weights(tmp_path, quick, capsys):
    before = Path.cwd()
    names, seen = docs.run(CELLS, OUT=tmp_path, SAMPLES=60, **TINY)
    assert Path.cwd() == before
    assert names["headline"] in capsys.readouterr().out
    assert len(list((tmp_path / "sprites").rglob("*.png"))) == 60 and names["held_out"].classes["class"]
    for name in ("audit.html", "report.html", "model.pt", "log.jsonl"):
        assert (tmp_path / name).stat().st_size > 0
    pictures = [name for cell in CODE for name in docs.pictures_of(cell)]
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100
    shown = [str(part) for each in seen if isinstance(each, docs.Shown) for part in each.content]
    assert sum("<iframe" in s for s in shown) == 2
    assert [*dict.fromkeys(Path(s).name for s in shown if s.endswith(".png"))] == pictures
    assert sorted(names["model"].spaces) == ["color", "content", "spatial"]


@pytest.mark.slow
def test_a_folder_of_photographs_and_a_download_that_fails(tmp_path, quick, monkeypatch, capsys):
    for k in range(72):
        pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))
        (tmp_path / "mine").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / "mine" / f"{k}.jpg")

    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    until = [cell for cell in CODE if cell["id"] in ("settings", "images", "groups", "audit")]
    names, _ = docs.run(until, OUT=tmp_path / "out", FOLDER=tmp_path / "mine", **TINY | {"WEIGHTS": "pretrained"})
    said = capsys.readouterr().out
    assert "could not be downloaded, so this is an untrained network" in said
    assert len(names["train_images"]) == 54 and not (tmp_path / "out" / "sprites").exists()


def test_a_setting_that_it_does_not_have_is_refused():
    with pytest.raises(NameError, match="'settings': got \\['STEP'\\]"):
        docs.run(CELLS[:3], STEP=1)


def test_a_run_puts_its_pictures_beside_the_page(tmp_path, monkeypatch, capsys):
    def run(found, OUT, WEIGHTS):
        for name in (name for cell in found for name in docs.pictures_of(cell)):
            (OUT / name).write_bytes(name.encode())

    monkeypatch.setattr(docs, "run", run)
    monkeypatch.setattr(docs, "PICTURES", tmp_path)
    monkeypatch.setattr(docs, "PAGE", tmp_path / "page.md")
    docs.main(["--run"])
    assert (tmp_path / "notebook-views.png").read_bytes() == b"views.png"
    assert "(results/notebook-views.png)" in (tmp_path / "page.md").read_text()
