"""The loop: shares and weights act, absent tasks are absent, the two paths agree, stages and early stopping."""

import json
from unittest import mock

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from mtl.best import track_best
from mtl.composition import composed, settings_of
from mtl.distributed import Distributed
from mtl.gradients import group_sizes
from mtl.interrupt import StopSignal
from mtl.job import evaluate_before, make_accelerator
from mtl.prepare import prepare
from mtl.run import RunState
from mtl.samplers.draws import FixedMixture
from mtl.stages import Stage, evaluation_steps
from mtl.step import batch_of, draw_batch, shares, training_step
from mtl.surgery import GramianSurgery, UPGrad
from mtl.training import begin_stage, end_stage, run_stages
from mtl.weighters import Static


@pytest.fixture
def prepared(tmp_path, monkeypatch, tiny_folder, make_task):
    """Makes a run up to its first step, in float64 and without dropout."""
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    sizes = {"one": 12, "two": 30, "three": 60}
    paths = {
        name: make_task(name, [{"prompt": f"{name} {i}", "completion": "ab" * (1 + i % 4)} for i in range(size)])
        for name, size in sizes.items()
    }

    def make(*overrides, folder="run"):
        config = composed(
            [
                *(f"model.name_or_path={tiny_folder}", "model.dtype=float64", "tasks=none"),
                *(f"tasks.{name}.path={path}" for name, path in paths.items()),
                *(() if "adapters=full" in overrides else ("adapters.lora_dropout=0",)),
                *("batch_size=6", "learning_rate=1e-3", "eval_scores=false"),
                *("max_eval_examples=3", "max_test_examples=3", "max_steps=4", "warmup_ratio=0"),
                *overrides,
            ]
        )
        settings = settings_of(config, tmp_path / folder)
        made = prepare(settings, Distributed(make_accelerator(settings)), StopSignal())
        evaluate_before(made, settings)
        return made.run

    return make


def flat(parameters):
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


class MeanByRows(GramianSurgery):
    """The mean, but not recognised as such, so that the loop computes rows."""

    weights_act = "yes"

    def coefficients(self, gramian_MM, tasks=None):
        return torch.full((len(gramian_MM),), 1 / len(gramian_MM), dtype=torch.float64)


@pytest.mark.parametrize("layout", ["shared", "shared_and_per_task", "full"])
@pytest.mark.parametrize("share", ["sampled", "equal", "tokens"])
def test_the_two_paths_agree(prepared, layout, share):
    overrides = [f"adapters={layout}", f"share={share}", "weighter=uncertainty"]
    outcomes = []
    for index, surgery in enumerate((None, MeanByRows())):
        run = prepared(*overrides, folder=f"run{index}")
        parts = begin_stage(run)
        parts.surgery = surgery or parts.surgery
        steps = [training_step(run, parts) for _ in range(4)]
        assert (steps[0].gramian_MM is None) == (surgery is None)
        outcomes.append((flat(run.layout.parameters()), torch.stack([s.weights_T for s in steps]), steps))
    (mixed, mixed_weights, mixed_steps), (apart, apart_weights, apart_steps) = outcomes
    assert relative(apart, mixed) < 1e-9
    assert torch.allclose(apart_weights, mixed_weights, rtol=1e-12)
    for a, b in zip(mixed_steps, apart_steps, strict=True):
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-9)
        assert torch.allclose(a.losses_M, b.losses_M, rtol=1e-9, atol=0)


def applied_gradient(run, parts):
    """The shared gradient that the next step's optimizer would see."""
    seen = {}
    parts.optimizer.register_step_pre_hook(
        lambda *_: seen.update(g=flat([p.grad for p in run.layout.shared_parameters()]))
    )
    outcome = training_step(run, parts)
    return seen["g"], outcome


@pytest.mark.parametrize("surgery", ["mean", "pcgrad"])
def test_a_weight_of_two_doubles_the_row_even_of_a_task_alone_in_the_step(prepared, surgery):
    gradients = []
    for index, weight in enumerate((1.0, 2.0)):
        run = prepared(
            *("batch_size=1", "sampler=equal", "weighter=static", f"weighter.weights.one={weight}"),
            *(f"surgery={surgery}", "max_grad_norm=null", "stages.joint.tasks=[one]"),
            folder=f"run{index}",
        )
        gradient, outcome = applied_gradient(run, begin_stage(run))
        assert list(outcome.tasks) == [0]
        gradients.append(gradient)
    assert torch.equal(gradients[1], 2 * gradients[0])


