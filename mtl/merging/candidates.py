"""Validating mixtures of parameters, each once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from torch import Tensor

from mtl.best import private_names
from mtl.evaluation.evaluate import evaluate
from mtl.evaluation.objectives import objective_of
from mtl.evaluation.results import TaskEvaluation
from mtl.guard import put
from mtl.merging.mixtures import Mixture, Spent, Weights
from mtl.reporting.json_files import JsonLines
from mtl.run import Run, summaries

MAX_NAMED = 4  # points in the name of a candidate


def mix(values_P: Sequence[Tensor], weights: Weights) -> Tensor:
    """``sum_p w_p theta_p``, in double precision; a point itself keeps its bits.

    With weights that sum to 1 that is ``theta_0 + sum_b w_b (theta_b - theta_0)`` for each point theta_0.
    """
    kept = [(float(weight), value) for weight, value in zip(weights, values_P, strict=True) if weight]
    if len(kept) == 1:
        return kept[0][1]
    total = kept[0][0] * kept[0][1].double()
    for weight, value in kept[1:]:
        total.add_(value.double(), alpha=weight)
    return total.to(kept[0][1].dtype)


class Candidates:
    """Puts mixtures into a run's model and validates them.

    A task's evaluation depends on the shared weights and its own only, and is had once for each pair of these.

    Args:
        run: The run whose model, data and log are used.
        points: Names and trainable parameters of the P points.
        max_evaluations: How many mixtures may be evaluated.
    """

    def __init__(self, run: Run, points: Mapping[str, Mapping[str, Tensor]], max_evaluations: int) -> None:
        self.run = run
        self.points = points
        self.max_evaluations = max_evaluations
        self.num_evaluations = 0
        values = list(points.values())
        same = {name for name in values[0] if all(bool((values[0][name] == of[name]).all()) for of in values)}
        put(run, {name: values[0][name] for name in same})
        own_T = [private_names(run, task) for task in range(len(run.data))]
        # What is the same in all points, as where a branch has frozen it, needs no weights.
        self.own_T = [[name for name in names if name not in same] for names in own_T]
        private = {name for names in own_T for name in names}
        self.shared = [name for name in run.layout.named_parameters() if name not in same and name not in private]
        self._known: dict[tuple[int, Weights, Weights], TaskEvaluation] = {}
        self._file = JsonLines(run.output_dir / "candidates.jsonl")

    @property
    def has_private(self) -> bool:
        """Whether parameters of single tasks differ between the points."""
        return any(self.own_T)

    def put(self, mixture: Mixture) -> None:
        """Gives the model's trainable parameters the mixture's values."""
        of = dict.fromkeys(self.shared, mixture.shared)
        for names, weights in zip(self.own_T, mixture.private_T, strict=False):
            of |= dict.fromkeys(names, weights)
        for name, weights in of.items():
            put(self.run, {name: mix([values[name] for values in self.points.values()], weights)})

    def evaluate(self, mixture: Mixture) -> list[TaskEvaluation]:
        """Each task on validation data.

        Raises:
            Spent: There have been ``max_evaluations``.
        """
        keys = [
            (task, mixture.shared, mixture.private_T[task] if self.own_T[task] else ())
            for task in range(len(self.run.data))
        ]
        missing = [key for key in keys if key not in self._known]
        if missing:
            if self.num_evaluations >= self.max_evaluations:
                raise Spent
            self.num_evaluations += 1
            self.put(mixture)
            self._known |= dict(zip(missing, self._evaluate([task for task, *_ in missing]), strict=True))
            self._log(mixture, [self._known[key] for key in keys])
        return [self._known[key] for key in keys]

    def objective(self, evaluations: Sequence[TaskEvaluation]) -> float:
        """By the run's ``select_by``; one that is not a number is below all."""
        value = self.run.objective(summaries(evaluations))
        return value if math.isfinite(value) else -math.inf

    def task_value(self, task: int, evaluation: TaskEvaluation) -> float:
        """What the task adds to the objective; its loss where the objective passes it by."""
        base_T, references_T = self.run.state.base_validation_T, self.run.references_T
        name = self.run.options.select_by if evaluation.metric is not None else "mean_loss_ratio"
        value = objective_of(name, summaries([evaluation]), [base_T[task]], [references_T[task]])
        return value if math.isfinite(value) else -math.inf

    def weights_by_name(self, weights: Weights) -> dict[str, float]:
        """Those that are not 0."""
        return {name: float(weight) for name, weight in zip(self.points, weights, strict=True) if weight}

    def described(self, mixture: Mixture) -> dict[str, Any]:
        """The mixture as JSON: ``weights``, and ``private`` by task where these have parameters of their own."""
        names = self.run.names
        shared = {"weights": self.weights_by_name(mixture.shared)} if mixture.shared else {}
        own = {
            names[task]: self.weights_by_name(weights)
            for task, weights in enumerate(mixture.private_T)
            if self.own_T[task]
        }
        return {**shared, **({"private": own} if own else {})}

    def _evaluate(self, tasks: Sequence[int]) -> list[TaskEvaluation]:
        run = self.run
        with run.work(f"mixture {self.num_evaluations} of at most {self.max_evaluations}:") as progress:
            return evaluate(
                run.model,
                run.tokenizer,
                lambda index: run.activate(None if index is None else tasks[index]),
                [run.data[task] for task in tasks],
                split="val",
                max_examples=run.options.max_eval_examples,
                predict=run.options.eval_scores,
                distributed=run.distributed,
                token_budget=run.options.eval_micro_batch_tokens,
                progress=progress,
            )

    def _log(self, mixture: Mixture, evaluations: Sequence[TaskEvaluation]) -> None:
        run, objective = self.run, self.objective(evaluations)
        tasks = dict(zip(run.names, summaries(evaluations), strict=True))
        record = {"candidate": self.num_evaluations, **self.described(mixture)}
        self._file.append({**record, "objective": objective, "tasks": tasks})
        if run.log:
            # TensorBoard would show the answers of every candidate.
            numbers = [replace(item, predictions=[]) for item in evaluations]
            run.log.evaluation(run.state, self._label(mixture), run.names, numbers)

    def _label(self, mixture: Mixture) -> str:
        own = set(mixture.private_T) - {mixture.shared}
        weights = mixture.shared or mixture.private_T[0]
        named = [f"{_short(weight)} {name}" for name, weight in zip(self.points, weights, strict=True) if weight]
        more = [f"{len(named) - MAX_NAMED} more"] if len(named) > MAX_NAMED else []
        differs = ", each task its own" if own and (mixture.shared or len(own) > 1) else ""
        return " + ".join([*named[:MAX_NAMED], *more]) + differs


def _short(weight: Fraction) -> str:
    return f"{float(weight):.3g}"
