from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from mtl.evaluation.results import Prediction
from mtl.reporting.records import MANY_TASKS, cosine_summary
from mtl.reporting.results import Cost, Results, TaskResult
from mtl.reporting.tensorboard import MAX_COSINE_TASKS, TensorBoardLog

NAMES = ["情感 😀 v1.0", "b c", "d"]
METRICS: dict[str, str | None] = {NAMES[0]: "accuracy", NAMES[1]: "bleu", NAMES[2]: None}


def step(number: int, names: list[str] = NAMES) -> dict[str, Any]:
    value = float(number)
    numbers = {name: value + place for place, name in enumerate(names)}
    return {
        "step": number,
        "stage": "joint",
        "loss": numbers,
        "objective": value,
        "p": numbers,
        "lambda": numbers,
        "w": numbers,
        "grad_norm": value,
        "grad_norm_task": numbers,
        "cosines": {f"{a}|{b}": 0.5 for place, a in enumerate(names) for b in names[place + 1 :]},
        "learning_rate": 0.25,
    }


EVALUATION = {
    "step": 2,
    "stage": "joint",
    "eval": {
        NAMES[0]: {"accuracy": 0.5, "loss": 1.0},
        NAMES[1]: {"bleu": 0.25, "loss": 2.0},
        NAMES[2]: {"loss": 3.0},
    },
    "mean": {"accuracy": 0.5, "bleu": 0.25, "score": 0.375, "loss_ratio": 0.75},
}


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def test_tags_and_values(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, {"learning_rate": 0.25}, METRICS)
    log.add_step(step(1))
    log.add_step(step(2) | {"w": None, "loss": {NAMES[0]: 7.0}})
    log.add_evaluation(EVALUATION)
    log.add_timing({"step": 2, "tokens_per_second": 210.5})
    log.close(succeeded=True)
    events = read(tmp_path)
    per_task = ["train/loss", "eval/loss", "sampler/prob", "weight", "surgery/coefficient", "grad/norm"]
    expected = {f"{tag}/{name}" for tag in per_task for name in NAMES}
    expected |= {f"eval/accuracy/{NAMES[0]}", f"eval/bleu/{NAMES[1]}"}
    expected |= {f"eval/{metric}/mean" for metric in ("accuracy", "bleu", "score", "loss_ratio")}
    expected |= {f"grad/cosine/{NAMES[a]}|{NAMES[b]}" for a, b in ((0, 1), (0, 2), (1, 2))}
    expected |= {"optim/lr", "grad/norm", "time/tokens_per_second"}
    assert set(events.Tags()["scalars"]) == expected

    def series(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(tag)]

    assert series(f"train/loss/{NAMES[0]}") == [(1, 1.0), (2, 7.0)]
    assert series("train/loss/d") == [(1, 3.0)]  # absent from step 2
    assert series("surgery/coefficient/b c") == [(1, 2.0)]
    assert series("eval/loss_ratio/mean") == [(2, 0.75)]
    assert series("time/tokens_per_second") == [(2, 210.5)]
    assert len(list(tmp_path.iterdir())) == 1  # one run, one file


def test_overlays_find_the_tags_of_all_tasks(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, {}, METRICS)
    log.add_step(step(1))
    log.add_evaluation(EVALUATION)
    log.close(succeeded=True)
    events = read(tmp_path)
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    found = {
        chart.title: [tag for tag in events.Tags()["scalars"] if any(re.match(p, tag) for p in chart.multiline.tag)]
        for chart in layout.category[0].chart
    }
    assert found["train/loss"] == [f"train/loss/{name}" for name in NAMES]
    assert found["grad/norm"] == [f"grad/norm/{name}" for name in NAMES]
    assert sorted(found["eval/bleu"]) == ["eval/bleu/b c", "eval/bleu/mean"]
    assert all(found.values())


def test_overlays_leave_out_what_they_would_take_for_a_run(tmp_path: Path) -> None:
    names = ["a", "b (v1)", "c)"]
    log = TensorBoardLog(tmp_path, {}, dict.fromkeys(names))
    log.add_step(step(1, names))
    log.close(succeeded=True)
    events = read(tmp_path)
    assert {f"train/loss/{name}" for name in names} < set(events.Tags()["scalars"])
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    patterns = [pattern for chart in layout.category[0].chart for pattern in chart.multiline.tag]
    overlaid = [tag for tag in events.Tags()["scalars"] if any(re.match(pattern, tag) for pattern in patterns)]
    assert overlaid
    assert all(tag.endswith("/a") for tag in overlaid)


