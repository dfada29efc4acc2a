"""From the words of run.py's command line to Hydra: help, short names, and one line for what Hydra refuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import CompactHydraException, HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from sparsegrad.cli.screen import replace_unprintable
from sparsegrad.errors import run_as_command
from sparsegrad.runs.overrides import expand_aliases, explain, refuse_none
from sparsegrad.runs.yaml_check import check_folder

_FULL = "HYDRA_FULL_ERROR"
# Hydra's own options; those with a value take it from the next word.
_FLAGS = {
    "--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m", "--shell-completion",
    "-sc", "--info", "-i",
}  # fmt: skip
_WITH_VALUE = {
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
    "--experimental-rerun",
}  # fmt: skip


class FailedJobs(CompactHydraException):
    """Jobs of a multirun failed; each has printed its error."""


def start_run(main: Callable[[], Any], conf: Path) -> int:
    """Run `main`, which `hydra.main` decorates, on the words of this process's command line.

    Returns:
        The exit status: 2 for a mistake of the user and 1 if jobs of a multirun failed, after one line each.
    """
    replace_unprintable()
    words = sys.argv[1:]
    status = run_as_command(lambda: _start(main, words, conf))
    if status == 0 and "torch" in sys.modules:  # a help text does not import it
        from sparsegrad.distributed import disconnect

        disconnect()
    return status


def _start(main: Callable[[], Any], words: Sequence[str], conf: Path) -> int:
    check_folder(conf)
    overrides = _pick_overrides(words)
    if wrong := next((word for word in overrides if word.startswith("-")), None):
        raise explain(OverrideParseException(wrong, ""), overrides, conf)
    if {"--help", "-h"} & set(words):
        from sparsegrad.cli.help_text import make_help

        print(make_help(overrides, conf))
        return 0
    refuse_none(overrides, conf)
    sys.argv[1:] = expand_aliases(words)
    if _FULL in os.environ:  # the user wants Hydra's own report
        main()
        return 0
    os.environ[_FULL] = "1"  # Hydra then raises its errors instead of printing them
    try:
        main()
    except FailedJobs:
        return 1
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if not _is_of_hydra(error):
            raise
        raise explain(error, overrides, conf) from None
    finally:
        del os.environ[_FULL]
    return 0


def _pick_overrides(words: Sequence[str]) -> list[str]:
    """The words that are no options of Hydra."""
    found, is_value = [], False
    for word in words:
        name, sign, _ = word.partition("=")
        if not is_value and name not in _FLAGS | _WITH_VALUE:
            found.append(word)
        is_value = not is_value and name in _WITH_VALUE and not sign
    return found


def _is_of_hydra(error: Exception) -> bool:
    """Whether composing the configuration failed. Hydra has one ValueError of its own, for `model=null`."""
    return not isinstance(error, ValueError) or str(error).startswith("Config group override")
