"""The run in TensorBoard: one event stream a run, tags of one pattern, so that runs and tasks overlay."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mtl.config_keys import is_neutral
from mtl.reporting.json_files import to_json
from mtl.reporting.records import MANY_TASKS, cosine_summary, summary

if TYPE_CHECKING:
    from mtl.evaluation.results import Prediction
    from mtl.reporting.results import Results

# Every tag is a chart that the browser draws and the server keeps in memory. Past 8 tasks, with 28 pairs, the charts of
# all pairs say less than their spread.
MAX_COSINE_TASKS = 8
MAX_PREDICTIONS = 8
MAX_CELL = 300  # characters

STEP_TAGS = {
    "train/loss": "loss",
    "sampler/prob": "p",
    "weight": "lambda",
    "surgery/coefficient": "w",
    "grad/norm": "grad_norm_task",
}

# The HPARAMS tab shows five hyperparameters until told otherwise: those that differ, by name, capitals first.
COLUMNS = ("Strategy", "sampler", "seed", "surgery", "weighter")


class TensorBoardLog:
    """Writes the records of :mod:`mtl.reporting.records` as scalars, into one event file.

    Tags: ``train/loss/<task>``, ``eval/<metric>/<task>`` and ``/mean`` (``loss``, ``score`` and ``loss_ratio`` are
    metrics here), the same with ``test/``, ``sampler/prob/<task>`` and ``sampler/<what an adaptive one goes
    by>/<task>``, ``weight/<task>``, ``surgery/coefficient/<task>``, ``grad/norm`` and ``/<task>``,
    ``grad/cosine/<a>|<b>``, ``optim/lr``, ``time/tokens_per_second``, ``predictions/<task>`` and
    ``predictions/test/<task>`` (text).

    Of more than 32 tasks, ``mean``, ``min``, ``median`` and ``max`` over the tasks take the place of ``<task>``, with
    ``eval/loss_ratio`` for the losses; ``eval/worst`` is a table of the tasks with the highest ratio, and predictions
    are those of these tasks. Of more than 8, the same and ``conflicting`` take the place of ``<a>|<b>``.

    Args:
        folder: Where the event file goes; made if missing.
        config: The run's config, nested as it is; the HPARAMS tab shows its :func:`hyperparameters`.
        metrics: Every task's metric by the task's name; None for a task that has only a loss.
        step: The last step that stands: what an earlier process logged of later ones is hidden.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        metrics: Mapping[str, str | None],
        *,
        step: int = 0,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 0.7 s that `mtl --help` need not pay

        self._many = len(metrics) > MANY_TASKS
        self._pairwise = len(metrics) <= MAX_COSINE_TASKS
        self._worst: set[str] = set()
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0, flush_secs=20)
        self._writer.add_custom_scalars({"tasks": _overlays(metrics)})
        experiment, session_start, self._session_end = _hparams(hyperparameters(config), _hparam_metrics(metrics))
        # TensorBoard takes the columns of all runs from any one that declares them: not from a run of one task.
        if config.get("only_task") is None:
            self._add_summary(experiment)
        self._add_summary(session_start)

    def add_step(self, record: Mapping[str, Any]) -> None:
        """Shows a ``step_record``."""
        scalars = {"optim/lr": record["learning_rate"], "grad/norm": record["grad_norm"]}
        for tag, key in STEP_TAGS.items():
            values = record.get(key) or {}
            shown = summary(list(values.values())) if self._many else values
            scalars |= {f"{tag}/{name}": value for name, value in shown.items()}
        for signal, values in record.get("signal", {}).items():
            known = {name: value for name, value in values.items() if value is not None}
            shown = summary(list(known.values())) if self._many else known
            scalars |= {f"sampler/{signal}/{name}": value for name, value in shown.items()}
        cosines = record.get("cosines", {})
        if not self._pairwise:
            cosines = record.get("cosine_summary") or cosine_summary(list(cosines.values()))
        scalars |= {f"grad/cosine/{name}": value for name, value in cosines.items()}
        self._add_scalars(scalars, record["step"])

    def add_evaluation(self, record: Mapping[str, Any]) -> None:
        """Shows an ``evaluation_record``."""
        scalars = {f"eval/{metric}/mean": value for metric, value in record["mean"].items()}
        if self._many:
            for metric, values in record["summary"].items():
                scalars |= {f"eval/{metric}/{name}": value for name, value in values.items()}
            self._worst = set(record["worst"])
            self._writer.add_text("eval/worst", _worst_table(record), record["step"])
        else:
            for name, values in record["eval"].items():
                scalars |= {f"eval/{metric}/{name}": value for metric, value in values.items()}
        self._add_scalars(scalars, record["step"])
        self._writer.flush()

    def add_results(self, step: int, results: Results) -> None:
        """Shows the test scores and losses at the run's last step; the HPARAMS tab compares runs by them."""
        self._add_scalars(_test_scalars(results), step)

    def add_timing(self, record: Mapping[str, Any]) -> None:
        """Shows a ``timing_record``."""
        self._add_scalars({"time/tokens_per_second": record["tokens_per_second"]}, record["step"])

    def add_predictions(
        self, step: int, task: str, predictions: Iterable[Prediction], *, split: Literal["val", "test"] = "val"
    ) -> None:
        """Shows the first 8 predictions of a task as a table; of many tasks, those that are worst by now."""
        if self._many and task not in self._worst:
            return
        rows = ["| prompt | reference | prediction | score |", "|---|---|---|---|"]
        rows += [
            f"| {_cell(item.prompt)} | {_cell(item.reference)} | {_cell(item.prediction)} | {item.score:.3f} |"
            for item in islice(predictions, MAX_PREDICTIONS)
        ]
        folder = "predictions" if split == "val" else "predictions/test"
        self._writer.add_text(f"{folder}/{task}", "\n".join(rows), step)

    def close(self, *, succeeded: bool) -> None:
        """Ends the file; a run that did not succeed stays unfinished in the HPARAMS tab."""
        if succeeded:
            self._add_summary(self._session_end)
        self._writer.close()

    def _add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        # One event a step: SummaryWriter.add_scalar costs one each, and 32 tasks have over 150 scalars.
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add_summary(Summary(value=[{"tag": tag, "simple_value": value} for tag, value in scalars.items()]), step)

    def _add_summary(self, summary: object, step: int | None = None) -> None:
        events: Any = self._writer.file_writer  # torch leaves it untyped
        events.add_summary(summary, step)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """What runs may be compared by, as the HPARAMS tab can show it: dotted keys; numbers stay, all else becomes text.

    ``Strategy`` is the run's name without the seed, or the levers' classes where it has none, and ``stages`` the names
    of the stages in their order. A class goes by its short name. What the tasks are, and what leaves a run's numbers
    alone, is left out.
    """
    flat = flatten(config)
    levers = ", ".join(str(flat[lever]) for lever in ("sampler", "weighter", "surgery") if lever in flat)
    name = re.sub(r"(^|,)seed=[^,]*", "", str(config.get("run_name") or "")).strip(",")
    if re.fullmatch(r"\d\d-\d\d-\d\d(-\d+)?", name):  # a time, which is what a folder is called if nobody names it
        name = ""
    shown = {"Strategy": name or levers, "stages": "+".join(config.get("stage_order") or ())}
    if "seed" in flat:
        flat["seed"] = str(flat["seed"])  # a number would be shown as 1.0000
    hidden = {"run_name", "stage_order"}
    return shown | {
        key: value
        for key, value in flat.items()
        if key not in hidden and key.partition(".")[0] != "tasks" and not is_neutral(key)
    }


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str]:
    """A nested config with dotted keys; numbers stay, what has a ``_target_`` becomes its class, all else text.

    Of a mapping with more than 32 keys, such as the tasks may be, only their number is shown.
    """
    flat: dict[str, int | float | str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if key in ("_target_", "_partial_"):
            continue
        if isinstance(value, Mapping) and len(value) > MANY_TASKS:
            flat[name] = f"{len(value):,} entries"
        elif isinstance(value, Mapping):
            if "_target_" in value:
                flat[name] = value["_target_"].rpartition(".")[2]
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, bool) or value is None or isinstance(value, list | tuple):
            flat[name] = to_json(value).decode()
        elif isinstance(value, int | float):
            flat[name] = value
        else:
            flat[name] = str(value)
    return flat


