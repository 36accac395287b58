"""A page that shows the answers of two strategies side by side, without their names, for people to judge."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mtl.errors import UserError
from mtl.reporting.json_files import to_json, write_atomically

if TYPE_CHECKING:
    from mtl.evaluation.results import Prediction

KEY_NAME = "blind_key.json"


@dataclass(frozen=True)
class BlindItem:
    """What the page doesn't say of a pair of answers.

    Args:
        task: Of the example.
        location: Its file and line.
        A: Which strategy's answer is A: 0 or 1; the other's is B.
    """

    task: str
    location: str
    A: int


@dataclass(frozen=True)
class BlindKey:
    """What a blind page doesn't say; kept in ``blind_key.json``.

    Args:
        page: Which page it belongs to.
        strategies: The names of the two.
        num_identical: Examples that are not on the page because both answers are the same.
        items: By the names that the page gives them.
    """

    page: str
    strategies: tuple[str, str]
    num_identical: int
    items: Mapping[str, BlindItem]


def write_blind_page(
    path: Path,
    strategies: tuple[str, str],
    predictions: Mapping[str, tuple[Sequence[Prediction], Sequence[Prediction]]],
    *,
    max_per_task: int = 20,
    seed: int = 0,
) -> BlindKey:
    """Writes a self-contained page, and beside it ``blind_key.json``, which judges should not see.

    The page shows the texts as they came, without white space around them. Pairs of equal texts are left out. The order
    is random, each strategy is A in half of the pairs (give or take one), and neither names nor scores are on the page.

    Args:
        path: Of the page.
        strategies: Names of the two.
        predictions: Theirs of each task, on the same examples in the same order.
        max_per_task: Pairs of a task that are drawn where there are more.
        seed: Of the draw and the shuffle.

    Raises:
        UserError: All pairs are of equal texts.
    """
    rng = random.Random(seed)
    pairs: list[tuple[str, tuple[Prediction, Prediction]]] = []
    num_identical = 0
    for task, runs in predictions.items():
        examples = list(zip(*runs, strict=True))
        different = [(task, (first, second)) for first, second in examples if _text(first) != _text(second)]
        num_identical += len(examples) - len(different)
        pairs += rng.sample(different, min(max_per_task, len(different)))
    if not pairs:
        raise UserError(
            f"{' and '.join(strategies)}: must have different answers to be judged, and have the same to all "
            f"{num_identical} examples; name two other runs."
        )
    rng.shuffle(pairs)
    sides = [place % 2 for place in range(len(pairs))]
    rng.shuffle(sides)
    shown, secret = [], {}
    for number, ((task, pair), side) in enumerate(zip(pairs, sides, strict=True), start=1):
        a, b = pair[side], pair[1 - side]
        texts = {"prompt": a.prompt, "reference": a.reference, "A": _text(a), "B": _text(b)}
        shown.append({"id": str(number), "task": task, **texts})
        secret[str(number)] = BlindItem(task, a.location, side)
    key = BlindKey(hashlib.sha256(to_json(shown)).hexdigest()[:16], strategies, num_identical, secret)
    write_atomically(path.with_name(KEY_NAME), to_json(asdict(key), indent=2) + b"\n")
    write_atomically(path, _page({"page": key.page, "items": shown}))
    return key


def _text(prediction: Prediction) -> str:
    return prediction.prediction.strip()


def _page(payload: Mapping[str, object]) -> bytes:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("mtl.report"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("blind.html").render(payload=payload).encode()
