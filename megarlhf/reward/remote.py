"""Rewards from servers that speak OpenRLHF's protocol over HTTP.

A request is {"query", "prompts", "labels"}, three lists with one entry a sample; a query is the prompt and the response
behind it. OpenRLHF 0.5's servers read "query" alone, 0.5.6's "prompts" too. The answer is {"rewards": [...]}; today's
servers add "scores", a list as long, and "extra_logs", a dictionary of such lists. We add "finish_reasons", "stop" or
"length", which our server (server.py) reads.
"""

import asyncio
import json
import logging
import math
import random
import threading
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import httpx

from megarlhf.config.urls import is_loopback
from megarlhf.data.types import Rollout, Sample
from megarlhf.reward.pool import chunks
from megarlhf.reward.sources import Outcome, SourceResult

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# With it a server may answer null where there is no reward, and why under "reasons".
NULL_HEADER = "megarlhf-accepts-null"
CONNECT_TIMEOUT_SECONDS = 10.0
MAX_ANSWER_BYTES = 1 << 24
_KEEP_ALIVE_SECONDS = 60.0  # an idle connection; our server closes it later
_BACK_OFF_SECONDS = 0.5  # before the first repetition, doubled with each
_MAX_BACK_OFF_SECONDS = 10.0
_MAX_REASON = 200  # characters of what a server says
# What servers answer to a request without samples where no other will fare better: what to do about it.
_REFUSALS = {
    401: "set the token that it asks for in MEGARLHF_RM_TOKEN",
    403: "set the token that it asks for in MEGARLHF_RM_TOKEN",
    404: "correct the path, which is often /get_reward",
    405: "correct the path, which is often /get_reward",
    503: "wait until it is ready",
}


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """How servers are asked."""

    token: str | None  # bearer token, sent to all of them
    timeout_seconds: float  # limit of a whole batch, repetitions included
    batch_size: int  # samples in a request, at most
    concurrency: int  # requests under way at each server, at most
    max_retries: int  # repetitions of a request
    is_required: bool  # at set-up; where not, a server that is not there is warned of


class Answer(NamedTuple):
    """What a server says of the samples of a request."""

    outcomes: list[Outcome]
    logs: dict[str, list[float | None]]  # "scores" and those of "extra_logs"


