"""Starting a job, in this process or in several, and telling what went wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf.errors import OmegaConfBaseException

from mtl import ranks
from mtl.composition import explained
from mtl.construct import build
from mtl.errors import Stopped, UserError
from mtl.launch import Launch, RankFailed, run_processes
from mtl.overrides import unescape

if TYPE_CHECKING:
    from mtl.settings import Settings


@dataclass(frozen=True)
class Ending:
    """How a job has ended: its exit code (0, 1 for a failure, 2 for a mistake, 128 + a signal), and why."""

    code: int = 0
    reason: str = ""


def run(settings: Settings, output_dir: str | None, *, debug: bool) -> Ending:
    """Runs a job; a mistake is reported and becomes the exit code. ``output_dir`` is what the config says."""
    try:
        execute(settings, output_dir, debug=debug)
    except Stopped as stopped:
        return Ending(stopped.exit_code, str(stopped))
    except RankFailed as error:
        return Ending(1, report(error, debug=False))
    except (UserError, OmegaConfBaseException) as error:
        return Ending(2, report(error, debug=debug))
    return Ending()


def execute(settings: Settings, output_dir: str | None, *, debug: bool) -> None:
    """Does the job in this process, or in those that ``launch`` asks for."""
    import torch  # which takes its time

    from mtl.distributed import forget_accelerator
    from mtl.job import run_job
    from mtl.prepare import config_text

    if not ranks.is_rank():
        launch = build(Launch, "launch", settings.config["launch"]).on(
            torch.cuda.device_count(), use_cpu=settings.options.use_cpu, output_dir=output_dir
        )
        if launch.num_processes != 1:
            config = {**settings.config, "resume_from_checkpoint": settings.resume_from_checkpoint}
            run_processes(launch, config_text(config), settings.output_dir, debug=debug)
            return
    try:
        run_job(settings)
    finally:
        forget_accelerator()


def report(error: Exception, *, debug: bool) -> str:
    """Prints a mistake as one line, once for all processes, and returns the line."""
    line: str = unescape(" ".join(explained(error).split()))
    ranks.report(error, line, debug=debug)
    return line