def hparams(folder: Path, tag: str) -> Any:
    content = read(folder).PluginTagToContent("hparams")
    return plugin_data_pb2.HParamsPluginData.FromString(content[tag]) if tag in content else None


def test_hyperparameters_stand_in_the_run_itself(tmp_path: Path) -> None:
    config = {
        "run_name": "温,seed=3",
        "seed": 3,
        "sampler": {"_target_": "mtl.samplers.Temperature", "_partial_": True, "temperature": 2.5},
        "eval_scores": True,
    }
    log = TensorBoardLog(tmp_path, config, METRICS)
    log.close(succeeded=True)
    start = hparams(tmp_path, "_hparams_/session_start_info").session_start_info.hparams
    assert start["sampler.temperature"].number_value == 2.5
    assert {key: start[key].string_value for key in ("Strategy", "seed", "sampler", "eval_scores")} == {
        "Strategy": "温",
        "seed": "3",
        "sampler": "Temperature",
        "eval_scores": "true",
    }
    experiment = hparams(tmp_path, "_hparams_/experiment").experiment
    assert {info.name for info in experiment.hparam_infos if info.differs} == {"Strategy", "sampler", "seed"}
    assert [info.name.tag for info in experiment.metric_infos] == [
        *("test/score/mean", "test/loss_ratio/mean"),
        *(f"test/accuracy/{NAMES[0]}", f"test/bleu/{NAMES[1]}"),
        *(f"test/loss/{name}" for name in NAMES),
        *("eval/score/mean", "eval/loss_ratio/mean"),
        *(f"eval/accuracy/{NAMES[0]}", f"eval/bleu/{NAMES[1]}"),
        *(f"eval/loss/{name}" for name in NAMES),
    ]
    assert hparams(tmp_path, "_hparams_/session_end_info") is not None


def test_a_run_of_one_task_does_not_decide_the_columns_of_all(tmp_path: Path) -> None:
    TensorBoardLog(tmp_path, {"only_task": "d", "seed": 1}, {"d": None}).close(succeeded=True)
    assert hparams(tmp_path, "_hparams_/experiment") is None
    assert hparams(tmp_path, "_hparams_/session_start_info").session_start_info.hparams["only_task"].string_value == "d"


def task_result(metric: str | None, base_loss: float, test: dict[str, float | None]) -> TaskResult:
    return TaskResult(metric, {"loss": base_loss}, {}, {**test, "num_examples": 50}, 1, 1.0, 1)


def results(tasks: dict[str, TaskResult]) -> Results:
    return Results({}, 0, "m", tasks, Cost(7, 1, 1, 1.0, 1.0, 1))


def test_results_are_the_last_values_of_test_tags(tmp_path: Path) -> None:
    tasks = {
        NAMES[0]: task_result("accuracy", 4.0, {"accuracy": 0.5, "macro_f1": 0.25, "loss": 1.0}),
        NAMES[1]: task_result("bleu", 2.0, {"bleu": 1.0, "loss": 1.0}),
        NAMES[2]: task_result(None, 0.0, {"loss": 3.0}),
    }
    log = TensorBoardLog(tmp_path, {}, METRICS)
    log.add_results(7, results(tasks))
    log.close(succeeded=True)
    events = read(tmp_path)
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    values = {
        f"test/accuracy/{NAMES[0]}": 0.5,
        "test/accuracy/mean": 0.5,
        f"test/macro_f1/{NAMES[0]}": 0.25,
        "test/macro_f1/mean": 0.25,
        f"test/loss/{NAMES[0]}": 1.0,
        "test/bleu/b c": 1.0,
        "test/bleu/mean": 1.0,
        "test/loss/b c": 1.0,
        "test/loss/d": 3.0,
        "test/score/mean": 0.75,
        "test/loss_ratio/mean": 0.375,  # of 1/4 and 1/2; the third loss was 0 before training
    }
    assert shown == {tag: [(7, value)] for tag, value in values.items()}


