"""The terminal chat: in a pipe and on a pseudo-terminal, against a real HTTP server on fake engines."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_serve.base.errors import ConfigError, ServerError
from moe_serve.cli.chat import ChatServer, ServedModel
from tests.support.fake_engines import FakeEngines
from tests.support.http_server import engines_of, make_state, serving
from tests.support.tokenizer_folders import TURN_END, write_folder

WAIT_SECONDS = 30.0
HI = [{"role": "user", "content": "hi"}]


class Server:
    """A server whose model says what a test wants it to say."""

    def __init__(self, url: str, engines: FakeEngines, encode: Callable[[str], list[int]]) -> None:
        self.url = url
        self.engines = engines
        self._encode = encode

    def says(self, text: str) -> None:
        self.engines.script = lambda prompt, sampling: self._encode(text + TURN_END)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server, Callable[[list[int]], str]]]:
    state = make_state(write_folder(tmp_path_factory.mktemp("model")), max_model_len=300)
    with serving(state) as url:
        tokenizer = state.tokenizer
        server = Server(url, engines_of(state), tokenizer.encode)
        yield url, server, lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


@pytest.fixture
def server(running: tuple[str, Server, object]) -> Iterator[Server]:
    yield running[1]
    running[1].engines.calm()


@pytest.fixture
def prompts(running: tuple[str, Server, Callable[[list[int]], str]]) -> Callable[[], list[str]]:
    """What the engines were given, as text."""
    _, server, decode = running
    return lambda: [decode(received.token_ids) for received in server.engines.received]


def chat(url: str, typed: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_serve", "chat", "--url", url, "--max-tokens", "60", *options],
        input=typed,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("MOE_SERVE_")},
    )


def test_in_a_pipe_each_line_is_answered_knowing_those_before(server: Server, prompts: Callable[[], list[str]]) -> None:
    server.says("well, naïve 🙃")
    done = chat(server.url, "one\n\ntwo\n/reset\nthree\n/quit\nfour\n", "--system", "be kind")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "well, naïve 🙃\n" * 3
    first, second, third = prompts()
    assert first == ("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n")
    assert second == first + ("well, naïve 🙃<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n")
    assert third == first.replace("one", "three")


def test_what_a_model_says_cannot_steer_the_terminal(server: Server) -> None:
    server.says("a\x1b[2J\x07b\x9bc\n[red]d[/red] :smile:")
    done = chat(server.url, "x\n")
    assert done.stdout == "a[2Jbc\n[red]d[/red] :smile:\n"


def test_a_turn_that_fails_is_told_and_forgotten(server: Server, prompts: Callable[[], list[str]]) -> None:
    server.says("fine")
    done = chat(server.url, "x" * 2000 + "\n/nonsense\nnext\n")
    assert done.returncode == 1
    assert "--max-model-len" in done.stderr
    assert "/reset forgets" in done.stderr
    assert done.stdout == "fine\n"
    assert prompts() == ["<|im_start|>user\nnext<|im_end|>\n<|im_start|>assistant\n"]


def test_when_the_context_is_full_the_oldest_turns_are_forgotten(
    server: Server, prompts: Callable[[], list[str]]
) -> None:
    server.says("yes")
    done = chat(server.url, "".join(f"{number}{number} " * 20 + "\n" for number in range(1, 8)))
    assert (done.returncode, done.stdout) == (0, "yes\n" * 7)
    assert "11 11" in prompts()[1]
    assert "11 11" not in prompts()[-1]
    assert "66 66" in prompts()[-1]


def test_an_answer_that_breaks_off_is_told(server: Server) -> None:
    server.says("half an answer")
    server.engines.seconds_per_event = 0.01
    server.engines.hold_after = 3
    talking = subprocess.Popen(
        [sys.executable, "-m", "moe_serve", "chat", "--url", server.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert talking.stdin is not None
    talking.stdin.write("x\n")
    talking.stdin.flush()
    until(lambda: server.engines.num_running)
    server.engines.die("engine dp 1 is gone")
    _, errors = talking.communicate(timeout=WAIT_SECONDS)
    assert "engine dp 1 is gone" in errors
    assert talking.returncode == 1


# --- on a terminal ---------------------------------------------------------------------------------------------


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *options: str) -> None:
        self.shown = ""
        self._pid, self._file = pty.fork()
        if self._pid == 0:
            os.environ["TERM"] = "xterm"
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it
            os.execv(sys.executable, [sys.executable, "-m", "moe_serve", "chat", *options])

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C at the prompt, which is shown a moment before Python begins to wait there."""
        time.sleep(0.5)
        self.type("\x03")

    def wait_for(self, pattern: str) -> None:
        """Until `pattern` is shown after what was waited for before."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            found = re.search(pattern, self.shown)
            if found:
                self.shown = self.shown[found.end() :]
                return
            assert time.monotonic() < deadline, f"{pattern!r} is not in {self.shown!r}"
            if select.select([self._file], [], [], 0.1)[0]:
                self.shown += os.read(self._file, 65536).decode(errors="replace")

    def end(self) -> int:
        """The exit code."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                os.close(self._file)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        raise AssertionError(f"the chat did not end; it showed {self.shown!r}")


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(server: Server, prompts: Callable[[], list[str]]) -> None:
    terminal = Terminal("--url", server.url)
    terminal.wait_for(r"fake-model at http://127.*/quit")
    terminal.wait_for("> ")
    server.says("one two three four five six")
    server.engines.hold_after = 4
    terminal.type("count\n")
    terminal.wait_for("one two")
    terminal.type("\x03")
    terminal.wait_for(r"\[stopped\]")
    until(lambda: server.engines.aborted)
    server.engines.hold_after = None
    terminal.type("go on\n")
    terminal.wait_for("one two three four five six")
    assert re.search(r"assistant\none two[^6]*<\|im_end\|>\n<\|im_start\|>user\ngo on", prompts()[1])
    terminal.wait_for("> ")
    terminal.interrupt()
    terminal.wait_for("Ctrl-C again")
    terminal.wait_for("> ")
    terminal.interrupt()
    assert terminal.end() == 0


