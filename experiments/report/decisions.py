"""How a claim is decided from results: each kind of decision returns what was measured and what follows from it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from experiments.mtbench.scores import compute_scores
from experiments.palette import style_of
from experiments.report import figures
from experiments.report.bench_ratios import CUT, ON_CPU, machine_ratios
from experiments.report.blocks import BLOCKS
from experiments.report.evidence import load_evidence
from experiments.report.gates import check_task
from experiments.report.resampling import LOWER_IS_BETTER
from experiments.report.searches import Searches
from experiments.report.stats import Difference, paired_interval
from experiments.report.tables import basis, calibration
from experiments.report.tables.base import Context
from experiments.report.tables.grades import ALL_TURNS, Grades, complete_grades, count_answers, grade
from sparsegrad.errors import UserError

SUPPORTED, CONTRADICTED, UNDECIDED, NOT_TESTED = "supported", "contradicted", "undecided", "not tested here"
REPRODUCED = "reproduced"  # as below, but as the paper says
NOT_REPRODUCED = "not reproduced"  # a claim, measured elsewhere than where the paper did: on a CPU
FINAL_SEEDS = 5  # a verdict from fewer is provisional
Spec = Mapping[str, Any]
Rule = Callable[[Difference, bool, int], str]
"""Difference of a part, whether lower is better, number of parts of its claim -> verdict."""


@dataclass(frozen=True)
class Decision:
    """What follows from one part of a claim in one place.

    Attributes:
        verdict: SUPPORTED, CONTRADICTED, UNDECIDED or NOT_TESTED.
        measured: what was measured, or why nothing was.
        interval: at 95 %; None for a part without one.
        joint: of how many parts the interval is widened for, because it is undecided only together with them; else 1.
        unit: of the interval.
        mixed: of an undecided part without an interval: what speaks for it and what against.
        seeds: paired seeds; 0 where the part has none.
        see: tables that it rests on.
        place: limit of a verdict, such as a kind of machine.
        tasks: on which the arms were compared; empty where the part has none.
    """

    verdict: str
    measured: str
    interval: tuple[float, float] | None = None
    joint: int = 1
    unit: str = "points"
    mixed: str = ""
    seeds: int = 0
    see: tuple[str, ...] = ()
    place: str = ""
    tasks: tuple[str, ...] = ()


def decide(context: Context, spec: Spec, parts: int = 1) -> list[Decision]:
    """The decisions of one part of a claim, one for each place where it can be tested.

    Args:
        context: whose results decide.
        spec: the part, from claims.yaml.
        parts: number of differences that decide the claim. Each of them can refute it, so that a refutation must
            survive the correction for their number. No correction is due for support, which needs all of them.

    Raises:
        UserError: for an unknown kind.
    """
    kind = spec.get("kind")
    if kind not in KINDS:
        raise UserError(f"claims.yaml: kind={kind} is not allowed: choose one of {', '.join(KINDS)}")
    return list(KINDS[kind](context, {**spec, "parts": parts}))


def count_differences(spec: Spec) -> int:
    """Number of differences with an interval in one part of a claim, each of which can refute the claim."""
    if spec["kind"] == "grade":
        return 1
    return len(spec["blocks"]) if spec["kind"] in ("difference", "margin") else 0


def _decide_pairs(context: Context, spec: Spec, rule: Rule) -> Iterable[Decision]:
    for folder in spec["blocks"]:
        yield _decide_pair(context, spec, folder, rule)


def _decide_pair(context: Context, spec: Spec, folder: str, rule: Rule) -> Decision:
    """Two arms of one block, over its comparable tasks on which both have enough seeds."""
    evidence, searches = load_evidence(context), Searches(context.results)
    block, see = evidence.blocks[folder], (folder,)
    a, b = str(spec["a"]), str(spec["b"])
    where = BLOCKS[folder].short
    both = [task for task in block.tasks if block.of(a, task) and block.of(b, task)]
    if not both:
        missing = " and ".join(_name(arm) for arm in (a, b) if arm not in block.arms) if block.runs else ""
        return Decision(NOT_TESTED, f"{where}: {missing + ' ' if missing else ''}not run yet", see=see)
    health = {task: check_task(evidence, folder, task, searches) for task in both}
    tasks = [task for task in both if health[task].is_comparable]
    if not tasks:
        return Decision(NOT_TESTED, f"{where}: {next(iter(health.values())).verdict}", see=see)
    counting = block.tasks_of(a, b, tasks)
    found = evidence.compare(folder, a, b, counting) if counting else None
    if found is None or found.interval is None:
        equal = found is not None and found.has_seeds
        why = "equal in every run" if equal else f"fewer than {block.fewest_seeds} paired seeds"
        return Decision(NOT_TESTED, f"{where}: {why} on {', '.join(counting or tasks)}", see=see)
    is_loss = block.metric(tasks[0]) in LOWER_IS_BETTER
    measured = f"{where}: {_name(a)} minus {_name(b)} {_describe_interval(found, 3 if is_loss else 2)}, "
    measured += f"{', '.join(counting)}, {found.seeds} seeds"
    if few := [task for task in tasks if task not in counting]:
        measured += f" (not {', '.join(few)}: fewer than {block.fewest_seeds} paired seeds)"
    verdict, joint = _judge(found, spec, rule, is_loss)
    unit = "in loss" if is_loss else "points"
    interval = found.interval_of(joint)
    return Decision(verdict, measured, interval, joint, unit, seeds=found.seeds, see=see, tasks=tuple(counting))


def _judge(found: Difference, spec: Spec, rule: Rule, is_loss: bool) -> tuple[str, int]:
    """Verdict of a difference, and the number of parts for which the interval that decides it is widened."""
    # A margin has no direction of its own: a loss that is higher is worse.
    is_lower_better = spec["expect"] == "lower" if "expect" in spec else is_loss
    verdict = rule(found, is_lower_better, spec["parts"])
    # Refuted alone, but not together with the other parts of the claim: the interval that says so is shown.
    joint = spec["parts"] if verdict == UNDECIDED and rule(found, is_lower_better, 1) != UNDECIDED else 1
    return verdict, joint


def _describe_interval(found: Difference, digits: int) -> str:
    assert found.interval is not None
    low, high = found.interval
    return f"{found.value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def _name(arm: str) -> str:
    return style_of(arm).name


def _rule_margin(found: Difference, lower: bool, parts: int, bound: float = 0.0) -> str:
    """Supported if the interval excludes a loss of `bound` or more; contradicted if it lies beyond it."""
    low = _orient(found.interval_of(1), lower)[0]
    high = _orient(found.interval_of(parts), lower)[1]
    return SUPPORTED if low > -bound else CONTRADICTED if high < -bound else UNDECIDED


def _orient(interval: tuple[float, float] | None, lower: bool) -> tuple[float, float]:
    """The interval of a gain: where lower is better, that of the negative difference."""
    assert interval is not None
    return (-interval[1], -interval[0]) if lower else interval


def _decide_difference(context: Context, spec: Spec) -> Iterable[Decision]:
    return _decide_pairs(context, spec, _rule_margin)


def _decide_margin(context: Context, spec: Spec) -> Iterable[Decision]:
    return _decide_pairs(context, spec, functools.partial(_rule_margin, bound=float(spec["bound"])))


def _decide_bench(context: Context, spec: Spec) -> Iterable[Decision]:
    """A ratio of two arms of the benchmark in the setting of Table 3; every repeat must be on one side of the bound."""
    found = machine_ratios(context.results, spec["arm"], spec["over"], spec["field"])
    what = "steps/s" if spec["field"] == "steps_per_second" else "peak memory"
    see = ("table3_measured",)  # table3 has one model alone, which need not be the one with enough repeats
    if not found:
        yield Decision(NOT_TESTED, f"{what} of {spec['arm']} over {spec['over']}: not measured in 3 repeats", see=see)
    lower = "at_most" in spec
    bound = float(spec["at_most"] if lower else spec["at_least"])
    for machine, ratios in found.items():
        holds = [ratio <= bound if lower else ratio >= bound for ratio in ratios]
        verdict = SUPPORTED if all(holds) else UNDECIDED if any(holds) else CONTRADICTED
        times = f"{median(ratios):.2f} times that of {spec['over']} ({machine})"
        place = " ".join([f"on {ON_CPU}"] * (ON_CPU in machine) + [f"with a {CUT}"] * (CUT in machine))
        mixed = f"{what} {min(ratios):.2f} to {max(ratios):.2f} times, on both sides of {bound:g}"
        yield Decision(verdict, f"{what} of {spec['arm']} {times}", mixed=mixed, see=see, place=place)


def _decide_energy(context: Context, spec: Spec) -> Iterable[Decision]:
    """Energy of the largest 1 % of entries in two bases, for both kinds of layer at every measured step."""
    found, see = basis.read(context.results), tuple(spec["see"])
    if found is None:
        yield Decision(NOT_TESTED, "no gradients measured", see=see)
        return
    for kind in figures.KINDS:
        a, b = (basis.kept_energy(found, str(spec[name]), kind) for name in ("a", "b"))
        above = [a[step] > b[step] for step in sorted(a)]
        first, last = min(a), max(a)
        shown = (
            f"{kind} layers of {found['model']}: the largest 1 % hold {100 * a[first]:.0f} % of the energy in HOSVD's "
            f"basis, {100 * b[first]:.0f} % in the plain one; after {last} steps {100 * a[last]:.0f} % and "
            f"{100 * b[last]:.0f} %"
        )
        verdict = SUPPORTED if all(above) else UNDECIDED if any(above) else CONTRADICTED
        yield Decision(verdict, shown, mixed=f"more at {sum(above)} of {len(above)} steps", see=see)


def _decide_zeros(context: Context, spec: Spec) -> Iterable[Decision]:
    """Supported if at least this share of dL/dY is zero; how much of it is padding does not decide, but is shown."""
    found, see = figures.read_data(context, "figure3"), tuple(spec["see"])
    if found is None:
        yield Decision(NOT_TESTED, "no gradients measured", see=see)
        return
    rows = [row for row in found["shares"] if row["pad"] == "max_length"]
    blocks = [row["nonzero"][kind] for row in rows for kind in figures.KINDS]
    zeros = 1 - mean(share for shares in blocks for share in shares)
    # The last block is special: only its first token reaches the classifier.
    inner = 1 - mean(share for shares in blocks for share in shares[:-1])
    padding = 1 - mean(row["real_tokens"] for row in rows)
    shown = (
        f"{found['model']}, padded to 128 as by the authors: {100 * zeros:.0f} % of dL/dY is zero; "
        f"{100 * padding / inner:.1f} % of the zeros are on padding tokens, except in the last block, where the first "
        "token alone has a gradient"
    )
    verdict = SUPPORTED if zeros >= float(spec["at_least"]) else CONTRADICTED
    yield Decision(verdict, shown, see=see)


def _decide_calibration(context: Context, spec: Spec) -> Iterable[Decision]:
    """The printed memory against that of the stack of section 3.1, which has the gradients of all blocks and steps."""
    for one in calibration.PRINTED:
        numbers = calibration.arithmetic(one)
        printed, stack = calibration.in_mb(one.memory), numbers["gradients of all blocks, 30 steps"]
        closest = min(numbers, key=lambda name: abs(numbers[name] - printed))
        shown = (
            f"{one.model}: the stack of section 3.1 takes {stack:,.0f} MB; the printed {one.memory} are closest to "
            f"'{closest}', {numbers[closest]:,.0f} MB"
        )
        verdict = CONTRADICTED if stack > float(spec["bound"]) * printed else SUPPORTED
        yield Decision(verdict, shown, see=tuple(spec["see"]))


def _decide_grade(context: Context, spec: Spec) -> Iterable[Decision]:
    """Grades of two arms, paired by question; every judge that graded both completely must be on one side."""
    model, methods, see = str(spec["model"]), [str(spec[name]) for name in ("a", "b")], tuple(spec["see"])
    graded = compute_scores(context.results / "mtbench")
    found = complete_grades(graded, model, methods)
    if not found:
        both = all(grade(graded, model, method)["judge's score"] for method in methods)
        why = f"no judge graded all {ALL_TURNS} turns of both" if both else "no judged answers"
        yield Decision(NOT_TESTED, f"{model}: {why}", see=see)
        return
    gains = {judge: _gains(a, b) for judge, (a, b) in found.items()}
    shown = "; ".join(_describe_grades(judge, a, b) for judge, (a, b) in found.items())
    parts = int(spec["parts"])
    single, joint = ([paired_interval(one, count) for one in gains.values()] for count in (1, parts))
    verdict = SUPPORTED if _are_all(single, "above") else CONTRADICTED if _are_all(joint, "below") else UNDECIDED
    # Refuted alone, but not together with the other parts of the claim: the interval that says so is shown.
    widened = parts if verdict == UNDECIDED and _are_all(single, "below") else 1
    widest = max(filter(None, joint if widened > 1 else single), key=width, default=None)
    # The interval is over questions: it knows nothing of how much another seed would change.
    seeds = min(count_answers(graded, model, method) for method in methods)
    yield Decision(verdict, f"{model}: {shown}", widest, widened, unit="in grade", seeds=seeds, see=see)


def _are_all(intervals: Iterable[tuple[float, float] | None], side: str) -> bool:
    """Whether all intervals exist and are on one side of 0: `above` or `below`."""
    return all(one is not None and (one[0] > 0 if side == "above" else one[1] < 0) for one in intervals)


def width(interval: tuple[float, float]) -> float:
    """Of an interval."""
    return interval[1] - interval[0]


def _gains(a: Grades, b: Grades) -> list[float]:
    return [a[question] - b[question] for question in sorted(a)]


def _describe_grades(judge: str, a: Grades, b: Grades) -> str:
    means = f"grades {mean(a.values()):.2f} and {mean(b.values()):.2f} by {judge}"
    interval = paired_interval(_gains(a, b))
    return means if interval is None else f"{means} ({interval[0]:+.2f} to {interval[1]:+.2f})"


KINDS: dict[str, Callable[[Context, Spec], Iterable[Decision]]] = {
    "difference": _decide_difference,
    "margin": _decide_margin,
    "bench": _decide_bench,
    "energy": _decide_energy,
    "zeros": _decide_zeros,
    "calibration": _decide_calibration,
    "grade": _decide_grade,
}
