"""Tokenized examples in flat arrays, and their cache."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from mtl.errors import UserError
from mtl.tasks.formats import Conversation, Example
from mtl.tasks.rendering import Renderer

TOO_LONG = ("error", "drop")


@dataclass(frozen=True)
class TokenizedExample:
    """One example's S tokens.

    Args:
        input_ids: Token ids [S] int32.
        is_target: [S] bool; ``is_target[i]``: token i is a label that is trained on. Never true at 0, since nothing
            comes before to predict it from.
    """

    input_ids: np.ndarray
    is_target: np.ndarray


class TokenizedSplit(Sequence[TokenizedExample]):
    """The n examples of a split in two flat arrays; indexing gives views.

    Args:
        input_ids: All tokens, one example after the other, int32.
        is_target: The same, bool.
        offsets: [n + 1] int64; example i is ``offsets[i]:offsets[i + 1]``. No example is empty.
    """

    def __init__(self, input_ids: np.ndarray, is_target: np.ndarray, offsets: np.ndarray) -> None:
        self.input_ids = input_ids
        self.is_target = is_target
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = range(len(self))[index]  # resolves a negative index and refuses one beyond the end
        span = slice(self.offsets[example], self.offsets[example + 1])
        return TokenizedExample(self.input_ids[span], self.is_target[span])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example [n] int64."""
        return np.diff(self.offsets)

    @property
    def num_targets(self) -> np.ndarray:
        """Target tokens of each example [n] int64."""
        return np.diff(np.concatenate(([0], np.cumsum(self.is_target, dtype=np.int64)))[self.offsets])


@dataclass(frozen=True)
class EncodedSplit:
    """A tokenized split with what an evaluation needs of it.

    Args:
        examples: The n examples that were kept.
        rows: Their indices among the examples that went in [n].
        prompt_lengths: Tokens before the last answer [n].
        option_ids: Tokens of all options as answers, through the end-of-turn token, one after the other.
        option_offsets: Where each option begins; the kept examples' options follow each other in order.
    """

    examples: TokenizedSplit
    rows: np.ndarray
    prompt_lengths: np.ndarray
    option_ids: np.ndarray
    option_offsets: np.ndarray


def encode_split(
    examples: Sequence[Example],
    renderer: Renderer,
    *,
    max_length: int,
    too_long: str,
    for_evaluation: bool,
) -> EncodedSplit:
    """Renders and tokenizes a split.

    Examples are cut after ``max_length`` tokens. One that keeps no target (for evaluation: none of its last answer) is
    an error or is dropped.

    Args:
        examples: What to encode.
        renderer: The chat template and tokenizer.
        max_length: Length limit of an example [tokens].
        too_long: ``error`` or ``drop``.
        for_evaluation: Whether to encode the options too.

    Raises:
        UserError: If an answer is cut away and ``too_long`` is ``error``.
    """
    pieces_of = [renderer.pieces(example) for example in examples]
    tokens = renderer.tokenize([piece.text for pieces in pieces_of for piece in pieces])
    ids: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    rows: list[int] = []
    prompt_lengths: list[int] = []
    for row, (example, pieces) in enumerate(zip(examples, pieces_of, strict=True)):
        piece_ids = [next(tokens) for _ in pieces]
        lengths = [len(piece) for piece in piece_ids]
        is_target = np.repeat([piece.is_target for piece in pieces], lengths)
        is_target[:1] = False
        prompt_length = sum(lengths[:-1])
        if not is_target[prompt_length if for_evaluation else 0 : max_length].any():
            if too_long == "error":
                raise _cut_away(example, sum(lengths), is_target, max_length, renderer)
            continue
        ids.append(np.array([token for piece in piece_ids for token in piece][:max_length], dtype=np.int32))
        targets.append(is_target[:max_length])
        rows.append(row)
        prompt_lengths.append(prompt_length)
    options = _encode_options([examples[row] for row in rows], renderer) if for_evaluation else []
    return EncodedSplit(
        TokenizedSplit(_joined(ids, np.int32), _joined(targets, np.bool_), _offsets(ids)),
        np.array(rows, dtype=np.int64),
        np.array(prompt_lengths, dtype=np.int64),
        _joined(options, np.int32),
        _offsets(options),
    )


def load_encoded(path: Path) -> dict[str, EncodedSplit] | None:
    """Reads what :func:`save_encoded` wrote; ``None`` if there is no such file or it is damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            digest = (file.metadata() or {}).get("sha256")
        if digest != _digest(arrays):
            return None
        return {split: _from_arrays(arrays, split) for split in sorted({name.split("/")[0] for name in arrays})}
    except (SafetensorError, OSError, KeyError):
        return None


def save_encoded(path: Path, splits: Mapping[str, EncodedSplit]) -> None:
    """Writes the splits in one step, so that processes that build the same file at once do not disturb each other.

    Raises:
        UserError: If the cache folder cannot be written to.
    """
    from safetensors.numpy import save

    arrays = {
        f"{split}/{name}": array for split, encoded in splits.items() for name, array in _to_arrays(encoded).items()
    }
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(save(arrays, metadata={"sha256": _digest(arrays)}))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cache_dir: {path.parent} cannot be written to: {error.strerror}. Set cache_dir to a writable folder."
        ) from None


def _cut_away(
    example: Example, num_tokens: int, is_target: np.ndarray, max_length: int, renderer: Renderer
) -> UserError:
    begin = int(is_target.argmax())
    return UserError(
        f"Task {renderer.task_name!r}: {example.location} has {num_tokens} tokens and its answer begins at token "
        f"{begin + 1}, so max_length={max_length} cuts the answer away. Raise max_length, shorten the row, or set "
        "too_long=drop to drop such rows."
    )


def _encode_options(examples: Iterable[Example], renderer: Renderer) -> list[np.ndarray]:
    texts = [
        renderer.answer_piece(example, option).text
        for example in examples
        if isinstance(example, Conversation)
        for option in example.options or ()
    ]
    return [np.array(token_ids, dtype=np.int32) for token_ids in renderer.tokenize(texts)]


def _joined(arrays: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays])


def _offsets(arrays: list[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, arrays)], dtype=np.int64)


def _to_arrays(encoded: EncodedSplit) -> dict[str, np.ndarray]:
    return {
        "input_ids": encoded.examples.input_ids,
        "is_target": encoded.examples.is_target,
        "offsets": encoded.examples.offsets,
        "rows": encoded.rows,
        "prompt_lengths": encoded.prompt_lengths,
        "option_ids": encoded.option_ids,
        "option_offsets": encoded.option_offsets,
    }


def _from_arrays(arrays: Mapping[str, np.ndarray], split: str) -> EncodedSplit:
    def get(name: str) -> np.ndarray:
        return arrays[f"{split}/{name}"]

    return EncodedSplit(
        TokenizedSplit(get("input_ids"), get("is_target"), get("offsets")),
        get("rows"),
        get("prompt_lengths"),
        get("option_ids"),
        get("option_offsets"),
    )


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Flipped bytes leave a file that still parses, so the contents carry a checksum."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        sha.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sha.hexdigest()
