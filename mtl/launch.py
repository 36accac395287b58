"""A run on several processes: starts them with accelerate, and says what became of them.

accelerate's launcher, an agent of torch elastic, runs within the process that composed the config: the ranks are its
children.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from mtl.errors import Stopped, UserError
from mtl.ranks import LAUNCHER, LOST, is_main

SHARDING_ARGUMENTS = {
    "none": ["--multi_gpu"],
    "fsdp2": ["--use_fsdp", "--fsdp_version=2"],
    # DeepSpeed's engine is made by the ranks: accelerate's would reduce gradients before the tasks are told apart.
    **{f"zero{stage}": ["--multi_gpu"] for stage in range(4)},
}
SAVE_SECONDS = 300  # that ranks have to end their step and save, once a signal has come
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # that the agent listens to


class RankFailed(Exception):
    """A rank has died, or met an error that is no mistake of the user's; all others were stopped."""


class JobFailed(Exception):
    """A job of a sweep has failed that ran elsewhere, under Slurm say: carries its exit code back to the sweep."""

    def __init__(self, code: int, folder: str) -> None:
        super().__init__(code, folder)
        self.code = code

    def __str__(self) -> str:
        printed = Path(self.args[1], ".submitit")  # under Slurm; others print to the terminal
        where = f" What the jobs printed is in {printed}." if printed.is_dir() else ""
        return f"A job failed with exit code {self.code}.{where}"


@dataclass(frozen=True)
class Launch:
    """How many processes do a run, and where; every field is a key of ``launch``.

    Args:
        num_processes: Over all machines; as many as there are GPUs if not given.
        num_machines: Each is given the same command, with its own ``machine_rank``.
        machine_rank: Of this machine, from 0.
        main_process_ip: Address of the machine of rank 0, where there are several.
        main_process_port: A free port there; any on one machine and 29500 on several if not given.
        cpu: Whether GPUs are left alone; only where there is none if not given.
        sharding: ``"none"``: each process holds the whole model; ``"fsdp2"``: a part of it; ``"zero0"`` to ``"zero3"``:
            DeepSpeed's stages.

    Raises:
        UserError: A value breaks a rule.
    """

    num_processes: int | None = 1
    num_machines: int = 1
    machine_rank: int | None = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None
    cpu: bool | None = None
    sharding: str = "none"

    def __post_init__(self) -> None:
        for field, least in (("num_processes", 1), ("num_machines", 1), ("machine_rank", 0), ("main_process_port", 1)):
            value = getattr(self, field)
            if isinstance(value, int) and value < least:
                self._refuse(field, f"must be at least {least}")
        if self.sharding not in SHARDING_ARGUMENTS:
            self._refuse("sharding", f"must be one of {', '.join(SHARDING_ARGUMENTS)}")

    def on(self, num_gpus: int, *, use_cpu: bool, output_dir: str | None) -> Launch:
        """The same with nothing left open, for a machine with ``num_gpus`` GPUs.

        Args:
            num_gpus: Of this machine.
            use_cpu: Whether the run leaves them alone.
            output_dir: Of the run, as the config has it.

        Raises:
            UserError: The values contradict each other, or this machine can't do it.
        """
        if self.cpu is False and use_cpu:
            self._refuse("cpu", "contradicts use_cpu=true. Set one of them")
        if self.cpu is False and num_gpus == 0:
            self._refuse("cpu", "must not be false without a GPU. Take launch=cpu")
        cpu = use_cpu or num_gpus == 0
        if self.num_processes is None and cpu:
            self._refuse("num_processes", "is for as many as there are GPUs, and none is used. Give a number")
        num_processes = self.num_processes or num_gpus * self.num_machines
        if num_processes % self.num_machines:
            self._refuse("num_processes", f"must be a multiple of launch.num_machines={self.num_machines}")
        if not cpu and num_processes // self.num_machines > num_gpus:
            self._refuse("num_processes", f"must not exceed the {num_gpus} GPUs of a machine. Or take launch.cpu=true")
        if self.sharding != "none" and num_processes == 1:
            self._refuse("sharding", "needs at least 2 processes. Set launch.num_processes")
        if self.num_machines > 1:
            if self.machine_rank is None or self.machine_rank >= self.num_machines:
                self._refuse("machine_rank", f"must be a number below launch.num_machines={self.num_machines}")
            if not self.main_process_ip:
                self._refuse("main_process_ip", "must be the address of the machine of rank 0")
            if not output_dir:
                self._refuse("num_machines", "needs an output_dir that all of them share. Set output_dir=<folder>")
        return replace(self, num_processes=num_processes, cpu=cpu)

    def arguments(self, *script: str) -> list[str]:
        """What ``accelerate launch`` is given for a module and its arguments, once nothing is open.

        All is spelled out, so that the machine's own accelerate config changes nothing.
        """
        import torch

        assert self.num_processes is not None
        port = self.main_process_port or (0 if self.num_machines == 1 else 29500)
        arguments = [
            *SHARDING_ARGUMENTS[self.sharding],
            f"--num_processes={self.num_processes}",
            f"--num_machines={self.num_machines}",
            f"--machine_rank={self.machine_rank or 0}",
            f"--main_process_port={port}",
            "--gpu_ids=all",
            "--mixed_precision=no",  # the ranks read mixed_precision from the config
            "--dynamo_backend=no",
        ]
        if self.main_process_ip:
            arguments.append(f"--main_process_ip={self.main_process_ip}")
        if "OMP_NUM_THREADS" not in os.environ:
            here = self.num_processes // self.num_machines
            arguments.append(f"--num_cpu_threads_per_process={max(1, torch.get_num_threads() // here)}")
        return [*arguments, "--module", *script]

    def environment(self) -> dict[str, str]:
        """What agent and ranks are told by variables."""
        from mtl.distributed import ZERO_STAGE  # needs torch, which takes its time

        zero = {ZERO_STAGE: self.sharding[-1]} if self.sharding.startswith("zero") else {}
        return {
            **zero,
            # accelerate launch --cpu would start a single process.
            "ACCELERATE_USE_CPU": str(self.cpu).lower(),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_SECONDS),
            LAUNCHER: str(os.getpid()),
        }

    def _refuse(self, field: str, rule: str) -> None:
        value = getattr(self, field)
        shown = json.dumps(value) if value is None or isinstance(value, bool) else value
        raise UserError(f"launch.{field}={shown}: {rule}.")


