"""Cells of the evidence tables: scores, differences, hours, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from experiments.palette import style_of
from experiments.report.evidence import Evidence
from experiments.report.gates import Health, reference_runs
from experiments.report.plans import REGIMES
from experiments.report.resampling import LOWER_IS_BETTER
from experiments.report.runs import Block
from experiments.report.searches import Searches
from experiments.report.stats import Difference, interquartile_mean, summarise
from experiments.report.tables.base import MISSING, hours, interval_text
from experiments.report.tables.costs import Cost

# Arm -> arm of the benchmark.
BENCHED = {
    "full": "full",
    "lora": "lora_peft",
    "lora_tuned": "lora_peft",
    "meprop": "meprop",
    "sparsegrad": "exact",
    "sparsegrad_small": "exact_small",
    "sparsegrad_authors": "authors",
    "sparsegrad_fast": "fast",
}
BENCHED_MODEL = "minilm"
JOINT = "95 % jointly"  # column of the intervals that all hold together
TARGET = 1.0  # points below full fine-tuning's score


def format_score(scores: Sequence[float], metric: str) -> str:
    found = summarise(scores)
    if found is None:
        return MISSING
    digits = 3 if metric in LOWER_IS_BETTER else 2
    spread = "" if found.std is None else f" ± {found.std:.{digits}f}"
    return f"{found.mean:.{digits}f}{spread} ({found.n})"


def format_averages(block: Block, arm: str, own: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """The average over an arm's tasks, which are named if the table has more, and its interquartile mean."""
    if not tasks:
        return {"average": "", "IQM": ""}
    if not own:
        return {"average": MISSING, "IQM": MISSING}
    values, metric = block.averages(arm, own), block.metric(own[0])
    middle = interquartile_mean(values)
    digits = 3 if metric in LOWER_IS_BETTER else 2
    average = format_score(values, metric) + _name_tasks(own, tasks)
    return {"average": average, "IQM": MISSING if middle is None else f"{middle:.{digits}f}"}


def _name_tasks(own: Sequence[str], tasks: Sequence[str]) -> str:
    """Which tasks a number is of, if they are not all of the table's."""
    return "" if set(own) == set(tasks) else f" ({', '.join(own)} only)"


def format_difference(
    found: Difference | None,
    p: float | None,
    is_reference: bool,
    health: Mapping[str, Health],
    comparisons: int,
    tasks: Sequence[str],
    is_loss: bool,
) -> dict[str, str]:
    """The columns of one of several comparisons; the reason where there is none. `tasks` are those of its row."""
    blank = dict.fromkeys(("difference", "95 %", JOINT, "p (Holm)", "detectable"), "")
    if is_reference:
        return {**blank, "difference": "reference"}
    failed = [one for one in health.values() if not one.is_comparable]
    if len(failed) == len(health):
        return {**blank, "difference": failed[0].verdict}
    if found is None:
        return {**blank, "difference": MISSING}
    smallest = found.detectable(comparisons) or 0.0
    digits = 3 if is_loss or (abs(found.value) < 0.1 and smallest < 0.1) else 2
    value = f"{found.value:+.{digits}f}{_name_tasks(found.tasks, tasks)}"
    if not found.has_seeds:
        return {**blank, "difference": value, "95 %": f"too few seeds ({found.seeds} paired)"}
    if found.interval is None:
        return {**blank, "difference": value, "95 %": "equal in every run"}
    return {
        "difference": value,
        "95 %": interval_text(found.interval, digits),
        JOINT: interval_text(found.interval_of(comparisons), digits),
        "p (Holm)": "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
        "detectable": f"{smallest:.{digits}f}",
    }


