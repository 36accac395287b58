"""Every file of conf/launch gives a command that accelerate understands as it is meant; Slurm's runs its jobs."""

import json
import os
import subprocess
import sys

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from mtl.composition import composed, config_dir
from mtl.construct import build
from mtl.errors import UserError
from mtl.launch import Launch

FILES = sorted(file.stem for file in (config_dir() / "launch").glob("*.yaml"))
GIVEN = {"multi_node": {"machine_rank": 1, "main_process_ip": "10.0.0.1"}}


def launch_of(name, num_gpus):
    config = composed([f"launch={name}"])
    values = dict(config.launch) | GIVEN.get(name, {})
    return build(Launch, "launch", values).on(num_gpus, use_cpu=False, output_dir="shared")


@pytest.mark.parametrize(
    ("name", "num_processes", "num_machines", "cpu", "fsdp"),
    [
        ("single", 1, 1, False, False),
        ("cpu", 2, 1, True, False),
        ("gpus", 4, 1, False, False),
        ("fsdp2", 4, 1, False, True),
        ("deepspeed", 4, 1, False, False),
        ("multi_node", 8, 2, False, False),
        ("slurm", 4, 1, False, False),
        ("joblib", 1, 1, False, False),
    ],
)
def test_accelerate_understands_it(monkeypatch, name, num_processes, num_machines, cpu, fsdp):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    launch = launch_of(name, num_gpus=4)
    if cpu:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        launch = build(Launch, "launch", dict(composed([f"launch={name}"]).launch)).on(4, use_cpu=True, output_dir=None)
    if num_processes == 1:
        assert launch.num_processes == 1
        return  # runs in the process that has the config
    args = launch_command_parser().parse_args(launch.arguments("mtl.train", "--config", "file"))
    args, _, _ = _validate_launch_command(args)
    assert (args.num_processes, args.num_machines) == (num_processes, num_machines)
    assert launch.cpu == cpu
    assert launch.environment().get("MTL_ZERO_STAGE") == ("3" if name == "deepspeed" else None)
    assert launch.environment()["ACCELERATE_USE_CPU"] == str(cpu).lower()
    assert bool(args.use_fsdp) == fsdp
    assert args.multi_gpu or args.use_fsdp
    if fsdp:
        assert int(args.fsdp_version) == 2
    assert (args.module, args.training_script) == (True, "mtl.train")
    assert args.training_script_args == ["--config", "file"]
    if num_machines > 1:
        assert (args.machine_rank, args.main_process_ip, args.main_process_port) == (1, "10.0.0.1", 29500)


def test_every_file_is_tested():
    [mark] = [mark for mark in test_accelerate_understands_it.pytestmark if mark.name == "parametrize"]
    assert [row[0] for row in sorted(mark.args[1])] == FILES


@pytest.mark.parametrize(
    ("name", "num_gpus", "message"),
    [
        ("gpus", 0, "launch.cpu=false: must not be false without a GPU"),
        ("fsdp2", 0, "launch.num_processes=null: is for as many as there are GPUs, and none is used"),
        ("fsdp2", 1, "launch.sharding=fsdp2: needs at least 2 processes"),
    ],
)
def test_what_a_machine_can_not_do_is_refused(name, num_gpus, message):
    with pytest.raises(UserError, match=message):
        launch_of(name, num_gpus)


FAKE_SLURM = """\
#!{python}
# Enough of Slurm for submitit: jobs run at once, in the background of this machine.
import os, re, subprocess, sys
from pathlib import Path

name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
if name == "sbatch":
    script = Path(arguments[-1])
    flags = dict(re.findall("#SBATCH --([a-z-]+)=(.*)", script.read_text()))
    Path(script.parent, "flags.txt").write_text(repr(flags))
    first, last = re.match("([0-9]+)-([0-9]+)", flags["array"]).groups()
    for index in range(int(first), int(last) + 1):
        job = {{"SLURM_JOB_ID": str(78 + index), "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(index)}}
        place = {{"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "1"}}
        ranks = {{"SLURM_CLUSTER_NAME": "x", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}}
        with open(script.parent / f"job{{index}}.txt", "w") as text:
            subprocess.Popen(["bash", script], env=os.environ | job | place | ranks, stdout=text, stderr=text)
    print("Submitted batch job 77")
elif name == "srun":
    while arguments[0].startswith("-"):
        arguments = arguments[2 if arguments[0] in ("--output", "--error") else 1 :]
    os.execvp(arguments[0], arguments)
elif name == "sacct":
    print("JobID|State|NodeList", *(f"77_{{index}}|RUNNING|here" for index in range(2)), sep=chr(10))
elif name == "scontrol":
    print("here")
"""


def test_slurm_runs_every_job_and_reports_a_failure(tmp_path, tiny_folder, make_task):
    """Each job of the sweep starts two processes itself; the second has a task without a file."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun", "sacct", "scontrol", "scancel"):
        (tmp_path / "bin" / name).write_text(FAKE_SLURM.format(python=sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    good, other = (
        make_task(name, [{"prompt": f"{name} {i}", "completion": "ab"} for i in range(20)]) for name in ("a", "b")
    )
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "mtl.train", "-m", "launch=slurm", "launch.num_processes=2"),
            *(f"model.name_or_path={tiny_folder}", "tasks=none", "max_steps=1", f"tasks.b.path={other}"),
            *("batch_size=2", "eval_scores=false", "max_eval_examples=2", "max_test_examples=2"),
            *(f"tasks.a.path={good},missing.jsonl", "hydra.sweep.dir=sweep"),
        ],
        env={
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(config_dir().parent),
            "MTL_CACHE": str(tmp_path / "cache"),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 2, finished.stdout + finished.stderr
    assert "A job failed with exit code 2" in finished.stderr
    [results] = (tmp_path / "sweep").rglob("results.json")
    assert json.loads(results.read_text(encoding="utf-8"))["cost"]["steps"] == 1
    [flags] = (tmp_path / "sweep" / ".submitit").rglob("flags.txt")
    assert "'gpus-per-node': '1'" in flags.read_text(encoding="utf-8")
