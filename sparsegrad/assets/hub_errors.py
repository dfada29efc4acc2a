"""What an error on the way to the Hugging Face hub means: one cause and one remedy, for models and data sets alike."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sparsegrad.errors import UserError, first_line

_LOGIN = "log in with `hf auth login` (or set HF_TOKEN)"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
_NOUNS = {"model": "model", "dataset": "data set"}
_MIXED_UP = "Consistency check failed"  # how `huggingface_hub` reports a file of another size than announced


def is_away(error: BaseException) -> bool:
    """Whether the hub as a whole cannot be used now, in contrast to an answer about one repository."""
    status = _find_status(error)
    return status is None or status in (408, 429) or status >= 500


def explain(error: BaseException, name: str, kind: str, *, state: str, prefetch: str, otherwise: str) -> UserError:
    """The error for the user.

    Args:
        error: as the hub's client raised it.
        name: of the repository.
        kind: `model` or `dataset`.
        state: of the repository in the cache, such as `not in the cache`.
        prefetch: the command that fills the cache on a machine that reaches the hub.
        otherwise: how to do without the hub.
    """
    what = f"{_NOUNS[kind]} {name}"
    chain = list(_walk_causes(error))
    if (refused := _explain_refusal(chain, what, name, kind, otherwise)) is not None:
        return refused
    if (unwritable := _explain_writing(chain, what)) is not None:
        return unwritable
    again = "try again when the hub answers"
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        again = "unset HF_HUB_OFFLINE"
    return UserError(
        f"{what} is {state}, and {describe(error)}: {again}; or download it where there is a network with "
        f"`{prefetch}` and copy the cache here (HF_HOME); or {otherwise}"
    )


def _explain_refusal(chain: list[BaseException], what: str, name: str, kind: str, otherwise: str) -> UserError | None:
    """The error for an answer of the hub about this repository; None where it gave none."""
    status = next((found for one in chain if (found := _find_status(one)) is not None), None)
    if any(isinstance(one, HFValidationError) for one in chain):
        return UserError(
            f"{what} is neither a folder here nor a name on the hub (org/name): correct it, or {otherwise}"
        )
    if any(isinstance(one, GatedRepoError) for one in chain):
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
        return UserError(
            f"{what} is gated: ask for access on {page}, then {_LOGIN} with that account's token, or {otherwise}"
        )
    if any(isinstance(one, RevisionNotFoundError) for one in chain):
        return UserError(f"{what} has no such revision: set model.revision= to a branch, tag or commit of it, or null")
    if status == 401 and any(_sent_token(one) for one in chain):
        return UserError(
            f"the hub refuses the token of this machine, which is invalid or has expired, for {what}: {_LOGIN} again, "
            f"remove it with `hf auth logout`, or {otherwise}"
        )
    if status in (401, 404) and not any(isinstance(one, RemoteEntryNotFoundError) for one in chain):
        return UserError(
            f"{what} is not on the hub, or is private: check the name, {_LOGIN} if it is private, or {otherwise}"
        )
    if any(isinstance(one, RepositoryNotFoundError) for one in chain):
        return UserError(f"{what} is not on the hub: check the name, or {otherwise}")
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        said = _find_message(chain)
        return UserError(
            f"the hub refuses {what} with status {status}{said}: check the token's permissions, or {otherwise}"
        )
    return None


def _explain_writing(chain: list[BaseException], what: str) -> UserError | None:
    """The error for a cache that cannot be written; None where that is not the cause."""
    for error in chain:
        number = error.errno if isinstance(error, OSError) and not isinstance(error, ConnectionError) else None
        reason = f"({getattr(error, 'strerror', None)})"
        if number in _NO_SPACE:
            return UserError(
                f"{what} does not fit on the disk {reason}: free space in {constants.HF_HUB_CACHE}, or set HF_HOME to "
                "a folder on a larger disk"
            )
        if number in _NOT_WRITABLE:
            return UserError(
                f"{what} cannot be stored {reason}: make {constants.HF_HUB_CACHE} writable, or set HF_HOME to a folder "
                "that is"
            )
    return None


def describe(error: BaseException) -> str:
    """Why the hub cannot be used, as half a sentence with the deepest cause."""
    chain = list(_walk_causes(error))
    text, names = first_line(chain[-1]), " ".join(type(one).__name__ for one in chain)
    status = next((found for one in chain if (found := _find_status(one)) is not None), None)
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        return "HF_HUB_OFFLINE is set"
    if status == 429:
        return "the hub refuses further requests for now (status 429)"
    if status is not None and status >= 500:
        return f"the hub has a server error (status {status})"
    if status is not None:
        return f"the hub refuses it (status {status})"
    if any(_MIXED_UP in str(one) for one in chain):
        return f"the download broke off ({_find_sizes(chain)})"
    if "ProxyError" in names:
        return f"the proxy does not let the request through ({text}; see HTTPS_PROXY)"
    if "SSL" in names + text or "CERTIFICATE" in text.upper():
        return f"the TLS connection to the hub fails ({text}; see SSL_CERT_FILE)"
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return f"{constants.ENDPOINT} answers, but not as a hub does ({text}; see HF_ENDPOINT)"
    if (proxy := _find_proxy()) is not None:
        return f"the hub cannot be reached through the proxy {proxy} ({text}; see HTTPS_PROXY)"
    return f"the hub cannot be reached ({text})"


def _find_proxy() -> str | None:
    """Host and port of the proxy that requests to the hub go through, without its password."""
    hub, proxies = urlsplit(constants.ENDPOINT), getproxies()
    proxy = proxies.get(hub.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(hub.hostname or ""):
        return None
    return urlsplit(proxy).netloc.rpartition("@")[2] or proxy


def _find_sizes(chain: list[BaseException]) -> str:
    found = re.search(r"size \d+ but has size \d+", " ".join(str(one) for one in chain))
    return found[0] if found else "a file is incomplete"


def _find_message(chain: list[BaseException]) -> str:
    """What the hub itself says about its refusal, in brackets; empty where it says nothing."""
    messages = [getattr(one, "server_message", None) for one in chain]
    return next((f" ({' '.join(one.split())})" for one in messages if one), "")


def _find_status(error: BaseException) -> int | None:
    response: Any = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _sent_token(error: BaseException) -> bool:
    """Whether the request that failed carried a token."""
    response: Any = getattr(error, "response", None)
    try:
        return response is not None and "authorization" in response.request.headers
    except RuntimeError:  # a response without its request
        return False


def _walk_causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on: what a library wrapped says less than the first cause."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
