"""The base model's evaluation, computed once per model, data and settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl.evaluation.batches import Ranks
from mtl.evaluation.evaluate import Activate, Progress, evaluate
from mtl.evaluation.results import Prediction, TaskEvaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mtl.data.loading import TaskData

FORMAT = 3  # raise it whenever this package gives other numbers for the same model and data
LIBRARIES = ("torch", "transformers", "tokenizers", "scikit-learn", "sacrebleu", "rouge-score", "jiwer")
TASK_SETTINGS = ("metric", "scoring", "labels", "max_new_tokens", "answer_pattern")


def evaluate_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    activate: Activate,
    data: Sequence[TaskData],
    *,
    split: str,
    max_examples: int | None,
    predict: bool,
    distributed: Ranks,
    token_budget: int,
    cache_dir: Path,
    model_fingerprint: str,
    dtype: str,
    progress: Progress | None = None,
) -> list[TaskEvaluation]:
    """The model without adapters on all tasks, from ``<cache_dir>/base`` where it has been evaluated before.

    Each task has a file of its own, so that a further task costs only itself. Only rank 0 touches files.

    Args:
        model_fingerprint: Identifies the base model's weights.
        dtype: Precision that the model computes in.

    The other arguments are those of :func:`mtl.evaluation.evaluate.evaluate`.
    """
    evaluations = []
    libraries = {name: version(name) for name in LIBRARIES}
    for task_data in data:
        key = {
            "format": FORMAT,
            "model": model_fingerprint,
            "dtype": dtype,
            "data": task_data.fingerprint,
            "task": {name: getattr(task_data.task, name) for name in TASK_SETTINGS},
            "split": split,
            "max_examples": max_examples,
            "predict": predict,
            "libraries": libraries,
        }
        path = cache_dir / "base" / f"{_digest(key)}.json"
        evaluation = distributed.gather(_read(path) if distributed.rank == 0 else None)[0]
        if evaluation is None:
            [evaluation] = evaluate(
                model,
                tokenizer,
                activate,
                [task_data],
                split=split,
                max_examples=max_examples,
                predict=predict,
                distributed=distributed,
                token_budget=token_budget,
                base=True,
                progress=progress,
            )
            if distributed.rank == 0:
                _write(path, key, evaluation)
        evaluations.append(evaluation)
    return evaluations


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()


def _read(path: Path) -> TaskEvaluation | None:
    """The stored evaluation; ``None`` if there is none or the file is not as it was written."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        fields = stored["evaluation"]
        if stored["sha256"] != _digest(fields):
            return None
        return TaskEvaluation(**{**fields, "predictions": [Prediction(**row) for row in fields["predictions"]]})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, key: dict[str, Any], evaluation: TaskEvaluation) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = asdict(evaluation)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(
        json.dumps({"key": key, "sha256": _digest(fields), "evaluation": fields}, ensure_ascii=False, default=list),
        encoding="utf-8",
    )
    os.replace(temporary, path)