def format_costs(
    evidence: Evidence, block: Block, arm: str, tasks: Sequence[str], searches: Searches
) -> dict[str, str]:
    """Trials and hours of the searches, hours of training, and hours to the target, over these tasks."""
    behind = searches.of_runs(run for task in tasks for run in block.of(arm, task).values())
    trials = sorted({search.trials for search in behind})
    return {
        "trials per search": " / ".join(map(str, trials)) or "none",
        "search h": f"{sum(search.hours for search in behind):.2f}" if behind else "",
        "training h": hours(training_hours(block, arm, tasks)),
        "h to target": _format_target(evidence, block, arm, tasks),
    }


def training_hours(block: Block, arm: str, tasks: Sequence[str]) -> float | None:
    """Hours of one seed over these tasks: the sum of the means over seeds; None if a task has no times."""
    total = 0.0
    for task in tasks:
        spent = [run.hours for run in block.of(arm, task).values() if run.hours is not None]
        if not spent:
            return None
        total += mean(spent)
    return total if tasks else None


@dataclass(frozen=True)
class TargetTime:
    """Hours over tasks until a target score, the sum of the means over seeds; None if a task has none.

    Attributes:
        hours: the sum.
        missed: tasks on which some seed does not reach the target, with their number: "1 of 3 seeds (stsb)".
        unknown: tasks on which all seeds reach it, but some at an unknown time, because its speed was not measured.
    """

    hours: float | None = None
    missed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def hours_to_target(evidence: Evidence, block: Block, arm: str, tasks: Sequence[str]) -> TargetTime:
    """Hours over these tasks until full fine-tuning's held-out score minus one point is first reached."""
    total, missed, unknown = 0.0, [], []
    method = block.plan.gate_method if block.plan else "full"
    for task in tasks:
        references = reference_runs(evidence, block.folder, task, method)
        runs = block.of(arm, task).values()
        if not runs or not references or block.metric(task) in LOWER_IS_BETTER:
            return TargetTime()
        target = mean(run.chosen_score for run in references) - TARGET
        times = [time for run in runs if (time := run.hours_until(target)) is not None]
        if missing := sum(not run.reaches(target) for run in runs):
            missed.append(f"{missing} of {len(runs)} seeds ({task})")
        elif len(times) < len(runs):
            unknown.append(task)
        else:
            total += mean(times)
    found = tasks and not missed and not unknown
    return TargetTime(total if found else None, tuple(missed), tuple(unknown))


def _format_target(evidence: Evidence, block: Block, arm: str, tasks: Sequence[str]) -> str:
    found = hours_to_target(evidence, block, arm, tasks)
    if found.missed:
        return f"not reached by {', '.join(found.missed)}"
    return f"unknown on {', '.join(found.unknown)}" if found.unknown else hours(found.hours)


def format_speed(block: Block, arm: str, costs: Mapping[str, Cost]) -> dict[str, str]:
    """Steps/s and peak memory of the benchmark, which has MiniLM in the paper's regime alone."""
    cost = costs.get(BENCHED.get(arm, "")) if _is_benched(block) else None
    return {
        "steps/s": "" if cost is None else f"{cost.speed:.2f}",
        "peak MiB": "" if cost is None else f"{cost.peak_mib:.0f}",
    }


def format_rates(block: Block, arm: str, task: str) -> str:
    rates = {run.record["config"].get("train", {}).get("lr") for run in block.of(arm, task).values()}
    return ", ".join(f"{rate:g}" for rate in sorted(rate for rate in rates if rate is not None))


def describe_machine(block: Block, machine: str) -> str:
    if not _is_benched(block) or not machine:
        return "steps/s and peak memory: not measured by the benchmark for this model and regime."
    same = [style_of(arm).name for arm in ("lora", "lora_tuned") if arm in block.arms]
    shared = f" {' and '.join(same)} have the same arm there." if len(same) > 1 else ""
    return f"steps/s, peak: results/bench/{machine}, MiniLM on snippets, everything trains; medians.{shared}"


def _is_benched(block: Block) -> bool:
    models = {run.record["config"]["model"]["name"] for run in block.all_runs()}
    return models == {BENCHED_MODEL} and (block.plan is None or REGIMES[block.plan.regime])