def test_results_that_are_missing_or_not_finite(tmp_path: Path) -> None:
    tasks = {
        "a": task_result("accuracy", 1.0, {"accuracy": None, "loss": math.nan}),
        "b": task_result("accuracy", 1.0, {"accuracy": 0.5, "loss": None}),
    }
    log = TensorBoardLog(tmp_path, {}, {"a": "accuracy", "b": "accuracy"})
    log.add_results(7, results(tasks))
    log.close(succeeded=True)
    events = read(tmp_path)
    shown = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert shown == pytest.approx(
        {
            "test/accuracy/b": 0.5,
            "test/accuracy/mean": 0.5,
            "test/score/mean": 0.5,
            "test/loss/a": math.nan,
            "test/loss_ratio/mean": math.nan,
        },
        nan_ok=True,
    )


def test_results_of_many_tasks_are_summarised(tmp_path: Path) -> None:
    names = [f"t{number}" for number in range(MANY_TASKS + 1)]
    tasks = {
        name: task_result("accuracy", 1.0, {"accuracy": place / MANY_TASKS, "loss": 0.5})
        for place, name in enumerate(names)
    }
    log = TensorBoardLog(tmp_path, {}, dict.fromkeys(names, "accuracy"))
    log.add_results(7, results(tasks))
    log.close(succeeded=True)
    events = read(tmp_path)
    groups = ("test/accuracy", "test/score", "test/loss_ratio")
    assert set(events.Tags()["scalars"]) == {f"{group}/{statistic}" for group in groups for statistic in STATISTICS}
    assert [events.Scalars(f"test/score/{statistic}")[0].value for statistic in STATISTICS] == [0.5, 0.0, 0.5, 1.0]


def test_a_failed_run_stays_unfinished(tmp_path: Path) -> None:
    TensorBoardLog(tmp_path, {"seed": 1}, METRICS).close(succeeded=False)
    assert hparams(tmp_path, "_hparams_/session_end_info") is None


def test_resuming_hides_what_came_after(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, {}, METRICS)
    for number in range(1, 6):
        log.add_step(step(number))
    log.close(succeeded=False)
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / "events.out.tfevents.0")  # files are read by name, which has seconds only
    resumed = TensorBoardLog(tmp_path, {}, METRICS, step=3)
    resumed.add_step(step(4) | {"grad_norm": 40.0})
    resumed.close(succeeded=True)
    shown = [(event.step, event.value) for event in read(tmp_path).Scalars("grad/norm")]
    assert shown == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


STATISTICS = ("mean", "min", "median", "max")


def many_tasks_evaluated(names: list[str]) -> dict[str, Any]:
    return EVALUATION | {
        "step": 1,
        "eval": {name: {"accuracy": 0.5, "loss": 1.0} for name in names},
        "summary": {key: dict.fromkeys(STATISTICS, 0.5) for key in EVALUATION["mean"]},
        "worst": {"t|99": 1.25, "t7": 1.125},
    }


