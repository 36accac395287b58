"""Flat arrays, truncation, and a cache file that is complete or not there."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from mtl.data.tokenized import EncodedSplit, TokenizedSplit, encode_split, load_encoded, save_encoded
from mtl.errors import UserError
from mtl.tasks.formats import Conversation, Example, Message, Text
from mtl.tasks.rendering import Renderer

CONTEXT = len(b"<user\n" + b"q" + b"<\n" + b"<assistant\n")  # tokens before a one-character prompt's answer


def question(answer: str, *, location: str = "train.jsonl:1", options: tuple[str, ...] | None = None) -> Conversation:
    return Conversation((Message("user", "q"), Message("assistant", answer)), options, location)


def encode(
    tokenizer: PreTrainedTokenizerFast,
    examples: list[Example],
    *,
    max_length: int = 100,
    too_long: str = "error",
    for_evaluation: bool = False,
) -> EncodedSplit:
    renderer = Renderer(tokenizer, "mine")
    return encode_split(examples, renderer, max_length=max_length, too_long=too_long, for_evaluation=for_evaluation)


def test_split_is_a_sequence_of_views() -> None:
    split = TokenizedSplit(
        np.arange(6, dtype=np.int32), np.array([0, 1, 0, 1, 1, 0], dtype=bool), np.array([0, 2, 5, 6], dtype=np.int64)
    )
    assert [example.input_ids.tolist() for example in split] == [[0, 1], [2, 3, 4], [5]]
    assert split[-1].input_ids.tolist() == [5]
    assert [example.is_target.tolist() for example in split[1:]] == [[False, True, True], [False]]
    assert split.lengths.tolist() == [2, 3, 1]
    assert split.num_targets.tolist() == [1, 2, 0]
    assert split.lengths.dtype == split.num_targets.dtype == np.int64
    assert np.shares_memory(split[1].input_ids, split.input_ids)
    with pytest.raises(IndexError):
        split[3]


def test_examples_are_stored_one_after_the_other(tokenizer: PreTrainedTokenizerFast) -> None:
    split = encode(tokenizer, [question("ab"), question("c")]).examples
    assert (split.input_ids.dtype, split.is_target.dtype, split.offsets.dtype) == (np.int32, np.bool_, np.int64)
    assert split.lengths.tolist() == [CONTEXT + 3, CONTEXT + 2]
    assert split[0].input_ids[split[0].is_target].tolist() == [*b"ab", 257]
    assert split[1].input_ids[split[1].is_target].tolist() == [*b"c", 257]


def test_first_token_of_a_text_has_nothing_to_be_predicted_from(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode(tokenizer, [Text("abc")]).examples[0]
    assert example.input_ids.tolist() == [*b"abc", 257]
    assert example.is_target.tolist() == [False, True, True, True]


def test_long_answer_is_cut_at_the_right(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode(tokenizer, [question("abcdef")], max_length=CONTEXT + 2).examples[0]
    assert len(example.input_ids) == CONTEXT + 2
    assert example.input_ids[example.is_target].tolist() == [*b"ab"]


@pytest.mark.parametrize("for_evaluation", [False, True])
def test_answer_that_is_cut_away_is_an_error_or_dropped(
    tokenizer: PreTrainedTokenizerFast, for_evaluation: bool
) -> None:
    long = Conversation((Message("user", "q" * 9), Message("assistant", "a")), location="train.jsonl:17")
    examples: list[Example] = [question("a"), long, question("b")]
    with pytest.raises(UserError) as caught:
        encode(tokenizer, examples, max_length=CONTEXT + 8, for_evaluation=for_evaluation)
    assert str(caught.value).startswith(
        f"Task 'mine': train.jsonl:17 has {CONTEXT + 10} tokens and its answer begins at token {CONTEXT + 9}, so "
        f"max_length={CONTEXT + 8} cuts the answer away."
    )
    kept = encode(tokenizer, examples, max_length=CONTEXT + 8, too_long="drop", for_evaluation=for_evaluation)
    assert kept.rows.tolist() == [0, 2]
    assert len(kept.examples) == 2
    assert len(encode(tokenizer, [long], max_length=CONTEXT + 9).examples) == 1  # one target token suffices


def test_evaluation_needs_the_last_answer_and_training_any(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (Message("user", "q"), Message("assistant", "a"), Message("user", "r"), Message("assistant", "b"))
    examples: list[Example] = [Conversation(turns)]
    assert len(encode(tokenizer, examples, max_length=CONTEXT + 2).examples) == 1
    assert not len(encode(tokenizer, examples, max_length=CONTEXT + 2, too_long="drop", for_evaluation=True).examples)


def test_options_are_encoded_for_the_kept_examples(tokenizer: PreTrainedTokenizerFast) -> None:
    long = Conversation((Message("user", "q" * 99), Message("assistant", "d")), ("d", "e"), "val.jsonl:2")
    examples = [question("a", options=("a", "é")), long, Text("x"), question("b", options=("b", "cc"))]
    encoded = encode(tokenizer, examples, too_long="drop", for_evaluation=True)
    offsets = encoded.option_offsets
    spans = [encoded.option_ids[begin:end].tolist() for begin, end in pairwise(offsets)]
    assert spans == [[*text.encode(), 257] for text in ("a", "é", "b", "cc")]
    assert encoded.prompt_lengths.tolist() == [CONTEXT, 0, CONTEXT]


@pytest.fixture
def splits(tokenizer: PreTrainedTokenizerFast) -> dict[str, EncodedSplit]:
    val = encode(tokenizer, [question("é", options=("é", "b"))], for_evaluation=True)
    return {"train": encode(tokenizer, [question("a"), Text("bc")]), "val": val}


def arrays(encoded: EncodedSplit) -> list[np.ndarray]:
    split = encoded.examples
    return [
        *(split.input_ids, split.is_target, split.offsets),
        *(encoded.rows, encoded.prompt_lengths, encoded.option_ids, encoded.option_offsets),
    ]


def test_saved_splits_load_bit_for_bit(tmp_path: Path, splits: dict[str, EncodedSplit]) -> None:
    path = tmp_path / "new" / "tokens.safetensors"
    assert load_encoded(path) is None
    save_encoded(path, splits)
    loaded = load_encoded(path)
    assert loaded is not None
    assert loaded.keys() == splits.keys()
    for name, encoded in splits.items():
        for saved, read in zip(arrays(encoded), arrays(loaded[name]), strict=True):
            assert saved.dtype == read.dtype
            assert np.array_equal(saved, read)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_any_damage_makes_the_file_invalid(tmp_path: Path, splits: dict[str, EncodedSplit]) -> None:
    path = tmp_path / "tokens.safetensors"
    save_encoded(path, splits)
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert load_encoded(path) is None, position
    for length in (0, 5, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert load_encoded(path) is None


def test_file_without_a_checksum_or_with_arrays_missing_is_invalid(
    tmp_path: Path, splits: dict[str, EncodedSplit]
) -> None:
    path = tmp_path / "tokens.safetensors"
    save_encoded(path, splits)
    save_file(load_file(path), path)
    assert load_encoded(path) is None


def test_unwritable_cache_is_one_line(tmp_path: Path, splits: dict[str, EncodedSplit]) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"^cache_dir: .* cannot be written to: .*writable folder\.$"):
        save_encoded(tmp_path / "file" / "tokens.safetensors", splits)
