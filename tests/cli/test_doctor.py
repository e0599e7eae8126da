"""`moe-serve doctor` as a command: modes, options, both outputs, exit codes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading

import pytest

from moe_serve.base.errors import ConfigError
from moe_serve.base.secret import TOKEN_ENVIRONMENT
from moe_serve.cli.doctor import misspelt_variables, parse_peer, run_doctor
from moe_serve.doctor.listening import Listener
from moe_serve.doctor.machine import TorchFacts

TOKEN = "a token of sixteen characters"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_serve.doctor.machine.ask_torch", lambda: TorchFacts("2.13.0", "AVX2"))
    monkeypatch.delenv(TOKEN_ENVIRONMENT, raising=False)


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("two", ("two", 7)),
        ("two:9", ("two", 9)),
        ("10.0.0.1:9", ("10.0.0.1", 9)),
        ("fd00::1", ("fd00::1", 7)),
        ("[fd00::1]", ("fd00::1", 7)),
        ("[fd00::1]:9", ("fd00::1", 9)),
    ],
)
def test_peers_are_written_with_or_without_a_port(text: str, peer: tuple[str, int]) -> None:
    assert parse_peer(text, 7) == peer


@pytest.mark.parametrize("text", ["", ":9", "two:", "two:x", "two:0", "two:70000", "[]:9"])
def test_what_is_no_peer_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST"):
        parse_peer(text, 7)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--listen", "--peers", "x"], "not allowed with"),
        (["--listen", "--seconds", "0"], "--seconds must be"),
        (["--listen", "--seconds", "nan"], "--seconds must be"),
        (["--peers", "x", "--seconds", "3"], "--seconds means nothing with --peers"),
        (["--server", "x", "--port", "3"], "--port means nothing with --server"),
        (["--api-key", "k"], "--api-key means nothing without a mode"),
        (["--ports", "0"], "no port"),
        (["--ports", "1,x"], "no port"),
        (["--ports", ",".join(map(str, range(1, 40)))], "more than"),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_doctor(arguments)


def test_this_machine_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    assert run_doctor(["--ports", str(port)]) == 0
    text = capsys.readouterr().out
    assert f"port {port}: free" in text
    assert " failures" in text.splitlines()[-1]
    assert run_doctor(["--ports", str(port), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert {"check": f"port {port}", "level": "ok", "found": "free", "means": "", "do": ""} in told["findings"]
    assert told["facts"]["cores"] > 0


def test_a_failure_is_exit_code_1_with_what_it_means_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as held:
        port = held.getsockname()[1]
        assert run_doctor(["--ports", str(port)]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if f"port {port}" in line)
    assert lines[at].startswith("failure")
    assert lines[at + 1].strip().startswith("means: ")
    assert lines[at + 2].strip().startswith("do: ")


def test_every_variable_that_serve_would_refuse_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_SERVE_PRT", "1")
    monkeypatch.setenv("MOE_SERVE_MAX_NUM_SEQ", "1")
    monkeypatch.setenv("MOE_SERVE_PORT", "tcp://10.0.0.1:80")  # Kubernetes' own
    found = misspelt_variables()
    assert len(found) == 2
    assert "did you mean MOE_SERVE_MAX_NUM_SEQS?" in found[0]
    assert "MOE_SERVE_PRT" in found[1]


def test_peers_are_checked_with_the_token_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TOKEN_ENVIRONMENT, TOKEN)
    listener = Listener("127.0.0.1", 0, token=TOKEN, tell=lambda _: None)
    thread = threading.Thread(target=listener.run, args=(60,))
    thread.start()
    try:
        peers = f"127.0.0.1:{listener.port},127.0.0.1:{listener.port}"
        assert run_doctor(["--peers", peers]) == 0
    finally:
        listener.end()
        thread.join(5)
    text = capsys.readouterr().out
    assert text.count("127.0.0.1: token: both know the same") == 2
    assert TOKEN not in text


def test_a_short_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENVIRONMENT, "short")
    with pytest.raises(ConfigError, match="5 characters"):
        run_doctor(["--peers", "x"])


def test_a_listener_to_whom_nobody_comes_says_so_and_ends_by_itself() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "moe_serve", "doctor", "--listen", "--port", port, "--seconds", "0.3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["findings"][0]["found"].startswith("nobody came")
    assert "without a token" in done.stderr