@pytest.mark.parametrize("with_summary", [True, False])
def test_many_tasks_are_shown_by_extremes_and_means(tmp_path: Path, with_summary: bool) -> None:
    names = [f"t{number}" for number in range(99)] + ["t|99"]
    config = {"weighter": {"weights": dict.fromkeys(names, 1.0)}}
    log = TensorBoardLog(tmp_path, config, dict.fromkeys(names, "accuracy"))
    record = step(1, names)
    if with_summary:
        record |= {"cosines": {"t0|t1": -0.5}, "cosine_summary": cosine_summary([-0.5, 0.5, 0.75])}
    log.add_step(record)
    log.add_evaluation(many_tasks_evaluated(names))
    prediction = Prediction("p", "r", "x", "x", 1.0, "l", 1.0, 1, True)
    for name in ("t0", "t7"):
        log.add_predictions(1, name, [prediction])
    log.close(succeeded=True)
    events = read(tmp_path)
    groups = ["train/loss", "sampler/prob", "weight", "surgery/coefficient", "grad/norm", "grad/cosine"]
    groups += ["eval/accuracy", "eval/bleu", "eval/score", "eval/loss_ratio"]
    expected = {f"{group}/{statistic}" for group in groups for statistic in STATISTICS}
    assert set(events.Tags()["scalars"]) == expected | {"grad/cosine/conflicting", "grad/norm", "optim/lr"}
    shown = {tag: events.Scalars(tag)[0].value for tag in expected}
    assert [shown[f"train/loss/{statistic}"] for statistic in STATISTICS] == [50.5, 1.0, 50.5, 100.0]
    assert [shown[f"grad/cosine/{statistic}"] for statistic in STATISTICS] == (
        [0.25, -0.5, 0.5, 0.75] if with_summary else [0.5] * 4
    )
    assert set(events.Tags()["tensors"]) >= {"eval/worst/text_summary", "predictions/t7/text_summary"}
    assert "predictions/t0/text_summary" not in events.Tags()["tensors"]
    table = events.Tensors("eval/worst/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| t\\|99 | 1.250 | accuracy 0.500, loss 1.000 |" in table
    assert [info.name.tag for info in hparams(tmp_path, "_hparams_/experiment").experiment.metric_infos] == [
        f"{split}/{tag}"
        for split in ("test", "eval")
        for tag in ("score/mean", "loss_ratio/mean", "score/min", "loss_ratio/max")
    ]
    start = hparams(tmp_path, "_hparams_/session_start_info").session_start_info.hparams
    assert start["weighter.weights"].string_value == "100 entries"
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag for chart in layout.category[0].chart}
    assert {"eval/loss_ratio", "grad/cosine"} < charts.keys()
    assert all(any(re.match(p, tag) for tag in expected for p in patterns) for patterns in charts.values())


def test_a_step_with_32_tasks_shows_each_but_not_each_pair(tmp_path: Path) -> None:
    names = [f"t{number}" for number in range(MANY_TASKS)]
    log = TensorBoardLog(tmp_path, {}, dict.fromkeys(names, "accuracy"))
    log.add_step(step(1, names))
    log.add_evaluation(EVALUATION | {"eval": {name: {"accuracy": 0.5, "loss": 1.0} for name in names}})
    log.close(succeeded=True)
    tags = set(read(tmp_path).Tags()["scalars"])
    assert {f"{group}/{name}" for group in ("train/loss", "eval/accuracy", "eval/loss") for name in names} < tags
    cosines = {tag for tag in tags if tag.startswith("grad/cosine/")}
    assert cosines == {f"grad/cosine/{name}" for name in (*STATISTICS, "conflicting")}


def test_8_tasks_show_each_pair(tmp_path: Path) -> None:
    names = [f"t{number}" for number in range(MAX_COSINE_TASKS)]
    log = TensorBoardLog(tmp_path, {}, dict.fromkeys(names, "accuracy"))
    log.add_step(step(1, names))
    log.close(succeeded=True)
    assert sum(tag.startswith("grad/cosine/") for tag in read(tmp_path).Tags()["scalars"]) == 28


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
def test_predictions_are_a_table_of_literal_text(tmp_path: Path) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    nasty = "a|b `c` *d* _e_ <em>f</em> [g](h) \\ \n 情感 😀 \ud800"
    log = TensorBoardLog(tmp_path, {}, METRICS)
    rows = [Prediction(nasty, str(number), "x" * 1000, "", 1 / 3, "l", 1.0, 1, True) for number in range(20)]
    log.add_predictions(5, NAMES[0], rows)
    log.add_predictions(5, NAMES[0], rows[:1], split="test")
    log.close(succeeded=True)
    (event,) = read(tmp_path).Tensors(f"predictions/{NAMES[0]}/text_summary")
    (of_test,) = read(tmp_path).Tensors(f"predictions/test/{NAMES[0]}/text_summary")
    assert event.step == of_test.step == 5
    assert event.tensor_proto.string_val[0].startswith(of_test.tensor_proto.string_val[0])  # its first row
    page = markdown_to_safe_html(event.tensor_proto.string_val[0])
    assert page.count("<tr>") == 1 + 8
    assert page.count("<td") == 8 * 4
    literal = "a|b `c` *d* _e_ &lt;em&gt;f&lt;/em&gt; [g](h) \\ 情感 😀 ?"
    assert page.count(literal) == 8
    assert "0.333" in page
    assert "x" * 300 + "…" in page
