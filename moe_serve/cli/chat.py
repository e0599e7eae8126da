"""`moe-serve chat`: a conversation with a server in the terminal, or in a pipe. Knows HTTP and nothing of engines.

Ctrl-C stops an answer (its connection closes, which the server takes as an abort); at the prompt, twice ends the chat.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from moe_serve.base.errors import ConfigError, MissingExtra, MoEServeError, ServerError
from moe_serve.base.registry import import_target

CONNECT_SECONDS = 10.0
ANSWER_TOKENS = 512
ANSWER_SECONDS = 300.0  # without a single piece of an answer
HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends, Ctrl-C stops an answer"
Message = dict[str, str]

# Text of a model must not steer the terminal.
_CONTROLS = {code: None for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """`context` in tokens, where the server tells."""

    name: str
    context: int | None


class ChatServer:
    """An OpenAI-compatible server at `url` (http://host:port, with or without /v1). Raises ConfigError, ServerError."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            self._host = ""
        if not self._host or parts.scheme not in ("http", "https"):
            raise ConfigError(f"{url!r} is no address such as http://127.0.0.1:8000 (option --url)")
        self.url = url
        self._secure = parts.scheme == "https"
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": b"application/json"}
        if api_key:
            if not api_key.isprintable():
                raise ConfigError("the API key holds characters that no header can carry (option --api-key)")
            self._headers["Authorization"] = f"Bearer {api_key}".encode()

    def model(self) -> ServedModel:
        """The model served; ConfigError when nobody answers or it is no such server."""
        with self._request("GET", "/v1/models") as response:
            try:
                card = json.load(response)["data"][0]
                return ServedModel(str(card["id"]), card.get("max_model_len"))
            except (ValueError, LookupError, TypeError, AttributeError):
                raise ConfigError(f"what answers at {self.url} is no OpenAI-compatible server") from None

    def answer(
        self, model: str, messages: Sequence[Message], options: Mapping[str, object]
    ) -> Generator[str, None, None]:
        """The pieces of an answer as they come. Closing the iterator early stops the answer."""
        body = {"model": model, "messages": list(messages), "stream": True, **options}
        with self._request("POST", "/v1/chat/completions", json.dumps(body).encode()) as response:
            try:
                for data in _events(response):
                    yield from _pieces(data)
            except (OSError, HTTPException) as error:
                raise ServerError(f"the answer broke off: {_reason(error)}") from error

    @contextlib.contextmanager
    def _request(self, method: str, path: str, body: bytes | None = None) -> Iterator[HTTPResponse]:
        """A response with status 200."""
        kind = HTTPSConnection if self._secure else HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_SECONDS)
        with contextlib.closing(connection):
            try:
                connection.connect()
                connection.sock.settimeout(ANSWER_SECONDS)
                connection.request(method, self._prefix + path, body, self._headers)
                response = connection.getresponse()
            except (OSError, HTTPException) as error:
                raise ConfigError(
                    f"no server answers at {self.url} ({_reason(error)}); start one with `moe-serve serve`, let "
                    "`moe-serve chat --spawn` start one, or name another with --url"
                ) from error
            if response.status != 200:
                raise _refusal(response)
            yield response


def converse(
    server: ChatServer, console: Console, *, system: str | None = None, options: Mapping[str, object] | None = None
) -> int:
    """Read lines and answer them until the end of input or /quit; the exit code."""
    return Conversation(server, console, system, options or {}).run()


