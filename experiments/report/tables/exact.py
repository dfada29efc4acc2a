"""SparseGrad exact against every other method of a block: the differences that README.md and docs/ quote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

import pandas as pd
from scipy import stats

from experiments.palette import style_of
from experiments.report.blocks import BLOCKS
from experiments.report.comparison.notes import SCORES, describe_floors
from experiments.report.evidence import Evidence, load_evidence
from experiments.report.gates import Health, check_task
from experiments.report.runs import Block
from experiments.report.searches import Searches
from experiments.report.stats import Difference, adjust
from experiments.report.tables import main_notes
from experiments.report.tables.base import MISSING, Context, Table, interval_text
from experiments.report.tables.evidence_cells import format_averages, format_difference, name_tasks
from experiments.report.tables.main_tables import reference_of

FOLDERS = ("evidence_paper", "evidence_mlp_only", "evidence_base")
# The paper's method. It is not in the plans, whose `evidence.reference` is that of the main tables: a record holds the
# hash of its plan, so that another line there would make every run exploratory.
REFERENCE = "sparsegrad"
CERTAIN = ("stsb", "sst2")  # on the other tasks, seeds and rows move a difference by several points
ORDERS = (
    "Orders: of the mean scores over seeds, the best first. Held-out rows chose rate, stopping and checkpoint. "
    "Spearman: the rank correlation of the two orders; 1 if they are the same."
)
ALONE = (
    "Detectable alone: as detectable, of a single comparison without correction. Columns of some tasks: the difference "
    "on them, in brackets the 95 % interval of this comparison alone."
)


def tables(context: Context) -> list[Table]:
    """The tables of all blocks that have them."""
    return [table for folder in FOLDERS for table in block_tables(context, folder)]


def block_tables(context: Context, folder: str) -> list[Table]:
    """Differences and orders of one block; none until another method has enough seeds in common with the reference."""
    if folder not in FOLDERS:
        return []
    evidence, searches = load_evidence(context), Searches(context.results)
    block = evidence.blocks[folder]
    checked = {task: check_task(evidence, folder, task, searches) for task in block.tasks}
    health = {task: one for task, one in checked.items() if one.is_comparable and _is_enough(block, REFERENCE, task)}
    found = {arm: _subtract(evidence, block, arm, list(health)) for arm in block.arms}
    if all(one is None or one.interval is None for one in found.values()):
        return []
    return [_difference_table(evidence, block, checked, health, found), _order_table(block, checked, list(health))]


def _is_enough(block: Block, arm: str, task: str) -> bool:
    return len(block.of(arm, task)) >= block.fewest_seeds


def _subtract(evidence: Evidence, block: Block, arm: str, tasks: Sequence[str]) -> Difference | None:
    """The reference minus an arm, over the tasks on which both have enough seeds."""
    paired = [] if arm == REFERENCE else block.tasks_of(arm, REFERENCE, tasks)
    return evidence.compare(block.folder, REFERENCE, arm, paired) if paired else None


def _difference_table(
    evidence: Evidence,
    block: Block,
    checked: Mapping[str, Health],
    health: Mapping[str, Health],
    found: Mapping[str, Difference | None],
) -> Table:
    """One row per arm; of the tasks that were checked, `health` has those that count."""
    tasks, adjusted = list(health), adjust(found)
    certain = [task for task in tasks if task in CERTAIN]
    parts = {f"{' and '.join(certain)} alone": certain} if 0 < len(certain) < len(tasks) else {}
    parts |= {f"on {task}": [task] for task in tasks if len(tasks) > 1}
    rows = []
    for arm, one in found.items():
        average = format_averages(block, arm, block.tasks_of(arm, None, tasks), tasks)["average"]
        alone = None if one is None else one.detectable(1)
        rows.append({
            "method": style_of(arm).name,
            "average": average,
            **format_difference(one, adjusted.get(arm), arm == REFERENCE, health, len(adjusted), tasks, block.is_loss),
            "detectable alone": "" if alone is None else f"{alone:.2f}",
            **{name: _format_part(evidence, block, arm, part) for name, part in parts.items()},
        })  # fmt: skip
    name = f"{style_of(REFERENCE).name} minus this"
    frame = pd.DataFrame(rows).rename(columns={"difference": name})
    title = f"{BLOCKS[block.folder].title}: {style_of(REFERENCE).name} minus each method"
    left = _describe_left_out(block, checked, tasks, "the averages")
    notes = [*_notes(block, tasks), *left, *main_notes.describe_unpaired(found)]
    return Table(f"{block.folder}_exact", title, frame, notes)


def _format_part(evidence: Evidence, block: Block, arm: str, tasks: Sequence[str]) -> str:
    """The difference over some of the tasks, with its interval."""
    if arm == REFERENCE:
        return ""
    one = _subtract(evidence, block, arm, tasks)
    if one is None:
        return MISSING
    interval = "" if one.interval is None else f" ({interval_text(one.interval)})"
    return f"{one.value:+.2f}{interval}{name_tasks(one.tasks, tasks)}"


def _notes(block: Block, tasks: Sequence[str]) -> list[str]:
    """What the cells hold; the main table has the same runs."""
    other = style_of(str(reference_of(block))).name
    return [
        f"{style_of(REFERENCE).name} minus the method of the row, over {', '.join(tasks)}; "
        f"{main_notes.name_table(block.folder)} has the same runs with the reference {other}.",
        *describe_floors(block),
        SCORES[block.is_loss] + main_notes.SCORED,
        *main_notes.describe_seeds(block, tasks, "±"),
        main_notes.DIFFERENCES.format(seeds=block.fewest_seeds),
        ALONE,
    ]


def _describe_left_out(block: Block, checked: Mapping[str, Health], tasks: Sequence[str], place: str) -> list[str]:
    """The tasks that do not count, with the reasons."""
    comparable = [task for task, one in checked.items() if one.is_comparable]
    few = main_notes.describe_left_out(block, comparable, tasks, place)
    return [*main_notes.describe_incomparable(checked), *few]


def _order_table(block: Block, checked: Mapping[str, Health], tasks: Sequence[str]) -> Table:
    """One row per task: the orders of the arms on validation and on held-out rows."""
    title = f"{BLOCKS[block.folder].title}: order of the methods on validation and on held-out rows"
    frame = pd.DataFrame([_order_row(block, task) for task in tasks])
    left = _describe_left_out(block, checked, tasks, "this table")
    return Table(f"{block.folder}_orders", title, frame, [ORDERS, *_describe_unordered(block, tasks), *left])


def _describe_unordered(block: Block, tasks: Sequence[str]) -> list[str]:
    """The arms that are in no order, or not in that of every task."""
    floors = [style_of(arm).name for arm in block.arms if block.is_floor(arm)]
    few = [
        f"{style_of(arm).name} on {', '.join(lacking)}"
        for arm in block.arms
        if not block.is_floor(arm) and (lacking := [task for task in tasks if not _is_enough(block, arm, task)])
    ]
    lines = [f"Left out, as floors, to read the other scores by: {', '.join(floors)}."] if floors else []
    return [*lines, *([f"Left out, with fewer than {block.fewest_seeds} seeds: {'; '.join(few)}."] if few else [])]


def _order_row(block: Block, task: str) -> dict[str, str]:
    arms = [arm for arm in block.arms if _is_enough(block, arm, task) and not block.is_floor(arm)]
    # Rounded, so that means of equal scores are equal and share a rank.
    validation = {arm: round(mean(block.scores(arm, task)), 6) for arm in arms}
    heldout = {arm: round(mean(run.chosen_score for run in block.of(arm, task).values()), 6) for arm in arms}
    return {
        "task": task,
        "methods": str(len(arms)),
        "Spearman": _correlate(list(validation.values()), list(heldout.values())),
        "validation rows": _list_order(validation, block.is_loss),
        "held-out rows": _list_order(heldout, block.is_loss),
    }


def _correlate(a: Sequence[float], b: Sequence[float]) -> str:
    """Spearman's rank correlation; empty where it has none."""
    if min(len(set(a)), len(set(b))) < 2:
        return ""
    return f"{stats.spearmanr(a, b).statistic:.2f}"


def _list_order(scores: Mapping[str, float], is_loss: bool) -> str:
    """Names with scores, the best first."""
    ranked = sorted(scores.items(), key=lambda pair: pair[1], reverse=not is_loss)
    return "; ".join(f"{style_of(arm).name} {score:.{3 if is_loss else 2}f}" for arm, score in ranked)
