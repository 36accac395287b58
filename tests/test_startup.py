"""A start repeats no work of the one before and never meets a stale answer; help imports nothing."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from mtl import memo
from mtl.cli import main
from mtl.data import loading, sources
from mtl.data.loading import load_task, load_tasks
from mtl.evaluation import base_cache
from mtl.models import load
from mtl.models.load import ModelSettings, dequantized, fingerprint, load_fingerprinted
from mtl.tasks.task import Task

HEAVY = {"torch", "transformers", "datasets", "hydra", "omegaconf", "numpy", "peft", "accelerate"}
ROWS = [{"prompt": f"What is {n} plus one?", "completion": ("yes", "no")[n % 2]} for n in range(40)]


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Lets files that a test has just written count as settled; :func:`rewrite` waits for the clock's next tick."""
    monkeypatch.setattr(memo, "SETTLED_NS", 0)


@pytest.fixture
def forbid(monkeypatch):
    """Makes a function fail whoever calls it."""

    def forbid(module, *names):
        for name in names:

            def fail(*arguments, name=name, **options):
                raise AssertionError(f"{name} was called again")

            monkeypatch.setattr(module, name, fail)

    return forbid


@pytest.fixture
def read(tmp_path, tiny_tokenizer, make_task):
    path = make_task("mine", ROWS)

    def read(path=path, *, tokenizer=tiny_tokenizer, seed=0, max_length=200, **fields):
        cache = tmp_path / "cache"
        return load_task(
            Task("mine", str(path), **fields), tokenizer, max_length=max_length, seed=seed, cache_dir=cache
        )

    read.path = path
    return read


def rewrite(path, content):
    """Puts other content of the same size in a file and restores its mtime."""
    before = path.stat()
    assert len(content) == before.st_size
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        time.sleep(0.005)
        path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def tokens_of(example):
    return example.input_ids.tolist(), example.is_target.tolist()


def seen(data):
    """All that a run sees of a task's data."""
    evaluated = [
        (tokens_of(e.tokens), e.prompt, e.prompt_ids, e.reference, e.options, e.option_ids, e.location)
        for e in [*data.val, *data.test]
    ]
    train = [tokens_of(example) for example in data.train]
    return data.task, train, [*data.train_locations], evaluated, data.majority, data.num_dropped, data.fingerprint


@pytest.mark.parametrize(
    "arguments", [["--help"], [], ["--version"], ["train", "--help"], ["train", "x=1", "-h"], ["export", "-h"]]
)
def test_help_imports_nothing_heavy(arguments):
    script = (
        f"import sys; from mtl.cli import main; assert main({arguments!r}) == 0; print(*sys.modules, file=sys.stderr)"
    )
    start = time.perf_counter()
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 10
    assert not HEAVY & set(answer.stderr.split())
    assert answer.stdout


def test_help_is_the_same_through_the_module(capsys):
    from mtl import train

    assert main(["train", "--help"]) == train.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown[: len(shown) // 2] * 2 == shown


def test_a_warm_start_repeats_nothing(tmp_path, monkeypatch, tiny_folder, make_task, forbid):
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    paths = [make_task(name, ROWS) for name in ("one", "two")]
    run = [
        *("train", f"model.name_or_path={tiny_folder}", "tasks=none", "max_steps=1", "evals_per_stage=1"),
        *("max_eval_examples=2", "max_test_examples=2", "eval_scores=false", "early_stopping_patience=null"),
        *(f"tasks.{path.stem}.path={path}" for path in paths),
        *(f"tasks.{path.stem}.max_new_tokens=2" for path in paths),
    ]
    assert main([*run, "output_dir=cold"]) == 0
    forbid(loading, "read_splits", "parse_row", "encode_split", "Renderer")
    forbid(load, "fingerprint")
    forbid(base_cache, "evaluate")
    assert main([*run, "output_dir=warm"]) == 0
    cold, warm = (Path(folder, "metrics.jsonl").read_bytes() for folder in ("cold", "warm"))
    assert cold == warm


@pytest.mark.parametrize("fields", [{}, {"labels": ["no", "yes"]}, {"max_train_examples": 7}])
def test_untouched_data_are_not_read_again(read, forbid, fields):
    cold = seen(read(**fields))
    forbid(loading, "read_splits", "parse_row", "encode_split", "Renderer")
    assert seen(read(**fields)) == cold


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": f"text {n}"} for n in range(20)],
        [{"prompt": f"{n}?", "completion": "ä", "options": ["ä", f"b{n}", "c"][: 2 + n % 2]} for n in range(20)],
    ],
)
def test_other_formats_come_back_too(read, make_task, forbid, rows):
    path = make_task("other", rows)
    cold = seen(read(path))
    forbid(loading, "read_splits", "encode_split")
    assert seen(read(path)) == cold


def test_the_beginning_of_a_text_is_no_prompt(read, make_task, tiny_tokenizer):
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)])
    tokenizer = type(tiny_tokenizer)(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")
    path = make_task("texts", [{"text": f"text {n}"} for n in range(20)])
    for _ in range(2):
        example = read(path, tokenizer=tokenizer).val[0]
        assert (example.tokens.input_ids[0], example.prompt_ids) == (0, ())


def test_a_datasets_folder_is_not_read_again(read, tmp_path, forbid):
    folder = tmp_path / "saved"
    Dataset.from_list(ROWS).save_to_disk(folder)
    cold = seen(read(folder))
    [arrow] = folder.glob("*.arrow")
    content = arrow.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "read_splits", None)
        assert seen(read(folder)) == cold
    rewrite(arrow, content.replace(b"plus one", b"less one"))
    assert seen(read(folder)) != cold


