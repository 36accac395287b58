"""Adapters that groups of tasks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from mtl.errors import UserError
from mtl.models.adapters import SHARED, LoraLayout, or_shared, private_adapter
from mtl.models.lora_config import lora_config


class GroupLayout(LoraLayout):
    """An adapter for each group of tasks, beside one for all and one for each task.

    A group's adapter is part of the shared parameters: each task's gradient has its place there, which is 0 for the
    tasks of other groups. In a step without a task of the group it stays as it is.

    Args:
        model: The base model; its linear layers are wrapped in place.
        num_tasks: T.
        names: The tasks' names.
        groups: The members of each group, by a name for it; a task may be in several groups, or in none.
        group_lora_r: Rank of each group's adapter.
        lora_r: Rank of the adapter that every task trains; 0 for none.
        private_lora_r: Rank of each task's own adapter; 0 for none.
        group_lora_alpha: Scale of a group's adapter, ``group_lora_alpha / group_lora_r``; twice the rank if not given.
        lora_alpha: The same for the shared adapter.
        private_lora_alpha: The same for the private adapters.
        lora_dropout: As in :class:`LoraLayout`, for the shared adapter, and so are the next two; those that begin with
            ``group_`` and ``private_`` are for the groups' and the tasks' own, and as the shared one's if not given.
        target_modules: Names of layers.
        init_lora_weights: How A and B begin.
        use_rslora: Scale by ``lora_alpha / sqrt(r)``.
        use_dora: Also train the norms of the weights; with one adapter a task only.
        seed: Seeds the adapters' initial values.

    Raises:
        UserError: There is no group, one without a task, one with a task that the run does not have, or a task without
            an adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        num_tasks: int,
        names: Sequence[str],
        *,
        groups: Mapping[str, Sequence[str]],
        group_lora_r: int = 8,
        lora_r: int = 16,
        private_lora_r: int = 0,
        group_lora_alpha: float | None = None,
        lora_alpha: float | None = None,
        private_lora_alpha: float | None = None,
        lora_dropout: float = 0.05,
        group_lora_dropout: float | None = None,
        private_lora_dropout: float | None = None,
        target_modules: Sequence[str] | None = None,
        group_target_modules: Sequence[str] | None = None,
        private_target_modules: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        group_init_lora_weights: bool | str | None = None,
        private_init_lora_weights: bool | str | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        seed: int = 0,
    ) -> None:
        check_ranks(group_lora_r, lora_r, private_lora_r)
        check_groups(groups, names)
        self._tasks_of = {
            f"group{g}": [list(names).index(name) for name in groups[key]] for g, key in enumerate(groups)
        }
        shared = (lora_dropout, target_modules, init_lora_weights)
        of_group = or_shared((group_lora_dropout, group_target_modules, group_init_lora_weights), shared)
        own = or_shared((private_lora_dropout, private_target_modules, private_init_lora_weights), shared)
        kinds = {
            SHARED: (lora_r, lora_alpha, shared),
            **dict.fromkeys(self._tasks_of, (group_lora_r, group_lora_alpha, of_group)),
            **{private_adapter(t): (private_lora_r, private_lora_alpha, own) for t in range(num_tasks)},
        }
        configs = {
            adapter: lora_config(
                model,
                rank,
                alpha,
                lora_dropout=dropout,
                target_modules=modules,
                init_lora_weights=init,
                use_rslora=use_rslora,
                use_dora=use_dora,
            )
            for adapter, (rank, alpha, (dropout, modules, init)) in kinds.items()
            if rank > 0
        }
        all_kinds = [(SHARED, *self._groups_of(task), private_adapter(task)) for task in range(num_tasks)]
        members = [[adapter for adapter in adapters if adapter in configs] for adapters in all_kinds]
        check_members(members, names, use_dora=use_dora)
        self._set_up(model, configs, members, seed)
        named = self.named_parameters().items()
        self._of_group = {group: [p for name, p in named if group in name.split(".")] for group in self._tasks_of}

    def _groups_of(self, task: int) -> list[str]:
        return [group for group, tasks in self._tasks_of.items() if task in tasks]

    def idle_parameters(self, tasks: Sequence[int]) -> list[nn.Parameter]:
        """Those of the groups without any of these tasks."""
        return [
            parameter
            for group, members in self._tasks_of.items()
            if not set(members) & set(tasks)
            for parameter in self._of_group[group]
        ]


def check_ranks(group_lora_r: int, lora_r: int, private_lora_r: int) -> None:
    """Refuses ranks that no adapter has."""
    if group_lora_r < 1 or min(lora_r, private_lora_r) < 0:
        raise UserError(
            f"adapters.group_lora_r={group_lora_r}, adapters.lora_r={lora_r}, adapters.private_lora_r={private_lora_r}:"
            " the first must be positive and none negative. Correct the rank."
        )


def check_members(members: Sequence[Sequence[str]], names: Sequence[str], *, use_dora: bool) -> None:
    """Refuses a task without an adapter, and one with several of DoRA."""
    for name, adapters in zip(names, members, strict=True):
        if not adapters:
            raise UserError(
                f"adapters.groups: task {name} is in no group and has no other adapter. Put it into one, or set "
                "adapters.lora_r or adapters.private_lora_r."
            )
        if use_dora and len(adapters) > 1:
            raise UserError(
                f"adapters.use_dora=true: task {name} has {len(adapters)} adapters, and several DoRA adapters can't be "
                "exported as one. Put it into one group, with adapters.lora_r=0 and adapters.private_lora_r=0."
            )


def check_groups(groups: Mapping[str, Sequence[str]], names: Sequence[str]) -> None:
    """Refuses groups that are none."""
    if not groups:
        raise UserError("adapters.groups: must name at least one group. Write adapters.groups.<group>=[<task>,...].")
    for group, members in groups.items():
        if isinstance(members, str) or not members:
            raise UserError(f"adapters.groups.{group}={members}: must be a list of tasks. Write [<task>,...].")
        for member in members:
            if member not in names:
                raise UserError(
                    f"adapters.groups.{group}: {member} is not a task of the run, which has {', '.join(names)}. "
                    "Correct the name."
                )
