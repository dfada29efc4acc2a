"""Health of a table's runs: whether its arms can be compared on a task, and if not, why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

from experiments.palette import order_of, style_of
from experiments.report.evidence import Evidence
from experiments.report.resampling import LOWER_IS_BETTER
from experiments.report.runs import Block, EvidenceRun
from experiments.report.searches import ALIKE, Searches
from sparsegrad.errors import DIVERGED

GATES = "evidence_gates"  # the block of gates alone
# What a collapsed run predicts, by metric; of the others, one class.
COLLAPSED = {
    "pearson": "numbers that hardly differ, or none, for all rows",
    "nll": "rows with a loss that is not finite",
}


@dataclass(frozen=True)
class Health:
    """What is known of one task of a block.

    Attributes:
        reasons: why differences on this task mean nothing; empty if they do.
        gate: points that full fine-tuning must reach; None without a gate.
        reached: points that it reaches, mean over report seeds; None without runs.
        improving: runs that still improve at their last evaluation, and all runs.
        missing: one text per arm that lacks seeds.
        exempt: what the plan's floors do that would stop a comparison of other arms.
        gate_folder: the block whose runs reached it, if that is another one.
    """

    reasons: tuple[str, ...]
    gate: float | None
    reached: float | None
    improving: tuple[int, int]
    missing: tuple[str, ...]
    exempt: tuple[str, ...] = ()
    gate_folder: str = ""

    @property
    def is_comparable(self) -> bool:
        """Whether the arms can be compared."""
        return not self.reasons

    @property
    def verdict(self) -> str:
        """`ok`, or the first reason."""
        return f"not comparable: {self.reasons[0]}" if self.reasons else "ok"


def check_task(evidence: Evidence, folder: str, task: str, searches: Searches) -> Health:
    """The health of one task of a block with runs."""
    block = evidence.blocks[folder]
    runs = list(block.all_runs(task))
    floors = [run for run in runs if block.is_floor(run.arm)]
    judged = [run for run in runs if not block.is_floor(run.arm)]
    improving = sum(run.still_improving for run in judged), len(judged)
    gate = None if block.plan is None else block.plan.gates.get(task)
    method = "full" if block.plan is None else block.plan.gate_method
    references = reference_runs(evidence, folder, task, method)
    reached = mean(run.score for run in references) if references else None
    reasons = [
        *_check_gate(block, task, gate, reached),
        # A rate that is too high may well end in one class; of the block of gates only the best rate counts.
        *_check_collapsed(references if folder == GATES else judged),
        *([] if folder == GATES else _check_diverged(block, task)),
        *_check_improving(block, improving),
        *_check_data(runs),
        *_check_budget(block, runs, searches),
        *_check_alike(block, runs, searches),
    ]
    return Health(
        reasons=tuple(reasons),
        gate=gate,
        reached=reached,
        improving=improving,
        missing=tuple(_missing_seeds(block, task)),
        exempt=(*_check_collapsed(floors), *_count_improving(floors)),
        gate_folder=next((place for run in references if (place := run.path.parts[0]) != folder), ""),
    )


def comparable_tasks(evidence: Evidence, folder: str, searches: Searches) -> list[str]:
    """Tasks of a block whose arms can be compared."""
    tasks = evidence.blocks[folder].tasks
    return [task for task in tasks if check_task(evidence, folder, task, searches).is_comparable]


def reference_runs(evidence: Evidence, folder: str, task: str, method: str = "full") -> list[EvidenceRun]:
    """Runs of the gate's method: of the block that its plan names, or else of this one, with the same model.

    A comparison may have `full` as one of its methods; there it trains less than in the block that is named.
    The block of gates has several rates with one seed each: there the run counts that is best on held-out rows. Other
    blocks do not fall back on it: its schedule, pooling and rows are not theirs.
    """
    own = evidence.blocks[folder]
    name = (own.plan.gate_experiment if own.plan else None) or folder
    if name not in evidence.blocks:
        return []
    block, models = evidence.blocks[name], {_model(run) for run in own.all_runs(task)}
    arms = [arm for arm in block.arms if arm.partition(" ")[0] == method]
    found = [run for arm in arms for run in block.of(arm, task).values() if _model(run) in models]
    return [max(found, key=lambda run: run.chosen_score)] if found and name == GATES else found


def _model(run: EvidenceRun) -> str:
    return str(run.record["config"]["model"]["name"])


def _check_gate(block: Block, task: str, gate: float | None, reached: float | None) -> Iterator[str]:
    """A plan with gates needs one for every task; a plan without any, such as a language model's, has none to fail."""
    name = style_of(block.plan.gate_method if block.plan else "full").name
    is_loss = block.metric(task) in LOWER_IS_BETTER
    if gate is None:
        if block.plan is None or block.plan.gates:
            yield f"the plan has no gate for {task}"
    elif reached is None:
        yield f"{name} has no runs on {task}, so its gate of {gate:g} is not checked"
    elif (reached > gate) if is_loss else (reached < gate):
        yield f"{name} reached {reached:.2f} of {gate:g} on {task}"


