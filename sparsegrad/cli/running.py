"""Run one composed configuration for `run.py`: what it prints and its exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.tree import Tree

from sparsegrad.cli.entry import FailedJobs
from sparsegrad.cli.screen import replace_unprintable
from sparsegrad.distributed import is_main
from sparsegrad.errors import UserError, missing_package
from sparsegrad.progress import job, remark, say, silence
from sparsegrad.runs.names import name_method
from sparsegrad.runs.overrides import list_given
from sparsegrad.trainer.quiet import quiet_libraries

if TYPE_CHECKING:  # it brings in transformers and datasets
    from sparsegrad.runs.config import RunConfig
    from sparsegrad.runs.result_lines import Published

# Products that each of torch's two caches for bfloat16 on a CPU (oneDNN's and ideep's) keeps, one for every shape.
# Batches of many lengths meet hundreds of shapes: with 1024, the default of both, one linear of 384 x 1536 held 670 MiB
# after 400 lengths, with 64 it held 130 MiB, and runs were as fast (1.93 and 1.95 steps/s).
KEPT_PRODUCTS = 64

console = Console()


def run_command(composed: DictConfig, published: Published | None = None) -> None:
    """Run one composed configuration. A `UserError` is one line and its status; Ctrl-C is status 130.

    Ctrl-C during training saves a checkpoint first, as do SIGTERM and SIGUSR1, which exit with 143 and 138.

    Args:
        composed: what Hydra composed.
        published: finds the paper's score, to which the result is compared.
    """
    replace_unprintable()
    try:
        _run(composed, published)
    except UserError as error:
        _refuse(error)
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "number", signal.SIGINT)
        how = "interrupted" if number == signal.SIGINT else f"stopped by {interrupt}"
        if is_main():
            then = "; ".join(getattr(interrupt, "__notes__", ["nothing had begun yet"]))
            print(f"\n{how}: {then}", file=sys.stderr)
        sys.exit(128 + number)


def _refuse(error: UserError) -> NoReturn:
    """Print the error and exit; in a multirun raise it, so that Hydra runs the other jobs and exits with 1."""
    if not error.silent:
        print(f"error: {error}", file=sys.stderr)
    if _is_multirun():
        raise FailedJobs(f"error: {error}") from None
    sys.exit(error.status)


def _run(composed: DictConfig, published: Published | None) -> None:
    cap_product_caches()
    if composed.get("quiet"):
        silence()
    with job("starting"):
        # Importing transformers and torch takes seconds, which `--help` and a mistyped override should not cost.
        from sparsegrad.runs.names import with_current_names, with_one_amount
        from sparsegrad.runs.runner import run as run  # all that a run needs
        from sparsegrad.threads import limit_threads
        from sparsegrad.trainer.quiet import quiet_transformers

    limit_threads()
    composed = with_current_names(with_one_amount(composed, list_given()))
    labels = {**_label_plan(), **apply_hparams(composed)}
    quiet_libraries()
    quiet_transformers()
    if composed.get("sweep") is None:
        _run_once(composed, labels, published)
    else:
        without = " without sweep.overwrite=true" if composed.sweep.get("overwrite") else ""
        with _noted_stop(lambda: f"the same command{without} continues the search"):
            _sweeps("pool").run_sweep(composed, labels)


@contextmanager
def _noted_stop(describe: Callable[[], str]) -> Iterator[None]:
    """Within: Ctrl-C or a signal carries a note on what the same command does next."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(describe())
        raise


def _run_once(composed: DictConfig, labels: Mapping[str, Any], published: Published | None) -> None:
    from sparsegrad.runs.config import build
    from sparsegrad.runs.result_lines import describe_stop
    from sparsegrad.runs.runner import run

    config = build(composed)
    console.quiet = not is_main()
    if is_main() and _is_later_job():
        remark("")
    if composed.get("verbose"):
        console.print(tree("run " + config.key, config.resolved))
    with _noted_stop(lambda: describe_stop(config, is_one_of_several=_is_multirun())):
        record, is_new = run(config, labels=labels, announces=True)
        if is_main():
            _print_result(config, record, published, is_new=is_new)


def _is_multirun() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _is_later_job() -> bool:
    """Whether this is not the first job of a multirun: an empty line separates it from the one before."""
    return _is_multirun() and HydraConfig.get().job.num > 0


def _print_result(config: RunConfig, record: Mapping[str, Any], published: Published | None, *, is_new: bool) -> None:
    """Print the score and, unless quiet, what to compare it with, its cost and where everything is."""
    from sparsegrad.runs.result_lines import describe_result, describe_reuse, find_troubles

    if not is_new:
        remark(describe_reuse(config))
    say(outcome(record))
    for line in describe_result(config, record, published):
        remark(line)
    for trouble in find_troubles(config, record):
        say(f"warning: {trouble}", file=sys.stderr)


def _label_plan() -> dict[str, Any]:
    """What the record says about the experiment that the command line names."""
    from sparsegrad.runs.plan import current_plan

    plan = current_plan()
    return {} if plan is None else {"plan": plan}


def apply_hparams(composed: DictConfig) -> dict[str, Any]:
    """Put the values that `hparams=` names into `composed`; the labels of the record that say so."""
    return {} if composed.get("hparams") is None else {"hparams": _sweeps("hparams").apply(composed)}


def _sweeps(name: str) -> Any:
    try:
        return import_module(f"sparsegrad.sweeps.{name}")
    except ModuleNotFoundError as error:
        raise missing_package("a sweep", error.name, "sweep") from None


def cap_product_caches() -> None:
    """Keep memory flat over hours of batches with many lengths. Call it before the first matrix product.

    Values that the user set in the environment stay.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_PRODUCTS))


def tree(title: str, node: Mapping[str, Any]) -> Tree:
    """A configuration as a tree."""
    root = Tree(title)
    _grow(root, node)
    return root


def _grow(branch: Tree, node: Mapping[str, Any]) -> None:
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            _grow(branch.add(f"[bold]{name}[/bold]"), value)
        else:
            branch.add(f"{name}: {value}", highlight=True)


def outcome(record: Mapping[str, Any]) -> str:
    """One line on the result of a run.

    Raises:
        UserError: for a record that lacks a field.
    """
    try:
        return _outcome(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        key = record.get("key")
        raise UserError(f"record {key} lacks a field ({error!r}): delete it and run again") from None


def _outcome(record: Mapping[str, Any]) -> str:
    result, config = record["result"], record["config"]
    return (
        f"{config['model']['name']} / {name_method(config['method'])} / {config['task']['name']}: "
        f"{result['metric']} {result['value']:.4f} on {result['split']} "
        f"(chosen on {result['chosen_on']} at step {result['chosen_step']} of {result['steps']})"
    )
