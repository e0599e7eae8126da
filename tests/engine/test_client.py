"""A front-end's client of the engines, with an engine made of a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import zmq
import zmq.asyncio

from moe_serve.base.config import Config
from moe_serve.base.engine_messages import (
    Abort,
    EngineHello,
    Events,
    FromEngine,
    Generate,
    HeldAnswer,
    HeldAsk,
    LoadReport,
    ToEngine,
    TokenEvent,
)
from moe_serve.base.errors import EngineDead, RequestError, RequestFailed
from moe_serve.base.messages import WorldView
from moe_serve.base.sampling import SamplingParams
from moe_serve.base.sockets import prepare
from moe_serve.engine.client import EngineClient
from moe_serve.engine.overdue import QUIET_SECONDS

TOKEN = "token of a test world"
WAIT_SECONDS = 10.0


class SocketEngine:
    """The other end of a client: what it was sent, and what it answers."""

    def __init__(self, context: zmq.asyncio.Context, address: str, dp: int) -> None:
        self._dp = dp
        self.socket = prepare(context.socket(zmq.DEALER), TOKEN, listens=False)
        self.socket.connect(address)

    async def say(self, message: FromEngine) -> None:
        await self.socket.send(msgspec.msgpack.encode(message))

    async def hello(self) -> None:
        await self.say(EngineHello(dp=self._dp, num_blocks=8, block_size=4, max_model_len=32))

    async def answer(self, event: TokenEvent) -> None:
        await self.say(Events(self._dp, [event], LoadReport()))

    async def heard(self) -> ToEngine:
        body = await asyncio.wait_for(self.socket.recv(), WAIT_SECONDS)
        return msgspec.msgpack.decode(body, type=ToEngine)


@asynccontextmanager
async def world(
    serves: list[int] | None = None, *, quiet: float = QUIET_SECONDS, step_timeout: float = 60
) -> AsyncIterator[tuple[EngineClient, list[SocketEngine]]]:
    """A client in a world of two engines (whatever its options say); those it serves are connected."""
    config = Config.from_flat({"step_timeout_seconds": step_timeout})
    client = EngineClient(config, token=TOKEN, serves=serves, quiet=quiet)
    client.meet(WorldView(engines=2))
    address = client.bind("127.0.0.1")
    context = zmq.asyncio.Context()
    engines = [SocketEngine(context, address, dp) for dp in serves or range(2)]
    receiving = asyncio.create_task(client.run())
    try:
        for engine in engines:
            await engine.hello()
        await asyncio.wait_for(client.wait_ready(), WAIT_SECONDS)
        yield client, engines
    finally:
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        context.destroy(linger=0)
        client.close()


def test_a_submitted_stream_knows_its_rank_before_any_event_and_ends_with_the_last() -> None:
    async def scenario() -> None:
        async with world() as (client, engines):
            streams = [await client.submit(name, [1, 2], SamplingParams()) for name in ("a", "b")]
            assert sorted(stream.rank for stream in streams) == [0, 1]
            first = streams[0]
            request = await engines[first.rank].heard()
            assert isinstance(request, Generate)
            assert request.request_id == "a"
            await engines[first.rank].answer(TokenEvent(request_id="a", token_ids=[5]))
            await engines[first.rank].answer(TokenEvent(request_id="a", token_ids=[6], finish_reason="length"))
            assert [event.token_ids async for event in first] == [[5], [6]]
            assert client.num_unfinished == 1
            await first.aclose()
            await streams[1].aclose()
            assert client.num_unfinished == 0

    asyncio.run(scenario())


def test_a_stream_closed_before_its_first_event_aborts_its_request_once() -> None:
    async def scenario() -> None:
        async with world() as (client, engines):
            stream = await client.submit("a", [1], SamplingParams(), dp_rank=1)
            assert stream.rank == 1
            await stream.aclose()
            await stream.aclose()
            assert client.num_unfinished == 0
            assert [event async for event in stream] == []
            await client.submit("b", [1], SamplingParams(), dp_rank=1)
            heard = [await engines[1].heard() for _ in range(3)]
            assert [type(message) for message in heard] == [Generate, Abort, Generate]

    asyncio.run(scenario())


def test_what_an_engine_refuses_and_a_broken_world_end_a_stream_with_their_errors() -> None:
    async def scenario() -> None:
        async with world() as (client, engines):
            refused = await client.submit("a", [1], SamplingParams(), dp_rank=0)
            await engines[0].answer(TokenEvent(request_id="a", token_ids=[], finish_reason="error", error="too long"))
            with pytest.raises(RequestError, match="too long"):
                await anext(refused)
            broken = await client.submit("d", [1], SamplingParams(), dp_rank=0)
            event = TokenEvent(request_id="d", token_ids=[], finish_reason="error", error="not finite", failed=True)
            await engines[0].answer(event)
            with pytest.raises(RequestFailed, match="not finite"):
                await anext(broken)
            waiting = await client.submit("b", [1], SamplingParams())
            client.fail("engine dp 1 was killed")
            with pytest.raises(EngineDead, match="was killed"):
                await anext(waiting)
            with pytest.raises(EngineDead, match="was killed"):
                await client.submit("c", [1], SamplingParams())
            assert client.num_unfinished == 0

    asyncio.run(scenario())


def test_a_client_that_serves_some_ranks_is_ready_when_they_have_come_and_asks_no_others() -> None:
    async def scenario() -> None:
        async with world([1]) as (client, _):
            assert client.data_parallel_size == 2
            streams = [await client.submit(name, [1, 2], SamplingParams()) for name in ("a", "b")]
            assert [stream.rank for stream in streams] == [1, 1]
            with pytest.raises(RequestError, match="must be one of 1, the data-parallel ranks that this front-end"):
                await client.submit("c", [1], SamplingParams(), dp_rank=0)
            for stream in streams:
                await stream.aclose()

    asyncio.run(scenario())


def test_a_client_is_not_ready_before_it_has_met_the_world_and_all_that_it_serves_have_come() -> None:
    async def scenario() -> None:
        client = EngineClient(Config(), token=TOKEN)
        context = zmq.asyncio.Context()
        address = client.bind("127.0.0.1")
        receiving = asyncio.create_task(client.run())
        try:
            engines = [SocketEngine(context, address, dp) for dp in range(2)]
            await engines[0].hello()
            await asyncio.sleep(0.2)
            assert not client.ready
            client.meet(WorldView(engines=2))
            assert not client.ready
            await engines[1].hello()
            await asyncio.wait_for(client.wait_ready(), WAIT_SECONDS)
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            context.destroy(linger=0)
            client.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "frames",
    [
        [b"\x81\xa4type\xac" + b"\xff" * 12],
        [b"\x91" * 100_000],
        [b"a", b"b"],
        [b""],
        [b"", b"", b""],
        [b"\xc1"],
    ],
    ids=["utf8", "deep", "two frames", "empty", "three frames", "unused byte"],
)
def test_a_strangers_bytes_end_nothing(frames: list[bytes]) -> None:
    async def scenario() -> None:
        async with world() as (client, engines):
            await engines[1].socket.send_multipart(frames)
            await asyncio.sleep(0.1)
            stream = await client.submit("a", [1], SamplingParams(), dp_rank=0)
            assert isinstance(await engines[0].heard(), Generate)
            await engines[0].answer(TokenEvent(request_id="a", token_ids=[5], finish_reason="length"))
            assert (await anext(stream)).token_ids == [5]
            await stream.aclose()

    asyncio.run(scenario())


def test_a_request_that_an_engine_swallowed_ends_by_name_and_one_that_waits_goes_on_waiting() -> None:
    async def scenario() -> None:
        async with world(quiet=0.1) as (client, engines):
            lost = await client.submit("lost", [1], SamplingParams(), dp_rank=1)
            waits = await client.submit("waits", [1], SamplingParams(), dp_rank=1)
            assert [type(await engines[1].heard()) for _ in range(2)] == [Generate, Generate]
            for unknown in (["lost"], [], []):
                ask = await engines[1].heard()
                while isinstance(ask, Abort):
                    assert ask.request_ids == ["lost"]
                    ask = await engines[1].heard()
                assert isinstance(ask, HeldAsk)
                await engines[1].say(HeldAnswer(dp=1, number=ask.number, unknown=unknown, computed=0))
                if unknown:
                    with pytest.raises(EngineDead, match="DP rank 1 does not know this request any more"):
                        await asyncio.wait_for(anext(lost), WAIT_SECONDS)
            assert ask.request_ids == ["waits"]
            await engines[1].answer(TokenEvent(request_id="waits", token_ids=[5], finish_reason="length"))
            assert (await asyncio.wait_for(anext(waits), WAIT_SECONDS)).token_ids == [5]
            await waits.aclose()
            assert client.alive
            assert client.num_unfinished == 0

    asyncio.run(scenario())


def test_an_engine_that_says_nothing_at_all_loses_its_requests_when_patience_ends() -> None:
    async def scenario() -> None:
        async with world(quiet=0.1, step_timeout=0.1) as (client, engines):
            mute = await client.submit("mute", [1], SamplingParams(), dp_rank=0)
            with pytest.raises(EngineDead, match=r"DP rank 0 has not said whether .* 0.3 s .*--step-timeout-seconds"):
                await asyncio.wait_for(anext(mute), WAIT_SECONDS)
            assert [type(await engines[0].heard()) for _ in range(3)] == [Generate, HeldAsk, Abort]

    asyncio.run(scenario())


def test_a_stream_whose_end_was_not_taken_yet_is_not_asked_about() -> None:
    async def scenario() -> None:
        async with world(quiet=0.1) as (client, engines):
            done = await client.submit("done", [1], SamplingParams(), dp_rank=0)
            assert isinstance(await engines[0].heard(), Generate)
            await engines[0].answer(TokenEvent(request_id="done", token_ids=[5], finish_reason="length"))
            assert not await engines[0].socket.poll(500)
            assert [event.token_ids async for event in done] == [[5]]

    asyncio.run(scenario())
