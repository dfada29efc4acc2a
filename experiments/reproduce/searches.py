"""Searches: those of Tables 13-15, the commands that make their trials, and what is left of them.

At the paper's scale, the search of a table is the one of the paper's text (sweep=paper); at the mini scale those of the
evidence plan on MiniLM (sweep=evidence, which `make search` makes for all methods). `search_all.make` finishes them.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence

from hydra.errors import HydraException

from experiments.paths import CONF, ROOT
from experiments.published import TASKS
from experiments.reproduce.cells import reads_folder
from experiments.reproduce.commands import carried
from experiments.reproduce.costs import Estimates, facts_of
from experiments.reproduce.dry_run import format_left, print_listing
from experiments.reproduce.plans import read_plan
from experiments.reproduce.processes import run_to_its_end
from experiments.reproduce.search import Search, compose_sweep
from experiments.reproduce.stale_searches import check_stored
from sparsegrad.errors import UserError
from sparsegrad.runs.overrides import explain, key_of
from sparsegrad.sweeps.config import make_plan
from sparsegrad.sweeps.make_commands import make_command
from sparsegrad.sweeps.search_results import OVERWRITE

TABLES = {
    "table13": ("bert_base", "sparsegrad"),
    "table14": ("bert_base", "full"),
    "table15": ("roberta_base", "full"),
}
# Begin the keys of `sweep` that are the same for all searches of the evidence.
ALIKE = (
    "sweep.sampler", "sweep.pruner", "sweep.metric", "sweep.objective", "sweep.trials", "sweep.space",
    "sweep.direction",
)  # fmt: skip
MINI_PLAN = "evidence_paper"  # its model and tasks stand for those of the paper


def planned_searches(table: str, scale: str, data: str | None, overrides: Sequence[str]) -> list[Search]:
    """The studies of a table; `task=` among the overrides narrows its tasks.

    Raises:
        UserError: for a value that is not allowed, at the mini scale also for a seed.
    """
    model, method = TABLES[table]
    narrowed = [one.partition("=")[2].split(",") for one in overrides if one.startswith("task=")]
    rest = [one for one in overrides if not one.startswith("task=")]
    if scale == "paper":
        tasks, about = list(TASKS.values()), ["sweep=paper", f"model={model}", f"method={method}"]
    else:
        tasks = list(read_plan(MINI_PLAN).grid["task"])
        check_alike(rest)
        about = [f"experiment={MINI_PLAN}", "sweep=evidence", f"method={method}", "hydra.mode=RUN"]
    tasks = narrowed[-1] if narrowed else tasks

    def command(task: str) -> str:
        args = carried([f"task={task}", *rest], OVERWRITE)
        return make_command(f"reproduce-{table}", scale=scale, data=data, args=args)

    return [make_search([*about, f"task={task}", *rest], task, data, command(task)) for task in tasks]


def check_alike(overrides: Iterable[str]) -> None:
    """Refuse to make a search of the evidence otherwise than the others: no run would take its rate.

    Raises:
        UserError: saying why.
    """
    for one in overrides:
        if key_of(one) == "seed":
            raise UserError(
                f"{one} is not allowed for a search: all use the same seed, which no comparison uses; leave it out"
            )
        if key_of(one).startswith(ALIKE):
            raise UserError(f"{one} is not allowed here: the searches of all methods are made alike; leave it out")


def make_search(overrides: list[str], task: str, data: str | None, anew: str) -> Search:
    """Compose and check one search; `data` is the folder of every task but the snippets, `anew` as in `Search`.

    Raises:
        UserError: for a value that is not allowed, or if the search of this name has other settings of the method or
            of training; `sweep.overwrite=true` makes such a search anew.
    """
    given = [*overrides, f"data.dir={data}"] if data and reads_folder(task) else overrides
    try:
        search = Search(tuple(given), make_plan(compose_sweep(given)), anew)
        if not search.plan.sweep.overwrite:
            check_stored(search)
    except HydraException as error:
        raise explain(error, given, CONF) from None
    return search


def launch(missing: Sequence[Search], launcher: str) -> None:
    """Add a worker to each study by a Hydra launcher, one command for all studies that share a data folder."""
    groups: dict[str | None, list[Search]] = {}
    for one in missing:
        groups.setdefault(one.plan.base.data.dir, []).append(one)
    for group in groups.values():
        call(_command(group, launcher))


def call(command: Sequence[str]) -> None:
    """Run a command; its output is not captured."""
    run_to_its_end(command)


def _command(group: Sequence[Search], launcher: str) -> list[str]:
    """The command of a launcher with one job per study."""
    tasks = ",".join(one.plan.base.task.name for one in group)
    rest = [one for one in group[-1].worker_overrides if not one.startswith(("task=", "hydra.mode="))]
    # Without the sweeper parameters of a plan, its seeds among them: one job per study.
    more = [f"task={tasks}", "hydra.sweeper.params=null", f"hydra/launcher={launcher}"]
    return [sys.executable, str(ROOT / "run.py"), "-m", *rest, *more]


def show(found: Sequence[Search], stale: Collection[Search] = ()) -> None:
    """Print the total hours that are left, and one line per study; `stale` are those that are made anew."""
    estimates = Estimates(found[0].results / "runs")
    rows, total, unknown = [], 0.0, 0
    for one in found:
        done, budget = 0 if one in stale else one.finished(), one.plan.budget
        each, source = estimates.of({**facts_of(one.plan.base.resolved), "experiment": one.study})
        left = budget - done
        total, unknown = total + left * (each or 0.0), unknown + (left if each is None else 0)
        row = {"study": one.study, "trials finished": f"{done} of {budget}", "hours left": format_left(left, each)}
        rows.append({**row, "estimated from": source if left else "-"})
    complete = sum(one.is_finished for one in found if one not in stale)
    print_listing(
        f"{complete} of {len(found)} studies complete; about {total:.1f} hours left, one trial at a time"
        + (f"; {unknown} trials of unknown cost" if unknown else ""),
        rows,
    )
