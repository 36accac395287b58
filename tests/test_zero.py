"""DeepSpeed's ZeRO gives what plain training gives; needs DeepSpeed: make test-deepspeed."""

import importlib.util
import json
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "workers" / "zero.py"
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is an extra: make test-deepspeed"
)


@pytest.fixture
def run(launch):
    """Runs a module, which starts its processes itself."""
    return lambda *command, code=0: launch(1, "-m", *command, code=code, DS_ACCELERATOR="cpu")


@needs_deepspeed
def test_every_stage_is_plain_training(tmp_path, launch):
    """Stages 0 to 2 bit for bit, with a resumption too; stage 3 adds up in another order."""
    launch(2, WORKER, tmp_path / "report.json", DS_ACCELERATOR="cpu")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert len(report) == 2 * (3 * 4 - 1)
    for name, errors in report.items():
        assert not errors.pop("absent moved"), name
        limits = {"rows": 1e-6, "parameters": 1e-4, "moments": 1e-4} if "zero3" in name else dict.fromkeys(errors, 0.0)
        assert all(errors[key] <= limits[key] for key in limits), (name, errors)


@pytest.fixture
def arguments(tmp_path, monkeypatch, tiny_folder, make_task):
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    free = make_task("free", [{"prompt": f"say {i}", "completion": "xy" * (1 + i % 4)} for i in range(30)])
    label = make_task(
        "label", [{"prompt": f"{i} " * (1 + i % 5), "completion": ["red", "blue"][i % 2]} for i in range(24)]
    )
    return [
        *(f"model.name_or_path={tiny_folder}", "tasks=none", "launch=deepspeed", "launch.num_processes=2"),
        *(f"tasks.free.path={free}", "tasks.free.max_new_tokens=5", f"tasks.label.path={label}"),
        *("tasks.label.labels=[red,blue]", "tasks.label.test_size=1", "stages=joint_then_weak"),
        *("weighter=uncertainty", "surgery=pcgrad", "max_steps=3", "stages.weak.num_weakest=1", "batch_size=5"),
        *("learning_rate=0.01", "max_eval_examples=5", "max_test_examples=5", "eval_steps=1", "keep_last=9"),
    ]  # fmt: skip


def steps(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@needs_deepspeed
@pytest.mark.parametrize(
    ("sharding", "layout"), [("zero2", "full"), ("zero1", "shared_and_per_task"), ("zero3", "shared_and_per_task")]
)
def test_a_run_is_that_of_plain_processes(tmp_path, arguments, run, sharding, layout):
    given = [*arguments, f"adapters={layout}", *(() if layout == "full" else ("adapters.lora_dropout=0",))]
    run("mtl.train", *given, "launch.sharding=none", f"output_dir={tmp_path / 'plain'}")
    run("mtl.train", *given, f"launch.sharding={sharding}", f"output_dir={tmp_path / 'zero'}")
    plain, zero = tmp_path / "plain", tmp_path / "zero"
    if sharding == "zero3":
        for found, expected in zip(steps(zero), steps(plain), strict=True):
            for name, loss in expected.get("loss", {}).items():
                assert found["loss"][name] == pytest.approx(loss, rel=1e-3)
    else:
        assert (zero / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
        for file in (*plain.glob("checkpoints/*/tensors.safetensors"), *plain.glob("*/*/*.safetensors")):
            assert (zero / file.relative_to(plain)).read_bytes() == file.read_bytes(), file

    # From a checkpoint of the one the other goes on.
    whole = (zero / "metrics.jsonl").read_bytes()
    for later in zero.glob("checkpoints/step-00000[3-9]"):
        for file in later.iterdir():
            file.unlink()
        later.rmdir()
    (zero / "results.json").unlink()
    run("mtl.train", *given, f"launch.sharding={sharding}", f"output_dir={zero}", "resume_from_checkpoint=auto")
    assert (zero / "metrics.jsonl").read_bytes() == whole


@needs_deepspeed
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.sharding=zero3", "adapters=full"], "launch.sharding=zero3: shards what is frozen, and adapters=full"),
        (["launch.sharding=zero1", "adapters=per_task", "surgery=mean"], "this layout shares nothing"),
        (["launch.sharding=zero2", "model.dtype=float64"], "needs float32 or bfloat16 weights, not torch.float64"),
    ],
)
def test_what_it_can_not_do_is_refused(tmp_path, arguments, run, overrides, message):
    finished = run("mtl.train", *arguments, *overrides, f"output_dir={tmp_path / 'run'}", code=2)
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_without_deepspeed_the_remedy_is_named(tmp_path, arguments, run):
    finished = run("mtl.train", *arguments, f"output_dir={tmp_path / 'run'}", code=2)
    assert "pip install 'mtl-sft[deepspeed]'" in finished.stderr
    assert "Traceback" not in finished.stderr
