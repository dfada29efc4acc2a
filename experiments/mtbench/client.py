"""A client for a judge behind any OpenAI-compatible chat API: retries, a rate limit, and a key that never leaks.

It uses httpx2 instead of the `openai` package: the API is a single POST request, and local servers implement it with
small differences. Every retry must respect our rate limit, and a Retry-After must pause all workers.
`huggingface_hub` depends on httpx2 anyway.
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

_TEMPORARY = (408, 409, 425, 429)  # besides all of 500 and above
_REFUSED = (401, 403)
_LONGEST_WAIT = 600.0  # seconds; a longer Retry-After ends the command


class QuestionFailedError(Exception):
    """One question got no reply; others may succeed."""


class _TemporaryError(Exception):
    """The request failed in a way that another attempt may cure."""


class StoppedError(Exception):
    """The grading was stopped while this request waited."""


@dataclass(frozen=True)
class Endpoint:
    """Address of the judge and options of its requests.

    Attributes:
        base_url: the URL without `/chat/completions`, for example `http://localhost:8000/v1`.
        model: the judge's model name on that server.
        key: sent as bearer token if given; never stored or printed.
        temperature: None omits it, for models that reject it.
        max_tokens, token_field: maximum number of tokens per verdict, and the request field for it.
        attempts, timeout, backoff: attempts per verdict; seconds per attempt; seconds of the first pause between two.
        per_minute: maximum number of requests per minute; None: no limit.

    Raises:
        UserError: for a value that is not allowed.
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
            raise UserError("the judge's key contains characters that no key has: set the environment variable again")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound:
        raise UserError(f"base_url={url} is not allowed: give a URL such as https://api.example.org/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError("base_url must hold no user, password, query or fragment: put the key into the environment")


@dataclass(frozen=True)
class Reply:
    """The judge's reply; `model` is the name that the server reports."""

    text: str
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Pace:
    """Spaces the requests of all threads evenly within the rate, and pauses them while the server asks to wait."""

    def __init__(self, per_minute: float | None, stop: threading.Event) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next, self._held = 0.0, 0.0
        self._lock, self._stop = threading.Lock(), stop

    def wait(self) -> None:
        """Wait for this request's turn.

        Raises:
            StoppedError: when the grading stops meanwhile.
        """
        # Reserve a slot under the lock, but wait for it outside, so that other threads can reserve theirs.
        with self._lock:
            slot = self._next = max(self._next, time.monotonic())
            self._next += self._interval
        # Another thread may extend the pause meanwhile, so look again after each wait.
        while (left := max(slot, self._held) - time.monotonic()) > 0:
            if self._stop.wait(left):
                break
        if self._stop.is_set():
            raise StoppedError

    def hold(self, seconds: float) -> None:
        """Pause all requests for this many seconds from now."""
        with self._lock:
            self._held = max(self._held, time.monotonic() + seconds)


class Client:
    """Sends requests to the endpoint; thread-safe. Use it as a context manager."""

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
        """The reply to a conversation, with as many attempts as the endpoint allows.

        Raises:
            UserError: when no question can succeed, as with a rejected key or a wrong address or model.
            QuestionFailedError: when this question failed.
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
            raise QuestionFailedError(f"{error} ({endpoint.attempts} attempts)") from None

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
        if status in (400, 413, 422):  # this request is at fault, for example too long
            raise QuestionFailedError(said)
        raise UserError(f"the judge cannot be asked at {self._address} ({said}): check --base-url and --model")

    def _hold(self, retry_after: str | None) -> None:
        seconds = seconds_of(retry_after)
        if seconds > _LONGEST_WAIT:
            raise UserError(
                f"the judge asks to wait {seconds:.0f} s: run the same command again after that time; it continues"
            )
        self._pace.hold(seconds)

    def _clean(self, text: str) -> str:
        """One line of text in which the key, which some servers echo, is masked."""
        key = self.endpoint.key
        return " ".join((text.replace(key, "***") if key else text).split())[:300]


def seconds_of(retry_after: str | None) -> float:
    """Seconds that a Retry-After header (a number or a date) asks for; 0 where it is missing or not valid."""
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
        raise _TemporaryError("the reply is not JSON of the chat API") from None
    if not isinstance(text, str):
        raise _TemporaryError("the reply's content is not a text")
    return Reply(text, str(model), *tokens)


def _message(response: Any) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return str(response.text)[:200]
