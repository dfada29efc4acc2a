"""A judge behind any endpoint with OpenAI's chat API: retries, a rate limit, and no leaking of the key.

httpx2 and not the `openai` client: the API is one POST, which local servers speak with small differences; we need every
retry to pass our own rate limit and Retry-After to hold all workers; httpx2 is what `huggingface_hub` brings anyway.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from sparsegrad.errors import UserError, check_integer, check_number, check_text, missing_package

_TEMPORARY = (408, 409, 425, 429)
_REFUSED = (401, 403)
_LONGEST_WAIT = 600.0


class QuestionFailedError(Exception):
    """One question got no reply; others may."""


class _TemporaryError(Exception):
    """Worth another try."""


class StoppedError(Exception):
    """The work was ended from elsewhere while this request waited."""


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is and how it is asked.

    Attributes:
        base_url: up to and without `/chat/completions`, for example `http://localhost:8000/v1`.
        model: the judge's name there.
        key: sent as bearer token if given; never stored, never shown.
        temperature: None leaves it out, for models that refuse it.
        max_tokens, token_field: most tokens of a verdict, and the request's field for it.
        attempts, timeout, backoff: tries for one verdict; seconds for one; first pause between two.
        per_minute: most requests a minute; None: no limit.
    """

    base_url: str
    model: str
    key: str | None = field(default=None, repr=False)
    temperature: float | None = 0.0
    max_tokens: int = 2048
    token_field: str = "max_tokens"
    attempts: int = 6
    timeout: float = 120.0
    backoff: float = 1.0
    per_minute: float | None = None

    def __post_init__(self) -> None:
        _check_url(self.base_url)
        check_text("model", self.model)
        check_integer("attempts", self.attempts, at_least=1)
        check_integer("max_tokens", self.max_tokens, at_least=1)
        check_number("timeout", self.timeout, above=0)
        check_number("backoff", self.backoff, above=0)
        if self.temperature is not None:
            check_number("temperature", self.temperature, at_least=0)
        if self.per_minute is not None:
            check_number("per_minute", self.per_minute, above=0)
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise UserError("the judge's key holds characters that no key has: set the environment variable again")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound:
        raise UserError(f"base_url={url} is not allowed: give an address such as https://api.example.org/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError("base_url must hold no user, password, query or fragment: the key comes from the environment")


@dataclass(frozen=True)
class Reply:
    """What the judge said; `model` is what the server calls itself."""

    text: str
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Pace:
    """Lets one request after another go: evenly within the rate, and none while the server asked to wait."""

    def __init__(self, per_minute: float | None, stop: threading.Event) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next, self._held = 0.0, 0.0
        self._lock, self._stop = threading.Lock(), stop

    def wait(self) -> None:
        """Wait for this request's turn; raises StoppedError when the work ends meanwhile."""
        with self._lock:
            slot = self._next = max(self._next, time.monotonic())
            self._next += self._interval
        while (left := max(slot, self._held) - time.monotonic()) > 0:
            if self._stop.wait(left):
                break
        if self._stop.is_set():
            raise StoppedError

    def hold(self, seconds: float) -> None:
        """No request for so many seconds from now."""
        with self._lock:
            self._held = max(self._held, time.monotonic() + seconds)


class Client:
    """Asks the endpoint; safe in several threads. Use as a context manager."""

    def __init__(self, endpoint: Endpoint) -> None:
        try:
            import httpx2
            import tenacity
        except ModuleNotFoundError as error:
            raise missing_package("a judge", error.name, "judge") from None
        self._errors, self._tenacity = httpx2.TransportError, tenacity
        self.endpoint, self.stop = endpoint, threading.Event()
        self._pace = Pace(endpoint.per_minute, self.stop)
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        self._http = httpx2.Client(headers=headers, timeout=endpoint.timeout)
        self._address = endpoint.base_url.rstrip("/") + "/chat/completions"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ask(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """The reply to a conversation, after as many tries as the endpoint allows.

        Raises:
            UserError: when no question can succeed: key refused, wrong address or model.
            QuestionFailedError: when this one did not.
            StoppedError: when `stop` was set.
        """
        tenacity, endpoint = self._tenacity, self.endpoint
        again = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(endpoint.attempts),
            wait=tenacity.wait_exponential_jitter(initial=endpoint.backoff, max=60, jitter=endpoint.backoff),
            retry=tenacity.retry_if_exception_type(_TemporaryError),
            sleep=tenacity.sleep_using_event(self.stop),
            reraise=True,
        )
        try:
            return again(self._ask_once, messages)  # type: ignore[no-any-return]
        except _TemporaryError as error:
            raise QuestionFailedError(f"{error} ({endpoint.attempts} tries)") from None

    def _ask_once(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        self._pace.wait()
        try:
            response = self._http.post(self._address, json=self._body(messages))
        except self._errors as error:
            raise _TemporaryError(self._clean(f"{type(error).__name__}: {error}")) from None
        self._check_status(response)
        return _reply(response, self.endpoint.model)

    def _body(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        endpoint = self.endpoint
        body: dict[str, Any] = {"model": endpoint.model, "messages": list(messages)}
        body[endpoint.token_field] = endpoint.max_tokens
        return body if endpoint.temperature is None else {**body, "temperature": endpoint.temperature}

    def _check_status(self, response: Any) -> None:
        status = response.status_code
        if status == 200:
            return
        said = self._clean(f"status {status}: {_message(response)}")
        if status in _REFUSED:
            raise UserError(f"the judge refuses the key ({said}): set the right one in the environment (--key-env)")
        if status in _TEMPORARY or status >= 500:
            self._hold(response.headers.get("retry-after"))
            raise _TemporaryError(said)
        if status in (400, 413, 422):
            raise QuestionFailedError(said)
        raise UserError(f"the judge cannot be asked at {self._address} ({said}): check --base-url and --model")

    def _hold(self, retry_after: str | None) -> None:
        seconds = seconds_of(retry_after)
        if seconds > _LONGEST_WAIT:
            raise UserError(f"the judge asks to wait {seconds:.0f} s: give the same command again then; it goes on")
        self._pace.hold(seconds)

    def _clean(self, text: str) -> str:
        key = self.endpoint.key
        return " ".join((text.replace(key, "***") if key else text).split())[:300]


def seconds_of(retry_after: str | None) -> float:
    """Seconds that a Retry-After header asks for, in seconds or as a date; 0 where there is none or it is nonsense."""
    if not retry_after:
        return 0.0
    try:
        return max(0.0, float(int(retry_after)))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _reply(response: Any, asked: str) -> Reply:
    try:
        body = response.json()
        message, usage = body["choices"][0]["message"], body.get("usage") or {}
        text, model = message.get("content") or "", body.get("model") or asked
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _TemporaryError("the reply is not the API's JSON") from None
    if not isinstance(text, str):
        raise _TemporaryError("the reply's content is not a text")
    return Reply(text, str(model), *tokens)


def _message(response: Any) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return str(response.text)[:200]