class AnswerError(Exception):
    """No answer, or one that cannot be used.

    Attributes:
        may_pass: whether the same request may be answered when it is repeated.
    """

    def __init__(self, message: str, *, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class RemoteReward:
    """Scores samples by servers that answer alike; each request goes to one of them.

    Several requests are under way at each server, and whichever is free takes the next; the samples of a prompt are in
    one request. A request that fails for a reason that may pass is repeated, at the next server where there are
    several. Connections stay open from batch to batch.
    """

    def __init__(self, name: str, urls: Sequence[str], options: RemoteOptions) -> None:
        """Take settings that config/check_rewards.py has passed; nothing is sent before `check`."""
        self.name = name
        self._urls, self._options = list(urls), options
        self._runner = asyncio.Runner()  # its event loop holds the connections
        self._running = threading.Lock()  # of one thread at a time
        self._task: asyncio.Task[Any] | None = None  # what it runs
        self._clients: list[httpx.AsyncClient] = []

    def check(self) -> None:
        """Ask each server for the rewards of no samples.

        Raises:
            ValueError: one cannot be reached, is not ready, or refuses the path or the token.
        """
        try:
            errors = self._run(self._probe_all())
        except httpx.InvalidURL as wrong:
            errors = [f"remote_rm_url={','.join(self._urls)} is no address ({wrong}): correct it"]
        if errors and self._options.is_required:
            raise ValueError("\n".join(errors))
        for error in errors:
            logger.warning("%s", error)

    def score(self, rollout: Rollout) -> SourceResult:
        """Outcome of each sample, in their order, within the limit of a batch whatever the servers do."""
        size, seconds = self._options.batch_size, self._options.timeout_seconds
        parts = list(chunks(rollout.samples, size=size, max_size=size))
        found: dict[int, Answer | str] = {}  # of a part, or why its last request has failed
        self._run(self._ask_all(parts, found))
        outcomes: list[Outcome] = []
        logs: dict[str, list[float | None]] = {}
        for number, part in enumerate(parts):
            answer = found.get(number, f"no result within the {seconds:g} seconds of remote_rm_timeout_seconds")
            if isinstance(answer, str):
                answer = Answer([(None, answer)] * len(part), {})
            for key in logs.keys() | answer.logs.keys():
                values = logs.setdefault(key, [None] * len(outcomes))
                values += answer.logs.get(key, [None] * len(part))
            outcomes += answer.outcomes
        return SourceResult(outcomes=outcomes, logs=logs)

    def close(self) -> None:
        """Close the connections, also under a `score` of another thread. Scoring opens others."""
        task = self._task
        if task is not None:
            task.get_loop().call_soon_threadsafe(task.cancel)
        self._run(self._close_clients())
        with self._running:
            self._runner.close()
            self._runner = asyncio.Runner()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        async def run() -> Result:
            self._task = asyncio.current_task()
            try:
                return await work
            finally:
                self._task = None

        with self._running:
            return self._runner.run(run())

    async def _close_clients(self) -> None:
        for client in self._clients:
            await client.aclose()
        self._clients = []

    def _open_clients(self) -> None:
        """One for each server, unless they are there; an event loop must run."""
        if self._clients:
            return
        options = self._options
        headers = {"content-type": "application/json", "accept-encoding": "identity", NULL_HEADER: "1"}
        if options.token is not None:
            headers["authorization"] = f"Bearer {options.token}"
        limits = httpx.Limits(max_connections=options.concurrency, keepalive_expiry=_KEEP_ALIVE_SECONDS)
        for url in self._urls:
            here = is_loopback(httpx.URL(url).host)  # where no proxy of the environment is asked
            client = httpx.AsyncClient(
                headers=headers,
                timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_SECONDS),
                limits=limits,
                follow_redirects=False,
                transport=httpx.AsyncHTTPTransport(limits=limits) if here else None,
            )
            self._clients.append(client)

    async def _probe_all(self) -> list[str]:
        self._open_clients()
        errors = await asyncio.gather(*[self._probe(number) for number in range(len(self._urls))])
        return [error for error in errors if error is not None]

    async def _probe(self, number: int) -> str | None:
        said = f"remote_rm_url={self._urls[number]}"
        try:
            async with asyncio.timeout(self._options.timeout_seconds):
                status, content = await self._post(number, _request([]))
        except (AnswerError, TimeoutError) as error:
            return f"{said} cannot be reached ({str(error) or 'no answer in time'}): start the server, or correct it"
        if status in _REFUSALS or 300 <= status < 400:
            return f"{said} {_refusal(status, content)}: {_REFUSALS.get(status, 'set the address it leads to')}"
        return None  # OpenRLHF's servers fail at a request without samples

    async def _ask_all(self, parts: Sequence[Sequence[Sample]], found: dict[int, Answer | str]) -> None:
        """Fill in the answer for each part; what has none when time is up stays out."""
        self._open_clients()
        left = iter(enumerate(parts))  # shared: whichever server is free takes the next
        try:
            async with asyncio.timeout(self._options.timeout_seconds), asyncio.TaskGroup() as group:
                for _ in range(min(self._options.concurrency, len(parts))):
                    for server in range(len(self._urls)):
                        group.create_task(self._work(server, left, found))
        except TimeoutError:
            pass

    async def _work(
        self, server: int, left: Iterator[tuple[int, Sequence[Sample]]], found: dict[int, Answer | str]
    ) -> None:
        for number, samples in left:
            body = _request(samples)
            for attempt in range(self._options.max_retries + 1):
                if attempt:
                    seconds = min(_BACK_OFF_SECONDS * 2.0 ** (attempt - 1), _MAX_BACK_OFF_SECONDS)
                    await asyncio.sleep(seconds * random.uniform(0.5, 1.5))  # so that clients do not come all at once
                try:
                    found[number] = await self._ask((server + attempt) % len(self._urls), body, len(samples))
                    break
                except AnswerError as error:
                    found[number] = str(error)
                    if not error.may_pass:
                        break

    async def _ask(self, server: int, body: bytes, count: int) -> Answer:
        """One request. Raises AnswerError."""
        status, content = await self._post(server, body)
        if not 200 <= status < 300:
            may_pass = status in (408, 429) or status >= 500
            raise AnswerError(self._of(server, _refusal(status, content)), may_pass=may_pass)
        try:
            return read_answer(content, count)
        except ValueError as error:
            raise AnswerError(self._of(server, f"answers what is no answer: {error}"), may_pass=False) from error

    async def _post(self, server: int, body: bytes) -> tuple[int, bytes]:
        """Status and content of what the server answers. Raises AnswerError."""
        content = bytearray()
        try:
            async with self._clients[server].stream("POST", self._urls[server], content=body) as response:
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > MAX_ANSWER_BYTES:
                        said = self._of(server, f"answers more than {MAX_ANSWER_BYTES} bytes")
                        raise AnswerError(said, may_pass=False)
        except httpx.HTTPError as error:
            said = f"{type(error).__name__}{f': {error}' if str(error) else ''}"[:_MAX_REASON]
            raise AnswerError(self._of(server, f"gives no answer ({said})"), may_pass=True) from error
        return response.status_code, bytes(content)

    def _of(self, server: int, said: str) -> str:
        return f"{self._urls[server]} {said}"