class Conversation:
    """The turns so far, and the loop around them. In a pipe only answers are written."""

    def __init__(self, server: ChatServer, console: Console, system: str | None, options: Mapping[str, object]) -> None:
        self._server = server
        self._console = console
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns: list[Message] = []
        model = server.model()
        self._model = model.name
        # Without a limit one answer could fill the context, and no next turn would fit.
        limit = min(ANSWER_TOKENS, model.context // 2 or 1) if isinstance(model.context, int) else ANSWER_TOKENS
        self._options = {"max_tokens": limit} | {name: value for name, value in options.items() if value is not None}
        self._typed = sys.stdin.isatty()
        if self._typed:
            # Once it is loaded, input() edits lines and remembers them. Not every Python has it.
            with contextlib.suppress(MissingExtra):
                import_target("readline:set_auto_history", "line editing", "readline")
        self._failed = False

    def run(self) -> int:
        self._hint(f"{self._model} at {self._server.url}. {HELP}.")
        interrupted = False
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                self._console.out()
                if interrupted:
                    return 0
                interrupted = True
                self._hint("Ctrl-C again ends the chat")
                continue
            interrupted = False
            if line is None or line in ("/quit", "/exit"):
                return 1 if self._failed and not self._typed else 0
            self._obey(line)

    def _read(self) -> str | None:
        """The next line; None at the end of input."""
        if not self._typed:
            line = sys.stdin.readline()
            return line.strip() if line else None
        try:
            return input("> ").strip()
        except EOFError:
            self._console.out()
            return None

    def _obey(self, line: str) -> None:
        if line == "/reset":
            self._turns.clear()
            self._hint("forgotten")
        elif line.startswith("/"):
            self._complain(HELP)
        elif line:
            self._turn(line)

    def _turn(self, text: str) -> None:
        """Ask and show the answer; of a turn that failed nothing is kept, of a stopped one what was shown."""
        self._turns.append({"role": "user", "content": _unicode(text)})
        told: list[str] = []
        try:
            self._show(told)
        except MoEServeError as error:
            if told:
                self._console.out()
            del self._turns[-1]
            self._failed = True
            self._complain(str(error))
            return
        except KeyboardInterrupt:
            self._console.out(" [stopped]", highlight=False, end="")
        self._console.out()
        self._turns.append({"role": "assistant", "content": "".join(told)})

    def _show(self, told: list[str]) -> None:
        """Write the answer piece by piece. Turns that no longer fit the context are forgotten, oldest first."""
        while True:
            messages = [*self._system, *self._turns]
            try:
                with contextlib.closing(self._server.answer(self._model, messages, self._options)) as pieces:
                    for piece in pieces:
                        told.append(piece)
                        self._console.out(piece.translate(_CONTROLS), highlight=False, end="")
                return
            except ServerError as error:
                if error.code != "context_length_exceeded" or len(self._turns) < 3:
                    raise
                del self._turns[:2]
                self._hint("the context is full: forgot the oldest question and answer")

    def _hint(self, text: str) -> None:
        if self._typed:
            self._console.print(text, style="dim", markup=False, highlight=False, emoji=False)

    def _complain(self, text: str) -> None:
        """On standard error, so that a pipe carries answers only."""
        Console(stderr=True).print(f"moe-serve chat: {text}", style="red", markup=False, highlight=False, emoji=False)


def make_console() -> Console:
    """Standard output, which shows a question mark for what it cannot show."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console()


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The data of each server-sent event; ServerError when the stream ends without [DONE]."""
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        try:
            value = json.loads(data)
        except ValueError:
            raise ServerError("the server sent an event that is no JSON") from None
        if not isinstance(value, dict):
            raise ServerError("the server sent an event that is no object")
        if "error" in value:
            raise _as_error(value, "the server broke the answer off")
        yield value
    raise ServerError("the answer broke off")


def _pieces(chunk: Mapping[str, Any]) -> Iterator[str]:
    """Texts of a chunk's choices."""
    for choice in chunk.get("choices") or ():
        text = (choice.get("delta") or {}).get("content")
        if text:
            yield text


def _refusal(response: HTTPResponse) -> MoEServeError:
    """What a status other than 200 means; a wrong key is the operator's mistake."""
    try:
        body = json.loads(response.read(1 << 20))
    except (ValueError, OSError, HTTPException):
        body = None
    error = _as_error(body, f"the server answered {response.status} {response.reason}")
    return ConfigError(str(error)) if response.status in (401, 403, 404, 405) else error


def _as_error(body: object, otherwise: str) -> ServerError:
    """OpenAI's error shape as an exception."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return ServerError(otherwise)
    code = error.get("code")
    return ServerError(str(error.get("message") or otherwise), code if isinstance(code, str) else None)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def _unicode(text: str) -> str:
    """Bytes of the terminal that are no text, as U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
