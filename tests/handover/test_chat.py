"""The chat over a pipe: what it sends to the model is what training would render."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture
def chat(trained, monkeypatch, mtl):
    """Sends lines to ``mtl chat`` and gives what it printed, and the prompts that the model got."""

    def run(*lines, options=("--max-new-tokens", "5"), layout="shared_and_per_task", task="sums"):
        from transformers import LlamaForCausalLM

        sent, generate = [], LlamaForCausalLM.generate

        def recorded(self, **arguments):
            sent.append(arguments["input_ids"][0].tolist())
            return generate(self, **arguments)

        monkeypatch.setattr(LlamaForCausalLM, "generate", recorded)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        shown = mtl("chat", trained(layout).folder, "--task", task, *options)
        return shown, sent

    return run


def test_an_answer_is_the_one_that_plain_generation_gives(chat, trained, tiny_folder, tiny_tokenizer):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shown, [prompt] = chat("3 + 4?")
    run = trained("shared_and_per_task")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder), run.folder / "adapters" / "sums"
    )
    rendered = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "3 + 4?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert rendered[0].tolist() == prompt
    answer = model.generate(input_ids=rendered, max_new_tokens=5, do_sample=False, eos_token_id=1, pad_token_id=1)
    assert shown == tiny_tokenizer.decode(answer[0, len(prompt) :], skip_special_tokens=True) + "\n"


def test_history_reset_and_other_tasks(chat, tiny_tokenizer):
    _, sent = chat("one", "two", "/reset", "three", "/task colours", "four", "/quit", "never")
    texts = [tiny_tokenizer.decode(tokens) for tokens in sent]
    assert len(texts) == 4
    assert "one" in texts[1] and texts[1].index("one") < texts[1].index("two")
    assert "one" not in texts[2]
    assert texts[3].startswith("<|im_start|>system\nAnswer briefly.<|im_end|>")
    assert "three" not in texts[3]


def test_tasks_answer_differently(chat):
    options = ("--max-new-tokens", "20")
    answers = [chat("Is colour 3 warm?", task=task, options=options)[0] for task in ("sums", "picks")]
    assert answers[0] != answers[1]
    lines = ("Is colour 3 warm?", "/task picks", "Is colour 3 warm?")
    assert chat(*lines, task="sums", options=options)[0] == answers[0] + answers[1]


def test_sampling_draws(chat):
    torch.manual_seed(0)
    options = ("--temperature", "2", "--max-new-tokens", "20")
    assert chat("x", options=options)[0] != chat("x", options=options)[0]


def test_mistakes_do_not_end_it(trained, monkeypatch, capsys):
    from mtl.cli import main

    monkeypatch.setattr(sys, "stdin", io.StringIO("/task sumz\n/help\n\nhi\n"))
    assert main(["chat", str(trained("per_task").folder), "--task", "sums", "--max-new-tokens", "3"]) == 0
    shown = capsys.readouterr()
    assert "Did you mean sums?" in shown.err
    assert "There is no /help" in shown.err


def test_a_long_conversation_loses_its_oldest_turns(chat, tiny_tokenizer):
    _, sent = chat("first " * 30, "second " * 30, "third", options=("--max-new-tokens", "100"))
    assert "first" in tiny_tokenizer.decode(sent[0])
    assert "first" not in tiny_tokenizer.decode(sent[-1])
    assert all(len(tokens) + 100 <= 512 for tokens in sent)


@pytest.mark.slow
def test_the_whole_command_reads_a_pipe(trained, handover_cache):
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "mtl.cli",
            "chat",
            str(trained("full").folder),
            "--task",
            "sums",
            "--max-new-tokens",
            "4",
        ],
        input="3 + 4?\n/quit\n",
        env={**os.environ, "MTL_CACHE": str(handover_cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.endswith("\n")
    assert not finished.stderr