def _check_collapsed(runs: list[EvidenceRun]) -> Iterator[str]:
    collapsed = [f"{run.arm} seed {run.seed}" for run in runs if run.has_collapsed]
    if collapsed:
        same = COLLAPSED.get(runs[0].metric, "one class for all rows")
        yield f"{', '.join(collapsed)} predict{'s' * (len(collapsed) == 1)} {same} of {runs[0].task}"


def _check_diverged(block: Block, task: str) -> Iterator[str]:
    """Planned seeds that diverged: without them, the others of their arm would look better than it is."""
    wanted = set(block.plan.seeds) if block.plan else set()
    arms = sorted({arm for arm, of in block.failed if of == task and not block.is_floor(arm)}, key=order_of)
    for arm in arms:
        failed = block.failures(arm, task)
        if seeds := sorted(seed for seed in wanted & set(failed) if DIVERGED in failed[seed]):
            yield f"{arm} diverged with seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} on {task}"


def _check_improving(block: Block, improving: tuple[int, int]) -> Iterator[str]:
    count, runs = improving
    limit = block.plan.max_improving if block.plan else 0.2
    if count > limit * runs:
        yield f"{count} of {runs} runs still improve at their last evaluation, more than {limit:.0%}".replace("%", " %")


def _count_improving(floors: list[EvidenceRun]) -> Iterator[str]:
    improving = [run.still_improving for run in floors]
    if any(improving):
        yield f"{sum(improving)} of {len(floors)} runs of the floors still improve at their last evaluation"


def _check_data(runs: list[EvidenceRun]) -> Iterator[str]:
    arms: dict[str, list[str]] = {}
    for run in runs:
        names = arms.setdefault(str(run.record.get("data", {}).get("fingerprint")), [])
        names.extend([run.arm] if run.arm not in names else [])
    if len(arms) > 1:
        groups = " and ".join(", ".join(names) for names in arms.values())
        yield f"arms have different data: {groups}"


def _check_budget(block: Block, runs: list[EvidenceRun], searches: Searches) -> Iterator[str]:
    """Arms whose search had another number of trials than the plan's budget, by its summary or else by the record."""
    wanted = block.plan.budget if block.plan else None
    if wanted is None:
        return
    found = {run.arm: trials for run in runs if (trials := searches.trials_of(run)) is not None}
    other = [f"{arm} {trials}" for arm, trials in sorted(found.items()) if trials != wanted]
    if other:
        yield f"searches have another budget than {wanted} trials: {', '.join(other)}"


def _check_alike(block: Block, runs: list[EvidenceRun], searches: Searches) -> Iterator[str]:
    """Arms whose searches were made otherwise; a summary that does not say how was made as the plan says."""
    if block.plan is None or block.plan.budget is None:
        return
    found = {run.arm: search.alike for run in runs if (search := searches.of_run(run)) is not None}
    for key in ALIKE:
        said = {arm: alike[key] for arm, alike in sorted(found.items()) if key in alike}
        if len(set(said.values())) > 1:
            yield f"searches differ in their {key}: {', '.join(f'{arm} {value}' for arm, value in said.items())}"
    seeds = set(map(str, block.plan.seeds))
    if reported := [arm for arm, alike in sorted(found.items()) if alike.get("seed") in seeds]:
        yield f"searches have a seed of the comparison: {', '.join(reported)}"


def _missing_seeds(block: Block, task: str) -> Iterator[str]:
    """One text per arm, of the plan or with runs, that lacks seeds of the plan; those that failed are marked."""
    wanted = set(block.plan.seeds) if block.plan else set()
    run = {arm.partition(" ")[0] for arm in block.arms}
    # A method that runs with an option alone (`peft config.r=8`) is not missing without it.
    planned = {arm for arm in _planned_arms(block) if arm not in run or block.failures(arm, task)}
    for arm in sorted({*block.arms, *planned}, key=order_of):
        failed = block.failures(arm, task)
        missing = sorted(wanted - set(block.of(arm, task)))
        if len(missing) == len(wanted) and wanted and not failed:
            yield f"{arm}: all"
        elif missing:
            yield f"{arm}: {', '.join(f'{seed} (failed)' if seed in failed else str(seed) for seed in missing)}"


def _planned_arms(block: Block) -> list[str]:
    """Methods of a plan whose arms differ in the method alone; otherwise the names of its arms are not known."""
    grid = block.plan.grid if block.plan else {}
    is_plain = set(grid) <= {"task", "seed", "method"}
    return [one.rpartition("/")[2] for one in grid.get("method", ())] if is_plain else []
