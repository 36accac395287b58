"""How a conversation becomes text and tokens, and which of the tokens are targets.

A rendered example is a list of pieces, context and target in turn. They are tokenized one by one, so that a token never
spans the border between prompt and answer and a generated answer continues exactly the tokens that training saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mtl.errors import UserError
from mtl.tasks.formats import Conversation, Example, Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_BATCH = 2048  # pieces; the tokenizer keeps offsets of a whole batch, some 100 bytes a token


class Piece(NamedTuple):
    """A stretch of rendered text; ``is_target`` says whether its tokens are trained on."""

    text: str
    is_target: bool


class Renderer:
    """Renders examples with a tokenizer's chat template.

    Every assistant turn is a target through its end-of-turn token. What the template writes after that token (a
    newline, usually) belongs to the next context, and to nothing at the very end. Targets are found by prefix: the text
    up to an answer must begin the text that includes it, which is checked. Where a template ends an answer with no
    special token, the tokenizer's end-of-sequence token is appended, or generation would never learn to stop.

    A tokenizer without a chat template (a base model's) gets the plain form: each message that is no answer followed by
    a newline, each answer by the end-of-sequence token, all after the beginning-of-sequence token if the tokenizer adds
    one by itself. A :class:`~mtl.tasks.formats.Text` is one target after that token.

    Args:
        tokenizer: A Hugging Face tokenizer.
        task_name: Names the task in messages.
    """

    tokenizer: PreTrainedTokenizerBase
    task_name: str

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task_name: str) -> None:
        self._tokenizer = tokenizer
        self.task_name = task_name
        # Some models list their end-of-turn token only here, marked special, and not among the named special tokens.
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special_tokens = tuple(added | set(tokenizer.all_special_tokens))
        adds_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._bos: str = tokenizer.bos_token if adds_bos else ""

    def pieces(self, example: Example) -> list[Piece]:
        """The example's text in order; the last piece is the last answer.

        Raises:
            UserError: If the template refuses the messages, or renders answers so that they cannot be told apart.
        """
        if isinstance(example, Text):
            return [Piece(self._bos, False), Piece(example.text + self._eos(), True)]
        pieces: list[Piece] = []
        done = ""  # the rendered text through the end of the answer before
        for number, message in enumerate(example.messages):
            if message.role != "assistant":
                continue
            before = self._render(example.messages[:number], example.location, ask=True)
            after = self._render(example.messages[: number + 1], example.location, ask=False)
            if not (after.startswith(before) and before.startswith(done)):
                raise UserError(
                    f"Task {self.task_name!r}: {example.location}: the tokenizer's chat template renders the messages "
                    f"before answer {number} differently once the answer follows, so that targets cannot be told from "
                    "prompts. Use another chat template, or rows with a single answer."
                )
            answer = after[len(before) :].rstrip()
            pieces.append(Piece(before[len(done) :], False))
            pieces.append(Piece(answer if answer.endswith(self._special_tokens) else answer + self._eos(), True))
            done = before + answer
        return pieces

    def answer_piece(self, conversation: Conversation, answer: str) -> Piece:
        """The last target as it would be with another answer, which its prompt does not depend on."""
        return self.pieces(conversation.with_answer(answer))[-1]

    def tokenize(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Token ids of each text by itself, with no special tokens added."""
        for start in range(0, len(texts), TOKENIZER_BATCH):
            batch = list(texts[start : start + TOKENIZER_BATCH])
            yield from self._tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]

    def _render(self, messages: Sequence[Message], location: str, *, ask: bool) -> str:
        if self._tokenizer.chat_template is None:
            ends = {"assistant": self._eos()}
            return self._bos + "".join(message.content + ends.get(message.role, "\n") for message in messages)
        from jinja2 import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [message._asdict() for message in messages], tokenize=False, add_generation_prompt=ask
                )
            )
        except TemplateError as error:
            raise UserError(
                f"Task {self.task_name!r}: {location}: the tokenizer's chat template refuses the messages ({error}). "
                f"Change the roles of the row, or remove tasks.{self.task_name}.system_prompt if it allows none."
            ) from None

    def _eos(self) -> str:
        if self._tokenizer.eos_token is None:
            raise UserError(
                f"Task {self.task_name!r}: the tokenizer has no end-of-sequence token to end an answer with. "
                "Set eos_token in its tokenizer_config.json."
            )
        return str(self._tokenizer.eos_token)
