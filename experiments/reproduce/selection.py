"""METHODS and TASKS: which part of the plans of the evidence they choose."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from experiments.paths import CONF
from experiments.report.plans import EvidencePlan
from sparsegrad.errors import UserError, check_choice
from sparsegrad.runs.composing import compose_run
from sparsegrad.runs.overrides import key_of
from sparsegrad.sweeps.make_commands import NO_TREES

Arm = tuple[EvidencePlan, str, str]  # a plan, and one of its methods and tasks
OPTIONS = {"method": "METHODS", "task": "TASKS"}


def check_repeats(methods: Collection[str], tasks: Collection[str], overrides: Sequence[str]) -> None:
    """Refuse ARGS that repeat METHODS or TASKS, of which one would be ignored.

    Raises:
        UserError: naming both.
    """
    for key, names in (("method", methods), ("task", tasks)):
        for one in overrides:
            if names and key_of(one) == key:
                raise UserError(f"{OPTIONS[key]}={','.join(names)} and ARGS={one} exclude each other: give one of them")


def name_choice(methods: Collection[str], tasks: Collection[str]) -> str:
    """`METHODS=a,b on TASKS=c`, without what is empty."""
    chosen = {"METHODS": methods, "TASKS": tasks}
    return " on ".join(f"{name}={','.join(values)}" for name, values in chosen.items() if values)


def select_arms(
    plans: Sequence[EvidencePlan], methods: Sequence[str], tasks: Sequence[str], *, has_trees: bool
) -> list[Arm]:
    """The methods and tasks of the plans that are chosen (empty: all), those of conversations only with trees.

    Raises:
        UserError: if nothing is left.
    """
    found = [one for plan in plans for one in _list_arms(plan, methods, tasks)]
    if not found:
        allowed = dict.fromkeys(task for plan in plans for _, _, task in _list_arms(plan, methods, ()))
        raise UserError(f"no plan has {name_choice(methods, tasks)}: choose TASKS of {', '.join(allowed)}")
    for method in methods:
        if method not in {one for _, one, _ in found}:
            print(f"left out: no plan has {name_choice([method], tasks)}", flush=True)
    kept = [one for one in found if has_trees or not one[0].takes_trees]
    if not kept:
        raise UserError(f"{name_choice((), tasks)} needs TREES={NO_TREES}")
    if len(kept) < len(found):
        print(f"SmolLM2's searches are left out: they need TREES={NO_TREES}", flush=True)
    return kept


def _list_arms(plan: EvidencePlan, methods: Collection[str], tasks: Collection[str]) -> list[Arm]:
    """Those of one plan, in its order; empty `methods` or `tasks`: all."""
    chosen = [one for one in plan.grid["method"] if not methods or one in methods]
    return [(plan, method, task) for task in plan.grid["task"] if not tasks or task in tasks for method in chosen]


def check_names(plans: Sequence[EvidencePlan], methods: Sequence[str], tasks: Sequence[str]) -> None:
    """Refuse a method or task that no plan has.

    Raises:
        UserError: with those that there are.
    """
    for key, names in (("method", methods), ("task", tasks)):
        known = list(dict.fromkeys(value for plan in plans for value in list_values(plan, key)))
        for one in names:
            check_choice(OPTIONS[key], one, known)


def choose_cells(plan: EvidencePlan, methods: Sequence[str], tasks: Sequence[str]) -> list[str] | None:
    """The overrides that choose these methods and tasks (empty: all) from the grid of a plan; None if it has none."""
    overrides = []
    for key, names in (("method", methods), ("task", tasks)):
        known = list_values(plan, key)
        kept = [one for one in known if one in (names or known)]
        if not kept:
            return None
        overrides += [f"{key}={','.join(kept)}"] if names and key in plan.grid else []
    return overrides


def list_values(plan: EvidencePlan, key: str) -> tuple[str, ...]:
    """The methods or tasks of a plan: those of its grid, or the one that all its cells have."""
    if key in plan.grid:
        return plan.grid[key]
    return (str(compose_run([f"experiment={plan.experiment}"], CONF)[key].name),)
