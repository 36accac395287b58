"""Choosing a stage's tasks, and making its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.distributed import Distributed
from mtl.errors import UserError
from mtl.gradients import Anchor, group_sizes
from mtl.interfaces import AdapterLayout, GradientSurgery, TaskSampler
from mtl.options import Options
from mtl.run import Run, StageParts
from mtl.samplers.converged import Converged
from mtl.samplers.replay import Replay
from mtl.settings import StageShape
from mtl.stages import Stage, evaluation_steps
from mtl.surgery import Every, GramianSurgery, Grouped, Mean
from mtl.weak import Standing, weakest, weaknesses
from mtl.zero import ZeroOptimizer


def select_tasks(run: Run) -> bool:
    """Chooses the tasks that the next stage is for and those that it samples; says whether there are any."""
    stage, state = run.stages[run.state.stage], run.state
    state.stage_weakness_T = None
    if stage.tasks == "all":
        focus = list(range(len(run.names)))
    elif stage.tasks == "weakest":
        state.stage_weakness_T = weaknesses(stage.weakness, standings(run, stage))
        focus = weakest(
            stage.weakness, state.stage_weakness_T, num_weakest=stage.num_weakest, min_weakness=stage.min_weakness
        )
    else:
        focus = sorted({run.names.index(name) for name in stage.tasks})
    state.stage_focus = focus
    # All tasks may turn out to be weak, and then there is none to replay.
    state.stage_tasks = list(range(len(run.names))) if stage.replay else focus
    return bool(focus)


def standings(run: Run, stage: Stage) -> list[Standing]:
    """Where each task stands by the newest validation."""
    state = run.state
    return [
        Standing(
            loss=now["loss"],
            base_loss=base["loss"],
            score=now.get("score"),
            best_score=best,
            reference=reference,
            target=stage.targets.get(name),
        )
        for name, now, base, best, reference in zip(
            run.names, state.validation_T, state.base_validation_T, state.best_score_T, run.references_T, strict=True
        )
    ]


def make_parts(run: Run) -> StageParts:
    """Fresh sampler, weighter, surgery, optimizer and schedule for the stage that ``run.state`` is in."""
    stage, options = run.stages[run.state.stage], run.options
    assert run.state.stage_tasks is not None
    assert run.state.stage_focus is not None
    tasks, focus = run.state.stage_tasks, run.state.stage_focus
    run.cursors.limit(tasks, stage.max_train_examples)
    batch_size = stage.batch_size or options.batch_size
    shape = shape_of(run, tasks, stage, batch_size)
    levers = run.factories.levers[stage.name]
    learning_rate = stage.learning_rate or options.learning_rate or run.layout.default_learning_rate
    parameters = trained_parameters(run, stage, tasks)
    optimizer = make_optimizer(run, stage, parameters, learning_rate)
    num_steps = shape.num_steps
    parts = StageParts(
        stage=stage,
        tasks=tasks,
        focus=focus,
        num_steps=num_steps,
        batch_size=batch_size,
        sampler=make_sampler(run, stage, shape),
        weighter=levers.weighter(shape),
        surgery=make_surgery(run, stage, shape),
        optimizer=optimizer,
        # Never prepared: accelerate would step it once per process.
        scheduler=run.factories.scheduler(optimizer, round(options.warmup_ratio * num_steps), num_steps),
        evaluation_steps=evaluation_steps(
            num_steps, evals_per_stage=options.evals_per_stage, eval_steps=options.eval_steps
        ),
        parameters=parameters,
        anchors=anchors(run, parameters) if stage.l2_to_start else (),
    )
    parts.tell_converged(run.state.converged, options.when_converged)
    run.backward.anchor = (
        Anchor(stage.kl_to_start, anchors(run, run.layout.parameters())) if stage.kl_to_start else None
    )
    return parts


def shape_of(run: Run, tasks: Sequence[int], stage: Stage, batch_size: int) -> StageShape:
    """What strategies may know of a stage on these of the run's tasks."""
    sizes = [run.cursors.size(task) for task in tasks]
    num_steps = stage.num_steps(sum(sizes), batch_size)
    return StageShape([run.names[task] for task in tasks], sizes, num_steps, batch_size)


def make_sampler(run: Run, stage: Stage, shape: StageShape) -> TaskSampler:
    """The stage's sampler, around it the replay of other tasks and what becomes of converged ones."""
    assert run.state.stage_tasks is not None
    assert run.state.stage_focus is not None
    tasks, focus, options = run.state.stage_tasks, run.state.stage_focus, run.options
    sampler = run.factories.levers[stage.name].sampler
    if len(focus) < len(tasks):
        inner = StageShape(
            [run.names[task] for task in focus],
            [run.cursors.size(task) for task in focus],
            shape.num_steps,
            max(1, round((1 - stage.replay) * shape.batch_size)),
        )
        places = [tasks.index(task) for task in focus]
        made: TaskSampler = Replay(sampler(inner), places, len(tasks), stage.replay, options.seed)
    else:
        made = sampler(shape)
    if options.task_patience is not None and options.when_converged == "floor":
        made = Converged(made, options.converged_floor, options.seed)
    return made


