"""The run in TensorBoard: one event stream a run, tags of one pattern, so that runs and tasks overlay."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl.reporting.json_files import to_json

if TYPE_CHECKING:
    from mtl.evaluation.results import Prediction

# Every tag is a chart that the browser draws and the server keeps in memory; metrics.jsonl has all tasks.
MAX_TASKS = 64
MAX_COSINE_TASKS = 16  # 120 pairs
MAX_PREDICTIONS = 8
MAX_CELL = 300  # characters

STEP_TAGS = {
    "train/loss": "loss",
    "sampler/prob": "p",
    "weight": "lambda",
    "surgery/coefficient": "w",
    "grad/norm": "grad_norm_task",
}


class TensorBoardLog:
    """Writes the records of :mod:`mtl.reporting.records` as scalars, into one event file.

    Tags: ``train/loss/<task>``, ``eval/<metric>/<task>`` and ``/mean`` (``loss``, ``score`` and ``loss_ratio`` are
    metrics here), ``sampler/prob/<task>``, ``weight/<task>``, ``surgery/coefficient/<task>``, ``grad/norm`` and
    ``/<task>``, ``grad/cosine/<a>|<b>``, ``optim/lr``, ``time/tokens_per_second``, ``predictions/<task>`` (text). The
    first 64 tasks are shown, and cosines of the first 16.

    Args:
        folder: Where the event file goes; made if missing.
        hyperparameters: The run's config, nested as it is; shown as ``a.b.c`` in the HPARAMS tab.
        metrics: Every task's metric by the task's name; None for a task that has only a loss.
        step: The last step that stands: what an earlier process logged of later ones is hidden.
    """

    def __init__(
        self,
        folder: Path,
        hyperparameters: Mapping[str, Any],
        metrics: Mapping[str, str | None],
        *,
        step: int = 0,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 0.7 s that `mtl --help` need not pay
        from torch.utils.tensorboard.summary import hparams

        self._tasks = set(islice(metrics, MAX_TASKS))
        self._pairs = {f"{a}|{b}" for a, b in combinations(islice(metrics, MAX_COSINE_TASKS), 2)}
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0, flush_secs=20)
        self._writer.add_custom_scalars({"tasks": _overlays(metrics.values())})
        # SummaryWriter.add_hparams would open a second run, which live TensorBoard mixes up with this one.
        shown = {name: metric for name, metric in metrics.items() if name in self._tasks}
        experiment, session_start, self._session_end = hparams(flatten(hyperparameters), _hparam_metrics(shown))
        self._add_summary(experiment)
        self._add_summary(session_start)

    def add_step(self, record: Mapping[str, Any]) -> None:
        """Shows a ``step_record``."""
        scalars = {"optim/lr": record["learning_rate"], "grad/norm": record["grad_norm"]}
        for tag, key in STEP_TAGS.items():
            values = record.get(key) or {}
            scalars |= {f"{tag}/{name}": value for name, value in values.items() if name in self._tasks}
        cosines = record.get("cosines", {})
        scalars |= {f"grad/cosine/{pair}": value for pair, value in cosines.items() if pair in self._pairs}
        self._add_scalars(scalars, record["step"])

    def add_evaluation(self, record: Mapping[str, Any]) -> None:
        """Shows an ``evaluation_record``."""
        scalars = {f"eval/{metric}/mean": value for metric, value in record["mean"].items()}
        for name, values in record["eval"].items():
            if name in self._tasks:
                scalars |= {f"eval/{metric}/{name}": value for metric, value in values.items()}
        self._add_scalars(scalars, record["step"])
        self._writer.flush()

    def add_timing(self, record: Mapping[str, Any]) -> None:
        """Shows a ``timing_record``."""
        self._add_scalars({"time/tokens_per_second": record["tokens_per_second"]}, record["step"])

    def add_predictions(self, step: int, task: str, predictions: Iterable[Prediction]) -> None:
        """Shows the first 8 predictions of a task as a table."""
        if task not in self._tasks:
            return
        rows = ["| prompt | reference | prediction | score |", "|---|---|---|---|"]
        rows += [
            f"| {_cell(item.prompt)} | {_cell(item.reference)} | {_cell(item.prediction)} | {item.score:.3f} |"
            for item in islice(predictions, MAX_PREDICTIONS)
        ]
        self._writer.add_text(f"predictions/{task}", "\n".join(rows), step)

    def close(self, *, succeeded: bool) -> None:
        """Ends the file; a run that did not succeed stays unfinished in the HPARAMS tab."""
        if succeeded:
            self._add_summary(self._session_end)
        self._writer.close()

    def _add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        # One event a step: SummaryWriter.add_scalar costs one each, and 64 tasks have over 300 scalars.
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add_summary(Summary(value=[{"tag": tag, "simple_value": value} for tag, value in scalars.items()]), step)

    def _add_summary(self, summary: object, step: int | None = None) -> None:
        events: Any = self._writer.file_writer  # torch leaves it untyped
        events.add_summary(summary, step)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str]:
    """A nested config as TensorBoard's HPARAMS tab can show it: dotted keys; numbers stay, all else becomes text."""
    flat: dict[str, int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, bool) or value is None or isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = to_json(value).decode()
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = value
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _overlays(metrics: Iterable[str | None]) -> dict[str, list[Any]]:
    """Charts with one line a task. The patterns are regular expressions on tags."""
    scores = [f"eval/{metric}" for metric in dict.fromkeys(metrics) if metric is not None]
    return {group: ["Multiline", [f"^{re.escape(group)}/.*"]] for group in [*STEP_TAGS, "eval/loss", *scores]}


def _hparam_metrics(metrics: Mapping[str, str | None]) -> dict[str, None]:
    """The tags whose last value the HPARAMS tab shows beside the hyperparameters, means first."""
    tags = ["eval/score/mean", "eval/loss_ratio/mean"]
    for name, metric in metrics.items():
        tags += [f"eval/loss/{name}"] if metric is None else [f"eval/loss/{name}", f"eval/{metric}/{name}"]
    return dict.fromkeys(tags)


def _cell(text: str) -> str:
    """``text`` as one literal cell of a Markdown table."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    short = line if len(line) <= MAX_CELL else f"{line[:MAX_CELL]}…"
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(short, quote=False))
