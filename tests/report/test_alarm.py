"""The collapse alarm: what it says of histories, and that it stays quiet where a run ends well."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ssd_addon
from ssd_addon import CollapseAlarm, CollapseWarning, DualAscent, JointEntropyLoss, Monitor
from ssd_addon.losses import FAMILIES, Family, SIGReg
from ssd_addon.runs import read_log

FINE = {
    "loss": 1.0,
    "entropy": 2.0,
    "constraint/content": 0.05,
    "invariance/content": -6.0,
    "effective_rank/content": 4.0,
    "agreement/content": 0.9,
    "spread/content": 0.8,
    "constraint/color": 0.02,
    "effective_rank/color": 6.0,
    "agreement/color": 0.95,
    "spread/color": 0.9,
    "overlap/content/color": 0.1,
}


def said(alarm, change, steps=range(0, 1000, 20), base=FINE):
    """Events over a history: change(step) -> what differs from a healthy line."""
    return [event for step in steps for event in alarm({**base, "step": step, **change(step)})]


def short(events):
    return [(e.step, e.space, e.kind, e.over) for e in events]


def one_direction(step):
    return {"effective_rank/content": 1.1}


# ---- each kind


def test_a_healthy_run_is_left_alone():
    assert said(CollapseAlarm(), lambda step: {}, range(0, 5000, 10)) == []


def test_one_direction_with_pairs_that_agree_is_a_collapse():
    (event,) = said(CollapseAlarm(widths={"content": 8}), one_direction)
    assert short([event]) == [(300, "content", "one direction", False)]
    assert event.text == (
        "content: its pairs agree (misalignment 0.05) but it uses one direction (effective rank 1.1 of 8 for 300 steps"
        "; healthy: 2 or more): lower its weight, or add content_entropy=True"
    )


@pytest.mark.parametrize(
    ("more", "space", "advice"),
    [
        ({"content_entropy": 1.0}, "content", "lower its weight"),
        (
            {"lambda/content": 3.0, "content_entropy": 1.0},
            "content",
            "raise the DualAscent's warmup_steps or tolerance",
        ),
        (
            {"lambda/content": 3.0, "equivariance": 1.0, "content_entropy": 1.0},
            "content",
            "raise the DualAscent's warmup_steps or tolerance, or leave out the equivariance term",
        ),
        (
            {"equivariance": 1.0, "content_entropy": 1.0},
            "content",
            "lower its weight, or lower the weight of the equivariance term",
        ),
        (
            {},
            "color",
            "lower its weight, or leave it as it is if its group changes one number only, for which one direction is "
            "enough",
        ),
    ],
)
def test_what_to_change_depends_on_what_the_run_has(more, space, advice):
    (event,) = said(CollapseAlarm(), lambda step: {**more, f"effective_rank/{space}": 1.2})
    assert event.space == space and event.text.rpartition("more): ")[2] == advice


def test_one_direction_with_pairs_that_do_not_agree_is_none():
    history = {"effective_rank/content": 1.1, "agreement/content": 0.15, "constraint/content": 0.01}
    assert said(CollapseAlarm(), lambda step: history) == []


def test_a_log_without_agreement_is_judged_by_the_misalignment():
    base = {k: v for k, v in FINE.items() if not k.startswith("agreement/")}
    assert said(CollapseAlarm(), lambda s: one_direction(s) | {"constraint/content": 0.2}, base=base) == []
    assert short(said(CollapseAlarm(), one_direction, base=base)) == [(300, "content", "one direction", False)]


@pytest.mark.parametrize(("width", "events"), [(1, 0), (2, 0), (3, 1)])
def test_a_space_of_one_or_two_dimensions_is_not_held_to_a_rank(width, events):
    assert len(said(CollapseAlarm(widths={"content": width}), one_direction)) == events


def test_equal_embeddings_are_a_collapse_whatever_their_rank():
    (event,) = said(CollapseAlarm(), lambda step: {"spread/content": 0.001, "effective_rank/content": 1.0})
    assert short([event]) == [(300, "content", "one embedding", False)] and "spread 0.001 for 300 steps" in event.text
    assert said(CollapseAlarm(), lambda step: {"spread/content": 0.004}) == []


def test_pairs_that_never_agree_are_reported_late():
    apart = {"agreement/color": 0.05}
    (event,) = said(CollapseAlarm(), lambda step: apart, range(0, 3000, 20))
    assert short([event]) == [(1500, "color", "pairs apart", False)]
    assert "agreement 0.05 for 1500 steps" in event.text and "group draws something" in event.text
    (event,) = said(CollapseAlarm(2000), lambda step: {"agreement/content": 0.0}, range(0, 3000, 20))
    assert event.step == 1000 and "its key shows the same image" in event.text
    assert said(CollapseAlarm(), lambda step: {"agreement/color": 0.12}, range(0, 3000, 20)) == []


def test_a_weight_that_runs_away_is_reported():
    def grows(step):
        return {"lambda/content": 1.0 + 0.1 * step, "constraint/content": 0.4}

    (event,) = said(CollapseAlarm(), grows, range(0, 2000, 20))
    assert event.kind == "weight" and event.step == 300
    assert "grew from 1 to 31" in event.text and "(0.4) has not fallen" in event.text
    # it grows, and pairs come closer; it grew, and stays; it has not grown far
    assert said(CollapseAlarm(), lambda s: grows(s) | {"constraint/content": 0.4 * 0.999**s}, range(0, 1000, 20)) == []
    assert said(CollapseAlarm(), lambda s: grows(min(s, 200)), range(0, 2000, 20)) == []
    assert said(CollapseAlarm(), lambda s: grows(s / 30), range(0, 2000, 20)) == []


def test_spaces_that_repeat_each_other_are_reported():
    (event,) = said(CollapseAlarm(), lambda step: {"overlap/content/color": 0.97})
    assert short([event]) == [(300, "content/color", "repeats", False)] and "overlap 0.97" in event.text
    assert said(CollapseAlarm(), lambda step: {"overlap/content/color": 0.85}) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
@pytest.mark.parametrize(
    ("name", "space"), [("constraint/content", "content"), ("invariance/content", "content"), ("loss", "loss")]
)
def test_terms_that_are_not_finite_are_reported_with_the_second_line(name, space, bad):
    events = said(CollapseAlarm(100_000), lambda step: {name: bad} if step > 35 else {}, range(0, 200, 10))
    assert short(events) == [(50, space, "not finite", False)] and f"{name} not finite at step 40" in events[0].text
    assert said(CollapseAlarm(), lambda step: {name: bad} if step == 50 else {}, range(0, 200, 10)) == []


def test_what_is_no_term_is_not_judged():
    alarm = CollapseAlarm()
    for step in range(0, 1000, 10):
        assert alarm({"step": step, "loss": math.nan}) == alarm({"step": step, "skipped": 1}) == []
        assert (
            alarm({"loss": 1.0}) == alarm({"step": None, **FINE}) == alarm({"step": step, "val/constraint/a": 0}) == []
        )
    assert said(alarm, lambda step: {"lr": math.nan, "constraint/content": 0.1}) == []


@pytest.mark.parametrize("kind", [np.float32, torch.tensor, lambda x: torch.tensor(x, dtype=torch.bfloat16), int, str])
def test_numbers_of_any_kind_and_nothing_else(kind):
    def lines(alarm, change):
        out = []
        for step in range(0, 1000, 20):
            line = {k: kind(v) for k, v in {**FINE, **change(step)}.items()}
            out += alarm({**line, "step": np.int64(step)})
        return out

    if kind is str:
        with pytest.raises(TypeError, match="loss: expected a number, or None for one that is not finite: got '1.0'"):
            lines(CollapseAlarm(), lambda step: {})
        with pytest.raises(TypeError, match="step: expected a number"):
            CollapseAlarm()({**FINE, "step": "3"})
    elif kind is not int:
        assert lines(CollapseAlarm(), lambda step: {}) == []
        assert short(lines(CollapseAlarm(), one_direction)) == [(300, "content", "one direction", False)]


@pytest.mark.parametrize("prefix", ["train/", "train_", "loss/ssl/", ""])
def test_names_may_have_one_prefix(prefix):
    def renamed(step, other="val/"):
        bad = {**FINE, **one_direction(step)}
        return {**{prefix + k: v for k, v in bad.items()}, **{other + k: v for k, v in FINE.items()}}

    assert short(said(CollapseAlarm(), renamed, base={})) == [(300, "content", "one direction", False)]
    assert said(CollapseAlarm(), lambda step: {f"val/{k}": v for k, v in renamed(step).items()}, base={}) == []
    if prefix:  # two sets of terms: which one is meant is not clear
        assert said(CollapseAlarm(), lambda step: renamed(step, "teacher/"), base={}) == []


# ---- patience


def test_an_early_dip_is_waited_for():
    dip = [6.0] * 10 + [1.2] * 14 + [1.9] * 60  # 280 steps of twenty
    assert said(CollapseAlarm(), lambda s: {"effective_rank/content": dip[s // 20]}, range(0, 1600, 20)) == []


def test_one_message_for_an_event_and_one_when_it_is_over():
    def history(step):
        return {"effective_rank/content": 1.2 if step < 600 else 1.6 if step < 900 else 2.5}

    first, last = said(CollapseAlarm(), history, range(0, 3000, 20))
    assert (first.step, first.over, last.step, last.over) == (300, False, 1000, True)
    assert last.text == "content: recovered, effective rank 2.5 (reported at step 300)"


def test_a_collapse_ends_too_where_pairs_come_apart():
    def history(step):
        return {"effective_rank/content": 1.2, "agreement/content": 0.9 if step < 600 else 0.05}

    events = said(CollapseAlarm(), history, range(0, 1000, 20))
    assert [(e.kind, e.over) for e in events] == [("one direction", False), ("one direction", True)]


def test_a_number_that_wavers_makes_no_stream_of_messages():
    events = said(CollapseAlarm(), lambda s: {"effective_rank/content": 1.45 + 0.1 * (s // 20 % 2)}, range(0, 5000, 20))
    assert events == []
    wavers = {0: 1.1, 1: 1.6}
    events = said(
        CollapseAlarm(), lambda s: {"effective_rank/content": wavers[s % 400 > 340]}, range(0, 5000, 20)
    )  # now and then above, never recovered
    assert len(events) <= 1
    outlier = said(CollapseAlarm(), lambda s: {"effective_rank/content": 3.0 if s == 160 else 1.1})
    assert len(outlier) == 1


def test_a_space_says_one_thing_at_a_time():
    both = {"spread/content": 0.001, "effective_rank/content": 1.1, "agreement/content": 0.9}
    assert len(said(CollapseAlarm(), lambda step: both, range(0, 3000, 20))) == 1


def test_a_window_grows_with_the_run_and_leaves_out_its_warm_up():
    assert CollapseAlarm().window == 300 and CollapseAlarm(100_000).window == 2000
    assert CollapseAlarm(100_000, window=50).window == 50
    (event,) = said(CollapseAlarm(20_000), one_direction, range(0, 5000, 20))
    assert event.step == 1400  # 5 % of the run, then 2 %
    (event,) = said(CollapseAlarm(window=100), one_direction, range(0, 5000, 20))
    assert event.step == 100


@pytest.mark.parametrize("every", [1, 7, 100, 1000])
def test_lines_may_come_often_or_seldom(every):
    (event,) = said(CollapseAlarm(), one_direction, range(0, 10_000, every))
    assert event.step in {1: range(300, 306), 7: range(300, 310), 100: [400], 1000: [4000]}[every]


def test_what_is_kept_is_bounded():
    alarm = CollapseAlarm()
    said(alarm, lambda step: {}, range(6000))
    assert 100 < len(alarm.state_dict()["lines"]) < 450


# ---- which spaces, arguments


def test_spaces_that_are_not_watched():
    assert said(CollapseAlarm(spaces=["color"]), one_direction) == []
    repeats = {"overlap/content/color": 1.0}
    assert said(CollapseAlarm(spaces=["color"]), lambda step: repeats) == []
    assert len(said(CollapseAlarm(spaces=["color", "content"]), lambda step: repeats)) == 1


def test_content_alone_is_watched_too():
    base = {k: v for k, v in FINE.items() if "color" not in k}
    assert [e.space for e in said(CollapseAlarm(), one_direction, base=base)] == ["content"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"total_steps": 0}, ValueError, "total_steps: expected a whole number, 1 or more: got 0"),
        ({"window": 2.5}, ValueError, "window: expected a whole number, 1 or more: got 2.5"),
        ({"spaces": "content"}, TypeError, "spaces: expected several names"),
    ],
)
def test_bad_arguments_of_the_alarm(arguments, error, message):
    with pytest.raises(error, match=message):
        CollapseAlarm(**arguments)


# ---- a run that goes on


def test_a_run_that_is_taken_up_again_says_what_an_uninterrupted_one_says():
    def history(step):
        return {"effective_rank/content": 1.2 if 100 < step < 900 else 4.0, "lambda/content": 1 + 0.1 * step}

    whole = short(said(CollapseAlarm(), history, range(0, 2000, 20)))
    assert len(whole) == 3
    for cut in (60, 200, 500, 1000):
        before, after = CollapseAlarm(), CollapseAlarm()
        events = said(before, history, range(0, cut, 20))
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        events += said(after, history, range(cut, 2000, 20))
        assert short(events) == whole
        replayed = CollapseAlarm()
        replayed.replay({**FINE, "step": s, **history(s)} for s in range(0, cut, 20))
        assert replayed.state_dict() == before.state_dict()
    with pytest.raises(ValueError, match="expected a state with lines, first and active"):
        CollapseAlarm().load_state_dict({"lines": []})


def test_steps_that_come_again_are_forgotten():
    alarm = CollapseAlarm()
    assert len(said(alarm, one_direction, range(0, 620, 20))) == 1
    assert said(alarm, lambda step: {}, range(200, 1000, 20)) == []  # from a checkpoint before it was said
    assert said(alarm, lambda step: {}, range(0, 1000, 20)) == []
    assert alarm.active == {}
    (event,) = said(alarm, one_direction, range(0, 400, 20))  # the healthy lines of those steps no longer count
    assert event.step == 300


# ---- recorded runs


def study():
    root = Path(ssd_addon.__file__).parents[1]
    return [json.loads(line) for line in (root / "docs/results/study.jsonl").read_text().splitlines()]


def test_the_recorded_histories_are_told_apart():
    found = {}
    for run in study():
        if run["name"] in ("weight 1", "weight 3 from the start", "weight 1, raised by dual ascent"):
            alarm = CollapseAlarm(widths={"content": 8})
            found[run["name"]] = short(event for line in run["history"] for event in alarm(line))
    assert found == {
        "weight 1": [],
        "weight 3 from the start": [(360, "content", "one direction", False)],
        "weight 1, raised by dual ascent": [],
    }


# ---- trainings that collapse on purpose, and that do not


class Mine(nn.Module):
    def forward(self, joint, ids):
        return -torch.stack([torch.logdet(torch.cov(view.T) + 0.1 * torch.eye(view.shape[1])) for view in joint]).mean()


def own_family():
    return Family("own", alignment=lambda a, b: (a - b).square().mean(dim=1), entropy=Mine(), weight=5.0)


SIX = [SIGReg(directions=16) if f == "sigreg" else f for f in FAMILIES]


def trained(family, weights=None, steps=180, same=False):
    """A linear layer for each space: content is the image's, color the view pair's. Events in windows of 60 steps."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    heads = {"content": nn.Linear(12, 4), "color": nn.Linear(12, 3)}
    if same:
        heads["content"].requires_grad_(False).weight.zero_()
    parameters = [p for h in heads.values() for p in h.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    criterion = JointEntropyLoss(family, weights=weights)
    alarm, events = CollapseAlarm(widths={"content": 4, "color": 3}, window=60), []
    for step in range(steps):
        image = torch.randn(32, 6, generator=g)
        look = torch.randn(2, 32, 6, generator=g)
        x = torch.stack([torch.cat([image, look[k]], dim=1) for k in (0, 1, 0)])
        x[2, :, :6] = torch.randn(32, 6, generator=g)  # the key of color shows another image
        terms = criterion.terms({n: h(x + 0.05 * torch.randn(x.shape, generator=g)) for n, h in heads.items()})
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        criterion.weights.step(terms)
        lambdas = {f"lambda/{n}": float(w) for n, w in criterion.weights.lambdas(("content", "color")).items()}
        if step % 3 == 0:
            events += alarm({"step": step, **terms.scalars(), **lambdas})
    return [(e.space, e.kind, e.over) for e in events]


@pytest.mark.parametrize("family", [*SIX, own_family()], ids=lambda f: getattr(f, "name", f))
def test_a_training_that_goes_well_is_left_alone(family):
    assert trained(family) == []


@pytest.mark.parametrize("family", [*SIX, own_family()], ids=lambda f: getattr(f, "name", f))
def test_a_space_that_is_dead_is_reported_in_every_family(family):
    assert ("content", "one embedding", False) in trained(family, same=True)


def test_a_weight_that_is_too_large_leaves_one_direction_or_none():
    """Content's key shares half of the image: with a weight of 20 nothing but what agrees exactly is left."""
    kinds = {kind for space, kind, _ in trained("simclr", {"content": 200.0, "color": 1.0}) if space == "content"}
    assert kinds <= {"one direction", "one embedding"}


def test_a_style_whose_group_draws_nothing_is_reported():
    z = {n: torch.randn(3, 32, d) for n, d in (("content", 4), ("color", 3))}
    z["content"][1] = z["content"][0]
    terms, alarm = JointEntropyLoss("vicreg").terms(z), CollapseAlarm(window=20)
    kinds = [(e.space, e.kind) for s in range(0, 200, 2) for e in alarm({"step": s, **terms.scalars()})]
    assert kinds == [("color", "pairs apart")]


def test_an_ascent_to_a_tolerance_out_of_reach_is_reported():
    ascent = DualAscent(("content", "color"), tolerance=0.0, step_size=5.0, start=1.0)
    z = {n: torch.randn(1, 32, d) + 0.7 * torch.randn(3, 32, d) for n, d in (("content", 4), ("color", 3))}
    criterion, alarm, kinds = JointEntropyLoss(weights=ascent), CollapseAlarm(window=20), []
    for step in range(60):
        terms = criterion.terms(z)
        criterion.weights.step(terms)
        kinds += [(e.space, e.kind) for e in alarm({"step": step, **terms.scalars()})]
    assert kinds == [("content", "weight"), ("color", "weight")]


# ---- Monitor, Lightning, the report


class Texts:
    def __init__(self):
        self.texts, self.names = [], set()

    def add_scalar(self, name, value, step):
        self.names.add(name)

    def add_text(self, name, text, step):
        self.texts.append((name, text, step))


def test_monitor_warns_writes_and_goes_on_after_an_interruption(tmp_path):
    log, writer = tmp_path / "log.jsonl", Texts()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for begin, end in ((0, 200), (200, 320), (320, 1000)):
            monitor = Monitor(log, tensorboard=writer, log_every=10)
            for step in range(begin, end):
                record = monitor.step(step, {**FINE, "effective_rank/content": 1.1 if step < 700 else 3.0})
                assert "alarm" not in record or step in (300, 790)
    first, last = [entry for entry in read_log(log) if "alarm" in entry]
    (event,), (over,) = first["alarm"], last["alarm"]
    assert first["step"] == event["step"] and (event["space"], event["kind"]) == ("content", "one direction")
    assert event["over"] is False and over["over"] is True and over["text"].startswith("content: recovered")
    assert [(w.category, str(w.message)) for w in caught] == [
        (CollapseWarning, f"step {e['step']}: {e['text']}") for e in (event, over)
    ]
    assert all(w.filename == __file__ for w in caught)
    assert writer.texts == [("alarm", e["text"], e["step"]) for e in (event, over)]
    assert "alarm" not in writer.names


def test_monitor_goes_on_from_a_state_where_there_is_no_log():
    before, after = (Monitor(None, alarm=CollapseAlarm(window=100)) for _ in range(2))
    for step in range(0, 60, 10):
        before.step(step, {**FINE, **one_direction(step)})
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    with pytest.warns(CollapseWarning, match="step 100: content: its pairs agree"):
        for step in range(60, 150, 10):
            after.step(step, {**FINE, **one_direction(step)})


def test_monitor_without_an_alarm_says_nothing():
    monitor = Monitor(None, alarm=False)
    for step in range(0, 1000, 10):
        assert "alarm" not in monitor.step(step, {**FINE, **one_direction(step)})
    assert monitor.state_dict() == {} and Monitor(None).load_state_dict({}) is None
    with pytest.raises(TypeError, match="alarm: expected a CollapseAlarm, True or False: got int"):
        Monitor(None, alarm=3)


def test_a_log_of_another_run_does_not_count(tmp_path):
    for _ in range(2):
        monitor = Monitor(tmp_path / "log", alarm=CollapseAlarm(window=100))
        for step in range(0, 90, 10):
            monitor.step(step, {**FINE, **one_direction(step)})
    with (tmp_path / "log").open("a") as file:
        file.write("no JSON\n[1]\n")
    assert len(Monitor(tmp_path / "log").alarm.state_dict()["lines"]) == 9


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*", "ignore:.*GPU available.*")
def test_lightning_is_told_the_run_and_keeps_the_state(tmp_path):
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    from ssd_addon import StyleHeads

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.heads = StyleHeads(nn.Identity(), {"content": 4, "color": 2}, in_features=3, sample_ndim=1)

        def training_step(self, batch, index):
            self.log_dict(
                {f"train/{k}": v for k, v in {**FINE, **one_direction(0)}.items()}, on_step=True, on_epoch=True
            )
            return self.heads(batch[0])["content"].square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(epochs, resume=None):
        monitor = Monitor(None, log_every=1, alarm=CollapseAlarm(window=10))
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[monitor.lightning()],
        )  # fmt: skip
        trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(32, 3)), batch_size=4), ckpt_path=resume)
        return monitor, trainer

    monitor, trainer = fit(1)
    assert monitor.alarm.total_steps == 8 and monitor.alarm.widths == {"content": 4, "color": 2}
    assert not any(name.endswith(("_step", "_epoch")) for name in monitor.alarm.state_dict()["lines"][-1])
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.warns(CollapseWarning, match="effective rank 1.1 of 4 for 10 steps"):
        monitor, _ = fit(2, tmp_path / "one.ckpt")
    assert monitor.alarm.active["one direction", "content"].step < 14  # sooner than a run that forgot the first epoch


def test_the_report_and_the_plot_show_what_was_said(tmp_path):
    from ssd_addon import plots
    from ssd_addon.report.curves import panel
    from ssd_addon.report.page import _alarms

    log = [{**FINE, "step": s} for s in range(0, 400, 20)]
    log[16]["alarm"] = [{"step": 320, "space": "content", "kind": "x", "text": "content: <b>", "over": False}]
    assert _alarms(log) == [(320.0, "content: <b>")]
    for bad in (3, "text", [3], [{"step": None, "text": "a"}], [{"step": 1, "text": 2}], {"step": 1, "text": "a"}):
        assert _alarms([{"step": 0, "alarm": bad}]) == []
    assert panel("t", "", {0: [(0, 1.0), (400, 2.0)]}, [320.0, 900.0]).count('class="mark"') == 1
    plots.curves(log, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0
