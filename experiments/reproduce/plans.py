"""The plans of the evidence: conf/experiment/evidence_*.yaml, their `evidence` node, and the order of their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.paths import CONF
from experiments.report import plans as report_plans
from experiments.report.blocks import STEPS, Step
from experiments.report.plans import REGIMES, EvidencePlan
from sparsegrad.errors import UserError, check_choice, fail, first_line
from sparsegrad.runs.composing import compose_run


def list_blocks(name: str) -> list[Step]:
    """The blocks that a name stands for, in the order of execution: one, both of `2`, or `all`.

    Raises:
        UserError: for an unknown name.
    """
    check_choice("BLOCK", name, sorted({*(step.name for step in STEPS), "2", "all"}))
    return [step for step in STEPS if name in ("all", step.name, step.name[0])]


def read_plan(name: str) -> EvidencePlan:
    """Read a plan and check that its runs follow its `evidence` node.

    Raises:
        UserError: if the YAML cannot be composed, or a value of `evidence` is missing or not allowed.
    """
    try:
        composed = compose_run([f"experiment={name}"], CONF)
        node: Any = OmegaConf.to_container(composed.evidence, resolve=False) if composed.evidence else None
        train_rest = composed.train.train_rest
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"plan {name}: {first_line(error)}") from None
    if not isinstance(node, Mapping):
        raise UserError(f"plan {name} has no evidence node: conf/experiment/evidence_paper.yaml shows one")
    for key in ("regime", "gates", "budget", "seeds", "min_seeds", "max_improving"):
        if key not in node:
            raise UserError(f"plan {name} lacks evidence.{key}: conf/experiment/evidence_paper.yaml shows it")
    plan = report_plans.read_plan(name, CONF)  # what only the report needs is refused now, not after the runs
    assert plan is not None
    _check_runs(plan, train_rest)
    return plan


def _check_runs(plan: EvidencePlan, train_rest: bool) -> None:
    """Refuse a plan whose runs have another regime, or other seeds, than its rules."""
    where = f"plan {plan.experiment}: evidence"
    if REGIMES[plan.regime] is not train_rest:
        reason = f"train.train_rest is {str(train_rest).lower()}"
        raise fail(f"{where}.regime", plan.regime, reason, "make both of one regime")
    seeds = plan.grid.get("seed", ())
    if tuple(map(str, plan.seeds)) != seeds:
        raise fail(f"{where}.seeds", list(plan.seeds), f"its runs have {','.join(seeds)}", "make both the same")
