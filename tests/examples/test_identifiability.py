"""The identifiability experiments: the generators' structure, equal budgets, their probe, and that every row trains."""

import json

import pytest
import result_lines
import torch
from identifiability import grid, report, runner
from identifiability.generators import VIEWS, ContentStyle, Mixing, PartialViews
from identifiability.methods import METHODS, Ours, OursPartial, Theirs, contrast
from identifiability.scores import kernel_ridge_r2, linear_r2


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    """A mixing is chosen from 25,000 matrices; a test takes a few."""
    from identifiability import generators

    monkeypatch.setattr(generators, "POOL", 400)
    monkeypatch.setattr(generators, "BEST", 0.05)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(world: str, **config) -> dict:
    return {"world": world, "encoder": (2, 2), "steps": 2, "samples": 60, "fit": 30, "rows": 60, "passes": 96, **config}


class TestMixing:
    def test_its_inverse_gives_the_latents_back(self):
        mix, z = Mixing(10, draws()), torch.randn(500, 10, dtype=torch.float64)
        assert torch.allclose(mix.inverse(mix(z)), z, atol=1e-10)
        assert (mix(z) + mix(-z)).abs().max() > 0.1  # it is not linear

    def test_layers_have_unit_columns_and_are_the_best_conditioned_of_their_pool(self):
        mix = Mixing(6, draws())
        for w, condition in zip(mix.layers, mix.conditions, strict=True):
            assert torch.allclose(w.norm(dim=0), torch.ones(6), atol=1e-6)
            assert condition == pytest.approx(float(torch.linalg.cond(w)), rel=1e-3) and condition <= mix.threshold
        pool = 2 * torch.rand(400, 6, 6, generator=draws()) - 1
        worse = torch.linalg.cond(pool / pool.norm(dim=1, keepdim=True)) > mix.threshold
        assert float(worse.float().mean()) == pytest.approx(0.95, abs=0.01)


class TestContentStyle:
    def latents(self, world: ContentStyle, kinds: list[str], n: int = 4000) -> list[torch.Tensor]:
        return [world.mix.inverse(x.double()) for x in world.views(n, kinds, draws(1))]

    def test_a_content_pair_shares_content_and_changes_each_style_with_the_stated_probability(self):
        world = ContentStyle(0, change=0.75, statistical=True, causal=True)
        query, key = self.latents(world, ["query", "content key"])
        assert torch.allclose(query[:, :5], key[:, :5], atol=1e-3)
        changed = (query[:, 5:] - key[:, 5:]).abs() > 1e-4
        assert changed.double().mean(0).tolist() == pytest.approx([0.75] * 5, abs=0.03)
        both = (changed[:, 0] & changed[:, 1]).double().mean()  # one draw for each style
        assert float(both) == pytest.approx(0.75**2, abs=0.03)

    def test_all_styles_change_where_the_probability_is_one(self):
        query, key = self.latents(ContentStyle(0), ["query", "content key"])
        assert bool(((query[:, 5:] - key[:, 5:]).abs() > 1e-4).double().mean() > 0.999)

    def test_a_style_pair_shares_style_and_has_content_of_its_own(self):
        query, key = self.latents(ContentStyle(0, causal=True), ["query", "style key"])
        assert torch.allclose(query[:, 5:], key[:, 5:], atol=1e-3)
        assert torch.cat([query[:, :5], key[:, :5]], 1).T.corrcoef()[:5, 5:].abs().max() < 0.1

    def test_a_negative_shares_nothing(self):
        query, other = self.latents(ContentStyle(0, causal=True), ["query", "negative"])
        assert torch.cat([query, other], 1).T.corrcoef()[:10, 10:].abs().max() < 0.1

    def test_dependences_are_there_when_asked_for(self):
        def correlation(**options) -> torch.Tensor:
            c, s = ContentStyle(3, **options).latents(20_000, draws())
            return torch.cat([c, s], 1).T.corrcoef() - torch.eye(10)

        assert correlation().abs().max() < 0.05
        within = correlation(statistical=True)
        assert within[:5, :5].abs().max() > 0.3 and within[:5, 5:].abs().max() < 0.05
        assert correlation(causal=True)[:5, 5:].abs().max() > 0.3

    def test_the_covariance_of_changes_is_the_one_that_was_drawn(self):
        world = ContentStyle(1, statistical=True)
        _, s = world.latents(50_000, draws())
        moved = (world.augmented(s, draws(1)) - s).T.cov()
        assert torch.allclose(moved, world.of_change @ world.of_change.T, atol=0.05 * float(moved.diagonal().max()))

    def test_an_unknown_kind_of_view_is_refused(self):
        with pytest.raises(ValueError, match="kinds: expected query"):
            ContentStyle(0).views(2, ["key"], draws())


