"""The error type for mistakes in the input, and the checks that raise it."""

from __future__ import annotations

import difflib
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

from sparsegrad import namesake as namesake  # imported for its check: every module imports this one
from sparsegrad.extras import explain_missing, install_command

Function = TypeVar("Function", bound=Callable[..., Any])


class UserError(ValueError):
    """A mistake in the input. The message names the value, what is allowed and the remedy.

    A command prints it as one line and exits with its status.
    """

    silent = False  # True when another process prints the same error
    status = 2


BUSY = 75  # the exit status that sysexits.h gives to "try again later"
DIVERGED = "diverged"  # in the message of each error by which a run ends because its loss or predictions are not finite


class BusyError(UserError):
    """Another process is working on the same run."""

    status = BUSY


class ResourceError(UserError):
    """A file, disk, device or process failed, which says nothing about the run: its checkpoints are kept."""


class FailedRunError(UserError):
    """Training showed that a run is not worth finishing: it diverges, or its sweep stops it. No checkpoint is kept."""


def fail(name: str, value: object, allowed: str, remedy: str = "") -> UserError:
    """Build the error for `name=value`; the caller raises it."""
    return UserError(f"{name}={value} is not allowed: {allowed}" + (f"; {remedy}" if remedy else ""))


def run_as_command(command: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run the main function of a command line; a user's mistake and Ctrl-C end in one line instead of a traceback.

    Args:
        command: returns the exit status; None means 0.
        interrupted: the line after Ctrl-C, which says what is kept.

    Returns:
        The exit status: that of `command` or of its `UserError`, 2 where the package of an extra is missing, 130 after
        Ctrl-C, 141 after `command | head`.
    """
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun starts several of the same process
    try:
        status = command() or 0
        sys.stdout.flush()  # here, where a closed pipe can still be handled
        return status
    except UserError as error:
        if not error.silent and is_first:
            print(f"error: {error}", file=sys.stderr)
        return error.status
    except ModuleNotFoundError as error:
        if (text := explain_missing(error)) is None:
            raise
        if is_first:
            print(f"error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout again at exit; without this it would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def closest(name: object, known: Iterable[object]) -> str | None:
    """The entry of `known` that `name` is probably a misspelling of; upper case and separators do not count."""
    plain = {_letters(one): str(one) for one in reversed(list(known))}
    found = difflib.get_close_matches(_letters(name), plain, n=1, cutoff=0.6)
    return plain[found[0]] if found else None


def did_you_mean(name: object, known: Iterable[object], prefix: str = "") -> str:
    """`did you mean PREFIX...?` for the closest entry of `known`; empty without one."""
    found = closest(name, known)
    return "" if found is None else f"did you mean {prefix}{found}?"


def _letters(name: object) -> str:
    return "".join(letter for letter in str(name).lower() if letter not in "_-. ")


def warn_renamed(old: str, new: str) -> None:
    """Warn, once per place in the code, that `old` is now called `new`; the caller accepts both names."""
    warnings.warn(f"{old} is now called {new}; the old name still works", FutureWarning, stacklevel=3)


def renamed_arguments(quiet: bool = False, **names: str) -> Callable[[Function], Function]:
    """Let a function accept arguments under earlier names.

    Args:
        quiet: do not warn, because the old name is a permanent alias.
        **names: old name -> new name.

    Raises:
        UserError: from the function, when an argument is given under both names.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def accepting(*args: Any, **given: Any) -> Any:
            for old, new in names.items():
                if old in given:
                    if new in given:
                        raise UserError(f"{old}= and {new}= are one argument: give {new}= alone")
                    if not quiet:
                        warn_renamed(f"{old}=", f"{new}=")
                    given[new] = given.pop(old)
            return function(*args, **given)

        return accepting  # type: ignore[return-value]

    return decorate


def missing_package(what: str, package: str | None, extra: str) -> UserError:
    """The error for a feature `what` whose `package` is not installed; `extra` is the extra that installs it."""
    return UserError(f"{what} needs the package {package}: run {install_command(extra)}")


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, or its class name if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    remedy: str = "",
) -> float:
    """Return `value` as a finite float inside the bounds, or raise `UserError`."""
    # bool is an int in Python; the comparison with the largest float excludes infinity and NaN.
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not number or not (value > above and at_least <= value <= at_most and value < below):
        raise _refuse_number(name, value, _format_bounds("a number", above, at_least, at_most, below), remedy)
    return float(value)


def check_integer(
    name: str, value: Any, *, at_least: float = -math.inf, at_most: float = math.inf, remedy: str = ""
) -> int:
    """Return `value` as an int inside the bounds, or raise `UserError`."""
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
        bounds = _format_bounds("a whole number", -math.inf, at_least, at_most, math.inf)
        raise _refuse_number(name, value, bounds, remedy)
    return value


def check_choice(name: str, value: Any, choices: Collection[Any], remedy: str = "", *, none: str = "None") -> Any:
    """Return `value` if it is one of `choices`, or raise `UserError` that lists them.

    Args:
        name: of the argument or setting.
        value: what was given.
        choices: what is allowed.
        remedy: what else to say.
        none: how the user writes None: `null` for a setting of a configuration.
    """
    if value not in choices:
        written = [none if one is None else str(one) for one in choices]
        # "None" is nearer to `online` than to `null`.
        meant = none if value == "None" and None in choices else value
        hint = did_you_mean(meant, written) if isinstance(value, str) else ""
        # Quotes tell a text from the choice that is printed alike, such as the text None.
        shown = repr(value) if isinstance(value, str) and value in written else value
        raise fail(name, shown, "choose one of " + ", ".join(written), "; ".join(filter(None, (hint, remedy))))
    return value


def check_text(name: str, value: Any) -> str:
    """Return `value` if it is a non-blank string, or raise `UserError`."""
    if not isinstance(value, str) or not value.strip():
        raise fail(name, value, "give a text", f"a number becomes one in quotes: {name}=\\'1\\'")
    return value


def _refuse_number(name: str, value: Any, bounds: str, remedy: str) -> UserError:
    """The error for a value that is not a number within `bounds`, or only looks like one when it is printed."""
    if not isinstance(value, int | float):
        try:
            float(value)
        except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
            pass
        else:  # "0.01", a tensor, numpy's float32: the value may be right, but its type is not
            return UserError(
                f"{name}={value!r} is a {type(value).__name__}: give {bounds}" + (remedy and f"; {remedy}")
            )
    return fail(name, value, f"give {bounds}", remedy)


def _format_bounds(kind: str, above: float, at_least: float, at_most: float, below: float) -> str:
    if at_least > -math.inf and at_most < math.inf:
        return f"{kind} from {_format_bound(at_least)} to {_format_bound(at_most)}"
    words = {"above": above, "at least": at_least, "at most": at_most, "below": below}
    bounds = " and ".join(f"{word} {_format_bound(bound)}" for word, bound in words.items() if math.isfinite(bound))
    return f"{kind} {'of ' if bounds.startswith('at ') else ''}{bounds}".strip()


def _format_bound(bound: float) -> str:
    # Not `:g` for an integer: it would round 4294967295 to 4.29497e+09.
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