def _hparams(values: dict[str, int | float | str], metrics: dict[str, None]) -> tuple[Any, Any, Any]:
    """The summaries of the columns, of the run's start and of its end."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    # SummaryWriter.add_hparams would open a second run, which live TensorBoard mixes up with this one.
    experiment, session_start, session_end = hparams(values, metrics)
    plugin_data = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin_data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in COLUMNS
    plugin_data.content = content.SerializeToString()
    return experiment, session_start, session_end


def _overlays(metrics: Mapping[str, str | None]) -> dict[str, list[Any]]:
    """Charts with one line a task, or one for each of mean, min, median and max. The patterns are of tags.

    A task with a parenthesis in its name is left out: these charts take what is in it for a run, and draw no line.
    """
    scores = [f"eval/{metric}" for metric in dict.fromkeys(metrics.values()) if metric is not None]
    loss = "eval/loss_ratio" if len(metrics) > MANY_TASKS else "eval/loss"
    groups = [*STEP_TAGS, loss, *scores]
    if len(metrics) > MAX_COSINE_TASKS:
        groups.append("grad/cosine")
    return {group: ["Multiline", [f"^{re.escape(group)}/[^()]*$"]] for group in groups}


def _hparam_metrics(metrics: Mapping[str, str | None]) -> dict[str, None]:
    """The tags whose last value the HPARAMS tab shows beside the hyperparameters: of test data, means, scores first."""
    tags = ["score/mean", "loss_ratio/mean"]
    if len(metrics) > MANY_TASKS:
        tags += ["score/min", "loss_ratio/max"]
    else:
        tags += [f"{metric}/{name}" for name, metric in metrics.items() if metric is not None]
        tags += [f"loss/{name}" for name in metrics]
    return dict.fromkeys(f"{split}/{tag}" for split in ("test", "eval") for tag in tags)


def _test_scalars(results: Results) -> dict[str, float]:
    """Tags and values of the test results, as those of an evaluation are."""
    values: dict[str, dict[str, float]] = {}
    for name, task in results.tasks.items():
        test = {key: value for key, value in task.test.items() if key != "num_examples" and value is not None}
        if task.metric in test:
            test["score"] = test[task.metric]
        if "loss" in test and task.base["loss"]:
            test["loss_ratio"] = test["loss"] / task.base["loss"]
        for metric, value in test.items():
            values.setdefault(metric, {})[name] = value
    scalars: dict[str, float] = {}
    for metric, by_task in values.items():
        if len(results.tasks) <= MANY_TASKS and metric not in ("score", "loss_ratio"):
            scalars |= {f"test/{metric}/{name}": value for name, value in by_task.items()}
        if metric != "loss":  # a mean over losses of different tasks says nothing
            described = summary(list(by_task.values()))
            shown = described if len(results.tasks) > MANY_TASKS else {"mean": described["mean"]}
            scalars |= {f"test/{metric}/{name}": value for name, value in shown.items()}
    return scalars


def _worst_table(record: Mapping[str, Any]) -> str:
    """The worst tasks of an ``evaluation_record`` in Markdown, with their numbers."""
    rows = ["| task | loss / loss before training | |", "|---|---|---|"]
    for name, ratio in record["worst"].items():
        numbers = ", ".join(f"{metric} {value:.3f}" for metric, value in record["eval"][name].items())
        rows.append(f"| {_cell(name)} | {ratio:.3f} | {_cell(numbers)} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    """``text`` as one literal cell of a Markdown table."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    short = line if len(line) <= MAX_CELL else f"{line[:MAX_CELL]}…"
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(short, quote=False))