class TestPartialViews:
    def test_a_view_depends_on_its_own_latents_and_on_all_of_them(self):
        world = PartialViews(0)
        z = world.latents(50, draws())
        before = world.observe(z)
        for j in range(6):
            moved = z.clone()
            moved[:, j] += 1
            for k, x in enumerate(world.observe(moved)):
                assert bool((x != before[k]).any()) == (j in VIEWS[k])

    def test_every_view_has_an_inverse(self):
        world = PartialViews(0)
        z = world.latents(50, draws()).double()
        for mix, x, view in zip(world.mixes, world.observe(z), VIEWS, strict=True):
            assert torch.allclose(mix.inverse(x), z[:, list(view)], atol=1e-10)

    def test_subsets_share_what_all_their_views_observe(self):
        world = PartialViews(0)
        assert world.shared((0, 1, 2, 3)) == (0, 1) and world.shared((0, 1, 2)) == (0, 1, 2)
        assert report.latents_of("01") == ({"0", "1", "2", "4"}, {"3", "5"})

    def test_so_many_first_latents_depend_on_each_other(self):
        r = PartialViews(0, dependent=3).latents(20_000, draws()).T.corrcoef() - torch.eye(6)
        assert r[:3, :3].abs().max() > 0.3 and r[3:].abs().max() < 0.05


class TestContrast:
    def test_it_is_the_equation(self):
        a, b, n = (torch.randn(5, 3, dtype=torch.float64) for _ in range(3))
        losses = []
        for i in range(5):
            pos = sum(float(v) ** 2 for v in a[i] - b[i])
            others = [sum(float(v) ** 2 for v in a[i] - n[j]) for j in range(5)]
            total = sum(torch.tensor([-d for d in [*others, pos]]).double().exp().tolist())
            losses.append(pos + float(torch.tensor(total / 6).log()))
        assert float(contrast([a, b], [n])) == pytest.approx(sum(losses) / 5)

    def test_views_of_a_subset_add_their_distances(self):
        a, n = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
        wide, others = torch.cat(list(a), 1), torch.cat(list(n), 1)
        pos = ((a[0] - a[1]) ** 2 + (a[1] - a[2]) ** 2).sum(1)
        logits = torch.cat([-((wide[:, None] - others) ** 2).sum(2), -pos[:, None]], 1)
        expected = (pos + logits.exp().mean(1).log()).mean()
        assert float(contrast(list(a), list(n))) == pytest.approx(float(expected))


def configurations(world: str) -> list[dict]:
    found = {}
    for experiment, (its, rows) in grid.EXPERIMENTS.items():
        for name, config in rows if its == world else ():
            found[name] = found.get(name, {"world": world, **config})
            assert config.keys() <= grid.DEFAULTS[world].keys(), experiment
    return [c for c in found.values() if c.get("method") != "truth"]


class TestBudgets:
    @pytest.mark.parametrize("world", ["pair", "partial"])
    def test_every_method_makes_the_same_number_of_encoder_passes(self, world):
        assert len(configurations(world)) >= 4
        for config in configurations(world):
            c = grid.DEFAULTS[world] | config | {"encoder": (2,)}
            its = runner.world_of(c, 0)
            method, counted = METHODS[world][c["method"]](c, its), 0

            def count(_module, inputs, _output):
                nonlocal counted
                counted += inputs[0].shape[:-1].numel()

            for name, module in method.named_modules():
                if (
                    isinstance(module, torch.nn.Linear)
                    and name.endswith(".0")
                    and module.in_features == {"pair": 10, "partial": 5}[world]
                ):
                    module.register_forward_hook(count)
            samples = c["passes"] // method.passes(1)
            method.loss(its, samples, draws())
            assert counted == method.passes(samples) == c["passes"], config

    def test_encoders_are_as_large_up_to_their_last_layer(self):
        world = ContentStyle(0)
        c = grid.DEFAULTS["pair"] | {"pairs": grid.BOTH}
        theirs, ours = Theirs(c, world), Ours(c, world)

        def size(module) -> int:
            return sum(p.numel() for p in module.parameters())

        assert size(theirs.net) == size(ours.model.backbone)


