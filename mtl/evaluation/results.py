"""What an evaluation finds out, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """One example's answer.

    Args:
        prompt: What was asked.
        reference: The right answer.
        prediction: The chosen option, or the generated text as it came.
        answer: What was scored: the option, or the answer extracted from the text.
        score: The example's own score in [0, 1]. A corpus metric such as BLEU is not the mean of these.
        location: File and line of the example.
        loss: Negative log-likelihood of the reference, summed over its ``num_targets`` target tokens [nats].
        complete: Whether a generated text ended by itself, not at the length limit; an option always is.
    """

    prompt: str
    reference: str
    prediction: str
    answer: str
    score: float
    location: str
    loss: float
    num_targets: int
    complete: bool


@dataclass(frozen=True)
class TaskEvaluation:
    """One task's evaluation.

    Args:
        loss: Mean negative log-likelihood per target token over all examples [nats].
        num_examples: Evaluated examples.
        num_targets: Their target tokens.
        metric: Name of the task's metric; ``None`` where only the loss was evaluated.
        scores: Scores in [0, 1], higher is better; holds the metric, and what is computed along with it.
        predictions: One per example, in the order of the data; empty where only the loss was evaluated.
        losses: Negative log-likelihood of each example, summed over its target tokens [nats].
    """

    loss: float
    num_examples: int
    num_targets: int
    metric: str | None
    scores: dict[str, float]
    predictions: list[Prediction]
    losses: Sequence[float] = ()

    @property
    def score(self) -> float | None:
        """The task's metric in [0, 1]; ``None`` where only the loss was evaluated."""
        return None if self.metric is None else self.scores[self.metric]
