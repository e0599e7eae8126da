"""A server of one's own: waited for, and gone afterwards however its user ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_serve.base.errors import ConfigError, EngineError, RankTimeout
from moe_serve.cli.spawn import spawned_server

WAIT_SECONDS = 20.0
READY = "print('a line'); print(\"curl http://127.0.0.1:4711/v1/completions -d '{}'\", flush=True); "
PID = "import os; open('PATH', 'w').write(str(os.getpid())); "


def child(path: Path, program: str) -> list[str]:
    """A command that notes its process id in `path` and then runs `program`."""
    return [sys.executable, "-c", PID.replace("PATH", str(path)) + program]


def gone(path: Path) -> bool:
    """Whether the process that noted itself has ended; a zombie of somebody else's has."""
    try:
        state = Path(f"/proc/{int(path.read_text())}/stat").read_text()
    except FileNotFoundError:
        return True
    return state.rpartition(")")[2].split()[0] == "Z"


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_spawned_server_is_found_by_its_ready_line_and_ended(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with spawned_server(child(note, READY + "import time; time.sleep(600)")) as url:
        assert url == "http://127.0.0.1:4711"
        assert not gone(note)
    assert gone(note)


def test_a_spawned_server_is_ended_when_its_user_fails(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(KeyError), spawned_server(child(note, READY + "import time; time.sleep(600)")):
        raise KeyError("x")
    assert gone(note)


@pytest.mark.parametrize(("code", "kind"), [(2, ConfigError), (1, EngineError), (0, EngineError)])
def test_a_server_that_ends_before_it_is_ready_is_an_error(tmp_path: Path, code: int, kind: type[Exception]) -> None:
    with (
        pytest.raises(kind, match=f"code {code} before it was ready"),
        spawned_server(child(tmp_path / "pid", f"raise SystemExit({code})")),
    ):
        pytest.fail("it is not ready")


def test_a_server_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with (
        pytest.raises(RankTimeout, match="not ready"),
        spawned_server(child(note, "import time; time.sleep(600)"), ready_seconds=1.0),
    ):
        pytest.fail("it is not ready")
    assert not note.exists() or gone(note)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_spawned_server_does_not_outlive_its_user(tmp_path: Path, number: signal.Signals) -> None:
    note = tmp_path / "pid"
    user = (
        "import time; from moe_serve.cli.spawn import spawned_server\n"
        f"with spawned_server({child(note, READY + 'import time; time.sleep(600)')!r}):\n"
        "    print('ready', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", user], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(WAIT_SECONDS) == (-number if number == signal.SIGKILL else 128 + number)
    until(lambda: gone(note))
