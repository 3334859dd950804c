"""The server of rewards: OpenRLHF's protocol over HTTP (remote.py is its client).

POST /get_reward takes {"query"}, 0.5.6's {"query", "prompts"} and today's {"query", "prompts", "labels"}, and answers
{"rewards"}, with labels also "scores" and "extra_logs". A client may add "finish_reasons", where "length" says that a
response was cut. Where a text has no result the request fails and says why, unless the client accepts null. GET /health
answers 200 when the server is ready, 503 before.
"""

import asyncio
import hmac
import signal
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from megarlhf.reward.remote import NULL_HEADER
from megarlhf.reward.sources import SourceResult
from megarlhf.reward.texts import Text, TextScorer

_KEEP_ALIVE_SECONDS = 75  # an idle connection; clients come back with each step
_MAX_REASONS = 3  # of a refusal


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request, and all that wait, may be."""

    token: str | None  # bearer token that clients must send
    max_body_bytes: int
    max_queries: int  # in a request
    max_len: int  # tokens of a query
    max_batch_tokens: int  # of requests that are scored together, unless a single one has more
    max_waiting_queries: int


class RewardRequest(BaseModel):
    """Body of a request; other keys are passed over."""

    model_config = ConfigDict(strict=True)
    query: list[str]
    prompts: list[str] | None = None
    labels: list[Any] | None = None
    finish_reasons: list[str] | None = None


class _Waiting(NamedTuple):
    request: Request
    texts: list[Text]
    answer: asyncio.Future[SourceResult]

    @property
    def num_tokens(self) -> int:
        return sum(text.num_tokens for text in self.texts)

    def refuse(self, error: HTTPException) -> None:
        """Answer with an error, unless there is an answer."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Batcher:
    """Scores the texts of several requests in one call, in the order of their coming, up to max_batch_tokens."""

    def __init__(self, scorer: TextScorer, limits: Limits) -> None:
        self._scorer, self._limits = scorer, limits
        self._queue: deque[_Waiting] = deque()
        self._has_come = asyncio.Event()
        self._failure: HTTPException | None = None  # of the scorer, which is no use any more

    @property
    def num_waiting(self) -> int:
        """Queries that wait."""
        return sum(len(waiting.texts) for waiting in self._queue)

    async def submit(self, request: Request, texts: list[Text]) -> SourceResult:
        """Outcomes of these texts, when it is their turn. Raises HTTPException where too many wait or scoring fails."""
        if self._failure is not None:
            raise self._failure
        if self.num_waiting + len(texts) > self._limits.max_waiting_queries:
            raise HTTPException(429, f"{self.num_waiting} queries wait already: come back later", {"retry-after": "1"})
        waiting = _Waiting(request, texts, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._has_come.set()
        return await waiting.answer

    async def run(self) -> None:
        """Score for ever.

        Raises:
            Exception: of the scorer, which is no use any more; whoever waits gets it too.
        """
        while True:
            await self._has_come.wait()
            batch = await self._next()
            if not batch:
                continue
            texts = [text for waiting in batch for text in waiting.texts]
            try:
                result = await asyncio.to_thread(self._scorer.score, texts)
            except Exception as error:
                self._failure = HTTPException(500, f"scoring failed: {error}")
                for waiting in (*batch, *self._queue):
                    waiting.refuse(self._failure)
                self._queue.clear()
                raise
            first = 0
            for waiting in batch:
                span = slice(first, first := first + len(waiting.texts))
                logs = {name: values[span] for name, values in result.logs.items()}
                if not waiting.answer.done():
                    waiting.answer.set_result(SourceResult(outcomes=result.outcomes[span], logs=logs))

    async def _next(self) -> list[_Waiting]:
        """Requests to score together; those whose client has gone are dropped."""
        batch: list[_Waiting] = []
        room = self._limits.max_batch_tokens
        while self._queue and (not batch or self._queue[0].num_tokens <= room):
            waiting = self._queue.popleft()
            if await waiting.request.is_disconnected():
                waiting.refuse(HTTPException(400, "the client has gone"))
                continue
            batch.append(waiting)
            room -= waiting.num_tokens
        if not self._queue:
            self._has_come.clear()
        return batch


class RewardServer:
    """One scorer behind HTTP. `run` serves until a signal, or until the scorer fails."""

    def __init__(self, scorer: TextScorer, limits: Limits, *, on_ready: Callable[[], None]) -> None:
        self._scorer, self._limits, self._on_ready = scorer, limits, on_ready
        self._batcher: Batcher | None = None  # once the scorer is ready
        self._failure: Exception | None = None
        self.app = FastAPI(lifespan=self._lifespan, openapi_url=None)
        self.app.get("/health")(self._health)
        self.app.post("/get_reward")(self._get_reward)

    def run(self, listening: socket.socket, **tls: str | None) -> None:
        """Serve, at first as one that is not ready. SIGTERM and SIGINT finish what is accepted and refuse the rest.

        Raises:
            ValueError: the scorer cannot start.
            Exception: it has failed.
        """
        config = uvicorn.Config(
            self.app,
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            **tls,  # type: ignore[arg-type]
        )
        self._server = uvicorn.Server(config)
        # uvicorn takes both signals while it serves, and raises them again for the handlers that were there before.
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._server.run(sockets=[listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._failure is not None:
            raise self._failure

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        work = asyncio.create_task(self._work())
        yield
        work.cancel()
        self._scorer.close()  # all that was accepted is answered

    async def _work(self) -> None:
        """Open the scorer and score; what it fails with ends the server."""
        try:
            await asyncio.to_thread(self._scorer.open)
            self._batcher = Batcher(self._scorer, self._limits)
            self._on_ready()
            await self._batcher.run()
        except Exception as error:
            self._failure = error
            self._server.should_exit = True

    async def _health(self) -> JSONResponse:
        if self._batcher is None:
            return JSONResponse({"status": "loading"}, 503)
        return JSONResponse({"status": "ready", "waiting": self._batcher.num_waiting})

    async def _get_reward(self, request: Request) -> JSONResponse:
        self._check_token(request)
        if self._batcher is None:
            raise HTTPException(503, "the server is not ready yet", {"retry-after": "1"})
        asked = _parsed(await self._body(request))
        texts = await asyncio.to_thread(self._texts, asked)
        longer = self._longer(texts)
        if longer and NULL_HEADER not in request.headers:
            said = [f"query[{index}] has {texts[index].num_tokens}" for index in longer[:_MAX_REASONS]]
            raise HTTPException(413, f"{', '.join(said)} tokens, more than max_len={self._limits.max_len}")
        readable = [text for index, text in enumerate(texts) if index not in longer]
        result = await self._batcher.submit(request, readable) if readable else SourceResult(outcomes=[])
        result = self._with_longer(result, longer, texts)
        rewards = [reward for reward, _ in result.outcomes]
        reasons = [reason for _, reason in result.outcomes]
        if None in rewards and NULL_HEADER not in request.headers:
            index, lost = rewards.index(None), rewards.count(None)
            raise HTTPException(500, f"{lost} of {len(rewards)} have no reward, query[{index}] first: {reasons[index]}")
        answer: dict[str, Any] = {"rewards": rewards}
        if None in rewards:
            answer["reasons"] = reasons
        if asked.labels is not None:
            answer |= {"scores": rewards, "extra_logs": dict(result.logs)}
        return JSONResponse(answer)

    def _check_token(self, request: Request) -> None:
        token, given = self._limits.token, request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "a bearer token is asked for", {"www-authenticate": "Bearer"})

    async def _body(self, request: Request) -> bytes:
        body, limit = bytearray(), self._limits.max_body_bytes
        too_long = HTTPException(413, f"the body is longer than {limit} bytes (max_body_mib)", {"connection": "close"})
        if int(request.headers.get("content-length") or 0) > limit:
            raise too_long
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise too_long
        return bytes(body)

    def _texts(self, asked: RewardRequest) -> list[Text]:
        """What is asked for. Raises HTTPException where it is too much, or cannot be read."""
        count, limits = len(asked.query), self._limits
        if count > limits.max_queries:
            raise HTTPException(413, f"{count} queries in a request are more than max_queries={limits.max_queries}")
        for name in ("prompts", "labels", "finish_reasons"):
            values = getattr(asked, name)
            if values is not None and len(values) != count:
                raise HTTPException(422, f"{len(values)} {name} for {count} queries")
        nothing: Sequence[Any] = [None] * count
        columns = (asked.query, asked.prompts or nothing, asked.labels or nothing, asked.finish_reasons or nothing)
        rows = zip(*columns, strict=True)
        texts = [Text(query=q, prompt=p, label=label, is_cut=reason == "length") for q, p, label, reason in rows]
        try:
            texts = self._scorer.tokenize(texts)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        return texts

    def _longer(self, texts: Sequence[Text]) -> list[int]:
        """Places of the texts that are too long to be scored."""
        return [index for index, text in enumerate(texts) if text.num_tokens > self._limits.max_len]

    def _with_longer(self, result: SourceResult, longer: Sequence[int], texts: Sequence[Text]) -> SourceResult:
        """What was found, and at the places of texts that were too long no result."""
        outcomes, logs = list(result.outcomes), {name: list(values) for name, values in result.logs.items()}
        for index in longer:
            reason = f"it has {texts[index].num_tokens} tokens, more than max_len={self._limits.max_len}"
            outcomes.insert(index, (None, reason))
            for values in logs.values():
                values.insert(index, None)
        return SourceResult(outcomes=outcomes, logs=logs)


def _parsed(body: bytes) -> RewardRequest:
    try:
        return RewardRequest.model_validate_json(body)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)[:_MAX_REASONS]
        said = [": ".join([".".join(map(str, one["loc"])), one["msg"]]).removeprefix(": ") for one in wrong]
        raise HTTPException(422, "; ".join(said)) from None
