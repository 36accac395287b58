"""One training job, from settings to results."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf

from mtl.checkpoint import load_checkpoint
from mtl.data.cursors import TaskCursors
from mtl.data.loading import TaskData, load_task
from mtl.distributed import Distributed
from mtl.errors import UserError
from mtl.evaluation.base_cache import evaluate_base
from mtl.evaluation.evaluate import trivial_score
from mtl.evaluation.results import TaskEvaluation
from mtl.gradients import Backward
from mtl.interfaces import AdapterLayout
from mtl.models.forward import packing_is_exact
from mtl.models.load import fingerprint, load_model, load_tokenizer
from mtl.reporting.results import Cost, Results, TaskResult, write_predictions, write_results
from mtl.reporting.run_log import RunLog, peak_memory_bytes
from mtl.reporting.summary import print_summary
from mtl.resume import check_identity, identity_of, open_output
from mtl.run import Run, RunState, StageParts, summaries
from mtl.settings import Settings
from mtl.surgery import Mean
from mtl.training import make_parts, run_stages

Answer = TypeVar("Answer")


def run_job(settings: Settings) -> Path:
    """Trains, evaluates and exports; returns the output folder.

    Raises:
        UserError: On every rank, for whatever a user can put right.
    """
    settings.check()
    accelerator = make_accelerator(settings)
    try:
        return _run_job(settings, Distributed(accelerator))
    finally:
        accelerator.end_training()  # without it gloo may abort at exit, after all work is done


def make_accelerator(settings: Settings) -> Accelerator:
    """Joins the process group that a launcher has announced, if any."""
    cuda = torch.cuda.is_available() and not settings.options.use_cpu
    precision = settings.options.mixed_precision
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # "no" is also what a plain launch says
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() and launched == "no" else launched
    if precision not in ("no", "bf16"):
        raise UserError(f"mixed_precision={precision}: must be no or bf16. Launch with --mixed_precision bf16.")
    accelerator = Accelerator(mixed_precision=precision, cpu=not cuda)  # Apple's GPUs lack float64
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        # On a machine without GPUs accelerate starts processes that do not find each other.
        raise UserError(
            f"The launcher announced {expected} processes, but accelerate formed a group of "
            f"{accelerator.num_processes}. On CPUs launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu."
        )
    return accelerator


def _run_job(settings: Settings, distributed: Distributed) -> Path:
    prepared = prepare(settings, distributed)
    run = prepared.run
    try:
        base = evaluate_before(prepared, settings)
        run_stages(run, restore(run, prepared.checkpoint) if prepared.checkpoint else None)
        finish(run, settings, base)
    except BaseException:
        if run.log:
            run.log.close(succeeded=False)
        raise
    if run.log:
        run.log.close(succeeded=True)
    return run.output_dir


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to begin, or to take a checkpoint's state, and the hash of its base model."""

    run: Run
    checkpoint: dict[str, Any] | None
    model_fingerprint: str


def prepare(settings: Settings, distributed: Distributed) -> Prepared:
    """Loads data, model and checkpoint, and puts the parts together; writes nothing before all of it is found good."""
    output_dir = Path(distributed.broadcast_object(str(settings.output_dir)))
    checkpoint_folder = on_main_first(distributed, lambda: open_output(settings, output_dir))
    tokenizer = on_main_first(distributed, lambda: load_tokenizer(settings.model, settings.cache_dir))
    data = on_main_first(distributed, lambda: load_data(settings, tokenizer))
    loaded = on_main_first(distributed, lambda: load_model(settings.model, settings.cache_dir))
    model_fingerprint = fingerprint(loaded)
    model = distributed.accelerator.prepare_model(loaded, evaluation_mode=True)  # no wrapper: device and autocast
    layout = settings.factories.layout(model, len(data))
    distributed.broadcast_(parameter.data for parameter in layout.parameters())
    check_rows(settings, layout, len(data))
    packing = settings.options.packing and packing_is_exact(model)
    options = settings.options
    backward = Backward(
        model, layout, distributed, max_tokens=options.micro_batch_tokens, packing=packing, seed=options.seed
    )
    checkpoint = on_main_first(distributed, lambda: load_checkpoint(checkpoint_folder) if checkpoint_folder else None)
    identity = identity_of(settings, layout, data)
    if checkpoint:
        check_identity(checkpoint["identity"], identity)
    log = None
    if distributed.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "config.yaml").write_text(config_text(settings.config), encoding="utf-8")
        log = open_log(settings, output_dir, data, checkpoint)
        if options.packing and not packing:
            log.warn("this model lets packed examples see each other; packing is switched off")
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
        state=RunState(num_tasks=len(data)),
        log=log,
    )
    return Prepared(run, checkpoint, model_fingerprint)


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
    return [
        load_task(
            task,
            tokenizer,
            max_length=settings.options.max_length,
            seed=settings.options.seed,
            cache_dir=settings.cache_dir,
            too_long=settings.options.too_long,
        )
        for task in settings.tasks
    ]


