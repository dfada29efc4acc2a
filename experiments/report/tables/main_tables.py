"""The main tables: scores, paired differences and costs of the evidence runs, one table per plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import mean

import pandas as pd

from experiments.palette import style_of
from experiments.report.blocks import BLOCKS, block_command
from experiments.report.clock import make_clock
from experiments.report.comparison.notes import describe_floors
from experiments.report.evidence import Evidence, load_evidence
from experiments.report.gates import GATES, Health, check_task, comparable_tasks
from experiments.report.origins import origin_notes
from experiments.report.resampling import LOWER_IS_BETTER
from experiments.report.runs import Block, EvidenceRun
from experiments.report.searches import Searches
from experiments.report.stats import Difference, adjust
from experiments.report.tables import main_notes
from experiments.report.tables.base import Context, Table, list_apart
from experiments.report.tables.costs import measured
from experiments.report.tables.evidence_cells import (
    describe_machine,
    format_averages,
    format_costs,
    format_difference,
    format_rates,
    format_score,
    format_speed,
    format_trainable,
)

NOT_RUN = "not run yet"
# Arms that a table compares with, if its plan names none.
REFERENCES = {
    "evidence_density": "sparsegrad keep=589824",
    "evidence_basis": "sparsegrad basis=hosvd",
    "evidence_smollm2": "lora",
}
REFERENCE = "lora_tuned"


def tables(context: Context) -> list[Table]:
    """The main table and the table per task of each plan, in the order of `BLOCKS`."""
    return [table for folder in BLOCKS for table in block_tables(context, folder)]


def block_tables(context: Context, folder: str) -> list[Table]:
    """The tables of one plan; one table that says so if it has no runs."""
    evidence, searches = load_evidence(context), Searches(context.results)
    block = evidence.blocks[folder]
    if not block.runs:
        return [_empty_table(block)]
    health = {task: check_task(evidence, folder, task, searches) for task in block.tasks}
    return [_main_table(context, evidence, block, health, searches), _task_table(evidence, block, health)]


def reference_of(block: Block) -> str | None:
    """The arm that a block's table compares with: the plan's, the usual one, or its first arm; the gates have none."""
    if block.folder == GATES:
        return None
    wanted = _planned_reference(block)
    return wanted if wanted in block.arms else next(iter(block.arms), None)


def _planned_reference(block: Block) -> str:
    planned = block.plan.reference if block.plan else None
    return planned or REFERENCES.get(block.folder, REFERENCE)


def _empty_table(block: Block) -> Table:
    planned = block.plan.planned if block.plan else 0
    text = f"{NOT_RUN} ({planned} runs planned): {block_command(block.folder)}"
    frame = pd.DataFrame([{"method": text}])
    return Table(block.folder, BLOCKS[block.folder].title, frame, apart_notes(block))


def _main_table(
    context: Context, evidence: Evidence, block: Block, health: Mapping[str, Health], searches: Searches
) -> Table:
    """One row per arm."""
    reference = reference_of(block)
    tasks = _averaged(block, [task for task, found in health.items() if found.is_comparable])
    machine, costs = measured(context.results)
    clock = make_clock(block, costs)
    found = {arm: _difference(evidence, block, arm, reference, tasks) for arm in block.arms}
    adjusted = adjust(found)
    rows = []
    for arm in block.arms:
        own = block.tasks_of(arm, None, tasks)
        difference = (
            {}
            if reference is None
            else format_difference(
                found[arm], adjusted.get(arm), arm == reference, health, len(adjusted), tasks, block.is_loss
            )
        )
        expense = {**format_costs(evidence, block, arm, own, searches, clock), **format_speed(block, arm, costs)}
        rows.append({**_format_scores(block, arm, own, tasks), **difference, **expense})
    notes = [
        *_main_notes(evidence, block, health, reference, tasks),
        clock.about,
        describe_machine(block, machine),
        *origin_notes(block, searches),
        *main_notes.describe_unpaired(found),
        *apart_notes(block),
    ]
    return Table(block.folder, BLOCKS[block.folder].title, _name_difference(rows, reference), notes, _records(block))


def _format_scores(block: Block, arm: str, own: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """Name, size and scores of an arm, and its averages over `own`: those of the averaged tasks that it has."""
    scores = {task: format_score(block.scores(arm, task), block.metric(task)) for task in block.tasks}
    averages = format_averages(block, arm, own, tasks)
    return {"method": style_of(arm).name, **format_trainable(block, arm), **scores, **averages}


def _main_notes(
    evidence: Evidence, block: Block, health: Mapping[str, Health], reference: str | None, tasks: Sequence[str]
) -> list[str]:
    """The notes on what the main table compares: health of the tasks, rules, reference, and what is left out."""
    comparable = [task for task, found in health.items() if found.is_comparable]
    return [
        *main_notes.describe_health(block, health),
        *main_notes.describe_gate_runs(evidence, block, health),
        *describe_floors(block),
        *main_notes.list_rules(block, reference),
        main_notes.describe_reference(reference, tasks),
        *main_notes.describe_seeds(block, tasks),
        *_describe_replaced(block, reference),
        *main_notes.describe_left_out(block, comparable, tasks),
    ]


def _averaged(block: Block, comparable: Sequence[str]) -> list[str]:
    """The comparable tasks whose averages a table shows: those on which its reference has enough seeds."""
    reference = reference_of(block)
    return list(comparable) if reference is None else block.tasks_of(reference, None, comparable) or list(comparable)


def _difference(
    evidence: Evidence, block: Block, arm: str, reference: str | None, tasks: Sequence[str]
) -> Difference | None:
    if reference is None or arm == reference:
        return None
    paired = block.tasks_of(arm, reference, tasks)
    return evidence.compare(block.folder, arm, reference, paired) if paired else None


def _task_table(evidence: Evidence, block: Block, health: Mapping[str, Health]) -> Table:
    """One row per task and arm."""
    reference = reference_of(block)
    found = {
        (task, arm): _difference(evidence, block, arm, reference, [task]) if health[task].is_comparable else None
        for task in block.tasks
        for arm in block.arms
    }
    adjusted = adjust({" ".join(key): one for key, one in found.items()})
    rows = [_task_row(block, arm, task, one, adjusted, reference, health) for (task, arm), one in found.items()]
    notes = [
        *main_notes.describe_health(block, health),
        *main_notes.describe_gate_runs(evidence, block, health),
        *describe_floors(block),
        *main_notes.list_task_rules(block, reference),
        *origin_notes(block),
    ]
    title = f"{BLOCKS[block.folder].title}: per task"
    return Table(f"{block.folder}_tasks", title, _name_difference(rows, reference), notes, _records(block))


def _task_row(
    block: Block, arm: str, task: str, found: Difference | None, adjusted: Mapping[str, float], reference: str | None,
    health: Mapping[str, Health],
) -> dict[str, str]:  # fmt: skip
    runs, p = block.of(arm, task).values(), adjusted.get(f"{task} {arm}")
    difference = (
        {}
        if reference is None
        else format_difference(found, p, arm == reference, {task: health[task]}, len(adjusted), [task], block.is_loss)
    )
    return {
        "method": style_of(arm).name,
        "task": task,
        "score": format_score(block.scores(arm, task), block.metric(task)),
        **difference,
        "still improving": f"{sum(run.still_improving for run in runs)} of {len(runs)}",
        "gain at the end": _format_gain(runs),
        "learning rate": format_rates(block, arm, task),
    }


def _format_gain(runs: Collection[EvidenceRun]) -> str:
    """The mean gain at the end of runs in points (of a loss, as it is); empty if they have too few evaluations."""
    gains = [gain for run in runs if (gain := run.gain_at_end) is not None]
    digits = 4 if any(run.metric in LOWER_IS_BETTER for run in runs) else 2
    return f"{mean(gains):+.{digits}f}" if gains else ""


def _name_difference(rows: Sequence[Mapping[str, str]], reference: str | None) -> pd.DataFrame:
    """The rows as a frame whose column of differences names the reference."""
    name = "" if reference is None else f"minus {style_of(reference).name}"
    return pd.DataFrame(rows).rename(columns={"difference": name})


def _records(block: Block) -> dict[str, list[Path]]:
    """Label of a score cell -> its records; the label is the row's name and the column's."""
    return {
        f"{style_of(arm).name} {task}": [run.path for run in runs.values()] for (arm, task), runs in block.runs.items()
    }


def _describe_replaced(block: Block, reference: str | None) -> list[str]:
    """That another arm stands in for the planned reference, which has no runs."""
    planned = _planned_reference(block)
    if reference in (None, planned):
        return []
    return [f"The planned reference is {style_of(planned).name}, which has no runs yet."]


def apart_notes(block: Block) -> list[str]:
    """Records that do not count, by reason, and runs that failed."""
    failed = [
        f"{' '.join(key)}: {', '.join(f'seed {seed}: {reason}' for seed, reason in sorted(reasons.items()))}"
        for key, reasons in sorted(block.failed.items())
    ]
    return [*list_apart(block.apart), *([f"Failed runs: {'; '.join(failed)}."] if failed else [])]


def progress(context: Context) -> list[tuple[str, int, int]]:
    """(short name, runs that count, planned runs) of each block."""
    evidence = load_evidence(context)
    return [
        (BLOCKS[folder].short, len(list(block.all_runs())), block.plan.planned if block.plan else 0)
        for folder, block in evidence.blocks.items()
    ]


def averaged_tasks(context: Context, folder: str) -> list[str]:
    """The tasks over which a block's table averages."""
    evidence = load_evidence(context)
    return _averaged(evidence.blocks[folder], comparable_tasks(evidence, folder, Searches(context.results)))
