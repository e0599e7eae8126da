"""A world that lives on ::1 alone: HTTP, coordinator, store, lines of ZMQ, gloo. Real processes."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest

from bench.http_stream import Address, get_json
from moe_serve.cli.random_model import make_model
from tests.support.ipv6 import why_no_ipv6
from tests.support.server import COMMAND, Server, serving

OPTIONS = (
    *("-dp", "2", "-ep", "--max-model-len", "256", "--kv-cache-memory-bytes", str(2**24)),
    *("--host", "[::1]", "--data-parallel-address", "::1"),
    *("--data-parallel-rpc-port", "0", "--data-parallel-master-port", "0"),
)


pytestmark = [pytest.mark.ranks, pytest.mark.long, pytest.mark.skipif(bool(why_no_ipv6()), reason=why_no_ipv6())]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = make_model(tmp_path_factory.mktemp("model") / "tiny")
    with serving(str(model), *OPTIONS) as running:
        yield running


def test_both_ranks_answer_and_every_socket_of_the_world_is_on_one_address(server: Server) -> None:
    assert server.base_url.startswith("http://[::1]:")
    body = {"prompt": "together", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    answers = [server.post("/v1/completions", body, {"X-data-parallel-rank": rank}) for rank in "01"]
    assert [answer.status_code for answer in answers] == [200, 200], [answer.text for answer in answers]
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    found = [each for process in server.family() for each in process.net_connections("inet")]
    assert len([each for each in found if each.status == psutil.CONN_LISTEN]) > 5
    assert {each.laddr.ip for each in found} == {"::1"}


def test_the_log_writes_addresses_as_urls_do(server: Server) -> None:
    assert server.get("/livez").status_code == 200
    deadline = time.monotonic() + 10  # the line is written after the answer
    while not (lines := [line for line in server.log().splitlines() if "/livez" in line]):
        assert time.monotonic() < deadline, server.log()
        time.sleep(0.05)
    assert "[::1]:" in lines[0]


def test_chat_and_the_load_generator_reach_it(server: Server) -> None:
    chat = subprocess.run(
        [*COMMAND, "chat", "--url", server.base_url, "--max-tokens", "4"],
        input="hello\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.strip()
    models = asyncio.run(get_json(Address.parse(server.base_url), "/v1/models"))
    assert models["data"][0]["max_model_len"] == 256
