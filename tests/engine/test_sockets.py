"""The line between a front-end and an engine: cut, it hangs nobody; a stranger is not heard on it. Real sockets."""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
import pytest
import zmq

from moe_serve.base.config import Config
from moe_serve.base.engine_messages import Abort, EngineHello, Events, Generate, LoadReport, ToEngine, TokenEvent
from moe_serve.base.errors import EngineDead
from moe_serve.base.messages import WorldView
from moe_serve.base.sampling import SamplingParams
from moe_serve.base.sockets import prepare
from moe_serve.engine.client import EngineClient
from moe_serve.engine.sockets import FrontendSockets, LineLost, LineStands
from moe_serve.engine.streams import SubmittedStream
from tests.support.proxy import Proxy

TOKEN = "token of a test world"
WAIT_SECONDS = 10.0
NONSENSE = [[b"", b"two frames"], [b"\xa3\xff\xfe\xfd"], [b"\x91" * 100_000], [b"\x81\xa1\xff"], [b""]]


@dataclass
class Line:
    """A client, an engine's sockets, and the proxy between them. `stands` holds one of each connection."""

    client: EngineClient
    engine: FrontendSockets
    heard: queue.Queue[ToEngine | LineLost]
    stands: queue.Queue[LineStands]
    proxy: Proxy
    address: str

    async def hear(self) -> ToEngine | LineLost:
        return await asyncio.to_thread(self.heard.get, timeout=WAIT_SECONDS)

    def answer(self, request: Generate, token: int, *, last: bool = False) -> None:
        event = TokenEvent(request_id=request.request_id, token_ids=[token], finish_reason="length" if last else None)
        self.engine.send(self.address, Events(0, [event], LoadReport()))


@asynccontextmanager
async def line(patience: float = 5.0) -> AsyncIterator[Line]:
    client = EngineClient(Config(), token=TOKEN)
    port = int(client.bind("127.0.0.1").rpartition(":")[2])
    heard: queue.Queue[ToEngine | LineLost] = queue.Queue()
    stands: queue.Queue[LineStands] = queue.Queue()

    def hear(_: str, message: ToEngine | LineLost | LineStands) -> None:
        stands.put(message) if isinstance(message, LineStands) else heard.put(message)

    hello = EngineHello(dp=0, num_blocks=8, block_size=4, max_model_len=32)
    engine = FrontendSockets(hello, hear, token=TOKEN, patience=patience)
    receiving = asyncio.create_task(client.run())
    with Proxy(port) as proxy:
        address = f"tcp://127.0.0.1:{proxy.port}"
        engine.connect(address)
        client.meet(WorldView(engines=1))
        try:
            await asyncio.wait_for(client.wait_ready(), WAIT_SECONDS)
            yield Line(client, engine, heard, stands, proxy, address)
        finally:
            engine.disconnect(address)
            receiving.cancel()
            client.close()


async def ask(line: Line, name: str) -> tuple[SubmittedStream, Generate]:
    stream = await line.client.submit(name, [1, 2, 3], SamplingParams(max_tokens=4))
    while not isinstance(request := await line.hear(), Generate):
        assert isinstance(request, Abort), "of a stream that the cut has ended"
    return stream, request


async def ask_for_ever(line: Line) -> None:
    """Until the client's end has noticed."""
    while True:
        await (await line.client.submit("lost", [1], SamplingParams(max_tokens=1))).aclose()
        await asyncio.sleep(0.05)


async def next_event(stream: SubmittedStream) -> TokenEvent:
    return await asyncio.wait_for(anext(stream), WAIT_SECONDS)


def test_a_line_that_is_cut_in_mid_stream_ends_its_streams_by_name_and_serves_the_next_request() -> None:
    async def scenario() -> None:
        async with line() as cut:
            stream, request = await ask(cut, "first")
            cut.answer(request, 7)
            assert (await next_event(stream)).token_ids == [7]
            assert cut.stands.qsize() == 1
            cut.proxy.cut()
            assert await cut.hear() == LineLost()
            cut.answer(request, 8)
            with pytest.raises(EngineDead, match="the connection to DP rank 0 was lost"):
                await next_event(stream)
            stream, request = await ask(cut, "second")
            cut.answer(request, 9, last=True)
            assert (await next_event(stream)).token_ids == [9]
            await stream.aclose()
            assert cut.client.num_unfinished == 0
            assert cut.stands.qsize() == 2

    asyncio.run(scenario())


def test_a_front_end_that_stays_out_of_reach_is_told_to_the_engine() -> None:
    async def scenario() -> None:
        async with line(patience=0.5) as cut:
            cut.proxy.closed = True
            cut.proxy.cut()
            assert await cut.hear() == LineLost()
            with pytest.raises(EngineDead, match="DP rank 0 cannot be reached now"):
                await asyncio.wait_for(ask_for_ever(cut), WAIT_SECONDS)
            assert await cut.hear() == LineLost(final=True)

    asyncio.run(scenario())


@pytest.mark.parametrize("knows", [False, True], ids=["stranger", "member that talks nonsense"])
def test_nothing_that_comes_in_ends_the_receiving(knows: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        caplog.set_level(logging.ERROR, "asyncio")
        async with line() as cut:
            target = f"tcp://127.0.0.1:{cut.proxy.port}"
            with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
                stranger.setsockopt(zmq.LINGER, 0)
                if knows:
                    prepare(stranger, TOKEN, listens=False)
                stranger.connect(target)
                for parts in NONSENSE:
                    stranger.send_multipart(parts)
                hello = EngineHello(dp=7, num_blocks=1, block_size=1, max_model_len=1)
                stranger.send(msgspec.msgpack.encode(hello))
                await asyncio.sleep(0.3)
                stream, request = await ask(cut, "afterwards")
                cut.answer(request, 5, last=True)
                assert (await next_event(stream)).token_ids == [5]
                await stream.aclose()
        assert (7 in cut.client._hellos) == knows

    asyncio.run(scenario())
