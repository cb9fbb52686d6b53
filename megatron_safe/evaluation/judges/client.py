"""Asking an OpenAI-compatible chat endpoint: in parallel, patiently, within a budget, and every question once.

No key and no text of a question leaves this file: replies are written and errors are told without them.
"""

import email.utils
import importlib
import math
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from tqdm import tqdm

from megatron_safe.config import EndpointConfig
from megatron_safe.errors import UserError
from megatron_safe.evaluation.judges.cache import Line, ReplyCache, question_key

Verdict = TypeVar("Verdict")
MAX_WAIT_SECONDS = 300.0
"""A server that asks for a longer pause is not waited for: the run ends, and goes on when it is started again."""
_FRAME_TOKENS = 64  # of a chat message, beside its text
_LINE_SECONDS = 5.0


class _Stopped(Exception):
    """This request was not made or not answered; the reason is `Endpoint._reason`."""


class Endpoint:
    """One model behind one URL, and what was asked of it.

    Attributes:
        requests: made by this object; retries: of them, those that repeat a failed one; cached: replies that came from
        the file; unparsable: replies that could not be read; all of them numbers of questions or requests.
    """

    def __init__(self, config: EndpointConfig, cache: Path, say: Callable[[str], None]):
        """cache: file of replies. Raises UserError for a bad setting, a key that is not there, or a bad file."""
        openai = library()
        self.config, self._key = config, read_key(config)
        self._client = openai.OpenAI(
            api_key=self._key or "none",  # the library insists on one; servers without keys ignore it
            base_url=config.url,
            timeout=config.timeout_seconds,
            max_retries=0,  # ours also cover cut-off and garbled replies, and count them
        )
        self.cache = ReplyCache(cache, say)
        self.requests = self.retries = self.cached = self.unparsable = 0
        self._room = threading.Condition()  # guards the counts and the budget
        self._on_their_way: list[float] = []  # what each can cost
        self._pause_until = 0.0
        self._stop = threading.Event()
        self._reason = ""

    def ask(self, prompts: Sequence[str], read: Callable[[str], Verdict | None], what: str) -> list[Verdict | None]:
        """What `read` makes of the reply to each prompt, in order; None where it could read neither of two replies.

        Equal prompts are asked once. Shows progress under the name `what`.

        Raises:
            UserError: the budget is spent, the endpoint refuses, or failed too often. Says how many prompts have no
                answer; those of the others are in the file.
        """
        unique = list(dict.fromkeys(prompts))
        self._stop.clear()
        self._reason = ""
        verdicts: dict[str, Verdict | None] = {}
        pool = ThreadPoolExecutor(self.config.max_parallel)
        try:
            futures = {pool.submit(self._verdict, prompt, read): prompt for prompt in unique}
            for future in self._progress(as_completed(futures), len(unique), what):
                try:
                    verdicts[futures[future]] = future.result()
                except _Stopped:
                    pass
        finally:
            self._stop.set()  # an interrupt: who waits for a retry shall not hold up the end
            pool.shutdown(cancel_futures=True)
        missing = len(unique) - len(verdicts)
        if missing:
            raise UserError(
                f"{self._reason}; {missing} of {len(unique)} questions ({what}) have no answer; all replies are kept "
                f"in {self.cache.path}, and the same command goes on from there"
            )
        return [verdicts[prompt] for prompt in prompts]

    def _verdict(self, prompt: str, read: Callable[[str], Verdict | None]) -> Verdict | None:
        for attempt in (0, 1):
            key = question_key(self.config.model, self.config.url, self.config.parameters, prompt, attempt)
            reply = self.cache.get(key)
            if reply is None:
                reply = self._fetch(key, prompt)
            else:
                self._count("cached")
            verdict = read(reply)
            if verdict is not None:
                return verdict
            self._count("unparsable")
        return None

    def _fetch(self, key: str, prompt: str) -> str:
        """A reply from the endpoint, which is in the file when this returns. Raises _Stopped."""
        most = self._most(prompt)
        for failures in range(self.config.retries + 1):
            self._wait_for_pause()
            self._reserve(most)
            # What a request that brings no usable reply may have cost all the same.
            lost = Line(key, None, 0, 0, most)
            try:
                self._count("requests")
                try:
                    line, failure, wait = self._request(key, prompt), "", 0.0
                except Exception as error:
                    line, failure, wait = self._judge_failure(error, lost, prompt)
                if line is not None:
                    self._keep(line)
            finally:
                self._release(most)  # after it is counted as spent
            if line is not None and line.reply is not None:
                return line.reply
            if failures == self.config.retries:
                self._end(f"judge.endpoint: gave up after {failures + 1} requests for one reply, the last: {failure}")
            if wait > MAX_WAIT_SECONDS:
                self._end(f"judge.endpoint: {failure}, and asks to wait {wait:.0f} s")
            self._count("retries")
            self._pause(wait)  # what the server says to one of us holds for all
            backoff = self.config.backoff_seconds * min(2.0**failures, 60.0) * random.uniform(0.5, 1.5)
            if self._stop.wait(wait + backoff):
                raise _Stopped
        raise AssertionError("unreachable")

    def _request(self, key: str, prompt: str) -> Line:
        done = self._client.chat.completions.create(
            model=self.config.model,
            messages=[{"role": "user", "content": prompt}],
            extra_body=self.config.parameters,
        )
        # The library passes on whatever parses as JSON, of any shape, and plain text too.
        try:
            message, usage = done.choices[0].message, done.usage
            reply = message.content
        except (AttributeError, IndexError, TypeError):
            raise _Garbage from None
        if reply is not None and not isinstance(reply, str):
            raise _Garbage
        reply = self._without_key(reply or "")  # empty where the endpoint declines to speak of it
        tokens = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        if not all(type(count) is int and count >= 0 for count in tokens):
            tokens = [_at_most_tokens(prompt), _at_most_tokens(reply)]
        return Line(key, reply, *tokens, self._dollars(*tokens))

    def _judge_failure(self, error: Exception, lost: Line, prompt: str) -> tuple[Line | None, str, float]:
        """(what it cost, if anything; what to say; how long the server wants us to wait) of a failure to be retried.

        Raises _Stopped for one that no retry will mend.
        """
        openai = library()
        if isinstance(error, openai.APITimeoutError):
            return lost, f"no reply within {self.config.timeout_seconds:g} s", 0.0
        if isinstance(error, openai.APIConnectionError):
            refused = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError")
            return None if refused else lost, "the connection failed" if refused else "the reply was cut off", 0.0
        if isinstance(error, openai.APIStatusError):
            said = self._said(error, prompt)
            if error.code == "content_filter":  # it will not read this text, now or later
                return Line(lost.key, "", 0, 0, 0.0), said, 0.0
            again = error.status_code in (408, 409, 425, 429) or error.status_code >= 500
            if not again or error.code == "insufficient_quota":
                self._end(f"judge.endpoint: {said}")
            return None, said, _retry_after(error.response.headers)
        if isinstance(error, (_Garbage, openai.OpenAIError, ValueError)):  # JSON's errors are ValueErrors
            return lost, "the reply was not a chat completion", 0.0
        self._end(f"judge.endpoint: {type(error).__name__}")

    def _said(self, error, prompt: str) -> str:
        """What a server says of a refusal, unless it repeats the question."""
        body = error.body if isinstance(error.body, dict) else {}
        parts = [part for part in (error.code, error.type, body.get("message")) if isinstance(part, str) and part]
        text = " ".join(self._without_key(", ".join(dict.fromkeys(parts))).split())[:300]
        repeats = any(text[i : i + 16] in prompt for i in range(len(text) - 15))
        return f"HTTP {error.status_code}" + (f" ({text})" if text and not repeats else "")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    # The budget: what is spent and what the requests on their way can cost at most never exceed it together.

    def _most(self, prompt: str) -> float:
        return self._dollars(_at_most_tokens(prompt), most_output_tokens(self.config))

    def _dollars(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.config.input_price + output_tokens * self.config.output_price) / 1e6

    def _reserve(self, dollars: float) -> None:
        with self._room:
            while not self._stop.is_set() and not self._fits(dollars):
                if not self._on_their_way:
                    self._end(
                        f"judge.endpoint.max_dollars: {self.cache.dollars:.4f} of {self.config.max_dollars:g} dollars "
                        f"are spent, and the next request may cost {dollars:.4f}"
                    )
                self._room.wait()  # those on their way may turn out cheaper
            if self._stop.is_set():
                raise _Stopped
            self._on_their_way.append(dollars)

    def _fits(self, dollars: float) -> bool:
        return self.cache.dollars + math.fsum([*self._on_their_way, dollars]) <= self.config.max_dollars

    def _release(self, dollars: float) -> None:
        with self._room:
            self._on_their_way.remove(dollars)
            self._room.notify_all()

    def _keep(self, line: Line) -> None:
        try:
            self.cache.add(line)
        except OSError as error:
            self._end(f"{self.cache.path}: cannot be written: {error.strerror}")

    def _end(self, reason: str):
        """Stop asking, for the first of the reasons. Raises _Stopped."""
        with self._room:
            if not self._stop.is_set():
                self._reason = reason
                self._stop.set()
            self._room.notify_all()
        raise _Stopped

    def _pause(self, seconds: float) -> None:
        with self._room:
            self._pause_until = max(self._pause_until, time.monotonic() + seconds)

    def _wait_for_pause(self) -> None:
        while (seconds := self._pause_until - time.monotonic()) > 0:
            if self._stop.wait(seconds):
                break

    def _count(self, name: str) -> None:
        with self._room:
            setattr(self, name, getattr(self, name) + 1)

    def _progress(self, futures, total: int, what: str):
        """The finished questions, with a bar on a terminal and else a line every few seconds."""
        bar = tqdm(total=total, desc=what, unit="question", dynamic_ncols=True, disable=not sys.stderr.isatty())
        printed_at = time.monotonic()
        with bar:
            for done, future in enumerate(futures, start=1):
                yield future
                bar.set_postfix_str(f"${self.cache.dollars:.4f}")
                bar.update()
                if bar.disable and (done == total or time.monotonic() - printed_at >= _LINE_SECONDS):
                    said = f"{what} {done}/{total} questions, ${self.cache.dollars:.4f} spent"
                    print(said, file=sys.stderr, flush=True)
                    printed_at = time.monotonic()