NUM_STEPS = 2000


def mean_parts(run, parts, share, probabilities_T, weights_T):
    """Each task's mean ``a_t lambda_t`` over many steps, as the loop computes both; 0 in steps without the task."""
    sampler = FixedMixture(np.array(probabilities_T), seed=0)
    totals_T = torch.zeros(len(probabilities_T), dtype=torch.float64)
    for _ in range(NUM_STEPS):
        batch, _ = draw_batch(run, parts, sampler.counts(parts.batch_size))
        tasks = [t for t in range(len(probabilities_T)) if batch.counts_T[parts.tasks[t]] > 0]
        totals_T[tasks] += shares(share, batch, parts, tasks, sampler.probabilities) * weights_T[tasks]
    return (totals_T / NUM_STEPS).tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 8, 32])
def test_shares_and_weights_act_at_every_batch_size(prepared, batch_size):
    """Dividing by the present tasks' total would give 0.10 at batch size 1 and 0.5 only at large ones."""
    run = prepared(f"batch_size={batch_size}", "stages.joint.tasks=[one,two]", "weighter=static")
    parts = begin_stage(run)
    ones_T = torch.ones(2, dtype=torch.float64)
    _, small = mean_parts(run, parts, "sampled", (0.9, 0.1), ones_T)
    assert small == pytest.approx(0.1, abs=0.01)
    _, small = mean_parts(run, parts, "equal", (0.9, 0.1), ones_T)
    assert small == pytest.approx(0.5, abs=0.01)
    weights_T = Static({"one": 0.1, "two": 1.9}, names=["one", "two"]).weights(None)
    for share, probabilities in (("sampled", (0.5, 0.5)), ("equal", (0.9, 0.1))):
        one, two = mean_parts(run, parts, share, probabilities, weights_T)
        assert two / one == pytest.approx(19, rel=0.02)


def test_an_absent_task_keeps_adapter_moments_and_weight_bitwise(prepared):
    run = prepared(
        "weighter=uncertainty", "surgery=pcgrad", "sampler=performance", "sampler.signal=loss_ratio", "max_steps=99"
    )
    parts = begin_stage(run)
    training_step(run, parts)
    private = run.layout.private_parameters(1)

    def snapshot():
        moments = [value.clone() for p in private for value in parts.optimizer.state[p].values()]
        weighter = {key: value[1].clone() for key, value in parts.weighter.state_dict().items()}
        sampler = parts.sampler.state_dict()
        losses = [sampler[key][1] for key in ("scores", "base_losses", "mean_losses", "num_losses")]
        return flat(private), moments, weighter, losses

    before = snapshot()
    parts.sampler.counts = lambda num_examples: [3, 0, 3]
    for _ in range(50):
        outcome = training_step(run, parts)
        assert list(outcome.tasks) == [0, 2]
        assert outcome.coefficients_M.shape == (2,)
    after = snapshot()
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert all(torch.equal(before[2][key], after[2][key]) for key in before[2])
    assert before[3] == after[3]


