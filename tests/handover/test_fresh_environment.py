"""An export in an environment of its own that has transformers and peft, and no mtl."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
LOGITS = """
import importlib.util, sys
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

assert importlib.util.find_spec("mtl") is None
base, exports, expected = sys.argv[1:]
logits = load_file(f"{expected}/logits.safetensors")
with torch.no_grad():
    for name in ("colours", "sums", "picks"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, f"{exports}/adapter/{name}").eval()
        found = model(input_ids=logits["prompts"], use_cache=False).logits
        torch.testing.assert_close(found, logits[name], rtol=0, atol=1e-5)
        model = AutoModelForCausalLM.from_pretrained(f"{exports}/merged/{name}").eval()
        found = model(input_ids=logits["prompts"], use_cache=False).logits
        torch.testing.assert_close(found, logits[name], rtol=0, atol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, f"{exports}/adapter/colours", adapter_name="colours").eval()
    for name in ("sums", "picks"):
        model.load_adapter(f"{exports}/adapter/{name}", adapter_name=name)
    names = [("colours", "sums", "picks")[row % 3] for row in range(len(logits["prompts"]))]
    found = model(input_ids=logits["prompts"], use_cache=False, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], logits[name][row], rtol=0, atol=1e-5)
print("all the same")
"""


@pytest.mark.slow
def test_exports_need_transformers_and_peft_only(trained, mtl, tiny_folder, prompts, tmp_path):
    run = trained("shared_and_per_task")
    for kind in ("adapter", "merged"):
        mtl("export", run.folder, "--all", "--format", kind, "--output", tmp_path / "exports" / kind)
    save_file({**run.logits, "prompts": prompts}, tmp_path / "logits.safetensors")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q", "-c", ROOT / "constraints.txt"]
    subprocess.run(
        [*map(str, install), f"torch=={torch.__version__.split('+')[0]}", "transformers", "peft"], check=True
    )
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run_there(code, *arguments, cwd=tmp_path):
        command = [str(python), "-c", code, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)

    finished = run_there(LOGITS, tiny_folder, tmp_path / "exports", tmp_path)
    assert finished.stdout == "all the same\n", finished.stderr
    for kind in ("adapter", "merged"):  # what the card says
        folder = tmp_path / "exports" / kind / "sums"
        [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        finished = run_there(code, cwd=folder)
        assert finished.returncode == 0, finished.stderr
    packages = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    assert not {"mtl-sft", "hydra-core", "datasets"} & {item["name"] for item in json.loads(packages.stdout)}
