"""From settings to a run that is ready: data, model, layout, checkpoint, reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from torch import Tensor

from mtl.checkpoint import Checkpoint, discard_after
from mtl.data.cursors import TaskCursors
from mtl.data.loading import TaskData, load_tasks
from mtl.distributed import Distributed, shard_like
from mtl.errors import UserError
from mtl.gradients import Backward, routing_is_exact
from mtl.interrupt import StopSignal
from mtl.loss_scale import LossScale
from mtl.models.forward import packing_is_exact
from mtl.models.load import load_fingerprinted, load_tokenizer
from mtl.reporting.json_files import write_atomically
from mtl.reporting.run_log import RunLog
from mtl.resume import (
    check_identity,
    environment_of,
    environment_warnings,
    find_checkpoint,
    find_origin,
    first_new_stage,
    identity_of,
    open_output,
)
from mtl.run import Run, RunState, StageParts
from mtl.settings import Settings
from mtl.stage_parts import check_stages, make_parts
from mtl.stages import Stage
from mtl.step import needs_rows
from mtl.surgery import GramianSurgery, Mean
from mtl.zero import shard_frozen

Answer = TypeVar("Answer")
SPLIT_SEED = 0  # not the run's: runs of all seeds are tested on the same examples, and tokenized once


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to begin, or to take a checkpoint's state, and the hash of its base model.

    ``origin`` is the end of another run that it begins with.
    """

    run: Run
    checkpoint: Checkpoint | None
    origin: Checkpoint | None
    model_fingerprint: str


def prepare(settings: Settings, distributed: Distributed, stop: StopSignal) -> Prepared:
    """Loads data, model and checkpoint, and puts the parts together; writes nothing before all of it is found good."""
    options = settings.options
    output_dir = Path(distributed.broadcast_object(str(settings.output_dir)))
    on_main_first(distributed, lambda: open_output(settings, output_dir))
    tokenizer = on_main_first(distributed, lambda: load_tokenizer(settings.model, settings.cache_dir))
    data = on_main_first(distributed, lambda: load_data(settings, tokenizer))
    loaded, model_fingerprint = on_main_first(
        distributed, lambda: load_fingerprinted(settings.model, settings.cache_dir)
    )
    layout = settings.factories.layout(loaded, [item.task.name for item in data])
    check_stages(settings.stages, options, layout, len(data), distributed)
    identity = identity_of(settings, layout, data, model_fingerprint)
    model = distributed.place(loaded, layout.parameters())
    if distributed.zero_stage == 3:
        shard_frozen(model, layout, distributed)
    distributed.broadcast_(parameter.data for parameter in layout.parameters())
    packing = options.packing and packing_is_exact(model)
    backward = Backward(
        model, layout, distributed, max_tokens=options.micro_batch_tokens, packing=packing, seed=options.seed
    )
    can_route = backward.routes
    backward.routes = can_route and routing_is_exact(backward, len(data))
    check_rows(settings, backward, len(data))
    environment = environment_of(options, distributed, backward.dtype)
    checkpoint, warnings = open_checkpoint(settings, output_dir, distributed, identity, environment)
    origin = None
    if settings.resume_from is not None and checkpoint is None:
        origin = on_main_first(distributed, lambda: find_origin(settings, identity))
    if options.packing and not packing:
        warnings.append("this model lets packed examples see each other; packing is switched off")
    if can_route and not backward.routes:
        warnings.append(
            "this model cannot hold several tasks in one forward; each has forwards of its own, which are slower"
        )
    log = open_log(settings, output_dir, data, checkpoint, warnings) if distributed.is_main else None
    run = Run(
        options=options,
        stages=settings.stages,
        factories=settings.factories,
        output_dir=output_dir,
        distributed=distributed,
        model=model,
        tokenizer=tokenizer,
        layout=layout,
        data=data,
        cursors=TaskCursors([len(item.train) for item in data], options.seed),
        backward=backward,
        identity=identity,
        environment=environment,
        loss_scale=LossScale(enabled=distributed.accelerator.mixed_precision == "fp16"),
        stop=stop,
        state=RunState(num_tasks=len(data)),
        log=log,
        references_T=[settings.references.get(item.task.name) for item in data],
    )
    return Prepared(run, checkpoint, origin, model_fingerprint)


