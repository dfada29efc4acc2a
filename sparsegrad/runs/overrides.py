"""Overrides of the command line: short names for common settings, and one line for what Hydra says in many.

Hydra's own advice for a mistyped key, `+train.batchsize=8`, would only fail later; here the nearest key is suggested.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsegrad.errors import UserError, closest, did_you_mean, fail, first_line

ALIASES = {"lr": "train.lr", "batch_size": "train.batch_size", "epochs": "protocol.epochs", "density": "method.density"}
# Names that users know from transformers and peft; they are suggested, not accepted.
_ELSEWHERE = {
    "learning_rate": "train.lr",
    "bs": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "gradient_accumulation_steps": "train.grad_accumulation",
    "num_train_epochs": "protocol.epochs",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "r": "method.rank",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "dataset": "task",
    "optimizer": "method",
    "output_dir": "results_dir",
}
_OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^=\s@]+)(?P<rest>(@[^=]*)?=.*)", re.DOTALL)
FEW = 10  # more choices than these are not listed after a suggestion


def expand_aliases(overrides: Iterable[str]) -> list[str]:
    """The overrides with the full names of settings: `lr=1e-4` becomes `train.lr=1e-4`. Options stay as they are."""
    return [_expand(one) for one in overrides]


def _expand(override: str) -> str:
    found = _OVERRIDE.fullmatch(override)
    if found is None or found["key"] not in ALIASES:
        return override
    return ALIASES[found["key"]] + found["rest"]  # without a sign: the setting exists already


def key_of(override: str) -> str:
    """`+train.lr=1` -> `train.lr`."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def list_given() -> set[str]:
    """The keys that the command line of this process sets; none where Hydra was not started by one."""
    return set(map(key_of, HydraConfig.get().overrides.task)) if HydraConfig.initialized() else set()


def list_groups(conf: Path) -> dict[str, list[str]]:
    """The groups of conf/ and their options, such as `lora` and `peft/dora`; not Hydra's own groups."""
    folders = sorted(path for path in conf.iterdir() if path.is_dir() and path.name != "hydra")
    return {
        folder.name: sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
        for folder in folders
    }


