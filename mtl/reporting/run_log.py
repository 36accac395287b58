"""Everything a run reports while it goes on, from one place: files, TensorBoard and the terminal."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mtl.reporting.console import RunConsole, shortened
from mtl.reporting.json_files import JsonLines
from mtl.reporting.records import MANY_TASKS, NUM_WORST, evaluation_record, step_record, timing_record
from mtl.reporting.tensorboard import TensorBoardLog
from mtl.reporting.watch import RunWatch

if TYPE_CHECKING:
    from mtl.evaluation.results import TaskEvaluation
    from mtl.reporting.results import Results
    from mtl.run import RunState, StageParts
    from mtl.step import StepOutcome


WEAKNESS_WORDS = {
    "loss_ratio": "val loss / base val loss",
    "score": "distance of the val score from 1",
    "reference": "gap to the val score of the task trained alone, relative to it",
    "target": "gap to the target score",
    "best": "gap to the run's best val score",
}


class RunLog:
    """The reports of a run; only rank 0 has one.

    Args:
        folder: The run's output folder.
        config: The resolved config, shown as hyperparameters.
        metrics: Every task's metric by its name, ``None`` where there is only a loss.
        sizes: Training examples of each task, by name.
        step: The step that the run goes on from; 0 for a new one.
        num_records: Lines of ``metrics.jsonl`` that stand; the others are of work that comes again.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        metrics: Mapping[str, str | None],
        sizes: Mapping[str, int],
        step: int,
        num_records: int,
    ) -> None:
        self._metrics_file = JsonLines(folder / "metrics.jsonl")
        self._timings_file = JsonLines(folder / "timings.jsonl")
        self._num_records = self._metrics_file.truncate(num_records)
        self._timings_file.truncate_after(step)
        self.console = RunConsole()
        self._tensorboard = TensorBoardLog(
            folder / "tensorboard", {**config, "run_name": folder.name}, metrics, step=step
        )
        self._watch = RunWatch()
        self._sizes = sizes
        self._stage = ExitStack()
        self._last = (time.monotonic(), 0)
        if len(metrics) > MANY_TASKS:
            self.say(
                f"TensorBoard shows means, extremes and the {NUM_WORST} worst of {len(metrics):,} tasks; metrics.jsonl "
                "has every task"
            )

    def begin_stage(self, state: RunState, parts: StageParts, names: Sequence[str]) -> None:
        """Says what the stage trains, and why those tasks."""
        chosen = [names[task] for task in parts.focus]
        replayed = [names[task] for task in parts.tasks if task not in parts.focus]
        self.say(
            f"Stage {parts.stage.name}: {parts.num_steps} steps of {parts.batch_size} examples on "
            f"{', '.join(shortened(chosen))}"
            + (f", replaying {parts.stage.replay:.0%} of {', '.join(shortened(replayed))}" if replayed else "")
        )
        special = [
            text
            for text, said in (
                (f"only {parts.stage.trainable} parameters move", parts.stage.trainable != "all"),
                ("the optimizer goes on from the stage before", parts.stage.optimizer == "carry"),
            )
            if said
        ]
        if special:
            self.say(f"  {'; '.join(special)}")
        if state.stage_weakness_T is not None:
            found = [(names[task], state.stage_weakness_T[task]) for task in parts.focus]
            values = [f"{name} {value:.3f}" for name, value in found if value is not None]
            self.say(f"  chosen for the highest {WEAKNESS_WORDS[parts.stage.weakness]}: {', '.join(shortened(values))}")
        self.resume_stage(state, parts)

    def stage_ended(self, record: Mapping[str, Any]) -> None:
        """Says what a guard has found, and what was taken back."""
        if record["own_best"]:
            self.say(f"  own parameters of their best evaluation: {', '.join(shortened(record['own_best']))}")
        guard = record.get("guard")
        if guard is None:
            return
        if not guard["harmed"]:
            self.say("  guard: no other task was harmed")
            return
        fallen = shortened([f"{name} by {drop:.3f}" for name, drop in guard["harmed"].items()])
        done = f"{guard['scale']:.0%} of the stage's change is kept" if guard["scale"] else "the stage is rolled back"
        self.say(f"  guard: {', '.join(fallen)} fell too far; {done}")

    def resume_stage(self, state: RunState, parts: StageParts) -> None:
        """Starts the stage's progress bar."""
        self._stage.enter_context(self.console.stage(parts.stage.name, done=state.stage_step, total=parts.num_steps))
        self._last = (time.monotonic(), state.tokens)

    def step(self, state: RunState, parts: StageParts, names: Sequence[str], outcome: StepOutcome) -> None:
        """Reports a step."""
        scale_M = outcome.shares_M * outcome.weights_T[list(outcome.tasks)]
        record = step_record(
            [names[task] for task in parts.tasks],
            step=state.step,
            stage=parts.stage.name,
            tasks=outcome.tasks,
            counts_M=outcome.counts_M,
            losses_M=outcome.losses_M.tolist(),
            shares_M=outcome.shares_M.tolist(),
            probabilities_T=outcome.probabilities_T,
            weights_T=outcome.weights_T.tolist(),
            objective=float(scale_M @ outcome.losses_M),
            grad_norm=outcome.grad_norm,
            skipped=not outcome.finite,
            learning_rate=outcome.learning_rate,
            tokens=outcome.num_tokens,
            target_tokens=sum(outcome.num_targets_M),
            coefficients_M=None if outcome.coefficients_M is None else outcome.coefficients_M.tolist(),
            gramian_MM=None if outcome.gramian_MM is None else outcome.gramian_MM.tolist(),
            signals=outcome.signals,
            conflict=None
            if outcome.conflict is None
            else ([names[task] for task in outcome.conflict.tasks], outcome.conflict.cosines_KK.tolist()),
        )
        now, tokens = time.monotonic(), state.tokens
        speed = (tokens - self._last[1]) / max(now - self._last[0], 1e-9)
        self._last = (now, tokens)
        timing = timing_record(
            step=state.step,
            stage=parts.stage.name,
            seconds=state.training_seconds,
            tokens_per_second=speed,
            peak_memory_bytes=peak_memory_bytes(),
        )
        self._metrics_file.append(record)
        self._num_records += 1
        self._timings_file.append(timing)
        self._tensorboard.add_step(record)
        self._tensorboard.add_timing(timing)
        self.console.step(float(outcome.losses_M.mean()), speed)
        epochs = {name: seen / self._sizes[name] for name, seen in zip(names, state.examples_seen_T, strict=True)}
        for warning in self._watch.observe(record, epochs):
            self.warn(warning)

    def evaluation(
        self, state: RunState, stage: str, names: Sequence[str], evaluations: Sequence[TaskEvaluation]
    ) -> None:
        """Reports an evaluation on validation data."""
        record = evaluation_record(
            dict(zip(names, evaluations, strict=True)),
            step=state.step,
            stage=stage,
            base_losses={name: base["loss"] for name, base in zip(names, state.base_validation_T, strict=True)},
        )
        self._metrics_file.append(record)
        self._num_records += 1
        self._tensorboard.add_evaluation(record)
        for name, evaluation in zip(names, evaluations, strict=True):
            if evaluation.predictions:
                self._tensorboard.add_predictions(state.step, name, evaluation.predictions)
        self.console.evaluation(record)
        self._last = (time.monotonic(), state.tokens)

    def results(self, results: Results, evaluations: Sequence[TaskEvaluation]) -> None:
        """Reports the results on test data; ``evaluations`` are those of ``results.tasks``, in their order."""
        self._tensorboard.add_results(results.cost.steps, results)
        for name, evaluation in zip(results.tasks, evaluations, strict=True):
            self._tensorboard.add_predictions(results.cost.steps, name, evaluation.predictions, split="test")

    def synced_records(self) -> int:
        """How many records ``metrics.jsonl`` has, all of them on disk: a checkpoint refers to them."""
        self._metrics_file.sync()
        return self._num_records

    def end_stage(self) -> None:
        """Ends the stage's progress bar."""
        self._stage.close()

    def work(self, label: str) -> AbstractContextManager[Callable[[str, int, int], None]]:
        """A progress bar for other work."""
        return self.console.work(label)

    def warn(self, message: str) -> None:
        """Prints a warning, once."""
        self.console.warn_once(message, message)

    def say(self, line: str) -> None:
        """Prints one line."""
        self.console.console.print(line, soft_wrap=True)

    def close(self, *, succeeded: bool) -> None:
        """Ends files and bars."""
        self._stage.close()
        self._tensorboard.close(succeeded=succeeded)


def peak_memory_bytes() -> int:
    """The most memory this process has used so far: of the GPU if there is one, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