def test_ctrl_d_ends(server: Server) -> None:
    terminal = Terminal("--url", server.url)
    terminal.wait_for("> ")
    terminal.type("/reset\n")
    terminal.wait_for("forgotten")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


# --- who answers -----------------------------------------------------------------------------------------------


def test_without_a_server_the_chat_says_what_to_do() -> None:
    done = chat("http://127.0.0.1:9", "x\n")
    assert (done.returncode, done.stdout) == (2, "")
    for words in ("no server answers at http://127.0.0.1:9", "refused", "moe-serve serve", "--spawn", "--url"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("url", ["", "http://", "ftp://host", "http://host:port", "http://host:99999", "http://[::1"])
def test_an_impossible_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        ChatServer(url)


def test_an_address_may_have_v1_or_no_scheme(server: Server) -> None:
    for url in (server.url + "/v1", server.url + "/v1/", server.url.removeprefix("http://")):
        assert ChatServer(url).model() == ServedModel("fake-model", 300)


def test_a_missing_key_and_a_strange_server_are_told_apart(tmp_path: Path) -> None:
    with serving(make_state(write_folder(tmp_path), api_key="sesame")) as url:
        with pytest.raises(ConfigError, match="API key"):
            ChatServer(url).model()
        assert ChatServer(url, "sesame").model().name == "fake-model"
        with pytest.raises(ConfigError, match="no such path"):
            ChatServer(url + "/other", "sesame").model()
        with pytest.raises(ConfigError, match="--api-key"):
            ChatServer(url, "a\r\nb")


def test_a_refused_request_carries_the_servers_words_and_code(server: Server) -> None:
    with pytest.raises(ServerError, match="--max-model-len") as caught:
        list(ChatServer(server.url).answer("fake-model", HI, {"max_tokens": 10**6}))
    assert caught.value.code == "context_length_exceeded"