def open_checkpoint(
    settings: Settings,
    output_dir: Path,
    distributed: Distributed,
    identity: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, and what there is to warn of.

    Raises:
        UserError: There is none where one was asked for, it is damaged, or it does not fit the run.
    """
    resume = settings.resume_from_checkpoint
    checkpoint, damaged = on_main_first(distributed, lambda: find_checkpoint(resume, output_dir))
    steps = distributed.gather(None if checkpoint is None else checkpoint.step)
    if len(set(steps)) > 1:
        raise UserError(
            f"resume_from_checkpoint={resume}: the processes find checkpoints of different steps, {steps}. Give a "
            "folder that all machines share."
        )
    if checkpoint is None:
        return None, damaged
    changed = check_identity(
        checkpoint.state["identity"], identity, allow_config_change=settings.options.allow_config_change
    )
    return checkpoint, [*damaged, *changed, *environment_warnings(checkpoint.environment, environment)]


def on_main_first(distributed: Distributed, work: Callable[[], Answer]) -> Answer:
    """Runs ``work`` on rank 0, then on the others, who find its caches; the mistake of one is everyone's."""
    answer, mistake = None, None
    for turn in (True, False):
        if distributed.is_main == turn:
            try:
                answer = work()
            except UserError as error:
                mistake = str(error)
        found = [text for text in distributed.gather(mistake) if text is not None]
        if found:
            raise UserError(found[0])
    return answer  # type: ignore[return-value]


def load_data(settings: Settings, tokenizer: Any) -> list[TaskData]:  # noqa: ANN401
    """All tasks' data, tokenized."""
    return load_tasks(
        settings.tasks,
        tokenizer,
        max_length=settings.options.max_length,
        seed=SPLIT_SEED,
        cache_dir=settings.cache_dir,
        too_long=settings.options.too_long,
    )


def check_rows(settings: Settings, backward: Backward, num_tasks: int) -> None:
    """Refuses a layout that can't work, surgery that has nothing to work on, and rows that would not fit."""
    if not backward.routes and getattr(backward.layout, "needs_routing", False):
        raise UserError(
            f"adapters={settings.strategy['adapters']}: needs a model that can hold several tasks in one forward, and "
            "this one cannot. Take another layout."
        )
    measures = settings.options.conflict_steps is not None
    wanted = [check_surgery(settings, stage, backward) for stage in settings.stages]
    if not any(wanted) and not measures:
        return
    batch_size = max(stage.batch_size or settings.options.batch_size for stage in settings.stages)
    num_rows = min(num_tasks, batch_size) * (4 if measures else 1)  # of two halves, and both put together
    num_bytes = num_rows * backward.row_bytes
    if num_bytes > settings.options.max_row_bytes:
        limit = settings.options.max_row_bytes
        raise UserError(
            f"The tasks' gradients take {num_bytes:,} bytes in each process ({num_rows} rows of "
            f"{backward.num_shared:,} shared parameters), over max_row_bytes={limit:,.0f}. Take a smaller "
            "batch_size or adapters.lora_r, or raise the limit."
        )


def check_surgery(settings: Settings, stage: Stage, backward: Backward) -> bool:
    """Refuses surgery that has nothing to work on; says whether the stage needs the tasks' gradients apart."""
    levers, shape = settings.factories.levers[stage.name], settings.shape_of(stage)
    surgery, name = levers.surgery(shape), levers.names["surgery"]
    mean = isinstance(surgery, Mean)
    if mean:
        return needs_rows(levers.weighter(shape))
    if backward.num_shared == 0 and not settings.options.allow_ineffective:
        raise UserError(
            f"surgery={name} acts on shared parameters, and this layout has none. Take surgery=mean, a layout with a "
            "shared adapter, or allow_ineffective=true."
        )
    grouped = settings.options.surgery_granularity != "global"
    if backward.shards_rows and (grouped or not isinstance(surgery, GramianSurgery)):
        raise UserError(
            f"surgery={name}: works on whole gradients, and each process has a part of those of a sharded model. Take "
            "adapters other than full, another surgery, or launch=gpus."
        )
    return True


def config_text(config: Mapping[str, Any]) -> str:
    """The config as YAML that loads back as the same: texts that look like numbers or references stay texts."""

    def escaped(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, str):
            return value.replace("${", "\\${")
        if isinstance(value, Mapping):
            return {key: escaped(item) for key, item in value.items()}
        return [escaped(item) for item in value] if isinstance(value, list) else value

    return OmegaConf.to_yaml(OmegaConf.create(escaped(config)))


def open_log(
    settings: Settings,
    folder: Path,
    data: Sequence[TaskData],
    checkpoint: Checkpoint | None,
    warnings: Sequence[str],
) -> RunLog:
    """The run's folder and reports, as they were when the checkpoint was taken."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", config_text(settings.config).encode())
    # What stands beyond the checkpoint, or without one, is of work that was lost and comes again.
    step = checkpoint.step if checkpoint else 0
    num_records = checkpoint.state["run"]["num_records"] if checkpoint else 0
    discard_after(folder / "checkpoints", step)
    log = RunLog(
        folder,
        settings.config,
        {item.task.name: None if item.task.metric == "none" else item.task.metric for item in data},
        {item.task.name: len(item.train) for item in data},
        step=step,
        num_records=num_records,
    )
    for warning in warnings:
        log.warn(warning)
    for item in data:
        if item.num_dropped:
            log.warn(
                f"task '{item.task.name}': {item.num_dropped} examples dropped, whose answers max_length cuts away"
            )
    return log


def start_from(run: Run, origin: Checkpoint) -> None:
    """Takes over what another run ended with; the stages that it has had are not had again.

    Validation before training stays this run's own: its options may be others.
    """
    state = origin.state
    run.state = replace(
        RunState(**state["run"]),
        stage=first_new_stage(run.stages, state["run"]["history"]),
        base_validation_T=run.state.base_validation_T,
        num_records=0,
    )
    run.started -= run.state.total_seconds
    run.cursors.load_state_dict(state["cursors"])
    put_parameters(run, state["parameters"])


def put_parameters(run: Run, values: Mapping[str, Tensor]) -> None:
    """Gives the trainable parameters the values of a checkpoint."""
    with torch.no_grad():
        for name, parameter in run.layout.named_parameters().items():
            parameter.copy_(shard_like(values[name], parameter))


def restore(run: Run, checkpoint: Checkpoint) -> StageParts | None:
    """Puts a checkpoint's state back; returns the parts of the stage it was taken in, if it was taken in one."""
    state = checkpoint.state
    run.state = RunState(**state["run"])
    run.started -= run.state.total_seconds
    run.loss_scale.load_state_dict(state["loss_scale"])
    run.cursors.load_state_dict(state["cursors"])
    put_parameters(run, state["parameters"])
    parameters = run.layout.named_parameters()
    run.best_parameters, run.start_parameters = (
        None
        if state[key] is None
        else {name: shard_like(value, parameters[name]) for name, value in state[key].items()}
        for key in ("best_parameters", "start_parameters")
    )
    run.best_private, run.carried = state["best_private"], state["carried"]
    if state["parts"] is None:
        return None
    parts = make_parts(run)
    changed = parts.load_state_dict(state["parts"])
    if run.log:
        for name in changed:
            run.log.warn(f"the {name} is another one than the checkpoint's and starts afresh")
        run.log.resume_stage(run.state, parts)
    return parts
