"""From a task's config to its tokenized data."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise, starmap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mtl.data.sources import SPLIT_WORDS, read_splits, source_files
from mtl.data.splits import make_splits
from mtl.data.tokenized import (
    TOO_LONG,
    EncodedSplit,
    TokenizedExample,
    TokenizedSplit,
    encode_split,
    load_encoded,
    save_encoded,
)
from mtl.errors import UserError
from mtl.memo import FileMemo
from mtl.tasks.formats import Conversation, Example, Text, detect_format, parse_row
from mtl.tasks.rendering import Renderer
from mtl.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_VERSION = 1  # part of every fingerprint; raise it when the same content would give other tokens or arrays
SPLITS = ("train", "val", "test")
CODE = [file for part in ("data", "tasks") for file in sorted((Path(__file__).parents[1] / part).glob("*.py"))]


@dataclass(frozen=True)
class EvalExample:
    """One example of a validation or test split.

    Args:
        tokens: The whole conversation, for the loss.
        prompt: What a person should read: the user's last message ("" for plain text).
        prompt_ids: The conversation rendered up to where the last answer begins (empty for plain text).
        reference: The last answer; the text itself for plain text.
        options: The texts the answer is one of: the row's own or the task's labels.
        option_ids: Each option rendered as the answer: its tokens through the end-of-turn token.
        location: The row's place, such as ``val.jsonl:17``.
    """

    tokens: TokenizedExample
    prompt: str
    prompt_ids: tuple[int, ...]
    reference: str
    options: tuple[str, ...] | None
    option_ids: tuple[tuple[int, ...], ...] | None
    location: str


@dataclass(frozen=True)
class TaskData:
    """A task's data, ready for training and evaluation.

    Args:
        task: The task with every ``auto`` resolved (format, metric, scoring).
        train: Training examples.
        train_locations: Their places, such as ``train.jsonl:17``.
        val: Validation examples.
        test: Test examples.
        majority: The commonest training answer of a task with labels, the first of the labels where several tie.
        num_dropped: Examples of all splits that ``max_length`` left without an answer.
        fingerprint: SHA-256 of everything that decides the tokens (content, tokenizer, options), not of time or paths.
    """

    task: Task
    train: TokenizedSplit
    train_locations: Sequence[str]
    val: Sequence[EvalExample]
    test: Sequence[EvalExample]
    majority: str | None
    num_dropped: int
    fingerprint: str


class _EvalRow(NamedTuple):
    prompt: str
    reference: str
    options: Sequence[str] | None
    location: str


@dataclass(frozen=True)
class _Facts:
    """What a task's rows say beside their tokens, in plain values; of the rows that were kept, in order."""

    fingerprint: str
    format: str
    metric: str
    scoring: str
    train_locations: Sequence[str]
    val: Sequence[_EvalRow]
    test: Sequence[_EvalRow]
    majority: str | None
    num_dropped: int


def load_task(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    cache_dir: Path,
    too_long: str = "error",
) -> TaskData:
    """One task's data; see :func:`load_tasks`."""
    [data] = load_tasks([task], tokenizer, max_length=max_length, seed=seed, cache_dir=cache_dir, too_long=too_long)
    return data


def load_tasks(
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    cache_dir: Path,
    too_long: str = "error",
) -> list[TaskData]:
    """Reads, checks, splits, renders and tokenizes the tasks' data.

    Tokens are cached as ``<cache_dir>/tokens/<fingerprint>.safetensors``, by content. What else is known of the rows
    is kept in ``<cache_dir>/tasks`` for as long as the source files stay untouched (:class:`mtl.memo.FileMemo`), so
    that the next run reads neither them nor what is in them again. Data sets on the Hub are read every time.

    Args:
        tasks: What to load.
        tokenizer: The model's tokenizer.
        max_length: Length limit of an example [tokens].
        seed: Decides splits that are made and samples that are drawn.
        cache_dir: The folder of all caches.
        too_long: What to do with examples that lose all their targets to ``max_length``: ``error`` or ``drop``.

    Raises:
        UserError: If the data or an option breaks a rule; the message names the place.
    """
    if too_long not in TOO_LONG:
        raise UserError(f"too_long must be one of {', '.join(TOO_LONG)}; found {too_long!r}.")
    if max_length < 2:
        raise UserError(f"max_length must be at least 2, a token and one to predict; found {max_length}.")
    loader = _Loader(tokenizer, _tokenizer_digest(tokenizer), max_length, too_long, seed, cache_dir)
    return [loader.load(task) for task in tasks]