class TestRows:
    @pytest.mark.slow
    @pytest.mark.parametrize("world", ["pair", "partial"])
    def test_every_kind_of_row_trains_two_steps(self, world):
        for config in configurations(world):
            line = runner.train(config | small(world), 0)
            tables = line["scores"]
            assert set(tables) == {"theirs", "theirs, linear", "linear", "kernel", "conditional"}
            assert line["budget"]["steps"] == 2 and line["budget"]["passes"] == 96
            spaces = 1 + (config.get("pairs") == grid.BOTH) if world == "pair" else 11
            assert len(tables["theirs"]) == (5 if config.get("spaces") == "latents" else spaces)

    def test_dual_ascent_moves_the_weights_after_its_warm_up(self):
        world = PartialViews(0)
        method = OursPartial(grid.DEFAULTS["partial"] | {"encoder": (2,), "spaces": "latents", "dual": 0.02}, world)
        method.criterion.weights.warmup_steps = 1
        for expected in (False, True):
            method.loss(world, 8, draws())
            method.after()
            assert bool((method.criterion.weights.values > 1).any()) == expected

    def test_training_steps_the_ascent_once_after_every_step(self, monkeypatch):
        calls = []
        monkeypatch.setattr(OursPartial, "after", lambda self: calls.append(self.terms.loss.item()))
        monkeypatch.setattr(runner, "score", lambda *_: {})
        runner.train(small("partial", spaces="latents", dual=0.02), 0)
        assert len(set(calls)) == 2

    def test_one_seed_is_one_run(self):
        config = small("pair", pairs=grid.BOTH)
        assert runner.train(config, 1)["scores"] == runner.train(config, 1)["scores"]

    def test_ours_takes_the_style_key_for_another_sample(self):
        world = ContentStyle(0)
        method, seen = Ours(grid.DEFAULTS["pair"] | {"pairs": grid.BOTH, "encoder": (2,)}, world), []
        method.criterion.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].image_ids))
        method.loss(world, 4, draws())
        assert seen[0].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]

    def test_the_truth_tells_style_only_as_far_as_it_depends_on_content(self):
        def explained(**options) -> float:
            config = {"world": "pair", "method": "truth", "samples": 400, "fit": 200, "rows": 20, **options}
            return runner.train(config, 0)["scores"]["theirs"]["content"]["style"]

        assert explained(causal=True) > 0.4 and abs(explained()) < 0.1


class TestProbes:
    def test_kernel_ridge_is_scikit_learns_with_its_grid(self):
        sklearn = pytest.importorskip("sklearn.kernel_ridge")
        from sklearn.metrics import r2_score
        from sklearn.model_selection import GridSearchCV

        x = torch.randn(100, 3, generator=draws())
        y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), torch.randn(100, generator=draws(1))], 1)
        grid_of = {"alpha": [1.0, 0.1, 0.01, 0.001], "gamma": torch.logspace(-2, 2, 4).tolist()}
        a, b = ((t - t[:60].mean(0)) / t[:60].std(0, correction=0) for t in (x, y))
        for k, score in enumerate(kernel_ridge_r2(x, y, 60).tolist()):
            search = GridSearchCV(sklearn.KernelRidge(kernel="rbf"), grid_of, cv=3)
            search.fit(a[:60].numpy(), b[:60, k].numpy())
            assert score == pytest.approx(r2_score(b[60:, k], search.predict(a[60:].numpy())), abs=1e-4)

    def test_linear_is_least_squares(self):
        x = torch.randn(200, 3, generator=draws())
        y = torch.stack([x @ torch.tensor([1.0, 2.0, 3.0]) + 4, x[:, 0] ** 2], 1)
        straight, curved = linear_r2(x, y, 100).tolist()
        assert straight == pytest.approx(1) and curved < 0.2


class TestLines:
    def test_a_stopped_grid_resumes_and_its_tables_are_filled(self, tmp_path, monkeypatch, capsys):
        rows = [("theirs", small("pair", method="theirs")), ("the true latents", small("pair", method="truth"))]
        rows = [(name, {k: v for k, v in c.items() if k != "world"} | {"encoder": [2]}) for name, c in rows]
        monkeypatch.setattr(grid, "EXPERIMENTS", {"pair/try": ("pair", rows)})
        monkeypatch.setattr(grid, "SEEDS", 1)
        out, page = tmp_path / "lines.jsonl", tmp_path / "page.md"
        assert runner.main(["run", "--out", str(out)]) == 0
        line = json.loads(out.read_text().splitlines()[0])
        assert line["n"] == 60 and line["seconds"] >= 0 and "commit" in line and line["seed"] == 0
        monkeypatch.setattr(runner, "train", None)  # what has a line is not run again
        assert runner.main(["run", "--out", str(out)]) == 0
        assert runner.main(["list", "--out", str(out)]) == 0
        assert capsys.readouterr().out.count("done") == 2
        page.write_text("text\n<!-- pair: their protocol -->\nold\n<!-- end -->\n<!-- agreement -->\n<!-- end -->\n")
        report.write(result_lines.read(out), page)
        text = page.read_text()
        assert "old" not in text and "| try | theirs † |" in text and "*Not run yet.*" in text
        with pytest.raises(ValueError, match="expected a block of"):
            result_lines.filled("<!-- pairs -->\n<!-- end -->", report.TABLES, [])

    def test_wrong_commands_are_refused(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            runner.main(["run", "--steps", "3"])
        assert "--steps: expected --out beside it" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="expected experiments of"):
            runner.main(["run", "pears", "--out", str(tmp_path / "x")])
        with pytest.raises(SystemExit):
            runner.main(["agree"])
        assert "agree: expected --pair DIR and --partial DIR" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="agree: expected a checkout"):
            runner.main(["agree", "--pair", str(tmp_path), "--partial", str(tmp_path)])

    def test_every_block_of_the_page_has_a_table_and_every_number_a_line(self):
        text = report.PAGE.read_text()
        assert result_lines.filled(text, report.TABLES, result_lines.read(runner.LINES)) == text
