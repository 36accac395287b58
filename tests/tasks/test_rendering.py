"""Rendered tokens and targets, against lists written by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import pytest
from transformers import PreTrainedTokenizerFast

from mtl.errors import UserError
from mtl.tasks.formats import Conversation, Message, Text
from mtl.tasks.rendering import TOKENIZER_BATCH, Piece, Renderer

Ids = Callable[[str], list[int]]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def conversation(*turns: str) -> Conversation:
    roles = {"S": "system", "U": "user", "A": "assistant"}
    return Conversation(tuple(Message(roles[turn[0]], turn[1:]) for turn in turns), location="train.jsonl:17")


def tokens_and_targets(renderer: Renderer, example: Conversation | Text) -> tuple[list[int], list[bool]]:
    pieces = renderer.pieces(example)
    ids = list(renderer.tokenize([piece.text for piece in pieces]))
    is_target = [[piece.is_target] * len(piece_ids) for piece, piece_ids in zip(pieces, ids, strict=True)]
    return list(chain.from_iterable(ids)), list(chain.from_iterable(is_target))


def test_answer_through_its_end_of_turn_token_is_the_target(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, is_target = tokens_and_targets(Renderer(tokenizer, "mine"), conversation("Uhi", "Aok"))
    assert tokens == [
        *(256, *b"user\n", *b"hi", 257, *b"\n"),
        *(256, *b"assistant\n"),
        *(*b"ok", 257),
    ]
    assert is_target == [False] * 21 + [True] * 3


def test_every_assistant_turn_is_a_target_and_the_newline_after_it_is_context(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    pieces = Renderer(tokenizer, "mine").pieces(conversation("Sbe", "U1", "A2", "U3", "A4\n"))
    assert pieces == [
        Piece("<s>system\nbe<e>\n<s>user\n1<e>\n<s>assistant\n", False),
        Piece("2<e>", True),
        Piece("\n<s>user\n3<e>\n<s>assistant\n", False),
        Piece("4\n<e>", True),
    ]


@pytest.mark.parametrize(
    "text", ["naïve café", "情感分析很好。", "🙂‍↔️👩‍👩‍👧", "e\N{COMBINING ACUTE ACCENT}", "a  b\t\u2028c"]
)
def test_any_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast, ids: Ids, text: str) -> None:
    tokens, is_target = tokens_and_targets(Renderer(tokenizer, "mine"), conversation("U" + text, "A" + text))
    assert tokens == ids(f"<s>user\n{text}<e>\n<s>assistant\n{text}<e>")
    answer = [token for token, target in zip(tokens, is_target, strict=True) if target]
    assert tokenizer.decode(answer) == text + "<e>"


def test_default_system_prompt_of_the_template_stays(make_tokenizer: MakeTokenizer) -> None:
    template = (
        "{% if messages[0].role != 'system' %}{{ '<s>system\nkind<e>\n' }}{% endif %}{% for m in messages %}"
        "{{ '<s>' + m.role + '\n' + m.content + '<e>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
    )
    renderer = Renderer(make_tokenizer(template), "mine")
    assert renderer.pieces(conversation("Uhi", "Aok"))[0].text.startswith("<s>system\nkind<e>\n<s>user")
    assert renderer.pieces(conversation("Sbe", "Uhi", "Aok"))[0].text.startswith("<s>system\nbe<e>\n<s>user")


def test_template_without_end_of_turn_token_gets_eos_after_each_answer(make_tokenizer: MakeTokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    pieces = Renderer(make_tokenizer(template), "mine").pieces(conversation("U1", "A2", "U3", "A4"))
    assert pieces == [
        Piece("user: 1\nassistant:", False),
        Piece(" 2<e>", True),
        Piece("\nuser: 3\nassistant:", False),
        Piece(" 4<e>", True),
    ]


def test_end_of_turn_token_that_is_only_marked_special_counts(make_tokenizer: MakeTokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content + '<turn>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    tokenizer.backend_tokenizer.add_special_tokens(["<turn>"])
    assert "<turn>" not in tokenizer.all_special_tokens
    assert Renderer(tokenizer, "mine").pieces(conversation("U1", "A2"))[-1] == Piece("2<turn>", True)


def test_template_that_changes_the_prompt_once_the_answer_follows_is_refused(make_tokenizer: MakeTokenizer) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"^Task 'mine': train.jsonl:17: the tokenizer's chat template renders"):
        Renderer(make_tokenizer(template), "mine").pieces(conversation("U1", "A2"))


def test_template_that_changes_earlier_answers_is_refused(make_tokenizer: MakeTokenizer) -> None:
    template = (  # as templates do that drop the thoughts of earlier turns
        "{% for m in messages %}{{ m.role + ':' + ('' if m.role == 'assistant' and not loop.last else m.content) }}"
        "{{ '<e>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    renderer = Renderer(make_tokenizer(template), "mine")
    renderer.pieces(conversation("U1", "A2"))
    with pytest.raises(UserError, match=r"rows with a single answer\.$"):
        renderer.pieces(conversation("U1", "A2", "U3", "A4"))


def test_template_that_refuses_a_role_gives_its_reason(make_tokenizer: MakeTokenizer) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(UserError, match=r"^Task 'mine': train.jsonl:17: .*System role not supported"):
        Renderer(make_tokenizer(template), "mine").pieces(conversation("Sbe", "U1", "A2"))


@pytest.mark.parametrize(("adds_bos", "bos"), [(False, ""), (True, "<s>")])
def test_without_a_chat_template(make_tokenizer: MakeTokenizer, adds_bos: bool, bos: str) -> None:
    pieces = Renderer(make_tokenizer(None, adds_bos=adds_bos), "mine").pieces(
        conversation("Sbe", "U1", "A2", "U3", "A4")
    )
    assert pieces == [Piece(f"{bos}be\n1\n", False), Piece("2<e>", True), Piece("3\n", False), Piece("4<e>", True)]


@pytest.mark.parametrize(("adds_bos", "bos"), [(False, ""), (True, "<s>")])
def test_text_is_a_target_as_a_whole(make_tokenizer: MakeTokenizer, adds_bos: bool, bos: str) -> None:
    renderer = Renderer(make_tokenizer(adds_bos=adds_bos), "mine")
    assert renderer.pieces(Text("Once 🙂")) == [Piece(bos, False), Piece("Once 🙂<e>", True)]
    tokens, is_target = tokens_and_targets(renderer, Text("ab"))
    assert tokens == [256] * adds_bos + [*b"ab", 257]
    assert is_target == [False] * adds_bos + [True] * 3


def test_tokenizer_without_eos_is_refused(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        Renderer(tokenizer, "mine").pieces(Text("x"))


def test_options_are_rendered_as_the_training_answer_is(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer, "mine")
    example = conversation("U1", "A2", "U3", "Ayes")
    assert renderer.answer_piece(example, "yes") == renderer.pieces(example)[-1] == Piece("yes<e>", True)
    assert renderer.answer_piece(example, "no") == Piece("no<e>", True)


def test_tokenizing_in_batches_keeps_the_order(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [str(number) for number in range(TOKENIZER_BATCH + 3)]
    assert list(Renderer(tokenizer, "mine").tokenize(texts)) == [list(text.encode()) for text in texts]