@dataclass(frozen=True)
class _Loader:
    """What all tasks are loaded with."""

    tokenizer: PreTrainedTokenizerBase
    tokenizer_digest: str
    max_length: int
    too_long: str
    seed: int
    cache_dir: Path

    def load(self, task: Task) -> TaskData:
        files = source_files(task)
        inputs = [asdict(task), self.seed, *self._token_options()]
        kept = FileMemo(self.cache_dir / "tasks", [*files, *CODE] if files else [], inputs)
        recalled = kept.recall()
        facts = None if recalled is None else _Facts(**recalled)
        encoded = None if facts is None else load_encoded(self._tokens_path(facts.fingerprint))
        if facts is None or encoded is None:
            facts, encoded = self._read(task)
            kept.keep(asdict(facts))
        return TaskData(
            task=replace(task, format=facts.format, metric=facts.metric, scoring=facts.scoring),
            train=encoded["train"].examples,
            train_locations=facts.train_locations,
            val=_eval_examples(encoded["val"], starmap(_EvalRow, facts.val), is_text=facts.format == "text"),
            test=_eval_examples(encoded["test"], starmap(_EvalRow, facts.test), is_text=facts.format == "text"),
            majority=facts.majority,
            num_dropped=facts.num_dropped,
            fingerprint=facts.fingerprint,
        )

    def _read(self, task: Task) -> tuple[_Facts, dict[str, EncodedSplit]]:
        """The way from the rows; writes the tokens if they are not there yet."""
        given = read_splits(task)
        if task.format == "auto":
            first = given["train"][0]
            task = replace(task, format=detect_format(first.values, task, first.location))
        parsed = {split: [parse_row(row.values, task, row.location) for row in rows] for split, rows in given.items()}
        task = _resolved(task, [example for split in parsed for example in parsed[split]])
        splits = make_splits(parsed, task, self.seed)
        fingerprint = _fingerprint(splits, self._token_options())
        path = self._tokens_path(fingerprint)
        encoded = load_encoded(path)
        if encoded is None:
            renderer = Renderer(self.tokenizer, task.name)
            encoded = _encode(splits, renderer, max_length=self.max_length, too_long=self.too_long)
            save_encoded(path, encoded)
        facts = _Facts(
            fingerprint=fingerprint,
            format=task.format,
            metric=task.metric,
            scoring=task.scoring,
            train_locations=[splits["train"][row].location for row in encoded["train"].rows],
            val=[_eval_row(splits["val"][row]) for row in encoded["val"].rows],
            test=[_eval_row(splits["test"][row]) for row in encoded["test"].rows],
            majority=_majority(task, splits["train"]),
            num_dropped=sum(len(splits[split]) - len(encoded[split].rows) for split in SPLITS),
        )
        return facts, encoded

    def _token_options(self) -> list[object]:
        return [CACHE_VERSION, self.max_length, self.too_long, self.tokenizer_digest]

    def _tokens_path(self, fingerprint: str) -> Path:
        return self.cache_dir / "tokens" / f"{fingerprint}.safetensors"


