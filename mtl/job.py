"""One training job, from settings to results."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from mtl.distributed import Distributed
from mtl.errors import RankError, Stopped, UserError
from mtl.evaluation.base_cache import evaluate_base
from mtl.evaluation.evaluate import trivial_score
from mtl.evaluation.results import TaskEvaluation
from mtl.interrupt import StopSignal
from mtl.prepare import Prepared, prepare, restore, start_from
from mtl.reporting.results import Cost, Results, TaskResult, write_predictions, write_results
from mtl.reporting.run_log import peak_memory_bytes
from mtl.reporting.summary import print_summary
from mtl.run import Run, summaries
from mtl.settings import Settings
from mtl.training import run_stages
from mtl.trouble import explained_memory


def run_job(settings: Settings) -> Path:
    """Trains, evaluates and exports; returns the output folder.

    Raises:
        UserError: For whatever a user can put right.
        Stopped: The run was asked to stop.
    """
    accelerator = make_accelerator(settings)
    try:
        with deterministic(settings):
            return _run_job(settings, Distributed(accelerator))
    finally:
        accelerator.end_training()  # without it gloo may abort at exit, after all work is done


@contextmanager
def deterministic(settings: Settings) -> Iterator[None]:
    """Lets torch take only algorithms that give the same bits again, if the run asks for it."""
    if not settings.options.deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def make_accelerator(settings: Settings) -> Accelerator:
    """Joins the process group that a launcher has announced, if any."""
    return accelerator_of(settings.options.mixed_precision, use_cpu=settings.options.use_cpu)


def accelerator_of(precision: str, *, use_cpu: bool) -> Accelerator:
    """The same from the two options that it takes, ``mixed_precision`` and ``use_cpu``."""
    cuda = torch.cuda.is_available() and not use_cpu
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # "no" is also what a plain launch says
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() and launched == "no" else launched
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(f"mixed_precision={precision}: must be no, bf16 or fp16. Launch with --mixed_precision bf16.")
    if precision == "fp16" and not cuda:
        raise UserError("mixed_precision=fp16: must run on a GPU, and there is none. Take bf16 or no.")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "accelerate launch asks for DeepSpeed, whose engine reduces gradients before the tasks are told apart. "
            "Take mtl train launch=fsdp2, which shards the model too."
        )
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
    stop = StopSignal()
    with stop.listening():
        prepared = prepare(settings, distributed, stop)
        run = prepared.run
        try:
            with explained_memory(run.options), explained_disk(run.output_dir):
                base = evaluate_before(prepared, settings)
                run_stages(run, restore(run, prepared.checkpoint) if prepared.checkpoint else None)
                finish(run, settings, base)
        except BaseException as error:
            if run.log:
                run.log.close(succeeded=False)
                if isinstance(error, Stopped):
                    run.log.say(str(error))
            raise
        if run.log:
            run.log.close(succeeded=True)
    return run.output_dir


@contextmanager
def explained_disk(output_dir: Path) -> Iterator[None]:
    """Turns a failed write into one line; the checkpoints so far stand.

    Raises:
        RankError: A file could not be written or read within the block.
    """
    try:
        yield
    except OSError as error:
        raise RankError(
            f"{error.filename or output_dir}: {error.strerror or error}. The checkpoints so far are kept; put it right "
            "and go on with resume_from_checkpoint=auto."
        ) from error


def evaluate_before(prepared: Prepared, settings: Settings) -> list[TaskEvaluation]:
    """The base model on validation data, from which ratios are taken, and on test data, for the results."""
    run = prepared.run
    if run.log:
        run.log.say("Evaluating the model before training, once for these data and settings ...")
    val, test = (evaluate_base_model(prepared, settings, split) for split in ("val", "test"))
    if prepared.checkpoint is None:
        begin_with_base(run, val)
        if prepared.origin is not None:
            start_from(run, prepared.origin)
            validation = run.validate()
            if run.log:
                run.log.evaluation(run.state, f"after {run.state.history[-1]['stage']}", run.names, validation)
    return test


def evaluate_base_model(prepared: Prepared, settings: Settings, split: str) -> list[TaskEvaluation]:
    """The model before training on ``"val"`` or ``"test"``, from the cache if it is there."""
    run, options = prepared.run, prepared.run.options
    with run.work(f"before training: {split}") as progress:
        return evaluate_base(
            run.model,
            run.tokenizer,
            run.activate,
            run.data,
            split=split,
            max_examples=options.max_eval_examples if split == "val" else options.max_test_examples,
            predict=split == "test" or options.eval_scores,
            distributed=run.distributed,
            token_budget=options.eval_micro_batch_tokens,
            cache_dir=settings.cache_dir,
            model_fingerprint=prepared.model_fingerprint,
            dtype=f"{next(iter(run.model.parameters())).dtype} {run.distributed.accelerator.mixed_precision}",
            progress=progress,
        )


def begin_with_base(run: Run, validation: Sequence[TaskEvaluation]) -> None:
    """Takes the base model's validation as the run's first."""
    run.state.base_validation_T = summaries(validation)
    run.keep_validation(validation)
    if run.log:
        run.log.evaluation(run.state, "before training", run.names, validation)


def finish(run: Run, settings: Settings, base: Sequence[TaskEvaluation]) -> None:
    """Evaluates on test data, exports the adapters, writes results and predictions, prints the table."""
    with run.layout.joined():  # what is tested is what is deployed
        test = run.evaluate("test", run.options.max_test_examples, predict=True)
    val = run.validation or run.validate()
    peaks = run.distributed.gather(peak_memory_bytes())
    seconds = time.monotonic() - run.started
    run.layout.export(run.output_dir / "adapters", run.names, write=run.distributed.is_main)
    if run.log is None:
        run.distributed.barrier()
        return
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
        stages=run.state.history,
    )
    write_results(run.output_dir / "results.json", results)
    run.log.results(results, test)
    chance = {item.task.name: trivial_score(item, "test", run.options.max_test_examples) for item in run.data}
    print_summary(run.log.console.console, results, chance, run.output_dir, shown=settings.output_dir)
    run.distributed.barrier()
