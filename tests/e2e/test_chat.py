"""`moe-serve chat --spawn`: one command from nothing to an answer, and nothing left behind."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from moe_serve.base.secret import TOKEN_ENVIRONMENT
from moe_serve.cli.random_model import make_model
from tests.support.server import COMMAND

WAIT_SECONDS = 15.0


def processes_of(token: str) -> list[int]:
    """Who carries a world's token in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if token in process.environ().values() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.long
def test_chat_starts_a_server_of_its_own_and_ends_it(tmp_path: Path) -> None:
    make_model(folder=tmp_path / "model", preset="tiny", arch="qwen3_moe", seed=0)
    token = secrets.token_hex(16)
    chat = ["chat", "--max-tokens", "8", "--spawn", str(tmp_path / "model"), "--max-model-len", "256", "-dp", "2"]
    done = subprocess.run(
        [*COMMAND, *chat, "--api-key", "sesame"],
        input="In the beginning\nAnd then?\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {TOKEN_ENVIRONMENT: token},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr
    deadline = time.monotonic() + WAIT_SECONDS
    while processes_of(token) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of(token)


def test_what_spawn_cannot_serve_is_said_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "chat", "--spawn", str(tmp_path), "--data-parallel-size", "0"],
        input="",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "data_parallel_size" in done.stderr
    assert "Traceback" not in done.stderr
