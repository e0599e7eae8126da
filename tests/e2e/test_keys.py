"""Clients' keys are known to the launcher and the API server; nobody else is told them. Real processes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from moe_serve.cli.random_model import make_model
from moe_serve.world.member import ENVIRONMENT, MemberSpec
from tests.support.server import Server, serving

pytestmark = [pytest.mark.ranks, pytest.mark.long]

KEY, ADMIN_KEY = "clients-know-this-3f1c", "operators-know-this-9d2a"
VARIABLES = {"MOE_SERVE_API_KEY": KEY, "moe_serve_admin_api_key": ADMIN_KEY}
COMPUTING = {"moe_serve.engine.process": 1, "moe_serve.worker.process": 2, "moe_serve.world.solver_process": 2}
OPTIONS = ("-tp", "2", "-ep", "--enable-eplb", "--max-model-len", "256", "--kv-cache-memory-bytes", str(2**24))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An engine with two workers, both solvers; the keys come from the environment."""
    model = make_model(tmp_path_factory.mktemp("model") / "tiny")
    with serving(str(model), *OPTIONS, environment={**os.environ, **VARIABLES}) as running:
        yield running


def of(server: Server, module: str) -> list[psutil.Process]:
    return [process for process in server.family() if module in process.cmdline()]


def told(process: psutil.Process) -> bytes:
    """Its environment and its command line, as Linux shows them."""
    folder = Path(f"/proc/{process.pid}")
    return (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()


def holds(process: psutil.Process, key: str) -> bool:
    """Whether the key is anywhere in what the process has written to its memory."""
    regions = re.findall(r"^(\w+)-(\w+) rw-p (?!.*\[v)", Path(f"/proc/{process.pid}/maps").read_text(), re.MULTILINE)
    with Path(f"/proc/{process.pid}/mem").open("rb", 0) as memory:
        return any(_holds(memory.fileno(), int(start, 16), int(end, 16), key.encode()) for start, end in regions)


def _holds(memory: int, start: int, end: int, key: bytes) -> bool:
    piece = 1 << 26
    for at in range(start, end, piece):
        try:
            if key in os.pread(memory, min(piece + len(key), end - at), at):
                return True
        except OSError:  # a guard page
            continue
    return False


def test_no_engine_worker_or_solver_is_told_a_key(server: Server) -> None:
    for module, number in COMPUTING.items():
        processes = of(server, module)
        assert len(processes) == number
        for process in processes:
            assert not any(key.encode() in told(process) for key in VARIABLES.values()), module
    (engine,) = of(server, "moe_serve.engine.process")
    (api,) = of(server, "moe_serve.api.server")
    for process, knows in ((engine, False), (api, True)):
        spec = MemberSpec.from_json(process.environ()[ENVIRONMENT])
        assert (spec.load_config().server.api_key is not None) == knows
        assert (spec.load_config().server.admin_api_key is not None) == knows


def test_no_engine_worker_or_solver_has_a_key_in_its_memory(server: Server) -> None:
    (api,) = of(server, "moe_serve.api.server")
    try:
        assert holds(api, KEY), "the search finds what is there"
    except PermissionError:
        pytest.skip("this machine does not let a process read another one's memory (kernel.yama.ptrace_scope)")
    for module in COMPUTING:
        for process in of(server, module):
            assert not holds(process, KEY), module
            assert not holds(process, ADMIN_KEY), module


def test_the_keys_open_doors_and_are_neither_shown_nor_logged(server: Server) -> None:
    def ask(method: str, path: str, key: str | None) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.request(method, server.base_url + path, headers=headers, json=None if method == "GET" else {})

    assert [ask("GET", "/config", key).status_code for key in (None, ADMIN_KEY, KEY)] == [401, 401, 200]
    assert [ask("POST", "/eplb/record/start", key).status_code for key in (KEY, ADMIN_KEY)] == [401, 200]
    shown = ask("GET", "/config", KEY).text
    for key in VARIABLES.values():
        assert key not in shown
        assert key not in server.log()