def read_answer(content: bytes, count: int) -> Answer:
    """What a server says of `count` samples. A reward that is no finite number costs its own sample its result.

    Raises:
        ValueError: it is no JSON, or has not as many rewards.
    """
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from None
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list):
        raise ValueError("no list of rewards")
    if len(rewards) != count:
        raise ValueError(f"{len(rewards)} rewards for {count} samples")
    reasons = answer.get("reasons")
    if not isinstance(reasons, list) or len(reasons) != count:
        reasons = [None] * count
    outcomes: list[Outcome] = []
    for value, reason in zip(rewards, reasons, strict=True):
        number = _number(value)
        why = reason if value is None and isinstance(reason, str) else f"the server answers {value!r:.50}, not a number"
        outcomes.append((number, None) if number is not None else (None, why[:_MAX_REASON]))
    extra = answer.get("extra_logs")
    named = {"scores": answer.get("scores")} | (extra if isinstance(extra, dict) else {})
    logs = {key: [_number(value) for value in values] for key, values in named.items() if _has(values, count)}
    return Answer(outcomes, logs)


def _request(samples: Sequence[Sample]) -> bytes:
    body = {
        "query": [sample.prompt.text + sample.response_text for sample in samples],
        "prompts": [sample.prompt.text for sample in samples],
        "labels": [sample.prompt.label for sample in samples],
        "finish_reasons": [sample.finish_reason for sample in samples],
    }
    return json.dumps(body).encode()


def _refusal(status: int, content: bytes) -> str:
    """What an answer says that holds no rewards."""
    text = " ".join(content[: 4 * _MAX_REASON].decode(errors="replace").split())[:_MAX_REASON]
    redirected = " (redirects are not followed)" if 300 <= status < 400 else ""
    return f"answers {status} {httpx.codes.get_reason_phrase(status)}{redirected}{f': {text}' if text else ''}"


def _number(value: Any) -> float | None:
    """A finite number as such; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _has(values: Any, count: int) -> bool:
    """Whether there is an entry for each sample."""
    return isinstance(values, list) and len(values) == count
