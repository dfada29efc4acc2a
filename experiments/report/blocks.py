"""The blocks of the evidence: their order, their names in tables, and the commands that make their runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the evidence, complete by itself.

    Attributes:
        name: as on the command line.
        plans: its experiment YAMLs; empty: the searches of all plans.
        overrides: which part of the plans it runs.
        takes_trees: whether its data are conversation trees instead of GLUE.
    """

    name: str
    plans: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    takes_trees: bool = False


STEPS = (
    Step(name="0", plans=("evidence_gates",)),
    Step(name="1"),
    Step(name="2a", plans=("evidence_paper",), overrides=("seed=42,3705,2023",)),
    Step(name="3", plans=("evidence_mlp_only",)),
    Step(name="4", plans=("evidence_density", "evidence_basis")),
    Step(name="5", plans=("evidence_base",)),
    Step(name="6", plans=("evidence_smollm2",), takes_trees=True),
    Step(name="2b", plans=("evidence_paper",), overrides=("seed=37,7777",)),
)


@dataclass(frozen=True)
class About:
    """How a block is named: title of its table, and short name."""

    title: str
    short: str


# Folder below results/runs, which is the name of its plan, too.
BLOCKS = {
    "evidence_paper": About("All methods, the paper's regime, MiniLM", "MiniLM"),
    "evidence_mlp_only": About("All methods, MLP weights and head alone, MiniLM", "MiniLM, MLP only"),
    "evidence_base": About("Base size, the paper's regime, MPNet-base", "MPNet-base"),
    "evidence_density": About("Number of kept entries, MLP weights and head alone, MiniLM", "kept entries"),
    "evidence_basis": About(
        "HOSVD's basis, the authors', a random one and none, MLP weights and head alone, MiniLM", "bases"
    ),
    "evidence_smollm2": About("Language model, validation loss, SmolLM2", "SmolLM2"),
    "evidence_gates": About("Health gates: full fine-tuning at several rates, MiniLM", "gates"),
}
# Table of the paper -> block that has the same comparison on a small model.
IN_SMALL = {
    **dict.fromkeys(("table4", "table5", "table9", "table10"), "evidence_paper"),
    **dict.fromkeys(("table11", "table12"), "evidence_density"),
}


def block_command(folder: str, seeds: Collection[int] = ()) -> str:
    """The command that makes the runs of a block: those of these seeds, or all."""
    steps = [step for step in STEPS if folder in step.plans]
    enough = [step for step in steps if seeds and set(map(str, seeds)) <= set(_list_seeds(step))]
    # Parts of a plan have a letter; the number alone stands for all of them.
    name = (enough or steps)[0].name if enough or len(steps) == 1 else steps[0].name[0]
    data = "TREES=<file of trees>" if steps[0].takes_trees else "DATA=<glue folder>"
    return f"make evidence BLOCK={name} {data}"


def describe_repeat(folder: str, seed: int) -> str:
    """How one run of a folder is made again, in words: its block repeats the runs that do not count."""
    command = block_command(folder, [seed]) if folder in BLOCKS else "the command that made it"
    return f"{command} makes it again"


def _list_seeds(step: Step) -> Iterator[str]:
    """The seeds that a step chooses from its plan."""
    for one in step.overrides:
        key, _, value = one.partition("=")
        if key == "seed":
            yield from value.split(",")