def _resolved(task: Task, examples: Sequence[Example]) -> Task:
    """Replaces ``auto`` in metric and scoring, and refuses what the data cannot serve."""
    field = f"tasks.{task.name}"
    if task.format == "text":
        if task.labels is not None:
            raise UserError(f"{field}.labels: plain text has no answers that labels could stand for. Remove them.")
        if task.metric not in ("auto", "none") or task.scoring not in ("auto", "none"):
            raise UserError(
                f"{field}: plain text has no answers to score, only a loss; found metric={task.metric} and "
                f"scoring={task.scoring}. Set both to auto."
            )
        return replace(task, metric="none", scoring="none")
    chosen = {
        example.options is not None: example.location for example in examples if isinstance(example, Conversation)
    }
    if len(chosen) == 2:
        raise UserError(
            f'Task {task.name!r}: {chosen[True]} has "options" and {chosen[False]} has none. Give all rows options, or '
            "none."
        )
    has_options = True in chosen
    if task.scoring == "likelihood" and not has_options:
        raise UserError(
            f"{field}.scoring: likelihood needs answers to choose from, and there are no labels and no options. Set "
            f'{field}.labels, add an "options" list to the rows, or take generation.'
        )
    scoring = ("likelihood" if has_options else "generation") if task.scoring == "auto" else task.scoring
    metric = ("accuracy" if has_options else "chrf") if task.metric == "auto" else task.metric
    return replace(task, metric=metric, scoring=scoring)


def _encode(
    splits: Mapping[str, Sequence[Example]], renderer: Renderer, *, max_length: int, too_long: str
) -> dict[str, EncodedSplit]:
    encoded = {}
    for split in SPLITS:
        encoded[split] = encode_split(
            splits[split], renderer, max_length=max_length, too_long=too_long, for_evaluation=split != "train"
        )
        if not len(encoded[split].rows):
            raise UserError(
                f"Task {renderer.task_name!r} has no {SPLIT_WORDS[split]} rows left: max_length={max_length} cuts the "
                f"answer of each of the {len(splits[split])} away. Raise max_length."
            )
    return encoded


def _eval_row(example: Example) -> _EvalRow:
    if isinstance(example, Text):
        return _EvalRow("", example.text, None, example.location)
    return _EvalRow(example.prompt, example.answer, example.options, example.location)


def _eval_examples(encoded: EncodedSplit, rows: Iterable[_EvalRow], *, is_text: bool) -> list[EvalExample]:
    spans = pairwise(encoded.option_offsets.tolist())
    result = []
    for tokens, prompt_length, row in zip(encoded.examples, encoded.prompt_lengths.tolist(), rows, strict=True):
        prompt_ids = () if is_text else tuple(tokens.input_ids[:prompt_length].tolist())
        options, option_ids = None, None
        if row.options is not None:
            options = tuple(row.options)
            own_spans = islice(spans, len(options))
            option_ids = tuple(tuple(encoded.option_ids[begin:end].tolist()) for begin, end in own_spans)
        result.append(EvalExample(tokens, row.prompt, prompt_ids, row.reference, options, option_ids, row.location))
    return result


def _majority(task: Task, train: Sequence[Example]) -> str | None:
    if task.labels is None:
        return None
    counts = Counter(example.answer for example in train if isinstance(example, Conversation))
    return max(task.labels, key=lambda label: counts[label])


def _fingerprint(splits: Mapping[str, Sequence[Example]], token_options: Sequence[object]) -> str:
    """Parsed examples rather than files go in: labels, system prompt, format, splits and samples show in them."""
    sha = hashlib.sha256(json.dumps(token_options).encode())
    for split in SPLITS:
        sha.update(f"\n{split} {len(splits[split])}\n".encode())
        for example in splits[split]:
            content = example.text if isinstance(example, Text) else [example.messages, example.options]
            sha.update(json.dumps(content).encode())
    return sha.hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        core = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    else:
        backend.no_padding()  # settings of the last call, which every call sets anew, are no part of the tokenizer
        backend.no_truncation()
        core = backend.to_str()
    settings = [tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, sorted(tokenizer.all_special_tokens)]
    return hashlib.sha256((core + json.dumps(settings)).encode()).hexdigest()