def make_surgery(run: Run, stage: Stage, shape: StageShape) -> GradientSurgery:
    """The stage's surgery: of whole gradients or of groups of parameters, at every step or now and then."""
    if stage.trainable == "private":
        return Mean()  # a gradient of one task only has no conflict
    factory = run.factories.levers[stage.name].surgery
    surgery = factory(shape)
    if isinstance(surgery, Mean):  # the same whatever it looks at together
        return surgery
    if run.options.surgery_granularity != "global":
        sizes = group_sizes(run.layout, run.options.surgery_granularity)
        return Grouped(lambda: factory(shape), sizes) if sizes else surgery
    if run.options.surgery_every > 1 and isinstance(surgery, GramianSurgery):
        return Every(surgery, run.options.surgery_every)
    return surgery


def trained_parameters(run: Run, stage: Stage, tasks: Sequence[int]) -> list[nn.Parameter]:
    """Those that the stage moves, in the layout's order."""
    if stage.trainable == "all":
        return run.layout.parameters()
    if stage.trainable == "shared":
        return run.layout.shared_parameters()
    return [parameter for task in tasks for parameter in run.layout.private_parameters(task)]


def make_optimizer(run: Run, stage: Stage, parameters: list[nn.Parameter], learning_rate: float) -> Optimizer:
    """Of these parameters; spread over the ranks where the launch asks for it."""
    zero_stage = run.distributed.zero_stage
    if zero_stage in (0, 1, 2):
        return ZeroOptimizer(
            lambda parameters: run.factories.optimizer(parameters, learning_rate),
            run.layout,
            run.distributed,
            stage=zero_stage,
        )
    optimizer = run.factories.optimizer(parameters, learning_rate)
    if stage.optimizer == "carry" and run.carried is not None:
        take_over(optimizer, names_of(run, parameters), run.carried)
    return optimizer


def names_of(run: Run, parameters: Sequence[nn.Parameter]) -> list[str]:
    """The parameters' names in the model."""
    names = {id(parameter): name for name, parameter in run.layout.named_parameters().items()}
    return [names[id(parameter)] for parameter in parameters]


def state_by_name(run: Run, parts: StageParts) -> dict[str, dict[str, Any]]:
    """The optimizer's state of every parameter that it has one of."""
    names = names_of(run, parts.parameters)
    return {names[index]: entry for index, entry in parts.optimizer.state_dict()["state"].items()}


def take_over(optimizer: Optimizer, names: Sequence[str], state: Mapping[str, dict[str, Any]]) -> None:
    """Gives an optimizer the state of those of its parameters that there is one of; the others begin afresh."""
    known = {index: state[name] for index, name in enumerate(names) if name in state}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": known})


def anchors(run: Run, parameters: Sequence[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Parameters with their values at the stage's beginning."""
    assert run.start_parameters is not None
    return [
        (parameter, run.start_parameters[name])
        for parameter, name in zip(parameters, names_of(run, parameters), strict=True)
    ]


def check_stages(
    stages: Sequence[Stage], options: Options, layout: AdapterLayout, num_tasks: int, distributed: Distributed
) -> None:
    """Refuses stages that can't be on this layout and launch, before anything is trained.

    Raises:
        UserError: Names the stage's option and what is missing.
    """
    has_private = any(layout.private_parameters(task) for task in range(num_tasks))
    has_shared = bool(layout.shared_parameters())
    for stage in stages:
        for kind, there in (("private", has_private), ("shared", has_shared)):
            if stage.trainable == kind and not there:
                stage.refuse("trainable", f"the adapters have no {kind} parameters. Take others, or trainable=all")
        if distributed.zero_stage in (0, 1, 2) and stage.optimizer == "carry":
            stage.refuse("optimizer", "DeepSpeed's optimizer begins afresh in every stage. Take fresh")
        if distributed.sharded and stage.kl_to_start:
            stage.refuse("kl_to_start", "needs every process to hold all parameters. Take l2_to_start, or launch=gpus")
    if options.task_patience is not None and options.when_converged == "freeze" and not has_private:
        raise UserError(
            "when_converged=freeze: the adapters have no private parameters to freeze. Take when_converged=floor, or "
            "adapters=shared_and_per_task."
        )