def test_surgery_of_conflicting_tasks_changes_the_step_and_private_gradients_are_left_alone(prepared):
    """Private gradients carry share and weight, never the surgery's coefficient."""
    seen = {}
    for name in ("mean", "pcgrad"):
        run = prepared(f"surgery={name}", "max_grad_norm=null", "sampler=equal", folder=name)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in run.layout.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
        parts = begin_stage(run)
        grads = {}
        parts.optimizer.register_step_pre_hook(
            lambda *_, run=run, grads=grads: grads.update(
                shared=flat([p.grad for p in run.layout.shared_parameters()]),
                private=[flat([p.grad for p in run.layout.private_parameters(t)]) for t in range(3)],
            )
        )
        outcome = training_step(run, parts)
        seen[name] = grads
        if name == "pcgrad":
            assert (outcome.gramian_MM < 0).any(), "the case must have a conflict"
            assert not torch.allclose(outcome.coefficients_M, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert relative(seen["pcgrad"]["shared"], seen["mean"]["shared"]) > 1e-3
    for task in range(3):
        assert relative(seen["pcgrad"]["private"][task], seen["mean"]["private"][task]) < 1e-9


def test_early_stopping_goes_back_to_the_best_parameters(prepared):
    run = prepared("early_stopping_patience=2", "max_steps=50", "eval_steps=1", "learning_rate=3.0")
    parts = begin_stage(run)
    from mtl.training import train

    train(run, parts)
    assert run.state.num_bad_evaluations == 2
    assert run.state.stage_step == run.state.best_stage_step + 2 < 50
    best = torch.cat([run.best_parameters[name].flatten() for name in run.layout.named_parameters()])
    value = run.state.best_value
    end_stage(run, parts)
    assert torch.equal(torch.cat([p.detach().flatten() for p in run.layout.named_parameters().values()]), best)
    assert sum(run.state.loss_ratios_T) / 3 == pytest.approx(value, rel=1e-12)


def test_without_patience_nothing_is_kept(prepared):
    run = prepared("early_stopping_patience=null")
    track_best(run, begin_stage(run))
    assert run.best_parameters is None


def test_second_stage_trains_the_least_improved_tasks_only(prepared):
    run = prepared("stages=joint_then_weak", "stages.weak.max_steps=3", "sampler=equal")
    run_stages(run)
    lines = (run.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    assert [record["stage"] for record in records] == ["joint"] * 4 + ["weak"] * 3
    assert [record["step"] for record in records] == list(range(1, 8))
    chosen = run.state.history[1]["tasks"]
    assert len(chosen) == 2
    assert all(set(record["loss"]) <= set(chosen) and set(record["p"]) == set(chosen) for record in records[4:])
    first = next(record for record in map(json.loads, lines) if "eval" in record and record["step"] == 4)
    base = {name: item["loss"] for name, item in zip(run.names, run.state.base_validation_T, strict=True)}
    ratios = {name: first["eval"][name]["loss"] / base[name] for name in run.names}
    assert set(chosen) == set(sorted(ratios, key=ratios.get)[1:])


def test_stage_lengths():
    assert Stage("s", num_epochs=2).num_steps(10, 4) == 5
    assert Stage("s", max_steps=7).num_steps(10, 4) == 7
    assert sorted(evaluation_steps(10, evals_per_stage=3, eval_steps=None)) == [4, 7, 10]
    assert sorted(evaluation_steps(10, evals_per_stage=3, eval_steps=4)) == [4, 8, 10]
    assert sorted(evaluation_steps(2, evals_per_stage=5, eval_steps=None)) == [1, 2]


def test_run_state_survives_json():
    state = RunState(num_tasks=2, base_validation_T=[{"loss": 0.1 + 0.2}], best_value=1 / 3)
    from dataclasses import asdict

    assert RunState(**json.loads(json.dumps(asdict(state)))) == state


def test_every_option_of_the_schema_reaches_options():
    from mtl.options import Options

    config = composed([])
    groups = {"model", "tasks", "adapters", "sampler", "weighter", "surgery", "optimizer", "scheduler"}
    groups |= {"stages", "launch", "sweep"}
    other = {"only_task", "only_budget", "stage_order", "output_dir", "cache_dir", "resume_from_checkpoint"}
    other |= {"resume_from", "reference", "merged_from"}
    assert set(OmegaConf.to_container(config)) == set(Options.__dataclass_fields__) | groups | other


class Recorder:
    """A weighter that keeps what it is told."""

    def __init__(self, num_tasks, needs):
        self.needs = frozenset(needs)
        self.asked, self.told = [], []
        self._weight_T = torch.ones(num_tasks, dtype=torch.float64)

    def weights(self, feedback):
        self.asked.append(feedback)
        return self._weight_T

    def update(self, feedback):
        self.told.append(feedback)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("surgery", ["mean", "pcgrad"])
@pytest.mark.parametrize("layout", ["shared", "shared_and_per_task"])
def test_losses_after_the_step_are_those_of_the_same_examples_under_the_same_masks(prepared, surgery, layout):
    run = prepared(f"adapters={layout}", f"surgery={surgery}", "adapters.lora_dropout=0.4")
    parts = begin_stage(run)
    run.model.train()
    parts.weighter = Recorder(3, {"losses_after"})
    rate = parts.optimizer.param_groups[0]["lr"]
    for group in parts.optimizer.param_groups:
        group["lr"] = 0.0
    training_step(run, parts)
    told = parts.weighter.told[-1]
    assert torch.equal(told.losses_after_M, told.losses_M), "without a step nothing has changed, not even a mask"
    assert parts.weighter.asked == [None]

    for group in parts.optimizer.param_groups:
        group["lr"] = 100 * rate
    taken = []
    parts.optimizer.register_step_post_hook(lambda *_: taken.append(flat(run.layout.parameters())))
    run.state.step = 1
    outcome = training_step(run, parts)
    told = parts.weighter.told[-1]
    assert not torch.equal(told.losses_after_M, told.losses_M)
    assert torch.equal(taken[0], flat(run.layout.parameters())), "looking back must not train"
    batch = batch_of(run, outcome.rows)
    again = run.backward(batch, torch.ones(3), step=1, apart=surgery != "mean")
    torch.testing.assert_close(told.losses_after_M, again.losses_M, rtol=1e-12, atol=0)
    assert all(parameter.grad is None for parameter in run.layout.parameters())


def test_who_needs_the_losses_is_asked_after_the_backward(prepared):
    run = prepared("adapters=shared")
    parts = begin_stage(run)
    parts.weighter = Recorder(3, {"losses"})
    outcome = training_step(run, parts)
    (feedback,) = parts.weighter.asked
    assert torch.equal(feedback.losses_M, outcome.losses_M)
    assert outcome.gramian_MM is not None
    assert parts.weighter.told[-1].losses_after_M is None


def test_a_weighter_by_current_losses_weighs_this_step(prepared):
    run = prepared("adapters=shared", "weighter=gls", "sampler=equal")
    outcome = training_step(run, begin_stage(run))
    expected = 1 / outcome.losses_M
    torch.testing.assert_close(outcome.weights_T, 3 * expected / expected.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("granularity", "number"), [("layer", 2), ("module", 14)])
def test_surgery_of_groups_is_that_of_each_alone(prepared, granularity, number):
    run = prepared("adapters=shared", "surgery=upgrad", "sampler=equal", f"surgery_granularity={granularity}")
    parts = begin_stage(run)
    applied, rows = [], []
    parts.optimizer.register_step_pre_hook(
        lambda *_: applied.append(torch.cat([p.grad.flatten() for p in run.layout.shared_parameters()]))
    )
    whole = type(parts.surgery).__call__

    def recording(self, grads_MN, tasks=None):
        rows.append(grads_MN.clone())
        return whole(self, grads_MN, tasks)

    with mock.patch.object(type(parts.surgery), "__call__", recording):
        run_options = training_step(run, parts)
    assert run_options.coefficients_M is None
    sizes = group_sizes(run.layout, granularity)
    assert len(sizes) == number
    expected = torch.cat([UPGrad()(columns) for columns in rows[0].split(sizes, dim=1)])
    expected *= min(1.0, 1.0 / (float(expected.norm()) + 1e-6))
    torch.testing.assert_close(applied[0], expected, rtol=1e-9, atol=1e-12)
    assert relative(expected, UPGrad()(rows[0])) > 1e-3, "the groups should make a difference"


def test_coefficients_are_kept_between_solves(prepared):
    run = prepared("adapters=shared", "surgery=mgda", "sampler=equal", "surgery_every=3")
    parts = begin_stage(run)
    found = [training_step(run, parts).coefficients_M for _ in range(4)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


def test_a_group_without_a_present_task_keeps_its_adapter_and_moments_bitwise(prepared):
    run = prepared(
        "adapters=task_groups", "adapters.groups.left=[one,two]", "adapters.groups.right=[three]", "surgery=pcgrad"
    )
    parts = begin_stage(run)
    training_step(run, parts)
    idle = run.layout.idle_parameters([0, 1])
    assert len(idle) == 2 * 14
    before = flat(idle), [{k: v.clone() for k, v in parts.optimizer.state[p].items()} for p in idle]
    parts.sampler = FixedMixture(np.array([1.0, 1.0, 0.0]), seed=0)
    for _ in range(3):
        training_step(run, parts)
    assert torch.equal(flat(idle), before[0])
    for parameter, state in zip(idle, before[1], strict=True):
        assert all(torch.equal(parts.optimizer.state[parameter][key], value) for key, value in state.items())


def test_the_log_says_what_the_sampler_goes_by(prepared):
    run = prepared("adapters=shared", "sampler=performance", "sampler.signal=loss_ratio")
    run_stages(run)
    records = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "loss" in record][-1]
    assert last["signal"].keys() == {"loss_ratio"}
    assert last["signal"]["loss_ratio"].keys() == {"one", "two", "three"}
    assert all(0 < ratio < 2 for ratio in last["signal"]["loss_ratio"].values())
