"""`moe-serve chat`: the command, and the server it may start. The conversation stands in chat.py."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from pydantic import Field

from moe_serve.cli.chat import ChatServer, converse, make_console
from moe_serve.cli.flags import Options, help_text, parse, wants_help
from moe_serve.cli.serve import parse_serve
from moe_serve.cli.spawn import serve_command, spawned_server


class ChatOptions(Options):
    url: str = Field("http://127.0.0.1:8000", description="Address of the server.")
    api_key: str | None = Field(None, description="Key that the server asks for.")
    system: str | None = Field(None, description="System message in front of the conversation.")
    temperature: float | None = Field(None, description="Sampling temperature; the model's own if not given.")
    max_tokens: int | None = Field(None, description="Longest answer; 512 or half the context if not given.")
    spawn: bool = Field(
        False, description="Start a server of its own and end it afterwards; all options that follow are `serve`'s."
    )


def run_chat(arguments: Sequence[str]) -> int:
    arguments = list(arguments)
    cut = arguments.index("--spawn") + 1 if "--spawn" in arguments else len(arguments)
    if wants_help(arguments[:cut]):
        print(help_text(ChatOptions, "chat", "Talk to a running server, or to one of its own."))
        return 0
    options = ChatOptions(**parse(ChatOptions, arguments[:cut], "chat"))
    sampling = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    with contextlib.ExitStack() as stack:
        url, key = options.url, options.api_key
        if options.spawn:
            config = parse_serve(arguments[cut:])
            any_port = [] if "port" in config.server.model_fields_set else ["--port", "0"]
            url = stack.enter_context(spawned_server(serve_command([*arguments[cut:], *any_port])))
            key = config.server.api_key.get_secret_value() if config.server.api_key else None
        return converse(ChatServer(url, key), make_console(), system=options.system, options=sampling)
