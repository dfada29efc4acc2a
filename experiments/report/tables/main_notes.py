"""The lines below the evidence tables: the health of their tasks, and what their cells hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.palette import style_of
from experiments.report.blocks import BLOCKS
from experiments.report.comparison.notes import CORRECTED, SCORES
from experiments.report.evidence import Evidence
from experiments.report.gates import Health
from experiments.report.runs import Block
from experiments.report.stats import Difference

SCORED = ": mean ± sample std over seeds (number of seeds), checkpoint chosen on held-out training rows."
AVERAGED = " IQM: interquartile mean of the average over seeds."
PAIRED = (
    "paired by seed and validation row; 95 % interval from 10,000 draws of the rows and the variance between seeds. "
    f"{CORRECTED} No interval from fewer than {{seeds}} seeds."
)
DIFFERENCES = f"Difference: of the average over comparable tasks, {PAIRED}"
DIFFERENCES_OF_TASK = f"Difference: on the task of the row, {PAIRED}"
HOURS = (
    "Training h: of the training steps of one seed (mean over seeds) on all comparable tasks, without evaluation and "
    "calibration. Search h: of the finished trials of the searches on these tasks."
)
TO_TARGET = (
    " H to target: until full fine-tuning's score on held-out training rows minus one point is first reached, "
    "summed over these tasks, mean over seeds; every seed must reach it."
)
TRAINABLE = "Trainable: trained entries of the MLP weights, of all of them; per step for methods that choose them anew."
IMPROVING = (
    "Still improving: runs whose best evaluation is the last one and half a point (of a loss, 0.5 %) above all earlier "
    "ones; at a constant rate, above all but the last three. Gain at the end: points (a loss: as it is) by which the "
    "last evaluation is above the best before the last three, mean over seeds; with a rate that falls to 0, part of it "
    "is due to that."
)
TRAINED = {"paper": "where everything trains", "mlp_only": "where the MLP weights and the head alone train"}


def describe_health(block: Block, health: Mapping[str, Health]) -> list[str]:
    """One note per task: gate, share of runs that still improve, missing seeds, and why it is not comparable."""
    counted = " (floors not counted)" if any(map(block.is_floor, block.arms)) else ""
    lines = []
    for task, found in health.items():
        improving = f"{found.improving[0]} of {found.improving[1]} runs{counted} still improving at the end"
        parts = [_describe_gate(block, found), improving]
        parts += [f"seeds not run yet: {'; '.join(found.missing)}"] if found.missing else []
        parts += [f"not comparable: {reason}" for reason in found.reasons]
        parts += [f"exempt: {one}" for one in found.exempt]
        lines.append(f"{task}: {'; '.join(parts)}.")
    return lines


def _describe_gate(block: Block, found: Health) -> str:
    if found.gate is None:
        return "no gate"
    reached = "no runs" if found.reached is None else f"{found.reached:.2f}"
    place = f" in {name_table(found.gate_folder)}" if found.gate_folder else ""
    return f"{_gate_name(block)} {reached}{place}, gate {found.gate:g}"


def name_table(folder: str) -> str:
    """A block as the reader of the page sees it: by the title of its main table."""
    return f'the table "{BLOCKS[folder].title}"'


def _gate_name(block: Block) -> str:
    return style_of(block.plan.gate_method if block.plan else "full").name


def describe_gate_runs(evidence: Evidence, block: Block, health: Mapping[str, Health]) -> list[str]:
    """That gates and targets come from the runs of another block, and what trains there."""
    lines = []
    for folder in dict.fromkeys(one.gate_folder for one in health.values() if one.gate_folder):
        plan = evidence.blocks[folder].plan
        is_other = plan is not None and block.plan is not None and plan.regime != block.plan.regime
        trained = f", {TRAINED[plan.regime]}" if is_other and plan is not None else ""
        what = "Gates" if block.is_loss else "Gates and h to target"
        lines.append(f"{what}: by the runs of {_gate_name(block)} in {name_table(folder)}{trained}.")
    return lines


def list_rules(block: Block, reference: str | None) -> list[str]:
    """What the cells of the main table hold; without a reference it has no differences."""
    differences = [] if reference is None else [DIFFERENCES.format(seeds=block.fewest_seeds)]
    hours = HOURS if block.is_loss else HOURS + TO_TARGET
    return [SCORES[block.is_loss] + SCORED + AVERAGED, *differences, hours, TRAINABLE]


def list_task_rules(block: Block, reference: str | None) -> list[str]:
    """What the cells of the table per task hold."""
    differences = [] if reference is None else [DIFFERENCES_OF_TASK.format(seeds=block.fewest_seeds)]
    return [SCORES[block.is_loss] + SCORED, *differences, IMPROVING]


def describe_reference(reference: str | None, tasks: Sequence[str]) -> str:
    """The tasks that the main table averages, and its reference."""
    if reference is None:
        averaged = f" Average and hours are over {', '.join(tasks)}." if tasks else ""
        return f"These runs decide whether a task can be compared; they are not compared with each other.{averaged}"
    if not tasks:
        return "No task is comparable, so there are no differences."
    return f"Average, differences and hours are over {', '.join(tasks)}; reference: {style_of(reference).name}."


def describe_seeds(block: Block, tasks: Sequence[str], spread: str = "± and IQM") -> list[str]:
    """What an average is of whose tasks have different seeds; nothing if those of every arm are the same.

    `spread` names what the table shows of the common seeds alone.
    """
    seeds = {arm: {frozenset(block.of(arm, task)) for task in block.tasks_of(arm, None, tasks)} for arm in block.arms}
    if all(len(one) < 2 for one in seeds.values()):
        return []
    return [
        "Averages of tasks with different seeds, such as (3 to 5, 3 common), are means over tasks of the means over "
        "all of their seeds, as in the differences. In brackets: the seeds of a task, from fewest to most, and the "
        f"common ones, which all tasks have; {spread}: over the common ones alone."
    ]


def describe_left_out(
    block: Block, comparable: Sequence[str], tasks: Sequence[str], place: str = "the averages"
) -> list[str]:
    """Comparable tasks that are not yet in the averages or another place, and planned tasks without runs."""
    few = [task for task in comparable if task not in tasks]
    lines = [f"Not in {place}, with fewer than {block.fewest_seeds} seeds: {', '.join(few)}."] if few else []
    absent = [task for task in (block.plan.tasks if block.plan else ()) if task not in block.tasks]
    return [*lines, *([f"Tasks without runs so far: {', '.join(absent)}."] if absent else [])]


def describe_incomparable(health: Mapping[str, Health]) -> list[str]:
    """Tasks that a table leaves out because their methods cannot be compared, with the reasons."""
    return [
        f"{task} is left out, as it is not comparable: {'; '.join(one.reasons)}."
        for task, one in health.items()
        if not one.is_comparable
    ]


def describe_unpaired(found: Mapping[str, Difference | None]) -> list[str]:
    """Arm by arm, the number of seeds that are in no difference."""
    left = [f"{style_of(arm).name} {one.left_out}" for arm, one in found.items() if one is not None and one.left_out]
    return [f"Seeds that only one of the two arms has are left out of differences: {', '.join(left)}."] if left else []
