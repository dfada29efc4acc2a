"""Cells of the evidence tables: scores, differences, hours, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from experiments.palette import style_of
from experiments.report.clock import BENCHED, Clock, TargetTime, hours_to_target, is_benched, training_hours
from experiments.report.evidence import Evidence
from experiments.report.gates import Health
from experiments.report.resampling import LOWER_IS_BETTER
from experiments.report.runs import Block
from experiments.report.searches import Searches
from experiments.report.stats import Difference, Summary, interquartile_mean, summarise
from experiments.report.tables.base import MISSING, hours, interval_text
from experiments.report.tables.costs import Cost

JOINT = "95 % jointly"  # column of the intervals that all hold together


def format_score(scores: Sequence[float], metric: str) -> str:
    found = summarise(scores)
    if found is None:
        return MISSING
    return f"{_format_mean(found, 3 if metric in LOWER_IS_BETTER else 2)} ({found.n})"


def _format_mean(found: Summary, digits: int) -> str:
    spread = "" if found.std is None else f" ± {found.std:.{digits}f}"
    return f"{found.mean:.{digits}f}{spread}"


def format_averages(block: Block, arm: str, own: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """The average over an arm's tasks, which are named if the table has more, and its interquartile mean."""
    if not tasks:
        return {"average": "", "IQM": ""}
    found, middle = block.average(arm, own), interquartile_mean(block.averages(arm, own))
    if found is None:
        return {"average": MISSING, "IQM": MISSING}
    digits = 3 if block.metric(own[0]) in LOWER_IS_BETTER else 2
    average = _format_mean(found, digits) + _count_seeds(block, arm, own) + name_tasks(own, tasks)
    return {"average": average, "IQM": MISSING if middle is None else f"{middle:.{digits}f}"}


def _count_seeds(block: Block, arm: str, tasks: Sequence[str]) -> str:
    """Number of seeds behind an average; where tasks have different ones, the fewest and most, and the common ones."""
    counts, common = [len(block.of(arm, task)) for task in tasks], len(block.averages(arm, tasks))
    if common == max(counts):
        return f" ({common})"
    span = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
    return f" ({span}, {common} common)"


def name_tasks(own: Sequence[str], tasks: Sequence[str]) -> str:
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
    smallest = found.detectable(comparisons)
    is_small = smallest is not None and max(abs(found.value), smallest) < 0.1
    digits = 3 if is_loss or is_small else 2
    value = f"{found.value:+.{digits}f}{name_tasks(found.tasks, tasks)}"
    if not found.has_seeds:
        return {**blank, "difference": value, "95 %": f"too few seeds ({found.seeds} paired)"}
    if smallest is None:
        return {**blank, "difference": value, "95 %": "equal in every run"}
    return {
        "difference": value,
        "95 %": interval_text(found.interval, digits),
        JOINT: interval_text(found.interval_of(comparisons), digits),
        "p (Holm)": "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
        "detectable": f"{smallest:.{digits}f}",
    }


def format_costs(
    evidence: Evidence, block: Block, arm: str, tasks: Sequence[str], searches: Searches, clock: Clock
) -> dict[str, str]:
    """Trials and hours of the searches, hours of training, and hours to the target, over these tasks."""
    runs = [run for task in tasks for run in block.of(arm, task).values()]
    trials = sorted({search.trials for search in searches.of_runs(runs)})
    return {
        "trials per search": " / ".join(map(str, trials)) or "none",
        "search h": hours(clock.search_hours(arm, runs, searches)),
        "training h": hours(training_hours(block, arm, tasks, clock)),
        "h to target": _format_target(hours_to_target(evidence, block, arm, tasks, clock), clock),
    }


def _format_target(found: TargetTime, clock: Clock) -> str:
    if found.missed:
        return f"not reached by {', '.join(found.missed)}"
    if found.unknown and not clock.is_known:
        return "reached"
    return f"unknown on {', '.join(found.unknown)}" if found.unknown else hours(found.hours)


def format_trainable(block: Block, arm: str) -> dict[str, str]:
    """Trained entries of the MLP weights over all of them."""
    share = median_share(block, arm)
    return {"trainable": "" if share is None else f"{100 * share:.2f} %"}


def median_share(block: Block, arm: str) -> float | None:
    """Trained entries of the MLP weights over all of them; None if no record says."""
    runs = (run.record for run in block.runs_of(arm))
    counts = [about for run in runs if (about := (run.get("trainable") or {}).get("mlp"))]
    return median(about["trained"] / about["total"] for about in counts) if counts else None


def format_speed(block: Block, arm: str, costs: Mapping[str, Cost]) -> dict[str, str]:
    """Steps/s and peak memory of the benchmark, which has MiniLM in the paper's regime alone."""
    cost = costs.get(BENCHED.get(arm, "")) if is_benched(block) else None
    return {
        "steps/s": "" if cost is None else f"{cost.speed:.2f}",
        "peak MiB": "" if cost is None else f"{cost.peak_mib:.0f}",
    }


def format_rates(block: Block, arm: str, task: str) -> str:
    rates = {run.record["config"].get("train", {}).get("lr") for run in block.of(arm, task).values()}
    return ", ".join(f"{rate:g}" for rate in sorted(rate for rate in rates if rate is not None))


def describe_machine(block: Block, machine: str) -> str:
    if not is_benched(block) or not machine:
        return "steps/s and peak memory: not measured by the benchmark for this model and regime."
    same = [style_of(arm).name for arm in block.arms if BENCHED.get(arm) == BENCHED["lora"]]
    shared = f" The same arm there: {'; '.join(same)}." if len(same) > 1 else ""
    return f"steps/s, peak: results/bench/{machine}, MiniLM on snippets, everything trains; medians.{shared}"