def test_a_data_set_on_the_hub_is_read_every_time(read, monkeypatch):
    for word in ("plus", "less"):
        rows = [{**row, "prompt": row["prompt"].replace("plus", word)} for row in ROWS]
        monkeypatch.setattr(sources, "_load_from_hub", lambda task, rows=rows: {"train": Dataset.from_list(rows)})
        assert word in read("hub:some/name").val[0].prompt


def test_changed_data_are_read_again(read):
    cold = read()
    content = read.path.read_bytes()
    rewrite(read.path, content.replace(b"plus", b"less"))
    changed = read()
    assert changed.fingerprint != cold.fingerprint
    assert "less" in changed.val[0].prompt
    rewrite(read.path, content)
    assert seen(read()) == seen(cold)


def test_a_new_split_is_seen(read, tmp_path):
    folder = tmp_path / "splits"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(read.path.read_bytes())
    carved = read(folder)
    assert carved.val[0].location.startswith("train.jsonl:")
    (folder / "val.jsonl").write_bytes(read.path.read_bytes())
    assert read(folder).val[0].location == "val.jsonl:1"


def test_every_option_that_decides_the_data_has_an_answer_of_its_own(read, tiny_tokenizer):
    cold = seen(read())
    other = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    other.chat_template = "Hi\n" + tiny_tokenizer.chat_template
    changes = [
        {"seed": 1},
        {"max_length": 100},
        {"tokenizer": other},
        {"labels": ["no", "yes"]},
        {"labels": ["yes", "no"]},
        {"system_prompt": "Be brief."},
        {"val_size": 5},
        {"metric": "bleu"},
    ]
    found = [cold, *(seen(read(**change)) for change in changes)]
    assert all(one != other for number, one in enumerate(found) for other in found[:number])
    assert seen(read()) == cold


def test_lost_tokens_are_made_again(read, tmp_path):
    cold = seen(read())
    [tokens] = (tmp_path / "cache" / "tokens").iterdir()
    tokens.unlink()
    assert seen(read()) == cold
    assert tokens.exists()


def test_the_tokenizer_is_hashed_once_for_all_tasks(tmp_path, tiny_tokenizer, make_task, monkeypatch):
    path, hashed = make_task("mine", ROWS), []
    monkeypatch.setattr(loading, "_tokenizer_digest", lambda tokenizer: hashed.append(tokenizer) or "digest")
    tasks = [Task(name, str(path)) for name in ("a", "b", "c")]
    loaded = load_tasks(tasks, tiny_tokenizer, max_length=200, seed=0, cache_dir=tmp_path)
    assert ([data.task.name for data in loaded], len(hashed)) == (["a", "b", "c"], 1)


@pytest.fixture
def own_model(tmp_path, tiny_folder):
    """A copy of the tiny model that a test may change."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_untouched_weights_are_hashed_once(own_model, tmp_path, forbid):
    settings, cache = ModelSettings(str(own_model)), tmp_path / "cache"
    model, cold = load_fingerprinted(settings, cache)
    assert cold == fingerprint(model)
    forbid(load, "fingerprint")
    again, warm = load_fingerprinted(settings, cache)
    assert warm == cold
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_changed_weights_get_another_fingerprint(own_model, tmp_path):
    settings, cache = ModelSettings(str(own_model)), tmp_path / "cache"
    _, cold = load_fingerprinted(settings, cache)
    weights = own_model / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "changed", metadata={"format": "pt"})
    rewrite(weights, (tmp_path / "changed").read_bytes())
    model, changed = load_fingerprinted(settings, cache)
    assert changed == fingerprint(model) != cold


def test_a_changed_config_or_dtype_gets_another_fingerprint(own_model, tmp_path):
    cache = tmp_path / "cache"
    _, cold = load_fingerprinted(ModelSettings(str(own_model)), cache)
    _, half = load_fingerprinted(ModelSettings(str(own_model), dtype="bfloat16"), cache)
    config = own_model / "config.json"
    rewrite(config, config.read_bytes().replace(b'"num_attention_heads": 2', b'"num_attention_heads": 4'))
    found = config.read_bytes().replace(b'"head_dim": 8', b'"head_dim": 4')
    rewrite(config, found.replace(b'"num_key_value_heads": 1', b'"num_key_value_heads": 2'))
    _, changed = load_fingerprinted(ModelSettings(str(own_model)), cache)
    assert len({cold, half, changed}) == 3


def test_the_same_settings_on_another_device_get_another_fingerprint(own_model, tmp_path, monkeypatch):
    found = set()
    for dtype in (torch.float32, torch.bfloat16):  # what dtype=auto is without and with a GPU
        monkeypatch.setattr(ModelSettings, "torch_dtype", dtype)
        found.add(load_fingerprinted(ModelSettings(str(own_model)), tmp_path / "cache")[1])
    assert len(found) == 2


def test_code_that_comes_with_a_model_is_never_trusted(own_model, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(load, "fingerprint", lambda model: hashed.append(model) or "hash")
    for _ in range(2):
        load_fingerprinted(ModelSettings(str(own_model), trust_remote_code=True), tmp_path / "cache")
    assert len(hashed) == 2


def test_a_gguf_is_hashed_once_and_found_by_its_content(tmp_path, monkeypatch):
    gguf, cache, hashed = tmp_path / "tiny.gguf", tmp_path / "cache", []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: hashed.append(given) or digest(*given))
    folders = [cache / "models" / f"tiny-{hashlib.sha256(text).hexdigest()[:16]}" for text in (b"old", b"new")]
    for folder in folders:
        folder.mkdir(parents=True)
    gguf.write_bytes(b"old")
    assert [dequantized(gguf, cache) for _ in range(3)] == folders[:1] * 3
    assert len(hashed) == 1
    rewrite(gguf, b"new")
    assert dequantized(gguf, cache) == folders[1]
