"""A server of our own for a measurement: started on a free port, waited for, ended by SIGTERM."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.http_stream import Address

READY_SECONDS = 300.0
END_SECONDS = 40.0


@dataclass(frozen=True, slots=True)
class Started:
    """A ready server; `begun` is when its process was started, in time.monotonic(); `pid` of its launcher."""

    address: Address
    begun: float
    pid: int


@contextmanager
def started(model: str | None, server_options: Sequence[str], *, preset: str = "tiny") -> Iterator[Started]:
    """Serve `model`, or a random checkpoint of `preset`."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "server.log")
        with log.open("wb") as output:
            served = model or _checkpoint(preset, Path(folder, "model"))
            command = [sys.executable, "-m", "moe_serve", "serve", str(served), "--port", "0", *server_options]
            begun = time.monotonic()
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield Started(_await_ready(process, log), begun, process.pid)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(END_SECONDS)


def _checkpoint(preset: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "moe_serve", "make-model", str(folder), "--preset", preset]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def _await_ready(process: subprocess.Popen[bytes], log: Path) -> Address:
    deadline = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        found = re.search(r"^curl (http://[^/\s]+)/", log.read_text(), re.MULTILINE)
        if found:
            return Address.parse(found.group(1))
        time.sleep(0.05)
    raise SystemExit(f"the server is not ready (exit code {process.poll()}):\n{log.read_text()}")
