"""``mtl chat``: a quick look at what a task's model says, in a terminal or over a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from mtl.errors import UserError
from mtl.evaluation.generation import stop_tokens
from mtl.handover.loading import LoadedModel
from mtl.handover.predicting import as_example, max_positions
from mtl.handover.rows import STAND_IN, PromptRow, tokenize
from mtl.tasks.formats import Conversation, Message
from mtl.tasks.rendering import Renderer

COMMANDS = "/reset forgets what was said, /task NAME switches to another task, /quit (or Ctrl-D) ends"


class Chat:
    """A conversation with the model of one task at a time.

    Args:
        loaded: The model.
        task: The task to begin with.
        max_new_tokens: Length limit of an answer [tokens].
        temperature: Of the sampling; 0 for the likeliest answer.
        say: Prints a line that is not the model's.
    """

    def __init__(
        self, loaded: LoadedModel, task: str, *, max_new_tokens: int, temperature: float, say: Callable[[str], None]
    ) -> None:
        self._loaded = loaded
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._say = say
        self.switch(task)

    def switch(self, task: str) -> None:
        """Goes on with another task, from the beginning."""
        self.task = task
        self.reset()

    def reset(self) -> None:
        """Forgets what was said, but for the task's system prompt."""
        prompt = self._loaded.deployment.tasks[self.task].task.system_prompt
        self._history = [] if prompt is None else [Message("system", prompt)]
        self._num_kept = len(self._history)

    def line(self, text: str) -> bool:
        """Does what a line asks for; false if that is to end."""
        command, _, argument = text.strip().partition(" ")
        match command:
            case "":
                return True
            case "/quit" | "/exit":
                return False
            case "/reset":
                self.reset()
            case "/task":
                try:
                    self.switch(self._loaded.deployment.named([argument.strip()])[0])
                except UserError as error:
                    self._say(str(error))
            case _ if command.startswith("/"):
                self._say(f"There is no {command}: {COMMANDS}.")
            case _:
                self._answer(text)
        return True

    def _answer(self, text: str) -> None:
        self._history.append(Message("user", text))
        with self._loaded.task(self.task):
            prompt_ids, stops = self._prompt()
            answer = self._generated(prompt_ids, stops)
        self._history.append(Message("assistant", answer or " "))

    def _prompt(self) -> tuple[list[int], list[int]]:
        """The tokens of the conversation as training renders it, without its oldest turns if these are too many."""
        renderer, limit = Renderer(self._loaded.tokenizer, self.task), max_positions(self._loaded)
        while True:
            turns = Conversation((*self._history, Message("assistant", STAND_IN)), location="this conversation")
            [tokens] = tokenize(renderer, [PromptRow(turns, None)])
            prompt_ids = list(tokens.prompt_ids)
            if limit is None or len(prompt_ids) + self._max_new_tokens <= limit:
                stops = stop_tokens(self._loaded.model, self._loaded.tokenizer, [as_example(tokens.answer_ids)])
                return prompt_ids, sorted(stops)
            if len(self._history) <= self._num_kept + 1:
                raise UserError(
                    f"The message has {len(prompt_ids)} tokens, and with an answer of {self._max_new_tokens} the model "
                    f"has only {limit} positions. Shorten it, or lower --max-new-tokens."
                )
            self._say("The conversation is longer than the model's positions; its oldest turn is left out.")
            del self._history[self._num_kept : self._num_kept + 2]

    def _generated(self, prompt_ids: list[int], stops: list[int]) -> str:
        from transformers import GenerationConfig, TextStreamer

        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        sampling = {"do_sample": True, "temperature": self._temperature} if self._temperature else {"do_sample": False}
        settings: Any = GenerationConfig(
            max_new_tokens=self._max_new_tokens, eos_token_id=stops, pad_token_id=stops[0] if stops else 0, **sampling
        )
        model.generation_config = settings  # the model's own would be merged into ours
        prompt = torch.tensor([prompt_ids], device=model.device)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        tokens = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, streamer=streamer
        )
        return str(tokenizer.decode(tokens[0, len(prompt_ids) :], skip_special_tokens=True))


def talk(chat: Chat) -> None:
    """Reads lines until the last, with a prompt and a history of lines on a terminal."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        import readline  # noqa: F401 - arrow keys in input()
    while True:
        try:
            text = input(f"{chat.task}> " if on_terminal else "")
        except (EOFError, KeyboardInterrupt):
            if on_terminal:
                print()
            return
        try:
            if not chat.line(text):
                return
        except KeyboardInterrupt:  # of an answer that goes on too long
            print()
