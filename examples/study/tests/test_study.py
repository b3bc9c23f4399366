"""The study's runner: every configuration of the grid trains, a stopped grid resumes, and lines are what was run."""

import json
import re
from pathlib import Path

import pytest
import result_lines
import torch
import torch.nn.functional as F
from latents import CausalLatents
from study import grid, methods, pictures, report, runner, worlds
from study.looc import LooCLoss

from ssd_addon import JointEntropyLoss


def test_every_row_has_a_name_and_a_configuration_of_its_own():
    for experiment, rows in grid.EXPERIMENTS.items():
        names = [name for name, _, _ in rows]
        assert len(set(names)) == len(names), experiment
        configs = [json.dumps(c, sort_keys=True) for _, c, _ in rows]
        assert len(set(configs)) == len(configs), experiment


def test_no_option_of_the_grid_is_misspelt():
    for run in grid.runs():
        allowed = grid.DEFAULTS.keys() | grid.OF_WORLD[run["config"]["world"]].keys() | {"world", "data"}
        assert run["config"].keys() <= allowed, run


def different(rows: list[grid.Row]) -> list[grid.Config]:
    """One configuration for every way in which rows differ beyond sizes and strengths."""
    kinds = ("method", "family", "plan", "cross", "heads", "dependent", "content_dependent", "styles", "groups", "dual")
    rows = [(name, c, seeds) for name, c, seeds in rows if c.get("method") != "truth"]
    return list({json.dumps([c.get(k) for k in kinds]): c for _, c, _ in rows}.values())


