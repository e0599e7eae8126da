"""What docs/deploying.md tells its reader to type, typed: a network namespace for each machine, and haproxy.

Its commands for nodes are those of test_nodes.py.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from bench.pods import Pods, complete_all, why_not
from bench.report import ROOT
from moe_serve.cli.random_model import make_model
from tests.support.mixed_requests import assert_right, bodies, expected
from tests.support.pages import blocks, lines

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.long,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "pods can be made"),
]

PAGE = ROOT / "docs" / "deploying.md"
MACHINES = ("HOST0", "HOST1")
READY_SECONDS = 120.0
ONE, _SEVERAL_SERVERS, SECRET, EXTERNAL, *_ = blocks(PAGE)


class Machines:
    """Their names are those of the page. MODEL is a small folder, in float32; nothing else is changed."""

    def __init__(self, model: str, folder: Path) -> None:
        self.pods = Pods([*MACHINES, "reader"])
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        export = f'{SECRET}echo "$MOE_SERVE_WORLD_TOKEN"'
        token = subprocess.run(["sh", "-c", export], capture_output=True, text=True, check=True).stdout.strip()
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MOE_SERVE_")},
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
            "MOE_SERVE_WORLD_TOKEN": token,
        }
        self._model = model
        program = folder / "moe-serve"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m moe_serve "$@" --dtype float32\n')
        program.chmod(0o755)

    def type(self, name: str, line: str) -> None:
        """A line of the page into a machine's shell."""
        command = ["sh", "-c", f"PATH={self._folder}:$PATH; {line.replace('MODEL', self._model)}"]
        self._processes.append(self.pods.start(name, command, self._environment, self._log(name)))

    def start_haproxy(self, config: str) -> None:
        path = self._folder / "haproxy.cfg"
        path.write_text(config)
        command = ["haproxy", "-db", "-f", str(path)]
        self._processes.append(self.pods.start("reader", command, dict(os.environ), self._folder / "haproxy.log"))

    def ask_ready(self, client: str, url: str) -> None:
        """Until /readyz is green, or a process has ended."""

        def ask() -> int:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{url}/readyz", timeout=2).status_code
            return 0

        deadline = time.monotonic() + READY_SECONDS
        while self.pods.inside(client, ask) != 200:
            assert time.monotonic() < deadline, self.logs()
            assert all(process.poll() is None for process in self._processes), self.logs()
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in self._folder.glob("*.log"))

    def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
            process.kill()
            process.wait()
        self.pods.close()

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def right(model: str) -> Callable[[list, list], None]:
    answers = expected(model, bodies(40))
    return lambda asked, given: assert_right(asked, given, answers)


@pytest.fixture
def machines(model: str) -> Iterator[Machines]:
    with tempfile.TemporaryDirectory() as folder:
        made = Machines(model, Path(folder))
        try:
            yield made
        finally:
            made.close()


def test_one_machine_serves_itself(machines: Machines, right: Callable[[list, list], None]) -> None:
    (line,) = lines(ONE)
    machines.type("HOST0", line)
    machines.ask_ready("HOST0", "http://127.0.0.1:8000")
    asked = bodies(8)
    right(asked, complete_all(machines.pods, "HOST0", "http://127.0.0.1:8000", asked))


def test_two_machines_are_one_world_behind_the_pages_load_balancer(
    machines: Machines, right: Callable[[list, list], None]
) -> None:
    told = dict(zip(MACHINES, lines(EXTERNAL), strict=True))
    for name in reversed(MACHINES):
        assert told[name].endswith(f"# on {name}")
        machines.type(name, told[name])
        time.sleep(2)
    (config,) = blocks(PAGE, "haproxy")
    machines.start_haproxy(config)
    url = "http://127.0.0.1:8080"
    machines.ask_ready("reader", url)
    time.sleep(1.5)  # the load balancer asks twice a second
    asked = bodies(40)
    answers = complete_all(machines.pods, "reader", url, asked)
    right(asked, answers)
    assert {answer.headers["X-Data-Parallel-Rank"] for answer in answers} == {"0", "1"}
