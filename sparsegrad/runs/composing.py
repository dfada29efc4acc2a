"""Configurations of many runs in one process, faster than Hydra composes each.

A grid has few choices of groups, such as method and task, and many values, such as rates and folders. Each choice is
composed once; values are set in a copy, because Hydra too sets them after it has merged all files.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Files = tuple[tuple[str, int, int], ...]


def compose_run(overrides: Sequence[str], conf: Path) -> DictConfig:
    """The configuration that run.py composes from these overrides; the caller may change it.

    Args:
        overrides: as for run.py, with full names (`expand_aliases`) and without those of Hydra itself.
        conf: the folder with `config.yaml`.

    Raises:
        HydraException, OmegaConfBaseException, ValueError: as Hydra's `compose`.
    """
    try:
        return _set_in_copy(overrides, conf)
    except (HydraException, OmegaConfBaseException, ValueError):
        return _compose(conf, overrides)  # composes what only Hydra can, and names what is wrong


def compose_with_choices(overrides: Sequence[str], conf: Path) -> tuple[DictConfig, dict[str, str | None]]:
    """What `compose_run` returns, and group -> the option that is chosen."""
    composed = _compose(conf, overrides, return_hydra_config=True)
    choices = dict(composed.hydra.runtime.choices)
    OmegaConf.set_readonly(composed, False)
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    return composed, choices


def read_sweep(experiment: str, conf: Path) -> dict[str, str]:
    """The sweeper parameters of an experiment: key -> values with commas; empty without any."""
    return dict(_sweep(conf, experiment, _list_files(conf)))


def _set_in_copy(overrides: Sequence[str], conf: Path) -> DictConfig:
    if any("shuffle(" in one for one in overrides):
        raise ValueError("Hydra orders this list anew in each call")
    parsed = [_parse(one) for one in overrides]
    if not all(map(_is_plain, parsed)):
        raise ValueError("more than choices and values")
    choices = [one for one in parsed if _is_choice(one, conf)]
    words = tuple(str(one.input_line) for one in choices)
    composed = copy.deepcopy(_compose_choices(conf, words, _list_files(conf)))
    for one in parsed:
        if one not in choices:
            OmegaConf.update(composed, one.key_or_group, one.value(), merge=True)
    return composed


def _is_choice(override: Override, conf: Path) -> bool:
    """Whether it chooses an option of a group; `method={rank: 3}` sets a value of the chosen one."""
    return (conf / override.key_or_group).is_dir() and not isinstance(override.value(), dict)


@lru_cache(maxsize=1000)
def _parse(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _is_plain(override: Override) -> bool:
    """Whether it is `key=value` with one value, and neither adds nor deletes a key."""
    plain = override.type is OverrideType.CHANGE and not override.is_sweep_override()
    return plain and override.package is None and not override.is_hydra_override()


@lru_cache(maxsize=64)
def _compose_choices(conf: Path, words: tuple[str, ...], files: Files) -> DictConfig:
    return _compose(conf, words)


@lru_cache(maxsize=64)
def _sweep(conf: Path, experiment: str, files: Files) -> dict[str, str]:
    composed = _compose(conf, [f"experiment={experiment}"], return_hydra_config=True)
    return {str(key): str(value) for key, value in (composed.hydra.sweeper.params or {}).items()}


def _compose(conf: Path, overrides: Sequence[str], **options: Any) -> DictConfig:
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", list(overrides), **options)


def _list_files(conf: Path) -> Files:
    """All files of conf with their times and sizes: what was composed holds as long as they stay as they are."""
    found = [(path, path.stat()) for path in conf.rglob("*.yaml")]
    return tuple(sorted((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in found))