class _Garbage(Exception):
    """A reply that is no chat completion."""


def library():
    """The client library. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("openai")
    except ImportError:
        raise UserError(
            "judge.kind endpoint: expected the package openai, found none; pip install 'megatron-safe[judges]'"
        ) from None


def read_key(config: EndpointConfig) -> str | None:
    """The key out of the environment. Raises UserError without it, and never says what it is.

    A value in `key_env` that does not look like a variable's name may be a key put there by mistake: not repeated.
    """
    if config.key_env is None:
        return None
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        name = re.fullmatch(r"[A-Z]{2,20}(_[A-Z]{2,20})+", config.key_env)
        raise UserError(
            "judge.endpoint.key_env: expected the name of an environment variable with the key in it (null where the "
            f"server needs none), found {name[0] if name else 'a name'} that is not set"
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError("judge.endpoint.key_env: expected a key of printable ASCII characters there, found others")
    return key


def check_endpoint(config: EndpointConfig) -> None:
    """Raise UserError for settings that cannot work or would not be safe to write into the run folder."""
    parts = urlsplit(config.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("judge.endpoint.url: expected http:// or https:// and a host, such as https://api.openai.com/v1")
    if parts.username or parts.password or parts.query:
        raise UserError("judge.endpoint.url: expected a plain address, found a user, password or query in it")
    if not config.model:
        raise UserError("judge.endpoint.model: expected the name of the model to ask, found none")
    for field in ("input_price", "output_price"):
        if getattr(config, field) is None:
            raise UserError(
                f"judge.endpoint.{field}: expected dollars per million tokens (0 for a server of your own), found none"
            )
    if taken := {"model", "messages", "stream", "n"} & set(config.parameters):
        raise UserError(f"judge.endpoint.parameters: expected none of what the judge sets itself, found {min(taken)}")
    most_output_tokens(config)


def most_output_tokens(config: EndpointConfig) -> int:
    """The longest reply, by the parameters. Raises UserError without such a limit: the budget is kept by it."""
    for name in ("max_completion_tokens", "max_tokens"):
        if name in config.parameters:
            most = config.parameters[name]
            if type(most) is not int or most < 1:
                raise UserError(f"judge.endpoint.parameters.{name}: expected a whole number above 0, found {most!r}")
            return most
    raise UserError("judge.endpoint.parameters: expected max_tokens or max_completion_tokens among them, found neither")


def _at_most_tokens(text: str) -> int:
    """No tokenizer in use makes more tokens of a text than it has bytes."""
    return len(text.encode("utf-8", "surrogatepass")) + _FRAME_TOKENS


def _retry_after(headers) -> float:
    """Seconds that the server asks to wait, as a number or a date; 0 where it says nothing that can be read."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