def photographs(tmp_path: Path) -> Path:
    from torchvision.utils import save_image

    g = torch.Generator().manual_seed(0)
    for split, n in (("train", 6), ("val", 3)):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(n):
                save_image(torch.rand(3, 32, 32, generator=g), tmp_path / split / label / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("world", ["latents", "sprites", "photographs"])
def test_every_kind_of_row_trains(world, tmp_path):
    torch.manual_seed(0)
    rows = [row for e, rows in grid.EXPERIMENTS.items() if grid.world(e) == world for row in rows]
    for config in different(rows):
        c = grid.DEFAULTS | grid.OF_WORLD[world] | config | {"batch": 16, "size": 32}
        if world == "photographs":
            c["data"] = str(photographs(tmp_path / str(len(list(tmp_path.iterdir())))))
        w = worlds.WORLDS[world](c, 0)
        model = methods.build_model(c, w)
        method = methods.METHODS[c["method"]](c, w)
        loss, _ = method(model, w.batch(c["batch"], torch.Generator().manual_seed(0)), True)
        loss.backward()
        assert torch.isfinite(loss) and set(w.widths) == set(model.spaces), config
        for name, p in model.named_parameters():
            if "color" in name or "style" in name:
                assert p.grad is not None and bool(p.grad.any()), (config, name)


def test_the_truth_knows_itself_and_the_content_that_it_depends_on():
    config = {"world": "latents", "method": "truth", "content_dependent": True, "samples": 400}
    found = runner.train(config, 0)["tables"]["kernel"]
    assert found["style_1"]["style_1"] > 0.95 and found["content"]["content"] > 0.95
    assert 0.1 < found["content"]["style_1"] < 0.6
    independent = runner.train(config | {"content_dependent": False}, 0)["tables"]["kernel"]
    assert abs(independent["content"]["style_1"]) < 0.05


def test_a_stopped_grid_resumes(tmp_path, monkeypatch, capsys):
    rows = {"latents/try": [("a", {"batch": 16}, 2), ("b", {"batch": 20}, 1)]}
    monkeypatch.setattr(grid, "EXPERIMENTS", rows)
    out = tmp_path / "lines.jsonl"
    one = runner.train({"world": "latents", "batch": 16, "steps": 1, "samples": 200}, 0)
    assert one["tables"]["kernel"].keys() == {"content", "style_1", "style_2", "backbone"} and one["terms"]["loss"]
    with open(out, "w") as file:
        for r in grid.runs()[:2]:
            file.write(json.dumps(r | one) + "\n")
    assert runner.main(["list", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("done") == 2
    assert runner.main(["list", "--rows", "^b", "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == ["done", "latents/try", "b", "seed", "0"]
    with pytest.raises(SystemExit):
        runner.main(["run", "--rows", "c", "--out", str(out)])
    assert "--rows: expected a part of a row's name: got 'c'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        runner.main(["run", "--rows", "(", "--out", str(out)])
    assert "--rows: expected a regular expression: got '(', which is none" in capsys.readouterr().err
    monkeypatch.setattr(runner, "attempt", None)  # nothing that has a line is run again
    rows["latents/try"] = rows["latents/try"][:1]
    with open(out, "a") as file:
        file.write(json.dumps(grid.runs()[1] | one) + "\n")
    assert runner.main(["run", "--out", str(out)]) == 0
    with pytest.raises(SystemExit, match="expected experiments of"):
        runner.main(["run", "latent/try", "--out", str(out)])
    with pytest.raises(SystemExit):
        runner.main(["run", "--steps", "3"])
    assert "--steps: expected --out beside it" in capsys.readouterr().err


def test_the_commands_that_are_written_down_name_experiments():
    for text in (
        runner.__doc__,
        (report.DOCS / "results.md").read_text(),
        (report.DOCS.parent / "README.md").read_text(),
    ):
        for command in re.findall(r"examples/study run ([a-z ]+?)(?: --|`|\s*$|  )", text, flags=re.MULTILINE):
            assert grid.runs(command.split()), command


def test_one_seed_is_one_run():
    config = {"world": "latents", "batch": 16, "steps": 2, "method": "equivariance", "samples": 200}
    a, b = runner.train(config, 1), runner.train(config, 1)
    assert a["tables"] == b["tables"] and a["terms"] == b["terms"]


class TestLatents:
    def test_interleaved_keys_share_the_block_that_their_row_serves(self):
        data = CausalLatents(0, plan="interleaved", cross_image=True)
        batch = data.batch(10, torch.Generator().manual_seed(0))
        index = torch.arange(10) % 3
        for m, name in enumerate(data.styles):
            a, b = (p[name]["0.Block"]["value"] for p in batch.parameters)
            assert torch.equal((a == b).all(1), index == m + 1)
        moved = batch.image_ids[1] != batch.image_ids[0]
        assert torch.equal(moved, index > 0)  # content's own rows keep their image
        assert all(int(i) % 3 == int(r) % 3 for r, i in enumerate(batch.image_ids[1]))  # among the rows of the space

    def test_unstructured_keys_share_no_block(self):
        batch = CausalLatents(0, structured=False).batch(8, torch.Generator().manual_seed(0))
        for v in range(1, 4):
            for name in ("style_1", "style_2"):
                a, b = (batch.parameters[k][name]["0.Block"]["value"] for k in (0, v))
                assert not (a == b).all(1).any()


@pytest.mark.parametrize("name", report.PAGES)
def test_the_tables_on_the_pages_of_results_are_made_from_the_lines(name):
    """`python examples/study tables` makes them; nobody writes a number of a table by hand."""
    text = (report.DOCS / name).read_text()
    assert result_lines.filled(text, report.TABLES, result_lines.read(runner.LINES)) == text, (
        "run `python examples/study tables`"
    )


def test_every_table_stands_on_one_page():
    text = "".join((report.DOCS / n).read_text() for n in report.PAGES)
    blocks = [b for b in re.findall(r"<!-- (.+?) -->", text) if b != "end"]
    assert sorted(blocks) == sorted(report.TABLES)
    with pytest.raises(ValueError, match="expected a block of .*got 'nonsense'"):
        result_lines.filled("<!-- nonsense -->\n<!-- end -->", report.TABLES, [])


class TestCells:
    def line(self, seed, own, content):
        kernel = {"content": {"content": 1.0, "style_1": 0.0}, "style_1": {"content": content, "style_1": own}}
        kernel["backbone"] = {"content": 1.0, "style_1": 1.0}
        given = {s: {f: v for f, v in row.items() if f != "content"} for s, row in kernel.items()}
        tables = {"linear": kernel, "kernel": kernel, "conditional": given}
        return {
            "experiment": "latents/try",
            "name": "a",
            "config": {"world": "latents"},
            "seed": seed,
            "tables": tables,
        }

    def test_mean_and_spread_over_seeds_and_a_mark_for_one(self, monkeypatch):
        experiments = {"latents/try": [("a", {}, 2), ("b", {"batch": 3}, 1)], "latents/other": [("a", {}, 3)]}
        monkeypatch.setattr(grid, "EXPERIMENTS", experiments)
        lines = [self.line(0, 0.5, 0.1), self.line(1, 0.7, 0.3)]
        lines.append(self.line(0, 0.9, 0.0) | {"config": {"world": "latents", "batch": 3}})
        lines.append(self.line(0, 0.0, 0.0) | {"config": {"world": "latents", "batch": 4}})  # the grid has left it
        rows = [r.split(" | ") for r in report.latents("latents/try")(lines).splitlines()]
        at = rows[0].index("styles")
        assert [r[0] for r in rows[2:]] == ["| a", "| b†"]
        assert rows[2][at] == "0.60 ± 0.14" and rows[3][at] == "0.90"
        assert rows[2][rows[0].index("content in styles")] == "0.20 ± 0.14"
        assert rows[2][rows[0].index("other styles")] == "n/a"  # there is one style alone
        lines += [lines[1] | {"seed": 2}, lines[0] | {"experiment": "latents/other"}, self.line(1, 0.7, 0.3)]
        assert report.latents("latents/try")(lines).splitlines() == [
            " | ".join(r) for r in rows
        ]  # no seed counts twice
        one = report.latents("latents/try")(lines[:1]).splitlines()
        assert one[2].startswith("| a† | ")
        assert report.latents("latents/try")([]) == "*Not run yet.*"
        two = [self.line(s, 0.5, 0.1) | {"experiment": "latents/other"} for s in (1, 0)]
        assert report.rows_of(two, "latents/other")["a"] == two[::-1]
        assert report.latents("latents/other")(two).splitlines()[2].startswith("| a (2 seeds) | ")

    def test_rows_of_other_parameters_have_a_table_of_their_own(self, monkeypatch):
        monkeypatch.setattr(grid, "EXPERIMENTS", {"cifar/try": [("a", {}, 1), ("b", {"groups": "each"}, 1)]})
        lines = []
        for config, parameter in (({}, "color/0.ColorJitter/hue_factor"), ({"groups": "each"}, "blur/0.Blur/sigma")):
            tables = {"label-free, each": {s: {parameter: 0.5} for s in ("content", "backbone")}}
            run = {"experiment": "cifar/try", "config": {"world": "photographs", **config}, "seed": 0}
            lines.append(run | {"tables": tables})
        first, second = report.label_free("cifar/try")(lines).split("\n\n")
        assert first.splitlines()[0] == "|  | space | hue |" and second.splitlines()[0] == "|  | space | sigma |"
        assert "n/a" not in first + second


def test_pictures_of_what_there_is(tmp_path):
    pictures.draw([], tmp_path)  # nothing has been run
    empty = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    pictures.draw(result_lines.read(runner.LINES), tmp_path)
    full = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert {p.name for p in (report.DOCS / "results").glob("*.png")} >= full.keys() >= empty.keys()
    assert all(full[name] != picture for name, picture in empty.items())


def test_a_run_whose_loss_is_not_finite_ends_at_once(monkeypatch):
    class Broken(methods.Joint):
        def forward(self, model, batch, log):
            loss, terms = super().forward(model, batch, log)
            return loss * float("nan"), terms

    monkeypatch.setitem(methods.METHODS, "ours", Broken)
    with pytest.raises(FloatingPointError, match="step 0: the loss is nan"):
        runner.train({"world": "latents", "steps": 2, "batch": 16}, 0)


def test_a_line_that_was_cut_off_is_no_run(tmp_path):
    (tmp_path / "l.jsonl").write_text('{"seed": 0}\n{"seed": 1, "tables": {}')
    assert result_lines.read(tmp_path / "l.jsonl") == [{"seed": 0}]
    for seed in (2, 3):
        result_lines.append(tmp_path / "l.jsonl", {"seed": seed})
    assert result_lines.read(tmp_path / "l.jsonl") == [{"seed": 0}, {"seed": 2}, {"seed": 3}]
    result_lines.append(tmp_path / "new" / "l.jsonl", {"seed": 4})
    assert result_lines.read(tmp_path / "new" / "l.jsonl") == [{"seed": 4}] and result_lines.read(tmp_path / "no") == []


@pytest.mark.parametrize("method", ["separate entropies", "equivariance", "augself", "looc", "unstructured pairs"])
def test_a_method_is_what_it_says(method):
    torch.manual_seed(0)
    c = grid.DEFAULTS | grid.OF_WORLD["latents"] | {"world": "latents", "method": method, "equivariance": 0.5}
    world = worlds.WORLDS["latents"](c, 0)
    model = methods.build_model(c, world).eval()
    batch = world.batch(12, torch.Generator().manual_seed(0))
    made = methods.METHODS[method](c, world).eval()
    loss = made(model, batch, True)[0].item()
    z, tau = model(batch), c["temperature"]
    joint = JointEntropyLoss("simclr", temperature=tau)
    if method == "separate entropies":
        each = []
        for s, (name, t) in enumerate(z.items()):
            u = F.normalize(t, dim=-1)
            every, ids = u.flatten(0, 1), torch.arange(12).repeat(4)
            logits = (every @ every.T / tau).masked_fill(ids[:, None] == ids, -torch.inf)
            each.append(logits.logsumexp(1).mean() - (u[0] * u[1 + s]).sum(1).mean() / tau)
            assert name in model.spaces
        expected = sum(each).item() / 3
    elif method == "equivariance":
        expected = (joint(z) + made.equivariance(z, batch)).item()
        assert made.equivariance.weight == 0.5 and expected != pytest.approx(joint(z).item(), abs=1e-3)
    elif method == "augself":
        a, b = model.features(batch)
        values = [{n: p[n]["0.Block"]["value"] for n in world.styles} for p in batch.parameters]
        changes = {f"{n}/0.Block/value": values[1][n] - values[0][n] for n in world.styles}
        expected = (joint(z) + made.augself(a, b, changes)).item()
        assert list(z) == ["content"] and made.augself(a, b, changes) > 0.1
    elif method == "looc":
        expected = LooCLoss(tau)(z).item()
    else:
        expected = joint(z).item()
        drawn = [p["style_1"]["0.Block"]["value"] for p in batch.parameters]
        assert not any((drawn[0] == d).all(1).any() for d in drawn[1:])
    assert loss == pytest.approx(expected, rel=1e-5)
