"""Options with a value for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def value_of_each_task(
    argument: str,
    values: Mapping[str, float] | Sequence[float],
    names: Sequence[str] | None,
    num_tasks: int,
    default: float | None = None,
) -> list[float]:
    """Reads a mapping from task name, or one value for each task in order.

    Args:
        argument: The constructor argument that it is, for messages.
        values: What was given.
        names: Names of the T tasks; needed to read a mapping.
        num_tasks: Number of tasks T.
        default: Value of a task that a mapping does not name; ``None`` if it must name every task.

    Raises:
        ValueError: If a name is unknown, a task has no value, or the number of values is not that of the tasks.
    """
    if not isinstance(values, Mapping):
        if len(values) != num_tasks:
            raise ValueError(
                f"{argument}: must be one for each of {num_tasks} tasks, found {len(values)}; or give them by name"
            )
        return [float(value) for value in values]
    if names is None:
        raise ValueError(f"names: must be given to read {argument} by task name, found None; pass the tasks' names")
    known = list(names)
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"{argument}: must name tasks of the run, found {unknown[0]!r}; the tasks are {known}")
    missing = [name for name in known if name not in values]
    if missing and default is None:
        raise ValueError(f"{argument}: must name every task, found nothing for {missing[0]!r}; add it")
    return [float(values.get(name, default)) for name in known]  # type: ignore[arg-type]