def explain(error: Exception, overrides: Sequence[str], conf: Path) -> UserError:
    """The error for what Hydra or OmegaConf refused: one line with the user's own words and what to write instead.

    Args:
        error: theirs.
        overrides: the words of the command line, as the user wrote them.
        conf: the folder of the configuration.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.partition("/")
        if group in list_groups(conf):
            return _explain_option(group, name, list_groups(conf)[group])
        group, _, name = error.missing_cfg_file.rpartition("/")
        return _explain_option(group, name, list(error.options))
    if isinstance(error, OverrideParseException):
        return _explain_syntax(error, overrides, conf)
    text = " ".join(str(error).split())
    if found := re.match(r"Could not (?:override|delete from config\.) '([^']+)'", text):
        return _explain_key(found[1], overrides, conf)
    if found := re.match(r"Could not append to config. An item is already at '([^']+)'", text):
        return UserError(f"+{found[1]} is set already: write it without +, {_find_word(found[1], overrides)}")
    if found := re.match(r"Multiple values for (\S+)\. To override a value use 'override \S+: ([^']*)'", text):
        return UserError(
            f"+{found[1]}={found[2]}: the group has a choice already; write {found[1]}={found[2]}, without +"
        )
    if found := re.match(r"Ambiguous value for argument '([^=]+)=", text):
        return _explain_several(found[1], overrides, conf)
    if text.startswith("Config group override must be"):
        return _explain_no_option(overrides, conf)
    cause = f" ({first_line(error.__cause__)})" if error.__cause__ else ""
    return UserError(f"the configuration cannot be composed: {text or type(error).__name__}{cause}")


def _explain_option(group: str, name: str, options: list[str]) -> UserError:
    """A group that does not have the option."""
    meant = _find_option(name, options) if name else None
    hint = "" if meant is None else f"did you mean {group}={meant}?"
    if hint and len(options) > FEW:
        return fail(group, name, f"{hint} run.py --help lists all")
    return fail(
        group, name, f"{hint} Choose one of {', '.join(options)}" if hint else f"choose one of {', '.join(options)}"
    )


def _find_option(name: str, options: Sequence[str]) -> str | None:
    """The option that `name` is probably a misspelling of; `dora` is the end of `peft/dora`."""
    ends = {option.rpartition("/")[2]: option for option in reversed(options)}
    found = closest(name, [*ends, *options])
    return None if found is None else ends.get(found, found)


def _explain_no_option(overrides: Sequence[str], conf: Path) -> UserError:
    """`model=null`, `model=3` or `=3`: a group without the name of an option."""
    for word in overrides:
        key, _, value = word.partition("=")
        if key in list_groups(conf) and value not in list_groups(conf)[key]:
            return _explain_option(key, value, list_groups(conf)[key])
    return UserError("an override has no key: write key=value; run.py --help lists the keys")


def _explain_syntax(error: OverrideParseException, overrides: Sequence[str], conf: Path) -> UserError:
    """An override that is not key=value, or has signs that need quotes."""
    word = next((one for one in overrides if _expand(one) == error.override), error.override or "")
    if "=" in word:
        key, _, value = word.partition("=")
        if value.startswith("~"):
            return UserError(f"{word} cannot be read: write {key}=$HOME{value[1:]}")
        return UserError(f"{word} cannot be read: put the value in two pairs of quotes, '{key}=\"{value}\"'")
    for group, options in list_groups(conf).items():
        if option := next((one for one in options if word in (one, one.rpartition("/")[2])), None):
            return UserError(f"{word} is not key=value: did you mean {group}={option}?")
    if word in list_groups(conf):
        return UserError(f"{word} is not key=value: choose {word}={'|'.join(list_groups(conf)[word])}")
    hint = did_you_mean(word, ("--help", "--multirun", "--cfg")) if word.startswith("-") else ""
    return UserError(f"{word} is not key=value: {hint or 'write for example lr=1e-4; run.py --help lists the keys'}")


def _explain_several(key: str, overrides: Sequence[str], conf: Path) -> UserError:
    word = _find_word(key, overrides)
    values = word.partition("=")[2]
    as_list = "" if key in list_groups(conf) else f", or write '{key}=[{values}]' for a list"
    return UserError(f"{word} are several values: add -m to run one after the other{as_list}")


def _explain_key(key: str, overrides: Sequence[str], conf: Path) -> UserError:
    """A key that the configuration does not have."""
    word = _find_word(key, overrides)
    composed = _compose_rest(key, overrides, conf)
    group, _, name = key.partition(".")
    if group == "sweep" and name and composed.get("sweep") is None:
        return UserError(f"{word} is not allowed: no sweep is chosen; add one, for example sweep=quick")
    node: Any = OmegaConf.select(composed, key.rpartition(".")[0]) if "." in key else None
    if isinstance(node, DictConfig):
        return _explain_field(word, key, node, composed)
    return UserError(f"{word} is not allowed: there is no {key}; {_suggest_key(key, composed, conf)}")


def _explain_field(word: str, key: str, node: DictConfig, composed: DictConfig) -> UserError:
    """A field that a node, such as `train` or the chosen method, does not have."""
    where, _, name = key.rpartition(".")
    fields = [str(field) for field in node if not str(field).startswith("_") and field != "name"]
    chosen = OmegaConf.select(composed, f"{where}.name") if "." not in where else None
    owner = f"{where}={chosen}" if chosen else where
    if name == "density" and "rank" in fields:
        return UserError(f"{word} is not allowed: {owner} has no density; give {where}.rank")
    if not fields:
        return UserError(f"{word} is not allowed: {owner} has no {name}, and no other settings")
    return UserError(f"{word} is not allowed: {describe_unknown(owner, where, name, fields)}")


def describe_unknown(owner: str, where: str, name: str, fields: Sequence[str]) -> str:
    """What an error says about a field that does not exist: the nearest one, or all there are."""
    near = _ELSEWHERE.get(name, "").removeprefix(f"{where}.")
    near = near if near in fields else closest(name, fields) or ""
    prefix = f"{where}." if where else ""
    rest = f"did you mean {prefix}{near}?" if near else f"it has {', '.join(fields)}"
    return f"{owner or 'a run'} has no {name}; {rest}"


def check_fields(maker: Callable[..., Any], fields: Mapping[str, Any], where: str, owner: str) -> None:
    """Check that `maker` takes all `fields`, such as those of the node `where` of the configuration.

    Raises:
        UserError: for the first that it does not take.
    """
    parameters = inspect.signature(maker).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return
    unknown = [name for name in fields if name not in parameters]
    if unknown:
        known = [name for name in parameters if name != "resolved" and not (where and name == "name")]
        path = f"{where}.{unknown[0]}" if where else str(unknown[0])
        reason = describe_unknown(owner, where, str(unknown[0]), known)
        raise UserError(f"{path}={fields[unknown[0]]} is not allowed: {reason}")


def _suggest_key(key: str, composed: DictConfig, conf: Path) -> str:
    """`did you mean KEY?` for a key outside all nodes; where nothing is near, where to look."""
    paths = _list_paths(composed)
    nested = [path for path in paths if path.count(".") == 1]
    last = re.split(r"[./]", key)[-1]
    same = [path for path in nested if path.endswith(f".{last}")]
    if "." in key:
        found = closest(key, same) or closest(key, nested)
    elif last in _ELSEWHERE or same:
        found = _ELSEWHERE.get(last) or same[0]
    else:
        found = closest(key, [*list_groups(conf), *ALIASES, *(path for path in paths if "." not in path)])
        ends = {path.rpartition(".")[2]: path for path in reversed(nested)}
        found = found or ends.get(closest(last, ends) or "")
    return f"did you mean {found}?" if found else "run.py --help lists the keys"


def _list_paths(node: DictConfig, prefix: str = "") -> list[str]:
    """Dotted names of all keys."""
    paths: list[str] = []
    for name in node:
        paths.append(prefix + str(name))
        child = node._get_node(name)  # not the value: an interpolation might fail
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            paths += _list_paths(child, f"{prefix}{name!s}.")
    return paths


def _find_word(key: str, overrides: Iterable[str]) -> str:
    """The user's own word that sets `key`."""
    words = [
        one.lstrip("+") for one in overrides if key_of(_expand(one)) == key or key_of(_expand(one)).startswith(key)
    ]
    return words[-1] if words else key


def _compose_rest(key: str, overrides: Sequence[str], conf: Path) -> DictConfig:
    """The configuration without the overrides of `key`; where others are wrong too, that of the groups or nothing."""
    rest = [one for one in map(_expand, overrides) if key_of(one) != key and "=" in one]
    # Of several values, as in a multirun, the first will do.
    groups = [one.split(",")[0] for one in rest if key_of(one) in list_groups(conf)]
    for chosen in (rest, groups, []):
        try:
            with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
                return compose("config", chosen)
        except (HydraException, OmegaConfBaseException, ValueError):
            continue
    return OmegaConf.create()
