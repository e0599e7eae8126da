"""The HTTP surface: create_app(state) -> FastAPI. Routes check, hand over to generation, and answer.

Every path but the probes, /version and /metrics needs the API key when one is set (api/middleware.py).
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from moe_serve.api import prepare
from moe_serve.api.balance_metrics import render_balance
from moe_serve.api.errors import answer_error
from moe_serve.api.generation import GrowingAnswer, GrowingSequence
from moe_serve.api.logprobs import Echo
from moe_serve.api.metrics import Metrics, RequestClock
from moe_serve.api.middleware import LimitBody
from moe_serve.api.orders import Access
from moe_serve.api.responses import ChatForm, CompletionForm, Form, Heading, event_stream, whole_body
from moe_serve.api.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    check_is_json,
    read_body,
)
from moe_serve.api.state import ApiState
from moe_serve.api.streaming import EventStream, unless_disconnected
from moe_serve.api.watching import WatchRequests
from moe_serve.api.world import world_body
from moe_serve.base.errors import EngineDead, MoEServeError
from moe_serve.base.sampling import SamplingParams
from moe_serve.base.version import package_version
from moe_serve.engine.admission import Place, closed_on_error

RANK_HEADER = "X-data-parallel-rank"
BALANCE_ACTIONS = ("plan", "apply", "rollback", "save", "record/start", "record/stop")
SomeBody = TypeVar("SomeBody", CompletionBody, ChatBody)
CLIENT_CLOSED = 499  # nobody reads it; it is what logs say


def create_app(state: ApiState) -> FastAPI:
    """The application; it owns its metrics and nothing else."""
    app = FastAPI(title="moe-serve", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    routes = Routes(state, state.metrics)
    gets: dict[str, Callable[..., Awaitable[Response]]] = {
        path: getattr(routes, path.rsplit("/", 1)[1])
        for path in ("/livez", "/readyz", "/health", "/version", "/metrics", "/config", "/v1/models", "/eplb", "/world")
    }
    gets |= {"/v1/models/{name:path}": routes.model, "/eplb/record/dump": routes.eplb_dump}
    for path, get in gets.items():
        app.add_api_route(path, get, methods=["GET", "HEAD"], response_model=None)
    posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/v1/completions": routes.completions,
        "/v1/chat/completions": routes.chat,
        "/tokenize": routes.tokenize,
        "/detokenize": routes.detokenize,
    }
    for action in BALANCE_ACTIONS:
        posts[f"/eplb/{action}"] = routes.eplb_action(action)
    for path, route in posts.items():
        app.add_api_route(path, route, methods=["POST"], response_model=None)
    server = state.config.server
    app.add_middleware(LimitBody, server=server)
    app.add_middleware(Access, server=server)
    if server.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=server.allowed_origins, allow_methods="*", allow_headers="*")
    app.add_middleware(WatchRequests, metrics=state.metrics, lines=server.access_log)
    for kind in (MoEServeError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    return app


@dataclass(frozen=True, slots=True)
class Asked(Generic[SomeBody]):
    """A request that may be answered: what it asks for, its place among others, and when it arrived."""

    request: Request
    body: SomeBody
    sampling: SamplingParams
    place: Place
    arrival: float


class Routes:
    """The handlers. Those under /v1 that generate refuse work while the engines are not ready."""

    def __init__(self, state: ApiState, metrics: Metrics) -> None:
        self._state = state
        self._metrics = metrics
        self._fingerprint = f"fp_{state.config.compute_hash()[:12]}"

    async def livez(self) -> Response:
        return _json({"alive": True})

    async def readyz(self) -> Response:
        reason = self._state.why_not_ready()
        return _json({"ready": True}) if reason is None else _json({"ready": False, "reason": reason}, 503)

    async def health(self) -> Response:
        engines = self._state.engines
        if engines.alive:
            return _json({"healthy": True})
        return _json({"healthy": False, "reason": engines.dead_reason or "the engines are gone"}, 503)

    async def version(self) -> Response:
        return _json({"version": package_version()})

    async def metrics(self) -> Response:
        text = self._metrics.render()
        if self._state.balance is not None and self._state.config.parallel.enable_eplb:
            with contextlib.suppress(EngineDead):  # the engines' own figures are worth having without these
                status, figures = await self._state.balance.ask("metrics")
                text += render_balance(msgspec.json.decode(figures), self._state.model_name) if status == 200 else b""
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def eplb(self) -> Response:
        return await self._ask_balance("state", b"")

    async def eplb_dump(self) -> Response:
        answer = await self._ask_balance("record/dump", b"")
        if answer.status_code == 200:
            answer.headers["content-type"] = "application/octet-stream"
            answer.headers["content-disposition"] = 'attachment; filename="expert_load.safetensors"'
        return answer

    def eplb_action(self, action: str) -> Callable[[Request], Awaitable[Response]]:
        """The route of POST /eplb/<action>."""

        async def route(request: Request) -> Response:
            self._state.check_ready()
            check_is_json(request.headers.get("content-type", ""))
            return await self._ask_balance(action, await request.body())

        return route

    async def _ask_balance(self, action: str, body: bytes) -> Response:
        if self._state.balance is None:
            raise EngineDead("no coordinator is connected")
        status, answer = await self._state.balance.ask(action, body)
        return Response(answer, status, media_type="application/json")

    async def config(self) -> Response:
        return _json(self._state.config.model_dump(mode="json") | {"running": self._state.engines.running})

    async def world(self) -> Response:
        return _json(*await world_body(self._state.world, self._state.engines, self._state.why_not_ready()))

    async def models(self) -> Response:
        return _json({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        self._state.check_model(name)
        return _json(self._card())

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, CompletionBody, self._complete)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, ChatBody, self._chat)

    async def _generate(
        self, request: Request, kind: type[SomeBody], answer: Callable[[Asked[SomeBody]], Awaitable[Response]]
    ) -> Response:
        """Refuse what can be refused without a tokenizer, take a place, and `answer`; an error gives the place back."""
        arrival = time.monotonic()
        self._state.check_open()
        body = await read_body(kind, request, self._state.unknown_fields)
        self._state.check_model(body.model)
        sampling = body.to_sampling(self._state.generation_defaults)
        place = self._state.admission.admit(prepare.num_prompts(body) * sampling.n, prepare.guess(body) * sampling.n)
        with closed_on_error(place):
            return await answer(Asked(request, body, sampling, place, arrival))

    async def _complete(self, asked: Asked[CompletionBody]) -> Response:
        body, sampling = asked.body, asked.sampling
        prompts = await prepare.completion_prompts(self._state.tokenizer, body, self._state.engines.max_model_len)
        heading = self._heading("cmpl")
        choices = self._choices(heading.id, prompts, asked, param="prompt", discard=body.only_scores)
        echo: dict[int, Echo] = {}
        if body.echo:
            skip = sampling.skip_special_tokens
            pairs = zip(body.prompt, prompts, strict=True)
            echoed = [prepare.echo_of(self._state.tokenizer, *pair, skip) for pair in pairs]
            echo = {choice.index: echoed[choice.index // sampling.n] for choice in choices}
        form = CompletionForm(heading, self._state.tokenizer, sampling.logprobs, echo)
        return await self._answer(asked, choices, form)

    async def _chat(self, asked: Asked[ChatBody]) -> Response:
        body = asked.body
        rendered = await self._state.conversations.render(body, len(await asked.request.body()))
        special, max_model_len = bool(body.add_special_tokens), self._state.engines.max_model_len
        prompt = await prepare.chat_ids(self._state.tokenizer, rendered, max_model_len, add_special_tokens=special)
        heading = self._heading("chatcmpl")
        limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        choices = self._choices(heading.id, [prompt], asked, param="messages", limit_param=limit)
        form = ChatForm(heading, self._state.tokenizer, asked.sampling.logprobs)
        return await self._answer(asked, choices, form)

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(TokenizeBody, request, self._state.unknown_fields)
        self._state.check_model(body.model)
        ids = await self._tokenized(body, len(await request.body()))
        engines = self._state.engines
        max_model_len = engines.max_model_len if engines.ready else None
        answer: dict[str, object] = {"count": len(ids), "max_model_len": max_model_len, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [self._state.tokenizer.token_text(token_id) for token_id in ids]
        return _json(answer)

    async def _tokenized(self, body: TokenizeBody, num_bytes: int) -> list[int]:
        tokenizer = self._state.tokenizer
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            return (await prepare.encode_all(tokenizer, [body.prompt], add_special_tokens=special))[0]
        rendered = await self._state.conversations.render(body, num_bytes)
        return await prepare.chat_ids(tokenizer, rendered, add_special_tokens=bool(body.add_special_tokens))

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(DetokenizeBody, request, self._state.unknown_fields)
        self._state.check_model(body.model)
        prepare.check_ids(body.tokens, self._state.num_ids, "tokens")
        return _json({"prompt": self._state.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    def _card(self) -> dict[str, object]:
        state = self._state
        return {
            "id": state.model_name,
            "object": "model",
            "created": state.created,
            "owned_by": "moe-serve",
            "max_model_len": state.engines.max_model_len if state.engines.ready else None,
        }

    def _heading(self, kind: str) -> Heading:
        return Heading(f"{kind}-{uuid.uuid4().hex}", int(time.time()), self._state.model_name, self._fingerprint)

    def _choices(
        self,
        answer_id: str,
        prompts: list[list[int]],
        asked: Asked[SomeBody],
        *,
        param: str,
        limit_param: str = "max_tokens",
        discard: bool = False,
    ) -> list[GrowingSequence]:
        """n choices per prompt, in order; RequestError for what does not fit."""
        state, sampling = self._state, asked.sampling
        prepare.check_sampling_ids(sampling, state.num_ids)
        choices: list[GrowingSequence] = []
        for token_ids in prompts:
            prepare.check_prompt(token_ids, state.num_ids, param)
            settled = prepare.settled(
                sampling, len(token_ids), state.engines.max_model_len, param=param, limit_param=limit_param
            )
            for single in settled.choices():
                choices.append(
                    GrowingSequence(
                        index=len(choices),
                        request_id=f"{answer_id}-{len(choices)}",
                        token_ids=token_ids,
                        sampling=single,
                        tokenizer=state.tokenizer,
                        clock=RequestClock(self._metrics, len(token_ids), asked.arrival),
                        discard=discard,
                    )
                )
        return choices

    async def _answer(self, asked: Asked[SomeBody], choices: list[GrowingSequence], form: Form) -> Response:
        engines, request, place = self._state.engines, asked.request, asked.place
        place.settle(len(choices), sum(len(choice.token_ids) for choice in choices))
        rank = prepare.pinned_rank(request.headers.get(RANK_HEADER), engines.data_parallel_size, RANK_HEADER)
        answer = GrowingAnswer(engines, choices, dp_rank=rank, place=place, group=form.heading.id)
        await answer.start()
        headers = {"X-Request-Id": form.heading.id}
        if asked.body.stream:
            events: AsyncIterator[bytes] = event_stream(answer, form, usage=asked.body.streamed_usage)
            return EventStream(events, headers=headers | _rank_header(answer), on_close=answer.aclose)
        try:
            whole = await unless_disconnected(request, whole_body(answer, form))
        finally:
            await answer.aclose()
        if whole is None:
            return Response(status_code=CLIENT_CLOSED)
        return Response(whole, headers=headers | _rank_header(answer), media_type="application/json")


def _rank_header(answer: GrowingAnswer) -> dict[str, str]:
    """Which DP ranks served, several with commas."""
    return {RANK_HEADER: ",".join(map(str, answer.ranks))} if answer.ranks else {}


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)
