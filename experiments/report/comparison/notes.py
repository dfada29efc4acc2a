"""The title of a comparison's table, and the lines below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.palette import style_of
from experiments.report.gates import Health
from experiments.report.runs import Block

SIZE_TOLERANCE = 0.25  # of the planned trainable share, relative: ranks and block sizes are whole numbers


@dataclass(frozen=True)
class About:
    """How a comparison is named.

    Attributes:
        title: what is trained, and on what.
        score: what its scores are, with the direction; also the figure's axis.
        command: makes its runs.
    """

    title: str
    score: str
    command: str


PLANS = {
    "compare": About(
        "MiniLM, MLP weights and head alone", "average score in points", "make compare SCALE=mini DATA=<glue folder>"
    ),
    "compare_smollm2": About(
        "SmolLM2, the MLP weights of every third block alone",
        "validation loss (lower is better)",
        "make compare SCALE=mini TASKS=oasst1 TREES=<file of conversation trees>",
    ),
}
SCORES = {
    False: "Scores in points (Matthews for CoLA, Pearson for STS-B, accuracy otherwise)",
    True: "Scores: loss per token on the validation rows, lower is better",
}
CORRECTED = (
    "95 %: of this comparison alone. 95 % jointly: widened so that the intervals of all rows hold together "
    "(Bonferroni); read p with these, because it is adjusted for the same comparisons (Holm). Detectable: the true "
    "difference that this comparison finds in 80 % of repetitions after that correction, if its noise is as estimated."
)
RULES = (
    f"Difference from the reference, paired by seed and row. {CORRECTED}",
    "Each search has the same number of trials of the learning rate. Trainable: of the entries of the MLP weights, "
    "without the head.",
    "steps/s and peak MiB: medians over the runs, which shared their machine; the benchmark (docs/performance.md) has "
    "undisturbed ones.",
)
TARGET = "h to target: until full fine-tuning's held-out score minus one point is first reached."
FORGETTING = (
    "Forgetting: loss on general text after training minus before, mean over the runs that were measured (their "
    "number); positive means forgetting."
)


def describe_scores(is_loss: bool) -> list[str]:
    """What scores, differences and costs are."""
    first = (
        f"{SCORES[is_loss]}: mean ± sample std over seeds (number of seeds); the checkpoint is chosen on held-out "
        "training rows. Average: over comparable tasks (fewest seeds of a task), by which the rows are sorted; rows "
        "with too few seeds are last. Its interval is that of docs/evidence.md."
    )
    return [first, *RULES, *([] if is_loss else [TARGET])]


def describe_health(health: Mapping[str, Health]) -> list[str]:
    """One note per task: whether it is comparable, runs that still improve, missing seeds, and what floors may do."""
    lines = []
    for task, found in health.items():
        parts = [found.verdict, f"{found.improving[0]} of {found.improving[1]} runs still improving at the end"]
        parts += [f"seeds not run yet: {'; '.join(found.missing)}"] if found.missing else []
        parts += [f"exempt: {one}" for one in found.exempt]
        lines.append(f"{task}: {'; '.join(parts)}.")
    return lines


def describe_floors(block: Block) -> list[str]:
    """The arms that are shown to read the others by."""
    names = [style_of(arm).name for arm in block.arms if block.is_floor(arm)]
    if not names:
        return []
    return [
        f"Floors, to read the other scores by: {', '.join(names)}. They may predict one class or still improve at the "
        "end (exempt), and a task stays comparable."
    ]


def describe_partial(labels: Sequence[str]) -> list[str]:
    """Methods whose averages are over fewer tasks."""
    if not labels:
        return []
    return [
        f"{', '.join(labels)}: average, differences, costs and forgetting are over the named tasks alone, so they "
        "cannot be compared with those of other rows. They are below the methods with all tasks, whatever their score."
    ]


def describe_reference(block: Block, reference: str) -> list[str]:
    """Which arm replaces the planned reference, and why."""
    planned = block.plan.reference if block.plan else None
    if planned in (None, reference):
        return []
    return [
        f"Reference: {style_of(reference).name}, the first method of the plan that has runs, because "
        f"{style_of(str(planned)).name} has none; METHODS={planned} makes them."
    ]


def describe_sizes(block: Block, shares: Mapping[str, float]) -> list[str]:
    """Arms that train another share of the weights than the plan says; floors have no size."""
    planned = block.plan.share if block.plan else None
    if planned is None:
        return []
    other = [
        f"{style_of(arm).name} {100 * share:.3g} %"
        for arm, share in shares.items()
        if not block.is_floor(arm) and abs(share - planned) > SIZE_TOLERANCE * planned
    ]
    if not other:
        return []
    return [
        f"Methods train about {100 * planned:g} % of the MLP weights, except {', '.join(other)}: their scores are not "
        "those of equal sizes."
    ]


def describe_unmerged(block: Block) -> list[str]:
    """The methods whose change cannot be merged into the weights, by their records."""
    names = {run.arm for run in block.all_runs() if (run.record.get("method") or {}).get("merges") is False}
    return [f"peft cannot merge these into the weights: {', '.join(sorted(names))}."] if names else []