def run_processes(launch: Launch, config: str, output_dir: Path, *, debug: bool) -> None:
    """Runs ``mtl train`` on several processes.

    Args:
        launch: With nothing left open.
        config: Of the run, as YAML.
        output_dir: That it names.
        debug: Whether agent and ranks show all they have to say.

    Raises:
        UserError: What the ranks reported.
        RankFailed: Names the rank that ended the run, and its error.
        Stopped: By a signal.
    """
    with tempfile.TemporaryDirectory(prefix="mtl-") as private:
        file = Path(private) / "config.yaml"
        file.write_text(config, encoding="utf-8")
        script = ["mtl.train", "--config", str(file), *(["--debug"] if debug else [])]
        try:
            with agent_settings(launch, quiet=not debug):
                run_agent([f"--log_dir={private}", *launch.arguments(*script)])
        except RankFailed as error:
            saved = any(output_dir.glob("checkpoints/step-*"))
            remedy = f" Go on with output_dir={output_dir} resume_from_checkpoint=auto." if saved else ""
            raise RankFailed(f"{error}{remedy}") from None


def run_agent(arguments: Sequence[str]) -> None:
    """Runs accelerate's launcher in this process, and turns what it raises into ours."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from mtl.distributed import lost_connection

    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        raise_cause(error.failures)
    except SignalException as error:
        raise Stopped(error.sigval, f"Stopped by {error.sigval.name}.") from None
    except (ConnectionError, RuntimeError) as error:
        if not isinstance(error, ConnectionError) and not lost_connection(error):
            raise
        raise UserError(f"launch.main_process_port: the processes can't find each other: {error}") from error


@contextmanager
def agent_settings(launch: Launch, *, quiet: bool) -> Iterator[None]:
    """Sets up this process for an agent, and puts back what that changes: environment, signal handlers, log."""
    from accelerate.utils import patch_environment

    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS} if in_main_thread else {}
    disabled = logging.root.manager.disable
    if quiet:
        logging.disable(logging.ERROR)  # what the agent has to say, we say
    try:
        with patch_environment(**launch.environment()):
            yield
    finally:
        logging.disable(disabled)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def raise_cause(failures: Mapping[int, Any]) -> None:
    """Raises what ended the run, given torch's ``ProcessFailure`` of each rank that failed, in order of discovery.

    Failures that follow from another come last: of ranks that the agent stopped, or whose peer was gone.

    Raises:
        UserError: A rank reported a mistake.
        Stopped: A signal had ended the run.
        RankFailed: Anything else.
    """

    def follows(failure: Any) -> bool:  # noqa: ANN401
        return failure.exitcode == -signal.SIGTERM or bool(reported(failure).get(LOST))

    rank, failure = min(failures.items(), key=lambda item: (follows(item[1]), item[1].timestamp))
    code, report = failure.exitcode, reported(failure)
    stopped = {number for number in SIGNALS if code in (-number, 128 + number)}
    if stopped:
        raise Stopped(stopped.pop(), f"Rank {rank} was stopped.")
    if code == 2 and report:
        raise UserError(report["message"])
    if code < 0:
        what = f"was killed by {failure.signal_name()}"
        if code == -signal.SIGKILL:
            what += " (as the system does when memory runs out)"
    elif report:
        print(report["py_callstack"], file=sys.stderr, flush=True)
        what = f"{'lost its connection to another' if report.get(LOST) else 'failed'}: {report['message']}"
    else:
        what = f"ended with exit code {code}"
    raise RankFailed(f"rank {rank} {what}; the other processes were stopped.")


def reported(failure: Any) -> dict[str, Any]:  # noqa: ANN401
    """What a rank has said about its end; empty if it was killed before it could."""
    if not isinstance(failure.message, dict):
        return {}
    return {"message": failure.message["message"], **failure.message["extraInfo"]}


@contextmanager
def new_folder(wanted: Path) -> Iterator[Path]:
    """A folder that no other process gets: ``wanted``, or with -2, -3, ... where that is taken.

    It goes again if nothing was put there. Other ranks than the first make none; they are told.

    Raises:
        UserError: It can't be made.
    """
    if not is_main():
        yield wanted
        return
    for number in count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True)
            break
        except OSError as error:
            if not folder.exists():
                raise UserError(f"{folder} can't be made: {error.strerror}. Set output_dir=<folder>.") from error
    try:
        yield folder
    finally:
        with suppress(OSError):  # not empty
            for made in (folder, *folder.parents):
                made.rmdir()