def check_rows(settings: Settings, layout: AdapterLayout, num_tasks: int) -> None:
    """Refuses surgery that has nothing to work on, and rows that would not fit."""
    mean = isinstance(settings.factories.surgery(), Mean)
    if mean and not settings.factories.weighter([task.name for task in settings.tasks]).needs:
        return
    num_shared = sum(parameter.numel() for parameter in layout.shared_parameters())
    if num_shared == 0 and not mean and not settings.options.allow_ineffective:
        raise UserError(
            f"surgery={settings.strategy['surgery']} acts on shared parameters, and this layout has none. Take "
            "surgery=mean, a layout with a shared adapter, or allow_ineffective=true."
        )
    batch_size = max(stage.batch_size or settings.options.batch_size for stage in settings.stages)
    num_rows = min(num_tasks, batch_size)
    num_bytes = num_rows * sum(p.numel() * p.element_size() for p in layout.shared_parameters())
    if num_bytes > settings.options.max_row_bytes:
        limit = settings.options.max_row_bytes
        raise UserError(
            f"The tasks' gradients take {num_bytes:,} bytes ({num_rows} rows of {num_shared:,} shared parameters), "
            f"over max_row_bytes={limit:,.0f}. Take a smaller batch_size or adapters.lora_r, or raise the limit."
        )


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
    settings: Settings, folder: Path, data: Sequence[TaskData], checkpoint: Mapping[str, Any] | None
) -> RunLog:
    """The run's reports; records after the checkpoint's step are dropped."""
    log = RunLog(
        folder,
        settings.config,
        {item.task.name: None if item.task.metric == "none" else item.task.metric for item in data},
        {item.task.name: len(item.train) for item in data},
        resumed_at=checkpoint["run"]["step"] if checkpoint else None,
    )
    for item in data:
        if item.num_dropped:
            log.warn(
                f"task '{item.task.name}': {item.num_dropped} examples dropped, whose answers max_length cuts away"
            )
    return log


def restore(run: Run, state: dict[str, Any]) -> StageParts | None:
    """Puts a checkpoint's state back; returns the parts of the stage it was taken in, if it was taken in one."""
    run.state = RunState(**state["run"])
    run.started -= run.state.total_seconds
    run.best_parameters = state["best_parameters"]
    run.cursors.load_state_dict(state["cursors"])
    with torch.no_grad():
        for name, parameter in run.layout.named_parameters().items():
            parameter.copy_(state["parameters"][name])
    if state["parts"] is None:
        return None
    parts = make_parts(run)
    for name, part_state in state["parts"].items():
        getattr(parts, name).load_state_dict(part_state)
    if run.log:
        run.log.resume_stage(run.state, parts)
    return parts


def evaluate_before(prepared: Prepared, settings: Settings) -> list[TaskEvaluation]:
    """The base model on validation data, from which ratios are taken, and on test data, for the results."""
    run = prepared.run
    evaluations = {}
    if run.log:
        run.log.say("Evaluating the model before training, once for these data and settings ...")
    for split, limit in (("val", run.options.max_eval_examples), ("test", run.options.max_test_examples)):
        with run.work(f"before training: {split}") as progress:
            evaluations[split] = evaluate_base(
                run.model,
                run.tokenizer,
                run.layout.activate,
                run.data,
                split=split,
                max_examples=limit,
                predict=split == "test" or run.options.eval_scores,
                distributed=run.distributed,
                token_budget=run.options.eval_micro_batch_tokens,
                cache_dir=settings.cache_dir,
                model_fingerprint=prepared.model_fingerprint,
                dtype=f"{next(iter(run.model.parameters())).dtype} {run.distributed.accelerator.mixed_precision}",
                progress=progress,
            )
    if prepared.checkpoint is None:
        run.state.base_validation_T = run.state.validation_T = summaries(evaluations["val"])
        if run.log:
            run.log.evaluation(run.state, "before training", run.names, evaluations["val"])
    return evaluations["test"]


def finish(run: Run, settings: Settings, base: Sequence[TaskEvaluation]) -> None:
    """Evaluates on test data, exports the adapters, writes results and predictions, prints the table."""
    with run.layout.joined():  # what is tested is what is deployed
        test = run.evaluate("test", run.options.max_test_examples, predict=True)
    val = run.validation or run.validate()
    peaks = run.distributed.gather(peak_memory_bytes())
    seconds = time.monotonic() - run.started
    if run.log is None:
        run.distributed.barrier()
        return
    run.layout.export(run.output_dir / "adapters", run.names)
    if (run.output_dir / "model").is_dir():
        run.tokenizer.save_pretrained(str(run.output_dir / "model"))
    tasks = {}
    for index, item in enumerate(run.data):
        name = item.task.name
        write_predictions(run.output_dir / "predictions", name, test[index].predictions)
        tasks[name] = TaskResult(
            metric=test[index].metric,
            base={**base[index].scores, "loss": base[index].loss},
            val={**val[index].scores, "loss": val[index].loss},
            test={**test[index].scores, "loss": test[index].loss, "num_examples": test[index].num_examples},
            examples_seen=run.cursors.examples_seen_T[index],
            epochs_seen=run.cursors.epochs_seen_T[index],
            target_tokens_seen=run.state.target_tokens_T[index],
        )
    cost = Cost(
        steps=run.state.step,
        tokens=run.state.tokens,
        target_tokens=sum(run.state.target_tokens_T),
        seconds=seconds,
        tokens_per_second=run.state.tokens / max(run.state.training_seconds, 1e-9),
        peak_memory_bytes=max(peaks),
    )
    results = Results(
        strategy=settings.strategy,
        seed=run.options.seed,
        model=settings.model.name_or_path,
        tasks=tasks,
        cost=cost,
    )
    write_results(run.output_dir / "results.json", results)
    chance = {item.task.name: trivial_score(item, "test", run.options.max_test_examples) for item in run.data}
    print_summary(run.log.console.console, results, chance, run.output_dir)
    run.distributed.barrier()
