"""Overrides of the command line: short names for common settings, and one line for what Hydra says in many.

Hydra's own advice for a mistyped key, `+train.batchsize=8`, would only fail later; here the nearest key is suggested.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsegrad.errors import UserError, closest, did_you_mean, fail, first_line
from sparsegrad.runs.composing import compose_run
from sparsegrad.runs.near_keys import describe_unknown, find_exact, find_key, list_paths

ALIASES = {"lr": "train.lr", "batch_size": "train.batch_size", "epochs": "protocol.epochs", "density": "method.density"}
_OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^=\s@]+)(?P<rest>(@[^=]*)?=.*)", re.DOTALL)
# Settings of which a list is one value, also where the chosen one is none; some models do not have them.
_LISTS = ("model.kinds", "model.dense", "model.blocks", "task.langs")
# Hydra's options that users mistype; their short forms are too short to be near anything.
_OPTIONS = ("--help", "--multirun", "--cfg")
_QUOTED = re.compile(r"[\"'\[({]")  # signs of a text, list or mapping, in which a comma parts no values
_NONE = re.compile(r"(^|[,:])(\s*)None(?=\s*([,}]|$))")  # a whole value, of several or of a field
_NONE_FIELD = re.compile(r"(\w+)\s*:\s*None\s*[,}]")
_PLAIN_VALUE = re.compile(r"[\w.+/-]+")
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
        return _explain_several(found[1].lstrip("+"), overrides, conf)
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
    choose = f"{hint} Choose one of {', '.join(options)}" if hint else f"choose one of {', '.join(options)}"
    is_source = group == "model" and ("/" in name or bool(name and not hint))
    own = f"for a hub id or a folder, write model=MODEL model.source={name}, MODEL being the one of its architecture"
    return fail(group, name, choose, own if is_source else "")


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
    if word.startswith("-"):
        return _explain_option_word(word, overrides, conf)
    if "=" in word:
        return _explain_value(word, overrides, conf)
    for group, options in list_groups(conf).items():
        if option := next((one for one in options if word in (one, one.rpartition("/")[2])), None):
            return UserError(f"{word} is not key=value: did you mean {group}={option}?")
    if word in list_groups(conf):
        return UserError(f"{word} is not key=value: choose {word}={'|'.join(list_groups(conf)[word])}")
    return UserError(f"{word} is not key=value: write for example lr=1e-4; run.py --help lists the keys")


def _explain_value(word: str, overrides: Sequence[str], conf: Path) -> UserError:
    """A value that Hydra cannot read."""
    key, _, value = word.partition("=")
    parts = [part.strip() for part in value.split(",")]
    if value.startswith("~"):
        return UserError(f"{word} cannot be read: write {key}=$HOME{value[1:]}")
    if "" in parts and not _QUOTED.search(value):
        kept = ",".join(filter(None, parts)) or "..."
        how = f"{key}={kept}; for several values, add -m and write no spaces between them"
        if _takes_list(key_of(word), _compose_rest(key_of(word), overrides, conf)):
            how = f"'{key}=[{kept}]'"
        return UserError(f"{word} cannot be read: a value is missing beside a comma; write {how}")
    return UserError(f"{word} cannot be read: put the value in two pairs of quotes, '{key}=\"{value}\"'")


def _explain_option_word(word: str, overrides: Sequence[str], conf: Path) -> UserError:
    """`--method lora` or `--method=lora`, as other programs write key=value; or an option of Hydra's, mistyped."""
    name, sign, value = word.lstrip("-").partition("=")
    name = name.replace("-", "_")
    composed = _compose_rest(name, overrides, conf)
    key = find_exact(name.removeprefix("no_"), composed, [*list_groups(conf), *ALIASES])
    is_switch = key is not None and isinstance(OmegaConf.select(composed, key), bool)
    if key is None or (name.startswith("no_") and not is_switch):
        hint = did_you_mean(word, _OPTIONS) or "write settings as lr=1e-4; run.py --help lists them"
        return UserError(f"{word} is no option: {hint}")
    after = overrides[overrides.index(word) + 1 :][:1]
    if not sign and after and "=" not in after[0] and not after[0].startswith("-"):
        word, value = f"{word} {after[0]}", after[0]
    if is_switch and not value:
        value = "false" if name.startswith("no_") else "true"
    # A value that Hydra reads in another way, or that means something else there, is not repeated.
    is_same = _PLAIN_VALUE.fullmatch(value) and value != "None" and name not in ("fp16", "bf16")
    return UserError(f"{word} is no option: settings have no dashes; write {key}={value if is_same else '...'}")


def _explain_several(key: str, overrides: Sequence[str], conf: Path) -> UserError:
    """Several values without -m; a list is suggested only where the setting takes one."""
    word, composed = _find_word(key, overrides), _compose_rest(key, overrides, conf)
    whole = next((one for one in overrides if one.lstrip("+") == word), word)
    if not whole.startswith("+") and key in _LISTS and key not in list_paths(composed):
        return _explain_key(key, overrides, conf)
    name, _, values = whole.partition("=")
    as_list = f", or write '{name}=[{values}]' for a list" if _takes_list(key, composed) else ""
    return UserError(f"{word} are several values: add -m to run one after the other{as_list}")


def _takes_list(key: str, composed: DictConfig) -> bool:
    return key in _LISTS or isinstance(OmegaConf.select(composed, key), ListConfig)


def refuse_none(overrides: Sequence[str], conf: Path) -> None:
    """Refuse `key=None` where null is the value without it: a text, such as a folder or a branch, of that name.

    Raises:
        UserError: for the first such word. Of other settings, their own checks say what is allowed.
    """
    for word in overrides:
        key, _, value = word.partition("=")
        others = [one for one in overrides if one != word]
        if any(_is_null(setting, others, conf) for setting in _find_nones(key_of(word), value)):
            written = _NONE.sub(r"\1\2null", value)
            raise UserError(f"{word} is not allowed: None would be a text here; write {key}={written}")


def _find_nones(key: str, value: str) -> Iterator[str]:
    """The settings that a value sets to None, which has no quotes: `key` itself, or fields as of `{dir: None}`."""
    if not _QUOTED.search(value):
        yield from [key] if "None" in map(str.strip, value.split(",")) else []
    elif value.startswith("{"):
        yield from (f"{key}.{name}" for name in _NONE_FIELD.findall(value))


def _is_null(key: str, overrides: Sequence[str], conf: Path) -> bool:
    composed = _compose_rest(key, overrides, conf)
    return key in list_paths(composed) and OmegaConf.select(composed, key) is None


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
    found = find_key(key, composed, [*list_groups(conf), *ALIASES])
    hint = f"did you mean {found}?" if found else "run.py --help lists the keys"
    return UserError(f"{word} is not allowed: there is no {key}; {hint}")


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
            return compose_run(chosen, conf.resolve())
        except (HydraException, OmegaConfBaseException, ValueError):
            continue
    return OmegaConf.create()
