"""A real `moe-serve serve` for tests: started on a port of its own, waited for with a bound, ended by its pid."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from moe_serve.base.secret import TOKEN_ENVIRONMENT

READY_SECONDS = 90.0
END_SECONDS = 20.0
COMMAND = (sys.executable, "-m", "moe_serve")


class Server:
    """`base_url` once ready. `log()` is all it has written so far (standard output and error together).

    Its world's token is in the environment of all its processes, so that they are found whoever their parent is;
    ranks of one world that are started apart share it.
    """

    def __init__(
        self,
        *arguments: str,
        environment: dict[str, str] | None = None,
        token: str | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="moe-serve-", suffix=".log")  # noqa: SIM115 - closed in end()
        self.token = token or secrets.token_hex(16)
        key = arguments[arguments.index("--api-key") + 1] if "--api-key" in arguments else None
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.process = subprocess.Popen(
            [*command, "serve", *arguments, *(() if "--port" in arguments else ("--port", "0"))],
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env={**(os.environ if environment is None else environment), TOKEN_ENVIRONMENT: self.token},
            start_new_session=True,
        )
        self.base_url = ""

    def wait_ready(self, seconds: float = READY_SECONDS) -> Server:
        """Until the last line of the start-up is there; AssertionError with the log if the server ends or is late."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"^curl (http://[^/\s]+)/", self.log(), re.MULTILINE)
            if found:
                self.base_url = found.group(1)
                return self
            time.sleep(0.02)
        raise AssertionError(f"not ready (exit code {self.process.poll()}):\n{self.log()}")

    def log(self) -> str:
        return Path(self._file.name).read_text()

    def curl_line(self) -> list[str]:
        """The printed curl command, as arguments."""
        line = next(line for line in self.log().splitlines() if line.startswith("curl "))
        return shlex.split(line)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.base_url + path, timeout=30, **{"headers": self._headers, **options})

    def post(self, path: str, body: object, headers: dict[str, str] | None = None) -> httpx.Response:
        return httpx.post(self.base_url + path, json=body, headers={**self._headers, **(headers or {})}, timeout=120)

    def complete(self, prompt: str | list[int], **fields: Any) -> dict[str, Any]:
        """The body of a completion; greedy unless told otherwise."""
        body = {"prompt": prompt, "temperature": 0, **fields}
        response = httpx.post(f"{self.base_url}/v1/completions", json=body, headers=self._headers, timeout=120)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def stream(self, prompt: str | list[int], **fields: Any) -> Iterator[dict[str, Any]]:
        """The events of a streamed completion, without the closing [DONE]."""
        body = {"prompt": prompt, "temperature": 0, "stream": True, **fields}
        with httpx.stream("POST", f"{self.base_url}/v1/completions", json=body, timeout=120) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))

    def family(self) -> list[psutil.Process]:
        """Every living process that was started for this world: launcher, API server, engines, workers."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def member(self, module: str, **fields: int) -> psutil.Process:
        """The process that runs `module` (for example "engine.process") with these values in what it was told."""
        for process in self.family():
            if f"moe_serve.{module}" in process.cmdline():
                environment = process.environ()
                told: dict[str, Any] = {}
                for name in ("MOE_SERVE_MEMBER", "MOE_SERVE_WORKER"):  # a worker inherits its engine's
                    told |= json.loads(environment.get(name, "{}"))
                if all(told[name] == value for name, value in fields.items()):
                    return process
        raise AssertionError(f"no process {module} {fields}")

    def wait_gone(self, seconds: float) -> list[psutil.Process]:
        """Until no process of the family lives, at most so long; those that are left."""
        deadline = time.monotonic() + seconds
        while (left := self.family()) and time.monotonic() < deadline:
            time.sleep(0.02)
            self.process.poll()
        return left

    def terminate(self, seconds: float = END_SECONDS) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def end(self) -> None:
        """Whatever happened before: no process of this server stays."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for process in self.family():
            process.kill()
        self._file.close()

    def _owns(self, process: psutil.Process) -> bool:
        try:
            return bool(process.environ().get(TOKEN_ENVIRONMENT) == self.token)
        except (psutil.Error, OSError):  # gone meanwhile, a zombie, or not ours to look at
            return False


@contextmanager
def serving(
    *arguments: str, environment: dict[str, str] | None = None, command: Sequence[str] = COMMAND
) -> Iterator[Server]:
    """A ready server, ended afterwards."""
    server = Server(*arguments, environment=environment, command=command)
    try:
        yield server.wait_ready()
    finally:
        server.end()
