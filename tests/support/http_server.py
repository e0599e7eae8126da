"""A real HTTP server over the application, on a free port of the loopback, in a thread of the test."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from moe_serve.api.app import create_app
from moe_serve.api.connections import HttpServer, listen
from moe_serve.api.state import ApiState
from moe_serve.base.config import Config
from moe_serve.text.tokenizer import load_tokenizer
from tests.support.fake_engines import FakeEngines

MODEL = "fake-model"


def make_state(folder: Path, *, max_model_len: int = 256, dp: int = 2, **options: object) -> ApiState:
    """Fake engines behind the tokenizer of `folder`; `options` by their flags' names."""
    config = Config.from_flat({"model": str(folder), "data_parallel_size": dp, **options})
    tokenizer = load_tokenizer(config)
    end = tokenizer.eos_token_id
    engines = FakeEngines(
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=() if end is None else (end,),
        data_parallel_size=dp,
        max_model_len=max_model_len,
    )
    return ApiState(config=config, model_name=MODEL, tokenizer=tokenizer, engines=engines)


def engines_of(state: ApiState) -> FakeEngines:
    assert isinstance(state.engines, FakeEngines)
    return state.engines


@contextlib.contextmanager
def serving(state: ApiState) -> Iterator[str]:
    """The address of a running server, such as http://127.0.0.1:4711."""
    listening = listen("127.0.0.1", 0)
    server = HttpServer(create_app(state), state.config.server, state.metrics)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listening.close()
        assert not thread.is_alive(), "the HTTP server did not end"
